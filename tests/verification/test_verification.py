"""Predicted against measured change: each number against an independent one, and the command as users meet it."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.selection import plant_sinks, sinks_of
from helpers.worlds import (
    make_dictionary,
    make_model,
    pairs,
    prompts,
    save_model,
    save_sae,
)
from scipy import stats

from trl_sae_audit import (
    AuditError,
    LookaheadConfig,
    audit_preferences,
    load_dictionary,
    measured_change,
    predictors_of,
    sampled_change,
    verify,
)
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.cli.main import main
from trl_sae_audit.models.sampling import Sampling, sample_ids
from trl_sae_audit.verification.comparison import compare
from trl_sae_audit.verification.measured import AnswerActivations, MeasuredChange


@pytest.fixture(scope="module")
def models(tokenizer):
    """A model, and the same after its weights moved a little."""
    before, after = make_model(tokenizer), make_model(tokenizer)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return before, after


def fake_change(units=40, features=30, noise=0.3, seed=0):
    generator = np.random.default_rng(seed)
    truth = generator.standard_normal(features)
    tokens = generator.integers(3, 9, units)
    before = generator.standard_normal((units, features))
    after = before + tokens[:, None] * (truth + noise * generator.standard_normal((units, features)))
    names = tuple(map(str, range(units)))
    seen = np.arange(features) > 0  # feature 0 was never active
    halves = [AnswerActivations(sums.astype(np.float32), tokens, names, seen) for sums in (before, after)]
    return truth, MeasuredChange("on given text", *halves)


class TestStatistics:
    def test_against_scipy(self):
        generator = np.random.default_rng(1)
        scores, measured = generator.standard_normal((3, 50)), generator.standard_normal((2, 50))
        scores[0] += measured[0]
        scores[1] = np.round(scores[1])  # ties
        found = compare(scores, measured, 7)
        for row, score in enumerate(scores):
            for draw, change in enumerate(measured):
                line = stats.linregress(score, change)
                assert found["r2"][row, draw] == pytest.approx(max(line.rvalue, 0) ** 2)
                assert found["slope"][row, draw] == pytest.approx(line.slope)
                assert found["spearman"][row, draw] == pytest.approx(stats.spearmanr(score, change).statistic)
                top = [set(np.argsort(-np.abs(values))[:7]) for values in (scores[2], change)]
                right = [f for f in top[0] & top[1] if scores[2][f] * change[f] > 0]
                assert found["precision"][2, draw] == pytest.approx(len(right) / 7)

    def test_sign_counts_and_scale_does_not(self):
        truth, measured = fake_change()
        found = verify({"right": 1e-9 * truth, "wrong": -truth}, measured, draws=50).statistics
        assert found["right"]["r2"].estimate > 0.95
        assert found["right"]["precision"].estimate > 0.9
        assert found["wrong"]["r2"].estimate == 0
        assert found["wrong"]["spearman"].estimate < -0.9
        assert found["wrong"]["precision"].estimate == 0

    def test_resamples_are_whole_prompts(self):
        """A resample's change is that of a sample in which prompts stand as often as they were drawn."""
        _, measured = fake_change(units=6)
        drawn = [0, 0, 3, 5, 5, 5]
        counts = np.bincount(drawn, minlength=6)[None]
        again = MeasuredChange(
            "on given text",
            *(
                AnswerActivations(half.sums[drawn], half.tokens[drawn], ("",) * 6, half.active)
                for half in (measured.before, measured.after)
            ),
        )
        np.testing.assert_allclose(measured.resampled(counts)[0], again.change, rtol=1e-4, atol=1e-6)

    def test_intervals_and_ceiling_know_the_noise(self):
        """Over fresh draws of the prompts, R² varies as the interval of one draw says, and the ceiling is what the truth
        itself scores."""
        truth, _ = fake_change()
        scored, spans, ceilings = [], [], []
        for seed in range(30):
            generator = np.random.default_rng(seed)
            tokens = np.full(40, 5)
            sums = tokens[:, None] * (truth + 4 * generator.standard_normal((40, 30)))
            names = tuple(map(str, range(40)))
            zero = AnswerActivations(np.zeros((40, 30), np.float32), tokens, names, np.ones(30, bool))
            after = AnswerActivations(sums.astype(np.float32), tokens, names, np.ones(30, bool))
            found = verify({"truth": truth}, MeasuredChange("in generations", zero, after), draws=200)
            r2 = found.statistics["truth"]["r2"]
            scored.append(r2.estimate)
            spans.append(r2.high - r2.low)
            ceilings.append(found.ceiling)
            assert r2.contains(r2.estimate)
        assert np.mean(spans) == pytest.approx(4 * np.std(scored), rel=0.4)
        assert np.mean(ceilings) == pytest.approx(np.mean(scored), abs=0.05)

    def test_lead_is_paired(self):
        truth, measured = fake_change(noise=3)
        found = verify({"a": truth, "b": truth * 2}, measured, draws=50)
        lead = found.lead("a", "b")
        assert (lead.low, lead.estimate, lead.high) == pytest.approx((0, 0, 0), abs=1e-9)
        assert found.lead("a", "random").low > 0

    def test_features_never_active_are_left_out(self):
        truth, measured = fake_change()
        found = verify({"a": truth}, measured, draws=10)
        assert found.features["feature"].tolist() == list(range(1, 30))

    def test_errors(self):
        truth, measured = fake_change()
        with pytest.raises(AuditError, match="has shape"):
            verify({"a": truth[:-1]}, measured)
        with pytest.raises(AuditError, match="not finite at feature 2"):
            verify({"a": np.where(np.arange(30) == 2, np.nan, truth)}, measured)
        with pytest.raises(AuditError, match="no change to predict"):
            verify({"a": truth}, MeasuredChange("in generations", measured.before, measured.before))
        tokens, active = measured.before.tokens, measured.before.active
        other = AnswerActivations(measured.before.sums, tokens, ("x",) * 40, active)
        with pytest.raises(AuditError, match="other prompts"):
            MeasuredChange("in generations", other, measured.after)


