"""Factories of a user's own: what they take, raise and return, and networks that cannot be trained."""

from __future__ import annotations

import random
from pathlib import Path

from cases import DATA, Case, Expected

GOOD = (
    "nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
    "nn.Linear(4, 2))"
)
BODIES: dict[str, tuple[str, Expected]] = {
    "plain": (f"def build(): return {GOOD}", "accepted"),
    "names": (f"def build(num_classes, in_channels=3, width=1.0): return {GOOD}", "accepted"),
    "keyword only": (f"def build(*, num_classes, in_channels, width): return {GOOD}", "accepted"),
    "kwargs passed on": (f"def inner(num_classes): return {GOOD}\ndef build(**k): return inner(**k)",
    "accepted"),
    "kwargs of torchvision's kind": (
        f"class N(nn.Module):\n    def __init__(self, num_classes=1000, zero=False):\n"
        "        super().__init__()\n"
        f"        self.n = {GOOD}\n    def forward(self, x): return self.n(x)\n"
        "def build(*, weights=None, progress=True, **kwargs): return N(**kwargs)", "accepted"),
    "class": (f"class build(nn.Sequential):\n    def __init__(self): super().__init__({GOOD})", "accepted"),
    "partial": (f"import functools\ndef b(x, num_classes): return {GOOD}\nbuild = functools.partial(b, 1)",
    "accepted"),
    "raises": ("def build(): raise KeyError('x')", "refused"),
    "raises long": ("def build(): raise ValueError('x' * 100000)", "refused"),
    "raises lines": ("def build(): raise ValueError('a\\nb\\nc')", "refused"),
    "exits": ("import sys\ndef build(): sys.exit(0)", "refused"),
    "exits at import": ("import sys\nsys.exit(3)", "refused"),
    "recursion": ("def build(): return build()", "refused"),
    "memory": ("def build(): return nn.Linear(10**9, 10**9)", "refused"),
    "none": ("def build(): pass", "refused"),
    "returns a class": ("def build(): return nn.Linear", "refused"),
    "returns a tensor": ("def build(): return torch.zeros(3)", "refused"),
    "returns a list": (f"def build(): return [{GOOD}]", "refused"),
    "needs more": ("def build(num_classes, backbone): pass", "refused"),
    "positional only": ("def build(num_classes, /): pass", "refused"),
    "wrong keyword inside": ("def build(**k): return nn.Linear(1, 2, width=3)", "refused"),
    "built": (f"build = {GOOD}", "refused"),
    "a number": ("build = 3", "refused"),
    "missing": ("x = 1", "refused"),
    "syntax": ("def build(:", "refused"),
    "import fails": ("import nothing_of_that_name", "refused"),
    "module getattr": ("def __getattr__(name): raise RuntimeError('no')", "refused"),
    "wrong outputs": ("def build(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))", "refused"),
    "tuple": ("class build(nn.Module):\n    def forward(self, x): return x, x", "refused"),
    "forward raises": ("class build(nn.Module):\n    def forward(self, x): raise KeyError('a')", "refused"),
    "forward asserts": ("class build(nn.Module):\n    def forward(self, x): assert False", "refused"),
    "no parameters": (
        "class build(nn.Module):\n    def forward(self, x): return x.mean((2, 3)).repeat(1, 2)", "refused"),
    "frozen": (f"def build(): return {GOOD}.requires_grad_(False)", "refused"),
    "lazy": ("def build(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))", "either"),
    "meta": (f"def build():\n    with torch.device('meta'): return {GOOD}", "refused"),
    "half": (f"def build(): return {GOOD}.half()", "either"),
    "double": (f"def build(): return {GOOD}.double()", "refused"),
    "nan": (f"def build():\n    m = {GOOD}\n    nn.init.constant_(m[0].weight, float('nan'))\n    return m",
    "either"),
    "three channels": ("def build(): return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())", "refused"),
    "eval refused": (f"class build(nn.Sequential):\n    def __init__(self): super().__init__({GOOD})\n"
                     "    def train(self, mode=True): raise RuntimeError('no')", "refused"),
}  # fmt: skip
NAMES = (":", "a:", ":b", "a:b:c", "fuzzed-x:build", "1:2", "a b:c", "os:system", "torch.nn:Linear",
         "builtins:exit",
         "sys:exit", "json:loads", "fuzzed_none:build", "\U0001f642:build", "a." * 500 + ":b", "..:b",
         "torch:load",
         "this:build", "os.path:join", "builtins:print", "typing:Any", "antigravity:x")  # fmt: skip


def cases(rng: random.Random, count: int) -> list[Case]:
    """Every factory and name first, then factories under other methods and flags."""
    made = [_factory(name, "dense", ()) for name in BODIES] + [_name(name) for name in NAMES[:-1]]
    more = (
        ("--width", "0.5"),
        ("--epochs", "1"),
        ("--channels-last",),
        ("--method", "rigl"),
        ("--precision", "bf16"),
    )
    while len(made) < count:
        made.append(_factory(rng.choice(sorted(BODIES)), rng.choice(("dense", "clicktrain", "prunetrain",
        "pat")),
                             rng.choice(more)))  # fmt: skip
    return made[:count]


def _line(name: str, method: str, flags: tuple[str, ...]) -> list[str]:
    settings = ["--data", DATA, "--batch-size", "8", "--threads", "1", "--epochs", "6", "--method", method]
    return ["train", "--model", name, *settings, "--out", "run", "--dry-run", *flags]


def _factory(name: str, method: str, flags: tuple[str, ...]) -> Case:
    body, expected = BODIES[name]

    def act(place: Path) -> list[str]:
        (place / "fuzzed_net.py").write_text(f"import torch\nfrom torch import nn\n{body}\n")
        return _line("fuzzed_net:build", method, flags)

    plain = method == "dense" and not flags
    return Case("factories", f"{name}, {method} {' '.join(flags)}", act, expected if plain else "either")


def _name(name: str) -> Case:
    return Case("factories", f"--model {name[:40]!r}", lambda place: _line(name, "dense", ()), "refused")
