"""What autograd keeps is counted node by node, whatever a node does inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from localize.convert.interpret import CostRun
from localize.convert.profile import profile
from localize.convert.record import trace

X = torch.randn(6, 4)
BYTES = X.numel() * 4


class Descent(nn.Module):
    """One step down an energy: it computes gradients in its forward."""

    def __init__(self, create_graph: bool) -> None:
        super().__init__()
        self.layer, self.create_graph = nn.Linear(4, 4), create_graph

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x if x.requires_grad else x.clone().requires_grad_()
            energy = torch.tanh(self.layer(place)).pow(2).sum()
            return x - torch.autograd.grad(energy, place, create_graph=self.create_graph)[0]


def saved(model: nn.Module) -> dict[str, int]:
    nodes = profile(trace(model, (X,), {})).nodes
    return {name: sum(nbytes for _, nbytes in node.saved) for name, node in nodes.items()}


def test_a_leaf_that_computes_gradients() -> None:
    """Its own graph is gone when it is done, and costs nothing; one that it keeps is counted."""
    assert saved(nn.Sequential(nn.Linear(4, 4), Descent(False), nn.Linear(4, 3)))["_1"] == 0
    assert saved(nn.Sequential(nn.Linear(4, 4), Descent(True), nn.Linear(4, 3)))["_1"] >= 3 * BYTES


def test_what_is_dropped_inside_a_leaf_is_not_saved() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.exp().pow(2)
            return x.tanh()

    assert saved(nn.Sequential(nn.Linear(4, 4), Looks(), nn.Linear(4, 3)))["_1"] == BYTES


def test_no_backward_after_the_node() -> None:
    traced = trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (X,), {})
    run = CostRun(traced, True, {}, [])
    with run.watching():
        output = run.run(X)[0]
    with pytest.raises(RuntimeError, match="no backward"):
        output.sum().backward()


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_sparse_tensors(layout: str) -> None:
    """Buffers that are left out of the count, and one that is not."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            dense = (torch.arange(16).view(4, 4) % 3 == 0).float()
            self.register_buffer("edges", dense.to_sparse(layout=getattr(torch, f"sparse_{layout}")))

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.edges @ torch.relu(self.first(x)).t()).t())

    model = Graph()
    found = saved(model)
    assert found["relu"] == found["last"] == BYTES
    assert found["matmul"] == 0
    traced = trace(model, (X,), {})
    counted = CostRun(traced, True, {}, [])
    with counted.watching():
        counted.run(X)
    edges = model.edges
    names = {"coo": ["indices"], "csr": ["crow_indices", "col_indices"], "csc": ["ccol_indices", "row_indices"]}
    held = [getattr(edges, name)() for name in ("values", *names[layout])]
    assert sum(counted.saved["matmul"].values()) == sum(t.untyped_storage().nbytes() for t in held)
