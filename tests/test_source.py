"""MODEL specs: which model a spec means, and what is said where it means none."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from localize.errors import ConfigError
from localize.source import load_source, read_source

ONE_CLASS = """
    from torch import nn
    class Block(nn.Module):
        def __init__(self, width): super().__init__()
    class Net(nn.Sequential):
        def __init__(self, width=3): super().__init__(nn.Linear(2, width))
"""


def write(folder: Path, text: str, name: str = "net.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


CASES = {
    "an object named model": "from torch import nn\nmodel = nn.Linear(2, 3)\nother = nn.Linear(1, 1)",
    "an object named net": "from torch import nn\nnet = nn.Linear(2, 3)",
    "a factory named build_model": "from torch import nn\ndef build_model():\n    return nn.Linear(2, 3)",
    "the only object": "from torch import nn\nencoder = nn.Linear(2, 3)",
    "the only class without required arguments": ONE_CLASS,
    "an annotated factory": (
        "from torch import nn\ndef make(width: int = 3) -> nn.Module:\n    return nn.Linear(2, width)"
    ),
    "an annotated factory, annotations as text": (
        "from __future__ import annotations\nfrom torch import nn\ndef make() -> nn.Linear:\n    return nn.Linear(2, 3)"
    ),
    "one object under two names": "from torch import nn\nmodel = net = nn.Linear(2, 3)",
    "model made by a factory in the file": (
        "from torch import nn\ndef build_model():\n    return nn.Linear(9, 9)\nmodel = nn.Linear(2, 3)"
    ),
    "a factory that needs arguments beside a class that does not": (
        "from torch import nn\ndef build_model(width):\n    return 0\n"
        "class Net(nn.Sequential):\n    def __init__(self): super().__init__(nn.Linear(2, 3))"
    ),
}


@pytest.mark.parametrize("text", CASES.values(), ids=CASES.keys())
def test_a_file_with_one_model_needs_no_name(tmp_path: Path, text: str) -> None:
    model = load_source(write(tmp_path, text))
    assert model(torch.zeros(1, 2)).shape == (1, 3)


def test_a_name_and_options_choose(tmp_path: Path) -> None:
    path = write(tmp_path, ONE_CLASS)
    assert load_source(f"{path}:Net?width=5")(torch.zeros(1, 2)).shape == (1, 5)
    assert read_source(f"{path}:Net").name == "Net"
    assert read_source(path).name == "net"


def test_the_only_function_is_tried_and_a_loss_is_no_model(tmp_path: Path) -> None:
    """Both were refused: a factory that does not say what it returns, and a model beside a loss."""
    factory = "from torch import nn\ndef make():\n    return nn.Linear(2, 3)"
    assert load_source(write(tmp_path, factory))(torch.zeros(1, 2)).shape == (1, 3)
    beside = "from torch import nn\ncriterion = nn.CrossEntropyLoss()\nencoder = nn.Linear(2, 3)"
    assert read_source(write(tmp_path, beside)).model.in_features == 2


ERRORS = {
    "no model": ("x = 1", r"net\.py holds no model.*build_model"),
    "only a class that needs arguments": (
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, width): pass",
        r"holds no model.*Net needs width",
    ),
    "two classes": (
        "from torch import nn\nclass A(nn.Module): pass\nclass B(nn.Module): pass",
        r"2 candidate models: A, B; say `.*net\.py:A` or `.*net\.py:B`",
    ),
    "two objects": (
        "from torch import nn\nmodel = nn.Linear(1, 1)\nnet = nn.Linear(1, 1)",
        r"2 candidate models: model, net",
    ),
    "a syntax error": ("x = = 1", r"net\.py cannot be imported: line 1: SyntaxError"),
    "an exception on import": (
        "\n\nraise ValueError('boom')",
        r"cannot be imported: line 3: ValueError: boom",
    ),
    "an exit on import": ("import sys\nsys.exit(1)", r"cannot be imported: line 2: SystemExit"),
    "a factory that raises": (
        "from torch import nn\ndef build_model():\n    raise KeyError('x')",
        r"build_model cannot be built: KeyError",
    ),
    "a factory of something else": ("def build_model():\n    return 3", r"returned a int, not an nn\.Module"),
}


@pytest.mark.parametrize(("text", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_a_bad_file_is_one_config_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_source(write(tmp_path, text))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/nte.py", "No file .*nte.py.*Did you mean 'net.py'"),
        ("{folder}/net.py:Nett", "no name 'Nett'. Did you mean 'Net'.*Models there: Net"),
        ("{folder}/net.py:Block", "needs arguments: width"),
        ("{folder}/net.py:Net?width", "name=value"),
        ("{folder}/net.py:Net?wdith=2", "cannot be built: TypeError"),
        ("{folder}", "no plan.json"),
        ("nonsense", "No model at 'nonsense'"),
        ("no_such_package.models:Net", "No module 'no_such_package.models'"),
        ("torch.nn:Linear", "needs arguments: in_features, out_features"),
        ("torch.nn:functional", "is a module, not a model"),
        ("torchvision:resnt18", "Did you mean 'resnet18'"),
        ("torchvision:resnet18?depth=3", "torchvision:resnet18 cannot be built"),
    ],
)
def test_a_bad_spec_is_one_config_error(tmp_path: Path, spec: str, message: str) -> None:
    write(tmp_path, ONE_CLASS)
    with pytest.raises(ConfigError, match=message):
        load_source(spec.format(folder=tmp_path))


def test_modules_and_libraries() -> None:
    assert isinstance(load_source("torch.nn:Linear?in_features=2&out_features=3"), nn.Linear)
    pytest.importorskip("torchvision")
    assert load_source("torchvision:resnet18?num_classes=7").fc.out_features == 7


def test_example_inputs_of_the_file(tmp_path: Path) -> None:
    plain = write(tmp_path, "import torch\nmodel = torch.nn.Linear(2, 3)\nexample_inputs = torch.ones(4, 2)")
    assert read_source(plain).example_inputs.shape == (4, 2)
    called = "import torch\nmodel = torch.nn.Linear(2, 3)\ndef example_inputs():\n    return torch.ones(5, 2)"
    assert read_source(write(tmp_path, called)).example_inputs.shape == (5, 2)


def test_siblings_are_importable_and_files_are_found_near_an_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "WIDTH = 3", "sibling_of_net.py")
    write(tmp_path, "from torch import nn\nfrom sibling_of_net import WIDTH\nmodel = nn.Linear(2, WIDTH)")
    artefact = tmp_path / "runs" / "net-al-4"
    artefact.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_source("net.py", near=artefact)(torch.zeros(1, 2)).shape == (1, 3)
    with pytest.raises(ConfigError, match=r"No file 'net\.py'"):
        load_source("net.py")


def test_a_misspelt_option_of_transformers_is_an_error() -> None:
    """It was kept in the configuration, where nobody read it: the model had all its layers."""
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"gpt2 has no option 'n_layr'.*n_layer"):
        load_source("transformers:gpt2?n_layr=2")
