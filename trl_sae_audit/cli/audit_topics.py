"""What an audit's command prints of topics: nothing, unless a feature is preferred otherwise in one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..console import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..audit.result import Audit

SIGNIFICANT = 0.05  # as in audit.result, which would be slow to import
_LINES = 5
_WORDS = {
    "dpo": ("pairs", "the chosen one has more of it"),
    "reward": ("pairs", "the one paid more has more of it"),
    "policy_gradient": ("prompts", "those paid more have more of it"),
}
"""By objective: what an example is, and what preferring a feature means."""


def topic_document(audit: Audit) -> dict[str, Any]:
    """What programs are told: the topics, and the cells beyond chance."""
    cells = audit.topic_features()
    return {
        "topics": audit.topics().to_dict("records"),
        "topic_features": cells[cells["q_value"] < SIGNIFICANT].to_dict("records"),
    }


def topic_parts(audit: Audit) -> list[RenderableType]:
    """The features that a topic prefers otherwise than the rest, each where it differs most clearly; empty where none does."""
    from ..io.feature_labels import caption

    cells = audit.topic_features()
    beyond = cells[cells["q_value"] < SIGNIFICANT].drop_duplicates("feature")
    if beyond.empty:
        return []
    examples, preferred = _WORDS[audit.manifest["loss"]["objective"]]
    rows = beyond.head(_LINES).to_dict("records")
    return [
        table(
            f"In one of {len(audit.topics())} topics otherwise than elsewhere",
            {
                "topic": "left",
                "feature": "right",
                "here": "right",
                "else-\nwhere": "right",
                "q": "right",
                "words": "left",
            },
            [
                [
                    row["name"] or f"topic {row['topic']}",
                    str(row["feature"]),
                    f"{row['preference']:.0%}",
                    f"{row['preference_elsewhere']:.0%}",
                    f"{row['q_value']:.2g}",
                    caption(row) or "–",
                ]
                for row in rows
            ],
            words="words",
            optional=["q"],
        ),
        f"Here, elsewhere: of the {examples} whose answers differ in the feature, the share in which {preferred}. Beyond chance in some "
        f"topic (q < {SIGNIFICANT:g}): {len(beyond)} features.",
    ]
