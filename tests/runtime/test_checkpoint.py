from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from localize import CheckpointError, ConfigError, to_local
from localize.heads.scpl import SCPL
from localize.runtime import checkpoint
from localize.runtime.checkpoint import LATEST, OPTIMIZER, STATE, TOKEN, TRAINER, WEIGHTS, Share, Snapshot
from localize.runtime.saver import Saver
from tests.runtime.helpers import Breaking, Interruption, assert_same, converted, loader, tensors, trainer


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        {"step": step, "epoch": 1},
        {"layer.weight": torch.full((3, 2), float(step))},
        {"layer.weight/exp_avg": torch.ones(3, 2)},
        {"history": [{"epoch": 1, "val_accuracy": {1: 0.5}}]},
    )


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Writes a checkpoint; where it is."""
    Saver(asynchronous=False).save(folder, snapshot)
    return folder / (folder / LATEST).read_text().strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------- folders


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    written = save(tmp_path / "a" / "b", snapshot(7))
    assert written == tmp_path / "a" / "b" / "step-00000007"
    assert names(written) == sorted([OPTIMIZER, STATE, TRAINER, WEIGHTS])
    back = checkpoint.load(tmp_path / "a" / "b")
    assert back is not None
    assert back.about["step"] == 7
    assert torch.equal(back.weights["layer.weight"], torch.full((3, 2), 7.0))
    assert list(back.optimizer) == ["layer.weight/exp_avg"]
    assert back.trainer == snapshot(7).trainer


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):  # the order of writing counts, not the number
        save(tmp_path, snapshot(step))
    assert names(tmp_path) == [LATEST, "step-00000020", "step-00000100"]
    assert checkpoint.load(tmp_path).about["step"] == 20  # type: ignore[union-attr]


def test_the_same_step_again_leaves_the_first_alone_until_the_second_is_complete(tmp_path: Path) -> None:
    first = save(tmp_path, snapshot(5))
    second = save(tmp_path, snapshot(5))
    assert first.is_dir()
    assert (tmp_path / LATEST).read_text() == second.name + "\n" == "step-00000005-2\n"


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "nowhere") is None
    assert not checkpoint.any_in(tmp_path / "nowhere")


@pytest.mark.parametrize("moment", ["weights", "trainer", "state", "rename", "pointer"])
def test_whenever_writing_fails_the_last_checkpoint_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, snapshot(5))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    replace = os.replace
    targets: dict[str, tuple[Any, str, Any]] = {
        "weights": (checkpoint, "save_file", full),
        "trainer": (Path, "write_bytes", full),
        "state": (json, "dumps", full),
        "rename": (os, "replace", full),
        "pointer": (os, "replace", lambda a, b: full() if Path(b).name == LATEST else replace(a, b)),
    }
    monkeypatch.setattr(*targets[moment])
    with pytest.raises(
        CheckpointError, match=r"step 10 cannot be written .*No space left.*last one is intact"
    ):
        save(tmp_path, snapshot(10))
    monkeypatch.undo()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(tmp_path.glob(".step*"))
    assert checkpoint.load(tmp_path).about["step"] == 5  # type: ignore[union-attr]
    save(tmp_path, snapshot(10))
    assert checkpoint.load(tmp_path).about["step"] == 10  # type: ignore[union-attr]


def shards(partial: Path, ranks: int, number: int) -> None:
    share = Share(shard=f"-{number}-of-{ranks}")
    checkpoint.write(partial, snapshot(10), checkpoint.pack(snapshot(10).trainer), share)


def test_a_share_that_fails_leaves_those_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder went away between another rank's making it and writing into it."""
    partial, save_file = tmp_path / "partial", checkpoint.save_file

    def failing(tensors: Any, path: Path) -> None:
        if "-1-of-2" in path.name:
            raise OSError(28, "No space left on device")
        with pytest.raises(OSError, match="No space"):
            shards(partial, 2, 1)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    shards(partial, 2, 2)
    assert names(partial) == [f"{kind}-2-of-2.{suffix}" for kind, suffix in KINDS]


