"""Options that several commands share. Nothing heavy is imported before one of their methods is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..console import Sentence, console, to_json
from ..errors import AuditError
from .parser import option

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.opener import DatasetLike
    from ..saes.dictionary import FeatureDictionary


@dataclass
class ModelArguments:
    """The model."""

    model: str = option(
        "Directory of a Hugging Face model, or its name on the Hub.", aliases=["--model_name_or_path"]
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("Type of the model's weights.", "float32")
    device: str | None = option("cpu, cuda, cuda:1 …; default a GPU if there is one.", None)
    trust_remote_code: bool = option("Run code that comes with the model. Only for models you trust.", False)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, ready for forward passes, and its tokenizer; AuditError if either cannot be loaded."""
        from .loading import load_model

        return load_model(self)


@dataclass
class DictionaryArguments:
    """The dictionary."""

    dictionary: str = option(
        "A directory of sae-lens, Gemma Scope, Llama Scope, sparsify, dictionary_learning …, or a sae-lens release or a repository on "
        "the Hub (with --sae_id); or auto: the best registered SAE of the model in the local cache; it says why.",
        "auto",
        main=True,
        aliases=["--sae"],
    )
    sae_id: str | None = option("Which SAE of the release; of a repository, its folder or file in it.", None)
    hook_point: str | None = option(
        "Read here instead of where the SAE says it hooks: a layer's number or a module's path.", None
    )
    transcoder: bool = option(
        "Also take a transcoder of one MLP: its scores are about what the MLP adds to the residual stream.",
        False,
    )

    def load(self, model: PreTrainedModel | None = None) -> FeatureDictionary:
        from ..saes.loading import load_dictionary

        if self.dictionary == "train":
            raise AuditError(
                "--dictionary train makes an SAE in `audit`; here, pass the directory in which it was kept, or train one with "
                "`trl-sae-audit train-sae`."
            )
        if self.dictionary == "auto" and model is None:
            raise AuditError(
                "--dictionary auto chooses an SAE for one model, in `audit` and `doctor`; here, pass the one that they chose."
            )
        return load_dictionary(
            self.dictionary, self.sae_id, hook_point=self.hook_point, transcoder=self.transcoder, model=model
        )

    def load_with(
        self, model_arguments: ModelArguments
    ) -> tuple[FeatureDictionary, PreTrainedModel, PreTrainedTokenizerBase]:
        """The dictionary, the model and its tokenizer; the dictionary first, which is the quicker to be refused."""
        if self.dictionary == "auto":
            model, tokenizer = model_arguments.load()
            return self.load(model), model, tokenizer
        dictionary = self.load()
        return dictionary, *model_arguments.load()


@dataclass
class PreferenceArguments:
    """The preference pairs."""

    dataset: str = option(
        "A file .jsonl, .json, .csv or .parquet (also .gz), a folder of them, a directory made by save_to_disk, or the name of a "
        "dataset on the Hub, with 'chosen' and 'rejected', and mostly 'prompt'.",
        aliases=["--dataset_name"],
    )
    split: str | None = option("Split, of a dataset that has several; default train.", None)
    max_rows: int | None = option("Use the first rows only.", None)

    def source(self) -> DatasetLike:
        """What `audit_preferences` and `filter_preferences` take: a file by its path, so that its rows are streamed."""
        from ..data.opener import iterate_rows, open_dataset

        if self.max_rows is not None:
            if self.max_rows < 1:
                raise AuditError(f"--max_rows is {self.max_rows}; give at least 1.")
            rows = islice(iterate_rows(self.dataset, self.split), self.max_rows)
            return [
                row.columns if row.columns is not None else row.text for row in rows
            ]  # a bad row stays bad
        path = Path(self.dataset)
        return path if path.is_file() else open_dataset(self.dataset, split=self.split)


@dataclass
class TextArguments:
    """The texts."""

    dataset: str = option(
        "A file .jsonl, .json, .csv, .parquet or .txt (also .gz), a folder of them, a directory made by save_to_disk, or the name "
        "of a dataset on the Hub. Preference data (prompt, chosen, rejected) and conversations are understood.",
        aliases=["--dataset_name", "--texts"],
    )
    columns: list[str] | None = option(
        "Columns that hold text; each gives texts of its own, save prompt, which goes before each of the others. Default: "
        "TRL's usual names.",
        None,
    )
    split: str | None = option("Split, of a dataset that has several; default train.", None)
    prompt_separator: str = option("What to put between a prompt and an answer that are plain strings.", "")
    max_texts: int | None = option("Use at most that many texts, chosen at random.", None)

    def read(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        from ..data.texts import read_texts

        return read_texts(
            self.dataset,
            tokenizer,
            columns=self.columns,
            split=self.split,
            prompt_separator=self.prompt_separator,
            limit=self.max_texts,
        )


def options_of(*groups: Any) -> dict[str, Any]:
    """What a manifest keeps as its `config`, and `--config DIRECTORY` reads back: all but where to write."""
    given = {name: value for group in groups for name, value in asdict(group).items()}
    return {
        name: value for name, value in given.items() if name not in ("output_dir", "overwrite", "push_to_hub")
    }


@dataclass
class OutputArguments:
    """General.

    A command collects its figures in one mapping, makes text and tables of it, and gives both to `show`; results go to standard
    output, everything else to standard error.
    """

    json: bool = option("Print one JSON document for programs instead of text and tables.", False)

    def show(self, document: Mapping[str, Any], *parts: RenderableType) -> None:
        """Print the result: `document` where --json was given, else `parts`, one below the other."""
        if self.json:
            print(to_json(document))
            return
        stdout = console()
        for part in parts:
            stdout.print(Sentence(part) if isinstance(part, str) else part, crop=False)
