"""What a capture gives: graphs over the user's own modules, and how calls map onto them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from localize.convert.naming import parameter_names
from localize.signature import CallSignature, OutputStructure
from localize.spec import Cost, TensorSpec, known_sum


@dataclass
class TracedModel:
    """A model as straight-line graphs over its *original* modules and parameters.

    Graph conventions:
        - a ``placeholder`` per input tensor, in the order of ``signature.names``;
        - ``call_module`` targets are module paths in ``root`` (or keys of ``extras``);
        - ``get_attr`` targets are parameter and buffer paths in ``root`` (or keys of ``extras``);
        - the ``output`` node holds a flat tuple: the leaves that ``outputs[mode]`` puts together again;
        - ``node.meta["scope"]``: path of the module whose forward the node was recorded in ("" for the root);
        - ``node.meta["storages"]``: frozenset of keys of the storages behind the node's value(s);
        - ``node.meta["mutates"]``: frozenset of keys of the storages that the node writes in place;
        - ``node.meta["links"]``: frozenset of earlier nodes that the node reads from past the graph; absent if none.

    ``train_graph is eval_graph`` where the model does the same in both modes (leaf modules look at their own
    ``training`` flag when they run; so do functional calls that are given ``self.training``).
    """

    root: nn.Module
    train_graph: fx.Graph
    eval_graph: fx.Graph
    signature: CallSignature
    outputs: dict[bool, OutputStructure]  # by mode: True for train
    example: tuple[Tensor, ...]  # the input leaves of the example, in placeholder order
    extras: dict[str, Any] = field(default_factory=dict)  # helper modules and constant tensors, by target
    notes: list[str] = field(default_factory=list)
    ran: bool = True  # on data; False where it was too large for that, so that nothing can be compared
    rerouted: bool = False  # a library was told that it is traced: equal to the model up to rounding

    def __post_init__(self) -> None:
        # A graph may have renamed an input (one called `input`, say): its names are the ones values travel under.
        names = tuple(n.name for n in self.train_graph.nodes if n.op == "placeholder")
        self.signature = replace(self.signature, names=names)

    def graph(self, training: bool) -> fx.Graph:
        """The graph of train or eval mode."""
        return self.train_graph if training else self.eval_graph

    @property
    def roots(self) -> list[nn.Module]:
        """The user's model and the helper modules."""
        return [self.root, *(m for m in self.extras.values() if isinstance(m, nn.Module))]

    @property
    def modes_agree(self) -> bool:
        return self.train_graph is self.eval_graph

    def resolve(self, target: str) -> Any:
        """The module, parameter, buffer or constant that a graph target names."""
        if target in self.extras:
            return self.extras[target]
        value: Any = self.root
        for name in target.split("."):
            value = getattr(value, name)
        return value

    def tensors_read(self, node: fx.Node) -> list[Tensor]:
        """The parameters below the module that a node calls, and all tensors and parameters that it is handed.

        A ``get_attr`` node itself reads nothing: it is repeated in whichever part needs it, so its parameter
        belongs to the nodes that use it.
        """
        tensors: list[Tensor] = []
        if node.op == "call_module":
            tensors += self.resolve(str(node.target)).parameters()
        for source in node.all_input_nodes:
            if source.op == "get_attr" and node.op != "output":
                value = self.resolve(str(source.target))
                tensors += value.parameters() if isinstance(value, nn.Module) else [value]
        return tensors

    def parameter_names(self) -> dict[int, str]:
        """The one name of every parameter object, by ``id``; those of helper modules under the helper's target."""
        names = parameter_names(self.root)
        for target, extra in self.extras.items():
            if isinstance(extra, nn.Module):
                inside = parameter_names(extra).items()
                names = {key: f"{target}.{path}" for key, path in inside} | names
        return names


@dataclass(frozen=True)
class NodeProfile:
    """What one node of a graph makes and costs, at the example's batch size."""

    specs: tuple[TensorSpec, ...]  # of the tensors in the node's value; empty for ints and None
    is_tensor: bool  # the value is one plain tensor (only such values may cross a cut)
    flops: float = 0.0
    forward_ms: float | None = None  # milliseconds of the forward pass, where measured
    backward_ms: float | None = None
    saved: tuple[tuple[int, int], ...] = ()  # (storage key, bytes) kept for backward, parameters excluded
    params: tuple[tuple[str, int], ...] = ()  # (parameter path, bytes) the node reads


@dataclass(frozen=True)
class Profile:
    """Per-node costs of one graph, by node name."""

    nodes: dict[str, NodeProfile]

    def cost(self, names: Sequence[str]) -> Cost:
        """Cost of a set of nodes run as one part: parameters and saved storages counted once."""
        saved: dict[int, int] = {}
        params: dict[str, int] = {}
        found = [self.nodes[name] for name in names]
        for node in found:
            saved.update(node.saved)
            params.update(node.params)
        return Cost(
            flops=sum((node.flops for node in found), 0.0),
            param_bytes=sum(params.values()),
            saved_bytes=sum(saved.values()),
            forward_ms=known_sum(node.forward_ms for node in found),
            backward_ms=known_sum(node.backward_ms for node in found),
        )
