"""MNIST from the four files as they are distributed, packed or not, in a folder or in MNIST/raw below it."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

Data = tuple[Tensor, Tensor]
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def located(folder: Path) -> list[Path]:
    """The four files.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    places = folder, folder / "MNIST" / "raw"
    for place in places:
        found = [path for name in FILES for path in (place / f"{name}.gz", place / name) if path.is_file()]
        names = {path.name.removesuffix(".gz"): path for path in found}
        if len(names) == len(FILES):
            return [names[name] for name in FILES]
    raise FileNotFoundError(f"no {', '.join(FILES)} (.gz or not) in {' or '.join(map(str, places))}")


def mnist(folder: Path, items: int) -> tuple[Data, Data]:
    """The first `items` training images and all test images, (n, 1, 28, 28) in [0, 1], and their labels."""
    images, labels, test, test_labels = map(_idx, located(folder))
    wide = [x.unsqueeze(1).float() / 255 for x in (images[:items], test)]
    return (wide[0], labels[:items].long()), (wide[1], test_labels.long())


def _idx(path: Path) -> Tensor:
    """A tensor of bytes from an IDX file: two zero bytes, 8 for bytes, the number of dimensions, each as 32 bits."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * len(sizes) :]), dtype=torch.uint8).view(sizes)
