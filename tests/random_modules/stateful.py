"""Snippets with in-place operations, buffers, attributes and other state."""

from __future__ import annotations

from tests.random_modules.snippets import Snippet


def _every(
    *lines: str, kinds: str = "vsm", init: str = "", weight: int = 2, pending: str = ""
) -> list[Snippet]:
    return [Snippet(kinds, text, init, weight=weight, pending=pending) for text in lines]


IN_PLACE = [
    *_every(
        "{n} = {v} + {o}\n{n}.add_({o})",
        "{n} = {v} * 2\n{n} += {o}",
        "{n} = {v} + 1\n{n}.mul_(0.5).sub_({o})",
        "{n} = {v} + 0\nbefore = {n} * 1\n{n}.relu_()\n{n} = {n} + before",
        "{n} = {v} + {o}\n{n}[:, 0] = 0",
        "{n} = {v} + {o}\n{n}[:, 0] = {v}[:, 1]",
        "{n} = {v} + {o}\n{n}[:, 1:] *= 2",
        "{n} = {v} + {o}\n{n}[0] += 1",
        "{n} = {v} + {o}\n{n}[: len({n}) // 2].mul_(3)",
        "{n} = torch.zeros_like({v})\n{n}[:] = {v}",
        "{n} = torch.empty({v}.shape)\n{n}.copy_({v})",
        "{n} = torch.zeros({v}.shape[0], *{v}.shape[1:])\n{n}[:, 0] = {v}[:, 0]\n{n} = {n} + {o}",
        "{n} = {v}.clone()\nview = {n}.view({v}.shape[0], -1)\nview.mul_(2)",
        "{n} = {v}.clone()\nview = {n}[:, :2]\nview.add_(1)\n{n} = {n} + view.sum()",
        "{n} = {v} + 1\nalias = {n}\nalias.add_({o})",
        "{n} = {v} + 1\nkeep = {n}.detach()\n{n} = {n} * 2\nkeep.mul_(0)\n{n} = {n} + keep",
        "{n} = {v} + 1\nkeep = [{n}, {o}]\nkeep[0].mul_(2)\n{n} = keep[0] + keep[1]",
        "{n} = {v} + 0\n{n}.data.clamp_(-1, 1)",
        "{n} = {v} + 0\n{n}.detach().mul_(2)",
        "{n} = {v} + 0\n{n}.masked_fill_({o} > 0, 0)",
        "{n} = {v} + 0\n{n}[{o} > 0] = 0.5",
        "{n} = {v} + 0\n{n}.transpose(0, 1)[0] = 1.0",
        "{n} = {v} + 0\n{n}.unsqueeze_(0)\n{n} = {n}.squeeze(0)",
        "{n} = F.relu({v} + 0, inplace=True)",
        "{n} = F.dropout({v} + 0, 0.3, self.training, inplace=True)",
        "{n} = torch.empty(0)\nwith torch.no_grad():\n    {n} = torch.add({v}, 1)\n    {n}.mul_(2)\n{n} = {n} + {o}",
        "total = torch.zeros({v}.shape[0])\nfor i in range(2):\n    total += {v}.flatten(1)[:, i]\n"
        "{n} = {v} + total.view(-1, *[1] * ({v}.dim() - 1))",
        "total = 0\nfor part in {v}.unbind(1):\n    total += part\n{n} = {v} + total.unsqueeze(1)",
        "{n} = {v} + 1\nother = {n} + 0\nother.mul_({o}.detach())\n{n} += other",
    ),
    *_every(
        "{v}.add_(1)\n{n} = {v} * 2",
        "{n} = {v} * 1\n{v} += 1\n{n} = {n} + {v}",
        "{v}[:, 0] = 0\n{n} = {v} + {o}",
        "{n} = {v}.view({v}.shape)\n{v}.mul_(2)",
        weight=1,
    ),
]

