"""What `audit` and `filter` share: where the preference pairs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import AuditError
from ..preferences import Source
from ..saved_datasets import load_saved


@dataclass
class PreferenceArguments:
    """The preference pairs."""

    dataset: str = field(
        metadata={
            "help": "A file .jsonl, .jsonl.gz or .parquet, a directory made by save_to_disk, or the name of a dataset on "
            "the Hub, with 'chosen' and 'rejected', and mostly 'prompt'."
        }
    )
    split: str = field(default="train", metadata={"help": "Split, of a dataset that has several."})

    def source(self) -> Source:
        """What `audit_preferences` and `filter_preferences` take.

        Raises:
            AuditError: there is no such dataset or split.
        """
        path = Path(self.dataset)
        if path.is_file() or self.dataset.endswith((".jsonl", ".json", ".gz", ".parquet")):
            return path
        try:
            found = load_saved(path) if path.is_dir() else load_dataset(self.dataset)
        except AuditError:
            raise
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise AuditError(
                f"The dataset {self.dataset!r} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(found, DatasetDict):
            return found
        if self.split not in found:
            raise AuditError(f"The dataset has no split {self.split!r} but {', '.join(found)}; pass --split.")
        return found[self.split]


def first_as_option(argv: Sequence[str], option: str) -> list[str]:
    """Let the first argument do without its option's name: `flag AUDIT --feature 3`."""
    if argv and not argv[0].startswith("-"):
        return [f"--{option}", *argv]
    return list(argv)


def leading_as_option(argv: Sequence[str], option: str) -> list[str]:
    """Let the first arguments, however many, do without their option's name: `compare RUN RUN --top 3`."""
    leading = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [f"--{option}", *argv] if leading else list(argv)
