"""Images: digits (in the package), MNIST, Fashion-MNIST, CIFAR-10 and folders of images.

Shape legend: ``N`` batch, ``C`` channels, ``H W`` space.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localize.data.base import Data, TensorData, split_dataset
from localize.data.idx import find_idx, read_idx
from localize.errors import ConfigError

_FILES = Path(__file__).parent / "files"
_MNIST_LIKE = {  # torchvision's class; mean and deviation of the training pixels
    "mnist": ("MNIST", 0.1307, 0.3081),
    "fashion-mnist": ("FashionMNIST", 0.2860, 0.3530),
}
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VALIDATION_NAMES = ("val", "valid", "validation", "test")


def digits() -> Data:
    """1,797 handwritten digits, (N, 1, 8, 8), values 0 to 1; one in five is for validation."""
    images = read_idx(_FILES / "digits-images-idx3-ubyte.gz").float() / 16
    labels = read_idx(_FILES / "digits-labels-idx1-ubyte.gz").long()
    train, val = split_dataset(TensorData(images.unsqueeze(1), labels))
    return Data("digits", train, val, 10, "classification")


def mnist_like(name: str, data_dir: Path, download: bool) -> Data:
    """MNIST or Fashion-MNIST, (N, 1, 28, 28) standardised; the test set is for validation.

    Looks in ``data_dir`` for the four IDX files, plain or gzipped, in torchvision's folders and on their own.
    """
    cls, mean, std = _MNIST_LIKE[name]
    if download:
        _torchvision_dataset(cls, data_dir, train=True, download=True)
    folders = [
        data_dir / sub for sub in ("", f"{cls}/raw", cls, name, f"{name}/raw", f"dataset-{name}", "raw")
    ]
    halves = []
    for prefix in ("train", "t10k"):
        images = _idx_or_error(f"{prefix}-images-idx3-ubyte", name, folders)
        labels = _idx_or_error(f"{prefix}-labels-idx1-ubyte", name, folders)
        halves.append(TensorData(images.float().unsqueeze(1).div(255).sub(mean).div(std), labels.long()))
    return Data(name, halves[0], halves[1], 10, "classification")


def _idx_or_error(file: str, name: str, folders: list[Path]) -> Tensor:
    path = find_idx(file, folders)
    if path is None:
        raise ConfigError(
            f"{name}: no file {file}[.gz] in {str(folders[0])!r} or its folders "
            f"{', '.join(str(f.relative_to(folders[0])) for f in folders[1:3])}. Pass the folder that holds "
            "it (--data-dir), or fetch the data set (--download)."
        )
    return read_idx(path)


def cifar10(data_dir: Path, download: bool) -> Data:
    """CIFAR-10 in torchvision's format, (N, 3, 32, 32) standardised; the test set is for validation."""
    halves = []
    for train in (True, False):
        raw = _torchvision_dataset("CIFAR10", data_dir, train=train, download=download)
        images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_CIFAR_MEAN, _CIFAR_STD))
        halves.append(TensorData((images - mean) / std, torch.tensor(raw.targets)))
    return Data("cifar10", halves[0], halves[1], 10, "classification")


def imagefolder(folder: Path, size: int = 224) -> Data:
    """A folder with a folder of images a class, or with ``train`` and ``val``/``test`` of that shape.

    Images are resized and cropped to ``size``, and standardised as for ImageNet models.
    """
    transforms = _torchvision("transforms")
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD),
        ]
    )
    if not folder.is_dir():
        raise ConfigError(f"imagefolder: no folder {str(folder)!r}.")
    val = next((folder / n for n in _VALIDATION_NAMES if (folder / n).is_dir()), None)
    if (folder / "train").is_dir() and val is not None:
        train_set, val_set = _image_folder(folder / "train", transform), _image_folder(val, transform)
        if train_set.classes != val_set.classes:
            differing = sorted(set(train_set.classes) ^ set(val_set.classes))
            raise ConfigError(
                f"imagefolder: train and {val.name} hold different classes ({', '.join(differing[:5])})."
            )
        return Data(folder.name, train_set, val_set, len(train_set.classes), "classification")
    whole = _image_folder(folder, transform)
    train_half, val_half = split_dataset(whole)
    return Data(folder.name, train_half, val_half, len(whole.classes), "classification")


def _image_folder(folder: Path, transform: Any) -> Any:
    try:
        return _torchvision("datasets").ImageFolder(str(folder), transform)
    except (FileNotFoundError, RuntimeError) as error:
        raise ConfigError(f"imagefolder: {error}") from error


def _torchvision(part: str) -> Any:
    try:
        return importlib.import_module(f"torchvision.{part}")
    except ImportError as error:
        raise ConfigError(
            f"torchvision is not installed ({error}); `pip install 'localize-torch[vision]'`."
        ) from error


def _torchvision_dataset(cls: str, data_dir: Path, train: bool, download: bool) -> Any:
    try:
        return getattr(_torchvision("datasets"), cls)(str(data_dir), train=train, download=download)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{cls}: {reason} (looked in {str(data_dir)!r}). Pass the folder that holds torchvision's "
            "files (--data-dir), or fetch the data set (--download)."
        ) from error
