"""The built world: its model, dictionary, reward model and ground truth are what they are said to be."""

import subprocess
import sys
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from trl_sae_audit.errors import AuditError
from trl_sae_audit.io.manifest import read_manifest, stored_files
from trl_sae_audit.lab.evaluation import base_rates, read_behaviour, sample_answers, wilson_interval
from trl_sae_audit.lab.ground_truth import auc, ground_truth, ranks
from trl_sae_audit.lab.language import Language
from trl_sae_audit.lab.pretraining import ModelConfig, encode_pairs, plain_texts
from trl_sae_audit.lab.reward import RewardConfig, reward_scores
from trl_sae_audit.lab.sparse_coding import DictionaryConfig, residual_stream
from trl_sae_audit.lab.wording import words
from trl_sae_audit.lab.world import World, WorldConfig, build_world

TINY = WorldConfig(
    seed=3,
    model=ModelConfig(layers=2, hidden_size=32, mlp_size=32, steps=12, batch_size=8),
    dictionary=DictionaryConfig(layer=0, size=64, k=4, texts=60, steps=12, batch_size=128, heldout_texts=20),
    reward=RewardConfig(pairs=16, heldout_pairs=8, batch_size=8),
    ground_truth_texts=60,
    evaluation_prompts=20,
)


def test_auc_against_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, size=(60, 3)).astype(float)
    positive = rng.random(60) < 0.4
    difference = scores[positive][:, None] - scores[~positive][None]
    expected = ((difference > 0) + 0.5 * (difference == 0)).mean((0, 1))
    np.testing.assert_allclose(auc(ranks(scores), positive), expected)
    assert np.isnan(auc(ranks(scores), np.ones(60, dtype=bool))).all()


def test_ground_truth_finds_features_made_to_carry(language: Language) -> None:
    """Codes made by hand: one feature fires on agreement, one on half of the filler, one on every word, one on none."""
    prompts, answers = plain_texts(language, 300, seed=7)
    codes = []
    for i, answer in enumerate(answers):
        tokens = words(answer)
        code = torch.zeros(len(tokens), 4)
        code[:, 2] = 1 + torch.rand(len(tokens), generator=torch.Generator().manual_seed(i))
        for span in language.spans(answer):
            if span.kind == "agree":
                code[span.start : span.stop, 0] = 2.0
            if span.kind == "filler" and tokens[span.start : span.stop].count("care"):
                code[span.start : span.stop, 1] = 1.0
        codes.append(code)
    table = ground_truth(language, prompts, answers, codes).set_index(["behaviour", "feature"])
    agrees, padded = table.loc[("agrees", 0)], table.loc[("padded", 1)]
    assert (agrees.auc, agrees.recall, agrees.precision, agrees.span_auc, agrees.span_mass) == (1, 1, 1, 1, 1)
    assert padded.precision == 1
    assert padded.carrier
    assert table[table.carrier].index.tolist() == [("agrees", 0), ("padded", 1)]


def test_ground_truth_breaks_ties_by_correlation_then_by_feature(language: Language) -> None:
    """All three separate perfectly by their maximum; the first is also active, only less, in every other answer."""
    prompts, answers = plain_texts(language, 300, seed=7)
    codes = []
    for answer in answers:
        code = torch.zeros(len(words(answer)), 3)
        code[:, 0] = 1.0
        for span in language.spans(answer):
            if span.kind == "agree":
                code[span.start : span.stop, 0] = 2.0
                code[span.start : span.stop, 1:] = 1.0
        codes.append(code)
    table = (
        ground_truth(language, prompts, answers, codes).query("behaviour == 'agrees'").set_index("feature")
    )
    assert table.auc.tolist() == [1.0, 1.0, 1.0]
    assert table.index.tolist() == [1, 2, 0]
    assert table.point_biserial[1] == table.point_biserial[2] > table.point_biserial[0]


