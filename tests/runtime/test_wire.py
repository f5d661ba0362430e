"""Messages as bytes and back; and what a receiver says of bytes that are not what they should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from localize import WireError
from localize.runtime.messages import Feedback, Message, Relay, Upward
from localize.runtime.wire import (
    HEADER_BYTES,
    Edge,
    Envelope,
    Kind,
    body_bytes,
    decode,
    decode_header,
    encode,
    place,
    room_for,
)

EDGE = Edge(2, 3)
WHERE = place(6, EDGE)
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip


def sent_and_received(envelope: Envelope) -> Envelope:
    """As over a transport: sizes come from the header alone."""
    header, rest, payload = encode(envelope)
    assert header.numel() == HEADER_BYTES
    assert body_bytes(header, WHERE) == (0 if rest is None else rest.numel())
    known = decode_header(header, rest, WHERE)
    assert known.payload_bytes == (0 if payload is None else payload.numel())
    return decode(known, payload)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
        )
    return type(one) is type(other) and one == other


def same(one: Any, other: Any) -> bool:
    flat, spec = pytree.tree_flatten(one)
    back, found = pytree.tree_flatten(other)
    return spec == found and all(map(equal, flat, back))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    value = (torch.arange(torch.Size(shape).numel()) % 5).reshape(shape).to(dtype)
    if draw(st.booleans()):
        value = value.permute(draw(st.permutations(range(value.dim()))))
    if value.dim() and value.shape[0] and draw(st.booleans()):
        value = value[draw(st.integers(0, value.shape[0] - 1)) :: draw(st.integers(1, 2))]
    if draw(st.booleans()):
        value = value.unsqueeze(-1).expand(*value.shape, draw(st.integers(1, 3)))
    return value


plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
targets = st.recursive(
    tensors() | plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
names = st.text(min_size=1, max_size=8)
streams = st.dictionaries(names, tensors(), max_size=4)
messages = st.one_of(
    st.none(),
    st.builds(Upward, streams, targets),
    st.builds(Relay, streams),
    st.builds(Feedback, tensors()),
)


@settings(max_examples=150, deadline=None)
@given(messages, st.sampled_from(Kind), st.integers(0, 2**62), st.dictionaries(names, plain, max_size=2))
def test_what_is_sent_is_received(message: Message | None, kind: Kind, step: int, note: dict[str, Any]) -> None:
    back = sent_and_received(Envelope(kind, step, EDGE, message, note))
    assert (back.kind, back.step, back.edge, back.note) == (kind, step, EDGE, note)
    assert type(back.message) is type(message)
    match message, back.message:
        case Upward(), Upward():
            assert list(back.message.stream) == list(message.stream)
            assert same(message.stream, back.message.stream)
            assert same(message.target, back.message.target)
        case Relay(), Relay():
            assert same(message.grads, back.message.grads)
        case Feedback(), Feedback():
            assert same(message.per_sample, back.message.per_sample)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(4, 6).t(),
        torch.randn(6, 8)[:, :4],
        torch.randn(3, 1).expand(3, 5),
    ],
    ids=["channels last", "transposed", "a slice", "expanded"],
)
def test_strides_travel_too(value: Tensor) -> None:
    """A convolution of a channels-last map rounds otherwise than one of a contiguous map with the same numbers."""
    back = sent_and_received(Envelope(Kind.DATA, 1, EDGE, Feedback(value))).message
    assert isinstance(back, Feedback)
    assert back.per_sample.stride() == value.stride()
    assert torch.equal(back.per_sample, value)


def test_an_expanded_tensor_is_not_blown_up() -> None:
    _, _, payload = encode(Envelope(Kind.DATA, 1, EDGE, Feedback(torch.ones(1, 1).expand(1000, 1000))))
    assert payload is not None
    assert payload.numel() == 256 + 8  # one number, at a multiple of 256, and the seal


def test_the_message_is_a_copy() -> None:
    value = torch.ones(5)
    header, rest, payload = encode(Envelope(Kind.DATA, 1, EDGE, Feedback(value)))
    value.zero_()
    back = decode(decode_header(header, rest, WHERE), payload).message
    assert isinstance(back, Feedback)
    assert back.per_sample.sum() == 5


def test_received_tensors_are_changed_in_place_one_by_one() -> None:
    """Views of one payload count changes together: a backward pass that needs another value of it failed."""
    stream = {"kept": torch.full((4,), 3.0), "changed": torch.full((4,), -1.0)}
    back = sent_and_received(Envelope(Kind.DATA, 1, EDGE, Upward(stream, None))).message
    assert isinstance(back, Upward)
    weight = torch.ones(4, requires_grad=True)
    product = back.stream["kept"].detach() * weight
    back.stream["changed"].detach().relu_()
    product.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 4


def test_a_body_larger_than_the_header_follows_it() -> None:
    stream = {f"a value with a long name {i}": torch.full((2,), float(i)) for i in range(200)}
    header, rest, _ = encode(Envelope(Kind.DATA, 1, EDGE, Upward(stream, None)))
    assert rest is not None
    assert body_bytes(header, WHERE) == rest.numel() > 0
    back = sent_and_received(Envelope(Kind.DATA, 1, EDGE, Upward(stream, None))).message
    assert isinstance(back, Upward)
    assert same(back.stream, stream)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_damaged_header_is_noticed(position: int, flip: int) -> None:
    envelope = Envelope(Kind.DATA, 7, EDGE, Upward({"x": torch.ones(2, 3)}, torch.zeros(2)), {"samples": 2})
    header, rest, _ = encode(envelope)
    used = int((header != 0).nonzero().max()) + 1
    header[position % used] ^= flip
    with pytest.raises(WireError):
        body_bytes(header, WHERE)
        decode_header(header, rest, WHERE)


@pytest.mark.parametrize("kept", [0, 3, 40, 100])
def test_a_truncated_header_is_noticed(kept: int) -> None:
    header, rest, _ = encode(Envelope(Kind.DATA, 7, EDGE, Upward({"x": torch.ones(2, 3)}, torch.zeros(2))))
    header[kept:] = 0  # what a short send leaves of a buffer of zeros
    with pytest.raises(WireError):
        decode_header(header, rest, WHERE)


@pytest.mark.parametrize("kept", [0, 1, 256, 512, 775])
def test_a_truncated_payload_is_noticed(kept: int) -> None:
    header, rest, payload = encode(Envelope(Kind.DATA, 7, EDGE, Upward({"x": torch.ones(10, 8)}, torch.ones(2))))
    known = decode_header(header, rest, WHERE)
    assert payload is not None
    received = room_for(known)
    received[:kept] = payload[:kept]
    with pytest.raises(WireError, match=r"Step 8, edge part 2 -> part 3: expected 776 bytes of x float32 \(10, 8\)"):
        decode(known, received)


def test_another_version_is_named() -> None:
    header, _, _ = encode(Envelope(Kind.EOS, 0, EDGE))
    header[4] += 1
    with pytest.raises(WireError, match="Step 7, edge part 2 -> part 3: expected a message of version 1, found 2"):
        body_bytes(header, WHERE)


def test_another_dtype_of_a_header_is_noticed() -> None:
    """A transport reinterprets bytes without a word: here a receiver is given random floats."""
    noise = torch.randn(HEADER_BYTES // 4).view(torch.uint8)
    with pytest.raises(WireError, match="Step 7, edge part 2 -> part 3: expected a header that begins with"):
        body_bytes(noise, WHERE)


class _Odd:
    pass


def test_a_target_that_cannot_travel_says_so() -> None:
    with pytest.raises(WireError, match="Step 4, edge part 2 -> part 3: a target holds a _Odd"):
        encode(Envelope(Kind.DATA, 3, EDGE, Upward({}, (torch.ones(1), _Odd()))))


def test_a_tensor_that_cannot_travel_says_so() -> None:
    with pytest.raises(WireError, match=r"x is a torch.sparse_coo tensor on cpu, which cannot travel"):
        encode(Envelope(Kind.DATA, 3, EDGE, Upward({"x": torch.ones(2, 2).to_sparse()}, None)))