KINDS = [("optimizer", "safetensors"), ("trainer", "pt"), ("weights", "safetensors")]


@pytest.mark.parametrize("lost", [f"{kind}-{rank}-of-3.{suffix}" for kind, suffix in KINDS for rank in (1, 2, 3)])
def test_a_checkpoint_without_all_shares_is_none(tmp_path: Path, lost: str) -> None:
    save(tmp_path, snapshot(5))
    partial = tmp_path / "partial"
    for number in (1, 2, 3):
        shards(partial, 3, number)
    (partial / lost).unlink()
    with pytest.raises(CheckpointError, match=rf"step 10 in .* lacks {lost}: not all ranks wrote"):
        checkpoint.commit(tmp_path, partial, {"step": 10})
    assert names(tmp_path) == [LATEST, "step-00000005"]
    assert checkpoint.load(tmp_path).about["step"] == 5  # type: ignore[union-attr]


def test_a_checkpoint_of_one_rank_s_own_folder_says_what_is_missing(tmp_path: Path) -> None:
    """An earlier version wrote such ones."""
    partial = tmp_path / "partial"
    for number in (1, 2):
        shards(partial, 2, number)
    path = checkpoint.commit(tmp_path, partial, {"step": 10})
    state = json.loads((path / STATE).read_text())
    state["file_bytes"] = {name: size for name, size in state["file_bytes"].items() if "-2-of-2" in name}
    (path / STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"lacks weights-1-of-2\.safetensors, .* trainer-1-of-2\.pt, which other"):
        checkpoint.load(tmp_path)


def test_leftovers_of_a_killed_process_are_ignored_and_swept(tmp_path: Path) -> None:
    save(tmp_path, snapshot(5))
    leftover = tmp_path / ".step-00000006.1.partial"
    leftover.mkdir()
    (leftover / WEIGHTS).write_bytes(b"half")
    (tmp_path / f"{TOKEN}0").touch()
    assert checkpoint.load(tmp_path).about["step"] == 5  # type: ignore[union-attr]
    (tmp_path / LATEST).unlink()
    (tmp_path / "step-00000005").rename(tmp_path.parent / "elsewhere")
    trained(tmp_path)
    assert names(tmp_path) == [LATEST, "step-00000004"]


def test_a_process_killed_before_its_first_pointer_still_left_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, snapshot(5))
    (tmp_path / LATEST).unlink()
    assert checkpoint.load(tmp_path).about["step"] == 5  # type: ignore[union-attr]


def test_views_into_shared_memory_are_stored(tmp_path: Path) -> None:
    """safetensors refuses them; the flat weights of an LSTM on a GPU are such views."""
    flat = torch.arange(6.0)
    save(tmp_path, Snapshot({"step": 1}, {"a": flat[:4], "b": flat[2:], "c": flat[::2]}, {}))
    back = checkpoint.load(tmp_path)
    assert back is not None
    assert back.weights["b"].tolist() == [2, 3, 4, 5]
    assert back.weights["c"].tolist() == [0, 2, 4]


