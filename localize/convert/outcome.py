"""What two recordings come to: one traced model, with the notes that tell what was found."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from localize.convert.context import Subject
from localize.convert.modes import merge_aliases, same_graph
from localize.convert.recording import Example, Recording
from localize.convert.settings import check_of
from localize.convert.traced import TracedModel


def traced_model(subject: Subject, example: Example, train: Recording, evaluation: Recording) -> TracedModel:
    """One graph where both modes do the same, two where they do not."""
    agree = train.output == evaluation.output and same_graph(train.graph, evaluation.graph)
    if agree:
        merge_aliases(train.graph, evaluation.graph)
        _check_settings(subject, train.graph, [train, evaluation], None)
        evaluation = train
    else:
        _check_settings(subject, train.graph, [train], True)
        _check_settings(subject, evaluation.graph, [evaluation], False)
    used = {
        str(node.target)
        for graph in (train.graph, evaluation.graph)
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }
    return TracedModel(
        root=subject.root,
        train_graph=train.graph,
        eval_graph=evaluation.graph,
        signature=example.signature,
        outputs={True: train.output, False: evaluation.output},
        example=tuple(example.leaves),
        extras={name: value for name, value in subject.extras.values.items() if name in used},
        notes=_notes(subject, agree),
        ran=not subject.remedies.fake,
        rerouted=subject.remedies.general,
    )


def _check_settings(subject: Subject, graph: fx.Graph, read: Sequence[Recording], mode: bool | None) -> None:
    """Puts a check of the settings that recordings read in front of a graph; ``mode`` is its own, None for both."""
    check = check_of(subject.root, [recording.settings for recording in read], subject.original, mode)
    if check is not None:
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            node = graph.call_module(subject.extras.check(check))
        node.meta.update(scope="", storages=frozenset(), mutates=frozenset())


def _notes(subject: Subject, agree: bool) -> list[str]:
    """What a person should know of the capture, a line each."""
    reasons: dict[str, list[str]] = {}
    for path, reason in subject.policy.opaque.items():
        reasons.setdefault(reason, []).append(path)
    notes = [f"kept whole: {', '.join(paths)} ({reason})" for reason, paths in reasons.items()]
    notes += [
        f"decides on values at {where} ({reader}): checked at every call"
        for where, reader in subject.policy.guarded.items()
    ]
    if subject.reassigned:
        notes.append(f"sets {', '.join(sorted(subject.reassigned))}: parts do not, and no call was seen to need it")
    if subject.hooked:
        names = ", ".join(path or "the model itself" for path in sorted(subject.hooked))
        notes.append(f"forward hooks of {names} ran at capture: what they do to values is kept, nothing else")
    if subject.remedies.fake:
        notes.append("too large to run here: captured without data, and not compared with the model")
    if subject.remedies.general:
        notes.append("attention masks are always built, which is right for every batch")
    if not agree:
        notes.append("train and eval mode do different things: two graphs")
    return notes
