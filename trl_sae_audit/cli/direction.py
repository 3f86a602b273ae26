"""`trl-sae-audit direction`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..console import single_line, table
from ..errors import AuditError
from .options import ModelArguments, OutputArguments, options_of
from .parser import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..saes.contrast import ContrastDictionary, Separation

DESCRIPTION = (
    "Find a direction in the residual stream for each trait, from pairs of answers with it and without it: no SAE is needed. Saved "
    "as a dictionary, which every other command takes. Exit code 0: all were found; 1: some do no better than chance on held-out "
    "answers, and are left out."
)
EXAMPLE = """\
trl-sae-audit direction --model ./model --output_dir ./directions
trl-sae-audit direction --model ./model --dataset contrasts.jsonl \\
    --output_dir ./directions
trl-sae-audit direction --model ./model --trait pirate --output_dir ./pirate \\
    --system_positive "Talk like a pirate." \\
    --system_negative "Talk like a clerk.\""""


@dataclass
class DirectionArguments:
    """The directions."""

    output_dir: str = option("Directory for the dictionary.")
    traits: list[str] | None = option(
        "Built-in traits: sycophancy, flattery, hedging, refusal, verbosity, markdown, emoji; default all, or none where a dataset is "
        "given.",
        None,
    )
    dataset: str | None = option(
        "A file of pairs of your own, with columns prompt, positive (an answer with the trait), negative (one without it), and, where "
        "there are several, trait.",
        None,
        aliases=["--dataset_name"],
    )
    trait: str = option(
        "Name of the trait of a dataset without a column trait, or of the system prompts.", "trait"
    )
    system_positive: str | None = option(
        "Let the model write the pairs: its answers under this system prompt, which asks for the trait, and under the other. Questions "
        "come from the column prompt of the dataset; default those of the built-in pairs.",
        None,
        text=True,
    )
    system_negative: str | None = option(
        "The system prompt that asks for the trait's absence.", None, text=True
    )
    max_new_tokens: int = option("Longest answer that the model writes.", 64)
    hook_points: list[str] | None = option(
        "Layers to choose from, by number or path; default all but the first and the last.", None
    )
    batch_size: int = option("Answers in one forward pass.", 16)
    max_length: int = option("Tokens of prompt and answer; longer ones are left out.", 1024)
    seed: int = option("Of the split into training and held-out pairs, and of the intervals.", 0)


OPTIONS = (ModelArguments, DirectionArguments, OutputArguments)


def run(model_arguments: ModelArguments, arguments: DirectionArguments, output: OutputArguments) -> int:
    from ..saes.contrast import contrast_directions, not_found
    from ..saes.contrast_files import save_directions

    asks = _asks(arguments)
    contrasts = {} if asks else read_contrasts(arguments)
    model, tokenizer = model_arguments.load()
    if asks:
        contrasts = {arguments.trait: _sampled_contrasts(arguments, model, tokenizer)}
    found = contrast_directions(
        model,
        tokenizer,
        contrasts,
        arguments.hook_points,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        seed=arguments.seed,
        missing="keep",
    )
    missing = [separation for separation in found.separations if not separation.found]
    if len(missing) == len(found.separations):
        raise AuditError(not_found(missing[0]))
    kept = keep_found(found)
    save_directions(kept, arguments.output_dir, options_of(model_arguments, arguments))
    output.show(
        {
            "path": arguments.output_dir,
            "hook_point": found.hook_point,
            "traits": [asdict(one) | {"found": one.found} for one in found.separations],
        },
        table(
            f"Directions at {found.hook_point}",
            {
                "feature": "right",
                "trait": "left",
                "AUC held out": "left",
                "distance": "right",
                "pairs": "right",
            },
            [_row(separation, kept.watch) for separation in found.separations],
        ),
        single_line(f"Saved in {arguments.output_dir}"),
    )
    return 1 if missing else 0


def _asks(arguments: DirectionArguments) -> bool:
    """Whether the model is to write the pairs itself."""
    given = [arguments.system_positive, arguments.system_negative]
    if given.count(None) == 1:
        raise AuditError("--system_positive and --system_negative go together; give both.")
    if None not in given and arguments.traits:
        raise AuditError(
            "--traits are built-in pairs, and system prompts make pairs of their own; give one of them."
        )
    return None not in given


def _sampled_contrasts(
    arguments: DirectionArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Any]:
    from ..data.opener import iterate_rows
    from ..saes.contrast_sampling import sample_contrasts
    from ..saes.contrast_sets import CONTRAST_SETS

    questions = [pair.prompt for pairs in CONTRAST_SETS.values() for pair in pairs]
    if arguments.dataset:
        prompts = [(row.columns or {}).get("prompt") for row in iterate_rows(arguments.dataset)]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise AuditError(
                f"A row of {arguments.dataset} has no prompt that is text, which is asked under the system prompts; correct it."
            )
        questions = [str(prompt) for prompt in prompts]
    return sample_contrasts(
        model,
        tokenizer,
        questions,
        str(arguments.system_positive),
        str(arguments.system_negative),
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        progress=True,
    )


def read_contrasts(arguments: DirectionArguments) -> Mapping[str, list[Any]]:
    """Trait → pairs, of the built-in sets and of the user's file."""
    from ..data.opener import iterate_rows
    from ..saes.contrast_sets import CONTRAST_SETS

    wanted = (
        arguments.traits if arguments.traits is not None else [] if arguments.dataset else list(CONTRAST_SETS)
    )
    unknown = [trait for trait in wanted if trait not in CONTRAST_SETS]
    if unknown:
        raise AuditError(
            f"There is no built-in trait {unknown[0]!r}; choose from {', '.join(CONTRAST_SETS)}, or give pairs of your own with "
            "--dataset."
        )
    contrasts: dict[str, list[Any]] = {trait: list(CONTRAST_SETS[trait]) for trait in wanted}
    for row in iterate_rows(arguments.dataset) if arguments.dataset else ():
        if row.columns is None:
            raise AuditError(
                f"A row of {arguments.dataset} is not one of columns; each has prompt, positive and negative."
            )
        contrasts.setdefault(str(row.columns.get("trait") or arguments.trait), []).append(row.columns)
    return contrasts


def keep_found(dictionary: ContrastDictionary) -> ContrastDictionary:
    """The same without the directions that were not found."""
    from ..saes.contrast import ContrastDictionary

    places = [place for place, one in enumerate(dictionary.separations) if one.found]
    kept = ContrastDictionary(
        dictionary.decoder[places], dictionary.hook_point, dictionary.name, model_name=dictionary.model_name
    )
    kept.separations = tuple(dictionary.separations[place] for place in places)
    return kept


def _row(separation: Separation, features: Mapping[str, int]) -> tuple[str, ...]:
    interval = separation.interval
    feature = str(features[separation.trait]) if separation.found else "not found"
    return (
        feature,
        separation.trait,
        f"{separation.auc:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
        f"{separation.distance:.1f}",
        str(separation.pairs),
    )
