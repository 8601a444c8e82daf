"""Declare, parse and explain the arguments of one command."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from docstring_parser import parse_from_object

from clicktrain.errors import UserError
from clicktrain.files import parse_yaml
from clicktrain.settings import choices_in, convert, type_hints

_SENTENCE_END = re.compile(r"(?<=\w\w\w\.|\w\w\)\.) (?=[A-Z])")
HELP_COLUMN, LONGEST_LINE = 26, 110
"""Where explanations begin, and the most columns that help uses."""


class HelpPrinted(Exception):  # noqa: N818 - not an error: help was asked for and shown
    """Help was printed: the command is done."""


@dataclass(frozen=True, slots=True)
class Option:
    """A flag ``--name`` (underscores become dashes) with a typed value; booleans also work without one."""

    name: str
    hint: Any
    help: str
    default: Any = None
    short: str | None = None
    metavar: str | None = None
    main: bool = True
    """Explained by ``--help``, not only by ``--help-all``."""
    named: bool = True
    """Where it is not explained, named at least; rarely used ones are only counted."""

    @property
    def flag(self) -> str:
        """The flag as it is typed."""
        return "--" + self.name.replace("_", "-")

    @property
    def usage(self) -> str:
        """The flag with its value: ``--learning-rate X``."""
        words = self.flag if self.hint is bool else f"{self.flag} {self.metavar or _metavar(self.hint)}"
        return words if self.short is None else f"{words.replace(self.flag, self.short)}, {words}"

    @property
    def note(self) -> str:
        """Type and default, in brackets."""
        parts = []
        if not _kinds(self.hint) & {bool, str, Literal, tuple, dict}:  # else the metavar says it
            numbers = _kinds(self.hint) - {types.NoneType}
            parts.append(f"type: {' or '.join(kind.__name__ for kind in numbers)}")
        if self.default is not None:  # else the help says what happens
            parts.append(f"default: {_shown(self.default)}")
        note = ", ".join(parts)
        if (choices := choices_in(self.hint)) is not None:
            note = f"{note}; or {choices.own}" if note else f"or {choices.own}"
        return f"({note})" if note else ""


OWN_MODEL = Option(
    "model",
    str | None,
    "For a run of a network of your own: package.module:factory, which is imported. That a file names it is "
    "not enough: loading a folder runs no code that you have not named.",
    metavar="NAME",
)
"""A flag of every command that builds the network of a run folder."""


@dataclass(frozen=True, slots=True)
class Positional:
    """Arguments without a flag: exactly one, at least one if ``many``, none too if ``optional``."""

    name: str
    help: str
    many: bool = False
    optional: bool = False


RUN = Positional("run", "Folder of the run.")
QUIET = Option("quiet", bool, "No progress, only the last line.", False, main=False)
REPORT = Option("report", bool, "Write report.html into the run's folder at the end.", True, main=False)
JSON = Option("json", bool, "Print one JSON object.", False)


@dataclass(frozen=True)
class Command:
    """What a command takes: flags (``groups``) and ``notes`` by heading, and arguments without a flag.

    ``explain`` is asked about a flag that the command does not have, for a sentence or None. ``examples`` are
    command lines that work as they stand, ``footer`` is said below them. ``more`` says by heading where the
    flags are explained that ``--help`` leaves out, if that is not ``--help-all``.
    """

    name: str
    description: str
    groups: Mapping[str, Sequence[Option]]
    positional: Positional | None = None
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    explain: Callable[[str], str | None] = lambda name: None
    examples: Sequence[str] = ()
    footer: str = ""
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Option]:
        """All flags by name."""
        return {option.name: option for group in self.groups.values() for option in group}

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Values of what was given, by name; HelpPrinted after ``--help`` or ``--help-all``."""
        if {"-h", "--help", "--help-all"} & set(argv):
            print(self.help(every="--help-all" in argv))
            raise HelpPrinted
        flags, words = self._split(argv)
        _check_repeated([option for option, _ in flags])
        values = {option.name: _typed(option, text) for option, text in flags}
        if self.positional is not None:
            values[self.positional.name] = self._check_words(words)
        elif words:
            raise UserError(f"'{words[0]}' is out of place: {self._usage()}")
        return values

    def _split(self, argv: Sequence[str]) -> tuple[list[tuple[Option, str]], list[str]]:
        """Flags with the text of their value, and the words that belong to none."""
        options = self.options
        shorts = {option.short: option for option in options.values() if option.short}
        flags: list[tuple[Option, str]] = []
        words: list[str] = []
        rest = list(argv)
        while rest:
            token = rest.pop(0)
            if not token.startswith("-") or token == "-" or _is_number(token):
                words.append(token)
                continue
            head, equals, attached = token.partition("=")
            name = head.removeprefix("--").replace("-", "_")
            option = shorts.get(head) if not head.startswith("--") else options.get(name)
            negated = options.get(name.removeprefix("no_")) if name.startswith("no_") else None
            if option is None and negated is not None and negated.hint is bool and not equals:
                flags.append((negated, "false"))
                continue
            if option is None:
                raise self._unknown(head, name, options)
            flags.append((option, attached if equals else _take(option, rest)))
        return flags, words

    def _unknown(self, head: str, name: str, options: Iterable[str]) -> UserError:
        if (sentence := self.explain(name)) is not None:
            return UserError(sentence)
        close = difflib.get_close_matches(name, list(options), n=1)
        hint = f"see 'clicktrain {self.name} --help' for those that there are"
        if close:
            hint = f"did you mean --{close[0].replace('_', '-')}?"
        return UserError(f"unknown flag {head}: {hint}")

    def _check_words(self, words: Sequence[str]) -> Any:
        assert self.positional is not None
        if not words and self.positional.optional:
            return None
        if not words:
            raise UserError(f"{self.positional.name.upper()} is missing: {self._usage()}")
        if self.positional.many:
            return list(words)
        if len(words) > 1:
            raise UserError(f"'{words[1]}' is out of place: {self._usage()}")
        return words[0]

    def _usage(self) -> str:
        word = ""
        if self.positional is not None:
            word = f"{self.positional.name.upper()}{'...' if self.positional.many else ''}"
            word = f" [{word}]" if self.positional.optional else f" {word}"
        return f"write 'clicktrain {self.name}{word} [--flag value ...]'"

    def help(self, every: bool) -> str:
        """What ``--help`` prints: main flags explained in a sentence, others named, rarely used ones counted.

        ``every``, or a command all of whose flags are main ones: everything at length.
        """
        every = every or all(option.main for options in self.groups.values() for option in options)
        width = min(shutil.get_terminal_size((100, 24)).columns, LONGEST_LINE)

        def folded(text: str, indent: str = "", first: str | None = None) -> list[str]:
            start = indent if first is None else first
            return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent,
                                 break_on_hyphens=False)  # fmt: skip

        usage = self._usage().removeprefix("write '").removesuffix("'")
        lines = [f"usage: {usage}", "", *folded(self.description)]
        if self.positional is not None:
            lines += ["", f"{self.positional.name.upper()}:", *folded(self.positional.help, "  ")]
        for title, options in self.groups.items():
            lines += ["", f"{title}:"]
            for note in self.notes.get(title, ()):
                lines += folded(note, "    ", "  ")
            for option in options:
                if every or option.main:
                    first = f"  {option.usage:<{HELP_COLUMN - 4}}  "
                    text = option.help if every else _SENTENCE_END.split(option.help)[0]
                    if len(first) > HELP_COLUMN:
                        lines.append(first.rstrip())
                        first = " " * HELP_COLUMN
                    lines += folded(f"{text} {option.note}".rstrip(), " " * HELP_COLUMN, first)
            if others := [option for option in options if not (every or option.main)]:
                lines += folded(_also(others, self.more.get(title, "--help-all")), "    ", "  ")
        if self.examples:
            lines += ["", "examples:", *(f"  {line}" for line in self.examples)]
        if self.footer:
            lines += ["", *folded(self.footer)]
        return "\n".join(lines)


