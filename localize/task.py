"""What a model is trained for: how its output and a target make a loss, and how well it does.

Shape legend: ``N`` batch, ``C`` classes, ``T`` tokens, ``H W`` space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from localize.errors import TaskError, did_you_mean

TaskKind = Literal["classification", "causal_lm", "segmentation", "regression"]
IGNORE_INDEX = -100  # PyTorch's: targets with this value carry no loss
_TARGET_AXES = {"classification": 1, "causal_lm": 2, "segmentation": 3}
_OUTPUT_NAMES = ("logits", "out", "prediction_logits")


@dataclass(frozen=True)
class Task:
    """A kind of supervised task.

    Args:
        kind: ``classification`` (logits (N, C), targets (N)), ``causal_lm`` (logits (N, T, C), targets (N, T)
            already shifted), ``segmentation`` (logits (N, C, H, W), targets (N, H, W)) or ``regression``
            (output and target of one shape).
        num_classes: C, where the kind has classes.
        loss_fn: replaces the kind's own loss: ``loss_fn(logits, target) -> scalar``.
    """

    kind: TaskKind
    num_classes: int | None = None
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise TaskError(f"A loss must be callable, loss(logits, target) -> scalar; got {self.loss_fn!r}.")
        if self.kind not in get_args(TaskKind):
            raise TaskError(
                f"Unknown task {self.kind!r}.{did_you_mean(str(self.kind), get_args(TaskKind))} "
                f"Tasks: {', '.join(get_args(TaskKind))}."
            )

    @property
    def has_classes(self) -> bool:
        """Whether targets are class indices."""
        return self.kind != "regression"

    def logits(self, output: Any) -> Tensor:
        """The tensor of a model's output that the loss reads: (N, C, …) or, for ``causal_lm``, (N, T, C).

        Raises:
            TaskError: no tensor is found in the output.
        """
        return find_logits(output)

    def completed(self, output: Any) -> Task:
        """This task with the number of classes that a model's output shows.

        Raises:
            TaskError: the model has another number of classes than the task.
        """
        if not self.has_classes:
            return self
        logits = self.logits(output)
        found = logits.shape[self.class_axis(logits)] if logits.dim() > 1 else 1
        if self.num_classes not in (None, found):
            raise TaskError(
                f"The task has {self.num_classes} classes, the model's logits {tuple(logits.shape)} have {found}; "
                "leave num_classes out, or change the model's last layer."
            )
        return replace(self, num_classes=found)

    def check_target(self, target: Any, inputs: Iterable[Tensor] = (), batch_axis: int = 0) -> None:
        """Raises ``TaskError`` for a target that no loss of this task can use.

        Args:
            target: its type, its number of axes and, on a CPU, its range are checked.
            inputs: what it is the target of: one of them must have as many samples.
            batch_axis: of the first input; 1 where the first axis is time, of targets (T, N) too.
        """
        if self.loss_fn is not None:
            return
        if not isinstance(target, Tensor):
            raise TaskError(f"{self.kind}: the target must be a tensor, got {type(target).__name__}.")
        found = f"{target.dtype} {tuple(target.shape)}"
        if self.kind == "classification" and target.is_floating_point() and target.dim() == 2:
            return  # probabilities (N, C), as mixup makes them
        axes = _TARGET_AXES.get(self.kind)
        if axes is not None and (target.dtype != torch.int64 or target.dim() != axes):
            raise TaskError(
                f"{self.kind}: targets must be class indices, int64 with {axes} axes (the batch first), got {found}."
            )
        samples = {leaf.shape[axis] for leaf in inputs for axis in {0, batch_axis} if leaf.dim() > axis}
        if samples and (not target.dim() or target.shape[0] not in samples):
            expected = " or ".join(map(str, sorted(samples)))
            raise TaskError(f"{self.kind}: {expected} samples need as many targets, got {found}.")
        if self.num_classes is None or not target.is_cpu or not target.numel():
            return  # on a GPU the check of the range would wait for the device
        counted = target[target != IGNORE_INDEX]
        low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
        if low < 0 or high >= self.num_classes:
            raise TaskError(
                f"{self.kind}: targets go from {low} to {high}, but the model has {self.num_classes} classes "
                f"(valid: 0 to {self.num_classes - 1}, and {IGNORE_INDEX} to ignore)."
            )

    def class_axis(self, logits: Tensor) -> int:
        """Axis of the classes: the last for ``causal_lm``, else 1."""
        return logits.dim() - 1 if self.kind == "causal_lm" else 1

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the batch, a scalar: cross-entropy, or mean squared error for ``regression``."""
        if self.loss_fn is not None:
            return self.loss_fn(logits, target)
        if self.kind == "regression":
            return F.mse_loss(logits, self._alike(logits, target))
        return F.cross_entropy(self._classes_second(logits), target)

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        """One loss a sample, shape (N): the mean over a sample's own elements.

        Raises:
            TaskError: a custom ``loss_fn`` gives one number for the whole batch only.
        """
        if self.loss_fn is not None:
            raise TaskError(
                "A custom loss gives one number a batch, and this method compares losses sample by sample; "
                "leave `loss` out or choose a method that needs no per-sample loss (scpl, al, nwise, early_exit)."
            )
        if self.kind == "regression":
            each = F.mse_loss(logits, self._alike(logits, target), reduction="none")
        else:
            each = F.cross_entropy(self._classes_second(logits), target, reduction="none")
        return each.flatten(1).mean(1) if each.dim() > 1 else each

    def _alike(self, logits: Tensor, target: Tensor) -> Tensor:
        """The target in the output's shape: (N) for (N, 1) is meant well, and would broadcast to (N, N)."""
        if target.shape == logits.shape:
            return target
        if target.numel() == logits.numel() and target.dim() and target.shape[0] == logits.shape[0]:
            return target.reshape(logits.shape).to(logits.dtype)
        raise TaskError(
            f"regression: output {tuple(logits.shape)} and target {tuple(target.shape)} differ; reshape the target, "
            "or pass task='classification' if the targets are classes."
        )

    def _classes_second(self, logits: Tensor) -> Tensor:
        return logits.transpose(1, -1) if self.kind == "causal_lm" else logits

    def hits(self, logits: Tensor, target: Any) -> Tensor:
        """(targets hit, targets there are), int64 on the logits' device; ignored targets are left out.

        (0, 0) where there are no classes to hit, or the target has another form.
        """
        axis = self.class_axis(logits) if self.has_classes else 0
        comparable = (
            self.has_classes
            and isinstance(target, Tensor)
            and not target.is_floating_point()
            and target.shape == logits.shape[:axis] + logits.shape[axis + 1 :]
        )
        if not comparable:
            return torch.zeros(2, dtype=torch.int64, device=logits.device)
        valid = target != IGNORE_INDEX
        return torch.stack([((logits.argmax(axis) == target) & valid).sum(), valid.sum()])


