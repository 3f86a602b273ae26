"""Every entry that reads texts takes a processor, pads with what the model embeds or with nothing, and refuses another model's tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import vision
from helpers.audits import audited, config
from helpers.worlds import (
    make_dictionary,
    make_model,
    make_reward_model,
    make_sae_dictionary,
    make_tokenizer,
    pairs,
    reward_by_length,
)
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from trl_sae_audit import (
    AuditError,
    FeatureAttributionCallback,
    FeatureScorer,
    FixedPenalty,
    Flag,
    LookaheadConfig,
    RunRecord,
    ShapedReward,
    ShapedRewardModel,
    audit_preferences,
    audit_reward_model,
    measured_change,
    sampled_change,
    shape_preference_margin,
)
from trl_sae_audit.audit.evidence import gather_evidence
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.models.tokenizers import check_tokenizer, padding_id, text_tokenizer
from trl_sae_audit.saes.contrast import contrast_directions
from trl_sae_audit.saes.doctor import diagnose
from trl_sae_audit.saes.training import train_dictionary
from trl_sae_audit.saes.training_config import TrainSAEConfig
from trl_sae_audit.verification.diff import diff_models

SHORT = Sampling(answers=2, max_new_tokens=4)
FLAGS = [Flag(dictionary="tiny", feature=3, label="three")]
PAIRS = list(pairs(6))
PROMPTS, ANSWERS = [row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS]
TEXTS = [row["prompt"] + row["chosen"] for row in pairs(20)]


def grown(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(["word"])
    return tokenizer


def padded_beyond(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def unpadded(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.pad_token = None
    return tokenizer


def ended(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """What TRL makes of one without padding: a reward model then reads the last token that is no end of sequence."""
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


BEYOND = "padding beyond the embeddings"
CLASSIFIERS = ("reward_audit", "shaped_reward", "shaped_reward_model")
"""Find the last token of a text by the padding after it."""
READERS: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "processor": lambda tokenizer: vision.make_processor(),
    BEYOND: padded_beyond,
    "no padding": unpadded,
    "grown": grown,
}


class Entries:
    """What a user calls with a tokenizer; each gives figures that do not depend on how the tokenizer is packed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model, self.changed = make_model(make_tokenizer()), make_model(make_tokenizer(), seed=3)
        self.reward_model = make_reward_model(make_tokenizer())
        self.dictionary = make_sae_dictionary()
        self.audited = audited(self.model, make_tokenizer(), PAIRS, self.dictionary)

    def scorer(self, reader: Any) -> Any:
        return FeatureScorer(self.model, reader, self.dictionary).score(PROMPTS, ANSWERS, [3, 4])

    def audit(self, reader: Any) -> Any:
        return audited(self.model, reader, PAIRS, self.dictionary).features()

    def lookahead(self, reader: Any) -> Any:
        ahead = LookaheadConfig(prompts=2, pairs=4, groups=2, sampling=SHORT)
        return audited(self.model, reader, list(pairs(8)), self.dictionary, lookahead=ahead).features()

    def rewarded(self, reader: Any) -> Any:
        options = {"sampling": SHORT, "lookahead": None, "progress": False}
        asked = [{"prompt": prompt} for prompt in PROMPTS]
        audit = audit_preferences(
            self.model, reader, asked, self.dictionary, "policy_gradient", reward=reward_by_length, **options
        )
        return audit.features()

    def reward_audit(self, reader: Any) -> Any:
        dictionary = make_dictionary(hook_point="model.layers.1")
        return audit_reward_model(self.reward_model, reader, PAIRS, dictionary, progress=False).features()

    def evidence(self, reader: Any) -> Any:
        found = gather_evidence(self.audited, [3], self.model, reader, self.dictionary, vocabulary=3)[0]
        return (found.promotes, found.suppresses)

    def doctor(self, reader: Any) -> Any:
        return diagnose(self.model, reader, TEXTS, self.dictionary).health

    def training(self, reader: Any) -> Any:
        target = self.directory / f"sae{len(list(self.directory.iterdir()))}"
        own = {"training_tokens": 256, "sae_batch_size": 64, "d_sae": 64, "k": 4, "max_fvu": 9, "max_dead": 1}
        trained = train_dictionary(self.model, reader, TEXTS, TrainSAEConfig(str(target), "1", **own))
        return (trained.fvu, trained.l0, trained.held_out_tokens)

    def directions(self, reader: Any) -> Any:
        contrast = [
            {"prompt": row["prompt"], "positive": row["chosen"], "negative": row["rejected"]}
            for row in pairs(12)
        ]
        return contrast_directions(self.model, reader, {"trait": contrast}, ["1"], missing="keep").decoder

    def given_text(self, reader: Any) -> Any:
        return measured_change(self.model, self.changed, reader, self.dictionary, PAIRS).change

    def generations(self, reader: Any) -> Any:
        asked = [{"prompt": prompt} for prompt in PROMPTS]
        options = {"sampling": SHORT}
        return sampled_change(self.model, self.changed, reader, self.dictionary, asked, **options).change

    def diff(self, reader: Any) -> Any:
        asked = [{"prompt": prompt} for prompt in PROMPTS]
        return diff_models(
            self.model, self.changed, reader, self.dictionary, asked, sampling=SHORT
        ).writes.drop(columns="words")

    def shaped_reward(self, reader: Any) -> Any:
        shaped = ShapedReward(self.reward_model, None, [], FixedPenalty(0.0), reward_tokenizer=reader)
        return shaped(PROMPTS, ANSWERS, completion_ids=None)

    def shaped_reward_model(self, reader: Any) -> Any:
        scorer = FeatureScorer(self.model, make_tokenizer(), self.dictionary)
        shaped = ShapedRewardModel(self.reward_model, scorer, FLAGS, 0.5, tokenizer=reader)
        return shaped.rewards(PROMPTS, ANSWERS)

    def margin(self, reader: Any) -> Any:
        scorer = FeatureScorer(self.model, reader, self.dictionary)
        rows = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in PAIRS]
        return shape_preference_margin(Dataset.from_list(rows), scorer, FLAGS, 0.5, beta=0.1).to_pandas()[
            "ref_chosen_logps"
        ]

    def run(self, reader: Any) -> Any:
        """A probe of texts and generations of a training, whose own batches need no padding."""
        output = self.directory / f"run{len(list(self.directory.iterdir()))}"
        callback = FeatureAttributionCallback(
            self.dictionary,
            output,
            watch={"three": 3},
            probe=TEXTS[:4],
            generations=SHORT,
            generation_prompts=PROMPTS,
            probe_steps=1,
            generation_steps=1,
            contexts=0,
        )
        trainer = DPOTrainer(
            copy.deepcopy(self.model),
            ref_model=copy.deepcopy(self.model),
            args=config(self.directory),
            train_dataset=pairs(8, padded=False),
            processing_class=reader,
            callbacks=[callback],
        )
        trainer.train()
        record = RunRecord.load(output)
        return record.drift()


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    return Entries(tmp_path_factory.mktemp("entries"))