def _also(options: Sequence[Option], where: str) -> str:
    """Flags that are not explained: by name, and the number of those that are not named either."""
    named = [re.sub(r"\{.*?\}", "NAME", option.usage) for option in options if option.named]
    if rest := len(options) - len(named):
        named.append(f"and {rest} more: {where}" if named else f"{rest} more: {where}")
    return "also " + ", ".join(named)


def options_of(cls: type) -> list[Option]:
    """A flag for every field of a dataclass, with the field's type, default and docstring."""
    hints, texts = type_hints(cls), _texts(cls)
    options: list[Option] = []
    for item in fields(cls):
        if not item.init:
            continue
        make = item.default_factory
        default = make() if make is not MISSING else None if item.default is MISSING else item.default
        hint = hints[item.name]
        options.append(Option(item.name, hint, texts.get(item.name, ""), default, metavar=_metavar(hint)))
    return options


@lru_cache(maxsize=64)
def _texts(cls: type) -> Mapping[str, str]:
    """Docstrings of a dataclass's fields, with inherited ones; slow to parse."""
    return {
        item.arg_name: " ".join((item.description or "").split())
        for base in filter(is_dataclass, reversed(cls.__mro__))
        for item in parse_from_object(base).params
    }


def _metavar(hint: Any) -> str:
    """How values are shown in help: the choices where there are some, else what kind of value it is."""
    if (choices := choices_in(hint)) is not None:
        return f"{{{','.join(choices)}}}"
    kinds = _kinds(hint)
    if tuple in kinds:
        if listed := _listed_words(hint):
            return f"{{{','.join(listed)}}} [...]"
        return "NAME [NAME ...]" if _holds_text(hint) else "X [X ...]"
    if dict in kinds:
        return "NAME=X [NAME=X ...]"
    if words := [str(word) for part in (hint, *get_args(hint)) if get_origin(part) is Literal
                 for word in get_args(part)]:  # fmt: skip
        numbers = ["N"] if int in kinds else ["X"] if float in kinds else []
        return f"{{{','.join(numbers + words)}}}"
    return next((text for kind, text in ((float, "X"), (int, "N")) if kind in kinds), "TEXT")


