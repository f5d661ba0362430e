"""Attention and transformers of torch's own, with masks and weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import C, D, T, generator, root, sequences


def masked(batch: int, seed: int, length: int = T) -> dict[str, Tensor]:
    """(N, T, D) and a mask (N, T) that is True at padding."""
    lengths = torch.randint(2, length + 1, (batch,), generator=generator(seed))
    x = torch.randn(batch, length, D, generator=generator(seed))
    return {"x": x, "padding": torch.arange(length)[None] >= lengths[:, None]}


@root(masked)
class AttentionWeights(nn.Module):
    """``need_weights``, a causal mask, a padding mask; the weights are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.one = nn.MultiheadAttention(D, 2, batch_first=True)
        self.two = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.first(x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y, weights = self.one(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=True)
        x = x + y
        z, mean = self.two(x, x, x, key_padding_mask=padding, average_attn_weights=False)
        w, nothing = self.two(z, x, x, need_weights=False)
        assert nothing is None
        return self.last(w.mean(1)), [weights, mean]


@root(masked)
class EncoderDecoder(nn.Module):
    """``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` with masks of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 16, 0.0, batch_first=True), 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.first(x)
        memory = self.encoder(x, src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.decoder(x, memory, tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=True)
        return self.last(y.masked_fill(padding[..., None], 0).sum(1))


@root(sequences)
class WholeTransformer(nn.Module):
    """``nn.Transformer`` with time first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.transformer = nn.Transformer(D, 2, 1, 1, 16, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(0, 1)
        return self.last(self.transformer(x, x[:4])[-1])


class ByHand(nn.Module):
    """``F.multi_head_attention_forward`` with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Parameter(torch.randn(3 * D, D) * 0.3)
        self.bias, self.out = nn.Parameter(torch.zeros(3 * D)), nn.Linear(D, D)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            D,
            2,
            self.project,
            self.bias,
            None,
            None,
            False,
            0.0,
            self.out.weight,
            self.out.bias,
            training=self.training,
            key_padding_mask=padding,
            need_weights=False,
        )
        return y.transpose(0, 1)


@root(masked)
class FunctionalAttention(nn.Module):
    """Attention by function, in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(D, D), ByHand(), ByHand(), nn.Linear(D, C)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.one(x, padding)
        return self.last((x + self.two(x, padding=padding)).mean(1))


@root(sequences, random=True)
class ScaledDotProduct(nn.Module):
    """``F.scaled_dot_product_attention`` with dropout by the training flag, split heads, a bias made of sizes."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.slopes = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Parameter(torch.rand(2))

        def forward(self, x: Tensor) -> Tensor:
            n, t, d = x.shape
            q, k, v = self.qkv(x).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
            place = torch.arange(t, device=x.device)
            bias = -(place[:, None] - place[None]).abs() * self.slopes[:, None, None]
            rate = 0.2 if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(n, -1, -1, -1), dropout_p=rate)
            return self.out(y.transpose(1, 2).reshape(n, t, d))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.layers = nn.ModuleList([self.Layer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x.mean(1))


@root(masked)
class FloatMaskForAll(nn.Module):
    """A floating-point mask is made once and read by every layer. It needs no gradient, which decides on the kernel."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)
            return self.out(y) * (2 if mask.requires_grad else 1)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.layers = nn.ModuleList([self.Layer() for _ in range(3)])

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        mask = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
        mask = mask[:, None, None].expand(-1, 1, x.shape[1], -1)
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x, mask)
        return self.last(x.mean(1))
