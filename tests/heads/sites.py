"""Hand-made places for heads, and a small MLP cut by hand."""

from itertools import pairwise

import torch
from torch import nn

from localize.heads.base import HeadSite
from localize.spec import TensorSpec
from localize.task import Task

CLASSES = 3


def make_site(
    number=1,
    parts=2,
    shape=(2, 8),
    layout="vector",
    task=None,
    classifier=None,
    batch_axis=0,
    dtype=torch.float32,
):
    task = task or Task("classification", CLASSES)
    output = {
        "classification": TensorSpec((2, CLASSES), dtype, 0, "vector"),
        "regression": TensorSpec((2, 4), dtype, 0, "vector"),
        "causal_lm": TensorSpec((2, 5, CLASSES), dtype, 0, "tokens"),
        "segmentation": TensorSpec((2, CLASSES, 16, 16), dtype, 0, "map"),
    }[task.kind]
    spec = TensorSpec(shape, dtype, batch_axis, layout)
    return HeadSite(number, parts, spec, task, classifier, output)


def mlp_parts(widths=(6, 8, 7, 5), seed=0):
    """Linear–Tanh parts in float64; the last width is the representation's (or the logits')."""
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(a, b), nn.Tanh()).double() for a, b in pairwise(widths)]


def data(n=9, width=6, classes=CLASSES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def build_heads(method, widths, classifier=None):
    """Heads of an MLP's parts with these output widths, in float64."""
    last = len(widths)
    return [
        method.build_head(
            make_site(k, last, (2, w), dtype=torch.float64, classifier=classifier if k == last else None)
        )
        for k, w in enumerate(widths, start=1)
    ]


def grads(module):
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_same_grads(fast, slow):
    """Gradients of two copies of a module agree, None for None."""
    one, two = grads(fast), grads(slow)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] is None) == (two[name] is None), name
        if one[name] is not None:
            torch.testing.assert_close(
                one[name], two[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
