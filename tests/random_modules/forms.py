"""What every generated source begins with, and how blocks are called."""

from __future__ import annotations

from dataclasses import dataclass

HEADER = """\
import dataclasses
import functools
import math
import random
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

GLOBAL = torch.tensor(1.25)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class State:
    x: torch.Tensor
    aux: object = None


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def helper(self, x):
    return x * 0.5
"""


@dataclass(frozen=True)
class Form:
    """How a block is called: parameters, the forward's first and last lines, the caller's lines."""

    parameters: str
    result: str
    call: str
    first: str = ""


FORMS = [
    Form("x", "return {n}", "{n} = {f}({v})"),
    Form("x", "return {n}", "{n} = {f}({v})"),
    Form("x", "return {n}", "{n} = {v} + {f}(x={v})"),
    Form("x, skip", "return {n} + skip", "{n} = {f}({v}, {o})"),
    Form("x, skip=None", "return {n} if skip is None else {n} + skip", "{n} = {f}({v}, skip={o})"),
    Form("x, skip=None", "return {n} if skip is None else {n} + skip", "{n} = {f}({v})"),
    Form("x, *, scale=2.0", "return {n} * scale", "{n} = {f}({v}, scale=0.5)"),
    Form("x, *rest, **options", "return {n} + sum(rest)", "{n} = {f}({v}, {o}, {v}, flag=True)"),
    Form("x, size", "return {n} / size", "{n} = {f}({v}, {v}.shape[0])"),
    Form("x", "return {n}, x", "{n}, aux = {f}({v})\n{n} = {n} + aux"),
    Form("x", "return {n}, x.shape[0]", "{n}, size = {f}({v})\n{n} = {n} * size"),
    Form("x", "return [{n}, None, {n} * 2]", "{n}, _, aux = {f}({v})\n{n} = {n} + aux"),
    Form("x", "return {{'x': {n}, 'aux': x.mean()}}", "found = {f}({v})\n{n} = found['x'] * found['aux']"),
    Form("x", "return Pair({n}, x)", "pair = {f}({v})\n{n} = pair.first - pair.second"),
    Form("x", "return State({n}, {n}.detach().mean())", "state = {f}({v})\n{n} = state.x + state.aux"),
    Form("given", "given['x'] = {n}\n    return given",
         "state = {f}({{'x': {v}, 'y': {o}}})\n{n} = state['x'] * state['y']",
         "x = given['x']"),
    Form("given", "given.x = {n}\n    return given", "state = {f}(State({v}))\n{n} = state.x", "x = given.x"),
    Form("xs", "return [{n}, *xs[1:]]", "{n} = sum({f}([{v}, {o}]))", "x = xs[0]"),
    Form("x, hidden=None", "return {n}, {n} * 0.5",
         "{n}, hidden = {f}({v})\n{n}, hidden = {f}({n}, hidden)\n{n} = {n} + hidden",
         "x = x if hidden is None else x + hidden"),
    Form("x", "self.seen = {n}\n    return x * 1.5", "{n} = {f}({v}) + {f}.seen"),
    Form("x, out", "out.append({n})\n    return x * 0.5", "kept = []\n{n} = {f}({v}, kept)\n{n} = {n} + kept[0]"),
    Form("x", "x.add_(1)\n    return {n}", "{n} = {v} + 0\n{n} = {f}({n}) + {n}"),
    Form("fn, x", "return fn({n})", "{n} = {f}(torch.tanh, {v})"),
]
