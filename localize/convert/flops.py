"""Forward floating-point operations of every operator that runs, a multiply-add counted as two.

What multiplies matrices, convolves or attends counts. Additions, activations, normalisations, pooling, lookups and
Fourier transforms are 0, as they are in torch's own counts: their time is that of moving memory. A checkpointed
block counts once, its forward; running it again is part of the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of all operators dispatched while it is active.

    Torch's own formulas (those of ``FlopCounterMode``) come first; its module tracking, which is most of the
    time ``FlopCounterMode`` takes, is not needed here. Formulas of this file cover what torch counts as 0.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.flops = 0
        self.workspaces: dict[int, int] = {}  # storage address -> bytes a fake kernel did not report

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _FORMULAS:
            self.flops += _FORMULAS[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=out))
        if packet is aten.mkldnn_rnn_layer:
            self._note_workspace(args[0], out)
        return out

    def _note_workspace(self, x: Tensor, out: Sequence[Tensor]) -> None:
        """oneDNN keeps a work space for the backward pass of an LSTM layer; the fake kernel reports it empty.

        Its size is the library's secret. Fitted: N·(T·(9H + 6·max(I, H)) + 10H) numbers, within 5 % of the
        true size from some ten samples on.
        """
        workspace = out[3]
        if workspace.numel() == 0 and x.dim() == 3:
            (steps, samples, inputs), hidden = x.shape, out[0].shape[-1]
            numbers = samples * (steps * (9 * hidden + 6 * max(inputs, hidden)) + 10 * hidden)
            self.workspaces[workspace.untyped_storage()._cdata] = numbers * x.element_size()


def _matrix_flops(rows: int, weights: Sequence[Tensor]) -> int:
    """Every weight matrix is multiplied with ``rows`` vectors; vectors among the weights are biases."""
    return 2 * rows * sum(w.numel() for w in weights if w.dim() == 2)


def _mkldnn_rnn(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    """One direction of one LSTM layer: 2·T·N·(4H·I + 4H·H)."""
    return _matrix_flops(math.prod(x.shape[:-1]), [w_input, w_hidden])


def _cudnn_rnn(x: Tensor, weight: Sequence[Tensor], *_: Any, **__: Any) -> int:
    """All layers and directions at once; ``x`` is (T, N, I), or (sum of lengths, I) when packed."""
    return _matrix_flops(math.prod(x.shape[:-1]), weight)


def _attention(tokens: int, keys: int, width: int) -> int:
    """Scores and weighted sum of ``tokens`` queries over ``keys`` keys, all heads together."""
    return 2 * 2 * tokens * keys * width


def _fused_attention(query: Tensor, key: Tensor, *args: Any, **_: Any) -> int:
    """``nn.MultiheadAttention``'s fused inference kernel: projections, N·T·4D² multiply-adds, and attention."""
    n, t, d = query.shape
    s = key.shape[1]
    return 2 * (2 * n * t * d * d + 2 * n * s * d * d) + _attention(n * t, s, d)


_BEFORE_MASK = 15  # arguments between the number of heads and the mask, which is a matrix but no weight


def _fused_encoder_layer(src: Tensor, embed_dim: int, num_heads: int, *weights: Any, **_: Any) -> int:
    """``nn.TransformerEncoderLayer``'s fused inference kernel: its four weight matrices and the attention."""
    n, t, d = src.shape
    matrices = [w for w in weights[:_BEFORE_MASK] if isinstance(w, Tensor)]
    return _matrix_flops(n * t, matrices) + _attention(n * t, t, d)


def _matrix_vector(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


def _add_matrix_vector(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


def _add_batched(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """``addbmm``: the sum over N of (N, T, D) times (N, D, S)."""
    return 2 * a.numel() * b.shape[-1]


def _bilinear(x: Tensor, weight: Tensor, y: Tensor, *_: Any, **__: Any) -> int:
    """``nn.Bilinear``: (N, I) and (N, J) with weights (O, I, J). First N·O·I·J multiply-adds, then N·O·J."""
    outputs, i, j = weight.shape
    return 2 * x.shape[0] * outputs * j * (i + 1)


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """``grouped_mm`` of experts: every row (or column, or both) of one meets one group of the other."""
    groups = a.shape[0] if a.dim() > b.dim() else 1
    return 2 * a.numel() // groups * b.shape[-1]


def _distances(x: Tensor, y: Tensor, *_: Any, **__: Any) -> int:
    """``cdist`` of (…, P, D) and (…, R, D): a multiply-add for each of the D differences of each pair."""
    samples = int(math.prod(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])))
    return 2 * samples * x.shape[-2] * y.shape[-2] * x.shape[-1]


def _sparse(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """A sparse matrix times a dense one: what is stored of it, times every column."""
    return 2 * int(a._nnz()) * b.shape[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mkldnn_rnn_layer: _mkldnn_rnn,
    aten._cudnn_rnn: _cudnn_rnn,
    aten._native_multi_head_attention: _fused_attention,
    aten._transformer_encoder_layer_fwd: _fused_encoder_layer,
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten.addbmm: _add_batched,
    aten._trilinear: _bilinear,
    aten._grouped_mm: _grouped,
    aten._cdist_forward: _distances,
    aten._sparse_addmm: _sparse,
}
