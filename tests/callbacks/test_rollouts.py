"""Answers of a run's first and last steps on its record: their tokens, and every feature that is active at each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trainers import KINDS, dpo
from helpers.worlds import make_sae_dictionary, make_tokenizer, reward_by_length

from trl_sae_audit import FeatureAttributionCallback, RunRecord
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import hidden_states
from trl_sae_audit.record.rollouts import ACTIVATIONS, AFTER, BEFORE, ROLLOUTS, TOKENS, read_rollouts
from trl_sae_audit.saes.contexts import decode, decode_pieces

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "OnlineDPO"])
def test_first_and_last_answers_are_on_the_record_as_the_model_reads_them(tmp_path: Path, kind: str) -> None:
    rolled: list[tuple[str, list[int]]] = []

    def reward(prompts, completions, completion_ids, **kwargs):
        rolled.extend(zip(prompts, (list(ids) for ids in completion_ids), strict=True))
        return reward_by_length(completions)

    trainer = KINDS[kind].build(tmp_path, settings={"max_steps": 16, "logging_steps": 1}, reward_funcs=reward)
    dictionary = make_sae_dictionary()
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record"))
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    found = read_rollouts(*(record.table(name) for name in (ROLLOUTS, TOKENS, ACTIVATIONS)))
    for when in (BEFORE, AFTER):
        some = [each for each in found if each.when == when]
        assert 0 < len(some) <= 16
        assert len({each.prompt for each in some}) == len(some), "one answer to a prompt"
    assert max(each.sampled for each in found if each.when == BEFORE) <= 8
    assert max(each.sampled for each in found if each.when == AFTER) == 16
    tokenizer = make_tokenizer()
    point = resolve_hook_point(trainer.model, dictionary.hook_point)
    for each in found:
        answers = [ids for prompt, ids in rolled if each.prompt.strip() == prompt.strip()]
        texts = decode(tokenizer, answers)
        ids = next(ids for ids, text in zip(answers, texts, strict=True) if text.startswith("".join(each.pieces)))  # fmt: skip
        ids = ids[: len(each.pieces)]
        asked = tokenizer(each.prompt)["input_ids"]
        batch = {"input_ids": torch.tensor([asked + ids])}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            expected = dictionary.encode(hidden_states(point, batch)[0, len(asked) :]).numpy()
        counts, features, values = each.active[dictionary.name]
        got = np.zeros_like(expected)
        got[np.repeat(np.arange(len(counts)), counts), features] = values
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_without_texts_or_where_answers_are_given_there_are_none(tmp_path: Path) -> None:
    for trainer, options in (
        (dpo(tmp_path / "given", max_steps=2), {}),
        (KINDS["GRPO"].build(tmp_path / "silent", settings={"max_steps": 2}), {"contexts": False}),
    ):
        directory = Path(trainer.args.output_dir) / "record"
        trainer.add_callback(FeatureAttributionCallback(make_sae_dictionary(), directory, **options))
        trainer.train()
        assert ROLLOUTS not in RunRecord.load(directory).tables


def test_pieces_are_the_text() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("w1 w2 w3")["input_ids"]
    assert "".join(decode_pieces(tokenizer, ids)) == decode(tokenizer, [ids])[0]
    assert len(decode_pieces(tokenizer, ids)) == len(ids)
    assert decode_pieces(tokenizer, []) == []
