"""The plan's arithmetic against a real trainer's FLOPs, memory, record and communication, and its command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import ROOT
from transformers import LlamaConfig, MixtralConfig

from trl_sae_audit import AuditError, cli, session
from trl_sae_audit.channel import Channel
from trl_sae_audit.model_shape import load_shape, shape_of
from trl_sae_audit.plan import (
    MOST_BUFFERED_SCORES,
    DictionaryShape,
    Machine,
    ModelShape,
    Options,
    RunShape,
    buffered_steps,
    plan,
)
from trl_sae_audit.record_files import totals_bytes
from trl_sae_audit.totals import BYTES_PER_FEATURE, FeatureTotals

sys.path.insert(0, str(ROOT / "scripts"))
import bench_plan
import cost_tables

pytestmark = pytest.mark.newest

LLAMA = ModelShape.of_numbers("llama", 32, 4096, 128256, 8_030_261_248)
RUN = RunShape(processes=8, batch=2, accumulation=4)


def test_flops_and_network_of_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training within 5 % (checkpointing stops early), what the callback adds within 2 %, communication to the byte."""
    case = bench_plan.Case(token_scores=True, probe_rows=2)
    given: list[torch.Tensor] = []
    pack = Channel.pack

    def counted(channel: Channel) -> torch.Tensor:
        given.append(pack(channel))
        return given[-1]

    monkeypatch.setattr(Channel, "pack", counted)
    without = bench_plan.flops_of(case, with_callback=False)
    extra = bench_plan.flops_of(case, with_callback=True) - without
    assert case.train_flops() == pytest.approx(without, rel=0.05)
    assert sum(case.plan().flops.values()) == pytest.approx(extra, rel=0.02)
    assert case.plan(2).network == sum(part.nbytes for part in given) / case.steps


def test_the_page_has_the_tables_that_the_script_makes() -> None:
    assert cost_tables.tables() in (ROOT / "docs" / "cost.md").read_text()


def test_record_on_disk() -> None:
    rows, totals = bench_plan.record_bytes(512, 600)
    planned = bench_plan.Case(features=512, steps=600).plan()
    assert rows == pytest.approx(planned.disk_row, rel=0.2)
    assert totals == pytest.approx(planned.disk_totals, rel=0.05)


def test_totals_in_memory() -> None:
    totals, features = FeatureTotals(1000), np.ones((64, 1000), np.float32)
    totals.update(*[features] * 5)
    assert len(totals_bytes(totals)) == pytest.approx(1000 * BYTES_PER_FEATURE, rel=0.01)


@pytest.mark.parametrize(
    ("features", "logging_steps", "expected"),
    [(16384, 10, 10), (16384, 500, 64), (2**20, 10, 4), (2**18, 500, 16), (2**26, 10, 1)],
)
def test_buffered_steps_are_those_of_the_callback(features: int, logging_steps: int, expected: int) -> None:
    assert (session._MOST_BUFFERED_STEPS, session._MOST_BUFFERED_SCORES) == (64, MOST_BUFFERED_SCORES)
    assert buffered_steps(features, logging_steps) == expected


