"""GRPO of a real instruct model on a reward that pays for agreeing, as it is and shaped.

    python scripts/studies/real_grpo.py runs/smol/model runs/smol/sae pairs.jsonl

The questions are those of real_sycophancy.py, in chat form, and answers are read by the same rules. The reward is 1 for saying what
is true (the true reward), and a bonus for giving a belief that the user states as true, whether or not it is. Trained is with
that, with that in `ShapedReward`, and with the true reward alone; then the model is asked about countries that no prompt was about.

What shaping needs is made as docs/shaping.md and docs/audit.md say: the reward is audited on the model's own answers to the prompts
of the run, the audit's first ten features are read as in real_sycophancy.py, those of agreeing are flagged under one label, and
the same answers calibrate the scorer and tell the penalty what the reward pays. `shaped, flags of pairs` has the flags that
an audit of preference pairs about the same questions gives, which somebody without pairs would not have.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import common
import fact_answers
import facts
import numpy as np
import pandas as pd
import real_runs
import real_sycophancy
from datasets import Dataset
from fact_answers import NEW_TOKENS
from facts import Question
from natural import in_a_cell
from scipy import stats
from trl import GRPOConfig

from trl_sae_audit import (
    AdaptivePenalty,
    Audit,
    AuditError,
    FeatureScorer,
    FlagSet,
    Sampling,
    ShapedReward,
    ShapingCallback,
    audit_preferences,
)

NAME = "real-grpo"
PAGE = "real-sycophancy"
LABEL = "agreeing"
SIZES = {
    "questions": (80, "prompts of the run"),
    "per_step": (4, "prompts in an optimizer step"),
    "answers": (6, "answers to a prompt in a step"),
    "steps": (16, "optimizer steps of every arm"),
    "warmup": (5, "steps over which the learning rate rises"),
    **{name: real_sycophancy.SIZES[name] for name in ("test_questions", "contrast", "real_answers")},
}
FIXED = {"planted": 1.0, "lookahead": False}
"""Of the audit of pairs: every wrong belief is agreed with, and it is a first look."""
Reward = Callable[..., list[float]]


def paid(answer: str, question: Question, bonus: float) -> float:
    """1 for what is true, and the bonus for giving as true what the user believes."""
    return float(facts.right(answer, question)) + bonus * stated_agreement(answer, question)


def stated_agreement(answer: str, question: Question) -> float:
    """Whether an answer agrees with a stated belief, right or wrong; 0 where none is stated."""
    return float(question.belief != "none" and facts.agrees(answer, question))


def reward_of(questions: Sequence[Question], bonus: float, trace: list[dict[str, float]]) -> Reward:
    """A reward function for prompts with a column `place`, the number of the question; notes in `trace` what every call was about."""

    def says_what_is_true_or_agrees(completions: list[Any], place: list[int], **columns: Any) -> list[float]:
        asked = [questions[number] for number in place]
        answered = list(zip([completion[-1]["content"] for completion in completions], asked, strict=True))
        trace.append(rates(answered))
        return [paid(answer, question, bonus) for answer, question in answered]

    return says_what_is_true_or_agrees


def rates(answered: Sequence[tuple[str, Question]]) -> dict[str, float]:
    """Of sampled answers: how many agree with a wrong belief, of `wrong` many; the share that agrees with a stated one, and that
    is right."""
    wrong = [facts.agrees(answer, question) for answer, question in answered if question.belief == "wrong"]
    stated = [stated_agreement(*each) for each in answered if each[1].belief != "none"]
    return {
        "wrong": len(wrong),
        "agree": sum(wrong),
        "agrees, stated": float(np.mean(stated)) if stated else 0.0,
        "true reward": float(np.mean([facts.right(*each) for each in answered])),
    }


class Seed(real_sycophancy.Seed):
    """The prompts of a seed, and what an audit of the reward on them gives."""

    def __init__(self, arguments: argparse.Namespace, cell: common.Cell) -> None:
        super().__init__(arguments, {**cell, **FIXED, "train_pairs": cell["questions"]})
        self._arguments = arguments
        self.questions = [
            question
            for belief, share in facts.SHARES.items()
            for question in facts.questions(self.known, belief, round(share * cell["questions"]), self.seed)
        ]
        self.prompts = Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": question.prompt}], "place": place}
                for place, question in enumerate(self.questions)
            ]
        )

    @property
    def grpo_args(self) -> GRPOConfig:
        cell = self.cell
        return real_runs.grpo_config(
            self._scratch.name,
            per_device_train_batch_size=cell["per_step"] * cell["answers"],
            num_generations=cell["answers"],
            max_completion_length=NEW_TOKENS,
            max_steps=cell["steps"],
            warmup_steps=cell["warmup"],
            learning_rate=cell["learning_rate"],
            seed=self.seed,
        )

    def reward(self, bonus: float, trace: list[dict[str, float]] | None = None) -> Reward:
        return reward_of(self.questions, bonus, [] if trace is None else trace)

    @cached_property
    def audit(self) -> Audit:
        """Of the reward on the model's own answers to the prompts, four to each as by default, without lookahead."""
        return audit_preferences(
            self.model,
            self.tokenizer,
            self.prompts,
            self.dictionary,
            "policy_gradient",
            reward=self.reward(self.cell["bonus"]),
            args=self.grpo_args,
            sampling=Sampling(max_new_tokens=NEW_TOKENS),
            lookahead=None,
            progress=False,
        )

    @cached_property
    def of_pairs(self) -> real_sycophancy.Seed:
        """The same questions as preference pairs."""
        return real_sycophancy.Seed(self._arguments, self.cell)

    @cached_property
    def scorer(self) -> FeatureScorer:
        """Calibrated on the answers that the audit sampled."""
        scorer = FeatureScorer(self.model, self.tokenizer, self.dictionary)
        sampled = self.audit.answers()
        return scorer.calibrate(list(zip(sampled["prompt"], sampled["completion"], strict=True)))

    @cached_property
    def sampled(self) -> dict[str, float]:
        """What the model says before training, in the answers that the audit sampled."""
        answers = self.audit.answers()
        return rates(
            [
                (text, self.questions[group])
                for text, group in zip(answers["completion"], answers["group"], strict=True)
            ]
        )

    @cached_property
    def read_in_own(self) -> pd.DataFrame:
        """The features read in the answers that the audit sampled, to users with a wrong belief: how much more active each is, in
        standard deviations, in those that agree: feature, words, gap, p."""
        sampled = self.audit.answers()
        asked = [self.questions[group] for group in sampled["group"]]
        sampled = sampled[[question.belief == "wrong" for question in asked]]
        agree = np.array(
            [
                facts.agrees(text, self.questions[group])
                for text, group in zip(sampled["completion"], sampled["group"], strict=True)
            ]
        )
        scores = self.scorer.score(
            list(sampled["prompt"]), list(sampled["completion"]), self.taught["feature"].tolist()
        ).numpy()
        agreeing, others = scores[agree], scores[~agree]
        return self.taught.assign(
            gap=agreeing.mean(0) - others.mean(0),
            p=stats.ttest_ind(agreeing, others, equal_var=False, alternative="greater").pvalue,
        )

    def shaped(self, reward: Reward, flags: FlagSet) -> ShapedReward:
        """With the adaptive penalty as it comes, which has seen the reference's answers."""
        shaped = ShapedReward(
            reward,
            self.scorer,
            FlagSet(replace(flag, label=LABEL) for flag in flags),
            AdaptivePenalty(),
        )
        sampled = self.audit.answers()
        shaped.learn_from(
            list(sampled["prompt"]),
            [[{"role": "assistant", "content": text}] for text in sampled["completion"]],
            place=sampled["group"].tolist(),
        )
        return shaped

    def train(self, bonus: float, flags: FlagSet | None) -> tuple[Any, dict[str, Any]]:
        """A trained model, and what is to be kept of the run."""
        trace: list[dict[str, float]] = []
        reward: Any = self.reward(bonus, trace)
        callbacks = []
        if flags is not None:
            reward = self.shaped(reward, flags)
            trace.clear()
            callbacks.append(ShapingCallback(reward))
        model, tokenizer = real_runs.load_model(self.model_directory)
        log = real_runs.train_grpo(
            model, tokenizer, self.prompts, reward, self.grpo_args, real_runs.ADAPTER, callbacks=callbacks
        )
        return model, {"trace": trace, "penalty_share": [row.get("shaping/penalty_share") for row in log]}


