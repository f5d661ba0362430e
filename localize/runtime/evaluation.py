"""Loss and accuracy of every exit where each rank has some of the parts: the batches go through them as in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from localize.model import ExitModel
from localize.part import Part, advance, evaluating
from localize.runtime import batches
from localize.runtime.messages import Side, Upward
from localize.runtime.metrics import scores_of, summary
from localize.runtime.precision import Autocast
from localize.runtime.wire import Kind
from localize.signature import Call, tensors_of, to_device

if TYPE_CHECKING:
    from localize.runtime.team import Team


def evaluate(team: Team, loader: Iterable[Any], autocast: Autocast) -> dict[str, Any]:
    """See ``Trainer.evaluate``. All ranks call this; the first reads ``loader``, and all get the result.

    With replicas, the first of them does it.
    """
    found: dict[str, Any] = {"sums": {}, "samples": 0}
    if team.placement.replica == 0:
        sums, samples = _evaluated(team, loader, autocast)
        found = {"sums": {n: s.tolist() for n, s in sums.items()}, "samples": samples}
    gathered = team.session.gather(found)
    by_exit = {int(n): s for values in gathered for n, s in values["sums"].items()}
    return summary(dict(sorted(by_exit.items())), gathered[0]["samples"])


def _evaluated(team: Team, loader: Iterable[Any], autocast: Autocast) -> tuple[dict[int, Tensor], int]:
    local, placement = team.local, team.placement
    with evaluating(local, local.to_standard()):
        models = {exit.number: cast(ExitModel, local.exit_model(exit.number)) for exit in local.exits}
        predictors = {number: model.predictor for number, model in models.items()}
        wanted = {
            rank: [predictor for n in numbers if (predictor := predictors.get(n)) is not None]
            for rank, numbers in enumerate(placement.ranges)
        }
        with team.holdings.borrowed(wanted):
            return _sums(team, loader, predictors, autocast)


def _sums(
    team: Team, loader: Iterable[Any], predictors: dict[int, nn.Module | None], autocast: Autocast
) -> tuple[dict[int, Tensor], int]:
    sums: dict[int, Tensor] = {}
    samples = 0
    for step, (arrived, size) in enumerate(_batches(team, loader)):
        samples += size
        predictions: dict[int, Tensor] = {}
        stream = arrived.stream
        with autocast():
            for number in team.placement.numbers:
                part = cast(Part, team.local.parts[number - 1])
                predictor = predictors.get(number)
                hidden, stream = advance(part, stream, hidden_only=predictor is not None)
                if number in predictors:
                    logits = predictor(hidden) if predictor is not None else team.local.task.logits(hidden)
                    predictions[number] = logits
        team.wires.at(Kind.EVAL, step, size)
        team.wires.send(Side.ABOVE, Upward(stream, arrived.target))
        for number, logits in predictions.items():
            with torch.no_grad():
                scores = scores_of(team.local.task, logits, arrived.target, size)
            sums[number] = scores if number not in sums else sums[number] + scores
    team.wires.end()
    return sums, samples


def _batches(team: Team, loader: Iterable[Any]) -> Iterator[tuple[Upward, int]]:
    if not team.first:
        for arrived, samples, _ in team.wires.batches(Kind.EVAL):
            yield arrived, samples
        return
    for inputs, target in batches.pairs(loader, team.options.split_batch):
        team.local.check_target(target, tensors_of(inputs))
        inputs, target = to_device(inputs, team.device), to_device(target, team.device)
        call = Call.of(inputs)
        stream = team.local.signature.stream(call.args, call.kwargs)
        yield Upward(stream, target), batches.batch_size(inputs, target)
