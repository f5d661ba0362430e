"""The property: a converted module is the module, bit for bit, whatever ``to_local``'s own ``verify`` says."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from localize import LocalModel, to_local
from localize.errors import CutError, TraceError
from tests.random_modules.program import LENGTH, Program, backward, seed_all, tensors_in


@dataclass
class Outcome:
    """What became of a program."""

    parts: int = 0  # 0: it was refused
    refusal: str = ""
    guarded: list[str] = field(default_factory=list)  # calls of another shape that a guard refused


def convert(program: Program, verify: bool, method: Any = "bp") -> tuple[nn.Module, LocalModel | None, str]:
    """The model, its conversion into as many of ``program.parts`` as it has places for, and why there is none."""
    model = program.build()
    task = "classification" if program.logits else "regression"
    for parts in range(program.parts, 1, -1):
        try:
            return model, to_local(model, program.example(), method=method, parts=parts, task=task, verify=verify), ""
        except (CutError, TraceError) as refusal:
            reason = f"{type(refusal).__name__}: {refusal}"
            if isinstance(refusal, TraceError):
                break
    assert len(reason) > 40, reason  # a message says what to do
    return model, None, reason


def check_same(program: Program, verify: bool) -> Outcome:
    """Converts the program's module and compares it with the module; raises ``AssertionError`` at a difference."""
    plain = program.build()
    model, local, refusal = convert(program, verify)
    assert_same_state(plain, model, "after the conversion")
    if local is None:
        return Outcome(refusal=refusal)
    outcome = Outcome(parts=len(local.parts))
    for training in (True, False):
        plain.train(training)
        local.train(training)
        model.train(training)
        for seed in (0, 1):  # the second call sees the buffers that the first one left, and other values
            what = f"{_mode(training)}, call {seed + 1}"
            with unchanged(plain, model) as undo:
                try:
                    _compare(program, plain, model, local, what, program.call(seed=seed), seed)
                except TraceError as guard:
                    outcome.guarded.append(f"{what}: {guard}")
                else:
                    undo.clear()
    for training in (False, True):
        for batch, length in ((program.batch + 1, LENGTH), (program.batch, LENGTH + 2)):
            if not program.works(training, batch, length):
                continue
            plain.train(training)
            local.train(training)
            model.train(training)
            what = f"{_mode(training)}, batch {batch}, length {length}"
            with unchanged(plain, model):
                try:
                    _compare(program, plain, model, local, what, program.call(batch, 2, length), 2)
                except TraceError as guard:
                    outcome.guarded.append(f"{what}: {guard}")
    for module in (plain, local, model):
        module.eval()
    with torch.no_grad(), contextlib.suppress(TraceError):
        _compare(program, plain, model, local, "eval without gradients", program.call(seed=3), 3)
    return outcome


def _mode(training: bool) -> str:
    return "train" if training else "eval"


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[list[Any]]:
    """Puts parameters, buffers and attributes back, unless what it yields is emptied: a guard stops a call halfway."""
    tables = [table for model in models for m in model.modules() for table in (vars(m), m._buffers, m._parameters)]
    held: list[Any] = [(table, _copied(table)) for table in tables]
    held += [(value, _copied(value)) for table in tables for value in table.values() if type(value) in (list, dict)]
    tensors = {id(t): t for table in tables for t in tensors_in(dict(table))}
    values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    try:
        yield held
    finally:
        for container, content in held:
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)
        for tensor, value in values if held else ():
            tensor.data.copy_(value)


def _copied(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _compare(
    program: Program, plain: nn.Module, model: nn.Module, local: LocalModel, what: str, call: Any, seed: int
) -> None:
    inputs, twin = tensors_in(call), copy.deepcopy(call)
    plain.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    seed_all(seed)
    expected = plain(**call)
    seed_all(seed)
    found = local(**twin)
    assert_equal(expected, found, f"{what}: output")
    assert_equal(call, twin, f"{what}: inputs afterwards")
    assert_same_state(plain, model, what)
    if not torch.is_grad_enabled():
        return
    backward(expected, seed)
    backward(found, seed)
    assert_equal(_grads(inputs), _grads(tensors_in(twin)), f"{what}: gradients of inputs")
    ours = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert_equal(parameter.grad, ours[name].grad, f"{what}: gradient of {name}")


def _grads(tensors: list[Tensor]) -> list[Tensor | None]:
    return [tensor.grad for tensor in tensors]


def assert_same_state(plain: nn.Module, model: nn.Module, what: str) -> None:
    """Parameters and buffers are equal."""
    for kind in ("parameters", "buffers"):
        one, two = dict(getattr(plain, f"named_{kind}")()), dict(getattr(model, f"named_{kind}")())
        assert one.keys() == two.keys(), f"{what}: {kind}"
        for name in one:
            assert_equal(one[name], two[name], f"{what}: {kind} {name}")


def assert_equal(expected: Any, found: Any, what: str) -> None:
    """One structure, equal types and tensors equal bit for bit."""
    assert type(expected) is type(found), f"{what}: {type(found)} instead of {type(expected)}"
    if isinstance(expected, Tensor):
        assert expected.dtype == found.dtype and expected.shape == found.shape, (
            f"{what}: {tuple(found.shape)} {found.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
        )
        assert expected.requires_grad == found.requires_grad, f"{what}: requires_grad is {found.requires_grad}"
        same = torch.equal(expected.detach().nan_to_num(), found.detach().nan_to_num())
        assert same, f"{what}: differs by {(expected.double() - found.double()).abs().max().item()}"
    elif isinstance(expected, dict):
        assert list(expected) == list(found), what
        for key in expected:
            assert_equal(expected[key], found[key], f"{what}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found), what
        for i, (one, two) in enumerate(zip(expected, found, strict=True)):
            assert_equal(one, two, f"{what}[{i}]")
    else:
        assert expected == found, f"{what}: {found!r} instead of {expected!r}"
