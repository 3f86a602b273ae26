"""DPO on a shifted margin has the loss and the gradient of the shaped objective, written out in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers.reference import sequence_logps
from helpers.trainers import arguments
from helpers.worlds import make_dictionary, make_model, make_tokenizer, pairs
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import (
    AdaptivePenalty,
    AuditError,
    FeatureScorer,
    FixedPenalty,
    Flag,
    FlagSet,
    shape_preference_margin,
)
from trl_sae_audit.shaping.margin import fit_flag_weights
from trl_sae_audit.statistics import explain_preferences

FLAGS = FlagSet([Flag("tiny", 3, "flattery"), Flag("tiny", 50, "length", weight=2.0, direction="down")])
BETA = 0.3


def scorer() -> FeatureScorer:
    tokenizer = make_tokenizer()
    pairs = [(f"w{i} w{i + 1} ", f"w{i + 2} w{(7 * i) % 50} w{i + 3}") for i in range(20)]
    return FeatureScorer(make_model(tokenizer, seed=5), tokenizer, make_dictionary()).calibrate(pairs)


def by_hand(prompts: list[str], answers: list[str], coefficient: float, clip: float = math.inf) -> Tensor:
    scores = scorer().score(prompts, answers, [3, 50]).double()
    return (coefficient * (scores[:, 0] - 2 * scores[:, 1])).clamp(-clip, clip)


def dpo(directory: Path, **overrides: Any) -> Any:
    tokenizer = make_tokenizer()
    return DPOTrainer(
        make_model(tokenizer),
        make_model(tokenizer, seed=5),
        args=DPOConfig(
            **arguments(directory, max_length=64, beta=BETA, precompute_ref_log_probs=True, **overrides)
        ),
        train_dataset=pairs(24),
        processing_class=tokenizer,
    )


@pytest.mark.newest
@pytest.mark.parametrize("clip", [None, 1.0])
def test_loss_and_gradient_are_those_of_the_shaped_objective(clip: float | None, tmp_path: Path) -> None:
    coefficient = 0.7
    trainer = dpo(tmp_path)
    shaped = shape_preference_margin(
        trainer.train_dataset, scorer(), FLAGS, FixedPenalty(coefficient, clip=clip), beta=BETA
    )
    trainer.train_dataset = shaped
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()

    tokenizer = make_tokenizer()
    policy, reference = make_model(tokenizer).double(), make_model(tokenizer, seed=5).double()
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    done = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["completion_mask"], strict=True)
    ]
    prompts = [
        tokenizer.decode(row[: len(row) - len(answer)]) for row, answer in zip(rows, done, strict=True)
    ]
    answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in done]
    off = by_hand(prompts, answers, coefficient, clip or math.inf)
    chosen, rejected = sequence_logps(policy, inputs).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = sequence_logps(reference, inputs).chunk(2)
    off_chosen, off_rejected = off.chunk(2)
    margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected)) + (off_chosen - off_rejected)
    expected = -F.logsigmoid(margin).mean()
    expected.backward()

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    unshaped = -F.logsigmoid(margin - off_chosen + off_rejected).mean()
    assert abs(float((expected - unshaped).detach())) > 1e-3
    for (name, ours), (_, theirs) in zip(
        trainer.model.named_parameters(), policy.named_parameters(), strict=True
    ):
        assert theirs.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert float(error) < 1e-4, name


@pytest.mark.newest
def test_preferences_that_the_penalty_explains_wholly_teach_nothing(tmp_path: Path) -> None:
    """Of four judges three prefer A, the one with more of the feature: at λ(s_A − s_B) = log 3 that is all there is to
    know, and the loss of a policy that is the reference has no slope. (The other sign would have it learn A twice.)"""
    tokenizer, reads = make_tokenizer(), scorer()
    prompt, one, other = "w1 w2 ", "w3 w4 w5", "w40 w41"
    flags = FlagSet([Flag("tiny", 3)])
    gap = float(reads.score([prompt], [one], [3]) - reads.score([prompt], [other], [3]))
    first, second = (one, other) if gap > 0 else (other, one)
    rows = [{"prompt": prompt, "chosen": first, "rejected": second}] * 3
    rows.append({"prompt": prompt, "chosen": second, "rejected": first})
    slopes = {}
    for name, coefficient in (("explained", math.log(3) / abs(gap)), ("plain", 0.0)):
        args = DPOConfig(
            **arguments(
                tmp_path / name,
                max_length=64,
                beta=BETA,
                precompute_ref_log_probs=True,
                per_device_train_batch_size=4,
            )
        )
        trainer = DPOTrainer(
            make_model(tokenizer),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train_dataset = shape_preference_margin(
            trainer.train_dataset, reads, flags, coefficient, beta=BETA
        )
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).backward()
        slopes[name] = max(float(parameter.grad.abs().max()) for parameter in trainer.model.parameters())
    assert slopes["explained"] < 1e-4 * slopes["plain"]


def test_the_fit_is_the_log_odds_of_a_feature_that_is_there_or_not() -> None:
    gaps = torch.tensor([2.0] * 300 + [-2.0] * 100 + [0.0] * 50, dtype=torch.float64)
    noise = torch.randn(450, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = explain_preferences(torch.stack([gaps, -gaps, torch.zeros_like(gaps), 1e-3 * gaps + noise], 1))
    assert found[0] == pytest.approx(math.log(3) / 2, rel=0.05)
    assert found[1] == found[2] == 0
    alone = explain_preferences(gaps[:, None])
    assert alone[0] == pytest.approx(math.log(3) / 2, rel=2e-3), "the prior is weak"
    assert explain_preferences(1000 * gaps[:, None])[0] == pytest.approx(float(alone[0]) / 1000, rel=1e-4)
    assert 0 < explain_preferences(gaps[:300, None] + noise[:300, None] / 10)[0] < 50, (
        "and finite where all agree"
    )


def test_without_a_coefficient_the_fitted_one_is_used_and_leaves_no_slope() -> None:
    reads, dataset = scorer(), with_references(200)
    fitted = fit_flag_weights(dataset, reads, FLAGS)
    gaps = reads.score(dataset["prompt"][:], dataset["chosen"][:], [3, 50])
    gaps = (gaps - reads.score(dataset["prompt"][:], dataset["rejected"][:], [3, 50])).double()
    gaps[:, 1] *= -1  # its flag is of direction "down"
    assert {flag.feature for flag in fitted} == {3, 50} - {
        feature for column, feature in enumerate((3, 50)) if explain_preferences(gaps)[column] == 0
    }
    shaped = shape_preference_margin(dataset, reads, FLAGS, beta=BETA)
    off = torch.tensor(shaped["shaping_chosen"][:]) - torch.tensor(shaped["shaping_rejected"][:])
    slope = (gaps * torch.sigmoid(-off.double())[:, None]).mean(0)
    before = 0.5 * gaps.mean(0)
    for column, feature in enumerate((3, 50)):
        if feature in {flag.feature for flag in fitted}:
            assert abs(float(slope[column])) < 0.02 * abs(float(before[column]))
        else:
            assert float(before[column]) < 0, "the preferences are against it already"


@pytest.mark.newest
def test_a_trainer_trains_on_it_and_zero_is_the_plain_run(tmp_path: Path) -> None:
    weights, reads = [], scorer()  # made first: it seeds the generator that shuffles
    for name, coefficient in (("plain", None), ("zero", 0.0), ("shaped", 2.0)):
        trainer = dpo(tmp_path / name)
        if coefficient is not None:
            trainer.train_dataset = shape_preference_margin(
                trainer.train_dataset, reads, FLAGS, coefficient, beta=BETA
            )
        trainer.train()
        weights.append(trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def with_references(rows: int = 5) -> Dataset:
    values = [float(i) for i in range(rows)]
    return (
        pairs(rows)
        .add_column("ref_chosen_logps", values)  # type: ignore[call-arg]
        .add_column("ref_rejected_logps", values)  # type: ignore[call-arg]
    )


def test_texts_are_scored_where_there_are_no_token_ids() -> None:
    dataset = with_references()
    shaped = shape_preference_margin(dataset, scorer(), FLAGS, 0.5, beta=BETA)
    for side in ("chosen", "rejected"):
        off = by_hand(dataset["prompt"][:], dataset[side][:], 0.5)
        assert shaped[f"shaping_{side}"][:] == pytest.approx(off.tolist(), abs=1e-5)
        moved = torch.tensor(shaped[f"ref_{side}_logps"][:]) - torch.tensor(dataset[f"ref_{side}_logps"][:])
        assert moved.tolist() == pytest.approx((-off / BETA).tolist(), abs=1e-4)


def test_token_ids_of_another_tokenizer_are_decoded() -> None:
    tokenizer = make_tokenizer()
    dataset = with_references()
    ids = {
        f"{name}_ids": [tokenizer(text)["input_ids"] for text in dataset[name][:]]
        for name in ("prompt", "chosen", "rejected")
    }
    for name, rows in ids.items():
        dataset = dataset.add_column(name, [[token + 100 for token in row] for row in rows])  # type: ignore[call-arg]

    class Shifted:
        """A tokenizer whose numbers begin at 100."""

        def get_vocab(self) -> dict[str, int]:
            return {word: number + 100 for word, number in tokenizer.get_vocab().items()}

        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return tokenizer.batch_decode([[token - 100 for token in row] for row in rows])

    other: Any = Shifted()
    shaped = shape_preference_margin(dataset, scorer(), FLAGS, 0.5, beta=BETA, tokenizer=other)
    expected = shape_preference_margin(with_references(), scorer(), FLAGS, 0.5, beta=BETA)
    assert shaped["shaping_chosen"][:] == pytest.approx(expected["shaping_chosen"][:], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dataset": [{"prompt": "w1"}]}, "datasets.Dataset"),
        ({"dataset": pairs(3)}, "precompute_ref_log_probs=True"),
        ({"dataset": with_references().remove_columns("prompt")}, "neither prompt"),
        ({"penalty": AdaptivePenalty()}, "DPO samples none"),
        ({"penalty": FixedPenalty(1, warmup=3)}, "no warm-up"),
        ({"penalty": FixedPenalty(1, relative=True)}, "no warm-up"),
        ({"penalty": -1.0}, "penalty below 0"),
        ({"beta": 0.0}, "beta is 0"),
        ({"flags": [Flag("another", 1)]}, "No flag is of dictionary"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {
        "dataset": with_references(),
        "scorer": scorer(),
        "flags": FLAGS,
        "penalty": 0.5,
        "beta": BETA,
        **change,
    }
    with pytest.raises(AuditError, match=match):
        shape_preference_margin(**given)


def test_a_dataset_is_shifted_once() -> None:
    shaped = shape_preference_margin(with_references(), scorer(), FLAGS, 0.5, beta=BETA)
    with pytest.raises(AuditError, match="shifted already"):
        shape_preference_margin(shaped, scorer(), FLAGS, 0.5, beta=BETA)
    broken = with_references(2).remove_columns("ref_chosen_logps")
    broken = broken.add_column("ref_chosen_logps", [math.nan, 1.0])  # type: ignore[call-arg]
    with pytest.raises(AuditError, match="not finite"):
        shape_preference_margin(broken, scorer(), FLAGS, 0.5, beta=BETA)