class TestMeasuredChange:
    def test_teacher_forced_is_the_mean_over_answer_tokens(self, tokenizer, models):
        dictionary, data = make_dictionary(), pairs(7)
        found = measured_change(*models, tokenizer, dictionary, data, batch_size=3)
        means = []
        for model in models:
            rows = []
            for row in data:
                for answer in (row["chosen"], row["rejected"]):
                    begun = tokenizer(row["prompt"])["input_ids"]
                    ids = begun + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
                    with torch.no_grad():
                        output = model(torch.tensor([ids]), output_hidden_states=True)
                    rows.append(output.hidden_states[2][0, len(begun) :])
            means.append((torch.cat(rows) @ dictionary.directions.T).mean(0).numpy())
        np.testing.assert_allclose(found.change, means[1] - means[0], rtol=1e-3, atol=1e-5)

    def test_rows_of_prompt_and_completion(self, tokenizer, models):
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(4)]
        rows += [{"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs(4)]
        single = measured_change(*models, tokenizer, make_dictionary(), rows)
        paired = measured_change(*models, tokenizer, make_dictionary(), pairs(4))
        assert len(single) == len(paired) == 4
        np.testing.assert_allclose(single.change, paired.change, rtol=1e-3, atol=1e-5)

    def test_sampled_answers_are_read_by_the_model_before(self, tokenizer, models):
        before, after = models
        dictionary, sampling = make_dictionary(), Sampling(2, max_new_tokens=6, seed=3)
        asked = prompts(9)
        found = sampled_change(before, after, tokenizer, dictionary, asked, sampling=sampling, batch_size=5)
        assert len(found) == 9
        begun = [tokenizer(row["prompt"])["input_ids"] for row in asked]
        total, tokens = np.zeros(dictionary.d_sae), 0
        for start, answers in zip(
            begun, sample_ids(after, tokenizer, begun, sampling, batch_size=5), strict=True
        ):
            for answer in answers:
                with torch.no_grad():
                    output = before(torch.tensor([start + answer]), output_hidden_states=True)
                total += (output.hidden_states[2][0, len(start) :] @ dictionary.directions.T).sum(0).numpy()
                tokens += len(answer)
        np.testing.assert_allclose(found.after.mean(), total / tokens, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("counted", [False, True])
    def test_no_feature_is_active_at_an_attention_sink(self, tokenizer, models, counted):
        """On given text and in generations, as in what predicts them."""
        dictionary, data = make_dictionary(), pairs(7)
        before, after = (copy.deepcopy(model) for model in models)
        for model in (before, after):
            plant_sinks(model)
        found = measured_change(before, after, tokenizer, dictionary, data, attention_sinks=counted)
        answers = [
            (
                tokenizer(row["prompt"])["input_ids"],
                tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id],
            )
            for row in data
            for side in ("chosen", "rejected")
        ]
        means = [self.mean(model, dictionary, answers, counted) for model in (before, after)]
        np.testing.assert_allclose(found.change, means[1] - means[0], rtol=1e-3, atol=1e-4)
        assert np.abs(means[0] - self.mean(before, dictionary, answers, not counted)).max() > 1
        asked, sampling = prompts(5), Sampling(2, max_new_tokens=6, seed=3)
        options = {"sampling": sampling, "batch_size": 64, "attention_sinks": counted}
        found = sampled_change(before, after, tokenizer, dictionary, asked, **options)
        begun = [tokenizer(row["prompt"])["input_ids"] for row in asked]
        sampled = sample_ids(after, tokenizer, begun, sampling, batch_size=64)
        answers = [(start, each) for start, several in zip(begun, sampled, strict=True) for each in several]
        expected = self.mean(before, dictionary, answers, counted)
        np.testing.assert_allclose(found.after.mean(), expected, rtol=1e-3, atol=1e-3)

    @staticmethod
    @torch.no_grad()
    def mean(model, dictionary, answers, counted):
        """Of every feature over the answers' tokens, one answer at a time."""
        total, tokens = 0.0, 0
        for start, answer in answers:
            output = model(torch.tensor([[*start, *answer]]), output_hidden_states=True)
            states = output.hidden_states[2][0, len(start) :]
            kept = counted | ~sinks_of(states)
            total = total + (states[kept] @ dictionary.directions.T).sum(0).numpy()
            tokens += len(answer)
        return total / tokens

    def test_both_models_sample_with_the_same_luck(self, tokenizer, models):
        begun = [tokenizer(row["prompt"])["input_ids"] for row in prompts(12)]
        sampling = Sampling(2, max_new_tokens=8)
        one, again = (sample_ids(models[0], tokenizer, begun, sampling, batch_size=7) for _ in range(2))
        assert one == again
        assert one[0][0] != one[0][1]
        other = sample_ids(models[0], tokenizer, begun, Sampling(2, 8, seed=1), batch_size=7)
        assert one != other
        slightly = make_model(tokenizer)
        with torch.no_grad():
            slightly.lm_head.weight *= 1.001
        near = sample_ids(slightly, tokenizer, begun, sampling, batch_size=7)
        same = np.mean([a == b for x, y in zip(one, near, strict=True) for a, b in zip(x, y, strict=True)])
        assert same > 0.8

    def test_padding_does_not_change_what_is_sampled(self, tokenizer, models):
        """Nearly greedy, so that luck does not matter: the likeliest tokens, as without a batch."""
        begun = [tokenizer(row["prompt"])["input_ids"] for row in prompts(6)]
        cold = Sampling(1, max_new_tokens=5, temperature=1e-4)
        for start, (answer,) in zip(
            begun, sample_ids(models[0], tokenizer, begun, cold, batch_size=6), strict=True
        ):
            ids = list(start)
            for token in answer:
                with torch.no_grad():
                    assert int(models[0](torch.tensor([ids])).logits[0, -1].argmax()) == token
                ids.append(token)

    def test_bad_rows_are_named(self, tokenizer, models):
        rows = [*pairs(1), {"prompt": "w1", "chosen": " ", "rejected": "w2"}]
        with pytest.raises(AuditError, match="Row 1 of the responses has an empty 'chosen'"):
            measured_change(*models, tokenizer, make_dictionary(), rows)
        with pytest.raises(AuditError, match="give pairs with 'chosen'"):
            measured_change(*models, tokenizer, make_dictionary(), prompts(2))
        with pytest.raises(AuditError, match="no responses"):
            measured_change(*models, tokenizer, make_dictionary(), [])
        with pytest.raises(AuditError, match="row 0 has no 'prompt'"):
            sampled_change(*models, tokenizer, make_dictionary(), [{"text": "w1"}])


def test_a_lookahead_predicts_its_own_step(tokenizer, models):
    """Through an audit: a real step by the optimizer's rule changes the probe's activations as was predicted, slope 1."""
    before, _ = models
    data, probe, dictionary = pairs(8), pairs(6, seed=7), make_dictionary()
    rule = UpdateRule("sgd", 1e-3, max_grad_norm=None)
    lookahead = LookaheadConfig(probe, optimizer=rule, sampling=None)
    audit = audit_preferences(before, tokenizer, data, dictionary, lookahead=lookahead, progress=False)
    after = make_model(tokenizer)
    with torch.no_grad():
        for name, value in after.named_parameters():
            value += audit._lookahead.ahead.step()[name]
    measured = measured_change(before, after, tokenizer, dictionary, probe)
    found = verify(predictors_of(audit), measured, draws=50)
    assert found.best == "predicted_change"
    assert found.statistics["predicted_change"]["r2"].estimate > 0.99
    assert found.statistics["predicted_change"]["slope"].estimate == pytest.approx(1, abs=0.05)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tokenizer, models):
    root = tmp_path_factory.mktemp("verify")
    for name, model in zip(("before", "after"), models, strict=True):
        save_model(model, tokenizer, root / name)
    save_sae(root / "sae")
    save_sae(root / "other_sae", seed=1)
    pairs(10, seed=4).to_json(root / "held_out.jsonl")
    audit_preferences(
        models[0],
        tokenizer,
        pairs(12),
        load_dictionary(root / "sae"),
        output_dir=root / "audit",
        lookahead=None,
        progress=False,
    )
    return root


class TestCommand:
    def command(self, compared, *more):
        paths = {"--model_name_or_path": "before", "--after": "after", "--dataset": "held_out.jsonl"}
        options = [part for name, path in paths.items() for part in (name, str(compared / path))]
        options += ["--device", "cpu", "--max_new_tokens", "6", "--draws", "20", *more]
        return ["verify", str(compared / "audit"), *options]

    def test_table_and_files(self, compared, capsys, tmp_path):
        out = tmp_path / "out"
        assert main(self.command(compared, "--sae", str(compared / "sae"), "--output_dir", str(out))) == 0
        shown = capsys.readouterr().out
        for part in ("on given text", "in generations", "attribution", "disparity", "random", "R²"):
            assert part in shown
        assert max(len(line) for line in shown.splitlines() if "[" in line) <= 80
        written = json.loads((out / "manifest.json").read_text())
        assert set(written["targets"]) == {"on given text", "in generations"}
        scores = written["targets"]["in generations"]["scores"]
        assert {"attribution", "activation_attribution", "disparity", "random"} <= set(scores)
        table = pd.read_parquet(out / "verify.parquet")
        part = table[table["target"] == "in generations"]
        r = stats.linregress(part["disparity"], part["measured"]).rvalue
        assert scores["disparity"]["r2"][0] == pytest.approx(max(r, 0) ** 2)
        assert main(["verify", "--config", str(out), "--output_dir", str(tmp_path / "again")]) == 0
        for file in ("manifest.json", "verify.parquet"):
            assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes()

    def test_json(self, compared, capsys):
        assert (
            main(self.command(compared, "--sae", str(compared / "sae"), "--json", "true", "--samples", "0"))
            == 0
        )
        assert set(json.loads(capsys.readouterr().out)["targets"]) == {"on given text"}

    def test_the_same_answers_are_said_to_be(self, compared, tokenizer, models, capsys):
        after = copy.deepcopy(models[0])
        with torch.no_grad():
            after.model.layers[0].mlp.down_proj.weight *= 1.00001
        save_model(after, tokenizer, compared / "hardly-trained")
        options = ["--sae", str(compared / "sae"), "--after", str(compared / "hardly-trained")]
        assert main(self.command(compared, *options)) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "on given text: " in shown
        assert "both models wrote the same answers to all prompts" in shown
        assert main(self.command(compared, *options, "--json", "true")) == 0
        document = json.loads(capsys.readouterr().out)
        assert (set(document["targets"]), document["same_answers"]) == ({"on given text"}, True)

    def test_an_answer_before_and_after_with_words(self, compared, tokenizer, models, capsys):
        after = copy.deepcopy(models[0])
        with torch.no_grad():
            after.lm_head.weight[tokenizer.convert_tokens_to_ids("w17")] *= 30
            after.model.layers[0].mlp.down_proj.weight *= 1.1
        save_model(after, tokenizer, compared / "says-w17")
        pairs(30, seed=4).to_json(compared / "more.jsonl")
        options = ["--sae", str(compared / "sae"), "--samples", "2"]
        options += ["--after", str(compared / "says-w17"), "--dataset", str(compared / "more.jsonl")]
        assert main(self.command(compared, *options)) == 0
        shown = capsys.readouterr().out.partition("Where the answers differ most")[2]
        assert re.match(r"; «» where it shows\s+\d+ \(\w", shown)
        assert "w17" in shown.partition("after")[2].partition("«")[2].partition("»")[0]
        assert shown.count("prompt ") == 1
        assert max(map(len, shown.splitlines())) <= 80

    def test_another_dictionary_is_refused(self, compared, capsys):
        assert main(self.command(compared, "--sae", str(compared / "other_sae"))) == 2
        assert "not the one that was scored" in capsys.readouterr().err


@pytest.mark.parametrize("drift", [[0.1, -0.2, 0.0], [np.nan] * 3], ids=["with a drift", "without"])
def test_of_a_record_all_that_it_knows_is_compared(drift: list[float]) -> None:
    table = pd.DataFrame({"feature": [2, 0, 1], "attribution": [3.0, 1.0, 2.0], "selection": [6.0, 4.0, 5.0]})
    record: Any = SimpleNamespace(features=lambda name: table.assign(generation_drift=drift))
    found = predictors_of(record, "tiny")
    assert list(found) == ["generation_drift"] * bool(np.isfinite(drift[0])) + ["selection", "attribution"]
    assert found["selection"].tolist() == [4.0, 5.0, 6.0]
