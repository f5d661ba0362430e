"""``LocalModel``: the user's model in local-learning form, its exits and its training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localize.errors import ConfigError, MethodError
from localize.heads.base import Head, Method, Target
from localize.part import Part, advance, evaluating, run_parts, set_own_mode
from localize.signature import Call, CallSignature
from localize.spec import Plan, StepResult
from localize.task import Task

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

@dataclass(frozen=True)
class Exit:
    """A sub-model of parts 1..``number`` and what turns its hidden state into a prediction.

    ``parameters`` says how many it has, training-only weights left out; ``flops`` how many floating-point
    operations a forward pass through its parts takes, for one sample.
    """

    number: int
    parameters: int
    flops: float | None = None


class Toolkit(Protocol):
    """What a ``LocalModel`` can do but must not import: the runtime, the grafting, the artefact's files."""

    def losses(self, local: LocalModel, call: Call, target: Target) -> list[Tensor]: ...

    def train_step(
        self, local: LocalModel, call: Call, target: Target, optimizers: Sequence[Optimizer], keep_grads: bool
    ) -> StepResult: ...

    def append_part(self, local: LocalModel, module: nn.Module, freeze_below: bool) -> None: ...

    def save(self, local: LocalModel, folder: Path) -> None: ...


class LocalModel(nn.Module):
    """The user's model in local-learning form. Made by ``to_local``.

    Parameters are the user's own: training this trains ``to_standard()``.

    Attributes:
        parts: the parts, bottom first (``parts[0]`` is part 1).
        method, task, plan: how it learns, what for, and where it is cut.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        heads: Sequence[Head | None],
        *,
        method: Method,
        task: Task,
        plan: Plan,
        signature: CallSignature,
        toolkit: Toolkit,
    ) -> None:
        super().__init__()
        # Not registered: every parameter is reached through the parts, under the same name, and only once.
        self.__dict__["_standard"] = model
        self.__dict__["_toolkit"] = toolkit
        self.parts = nn.ModuleList(parts)
        self.grafts = nn.ModuleDict({str(i): head for i, head in enumerate(heads, 1) if head is not None})
        self.method, self.task, self.plan, self.signature = method, task, plan, signature
        self.appended: list[nn.Module] = []  # modules of append_part, which to_standard() does not have
        self.source: str | None = None  # the MODEL spec it came from, for `load` without a model
        self.training = model.training  # the user's modules keep the modes they have
        set_own_mode(self, model.training)
        self.grafts.train(model.training)

    @property
    def _pieces(self) -> list[Part]:
        return cast(list[Part], list(self.parts))

    @property
    def heads(self) -> list[Head | None]:
        """One entry a part; None where a part has no head."""
        return [self.grafts[str(i)] if str(i) in self.grafts else None for i in range(1, len(self.parts) + 1)]  # type: ignore[misc]

    # ---------------------------------------------------------------- inference

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's own output; for AL the logits (N, C) of the AL path."""
        number = len(self.parts)
        if self.method.predicts == "path":
            return self._exit_logits(Call(inputs, kwargs), number, self._predictor(number))
        return run_parts(self.parts, self.signature, Call(inputs, kwargs))

    @property
    def exits(self) -> list[Exit]:
        """The sub-models that can predict, smallest first."""
        return [self._exit(n) for n in range(1, len(self.parts) + 1) if self._has_exit(n)]

    def _has_exit(self, number: int) -> bool:
        ends = number == len(self.parts) and self.method.predicts != "path"
        return ends or self.method.predictor(self.heads[:number]) is not None

    def _exit(self, number: int) -> Exit:
        weights = {id(p): p.numel() for p in self.exit_model(number).parameters()}
        axes = [(spec.shape, spec.batch_axis) for spec in self.plan.inputs]
        samples = next((shape[axis] for shape, axis in axes if axis is not None), 1)  # of the example
        flops = sum(p.part.flops for p in self.plan.parts[:number]) / max(1, samples)
        return Exit(number, sum(weights.values()), flops)

    def predict(self, inputs: Any, exit: int | None = None) -> Tensor:
        """Logits (N, C) of exit ``exit`` (1..K, default K) in eval mode and without gradients.

        Raises:
            ConfigError: no such part.
            MethodError: the method's heads do not predict there.
        """
        number = len(self.parts) if exit is None else exit
        predictor = self._predictor(number)
        with evaluating(self, self.to_standard()):
            return self._exit_logits(Call.of(inputs), number, predictor)

    def predict_all(self, inputs: Any) -> dict[int, Tensor]:
        """Logits (N, C) of every exit, each part run once; eval mode, no gradients."""
        call, result = Call.of(inputs), {}
        with evaluating(self, self.to_standard()):
            stream = self.signature.stream(call.args, call.kwargs)
            for number, part in enumerate(self._pieces, 1):
                if not self._has_exit(number):
                    _, stream = advance(part, stream)
                    continue
                predictor = self._predictor(number)
                hidden, stream = advance(part, stream, hidden_only=predictor is not None)
                result[number] = predictor(hidden) if predictor is not None else self.task.logits(hidden)
        return result

    def _exit_logits(self, call: Call, number: int, predictor: nn.Module | None) -> Tensor:
        hidden = run_parts(self.parts[:number], self.signature, call, hidden_only=predictor is not None)
        logits: Tensor = predictor(hidden) if predictor is not None else self.task.logits(hidden)
        return logits

    def _predictor(self, number: int) -> nn.Module | None:
        parts = len(self.parts)
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= parts:
            raise ConfigError(f"There is no exit {number!r}: this model has {parts} parts, counted from 1.")
        if number == parts and self.method.predicts != "path":
            return None
        predictor = self.method.predictor(self.heads[:number])
        if predictor is None:
            raise MethodError(
                f"Method {self.method.name!r} has no prediction at exit {number} of {parts}: its heads are only for "
                f"training. Use exit={parts}, or a method with exits (al, nwise, lct, early_exit, joint)."
            )
        predictor.training = self.training
        return predictor

    def exit_model(self, number: int) -> nn.Module:
        """Exit ``number`` as a stand-alone module, sharing weights, without anything that only training needs.

        Raises:
            ConfigError: no such part.
            MethodError: the method's heads do not predict there.
        """
        predictor = self._predictor(number)
        parts = self._pieces[:number]
        if predictor is not None and parts[-1].route.hidden is not None:
            parts[-1] = parts[-1].below_classifier()
        return ExitModel(parts, predictor, self.signature, self.task, self.training)

    # ---------------------------------------------------------------- training

    def losses(self, inputs: Any, target: Target) -> list[Tensor]:
        """One isolated loss per part; ``sum(losses).backward()`` leaves the gradients that ``train_step`` uses.

        The gradients are computed here, part by part with activations released as it goes, and each returned
        scalar hands its own to the parameters it trains when it is backpropagated (scaled, if it was).
        Under ``torch.no_grad()`` only values are computed. A part without a loss of its own has a constant 0.
        Where several losses train one part (``joint``, n-wise with ``sum``), the part's whole gradient hangs on the
        highest of them: add the losses up, do not weigh them. Loss scaling for float16 comes too late here; use
        bfloat16, or ``Trainer(precision="fp16")``.
        """
        return self.__dict__["_toolkit"].losses(self, Call.of(inputs), target)  # type: ignore[no-any-return]

    def check_target(self, target: Any, inputs: Iterable[Tensor]) -> None:
        """Raises ``TaskError`` for a target that does not fit the task, or the number of samples in ``inputs``."""
        self.task.check_target(target, inputs if self.plan.has_batch else (), self.plan.batch_axis)

    def train_step(
        self, inputs: Any, target: Target, optimizers: Optimizer | Sequence[Optimizer], *, keep_grads: bool = True
    ) -> StepResult:
        """Forward, local backward and update part by part; a part's activations are freed before the next runs.

        ``optimizers`` may group parts and heads in any way; one optimizer for all will do. Gradients are zeroed
        before use. ``keep_grads=False`` drops each part's gradients after its update, so that gradients, too, take
        the room of the largest part only.
        """
        each = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
        return self.__dict__["_toolkit"].train_step(self, Call.of(inputs), target, each, keep_grads)  # type: ignore[no-any-return]

    def optimizers(
        self, factory: OptimizerFactory, head_factory: OptimizerFactory | None = None
    ) -> list[Optimizer]:
        """One optimizer a part, its head's parameters included; two where the method or ``head_factory`` separates
        them (the part's first). Parts without trainable parameters get none."""
        result = []
        for part, head in zip(self.parts, self.heads, strict=True):
            own = [p for p in part.parameters() if p.requires_grad]
            extra = [p for p in head.parameters() if p.requires_grad] if head is not None else []
            separate = head_factory is not None or self.method.separate_head_optimizer
            if not separate:
                own, extra = own + extra, []
            if own:
                result.append(factory(own))
            if extra:
                result.append((head_factory or self._head_factory(factory))(extra))
        return result

    def _head_factory(self, factory: OptimizerFactory) -> OptimizerFactory:
        rate = self.method.head_learning_rate
        return factory if rate is None else lambda parameters: torch.optim.Adam(parameters, lr=rate)

    def append_part(self, module: nn.Module, freeze_below: bool = True) -> None:
        """Puts a new part with a new head on top (dynamic layer accumulation, AL section 2.2.2).

        ``module`` takes the top part's hidden state. ``freeze_below`` stops training the parts and heads below;
        statistics of batch normalisation there still move in train mode, as for any frozen layer.
        ``to_standard()`` stays the model that was converted, without the new part.

        Raises:
            CutError: the top part has no hidden state below a classifier of its own.
            ConfigError: ``module`` does not take that hidden state, or does not give what the task needs.
            MethodError: the method has no head for it.
        """
        self.__dict__["_toolkit"].append_part(self, module, freeze_below)

    # ---------------------------------------------------------------- the model itself

    def to_standard(self) -> nn.Module:
        """The very model that was converted, with the weights trained so far."""
        model: nn.Module = self.__dict__["_standard"]
        return model

    def save(self, folder: str | Path) -> None:
        """Writes the artefact folder: ``plan.json``, ``weights.safetensors``, ``part_K.py``.

        Raises:
            CheckpointError: the folder is something else's, or the example inputs cannot be described.
        """
        self.__dict__["_toolkit"].save(self, Path(folder))

    def train(self, mode: bool = True) -> LocalModel:
        """As ``nn.Module.train``, for the parts, the heads and the original model."""
        super().train(mode)
        self.__dict__["_standard"].train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LocalModel:
        # Through the original model, so that each tensor is converted once and all holders see the same one.
        self.__dict__["_standard"]._apply(fn, recurse)
        self.grafts._apply(fn, recurse)
        for module in self.appended:
            module._apply(fn, recurse)
        for part in self._pieces:
            part.take_over(self.__dict__["_standard"], fn)
        return self


class ExitModel(nn.Module):
    """The lower parts of a model and a predictor: for inference. Shares the weights, knows nothing of training."""

    def __init__(
        self,
        parts: Sequence[Part],
        predictor: nn.Module | None,
        signature: CallSignature,
        task: Task,
        training: bool,
    ) -> None:
        super().__init__()
        self.training = training  # the modules are shared, and keep the modes they have
        self.parts = nn.ModuleList(parts)
        self.predictor = predictor
        self.signature, self.task = signature, task

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Logits (N, C)."""
        hidden = run_parts(self.parts, self.signature, Call(inputs, kwargs))
        logits: Tensor = self.predictor(hidden) if self.predictor is not None else self.task.logits(hidden)
        return logits


