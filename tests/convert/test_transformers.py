"""Models of the transformers library: parts are the model, one of a kind; the whole suite is a benchmark."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from localize import CutError, MethodError, list_methods, to_local
from localize.source import load_source
from tests.convert.recording import assert_untouched, capture, runner, state_of

pytest.importorskip("transformers")
from benchmarks.suites import Case
from benchmarks.suites import transformers_models as suite

CUT = [
    "bert-classification",
    "gpt2-lm-untied",
    "bart-lm-untied",
    "mixtral-lm",
    "mamba-base",
]
TIED = ["t5-lm", "gpt2-lm"]  # the embedding is the last layer, too: captured, but not cut
ONE_TARGET_A_SAMPLE = ("scpl", "al")  # nothing for the next token
TRAINED = [("bert-classification", method) for method in list_methods()] + [("llama-lm", "nwise")]


@pytest.mark.parametrize("name", CUT)
def test_parts_are_the_model(name: str) -> None:
    case = suite.build(name)
    local = _convert(case, "bp")
    assert len(local.parts) == 4
    for call in (case.inputs, _one_more(case.inputs)):
        for training in (True, False):
            local.train(training)
            expected = _run(case.model, lambda c=call: case.model(**copy.deepcopy(c)))
            found = _run(case.model, lambda c=call: local(**copy.deepcopy(c)))
            assert _differences(expected, found) == []


@pytest.mark.parametrize("name", TIED)
def test_a_model_with_a_tied_last_layer_is_captured(name: str) -> None:
    case = suite.build(name)
    traced = capture(case.model, **case.inputs)
    for training in (True, False):
        case.model.train(training)
        expected = _run(case.model, lambda: case.model(**case.inputs))
        found = _run(case.model, lambda t=training: runner(traced, t)(**case.inputs))
        assert _differences(expected, found) == []


def test_a_tied_last_layer_is_not_cut_off_silently() -> None:
    case = suite.build("gpt2-lm")
    with pytest.raises(CutError, match="wte"):
        _convert(case, "bp")


def test_a_batch_without_padding_is_right_where_the_example_had_some() -> None:
    case = suite.build("bert-classification")
    local = _convert(case, "bp").eval()
    full = {**case.inputs, "attention_mask": torch.ones_like(case.inputs["attention_mask"])}
    with torch.no_grad():
        torch.testing.assert_close(local(**full).logits, case.model(**full).logits)


def test_lazily_installed_hooks_are_not_left_behind() -> None:
    """The first forward installs hooks that collect hidden states; twice the hooks, twice the states."""
    case = suite.build("segformer-segmentation")
    before = state_of(case.model)
    hooks = [len(module._forward_hooks) for module in case.model.modules()]
    _convert(case, "bp")
    assert [len(module._forward_hooks) for module in case.model.modules()] == hooks
    assert_untouched(case.model, before)
    case.model(**case.inputs)
    case.model(**case.inputs)


@pytest.mark.parametrize(("name", "method"), TRAINED)
def test_one_step_with_every_method(name: str, method: str) -> None:
    case = suite.build(name)
    local = _convert(case, method)
    before = [p.detach().clone() for p in local.parameters()]
    optimizers = local.optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    # Four samples, two of a kind: with fewer, a contrastive loss has nothing to compare.
    inputs = {key: torch.cat([value, value]) for key, value in case.inputs.items()}
    result = local.train_step(inputs, torch.cat([case.target, case.target]), optimizers)
    assert all(torch.isfinite(loss) for loss in result.losses)
    moved = [not torch.equal(old, new) for old, new in zip(before, local.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("method", ONE_TARGET_A_SAMPLE)
def test_a_method_that_does_not_fit_names_those_that_do(method: str) -> None:
    with pytest.raises(MethodError, match="Use nwise"):
        _convert(suite.build("llama-lm"), method)


def test_a_model_by_its_name_is_converted() -> None:
    sizes = "num_hidden_layers=4&hidden_size=32&num_attention_heads=4&intermediate_size=64&vocab_size=99"
    model = load_source(f"transformers:bert?{sizes}&num_labels=3")
    local = to_local(model, suite.build("bert-classification").inputs, method="bp", parts=4)
    assert len(local.parts) == 4
    assert local.task.num_classes == 3


def _convert(case: Case, method: str) -> Any:
    return to_local(
        case.model, case.inputs, method=method, parts=4, task=case.task, loss=case.loss, verify=False
    )


def _one_more(inputs: dict[str, Any]) -> dict[str, Any]:
    """The call with one sample more."""
    return {name: torch.cat([v, v[:1]]) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def _run(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Any]:
    """Output, buffers and the gradients of a random weighting of all outputs, from one seed."""
    torch.manual_seed(3)
    model.zero_grad()
    output = forward()
    leaves = list(_leaves(output))
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    weights = torch.Generator().manual_seed(5)
    torch.autograd.backward(tensors, [torch.randn(t.shape, generator=weights) for t in tensors])
    return {
        "type": type(output),
        **{f"output {i}": leaf for i, leaf in enumerate(leaves)},
        **{f"gradient {name}": p.grad for name, p in model.named_parameters()},
        **{f"buffer {name}": b.clone() for name, b in model.named_buffers()},
    }


def _leaves(value: Any) -> Iterator[Any]:
    """Tensors, numbers and the rest, also inside objects that nobody registered: caches of keys and values."""
    for leaf in pytree.tree_leaves(value):
        if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor | type):
            yield type(leaf)
            yield from _leaves([item for _, item in sorted(vars(leaf).items())])
        else:
            yield leaf


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    assert expected.keys() == found.keys()
    return [name for name, value in expected.items() if not _equal(value, found[name])]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
