"""A chart with its title, its key and a caption that says what one sees."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a chart's key: a line, or an area."""

    label: str
    css: str
    dashed: bool = False
    area: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """What a template shows as ``<figure>``."""

    title: str
    drawn: Markup
    caption: str
    keys: tuple[Key, ...] = ()
    keys_below: bool = False
