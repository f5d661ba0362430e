"""Layouts of the values inside real models, and where recurrent layers leave their final state."""

import pytest
import torch
from torch import nn

from localize.convert.profile import profile
from localize.convert.record import trace


def specs(model, *inputs):
    """The specs of all plain tensors of more than two axes, in order, layout and final state together."""
    traced = trace(model, inputs, {})
    found = profile(traced)
    return [
        (node.specs[0].layout, node.specs[0].final)
        for node in found.nodes.values()
        if node.is_tensor and node.specs and len(node.specs[0].shape) > 2
    ]


class Recurrent(nn.Module):
    def __init__(self, rnn, after):
        super().__init__()
        self.rnn, self.after, self.out = rnn, after, nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.after(self.rnn(x)[0])[:, -1])


class Flipped(nn.Module):
    def forward(self, x):
        return x.flip(1)


@pytest.mark.parametrize(
    ("rnn", "after", "expected"),
    [
        (nn.LSTM(8, 8, batch_first=True), nn.Identity(), "last"),
        (nn.GRU(8, 4, batch_first=True, bidirectional=True), nn.Identity(), "both"),
        (nn.GRU(8, 8, batch_first=True), nn.Sequential(nn.LayerNorm(8), nn.Dropout(), nn.Tanh()), "last"),
        (nn.GRU(8, 8, batch_first=True), nn.Sequential(nn.Linear(8, 8)), None),
        (nn.GRU(8, 8, batch_first=True), Flipped(), None),
    ],
    ids=["lstm", "both directions", "tokenwise layers", "linear", "flip"],
)
def test_the_final_state_of_recurrent_layers_is_known(rnn, after, expected):
    found = specs(Recurrent(rnn, after), torch.randn(2, 5, 8))
    assert found[0] == ("tokens", None)  # the input
    assert found[-1] == ("tokens", expected)


def test_packed_sequences_have_no_one_place_for_their_final_state():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5] * len(x)), batch_first=True)
            made, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.out(made.mean(1))

    assert all(final is None for _, final in specs(Packed(), torch.randn(2, 5, 8)))


def test_videos_of_both_layouts():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.mix = nn.Conv3d(2, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            x = torch.relu(self.conv(x)).permute(0, 2, 3, 4, 1)
            return self.out(torch.tanh(self.mix(self.norm(x))).mean((1, 2, 3)))

    layouts = [layout for layout, _ in specs(Video(), torch.randn(2, 2, 3, 5, 4))]
    assert layouts[:3] == ["map", "map", "map"]
    assert set(layouts[3:]) == {"map_last"}
