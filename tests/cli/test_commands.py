"""Every command from end to end, and every way it can be given something bad: one line, exit status 2."""

from __future__ import annotations

import importlib
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from localize import list_methods, load
from localize.cli.app import main
from localize.cli.method_options import option_rows
from localize.heads import registry
from localize.heads.registry import method_class

MODEL = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, 10),
        )

def build_model():
    return Net()

example_inputs = torch.zeros(2, 1, 8, 8)
"""


class Cli:
    """Runs commands in a folder with ``model.py`` and remembers what they said."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self.capfd.readouterr()
        status = main(list(arguments))
        self.out, self.err = self.capfd.readouterr()
        return status

    def ok(self, *arguments: str) -> str:
        assert self(*arguments) == 0, self.err
        return self.out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def fails(self, *arguments: str) -> str:
        assert self(*arguments) == 2, self.out + self.err
        assert self.out == ""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in self.err
        return self.err


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return Cli(capfd)


@pytest.fixture
def artefact(cli: Cli) -> str:
    cli.ok("convert", "model.py", "--method", "al", "--parts", "3", "-o", "art")
    return "art"


def test_convert_prints_the_parts_and_writes_the_folder(cli: Cli) -> None:
    out = cli.ok("convert", "model.py", "--method", "al", "--parts", "3")
    assert "al, 3 parts by flops" in out
    folder = Path("model-al-3")
    assert {f.name for f in folder.iterdir()} >= {
        "plan.json",
        "weights.safetensors",
        "part_1.py",
        "part_3.py",
    }
    assert len(load(folder).parts) == 3
    assert "Wrote model-al-3" in cli.err


def test_convert_for_machines(cli: Cli) -> None:
    result = cli.json("convert", "model.py:Net?width=4", "--parts", "2", "--input-shape", "1x28x28")
    assert result["folder"] == "Net-scpl-2"
    assert len(result["plan"]["parts"]) == 2
    assert cli.ok("convert", "model.py", "-o", "quiet", "--quiet") == "quiet\n"


def test_convert_takes_the_method_s_options_as_flags(cli: Cli) -> None:
    cli.ok("convert", "--temperature", "0.25", "model.py", "--method", "scpl", "-o", "flag")
    cli.ok("convert", "model.py", "-O", "temperature=0.25", "-o", "pair")
    for folder in ("flag", "pair"):
        assert load(folder).method.options()["temperature"] == 0.25


def test_convert_cuts_where_told(cli: Cli) -> None:
    cut = cli.json("convert", "model.py", "--method", "nwise", "--parts", "3", "-o", "a")["plan"]["cuts"]
    again = cli.json("convert", "model.py", "--method", "nwise", "--cuts", ",".join(cut), "-o", "b")
    assert again["plan"]["cuts"] == cut
    cli.ok("convert", "model.py", "--cuts", ",".join(cut), "--parts", "3", "-o", "c")  # they agree


