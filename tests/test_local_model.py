"""Exits, stand-alone sub-models, growing, copying, moving: what one does with a LocalModel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from localize import ConfigError, LocalModel, MethodError, get_method, to_local
from tests.test_exact import METHODS, method_id
from tests.zoo import BY_NAME, CASES, CLASSES, build

every_method = pytest.mark.parametrize("method", METHODS, ids=method_id)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def trained(name: str, method, parts: int = 3, cuts=None) -> LocalModel:
    case = BY_NAME[name]
    torch.manual_seed(0)
    local = to_local(build(case), case.inputs(), method=method, parts=parts, cuts=cuts, task="classification")
    optimizers = local.optimizers(sgd)
    for step in range(2):
        local.train_step(case.inputs(seed=step), case.targets(seed=step), optimizers)
    return local


@pytest.mark.parametrize("case", CASES, ids=str)
@every_method
def test_exit_models_predict_what_predict_does(case, method):
    local = trained(case.name, method)
    numbers = [e.number for e in local.exits]
    total = len(local.parts)
    assert numbers == ([total] if method.predicts == "none" else list(range(1, total + 1)))
    x = case.inputs(5)
    everything = local.predict_all(x)
    assert list(everything) == numbers
    for entry in local.exits:
        logits = local.predict(x, exit=entry.number)
        assert logits.shape == (5, CLASSES)
        assert torch.equal(everything[entry.number], logits)
        alone = copy.deepcopy(local.exit_model(entry.number)).eval()
        assert sum(p.numel() for p in alone.parameters()) == entry.parameters
        with torch.no_grad():
            assert torch.equal(alone(x), logits)
    sizes = [e.parameters for e in local.exits]
    assert len(numbers) == 1 or sizes[0] < sum(p.numel() for p in local.parameters())


@every_method
def test_an_exit_has_no_training_only_weights(method):
    local = trained("cnn", method)
    for entry in local.exits:
        model = local.exit_model(entry.number).eval()
        x = BY_NAME["cnn"].inputs()
        grads = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
        assert all(g is not None for g in grads), "a weight that the prediction does not depend on"


def test_al_s_own_classifier_is_trained_and_not_on_the_path():
    local = trained("cnn", get_method("al"))
    case = BY_NAME["cnn"]
    before = copy.deepcopy(local.to_standard().state_dict())
    local.train_step(case.inputs(seed=9), case.targets(seed=9), local.optimizers(sgd))
    last = list(before)[-2]
    assert not torch.equal(before[last], local.to_standard().state_dict()[last])
    names = [n for n, _ in local.exit_model(3).named_parameters()]
    assert not any(n.endswith("14.weight") for n in names)


def test_predict_leaves_every_module_s_mode_as_it_is():
    local = trained("cnn", get_method("early_exit"))
    local.train()
    frozen = local.to_standard()[1]
    frozen.eval()
    local.predict(BY_NAME["cnn"].inputs())
    assert local.training and not frozen.training and local.to_standard()[4].training


def test_unknown_exit_and_missing_prediction_are_told():
    local = trained("cnn", get_method("scpl"))
    with pytest.raises(ConfigError, match=r"no exit 4: this model has 3 parts"):
        local.predict(BY_NAME["cnn"].inputs(), exit=4)
    with pytest.raises(MethodError, match=r"'scpl' has no prediction at exit 1 of 3"):
        local.predict(BY_NAME["cnn"].inputs(), exit=1)
    with pytest.raises(MethodError):
        local.exit_model(2)


@pytest.mark.parametrize("name", ["mlp", "cnn", "train_only_branch", "encoder"])
@every_method
def test_a_copy_is_independent_and_whole(name, method):
    local = trained(name, method)
    other = copy.deepcopy(local)
    case = BY_NAME[name]
    mine = {id(p) for p in local.parameters()}
    assert not mine & {id(p) for p in other.parameters()}
    inside = {id(p) for p in other.to_standard().parameters()}
    assert inside == {id(p) for p in other.parts.parameters()}
    torch.manual_seed(3)
    local.train_step(case.inputs(), case.targets(), local.optimizers(sgd))
    torch.manual_seed(3)
    other.train_step(case.inputs(), case.targets(), other.optimizers(sgd))
    for (label, p), q in zip(local.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), label


@every_method
@pytest.mark.parametrize("case", CASES, ids=str)
def test_to_converts_parts_heads_and_model_together(case, method):
    local = trained(case.name, method)
    local.double()
    assert all(p.dtype == torch.float64 for p in local.parameters())
    assert {id(p) for p in local.parts.parameters()} == {id(p) for p in local.to_standard().parameters()}
    x = case.inputs()
    x = x.double() if x.is_floating_point() else x
    local.train_step(x, case.targets(), local.optimizers(sgd))
    local.eval()
    assert local.predict(x).dtype == torch.float64


def test_train_and_eval_reach_the_model_and_back():
    local = trained("dropouts", get_method("scpl"))
    local.eval()
    assert not any(m.training for m in local.to_standard().modules())
    x = BY_NAME["dropouts"].inputs()
    assert torch.equal(local(x), local(x))
    local.train()
    assert not torch.equal(local(x), local(x))


def test_a_state_dict_goes_round():
    local, other = trained("cnn", get_method("al")), trained("cnn", get_method("al"))
    local.train_step(BY_NAME["cnn"].inputs(), BY_NAME["cnn"].targets(), local.optimizers(sgd))
    other.load_state_dict(local.state_dict())
    x = BY_NAME["cnn"].inputs()
    assert torch.equal(local.predict(x), other.predict(x))


@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "bp"], ids=method_id)
@pytest.mark.parametrize("freeze", [True, False])
def test_append_part_grows_a_trained_model(method, freeze):
    """AL, section 2.2.2: a new layer on top, the layers below fixed or trained on."""
    case = BY_NAME["cnn"]
    local = trained("cnn", method, cuts=["2", "5"])
    below = copy.deepcopy(dict(local.named_parameters()))
    exits = [e.number for e in local.exits]
    module = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, CLASSES))
    local.append_part(module, freeze_below=freeze)
    assert len(local.parts) == 4 == len(local.heads) == len(local.plan.parts)
    assert [e.number for e in local.exits] == ([4] if exits == [3] else [1, 2, 3, 4])
    losses = [
        local.train_step(case.inputs(), case.targets(), local.optimizers(sgd)).losses[-1] for _ in range(30)
    ]
    assert losses[-1] < losses[0]
    after = dict(local.named_parameters())
    moved = [n for n, p in below.items() if not torch.equal(p, after[n])]
    assert (not moved) if freeze else moved
    assert local.predict(case.inputs()).shape == (8, CLASSES)
    assert str(local.plan).count("\n") >= 5


def test_append_part_checks_what_it_is_given():
    local = trained("cnn", get_method("early_exit"), cuts=["2", "5"])
    with pytest.raises(ConfigError, match="does not take the top part's hidden state"):
        local.append_part(nn.Linear(7, CLASSES))
    with pytest.raises(ConfigError, match="must give 5 logits"):
        local.append_part(nn.Linear(48, 3))
    assert len(local.parts) == 3


def test_optimizers_are_one_a_part_and_two_where_heads_are_separate():
    assert len(trained("cnn", get_method("scpl")).optimizers(sgd)) == 3
    lct = trained("cnn", get_method("lct")).optimizers(sgd)
    assert [type(o).__name__ for o in lct] == ["SGD", "Adam", "SGD", "Adam", "SGD"]
    assert lct[1].param_groups[0]["lr"] == 1e-4


def test_an_optimizer_of_foreign_parameters_is_told():
    local = trained("mlp", get_method("scpl"))
    with pytest.raises(ConfigError, match="neither part nor head"):
        local.train_step(BY_NAME["mlp"].inputs(), BY_NAME["mlp"].targets(), [sgd([nn.Parameter(torch.zeros(3))])])


def test_what_no_optimizer_holds_is_told_once(caplog):
    """Optimizers of some parts only: allowed (users freeze on purpose), but the others silently did not train."""
    local, x, y = trained("mlp", get_method("early_exit")), BY_NAME["mlp"].inputs(), BY_NAME["mlp"].targets()
    optimizers = local.optimizers(sgd)
    caplog.set_level("WARNING")
    local.train_step(x, y, optimizers)
    assert not caplog.records
    for _ in range(2):
        local.train_step(x, y, optimizers[1:])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "part 1, head 1;" in caplog.text
    for frozen in (local.parts[0], local.heads[0]):
        frozen.requires_grad_(False)
    caplog.clear()
    local.train_step(x, y, local.optimizers(sgd))
    assert not caplog.records


def test_the_plan_prints_and_is_plain_data():
    import json

    local = trained("residual", get_method("scpl"))
    table = str(local.plan)
    assert "imbalance" in table and table.count("\n") == 4
    assert json.loads(json.dumps(local.plan.to_dict()))["cuts"] == list(local.plan.cuts)


@pytest.mark.parametrize("parts", [1, 3])
def test_conversion_and_exits_leave_frozen_layers_in_eval(parts):
    """A frozen batch norm, the usual fine-tuning set-up, was set to train by the conversion."""
    case = BY_NAME["cnn"]
    model = build(case).train()
    model[1].eval()
    local = to_local(model, case.inputs(), method="early_exit", parts=parts)
    local.predict(case.inputs())
    local.exit_model(1)
    assert [m.training for m in model] == [i != 1 for i in range(len(model))]
    assert local.training and all(part.training for part in local.parts)


def test_a_mapping_is_keyword_arguments_everywhere():
    from collections import UserDict

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, image, scale=None):
            return self.b(torch.relu(self.a(image)))

    inputs = UserDict(image=torch.randn(4, 4))
    local = to_local(Net(), inputs, method="early_exit", parts=2)
    assert local.predict(inputs).shape == (4, 3)
    local.train_step(inputs, torch.tensor([0, 1, 2, 0]), local.optimizers(sgd))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_and_its_exits_go_through_torch_save(case, parts, tmp_path):
    """Generated code could not be pickled."""
    local = to_local(build(case), case.inputs(), method="al" if parts > 1 else "early_exit", parts=parts)
    x = case.inputs()
    for module in (local, local.exit_model(parts)):
        torch.save(module, tmp_path / "module.pt")
        again = torch.load(tmp_path / "module.pt", weights_only=False).eval()
        with torch.no_grad():
            assert torch.equal(again(x), module.eval()(x))
