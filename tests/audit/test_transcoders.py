"""Audits with a transcoder, against float64 autograd at the MLP's output and sae-lens' encoder at the MLP's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.audits import audited, by_feature
from helpers.lookaheads import RULES, look, make_gpt2, moved_by
from helpers.transcoders import make_transcoder, watched
from helpers.worlds import D_MODEL, made, make_config, pairs
from sae_lens import SAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from trl_sae_audit import Audit, load_dictionary
from trl_sae_audit.audit.lookahead.config import LookaheadConfig
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.models.sampling import Sampling

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

GAINLESS = "blocks.1.ln2.hook_normalized"
LAYER = "model.layers.1"


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def gemma(tokenizer: Any) -> Gemma2ForCausalLM:
    return made(Gemma2ForCausalLM, make_config(tokenizer, Gemma2Config, head_dim=8), 0).eval()


@pytest.mark.parametrize("attention_sinks", [False, True])
def test_scores_and_activations(attention_sinks: bool, tokenizer: Any, tmp_path: Path) -> None:
    data = pairs(6)
    transcoder = make_transcoder("jumprelu_skip_transcoder", GAINLESS)
    dictionary = load_dictionary(transcoder, transcoder=True, name="ours")
    audit = audited(
        gemma(tokenizer), tokenizer, data, dictionary, output_dir=tmp_path, attention_sinks=attention_sinks
    )
    found = by_feature(audit)
    model = gemma(tokenizer).double()
    decoder = transcoder.W_dec.detach().double()
    unit = F.normalize(decoder, dim=1)
    loss = PreferenceLoss(tokenizer)
    totals: dict[str, Tensor | float] = dict.fromkeys(
        ("attribution", "effect", "chosen", "rejected", "moved"), 0.0
    )
    with watched(model, f"{LAYER}.pre_feedforward_layernorm", f"{LAYER}.post_feedforward_layernorm") as seen:
        for example in loss.tokenize(list(enumerate(data))):
            batch = loss.collate([example])
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            chosen, rejected = (log_probs * batch["completion_mask"][:, 1:]).sum(1)
            # the policy is its own reference, so that the margin is 0 and only its gradient counts
            margin = (chosen - chosen.detach()) - (rejected - rejected.detach())
            (-F.logsigmoid(0.1 * margin)).backward()
            written, gradient, before = seen["written"].detach(), seen["written"].grad, seen["read"]
            read = before * (before.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
            acts = transcoder.encode(read.float()).detach().double()
            answer = batch["completion_mask"].bool()
            counted = F.pad(answer[:, 1:], (0, 1))
            totals["attribution"] += -(gradient @ unit.T).sum((0, 1)) / len(data)
            totals["effect"] += -(acts * (gradient @ decoder.T))[counted].sum(0) / len(data)
            for row, side in enumerate(("chosen", "rejected")):
                totals[side] += acts[row][answer[row]].mean(0) / len(data)
            means = [written[row][answer[row]].mean(0) for row in (0, 1)]
            totals["moved"] += (means[0] - means[1]) @ unit.T / len(data)
    assert relative(found["attribution"], totals["attribution"]) <= 1e-5
    assert relative(found["activation_attribution"], totals["effect"]) <= 1e-5
    assert relative(found["projection_difference"], totals["moved"]) <= 1e-5
    assert relative(found["mean_activation_difference"], totals["chosen"] - totals["rejected"]) <= 1e-5
    assert Audit.load(tmp_path).dictionary.reads == GAINLESS


@torch.no_grad()
def test_the_lookahead_predicts_activations_at_the_mlps_input(tokenizer: Any) -> None:
    """The derivative along a real optimizer's step, of what sae-lens' encoder says of the norm's output without its gain."""
    transcoder = make_transcoder("topk_transcoder", GAINLESS).double()
    dictionary = load_dictionary(make_transcoder("topk_transcoder", GAINLESS), transcoder=True)
    transcoder.dtype = torch.float64
    dictionary.encoder.sae = transcoder
    model = make_gpt2(tokenizer)
    ahead = look(model, tokenizer, dictionary, RULES["sgd"])
    found = ahead.predicted_change()
    step = ahead.step()
    loss = PreferenceLoss(tokenizer)

    def mean_activation(moved: Any) -> Tensor:
        total, tokens = torch.zeros(1), 0
        with watched(moved, "transformer.h.1.ln_2", "transformer.h.1.mlp") as seen:
            for example in loss.tokenize(list(enumerate(pairs(4, seed=9)))):
                batch = loss.collate([example])
                moved(batch["input_ids"], attention_mask=batch["attention_mask"])
                read = F.layer_norm(seen["read"], (D_MODEL,), eps=moved.config.layer_norm_epsilon)
                answer = batch["completion_mask"].bool()
                total, tokens = total + transcoder.encode(read[answer]).sum(0), tokens + int(answer.sum())
        return total / tokens

    h = 1e-4
    ends = [mean_activation(moved_by(model, step, sign * h)) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * h)
    assert expected.abs().max() > 0
    assert relative(found, expected) < 1e-4


def test_effects_in_generations_are_those_of_an_sae_at_the_mlps_input(model: Any, tokenizer: Any) -> None:
    """By the same encoder there, on the same answers; only the attribution is another place's."""
    transcoder = make_transcoder()
    metadata = SAEMetadata(hook_name="model.layers.1.post_attention_layernorm")
    settings = {"d_in": D_MODEL, "d_sae": transcoder.cfg.d_sae, "apply_b_dec_to_input": False}
    sae = SAE.from_dict(JumpReLUSAEConfig(**settings, metadata=metadata).to_dict())
    sae.load_state_dict(transcoder.state_dict())
    look_ahead = LookaheadConfig(pairs(4, seed=9), sampling=Sampling(2, 4))
    ours, theirs = (
        by_feature(audited(model, tokenizer, pairs(12), dictionary, lookahead=look_ahead))
        for dictionary in (load_dictionary(transcoder, transcoder=True), load_dictionary(sae))
    )
    for column in ("effect_size", "predicted_change", "selection", "disparity"):
        assert theirs[column].abs().max() > 0
        assert relative(ours[column], theirs[column]) <= 1e-4
    assert relative(ours["attribution"], theirs["attribution"]) > 0.1