class TestArithmetic:
    def test_extra_flops_by_hand(self) -> None:
        planned = plan(LLAMA, RUN, DictionaryShape(65536, 16))
        assert planned.flops["projection"] == 2 * 65536 * 4096 * (3 + 8)
        assert planned.flops["health"] == pytest.approx(64 * 65536 * (4 * 4096 + 2) / 10)
        assert planned.network == 8 * (4096 + 3 + 4 * 65536)
        assert planned.host_memory["totals"] == 328 * 65536

    def test_what_each_choice_costs(self) -> None:
        """Each is larger, or smaller, in the figures it is about."""
        small = plan(LLAMA, RUN, DictionaryShape(65536, 16))
        large = plan(LLAMA, RUN, DictionaryShape(2**20, 16))
        for part in ("device_memory", "host_memory"):
            assert sum(getattr(large, part).values()) > 5 * sum(getattr(small, part).values())
        kept = plan(LLAMA, RUN, DictionaryShape(2**20, 16, weight_bytes=2))
        assert kept.device_memory["dictionary"] == large.device_memory["dictionary"] / 2
        offloaded = plan(LLAMA, RUN, DictionaryShape(2**20, 16, offload=True))
        assert "dictionary" not in offloaded.device_memory
        assert offloaded.shared_memory["dictionary, mapped"] == 2 * 2**20 * 4096 * 4
        assert offloaded.seconds["transfer"] > large.seconds["transfer"]
        tokens = plan(LLAMA, RUN, DictionaryShape(65536, 16), Options(token_scores=True))
        assert tokens.flop_share > 20 * small.flop_share
        assert tokens.network > 1.4 * small.network
        on_host = plan(LLAMA, RUN, DictionaryShape(65536, 16), machine=Machine(accelerator=False))
        assert on_host.device_memory == {}
        alone = plan(LLAMA, RunShape(), DictionaryShape(65536, 16))
        assert alone.network == 0

    def test_an_audit_costs_less_than_training(self) -> None:
        shares = [plan(LLAMA, RUN, DictionaryShape(65536, layer)).audit for layer in (1, 16, 32)]
        assert 0.2 < shares[2] < shares[1] < shares[0] < 0.45


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
        shape = load_shape(str(tmp_path))
        assert shape.parameters == 8_030_261_248
        assert shape.active == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
        assert (shape.layers, shape.width, shape.attention_width) == (32, 4096, 4096)
        by_numbers = ModelShape.of_numbers("same", 32, 4096, 128256, shape.parameters)
        assert by_numbers.active == pytest.approx(shape.active, rel=1e-4)

    def test_of_a_mixture_of_experts(self) -> None:
        config = MixtralConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        )  # fmt: skip
        idle = 2 * 6 * 3 * 64 * 128
        shape = shape_of(config, "mixture")
        assert shape.active == shape.parameters - 2 * 100 * 64 - idle - 5 * 64

    def test_what_is_no_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match=r"cannot be used.*--parameters"):
            load_shape(str(tmp_path))


NUMBERS = ["--layers", "32", "--hidden_size", "4096", "--vocab_size", "128256"]


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        assert cli.main(["doctor", "--plan", *arguments]) == 0
        return capsys.readouterr().out

    def test_tables_fit_80_columns(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        printed = self.run(
            capsys, *NUMBERS, "--d_sae", "1048576", "--processes", "1024", "--probe_rows", "64", "--offload"
        )  # fmt: skip
        assert max(map(len, printed.splitlines())) <= 80
        for part in ("FLOPs, extra in all", "network: scores", "mapped", "an audit of the data"):
            assert part in printed

    def test_json(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "cfg.json").write_text(json.dumps({"d_sae": 65536, "d_in": 4096}))
        given: dict[str, Any] = json.loads(
            self.run(capsys, *NUMBERS, "--sae", str(tmp_path), "--processes", "8", "--json")
        )
        shape = ModelShape.of_numbers("the model", 32, 4096, 128256)
        expected = plan(shape, RunShape(processes=8), DictionaryShape(65536, 16))
        assert given["plan"]["flop_share"] == expected.flop_share
        assert given["plan"]["host_memory"] == expected.host_memory
        assert given["dictionary"]["features"] == 65536

    def test_help_explains_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main(["doctor", "--plan", "--help"])
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert "usage: trl-sae-audit doctor --plan" in printed
        assert "(default: None)" not in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--d_sae", "10"], "The model is not given"),
            (NUMBERS, "The dictionary is not given"),
            ([*NUMBERS, "--d_sae", "10", "--layer", "33"], "no layer 33"),
            ([*NUMBERS, "--d_sae", "0"], "d_sae is 0"),
            (
                [*NUMBERS, "--d_sae", "9", "--token_scores", "--offload"],
                "an offloaded one would go to the GPU",
            ),
            ([*NUMBERS, "--d_sae", "10", "--tflops", "0"], "tflops is 0"),
            ([*NUMBERS, "--d_sae", "10", "--parameters", "1e6"], "fewer than embedding and head"),
            (["--model_name_or_path", "no/where", "--d_sae", "10"], "cannot be used"),
            ([*NUMBERS, "--sae", "no/where"], "no SAE saved by sae-lens"),
        ],
    )
    def test_what_does_not_go_is_one_sentence(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["doctor", "--plan", *arguments]) == cli.USAGE_ERROR
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
