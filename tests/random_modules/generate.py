"""Writes the source of a random module, and what it is called with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tests.random_modules.families import FAMILIES, IN_BLOCKS, IN_ROOT
from tests.random_modules.forms import FORMS, HEADER, Form
from tests.random_modules.program import InputSpec, Program
from tests.random_modules.snippets import CONVERSIONS, LAYERS, Snippet
from tests.random_modules.stateful import CONDITIONS, PENDING_CONDITIONS

T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """A tensor variable of a forward."""

    name: str
    kind: str
    width: int


@dataclass(frozen=True)
class Block:
    """A class of blocks for values of one kind and width."""

    name: str
    kind: str
    width: int
    form: Form
    linears: tuple[str, ...]


@dataclass
class Body:
    """One class under construction."""

    depth: int
    init: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    linears: dict[int, list[str]] = field(default_factory=dict)  # width → paths of Linear(width, width)
    blocks: list[tuple[str, Block]] = field(default_factory=list)
    count: int = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"


class Generator:
    """Draws everything from ``rng``: a ``random.Random``, or hypothesis's."""

    def __init__(self, rng: random.Random, pending: bool = False) -> None:
        self.rng, self.pending = rng, pending
        self.classes: list[str] = []
        self.blocks: list[Block] = []

    def chance(self, percent: int) -> bool:
        return self.rng.randrange(100) >= 100 - percent

    def pick(self, entries: Sequence[T], weights: Sequence[int]) -> T:
        """An entry, weighted; the first ones are the simplest, for hypothesis shrinks towards them."""
        rest = self.rng.randrange(sum(weights))
        for entry, weight in zip(entries, weights, strict=True):
            rest -= weight
            if rest < 0:
                return entry
        raise AssertionError

    # -- forward code

    def value(self, body: Body) -> Value:
        """The latest value as a rule, else an older one: a skip."""
        return self.rng.choice(body.values) if self.chance(15) else body.values[-1]

    def other(self, body: Body, value: Value) -> Value:
        alike = [v for v in body.values if (v.kind, v.width) == (value.kind, value.width)]
        return self.rng.choice(alike)

    def linear(self, body: Body, width: int) -> str:
        paths = body.linears.setdefault(width, [])
        if not paths:
            paths.append(body.name("lin"))
            body.init.append(f"self.{paths[0]} = nn.Linear({width}, {width})")
        return self.rng.choice(paths)

    def snippet(self, body: Body, value: Value) -> None:
        families = FAMILIES + (IN_BLOCKS if body.depth else IN_ROOT)
        family = self.pick([f for _, f in families], [weight for weight, _ in families])
        fitting = [s for s in family if value.kind in s.kinds and (self.pending or not s.pending)]
        self.emit(body, value, self.pick(fitting, [s.weight for s in fitting]))

    def emit(self, body: Body, value: Value, snippet: Snippet, may_branch: bool = True) -> Value:
        made = Value(body.name("v"), snippet.to or value.kind, value.width)
        names = {
            "v": value.name,
            "n": made.name,
            "o": self.other(body, value).name,
            "a": body.name("a"),
            "b": body.name("b"),
            "w": value.width,
            "h": value.width // 2,
        }
        if "{l}" in snippet.lines + snippet.init:
            names["l"] = self.linear(body, value.width)
        body.init += snippet.init.format(**names).splitlines()
        if snippet.init.startswith("self.{a} = nn.Linear({w}, {w})") and "\n" not in snippet.init:
            body.linears.setdefault(value.width, []).append(str(names["a"]))
        lines = snippet.lines.format(**names).splitlines()
        if may_branch and not snippet.to and self.chance(14):
            lines = self.branch(lines, names)
        body.lines += lines
        body.values.append(made)
        return made

    def branch(self, lines: list[str], names: dict[str, object]) -> list[str]:
        condition = self.rng.choice(CONDITIONS + (PENDING_CONDITIONS if self.pending else ())).format(**names)
        indented = ["    " + line for line in lines]
        if self.chance(50):
            return [f"{names['n']} = {names['v']}", f"if {condition}:", *indented]
        return [f"if {condition}:", *indented, "else:", f"    {names['n']} = {names['v']} * 0.5"]

    def call(self, body: Body, value: Value) -> None:
        """Calls a block: one of this body again, another of a class there is, or one of a new class."""
        fits = [(p, b) for p, b in body.blocks if (b.kind, b.width) == (value.kind, value.width)]
        if fits and self.chance(25):
            path, block = self.rng.choice(fits)
        else:
            known = [b for b in self.blocks if (b.kind, b.width) == (value.kind, value.width)]
            block = self.rng.choice(known) if known and self.chance(35) else self.block(value, body.depth + 1)
            path = body.name("block")
            body.init.append(f"self.{path} = {block.name}()")
            if block.linears and self.chance(12):
                mine = self.linear(body, value.width)
                body.init.append(f"self.{path}.{block.linears[0]}.weight = self.{mine}.weight")
            body.blocks.append((path, block))
        made = Value(body.name("v"), value.kind, value.width)
        names = {"v": value.name, "o": self.other(body, value).name, "n": made.name, "f": f"self.{path}"}
        body.lines += block.form.call.format(**names).splitlines()
        body.values.append(made)

    def fill(self, body: Body, steps: int) -> None:
        for _ in range(steps):
            value = self.value(body)
            if body.depth < 3 and self.chance(45 if body.depth == 0 else 20):
                self.call(body, value)
            else:
                self.snippet(body, value)

    # -- classes

    def block(self, value: Value, depth: int) -> Block:
        body = Body(depth, values=[Value("x", value.kind, value.width)])
        form = self.rng.choice(FORMS)
        if form.first:
            body.lines.append(form.first)
        self.emit(body, body.values[-1], self.layer(value.kind), may_branch=False)
        self.fill(body, self.rng.randrange(4))
        body.lines += form.result.format(n=body.values[-1].name).replace("\n    ", "\n").splitlines()
        # Classes are numbered as they are finished: inner ones first, which is the order of the source.
        name, linears = f"Block{len(self.blocks)}", tuple(body.linears.get(value.width, ()))
        block = Block(name, value.kind, value.width, form, linears)
        self.blocks.append(block)
        self.classes.append(_class(block.name, body, form.parameters))
        return block

    def layer(self, kind: str) -> Snippet:
        fitting = [s for s in LAYERS if kind in s.kinds]
        return self.pick(fitting, [s.weight for s in fitting])

    def program(self) -> Program:
        body = Body(0)
        inputs = self.inputs(body)
        value = body.values[-1]
        self.emit(body, value, self.layer(value.kind), may_branch=False)
        self.fill(body, 2 + self.rng.randrange(5))
        while body.values[-1].kind != "v" and self.chance(85):
            convert = [s for s in CONVERSIONS if body.values[-1].kind in s.kinds]
            self.emit(body, body.values[-1], self.rng.choice(convert))
            self.fill(body, self.rng.randrange(3))
        logits = self.finish(body)
        parameters = ", ".join(spec.parameter for spec in inputs)
        self.classes.append(_class("Net", body, parameters))
        return Program(
            source="\n\n".join([HEADER, *self.classes]),
            inputs=tuple(inputs),
            by_keyword=self.chance(20),
            input_grads=self.chance(25),
            batch=2 + self.rng.randrange(3),
            parts=2 + self.rng.randrange(3),
            logits=logits,
        )

    def inputs(self, body: Body) -> list[InputSpec]:
        """One to three inputs; the first is the main one, the others are added somewhere or left out."""
        width = self.rng.choice((8, 4, 6))
        kind = self.pick(("v", "s", "m", "tokens"), (5, 4, 3, 1))
        width = 4 if kind == "m" else width
        first = InputSpec("x", kind, width)
        body.values.append(Value("x", "s" if kind == "tokens" else kind, width))
        if kind == "tokens":
            body.init.append(f"self.embed = nn.Embedding(11, {width})")
            body.lines.append("x = self.embed(x)")
        specs = [first]
        for name in ("y", "z")[: self.pick((0, 1, 2), (5, 3, 2))]:
            how = self.pick(("tensor", "optional", "omitted", "pair", "dict", "mask"), (4, 2, 2, 1, 1, 2))
            spec = InputSpec(name, body.values[0].kind, width, how)
            specs.append(spec)
            body.lines += spec.use.splitlines()
            if how in ("tensor", "pair", "dict"):
                body.values.insert(0, Value(spec.value, spec.kind, width))
        return sorted(specs, key=lambda spec: {"optional": 1, "omitted": 2}.get(spec.how, 0))

    def finish(self, body: Body) -> bool:
        """The last lines of the root's forward; whether the output is logits (N, 3)."""
        last = body.values[-1]
        logits = last.kind == "v" and self.chance(70)
        if logits:
            body.init.append(f"self.head = nn.Linear({last.width}, 3)")
            body.lines.append(f"{last.name} = self.head({last.name})")
        aux = self.rng.choice(body.values).name
        form = self.rng.choice(
            (
                "{n}",
                "{n}",
                "{n}",
                "{n}, {aux}",
                "[{n}, {n} * 2]",
                "{{'logits': {n}, 'aux': [{aux}, None]}}",
                "Pair({n}, {aux}.mean())",
                "{n}, {n}.shape[0]",
                "{n}, {{'inner': ({aux}, {aux})}}",
                "{n}, {aux}.detach(), {aux} > 0",
                "{n}, torch.ones(2), 'name'",
            )
        )
        body.lines.append("return " + form.format(n=last.name, aux=aux))
        return logits and form == "{n}"


