"""What `localize inspect` says: the capture, the legal and the chosen cuts, what crosses, and the costs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from localize import to_local
from localize.cli.app import main
from localize.cli.output import Bytes, Quantity, Share
from localize.cli.report import gathered
from localize.source import read_source

MODELS = """
import torch
from torch import nn

class Skip(nn.Module):
    "The stem crosses every cut up to the sum."
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.top, self.out = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        kept = self.stem(x)
        return self.out(self.top(torch.relu(self.body(kept))) + kept)

class Chooser(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x) if bool((x > 0).any()) else self.b(x)

class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(6, 8), nn.Linear(64, 3)
        self.blocks = nn.ModuleList([Chooser() for _ in range(3)])
        self.wide = nn.Linear(8, 64)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(torch.relu(self.wide(x)))

class Tied(nn.Module):
    "The first half of the model has one matrix."
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.third, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(torch.relu(self.third(x)))

class Branch(nn.Module):
    "What it does depends on a size."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.strength = 0.5

    def forward(self, x):
        x = self.a(x) * self.strength
        if x.shape[0] > 1:
            x = x + 1
        return self.b(x)

class Noisy(nn.Module):
    "Another program in train mode; a decision on values; an attribute that it sets."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.seen = None

    def forward(self, x):
        h = self.a(x)
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
        if bool((h > -1e9).all()):
            h = torch.relu(h)
        self.seen = h.mean()
        return self.b(h)

def lopsided():
    return nn.Sequential(nn.Linear(6, 200), nn.Linear(200, 200), nn.Linear(200, 2), nn.Linear(2, 2), nn.Linear(2, 3))

class Many(nn.Module):
    "Ten tensors cross into the sum."
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6 if i % 2 else 3) for i in range(10)])
        self.out = nn.Linear(45, 3)

    def forward(self, x):
        return self.out(torch.cat([layer(x) for layer in self.layers], 1))

def deep():
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(60)])

def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 3))

example_inputs = torch.randn(4, 6)
"""


class Inspect:
    """Runs `inspect` on a model of ``nets.py``."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, model: str, *arguments: str) -> str:
        self.capfd.readouterr()
        assert main(["inspect", f"nets.py:{model}", *arguments]) == 0, self.capfd.readouterr().err
        return self.capfd.readouterr().out

    def json(self, model: str, *arguments: str) -> Any:
        return json.loads(self(model, "--json", *arguments))


