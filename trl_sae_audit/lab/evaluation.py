"""How a model behaves: sampled answers to held-out prompts, read by rule, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_sae_audit.errors import AuditError
from trl_sae_audit.lab.language import LONGEST_ANSWER, Attributes, Language, Split

RATES = ("right", "agrees", "disagrees", "echoes", "padded", "marked", "malformed")
"""The attributes whose rates are reported."""


@dataclass(frozen=True)
class Behaviour:
    """Answers of one model, and what they are."""

    prompts: list[str]
    """The prompts asked."""
    answers: list[str]
    """The answer to each."""
    attributes: list[Attributes]
    """What each answer is, by rule."""

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
            over = self.attributes
            if name in ("agrees", "disagrees"):
                over = [a for a in over if a.belief_right is not None]
            if name == "echoes":
                over = [a for a in over if a.belief_right is False]
            hits = sum(bool(vars(a)[name]) for a in over)
            low, high = wilson_interval(hits, len(over), confidence)
            rate = hits / len(over) if over else float("nan")
            rows.append({"attribute": name, "rate": rate, "low": low, "high": high, "n": len(over)})
        return pd.DataFrame(rows).set_index("attribute")


def wilson_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial rate; (0, 1) when `n` is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def read_behaviour(language: Language, prompts: Sequence[str], answers: Sequence[str]) -> Behaviour:
    """Read given answers by rule."""
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

    The global random state is left as it was, and so is the model's mode. Same seed, same answers, for the
    same `batch_size` on the same machine.

    Args:
        model: A causal language model of the lab's vocabulary.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        seed: Of the sampling.
        temperature: Of the sampling; 0 means greedy.
        batch_size: Prompts generated for at once.

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
        with torch.random.fork_rng(devices=_devices(model)):
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
    """Sample answers to `n` prompts and read them by rule; `.rates()` gives the table with intervals.

    The prompts depend on `seed`, `n`, `split` and `beliefs` only, so that two models are compared on the same.
    """
    prompts = sample_prompts(language, n, seed, split, beliefs)
    return read_behaviour(language, prompts, sample_answers(model, tokenizer, prompts, seed, temperature))


def _devices(model: PreTrainedModel) -> list[int]:
    """The CUDA devices whose generators sampling touches."""
    return [model.device.index or 0] if model.device.type == "cuda" else []