def _class(name: str, body: Body, parameters: str) -> str:
    init = "".join(f"\n        {line}" for line in body.init)
    forward = "".join(f"\n        {line}" for line in body.lines)
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__(){init}\n\n"
        f"    _helper = helper\n\n    def forward(self, {parameters}):{forward}\n"
    )


def single(snippet: Snippet, kind: str, in_block: bool) -> Program:
    """A program of one snippet, of the root or in a block of its own, between two layers."""
    rng = random.Random(0)
    generator, body = Generator(rng, pending=True), Body(0, values=[Value("x", kind, 4)])
    generator.emit(body, body.values[-1], _simplest_layer(kind), may_branch=False)
    if in_block:
        inner = Body(1, values=[Value("x", kind, 4)])
        generator.emit(inner, inner.values[-1], _simplest_layer(kind), may_branch=False)
        made = generator.emit(inner, inner.values[-1], snippet, may_branch=False)
        inner.lines.append(f"return {made.name}")
        generator.classes.append(_class("Block", inner, "x"))
        body.init.append("self.block = Block()")
        body.lines.append(f"out = self.block({body.values[-1].name})")
        body.values.append(Value("out", made.kind, 4))
    else:
        generator.emit(body, body.values[-1], snippet, may_branch=False)
    generator.emit(body, body.values[-1], _simplest_layer(body.values[-1].kind), may_branch=False)
    body.lines.append(f"return {body.values[-1].name}")
    generator.classes.append(_class("Net", body, "x"))
    return Program("\n\n".join([HEADER, *generator.classes]), (InputSpec("x", kind, 4),))


def _simplest_layer(kind: str) -> Snippet:
    return next(s for s in LAYERS if kind in s.kinds and ("Conv" if kind == "m" else "Linear") in s.init)


def generate(rng: random.Random, pending: bool = False) -> Program:
    """A random program. The module may fail of itself: see ``Program.works``.

    ``pending`` adds what the conversion is known not to do right yet.
    """
    return Generator(rng, pending).program()