def _listed_words(hint: Any) -> tuple[str, ...]:
    """The words of which a tuple holds some, if it is one of words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and get_origin(args[0]) is Literal:
        return get_args(args[0])
    return ()


def words_of(option: Option) -> tuple[str, ...]:
    """The words that a flag takes as its value, where there are such: for completion and schemas."""
    if (choices := choices_in(option.hint)) is not None:
        return tuple(choices)
    literals = [part for part in (option.hint, *get_args(option.hint)) if get_origin(part) is Literal]
    found = tuple(str(word) for part in literals for word in get_args(part)) or _listed_words(option.hint)
    return (*found, "true", "false") if bool in _kinds(option.hint) else found


def _check_repeated(given: Sequence[Option]) -> None:
    """UserError where a flag that takes several words is given twice: the first ones would be lost."""
    for number, option in enumerate(given):
        if _listed_words(option.hint) and option in given[:number]:
            raise UserError(f"{option.flag} is given twice: give all its values after one, {option.usage}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list | dict):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _kinds(hint: Any) -> set[Any]:
    """The bare types that a value of a flag may have; a choice of a registry is text."""
    if get_origin(hint) is Annotated:
        return {str} if choices_in(hint) is not None else _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for arg in get_args(hint) for kind in _kinds(arg)}
    return {get_origin(hint) or hint}


def _take(option: Option, rest: list[str]) -> str:
    """Take the words of a flag's value from the front of ``rest``, as one text that YAML understands."""
    kinds = _kinds(option.hint)
    if bool in kinds and (not rest or rest[0].lower() not in ("true", "false")):
        return "true"
    words: list[str] = []
    many = tuple in kinds or dict in kinds
    while rest and (not rest[0].startswith("-") or _is_number(rest[0])) and (many or not words):
        words.append(rest.pop(0))
    if not words:
        raise UserError(f"{option.flag} needs a value")
    if not many or (len(words) == 1 and words[0][:1] in ("[", "{")):
        return words[0]
    if tuple in kinds:
        return json.dumps([_item(word, option.hint) for word in words])
    pairs = [word.partition("=") for word in words]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"{option.flag} is {' '.join(words)!r}: write it as NAME=VALUE, once or more")
    return json.dumps({name: _item(value, option.hint) for name, _, value in pairs})


def _typed(option: Option, text: str) -> Any:
    """A flag's value in its own type: what the same text would be as the value of a YAML setting.

    Where only text is asked for it is taken as it is typed, without YAML's quotes; ``null`` is nothing.
    """
    kinds = _kinds(option.hint)
    if kinds <= {str, types.NoneType}:
        return None if text == "null" and types.NoneType in kinds else text
    value = _scalar(text)
    if tuple in kinds and not isinstance(value, list) and value is not None:
        value = [_item(text, option.hint)]
    return convert(option.name, value, option.hint)


def _item(text: str, hint: Any) -> Any:
    """A member of a tuple or mapping: text where its type is text, else what YAML makes of it."""
    return text if _holds_text(hint) else _scalar(text)


def _holds_text(hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_holds_text(arg) for arg in args)
    if origin is tuple:
        return args[0] is str or bool(_listed_words(hint))
    return origin is dict and args[1] is str


def _scalar(text: str) -> Any:
    try:
        return parse_yaml(text)
    except UserError:
        return text


def output_file(flag: str, name: str) -> Path:
    """The file that a flag names, checked before minutes of work: no folder, and in a folder that is there.

    Raises:
        UserError: nothing can be written there.
    """
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{flag} {name} is a folder: give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {name}: there is no folder {path.parent}")
    return path


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