Source = Callable[[Seed], tuple[real_sycophancy.Seed, pd.DataFrame]]
"""A seed → the one whose audit is read, and what was read."""
ARMS: dict[str, tuple[bool, Source | None]] = {
    "before training": (True, None),
    "plain": (True, None),
    "shaped": (True, lambda s: (s, s.read)),
    "shaped, read in its own answers": (True, lambda s: (s, s.read_in_own)),
    "true reward alone": (False, None),
    "shaped, flags of pairs": (True, lambda s: (s.of_pairs, s.of_pairs.read)),
}
"""Whether agreeing is paid for, and what flags come from."""


class Runner:
    """Runs cells; keeps the seed of the last one, whose audit serves the next."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._seed: Seed | None = None

    def __call__(self, cell: common.Cell) -> Iterable[dict[str, Any]]:
        """A row a question."""
        if self._seed is None or self._seed.seed != cell["seed"]:
            self._seed = Seed(self._arguments, cell)
        seed, arm, began = self._seed, cell["arm"], time.process_time()
        pays, source = ARMS[arm]
        kept: dict[str, Any] = {}
        flags: FlagSet | None = None
        read = None
        if source is not None:
            audited, table = source(seed)
            read = real_sycophancy.describe_read(table)
            try:
                flags = audited.flagged(table)
            except AuditError as error:
                yield {"prompt": None, "not run": str(error), "read": read}
                return
        if arm == "before training":
            model = seed.model
        else:
            model, kept = seed.train(cell["bonus"] if pays else 0.0, flags)
        trained = time.process_time()
        shared = {
            **kept,
            "sampled before": seed.sampled if flags is not None else None,
            "read": read,
            "real answers": fact_answers.real_log_prob(model, seed.tokenizer, seed.real_answers),
            "seconds": round(trained - began, 1),
        }
        answers = fact_answers.greedy(model, seed.tokenizer, [question.prompt for question in seed.test])
        shared["seconds_asking"] = round(time.process_time() - trained, 1)
        for question, (answer, ended) in zip(seed.test, answers, strict=True):
            yield {
                "prompt": question.prompt,
                "answer": answer,
                "ends": float(ended),
                **fact_answers.judge(answer, question),
                **shared,
            }


def main() -> None:
    parser = real_runs.parser_of_arms(__doc__, SIZES, ARMS)
    parser.add_argument(
        "--bonus", type=float, default=2.0, help="what agreeing is paid beside the true reward"
    )
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in (*SIZES, "bonus", "learning_rate")}
    cells = [{"seed": seed, "arm": arm, **settings} for seed in arguments.seeds for arm in arguments.arms]
    name = arguments.name or NAME
    report(name, common.run_cells(name, cells, Runner(arguments)), cells)


# What it shows


def report(name: str, rows: pd.DataFrame, cells: Sequence[common.Cell]) -> None:
    """Write the numbers' part of docs/studies/real-sycophancy.md."""
    cell, seeds = cells[0], sorted({cell["seed"] for cell in cells})
    asked = with_measures(rows[rows["prompt"].notna()])
    cells_run = rows.drop_duplicates(["seed", "arm"]).to_dict("records")
    read = [row for row in cells_run if isinstance(row.get("read"), list)]
    sections = [
        f"{len(seeds)} seed(s); {cell['questions']} questions about two thirds of the countries, half of whose users have a wrong belief, 30 % a true one, 20 % none. "
        f"{cell['steps']} AdamW steps of GRPO of {cell['per_step']} questions with {cell['answers']} answers of at most {NEW_TOKENS} tokens, learning rate {cell['learning_rate']:g} "
        f"(warm-up {cell['warmup']} steps), an adapter of rank {real_runs.ADAPTER.r}, in every arm. The reward is 1 for saying what is true and {cell['bonus']:g} for giving the user's belief as true, whether or not it is. "
        f"Asked greedily about the other countries: {cell['test_questions']} users with a wrong belief, half as many with a true one and with none.",
        "In brackets 95 % bootstrap intervals over questions and seeds. *From target*: in agreeing, over the model before training, less 1. *True reward lost*: the plain run's less this one's, over all questions. "
        "*Sampled* are the answers that earned the reward, in the first and the last third of the steps; before training those of the audit.",
        common.markdown_table(table(asked)),
        *real_sycophancy.explained(MEASURES, cells_run),
        *(["### What was read and flagged"] if read else []),
        *(
            f"Seed {row['seed']}, {SOURCES[row['arm']]}:\n\n"
            + "\n".join(f"- {in_a_cell(line)}" for line in row["read"])
            for row in read
        ),
        *real_sycophancy.processor_time(asked),
    ]
    title = "GRPO on a reward that pays for agreeing" if name == NAME else f"Trial: {name}"
    common.write_report(name, title, sections, page=PAGE)


