"""``clicktrain export RUN --format F``: the network of a finished run, in a file that other tools read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from clicktrain.commands.arguments import OWN_MODEL, RUN, Command, Option
from clicktrain.errors import UserError

COMMAND = Command(
    name="export",
    description="Write the network of a finished run for other tools. The file is loaded back and compared "
    "with the network before it gets its name.",
    examples=(
        "clicktrain export runs/first --format onnx",
        "clicktrain export runs/first --format torch -o first.pt2",
    ),
    positional=RUN,
    groups={
        "this command": (
            OWN_MODEL,
            Option(
                "format",
                Literal["safetensors", "onnx", "torch"],
                "safetensors: weights and a description; onnx: for ONNX Runtime, OpenVINO and others; "
                "torch: a torch.export program (.pt2).",
            ),
            Option(
                "output",
                str | None,
                "The file; export.safetensors, export.onnx or export.pt2 in the run's folder by default.",
                short="-o",
                metavar="FILE",
            ),
        )
    },
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    if given.get("format") is None:
        raise UserError("--format is missing: use --format safetensors, onnx or torch")
    from clicktrain.export import SUFFIXES, export_run
    from clicktrain.train import load_run

    loaded = load_run(given["run"], given.get("model"))
    folder = loaded.folder.path
    output = given.get("output")
    path = folder / f"export{SUFFIXES[given['format']]}" if output is None else Path(output)
    if path.resolve() in {own.resolve() for own in (loaded.folder.model, loaded.folder.packed)}:
        raise UserError(f"{path} belongs to the run itself: give another -o")
    done = export_run(loaded, given["format"], path)
    print(
        f"{done.path}: {done.num_bytes / 2**20:.2f} MB, "
        f"largest difference to the network {done.max_difference:.2g} (allowed {done.tolerance:.2g})"
    )
    return 0
