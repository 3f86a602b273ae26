"""How a model behaves: it answers held-out prompts, and its answers are read by rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import AuditError
from ..models.sampling import without_own_generation_config
from .attributes import Attributes, Split
from .language import Language
from .wording import LONGEST_ANSWER

RATES = ("right", "agrees", "disagrees", "echoes", "padded", "marked", "malformed")
"""The attributes whose rates are reported."""


@dataclass(frozen=True)
class Behaviour:
    """Answers of one model and their attributes."""

    prompts: list[str]
    """The prompts asked."""
    answers: list[str]
    """The answer to each."""
    attributes: list[Attributes]
    """The attributes of each answer, read by rule."""

    def frame(self) -> pd.DataFrame:
        """One row an answer: `prompt`, `answer` and every attribute."""
        frame = pd.DataFrame([vars(attributes) for attributes in self.attributes])
        frame.insert(0, "answer", self.answers)
        frame.insert(0, "prompt", self.prompts)
        return frame

    def rates(self, confidence: float = 0.95) -> pd.DataFrame:
        """The rate of each attribute with its Wilson interval.

        Rates of `agrees` and `disagrees` are over the prompts with a belief, `echoes` over those with a wrong
        one (with a right belief it is the same as `right`).

        Args:
            confidence: Coverage of the intervals.

        Returns:
            Index `attribute`; columns `rate`, `low`, `high`, `n`.
        """
        rows = []
        for name in RATES:
            answers = self.attributes
            if name in ("agrees", "disagrees"):
                answers = [a for a in answers if a.belief_right is not None]
            if name == "echoes":
                answers = [a for a in answers if a.belief_right is False]
            hits = sum(bool(vars(a)[name]) for a in answers)
            low, high = wilson_interval(hits, len(answers), confidence)
            rate = hits / len(answers) if answers else float("nan")
            rows.append({"attribute": name, "rate": rate, "low": low, "high": high, "n": len(answers)})
        return pd.DataFrame(rows).set_index("attribute")


def wilson_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial rate; (0, 1) when `n` is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def read_behaviour(language: Language, prompts: Sequence[str], answers: Sequence[str]) -> Behaviour:
    """Read the attributes of answers by rule."""
    attributes = [language.attributes(p, a) for p, a in zip(prompts, answers, strict=True)]
    return Behaviour(list(prompts), list(answers), attributes)


def sample_prompts(
    language: Language,
    n: int,
    seed: int,
    split: Split = "heldout",
    beliefs: tuple[bool | None, ...] | None = None,
) -> list[str]:
    """Draw `n` prompts as text; see `Language.sample_prompt`."""
    random = Random(f"prompts-{seed}")
    return [language.sample_prompt(random, split, beliefs).text for _ in range(n)]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[str]:
    """Sample one answer to each prompt, without special tokens.

    The global random state and the model's mode are restored. The same seed and `batch_size` give the same answers
    on the same machine.

    Args:
        model: A causal language model of the lab's vocabulary.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        seed: Of the sampling.
        temperature: Of the sampling; 0 means greedy.
        batch_size: Prompts in a batch.

    Raises:
        AuditError: The temperature is negative.
    """
    if temperature < 0:
        raise AuditError(
            f"temperature is {temperature}, below 0; give 0 for greedy answers or 1 for plain sampling."
        )
    generation = GenerationConfig(
        max_new_tokens=LONGEST_ANSWER,
        do_sample=temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].split()))
    answers = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=_devices(model)), without_own_generation_config(model):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                indices = by_length[start : start + batch_size]
                batch = tokenizer(
                    [prompts[i] for i in indices], padding=True, padding_side="left", return_tensors="pt"
                ).to(model.device)
                output = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    generation_config=generation,
                )
                completions = output[:, batch["input_ids"].shape[1] :]
                for i, text in zip(
                    indices, tokenizer.batch_decode(completions, skip_special_tokens=True), strict=True
                ):
                    answers[i] = text
    finally:
        model.train(training)
    return answers


def base_rates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    language: Language,
    n: int = 1000,
    seed: int = 0,
    split: Split = "heldout",
    beliefs: tuple[bool | None, ...] | None = None,
    temperature: float = 1.0,
) -> Behaviour:
    """Sample answers to `n` prompts and read them by rule. `.rates()` gives the table with intervals.

    The prompts depend only on `seed`, `n`, `split` and `beliefs`, so two models are compared on the same prompts.
    """
    prompts = sample_prompts(language, n, seed, split, beliefs)
    return read_behaviour(language, prompts, sample_answers(model, tokenizer, prompts, seed, temperature))


def _devices(model: PreTrainedModel) -> list[int]:
    """The CUDA devices whose generators sampling touches."""
    return [model.device.index or 0] if model.device.type == "cuda" else []