BUFFERS = [
    *_every(
        "self.{a} += 1\n{n} = {v} * self.{a}",
        "self.{a}.add_(1)\n{n} = {v} + self.{a}",
        "self.{a}.copy_({v}.detach().mean())\n{n} = {v} - self.{a}",
        "self.{a}.mul_(0.9).add_({v}.detach().mean(), alpha=0.1)\n{n} = {v} - self.{a}",
        "with torch.no_grad():\n    self.{a} += {v}.mean()\n{n} = {v} + self.{a}",
        "if self.training:\n    self.{a}.add_({v}.detach().std())\n{n} = {v} / (1 + self.{a})",
        "{n} = {v} + self.{a}\nself.{a}.add_(1)",
        "{n} = {v} + self.{a}.clone()\nself.{a}.fill_(2)",
        "before = self.{a}.clone()\nself.{a} += 1\n{n} = {v} + before * self.{a}",
        init="self.register_buffer('{a}', torch.zeros(()))",
        weight=1,
    ),
    *_every(
        "self.{a} = self.{a} * 0.9 + {v}.detach().mean()\n{n} = {v} + self.{a}",
        "self.{a} = self.{a} + 1\n{n} = {v} * self.{a}",
        "if self.training:\n    self.{a} = {v}.detach().amax()\n{n} = {v} + self.{a}",
        init="self.register_buffer('{a}', torch.zeros(()))",
        weight=1,
    ),
    *_every("old = self.{a}\nself.{a} = {v}.detach().mean()\n{n} = {v} + old",
            init="self.register_buffer('{a}', torch.zeros(()))", weight=1),
    *_every("self.{a}.data = self.{a}.data + 1\n{n} = {v} + self.{a}",
            init="self.register_buffer('{a}', torch.zeros(()))", weight=1),
    *_every("{n} = {v} + self.{a}[: {v}.shape[-1]]", "{n} = {v} * self.{a}[..., : {v}.shape[-1]]",
            init="self.register_buffer('{a}', torch.arange(12.0), persistent=False)"),
    Snippet("v", "self.{a} = self.{a} * 0.5 + {v}.detach().mean(0) * 0.5\n{n} = {v} - self.{a}",
            "self.register_buffer('{a}', torch.zeros({w}))"),
    Snippet("v", "self.{a}[0] = {v}.detach().mean(0)\nself.{a} = self.{a}.roll(1, 0)\n{n} = {v} + self.{a}.mean(0)",
            "self.register_buffer('{a}', torch.zeros(3, {w}))"),
    Snippet("v", "{n} = F.batch_norm({v}, self.{a}, self.{b}, training=self.training)",
            "self.register_buffer('{a}', torch.zeros({w}))\nself.register_buffer('{b}', torch.ones({w}))"),
    Snippet("v", "{n} = F.batch_norm({v}, self.{a}, self.{b}, training=self.training or False, momentum=0.2)",
            "self.register_buffer('{a}', torch.zeros({w}))\nself.register_buffer('{b}', torch.ones({w}))"),
]

CONSTANTS = [
    *_every("{n} = {v} + self.{a}", init="self.{a} = torch.tensor(0.5)"),
    *_every("{n} = {v} * self.{a}[0] + self.{a}[1]", init="self.{a} = [torch.tensor(0.5), torch.tensor(2.0)]"),
    *_every("{n} = {v} * self.{a}['k']", init="self.{a} = {{'k': torch.tensor(1.5)}}"),
    *_every("{n} = {v} * self.{a} + self.{b}", init="self.{a}, self.{b} = 0.5, 2"),
    *_every("{n} = {v} if self.{a} else {o}", init="self.{a} = True"),
    Snippet("vs", "{n} = {v} + self.{a}.mul(2)", "self.{a} = torch.ones({w})"),
    Snippet("vsm", "{n} = self.{a}({v})", "self.{a} = functools.partial(torch.mul, torch.tensor(0.5))"),
    Snippet("vsm", "{n} = self.{a}({v})", "self.{a} = torch.tanh"),
    Snippet("vsm", "{n} = self._helper({v})", weight=2),
]

