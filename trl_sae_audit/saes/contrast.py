"""Directions without an SAE: what an answer with a trait has in the residual stream that one without it has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import AuditError
from ..models.attention_sinks import find_attention_sinks
from ..models.batches import answer_batches
from ..models.hook_points import HookPoint, layer_lists, layer_output, resolve_hook_point
from ..models.residual_stream import evaluation_mode
from ..models.token_ids import Text, tokenize_pairs
from ..models.tokenizers import Processing, text_tokenizer
from ..statistics import Interval
from .compatibility import check_whole, model_name
from .contrast_sets import ContrastPair
from .dictionary import FeatureDictionary

FEWEST_PAIRS = 12
HELD_OUT = 3
"""One pair of so many is held out."""
_DRAWS = 2_000


@dataclass(frozen=True)
class Separation:
    """How well a trait's direction tells held-out answers apart.

    Attributes:
        trait: its name. hook_point: the layer's path.
        auc: chance that a held-out answer with the trait lies further along the direction than one without it; 0.5 is chance.
        interval: of the AUC, 95 %, over held-out pairs.
        distance: of the two means of held-out answers, in standard deviations.
        pairs: how many were held out.
    """

    trait: str
    hook_point: str
    auc: float
    interval: Interval
    distance: float
    pairs: int

    @property
    def found(self) -> bool:
        """Whether the direction does better than chance."""
        return self.interval.low > 0.5


class ContrastDictionary(FeatureDictionary):
    """Directions of traits: a feature's activation is the projection of the hidden state onto its direction.

    Attributes:
        separations: how well each tells held-out answers apart, in the order of the features.
    """

    separations: tuple[Separation, ...] = ()

    @property
    def watch(self) -> dict[str, int]:
        """Trait → feature, as a callback's `watch` takes it."""
        return {separation.trait: feature for feature, separation in enumerate(self.separations)}


def contrast_directions(
    model: nn.Module,
    tokenizer: Processing,
    contrasts: Mapping[str, Sequence[ContrastPair | Mapping[str, Any]]],
    hook_points: Sequence[str] | None = None,
    *,
    name: str = "directions",
    batch_size: int = 16,
    max_length: int = 1024,
    seed: int = 0,
    missing: Literal["refuse", "keep"] = "refuse",
) -> ContrastDictionary:
    """A direction for each trait: the mean hidden state of answers with it, less that of answers without it.

    Two thirds of the pairs, chosen at random, make the directions; each is measured on the others. The one layer for all traits is that
    at which directions of one half of the former tell the other half apart best, so that the held-out pairs choose nothing.

    Args:
        model: whose residual stream is read; the model that will be trained.
        tokenizer: the model's, or a processor that has it.
        contrasts: trait → pairs: `ContrastPair`, or mappings with `prompt`, `positive` and `negative`, strings or messages.
            `CONTRAST_SETS` has seven traits.
        hook_points: the layers to choose from; all but the first and the last by default.
        name: of the dictionary.
        batch_size: answers in one forward pass.
        max_length: tokens of prompt and answer; longer ones are left out.
        seed: of the split and the intervals.
        missing: what to do with a direction that does no better than chance on held-out answers: refuse all, or "keep" it, with
            what was measured in `separations`.

    Raises:
        AuditError: fewer than twelve pairs of a trait, or a direction that was not found.
    """
    check_whole(model)
    points = _points(model, hook_points)
    tokenizer = text_tokenizer(tokenizer, points[0].decoder)
    pairs = {trait: [_as_pair(trait, pair) for pair in given] for trait, given in contrasts.items()}
    if not pairs:
        raise AuditError("There is no trait to find a direction of; give at least one, with its pairs.")
    rng = np.random.default_rng(seed)
    states, training, held_out = {}, {}, {}
    for trait, given in pairs.items():
        states[trait] = _answer_means(model, tokenizer, trait, given, points, batch_size, max_length)
        order = torch.from_numpy(rng.permutation(len(states[trait])))
        kept_out = len(order) // HELD_OUT
        held_out[trait], training[trait] = order[:kept_out], order[kept_out:]
    layers = range(len(points))
    chosen = max(
        layers,
        key=lambda layer: sum(_cross_distance(states[trait][training[trait], :, layer]) for trait in pairs),
    )
    directions, separations = [], []
    for trait in pairs:
        here = states[trait][:, :, chosen]
        direction = _difference(here[training[trait]])
        directions.append(direction)
        projections = (here[held_out[trait]] @ direction).numpy()
        separations.append(_separate(trait, points[chosen].path, projections, seed))
    dictionary = ContrastDictionary(
        torch.stack(directions), points[chosen].path, name, model_name=model_name(model) or None
    )
    dictionary.separations = tuple(separations)
    for separation in separations if missing == "refuse" else ():
        if not separation.found:
            raise AuditError(not_found(separation))
    return dictionary


