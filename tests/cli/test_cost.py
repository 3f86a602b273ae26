"""The estimate of cost against a real trainer's FLOPs, memory, record and communication, and its command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pages import ROOT
from transformers import LlamaConfig, MixtralConfig

from trl_sae_audit import AuditError
from trl_sae_audit.attribution.feature_tracker import FeatureTracker
from trl_sae_audit.attribution.packed_steps import PackedSteps
from trl_sae_audit.attribution.score_totals import BYTES_PER_EXTRA, BYTES_PER_FEATURE
from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.callbacks import session
from trl_sae_audit.cli import main as cli
from trl_sae_audit.cli.cost import (
    MOST_BUFFERED_SCORES,
    TOTALS,
    TOTALS_OF_TOKENS,
    ModelShape,
    RunShape,
    estimate_cost,
    format_seconds,
    format_share,
    format_size,
    load_shape,
    selection_budget,
    shape_of,
)

sys.path.insert(0, str(ROOT / "scripts"))
import bench_cost
import cost_tables

pytestmark = pytest.mark.newest

LLAMA = ModelShape("llama", 32, 4096, 128256, 8_030_261_248, 6_979_321_856, 4096)
RUN = RunShape(65536, 16, processes=8)


def test_flops_and_network_of_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training within 5 % (checkpointing stops early), what the callback adds within 2 %, communication to the byte."""
    case = bench_cost.Case(token_scores=True, probe_rows=2)
    given: list[PackedSteps] = []
    pack = FeatureTracker.pack

    def counted(tracker: FeatureTracker) -> PackedSteps:
        given.append(pack(tracker))
        return given[-1]

    monkeypatch.setattr(FeatureTracker, "pack", counted)
    without = bench_cost.flops_of(case, with_callback=False)
    extra = bench_cost.flops_of(case, with_callback=True) - without
    assert case.train_flops() == pytest.approx(without, rel=0.05)
    assert sum(case.cost().flops.values()) == pytest.approx(extra, rel=0.02)
    assert case.cost(2).network == sum(part.sums.nbytes for part in given) / case.steps


def test_the_page_has_the_tables_that_the_script_makes() -> None:
    assert cost_tables.tables() in (ROOT / "docs" / "cost.md").read_text()


def test_record_on_disk() -> None:
    rows, totals = bench_cost.record_bytes(512, 600)
    estimated = bench_cost.Case(features=512, steps=600).cost()
    assert rows == pytest.approx(estimated.disk_row, rel=0.2)
    assert totals == pytest.approx(estimated.disk_totals, rel=0.05)


def test_totals_in_memory() -> None:
    totals, features = FeatureTotals(1000), np.ones((64, 1000), np.float32)
    totals.update(*[features] * 5)
    kept = sum(array.nbytes for array in totals.state_dict().values())
    assert kept == pytest.approx(1000 * BYTES_PER_FEATURE, rel=0.01)
    assert (TOTALS, TOTALS_OF_TOKENS) == (BYTES_PER_FEATURE, 2 * BYTES_PER_EXTRA)


@pytest.mark.parametrize(
    ("features", "logging_steps", "expected"),
    [(16384, 10, 10), (16384, 500, 10), (2**20, 10, 4), (2**18, 500, 10), (2**26, 10, 1)],
)
def test_buffered_steps_are_those_of_the_callback(features: int, logging_steps: int, expected: int) -> None:
    assert (session._MOST_BUFFERED_STEPS, session._MOST_BUFFERED_SCORES) == (10, MOST_BUFFERED_SCORES)
    assert RunShape(features, 1, logging_steps=logging_steps).buffered_steps() == expected


