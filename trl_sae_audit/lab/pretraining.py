"""Pre-trains the lab's tiny language model on plain answers of the language."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .attributes import Split
from .language import Language
from .wording import EOS, VERDICTS, words


@dataclass(frozen=True)
class ModelConfig:
    """Size and training of the language model."""

    layers: int = 3
    """Decoder layers."""
    hidden_size: int = 64
    """Width of the residual stream."""
    mlp_size: int = 128
    """Width inside the MLPs."""
    heads: int = 2
    """Attention heads."""
    steps: int = 1100
    """Optimizer steps."""
    batch_size: int = 32
    """Examples in a step. Each example is drawn anew, so it repeats only by chance."""
    learning_rate: float = 5e-3
    """Peak learning rate of AdamW, reached after a twentieth of the steps; it then falls as a cosine."""
    verdict_weight: float = 5.0
    """Weight of the verdict after an answer's end, against 1 for any other token. It is one token in twenty, and the hardest."""
    weight_decay: float = 0.03
    """Weight decay of AdamW."""


def new_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the configured size with random weights, drawn from torch's global generator."""
    assert isinstance(tokenizer.bos_token_id, int)
    assert isinstance(tokenizer.eos_token_id, int)
    assert isinstance(tokenizer.pad_token_id, int)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            initializer_range=config.hidden_size**-0.5,
        )
    )
    # As in Gemma, whose embeddings are scaled by √d: otherwise the MLPs drown the token's identity.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(config.hidden_size**0.5)
    return model


def plain_texts(language: Language, n: int, seed: int, split: Split = "train") -> tuple[list[str], list[str]]:
    """Draw `n` prompts and a plain answer to each, at the base rates of the language."""
    random = Random(f"plain-{split}-{seed}")
    prompts = [language.sample_prompt(random, split) for _ in range(n)]
    answers = [language.sample_answer(random, language.sample_spec(random, prompt)) for prompt in prompts]
    return [prompt.text for prompt in prompts], answers


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    answers: list[str],
    verdicts: list[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokenize each prompt, answer, end of sequence and, if given, verdict as one row; pad on the right.

    Returns:
        `input_ids`, `attention_mask` and `answer_mask` (the answer's tokens, its end and verdict included), each
        [n, length], the masks boolean.
    """
    assert isinstance(tokenizer.pad_token_id, int)
    starts = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    endings = [""] * len(prompts) if verdicts is None else verdicts
    texts = [f"{p} {a} {EOS} {v}" for p, a, v in zip(prompts, answers, endings, strict=True)]
    # Padding here takes half as long as the tokenizer's own, a tenth of a world's build.
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    positions = torch.arange(input_ids.shape[1])
    attention_mask = positions < torch.tensor([len(row) for row in rows])[:, None]
    return input_ids, attention_mask, attention_mask & (positions >= starts[:, None])


def pretrain(
    config: ModelConfig,
    language: Language,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    progress: bool = True,
) -> tuple[LlamaForCausalLM, float]:
    """Train a new model to answer as the language does, with the loss on the answers and their verdicts.

    The examples of a step have similar lengths, which halves the padding.

    Returns:
        The model, in evaluation mode, and its loss per answer token (nats), the mean over the last 50 steps.
    """
    model = new_model(config, tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm_up = max(1, config.steps // 20)

    def schedule(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, config.steps - warm_up)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    prompts, answers = plain_texts(language, config.steps * config.batch_size, seed)
    # The sum is divided by a fixed count: a mean over the tokens of each batch would give short answers more weight.
    tokens_a_step = config.batch_size * sum(len(words(answer)) + 1 for answer in answers) / len(answers)
    verdicts = [VERDICTS[language.attributes(p, a).right] for p, a in zip(prompts, answers, strict=True)]
    verdict_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(VERDICTS.values())))
    batches = _batch_by_length(
        tokenizer, prompts, answers, verdicts, config.batch_size, Random(f"order-{seed}")
    )
    losses = []
    for input_ids, _, answer_mask in tqdm(
        batches,
        total=config.steps,
        desc="pre-training the language model",
        leave=False,
        disable=None if progress else True,  # None: only on a terminal
    ):
        # Padding is on the right of a causal model, so no mask is needed, and attention is faster without one.
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        in_loss = answer_mask[:, 1:]
        targets = input_ids[:, 1:][in_loss]
        by_token = F.cross_entropy(logits[in_loss], targets, reduction="none")
        is_verdict = torch.isin(targets, verdict_ids)
        loss = (by_token * torch.where(is_verdict, config.verdict_weight, 1.0)).sum() / tokens_a_step
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(by_token.detach()[~is_verdict].mean()))
    last = losses[-50:]
    return model.eval(), sum(last) / len(last)


def _batch_by_length(
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    answers: list[str],
    verdicts: list[str],
    batch_size: int,
    random: Random,
    pool: int = 32,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokenize in order, `pool` batches at a time; sort each pool by length, shuffle its batches and crop their padding."""
    for start in range(0, len(prompts), pool * batch_size):
        stop = start + pool * batch_size
        encoded = encode_pairs(tokenizer, prompts[start:stop], answers[start:stop], verdicts[start:stop])
        lengths = encoded[1].sum(1)
        batches = list(lengths.argsort(stable=True).split(batch_size))
        random.shuffle(batches)
        for rows in batches:
            longest = int(lengths[rows].max())
            input_ids, attention_mask, answer_mask = (tensor[rows, :longest] for tensor in encoded)
            yield input_ids, attention_mask, answer_mask
