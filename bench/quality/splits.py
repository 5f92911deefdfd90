"""Which images a seed trains and is judged on. What tuning sees and what final seeds are judged on never meet."""

from __future__ import annotations

import gzip
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

Data = tuple[Tensor, Tensor]
TUNING = ("tune", "tune2")  # the second is for what is chosen without tuning, such as a default
FINAL = ("final1", "final2", "final3")
SPLITS = (*TUNING, *FINAL)
DATASETS = ("mnist", "digits")
BLOCK = 10_000  # of MNIST's 60,000 training images: one a split, and one to validate on
FILES = (
    ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    (
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ),
)


class Split(NamedTuple):
    """Images of shape (n, 1, height, width), values in [0, 1], and labels."""

    train: Data
    test: Data


def split(dataset: str, name: str, size: int | None = None) -> Split:
    """The images of a split; `size` takes so many for training, and half as many to test."""
    images, labels = pool(dataset)
    train, test = indices(dataset, name)
    if size is not None:
        train, test = train[:size], test[: max(size // 2, 1)]
    return Split((images[train], labels[train]), (images[test], labels[test]))


def indices(dataset: str, name: str) -> tuple[Tensor, Tensor]:
    """Where in the pool a split's images lie: to train on, and to test on.

    MNIST: blocks of the training file; tuning is validated on a block that nothing is trained on, final seeds share the
    test file out among them. Digits are too few for that: the last 360 are kept for the final seeds, which train on all
    others; tuning validates on 360 of these.
    """
    if dataset == "digits":
        order = _order(1797)
        known, last = order[:1437], order[1437:]
        return (known[:1077], known[1077:]) if name in TUNING else (known, last)
    order, test = _order(60_000), 60_000 + _order(10_000)
    blocks = order.split(BLOCK)
    train = blocks[SPLITS.index(name)]
    if name in TUNING:
        return train, blocks[5].chunk(len(TUNING))[TUNING.index(name)]
    return train, test.chunk(len(FINAL))[FINAL.index(name)]


@cache
def pool(dataset: str) -> Data:
    """Every image of a data set and its label; MNIST is read from the folder FASTLUR_DATA/mnist, or FASTLUR_DATA."""
    if dataset == "digits":
        raw = load_digits()
        return torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(raw.target).long()
    folder = Path(os.environ.get("FASTLUR_DATA", ""))
    folder = folder / "mnist" if (folder / "mnist").is_dir() else folder
    if not (folder / FILES[0][0]).exists():
        raise SystemExit("FASTLUR_DATA must name the folder with the four MNIST files, or one with mnist/ in it")
    read = [(_idx(folder / images, 16), _idx(folder / labels, 8)) for images, labels in FILES]
    images = np.concatenate([one.reshape(-1, 1, 28, 28) for one, _ in read])
    labels = np.concatenate([other for _, other in read])
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def _idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


@cache
def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(2503))