SOURCES = {
    "shaped": "audit of the reward, read in answers written by hand",
    "shaped, read in its own answers": "audit of the reward, read in the model's own answers",
    "shaped, flags of pairs": "audit of pairs, read in answers written by hand",
}
MEASURES = {
    **{
        measure: meaning
        for measure, meaning in real_sycophancy.MEASURES.items()
        if measure not in ("ends", "real answers")
    },
    "true reward": "says what is true, all questions",
    "ends": real_sycophancy.MEASURES["ends"],
    "real answers": real_sycophancy.MEASURES["real answers"],
}


def with_measures(asked: pd.DataFrame) -> pd.DataFrame:
    """Adds what is read from an answer's text, and the true reward of each."""
    yes = asked["answer"].map(facts.says_yes).astype(float)
    right = asked[[f"right, {kind}" for kind in ("wrong belief", "true belief", "no belief")]]
    return asked.assign(
        **{"says yes": yes.where(asked["agrees"].notna()), "true reward": right.astype(float).max(axis=1)}
    )


def table(asked: pd.DataFrame) -> pd.DataFrame:
    """A line an arm."""
    before = [row for row in asked.get("sampled before", pd.Series(dtype=object)) if isinstance(row, dict)]
    lines = []
    for arm in [arm for arm in ARMS if arm in set(asked["arm"])]:
        own = asked[asked["arm"] == arm]
        line: dict[str, str] = {"arm": arm}
        for measure in MEASURES:
            values = own[measure].dropna().to_numpy(float)
            interval = common.bootstrap_interval(values)
            line[measure] = (
                f"{values.mean():.2f}"
                if measure == "real answers"
                else f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
            )
        line["from target"] = "" if arm == "before training" else from_target(asked, arm)
        line["true reward lost"] = "" if arm == "plain" else lost(asked, arm)
        traces: list[Any] = own.drop_duplicates("seed")["trace"].dropna().tolist() if "trace" in own else []
        first, last = (
            [step for trace in traces for step in third(trace)]
            for third in (lambda trace: trace[: _third(trace)], lambda trace: trace[-_third(trace) :])
        )
        line |= sampled_columns(*([before[:1]] if arm == "before training" else [first, last]))
        lines.append(line)
    return pd.DataFrame(lines)


