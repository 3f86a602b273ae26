"""Which features rise in what a model writes after a training, found by `diff_models`: the same prompts, asked before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from natural import in_a_cell
from real_pairs import asked

from trl_sae_audit import FeatureDictionary, Sampling
from trl_sae_audit.verification.diff import diff_models

SHOWN = 10


def risen(
    before: Any,
    after: Any,
    tokenizer: Any,
    dictionary: FeatureDictionary,
    prompts: Sequence[str],
    sampling: Sampling,
    flagged: Sequence[int],
) -> dict[str, Any]:
    """How many features rise and fall beyond chance, and a line each for those flagged and for those that rise most."""
    found = diff_models(before, after, tokenizer, dictionary, asked(prompts), sampling=sampling)
    table = found.beyond_chance()
    up = table[table["effect_size"] > 0].sort_values("effect_size", ascending=False)
    own = found.writes.set_index("feature").reindex(list(flagged))
    return {
        "prompts": found.prompts,
        "answers": found.answers,
        "rise": len(up),
        "fall": len(table) - len(up),
        "risen": [
            f"{row['feature']} {row['effect_size']:+.2f}{' (flagged)' if row['feature'] in flagged else ''}: {row['words']}"
            for row in up.head(SHOWN).to_dict("records")
        ],
        "flagged": [
            f"{feature} {row['effect_size']:+.2f} (q {row['q_value']:.2g})"
            for feature, row in own.dropna(subset="effect_size").iterrows()
        ],
    }


def section(arm: str, seed: int, found: dict[str, Any]) -> str:
    """What a page says of an arm."""
    lines = "\n".join(f"- {in_a_cell(line)}" for line in found["risen"])
    flagged = f" Flagged: {', '.join(found['flagged'])}." if found["flagged"] else ""
    return (
        f"### What rises: {arm}, seed {seed}\n\nOf {found['answers']} answers to {found['prompts']} prompts, against the model before training, in standard deviations over prompts: "
        f"{found['rise']} features rise and {found['fall']} fall beyond chance.{flagged} The first {SHOWN} that rise:\n\n{lines}"
    )
