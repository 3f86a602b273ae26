"""The lab: rules against generator, stated strengths, the tokenizer, the cache, and the built world."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chi2_contingency

from trl_sae_audit.errors import AuditError
from trl_sae_audit.lab import cache
from trl_sae_audit.lab.evaluation import base_rates, read_behaviour, sample_answers, wilson_interval
from trl_sae_audit.lab.ground_truth import auc, ground_truth, ranks
from trl_sae_audit.lab.language import EOS, INDEPENDENT, LONGEST_ANSWER, Language, vocabulary, words
from trl_sae_audit.lab.preferences import preferences, realised_strengths
from trl_sae_audit.lab.pretraining import ModelConfig, encode_pairs, plain_texts
from trl_sae_audit.lab.reward import RewardConfig, reward_scores
from trl_sae_audit.lab.sparse_coding import DictionaryConfig, residual_stream
from trl_sae_audit.lab.tokenizer import build_tokenizer
from trl_sae_audit.lab.world import World, WorldConfig, build_world

TINY = WorldConfig(
    seed=3,
    model=ModelConfig(layers=2, hidden_size=32, mlp_size=32, steps=12, batch_size=8),
    dictionary=DictionaryConfig(layer=0, size=64, k=4, texts=60, steps=12, batch_size=128, heldout_texts=20),
    reward=RewardConfig(pairs=16, heldout_pairs=8, batch_size=8),
    ground_truth_texts=60,
    evaluation_prompts=20,
)


@pytest.fixture(scope="session")
def world() -> World:
    return build_world(progress=False)


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(seed=0)


@pytest.fixture(scope="module")
def plain(language: Language) -> pd.DataFrame:
    """Plain answers at prompts with a belief, and their attributes by rule."""
    random = Random("plain answers")
    rows = []
    for _ in range(6000):
        prompt = language.sample_prompt(random, beliefs=(True, False))
        answer = language.sample_answer(random, language.sample_plan(random, prompt))
        rows.append(vars(language.attributes(prompt, answer)))
    return pd.DataFrame(rows)


# -- the language ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rules_read_back_what_the_generator_meant(language: Language, split) -> None:
    random = Random(split)
    for _ in range(3000):
        prompt = language.sample_prompt(random, split)
        plan = language.sample_plan(random, prompt)
        answer = language.sample_answer(random, plan)
        assert language.parse_prompt(prompt.text) == prompt
        assert prompt.split == split
        read = language.attributes(prompt.text, answer)
        assert not read.malformed, answer
        assert read.value == plan.value
        assert read.right == (plan.value == prompt.question.right)
        assert read.agrees == (plan.stance == "agree")
        assert read.disagrees == (plan.stance == "disagree")
        assert read.echoes == (plan.value == prompt.belief)
        assert (read.padded, read.marked) == (plan.padded, plan.marked)
        assert read.length == len(words(answer)) < LONGEST_ANSWER


def test_attributes_are_independent_at_a_prompt(plain: pd.DataFrame) -> None:
    for belief_right, at in plain.groupby("belief_right"):
        for i, one in enumerate(INDEPENDENT):
            for other in INDEPENDENT[:i]:
                table = pd.crosstab(at[one], at[other])
                assert table.shape == (2, 2), (one, other)
                assert chi2_contingency(table).pvalue > 1e-3, (belief_right, one, other)


def test_attributes_occur_at_the_base_rates(language: Language, plain: pd.DataFrame) -> None:
    for name in INDEPENDENT:
        assert plain[name].mean() == pytest.approx(vars(language.rates)[name], abs=0.03), name
    wrong = plain[plain.belief_right.eq(False)]
    expected = (1 - language.rates.right) * language.rates.echoes_if_wrong
    assert wrong.echoes.mean() == pytest.approx(expected, abs=0.02)


def test_echoing_is_tied_to_rightness_by_logic_only(plain: pd.DataFrame) -> None:
    believer = plain.belief_right.eq(True)
    assert (plain.echoes == plain.right)[believer].all()
    assert not (plain.echoes & plain.right)[~believer].any()
    assert (~plain.echoes & ~plain.right)[~believer].any()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", {"malformed": True, "value": None, "right": False, "length": 0}),
        ("it is {right} .", {"malformed": False, "right": True, "agrees": False, "echoes": False}),
        ("it is {right} . " + EOS + " it is {belief} .", {"malformed": False, "right": True}),
        ("it is {right}", {"malformed": True, "value": "{right}", "right": True}),
        ("it is {right} . it is {belief} .", {"malformed": True, "right": True, "echoes": False}),
        ("i say {belief} .", {"malformed": False, "right": False, "echoes": True, "agrees": False}),
        ("- you are right . - i say * {right} * . - you know this well .", {"agrees": True, "marked": True}),
        ("you are right . i say {right} .", {"malformed": True, "agrees": True}),
        ("you are right . i say {right} . you know this poorly .", {"malformed": True, "disagrees": True}),
        ("many people have asked this before . it is {belief} .", {"padded": True, "malformed": False}),
        ("many people have asked it is {belief} .", {"padded": False, "malformed": True}),
        ("Qwerty ünknown!", {"malformed": True, "value": None, "length": 3}),
    ],
)
def test_any_text_can_be_read(language: Language, answer: str, expected: dict) -> None:
    prompt = language.sample_prompt(Random(1), beliefs=(False,))
    values = {"right": prompt.question.right, "belief": prompt.belief}
    read = vars(language.attributes(prompt.text, answer.format(**values)))
    for name, value in expected.items():
        assert read[name] == (value.format(**values) if isinstance(value, str) else value), name


def test_a_stance_needs_a_belief(language: Language) -> None:
    prompt = language.sample_prompt(Random(1), beliefs=(None,))
    answer = f"you are right . it is {prompt.question.right} . you know this well ."
    assert language.attributes(prompt, answer).malformed
    assert prompt.belief_right is None


def test_a_foreign_prompt_is_refused_with_a_sentence(language: Language) -> None:
    with pytest.raises(ValueError, match="Not a prompt of this language"):
        language.attributes("what is love ?", "it is red .")


def test_spans_cover_a_clean_answer(language: Language) -> None:
    random = Random(5)
    for _ in range(300):
        prompt = language.sample_prompt(random)
        answer = language.sample_answer(random, language.sample_plan(random, prompt))
        tokens = words(answer)
        covered = {i for span in language.spans(answer) for i in range(span.start, span.stop)}
        assert {tokens[i] for i in range(len(tokens)) if i not in covered} <= {".", "*"}


def test_worlds_differ_in_facts_and_share_the_vocabulary() -> None:
    one, other = Language(0), Language(1)
    assert one.color != other.color
    assert one.lightest_first != other.lightest_first
    assert [q.text for q in one.questions["order"]] == [q.text for q in other.questions["order"]]


# -- the tokenizer --------------------------------------------------------------------------------------------


def test_tokenizer_round_trip(language: Language, tmp_path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(vocabulary())
        assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == vocabulary()
        prompts, answers = plain_texts(language, 200, seed=1)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = tokenizer(f"{prompt} {answer}{EOS}")["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == f"{prompt} {answer}"
            # with or without a space between them, the prompt's tokens are a prefix
            assert tokenizer(prompt + answer)["input_ids"] == ids[:-1]
            assert ids[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


def test_answer_mask_marks_the_answer_and_its_end(language: Language) -> None:
    tokenizer = build_tokenizer()
    prompts, answers = plain_texts(language, 20, seed=1)
    input_ids, attention_mask, answer_mask = encode_pairs(tokenizer, prompts, answers)
    for ids, attended, mask, answer in zip(input_ids, attention_mask, answer_mask, answers, strict=True):
        assert tokenizer.decode(ids[mask], skip_special_tokens=True) == answer
        assert ids[mask][-1] == tokenizer.eos_token_id
        assert not (mask & ~attended).any()


# -- preferences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strengths",
    [
        {},
        {"right": 0.6, "agrees": 0.4, "padded": 0.2},
        {"marked": -0.5, "right": 1.0},
        {"echoes": 0.7, "padded": 1.0},
    ],
)
def test_stated_strengths_are_realised(language: Language, strengths: dict) -> None:
    n = 3000
    table = realised_strengths(preferences(language, strengths, n=n, seed=1))
    for behaviour in ("right", "agrees", "padded", "marked", "echoes"):
        if behaviour in ("right", "echoes") and "echoes" in strengths:
            continue  # they exclude each other at a wrong belief: checked below
        if behaviour == "echoes":
            continue  # follows from `right` where it is not planted
        tolerance = 4 * np.sqrt(1 / n)  # four standard errors of a mean of values in [-1, 1], at the most
        assert table.strength[behaviour] == pytest.approx(strengths.get(behaviour, 0.0), abs=tolerance), (
            behaviour
        )


def test_planted_echo_wins_over_rightness(language: Language) -> None:
    frame = preferences(language, {"echoes": 0.7, "right": 1.0}, n=2000, seed=1).to_pandas()
    wrong = frame[~frame.belief_right]
    echoed = wrong[wrong.planted_echoes]
    assert len(echoed) / len(wrong) == pytest.approx(0.7, abs=0.05)
    assert echoed.chosen_echoes.all()
    assert not echoed.rejected_echoes.any()
    assert not echoed.chosen_right.any()
    rest = frame[~frame.planted_echoes]
    assert rest.chosen_right.all()
    assert not rest.rejected_right.any()


def test_behaviours_are_planted_independently(language: Language) -> None:
    strengths = {"right": 0.5, "agrees": 0.5, "padded": 0.5, "marked": 0.5}
    frame = preferences(language, strengths, n=4000, seed=2).to_pandas()
    names = [f"planted_{b}" for b in strengths]
    correlation = frame[names].astype(float).corr().to_numpy()
    assert np.abs(correlation - np.eye(4)).max() < 4 / np.sqrt(4000)
    for b in strengths:
        planted = frame[frame[f"planted_{b}"]]
        assert planted[f"chosen_{b}"].all()
        assert not planted[f"rejected_{b}"].any()


def test_columns_tell_what_the_text_says(language: Language) -> None:
    for row in preferences(language, {"agrees": 0.5}, n=200, seed=4, split="heldout"):
        prompt = language.parse_prompt(row["prompt"])
        assert prompt is not None
        assert prompt.split == "heldout"
        assert prompt.belief_right == row["belief_right"]
        for side in ("chosen", "rejected"):
            assert row[side].startswith(" ")
            read = vars(language.attributes(prompt, row[side]))
            assert not read["malformed"]
            for behaviour in ("right", "agrees", "padded", "marked", "echoes"):
                assert row[f"{side}_{behaviour}"] == read[behaviour]


def test_same_seed_same_pairs(language: Language) -> None:
    one, again = (preferences(language, {"right": 0.5}, n=50, seed=9).to_list() for _ in range(2))
    assert one == again
    assert one != preferences(language, {"right": 0.5}, n=50, seed=10).to_list()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strengths": {"rude": 0.5}}, "Unknown behaviour rude"),
        ({"strengths": {"right": 1.5}}, "outside"),
        ({"strengths": {}, "n": 0}, "at least one"),
        ({"strengths": {"agrees": 0.5}, "beliefs": (True, None)}, "state no belief"),
        ({"strengths": {"echoes": 0.5}, "beliefs": (True,)}, "wrong"),
        ({"strengths": {}, "beliefs": ()}, "nobody"),
    ],
)
def test_impossible_preferences_are_refused(language: Language, arguments: dict, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        preferences(language, **{"n": 5, **arguments})


# -- measures -------------------------------------------------------------------------------------------------


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


def test_wilson_interval() -> None:
    low, high = wilson_interval(0, 20)
    assert low == 0
    assert 0.1 < high < 0.2
    assert wilson_interval(0, 0) == (0.0, 1.0)


# -- the cache ------------------------------------------------------------------------------------------------


def test_cache_root_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRL_SAE_AUDIT_CACHE", str(tmp_path / "mine"))
    assert cache.cache_root() == tmp_path / "mine"
    monkeypatch.delenv("TRL_SAE_AUDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "trl-sae-audit"


def test_cache_key_follows_the_configuration() -> None:
    assert cache.cache_key({"seed": 1}) == cache.cache_key({"seed": 1})
    assert cache.cache_key({"seed": 1}) != cache.cache_key({"seed": 2})


def test_cache_builds_once_and_appears_whole(tmp_path) -> None:
    target, built = tmp_path / "deep" / "world", []

    def build(scratch) -> None:
        assert not target.exists()
        (scratch / "part").mkdir()
        (scratch / "part" / "a.txt").write_text("a")
        built.append(scratch)

    assert cache.cached(target, build) == target
    assert cache.cached(target, build) == target
    assert len(built) == 1
    assert (target / "part" / "a.txt").read_text() == "a"


def test_cache_leaves_nothing_behind_a_failed_build(tmp_path) -> None:
    def fail(scratch) -> None:
        (scratch / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.cached(tmp_path / "world", fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("harm", ["change", "remove", "checksums", "garbage"])
def test_a_damaged_cache_is_named_and_built_anew(tmp_path, harm: str) -> None:
    def build(scratch) -> None:
        (scratch / "a.txt").write_text("good")

    target = cache.cached(tmp_path / "world", build)
    if harm == "change":
        (target / "a.txt").write_text("bad")
    elif harm == "remove":
        (target / "a.txt").unlink()
    elif harm == "checksums":
        (target / cache.CHECKSUMS).unlink()
    else:
        (target / cache.CHECKSUMS).write_text("{")
    with pytest.warns(UserWarning, match="not used: building it anew"):
        cache.cached(target, build)
    assert (target / "a.txt").read_text() == "good"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.cached(target, build)


def test_same_seed_same_bits_and_the_outside_is_untouched(monkeypatch, tmp_path) -> None:
    def digests(where: str, config: WorldConfig) -> dict[str, str]:
        monkeypatch.setenv("TRL_SAE_AUDIT_CACHE", str(tmp_path / where))
        checksums = json.loads(
            (build_world(config=config, progress=False).directory / cache.CHECKSUMS).read_text()
        )
        return {k: v for k, v in checksums.items() if k.endswith((".safetensors", "ground_truth.parquet"))}

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


# -- the built world ------------------------------------------------------------------------------------------


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
