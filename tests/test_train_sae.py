"""Training a dictionary: the tokens it sees, the store they lie in, and what comes out."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from small_model import CHAT_TEMPLATE, WORDS, make_model, make_texts, make_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from trl_sae_audit import AuditError, load_dictionary
from trl_sae_audit.activation_buffer import ActivationBuffer
from trl_sae_audit.health import Health, health
from trl_sae_audit.hook_points import resolve_hook_point
from trl_sae_audit.residual_stream import TokenRules, hidden_states, residual_stream, token_windows
from trl_sae_audit.texts import read_texts
from trl_sae_audit.train_sae import fault_of, train_dictionary
from trl_sae_audit.train_sae_config import TrainSAEConfig

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


PAIR = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}


class TestTexts:
    def write(self, path: Path, rows: list[dict[str, Any]]) -> Path:
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    def test_preference_pairs_give_prompt_with_each_answer(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "pairs.jsonl", [PAIR])
        assert read_texts(file, make_tokenizer()) == ["w1 w2", "w1 w3"]
        assert read_texts(file, make_tokenizer(), prompt_separator="w9 ") == ["w1 w9 w2", "w1 w9 w3"]

    @pytest.mark.parametrize(
        ("row", "columns", "expected"),
        [
            ({"text": "w1", "other": "w2"}, None, ["w1"]),
            ({"prompt": "w1 ", "completion": "w2", "label": True}, None, ["w1 w2"]),
            ({"chosen": "w1", "rejected": "w2"}, None, ["w1", "w2"]),
            ({"prompt": "w1", "answer": 3}, None, ["w1"]),
            ({"question": "w1", "reply": "w2"}, ["reply"], ["w2"]),
            ({"prompt": "w1 ", "reply": "w2", "other": "w3"}, ["prompt", "reply"], ["w1 w2"]),
        ],
    )
    def test_columns(
        self, tmp_path: Path, row: dict[str, Any], columns: list[str] | None, expected: list[str]
    ) -> None:
        file = self.write(tmp_path / "rows.jsonl", [row])
        assert read_texts(file, make_tokenizer(), columns=columns) == expected

    def test_every_kind_of_file(self, tmp_path: Path) -> None:
        rows = [{"text": "w1 w2"}, {"text": "w3"}, {"text": "w3"}, {"text": " "}]
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "a.jsonl").write_text(lines + "\n")
        (tmp_path / "a.json").write_text(json.dumps(rows))
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
        pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
        for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.txt", "a.parquet", "saved", "splits"):
            assert [text.strip() for text in read_texts(tmp_path / name, make_tokenizer())] == ["w1 w2", "w3"]

    def test_limit_is_a_fixed_random_choice(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "rows.jsonl", [{"text": word} for word in WORDS])
        some = read_texts(file, make_tokenizer(), limit=10)
        assert len(some) == 10
        assert some == read_texts(file, make_tokenizer(), limit=10) != WORDS[:10]

    def test_conversations_go_through_the_chat_template(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        user = [{"role": "user", "content": "w1"}]
        reply = [{"role": "assistant", "content": "w2"}]
        rows = [
            {"prompt": user, "chosen": reply, "rejected": "w3"},
            {"prompt": user, "chosen": reply, "rejected": reply},
        ]
        file = self.write(tmp_path / "chats.jsonl", rows)
        assert read_texts(file, tokenizer) == ["<s>user w1 assistant w2 ", "<s>user w1 assistant w3 "]
        file = self.write(tmp_path / "messages.jsonl", [{"messages": user + reply}])
        assert read_texts(file, tokenizer) == ["<s>user w1 assistant w2 "]
        with pytest.raises(AuditError, match="has no chat template"):
            read_texts(file, make_tokenizer())

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.jsonl", b'{"text": "w1"}\n{"text": ', "line 2: not valid JSON"),
            ("rows.jsonl", b'"w1"', "not an object with columns"),
            ("rows.jsonl", b'{"body": "w1"}', "has the columns body.*--columns"),
            ("rows.jsonl", b'{"text": 3}', "holds something else"),
            ("rows.jsonl", b'{"text": " "}', "has no text in it"),
            ("rows.jsonl", b"", "has no text in it"),
            ("rows.jsonl", b"\xff\xfe\xff", "cannot be read as text"),
            ("rows.jsonl.gz", b"no gzip", "cannot be read as text"),
            ("rows.parquet", b"no parquet", "cannot be read as Parquet"),
            ("rows.docx", b"", "of no known kind"),
        ],
    )
    def test_unusable_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AuditError, match=message):
            read_texts(tmp_path / name, make_tokenizer())

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="There is no file"):
            read_texts(tmp_path / "none.jsonl", make_tokenizer())
        with pytest.raises(AuditError, match="holds no dataset made by save_to_disk"):
            read_texts(tmp_path, make_tokenizer())
        file = self.write(tmp_path / "rows.jsonl", [PAIR])
        with pytest.raises(AuditError, match="no column 'reply'"):
            read_texts(file, make_tokenizer(), columns=["reply"])


class TestWindows:
    def test_long_texts_are_cut_and_every_window_begins_with_bos(self) -> None:
        windows = list(token_windows([" ".join(WORDS[:7])], make_tokenizer(), context_size=4))
        assert windows == [[1, 4, 5, 6], [1, 7, 8, 9], [1, 10]]

    def test_without_bos(self) -> None:
        windows = list(token_windows([" ".join(WORDS[:5])], make_tokenizer(bos=False), context_size=4))
        assert windows == [[4, 5, 6, 7], [8]]

    def test_a_template_that_writes_bos_gets_no_second_one(self) -> None:
        assert list(token_windows(["<s> w0 w1"], make_tokenizer(), 8)) == [[1, 4, 5]]

    def test_empty_text_has_none(self) -> None:
        assert list(token_windows(["", "w0"], make_tokenizer(), 8)) == [[1, 4]]


class TestResidualStream:
    def rows(self, model: LlamaForCausalLM, texts: list[str], rules: TokenRules, batch: int = 4) -> Tensor:
        hook = resolve_hook_point(model, HOOK)
        return torch.cat(list(residual_stream(model, make_tokenizer(), texts, hook, rules, batch)))

    def test_is_what_the_model_reports_and_stops_there(self, model: LlamaForCausalLM) -> None:
        ids = torch.tensor([[1, 4, 5, 6]])
        above: list[object] = []
        hooks = len(model.model.layers[1]._forward_hooks)
        handle = model.model.layers[2].register_forward_hook(lambda *args: above.append(args))
        hidden = hidden_states(
            resolve_hook_point(model, HOOK), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        )
        assert above == []
        assert len(model.model.layers[1]._forward_hooks) == hooks
        handle.remove()
        with torch.no_grad():
            expected = model.eval()(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(hidden, expected)

    def test_layers_that_return_tuples(self) -> None:
        config = AutoConfig.for_model(
            "falcon", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=70
        )
        falcon = AutoModelForCausalLM.from_config(config)
        assert self.rows(falcon, ["w1 w2 w3"], TokenRules()).shape == (3, 16)

    def test_padding_and_special_tokens_stay_out(self, model: LlamaForCausalLM) -> None:
        texts = ["w1 w2 w3 w4 w5", "w6", "w7 </s> w8"]
        together = self.rows(model, texts, TokenRules(skip_special_tokens=True, skip_first_position=False))
        alone = [self.rows(model, [text], TokenRules(skip_first_position=False)) for text in texts]
        assert [len(rows) for rows in alone] == [5, 1, 2]
        expected = torch.cat(sorted(alone, key=len))
        torch.testing.assert_close(together, expected)

    @pytest.mark.parametrize(
        ("special", "first", "count"),
        [(False, False, 4), (False, True, 3), (True, False, 2), (True, True, 2)],
    )
    def test_rules(self, model: LlamaForCausalLM, special: bool, first: bool, count: int) -> None:
        rules = TokenRules(skip_special_tokens=special, skip_first_position=first)
        assert len(self.rows(model, ["w1 w2 </s>"], rules)) == count

    def test_first_position_without_bos(self, model: LlamaForCausalLM) -> None:
        hook = resolve_hook_point(model, HOOK)
        stream = residual_stream(model, make_tokenizer(bos=False), ["w1 w2 w3"], hook, TokenRules())
        assert sum(map(len, stream)) == 2

    def test_model_is_left_in_its_mode(self, model: LlamaForCausalLM) -> None:
        model.train()
        self.rows(model, ["w1 w2"], TokenRules())
        assert model.training


class TestActivationBuffer:
    def buffer(self, tmp_path: Path, rows: int, capacity: int, batch: int = 8) -> ActivationBuffer:
        def source() -> Iterator[Tensor]:
            yield from torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 2).split(7)

        return ActivationBuffer(source, capacity, 2, batch, tmp_path / "store", seed=0)

    def test_a_source_that_fits_is_used_once_an_epoch(self, tmp_path: Path) -> None:
        buffer = self.buffer(tmp_path, rows=32, capacity=100)
        assert buffer.complete
        for _ in range(3):
            epoch = torch.cat([next(buffer)[:, 0] for _ in range(4)])
            assert sorted(epoch.tolist()) == list(range(32))
        assert epoch.tolist() != sorted(epoch.tolist())

    def test_a_larger_source_is_seen_whole_and_mixed(self, tmp_path: Path) -> None:
        buffer = self.buffer(tmp_path, rows=200, capacity=64)
        assert not buffer.complete
        seen = torch.cat([next(buffer)[:, 0] for _ in range(100)])
        counts = torch.bincount(seen.long(), minlength=200)
        assert len(seen) == 800
        assert int((counts > 0).sum()) >= 190
        assert int(counts.max()) <= 8
        assert buffer.rows.shape == (64, 2)

    def test_same_seed_same_batches(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        one, other = (self.buffer(tmp_path / name, rows=50, capacity=30) for name in "ab")
        assert all(torch.equal(next(one), next(other)) for _ in range(30))

    def test_too_few_rows(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="give only 5 activations, fewer than one batch of 8"):
            self.buffer(tmp_path, rows=5, capacity=30)

    def test_not_finite(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="not finite on these texts"):
            ActivationBuffer(lambda: iter([torch.full((9, 2), math.inf)]), 20, 2, 4, tmp_path / "s", seed=0)


def config(output: Path, **changes: Any) -> TrainSAEConfig:
    settings: dict[str, Any] = {
        "hook_point": HOOK,
        "output_dir": str(output),
        "d_sae": 64,
        "k": 6,
        "training_tokens": 250 * 256,
        "sae_batch_size": 256,
        "held_out_share": 0.2,
        "seed": 3,
    }
    return TrainSAEConfig(**{**settings, **changes})


class TestTraining:
    @pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
    def test_learns_and_loads_without_arguments(
        self, model: LlamaForCausalLM, architecture: Any, tmp_path: Path
    ) -> None:
        texts = make_texts()
        trained = train_dictionary(
            model,
            make_tokenizer(),
            texts,
            config(tmp_path / "sae", architecture=architecture),
            dataset="words",
        )
        assert trained.path == tmp_path / "sae"
        assert trained.fvu < 0.4
        assert trained.l0 == pytest.approx(6, abs=2.5)
        assert trained.dead < 0.9
        assert trained.held_out_tokens > 300
        dictionary = load_dictionary(trained.path)
        assert dictionary.hook_point == trained.hook_point == "model.layers.1"
        # the saved SAE explains the raw residual stream of texts it was not trained on
        hook = resolve_hook_point(model, dictionary.hook_point)
        new = make_texts(200)[150:]
        hidden = torch.cat(list(residual_stream(model, make_tokenizer(), new, hook, TokenRules())))
        assert health(dictionary, hidden).fvu == pytest.approx(trained.fvu, abs=0.1)

    @pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
    def test_other_architectures_train(
        self, model: LlamaForCausalLM, architecture: Any, tmp_path: Path
    ) -> None:
        settings = config(tmp_path / "sae", architecture=architecture, max_dead=1.0)
        assert train_dictionary(model, make_tokenizer(), make_texts(), settings).fvu < 0.8

    def test_metadata(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        model.config.name_or_path = "someone/tiny"
        trained = train_dictionary(
            model, make_tokenizer(), make_texts(), config(tmp_path / "sae"), dataset="words.jsonl"
        )
        metadata = json.loads((trained.path / "cfg.json").read_text())["metadata"]
        expected = {
            "model_name": "someone/tiny",
            "hook_name": "blocks.1.hook_resid_post",
            "hf_hook_name": "model.layers.1",
            "context_size": 256,
            "dataset_path": "words.jsonl",
            "exclude_special_tokens": True,
            "seqpos_slice": [1, None],
            "seed": 3,
        }
        assert {key: metadata[key] for key in expected} == expected
        assert metadata["held_out"]["fvu"] == pytest.approx(trained.fvu)
        assert load_dictionary(trained.path).model_name == "someone/tiny"
        assert [path.name for path in tmp_path.iterdir()] == ["sae"]

    def test_same_seed_same_weights_and_the_global_one_untouched(
        self, model: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        state = torch.get_rng_state()
        one, other = (
            train_dictionary(
                model,
                make_tokenizer(),
                make_texts(),
                config(tmp_path / name, training_tokens=2560, max_fvu=10, max_dead=1),
            )
            for name in ("one", "other")
        )
        assert load_dictionary(one.path).identity == load_dictionary(other.path).identity
        assert torch.equal(state, torch.get_rng_state())

    def test_texts_that_do_not_fit_the_buffer(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        trained = train_dictionary(
            model, make_tokenizer(), make_texts(), config(tmp_path / "sae", buffer_tokens=1000)
        )
        assert trained.distinct_tokens is None
        assert trained.fvu < 0.4


class TestDeadSae:
    def test_is_refused_and_kept_under_a_name_that_says_so(
        self, model: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        settings = config(
            tmp_path / "sae", architecture="standard", sparsity_coefficient=1e4, training_tokens=100 * 256
        )
        with pytest.raises(AuditError, match=r"The SAE is dead: .* kept in .*sae\.failed.*do not use it"):
            train_dictionary(model, make_tokenizer(), make_texts(), settings)
        assert [path.name for path in tmp_path.iterdir()] == ["sae.failed"]
        figures = json.loads((tmp_path / "sae.failed" / "cfg.json").read_text())["metadata"]["held_out"]
        assert figures["fvu"] > 0.9 or figures["dead"] > 0.9

    def test_one_that_diverged(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        settings = config(tmp_path / "sae", lr=1e30, training_tokens=5 * 256)
        with pytest.raises(AuditError, match=r"The SAE is dead"):
            train_dictionary(model, make_tokenizer(), make_texts(), settings)
        assert (tmp_path / "sae.failed").is_dir()

    @pytest.mark.parametrize(
        ("fvu", "token_fvu", "dead", "tokens", "fault"),
        [
            (0.2, 0.3, 0.1, 100, None),
            (0.9, 0.3, 0.1, 100, "90% of the variance unexplained"),
            (0.2, 0.96, 0.1, 100, "96% of the average token unexplained"),
            (math.nan, math.nan, 0.1, 100, "unexplained"),
            (0.2, 0.3, 0.95, 100, "95% of its features"),
            (math.nan, math.nan, math.nan, 0, "no held-out token"),
        ],
    )
    def test_faults(
        self, fvu: float, token_fvu: float, dead: float, tokens: float, fault: str | None
    ) -> None:
        found = fault_of(Health(fvu=fvu, token_fvu=token_fvu, l0=4.0, dead=dead, tokens=tokens))
        assert found is None if fault is None else fault in str(found)


class TestRefusedBeforeTraining:
    @pytest.mark.parametrize("existing", ["sae", "sae.failed"])
    def test_existing_output(self, model: LlamaForCausalLM, tmp_path: Path, existing: str) -> None:
        (tmp_path / existing).mkdir()
        with pytest.raises(AuditError, match="exists already"):
            train_dictionary(model, make_tokenizer(), make_texts(), config(tmp_path / "sae"))

    def test_no_such_hook_point(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="has 3 layers"):
            train_dictionary(
                model,
                make_tokenizer(),
                make_texts(),
                config(tmp_path / "sae", hook_point="blocks.7.hook_resid_post"),
            )

    def test_one_text(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="Only one text"):
            train_dictionary(model, make_tokenizer(), ["w1 w2", "w1 w2"], config(tmp_path / "sae"))

    def test_k_above_features(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="only 64 features"):
            train_dictionary(model, make_tokenizer(), make_texts(), config(tmp_path / "sae", k=65))

    @pytest.mark.parametrize(
        "change",
        [
            {"architecture": "magic"},
            {"k": 0},
            {"context_size": 1},
            {"held_out_share": 0.0},
            {"held_out_share": 1.0},
            {"lr_decay_share": 0.99},
            {"training_tokens": 10},
        ],
    )
    def test_settings(self, tmp_path: Path, change: dict[str, Any]) -> None:
        with pytest.raises(AuditError):
            config(tmp_path / "sae", **change)
