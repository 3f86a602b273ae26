"""Options from dataclasses: what TRL's own parser makes of the same words, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from trl import TrlParser

from trl_sae_audit import AuditError
from trl_sae_audit.cli.parser import _fill, option, parse_options

pytestmark = pytest.mark.newest


@dataclass
class First:
    """First things."""

    name: str = option("A name.", aliases=["--also"])
    count: int = option("A count.", 3)
    rate: float = option("A rate.", 0.5)
    kind: Literal["red", "blue"] = option("A kind.", "red")
    limit: int | None = option("A limit.", None)
    note: str | None = option("A note.", None, text=True)


@dataclass
class Second:
    """Second things."""

    words: list[str] = option("Words.", ["one", "two"])
    more: list[str] | None = option("More words.", None)
    quick: bool = option("Be quick.", False)
    careful: bool = option("Be careful.", True, negative="Be careless.")


GROUPS = (First, Second)


@dataclass
class Places:
    """Places."""

    places: list[str] = option("Places.", positional=True, metavar="PLACE")
    top: int = option("How many.", 8)


def for_trl(group: Any) -> Any:
    """The same dataclass with what TRL's parser knows of a field's metadata."""
    hints = get_type_hints(group)
    return make_dataclass(
        group.__name__,
        [
            (
                each.name,
                hints[each.name],
                field(
                    default=each.default,
                    default_factory=each.default_factory,
                    metadata={"aliases": list(each.metadata.get("aliases", ()))},
                ),
            )
            for each in fields(group)
        ],
    )


TRL = tuple(map(for_trl, GROUPS))


def parse(*words: str, groups: Any = GROUPS) -> tuple[Any, ...]:
    return parse_options("try", "A description.", "trl-sae-audit try --name a", groups, words)


@pytest.mark.parametrize(
    "line",
    [
        "--name a",
        "--name=a --count -4 --rate=-1e-3 --kind blue",
        "--name a --words x --more y z --quick --no_careful",
        "--name a --quick true --careful false",
        "--name a --quick=no --careful=1",
        "--name a --limit none --note None",
        "--name a --limit 7 --note=",
        "--name a --name b --words p q --words r",
        "--no-careful --name a",
    ],
)
def test_words_mean_what_they_mean_to_trl(line: str) -> None:
    theirs = TrlParser(TRL).parse_args_and_config(line.split())
    assert list(map(asdict, parse(*line.split()))) == list(map(asdict, theirs))


@pytest.mark.parametrize(
    "entries",
    [
        {"name": "a"},
        {
            "name": "b",
            "count": 4,
            "rate": "1e-3",
            "kind": "blue",
            "words": ["x", "y"],
            "quick": True,
            "careful": False,
        },
        {"name": "c", "limit": None, "more": None, "note": "a b"},
    ],
)
def test_a_file_means_what_it_means_to_trl(entries: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(entries))
    for line in ([], ["--count", "9", "--words", "z"]):
        words = ["--config", str(file), *line]
        theirs = TrlParser(TRL).parse_args_and_config(words)
        assert list(map(asdict, parse(*words))) == list(map(asdict, theirs))


def test_a_first_argument_needs_no_name(tmp_path: Path) -> None:
    assert parse("a", "b", "--top", "3", groups=[Places]) == (Places(["a", "b"], 3),)
    assert parse("--top", "3", "a", "b", groups=[Places]) == (Places(["a", "b"], 3),)
    assert parse("--places", "a", "b", groups=[Places]) == (Places(["a", "b"]),)
    (tmp_path / "c.yaml").write_text("places: [x, y]\ntop: 2\n")
    assert parse("--config", str(tmp_path / "c.yaml"), groups=[Places]) == (Places(["x", "y"], 2),)
    assert parse("z", "--config", str(tmp_path / "c.yaml"), groups=[Places]) == (Places(["z"], 2),)


def test_other_spellings() -> None:
    assert parse("--also", "a")[0].name == "a"
    assert parse("--name", "a", "--no-careful")[1].careful is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--name must be given; see trl-sae-audit try --help."),
        ("--name a --coutn 3", "There is no option --coutn; did you mean --count?"),
        ("--name a --count x", "--count: 'x' is not a whole number"),
        ("--name a --rate x", "--rate: 'x' is not a number"),
        ("--name a --kind green", "--kind: 'green' is not one of red, blue"),
        ("--name a --quick maybe", "--quick: 'maybe' is not true or false"),
        ("--name", "--name: expected one argument"),
        ("--name a --config", "--config: expected one argument"),
        ("--name a left", "There is no option left"),
        ("--name a --cou 3", "There is no option --cou"),
    ],
)
def test_what_is_wrong_is_one_sentence(line: str, message: str) -> None:
    with pytest.raises(AuditError) as error:
        parse(*line.split())
    assert message in str(error.value)
    assert str(error.value).endswith((".", "?"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a: [1", "is not valid YAML"),
        ("- a", "must contain a YAML mapping"),
        ("count: {a: 1}", "must be one value, or a list of values"),
        ("nonsense: 1", "has an entry 'nonsense', which is not an option of trl-sae-audit try"),
        ("env: {PATH: x}", "must be one value"),
        ("env: x", "has an entry 'env'"),
        ("count: many", "'many' is not a whole number"),
        ("help: true", "has an entry 'help'"),
        ("config: other.yaml", "has an entry 'config'"),
    ],
)
def test_a_file_that_is_wrong(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(AuditError) as error:
        parse("--name", "a", "--config", str(file))
    assert message in str(error.value)
    assert "config" in str(error.value)


def test_text_keeps_its_letters_where_python_takes_the_terminal_for_ascii() -> None:
    typed = "Überzeugung".encode().decode("ascii", "surrogateescape")
    assert parse("--name", "a", "--note", typed)[0].note == "Überzeugung"


@pytest.mark.parametrize("width", range(20, 30))
def test_no_line_of_the_help_ends_between_a_number_and_what_belongs_to_it(
    width: int,
) -> None:
    text = "Of a share of 95 % of them all; default 2.5 of it, or none. (default: 0.05)"
    lines = _fill(text, width).splitlines()
    assert " ".join(lines) == text
    assert not [line for line in lines if line.endswith(("default", "default:", "95"))]


def test_help_has_groups_and_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: trl-sae-audit try --name NAME [options]\n")
    printed = printed[printed.index("most used:") :]
    order = [
        "most used:",
        "--name NAME",
        "first things:",
        "--count N",
        "second things:",
        "--no_careful",
        "general:",
    ]
    assert [printed.index(part) for part in order] == sorted(printed.index(part) for part in order)
    for part in (
        "Also --also.",
        "(default: 3)",
        "red|blue",
        "Be careless.",
        "(default: one two)",
        "--words WORDS …",
    ):
        assert part in printed
    with pytest.raises(SystemExit):
        parse("--help", groups=[Places])
    assert capsys.readouterr().out.startswith("usage: trl-sae-audit try PLACE … [options]\n")