def find_logits(output: Any) -> Tensor:
    """The prediction inside a model's output: the tensor itself, ``.logits``/``["out"]``, or the first tensor.

    Raises:
        TaskError: the output holds no floating-point tensor.
    """
    if isinstance(output, Tensor):
        return output
    for name in _OUTPUT_NAMES:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, list | tuple):
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
    raise TaskError(
        f"The model's output ({type(output).__name__}) holds no tensor of logits; return a tensor, a dict "
        "with 'logits' or 'out', or a tuple whose first entry is the prediction."
    )


def infer_task(output: Any, loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None) -> Task:
    """Guesses the task from the shape of a model's output: (N, C) classes, (N, C, H, W) a map of classes,
    (N, T, C) tokens, (N) or (N, 1) a number.

    Raises:
        TaskError: nothing fits.
    """
    logits = find_logits(output)
    if loss_fn is not None and logits.dim() not in (1, 2, 3, 4):
        return Task("regression", loss_fn=loss_fn)
    if not torch.is_floating_point(logits):
        raise TaskError(
            f"The model's output is {logits.dtype}; training needs floating-point logits. "
            "Pass `task=` and `loss=`."
        )
    match logits.dim():
        case 1:
            return Task("regression", loss_fn=loss_fn)
        case 2 if logits.shape[1] == 1:
            return Task("regression", loss_fn=loss_fn)
        case 2:
            return Task("classification", logits.shape[1], loss_fn)
        case 3:
            return Task("causal_lm", logits.shape[2], loss_fn)
        case 4:
            return Task("segmentation", logits.shape[1], loss_fn)
    raise TaskError(
        f"The model's output has shape {tuple(logits.shape)}, which fits no known task; pass `task=` "
        "(classification, causal_lm, segmentation, regression) or `loss=`."
    )
