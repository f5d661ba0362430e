"""The recordings of one model, until both modes succeed under one set of remedies."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from localize.convert.context import Subject
from localize.convert.obstacle import Obstacle, Remedy
from localize.convert.outcome import traced_model
from localize.convert.recording import Example, record
from localize.convert.restore import preserved
from localize.convert.traced import TracedModel
from localize.errors import TraceError
from localize.signature import CallSignature

MAX_RESTARTS = 100


class Session:
    """Tries, and learns from each obstacle."""

    def __init__(self, model: nn.Module, signature: CallSignature, leaves: list[Tensor]) -> None:
        self._subject = Subject.of(model)
        self._example = Example(signature, leaves)
        self._restarts = 0
        self._settled = ExitStack()

    def capture(self) -> TracedModel:
        """Records both modes, again and again until nothing is in the way.

        Raises:
            TraceError: something is, and nothing helps.
        """
        while True:
            try:
                train = record(self._subject, self._example, training=True)
                evaluation = record(self._subject, self._example, training=False)
            except Obstacle as obstacle:
                self._give_way(obstacle)
            else:
                return traced_model(self._subject, self._example, train, evaluation)

    def _give_way(self, obstacle: Obstacle) -> None:
        """Applies the obstacle's remedy; where there is none, makes the module in the way a leaf.

        Raises:
            TraceError: it is the root itself, or nothing helps.
        """
        self._restarts += 1
        if self._restarts > MAX_RESTARTS or not (self._remedied(obstacle) or self._kept_whole(obstacle)):
            raise TraceError(
                f"The model cannot be captured. {obstacle}. Put these lines into an nn.Module of their own: it is then "
                "kept whole. Or convert the modules around."
            ) from obstacle

    def _remedied(self, obstacle: Obstacle) -> bool:
        """Whether something else than keeping the module whole was done."""
        remedies = self._subject.remedies
        match obstacle.remedy:
            case Remedy.WATCH:
                remedies.watch_random = True
                return True
            case Remedy.FAKE if not remedies.fake:
                remedies.fake = True
                return True
            case Remedy.GUARD:
                return self._subject.policy.guard(obstacle.scope)
            case Remedy.GENERAL if not remedies.general:
                remedies.general = True
                return True
            case Remedy.SETTLE if not remedies.settled:
                remedies.settled = True
                self._settle()
                return True
            case Remedy.REBIND:
                remedies.rebound.add(obstacle.name)
                return True
        return False

    def _kept_whole(self, obstacle: Obstacle) -> bool:
        return obstacle.scope != "" and self._subject.policy.keep_whole(obstacle.scope, str(obstacle))

    def _settle(self) -> None:
        """Runs the model once, so that what it sets up at its first call is there; undone after the session."""
        model = self._subject.root
        self._settled.enter_context(preserved(model))
        for training in (True, False):
            model.train(training)
            with torch.inference_mode(False), torch.enable_grad():
                self._example.call(model)

    def close(self) -> None:
        """Puts the model back as it was before the session."""
        self._settled.close()
