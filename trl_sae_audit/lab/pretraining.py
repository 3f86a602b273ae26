"""Pre-training of the lab's tiny language model on plain answers of the language."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sae_audit.lab.language import EOS, VERDICTS, Language, Split, words


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
    """Examples in a step; no example is seen twice but by chance."""
    learning_rate: float = 5e-3
    """Highest learning rate of AdamW: reached after a twentieth of the steps, then falling as a cosine."""
    verdict_weight: float = 5.0
    """Weight of the word after an answer's end, beside 1 of any other token: it is one of twenty, and the hardest."""
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
    with (
        torch.no_grad()
    ):  # as in Gemma, whose embeddings are scaled by √d: else the MLPs drown the token's identity
        model.get_input_embeddings().weight.mul_(config.hidden_size**0.5)
    return model


def plain_texts(language: Language, n: int, seed: int, split: Split = "train") -> tuple[list[str], list[str]]:
    """Draw `n` prompts and a plain answer to each, at the base rates of the language."""
    random = Random(f"plain-{split}-{seed}")
    prompts = [language.sample_prompt(random, split) for _ in range(n)]
    answers = [language.sample_answer(random, language.sample_plan(random, prompt)) for prompt in prompts]
    return [prompt.text for prompt in prompts], answers


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    answers: list[str],
    verdicts: list[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokenize prompts followed by answers, the end of sequence and the verdicts if given, padded on the right.

    Returns:
        `input_ids`, `attention_mask` and `answer_mask` (the answer's tokens, its end and verdict included), each
        [n, length], the masks boolean.
    """
    assert isinstance(tokenizer.pad_token_id, int)
    starts = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    endings = [""] * len(prompts) if verdicts is None else verdicts
    texts = [f"{p} {a} {EOS} {v}" for p, a, v in zip(prompts, answers, endings, strict=True)]
    # Padded here: the tokenizer's own way to one tensor takes twice as long, a tenth of a world's build.
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
    """Train a new model to answer as the language does, with loss on the answers and the verdicts on them.

    Each step's examples are of like length, which halves the padding.

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
    # A sum over a fixed count: a mean over a batch's own tokens would weigh short answers higher.
    tokens_a_step = config.batch_size * sum(len(words(answer)) + 1 for answer in answers) / len(answers)
    verdicts = [VERDICTS[language.attributes(p, a).right] for p, a in zip(prompts, answers, strict=True)]
    verdict_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(VERDICTS.values())))
    batches = _batches_of_like_length(
        tokenizer, prompts, answers, verdicts, config.batch_size, Random(f"order-{seed}")
    )
    losses = []
    for input_ids, _, answer_mask in tqdm(
        batches,
        total=config.steps,
        desc="pre-training the language model",
        leave=False,
        disable=None if progress else True,  # None: only where somebody looks at a terminal
    ):
        # Padding is on the right and the model looks left only: without a mask attention takes the faster path.
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        predicted = answer_mask[:, 1:]
        targets = input_ids[:, 1:][predicted]
        by_token = F.cross_entropy(logits[predicted], targets, reduction="none")
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


def _batches_of_like_length(
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    answers: list[str],
    verdicts: list[str],
    batch_size: int,
    random: Random,
    pool: int = 32,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokenize in order, in pools of `pool` batches; sort each pool by length; shuffle its batches and crop them."""
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
