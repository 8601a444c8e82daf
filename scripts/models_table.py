"""Try methods on networks of timm and torchvision, and write the table of docs/results/models.md.

python scripts/models_table.py run [--seconds 900] [--models 'timm:res*'] [--methods rigl] [--again]
python scripts/models_table.py page

Each cell trains a network for a few steps on random images, prunes it, and looks at what came out. Results
are kept line by line in docs/results/models.jsonl: a run that is stopped goes on with the cells that are
missing (``--again`` tries those that did not work a second time). Needs ``pip install 'clicktrain[models]'``;
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clicktrain.errors import UserError
from clicktrain.methods import NM, ClickTrain, Method, PaT, Pruner, PruneTrain, RigL
from clicktrain.models import create_model

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
CELLS, PAGE = FOLDER / "models.jsonl", FOLDER / "models.md"
EPOCHS, STEPS, BATCH, CLASSES = 4, 2, 4, 8

MODELS: dict[str, int] = {
    "timm:resnet18": 64, "timm:resnet26": 64, "timm:resnet26d": 64, "timm:resnet26t": 64,
    "timm:seresnext26ts": 64, "timm:eca_resnext26ts": 64, "timm:skresnet18": 64, "timm:resnetv2_18": 64,
    "timm:nf_resnet26": 64, "timm:regnetx_002": 64, "timm:regnety_002": 64, "timm:repvgg_a0": 64,
    "timm:mobilenetv2_050": 64, "timm:mobilenetv3_small_050": 64, "timm:mobilenetv4_conv_small_050": 64,
    "timm:efficientnet_b0": 64, "timm:tinynet_e": 64, "timm:mnasnet_small": 64, "timm:ghostnet_050": 64,
    "timm:lcnet_035": 64, "timm:hardcorenas_a": 64, "timm:dla46_c": 64, "timm:selecsls42": 64,
    "timm:convnext_atto": 64, "timm:edgenext_xx_small": 64, "timm:mobilevit_xxs": 64,
    "timm:vit_tiny_patch16_224": 64,
    "torchvision:resnet18": 64, "torchvision:alexnet": 64, "torchvision:vgg11_bn": 64,
    "torchvision:squeezenet1_1": 64, "torchvision:densenet121": 64, "torchvision:googlenet": 64,
    "torchvision:mobilenet_v2": 64, "torchvision:mobilenet_v3_small": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:mnasnet0_5": 64, "torchvision:efficientnet_b0": 64, "torchvision:regnet_x_400mf": 64,
    "torchvision:swin_t": 64,
}  # fmt: skip
"""Name -> side of the images in pixels."""
METHODS: dict[str, Callable[[], Method[Any]]] = {
    "clicktrain": lambda: ClickTrain(compression=3),
    "rigl": lambda: RigL(sparsity=0.8, interval=2),
    "nm": NM,
    "pat": lambda: PaT(policy="epoch", prune_epoch=1, prune_steps=1, prune_ratio=0.3),
    "prunetrain": lambda: PruneTrain(coefficient=0.05, interval=1),
}
BY_CHOICE = (
    "first convolution",
    "depthwise",
    "linear: this method",
    "its kernels have one position",
    "excluded",
)
"""Beginnings of the reasons for which a method leaves a layer alone in any network."""


def tried(model: str, method: str) -> dict[str, Any]:
    """Train and prune one network; what came of it."""
    torch.manual_seed(0)
    began = time.perf_counter()
    cell: dict[str, Any] = {"model": model, "method": method}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            cell |= outcome(*trained(model, METHODS[method]()))
        except UserError as error:
            cell |= {"verdict": "no", "reasons": {str(error): 1}}
        except Exception as error:  # what the table is made to find
            cell |= {"verdict": "error", "reasons": {f"{type(error).__name__}: {error}"[:300]: 1}}
    cell["warnings"] = sorted({str(one.message).partition("\n")[0][:200] for one in said})
    return {**cell, "seconds": round(time.perf_counter() - began, 1)}


def trained(model: str, method: Method[Any]) -> tuple[Pruner, dict[str, int]]:
    """A network after a few steps, and the filters of its layers before."""
    side = MODELS[model]
    network = create_model(model, num_classes=CLASSES, image_size=side)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.005, momentum=0.9)
    filters = {name: m.weight.shape[0] for name, m in network.named_modules() if _has_filters(m)}
    pruner = method.attach(
        network, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS, packed=True, accelerate=False,
        example=torch.zeros(2, 3, side, side),
    )  # fmt: skip
    for _ in range(EPOCHS * STEPS):
        x, y = torch.randn(BATCH, 3, side, side), torch.randint(0, CLASSES, (BATCH,))
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        pruner.observe(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    pruner.check_zeros()
    with torch.no_grad():
        result = network.eval()(torch.randn(2, 3, side, side))
    if result.shape != (2, CLASSES) or not result.isfinite().all():
        raise AssertionError(
            f"the pruned network gives {tuple(result.shape)}, or numbers that are not finite"
        )
    return pruner, filters


def _has_filters(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.modules.conv._ConvNd, torch.nn.Linear))


def outcome(pruner: Pruner, filters: dict[str, int]) -> dict[str, Any]:
    """Which layers were pruned, and why others were not."""
    if pruner.method.reads_graph:
        return channels(pruner, filters)
    rows = pruner.plan().rows
    pruned = [row for row in rows if row.action != "none"]
    alone = Counter(_short(row.reason) for row in rows if row.action == "none")
    odd = {reason: n for reason, n in alone.items() if not reason.startswith(BY_CHOICE)}
    zeros = {name: float((~mask).float().mean()) for name, mask in pruner.masks.items()}
    return {
        "verdict": "yes" if not odd else "partly",
        "layers": [len(pruned), len(rows) - sum(alone.values()) + sum(odd.values())],
        "zeros": round(sum(zeros.values()) / max(len(zeros), 1), 2),
        "reasons": odd,
    }


def channels(pruner: Pruner, filters: dict[str, int]) -> dict[str, Any]:
    """What channels of which layers can go, and went."""
    from clicktrain.surgery import channel_groups

    network = pruner.model
    groups = [g for g in channel_groups(network, pruner.network.prunable.example) if g.size > 1]
    fixed: dict[str, str] = {}
    for group in groups:
        for member in group.members:
            if group.fixed is not None and member.dim == 0 and member.name.endswith(".weight"):
                fixed[member.name.removesuffix(".weight")] = group.fixed
    convs = {n for n, m in network.named_modules() if isinstance(m, torch.nn.modules.conv._ConvNd)}
    reasons = Counter(_short(reason) for name, reason in fixed.items() if name in convs)
    natural = ("it is an output of the network", "it is an input of the network")
    odd = {reason: n for reason, n in reasons.items() if not reason.startswith(natural)}
    now = {name: m.weight.shape[0] for name, m in network.named_modules() if _has_filters(m)}
    before, after = sum(filters.values()), sum(now.values())
    return {
        "verdict": "yes"
        if not odd
        else "partly"
        if after < before or sum(odd.values()) < len(convs)
        else "no",
        "layers": [len(convs) - sum(odd.values()), len(convs)],
        "zeros": round(1 - after / before, 2),
        "reasons": odd,
    }


def _short(reason: str) -> str:
    """A reason without the names of layers, so that alike ones are counted together."""
    return re.sub(r"\b[\w]+(\.[\w]+)+\b", "LAYER", reason)[:200]


def read() -> dict[tuple[str, str], dict[str, Any]]:
    """Cells by network and method; of a cell that was tried twice, the last."""
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    cells = [json.loads(line) for line in lines]
    return {(cell["model"], cell["method"]): cell for cell in cells}


def write(cells: Iterable[dict[str, Any]]) -> None:
    """All cells, in the order of the table."""
    models, methods = list(MODELS), list(METHODS)
    known = [cell for cell in cells if cell["model"] in MODELS and cell["method"] in METHODS]
    known.sort(key=lambda cell: (models.index(cell["model"]), methods.index(cell["method"])))
    CELLS.write_text("".join(json.dumps(cell) + "\n" for cell in known))


def run(seconds: float, models: str, methods: str, again: bool) -> int:
    """Fill cells until the time is over."""
    torch.set_num_threads(1)
    cells, end = read(), time.monotonic() + seconds
    for method in METHODS:
        for model in MODELS:
            if not fnmatchcase(model, models) or not fnmatchcase(method, methods):
                continue
            cell = cells.get((model, method))
            if cell is not None and not (again and cell["verdict"] != "yes"):
                continue
            if time.monotonic() > end:
                print("time is up: call it again for the rest")
                return 0
            cell = cells[model, method] = tried(model, method)
            print(f"{model:40} {method:12} {cell['verdict']:8} {cell['seconds']:6.1f} s  {cell['reasons']}")
            write(cells.values())
    return 0


def page() -> int:
    """Write the page from the cells."""
    cells = read()
    lines = ["| network | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    reasons: dict[str, list[str]] = {}
    for model in MODELS:
        row = []
        for method in METHODS:
            cell = cells.get((model, method))
            row.append("not tried" if cell is None else _cell(cell))
            for reason in {} if cell is None else cell["reasons"]:
                reasons.setdefault(reason, []).append(f"{model} ({method})")
        lines.append(f"| `{model}` | " + " | ".join(row) + " |")
    count = Counter(cell["verdict"] for cell in cells.values())
    listed = [
        f"| {reason.replace('|', '/')} | {_names(where)} |"
        for reason, where in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    PAGE.write_text(
        _HEAD.format(
            epochs=EPOCHS, steps=STEPS, batch=BATCH, cells=len(cells), models=len({m for m, _ in cells}),
            count=", ".join(f"{n} {verdict}" for verdict, n in count.most_common()),
            versions=", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm")),
        )
        + "\n".join(lines)
        + "\n\n## Why not all layers\n\n| reason | where |\n|---|---|\n"
        + "\n".join(listed)
        + "\n"
    )  # fmt: skip
    return 0


def _cell(cell: dict[str, Any]) -> str:
    if cell["verdict"] in ("no", "error"):
        return cell["verdict"]
    pruned, whole = cell["layers"]
    return f"{cell['verdict']} {pruned}/{whole}, {round(100 * cell['zeros'])}%"


def _names(where: list[str]) -> str:
    return ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")


_HEAD = """# Networks of timm and torchvision, and the methods

`python scripts/models_table.py run`, then `page`, with {versions}: {models} networks, {cells} cells: {count}.

Each cell is a short run on a CPU: random images, {epochs} epochs of {steps} batches of {batch}; accuracy is
not looked at. *yes*: every layer that the method prunes in any network was pruned; *partly*: some were left
alone, for the reasons below; *no*: the method refuses the network in one sentence; *error*: a fault. Of
`clicktrain`, `rigl` and `nm`, the numbers are layers pruned of those that could be (first convolutions,
depthwise ones and, for methods of convolutions, linear layers are never), and the mean share of zeros in
them. Of `pat` and `prunetrain`, they are convolutions whose channels can go, of all, and the share of
filters that went in this short run.

"""


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--models", default="*")
    parser.add_argument("--methods", default="*")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    if given.what == "page":
        return page()
    return run(given.seconds, given.models, given.methods, given.again)


if __name__ == "__main__":
    sys.exit(main())
