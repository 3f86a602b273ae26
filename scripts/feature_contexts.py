"""What do a run's top features react to? Their strongest tokens, in context, over texts; as Markdown.

python scripts/feature_contexts.py runs/dpo/sae_audit --model ./model --dictionary ./sae --dataset pairs.jsonl
"""

from __future__ import annotations

import argparse
import heapq
from itertools import islice

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sae_audit import RunRecord, load_dictionary
from trl_sae_audit.data.texts import read_texts
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import hidden_states, token_windows
from trl_sae_audit.statistics import NORMAL_QUANTILE

BEFORE, AFTER = 6, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", help="directory of the run record")
    parser.add_argument("--model", required=True, help="directory of the model, as it was before training")
    parser.add_argument("--dictionary", required=True, help="directory of the SAE")
    parser.add_argument("--dataset", "--texts", dest="texts", required=True, help="texts to look at")
    parser.add_argument("--windows", type=int, default=200, help="texts, or windows of them, to read")
    parser.add_argument("--context", type=int, default=160, help="tokens a window")
    parser.add_argument("--features", type=int, default=6, help="features of either sign")
    parser.add_argument("--examples", type=int, default=4, help="contexts a feature")
    options = parser.parse_args()
    features = RunRecord.load(options.record).features()
    ranked = features.sort_values("attribution", ascending=False)
    shown = ranked.iloc[[*range(options.features), *range(-options.features, 0)]]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    dictionary = load_dictionary(options.dictionary)
    point = resolve_hook_point(model, dictionary.hook_names)
    columns = torch.tensor(shown["feature"].to_numpy())
    strongest: dict[int, list[tuple[float, str]]] = {int(feature): [] for feature in columns}
    active, tokens = torch.zeros(len(columns)), 0
    windows = islice(
        token_windows(
            read_texts(options.texts, tokenizer, limit=options.windows), tokenizer, options.context
        ),
        options.windows,
    )
    for window in track(list(windows), description="reading"):
        ids = torch.tensor([window])
        hidden = hidden_states(point, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, 1:]
        activations = dictionary.encode(hidden)[:, columns]
        active, tokens = active + (activations > 0).sum(0), tokens + len(activations)
        for column, feature in enumerate(strongest):
            place = int(activations[:, column].argmax()) + 1
            before = tokenizer.decode(window[max(1, place - BEFORE) : place])
            after = tokenizer.decode(window[place + 1 : place + 1 + AFTER])
            text = f"{before}**{tokenizer.decode(window[place : place + 1])}**{after}".replace("\n", "⏎")
            heapq.heappush(strongest[feature], (float(activations[place - 1, column]), text))
            if len(strongest[feature]) > 50:
                heapq.heappop(strongest[feature])
    print("| feature | attribution ± 95 % interval | q | lift | active | strongest tokens in context |")
    print("|---|---|---|---|---|---|")
    for (_, row), share in zip(shown.iterrows(), active / tokens, strict=True):
        contexts = list(
            dict.fromkeys(text for value, text in sorted(strongest[int(row.feature)], reverse=True) if value)
        )
        print(
            f"| {int(row.feature)} | {row.attribution:+.4f} ± {NORMAL_QUANTILE * row.standard_error:.4f} | {row.q_value:.2g} | {row.lift:.1f} "
            f"| {share:.1%} | {' · '.join(contexts[: options.examples]).replace('|', '¦')} |"
        )


if __name__ == "__main__":
    main()
