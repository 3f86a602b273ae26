"""Small models in float64, and lookaheads of them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from sae_lens import SAE
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.worlds import D_MODEL, pairs
from trl_sae_audit import FeatureDictionary
from trl_sae_audit.audit.lookahead.generations import Generations
from trl_sae_audit.audit.lookahead.lookahead import Lookahead
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.models.sampling import Sampling, sample_ids
from trl_sae_audit.saes.compatibility import find_hook_point
from trl_sae_audit.saes.loading import SaeLensEncoder

HOOK = "transformer.h.1"


RULES = {
    "adamw": UpdateRule("adamw", 1e-3, weight_decay=0.1, max_grad_norm=0.5),
    "adamw without decay": UpdateRule("adamw", 1e-3),
    "sgd": UpdateRule("sgd", 1e-2, max_grad_norm=None),
}


def make_gpt2(tokenizer, seed=0):
    """LayerNorm stays in float64; Llama's RMSNorm computes in float32 whatever the weights are."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=D_MODEL, n_layer=3, n_head=4, pad_token_id=0
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


def with_lora(model):
    torch.manual_seed(1)
    adapters = LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights=False)
    return get_peft_model(model, adapters).double().eval()


def directions(seed=2):
    raw = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return FeatureDictionary(raw, HOOK, "raw")


def topk():
    torch.manual_seed(4)
    config = {
        "architecture": "topk",
        "d_in": D_MODEL,
        "d_sae": 40,
        "k": 5,
        "dtype": "float64",
        "device": "cpu",
    }
    sae = SAE.from_dict(config | {"metadata": {"hook_name": HOOK}})
    return FeatureDictionary(sae.W_dec, HOOK, "topk", encoder=SaeLensEncoder(sae))


def look(
    model, tokenizer, dictionary, rule, reference=None, method="auto", n=6, borders=(), attention_sinks=False
):
    loss = PreferenceLoss(tokenizer)
    examples = loss.tokenize(list(enumerate(pairs(n))))
    probe = loss.tokenize(list(enumerate(pairs(4, seed=9))))
    return Lookahead(
        model,
        find_hook_point(dictionary, model),
        dictionary,
        loss,
        rule,
        lambda: [examples[:4], examples[4:]],
        lambda: [probe[:3], probe[3:]],
        reference=reference,
        method=method,
        borders=borders,
        attention_sinks=attention_sinks,
    )


def mean_loss(model, tokenizer, reference, n=6, rows=slice(None)):
    """DPO's sigmoid loss written out, in float64."""
    loss = PreferenceLoss(tokenizer)
    examples = loss.tokenize(list(enumerate(pairs(n))))[rows]
    batch, n = loss.collate(examples), len(examples)

    def sums(policy):
        logits = policy(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (log_probs * batch["completion_mask"][:, 1:]).sum(1)

    policy = sums(model)
    with torch.no_grad():
        frozen = sums(reference) if reference is not None else policy.detach()
    ratios = policy - frozen
    return -torch.nn.functional.logsigmoid(0.1 * (ratios[:n] - ratios[n:])).mean()


def moved_by(model, step, factor):
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in moved.named_parameters():
            if name in step:
                value += factor * step[name]
    return moved


def answers_of(model, tokenizer, prompts, n, length):
    sampled = sample_ids(model, tokenizer, prompts, Sampling(n, length), batch_size=512)
    return list(Generations(prompts, sampled).batches(tokenizer, 512, torch.device("cpu")))


def centred(increments):
    """Those of each answer, less the mean over the answers that have a token at the same place."""
    longest = max(map(len, increments))
    means = [
        torch.stack([each[place] for each in increments if place < len(each)]).mean()
        for place in range(longest)
    ]
    return [each - torch.stack(means[: len(each)]) for each in increments]
