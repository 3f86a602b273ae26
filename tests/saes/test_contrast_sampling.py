"""Pairs that a model writes itself, under two system prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.worlds import make_model, make_tokenizer, save_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sae_audit import AuditError
from trl_sae_audit.cli.main import main
from trl_sae_audit.models.sampling import Sampling, sample_ids
from trl_sae_audit.saes.contrast_sampling import sample_contrasts

NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message.content }} {% endfor %}"
)


def test_answers_under_either_prompt_after_the_question_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    questions = ["w1 w2", "w3", "w1 w2"]
    pairs = sample_contrasts(model, tokenizer, questions, "w8", "w9 w9", max_new_tokens=5, seed=4)
    assert [pair["prompt"] for pair in pairs] == [
        [{"role": "user", "content": question}] for question in ("w1 w2", "w3")
    ]
    for side, system in (("positive", "w8"), ("negative", "w9 w9")):
        begun = [tokenizer(f"{system} {question} ")["input_ids"] for question in ("w1 w2", "w3")]
        expected = sample_ids(model, tokenizer, begun, Sampling(answers=1, max_new_tokens=5, seed=4))
        assert [pair[side] for pair in pairs] == [
            tokenizer.decode(each[0], skip_special_tokens=True) for each in expected
        ]


def test_a_template_without_a_place_for_a_system_prompt(model: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer()
    expected = sample_contrasts(model, tokenizer, ["w1"], "w8", "w9", max_new_tokens=5)
    tokenizer.chat_template = NO_SYSTEM
    assert sample_contrasts(model, tokenizer, ["w1"], "w8", "w9", max_new_tokens=5) == expected


def test_what_is_refused(model: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer()
    for questions, negative, match in ((["w1"], "w8", "the same"), ([" "], "w9", "no questions")):
        with pytest.raises(AuditError, match=match):
            sample_contrasts(model, tokenizer, questions, "w8", negative)
    tokenizer.chat_template = None
    with pytest.raises(AuditError, match="no chat template"):
        sample_contrasts(model, tokenizer, ["w1"], "w8", "w9")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(make_model(make_tokenizer()), make_tokenizer(), tmp_path / "model")
    (tmp_path / "questions.jsonl").write_text("".join(f'{{"prompt": "w{n} w1"}}\n' for n in range(16)))
    asked = ["direction", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "questions.jsonl")]
    asked += ["--output_dir", str(tmp_path / "out"), "--max_new_tokens", "4", "--trait", "pirate"]
    assert main([*asked, "--system_positive", "w8"]) == 2
    assert "go together; give both" in capsys.readouterr().err
    code = main([*asked, "--system_positive", "w8 w8", "--system_negative", "w9"])
    printed = capsys.readouterr()
    assert "pirate" in printed.out if code == 0 else "No direction of 'pirate' was found" in printed.err
