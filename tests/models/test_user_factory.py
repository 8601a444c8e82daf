import sys

import pytest
import torch
from torch import nn

from clicktrain.errors import UserError
from clicktrain.models import create_model

SOURCE = """
import torch
from torch import nn
from sidecar import HIDDEN

def everything(num_classes, in_channels, width):
    return nn.Conv2d(in_channels, int(num_classes * width), 1)

def classes_only(num_classes=2, depth=3):
    return nn.Linear(HIDDEN, num_classes)

def nothing():
    import lazy
    return nn.Linear(lazy.INPUTS, 3)

def keywords(**options):
    module = nn.Identity()
    module.options = options
    return module

class Net(nn.Module):
    def __init__(self, *, num_classes):
        super().__init__()
        self.fc = nn.Linear(4, num_classes)

def demanding(num_classes, backbone, *, pretrained): ...
def positional(num_classes, /): ...
def none(num_classes): ...
def failing(num_classes): raise LookupError("my own mistake")
def leaving(num_classes): raise SystemExit(3)
def keyword_only(*, num_classes, in_channels, width):
    return nn.Conv2d(in_channels, int(num_classes * width), 1)
def passes_on(*, weights=None, **options):
    return Net(**options)
def mistaken(**options): return Net(num_clases=2)
def a_class(num_classes): return nn.Linear
built = nn.Linear(2, 2)
number = 5
"""


@pytest.fixture(autouse=True)
def _user_directory(tmp_path, monkeypatch):
    """A user's folder as the current directory; nothing that is imported from it outlives the test."""
    (tmp_path / "mynets").mkdir()
    (tmp_path / "mynets" / "__init__.py").touch()
    (tmp_path / "mynets" / "small.py").write_text(SOURCE)
    (tmp_path / "mynets" / "needy.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "mynets" / "broken.py").write_text("x = 1\ny = undefined_name\n")
    (tmp_path / "mynets" / "typo.py").write_text("def f(:\n")
    (tmp_path / "sidecar.py").write_text("HIDDEN = 6\n")
    (tmp_path / "lazy.py").write_text("INPUTS = 9\n")
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mynets", "sidecar", "lazy"):
            del sys.modules[name]


def create(factory, **options):
    return create_model(f"mynets.small:{factory}", **{"num_classes": 10, **options})


def error(name, **options):
    with pytest.raises(UserError) as caught:
        create_model(name, **{"num_classes": 10, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_factory_gets_what_its_signature_names():
    model = create("everything", in_channels=2, width=0.5)
    assert isinstance(model, nn.Conv2d)
    assert model.weight.shape == (5, 2, 1, 1)
    assert create("classes_only").weight.shape == (10, 6)
    assert create("Net").fc.weight.shape == (10, 4)
    assert create("nothing").weight.shape == (3, 9)  # with an import inside the factory


def test_a_factory_with_kwargs_gets_all():
    assert create("keywords", in_channels=1).options == {"num_classes": 10, "in_channels": 1, "width": 1.0}


def test_installed_modules_work_too():
    model = create_model("clicktrain.models.mobilenet:MobileNetV1", num_classes=10, width=0.25)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(
    "name", ["mynets.small:", ":build", "my-nets:build", "mynets:a:b", ".small:build", "a..b:c"]
)
def test_a_name_that_cannot_be_read(name):
    assert error(name).startswith(f"cannot read the model name {name!r}: ")


def test_a_missing_module(tmp_path):
    assert error("nosuch.small:build").startswith(
        "there is no module 'nosuch' (looked for 'nosuch.small' in "
    )
    text = error("mynets.large:build")
    assert text.startswith("there is no module 'mynets.large' ")
    assert str(tmp_path) in text


def test_a_module_whose_own_import_is_missing():
    text = error("mynets.needy:build")
    assert text.startswith(
        "importing 'mynets.needy' failed with ModuleNotFoundError: No module named 'a_package_nobody_has' ("
    )
    assert text.endswith("needy.py, line 1)")


def test_a_module_that_fails():
    text = error("mynets.broken:build")
    assert "failed with NameError: name 'undefined_name' is not defined" in text
    assert text.endswith("broken.py, line 2)")
    text = error("mynets.typo:build")
    assert "failed with SyntaxError" in text
    assert "typo.py, line 1" in text


def test_a_missing_factory():
    text = error("mynets.small:missing")
    assert text.startswith("module 'mynets.small' (")
    assert text.endswith("small.py) has no 'missing': a model of your own is named as package.module:factory")


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("number", {}, "must be a function or a class, but it is of type int"),
        ("built", {}, "is a network that is already built: name the class or a function that builds it"),
        ("none", {}, "must return a torch.nn.Module, but it returned None"),
        ("a_class", {}, "must return a torch.nn.Module, but it returned of type type"),
        ("demanding", {}, "needs backbone, pretrained, but a factory is called with num_classes, "),
        ("positional", {}, "needs num_classes, but a factory is called with num_classes, "),
        ("classes_only", {"width": 0.5}, "has no parameter width, so width must stay 1.0"),
    ],
)
def test_a_factory_that_is_not_usable(factory, options, message):
    assert error(f"mynets.small:{factory}", **options).startswith(f"model 'mynets.small:{factory}' {message}")


def test_what_the_factory_raises_is_told_with_its_place():
    text = error("mynets.small:failing")
    assert text.startswith("building model 'mynets.small:failing' failed with LookupError: my own mistake (")
    assert text.endswith("small.py, line 29)")
    assert "SystemExit" in error("mynets.small:leaving")


def test_keywords_that_a_factory_passes_on_to_one_who_refuses_them_are_left_out():
    create("passes_on")  # importing the module draws random numbers too
    torch.manual_seed(7)
    model = create("passes_on", in_channels=3)
    torch.manual_seed(7)
    assert model.fc.weight.equal(nn.Linear(4, 10).weight)  # the refused calls have drawn no random numbers
    assert "has no parameter width, so width must stay 1.0" in error("mynets.small:passes_on", width=0.5)
    text = error("mynets.small:mistaken")
    assert "failed with TypeError" in text
    assert "'num_clases'" in text


def test_keyword_only_names_are_given():
    assert create("keyword_only", in_channels=2, width=0.5).weight.shape == (5, 2, 1, 1)
