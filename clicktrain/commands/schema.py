"""``clicktrain schema``: a JSON schema of recipes, for editors."""

from __future__ import annotations

import json
from collections.abc import Sequence

from clicktrain.commands.arguments import Command, Option, output_file
from clicktrain.errors import UserError

COMMAND = Command(
    name="schema",
    description="Print a JSON schema (draft 07) of YAML recipes: settings with their meaning, type, range "
    "and default, those of the method that the recipe names among them.",
    groups={
        "this command": (
            Option("method", str | None, "Only recipes of this method; all by default.", metavar="NAME"),
            Option("output", str | None, "Write it to a file.", short="-o", metavar="FILE"),
        )
    },
    examples=("clicktrain schema -o clicktrain.schema.json", "clicktrain schema --method pat"),
    footer="Editors with a YAML language server check and complete a recipe whose first line is "
    "'# yaml-language-server: $schema=clicktrain.schema.json'.",
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    from clicktrain.commands.config_schema import config_schema
    from clicktrain.formats.atomic import write_text_atomic
    from clicktrain.methods import METHODS

    method, output = given.get("method"), given.get("output")
    if method is not None and method not in METHODS:
        raise UserError(f"method is {method!r}: use one of {', '.join(METHODS)}")
    text = json.dumps(config_schema(None if method is None else [method]), indent=2)
    if output is None:
        print(text)
        return 0
    write_text_atomic(output_file("--output", output), text + "\n")
    print(output)
    return 0