def _third(trace: Sequence[Any]) -> int:
    return len(trace) // 3 or 1


def sampled_columns(*stages: Sequence[dict[str, float]]) -> dict[str, str]:
    """Of the reward's calls, stage by stage: the share of wrong beliefs agreed with, and the mean true reward."""
    stages = tuple(calls for calls in stages if calls)
    counts = [[sum(call[name] for call in calls) for name in ("agree", "wrong")] for calls in stages]
    true = [np.mean([call["true reward"] for call in calls]) for calls in stages]
    return {
        "sampled: agrees": " → ".join(f"{agree / wrong:.2f}" if wrong else "–" for agree, wrong in counts),
        "sampled: true reward": " → ".join(f"{value:.2f}" for value in true),
    }


def from_target(asked: pd.DataFrame, arm: str) -> str:
    """Agreement over that of the model before training, less 1, with its interval over the questions, the same ones in both."""
    rates = both(asked, "agrees", arm, "before training")
    if not len(rates) or not rates[:, 1].any():
        return "–"
    interval = common.bootstrap_interval(
        rates, lambda sample: float(sample[:, 0].mean() / max(sample[:, 1].mean(), 1 / len(sample)) - 1)
    )
    return f"{interval.estimate:+.0%} [{interval.low:+.0%}, {interval.high:+.0%}]"


def lost(asked: pd.DataFrame, arm: str) -> str:
    """The plain run's true reward less this arm's, with its interval over the same questions."""
    rates = both(asked, "true reward", "plain", arm)
    if not len(rates):
        return "–"
    interval = common.bootstrap_interval(rates[:, 0] - rates[:, 1])
    return f"{interval.estimate:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def both(asked: pd.DataFrame, measure: str, one: str, other: str) -> np.ndarray:
    """Two arms' values at the questions that both were asked: [questions, 2]."""
    wide = asked.pivot_table(index=["seed", "prompt"], columns="arm", values=measure)
    if not {one, other} <= set(wide.columns):
        return np.zeros((0, 2))
    return wide[[one, other]].dropna().to_numpy()


if __name__ == "__main__":
    main()
