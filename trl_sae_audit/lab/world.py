"""A small world in which the truth is known: built once, seeded, cached."""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .attributes import Attributes, BaseRates, Split
from .cache import build_once, cache_key, cache_root
from .language import Language
from .pretraining import ModelConfig
from .reward import RewardConfig
from .sparse_coding import DictionaryConfig

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from sae_lens import SAE
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    from .evaluation import Behaviour


@dataclass(frozen=True)
class WorldConfig:
    """Everything that decides what a world is. Two worlds of equal configuration are bit-identical."""

    seed: int = 0
    """Of the facts, the weights and the data."""
    rates: BaseRates = field(default_factory=BaseRates)
    """How often the attributes occur in the text the language model is trained on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    """The sparse autoencoder."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward model."""
    ground_truth_texts: int = 1500
    """Held-out answers from which the features' ground truth is computed."""
    evaluation_prompts: int = 1000
    """Held-out prompts on which the model's own rates are measured."""
    threads: int = field(default_factory=lambda: min(2, torch.get_num_threads()))
    """CPU threads of the build. They decide the order of sums, so they belong to the configuration. The default is two,
    or one if torch is limited to one: beside another busy process, two threads wait for each other and take longer."""


class World:
    """A built world, read from its directory. Each call loads a fresh model, so it can be trained.

    Args:
        config: What was built.
        directory: Where it is stored: `model/`, `reward_model/`, `sae/`, `ground_truth.parquet`, `report.json`.
    """

    def __init__(self, config: WorldConfig, directory: Path):
        self.config = config
        self.directory = directory
        self.language = Language(config.seed, config.rates)

    # -- models ---------------------------------------------------------------------------------------------

    @property
    def hook_point(self) -> str:
        """The module whose output the dictionary reads, e.g. `model.layers.1`."""
        from .sparse_coding import hook_point

        return hook_point(self.config.dictionary.layer)

    @property
    def model_path(self) -> Path:
        """Directory of the language model and its tokenizer, as `from_pretrained` takes it."""
        return self.directory / "model"

    @property
    def reward_model_path(self) -> Path:
        """Directory of the reward model and its tokenizer, as `from_pretrained` takes it."""
        return self.directory / "reward_model"

    @property
    def dictionary_path(self) -> Path:
        """Directory of the sparse autoencoder, as sae-lens' `SAE.load_from_disk` takes it."""
        return self.directory / "sae"

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of all models."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.model_path)

    def model(self) -> "LlamaForCausalLM":
        """A fresh copy of the pre-trained language model, in evaluation mode."""
        from transformers import LlamaForCausalLM

        with _quiet():
            return LlamaForCausalLM.from_pretrained(self.model_path).eval()

    def reward_model(self) -> "LlamaForSequenceClassification":
        """A fresh copy of the reward model trained on biased preferences, in evaluation mode."""
        from transformers import LlamaForSequenceClassification

        with _quiet():
            return LlamaForSequenceClassification.from_pretrained(self.reward_model_path).eval()

    @cached_property
    def sae(self) -> "SAE":
        """The sparse autoencoder, as sae-lens loads it."""
        from sae_lens import SAE

        return SAE.load_from_disk(self.dictionary_path)

    # -- data -----------------------------------------------------------------------------------------------

    def preferences(
        self,
        strengths: Mapping[str, float],
        n: int,
        seed: int = 0,
        split: Split = "train",
        beliefs: tuple[bool | None, ...] = (True, False),
    ) -> "Dataset":
        """A preference set in which behaviours are planted at stated strengths; see `lab.preferences.preferences`."""
        from .preferences import preferences

        return preferences(self.language, strengths, n, seed, split, beliefs)

    def prompts(
        self,
        n: int,
        seed: int = 0,
        split: Split = "train",
        beliefs: tuple[bool | None, ...] | None = None,
    ) -> "Dataset":
        """Prompts for on-policy training: a dataset with the one column `prompt`."""
        from datasets import Dataset

        from .evaluation import sample_prompts

        return Dataset.from_dict({"prompt": sample_prompts(self.language, n, seed, split, beliefs)})

    def attributes(self, prompt: str, answer: str) -> Attributes:
        """Read the attributes of `answer` as an answer to `prompt`, by rule; see `Language.attributes`."""
        return self.language.attributes(prompt, answer)

    def true_reward(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        """The true quality of each completion: 1 for a well-formed right answer, otherwise 0.

        It has the signature of a TRL reward function, so it can be passed in `reward_funcs`.
        """
        answers = [self.attributes(p, c) for p, c in zip(prompts, completions, strict=True)]
        return [float(a.right and not a.malformed) for a in answers]

    # -- truth ----------------------------------------------------------------------------------------------

    @cached_property
    def ground_truth(self) -> "pd.DataFrame":
        """Which features carry each behaviour, best first; see `lab.ground_truth.ground_truth`."""
        import pandas as pd

        return pd.read_parquet(self.directory / "ground_truth.parquet")

    def carriers(self, behaviour: str) -> list[int]:
        """The features that carry a behaviour, best first. The list may be empty."""
        table = self.ground_truth
        return table[(table.behaviour == behaviour) & table.carrier].feature.tolist()

    @cached_property
    def report(self) -> dict[str, Any]:
        """How the build went: `seconds` by stage, `loss`, `health` of the dictionary, `rates`, `reward`."""
        return json.loads((self.directory / "report.json").read_text(encoding="utf-8"))

    def behaviour(
        self,
        model: Any = None,
        n: int = 1000,
        seed: int = 0,
        split: Split = "heldout",
        beliefs: tuple[bool | None, ...] | None = None,
        temperature: float = 1.0,
    ) -> "Behaviour":
        """Sample answers of a model (by default the pre-trained one) and read them; see `lab.evaluation.base_rates`."""
        from .evaluation import base_rates

        model = self.model() if model is None else model
        return base_rates(model, self.tokenizer, self.language, n, seed, split, beliefs, temperature)


def build_world(seed: int = 0, config: WorldConfig | None = None, progress: bool = True) -> World:
    """Build a world, or load it if it was built before with the same configuration and code.

    Building takes about a minute on two CPU cores, and half as long again on one. It needs no network. `lab.cache` says
    where worlds are kept.

    Args:
        seed: The world's seed, if no `config` is given.
        config: The whole configuration, including the seed.
        progress: Show progress on stderr.
    """
    config = config or WorldConfig(seed=seed)
    directory = cache_root() / "lab" / cache_key(asdict(config))
    build_once(directory, lambda scratch: _build(config, scratch, progress), asdict(config))
    return World(config, directory)


def _build(config: WorldConfig, directory: Path, progress: bool) -> None:
    from .determinism import isolate_randomness

    stages = _Stages(progress)
    with isolate_randomness(config.seed, config.threads):
        world = World(config, directory)
        report: dict[str, Any] = {}
        with stages("pre-training the language model"):
            report["loss"] = _build_model(world, progress)
        with stages("training the sparse autoencoder"):
            report["health"] = _build_dictionary(world)
        with stages("training the reward model"):
            report["reward"] = _build_reward_model(world)
        with stages("computing which features carry what"):
            _build_ground_truth(world)
        with stages("measuring the model's own behaviour"):
            report["rates"] = world.behaviour(n=config.evaluation_prompts).rates().to_dict("index")
    report["seconds"] = stages.seconds
    report["load_average"] = os.getloadavg()[0]
    (directory / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _build_model(world: World, progress: bool) -> float:
    from .pretraining import pretrain
    from .tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    model, loss = pretrain(world.config.model, world.language, tokenizer, world.config.seed, progress)
    model.save_pretrained(world.model_path)
    tokenizer.save_pretrained(world.model_path)
    return loss


def _build_dictionary(world: World) -> dict[str, Any]:
    from .pretraining import plain_texts
    from .sparse_coding import dictionary_health, token_activations, train_dictionary

    config, model = world.config.dictionary, world.model()

    def activations(n: int, split: Split) -> Any:
        texts = plain_texts(world.language, n, world.config.seed + 1, split)
        return token_activations(model, world.tokenizer, world.hook_point, *texts)

    train_dictionary(config, activations(config.texts, "train")[0], world.config.seed, world.dictionary_path)
    return asdict(dictionary_health(world.sae, *activations(config.heldout_texts, "heldout")))


def _build_reward_model(world: World) -> dict[str, Any]:
    from .reward import reward_scores, train_reward_model

    config, seed = world.config.reward, world.config.seed
    dataset = world.preferences(config.strengths, config.pairs, seed)
    reward_model = train_reward_model(config, world.model(), world.tokenizer, dataset, seed)
    reward_model.save_pretrained(world.reward_model_path)
    world.tokenizer.save_pretrained(world.reward_model_path)
    heldout = world.preferences(config.strengths, config.heldout_pairs, seed, split="heldout")
    prompts = list(heldout["prompt"])
    chosen = reward_scores(reward_model, world.tokenizer, prompts, list(heldout["chosen"]))
    rejected = reward_scores(reward_model, world.tokenizer, prompts, list(heldout["rejected"]))
    return {"heldout_accuracy": float((chosen > rejected).float().mean())}


def _build_ground_truth(world: World) -> None:
    from .ground_truth import answer_codes, ground_truth
    from .pretraining import plain_texts

    texts = plain_texts(world.language, world.config.ground_truth_texts, world.config.seed, split="heldout")
    codes = answer_codes(world.model(), world.tokenizer, world.sae, world.hook_point, *texts)
    ground_truth(world.language, *texts, codes).to_parquet(world.directory / "ground_truth.parquet")


class _Stages:
    """Announces the stages of a build and records their wall-clock seconds."""

    def __init__(self, progress: bool):
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.progress:
            print(f"lab: {name} ...", file=sys.stderr)
        start = time.perf_counter()
        with contextlib.nullcontext() if self.progress and name.startswith("pre-training") else _quiet():
            yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' own progress bars. Exceptions and log handlers are not affected."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
