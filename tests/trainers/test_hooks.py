"""What a trainer hands over may have a graph of its own."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainers import SAMPLED, arguments
from helpers.worlds import make_dictionary, make_model, make_tokenizer, prompts, reward_by_length
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_sae_audit import FeatureAttributionCallback, RunRecord

pytestmark = pytest.mark.newest


def with_a_graph(base: Any, seen: list[Any], alive: list[int], learned: bool) -> Any:
    """Advantages scaled by what is learned too."""

    class Scaled(base):
        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            alive.append(sum(each() is not None for each in seen))
            scale = nn.Parameter(torch.ones(()), requires_grad=learned)
            made = inputs["advantages"] * scale
            seen.append(weakref.ref(made))
            return super().compute_loss(model, {**inputs, "advantages": made * scale}, *args, **kwargs)

    return Scaled


@pytest.mark.parametrize(("base", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_advantages_that_carry_a_gradient(base: Any, config: Any, tmp_path: Path) -> None:
    tables, weights = [], []
    for learned in (False, True):
        directory, seen, alive = tmp_path / str(learned), [], []  # type: ignore[var-annotated]
        tokenizer = make_tokenizer()
        trainer = with_a_graph(base, seen, alive, learned)(
            make_model(tokenizer),
            reward_funcs=reward_by_length,
            args=config(**arguments(directory, logging_steps=10, max_steps=3, **SAMPLED)),
            train_dataset=prompts(24),
            processing_class=tokenizer,
            callbacks=[
                FeatureAttributionCallback(
                    make_dictionary(), directory / "run", watch={"one": 1}, examples=True
                )
            ],
        )
        trainer.train()
        assert max(alive) <= 1, "no graph outlives its micro-batch"
        tables.append(RunRecord.load(directory / "run").table("examples"))
        weights.append([value.detach().clone() for value in trainer.model.parameters()])
    assert tables[0].equals(tables[1])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
