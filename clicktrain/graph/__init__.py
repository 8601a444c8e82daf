"""Models as graphs: one tracer, and comparison before a rewritten network is believed."""

from __future__ import annotations

from clicktrain.graph.copying import users_hooks, working_copy
from clicktrain.graph.in_place import changes_in_place, later_uses_see_changes, write_elsewhere
from clicktrain.graph.inputs import Inputs, as_inputs, layer_input_shapes
from clicktrain.graph.random_state import own_random_numbers
from clicktrain.graph.trace import ModelGraph, TraceError, trace_symbolically
from clicktrain.graph.watch import Read, is_plain

__all__ = [
    "Inputs",
    "ModelGraph",
    "Read",
    "TraceError",
    "as_inputs",
    "changes_in_place",
    "is_plain",
    "later_uses_see_changes",
    "layer_input_shapes",
    "own_random_numbers",
    "trace_symbolically",
    "users_hooks",
    "working_copy",
    "write_elsewhere",
]
