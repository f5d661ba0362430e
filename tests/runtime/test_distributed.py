"""Several processes are one: the same bits, the same history, and one reason when something goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import localize
from localize.runtime.messages import Message, Side, Upward
from localize.runtime.sequential import run_batch, stages_of
from localize.runtime.stage import Half, Stage
from tests.runtime.cases import METHODS, made
from tests.runtime.helpers import trainer
from tests.runtime.several import Several

CASES = "tests.runtime.cases:"
RANKS = (2, 3, 4)


def is_one(several: Several, folder: Path, model: str, method: str, ranks: int, **options: Any) -> None:
    found = several.results(
        f"{CASES}same_as_sequential", ranks, model=model, method=method, parts=4, folder=str(folder), **options
    )
    assert all(other == found[0] for other in found)  # history and scores


# ------------------------------------------------------------------ the same bits


@pytest.mark.parametrize(("method", "ranks"), [(m, RANKS[i % 3]) for i, m in enumerate(sorted(METHODS))])
def test_many_processes_are_one(several: Several, tmp_path: Path, method: str, ranks: int) -> None:
    """Weights, buffers, optimizer state, history and scores after 21 steps: batch norm, dropout, skips, ragged."""
    is_one(several, tmp_path, "mixed", method, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("model", ["mixed", "cnn", "dropouts", "long_skip", "residual", "encoder", "channels_last"])
def test_many_processes_are_one_all_over(
    several: Several, tmp_path: Path, model: str, method: str, ranks: int
) -> None:
    is_one(several, tmp_path, model, method, ranks)


@pytest.mark.parametrize(
    "options",
    [{"clip_grad_norm": 0.1}, {"precision": "bf16"}, {"precision": "fp16"}, {"on_nonfinite": "skip"}],
    ids=str,
)
def test_with_options_too(several: Several, tmp_path: Path, options: dict[str, Any]) -> None:
    is_one(several, tmp_path, "mixed", "early_exit", 2, epochs=1, **options)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [("lct", 2, 3), ("early_exit", 4, 1), ("nwise", 1, 2)],
    ids=["2 ranks, then 3", "4 ranks, then one process", "one process, then 2 ranks"],
)
def test_a_checkpoint_is_read_by_any_number_of_ranks(
    several: Several, tmp_path: Path, method: str, before: int, after: int
) -> None:
    def run(ranks: int, folder: str, stop: int | None = None) -> Any:
        executor = "sequential" if ranks == 1 else "distributed"
        where = str(tmp_path / folder)
        return several.results(
            f"{CASES}runs", ranks, method=method, parts=4, executor=executor, folder=where, stop=stop
        )[0]

    assert run(before, "interrupted", stop=11) is None
    state = localize.runtime.checkpoint.load(tmp_path / "interrupted")
    assert state is not None
    assert state.about["step"] == 8
    assert run(after, "interrupted") == run(1, "whole")


def test_nothing_but_checkpoints_is_left(several: Several, tmp_path: Path) -> None:
    several.results(f"{CASES}runs", 2, method="bp", parts=2, executor="distributed", folder=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000020", "step-00000021"]
    newest = sorted(path.name for path in (tmp_path / "step-00000021").iterdir())
    assert newest == [
        "optimizer-1-of-2.safetensors", "optimizer-2-of-2.safetensors", "state.json", "trainer-1-of-2.pt",
        "trainer-2-of-2.pt", "weights-1-of-2.safetensors", "weights-2-of-2.safetensors",
    ]  # fmt: skip


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("gather", ["first", "all", "none"])
def test_a_rank_holds_its_own_parts_only(several: Several, tmp_path: Path, gather: str) -> None:
    folder = tmp_path / "saved"
    found = several.results(f"{CASES}holdings", 3, parts=4, gather=gather, folder=str(folder))
    for rank, each in enumerate(found):
        assert sorted(each["during"]) == sorted(each["own"])
        assert len(each["during"]) < len(each["all"])
        whole = gather == "all" or (gather == "first" and rank == 0)
        assert sorted(each["after"]) == sorted(each["all"] if whole else each["own"])
        assert each["same object"]
        assert each["trainable"]
    assert sorted(n for each in found for n in each["own"]) == sorted(found[0]["all"])
    assert [n for each in found for n in each["reported"]] == ["1", "2", "3", "4"]
    if gather == "first":
        model = made("mixed", "al", 4)[0].to_standard()
        assert len(localize.load(folder, model).parts) == 4


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("method", "on", "how"),
    [("early_exit", 1, "raise"), ("bp", 2, "raise"), ("early_exit", 0, "raise"), ("early_exit", 1, "kill"),
     ("bp", 2, "kill"), ("early_exit", 0, "kill")],
)  # fmt: skip
def test_all_stop_when_one_fails_and_say_which(several: Several, method: str, on: int, how: str) -> None:
    found = several.run(f"{CASES}fails", 3, method=method, parts=3, at=5, on=on, how=how)
    reason = "the process is gone" if how == "kill" else "Interruption: something broke"
    for rank, answer in enumerate(found):
        if rank == on:
            assert answer["status"] == (-9 if how == "kill" else 0)
            continue
        assert answer["result"]["kind"] == "Stopped", answer
        assert f"because of rank {on} (part {on + 1} of 3) at step" in answer["result"]["text"]
        assert reason in answer["result"]["text"]
        assert answer["seconds"] < 20


@pytest.mark.parametrize("on", [1, 2])
def test_a_rank_above_that_vanishes_is_noticed_by_those_that_wait_for_no_message(several: Several, on: int) -> None:
    """Nothing comes down an edge with a reach of 1, and the ranks below, done with the epoch, waited for ever."""
    found = several.run(f"{CASES}fails", 3, method="early_exit", parts=3, at=7, on=on, how="kill later")
    for rank, answer in enumerate(found):
        if rank == on:
            assert answer["status"] == -9
            continue
        assert answer["result"]["kind"] == "Stopped", answer
        assert f"because of rank {on} (part {on + 1} of 3)" in answer["result"]["text"]
        assert "the process is gone" in answer["result"]["text"]
        assert answer["seconds"] < 20


def test_processes_of_a_failed_run_are_not_used_again(several: Several) -> None:
    """Threads of the failed run would take the messages of the next one: it waited forever."""
    how = {"method": "early_exit", "parts": 2, "at": 3, "on": 1, "how": "raise"}
    for answer in several.results(f"{CASES}fails", 2, again=True, **how):
        assert answer["kind"] == "PlacementError"
        assert "start them anew" in answer["text"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("dtype", "as float32 with 2 axes, as before, found"),
        ("axes", "as float32 with 2 axes, as before, found"),
        ("name", "expected the values"),
        ("step", "expected step 3, found step 4"),
        ("edge", "expected a message of part 1 -> part 2, found one of part 2 -> part 3"),
        ("type", "expected upward, found feedback"),
        ("kind", "expected DATA, found EVAL"),
        ("payload", "the payload is truncated"),
        ("header", "expected a header with its checksum, found a damaged or truncated one"),
        ("header dtype", "expected a header that begins with"),
    ],
)
def test_what_is_not_the_next_message_is_refused(several: Several, what: str, said: str) -> None:
    first, second = several.results(f"{CASES}distorted", 2, what=what, at=3)
    assert second["kind"] == "WireError"
    assert said in second["text"]
    assert "edge part 1 -> part 2:" in second["text"]
    assert first["kind"] == "Stopped"
    assert said in first["text"]


@pytest.mark.parametrize("what", ["method", "cuts", "seed"])
def test_ranks_that_were_given_different_things_do_not_start(several: Several, what: str) -> None:
    for answer in several.results(f"{CASES}unlike", 2, what=what):
        assert answer["kind"] == "PlacementError"
        assert "The ranks do not train the same" in answer["text"]
        assert f"{what} is " in answer["text"]


@pytest.mark.parametrize(
    ("parts", "options", "said"),
    [
        (2, {}, "There are 3 ranks for 2 parts; start 2 processes, or convert with parts=3."),
        (3, {"precision": "fp16"}, "use precision='bf16'"),
    ],
)
def test_what_cannot_be_placed_says_what_can(
    several: Several, parts: int, options: dict[str, Any], said: str
) -> None:
    for answer in several.results(f"{CASES}refused", 3, parts=parts, **options):
        assert answer["kind"] == "PlacementError"
        assert said in answer["text"]


def test_without_torchrun_it_says_how_to_start() -> None:
    with pytest.raises(localize.errors.PlacementError, match="torchrun --nproc-per-node"):
        trainer(made("mixed", "bp", 2)[0], executor="distributed")


@pytest.mark.parametrize("method", ["early_exit", "lct", "nwise", "bp"])
def test_a_rank_needs_the_memory_of_its_part(several: Several, method: str) -> None:
    """Weights, gradients and optimizer state exactly; messages that wait have a bound of their own."""
    for each in several.results("tests.runtime.cases_memory:peaks", 3, method=method, parts=3):
        found, own, wire = each["found"], each["own"], each["wire"]
        assert all(own.values())
        for name in ("weights", "gradients", "optimizer"):
            assert found[name] == own[name], name
        assert found["saved"] <= 1.01 * own["saved"]
        assert sum(found.values()) <= 1.01 * sum(own.values())
        assert 0 < wire["peak"] <= wire["most"] * wire["message"]


# ------------------------------------------------------------------ who does what when


class _Log:
    """An updater and the world outside of a part, which write down what is asked of them."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def send(self, to: Side, message: Message) -> None:
        self.events.append(f"send {to.name}")

    def receive(self, source: Side) -> Message:
        raise AssertionError("nothing is to come")

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        self.events.append("begin backward")

    def ready(self, stage: Stage, half: Half) -> None:
        self.events.append(f"update {half}")


