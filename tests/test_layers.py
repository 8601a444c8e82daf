"""Imports point down the layers, wherever in a file they stand, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "clicktrain"

# Low to high. A module imports from its own package and from lower rows; names in one row are siblings that
# do not know each other. A new package has to be given its row here.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("files", "leftovers", "limits", "own_code", "settings", "wording"),
    ("models", "data", "sparsity", "comm"),
    ("formats", "graph"),
    ("kernels", "surgery", "accounting", "runs", "cluster"),
    ("latency", "inference"),
    ("compiler",),
    ("methods",),
    ("train", "deploy", "report", "papers", "integrations"),
    ("bench",),
    ("__init__",),
    ("cli", "commands", "__main__"),
)
ABOVE_METHODS = (
    "train", "deploy", "report", "papers", "integrations", "bench", "cli", "commands", "__main__", "__init__",
)  # fmt: skip
# Rows say who is lower; these say who has no business with whom all the same.
ONLY_FROM = {"models": ABOVE_METHODS, "data": ABOVE_METHODS}
# The command line is one thing in several files.
ONE_ROW = {"cli", "commands", "__main__"}
# Internals of one implementation: everybody else asks `kernels.impls` and `kernels.layouts`.
INTERNALS = {"clicktrain.kernels.sparse_conv2d.blocked": "clicktrain.kernels"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def deferred_nodes(tree: ast.AST) -> set[ast.AST]:
    """Everything inside functions and ``if TYPE_CHECKING``: it does not run when the module is imported."""
    bodies: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            bodies.append(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            bodies.extend(node.body)
    return {inside for body in bodies for inside in ast.walk(body)}


def imported_names(path: Path, module: str, *, at_import_only: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of what a file imports: anywhere in it, or only while it loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    skipped = deferred_nodes(tree) if at_import_only else set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + (path.name == "__init__.py")]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def edges_of(package: Path, *, at_import_only: bool = False) -> dict[str, dict[str, int]]:
    """Module -> {imported module of the same package: line}."""
    modules = modules_of(package)
    edges: dict[str, dict[str, int]] = {name: {} for name in modules}
    for module, path in modules.items():
        for line, name in imported_names(path, module, at_import_only=at_import_only):
            # ``from clicktrain.a import b``: b is a module, or a name inside clicktrain.a.
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                edges[module].setdefault(target, line)
    return edges


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def wrong_imports(edges: Mapping[str, Mapping[str, int]]) -> list[str]:
    row = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = []
    for module, targets in edges.items():
        layer = layer_of(module)
        for target, line in targets.items():
            below = layer_of(target)
            if below not in row or layer not in row or layer == below or {layer, below} <= ONE_ROW:
                continue
            if row[below] >= row[layer] or layer not in ONLY_FROM.get(below, (layer,)):
                wrong.append(f"{module}:{line} imports {target}")
    return wrong


def imported_internals(edges: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Imports of a backend's internals from outside the package that they belong to."""
    return [
        f"{module}:{line} imports {target}"
        for module, targets in edges.items()
        for target, line in targets.items()
        for internal, home in INTERNALS.items()
        if f"{target}.".startswith(f"{internal}.") and not f"{module}.".startswith(f"{home}.")
    ]


def find_cycle(edges: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One circle of imports, first module repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in edges[module]:
            if cycle := visit(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in edges if (cycle := visit(module, []))), [])


def test_every_package_has_a_layer() -> None:
    known = {name for names in LAYERS for name in names}
    unknown = {layer_of(module) for module in modules_of(PACKAGE)} - known
    assert not unknown, f"give {sorted(unknown)} a row in LAYERS"


def test_imports_point_down() -> None:
    assert wrong_imports(edges_of(PACKAGE)) == []


def test_nobody_outside_kernels_knows_a_backend() -> None:
    assert imported_internals(edges_of(PACKAGE)) == []


def test_no_import_cycles() -> None:
    assert find_cycle(edges_of(PACKAGE, at_import_only=True)) == []


