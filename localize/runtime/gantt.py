"""A picture of timelines, a panel each, a row a part. Needs the ``plot`` extra."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localize.errors import ConfigError
from localize.runtime.files import written
from localize.runtime.timeline import Interval, Timeline

COLORS = {
    "forward": "#7fb3e6",
    "head": "#f3c969",
    "backward": "#d9734e",
    "relay": "#f2bfa8",
    "update": "#6b8f5e",
}
_NAMES = {"head": "head and loss", "relay": "gradients passed on"}
_INK, _PAPER = "#1f2933", "#ffffff"
SUFFIXES = (".png", ".svg", ".pdf")
_MOST_LABELS = 600  # of one panel: more could not be read
_WIDTH, _ROW = 11.0, 0.32  # inches


def draw(timelines: Sequence[Timeline], path: str | Path) -> None:
    """Writes a Gantt picture, by the path's suffix as PNG, SVG or PDF; all panels share one axis of time.

    Boxes carry the number of their batch (and of the micro-batch, after a dot) where there is room for it.
    The file's folder is made where there is none.

    Raises:
        ConfigError: another suffix, no timelines, timelines of different units, or no matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"A picture is a file with one of the suffixes {', '.join(SUFFIXES)}; got {str(path)!r}.")
    units = {timeline.unit for timeline in timelines}
    if len(units) != 1:
        raise ConfigError(f"A picture takes timelines of one unit, got {len(timelines)} in {sorted(units) or 'none'}.")
    matplotlib = _matplotlib("matplotlib")
    rows = [len(timeline.parts) for timeline in timelines]
    with matplotlib.rc_context({"svg.hashsalt": "localize", "svg.fonttype": "none", "font.size": 8}):
        size = (_WIDTH, _ROW * sum(rows) + 0.55 * len(rows) + 0.6)
        figure = _matplotlib("matplotlib.figure").Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
        span = max(timeline.steps for timeline in timelines) or 1.0
        for panel, timeline in zip(panels, timelines, strict=True):
            _panel(panel, timeline, span)
        panels[-1].set_xlabel("time steps" if units == {"steps"} else "seconds")
        _legend(figure, timelines)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        look: dict[str, Any] = {"dpi": 150, "facecolor": _PAPER, "metadata": metadata}
        written(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), **look))


def _panel(panel: Any, timeline: Timeline, span: float) -> None:
    row_of = {part: row for row, part in enumerate(timeline.parts)}
    shown = [each for each in timeline.intervals if each.kind != "wait"]
    panel.barh(
        [row_of[each.part] for each in shown],
        [each.duration for each in shown],
        left=[each.start - timeline.start for each in shown],
        height=0.86,
        color=[COLORS[each.label] for each in shown],
        edgecolor=_PAPER,
        linewidth=0.5,
        clip_on=False,
    )
    if len(shown) <= _MOST_LABELS:
        for each in shown:
            text = _text(each)
            if each.duration / span * _WIDTH > 0.075 * len(text):
                middle = (each.start + each.end) / 2 - timeline.start
                panel.text(middle, row_of[each.part], text, ha="center", va="center", color=_INK, fontsize=7)
    amount = f"{timeline.steps:g} time steps" if timeline.unit == "steps" else f"{timeline.steps:.4g} s"
    panel.set_title(f"{timeline.title}: {amount}" if timeline.title else amount, loc="left", fontsize=9, color=_INK)
    panel.set_yticks(range(len(row_of)), [timeline.row(part) for part in row_of])
    panel.set_ylim(len(row_of) - 0.5, -0.5)
    panel.set_xlim(0, span)
    panel.tick_params(length=0, labelcolor=_INK)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _text(each: Interval) -> str:
    return str(each.batch) if each.micro is None else f"{each.batch}.{each.micro}"


def _legend(figure: Any, timelines: Sequence[Timeline]) -> None:
    present = {each.label for timeline in timelines for each in timeline.intervals}
    patch = _matplotlib("matplotlib.patches").Patch
    handles = [patch(color=color, label=_NAMES.get(kind, kind)) for kind, color in COLORS.items() if kind in present]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(COLORS), frameon=False)


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"matplotlib is not installed ({error}); `pip install 'localize-torch[plot]'`.") from error
