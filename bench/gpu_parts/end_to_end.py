"""Whole runs to the same gap: LUR against ScissorHands, from the call to the model, everything in between included.

Wrong labels of 5 % of the images are memorised and then to be forgotten; the gap is the mean distance to a network
retrained without them. Each arm climbs a ladder of run lengths, every run from the same trained model. The target is
the smallest gap that ScissorHands as published reached; an arm's time is that of its quickest run that is as near.
"""

from __future__ import annotations

import copy
import gzip
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlur
from fastlur.demo import digits, residual_cnn
from fastlur.losses import negative_cross_entropy
from gpu_parts.book import Book, Options, Row, Skip, device
from gpu_parts.timing import wait

Data = tuple[Tensor, Tensor]
WRONG = 0.05
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
PUBLISHED = "scissorhands, as published"
LADDER = (10.0, 5.0, 2.0, 1.0)  # epochs; the published length first
# what it is called: how `unlearn` is called
ARMS: dict[str, dict[str, Any]] = {
    PUBLISHED: {
        "method": fastlur.methods.METHODS["scissorhands"](form="as_published"),
        "forget_loss": negative_cross_entropy,
        "lr": 5e-3,
        "weight_decay": 5e-4,
    },
    "lur, optimistic": {"method": fastlur.LUR()},
    "lur, optimistic, bf16": {
        "method": fastlur.LUR(),
        "precision": "bf16",
        "memory_format": torch.channels_last,
    },
    "scissorhands, cleaned": {
        "method": fastlur.methods.METHODS["scissorhands"](),
        "forget_loss": negative_cross_entropy,
        "lr": 5e-3,
        "weight_decay": 5e-4,
    },
}


def run(book: Book, options: Options) -> None:
    job: dict[str, Any] = {}
    found: dict[str, list[Row]] = {name: [] for name in ARMS}
    book.case("training, and retraining without the forget set", 20, lambda row: train_both(row, job, options))
    if "model" not in job:
        return
    arms = [PUBLISHED, "lur, optimistic"] if options.tiny else list(ARMS)
    rates: dict[str, float] = {}  # seconds an epoch, so far
    for epochs in (1.0,) if options.tiny else LADDER:
        for name in arms:
            likely = epochs * rates.get(name, max(rates.values(), default=0.0))
            row = book.case(
                f"{name}, {epochs:g} epochs", likely, partial(one, job=job, name=name, epochs=epochs, tiny=options.tiny)
            )
            if row["status"] == "done":
                found[name].append(row)
                rates[name] = row["spent_seconds"] / epochs
    book.case("to the same gap", 0, lambda row: verdict(row, found))


def train_both(row: Row, job: dict[str, Any], options: Options) -> None:
    """The data, the network that memorised the wrong labels, the one that never saw them, and where we start."""
    if options.data is None and not options.tiny:
        raise Skip("needs MNIST: --data DIR")
    if options.tiny or options.data is None:
        (images, labels), test = digits(0)
        images, labels, row["data"] = images[:200], labels[:200], "digits"
    else:
        (images, labels), test = mnist(options.data, 10_000)
        row["data"] = "MNIST, 10,000 images of 28 × 28"
    generator = torch.Generator().manual_seed(1)
    gone = torch.zeros(len(labels), dtype=torch.bool)
    gone[torch.randperm(len(labels), generator=generator)[: int(WRONG * len(labels))]] = True
    wrong = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    labels = torch.where(gone, wrong, labels)
    images, labels, gone = (x.to(device()) for x in (images, labels, gone))
    job["forget"], job["retain"] = (images[gone], labels[gone]), (images[~gone], labels[~gone])
    job["test"] = tuple(x.to(device()) for x in test)
    epochs = 2 if options.tiny else 60
    model = train((images, labels), epochs, 0)
    wait()
    began = time.perf_counter()
    truth = train(job["retain"], epochs, 100)
    wait()
    row["retraining_seconds"] = round(time.perf_counter() - began, 3)
    reference = fastlur.evaluate(truth, forget=job["forget"], retain=job["retain"], test=job["test"])
    job["model"], job["reference"] = model, reference
    row["retrained"] = figures(reference)
    row["before"] = figures(judge(model, job))


def one(row: Row, job: dict[str, Any], name: str, epochs: float, tiny: bool) -> None:
    """One run from the trained model; its seconds are those of `unlearn` as a whole, its second time where short."""
    batch = 32 if tiny else 128
    settings = {"batch_size": batch, "epochs": epochs, "progress": False, **ARMS[name]}
    spent = []
    for _ in range(1 if tiny else 2):  # the first one also chooses algorithms and compiles kernels
        model = copy.deepcopy(job["model"])
        wait()
        began = time.perf_counter()
        result = fastlur.unlearn(model, job["forget"], job["retain"], **settings)
        wait()
        spent.append(time.perf_counter() - began)
        if spent[0] > 5:
            break
    row |= {"arm": name, "epochs": epochs, "seconds": round(spent[-1], 4), "all_seconds": [round(s, 4) for s in spent]}
    row["steps"] = len(result.history["retain_loss"])
    row["after"] = figures(judge(model, job))
    row["gap"] = row["after"]["gap"]


def verdict(row: Row, found: dict[str, list[Row]]) -> None:
    """Who was how quick to the gap that ScissorHands as published reached."""
    if not found[PUBLISHED]:
        raise Skip(f"no run of {PUBLISHED} is there")
    row["target_gap"] = min(each["gap"] for each in found[PUBLISHED])
    row["seconds"] = {}
    for name, runs in ((name, runs) for name, runs in found.items() if runs):
        near = [each["seconds"] for each in runs if each["gap"] <= row["target_gap"]]
        row["seconds"][name] = min(near) if near else None
    base = row["seconds"][PUBLISHED]
    row["ratio_to_published"] = {n: None if s is None else round(s / base, 3) for n, s in row["seconds"].items()}


def judge(model: nn.Module, job: dict[str, Any]) -> fastlur.Evaluation:
    return fastlur.evaluate(
        model, forget=job["forget"], retain=job["retain"], test=job["test"], reference=job["reference"]
    )


def figures(of: fastlur.Evaluation) -> dict[str, float | None]:
    return {key: None if (v := getattr(of, key)) is None else round(v, 3) for key in ("ua", "ra", "ta", "mia", "gap")}


def train(data: Data, epochs: int, seed: int) -> nn.Module:
    """The network from scratch with AdamW and a one-cycle learning rate, in batches of 128."""
    torch.manual_seed(seed)
    model = residual_cnn().to(device())
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    steps = epochs * -(-len(labels) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(labels), device=device()), 128):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def mnist(folder: Path, items: int) -> tuple[Data, Data]:
    """The first `items` training images and all test images, (n, 1, 28, 28) in [0, 1], and their labels."""
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise Skip(f"{folder} has no {missing[0]}")
    read = [_idx(folder / name) for name in FILES]
    images = [x.unsqueeze(1).float() / 255 for x in (read[0][:items], read[2])]
    return (images[0], read[1][:items].long()), (images[1], read[3].long())


def _idx(path: Path) -> Tensor:
    """A tensor of bytes from an IDX file: two zero bytes, 8 for bytes, the number of dimensions, each as 32 bits."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * len(sizes) :]), dtype=torch.uint8).view(sizes)
