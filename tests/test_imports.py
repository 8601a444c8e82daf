"""`import clicktrain` is light, and needs nothing that is optional."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_layers import LAYERS, PACKAGE, modules_of

# Packages of the extras, and what a machine may lack.
OPTIONAL = ("triton", "torchvision", "onnx", "onnxscript", "onnxruntime", "tensorboard", "timm", "lightning")
# Packages that are installed, and that no one should wait for who only wants the library.
HEAVY = ("datasets", "pyarrow", "pandas", "sklearn", "scipy", "jinja2", "PIL")
# Each of these imports the package that it is for.
NEED_THEIR_PACKAGE = tuple(
    f"integrations.{name}"
    for name in ("accelerate", "lightning", "lightning_package", "transformers", "ultralytics")
)
SECONDS = 2.0  # on top of torch's own; 0.2 measured on an idle core


def run_python(code: str, repository: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:clicktrain", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocked(names: tuple[str, ...]) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


def test_import_without_optional_packages_or_compiler(repository: Path) -> None:
    code = "import clicktrain\nfor name in clicktrain.__all__:\n    getattr(clicktrain, name)"
    run_python(blocked(OPTIONAL) + code, repository, PATH="")


def test_import_starts_no_device_and_no_threads(repository: Path) -> None:
    code = """
import threading, torch
def settings():
    return torch.get_num_threads(), torch.get_default_dtype(), threading.active_count()
before = settings()
state = torch.get_rng_state()
import clicktrain
assert not torch.cuda.is_initialized()
assert torch.equal(state, torch.get_rng_state()), "import drew random numbers"
assert before == settings(), (before, settings())
"""
    run_python(code, repository)


def test_import_is_light(repository: Path) -> None:
    code = f"""
import sys, time, torch
already = set(sys.modules)
start = time.process_time()
import clicktrain
for name in clicktrain.__all__:
    getattr(clicktrain, name)
seconds = time.process_time() - start
heavy = sorted({{name.split(".")[0] for name in set(sys.modules) - already}} & set({HEAVY!r}))
assert not heavy, f"import clicktrain and its names load {{heavy}}: import them where used"
assert seconds < {SECONDS}, f"import clicktrain and its names take {{seconds:.1f}} s on top of torch"
"""
    run_python(code, repository)


def bound_names(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module gives a value."""
    match node:
        case ast.Import(names=names):
            return [(alias.asname or alias.name).split(".")[0] for alias in names]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def shadowed_modules(package: Path) -> list[str]:
    """Submodules that cannot be reached as attributes: their package's ``__init__`` gives the name to
    something else. The submodule itself may be imported there (``from package import module``)."""
    shadowed = []
    for init in sorted(package.rglob("__init__.py")):
        folder = init.parent
        name = ".".join(folder.relative_to(package.parent).parts)
        inside = {path.stem for path in folder.glob("*.py")} | {
            p.parent.name for p in folder.glob("*/__init__.py")
        }
        for node in ast.parse(init.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.ImportFrom) and node.module == name):
                shadowed += [f"{name}.{bound}" for bound in bound_names(node) if bound in inside]
    return shadowed


def test_no_package_hides_a_module_of_its_own() -> None:
    """``import clicktrain.train.fit as f`` gives the module, not a function of that name."""
    assert shadowed_modules(PACKAGE) == []


@pytest.mark.parametrize(
    ("line", "hidden"),
    [
        ("from clicktrain.train.fit import fit", True),
        ("from clicktrain.train.fit import run as fit", True),
        ("def fit(): ...", True),
        ("fit = 1", True),
        ("from clicktrain.train import fit", False),
        ("from clicktrain.train.fit import run", False),
    ],
)
def test_a_hidden_module_is_found(tmp_path: Path, line: str, hidden: bool) -> None:
    package = tmp_path / "clicktrain"
    (package / "train").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train" / "fit.py").touch()
    (package / "train" / "__init__.py").write_text(f"{line}\n")
    assert shadowed_modules(package) == (["clicktrain.train.fit"] if hidden else [])


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_module_imports_alone_and_without_optional_packages(repository: Path) -> None:
    """Each in a process that has imported nothing of its layer yet; forked, so that others load once.

    Lower layers are loaded: they import what is lower still (test_layers), so they can be in no circle.
    """
    modules = [name for name in modules_of(PACKAGE) if not name.endswith(("__main__", *NEED_THEIR_PACKAGE))]
    layers = [[name for name in modules if (name.split(".")[1:] or ["__init__"])[0] in row] for row in LAYERS]
    assert sorted(name for layer in layers for name in layer) == sorted(modules)
    code = (
        blocked(OPTIONAL)
        + f"layers = {layers!r}"
        + """
import importlib, os, sys, warnings
import docstring_parser, jinja2, numpy, PIL.Image, rich.live, safetensors.torch, torch, yaml
import torch.export, torch.optim.swa_utils
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads about: the child only imports
failed = []
for layer in layers:
    for name in layer:
        if (child := os.fork()) == 0:
            try:
                importlib.import_module(name)
            except BaseException as error:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        failed += [name] * bool(os.waitpid(child, 0)[1])
    if failed:
        sys.exit(f"{len(failed)} modules cannot be imported alone")
    for name in layer:
        importlib.import_module(name)
"""
    )
    run_python(code, repository)
