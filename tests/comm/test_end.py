"""A process that was one of several ends with its exit code, whatever threads of gloo are left."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from clicktrain.comm.processes import end

class Late:
    "Where gloo lets go of what a hook has made, the interpreter is half taken apart."
    def __del__(self):
        print("taken apart")

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
wrapped = DistributedDataParallel(nn.Linear(2, 2))
wrapped.late = Late()
atexit.register(print, "at exit")
dist.destroy_process_group()
sys.stdout.write("said ")
end(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_ends_as_it_says(code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(code)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "said at exit\n", "")
