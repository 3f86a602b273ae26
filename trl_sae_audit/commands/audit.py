"""`trl-sae-audit audit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from accelerate import PartialState
from trl import DPOConfig

from ..audit import audit_preferences
from ..audit_result import Audit
from ..evidence import gather_evidence, read_labels
from ..evidence_files import write_evidence
from ..flags import FlagSet
from ..objectives import PreferenceLoss
from ..sae import load_dictionary
from ..sampling import Sampling
from ..terminal import Justify, OutputArguments, table, to_copy
from .arguments import ModelArguments, load_model, parse
from .preferences import PreferenceArguments

DESCRIPTION = (
    "Which features would this preference data teach? One pass over the data before training: the gradient of each "
    "pair's DPO loss at the dictionary's hook point, in the dictionary's features, with statistics. An interrupted "
    "audit goes on when the same command is run again; several processes share the work under `accelerate launch`. "
    "Example: trl-sae-audit audit --model_name_or_path ./model --dataset pairs.jsonl --sae ./sae --output_dir runs/audit"
)


_WRITES = "predicted_sampled_change"
_LOOKED_AHEAD = (("reads", "predicted_change"), ("writes", _WRITES))


@dataclass
class AuditArguments:
    """The audit."""

    sae: str = field(
        metadata={"help": "A directory saved by sae-lens, or a sae-lens release (with --sae_id)."}
    )
    output_dir: str = field(metadata={"help": "Where the audit is written; `flag` and `filter` read it."})
    sae_id: str | None = field(default=None, metadata={"help": "Which SAE of the release."})
    hook_point: str | None = field(
        default=None, metadata={"help": "Read here instead of where the SAE says it hooks."}
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": "As in TRL's DPOConfig: sigmoid, ipo, hinge …"}
    )
    beta: float = field(default=0.1, metadata={"help": "As in TRL's DPOConfig."})
    label_smoothing: float = field(default=0.0, metadata={"help": "As in TRL's DPOConfig."})
    max_length: int = field(default=1024, metadata={"help": "Tokens at which prompt and answer are cut."})
    batch_size: int = field(default=8, metadata={"help": "Pairs at a time; no figure depends on it."})
    part_size: int = field(default=512, metadata={"help": "Rows in a file of the audit."})
    activations: bool = field(
        default=True, metadata={"help": "Also encode the answers, for disparity and activation attribution."}
    )
    on_bad_row: Literal["stop", "set_aside"] = field(
        default="stop", metadata={"help": "What to do at a row that is no pair."}
    )
    lookahead: str | None = field(
        default=None,
        metadata={
            "help": "Held-out pairs: also predict what an AdamW step on the data does to each feature on them. Takes about "
            "as long as an epoch of training."
        },
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Of that step."})
    train_batch_size: int = field(default=8, metadata={"help": "Pairs in that step."})
    lookahead_samples: int = field(
        default=0,
        metadata={
            "help": "Also sample that many answers at each held-out prompt, and predict what the step does to each feature "
            "in what the model writes. 4 or more."
        },
    )
    rehearse_steps: float | None = field(
        default=None,
        metadata={
            "help": "Also predict what a whole run of that many steps does, ten at a time; costs as many gradients as the run, or a "
            "pass over the data. Steps at the full learning rate: of a linear schedule half."
        },
    )
    rehearse_parts: int | None = field(
        default=None,
        metadata={
            "help": "Take these steps together to that many long ones. By default to one for ten, but four at least."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest of those answers."})
    influence: str | None = field(
        default=None,
        metadata={"help": "A file of flags: each example's part in the predicted change of those."},
    )
    evidence: int = field(
        default=0,
        metadata={
            "help": "Gather evidence for that many top features (examples, tokens, vocabulary): evidence.md to read, evidence.json for the report."
        },
    )
    labels: str | None = field(
        default=None,
        metadata={"help": "A local file of feature labels, for the evidence; JSON, JSON lines or CSV."},
    )
    seed: int = field(default=0, metadata={"help": "Of the random flips and splits of the statistics."})
    top: int = field(default=10, metadata={"help": "Features to print."})


def main(argv: Sequence[str]) -> int:
    model_arguments, data, arguments, output = parse(
        "audit", DESCRIPTION, (ModelArguments, PreferenceArguments, AuditArguments, OutputArguments), argv
    )
    dictionary = load_dictionary(arguments.sae, arguments.sae_id, hook_point=arguments.hook_point)
    source = data.source()
    model, tokenizer = load_model(model_arguments)
    config = DPOConfig(
        arguments.output_dir,
        loss_type=arguments.loss_type,
        beta=arguments.beta,
        label_smoothing=arguments.label_smoothing,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.train_batch_size,
        bf16=False,
        report_to="none",
    )
    sampling = None
    if arguments.lookahead_samples:
        sampling = Sampling(arguments.lookahead_samples, arguments.max_new_tokens, seed=arguments.seed)
    audit = audit_preferences(
        model,
        tokenizer,
        source,
        dictionary,
        args=config,
        output_dir=arguments.output_dir,
        batch_size=arguments.batch_size,
        part_size=arguments.part_size,
        activations=arguments.activations,
        on_bad_row=arguments.on_bad_row,
        lookahead=arguments.lookahead,
        sampling=sampling,
        rehearse_steps=arguments.rehearse_steps,
        rehearse_parts=arguments.rehearse_parts,
        seed=arguments.seed,
    )
    if arguments.influence:
        audit.influence(FlagSet.load(arguments.influence).of(audit.dictionary))
    if PartialState().is_main_process:
        if arguments.evidence:
            features = [int(feature) for feature in audit.features()["feature"].head(arguments.evidence)]
            labels = read_labels(arguments.labels) if arguments.labels else None
            loss = PreferenceLoss(tokenizer, config)
            found = gather_evidence(
                audit, features, model, tokenizer, source, dictionary, loss, labels=labels
            )
            write_evidence(audit.directory, found)
        show(audit, arguments.top, output)
    return 0


def show(audit: Audit, top: int, output: OutputArguments) -> None:
    """Print the features with the largest predicted change of what the model writes; without one, attribution."""
    features = audit.features()
    if _WRITES in features:
        features = features.sort_values(_WRITES, key=abs, ascending=False, kind="stable")
    rows = features.head(top).to_dict("records")
    significant = features["q_value"] < 0.05
    at_equal_length = significant & (features["length_q_value"] < 0.05)
    optional = {
        heading: column
        for heading, column in (("disparity", "disparity"), *_LOOKED_AHEAD)
        if column in features
    }
    columns: dict[str, Justify] = dict.fromkeys(
        ("feature", "attribution", "± s.e.", "lift", "q", "q at equal\nlength", *optional), "right"
    )
    cells = [
        [
            str(row["feature"]),
            f"{row['attribution']:+.2e}",
            f"{row['standard_error']:.0e}",
            f"{row['lift']:.1f}",
            f"{row['q_value']:.2g}",
            f"{row['length_q_value']:.2g}",
            *(f"{row[column]:+.2g}" for column in optional.values()),
        ]
        for row in rows
    ]
    output.show(
        {
            "audit": audit.directory,
            "dictionary": audit.dictionary.name,
            "examples": len(audit),
            "features": len(features),
            "significant": significant.sum(),
            "significant_at_equal_length": at_equal_length.sum(),
            "top": rows,
        },
        table(f"{len(audit)} examples, {len(features)} features of {audit.dictionary.name}", columns, cells),
        f"Positive: training on this data up-weights the feature. q < 0.05: {significant.sum()} features, "
        f"{at_equal_length.sum()} of them also at equal answer length.",
        *_explained(optional),
        to_copy(f"Audit in {audit.directory}; next:"),
        to_copy(f"  trl-sae-audit flag {audit.directory} --feature N --label … --reason …"),
    )


def _explained(columns: Mapping[str, str]) -> list[str]:
    if "reads" not in columns:
        return []
    return [
        "reads, writes: what a training step does to the feature's mean activation on held-out answers, and on answers that "
        "the model gives itself (with --lookahead_samples)."
    ]
