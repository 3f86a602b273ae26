"""Does this dictionary fit this model, and which trainers will work?"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import trl
from transformers import PreTrainedModel

from ..errors import AuditError
from ..models.hook_points import HookPoint, layer_lists, residual_width, resolve_hook_point
from ..models.residual_stream import TokenRules, residual_streams
from ..models.tokenizers import Processing, text_tokenizer
from .compatibility import find_hook_point, model_name, same_family, same_model
from .dictionary import FeatureDictionary
from .fit import POOR_FVU, Health, health_of

USELESS_FVU = 0.9
"""An FVU from which on a dictionary is condemned."""
NORMAL_L0 = (5.0, 300.0)
MOSTLY_DEAD = 0.9
_NEIGHBOUR_TOKENS = 2_000
_MUCH_BETTER = 0.75

State = Literal["good", "doubtful", "bad"]


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, whether that is good, and what is normal or to be done."""

    name: str
    found: str
    state: State
    remark: str = ""


@dataclass(frozen=True)
class TrainerSupport:
    """Whether a trainer can be used with the installed TRL, and if not, why."""

    name: str
    works: bool
    remark: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        dictionary: name of the dictionary.
        checks: one by one.
        trainers: TRL's, in the installed version.
        health: figures on the texts; None if the dictionary could not be put on the model.
        verdict: a sentence.
        fits: False if any check is bad.
    """

    dictionary: str
    checks: tuple[Check, ...]
    trainers: tuple[TrainerSupport, ...]
    trl_version: str
    health: Health | None
    verdict: str
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not a number becomes None."""
        result = asdict(self)
        if self.health is not None:
            result["health"] = {
                key: None if math.isnan(value) else value for key, value in result["health"].items()
            }
        return result


def diagnose(
    model: PreTrainedModel,
    tokenizer: Processing,
    texts: Sequence[str],
    dictionary: FeatureDictionary,
    *,
    rules: TokenRules | None = None,
    batch_size: int = 16,
    max_tokens: int = 20_000,
) -> Diagnosis:
    """Look whether `dictionary` fits `model` on `texts`.

    Args:
        model: the model that will be trained.
        tokenizer: the model's, or a processor that has it.
        texts: like those of the training run.
        dictionary: which is to explain it.
        rules: which tokens count.
        batch_size: windows in one forward pass.
        max_tokens: stop after about that many tokens.
    """
    rules = rules or TokenRules()
    checks: list[Check] = []
    health = None
    hook = _check_hook(model, dictionary, checks)
    width_fits = _check_width(model, dictionary, checks)
    checks.append(_check_name(model, dictionary))
    if hook is not None and width_fits:
        reader = text_tokenizer(tokenizer, hook.decoder)
        dictionary = dictionary.to(model.device)

        def measure(place: HookPoint, limit: int) -> Health:
            places = [place] if place.source is None else [place, replace(place, source=None)]
            stream = residual_streams(model, reader, texts, places, rules, batch_size)
            return health_of(stream, dictionary, limit)

        health = measure(hook, max_tokens)
        checks += _check_health(dictionary, health)
        if not math.isnan(health.token_fvu):
            checks += _look_at_neighbours(model, hook, health.token_fvu, measure)
    return Diagnosis(
        dictionary=dictionary.name,
        checks=tuple(checks),
        trainers=trainer_support(),
        trl_version=trl.__version__,
        health=health,
        verdict=_verdict(checks, health),
        fits=all(check.state != "bad" for check in checks),
    )


def trainer_support() -> tuple[TrainerSupport, ...]:
    """Which of the trainers this package reads the installed TRL has."""
    stable = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer", "RewardTrainer", "SFTTrainer")
    places = dict.fromkeys(stable, "trl")
    experimental = {"OnlineDPO": "online_dpo", "CPO": "cpo", "ORPO": "orpo", "TPO": "tpo", "PPO": "ppo"}
    places |= {f"{name}Trainer": f"trl.experimental.{module}" for name, module in experimental.items()}
    return tuple(_importable(name, module) for name, module in places.items())


def _importable(name: str, module: str) -> TrainerSupport:
    try:
        getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if name == "PPOTrainer" and error.name == "trl.experimental.ppo":
            return TrainerSupport(name, False, "TRL removed it after 1.12: pip install 'trl-sae-audit[ppo]'")
        return TrainerSupport(name, False, f"needs {error.name}, which is not installed")
    except (ImportError, AttributeError, RuntimeError) as error:
        return TrainerSupport(name, False, " ".join(str(error).split()))
    return TrainerSupport(name, True)


def _check_hook(
    model: PreTrainedModel, dictionary: FeatureDictionary, checks: list[Check]
) -> HookPoint | None:
    try:
        hook = find_hook_point(dictionary, model)
    except AuditError as error:
        checks.append(Check("hook point", dictionary.hook_point, "bad", str(error)))
        return None
    remark = "" if hook.path == dictionary.hook_point else f"recorded as {dictionary.hook_point}"
    checks.append(Check("hook point", hook.path, "good", remark))
    if hook.source is not None:
        remark = (
            "a transcoder: scores and figures are about what this MLP adds, not about the residual stream"
        )
        checks.append(Check("reads", f"{hook.source.path} ({hook.source.side})", "good", remark))
    return hook