@pytest.fixture
def inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Inspect:
    (tmp_path / "nets.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return Inspect(capfd)


def lines(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


def test_the_document_has_these_keys(inspect: Inspect) -> None:
    report = inspect.json("Skip", "-m", "bp")
    assert list(report) == ["model", "capture", "legal_cuts", "cut_points", "plan", "crossing", "limit", "next"]
    assert list(report["capture"]) == [
        "graphs", "calls", "kept_whole", "guards", "settings", "not_set", "notes",
    ]  # fmt: skip
    assert set(report["cut_points"][0]) == {
        "name", "aliases", "inside", "chosen", "candidate", "obstacle", "shape", "dtype", "layout", "primary",
        "crossing", "crossing_bytes", "below",
    }  # fmt: skip


def test_the_model_is_described(inspect: Inspect) -> None:
    model = inspect.json("Skip", "-m", "bp")["model"]
    own = read_source("nets.py:Skip").model
    assert model["class"] == "Skip"
    assert model["parameters"] == sum(p.numel() for p in own.parameters())
    assert model["parameter_bytes"] == 4 * model["parameters"]
    assert model["flops"] == 2 * 4 * (6 * 8 + 8 * 16 + 16 * 8 + 8 * 3)
    assert (model["task"], model["num_classes"]) == ("classification", 3)
    [inputs] = model["inputs"]
    assert (inputs["name"], inputs["sizes"], inputs["dtype"], inputs["bytes"]) == ("x", [4, 6], "float32", 96)


def test_where_the_example_comes_from(inspect: Inspect) -> None:
    assert "example_inputs in the model's file" in lines(inspect("Skip"), "example")[0]
    assert inspect.json("Skip", "--input-shape", "6")["model"]["inputs_from"] == "--input-shape 6"
    Path("nets.py").write_text(MODELS.replace("example_inputs =", "other ="))
    assert inspect.json("Skip", "-m", "bp")["model"]["inputs_from"].startswith("inferred from ")


def test_two_tensors_cross_and_their_bytes_add_up(inspect: Inspect) -> None:
    report = inspect.json("Skip", "-m", "bp", "--cuts", "body")
    [boundary] = report["crossing"]
    stem, body = boundary["tensors"]
    assert (stem["made_in"], stem["sizes"], stem["bytes"], stem["primary"]) == ("stem", [4, 8], 128, False)
    assert (body["made_in"], body["sizes"], body["bytes"], body["primary"]) == ("body", [4, 16], 256, True)
    assert boundary["bytes"] == 384 == report["plan"]["boundaries"][0]["crossing_bytes"]
    [chosen] = [cut for cut in report["cut_points"] if cut["chosen"]]
    assert chosen["name"] == "body"
    assert chosen["crossing"] == [stem["name"], body["name"]]
    assert chosen["crossing_bytes"] == 384
    assert chosen["below"] == pytest.approx((48 + 128) / (48 + 128 + 128 + 24))


def test_the_tables_show_what_crosses(inspect: Inspect) -> None:
    text = inspect("Skip", "-m", "bp", "--cuts", "body")
    chosen, crossing = lines(text, "✂   ")[0], text.partition("What crosses")[2]
    assert "body" in chosen
    assert " 2 " in chosen
    assert "384 B" in chosen
    assert "1 → 2" in crossing
    assert "128 B" in lines(crossing, "stem")[0]
    assert "256 B" in lines(crossing, "N×16")[0]
    assert "✂" in lines(crossing, "N×16")[0]
    assert "✂" not in lines(crossing, "stem")[0]


def test_of_many_tensors_the_largest_are_shown(inspect: Inspect) -> None:
    [boundary] = inspect.json("Many", "-m", "bp", "--cuts", "layers")["crossing"]
    assert len(boundary["tensors"]) == 10
    assert boundary["bytes"] == sum(tensor["bytes"] for tensor in boundary["tensors"]) == 4 * 4 * 45
    few, every = (
        inspect("Many", "-m", "bp", "--cuts", "layers", *more).partition("What crosses")[2] for more in ([], ["--all"])
    )
    assert len(lines(few, " vector ")) == 6
    assert len(lines(few, " 96 B")) == 5
    assert "192 B" in lines(few, "and 4 more")[0]
    assert all("720 B" in lines(text, "1 → 2")[0] for text in (few, every))
    assert len(lines(every, " vector ")) == 10
    assert "layers.9" in lines(few, "✂  ")[0]


def test_a_block_that_stays_whole_says_why(inspect: Inspect) -> None:
    [whole] = inspect.json("Opaque", "-m", "bp")["capture"]["kept_whole"]
    assert whole["modules"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert whole["class"] == "Chooser"
    assert "nets.py:" in whole["reason"]
    assert whole["flops_share"] == pytest.approx(3 * 64 / (48 + 3 * 64 + 512 + 192))
    text = inspect("Opaque", "-m", "bp")
    [line] = lines(text, "kept whole")
    assert "Chooser" in line
    assert "blocks.* (3)" in line
    assert "20 % of the FLOPs" in line


def test_layers_of_torch_that_stay_whole_are_named(inspect: Inspect) -> None:
    Path("nets.py").write_text(MODELS.replace("torch.randn(4, 6)", "torch.randn(4, 3, 6)"))
    [whole] = inspect.json("encoder", "-m", "bp")["capture"]["kept_whole"]
    assert whole["class"] == "TransformerEncoderLayer"
    assert whole["modules"] == ["1.layers.0", "1.layers.1"]
    assert whole["reason"] == "torch.nn's own layer"


def test_tied_weights_are_named_and_block_cuts(inspect: Inspect) -> None:
    report = inspect.json("Tied", "-m", "bp", "--all")
    [tied] = report["model"]["shared_parameters"]
    assert tied["names"] == ["first.weight", "second.weight"]
    assert tied["bytes"] == 6 * 6 * 4
    assert tied["read_in"] == ["first", "second"]
    blocked = [cut["name"] for cut in report["cut_points"] if cut["obstacle"]]
    assert "first" in blocked
    assert "second" not in blocked
    assert len(blocked) == tied["cuts_blocked"]
    assert "first.weight" in report["cut_points"][0]["obstacle"]
    assert report["model"]["unused_parameters"] == ["spare.weight", "spare.bias"]
    text = inspect("Tied", "-m", "bp")
    assert "first.weight = second.weight (144 B)" in lines(text, "tied")[0]
    assert "(1) not usable: parts the readers of first.weight" in text


def test_untied_weights_block_nothing(inspect: Inspect) -> None:
    report = inspect.json("Tied", "-m", "bp", "--tied", "untie", "--all")
    assert report["model"]["shared_parameters"] == []
    assert report["model"]["tied"] == report["plan"]["tied"] == "untie"
    assert not any(cut["obstacle"] for cut in report["cut_points"])
    assert any(note.startswith("untied: second.weight") for note in report["capture"]["notes"])


def test_guards_and_settings(inspect: Inspect) -> None:
    capture = inspect.json("Branch", "-m", "bp")["capture"]
    [guard] = capture["guards"]
    assert (guard["kind"], guard["decision"]) == ("size", "a size > 1")
    assert guard["where"].startswith("nets.py:")
    assert {"module": "", "name": "strength", "value": 0.5} in capture["settings"]
    text = inspect("Branch", "-m", "bp")
    assert "nets.py:" in lines(text, "checked")[0]
    assert "strength" in lines(text, "settings")[0]


def test_modes_decisions_and_attributes_that_are_set(inspect: Inspect) -> None:
    capture = inspect.json("Noisy", "-m", "bp")["capture"]
    assert capture["graphs"] == 2
    assert capture["not_set"] == ["seen"]
    assert capture["settings"] == []  # train() and eval() may be called
    assert {guard["decision"] for guard in capture["guards"]} == {"a tensor's __bool__ gives True"}
    text = inspect("Noisy", "-m", "bp")
    assert "two graphs" in lines(text, "train, eval")[0]
    assert "seen" in lines(text, "not set")[0]
    assert "nets.py:" in lines(text, "checked")[0]
    assert not lines(text, "note ")  # each is told once, under its own heading


@pytest.mark.parametrize(
    ("condition", "decision"),
    [("> 1", "> 1"), ("< 3", ">= 3"), ("!= 4", "== 4"), ("== x.shape[1]", "!= another size")],
)
def test_a_guard_says_what_must_stay_so(inspect: Inspect, condition: str, decision: str) -> None:
    Path("nets.py").write_text(MODELS.replace("x.shape[0] > 1", f"x.shape[0] {condition}"))
    [guard] = inspect.json("Branch", "-m", "bp")["capture"]["guards"]
    assert guard["decision"] == f"a size {decision}"


def test_the_limit_is_a_lower_bound_and_names_the_layer(inspect: Inspect) -> None:
    report = inspect.json("lopsided", "-m", "bp", "--parts", "4")
    limit, plan = report["limit"], report["plan"]
    flops = [6 * 200, 200 * 200, 200 * 2, 2 * 2, 2 * 3]
    assert (limit["after"], limit["to"], limit["heaviest"]) == ("0", "1", "1")
    assert limit["share"] == pytest.approx(flops[1] / sum(flops))
    assert limit["imbalance_at_least"] == pytest.approx(4 * flops[1] / sum(flops))
    assert limit["imbalance_at_least"] <= plan["imbalance"] + 1e-9
    [line] = lines(inspect("lopsided", "-m", "bp", "--parts", "4"), "at least")
    assert "no usable cut lies between after 0 and after 1, where 96 % of the model's flops is" in line
    assert "at least" not in inspect("Skip", "-m", "bp")
    assert inspect.json("Skip", "-m", "bp", "--parts", "1")["limit"] is None


@pytest.mark.parametrize("balance", ["flops", "memory", "activations", "params", "time"])
def test_every_balance_has_its_column(inspect: Inspect, balance: str) -> None:
    report = inspect.json("deep", "-m", "early_exit", "--parts", "3", "--balance", balance)
    assert report["limit"]["imbalance_at_least"] <= report["plan"]["imbalance"] + 1e-9
    text = inspect("deep", "-m", "early_exit", "--parts", "3", "--balance", balance)
    assert f"3 parts for early_exit by {balance}, heads included" in text
    assert (" ms " in text) == (balance == "time")
    timed = [part["part"]["forward_ms"] is not None for part in report["plan"]["parts"]]
    assert timed == [balance == "time"] * 3


def test_long_lists_are_short_unless_all(inspect: Inspect) -> None:
    few, every = inspect("deep", "-m", "bp", "--parts", "4"), inspect("deep", "-m", "bp", "--parts", "4", "--all")
    assert "24 of 59 candidates" in few
    assert "all 59 legal places" in every
    assert len(lines(few, " vector ")) == 24 + 3  # and the tensors that cross
    assert len(lines(every, " vector ")) == 59 + 3
    assert len(lines(few, "✂  ")) == len(lines(every, "✂  ")) == 3 + 3


def test_all_lists_every_place_for_machines_too(inspect: Inspect) -> None:
    few, every = inspect.json("Skip", "-m", "bp"), inspect.json("Skip", "-m", "bp", "--all")
    assert few["legal_cuts"] == every["legal_cuts"] == len(every["cut_points"]) > len(few["cut_points"])
    assert [p["name"] for p in every["cut_points"] if p["candidate"]] == [p["name"] for p in few["cut_points"]]
    for name in [p["name"] for p in every["cut_points"]]:  # each is a name that --cuts takes
        assert inspect.json("Skip", "-m", "bp", "--cuts", name)["plan"]["cuts"] == [name]


def test_the_next_command_converts_what_was_inspected(inspect: Inspect) -> None:
    report = inspect.json("Skip", "-m", "scpl", "--temperature", "0.2", "--cuts", "body, top", "--seed", "3", "--all")
    words = shlex.split(report["next"])
    assert words[:2] == ["localize", "convert"]
    assert main([*words[1:], "-o", "art", "--quiet"]) == 0
    saved = json.loads(Path("art/plan.json").read_text())
    assert saved["cuts"] == report["plan"]["cuts"] == ["body", "top"]
    assert saved["method"]["options"]["temperature"] == 0.2
    assert "localize train art --data DATA" in json.loads(_again(inspect, "art"))["next"]


def _again(inspect: Inspect, folder: str) -> str:
    inspect.capfd.readouterr()
    assert main(["inspect", folder, "--json"]) == 0
    return inspect.capfd.readouterr().out


def test_the_plan_is_the_one_that_a_conversion_makes(inspect: Inspect) -> None:
    report = inspect.json("Skip", "-m", "early_exit", "--parts", "3")
    source = read_source("nets.py:Skip")
    plan = to_local(source.model, torch.randn(4, 6), method="early_exit", parts=3).plan
    assert report["plan"]["cuts"] == list(plan.cuts)
    assert report["plan"]["parts"] == plan.to_dict()["parts"]


def test_what_is_wrong_is_one_line(inspect: Inspect) -> None:
    inspect.capfd.readouterr()
    assert main(["inspect", "nets.py:Tied", "-m", "bp", "--cuts", "first"]) == 2
    out, err = inspect.capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "first.weight" in err


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a.0.b", "a.1.b", "a.12.b"], "a.*.b (3)"),
        (["layer1", "layer2"], "layer1, layer2"),
        (["b.0.norm1", "b.1.norm1", "b.2.norm1", "c_1"], "b.*.norm1 (3), c_1"),
        ([f"layer_{i}.0" for i in range(12)], "layer_*.0 (12)"),
        (["a.0", "c", "d", "e"], "a.0, c and 2 more"),
    ],
)
def test_names_that_differ_in_numbers_are_one(names: Sequence[str], text: str) -> None:
    assert gathered(names, 2) == text


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Bytes, 0, "0 B"),
        (Bytes, 999, "999 B"),
        (Bytes, 999_600, "1 MB"),
        (Bytes, 8192, "8.19 kB"),
        (Quantity, 11_689_512, "11.7 M"),
        (Quantity, 4e21, "4e+06 P"),
        (Share, 0.256, "26 %"),
    ],
)
def test_quantities_are_short(kind: Callable[[float], object], value: float, text: str) -> None:
    assert str(kind(value)) == text


def test_model_files_are_as_they_were(inspect: Inspect) -> None:
    inspect("Opaque", "-m", "bp")
    assert [f.name for f in Path().iterdir() if f.name != "__pycache__"] == ["nets.py"]
    assert isinstance(read_source("nets.py:Opaque").model, nn.Module)