def not_found(separation: Separation) -> str:
    """The sentence about a direction that is none."""
    return (
        f"No direction of {separation.trait!r} was found: on {separation.pairs} held-out pairs its AUC is {separation.auc:.2f} "
        f"[{separation.interval.low:.2f}, {separation.interval.high:.2f}], and 0.5 is chance. Give more pairs, pairs that differ in the "
        "trait alone, or other layers (hook_points)."
    )


def _points(model: nn.Module, hook_points: Sequence[str] | None) -> list[HookPoint]:
    if hook_points is not None:
        return [resolve_hook_point(model, hook_point) for hook_point in hook_points]
    depth = max(layer_lists(model).values(), default=1)
    return [resolve_hook_point(model, str(layer)) for layer in range(1, depth - 1) or range(depth)]


def _as_pair(trait: str, pair: ContrastPair | Mapping[str, Any]) -> ContrastPair:
    if isinstance(pair, ContrastPair):
        return pair
    missing = [column for column in ("positive", "negative") if column not in pair]
    if missing:
        raise AuditError(
            f"A pair of {trait!r} has no {' and no '.join(missing)}; each has prompt, positive (an answer with the trait) and "
            "negative (one without it)."
        )
    return ContrastPair(pair.get("prompt", ""), pair["positive"], pair["negative"])


@torch.no_grad()
def _answer_means(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trait: str,
    pairs: Sequence[ContrastPair],
    points: Sequence[HookPoint],
    batch_size: int,
    max_length: int,
) -> Tensor:
    """Mean hidden state of each answer's tokens, attention sinks aside: [pairs, 2, layers, d_model] float32, with the trait first."""
    prompts: list[Text] = [pair.prompt for pair in pairs for _ in range(2)]
    answers: list[Text] = [answer for pair in pairs for answer in (pair.positive, pair.negative)]
    rows = tokenize_pairs(tokenizer, prompts, answers)
    whole = [
        pair
        for pair in range(len(pairs))
        if all(
            len(answer) > 0 and len(before) + len(answer) <= max_length
            for before, answer in rows[2 * pair : 2 * pair + 2]
        )
    ]
    if len(whole) < FEWEST_PAIRS:
        raise AuditError(
            f"The trait {trait!r} has {len(whole)} usable pairs, and a direction takes at least {FEWEST_PAIRS}: some make it, others "
            f"measure it. A pair counts if neither answer is empty nor longer than {max_length} tokens with its prompt."
        )
    rows = [row for pair in whole for row in rows[2 * pair : 2 * pair + 2]]
    means: list[Tensor] = [torch.empty(0)] * len(rows)
    decoder = points[0].decoder
    device = next(decoder.parameters()).device
    with evaluation_mode(model):
        for places, batch in answer_batches(tokenizer, rows, batch_size):
            seen: dict[int, Tensor] = {}
            with ExitStack() as stack:
                for number, point in enumerate(points):
                    stack.callback(point.module.register_forward_hook(_keep(seen, number)).remove)
                decoder(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    use_cache=False,
                )
            counted = batch["completion_mask"].bool().to(device)
            for number in sorted(seen):
                kept = counted & ~find_attention_sinks(seen[number], counted)
                total = torch.where(kept[..., None], seen[number].float(), 0.0).sum(1)
                seen[number] = (total / kept.sum(1, keepdim=True)).cpu()
            for row, place in enumerate(places):
                means[place] = torch.stack([seen[number][row] for number in range(len(points))])
    return torch.stack(means).unflatten(0, (-1, 2))


def _keep(seen: dict[int, Tensor], number: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[number] = layer_output(output)

    return hook


def _difference(states: Tensor) -> Tensor:
    """Unit difference of means of [pairs, 2, d_model]."""
    return nn.functional.normalize((states[:, 0] - states[:, 1]).mean(0), dim=0)


def _cross_distance(states: Tensor) -> float:
    """How far directions of one half of the pairs put the other half's means apart, in standard deviations; mean of both ways."""
    middle = len(states) // 2
    halves = states[:middle], states[middle:]
    ways = ((halves[0], halves[1]), (halves[1], halves[0]))
    return float(np.mean([_distance((other @ _difference(one)).numpy()) for one, other in ways]))


def _distance(projections: np.ndarray) -> float:
    """(mean with − mean without) / pooled standard deviation, of [pairs, 2]."""
    spread = np.sqrt(projections.var(0, ddof=1).mean())
    return float((projections[:, 0].mean() - projections[:, 1].mean()) / max(spread, 1e-12))


def _separate(trait: str, hook_point: str, projections: np.ndarray, seed: int) -> Separation:
    rng = np.random.default_rng(seed)
    draws = [
        area_under_curve(projections[rng.integers(0, len(projections), len(projections))])
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    area = area_under_curve(projections)
    return Separation(
        trait,
        hook_point,
        area,
        Interval(area, float(low), float(high)),
        _distance(projections),
        len(projections),
    )


def area_under_curve(projections: np.ndarray) -> float:
    """Chance that one with the trait exceeds one without it, ties counting half, of [n, 2]: Mann and Whitney's U / n²."""
    n = len(projections)
    ranks = rankdata(np.concatenate([projections[:, 0], projections[:, 1]]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / n**2)
