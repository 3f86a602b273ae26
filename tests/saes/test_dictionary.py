"""Dictionaries: every SAE sae-lens can load, and a sentence for every one that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sae_lens
import torch
from helpers.saes import ACTIVE, CONFIGS, FEATURES, HOOK, WIDTH, hidden_states, make_sae
from huggingface_hub import constants
from requests.exceptions import ConnectionError as RequestsConnectionError
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from trl_sae_audit import AuditError, FeatureDictionary, load_dictionary
from trl_sae_audit.saes.releases import pretrained_sae_loaders


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_sae("standard").save_model(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("architecture", CONFIGS)
class TestArchitectures:
    def test_encodes_and_reconstructs_like_the_sae(self, architecture: str) -> None:
        sae = make_sae(architecture)
        dictionary, hidden = load_dictionary(sae), hidden_states(2, 5)
        activations = dictionary.encode(hidden)
        assert activations.shape == (2, 5, FEATURES)
        assert not activations.requires_grad
        torch.testing.assert_close(activations, sae.encode(hidden))
        torch.testing.assert_close(dictionary.reconstruct(hidden, activations), sae(hidden))

    def test_directions_are_unit_and_norms_the_rest(self, architecture: str) -> None:
        sae = make_sae(architecture)
        dictionary = load_dictionary(sae)
        torch.testing.assert_close(dictionary.directions.norm(dim=1), torch.ones(FEATURES))
        torch.testing.assert_close(dictionary.directions * dictionary.norms[:, None], sae.W_dec.detach())
        assert not dictionary.directions.requires_grad

    def test_same_identity_from_memory_and_from_disk(self, architecture: str, tmp_path: Path) -> None:
        sae = make_sae(architecture)
        sae.save_model(tmp_path / "sae")
        loaded = load_dictionary(tmp_path / "sae")
        assert loaded.identity == load_dictionary(sae).identity
        assert (loaded.name, loaded.hook_point, loaded.model_name) == ("sae", HOOK, "tiny")
        torch.testing.assert_close(
            loaded.encode(hidden_states(3)), load_dictionary(sae).encode(hidden_states(3))
        )


@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_written_norms_are_the_derivative_of_the_reconstruction(
    architecture: str, normalisation: str
) -> None:
    dictionary = load_dictionary(make_sae(architecture, normalize_activations=normalisation))
    hidden = hidden_states(3)
    activations = dictionary.encode(hidden)
    base = dictionary.reconstruct(hidden, activations)
    norms = dictionary.written_norms(hidden).expand(3, FEATURES)
    for feature in (0, 7):
        raised = activations.clone()
        raised[:, feature] += 1
        step = dictionary.reconstruct(hidden, raised) - base
        torch.testing.assert_close(step, norms[:, feature, None] * dictionary.directions[feature])


def test_topk_that_rescales_by_decoder_norm_writes_unit_vectors() -> None:
    sae = make_sae("topk", rescale_acts_by_decoder_norm=True)
    dictionary, hidden = load_dictionary(sae), hidden_states(3)
    activations = dictionary.encode(hidden)
    torch.testing.assert_close(dictionary.written_norms(hidden).expand(3, -1), torch.ones(3, FEATURES))
    torch.testing.assert_close(
        dictionary.reconstruct(hidden, activations), activations @ dictionary.directions + sae.b_dec
    )


def test_normalisation_survives_a_move() -> None:
    dictionary = load_dictionary(make_sae("standard", normalize_activations="layer_norm"))
    assert dictionary.encoder is not None
    moved = dictionary.encoder.to(torch.device("cpu"))
    hidden = hidden_states(4)
    torch.testing.assert_close(moved.encode(hidden), dictionary.encode(hidden))
    torch.testing.assert_close(
        moved.decode(moved.encode(hidden), hidden), dictionary.reconstruct(hidden, dictionary.encode(hidden))
    )


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_normalisation_whose_factor_is_lost_is_refused(normalisation: str) -> None:
    with pytest.raises(AuditError, match=f"{normalisation}.*fold"):
        load_dictionary(make_sae("standard", normalize_activations=normalisation))


def test_half_precision_sae_is_used_in_float32_and_left_alone() -> None:
    sae = make_sae("topk").to(dtype=torch.bfloat16)
    dictionary = load_dictionary(sae)
    assert dictionary.encode(hidden_states(2)).dtype == torch.float32
    assert sae.W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        sae_lens.BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=FEATURES, k=ACTIVE),
        sae_lens.TopKTrainingSAEConfig(d_in=WIDTH, d_sae=FEATURES, k=ACTIVE),
        sae_lens.StandardTrainingSAEConfig(d_in=WIDTH, d_sae=FEATURES),
    ],
    ids=lambda config: config.architecture(),
)
def test_an_sae_in_training_gives_what_its_saved_form_gives(
    config: sae_lens.TrainingSAEConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sae = sae_lens.TrainingSAE.from_dict(config.to_dict())
    sae.W_dec.data.mul_(3)
    sae.save_inference_model(tmp_path)
    decoder = sae.W_dec.detach().clone()
    live, disk = (load_dictionary(source, hook_point="model.layers.0") for source in (sae, tmp_path))
    torch.testing.assert_close(live.encode(hidden_states(5)), disk.encode(hidden_states(5)))
    assert live.identity == disk.identity
    assert torch.equal(sae.W_dec, decoder)


class TestRawDirections:
    def test_activation_is_the_projection(self) -> None:
        raw = torch.randn(5, WIDTH) * 3
        dictionary = FeatureDictionary(raw, hook_point="model.layers.1", name="mine")
        hidden = hidden_states(2, 3)
        expected = hidden @ torch.nn.functional.normalize(raw, dim=1).T
        torch.testing.assert_close(dictionary.encode(hidden), expected)
        torch.testing.assert_close(dictionary.project(hidden[0]), expected[0])
        assert dictionary.written_norms(hidden[0]).tolist() == [[1.0] * 5]
        assert dictionary.info.d_sae == 5

    def test_nothing_to_reconstruct(self) -> None:
        dictionary = FeatureDictionary(torch.eye(WIDTH), hook_point="model.layers.1", name="mine")
        with pytest.raises(AuditError, match="without an encoder"):
            dictionary.reconstruct(hidden_states(2), torch.zeros(2, WIDTH))

    def test_a_zero_direction_stays_zero(self) -> None:
        dictionary = FeatureDictionary(torch.zeros(1, WIDTH), hook_point="x.0", name="zero")
        assert torch.equal(dictionary.directions, torch.zeros(1, WIDTH))

    @pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (2, 3, WIDTH)])
    def test_wrong_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(AuditError, match=r"give a matrix \[d_sae, d_model\]"):
            FeatureDictionary(torch.ones(shape), hook_point="x.0", name="bad")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value: float) -> None:
        directions = torch.ones(3, WIDTH)
        directions[1, 2] = value
        with pytest.raises(AuditError, match=r"Direction 1 .* not finite"):
            FeatureDictionary(directions, hook_point="x.0", name="bad")

    def test_no_hook_point(self) -> None:
        with pytest.raises(AuditError, match="does not say where it hooks"):
            FeatureDictionary(torch.eye(3), hook_point="", name="bad")

    def test_identity_depends_on_content_and_shape_only(self) -> None:
        one = FeatureDictionary(torch.eye(4), hook_point="x.0", name="one")
        other = FeatureDictionary(torch.eye(4).double(), hook_point="y.1", name="other")
        flat = FeatureDictionary(torch.eye(4).reshape(2, 8), hook_point="x.0", name="flat")
        assert one.identity == other.identity != flat.identity

    def test_chunks_cover_every_feature_once(self) -> None:
        dictionary = FeatureDictionary(torch.ones(1000, 2), hook_point="x.0", name="wide")
        pieces = [chunk.features for chunk in dictionary.chunks(rows=500_000)]
        assert [i for piece in pieces for i in range(1000)[piece]] == list(range(1000))
        assert max(piece.stop - piece.start for piece in pieces) * 4 * 500_000 <= 256 * 2**20


class TestOverrides:
    def test_name_and_hook_point(self, saved: Path) -> None:
        dictionary = load_dictionary(saved, name="mine", hook_point="model.layers.7")
        assert (dictionary.name, dictionary.hook_point) == ("mine", "model.layers.7")

    def test_hugging_face_hook_name_wins(self) -> None:
        sae = make_sae("standard")
        sae.cfg.metadata.hf_hook_name = "model.layers.3.output"
        assert load_dictionary(sae).hook_point == "model.layers.3.output"

    def test_no_hook_recorded(self) -> None:
        sae = make_sae("standard")
        sae.cfg.metadata = SAEMetadata()
        with pytest.raises(AuditError, match="does not record where it hooks; give hook_point"):
            load_dictionary(sae)


class TestRefused:
    @pytest.mark.parametrize(
        "architecture",
        ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"],
    )
    def test_transcoders(self, architecture: str) -> None:
        settings = {"d_in": WIDTH, "d_out": WIDTH, "d_sae": FEATURES, "apply_b_dec_to_input": False}
        with pytest.raises(AuditError, match=r"is a transcoder.*SAE of the residual stream"):
            load_dictionary(SAE.from_dict({**settings, "architecture": architecture}))

    def test_temporal(self) -> None:
        settings = {"d_in": 64, "d_sae": 512, "architecture": "temporal"}
        with pytest.raises(AuditError, match="temporal SAE"):
            load_dictionary(SAE.from_dict(settings))

    def test_attention_heads(self) -> None:
        sae = make_sae("standard")
        sae.cfg.reshape_activations = "hook_z"
        with pytest.raises(AuditError, match="reads attention heads"):
            load_dictionary(sae)


class TestDamagedDirectory:
    def test_no_such_directory(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="is not a directory; give"):
            load_dictionary(tmp_path / "nowhere")

    @pytest.mark.parametrize("missing", ["cfg.json", "sae_weights.safetensors"])
    def test_missing_file(self, saved: Path, missing: str) -> None:
        (saved / missing).unlink()
        with pytest.raises(AuditError, match=f"has no {missing}"):
            load_dictionary(saved)

    @pytest.mark.parametrize("left", [0, 5, 300])
    def test_truncated_weights(self, saved: Path, left: int) -> None:
        weights = saved / "sae_weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:left])
        with pytest.raises(AuditError, match="damaged or incomplete"):
            load_dictionary(saved)

    @pytest.mark.parametrize("content", [b'{"architecture": ', b"\xff\xfe\x00", b"[1, 2]"])
    def test_configuration_that_is_none(self, saved: Path, content: bytes) -> None:
        (saved / "cfg.json").write_bytes(content)
        with pytest.raises(AuditError, match="copy the SAE again"):
            load_dictionary(saved)

    def test_configuration_without_sizes(self, saved: Path) -> None:
        change_config(saved, d_in=None)
        with pytest.raises(AuditError, match="damaged or incomplete"):
            load_dictionary(saved)

    def test_unknown_architecture(self, saved: Path) -> None:
        change_config(saved, architecture="quantum")
        with pytest.raises(AuditError, match="'quantum', which sae-lens does not know"):
            load_dictionary(saved)

    def test_training_checkpoint(self, saved: Path) -> None:
        change_config(saved, architecture="batchtopk")
        with pytest.raises(AuditError, match=r"training checkpoint.*save_inference_model"):
            load_dictionary(saved)

    def test_shapes_that_contradict_the_configuration(self, saved: Path) -> None:
        change_config(saved, d_sae=FEATURES + 1)
        with pytest.raises(AuditError, match=r"damaged or incomplete.*size mismatch"):
            load_dictionary(saved)

    def test_missing_tensor(self, saved: Path) -> None:
        weights = load_file(saved / "sae_weights.safetensors")
        del weights["b_enc"]
        save_file(weights, saved / "sae_weights.safetensors")
        with pytest.raises(AuditError, match=r"damaged or incomplete.*b_enc"):
            load_dictionary(saved)

    @pytest.mark.parametrize("tensor", ["W_dec", "W_enc", "b_dec"])
    def test_values_that_are_not_finite(self, saved: Path, tensor: str) -> None:
        weights = load_file(saved / "sae_weights.safetensors")
        weights[tensor].view(-1)[3] = float("nan")
        save_file(weights, saved / "sae_weights.safetensors")
        with pytest.raises(AuditError, match="not finite"):
            load_dictionary(saved)


def change_config(directory: Path, **changes: object) -> None:
    """Change settings of a saved SAE; None removes one."""
    config = {**json.loads((directory / "cfg.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "cfg.json").write_text(json.dumps(kept))


RELEASE, SAE_ID = "gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_small"


class TestReleases:
    @pytest.fixture(autouse=True)
    def offline_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty hub cache and no hub, also for what asks it without huggingface_hub."""

        def no_network(url: str, headers: object) -> None:
            raise RequestsConnectionError(f"no route to {url}")

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(pretrained_sae_loaders, "_get_with_rate_limit_retry", no_network)
        return tmp_path

    @pytest.fixture
    def gemma_scope(self, offline_cache: Path) -> dict[str, torch.Tensor]:
        """A narrow Gemma Scope 2 SAE, laid out as the hub's cache has it."""
        revision = "0123456789abcdef0123456789abcdef01234567"
        repository = offline_cache / "models--google--gemma-scope-2-270m-pt"
        folder = repository / "snapshots" / revision / "resid_post" / SAE_ID
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        config = {
            "architecture": "jump_relu",
            "model_name": "gemma-v3-270m-pt",
            "hf_hook_point_in": "model.layers.12.output",
        }
        (folder / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        weights = {
            "w_enc": torch.randn(WIDTH, FEATURES),
            "w_dec": torch.randn(FEATURES, WIDTH),
            "b_enc": torch.randn(FEATURES),
            "b_dec": torch.randn(WIDTH),
            "threshold": torch.rand(FEATURES),
        }
        save_file(weights, folder / "params.safetensors")
        return weights

    def test_gemma_scope_2_from_the_cache(self, gemma_scope: dict[str, torch.Tensor]) -> None:
        dictionary = load_dictionary(RELEASE, SAE_ID)
        hidden = hidden_states(6)
        before = hidden @ gemma_scope["w_enc"] + gemma_scope["b_enc"]
        expected = before.relu() * (before > gemma_scope["threshold"])
        torch.testing.assert_close(dictionary.encode(hidden), expected)
        torch.testing.assert_close(
            dictionary.reconstruct(hidden, expected), expected @ gemma_scope["w_dec"] + gemma_scope["b_dec"]
        )
        torch.testing.assert_close(dictionary.norms, gemma_scope["w_dec"].norm(dim=1))
        assert dictionary.name == f"{RELEASE}/{SAE_ID}"
        assert dictionary.hook_point == "model.layers.12.output"
        assert dictionary.model_name == "google/gemma-3-270m"

    def test_neuronpedia_id_comes_from_the_registry(
        self, gemma_scope: dict[str, torch.Tensor], offline_cache: Path
    ) -> None:
        folder = next(offline_cache.glob(f"models--*/snapshots/*/resid_post/{SAE_ID}"))
        folder.rename(folder.with_name("layer_12_width_16k_l0_medium"))
        dictionary = load_dictionary(RELEASE, "layer_12_width_16k_l0_medium")
        assert dictionary.neuronpedia_id == "gemma-3-270m/12-gemmascope-2-res-16k"
        assert dictionary.info.neuronpedia_id == dictionary.neuronpedia_id

    def test_loaders_are_left_as_they_were(self, gemma_scope: dict[str, torch.Tensor]) -> None:
        before = pretrained_sae_loaders.get_safetensors_tensor_shapes
        load_dictionary(RELEASE, SAE_ID)
        assert pretrained_sae_loaders.get_safetensors_tensor_shapes is before

    def test_damaged_download(self, gemma_scope: dict[str, torch.Tensor], offline_cache: Path) -> None:
        file = next(offline_cache.glob("models--*/snapshots/*/resid_post/*/params.safetensors"))
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(AuditError, match="cannot be loaded by sae-lens"):
            load_dictionary(RELEASE, SAE_ID)

    @pytest.mark.parametrize(
        ("release", "sae_id"),
        [
            (RELEASE, SAE_ID),
            ("gpt2-small-res-jb", "blocks.7.hook_resid_pre"),
            ("someone/their-saes", "layer_3"),
        ],
    )
    def test_not_in_the_cache(self, release: str, sae_id: str) -> None:
        with pytest.raises(AuditError, match=r"local cache and the hub cannot be reached.*download it once"):
            load_dictionary(release, sae_id)

    def test_unknown_release(self) -> None:
        with pytest.raises(AuditError, match="Release gemma-scope-9 not found"):
            load_dictionary("gemma-scope-9", SAE_ID)

    def test_unknown_id_names_some_that_exist(self) -> None:
        with pytest.raises(AuditError, match=r"layer_99 not found.*Valid IDs are.*layer_12"):
            load_dictionary(RELEASE, "layer_99")

    def test_release_without_id_is_told_apart_from_a_directory(self) -> None:
        with pytest.raises(AuditError, match="or a release together with sae_id"):
            load_dictionary(RELEASE)
