"""The artefact folder: what was saved comes back, and what is damaged is told."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import localize
from localize import CheckpointError, to_local
from localize.runtime.materialise import materialise
from localize.source import load_source
from localize.weights import named_tensors
from tests.test_exact import METHODS, method_id
from tests.test_local_model import sgd, trained
from tests.zoo import BY_NAME, CASES, CLASSES, build


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_save_and_load(case, method, tmp_path):
    local = trained(case.name, method)
    local.save(tmp_path / "artefact")
    again = localize.load(tmp_path / "artefact", build(case, seed=5))
    assert again.plan.cuts == local.plan.cuts
    assert again.method == local.method and again.task == local.task
    for (name, p), q in zip(local.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    x = case.inputs()
    assert torch.equal(local.predict(x), again.predict(x))
    names = {path.name for path in (tmp_path / "artefact").iterdir()}
    assert names == {"plan.json", "weights.safetensors", *(f"part_{k}.py" for k in range(1, len(local.parts) + 1))}


def test_names_in_the_weights_are_the_model_s_own(tmp_path):
    from safetensors.torch import load_file

    local = trained("cnn", METHODS[1])
    local.save(tmp_path / "a")
    names = set(load_file(tmp_path / "a" / "weights.safetensors"))
    own = set(local.to_standard().state_dict())
    assert own <= names
    assert all(n.startswith("heads.") for n in names - own)
    assert any(n.startswith("heads.1.") for n in names)


def test_cuts_may_be_edited_by_hand(tmp_path):
    local = trained("mlp", METHODS[0], parts=2)
    local.save(tmp_path / "a")
    path = tmp_path / "a" / "plan.json"
    content = json.loads(path.read_text())
    content["cuts"] = ["1", "3"]
    path.write_text(json.dumps(content))
    assert len(localize.load(tmp_path / "a", build(BY_NAME["mlp"])).parts) == 3


def test_appended_parts_are_kept(tmp_path):
    local = trained("cnn", METHODS[2])
    local.append_part(nn.Linear(48, CLASSES))
    local.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="1 appended parts and 0 modules"):
        localize.load(tmp_path / "a", build(BY_NAME["cnn"]))
    again = localize.load(tmp_path / "a", build(BY_NAME["cnn"]), appended=[nn.Linear(48, CLASSES)])
    x = BY_NAME["cnn"].inputs()
    assert torch.equal(local.predict(x), again.predict(x))


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    local = trained("cnn", METHODS[1])
    local.save(tmp_path / "a")
    local.train_step(BY_NAME["cnn"].inputs(), BY_NAME["cnn"].targets(), local.optimizers(sgd))
    local.save(tmp_path / "a")
    again = localize.load(tmp_path / "a", build(BY_NAME["cnn"]))
    assert torch.equal(local.predict(BY_NAME["cnn"].inputs()), again.predict(BY_NAME["cnn"].inputs()))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no artefact of localize"):
        trained("mlp", METHODS[0]).save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_artefact(tmp_path, monkeypatch):
    local = trained("mlp", METHODS[0])
    local.save(tmp_path / "a")
    before = (tmp_path / "a" / "weights.safetensors").read_bytes()
    monkeypatch.setattr("localize.artifact.json.dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        local.save(tmp_path / "a")
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


DAMAGE = {
    "truncated weights": ("weights.safetensors", lambda b: b[: len(b) // 2], "truncated or damaged"),
    "empty weights": ("weights.safetensors", lambda b: b"", "truncated or damaged"),
    "truncated plan": ("plan.json", lambda b: b[:40], "cannot be read"),
    "plan of a newer version": ("plan.json", lambda b: b.replace(b'"format": 1', b'"format": 99'), "format 99"),
    "plan without a format": ("plan.json", lambda b: b"{}", "no format version"),
    "plan without cuts": ("plan.json", lambda b: b.replace(b'"cuts"', b'"cats"'), "lacks the entry 'cuts'"),
    "plan of an unknown method": ("plan.json", lambda b: b.replace(b'"name": "bp"', b'"name": "bq"'), "bq"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(tmp_path, damage):
    file, change, message = DAMAGE[damage]
    trained("mlp", METHODS[0]).save(tmp_path / "a")
    path = tmp_path / "a" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(localize.LocalizeError, match=message):
        localize.load(tmp_path / "a", build(BY_NAME["mlp"]))


def test_missing_files_and_other_models_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="no artefact"):
        localize.load(tmp_path)
    trained("mlp", METHODS[0]).save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"holds .* the model given is"):
        localize.load(tmp_path / "a", build(BY_NAME["cnn"]))
    with pytest.raises(CheckpointError, match="names no source"):
        localize.load(tmp_path / "a")
    (tmp_path / "a" / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        localize.load(tmp_path / "a", build(BY_NAME["mlp"]))


def test_a_loss_of_one_s_own_must_be_given_again(tmp_path):
    case = BY_NAME["mlp"]

    def loss(logits, target):
        return 7 * nn.functional.cross_entropy(logits, target)

    local = to_local(build(case), case.inputs(), method="early_exit", parts=2, loss=loss)
    local.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a loss of its own"):
        localize.load(tmp_path / "a", build(case))
    again = localize.load(tmp_path / "a", build(case), loss=loss)
    x, y = case.inputs(), case.targets()
    assert torch.equal(again.losses(x, y)[-1], local.losses(x, y)[-1])


class Positional(nn.Module):
    """Takes its inputs by position only, and any number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, /, *more):
        return self.b(torch.relu(self.a(x + more[0])))