@pytest.mark.parametrize(
    ("method", "first"), [("early_exit", ["send ABOVE", "head"]), ("al", ["head", "send ABOVE"])]
)
def test_activations_leave_first(method: str, first: list[str]) -> None:
    """They once left after the backward pass, since the stage went on before its message was delivered.

    Only AL's head has to run before: it makes what is sent along.
    """
    local, loader = made("mixed", method, 2)
    local.train()
    inputs, targets = next(iter(loader))
    log = _Log()
    head = local.heads[0]
    assert head is not None
    head.register_forward_pre_hook(lambda module, given: log.events.append("head"))
    run_batch(stages_of(local)[:1], [Upward(local.signature.stream((inputs,), {}), targets)], log, outside=log)
    assert log.events == [*first, "begin backward", "update part", "update head"]


@pytest.mark.parametrize(("method", "ranks"), [("early_exit", 2), ("bp", 3)])
def test_a_trace_shows_what_each_part_did(several: Several, tmp_path: Path, method: str, ranks: int) -> None:
    file = tmp_path / "trace.json"
    several.results(f"{CASES}traced", ranks, method=method, parts=3, file=str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    for part in (1, 2, 3):
        own = [event for event in events if event["tid"] == part]
        for batch in range(1, 8):
            kinds = [event["cat"] for event in own if event["args"]["batch"] == batch and event["cat"] != "wait"]
            assert kinds[0] == "forward"
            assert kinds.count("head") == int(method != "bp" or part == 3)
            assert {"forward", "backward", "update"} <= set(kinds)
    waits = {(event["tid"], event["args"]["waits_for"]) for event in events if event["cat"] == "wait"}
    assert any(waits_for == f"part {part - 1}" for part, waits_for in waits)  # for the first batch at least
    if method == "bp":
        assert {(1, "part 2"), (2, "part 3")} <= waits
    else:
        assert not any(part == 1 for part, _ in waits)  # nobody ever waits for the part above