class TestArithmetic:
    def test_extra_flops_by_hand(self) -> None:
        estimated = estimate_cost(LLAMA, RUN)
        assert estimated.flops["projection"] == 2 * 65536 * 4096 * (3 + 8)
        assert estimated.flops["fit"] == pytest.approx(64 * 65536 * (4 * 4096 + 2) / 10)
        assert estimated.network == 8 * (4096 + 3 + 4 * 65536)
        assert estimated.host["totals"] == 328 * 65536
        assert estimated.gpu["dictionary"] == 3 * 4 * 65536 * 4096

    def test_what_each_choice_costs(self) -> None:
        """Each is larger, or smaller, in the figures it is about."""
        small = estimate_cost(LLAMA, RUN)
        many = replace(RUN, features=2**20)
        large = estimate_cost(LLAMA, many)
        for part in ("gpu", "host"):
            assert sum(getattr(large, part).values()) > 5 * sum(getattr(small, part).values())
        kept = estimate_cost(LLAMA, replace(many, weight_bytes=2))
        assert kept.gpu["dictionary"] == large.gpu["dictionary"] / 2
        offloaded = estimate_cost(LLAMA, replace(many, offload=True))
        assert (large.mapped, offloaded.mapped) == (0, 2 * 2**20 * 4096 * 4)
        assert offloaded.gpu["dictionary"] == 0
        assert offloaded.seconds["transfer"] > large.seconds["transfer"]
        tokens = estimate_cost(LLAMA, replace(RUN, token_scores=True))
        assert tokens.flop_share > 20 * small.flop_share
        assert tokens.network > 1.4 * small.network
        on_host = estimate_cost(LLAMA, replace(RUN, on_gpu=False))
        assert on_host.gpu == {}
        assert on_host.mapped > 0
        assert estimate_cost(LLAMA, replace(RUN, processes=1)).network == 0

    def test_what_is_looked_at_on_the_way(self) -> None:
        looked = estimate_cost(LLAMA, replace(RUN, selection_tokens=1024, generations=True)).flops
        assert looked["selection"] == 2 * 65536 * 4096 * 1024
        assert estimate_cost(LLAMA, RUN).flops["drift in generations"] == 0
        step = estimate_cost(LLAMA, RUN).train_flops
        assert 0 < looked["drift in generations"] * RUN.generation_steps < 2 * step
        assert selection_budget(LLAMA, RUN) == 1024
        assert selection_budget(replace(LLAMA, parameters=10**6), replace(RUN, features=2**20)) == 16

    def test_a_default_audit_costs_less_than_an_epoch_and_a_half(self) -> None:
        for steps in (50, 1000):
            assert 0.3 < estimate_cost(LLAMA, replace(RUN, steps=steps)).default_audit < 1.5

    def test_an_audit_costs_less_than_training(self) -> None:
        shares = [estimate_cost(LLAMA, replace(RUN, layer=layer)).audit for layer in (1, 16, 32)]
        assert 0.2 < shares[2] < shares[1] < shares[0] < 0.45


def test_figures_are_printed_with_three_digits() -> None:
    assert [format_size(2.0**10), format_size(3.3 * 2**20), format_size(1000 * 2.0**30), format_size(0)] == [
        "1 KiB",
        "3.3 MiB",
        "1000 GiB",
        "0 B",
    ]
    assert [format_seconds(3e-7), format_seconds(0.0123), format_seconds(599), format_seconds(7200)] == [
        "0.3 µs",
        "12.3 ms",
        "599 s",
        "2 h",
    ]
    assert [format_share(1e-6), format_share(0.0123), format_share(0.996), format_share(12.3)] == [
        "< 0.001 %",
        "1.2 %",
        "100 %",
        "1,230 %",
    ]


class TestShapes:
    def test_of_a_configuration(self, tmp_path: Path) -> None:
        """Llama 3.1 8B's, whose numbers are known; nothing but config.json is there."""
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        )
        config.save_pretrained(tmp_path)
        assert load_shape(str(tmp_path)) == replace(LLAMA, name=str(tmp_path))
        assert LLAMA.active == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)

    def test_of_a_mixture_of_experts(self) -> None:
        config = MixtralConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        )  # fmt: skip
        idle = 2 * 6 * 3 * 64 * 128
        shape = shape_of(config, "mixture")
        assert shape.active == shape.parameters - 2 * 100 * 64 - idle - 5 * 64

    def test_what_is_no_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="cannot be used"):
            load_shape(str(tmp_path))


class TestCommand:
    @pytest.fixture
    def model(self, tmp_path: Path) -> str:
        LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=3, vocab_size=100
        ).save_pretrained(tmp_path)
        return str(tmp_path)

    def test_a_table_of_80_columns(
        self, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        options = ["--model", model, "--features", "1048576", "--processes", "1024", "--offload"]
        assert cli.main(["cost", *options]) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80
        for part in (
            "FLOPs of a step",
            "network, a step",
            "shared by processes",
            "an audit before it",
            "after layer 2 of 3",
        ):
            assert part in printed

    def test_json(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["cost", "--model", model, "--features", "65536", "--processes", "8", "--json"]) == 0
        given: dict[str, Any] = json.loads(capsys.readouterr().out)
        shape, asked = load_shape(model), replace(RUN, layer=2)
        expected = estimate_cost(shape, replace(asked, selection_tokens=selection_budget(shape, asked)))
        assert given["cost"]["host"] == expected.host
        assert given["cost"]["flops"] == expected.flops
        assert given["run"]["features"] == 65536

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "no/where", "--features", "10"], "cannot be used"),
            (["--model", "no/where", "--features", "0"], "must be at least 1"),
            (["--model", "no/where", "--features", "9", "--trainer", "ppo"], "not one of dpo, kto"),
        ],
    )
    def test_what_does_not_go_is_one_sentence(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["cost", *arguments]) == cli.USAGE_ERROR
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
