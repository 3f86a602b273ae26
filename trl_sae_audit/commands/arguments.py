"""What the commands share: parsing options with `TrlParser`, loading a model and its tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

from ..errors import AuditError
from ..texts import read_texts
from ..untrusted import parse_yaml, read_bytes


@dataclass
class ModelArguments:
    """The model to look at."""

    model_name_or_path: str = field(
        metadata={"help": "Directory of a Hugging Face model, or its name on the Hub."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the model's weights."}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1 …; default a GPU if there is one."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model. Only for models you trust."}
    )


@dataclass
class TextArguments:
    """The texts to look at it with."""

    texts: str = field(
        metadata={
            "help": "A file .jsonl, .json, .parquet or .txt, a directory saved by datasets, or the name of a data set "
            "on the Hub. Preference data (prompt, chosen, rejected) and conversations are understood."
        }
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns that hold text; each gives texts of its own, save prompt, which goes before each of the "
            "others. Default: TRL's usual names."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of a data set that has several."})
    prompt_separator: str = field(
        default="", metadata={"help": "What to put between a prompt and an answer that are plain strings."}
    )
    max_texts: int | None = field(
        default=None, metadata={"help": "Use at most that many texts, chosen at random."}
    )

    def read(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        return read_texts(
            self.texts,
            tokenizer,
            columns=self.columns,
            split=self.split,
            prompt_separator=self.prompt_separator,
            limit=self.max_texts,
        )


def parse(
    command: str, description: str, dataclasses: Sequence[type], argv: Sequence[str]
) -> tuple[Any, ...]:
    """Options of a command as instances of `dataclasses`, from the command line and `--config FILE.yaml`.

    Raises:
        AuditError: if the file cannot be read, or has an option the command does not know.
    """
    parser = TrlParser(
        dataclasses,
        prog=f"trl-sae-audit {command}",
        description=description,
        formatter_class=_DefaultsWhereThereAreAny,
    )
    # TrlParser takes --config out of the arguments before argparse sees it; this makes the help show it
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Take options from this file; those on the command line win.",
        default=argparse.SUPPRESS,
    )
    if "--config" in argv and list(argv).index("--config") == len(argv) - 1:
        parser.error("argument --config: expected a file")
    try:
        if "--config" in argv:
            check_config(list(argv)[list(argv).index("--config") + 1])
        return parser.parse_args_and_config(list(argv))[: len(dataclasses)]
    except OSError as error:
        raise AuditError(f"the file of --config cannot be read: {error}.") from error
    except AuditError:
        raise
    except ValueError as error:
        raise AuditError(" ".join(str(error).split())) from error


def check_config(path: str) -> None:
    """Look at a file of options before `TrlParser` takes it at its word.

    Raises:
        AuditError: it is no valid YAML of names and values, or sets environment variables, which `TrlParser` would obey.
    """
    try:
        options = parse_yaml(read_bytes(Path(path)))
    except ValueError as error:
        raise AuditError(f"the file of --config is not valid YAML of options: {error}.") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise AuditError(
            "the file of --config must contain a YAML mapping of options, such as 'output_dir: runs/audit'."
        )
    if "env" in options:
        raise AuditError(
            "the file of --config sets environment variables ('env'), which could load other code; set them yourself if you "
            "mean it."
        )


class _DefaultsWhereThereAreAny(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def load_model(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready for forward passes, and its tokenizer.

    Raises:
        AuditError: if either cannot be loaded, or the model's files lack some of its weights.
    """
    name = arguments.model_name_or_path
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, arguments.dtype),
            trust_remote_code=arguments.trust_remote_code,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise AuditError(f"the model {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise AuditError(
            f"the files of the model {name!r} lack {len(missing)} of its weights, such as {missing[0]!r}, which would be "
            "random: give a complete model with a language-model head."
        )
    return model.to(device).eval(), tokenizer
