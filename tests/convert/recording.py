"""What the capture's tests share: a model and its graph must do the same, and the model must not notice."""

from __future__ import annotations

import builtins
import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from localize.convert.record import trace
from localize.convert.traced import TracedModel

CALL, APPLY = nn.Module.__call__, vars(torch.autograd.Function)["apply"]
RANGE, LEN = builtins.range, builtins.len


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> TracedModel:
    """Traces and checks that the model, the generators and everything patched are as before."""
    before = state_of(model)
    traced = trace(model, args, kwargs)
    assert_untouched(model, before)
    return traced


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "flags": [m.training for m in model.modules()],
        "tensors": {n: (t, t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())},
        "attributes": [dict(vars(m)) for m in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state())),
        "grads": [p.grad for p in model.parameters()],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """Flags, tensors (objects and values), attributes, generators and patches are as they were."""
    after = state_of(model)
    assert after["flags"] == before["flags"]
    assert after["random"][1:] == before["random"][1:]
    assert torch.equal(after["random"][0], before["random"][0])
    assert all(a is b for a, b in zip(after["grads"], before["grads"], strict=True))
    for name, (tensor, value) in before["tensors"].items():
        assert after["tensors"][name][0] is tensor
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(value)), name
    for now, then in zip(after["attributes"], before["attributes"], strict=True):
        assert now.keys() == then.keys()
        assert all(now[k] is then[k] for k in then if k != "training")
    assert nn.Module.__call__ is CALL
    assert vars(torch.autograd.Function)["apply"] is APPLY
    assert builtins.range is RANGE
    assert builtins.len is LEN
    assert torch.overrides._get_current_function_mode() is None


def assert_same(model: nn.Module, traced: TracedModel, *args: Any, **kwargs: Any) -> None:
    """Outputs, gradients and buffers of graph and model are equal bit for bit, in train and in eval mode."""
    for training in (True, False):
        model.train(training)
        start = {n: b.clone() for n, b in model.named_buffers()}
        call, recorded = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
        expected = _run(model, start, lambda c=call: model(*c[0], **c[1]))
        run = runner(traced, training)
        found = _run(model, start, lambda c=recorded, r=run: r(*c[0], **c[1]))
        _assert_equal(expected, found)
        _restore(model, start)


def runner(traced: TracedModel, training: bool) -> Any:
    """The graph of one mode as a function with the model's own signature, and its source proven valid."""
    graph_module = runnable(traced, training)
    source = traced.graph(training).python_code("self")
    namespace = dict(source.globals)
    exec(source.src, namespace)

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = traced.signature.bind(args, kwargs)
        return traced.outputs[training].restore(namespace["forward"](graph_module, *leaves))

    return run


def runnable(traced: TracedModel, training: bool) -> fx.GraphModule:
    """The graph of one mode as a module. It shares all modules and tensors."""
    graph = traced.graph(training)
    targets = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    module = fx.GraphModule({}, fx.Graph())
    for target in sorted(targets, key=lambda t: t.count(".")):
        _install(module, target, traced.resolve(target))
    module.graph = graph
    return module


def run_graph(traced: TracedModel, leaves: Sequence[Tensor], training: bool) -> Any:
    """Runs the graph of one mode on flat inputs; the model's output in its own structure."""
    return traced.outputs[training].restore(runnable(traced, training)(*leaves))


def _install(module: nn.Module, target: str, value: Any) -> None:
    """Makes ``value`` an attribute at a dotted path; never writes into a module of the user's on the way."""
    *path, name = target.split(".")
    for step in path:
        if not hasattr(module, step):
            setattr(module, step, nn.Module())
        module = getattr(module, step)
        if type(module) is not nn.Module:
            return  # a module that was installed as a whole, and holds the target already
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value, persistent=False)
    else:
        setattr(module, name, value)


def _run(model: nn.Module, start: dict[str, Tensor], call: Any) -> dict[str, Any]:
    _restore(model, start)
    torch.manual_seed(3)
    model.zero_grad()
    output = call()
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if tensors:
        torch.autograd.backward([(t * torch.linspace(0, 1, t.numel()).view(t.shape)).sum() for t in tensors])
    return {
        "type": type(output),
        "output": pytree.tree_leaves(output),
        "grads": [p.grad for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
    }


def _restore(model: nn.Module, start: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(start[name])


def _assert_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert expected["type"] is found["type"]
    for key in ("output", "grads", "buffers"):
        assert len(expected[key]) == len(found[key])
        for a, b in zip(expected[key], found[key], strict=True):
            if isinstance(a, Tensor):
                assert isinstance(b, Tensor)
                assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), key
            else:
                assert a == b
