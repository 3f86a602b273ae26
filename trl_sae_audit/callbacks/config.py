"""The options of the attribution callback."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer

from ..errors import AuditError
from ..models.sampling import Sampling
from ..saes.dictionary import FeatureDictionary

_MINIMUM = {"top_k": 1, "log_top": 0, "health_tokens": 0, "probe_steps": 1, "generation_steps": 1, "selection_tokens": 1}  # fmt: skip
_RECORDED = ("top_k", "token_scores", "examples", "health_tokens", "probe_steps", "selection", "selection_tokens", "contexts", "attention_sinks")  # fmt: skip


@dataclasses.dataclass
class AttributionConfig:
    """The arguments of `FeatureAttributionCallback`, checked.

    Raises:
        AuditError: for arguments that contradict each other.
    """

    dictionary: FeatureDictionary | Sequence[FeatureDictionary]
    """What to project the gradient onto. Several, for instance one per layer, must have different names."""
    output_dir: str | Path | None = None
    """Where the run record goes; by default `sae_audit` in the trainer's output directory."""
    _: dataclasses.KW_ONLY
    watch: Mapping[str, int | tuple[str, int]] | None = None
    """Label → feature, always logged; with several dictionaries label → (dictionary name, feature)."""
    top_k: int = 20
    """Features recorded per step besides the watched ones: the largest by selection and by attribution."""
    log_top: int = 3
    """Number of top features that the trainer's log names."""
    token_scores: bool = False
    """Also record token share and activation attribution, from the tokens whose logits enter the loss. Costs two products
    with the dictionary per token; see `selection_tokens`."""
    examples: bool = False
    """Also record every example's own attribution to the watched features."""
    health_tokens: int = 64
    """Tokens per log on which the fit of the SAE (FVU, L0) is measured; 0 for none."""
    probe: Sequence[str] | Mapping[str, Tensor] | None = None
    """Texts, or a tokenized batch, on which the watched features' activation is measured during training."""
    probe_steps: int = 50
    """Optimizer steps between two measurements on the probe."""
    generations: Sampling | None = None
    """How to sample answers when training starts, e.g. `Sampling(answers=4)`. From these answers `generation_drift` is
    computed: how far every feature has moved in what the model now generates. When training ends they are sampled again if
    they say too little by then, see docs/scores.md. By default no answers are sampled; docs/attribution.md has the cost."""
    generation_prompts: Sequence[Any] | None = None
    """The prompts to answer: texts, conversations, or rows with a `prompt`; every answer to them is read in a look. By default
    64 prompts of the train set, and of long answers as many, drawn at random, as have 10,240 tokens."""
    generation_steps: int = 50
    """Optimizer steps between two measurements on the answers."""
    flush_seconds: float = 30.0
    """Longest time between two writes of the record. A killed process loses at most that, and the last ten optimizer
    steps, however rarely the trainer logs."""
    overwrite: bool = False
    """Replace the record of an earlier run in `output_dir`. By default a second run's record goes to `runs/dpo-2` if
    `runs/dpo` has one, and the log says so."""
    selection: bool = True
    """Also record what each step selects for, `Σ c·(a_f − ā_f)` over the response tokens, for every dictionary that has
    an encoder. Of all scores of a running training it says most about what the model will write; see docs/scores.md."""
    selection_tokens: int | None = None
    """Tokens per step and process that are encoded for selection, and for token scores, drawn at random so that every sum
    stays unbiased. By default 1,024, or as many as take about 2 % of the step's operations where the dictionary is large
    beside the model, but at least 16; the record's manifest has the number. Give a large one for all tokens."""
    contexts: bool = True
    """Keep on the record, as text, where each feature is most active in the responses, and of a run on the model's own answers
    some of the first and the last of them; needs `selection`."""

    attention_sinks: bool = False
    """Count features as active at attention sinks too, tokens of more than ten times the median norm of their answer's: in selection,
    in activation attribution, on the probe, in generations and rollouts."""

    dataset: str | None = None
    """Where the training data are, as the option `--dataset` takes them: for the record, so that `verify` and `diff` know."""

    dictionaries: tuple[FeatureDictionary, ...] = dataclasses.field(init=False)
    """`dictionary` as a tuple."""

    def __post_init__(self) -> None:
        if isinstance(self.dictionary, FeatureDictionary):
            self.dictionaries = (self.dictionary,)
        else:
            self.dictionaries = tuple(self.dictionary)
        if not self.dictionaries or not all(
            isinstance(each, FeatureDictionary) for each in self.dictionaries
        ):
            raise AuditError(
                "FeatureAttributionCallback needs a FeatureDictionary or a list of them; make one with load_dictionary."
            )
        names = [each.name for each in self.dictionaries]
        if len(set(names)) < len(names):
            raise AuditError(
                f"Two dictionaries have the same name among {names}; pass name= to load_dictionary."
            )
        for option, least in _MINIMUM.items():
            value = getattr(self, option)
            if value is not None and value < least:
                raise AuditError(f"{option} is {value}; it must be at least {least}.")
        if self.probe is not None and not self.watch:
            raise AuditError(
                "A probe measures the drift of watched features, but none is watched; pass watch=."
            )
        if self.generation_prompts is not None and self.generations is None:
            raise AuditError(
                "There are generation_prompts but no generations; pass generations=Sampling(answers=4) as well."
            )
        if self.output_dir is not None:  # the process may change its directory while it trains
            self.output_dir = Path(self.output_dir).absolute()

    def to_record(self) -> dict[str, Any]:
        """The options that the record's manifest names."""
        sampling = self.generations and dataclasses.asdict(self.generations) | {
            "steps": self.generation_steps
        }
        return {name: getattr(self, name) for name in _RECORDED} | {"generations": sampling}


def record_directory(config: AttributionConfig, trainer: Trainer) -> Path:
    """Where the run record goes, as an absolute path."""
    return Path(config.output_dir or Path(trainer.args.output_dir) / "sae_audit").absolute()