def test_positional_inputs_go_round(tmp_path):
    inputs = (torch.randn(4, 4), torch.randn(4, 4))
    local = to_local(Positional(), inputs, method="early_exit", parts=2)
    local.save(tmp_path / "a")
    again = localize.load(tmp_path / "a", Positional())
    assert torch.equal(again.predict(inputs), local.predict(inputs))


class Typed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, dtype=torch.float32):
        return self.b(torch.relu(self.a(x.to(dtype))))


def test_an_example_that_json_cannot_hold_is_told(tmp_path):
    local = to_local(Typed(), torch.randn(4, 4), method="early_exit", parts=2)
    with pytest.raises(CheckpointError, match=r"float32, which plan.json cannot hold"):
        local.save(tmp_path / "a")


def test_frozen_stays_frozen_and_free_stays_free(tmp_path):
    local = trained("cnn", METHODS[1])
    local.to_standard()[0].requires_grad_(False)
    local.save(tmp_path / "a")
    again = localize.load(tmp_path / "a", build(BY_NAME["cnn"]))
    frozen = [name for name, p in again.to_standard().named_parameters() if not p.requires_grad]
    assert frozen == ["0.weight", "0.bias"]


def test_frozen_heads_and_appended_parts_stay_frozen(tmp_path):
    local = trained("cnn", METHODS[2], cuts=["2", "5"])
    for _ in range(2):
        local.append_part(nn.Sequential(nn.Linear(48, 48), nn.ReLU()))
    local.save(tmp_path / "a")
    modules = [nn.Sequential(nn.Linear(48, 48), nn.ReLU()) for _ in range(2)]
    again = localize.load(tmp_path / "a", build(BY_NAME["cnn"]), appended=modules)
    flags = [p.requires_grad for p in local.parameters()]
    assert flags == [p.requires_grad for p in again.parameters()] and not all(flags) and any(flags)