def test_wilson_interval() -> None:
    low, high = wilson_interval(0, 20)
    assert low == 0
    assert 0.1 < high < 0.2
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_same_seed_same_bits_and_the_outside_is_untouched(monkeypatch, tmp_path) -> None:
    def digests(where: str, config: WorldConfig) -> dict[str, int]:
        monkeypatch.setenv("TRL_SAE_AUDIT_CACHE", str(tmp_path / where))
        manifest = read_manifest(build_world(config=config, progress=False).directory, "world")
        return {
            stored.file: stored.crc32
            for stored in stored_files(manifest)
            if stored.file.endswith((".safetensors", "ground_truth.parquet"))
        }

    torch.manual_seed(123)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    one = digests("one", TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.rand(7)  # another state of the global generators
    assert one == digests("two", TINY)
    assert len(one) == 4
    assert one["model/model.safetensors"] != digests("one", replace(TINY, seed=4))["model/model.safetensors"]


def test_import_is_light() -> None:
    code = (
        "import sys, trl_sae_audit.lab, trl_sae_audit.lab.language\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'sae_lens', 'datasets', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_model_has_learned_the_language(world: World) -> None:
    greedy = world.behaviour(n=400, temperature=0)
    rates = greedy.rates().rate
    assert rates.right > 0.9
    assert rates.malformed < 0.02
    sampled = world.behaviour(n=1000).rates()
    assert sampled.rate.malformed < 0.08
    base = vars(world.language.rates)
    for name in ("right", "agrees", "disagrees", "padded", "marked"):
        assert sampled.rate[name] == pytest.approx(base[name], abs=0.08), name


def test_sampling_is_seeded_and_leaves_no_trace(world: World) -> None:
    model = world.model().train()
    prompts = world.prompts(40, seed=1, split="heldout")["prompt"]
    before = torch.get_rng_state()
    one = sample_answers(model, world.tokenizer, list(prompts), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert one == sample_answers(model, world.tokenizer, list(prompts), seed=5)
    assert one != sample_answers(model, world.tokenizer, list(prompts), seed=6)
    model.generation_config.repetition_penalty = 5.0  # a file of the model's decides nothing
    assert one == sample_answers(model, world.tokenizer, list(prompts), seed=5)
    with pytest.raises(AuditError, match="below 0"):
        sample_answers(model, world.tokenizer, list(prompts), temperature=-1)


def test_rates_are_those_of_the_answers(world: World) -> None:
    behaviour = base_rates(world.model(), world.tokenizer, world.language, n=60, seed=2)
    again = read_behaviour(world.language, behaviour.prompts, behaviour.answers)
    assert again == behaviour
    rates, frame = behaviour.rates(), behaviour.frame()
    assert rates.rate.right == frame.right.mean()
    assert rates.rate.agrees == frame[frame.belief_right.notna()].agrees.mean()
    assert ((rates.low <= rates.rate) & (rates.rate <= rates.high)).all()


def test_the_dictionary_is_healthy_and_says_where_it_hooks(world: World) -> None:
    health = world.report["health"]
    assert health["fvu"] < 0.1
    assert health["l0"] == pytest.approx(world.config.dictionary.k, rel=0.1)
    assert health["dead"] < 0.15 * world.config.dictionary.size
    metadata = world.sae.cfg.metadata
    assert metadata.hf_hook_name == world.hook_point
    assert metadata.hook_name == "blocks.1.hook_resid_post"
    assert metadata.model_name
    prompts, answers = plain_texts(world.language, 30, seed=11, split="heldout")
    input_ids, attention_mask, answer_mask = encode_pairs(world.tokenizer, prompts, answers)
    hidden = residual_stream(world.model(), world.hook_point, input_ids, attention_mask)[answer_mask]
    with torch.no_grad():
        error = (world.sae(hidden) - hidden).pow(2).sum() / (hidden - hidden.mean(0)).pow(2).sum()
    assert error < 0.1


@pytest.mark.parametrize("behaviour", ["agrees", "padded", "marked"])
def test_the_ground_truth_separates_on_fresh_text(world: World, behaviour: str) -> None:
    """The first carrier also tells the behaviour on answers the table was not made from, and better than the median."""
    carriers = world.carriers(behaviour)
    assert carriers
    prompts, answers = plain_texts(world.language, 300, seed=99, split="heldout")
    input_ids, attention_mask, answer_mask = encode_pairs(world.tokenizer, prompts, answers)
    hidden = residual_stream(world.model(), world.hook_point, input_ids, attention_mask)
    with torch.no_grad():
        codes = world.sae.encode(hidden).masked_fill(~answer_mask[..., None], 0).amax(1).numpy()
    has = np.array([vars(world.attributes(p, a))[behaviour] for p, a in zip(prompts, answers, strict=True)])
    found = auc(ranks(codes), has)
    assert found[carriers[0]] > 0.7  # a carrier of one of two wordings finds half of the answers: 0.75
    assert found[carriers[0]] > np.quantile(found, 0.9)


def test_the_reward_model_has_learned_the_bias(world: World) -> None:
    """At a fixed prompt, its scores rise with the behaviours that its data rewarded."""
    reward_model = world.reward_model()
    for behaviour in world.config.reward.strengths:
        pairs = world.preferences({behaviour: 1.0}, n=300, seed=5, split="heldout")
        prompts = list(pairs["prompt"])
        chosen = reward_scores(reward_model, world.tokenizer, prompts, list(pairs["chosen"]))
        rejected = reward_scores(reward_model, world.tokenizer, prompts, list(pairs["rejected"]))
        assert (chosen > rejected).float().mean() > 0.6, behaviour
    assert world.report["reward"]["heldout_accuracy"] > 0.65


def test_true_reward_is_rightness(world: World) -> None:
    prompt = world.language.sample_prompt(Random(0), beliefs=(False,))
    right, wrong = f" it is {prompt.question.right} .", f"it is {prompt.belief} ."
    answers = [right, wrong, right + " it", "you are right ."]
    assert world.true_reward([prompt.text] * 4, answers, trainer_state=None) == [1.0, 0.0, 0.0, 0.0]
    assert world.true_reward.__name__ == "true_reward"