# -------------------------------------------------------------------- damage


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def scrambled(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("file", [STATE, WEIGHTS, OPTIMIZER, TRAINER])
@pytest.mark.parametrize("damage", [shortened, scrambled, Path.unlink])
def test_a_damaged_checkpoint_is_named_with_a_way_out(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    save(tmp_path, snapshot(5))
    damage(save(tmp_path, snapshot(6)) / file)
    with pytest.raises(
        CheckpointError, match=r"step-00000006 is truncated or damaged: .*write 'step-00000005' into"
    ):
        checkpoint.load(tmp_path)
    (tmp_path / LATEST).write_text("step-00000005\n")
    assert checkpoint.load(tmp_path).about["step"] == 5  # type: ignore[union-attr]


def test_a_newer_version_says_to_upgrade(tmp_path: Path) -> None:
    path = save(tmp_path, snapshot(5)) / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99; this version reads up to 2. Upgrade"):
        checkpoint.load(tmp_path)


def test_a_pointer_into_nowhere_names_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, snapshot(5))
    (tmp_path / LATEST).write_text("step-00000009\n")
    with pytest.raises(
        CheckpointError, match="'step-00000009', which does not exist: there are step-00000005"
    ):
        checkpoint.load(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hacked"),)


def test_nothing_is_unpickled_freely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="would run code"):
        checkpoint.pack({"scheduler": Evil()})
    path = save(tmp_path / "state", snapshot(5))
    buffer = io.BytesIO()
    torch.save({"x": Evil()}, buffer)
    (path / TRAINER).write_bytes(buffer.getvalue())
    state = json.loads((path / STATE).read_text())
    state["file_bytes"][TRAINER] = len(buffer.getvalue())
    (path / STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "state")
    assert not Path("hacked").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Path("hacked").exists(), "the trap works"


# -------------------------------------------------------------------- whose state


def trained(folder: Path, **options: Any) -> None:
    trainer(converted(), folder, **options).fit(loader(), epochs=1)


def other_model() -> Any:
    net = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4))
    return to_local(net, torch.randn(4, 5), method="early_exit", parts=2, verify=False)


def test_a_checkpoint_of_another_run_lists_all_differences_and_changes_nothing(tmp_path: Path) -> None:
    trained(tmp_path)
    local = other_model()
    before = tensors(local)
    with pytest.raises(CheckpointError) as caught:
        trainer(local, tmp_path, seed=4).fit(loader(), epochs=2, resume=True)
    assert "is of torch.nn.modules.container.Sequential with 508 parameters" in str(caught.value)
    assert "its seed is 3, and here it is 4" in str(caught.value)
    assert_same(before, tensors(local))


@pytest.mark.parametrize(
    ("local", "options", "message"),
    [
        (lambda: converted("nwise"), {}, r"its method is early_exit\(.*\), and here it is nwise\("),
        (
            converted,
            {"optimizer": partial(torch.optim.SGD, lr=0.1)},
            "was trained by Adam, and here it is by SGD",
        ),
        (
            lambda: converted(parts=2),
            {},
            r"heads\.2\.\S+ is not in the model.*was cut after .*, and here it is cut",
        ),
    ],
    ids=["method", "optimizer", "parts"],
)
def test_other_methods_optimizers_and_parts_are_refused(
    tmp_path: Path, local: Any, options: dict[str, Any], message: str
) -> None:
    trained(tmp_path)
    ours = local()
    before = tensors(ours)
    with pytest.raises(CheckpointError, match="(?s)" + message):
        trainer(ours, tmp_path, **options).fit(loader(), epochs=2, resume=True)
    assert_same(before, tensors(ours))


def test_other_options_of_the_method_are_another_run(tmp_path: Path) -> None:
    trainer(converted(SCPL(temperature=0.1)), tmp_path).fit(loader(), epochs=1)
    with pytest.raises(CheckpointError, match=r"temperature=0\.1.*temperature=0\.2"):
        trainer(converted(SCPL(temperature=0.2)), tmp_path).fit(loader(), epochs=2, resume=True)


def test_other_micro_batches_are_refused_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        trainer(converted(), tmp_path, checkpoint_every=1, microbatches=2).fit(Breaking(loader(), 3), epochs=2)
    local = converted()
    before = tensors(local)
    said = r"after step 2 of epoch 1 with microbatches=2, and here it is 1, .* go on with 2 to the end"
    with pytest.raises(CheckpointError, match=said):
        trainer(local, tmp_path).fit(loader(), epochs=2, resume=True)
    assert_same(before, tensors(local))
    trainer(local, tmp_path, microbatches=2).fit(loader(), epochs=2, resume=True)


