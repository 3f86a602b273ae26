"""An audit of answers with attention sinks, against sums over plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.audits import audited, by_feature
from helpers.selection import plant_sinks, sinks_of
from helpers.worlds import D_SAE, make_model, make_sae_dictionary, pairs

from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.cli.verify import counts_attention_sinks

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

BETA = 0.1


@pytest.mark.parametrize("counted", [False, True])
def test_no_feature_is_active_at_an_attention_sink(
    counted: bool, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, dictionary, data = make_model(tokenizer), make_sae_dictionary(), pairs(8)
    plant_sinks(model)
    with caplog.at_level("INFO", "trl_sae_audit"):
        audit = audited(model, tokenizer, data, dictionary, output_dir=tmp_path, attention_sinks=counted)
    found = by_feature(audit)
    loss, unit = PreferenceLoss(tokenizer), dictionary.directions.double()
    model = model.double()
    sums = {
        name: np.zeros(D_SAE) for name in ("attribution", "effect", "mean", "share", "largest", "selected")
    }
    active, sinks = [], 0
    for example in loss.tokenize(list(enumerate(data))):
        batch = loss.collate([example])
        answer = batch["completion_mask"].bool()
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        hidden = output.hidden_states[2]
        log_probs = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = (log_probs * answer[:, 1:]).sum(1)
        # the policy is its own reference, so that the margin is 0 and only its gradient counts
        margin = (chosen - chosen.detach()) - (rejected - rejected.detach())
        (gradient,) = torch.autograd.grad(-F.logsigmoid(BETA * margin), hidden)
        sums["attribution"] -= (gradient @ unit.T).sum((0, 1)).numpy() / len(data)
        for row, sign in enumerate((1, -1)):
            huge = torch.zeros_like(answer[row])
            huge[answer[row]] = sinks_of(hidden[row][answer[row]])
            # the token before the answer predicts its first, and is measured by the answer's median
            norms = hidden[row].detach().norm(dim=-1)
            first = int(answer[row].nonzero()[0])
            huge[first - 1] = (
                norms[first - 1] > 10 * norms[answer[row]].sort().values[(int(answer[row].sum()) - 1) // 2]
            )
            sinks += int((huge & answer[row]).sum())
            here = dictionary.encode(hidden[row].detach().float()).double()
            here = (here * (counted | ~huge)[:, None]).numpy()
            own = answer[row].numpy()
            predicting = np.roll(own, -1)
            effects = here * (gradient[row] @ unit.T).numpy() * dictionary.norms.double().numpy()
            sums["effect"] -= effects[predicting].sum(0) / len(data)
            sums["mean"] += sign * here[own].mean(0) / len(data)
            sums["share"] += sign * (here[own] != 0).any(0) / len(data)
            sums["largest"] += sign * here[own].max(0) / len(data)
            sums["selected"] += sign * BETA / 2 * here[own].sum(0)
            active.append((sign * BETA / 2 * own.sum(), here[own]))
    everywhere = np.concatenate([values for _, values in active])
    weight = sum(each for each, _ in active)
    sums["selected"] = (sums["selected"] - weight * everywhere.mean(0)) / len(data)
    for column, name in (
        ("attribution", "attribution"),
        ("activation_attribution", "effect"),
        ("mean_activation_difference", "mean"),
        ("disparity", "share"),
        ("max_activation_difference", "largest"),
        ("selection", "selected"),
    ):
        expected = sums[name]
        error = np.abs(np.asarray(found[column]) - expected).max()
        assert error <= 1e-4 * np.abs(expected).max(), column
    assert sinks
    told = [entry.getMessage() for entry in caplog.records if "attention sinks" in entry.getMessage()]
    assert [line.split()[0] for line in told] == ([] if counted else [str(sinks)])
    assert counts_attention_sinks(audit) == counted  # so that `verify` measures likewise