def _check_width(model: PreTrainedModel, dictionary: FeatureDictionary, checks: list[Check]) -> bool:
    width = residual_width(model)
    fits = width == dictionary.d_model
    remark = "" if fits else f"the model's residual stream has {width}: it was made for another model"
    checks.append(Check("width", str(dictionary.d_model), "good" if fits else "bad", remark))
    return fits


def _check_name(model: PreTrainedModel, dictionary: FeatureDictionary) -> Check:
    given, recorded = model_name(model), dictionary.model_name
    if not recorded:
        return Check(
            "made for", "not recorded", "doubtful", "only the figures below can tell whether it fits"
        )
    if given and not same_family(recorded, given):
        return Check(
            "made for",
            recorded,
            "doubtful",
            f"you give {given}; if that is the same model under another name, or fine-tuned from it, all is well; "
            "otherwise the features mean nothing in it",
        )
    if given and not same_model(recorded, given):
        remark = f"you give {given}, another stage of its training: the figures below tell whether it fits that too"
        return Check("made for", recorded, "good", remark)
    return Check("made for", recorded, "good", f"you give {given}" if given else "")


def _check_health(dictionary: FeatureDictionary, health: Health) -> list[Check]:
    if health.tokens == 0:
        return [Check("tokens", "0", "bad", "the texts have no token that counts; give longer texts")]
    tokens = Check("tokens", f"{health.tokens:,.0f}", "good")
    if dictionary.encoder is None:
        remark = "raw directions do not reconstruct, so nothing tells whether they fit"
        return [tokens, Check("fit", "unknown", "doubtful", remark)]
    by_token = "the same token by token: what a few huge activations cannot flatter"
    return [
        tokens,
        _check_fvu("FVU", health.fvu, USELESS_FVU, "normal: 0.05 to 0.4; 1 is no better than the mean"),
        _check_fvu("token FVU", health.token_fvu, POOR_FVU, f"{by_token}; normal: below 0.3"),
        _check_l0(health.l0),
        _check_dead(health),
    ]


def _check_fvu(name: str, fvu: float, limit: float, remark: str) -> Check:
    if not fvu < limit:
        return Check(name, f"{fvu:.3f}", "bad", f"it does not explain these activations; {remark}")
    return Check(name, f"{fvu:.3f}", "doubtful" if fvu >= POOR_FVU else "good", remark)


def _check_l0(l0: float) -> Check:
    low, high = NORMAL_L0
    normal = f"normal: {low:.0f} to {high:.0f} active features a token"
    if l0 == 0:
        return Check("L0", "0", "bad", f"no feature is ever active; {normal}")
    return Check("L0", f"{l0:.1f}", "good" if low <= l0 <= high else "doubtful", normal)


def _check_dead(health: Health) -> Check:
    """Rare features need many tokens to show, so a high share alone condemns nothing."""
    remark = "active on none of these tokens; normal: below half, and more where tokens are few"
    return Check("dead", f"{health.dead:.1%}", "doubtful" if health.dead > MOSTLY_DEAD else "good", remark)


def _look_at_neighbours(
    model: PreTrainedModel, hook: HookPoint, token_fvu: float, measure: Callable[[HookPoint, int], Health]
) -> list[Check]:
    """A dictionary that fits much better at the next layer was probably put one layer off."""
    parent, _, layer = hook.path.rpartition(".")
    depth = layer_lists(model).get(parent, 0)
    for other in (int(layer) - 1, int(layer) + 1) if depth else ():
        if 0 <= other < depth:
            place = resolve_hook_point(model, f"{parent}.{other}")
            there = measure(place, _NEIGHBOUR_TOKENS)
            if there.token_fvu < _MUCH_BETTER * token_fvu:
                remark = (
                    f"it fits better there: token FVU {there.token_fvu:.3f}; pass --hook_point {place.path}"
                )
                return [Check("next layer", place.path, "doubtful", remark)]
    return []


def _verdict(checks: Sequence[Check], health: Health | None) -> str:
    bad = [check for check in checks if check.state == "bad"]
    doubtful = [check for check in checks if check.state == "doubtful"]
    if bad:
        return f"The dictionary does not fit this model: {bad[0].name} {bad[0].found} ({bad[0].remark})."
    explained = (
        ""
        if health is None or math.isnan(health.fvu)
        else f" ({1 - health.token_fvu:.0%} of a token explained)"
    )
    if doubtful:
        names = ", ".join(check.name for check in doubtful)
        return f"The dictionary can be used{explained}, with doubts about: {names}."
    return f"The dictionary fits this model{explained}."
