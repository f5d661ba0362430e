"""Associated Learning (Wu et al. 2022, after Kao & Chen 2021)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import MethodError
from localize.heads.base import Head, HeadOutput, HeadSite, Method, Target, one_of, positive
from localize.heads.layers import Shaped, check_batch_first, check_hidden, output_features
from localize.heads.pooling import TOKEN_POOLS, PooledVector, TokenPool
from localize.task import IGNORE_INDEX

_INSTEAD = "Use nwise, lct, early_exit, joint or bp."


class AssociatedHead(Head):
    """g_k, h_k and b_k of part k.

        part k-1          t_{k-1} ──g_k──▶ t_k ──h_k──▶ t'_{k-1}      L_AE = dist(t'_{k-1}, t_{k-1})
                                           ╎ (no gradient)
        part k     s_k ──reduce──b_k──▶ s'_k                          L_A  = MSE(s'_k, t_k)

    The target of part 1 is the labels, of the others the tuple (t_{k-1}, labels); (t_k, labels) is handed on.
    Attributes: ``encoder`` g, ``decoder`` h, ``bridge`` b, ``reduce`` (no weights).
    """

    def __init__(self, site: HeadSite, options: AL, outputs: int) -> None:
        super().__init__(site)
        width = options.hidden
        self.width, self.outputs = width, outputs
        self.target_gradient, self.keep_classifier = options.target_gradient, options.keep_classifier
        below = outputs if site.number == 1 else width
        self.reduce = PooledVector(site.hidden, token_pool=options.token_pool)
        self.encoder = nn.Sequential(nn.Linear(below, width), nn.Tanh())
        self.bridge = nn.Sequential(nn.Linear(self.reduce.out_features, width), nn.Tanh())
        # No Tanh on h_1: it would cap the logits at ±1.
        self.decoder = nn.Sequential(nn.Linear(width, below))
        if site.number > 1:
            self.decoder.append(nn.Tanh())
        elif not site.task.has_classes and site.output is not None:
            self.decoder.append(Shaped(site.output.features))
        self.to(site.hidden.dtype)

    def forward(self, hidden: Tensor, target: Target) -> HeadOutput:
        below, labels = self._unpack(target)
        valid = labels != IGNORE_INDEX if self.site.task.has_classes else None
        code = self.encoder(below)
        decoded = self.decoder(code)
        bridged = self.bridge(self.reduce(hidden))
        association = _mean_square(bridged, code if self.target_gradient else code.detach(), valid)
        if self.site.number > 1:
            reconstruction = _mean_square(decoded, below, valid)
        elif self.site.task.has_classes:
            reconstruction = F.cross_entropy(decoded, labels, ignore_index=IGNORE_INDEX)
        else:
            reconstruction = _mean_square(decoded.reshape(len(decoded), -1), below, valid)
        loss = association + reconstruction
        if self.site.classifier is not None and self.keep_classifier:
            task = self.site.task
            loss = loss + task.loss(task.logits(self.site.classifier(hidden.detach())), labels)
        return HeadOutput(loss, target=(code.detach(), labels))

    def _unpack(self, target: Target) -> tuple[Tensor, Tensor]:
        """t_{k-1} of shape (N, D) and the labels."""
        dtype = next(self.encoder.parameters()).dtype
        if self.site.number == 1:
            if not self.site.task.has_classes:
                return target.reshape(len(target), -1).to(dtype), target
            if target.is_floating_point():
                raise self.site.error("al", "it encodes class indices, not probabilities", _INSTEAD)
            classes = torch.arange(self.outputs, device=target.device)
            return (target[:, None] == classes).to(dtype), target  # a row of zeros for an ignored label
        if not (isinstance(target, tuple | list) and len(target) == 2):
            below = self.site.number - 1
            raise MethodError(
                f"al: the target of head {self.site.number} is (code, labels), which head {below} hands on "
                f"(`heads[{below - 1}](hidden, target).target`); got {type(target).__name__}."
            )
        code, labels = target
        return code.detach(), labels

    def example_target(self, batch: int, device: torch.device | str) -> Target:
        labels = super().example_target(batch, device)
        if self.site.number == 1:
            return labels
        dtype = next(self.encoder.parameters()).dtype
        return torch.zeros(batch, self.width, dtype=dtype, device=device), labels


def _mean_square(a: Tensor, b: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over samples and features of (a - b)², (N, D) each; only over samples that are ``valid`` (N)."""
    if a.dtype != torch.float64:
        a, b = a.float(), b.float()
    square = (a - b).square()
    if valid is None:
        return square.mean()
    return (square.mean(1) * valid).sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class AL(Method):
    """Each part meets its target halfway: the hidden state and the encoded target are made alike.

        t_0 = one-hot y,   t_k = g_k(t_{k-1})
        L_A  = MSE(b_k(reduce(s_k)), t_k)       trains part k and b_k  (and g_k with ``target_gradient``)
        L_AE = dist(h_k(t_k), t_{k-1})          trains g_k and h_k; cross-entropy at k = 1, MSE above

    Equation 3 and algorithm 2, with the gradient of the released code. g, b: Linear–Tanh; h: Linear–Tanh, h_1
    Linear alone. Inference (algorithm 3) takes any shortcut ℓ: s_ℓ → b_ℓ → h_ℓ → … → h_1 → logits; all parts
    are exits. For regression t_0 is the target itself, and MSE its distance. A loss of the user's own trains the
    kept classifier; the path has the losses above.

    Args:
        hidden: size of the codes t_k; overcomplete when larger than the number of classes (section 6.9).
        target_gradient: whether L_A trains g_k too, as equation 3 has it; the released code detaches.
        keep_classifier: whether the model's own classifier, which is not on this path, is trained too, by
            cross-entropy on detached features; else nothing trains it.
        token_pool: how tokens become a vector: ``mean``, the ``first`` (a class token), the ``last``; ``auto``: the
            final state where a recurrent layer made them, else the mean.
    """

    hidden: int = 128
    target_gradient: bool = False
    keep_classifier: bool = True
    token_pool: TokenPool = "auto"

    name: ClassVar[str] = "al"
    summary: ClassVar[str] = "associated learning: hidden states meet encoded targets; every part predicts"
    source: ClassVar[str] = "Wu et al. 2022"
    predicts: ClassVar[Literal["none", "exits", "path"]] = "path"
    encodes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(
            positive("hidden", self.hidden, whole=True), one_of("token_pool", self.token_pool, TOKEN_POOLS)
        )

    @property
    def splits_classifier(self) -> bool:
        return True  # the path leaves the model below its classifier, whether that is trained or not

    def build_head(self, site: HeadSite) -> Head:
        """Encoder, decoder and bridge of one part."""
        if site.task.kind not in ("classification", "regression"):
            problem = f"it encodes one target a sample, and the task is {site.task.kind}"
            raise site.error(self.name, problem, _INSTEAD)
        check_hidden(site, self.name)
        check_batch_first(site, self.name, "it encodes one target a sample")
        return AssociatedHead(site, self, output_features(site, self.name))

    def predictor(self, heads: Sequence[Head | None]) -> nn.Module:
        """Hidden state ℓ → logits (N, C): reduce, b_ℓ, then h_ℓ … h_1, sharing the heads' modules."""
        path = [head for head in heads if isinstance(head, AssociatedHead)]
        if not path or len(path) != len(heads):
            raise MethodError(f"al: the path to exit {len(heads)} needs the AL heads of all parts below.")
        steps: OrderedDict[str, nn.Module] = OrderedDict(reduce=path[-1].reduce, bridge=path[-1].bridge)
        for head in reversed(path):
            steps[f"decoder_{head.site.number}"] = head.decoder
        return nn.Sequential(steps)
