"""Training a dictionary: it learns, is checked before and after, and loads without arguments."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sae_training import make_narrow_model, make_texts, training_config
from helpers.saes import hidden_states, make_sae
from helpers.worlds import make_tokenizer
from rich.console import Console
from sae_lens import TrainingSAE
from transformers import LlamaForCausalLM

from trl_sae_audit import AuditError, load_dictionary
from trl_sae_audit.cli.train_sae import summary
from trl_sae_audit.io.manifest import read_manifest
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import TokenRules, residual_stream
from trl_sae_audit.saes.fine_tuning import start_from, start_settings
from trl_sae_audit.saes.fit import Health, health
from trl_sae_audit.saes.training import fault_of, train_dictionaries, train_dictionary
from trl_sae_audit.saes.training_config import TrainSAEConfig, architecture_settings


class TestTraining:
    @pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
    def test_learns_and_loads_without_arguments(
        self, model: LlamaForCausalLM, architecture: Any, tmp_path: Path
    ) -> None:
        texts = make_texts()
        trained = train_dictionary(
            model,
            make_tokenizer(bos=True),
            texts,
            training_config(tmp_path / "sae", architecture=architecture),
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
        hidden = torch.cat(list(residual_stream(model, make_tokenizer(bos=True), new, hook, TokenRules())))
        assert health(dictionary, hidden).fvu == pytest.approx(trained.fvu, abs=0.1)

    @pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
    def test_other_architectures_train(
        self, model: LlamaForCausalLM, architecture: Any, tmp_path: Path
    ) -> None:
        settings = training_config(tmp_path / "sae", architecture=architecture, max_dead=1.0)
        assert train_dictionary(model, make_tokenizer(bos=True), make_texts(), settings).fvu < 0.8

    def test_metadata(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        model.config.name_or_path = "someone/tiny"
        trained = train_dictionary(
            model,
            make_tokenizer(bos=True),
            make_texts(),
            training_config(tmp_path / "sae"),
            dataset="words.jsonl",
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
        manifest = read_manifest(trained.path, "sae")
        assert manifest["held_out"]["fvu"] == pytest.approx(trained.fvu)
        assert (manifest["config"]["seed"], manifest["config"]["dataset"]) == (3, "words.jsonl")
        assert load_dictionary(trained.path).model_name == "someone/tiny"
        assert [path.name for path in tmp_path.iterdir()] == ["sae"]

    def test_same_seed_same_weights_and_the_global_one_untouched(
        self, model: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        state = torch.get_rng_state()
        one, other = (
            train_dictionary(
                model,
                make_tokenizer(bos=True),
                make_texts(),
                training_config(tmp_path / name, training_tokens=2560, max_fvu=10, max_dead=1),
            )
            for name in ("one", "other")
        )
        assert load_dictionary(one.path).identity == load_dictionary(other.path).identity
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("tokens", "said"), [(512, ", all different"), (10**5 // 256 * 256, " of them different")]
    )
    def test_no_more_tokens_are_different_than_it_is_trained_on(
        self, model: LlamaForCausalLM, tmp_path: Path, tokens: int, said: str
    ) -> None:
        settings = training_config(tmp_path / "sae", training_tokens=tokens, max_fvu=10, max_dead=1)
        trained = train_dictionary(model, make_tokenizer(bos=True), make_texts(), settings)
        assert trained.training_tokens == tokens
        assert 0 < (trained.distinct_tokens or 0) <= tokens
        with io.StringIO() as file:
            Console(file=file, width=80).print(summary(trained, 1.0))
            assert f"{tokens:,} tokens" in file.getvalue()
            assert said in file.getvalue()

    def test_texts_that_do_not_fit_the_buffer(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        trained = train_dictionary(
            model,
            make_tokenizer(bos=True),
            make_texts(),
            training_config(tmp_path / "sae", buffer_tokens=1000),
        )
        assert trained.distinct_tokens is None
        assert trained.fvu < 0.4


class TestDeadSae:
    def test_is_refused_and_kept_under_a_name_that_says_so(
        self, model: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        settings = training_config(
            tmp_path / "sae", architecture="standard", sparsity_coefficient=1e4, training_tokens=100 * 256
        )
        with pytest.raises(AuditError, match=r"The SAE is dead: .* kept in .*sae\.failed.*do not use it"):
            train_dictionary(model, make_tokenizer(bos=True), make_texts(), settings)
        assert [path.name for path in tmp_path.iterdir()] == ["sae.failed"]
        figures = read_manifest(tmp_path / "sae.failed", "sae")["held_out"]
        assert figures["fvu"] > 0.9 or figures["dead"] > 0.9

    def test_one_that_diverged(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        settings = training_config(tmp_path / "sae", lr=1e30, training_tokens=5 * 256)
        with pytest.raises(AuditError, match=r"The SAE is dead"):
            train_dictionary(model, make_tokenizer(bos=True), make_texts(), settings)
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
            train_dictionary(model, make_tokenizer(bos=True), make_texts(), training_config(tmp_path / "sae"))

    def test_no_such_hook_point(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="has 3 layers"):
            train_dictionary(
                model,
                make_tokenizer(bos=True),
                make_texts(),
                training_config(tmp_path / "sae", hook_point="blocks.7.hook_resid_post"),
            )

    def test_one_text(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="Only one text"):
            train_dictionary(
                model, make_tokenizer(bos=True), ["w1 w2", "w1 w2"], training_config(tmp_path / "sae")
            )

    def test_k_above_features(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="only 64 features"):
            train_dictionary(
                model, make_tokenizer(bos=True), make_texts(), training_config(tmp_path / "sae", k=65)
            )

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
            training_config(tmp_path / "sae", **change)


class TestDefaults:
    def test_the_model_gives_layer_width_and_k(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        short = {"training_tokens": 2048, "sae_batch_size": 64, "max_fvu": 10, "max_dead": 1}
        config = TrainSAEConfig(str(tmp_path / "sae"), **short)
        trained = train_dictionary(model, make_tokenizer(bos=True), make_texts(), config)
        assert (trained.hook_point, trained.d_sae) == ("model.layers.1", 4 * 16)
        assert json.loads((trained.path / "cfg.json").read_text())["k"] == 8

    @pytest.mark.parametrize(
        ("width", "expected"), [(576, (2304, 36)), (64, (256, 8)), (4096, (16384, 64)), (1, (4, 4))]
    )
    def test_size(self, tmp_path: Path, width: int, expected: tuple[int, int]) -> None:
        assert TrainSAEConfig(str(tmp_path)).size(width) == expected


class TestSeveralLayers:
    def test_each_is_the_one_trained_alone(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        short = {"training_tokens": 20 * 256, "max_fvu": 10, "max_dead": 1}
        tokenizer, texts = make_tokenizer(bos=True), make_texts()
        config = training_config(
            tmp_path / "saes", hook_point=None, hook_points=["0", "model.layers.2"], **short
        )
        several = train_dictionaries(model, tokenizer, texts, config)
        assert [each.path.name for each in several] == ["model.layers.0", "model.layers.2"]
        for layer, each in zip(("0", "2"), several, strict=True):
            alone = train_dictionary(
                model, tokenizer, texts, training_config(tmp_path / layer, hook_point=layer, **short)
            )
            assert load_dictionary(each.path).identity == load_dictionary(alone.path).identity
            assert each.token_fvu == alone.token_fvu

    def test_what_is_refused(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        config = training_config(tmp_path / "sae", hook_point=None, hook_points=["1", "model.layers.1"])
        with pytest.raises(AuditError, match="same layer twice"):
            train_dictionaries(model, make_tokenizer(bos=True), make_texts(), config)
        for wrong in (
            {"hook_points": ["1"]},
            {"hook_point": None, "hook_points": ["1"], "start_from": "sae"},
        ):
            with pytest.raises(AuditError, match="give one"):
                training_config(tmp_path / "sae", **wrong)


class TestFineTuning:
    @pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
    def test_the_first_step_begins_at_the_sae_itself(self, architecture: str) -> None:
        sae = make_sae(architecture, normalize_activations="none")
        if architecture == "jumprelu":  # a trained one has no threshold below 0
            sae.threshold.data.abs_()
        hidden = hidden_states(50)
        config = TrainSAEConfig("unused", start_from="sae")
        settings = architecture_settings(config, architecture, 8, 24, 4, 10, torch.device("cpu"))
        training = TrainingSAE.from_dict(settings | start_settings(sae))
        start_from(training, sae, scale=3.0)
        training.fold_activation_norm_scaling_factor(3.0)
        torch.testing.assert_close(training(hidden), sae(hidden), rtol=1e-4, atol=1e-4)

    def test_a_changed_model_is_explained_better_after_it(self, tmp_path: Path) -> None:
        texts, tokenizer = make_texts(), make_tokenizer(bos=True)
        first = train_dictionary(make_narrow_model(), tokenizer, texts, training_config(tmp_path / "first"))
        changed = make_narrow_model()
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.add_(0.8 * parameter.std() * torch.randn_like(parameter))
        short = {"d_sae": None, "k": None, "training_tokens": 40 * 256}
        config = training_config(tmp_path / "second", start_from=str(first.path), **short)
        tuned = train_dictionary(changed, tokenizer, texts, config)
        hook = resolve_hook_point(changed, "1")
        hidden = torch.cat(list(residual_stream(changed, tokenizer, texts[:40], hook, TokenRules())))
        before, after = (health(load_dictionary(each.path), hidden).token_fvu for each in (first, tuned))
        assert after < 0.9 * before
        assert (tuned.d_sae, load_dictionary(tuned.path).hook_point) == (64, "model.layers.1")

    def test_what_cannot_start_one(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        for name, settings, match in (
            ("wide", {}, "reads 8 dimensions"),
            ("normalised", {"normalize_activations": "layer_norm"}, "expects its input normalised"),
        ):
            make_sae("topk", **settings).save_model(tmp_path / name)
            config = training_config(tmp_path / "sae", start_from=str(tmp_path / name))
            with pytest.raises(AuditError, match=match):
                train_dictionary(
                    model if name == "wide" else make_narrow_model(8),
                    make_tokenizer(bos=True),
                    make_texts(),
                    config,
                )
        make_sae("matching_pursuit").save_model(tmp_path / "pursuit")
        config = training_config(tmp_path / "sae", start_from=str(tmp_path / "pursuit"))
        with pytest.raises(AuditError, match="'matching_pursuit', which is not trained further"):
            train_dictionary(model, make_tokenizer(bos=True), make_texts(), config)