WRONG = {
    "source is a number": ("source", 7, "'source' is 7"),
    "model is a number": ("model", 3, "'model' is 3"),
    "cuts is a number": ("cuts", 5, "'cuts' is 5"),
    "cuts of numbers": ("cuts", [1], "a list of names"),
    "method is a string": ("method", "x", "'method.name'"),
    "method name is a number": ("method", {"name": 7, "options": {}}, "'method.name' is 7"),
    "inputs are empty": ("inputs", {}, "example inputs"),
    "frozen is a string": ("frozen", "x", "'frozen' is 'x'"),
    "frozen is unknown": ("frozen", ["zz"], "does not have"),
    "an unknown task": ("task", {"kind": "x", "num_classes": None, "custom_loss": False}, "Unknown task 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_of_the_wrong_kind_is_told(tmp_path, case):
    key, value, message = WRONG[case]
    trained("mlp", METHODS[0]).save(tmp_path / "a")
    path = tmp_path / "a" / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        localize.load(tmp_path / "a", build(BY_NAME["mlp"]))


@pytest.mark.parametrize("change", [{"shape": [-1, 6]}, {"values": [1]}, {"dtype": "float99"}])
def test_example_inputs_of_the_wrong_kind_are_told(tmp_path, change):
    trained("mlp", METHODS[0]).save(tmp_path / "a")
    path = tmp_path / "a" / "plan.json"
    content = json.loads(path.read_text())
    content["inputs"]["tensors"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="example inputs"):
        localize.load(tmp_path / "a", build(BY_NAME["mlp"]))


# ---------------------------------------------------------------- weights that are not read yet


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("built", ["real", "meta"])
def test_weights_on_meta_are_read_later(case, built, tmp_path):
    local = trained(case.name, METHODS[1])
    local.save(tmp_path / "a")
    with torch.device("meta" if built == "meta" else "cpu"):
        model = build(case, seed=5)
    again = localize.load(tmp_path / "a", model, device="meta")
    assert all(t.is_meta for t in named_tensors(again).values())
    materialise(again, seed=0)
    assert all(torch.equal(t, named_tensors(again)[n]) for n, t in named_tensors(local).items())
    assert torch.equal(local.predict(case.inputs()), again.predict(case.inputs()))
    again.save(tmp_path / "b")
    one, other = ((tmp_path / folder / "weights.safetensors").read_bytes() for folder in ("a", "b"))
    assert one == other


BUILDS = {
    "a table": ("self.register_buffer('t', torch.arange(8).float(), persistent=False)", None),
    "random parameters": ("self.p = nn.Parameter(torch.randn(8) * 0.1)", None),
    "a tied parameter": ("self.c = nn.Linear(8, 8); self.c.weight = self.b.weight", None),
    "a layer that is replaced": ("self.b = nn.Linear(8, 8); self.register_buffer('k', torch.ones(8))", None),
    "a parameter in a buffer": ("self.register_buffer('t', self.b.bias.detach() * 2, persistent=False)", "from param"),
    "a random table": ("torch.manual_seed(3); self.register_buffer('t', torch.rand(8), persistent=False)", "draws"),
    "a random number": ("torch.manual_seed(3); self.factor = float(torch.rand(8).sum())", "draws random"),
    "values that are read": ("self.factor = 1.0 + 0.0 * float(self.b.weight.sum())", "cannot be built"),
    "a second model": ("OTHERS.append(nn.Linear(8, 8))", "keeps parameters outside"),
    "an expanded buffer": ("self.register_buffer('t', torch.ones(1).expand(8))", None),
    "views of one": ("self.register_buffer('w', torch.ones(2, 8)); self.register_buffer('t', self.w[1])", "share"),
    "a plain tensor": ("self.t = torch.arange(8).float()", "fails"),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_a_model_is_built_without_memory_where_that_comes_to_the_same(kind, tmp_path, monkeypatch, caplog):
    """The tables that no file has are those of a normal build, whatever the way."""
    more, doubt = BUILDS[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nOTHERS = []\n\nclass Net(nn.Module):\n    factor = 1.0\n\n"
        "    def __init__(self):\n        super().__init__()\n        torch.manual_seed(1)\n"
        "        self.a, self.b, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)\n"
        f"        {more}\n\n    def forward(self, x):\n        h = torch.relu(self.b(torch.relu(self.a(x))))\n"
        "        h = h + self.t if hasattr(self, 't') else h * self.factor\n        return self.last(h)\n"
    )
    local = to_local(load_source("net.py:Net"), torch.randn(4, 6), method="al", parts=2)
    local.source = "net.py:Net"
    local.save(tmp_path / "a")
    with caplog.at_level("DEBUG", logger="localize"):
        again = localize.load(tmp_path / "a", device="meta")
    assert all(t.is_meta or (doubt == "share" and name in ("w", "t")) for name, t in named_tensors(again).items())
    assert ("was built without memory" in caplog.text) is (doubt is None)
    assert doubt is None or doubt in caplog.text
    materialise(again, seed=0)
    x = torch.randn(4, 6)
    assert torch.equal(again.predict(x), localize.load(tmp_path / "a").predict(x))
    assert nn.Module.register_parameter is REGISTER


REGISTER = nn.Module.register_parameter


def test_what_is_damaged_is_told_without_reading_it_whole(tmp_path):
    trained("mlp", METHODS[0]).save(tmp_path / "a")
    path = tmp_path / "a" / "weights.safetensors"
    whole = path.read_bytes()
    for damaged, message in ((whole[:-8], "truncated or damaged"), (whole[:-1] + b"\x07", "is damaged")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            localize.load(tmp_path / "a", build(BY_NAME["mlp"]), device="meta")
    path.write_bytes(whole)
    again = localize.load(tmp_path / "a", build(BY_NAME["mlp"]), device="meta")
    with pytest.raises(CheckpointError, match="have no values in this process"):
        again.save(tmp_path / "b")
    path.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        materialise(again, seed=0)


def test_edited_cuts_leave_the_weights_for_later_too(tmp_path):
    local = trained("mlp", METHODS[1], parts=2)
    local.save(tmp_path / "a")
    path = tmp_path / "a" / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cuts": ["1", "3"]}))
    again = localize.load(tmp_path / "a", build(BY_NAME["mlp"], seed=5), device="meta")
    assert all(p.is_meta for p in again.to_standard().parameters())
    materialise(again, seed=0)
    for name, tensor in local.to_standard().state_dict().items():
        assert torch.equal(tensor, again.to_standard().state_dict()[name])


def test_load_puts_the_model_where_it_is_wanted(tmp_path):
    trained("mlp", METHODS[0]).save(tmp_path / "a")
    again = localize.load(tmp_path / "a", build(BY_NAME["mlp"]), device="cpu")
    assert {p.device.type for p in again.parameters()} == {"cpu"}
