"""Pieces of forward code, as data: each reads a value ``{v}`` and makes ``{n}`` of the same kind and width.

Kinds: ``v`` a vector (N, w), ``s`` a sequence (N, T, w), ``m`` a map (N, w, 4, 4). In a snippet ``{o}`` is another
value of the same kind and width, ``{a}`` a fresh attribute name, ``{l}`` a Linear(w, w) that the module has, ``{w}``
the width, ``{h}`` half of it. A snippet that changes the kind says so in ``to``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Snippet:
    """``lines`` of a forward and the ``init`` lines they need."""

    kinds: str
    lines: str
    init: str = ""
    to: str = ""  # the kind of ``{n}`` where it is another one
    weight: int = 2
    pending: str = ""  # what the conversion cannot do yet with it; such snippets are left out


def _all(kinds: str, *lines: str, weight: int = 2) -> list[Snippet]:
    return [Snippet(kinds, text, weight=weight) for text in lines]


LAYERS = [
    Snippet("vs", "{n} = self.{a}({v})", "self.{a} = nn.Linear({w}, {w})", weight=12),
    Snippet("vs", "{n} = torch.relu_(self.{a}({v}))", "self.{a} = nn.Linear({w}, {w})", weight=4),
    Snippet("vs", "{n} = {v} + self.{a}({v})", "self.{a} = nn.Linear({w}, {w}, bias=False)", weight=4),
    Snippet("vs", "{n} = self.{a}(self.{a}({v}))", "self.{a} = nn.Linear({w}, {w})"),
    Snippet("vs", "{n} = self.{a}({v})", "self.{a} = nn.LayerNorm({w})"),
    Snippet("vsm", "{n} = self.{a}({v})", "self.{a} = nn.Dropout(0.3)"),
    Snippet("vsm", "{n} = self.{a}({v})", "self.{a} = nn.Identity()"),
    Snippet("vsm", "{n} = self.{a}({v} + 0)", "self.{a} = nn.ReLU(inplace=True)"),
    Snippet("v", "{n} = self.{a}({v})", "self.{a} = nn.BatchNorm1d({w})"),
    Snippet("m", "{n} = self.{a}({v})", "self.{a} = nn.BatchNorm2d({w})", weight=4),
    Snippet("m", "{n} = self.{a}({v})", "self.{a} = nn.Conv2d({w}, {w}, 3, padding=1)", weight=12),
    Snippet("m", "{n} = {v} + self.{a}({v})", "self.{a} = nn.Conv2d({w}, {w}, 1)", weight=6),
    Snippet("m", "{n} = self.{a}({v})", "self.{a} = nn.GroupNorm(2, {w})"),
    Snippet("s", "{n} = self.{a}({v})[0]", "self.{a} = nn.GRU({w}, {w}, batch_first=True)"),
    Snippet(
        "s",
        "zero = torch.zeros(1, {v}.size(0), {w})\n{n}, (hidden, _) = self.{a}({v}, (zero, zero))\n"
        "{n} = {n} + hidden.transpose(0, 1)",
        "self.{a} = nn.LSTM({w}, {w}, batch_first=True)",
    ),
    Snippet("v", "{n} = self.{a}({v}, {o})", "self.{a} = nn.GRUCell({w}, {w})"),
    Snippet(
        "s",
        "{n}, _ = self.{a}({v}, {o}, {v}, need_weights=False)",
        "self.{a} = nn.MultiheadAttention({w}, 2, dropout=0.2, batch_first=True)",
    ),
    Snippet(
        "vs",
        "{n} = self.{a}({v})",
        "self.{a} = nn.Sequential(nn.Linear({w}, 4), nn.ReLU(True), nn.Dropout(0.1), nn.Linear(4, {w}))",
        weight=4,
    ),
    Snippet(
        "vs",
        "{n} = {v}\nfor layer in self.{a}:\n    {n} = torch.tanh(layer({n}))",
        "self.{a} = nn.ModuleList(nn.Linear({w}, {w}) for _ in range(2))",
        weight=4,
    ),
    Snippet(
        "vs",
        "{n} = self.{a}['deep']({v}) + self.{a}['wide']({v})",
        "self.{a} = nn.ModuleDict({{'deep': nn.Linear({w}, {w}), 'wide': nn.Linear({w}, {w})}})",
    ),
    Snippet("vs", "{n} = self.{a}({v})", "self.{a} = torch.nn.utils.parametrizations.weight_norm(nn.Linear({w}, {w}))"),
    Snippet("vs", "{n} = self.{a}({v})", "self.{a} = nn.utils.parametrizations.spectral_norm(nn.Linear({w}, {w}))"),
    Snippet(
        "vs",
        "{n} = self.{a}({v})",
        "self.{a} = nn.Linear({w}, {w})\nself.{a}.register_forward_hook(lambda m, i, o: o * 0.5)",
    ),
    Snippet(
        "vs",
        "{n} = torch.utils.checkpoint.checkpoint(self.{a}, {v}, use_reentrant=False)",
        "self.{a} = nn.Sequential(nn.Linear({w}, {w}), nn.Tanh(), nn.Linear({w}, {w}))",
    ),
    Snippet("vs", "{n} = self.{a}[:1]({v})", "self.{a} = nn.Sequential(nn.Linear({w}, {w}), nn.Tanh())"),
    Snippet(
        "vs",
        "{n} = self.{a}({v})",
        "self.{a} = nn.Linear({w}, {w})\nfor p in self.{a}.parameters():\n    p.requires_grad_(False)",
    ),
]

PARAMETERS = [
    Snippet("vs", "{n} = {v} * self.{a}", "self.{a} = nn.Parameter(torch.randn({w}))"),
    Snippet("vs", "{n} = {v} @ self.{a} + self.{a}.sum()", "self.{a} = nn.Parameter(torch.randn({w}, {w}) * 0.3)"),
    Snippet("vs", "{n} = F.linear({v}, self.{l}.weight)"),
    Snippet("vs", "{n} = {v} @ self.{l}.weight"),
    Snippet("vs", "{n} = self.{a}({v})", "self.{a} = nn.Linear({w}, {w})\nself.{a}.weight = self.{l}.weight"),
    Snippet("vs", "{n} = F.linear({v}, self.{l}.weight.detach())"),
    Snippet("vs", "{n} = {v} + self.{l}.bias.data"),
    Snippet("vs", "{n} = {v} + self.{a}[:, :{w}]", "self.{a} = nn.Parameter(torch.randn(1, 16))"),
    Snippet("s", "{n} = {v} + self.{a}[:, :{v}.shape[1]]", "self.{a} = nn.Parameter(torch.randn(1, 12, {w}))"),
    Snippet("s", "{n} = torch.cat([self.{a}.expand(len({v}), -1, -1), {v}], 1)[:, 1:]",
            "self.{a} = nn.Parameter(torch.randn(1, 1, {w}))"),
    Snippet("vs", "{n} = {v} + F.softmax(self.{a}, 0) * self.{b}",
            "self.{a} = nn.Parameter(torch.randn({w}))\nself.{b} = self.{a}"),
    Snippet("m", "{n} = F.conv2d({v}, self.{a}, padding='same')",
            "self.{a} = nn.Parameter(torch.randn({w}, {w}, 3, 3) * 0.2)"),
    Snippet("vs", "{n} = {v}\nfor p in self.{a}:\n    {n} = {n} + p",
            "self.{a} = nn.ParameterList(torch.randn({w}) for _ in range(2))"),
]

PURE = [
    *_all(
        "vsm",
        "{n} = {v} + {o}",
        "{n} = torch.tanh({v}) * {o}",
        "{n} = {o} - {v} / 2",
        weight=5,
    ),
    *_all(
        "vsm",
        "{n} = F.gelu({v})",
        "{n} = {v}.sigmoid()",
        "{n} = 1 - {v}",
        "{n} = -{v} ** 2",
        "{n} = {v}.detach() * {o}",
        "{n} = {v} + ({o} > 0).float()",
        "{n} = torch.where({v} > 0, {v}, {o})",
        "{n} = {v}.masked_fill({v} > 1, 0.5)",
        "{n} = F.dropout({v}, 0.4, self.training)",
        "{n} = F.dropout({v}, p=0.2, training=self.training)",
        "{n} = {v} + torch.ones_like({v})",
        "{n} = {v} + torch.zeros({v}.shape)",
        "{n} = {v} + {v}.new_ones({v}.size(0), *[1] * ({v}.dim() - 1))",
        "{n} = torch.stack([{v}, {o}]).sum(0)",
        "{n} = torch.stack(({v}, {o}), dim=1).mean(dim=1)",
        "{n} = torch.cat([{v}, {o}]).split({v}.shape[0])[1]",
        "{n} = torch.cat([{v}, {o}])[: {v}.shape[0]]",
        "{n} = torch.cat([{v}, {o}])[len({v}) :]",
        "{n} = {v}.reshape({v}.shape[0], -1).view({v}.shape)",
        "{n} = {v}.flatten(1).reshape_as({v})",
        "{n} = {v}.flatten(0).view(*{v}.size())",
        "{n} = {v}.clone().contiguous()",
        "{n} = {v}.to(torch.float64).float()",
        "{n} = {v}.to({o}.device, {o}.dtype)",
        "{n} = {v}.transpose(0, 1).transpose(1, 0)",
        "{n} = {v} / {v}.shape[0]",
        "{n} = {v} * {v}.shape[0] ** -0.5",
        "{n} = {v} * math.sqrt({v}.shape[1])",
        "{n} = {v} * float({v}.size(-1))",
        "{n} = {v} * ({v}.numel() / {v}.shape[0]) * 0.01",
        "{n} = {v} + torch.arange({v}.shape[0]).view(-1, *[1] * ({v}.dim() - 1))",
        "{n} = {v} + torch.linspace(0, 1, {v}.shape[-1])",
        "{n} = {v} * torch.full(({v}.shape[0],), 2.0)[:, *[None] * ({v}.dim() - 1)]",
        "{n} = {v}[torch.arange({v}.shape[0] - 1, -1, -1)]",
        "{n} = {v}.index_select(0, {v}.flatten(1).sum(1).argsort())",
        "{n} = {v}.roll(1, 0)",
        "{n} = {v} - {v}.mean(0, keepdim=True)",
        "{n} = {v} - {v}.max()",
        "{n} = {v} + {v}.amax(-1, keepdim=True) + {v}.std()",
        "{n} = {v} + sum({v}[:, i].mean() for i in range({v}.shape[1]))",
        "{n} = {v} + {v}.new_tensor([0.5])",
        "{n} = {v} + torch.tensor(0.25)",
        "{n} = {v} + torch.eye({v}.size(1)).sum()",
        "{n} = {v} + torch.rand_like({v}) * 0.1",
        "{n} = {v} + torch.randn({v}.shape[0], *{v}.shape[1:]) * 0.1",
        "{n} = {v}.unsqueeze(0).expand(2, *{v}.shape).sum(0)",
        "{n} = {v}[None].repeat(2, *[1] * {v}.dim())[1]",
        "{n} = Double.apply({v})",
        "{n} = (lambda t, k=2: t * k)({v})",
        "{n} = functools.reduce(torch.add, [{v}, {o}, {v}])",
        "{n} = {{'a': {v}, 'b': [{o}]}}['b'][0] + {v}",
        "{n}, *_ = ({v}, {o}, None)",
        "{n} = max([{v}, {o}], key=lambda t: t.dim())",
        "{n} = GLOBAL * {v}",
        "try:\n    {n} = {v} @ torch.zeros(3, 3, 3, 3, 3)\nexcept RuntimeError:\n    {n} = {v} + 1",
        "rows = {v}.unbind(0)\n{n} = torch.stack(rows[1:] + rows[:1])",
        "{n} = {v} + {v}[{v} > 0].sum()",
        "{n} = {v} + {v}[{v} > 0].numel() / 100",
        "{n} = {v} + {v}.detach().flatten(1).topk(2, 1).indices.sum().float() * 0.01",
        "{n} = {v}.data + {o}",
        "with torch.no_grad():\n    scale = {v}.abs().mean() + {o}.std()\n{n} = {v} * scale",
        "with torch.no_grad():\n    {n} = {v} * 2\n{n} = {n} + {o}",
        "with torch.no_grad():\n    shape = {v}.shape\n    with torch.enable_grad():\n        "
        "{n} = {v}.view(shape) * 1.5",
        "{n} = {v} + min({v}.shape[0], 3)",
        "{n} = {v} + sum({v}.shape[:2])",
        "{n} = {v} * (0.5 * {v}.shape[-1])",
        "{n} = {v} + int({v}.shape[0] > 2)",
        "{n} = {v} + len(str({v}.shape[1]))",
        "{n} = {v} + [0.1, 0.2, 0.3][{v}.shape[1] % 3]",
        "batch, *rest = {v}.shape\n{n} = {v}.reshape(batch * rest[0], -1).mul(1.5).reshape(batch, *rest)",
        weight=1,
    ),
    *_all(
        "vs",
        "left, right = {v}.chunk(2, -1)\n{n} = torch.cat([right, left * 2], dim=-1)",
        "left, right = torch.split({v}, [{h}, {v}.shape[-1] - {h}], dim=-1)\n{n} = torch.cat((left.relu(), right), -1)",
        "{n} = F.layer_norm({v}, {v}.shape[-1:])",
        "{n} = torch.cat([{v}[..., : {v}.shape[-1] // 2] * 2, {v}[..., {v}.shape[-1] // 2 :]], -1)",
        "{n} = {v}.view(*{v}.shape[:-1], 2, -1).transpose(-1, -2).reshape({v}.shape)",
        "{n} = F.pad({v}, (1, 0))[..., :-1]",
        "{n} = torch.einsum('...i,...i->...i', {v}, {o})",
    ),
    *_all(
        "s",
        "{n} = {v} + torch.arange({v}.shape[1])[None, :, None] * 0.1",
        "{n} = {v}.softmax(1) @ {v}.new_ones({w}, {w})",
        "mask = torch.ones({v}.size(1), {v}.size(1)).tril() == 0\n"
        "score = ({v} @ {o}.transpose(1, 2)).masked_fill(mask, -1e9)\n"
        "{n} = score.softmax(-1) @ {v}",
        "{n} = F.scaled_dot_product_attention({v}, {o}, {v}, is_causal=True)",
        "{n} = torch.stack([{v}[:, i] * (i + 1) for i in range({v}.shape[1])], 1)",
        "state = torch.zeros({v}.shape[0], {w})\nsteps = []\n"
        "for step in {v}.unbind(1):\n    state = torch.tanh(state + step)\n"
        "    steps.append(state)\n{n} = torch.stack(steps, dim=1)",
        "{n} = {v}.cumsum(1)",
        "{n} = {v}.permute(1, 0, 2).permute(1, 0, 2)",
    ),
    *_all(
        "v",
        "{n} = {v}.softmax(1)",
        "{n} = F.normalize({v}, dim=1)",
        "{n} = {v} + F.one_hot({v}.argmax(1), {w})",
        "{n} = ({v} @ {o}.t()) @ {v} / {v}.size(0)",
        "{n} = {v}.gather(1, {o}.argsort(1))",
        "{n} = torch.zeros_like({v}).scatter(1, {v}.argmax(1, keepdim=True), 1.0) + {v}",
        "{n} = {v}.index_add(0, torch.zeros(len({v}), dtype=torch.long), {o})",
    ),
    *_all(
        "m",
        "{n} = F.interpolate(F.max_pool2d({v}, 2), size={v}.shape[-2:])",
        "{n} = F.avg_pool2d({v}, 3, 1, 1)",
        "{n} = {v} * {v}.mean((2, 3), keepdim=True).sigmoid()",
        "a, b = {v}.chunk(2, dim=1)\n{n} = torch.cat([b, a + b], dim=1)",
        "{n} = {v}.flatten(2).transpose(1, 2).reshape({v}.shape[0], *{v}.shape[2:], -1).permute(0, 3, 1, 2)",
        "{n} = F.pixel_shuffle(F.pixel_unshuffle({v}, 2), 2)",
        "{n} = F.batch_norm({v}, None, None, training=True)",
    ),
]

CONVERSIONS = [
    Snippet("s", "{n} = {v}.mean(1)", to="v"),
    Snippet("s", "{n} = {v}[:, -1]", to="v"),
    Snippet("s", "_, {n} = self.{a}({v})\n{n} = {n}[-1]", "self.{a} = nn.GRU({w}, {w}, batch_first=True)", to="v"),
    Snippet("s", "{n} = {v}[torch.arange({v}.shape[0]), {v}.shape[1] - 1]", to="v"),
    Snippet("m", "{n} = {v}.mean((2, 3))", to="v"),
    Snippet("m", "{n} = F.adaptive_avg_pool2d({v}, 1).flatten(1)", to="v"),
    Snippet("m", "{n} = self.{a}({v}.view({v}.size(0), -1))", "self.{a} = nn.Linear({w} * 16, {w})", to="v"),
    Snippet("m", "{n} = {v}.flatten(2).transpose(1, 2)", to="s"),
    Snippet("v", "{n} = {v}.unsqueeze(1)", to="s"),
]