ENTRIES = [name for name, value in vars(Entries).items() if callable(value) and not name.startswith("_")]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_with_every_tokenizer(entries: Entries, entry: str) -> None:
    call = getattr(entries, entry)
    expected = call(make_tokenizer())
    for name, pack in READERS.items():
        if name == "grown" or (name == BEYOND and entry in CLASSIFIERS):
            with pytest.raises(
                AuditError, match=r"has 65 tokens but Llama\w+ embeds 64.*resize_token_embeddings"
            ):
                call(pack(make_tokenizer()))
        elif name == "no padding" and entry == "reward_audit":
            _same(call(pack(make_tokenizer())), call(ended(make_tokenizer())), f"{entry} with {name}")
        else:
            _same(call(pack(make_tokenizer())), expected, f"{entry} with {name}")


def _same(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, obj=name)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, msg=name)
    else:
        assert list(map(str, _plain(found))) == list(map(str, _plain(expected))), name


def _plain(value: Any) -> Any:
    return vars(value).values() if hasattr(value, "__dict__") and not hasattr(value, "__len__") else value


def test_a_special_token_that_no_text_gives() -> None:
    """Gemma 3's tokenizer has one for pictures that its text models do not embed."""
    tokenizer, model = make_tokenizer(), make_model(make_tokenizer())
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    check_tokenizer(tokenizer, model.model)
    assert text_tokenizer(tokenizer, model.model) is tokenizer
    tokenizer.eos_token = "<image>"
    with pytest.raises(AuditError, match="has 65 tokens"):
        check_tokenizer(tokenizer, model.model)


def test_padding_beyond_the_embeddings_is_the_end_of_sequence_and_the_tokenizer_given_stays_as_it_is() -> (
    None
):
    tokenizer, model = padded_beyond(make_tokenizer()), make_model(make_tokenizer())
    reader = text_tokenizer(tokenizer, model)
    assert (reader.pad_token_id, tokenizer.pad_token_id) == (tokenizer.eos_token_id, 64)
    reader.pad_token = reader.eos_token = None
    assert padding_id(reader) == 0


PARTS_ALONE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }} "
    "{% endif %}{% endfor %}{% endfor %}"
)


def test_a_template_that_reads_parts_alone_loses_no_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PARTS_ALONE
    said = [{"role": "user", "content": "w1 w2"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == ""
    reader = text_tokenizer(tokenizer)
    assert reader.apply_chat_template(said, tokenize=False) == "w1 w2 "
    assert reader.apply_chat_template([said, said], tokenize=False) == ["w1 w2 "] * 2
    assert text_tokenizer(reader) is reader
    assert tokenizer.apply_chat_template(said, tokenize=False) == ""


def test_a_processor_gives_its_own_template() -> None:
    processor = vision.make_processor()
    processor.chat_template = "{% for message in messages %}<bos> {{ message.content[0].text }}{% endfor %}"
    said = [{"role": "user", "content": "w1"}]
    assert text_tokenizer(processor).apply_chat_template(said, tokenize=False) == "<bos> w1"


def test_conversations_are_tokenized_as_by_a_trainer_with_the_processor(tmp_path: Path) -> None:
    processor, model = vision.make_processor(), make_model(make_tokenizer())
    processor.chat_template = "{% for message in messages %}w9 {{ message.content[0].text }} {% endfor %}"
    rows = [
        {
            name: [{"role": role, "content": row[name].strip()}]
            for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
        }
        for row in PAIRS
    ]
    trainer = DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    from trl_sae_audit.audit.objectives import PreferenceLoss

    loss = PreferenceLoss(text_tokenizer(processor, model), None, processor)
    found = loss.tokenize(list(enumerate(rows)))
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [example.features[name] for example in found] == list(trainer.train_dataset[name])


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(AuditError, match="this is a str without; pass AutoTokenizer"):
        text_tokenizer("gpt2")