def test_other_micro_batches_from_an_epoch_on_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epochs, microbatches in ((1, 1), (2, 1), (3, 2)):
        assert "microbatches" not in caplog.text
        trainer(converted(), tmp_path, microbatches=microbatches).fit(loader(), epochs=epochs, resume=True)
    assert "was made with microbatches=1 until the end of epoch 2, and here it is 2" in caplog.text


def test_a_checkpoint_that_tells_no_micro_batches_is_taken(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        trainer(converted(), tmp_path, checkpoint_every=1, microbatches=2).fit(Breaking(loader(), 3), epochs=2)
    path = tmp_path / (tmp_path / LATEST).read_text().strip() / STATE
    state = json.loads(path.read_text())
    del state["microbatches"]
    path.write_text(json.dumps(state))
    trainer(converted(), tmp_path, microbatches=2).fit(loader(), epochs=1, resume=True)


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ConfigError, match="holds the checkpoints of an earlier run: pass resume=True"):
        trained(tmp_path)


def test_names_are_the_models_own_and_reading_needs_no_toolkit(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / (tmp_path / LATEST).read_text().strip()
    weights = load_file(path / WEIGHTS)
    assert {"0.weight", "1.running_mean", "12.bias"} <= set(weights)
    assert {name.split(".")[1] for name in weights if name.startswith("heads.")} == {"1", "2"}
    state = load_file(path / OPTIMIZER)
    assert {"0.weight/exp_avg", "0.weight/step", "12.bias/exp_avg_sq"} <= set(state)
    about = json.loads((path / STATE).read_text())
    assert (about["step"], about["epoch"], about["batch"], about["method"]["name"]) == (4, 1, 0, "early_exit")


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_parts(tmp_path: Path, before: int, after: int) -> None:
    """`bp` has heads without weights, so any cut fits; the whole equals a run that was never cut again."""

    def run(parts: int) -> Any:
        local = converted("bp", parts=parts, dropout=0.0)
        return local, trainer(local, tmp_path, checkpoint_every=1)

    whole = converted("bp", parts=1, dropout=0.0)
    trainer(whole).fit(loader(), epochs=3)
    with pytest.raises(Interruption):
        run(before)[1].fit(Breaking(loader(), 7), epochs=3)
    local, again = run(after)
    again.fit(loader(), epochs=3, resume=True)
    assert_same(tensors(whole), tensors(local))


def test_optimizers_with_state_that_is_no_tensor_are_resumed(tmp_path: Path) -> None:
    """Some keep their step as a Python number, some a list of tensors."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    state["past"] = [*state.get("past", []), p.detach().mean()][-2:]
                    p.data.sub_(1e-3 * state["count"] * state["past"][0])

    def run(folder: Path | None) -> tuple[Any, Any]:
        local = converted()
        return local, trainer(local, folder, optimizer=lambda p: Counting(p, lr=0.01, momentum=0.9))

    whole, training = run(None)
    training.fit(loader(), epochs=2)
    run(tmp_path)[1].fit(loader(), epochs=1)
    local, training = run(tmp_path)
    training.fit(loader(), epochs=2, resume=True)
    assert_same(tensors(whole), tensors(local))


def test_a_schedule_that_cannot_be_stored_is_refused_before_training(tmp_path: Path) -> None:
    class Custom(torch.optim.lr_scheduler.LambdaLR):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"hook": Evil()}

    steps: list[int] = []
    with pytest.raises(CheckpointError, match="would run code"):
        trainer(
            converted(),
            tmp_path,
            scheduler=lambda optimizer: Custom(optimizer, lambda epoch: 1.0),
            on_step=lambda step, reports: steps.append(step),
        ).fit(loader(), epochs=1)
    assert steps == []


def test_saved_tensors_are_copies(tmp_path: Path) -> None:
    weight: Tensor = torch.zeros(2)
    save(tmp_path, Snapshot({"step": 1}, {"w": weight}, {}))
    weight += 1
    assert checkpoint.load(tmp_path).weights["w"].tolist() == [0, 0]  # type: ignore[union-attr]
