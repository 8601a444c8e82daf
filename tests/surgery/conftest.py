"""ResNet-50 v1 and v1.5 differ in where a stride is: one of them is enough for every run of the suite."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "surgery" and "resnet50_v1" in item.name:
            item.add_marker(pytest.mark.slow)
