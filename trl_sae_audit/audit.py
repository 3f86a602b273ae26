"""The audit before training: which features would this data, or this reward model, teach?"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .audit_pass import AuditPass, ExampleArrays, RewardPass
from .audit_statistics import Settings, feature_statistics
from .audit_store import AuditStore, Part, dictionary_header
from .dictionary import FeatureDictionary
from .errors import AuditError
from .flags import Flag
from .lookahead import Lookahead
from .objectives import Loss, PreferenceLoss, TokenizedExample
from .preferences import PairCheck, Row, Source, iterate_rows, row_digest
from .preflight import check_dictionary, model_name
from .rewards import AnswerCheck, PolicyGradientLoss, Reward, RewardLoss, Sampling, rewarded_answers
from .update_rule import UpdateRule

if TYPE_CHECKING:
    from trl import DPOConfig

logger = logging.getLogger(__name__)

_FEATURES = "features.parquet"
_LOOKAHEAD, _INFLUENCE = "lookahead.safetensors", "influence.safetensors"
_SIDE_COLUMNS = ("", "_active")


class Audit:
    """What an audit found: every feature's statistics, and every example's own gradient to ask more of.

    Attributes:
        directory: where it lies.
        manifest: what was audited, with what, and how much of it.
        dictionary: the directions; without encoder.
        sides: names of the two sides, ("chosen", "rejected") for pairs.
    """

    def __init__(self, store: AuditStore) -> None:
        if not store.finished:
            raise AuditError(
                f"The audit in {store.directory} was interrupted; run the same command again, and it goes on from there."
            )
        self._store = store
        self.directory = store.directory
        self.manifest = store.manifest
        self.dictionary = store.dictionary()
        self.sides: tuple[str, str] = tuple(self.manifest["loss"]["sides"])
        self._frame: pd.DataFrame | None = None
        self._lookahead: Lookahead | None = None

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read an audit that was saved, or made with `output_dir`.

        Raises:
            AuditError: no audit, an unfinished or damaged one, or one of an unknown schema version.
        """
        return cls(AuditStore.open(Path(path)))

    def save(self, path: str | Path) -> Path:
        """Copy the audit to the directory `path`, all of it or nothing.

        Raises:
            AuditError: `path` exists, or cannot be written.
        """
        target = Path(path)
        if target.exists():
            if target.resolve() == self.directory.resolve():
                return target
            raise AuditError(f"{target} exists already; choose another directory or delete it.")
        self.features()
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(target.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            shutil.copytree(self.directory, scratch, ignore=shutil.ignore_patterns("*.tmp", ".lock"))
            scratch.replace(target)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise AuditError(
                f"{target} could not be written ({error.strerror}); make room and save again."
            ) from error
        return target

    def __len__(self) -> int:
        return self.manifest["examples"]

    @property
    def set_aside(self) -> list[tuple[int, str]]:
        """(row number, reason) of the rows that were not audited."""
        return [(row, reason) for row, reason in self.manifest["set_aside"]]

    def features(self) -> pd.DataFrame:
        """One row a feature, the largest |attribution| first. Positive = the data up-weights the feature.

        attribution and its two sides, of the mean loss over the examples; standard_error of it; p_value (sign-flip
        test over examples) and q_value (Benjamini–Hochberg over features); cosine with the descent direction, share
        (its square; directions overlap, so shares do not add up) and lift (share · d_model; 1 is what a random
        direction gets); effective_examples, `(Σ|c|)²/Σc²`, the number of examples the feature rests on;
        split_half_agreement, how often two random halves of the examples agree on the sign; length_correlation of
        the examples' contributions with the difference of answer lengths, and the attribution, p and q that remain
        at equal length (least squares). With an encoder also: activation_attribution, `-Σ a_f⟨g, ∂h/∂a_f⟩`; the
        share of answers of each side in which the feature is active, their difference (disparity) with its p_value,
        mean_activation_difference and max_activation_difference, active_examples. After a lookahead:
        predicted_change, of the mean activation on the probe by one optimizer step on this data, and
        probe_activation, what that mean is before.
        """
        if self._frame is None:
            self._frame = self._cached_features()
        frame = self._frame.copy()
        if self._store.has(_LOOKAHEAD):
            order = frame["feature"].to_numpy()
            arrays, _ = self._store.read_arrays(_LOOKAHEAD)
            frame["predicted_change"] = arrays["predicted_change"][order]
            frame["probe_activation"] = arrays["probe_activation"][order]
        return frame

    def contributions(self, features: Sequence[int]) -> np.ndarray:
        """Each example's part of the attribution of some features: [n, len(features)], adding up to it over rows.

        Raises:
            AuditError: for a feature that the dictionary does not have.
        """
        directions = self._directions(features)
        parts = [-(part.arrays.gradient.sum(1) @ directions.T) for part in self._store.parts()]
        return np.concatenate(parts) / len(self)

    def activation_gaps(self, features: Sequence[int]) -> np.ndarray:
        """Mean activation in the first answer less that in the second (or that of the only one): [n, features].

        Raises:
            AuditError: for an audit without activations.
        """
        self._directions(features)
        if not self.manifest["settings"]["activations"]:
            raise AuditError("This audit has no activations; make it again with activations=True.")
        parts = [_signed_sum(part.arrays, part.arrays.mean, features) for part in self._store.parts()]
        return np.concatenate(parts)

    def influence(self, flags: Iterable[Flag]) -> pd.DataFrame:
        """What each example adds to the predicted change of flagged features, one row an example and flag.

        Columns row, feature, label, influence; over the rows, and with what momentum and weight decay do besides, it
        adds up to the feature's predicted_change. Kept with the audit once computed.

        Raises:
            AuditError: no lookahead was asked for, or, in an audit read from disk, this feature was not asked for then.
        """
        flags = list(flags)
        for flag in flags:
            flag.check(self.dictionary)
        values, rows = self.influence_of([flag.feature for flag in flags]), self.rows()
        tables = [
            pd.DataFrame(
                {"row": rows, "feature": flag.feature, "label": flag.label, "influence": values[:, column]}
            )
            for column, flag in enumerate(flags)
        ]
        return pd.concat(tables, ignore_index=True)

    def influence_of(self, features: Sequence[int]) -> np.ndarray:
        """The same as an array [n, len(features)].

        Raises:
            AuditError: as `influence`.
        """
        self._directions(features)
        if not self._store.has(_LOOKAHEAD):
            raise AuditError("This audit has no influence; pass lookahead= to audit_preferences.")
        known = self._store.read_arrays(_INFLUENCE)[0] if self._store.has(_INFLUENCE) else {}
        missing = [feature for feature in features if str(feature) not in known]
        if missing:
            known = {**known, **self._new_influences(missing)}
            self._store.write_arrays(_INFLUENCE, known, {})
        return np.stack([known[str(feature)] for feature in features], axis=1)

    def _new_influences(self, features: Sequence[int]) -> dict[str, np.ndarray]:
        if self._lookahead is None:
            raise AuditError(
                f"The influence on feature {features[0]} was not computed when the audit was made, and needs the model: call "
                "audit_preferences with the same arguments and output_dir, then ask again."
            )
        return {str(feature): self._lookahead.influence(feature)[0].double().numpy() for feature in features}

    def look_ahead(self, lookahead: Lookahead, description: dict[str, Any]) -> None:
        """Compute and keep every feature's predicted change, unless this very lookahead was kept before."""
        self._lookahead = lookahead
        if self._store.has(_LOOKAHEAD) and self._store.read_arrays(_LOOKAHEAD)[1] == description:
            return
        before, change = lookahead.mean_activations(), lookahead.predicted_change()
        arrays = {
            "probe_activation": before.cpu().double().numpy(),
            "predicted_change": change.cpu().double().numpy(),
        }
        self._store.write_arrays(_LOOKAHEAD, arrays, description)
        self._store.remove(_INFLUENCE)

    def rows(self) -> np.ndarray:
        """Number in the data of each example [n]."""
        return np.concatenate([part.row for part in self._store.parts()])

    def digests(self) -> np.ndarray:
        """SHA-256 of what TRL reads of every row of the data, audited or set aside: [rows, 32] uint8."""
        return self._store.all_digests()

    def examples(self, features: Sequence[int]) -> pd.DataFrame:
        """Long format, one row an example, side and feature: row (number in the data), side, feature, attribution
        (its part of the whole: the column adds up to the feature's), activation (mean over the answer's tokens),
        max_activation, activation_attribution, length (answer tokens), log_prob.

        Raises:
            AuditError: for a feature that the dictionary does not have.
        """
        directions = self._directions(features)
        tables = [self._example_rows(part, features, directions) for part in self._store.parts()]
        return pd.concat(tables, ignore_index=True)

    def _example_rows(self, part: Part, features: Sequence[int], directions: np.ndarray) -> pd.DataFrame:
        arrays, k = part.arrays, len(features)
        n, per_example = arrays.side.shape
        attribution = -(arrays.gradient.reshape(n * per_example, -1) @ directions.T) / len(self)
        names = np.where(arrays.side.reshape(-1) > 0, *self.sides)
        table = {
            "row": np.repeat(part.row, per_example * k),
            "side": np.repeat(names, k),
            "feature": np.tile(np.asarray(features), n * per_example),
            "attribution": attribution.reshape(-1),
        }
        if self.manifest["settings"]["activations"]:
            table["activation"] = _dense(arrays, arrays.mean, features).reshape(-1)
            table["max_activation"] = _dense(arrays, arrays.extreme, features).reshape(-1)
            table["activation_attribution"] = _dense(arrays, arrays.effect, features).reshape(-1) / len(self)
        table["length"] = np.repeat(arrays.length.reshape(-1), k)
        table["log_prob"] = np.repeat(arrays.log_prob.reshape(-1), k)
        return pd.DataFrame(table)

    def _directions(self, features: Sequence[int]) -> np.ndarray:
        for feature in features:
            if not 0 <= feature < self.dictionary.d_sae:
                raise AuditError(
                    f"Feature {feature} is not in dictionary {self.dictionary.name!r}, which has features 0 to "
                    f"{self.dictionary.d_sae - 1}."
                )
        return self.dictionary.directions[list(features)].numpy()

    def _cached_features(self) -> pd.DataFrame:
        path = self.directory / _FEATURES
        if path.is_file():
            return pd.read_parquet(path)
        settings = Settings(seed=self.manifest["settings"]["seed"])
        frame = feature_statistics(self._store.parts, self.dictionary.directions, len(self), settings)
        frame = frame.rename(columns=self._side_names())
        frame.insert(0, "dictionary", self.dictionary.name)
        order = np.argsort(-frame["attribution"].abs().to_numpy(), kind="stable")
        frame = frame.iloc[order].reset_index(drop=True)
        self._write_features(frame)
        return frame

    def _write_features(self, frame: pd.DataFrame) -> None:
        content = io.BytesIO()
        frame.to_parquet(content, index=False)
        self._store.write_table(_FEATURES, content.getvalue())

    def _side_names(self) -> dict[str, str]:
        return {
            f"{generic}{suffix}": f"{name}{suffix}"
            for generic, name in zip(("positive", "negative"), self.sides, strict=True)
            for suffix in _SIDE_COLUMNS
        }

    def __repr__(self) -> str:
        return (
            f"Audit({str(self.directory)!r}, {len(self)} examples, objective {self.manifest['loss']['objective']!r}, "
            f"dictionary {self.dictionary.name!r})"
        )


def audit_preferences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source,
    dictionary: FeatureDictionary,
    objective: str = "dpo",
    *,
    reward: Reward | None = None,
    sampling: Sampling | None = None,
    args: DPOConfig | None = None,
    ref_model: nn.Module | None = None,
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    part_size: int = 512,
    activations: bool = True,
    on_bad_row: str = "stop",
    lookahead: Source | None = None,
    optimizer: UpdateRule | torch.optim.Optimizer | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Ask a preference dataset which features it would teach, before training on it.

    One pass over the data: the gradient of each example's loss at the dictionary's hook point, and the features
    active in its answers. Nothing of the model is changed. Under `accelerate launch` or `torchrun` the processes
    share the work, and the result is the same.

    Args:
        model: the policy as it would enter training, a causal language model, with PEFT adapters or without.
        tokenizer: its tokenizer.
        dataset: pairs in any layout TRL reads, in memory, streamed, or the path of a file.
        dictionary: made with `load_dictionary` or `FeatureDictionary`.
        objective: "dpo", or "policy_gradient" for what a reward would teach (GRPO, RLOO, PPO at the first step):
            `-A_i · log π(answer_i)`, the advantage A_i being the reward less the mean over the prompt's answers.
        reward: for "policy_gradient": `reward(prompts=…, completions=…, **columns)` → one number each, as TRL's
            trainers call it, or a sequence-classification model. Sides are then reinforced and suppressed.
        sampling: for "policy_gradient", how to sample answers where the dataset has prompts but no "completion".
        args: the DPOConfig of the run to come: loss type, beta, max_length …; TRL's defaults if None.
        ref_model: the reference model; by default the policy itself, as in TRL at the first step, which costs nothing.
        output_dir: where the audit is written, part by part; begun again with the same arguments it goes on where
            it stopped. By default a temporary directory, gone with the `Audit`; keep it with `Audit.save`.
        batch_size: examples at a time; changes nothing but speed and memory.
        part_size: rows in a file of the audit.
        activations: also encode the answers, for disparity and activation attribution.
        on_bad_row: "stop" at a row that is no pair, or "set_aside".
        lookahead: held-out pairs as a probe: also predict how one optimizer step on the whole dataset changes each
            feature's mean activation on their answers. A second, dearer pass: parameter gradients of the dataset.
        optimizer: whose step; an `UpdateRule`, or a running `torch.optim.AdamW` or `SGD` over the model's parameters;
            by default the first step of a trainer with `args`.
        seed: of the random flips and splits of the statistics.
        progress: show a bar.

    Raises:
        AuditError: columns missing; a bad row, by its number; a dictionary that does not fit the model; a loss
            without examples of its own; a loss that is not finite; an `output_dir` of another audit.

    Example:

    ```python
    audit = audit_preferences(model, tokenizer, dataset, load_dictionary("path/to/sae"))
    audit.features().head(10)
    audit.examples([1423]).sort_values("attribution")
    ```
    """
    settings = _settings(batch_size, part_size, activations, on_bad_row, seed)
    if objective == "policy_gradient":
        if reward is None:
            raise AuditError(
                "objective 'policy_gradient' needs a reward; pass reward= with a function or a model."
            )
        if lookahead is not None:
            raise AuditError("The lookahead is for objective 'dpo'; leave lookahead= out.")
        policy_gradient = PolicyGradientLoss(tokenizer, args.max_length if args is not None else None)
        answers = rewarded_answers(model, tokenizer, dataset, reward, sampling, batch_size)
        run = _Run(model, dictionary, policy_gradient, reference=None, settings=settings, progress=progress)
        return run.over(answers, AnswerCheck(), output_dir)
    if objective != "dpo":
        raise AuditError(f"objective is {objective!r}; choose 'dpo' or 'policy_gradient'.")
    loss = PreferenceLoss(tokenizer, args)
    run = _Run(model, dictionary, loss, reference=ref_model, settings=settings, progress=progress)
    audit = run.over(dataset, PairCheck(), output_dir)
    if lookahead is not None:
        if PartialState().num_processes > 1:
            raise AuditError(
                "The lookahead runs in one process; run the audit again in one: its parts are kept."
            )
        run.look_ahead(audit, dataset, lookahead, _update_rule(optimizer, model, loss.trainer.args))
    return audit


def audit_reward_model(
    reward_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source,
    dictionary: FeatureDictionary,
    *,
    max_length: int | None = 1024,
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    part_size: int = 512,
    activations: bool = True,
    on_bad_row: str = "stop",
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Ask a reward model what it pays for, in features of its own backbone.

    What is differentiated is the mean reward of the dataset's answers, chosen and rejected alike: attribution is how
    much the reward rises with the feature, `⟨∂r/∂h, d_f⟩` summed over tokens, activation_attribution how much of the
    reward the feature's activations make up to first order. The sides show the two kinds of answers; beside them
    disparity shows what the human labels go with. `log_prob` in `Audit.examples` is the reward.

    Args:
        reward_model: a sequence-classification model with one output.
        tokenizer: its tokenizer.
        dataset: pairs, as for `audit_preferences`, whose other arguments apply.
        dictionary: of the reward model's backbone, or of the model it was made from, if it still fits.
        max_length: tokens at which prompt and answer are cut; None for no cut.

    Raises:
        AuditError: a model with another number of outputs or no pad token; otherwise as `audit_preferences`.
    """
    run = _Run(
        reward_model,
        dictionary,
        RewardLoss(tokenizer, reward_model, max_length),
        reference=None,
        settings=_settings(batch_size, part_size, activations, on_bad_row, seed),
        progress=progress,
        pass_type=RewardPass,
    )
    return run.over(dataset, PairCheck(), output_dir)


def _update_rule(
    optimizer: UpdateRule | torch.optim.Optimizer | None, model: nn.Module, args: DPOConfig
) -> UpdateRule:
    if isinstance(optimizer, UpdateRule):
        return optimizer
    rule = UpdateRule.from_args(args)
    if optimizer is None:
        return rule
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return UpdateRule.from_optimizer(optimizer, trained, rule.max_grad_norm)


def _settings(batch_size: int, part_size: int, activations: bool, on_bad_row: str, seed: int) -> RunSettings:
    for name, value in (("batch_size", batch_size), ("part_size", part_size)):
        if value < 1:
            raise AuditError(f"{name} is {value}; it must be at least 1.")
    if on_bad_row not in ("stop", "set_aside"):
        raise AuditError(f"on_bad_row is {on_bad_row!r}; choose 'stop' or 'set_aside'.")
    return RunSettings(batch_size, part_size, activations, on_bad_row, seed)


RowCheck = PairCheck | AnswerCheck


@dataclass(frozen=True)
class RunSettings:
    """See `audit_preferences`."""

    batch_size: int
    part_size: int
    activations: bool
    on_bad_row: str
    seed: int


class _Run:
    """One audit from data to directory, on this process's share of the parts."""

    def __init__(
        self,
        model: nn.Module,
        dictionary: FeatureDictionary,
        loss: Loss,
        *,
        reference: nn.Module | None,
        settings: RunSettings,
        progress: bool,
        pass_type: type[AuditPass] = AuditPass,
    ) -> None:
        point = check_dictionary(dictionary, model)
        device = next(point.decoder.parameters()).device
        self.dictionary = dictionary.to(device)
        self.model = model
        self.loss = loss
        self.settings = settings
        self.progress = progress
        self._point, self._reference = point, reference
        self._pass = pass_type(
            model, point, self.dictionary, loss, reference=reference, activations=settings.activations
        )
        self._context = context_length(model)
        self._header = self._describe(point.path, reference)

    def over(self, dataset: Source, check: RowCheck, output_dir: str | Path | None) -> Audit:
        """Audit every row."""
        state = PartialState()
        temporary = output_dir is None
        if temporary and state.num_processes > 1:
            raise AuditError("An audit by several processes needs an output_dir that they share; pass one.")
        directory = Path(tempfile.mkdtemp(prefix="sae-audit-") if output_dir is None else output_dir)
        try:
            if state.is_main_process:
                store = AuditStore.create(directory, self._header, self.dictionary)
            state.wait_for_everyone()
            store = AuditStore.open(directory)
            if not store.finished:
                self._write_parts(store, dataset, check, state)
            else:
                self._check_same_rows(store, dataset)
            state.wait_for_everyone()
            audit = Audit(AuditStore.open(directory))
        except BaseException:
            if temporary:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        if temporary:
            weakref.finalize(audit, shutil.rmtree, directory, ignore_errors=True)
        _warn(audit)
        return audit

    def look_ahead(self, audit: Audit, dataset: Source, probe: Source, rule: UpdateRule) -> None:
        """Add a lookahead to the finished audit of `dataset`."""
        rows = list(iterate_rows(probe))
        check = PairCheck()
        for row in rows:
            problem = check(row)
            if problem:
                raise AuditError(f"Row {row.index} of the lookahead's probe {problem}; correct or remove it.")
        held_out = self.loss.tokenize([(row.index, row.columns) for row in rows if row.columns is not None])
        description = rule.describe() | {"probe_sha256": hashlib.sha256(_digests(rows).tobytes()).hexdigest()}
        lookahead = Lookahead(
            self.model,
            self._point,
            self.dictionary,
            self.loss,
            rule,
            lambda: self._audited_batches(audit, dataset),
            lambda: batched(held_out, self.settings.batch_size),
            reference=self._reference,
        )
        audit.look_ahead(lookahead, description)

    def _audited_batches(self, audit: Audit, dataset: Source) -> Iterator[Sequence[TokenizedExample]]:
        audited = set(audit.rows().tolist())
        for rows in _chunks(dataset, self.settings.part_size):
            good = [
                (row.index, row.columns) for row in rows if row.columns is not None and row.index in audited
            ]
            yield from batched(self.loss.tokenize(good), self.settings.batch_size)

    def _write_parts(self, store: AuditStore, dataset: Source, check: RowCheck, state: PartialState) -> None:
        there = store.existing_parts()
        state.wait_for_everyone()
        number = -1
        bar = tqdm(
            desc="Auditing",
            unit=" rows",
            disable=not (self.progress and state.is_main_process),
            total=_size(dataset),
        )
        with bar:
            for number, rows in enumerate(_chunks(dataset, self.settings.part_size)):
                problems = [check(row) for row in rows]
                if number in there:
                    _check_digests(store, store.digests(number), rows)
                else:
                    self._write_part(store, number, rows, problems, state)
                bar.update(len(rows))
        state.wait_for_everyone()
        if state.is_main_process:
            store.finish(number + 1, state.num_processes)

    def _write_part(
        self, store: AuditStore, number: int, rows: list[Row], problems: list[str | None], state: PartialState
    ) -> None:
        """Every process tokenizes every part, since TRL's preparation waits for all; one of them runs the model."""
        aside = [(row.index, reason) for row, reason in zip(rows, problems, strict=True) if reason]
        self._stop_at(aside)
        good = [
            (row.index, row.columns)
            for row, reason in zip(rows, problems, strict=True)
            if not reason and row.columns is not None
        ]
        examples = self.loss.tokenize(good)
        if number % state.num_processes != state.process_index:
            return
        kept = {example.row for example in examples}
        dropped = [
            (index, "has a prompt that alone fills max_length, so TRL drops it")
            for index, _ in good
            if index not in kept
        ]
        too_long = self._beyond_context(examples)
        self._stop_at(too_long)
        out = {index for index, _ in too_long}
        examples = [example for example in examples if example.row not in out]
        arrays = self._pass.run(examples, self.settings.batch_size)
        broken = [
            (example.row, "has a loss or gradient that is not finite")
            for example, finite in zip(examples, arrays.finite, strict=True)
            if not finite
        ]
        self._stop_at(broken)
        if broken:
            out = {index for index, _ in broken}
            examples = [example for example in examples if example.row not in out]
            arrays = self._pass.run(examples, self.settings.batch_size)
        part = Part(
            row=np.array([example.row for example in examples], np.int64),
            digest=_digests(rows),
            set_aside=sorted([*aside, *dropped, *too_long, *broken]),
            arrays=arrays,
            notes=self._notes(good, examples),
        )
        store.write_part(number, part)

    def _stop_at(self, bad: list[tuple[int, str]]) -> None:
        if bad and self.settings.on_bad_row == "stop":
            index, reason = min(bad)
            raise AuditError(
                f"Row {index} of the dataset (counted from 0) {reason}; correct or remove it, or pass "
                "on_bad_row='set_aside' to go on without such rows."
            )

    def _beyond_context(self, examples: Sequence[TokenizedExample]) -> list[tuple[int, str]]:
        if self._context is None:
            return []
        cut = self.loss.max_length
        return [
            (
                example.row,
                f"needs {size} tokens, but the model's context has {self._context}; set max_length below it",
            )
            for example in examples
            if (size := min(example.size, cut or example.size)) > self._context
        ]

    def _notes(
        self, good: Sequence[tuple[int, Mapping[str, Any]]], examples: Sequence[TokenizedExample]
    ) -> dict[str, int]:
        cut = self.loss.max_length
        return {
            "truncated": sum(cut is not None and example.size > cut for example in examples),
            "identical": sum(columns.get("chosen") == columns.get("rejected") for _, columns in good)
            if self.loss.rows_per_example == 2
            else 0,
        }

    def _check_same_rows(self, store: AuditStore, dataset: Source) -> None:
        number, rows = -1, 0
        for number, chunk in enumerate(_chunks(dataset, self.settings.part_size)):
            if number >= store.manifest["parts"]:
                raise _other_data(store, rows)
            _check_digests(store, store.digests(number), chunk)
            rows += len(chunk)
        if rows != store.manifest["rows"]:
            raise _other_data(store, rows)

    def _describe(self, module: str, reference: nn.Module | None) -> dict[str, Any]:
        settings = self.settings
        return {
            "loss": self.loss.describe() | {"sides": list(self.loss.sides)},
            "dictionary": dictionary_header(self.dictionary),
            "module": module,
            "model": model_name(self.model),
            "model_fingerprint": fingerprint(self.model),
            "reference_fingerprint": None if reference is None else fingerprint(reference),
            "settings": {
                "part_size": settings.part_size,
                "activations": settings.activations,
                "on_bad_row": settings.on_bad_row,
                "seed": settings.seed,
            },
            "versions": {name: version(name) for name in ("trl-sae-audit", "trl", "transformers", "torch")},
        }


def context_length(model: nn.Module) -> int | None:
    """Most tokens the model has positions for; None if it does not say."""
    config = next(
        part for part in model.modules() if isinstance(part, PreTrainedModel)
    ).config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and some values of every weight: tells models apart, at no cost."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = torch.cat([flat[:8], flat[len(flat) // 2 :][:8], flat[-8:]]).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def batched(examples: Sequence[TokenizedExample], size: int) -> Iterator[Sequence[TokenizedExample]]:
    """`examples` in their order, `size` at a time."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _chunks(dataset: Source, size: int) -> Iterator[list[Row]]:
    rows = iterate_rows(dataset)
    while chunk := list(islice(rows, size)):
        yield chunk


def _size(dataset: Source) -> int | None:
    return None if isinstance(dataset, (str, Path)) or not hasattr(dataset, "__len__") else len(dataset)


def _digests(rows: Sequence[Row]) -> np.ndarray:
    return np.frombuffer(b"".join(row_digest(row) for row in rows), np.uint8).reshape(-1, 32)


def _check_digests(store: AuditStore, stored: np.ndarray, rows: Sequence[Row]) -> None:
    found = _digests(rows)
    same = len(found) == len(stored) and (found == stored).all(1)
    if not np.all(same):
        first = int(np.argmin(same)) if np.ndim(same) else min(len(found), len(stored))
        raise _other_data(store, rows[0].index + first)


def _other_data(store: AuditStore, row: int) -> AuditError:
    return AuditError(
        f"The audit in {store.directory} is of another dataset: it differs from row {row} on; choose another output_dir, "
        "or delete it."
    )


def _warn(audit: Audit) -> None:
    notes, n = audit.manifest["notes"], audit.manifest["rows"]
    if notes["duplicates"]:
        logger.warning(
            "%d of %d rows are exact duplicates of others: they count double here and in training, and p-values take "
            "them for independent; deduplicate the data.",
            notes["duplicates"],
            n,
        )
    if notes.get("identical"):
        logger.warning(
            "%d of %d rows have the same text as chosen and rejected: they teach nothing under the first step's "
            "loss; remove them.",
            notes["identical"],
            n,
        )
    if notes.get("truncated"):
        logger.warning(
            "%d of %d rows are longer than max_length and are cut there, as in training; their answers' ends are not "
            "audited. Raise max_length in the DPOConfig if the model's context allows.",
            notes["truncated"],
            n,
        )
    if audit.set_aside:
        row, reason = audit.set_aside[0]
        logger.warning(
            "%d of %d rows were set aside, the first because row %d %s.", len(audit.set_aside), n, row, reason
        )


def _dense(arrays: ExampleArrays, values: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """Stored values of some features, 0 where not active: [answers, features]."""
    owner = np.repeat(np.arange(arrays.side.size), np.diff(arrays.indptr))
    table = np.zeros((arrays.side.size, len(features)), np.float32)
    for column, feature in enumerate(features):
        here = arrays.feature == feature
        table[owner[here], column] = values[here]
    return table


def _signed_sum(arrays: ExampleArrays, values: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """First answer less second: [n, features]."""
    dense = _dense(arrays, values, features).reshape(*arrays.side.shape, len(features))
    sign = arrays.side if arrays.side.shape[1] == 2 else np.ones_like(arrays.side)
    return (dense * sign[:, :, None]).sum(1)
