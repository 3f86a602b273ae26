"""The dictionary of an audit: one that there is, or one that is trained on the data first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AuditError, NoDictionaryError
from .options import DictionaryArguments, PreferenceArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..saes.dictionary import FeatureDictionary

AUTO, TRAIN = "auto", "train"
_ANSWERS = ("chosen", "completion", "messages", "text")

logger = logging.getLogger(__name__)


def dictionary_of(
    arguments: DictionaryArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceArguments,
    output_dir: str,
) -> FeatureDictionary:
    """The dictionary that the options ask for. One that was trained is kept in OUTPUT_DIR-sae, and the options name it from then on.

    Raises:
        AuditError: it cannot be loaded, or trained on these data.
    """
    if arguments.dictionary != TRAIN:
        try:
            return arguments.load(model)
        except NoDictionaryError as error:
            logger.warning("%s", error.reason)
    from ..data.opener import iterate_rows
    from ..data.texts import read_texts
    from ..saes.on_the_spot import train_on_the_spot

    directory = Path(output_dir)
    directory = directory.with_name(f"{directory.name}-sae")
    source = data.source()

    def texts() -> list[str]:
        first = next((row.columns for row in iterate_rows(source) if row.columns is not None), {})
        if not any(name in first for name in _ANSWERS):
            raise AuditError(
                f"An SAE is to be trained on the data, but they have prompts alone (columns {sorted(first)}); train one on texts with "
                "answers by `trl-sae-audit train-sae`, and pass it with --dictionary."
            )
        return read_texts(source, tokenizer)

    dictionary = train_on_the_spot(model, tokenizer, texts, directory, dataset=data.dataset)
    arguments.dictionary = str(directory)
    return dictionary
