"""Which files of a folder are the shards of which split."""

from __future__ import annotations

import re
from pathlib import Path

from clicktrain.errors import UserError

VAL_NAMES = ("validation", "val", "valid", "test")
_SPLITS = ("train", *VAL_NAMES)
_OF = re.compile(r"(?P<before>.*-)(?P<number>\d+)-of-(?P<count>\d+)[-.].*")


def find_shards(root: Path, suffix: str, what: str) -> dict[str, list[Path]]:
    """Find the shards of the splits of a folder: ``train``, and a validation split where there is one.

    A file belongs to the split that its name has as a word (``train-00.tar``, ``imagenet-val-00.tar``), in
    the folder or in its folder ``data``, or to that of the folder it is in (``DIR/train/00.tar``). Without
    such names all files are training shards. Of several validation splits the first of `VAL_NAMES` counts.

    Args:
        suffix: of the files, with the dot.
        what: the specification, for messages.

    Raises:
        UserError: no such folder, no training shards, or one of ``N-of-M`` is missing.
    """
    if not root.is_dir():
        raise UserError(f"data {what}: {root} is not a folder; give the one that holds the shards")
    splits: dict[str, list[Path]] = {}
    folders = [root, root / "data"]
    for folder in folders:
        splits = splits or _by_name(folder, suffix)
    for split in _SPLITS:
        inside = _files(root / split, suffix)
        if inside:
            splits.setdefault(split, []).extend(inside)
    for folder in folders:
        if not splits and (files := _files(folder, suffix)):
            splits = {"train": files}
    if "train" not in splits:
        names = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise UserError(f"data {what}: {root} has no training shards (train-*{suffix}); it holds {names}")
    val = next((name for name in VAL_NAMES if name in splits), None)
    found = {"train": splits["train"]} | ({} if val is None else {"val": splits[val]})
    for files in found.values():
        _check_complete(files)
    return found


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix) and not path.name.startswith(".") and path.is_file()
    )


def _by_name(folder: Path, suffix: str) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in _files(folder, suffix):
        words = [word.rstrip("0123456789") for word in re.split(r"[-_.]", path.name.lower())]  # train000.tar
        split = next((word for word in words if word in _SPLITS), None)
        if split is not None:
            splits.setdefault(split, []).append(path)
    return splits


def _check_complete(files: list[Path]) -> None:
    """Raise a UserError where names say that there are more shards than these."""
    present: dict[tuple[str, str], dict[int, Path]] = {}
    for path in files:
        if match := _OF.fullmatch(path.name):
            present.setdefault((match["before"], match["count"]), {})[int(match["number"])] = path
    for (before, count), numbers in present.items():
        missing = next((n for n in range(min(int(count), len(numbers) + 1)) if n not in numbers), None)
        if missing is not None:
            path = next(iter(numbers.values()))
            raise UserError(
                f"{path.parent / before}{missing:0{len(count)}}-of-{count} is missing: {path.name} is one of "
                f"{int(count)} shards"
            )
