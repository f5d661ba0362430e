"""Supervised Contrastive Parallel Learning (Ho et al. 2026)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import MethodError
from localize.heads.base import Head, HeadOutput, HeadSite, Method, Target, TaskHead, one_of, positive
from localize.heads.layers import check_hidden, linear_block
from localize.heads.pooling import MAX_FEATURES, TOKEN_POOLS, PooledVector, TokenPool
from localize.task import IGNORE_INDEX

Normalizer = Literal["reference", "khosla"]
_NORMALIZERS = ("reference", "khosla")
_INSTEAD = "Use nwise, lct, early_exit, joint or bp."


def supervised_contrastive_loss(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.1, normalizer: Normalizer = "reference"
) -> Tensor:
    """Pulls together samples of one class and pushes apart the rest.

        z_i = embedding_i / ‖embedding_i‖,   s_ij = z_i·z_j / τ
        loss = −mean_i Σ_{p∈P(i)} log( e^{s_ip} / Σ_{a≠i} e^{s_ia} ) / n_i

    P(i) are the other samples of i's class. An anchor without any contributes 0 to the mean. ``logsumexp``
    subtracts the row maximum, and all is computed in at least float32, autocast or not, so that no precision
    overflows. Samples with label -100 take no part.

    Args:
        embeddings: (N, D); rows need not be normalised.
        labels: (N), class indices.
        temperature: τ.
        normalizer: n_i. ``reference`` is |P(i)| + 1, as SCPL's released code has it, where ``mask.sum(1)``
            counts the anchor itself (algorithm 1 as printed divides by the pairs of the whole batch);
            ``khosla`` is |P(i)|, equation 2 of Khosla et al. 2020.

    Returns:
        A scalar. A batch of one sample gives 0, with a gradient of 0.

    Raises:
        MethodError: shapes that do not fit, or an option out of range.
    """
    _check_shapes(embeddings, labels)
    problem = positive("temperature", temperature) or one_of("normalizer", normalizer, _NORMALIZERS)
    if problem:
        raise MethodError(problem)
    with _no_autocast(embeddings.device.type):
        z = F.normalize(_widened(embeddings), dim=1)
        similarity = z @ z.T / temperature
        ignored = labels == IGNORE_INDEX
        left_out = torch.eye(len(labels), dtype=torch.bool, device=labels.device) | ignored
        together = ((labels[:, None] == labels[None, :]) & ~left_out).to(similarity.dtype)
        # Not -inf: a row without any other sample would give inf - inf.
        lowest = torch.finfo(similarity.dtype).min
        log_others = similarity.masked_fill(left_out, lowest).logsumexp(1)
        positives = together.sum(1)
        divisor = positives + 1 if normalizer == "reference" else positives.clamp(min=1)
        each = (positives * log_others - (together * similarity).sum(1)) / divisor
        return each.sum() / (~ignored).sum().clamp(min=1)


def _check_shapes(embeddings: Tensor, labels: Tensor) -> None:
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise MethodError(
            "supervised_contrastive_loss takes embeddings (N, D) and labels (N), got "
            f"{tuple(embeddings.shape)} and {tuple(labels.shape)}."
        )


def _widened(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def _no_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class ContrastiveHead(Head):
    """Reduces the hidden state to a vector, projects it, and contrasts it within the batch.

    On the last part the classifier, which belongs to the part, is trained beside it.
    """

    def __init__(self, site: HeadSite, options: SCPL) -> None:
        super().__init__(site)
        self.temperature, self.normalizer = options.temperature, options.normalizer
        self.joint, self.across_replicas = options.classifier == "joint", options.across_replicas
        self.reduce = PooledVector(
            site.hidden, MAX_FEATURES if options.pool == "auto" else None, options.token_pool
        )
        kind = options.projector or ("identity" if site.hidden.layout == "tokens" else "mlp")
        self.projector: nn.Module = nn.Identity()
        if kind == "mlp":
            first = linear_block(self.reduce.out_features, options.hidden)
            self.projector = nn.Sequential(*first, nn.Linear(options.hidden, options.projection))
        self.to(site.hidden.dtype)

    def forward(self, hidden: Tensor, target: Target) -> HeadOutput:
        embeddings, labels = self.projector(self.reduce(hidden)), target
        if self.across_replicas and self.replicas is not None:
            _check_shapes(embeddings, labels)  # what does not fit is told before anyone waits for this replica
            embeddings, labels = self.replicas(_widened(embeddings), labels)
        loss = supervised_contrastive_loss(embeddings, labels, self.temperature, self.normalizer)
        # Not registered, site being no module: the classifier's weights belong to the part.
        classifier = self.site.classifier
        if classifier is None:
            return HeadOutput(loss)
        task = self.site.task
        logits = task.logits(classifier(hidden if self.joint else hidden.detach()))
        return HeadOutput(loss + task.loss(logits, target), logits=logits)


@dataclass(frozen=True)
class SCPL(Method):
    """Each part is trained by a supervised contrastive loss on a projection of its hidden state.

        L_k = SupCon(P_k(h_k), y),   P_k: flatten–Linear(d, 512)–ReLU–Linear(512, 1024)

    and the last part's classifier by cross-entropy on the detached representation (algorithms 1 and 2).
    Exits below the last do not predict.

    Args:
        temperature: τ of the contrastive loss.
        projector: ``mlp``, or ``identity`` (the paper's for text); None: identity on tokens, else mlp.
        normalizer: see ``supervised_contrastive_loss``.
        pool: ``flatten`` flattens maps whole, as the paper does; ``auto`` averages maps of more than 8192
            values first, without which the head of a large map is larger than the model.
        classifier: whether cross-entropy trains the classifier only (``detached``) or the last part too
            (``joint``).
        hidden, projection: widths of the mlp.
        token_pool: how tokens become a vector: ``mean``, the ``first`` (a class token), the ``last``; ``auto``: the
            final state where a recurrent layer made them, else the mean.
        across_replicas: with several replicas (``data_parallel``), whether samples are contrasted with those of all
            replicas' batches, as one process would with one large batch; else each replica's with those of its own.
    """

    temperature: float = 0.1
    projector: Literal["mlp", "identity"] | None = None
    normalizer: Normalizer = "reference"
    pool: Literal["auto", "flatten"] = "auto"
    classifier: Literal["detached", "joint"] = "detached"
    hidden: int = 512
    projection: int = 1024
    token_pool: TokenPool = "auto"
    across_replicas: bool = False

    name: ClassVar[str] = "scpl"
    summary: ClassVar[str] = "supervised contrastive loss on every part"
    source: ClassVar[str] = "Ho et al. 2026"

    def __post_init__(self) -> None:
        self.check(
            positive("temperature", self.temperature),
            one_of("projector", self.projector, ("mlp", "identity", None)),
            one_of("normalizer", self.normalizer, _NORMALIZERS),
            one_of("pool", self.pool, ("auto", "flatten")),
            one_of("classifier", self.classifier, ("detached", "joint")),
            positive("hidden", self.hidden, whole=True),
            positive("projection", self.projection, whole=True),
            one_of("token_pool", self.token_pool, TOKEN_POOLS),
        )

    @property
    def splits_classifier(self) -> bool:
        return True

    def build_head(self, site: HeadSite) -> Head:
        """A contrastive head; plain cross-entropy where the last part is nothing but the classifier."""
        if site.task.kind != "classification":
            problem = f"it contrasts samples of different classes, and the task is {site.task.kind}"
            raise site.error(self.name, problem, _INSTEAD)
        if site.is_last and site.classifier is None:
            return TaskHead(site)
        check_hidden(site, self.name)
        return ContrastiveHead(site, self)
