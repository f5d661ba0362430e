"""The flags of ``localize schedule``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model as for convert, or an artefact folder: its parts' costs are used.",
        show_default=False,
    ),
]
Batches = Annotated[int, typer.Option("--batches", "-b", help="How many batches to show.")]
Microbatches = Annotated[int, typer.Option(help="Micro-batches of a batch.", metavar="M")]
Ranks = Annotated[
    int | None,
    typer.Option(
        help="Ranks that share the parts, consecutive ones each, as in training; one a part if left out.",
        metavar="R",
        show_default=False,
    ),
]
Order = Annotated[str, typer.Option(help="stage; for bp and joint also 1f1b or hogwild (stale gradients).")]


def _cost(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=text, metavar="COST", show_default=False)
    return option


Forward = Annotated[str | None, _cost("A part's forward pass; 1 if left out.")]
Loss = Annotated[str | None, _cost("A part's head and loss, forward and backward; 0.")]
Backward = Annotated[str | None, _cost("A backward pass through a part; 1.")]
Update = Annotated[str | None, _cost("A part's optimizer step; 0.")]
Relay = Annotated[str | None, _cost("A backward pass that only passes gradients on; as --backward.")]
Feedback = Annotated[str | None, _cost("A head's second backward pass (lct); 0.")]
Transfer = Annotated[str | None, _cost("A batch's way across a boundary; 0.")]
Window = Annotated[
    int | None,
    typer.Option(
        help="Messages that may be under way at a boundary; any number if left out, 2 with MODEL.",
        metavar="N",
        show_default=False,
    ),
]
Flops = Annotated[
    str | None,
    typer.Option(
        help="With MODEL: FLOP/s that a device reaches, as 10T, or one a part with commas. Left out: the times "
        "that --balance time measured.",
        metavar="RATE",
    ),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(help="With MODEL: bytes a second across a boundary, as 12.5G.", metavar="RATE"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="With MODEL: samples of a batch; its example's if left out.", show_default=False),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Beside it: the same parts end to end, as they are, GPipe and 1F1B.")
]
Plot = Annotated[
    Path | None, typer.Option(help="Write a picture: .svg, .png or .pdf.", metavar="FILE")
]
Trace = Annotated[
    Path | None,
    typer.Option(help="Write a trace for chrome://tracing or ui.perfetto.dev.", metavar="FILE"),
]
