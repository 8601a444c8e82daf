"""An accelerated network that was pickled where vectors are wider or narrower than here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from pruned_networks import batch, network

from clicktrain import accelerate
from clicktrain.kernels.native import toolchain

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


@pytest.mark.slow
def test_a_pickle_runs_at_another_width(tmp_path: Path) -> None:
    model = network("resnet20").train()
    x, _ = batch(3)
    fast = accelerate(model, x, rule="sparse")
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), next(model.parameters()))
    torch.save({"fast": fast, "x": x, "y": expected.detach(), "gradient": gradient}, tmp_path / "it.pt")
    code = """
    import sys, warnings, torch
    from clicktrain.kernels.native import toolchain
    warnings.simplefilter("error")
    found = torch.load(sys.argv[1], weights_only=False)
    y = found["fast"](found["x"])
    torch.testing.assert_close(y, found["y"], rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(y.square().sum(), next(found["fast"].base.parameters()))
    torch.testing.assert_close(gradient, found["gradient"], rtol=1e-8, atol=1e-8)
    print(toolchain().lanes(torch.float32))
    """
    tools = toolchain()
    assert tools is not None
    other = 8 if tools.lanes(torch.float32) != 8 else 4
    environment = {**os.environ, "CLICKTRAIN_LANES": str(other), "CLICKTRAIN_PAIRS": "0"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "it.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{other}\n"
