"""Other ways to compute: torch.func, scripted and compiled modules, einops, FFT, sparse and quantised tensors."""

from __future__ import annotations

import einops
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, T, block, root, sequences


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)


@block()
class FunctionalCall(Inner):
    """``torch.func.functional_call`` with weights that were changed."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: p * 0.5 for name, p in self.linear.named_parameters()}
        return torch.func.functional_call(self.linear, weights, (x,))


@root(refused="functional_call")
class FunctionalCallAtRoot(Layers):
    """The same in the root, on a layer that is called as usual too."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.func.functional_call(self.b, {"weight": self.b.weight * 0.5 + 0.1}, (torch.relu(self.b(x)),))
        return self.last(torch.relu(self.c(x)))


@block()
class VmapInBlock(Inner):
    """``vmap`` over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: F.linear(row, self.linear.weight).softmax(0) * row.sum())(x)


@root()
class VmapAtRoot(Layers):
    """``vmap`` in the root, with a layer inside."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.vmap(lambda row: self.b(row).softmax(0) * row.sum())(x)
        return self.last(torch.relu(self.c(x)))


@block()
class GradientInBlock(nn.Module):
    """The output is the gradient of an energy: ``torch.autograd.grad`` with ``create_graph``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.two(torch.tanh(self.one(place))).sum()
            return x - torch.autograd.grad(energy, place, create_graph=True)[0]


@root(refused="grad|recorder cannot see")
class GradientAtRoot(Layers):
    """The same in the root: forces from an energy."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = self.a(x)
            energy = torch.tanh(self.b(place)).square().sum()
            force = torch.autograd.grad(energy, place, create_graph=True)[0]
        return self.last(torch.relu(self.c(force)))


@root()
class ScriptedInside(nn.Module):
    """Scripted and traced submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.BatchNorm1d(D)))
        self.traced = torch.jit.trace(nn.Sequential(nn.Linear(D, D), nn.Tanh()), torch.ones(2, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.traced(self.scripted(torch.relu(self.first(x)))))


@torch.jit.script
def scripted_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))


@block()
class ScriptedFunction(Inner):
    """A scripted function in a block."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(scripted_gelu(x))


@root(refused="scripted")
class ScriptedFunctionAtRoot(Layers):
    """A scripted function in the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(scripted_gelu(self.b(scripted_gelu(self.a(x)))))


@root()
class CompiledInside(nn.Module):
    """A submodule under ``torch.compile``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.compiled = torch.compile(nn.Sequential(nn.Linear(D, D), nn.ReLU()), backend="eager")
        self.between = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.compiled(torch.relu(self.first(x)))))


@root(sequences)
class Einops(nn.Module):
    """``rearrange``, ``reduce``, ``repeat``, an einops layer and ``einsum``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.swap = nn.Sequential(Rearrange("n t d -> n d t"), nn.Linear(T, T), Rearrange("n d t -> n t d"))
        self.token = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.swap(self.first(x))
        heads = einops.rearrange(x, "n t (h e) -> n h t e", h=2)
        scores = torch.einsum("nhte,nhse->nhts", heads, heads).softmax(-1)
        x = einops.rearrange(scores @ heads, "n h t e -> n t (h e)")
        x = torch.cat([einops.repeat(self.token, "d -> n 1 d", n=x.shape[0]), self.between(x)], 1)
        return self.last(einops.reduce(x, "n t d -> n d", "mean"))


@root(sequences)
class Frequencies(nn.Module):
    """FFT with complex weights, as in FNet and Fourier operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.weight = nn.Parameter(torch.randn(D, D, dtype=torch.cfloat) * 0.3)
        self.between = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        spectrum = torch.fft.rfft(x, dim=1)[:, :3] @ self.weight
        x = self.between(torch.fft.irfft(spectrum, n=x.shape[1], dim=1)) + torch.fft.fft2(x).real
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones(4), torch.ones(4))
        return self.last(torch.view_as_real(turned).flatten(-2).mean(1))


@root()
class SparseAdjacency(Layers):
    """A sparse matrix as a buffer, and one made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", (torch.rand(D, D) > 0.6).float().to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sparse.mm(self.adjacency, torch.relu(self.a(x)).t()).t()
        rows = torch.arange(x.shape[0])
        eye = torch.sparse_coo_tensor(torch.stack([rows, rows.flip(0)]), torch.ones(x.shape[0]), (x.shape[0],) * 2)
        return self.last(torch.relu(self.b(x)) + eye @ x)


@block()
class FakeQuantised(Inner):
    """Fake quantisation by torch's own operators and by rounding with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, -128, 127)
        weight = self.linear.weight
        weight = weight + (torch.round(weight * 16) / 16 - weight).detach()
        return F.linear(x.half().float(), weight, self.linear.bias)


@root(refused="nested|layout")
class NestedTensors(Layers):
    """Jagged nested tensors."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        nested = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 1, x.shape[0]]))
        return self.last(torch.relu(self.b(nested)).values())
