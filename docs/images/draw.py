"""Draws the README's picture: end-to-end training above, local learning below. Needs the `plot` extra.

    python docs/images/draw.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PART, HEAD, FORWARD, BACKWARD = "#1f2933", "#dbe7f5", "#fde7c8", "#2f6fb0", "#c4512d"
PARTS = 4


def box(ax, x, y, width, height, color, text) -> None:
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color, ec=INK, lw=1)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=INK)


def arrow(ax, start, end, color, bend=0.0) -> None:
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.6, connectionstyle=style)
    )


def row(ax, y, local: bool) -> None:
    for k in range(PARTS):
        x = 0.6 + 2.2 * k
        box(ax, x, y, 1.3, 0.7, PART, f"part {k + 1}")
        arrow(ax, (x - 0.85 if k else x - 0.5, y + 0.48), (x - 0.04, y + 0.48), FORWARD)
        if local:
            box(ax, x + 0.15, y + 1.15, 1.0, 0.5, HEAD, f"head {k + 1}")
            arrow(ax, (x + 0.5, y + 0.74), (x + 0.5, y + 1.12), FORWARD)
            arrow(ax, (x + 0.8, y + 1.12), (x + 0.8, y + 0.74), BACKWARD)
        elif k:
            arrow(ax, (x - 0.04, y + 0.22), (x - 0.85, y + 0.22), BACKWARD)
    x = 0.6 + 2.2 * PARTS
    if not local:
        arrow(ax, (x - 0.85, y + 0.48), (x - 0.04, y + 0.48), FORWARD)
        arrow(ax, (x - 0.04, y + 0.22), (x - 0.85, y + 0.22), BACKWARD)
        box(ax, x, y, 0.9, 0.7, HEAD, "loss")


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "localize"
    plt.rcParams["svg.fonttype"] = "path"
    figure, ax = plt.subplots(figsize=(10, 4.1))
    ax.text(0.05, 4.75, "end to end: every part waits for the gradient of all parts above", fontsize=11, color=INK)
    row(ax, 3.7, local=False)
    ax.text(0.05, 2.75, "localize: a loss a part; activations are freed at once", fontsize=11)
    row(ax, 0.65, local=True)
    ax.plot([], [], color=FORWARD, label="activations")
    ax.plot([], [], color=BACKWARD, label="gradients")
    ax.legend(loc="lower right", ncols=2, frameon=False, fontsize=10)
    ax.set_xlim(0, 10.6)
    ax.set_ylim(0.1, 5.1)
    ax.axis("off")
    figure.savefig(Path(__file__).parent / "local-learning.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
