"""How a value is laid out, from its shape and from the layers around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx, nn

from localize.convert.traced import TracedModel
from localize.spec import Final, Layout

_LOOK_THROUGH = 8  # neighbours further away say little about a value

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.modules.dropout.Dropout2d,
    nn.modules.dropout.Dropout3d,
)
_CHANNELS_FIRST_CALLS = (
    "conv",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "max_pool",
    "avg_pool",
    "interpolate",
    "upsample",
    "pixel_shuffle",
    "pixel_unshuffle",
)
_TOKENWISE = (
    nn.modules.dropout._DropoutNd,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Identity,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)
_TOKENWISE_CALLS = ("dropout", "layer_norm", "relu", "gelu", "silu", "tanh", "sigmoid", "contiguous", "transpose")
_ATTENTION_CALLS = ("scaled_dot_product_attention", "matmul", "bmm", "softmax", "baddbmm")


def layout_of(
    traced: TracedModel, node: fx.Node, shapes: Mapping[str, tuple[int, ...]], batch_axis: int | None
) -> Layout:
    """The layout of a node's value.

    Two axes are a vector and three are tokens, unless one-dimensional convolutions are around. With four or
    more, the nearest layer that knows where channels are decides; element-wise neighbours are looked through.

    Args:
        traced: the model, for the modules behind the nodes.
        node: whose value.
        shapes: of every value that is one plain tensor, by node name.
        batch_axis: of the value; a value without one has no layout.
    """
    shape = shapes[node.name]
    if batch_axis is None or len(shape) < 2:
        return "other"
    if len(shape) == 2:
        return "vector"
    votes = _votes(traced, node, shapes)
    if len(shape) == 3:
        return "map" if batch_axis == 0 and votes and votes[0] == "map" else "tokens"
    if batch_axis != 0:
        return "other"
    return votes[0] if votes else "map"  # channels first is the convention of torch


def final_of(
    traced: TracedModel, node: fx.Node, shapes: Mapping[str, tuple[int, ...]], batch_axis: int | None
) -> Final | None:
    """Where a value holds the final state of the recurrent layer that made it; None for any other value.

    Layers that work token by token are looked through. Packed sequences have their last tokens at other places,
    and an output that was padded again is not recognised.
    """
    if batch_axis not in (0, 1) or len(shapes[node.name]) != 3:
        return None
    here: fx.Node | None = node
    for _ in range(_LOOK_THROUGH):
        if here is None or not here.all_input_nodes:
            return None
        source = here.all_input_nodes[0]
        recurrent = _recurrent(traced, source)
        if recurrent is not None:
            whole = _call_name(here) == "getitem" and here.args[1] == 0
            return ("both" if recurrent.bidirectional else "last") if whole and _takes_all(source, shapes) else None
        here = source if _is_tokenwise(traced, here) else None
    return None


def _recurrent(traced: TracedModel, node: fx.Node) -> nn.RNNBase | None:
    module = traced.resolve(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, nn.RNNBase) else None


def _takes_all(node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a recurrent layer reads a plain batch of sequences, not a packed one."""
    return bool(node.args) and isinstance(node.args[0], fx.Node) and len(shapes.get(node.args[0].name, ())) == 3


def _is_tokenwise(traced: TracedModel, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(traced.resolve(str(node.target)), _TOKENWISE)
    return _call_name(node) in _TOKENWISE_CALLS


def _votes(traced: TracedModel, node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> list[Layout]:
    """The layouts that the nearest opinionated neighbours imply, found breadth-first over the graph."""
    shape = shapes[node.name]
    votes: list[Layout] = []
    frontier, seen = [node], {node}
    own = _opinion(traced, node, shape)
    if own is not None:
        votes.append(own)
    for _ in range(_LOOK_THROUGH):
        following: list[fx.Node] = []
        for here in frontier:
            for neighbour, above in _neighbours(here):
                if neighbour in seen:
                    continue
                seen.add(neighbour)
                # An opinion of the layer above is about its input, one of the layer below about its output.
                opinion = (
                    _opinion(traced, neighbour, shape)
                    if above or _same_rank(shapes, neighbour, shape)
                    else None
                )
                if opinion is not None:
                    votes.append(opinion)
                elif shapes.get(neighbour.name) == shape:
                    following.append(neighbour)
        if votes or not following:
            break
        frontier = following
    return votes


def _neighbours(node: fx.Node) -> Iterable[tuple[fx.Node, bool]]:
    for user in node.users:
        yield user, True
    for source in node.all_input_nodes:
        yield source, False


def _same_rank(shapes: Mapping[str, tuple[int, ...]], node: fx.Node, shape: tuple[int, ...]) -> bool:
    return len(shapes.get(node.name, ())) == len(shape)


def _opinion(traced: TracedModel, node: fx.Node, shape: tuple[int, ...]) -> Layout | None:
    """What a node says about a value of this shape that it takes or makes."""
    if node.op == "call_module":
        return _module_opinion(traced.resolve(str(node.target)), shape)
    name = _call_name(node)
    if name.startswith(_CHANNELS_FIRST_CALLS) or name.removeprefix("adaptive_").startswith(
        _CHANNELS_FIRST_CALLS
    ):
        return "map"
    if name in _ATTENTION_CALLS and len(shape) > 3:
        return "other"
    if name in ("linear", "layer_norm"):
        return "map_last"
    return None


def _module_opinion(module: nn.Module, shape: tuple[int, ...]) -> Layout | None:
    if isinstance(module, _CHANNELS_FIRST):
        return "map"
    if isinstance(module, nn.LayerNorm):
        return (
            _by_axis(int(module.normalized_shape[-1]), shape) if len(module.normalized_shape) == 1 else None
        )
    if isinstance(module, nn.Linear):
        return "map_last" if shape[-1] in (module.in_features, module.out_features) else None
    return None


def _by_axis(channels: int, shape: tuple[int, ...]) -> Layout | None:
    """Subclasses of LayerNorm may permute inside: the axis of the right size is the channels'."""
    if shape[-1] == channels:
        return "map_last"
    return "map" if shape[1] == channels else None


def _call_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
