"""The artefact folder: what was saved comes back, and what is damaged is told."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import localize
from localize import CheckpointError, to_local
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
