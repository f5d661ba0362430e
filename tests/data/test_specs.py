"""DATA specs: what each gives, and what is said where it gives nothing."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from localize.data import Data, load_data
from localize.errors import ConfigError


def write_idx(path: Path, values: Tensor) -> None:
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    raw = header + bytes(values.flatten().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(folder: Path, suffix: str = "") -> None:
    for prefix, count in (("train", 20), ("t10k", 10)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", torch.full((count, 28, 28), 255))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", torch.arange(count) % 10)


def order(data: Data, seed: int, epochs: int) -> list[list[int]]:
    loader, _ = data.loaders(batch_size=3, seed=seed)
    return [[int(v) for _, y in loader for v in y] for _ in range(epochs)]


def test_digits_come_with_the_package() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.val)) == (1438, 359)
    train, val = data.loaders(batch_size=100)
    x, y = next(iter(train))
    assert x.shape == (100, 1, 8, 8)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert set(y.tolist()) == set(range(10)) == set(next(iter(val))[1].tolist())
    assert data.example().shape == (2, 1, 8, 8)


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data, wanted = load_data("digits"), datasets.load_digits()
    rows = torch.cat([data.train.inputs, data.val.inputs]).mul(16).flatten(1).int().tolist()
    assert sorted(rows) == sorted(torch.as_tensor(wanted.data).int().tolist())


def test_order_is_new_every_epoch_and_comes_from_the_seed() -> None:
    x = torch.arange(10)
    data = Data("ten", TensorDataset(x, x), TensorDataset(x, x))
    first, second = order(data, seed=0, epochs=2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    torch.manual_seed(7)  # the global stream has no part in it
    assert order(data, seed=0, epochs=2) == [first, second]
    assert order(data, seed=1, epochs=1) != [first]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "FashionMNIST/raw", "fashion-mnist"])
def test_idx_files_are_found_where_they_usually_lie(tmp_path: Path, place: str, suffix: str) -> None:
    write_mnist(tmp_path / place, suffix)
    data = load_data("fashion-mnist", tmp_path)
    assert (len(data.train), len(data.val)) == (20, 10)
    assert data.example().shape == (2, 1, 28, 28)
    assert float(data.example().max()) == pytest.approx((1 - 0.2860) / 0.3530)


def test_csv_classes_words_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "flowers.csv"
    rows = [f"{i},{i * 2},{'red' if i % 2 else 'blue'},{i / 3}" for i in range(10)]
    path.write_text("\n".join(["a,b,colour,height", *rows]))
    with pytest.raises(ConfigError, match=r"line 2: 'blue' is no number"):
        load_data(f"csv:{path}")
    path.write_text(
        "\n".join(["a,colour,height", *(f"{i},{'red' if i % 2 else 'blue'},{i}" for i in range(10))])
    )
    data = load_data(f"csv:{path}?target=colour")
    assert (data.num_classes, data.task) == (2, "classification")
    assert data.example().shape == (2, 2)
    path.write_text("\n".join(f"{i},{i * i},{i / 3}" for i in range(10)))
    data = load_data(f"csv:{path}")
    assert data.task == "regression"
    assert data.train[0][1].shape == (1,)


def test_text_is_shifted_by_one(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_text("abcdefgh" * 10)
    data = load_data(f"text:{path}?length=4")
    assert (data.num_classes, data.task) == (8, "causal_lm")
    x, y = data.train[0]
    assert x.tolist() == [0, 1, 2, 3]
    assert y.tolist() == [1, 2, 3, 4]


def test_imagefolder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for half in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / half / name).mkdir(parents=True)
            image.new("RGB", (12, 10)).save(tmp_path / half / name / "0.png")
    data = load_data(f"imagefolder:{tmp_path}?size=8")
    assert data.num_classes == 2
    assert data.example().shape == (2, 3, 8, 8)


OWN = """
import torch
from torch.utils.data import DataLoader, TensorDataset
one = TensorDataset(torch.randn(10, 3), torch.arange(10))
pair = (one, one)
def data(count=10):
    return TensorDataset(torch.randn(count, 3), torch.arange(count)), one
loaders = (DataLoader(one, batch_size=5), DataLoader(one, batch_size=5))
number = 3
empty = (TensorDataset(torch.zeros(0, 3)), one)
"""


@pytest.mark.parametrize(
    ("name", "size"), [("", 10), (":one", 8), (":pair", 10), (":data?count=6", 6), (":loaders", 2)]
)
def test_a_file_of_ones_own(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    data = load_data(f"{path}{name}")
    assert len(data.train) == size
    assert data.example().shape == (2, 3)
    if name == ":loaders":
        assert isinstance(data.loaders(64)[0], DataLoader)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "Did you mean 'digits'"),
        ("digits?size=3", "digits takes no options"),
        ("mnist", r"no file train-images-idx3-ubyte\[\.gz\] in .*--data-dir.*--download"),
        ("cifar10", "CIFAR10: Dataset not found.*--data-dir"),
        ("csv:", "csv needs a path"),
        ("csv:{folder}/none.csv", "cannot read"),
        ("csv:{folder}/t.csv?target=c", "no column 'c'.*Columns: a, b"),
        ("csv:{folder}/t.csv?traget=a", "no option 'traget'. Did you mean 'target'"),
        ("csv:{folder}/ragged.csv", "rows 2 do not have the 2 columns"),
        ("text:{folder}/t.csv", "at least 325 are needed"),
        ("imagefolder:{folder}/none", "no folder"),
        ("{folder}/none.py", "No file"),
        ("{folder}/own.py:dta", "has no dta. Did you mean 'data'"),
        ("{folder}/own.py:number", "is a int; wanted is a pair"),
        ("{folder}/own.py:empty", "training half is empty"),
        ("{folder}/own.py:data?n=1", "cannot be called: TypeError"),
    ],
)
def test_bad_data_is_one_config_error(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "ragged.csv").write_text("1,2\n3\n")
    with pytest.raises(ConfigError, match=message):
        load_data(spec.format(folder=tmp_path), tmp_path / "nowhere")


def test_truncated_idx_names_the_file(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte.*truncated"):
        load_data("mnist", tmp_path)
    path.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01")[:-9])
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load_data("mnist", tmp_path)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="batch size is 0"):
        load_data("digits").loaders(batch_size=0)
