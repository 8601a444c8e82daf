"""A Hugging Face data set by its name, downloaded and cached by the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clicktrain.data.cache import files_fingerprint
from clicktrain.data.listing import ListedSplit, Listing
from clicktrain.data.sources.arrow_images import ArrowImages, Columns, find_columns, open_table, read_labels
from clicktrain.data.spec import forms, near_miss
from clicktrain.errors import UserError

_VAL_NAMES = ("validation", "val", "valid", "test")


def list_hub(name: str, config: str | None, cache_dir: Path | None) -> Listing:
    """Load a data set of the Hub (``load_dataset(name, config)``) and find its images and labels by type.

    The validation split is ``validation``, ``val``, ``valid`` or ``test``, the first that exists. Downloads
    go to ``cache_dir``, or the library's own folder.

    Raises:
        UserError: unknown, offline, no ``train`` split, or no image or label column.
    """
    import datasets

    text = name if config is None else f"{name}:{config}"
    if hasattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE"):  # before version 4: scripts of a data set
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    try:
        loaded = datasets.load_dataset(
            name, config, cache_dir=None if cache_dir is None else str(cache_dir / "hub")
        )
    except Exception as error:  # the library lets network, file and format errors of many types through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"data {text!r} could not be loaded from the Hugging Face Hub ({reason}); check the name and the "
            f"network, or use {forms()}{near_miss(text)}"
        ) from error
    return _listing(loaded, text)


def _listing(splits: Mapping[str, Any], text: str) -> Listing:
    if "train" not in splits:
        raise UserError(f"data {text!r} has no train split; it has {', '.join(map(str, splits)) or 'none'}")
    val_name = next((split for split in _VAL_NAMES if split in splits), None)
    columns = find_columns(splits["train"].features.arrow_schema, f"data {text!r}")
    files = [_files(splits["train"])] + ([_files(splits[val_name])] if val_name else [])
    return Listing(
        classes=columns.classes,
        train=_list_split(files[0], columns, f"{text} train"),
        val=_list_split(files[1], columns, f"{text} {val_name}") if val_name else None,
        fingerprint=lambda: files_fingerprint([path for part in files for path in part]),
    )


def _files(split: Any) -> list[Path]:
    return [Path(entry["filename"]) for entry in split.cache_files]


def _list_split(files: list[Path], columns: Columns, where: str) -> ListedSplit:
    labels, rows = [torch.empty(0, dtype=torch.int64)], []
    for path in files:
        table = open_table(path, "arrow-stream", [columns.label])
        labels.append(read_labels(table, columns.label, f"{where} ({path.name})"))
        rows.append((f"{where} ({path.name})", len(table)))
    return ListedSplit(ArrowImages(files, "arrow-stream", columns.image, rows), torch.cat(labels))