def test_weights_of_a_seed_are_the_same(cli: Cli) -> None:
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        cli.ok("convert", "model.py", "--method", "bp", "--seed", seed, "-o", folder)
    a, b, c = (load_file(f"{folder}/weights.safetensors")["0.weight"] for folder in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_train_and_evaluate_an_artefact(cli: Cli, artefact: str) -> None:
    before = load_file("art/weights.safetensors")
    trained = cli.json("train", artefact, "--data", "digits", "--epochs", "2", "--lr", "3e-3")
    assert len(trained["history"]) == 2
    assert not torch.equal(before["0.weight"], load_file("art/weights.safetensors")["0.weight"])
    evaluated = cli.json("evaluate", artefact, "--data", "digits")["evaluation"]
    assert evaluated["accuracy"] == trained["evaluation"]["accuracy"]
    assert evaluated["loss"] == pytest.approx(trained["evaluation"]["loss"])
    assert evaluated["exits"]["1"]["accuracy"] > 0.5
    assert float(cli.ok("evaluate", artefact, "--quiet")) == pytest.approx(evaluated["accuracy"], abs=1e-4)
    table = cli.ok("evaluate", artefact)
    assert "exit" in table
    assert "accuracy" in table


def test_train_a_model_at_once(cli: Cli) -> None:
    cli.ok("train", "model.py", "--method", "nwise", "--reach", "2", "--parts", "2", "--epochs", "1")
    assert load("model-nwise-2").method.options()["reach"] == 2


def test_train_writes_a_trace_of_every_part(cli: Cli, artefact: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "run.json"
    cli.ok("train", artefact, "--epochs", "1", "--trace", str(file), "--microbatches", "2")
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["tid"] for event in events} == {1, 2, 3}
    assert {event["cat"] for event in events} == {"forward", "head", "backward", "update"}


def test_train_resumes_to_the_same_weights(cli: Cli) -> None:
    common = ("model.py", "--method", "al", "--scheduler", "cosine", "--seed", "3")
    cli.ok("train", *common, "--epochs", "2", "-o", "whole", "--log-dir", "logs")
    assert any(Path("logs").iterdir())
    cli.ok("train", *common, "--epochs", "2", "-o", "half", "--checkpoint-dir", "ck")
    cli.ok("train", *common, "--epochs", "2", "-o", "again", "--checkpoint-dir", "ck", "--resume")
    whole, again = (load_file(f"{f}/weights.safetensors") for f in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_methods_lists_the_registry(cli: Cli) -> None:
    listed = [row["name"] for row in cli.json("methods")["methods"]]
    assert listed == list_methods()
    table = cli.ok("methods")
    assert all(name in table for name in listed)
    options = cli.json("methods", "scpl")["options"]
    assert {"flag": "--temperature", "type": "float", "default": 0.1} in options
    assert "--temperature" in cli.ok("methods", "scpl")


def test_inspect_shows_cuts_and_costs_and_writes_nothing(cli: Cli) -> None:
    result = cli.json("inspect", "model.py", "--method", "al", "--parts", "3")
    names = [cut["name"] for cut in result["cut_points"]]
    assert set(result["plan"]["cuts"]) <= set(names)
    assert all(cut["shape"] for cut in result["cut_points"])
    assert names[0] in cli.ok("inspect", "model.py")
    assert [f.name for f in Path().iterdir() if f.name != "__pycache__"] == ["model.py"]


def test_inspect_takes_a_seed_and_says_what_becomes_of_tied_weights(cli: Cli) -> None:
    assert cli.json("inspect", "model.py", "--seed", "3", "--tied", "untie")["plan"]["cuts"]
    assert "Did you mean 'colocate'" in cli.fails("inspect", "model.py", "--tied", "colocated")


def test_work_is_done_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """`inspect` captured the model twice, and `train` read the data set three times."""
    done: list[str] = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **kw: (done.append(name), original(*a, **kw))[1])

    for module in ("localize.api", "localize.cli.inspect"):
        counted(importlib.import_module(module), "trace")
    counted(importlib.import_module("localize.data.specs"), "_named")
    cli.ok("inspect", "model.py", "--data", "digits")
    assert sorted(done) == ["_named", "trace"]
    done.clear()
    cli.ok("train", "model.py", "--data", "digits", "--epochs", "1")
    assert sorted(done) == ["_named", "trace"]


def test_inspect_an_artefact(cli: Cli, artefact: str) -> None:
    assert len(cli.json("inspect", artefact)["plan"]["parts"]) == 3


@pytest.mark.parametrize("command", ["convert", "inspect", "train", "evaluate", "methods"])
def test_help_has_an_example(cli: Cli, command: str) -> None:
    assert f"localize {command}" in cli.ok(command, "--help").partition("Usage")[2]


@pytest.mark.parametrize("command", ["convert", "inspect", "train"])
def test_no_option_of_a_method_hides_behind_one_of_the_command(cli: Cli, command: str) -> None:
    taken = set(re.findall(r"--[a-z-]+", cli.ok(command, "--help")))
    options = {flag for name in list_methods() for flag, _, _ in option_rows(method_class(name))}
    assert not options & taken


def test_version_and_bare_command(cli: Cli) -> None:
    assert cli.ok("--version").startswith("localize ")
    assert "convert" in cli.ok()


BAD = {
    "unknown command": (["convrt"], "convrt"),
    "unknown option": (["evaluate", "art", "--dta", "digits"], "--dta"),
    "unknown option beside a method's": (
        ["convert", "model.py", "--temprature", "1"],
        "Did you mean '--temperature'",
    ),
    "missing model": (["convert"], "MODEL"),
    "two models": (["convert", "model.py", "other.py"], "One MODEL is needed, got 2"),
    "unknown method": (["convert", "model.py", "--method", "sclp"], "Did you mean 'scpl'"),
    "unknown balance": (["convert", "model.py", "--balance", "flop"], "Did you mean 'flops'"),
    "unknown task": (["convert", "model.py", "--task", "classify"], "Did you mean 'classification'"),
    "option out of range": (["convert", "model.py", "--temperature", "-1"], "temperature"),
    "option of another type": (["convert", "model.py", "--temperature", "warm"], "'warm' is not float"),
    "too many parts": (["convert", "model.py", "--parts", "40"], "40 parts"),
    "no parts": (["convert", "model.py", "--parts", "0"], "--parts is '0'"),
    "parts in words": (["convert", "model.py", "--parts", "two"], "--parts is 'two'"),
    "auto without a budget": (["convert", "model.py", "--parts", "auto"], "budget"),
    "a budget that is none": (["convert", "model.py", "--parts", "auto", "--memory-budget", "much"], "8GB"),
    "a budget for a number of parts": (["convert", "model.py", "--memory-budget", "8GB"], "parts='auto'"),
    "cuts and other parts": (
        ["convert", "model.py", "--cuts", "2", "--parts", "4"],
        "--cuts 2 makes 2 parts and --parts says 4",
    ),
    "unknown cut": (["convert", "model.py", "--cuts", "layer9"], "layer9"),
    "no shape": (["convert", "model.py", "--input-shape", "8by8"], "3x224x224"),
    "a shape that does not fit": (["convert", "model.py", "--input-shape", "3x8x8"], "3, 8, 8"),
    "missing file": (["convert", "modle.py"], "Did you mean 'model.py'"),
    "unknown data": (["train", "model.py", "--data", "digit"], "Did you mean 'digits'"),
    "data not there": (["train", "model.py", "--data", "mnist"], "--data-dir"),
    "unknown optimizer": (["train", "model.py", "--optimizer", "adm"], "Did you mean 'adam'"),
    "unknown scheduler": (["train", "model.py", "--scheduler", "cosin"], "Did you mean 'cosine'"),
    "unknown precision": (["train", "model.py", "--precision", "fp8"], "fp8"),
    "unknown device": (["train", "model.py", "--device", "gpu"], "gpu"),
    "negative rate": (["train", "model.py", "--lr", "-1"], "lr is -1"),
    "no epochs": (["train", "model.py", "--epochs", "0"], "--epochs is 0"),
    "no batch": (["train", "model.py", "--batch-size", "0"], "batch size is 0"),
    "a number that is none": (["train", "model.py", "--epochs", "many"], "--epochs"),
    "resume without a place": (["train", "model.py", "--resume"], "--checkpoint-dir"),
    "no artefact": (["evaluate", "nowhere"], "no artefact"),
    "unknown method to describe": (["methods", "sclp"], "Did you mean 'scpl'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2(cli: Cli, arguments: list[str], message: str) -> None:
    assert message in cli.fails(*arguments)
    assert {f.name for f in Path().iterdir()} <= {"model.py", "__pycache__"}, "nothing was left behind"


BAD_FILES = {
    "no model": ("x = 1", "holds no model"),
    "two models": (
        "from torch import nn\na = nn.Linear(1, 1)\nb = nn.Linear(1, 1)",
        "2 candidate models: a, b",
    ),
    "inputs that nobody gave": (
        """
        from torch import nn
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
            def forward(self, x, table):
                return self.b(self.a(x) + table["shift"])
        """,
        "example_inputs",
    ),
    "an output that no task fits": (
        """
        import torch
        from torch import nn
        class Net(nn.Sequential):
            def __init__(self):
                super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            def forward(self, x):
                return super().forward(x).argmax(1)
        example_inputs = torch.randn(2, 4)
        """,
        "floating-point",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_model_files(cli: Cli, text: str, message: str) -> None:
    Path("bad.py").write_text(textwrap.dedent(text))
    assert message in cli.fails("convert", "bad.py")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def make_newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 999}))


def drop_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights.pop("0.weight")
    save_file(weights, path)


def widen(path: Path) -> None:
    path.write_text(MODEL.replace("width=8", "width=16"))


BAD_ARTEFACTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated weights": ("art/weights.safetensors", truncate, "weights.safetensors"),
    "truncated plan": ("art/plan.json", truncate, "plan.json"),
    "a newer version": ("art/plan.json", make_newer, "999"),
    "a missing weight": ("art/weights.safetensors", drop_a_weight, "is damaged"),
    "weights gone": ("art/weights.safetensors", Path.unlink, "weights.safetensors"),
    "another model": ("model.py", widen, "parameters"),
    "the model's file gone": ("model.py", Path.unlink, "model.py"),
}


@pytest.mark.parametrize(("file", "spoil", "message"), BAD_ARTEFACTS.values(), ids=BAD_ARTEFACTS.keys())
def test_bad_artefacts(
    cli: Cli, artefact: str, file: str, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(Path(file))
    before = {f.name: f.read_bytes() for f in Path(artefact).iterdir()}
    assert message in cli.fails("train", artefact, "--epochs", "1")
    assert before == {f.name: f.read_bytes() for f in Path(artefact).iterdir()}


DATA = """
import torch
from torch.utils.data import TensorDataset
x = torch.randn(20, 1, 8, 8)
far = (TensorDataset(x, torch.full((20,), 12)),) * 2
nan = (TensorDataset(x * float("nan"), torch.zeros(20).long()),) * 2
wide = (TensorDataset(torch.randn(20, 3, 8, 8), torch.zeros(20).long()),) * 2
"""


@pytest.mark.parametrize(
    ("name", "message"), [("far", "12"), ("nan", "part 1"), ("wide", "3, 8, 8")], ids=lambda v: str(v)
)
def test_training_that_goes_wrong_leaves_the_artefact_as_it_was(
    cli: Cli, artefact: str, name: str, message: str
) -> None:
    Path("own.py").write_text(DATA)
    before = {f.name: f.read_bytes() for f in Path(artefact).iterdir()}
    error = cli.fails("train", artefact, "--data", f"own.py:{name}")
    assert message in error
    assert before == {f.name: f.read_bytes() for f in Path(artefact).iterdir()}


def test_an_artefact_is_not_converted_again(cli: Cli, artefact: str) -> None:
    assert "converted already" in cli.fails("convert", artefact)
    assert "converted already" in cli.fails("train", artefact, "--method", "scpl")
    assert "converted already" in cli.fails("train", artefact, "--temperature", "1")


def test_a_folder_with_other_things_is_not_overwritten(cli: Cli, artefact: str) -> None:
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("years of work")
    assert "holds no artefact" in cli.fails("convert", "model.py", "-o", "full")
    assert "is a file" in cli.fails("convert", "model.py", "-o", "model.py")
    cli.ok("convert", "model.py", "-o", "full", "--force")
    assert Path("full/thesis.tex").read_text() == "years of work"
    assert len(load("full").parts) == 2
    cli.ok("convert", "model.py", "-o", artefact)
    assert "Replaced art" in cli.err


OWN_METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from localize import register_method
from localize.heads.early_exit import EarlyExit

@register_method
@dataclass(frozen=True)
class Mine(EarlyExit):
    strength: float = 1.0
    name: ClassVar[str] = "mine"
"""


def test_a_method_of_ones_own(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    Path("mine.py").write_text(OWN_METHOD)
    assert "--strength" in cli.ok("methods", "mine", "--import", "mine.py")
    cli.ok("convert", "--import=mine.py", "model.py", "-m", "mine", "--strength", "2", "-o", "own")
    assert json.loads(Path("own/plan.json").read_text())["method"]["file"] == "mine.py"
    registry._registered.clear()  # as in a new process
    cli.ok("evaluate", "own")
    assert "mine" in list_methods()
    registry._registered.clear()
    Path("mine.py").rename("moved.py")
    assert "--import FILE" in cli.fails("evaluate", "own")
    cli.ok("evaluate", "own", "--import", "moved.py")
    assert "No file" in cli.fails("methods", "--import", "none.py")


def test_debug_says_what_is_going_on(cli: Cli) -> None:
    cli.ok("convert", "model.py", "-o", "quietly")
    assert "DEBUG" not in cli.err
    cli.ok("train", "model.py", "--epochs", "1", "--checkpoint-dir", "ck", "-o", "art", "--debug")
    assert "DEBUG: Net: 2 parts by flops, cut after" in cli.err
    assert re.search(r"DEBUG: wrote the checkpoint ck.step-\d+", cli.err)
    assert "DEBUG: wrote the artefact art" in cli.err


def test_debug_shows_the_traceback(cli: Cli) -> None:
    with pytest.raises(Exception, match="Unknown method"):
        main(["convert", "model.py", "--method", "nope", "--debug"])
