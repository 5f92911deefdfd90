"""Whole runs to the same gap on MNIST: 5 % wrong labels, memorised, then forgotten. What is compared: see `whole`."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from whole import ARMS, CLEANED, LUR, PUBLISHED, Data, Job, mislabelled, verdict
from whole import run as run_arm

from fastlur.demo import digits, residual_cnn
from gpu_parts.book import Book, Options, Row, Skip, device
from gpu_parts.mnist import mnist
from gpu_parts.needs import WANTED, missing
from gpu_parts.timing import tf32, wait

WRONG = 0.05
LADDER = (1.0, 2.0, 5.0, 10.0)  # epochs; short ones first, so that whole rounds of all arms fit whatever the device
RATES = (1.0, 0.3, 3.0)  # times the learning rate of each arm
TRAINED = 20  # epochs


def run(book: Book, options: Options) -> None:
    """Float32 is float32 here, whatever the process was told before; bf16 is an arm of its own."""
    with tf32(False):
        to_the_same_gap(book, options)


def to_the_same_gap(book: Book, options: Options) -> None:
    """The two networks, then every arm at every length and rate that the time allows."""
    jobs: list[Job] = []
    book.case("training, and retraining without the forget set", 20, lambda row: jobs.append(train_both(row, options)))
    if not jobs:
        return
    arms = (PUBLISHED, LUR) if options.tiny else tuple(ARMS)
    pace: dict[str, float] = {}  # seconds an epoch, so far
    compared: list[Row] = []
    for rate, epochs in [(1.0, 1.0)] if options.tiny else [(rate, epochs) for rate in RATES for epochs in LADDER]:
        rows = []
        for name in arms:
            likely = epochs * pace.get(name, max(pace.values(), default=0.0))
            case = partial(one, job=jobs[0], name=name, epochs=epochs, rate=rate, tiny=options.tiny)
            row = book.case(f"{name}, {epochs:g} epochs, learning rate × {rate:g}", likely, case)
            if row["status"] == "done":
                rows.append(row)
                pace[name] = row["spent_seconds"] / epochs
        if len(rows) == len(arms):  # every arm has the same number of tries
            compared += rows
    book.case("to the same gap", 0, lambda row: judge(row, compared))


def judge(row: Row, compared: list[Row]) -> None:
    """Who came how near in what time, of the settings that every arm was run with."""
    if not compared:
        raise Skip("no setting was run with every arm")
    row["to_the_gap"] = verdict(compared, (PUBLISHED, CLEANED, LUR))


def train_both(row: Row, options: Options) -> Job:
    """The data, the network that memorised the wrong labels and from which all start, the one that never saw them."""
    absent = missing(("sklearn", "scipy"))  # what the figures of a run are made with
    if absent:
        raise Skip(f"{WANTED[absent[0]]} is not there")
    if options.data is None and not options.tiny:
        raise Skip("needs MNIST: --data DIR")
    if options.tiny or options.data is None:
        (images, labels), test = digits(0)
        images, labels, row["data"] = images[:200], labels[:200], "digits"
    else:
        (images, labels), test = mnist(options.data, 10_000)
        row["data"] = "MNIST, 10,000 images of 28 × 28"
    labels, gone = mislabelled((images, labels), WRONG, 1)
    images, labels, gone = (x.to(device()) for x in (images, labels, gone))
    retain = images[~gone], labels[~gone]
    epochs = 2 if options.tiny else TRAINED
    model = train((images, labels), epochs, 0)
    wait()
    began = time.perf_counter()
    truth = train(retain, epochs, 100)
    wait()
    row["retraining_seconds"] = round(time.perf_counter() - began, 3)
    made = Job(model, (images[gone], labels[gone]), retain, tuple(x.to(device()) for x in test), truth)
    row["before"], row["retrained"] = made.figures(model), made.figures(truth)
    return made


def one(row: Row, job: Job, name: str, epochs: float, rate: float, tiny: bool) -> None:
    """One setting of an arm."""
    length: dict[str, Any] = {"epochs": epochs, "batch_size": 32 if tiny else 128}
    row.update(run_arm(job, name, rate, times=1 if tiny else 2, wait=wait, **length), epochs=epochs)


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
