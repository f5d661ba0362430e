"""Recurrent networks: states, packed sequences, cells in loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpad_sequence,
)

from tests.awkward.base import C, D, T, generator, root, sequences


@root(sequences)
class StackedLstm(nn.Module):
    """LSTM, GRU and RNN above one another; states go from one to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, D, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * D, D, num_layers=2, batch_first=True)
        self.rnn, self.last = nn.RNN(D, D, batch_first=True), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x, (hidden, _) = self.lstm(x)
        x, top = self.gru(x, hidden)
        x, top = self.rnn(x, top[-1:])
        return self.last(top[-1] + x[:, 0])


def with_state(batch: int, seed: int, length: int = T) -> dict[str, Any]:
    """(N, T, D) and a pair of states (1, N, D): the batch is not the first axis there."""
    x = torch.randn(batch, length, D, generator=generator(seed))
    state = torch.randn(1, batch, D, generator=generator(seed))
    return {"x": x, "state": (state, state * 0.5)}


@root(with_state)
class StatesGoRound(nn.Module):
    """Takes the states and returns the new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(D, D), nn.LSTM(D, D, batch_first=True), nn.Linear(D, C)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, state = self.lstm(torch.relu(self.first(x)), state)
        return self.last(x[:, -1]), (state[0], state[1])


@root(sequences)
class StateLeftOut(StatesGoRound):
    """The same, without a state: the model makes zeros."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:  # type: ignore[override]
        if state is None:
            zeros = x.new_zeros(1, x.size(0), D)
            state = (zeros, zeros)
        return super().forward(x, state)[0]


@root(sequences)
class TimeFirst(nn.Module):
    """``batch_first=False`` inside: the axes are swapped on the way in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(D, D), nn.GRU(D, D), nn.LSTM(D, D)
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(0, 1)
        x, state = self.one(x)
        x, _ = self.two(x, (state, torch.zeros_like(state)))
        return self.last(x[-1])


def padded(batch: int, seed: int, length: int = T) -> tuple[Tensor, Tensor]:
    """(N, T, D) and lengths (N), at least one of them T."""
    lengths = torch.randint(1, length + 1, (batch,), generator=generator(seed))
    lengths[0] = length
    return torch.randn(batch, length, D, generator=generator(seed)), lengths


@root(padded, guarded="value|specialised")
class PackedAtRoot(nn.Module):
    """Packed and padded again in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(D, D), nn.LSTM(D, D, batch_first=True), nn.Linear(D, C)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.first(x), lengths, batch_first=True, enforce_sorted=False)
        out, (hidden, _) = self.rnn(packed)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return self.last(hidden[-1] + out.sum(1) / lengths[:, None])


class PackedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.linear = nn.GRU(D, D, batch_first=True), nn.Linear(D, D)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.linear(out)


@root(padded)
class PackedInBlocks(nn.Module):
    """Packed and padded again in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(D, D), PackedBlock(), PackedBlock()
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.two(torch.relu(self.one(self.first(x), lengths)), lengths)
        return self.last(x.sum(1))


@root(padded, guarded="value|specialised", refused="value|specialised")
class RaggedList(nn.Module):
    """Unpads to a list of sequences of different lengths, and pads again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = [torch.relu(self.middle(row)) for row in unpad_sequence(self.first(x), lengths, batch_first=True)]
        _ = pack_sequence(rows, enforce_sorted=False)
        return self.last(pad_sequence(rows, batch_first=True).sum(1))


@root(sequences)
class CellsInLoop(nn.Module):
    """GRU and LSTM cells step by step, backwards too, with a list of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru, self.lstm = nn.Linear(D, D), nn.GRUCell(D, D), nn.LSTMCell(D, D)
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.gru(step, state)
            outputs.append(state)
        pair = (torch.zeros_like(outputs[0]), torch.zeros_like(outputs[0]))
        for t in reversed(range(x.size(1))):
            pair = self.lstm(outputs[t], pair)
        return self.last(pair[0])


@root(sequences, guarded="sets|state|attribute", refused="sets|attribute|side channel|detach")
class StatefulAtRoot(nn.Module):
    """The state is kept on the root between calls, detached, as in truncated backpropagation through time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(D, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, C)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        state = None if self.state is None or self.state.shape[1] != x.shape[0] else self.state
        x, state = self.rnn(torch.relu(self.first(x)), state)
        self.state = state.detach()
        return self.last(x[:, -1])


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.linear = nn.GRU(D, D, batch_first=True), nn.Linear(D, D)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None or self.state.shape[1] != x.shape[0]:
            self.state = x.new_zeros(1, x.shape[0], D)
        x, state = self.rnn(x, self.state)
        self.state = state.detach()
        return self.linear(x)


@root(sequences)
class StatefulInBlock(nn.Module):
    """The state is kept in a block between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), Remembering(), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.relu(self.first(x))).mean(1))
