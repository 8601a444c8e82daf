"""Hooks on all modules are seen, whichever of PyTorch's functions registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.nn.modules import module

from clicktrain.compiler.lower import GLOBAL_HOOKS


@pytest.mark.parametrize(
    "register",
    [
        module.register_module_forward_pre_hook,
        module.register_module_forward_hook,
        module.register_module_full_backward_pre_hook,
        module.register_module_full_backward_hook,
    ],
)
def test_a_hook_on_all_modules_is_in_a_table(register: Callable[..., Any]) -> None:
    assert not any(GLOBAL_HOOKS)
    handle = register(lambda *arguments: None)
    try:
        assert any(GLOBAL_HOOKS)
    finally:
        handle.remove()
    assert not any(GLOBAL_HOOKS)