ATTRIBUTES = [
    *_every("self.{a} += 1\n{n} = {v} * self.{a}", init="self.{a} = 0", weight=1),
    *_every("self.{a} = {v}.detach()\n{n} = {v} + self.{a}", init="self.{a} = None", weight=1),
    *_every("{n} = {v} if self.{a} is None else {v} + self.{a}\nself.{a} = {v}.detach().mean()",
            init="self.{a} = None", weight=1),
    *_every("self.{a}.append({v}.shape[0])\n{n} = {v} + len(self.{a})", init="self.{a} = []", weight=1,
            pending="contents"),
    *_every("self.{a}.append({v}.mean())\n{n} = {v} + self.{a}.pop()", init="self.{a} = []", weight=1),
    *_every("key = {v}.shape[1]\nif key not in self.{a}:\n    self.{a}[key] = torch.arange(key).float().sum()\n"
            "{n} = {v} + self.{a}[key]", init="self.{a} = {{}}", weight=1),
    *_every("self.{a}['last'] = {v}\n{n} = self.{a}['last'] * 2", init="self.{a} = {{}}", weight=1),
    *_every("self.{a}.seen = {v}.detach().mean()\n{n} = {v} + self.{a}.seen",
            init="self.{a} = types.SimpleNamespace(seen=0)", weight=1),
    *_every("self.{a}.mul_(0.5)\n{n} = {v} + self.{a}", init="self.{a} = torch.tensor(4.0)", weight=1),
    *_every("with torch.no_grad():\n    self.{a}.mul_(0.9)\n{n} = {v} * self.{a}",
            init="self.{a} = nn.Parameter(torch.ones(()))", weight=1),
    *_every("self.{a}.data.mul_(0.9)\n{n} = {v} * self.{a}", init="self.{a} = nn.Parameter(torch.ones(()))", weight=1),
]

BY_VALUE = _every(
    "{n} = {v} + float({v}.mean())",
    "{n} = {v} * {v}.sum().item()",
    "{n} = {v} if {v}.sum() > 0 else {v} * 2",
    "{n} = {v}\nwhile {n}.abs().max() > 1:\n    {n} = {n} * 0.5",
    "{n} = {v} + random.random()",
    "{n} = {v} * 2 if torch.rand(()) < 0.5 else {v}",
    "{n} = {v} + torch.from_numpy({v}.detach().numpy() * 2)",
    "{n} = {v} + torch.tensor([float(t) for t in {v}.detach().flatten()[:2]]).sum()",
    "{n} = {v} + torch.tensor({v}.detach().mean())",
    "{n} = {v} + {v}.nonzero().shape[0] * 0.1",
    "{n} = {v} + {v}.detach().flatten()[0].round().int().tolist()",
)

CONDITIONS = (
    "self.training",
    "self.training",
    "not self.training",
    "{v}.shape[0] > 2",
    "{v}.shape[0] % 2 == 0",
    "len({v}) != 3",
    "{v}.size(-1) >= 4",
    "{v}.shape[1] == {o}.shape[1]",
    "{v}.dim() == 2",
    "{v}.shape == {o}.shape",
    "{v}.numel() > 40",
    "2 < {v}.shape[0] < 4",
    "{v}.shape[0] == 3 and self.training",
    "{v}.dtype == torch.float32",
    "isinstance({v}, torch.Tensor)",
    "not {v}.is_cuda",
    "hasattr(self, 'missing')",
    "{v} is not None",
)

# What a graph cannot tell: it was recorded with gradients on and is not guarded against another layout.
PENDING_CONDITIONS = ("{v}.is_contiguous()", "torch.is_grad_enabled()", "{v}.requires_grad")
