from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from clicktrain.commands.arguments import Command, HelpPrinted, Option, Positional, options_of
from clicktrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a test."""

    batch_size: int = 3
    """Images in
    a batch."""
    rate: float = 0.1
    """Step length."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run."""
    layers: dict[str, float] = field(default_factory=dict)
    """By layer."""
    compile: bool = False
    """Compile it."""
    image_size: int | None = None
    """Side."""
    stem: Literal["auto", "cifar"] = "auto"
    """First layers."""
    data: str = "digits"
    """Images."""
    exclude: tuple[str, ...] = ()
    """Layers to leave."""


OUTPUT = Option("output", str | None, "Where to.", short="-o", metavar="FILE")
COMMAND = Command("demo", "Show it.", {"settings": options_of(Settings), "output": [OUTPUT]})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--batch-size 4", {"batch_size": 4}),
        ("--batch-size=4 --batch-size 5", {"batch_size": 5}),
        ("--batch_size 4", {"batch_size": 4}),
        ("--rate 5e-4", {"rate": 5e-4}),
        ("--rate -1", {"rate": -1.0}),
        ("--milestones .1 .2", {"milestones": (0.1, 0.2)}),
        ("--milestones [.1,.2]", {"milestones": (0.1, 0.2)}),
        ("--milestones 0.3 --compile", {"milestones": (0.3,), "compile": True}),
        ("--layers layer1.*=2 fc=4", {"layers": {"layer1.*": 2.0, "fc": 4.0}}),
        ("--compile", {"compile": True}),
        ("--no-compile", {"compile": False}),
        ("--compile false --image-size 32", {"compile": False, "image_size": 32}),
        ("--image-size null", {"image_size": None}),
        ("--stem cifar", {"stem": "cifar"}),
        ("--data 123", {"data": "123"}),
        ("--data parquet:/a=b", {"data": "parquet:/a=b"}),
        ("--exclude conv1 layer1.*", {"exclude": ("conv1", "layer1.*")}),
        ("--exclude 1", {"exclude": ("1",)}),
        ("-o x.html", {"output": "x.html"}),
        ("--output=x.html", {"output": "x.html"}),
    ],
)
def test_parse_gives_what_was_given_in_its_type(line: str, expected: dict[str, object]) -> None:
    found = COMMAND.parse(line.split())
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--batchsize 4", "unknown flag --batchsize: did you mean --batch-size?"),
        ("--zzz", "unknown flag --zzz: see 'clicktrain demo --help' for those that there are"),
        ("-x", "unknown flag -x: see 'clicktrain demo --help' for those that there are"),
        ("--no-rate", "unknown flag --no-rate: did you mean --rate?"),
        ("--batch-size", "--batch-size needs a value"),
        ("--batch-size --compile", "--batch-size needs a value"),
        ("--batch-size four", "batch_size is 'four': a value of type int is needed"),
        ("--batch-size 2.5", "batch_size is 2.5: a value of type int is needed"),
        ("--rate much", "rate is 'much': a number is needed"),
        ("--stem vgg", "stem is 'vgg': use one of auto, cifar"),
        ("--compile=maybe", "compile is 'maybe': a value of type bool is needed"),
        ("--milestones a b", "milestones is 'a': a number is needed"),
        ("--layers fc", "--layers is 'fc': write it as NAME=VALUE, once or more"),
        ("--layers fc=x", "layers is 'x': a number is needed"),
        ("somewhere", "'somewhere' is out of place: write 'clicktrain demo [--flag value ...]'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(line: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        COMMAND.parse(line.split())
    assert str(caught.value).startswith(sentence)


def test_positionals() -> None:
    one = Command("one", "", {"flags": [OUTPUT]}, Positional("run", "Folder."))
    many = Command("many", "", {"flags": [OUTPUT]}, Positional("runs", "Folders.", many=True))
    assert one.parse(["a", "-o", "b"]) == {"run": "a", "output": "b"}
    assert many.parse(["a", "-o", "b", "c"]) == {"runs": ["a", "c"], "output": "b"}
    with pytest.raises(UserError, match="RUN is missing: write 'clicktrain one RUN"):
        one.parse([])
    with pytest.raises(UserError, match="'b' is out of place"):
        one.parse(["a", "b"])
    with pytest.raises(UserError, match="RUNS is missing: write 'clicktrain many RUNS"):
        many.parse(["-o", "x"])


def test_help_shows_fields_with_docstring_type_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HelpPrinted):
        COMMAND.parse(["--batch-size", "x", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "settings: --batch-size N Images in a batch. (type: int, default: 3)" in text
    assert "--stem {auto,cifar} First layers." in text
    assert "output: -o FILE, --output FILE Where to." in text


def test_explain_has_the_first_word_about_an_unknown_flag() -> None:
    command = Command("x", "", {}, explain=lambda name: "is elsewhere" if name == "far_off" else None)
    with pytest.raises(UserError, match=r"^is elsewhere$"):
        command.parse(["--far-off", "3"])
    with pytest.raises(UserError, match=r"^unknown flag --near"):
        command.parse(["--near", "3"])
