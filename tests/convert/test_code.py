"""Generated source refers to whatever a module may be called."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor, nn

from localize import to_local


class Keywords(nn.Module):
    """Registered under names that are Python's keywords, no names at all, or those of a part's own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"in": torch.full((4,), 2.0), "out": torch.ones(4)})
        inner = nn.ModuleDict({"is": nn.ParameterDict({"not": torch.full((4,), 3.0)})})
        self.blocks = nn.ModuleDict({"class": nn.Linear(4, 4), "0": inner})
        self.first = nn.Linear(4, 4)
        self.add_module("lambda", nn.Linear(4, 4))
        self.add_module("route", nn.ModuleDict({"for": nn.Linear(4, 3)}))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks["class"](torch.relu(self.first(x * self.scales["in"]))) * self.scales["out"]
        x = getattr(self, "lambda")(x * self.blocks["0"]["is"]["not"])
        return self.route["for"](x)


def test_names_that_are_keywords() -> None:
    model, x = Keywords(), torch.randn(3, 4)
    local = to_local(model, x, method="bp", parts=3)
    assert torch.equal(local(x), model(x))
    source = "".join(part.source_code for part in local.parts)
    assert 'getattr(self.scales, "in")' in source
    assert 'getattr(getattr(getattr(self.blocks, "0"), "is"), "not")' in source
    assert 'getattr(self.__getattr__("route"), "for")(' in source
    assert "self.scales.out" in source
    again = pickle.loads(pickle.dumps(local.parts[0].route.whole.run))
    assert again.source == local.parts[0].source_code
