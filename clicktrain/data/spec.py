"""The text that names a data set: ``digits``, ``parquet:DIR``, a Hugging Face name, and so on."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from clicktrain.errors import UserError, shown

FORMS = (
    "digits",
    "parquet:DIR",
    "parquet-shards:DIR",
    "webdataset:DIR",
    "imagefolder:DIR",
    "cifar10:DIR",
    "cifar100:DIR",
    "synthetic:classes=10,size=32,train=512,val=128",
    "the name of a Hugging Face data set (NAME, OWNER/NAME or either with :CONFIG)",
)
_FOLDER_KINDS = ("parquet", "parquet-shards", "webdataset", "imagefolder", "cifar10", "cifar100")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?")


def forms() -> str:
    """Return the forms that a specification may take, as one phrase for a message."""
    return ", ".join(FORMS[:-1]) + " or " + FORMS[-1]


LONGEST = 1024
"""Characters of a specification, which may hold the path of a folder."""


@dataclass(frozen=True)
class DataSpec:
    """What a specification says, before anything is opened."""

    kind: str
    """``hub``, or what the forms begin with: ``digits``, ``parquet``, ``webdataset``, ..."""
    argument: str = ""
    """The folder, the settings of ``synthetic``, or the data set's name on the Hub."""
    config: str | None = None
    """Configuration of a Hub data set that has several."""

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """Read a specification.

        Raises:
            UserError: it has none of the forms in `FORMS`.
        """
        text = text.strip()
        if len(text) > LONGEST:
            raise UserError(
                f"data {shown(text)} has {len(text):,} characters: no form needs more than {LONGEST}"
            )
        kind, colon, argument = text.partition(":")
        if kind == "digits":
            if colon:
                raise UserError(f"data {text!r}: digits is embedded and takes nothing after it; write digits")
            return cls("digits")
        if kind == "synthetic":
            return cls("synthetic", argument)
        if kind in _FOLDER_KINDS and (colon or kind not in ("cifar10", "cifar100")):
            if not argument:
                raise UserError(f"data {text!r} names no folder; write {kind}:DIR")
            return cls(kind, argument)
        hub = _HUB_NAME.fullmatch(text)
        # a folder NAME is surely meant as one; OWNER/NAME may be either, and `datasets` looks at the disk too
        if hub is None or ("/" not in text and Path(text).is_dir()):
            raise UserError(f"data {text!r} is none of the known forms: {forms()}{_hint(text)}")
        return cls("hub", hub["name"], hub["config"])


def _hint(text: str) -> str:
    folder = Path(text).expanduser()
    if folder.is_dir():
        return f"; for the folder {text} write imagefolder:{text} or parquet:{text}"
    kind, colon, argument = text.partition(":")
    near = difflib.get_close_matches(kind, ("digits", "synthetic", *_FOLDER_KINDS), n=1)
    return f"; did you mean {near[0]}{colon}{argument}?" if near else ""


def near_miss(name: str) -> str:
    """Return a question that proposes the embedded form nearest to ``name``, or nothing."""
    return _hint(name) if "/" not in name else ""