def test_no_import_cycles_by_imports_for_types_or_inside_functions() -> None:
    assert find_cycle(edges_of(PACKAGE)) == []


def test_names_say_what_is_inside() -> None:
    vague = [p for p in PACKAGE.rglob("*") if p.stem.strip("_") in VAGUE_NAMES]
    assert vague == []


# ---------------------------------------------------------------- the checks themselves can fail


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "clicktrain"
    for name in ("sparsity", "formats", "data", "train"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    (root / "__init__.py").write_text("from clicktrain.formats import tree\n")
    (root / "formats" / "tree.py").write_text("from ..sparsity import masks\nimport torch\n")
    (root / "sparsity" / "masks.py").write_text("import math\n")
    return root


def test_a_good_tree_passes(package: Path) -> None:
    edges = edges_of(package)
    assert edges["clicktrain"] == {"clicktrain.formats.tree": 1}
    assert edges["clicktrain.formats.tree"] == {"clicktrain.sparsity.masks": 1}
    assert wrong_imports(edges) == []
    assert find_cycle(edges) == []


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("from clicktrain.formats import tree", "clicktrain.formats.tree"),
        ("from clicktrain.formats.tree import save_tree", "clicktrain.formats.tree"),
        ("def f():\n    import clicktrain.train", "clicktrain.train"),
        ("import clicktrain", "clicktrain"),
        ("from .. import train", "clicktrain.train"),
        ("from ..data import cifar", "clicktrain.data"),
        ("import importlib\nimportlib.import_module('clicktrain.formats')", "clicktrain.formats"),
    ],
)
def test_an_upward_or_sideways_import_is_found(package: Path, line: str, target: str) -> None:
    (package / "sparsity" / "masks.py").write_text(f"{line}\n")
    wrong = wrong_imports(edges_of(package))
    assert len(wrong) == 1
    assert wrong[0].endswith(f"imports {target}")


def test_an_import_of_a_backend_is_found(package: Path) -> None:
    blocked = package / "kernels" / "sparse_conv2d" / "blocked"
    blocked.mkdir(parents=True)
    for folder in (blocked, blocked.parent, blocked.parent.parent):
        (folder / "__init__.py").touch()
    (blocked / "launch.py").write_text("from clicktrain.kernels.sparse_conv2d import blocked\n")
    (package / "train" / "__init__.py").write_text(
        "def f():\n    from clicktrain.kernels.sparse_conv2d.blocked import launch\n"
    )
    wrong = imported_internals(edges_of(package))
    assert wrong == ["clicktrain.train:2 imports clicktrain.kernels.sparse_conv2d.blocked.launch"]


def test_a_method_has_no_business_with_data_sets(package: Path) -> None:
    (package / "methods").mkdir()
    (package / "methods" / "__init__.py").write_text("from clicktrain.data import open_data\n")
    assert wrong_imports(edges_of(package)) == ["clicktrain.methods:1 imports clicktrain.data"]


def test_a_cycle_is_found(package: Path) -> None:
    (package / "sparsity" / "masks.py").write_text("class A:\n    from clicktrain.sparsity import pool\n")
    (package / "sparsity" / "pool.py").write_text("try:\n    from .masks import A\nfinally:\n    pass\n")
    cycle = find_cycle(edges_of(package, at_import_only=True))
    assert set(cycle) == {"clicktrain.sparsity.masks", "clicktrain.sparsity.pool"}


@pytest.mark.parametrize("guard", ["def f():", "if TYPE_CHECKING:"])
def test_an_import_that_waits_closes_no_cycle(package: Path, guard: str) -> None:
    (package / "sparsity" / "masks.py").write_text(f"{guard}\n    from clicktrain.sparsity import pool\n")
    (package / "sparsity" / "pool.py").write_text("from .masks import f\n")
    assert find_cycle(edges_of(package, at_import_only=True)) == []
    assert find_cycle(edges_of(package)) != []
