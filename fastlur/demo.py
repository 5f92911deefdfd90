"""The whole job on real data that ship with a dependency: scikit-learn's handwritten digits.

A small residual network learns the digits, is made to forget (a) one class and (b) a set of mislabelled images that it
had memorised, and is compared with the truth: the same network trained without them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from fastlur.api import unlearn
from fastlur.evaluate import Evaluation, evaluate
from fastlur.info import info
from fastlur.methods.base import Method
from fastlur.result import Result

Data = tuple[Tensor, Tensor]
SCENARIOS = ("class", "mislabelled")
FORGOTTEN_CLASS = 3
MISLABELLED = 0.05
EPOCHS = 40  # enough to memorise wrong labels
STEPS = {"class": 50, "mislabelled": 50}


class Residual(nn.Module):
    """Two convolutions around a skip connection; input and output of shape (n, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """relu(x + block(x))."""
        inside = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(x + inside)


def residual_cnn(classes: int = 10, width: int = 32, stem: tuple[int, int, int] = (3, 1, 1)) -> nn.Module:
    """A small residual network with batch norm for grey images; input (n, 1, height, width), output (n, classes).

    `stem` is kernel size, stride and padding of the first convolution.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, *stem, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        Residual(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


@dataclass
class Scenario:
    """What is to be forgotten, what kept, and what the truth is tested on."""

    name: str
    forget: Data
    retain: Data
    test: Data


@dataclass
class Outcome:
    """One scenario's figures: the model before, after, and retrained without the forget set."""

    scenario: str
    before: Evaluation
    after: Evaluation
    retrained: Evaluation
    seconds: float
    retraining_seconds: float
    result: Result


def digits(seed: int) -> tuple[Data, Data]:
    """1,437 training and 360 test images, shape (n, 1, 8, 8), values in [0, 1], and their labels."""
    from sklearn.datasets import load_digits  # here: the network is of use without them

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1437], order[1437:]
    return (images[train], labels[train]), (images[test], labels[test])


def scenario(name: str, seed: int) -> Scenario:
    """Build one of `SCENARIOS` from the digits."""
    (images, labels), (test_images, test_labels) = digits(seed)
    if name == "class":
        gone, others = labels == FORGOTTEN_CLASS, test_labels != FORGOTTEN_CLASS
        test = test_images[others], test_labels[others]
    else:
        generator = torch.Generator().manual_seed(seed + 1)
        gone = torch.zeros(len(labels), dtype=torch.bool)
        gone[torch.randperm(len(labels), generator=generator)[: int(MISLABELLED * len(labels))]] = True
        wrong = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
        labels = torch.where(gone, wrong, labels)
        test = test_images, test_labels
    return Scenario(name, (images[gone], labels[gone]), (images[~gone], labels[~gone]), test)


def train(data: Data, epochs: int, seed: int) -> nn.Module:
    """Train the network from scratch with AdamW and a one-cycle learning rate, in batches of 128."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = residual_cnn()
        images, labels = data
        steps = epochs * -(-len(labels) // 128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(labels)), 128):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images[batch]), labels[batch])
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    return model.eval()


def play(name: str, seed: int, method: str | Method = "lur", progress: bool = True) -> Outcome:
    """Run one scenario from training to the verdict."""
    job = scenario(name, seed)
    everything = torch.cat([job.forget[0], job.retain[0]]), torch.cat([job.forget[1], job.retain[1]])
    with tqdm(total=4, desc=name, disable=not progress, leave=False, unit="part") as bar:
        bar.set_postfix_str("training on everything")
        model = train(everything, EPOCHS, seed)
        bar.update()
        bar.set_postfix_str("retraining without the forget set")
        began = time.perf_counter()
        truth = train(job.retain, EPOCHS, seed + 100)
        retraining_seconds = time.perf_counter() - began
        bar.update()
        retrained = judge(truth, job)
        before = judge(model, job, retrained)
        bar.set_postfix_str("unlearning")
        result = unlearn(model, job.forget, job.retain, method=method, steps=STEPS[name], seed=seed, progress=progress)
        bar.update()
        after = judge(model, job, retrained)
        bar.update()
    return Outcome(name, before, after, retrained, result.seconds, retraining_seconds, result)


def judge(model: nn.Module, job: Scenario, reference: Evaluation | None = None) -> Evaluation:
    """Evaluate a model on a scenario."""
    return evaluate(model, forget=job.forget, retain=job.retain, test=job.test, reference=reference)


def table(outcomes: list[Outcome]) -> str:
    """One table that a person reads at a glance."""
    lines = [f"{'':22s}{'UA':>7s}{'RA':>7s}{'TA':>7s}{'MIA':>7s}{'gap':>7s}{'seconds':>9s}"]
    for outcome in outcomes:
        lines.append(f"forget {TITLES[outcome.scenario]}")
        for label, figures, seconds in rows(outcome):
            cells = [figures.ua, figures.ra, figures.ta, figures.mia, figures.gap or 0.0]
            time_spent = "" if seconds is None else f"{seconds:.1f}"
            lines.append(f"  {label:20s}" + "".join(f"{cell:7.1f}" for cell in cells) + f"{time_spent:>9s}")
        faster = outcome.retraining_seconds / outcome.seconds
        lines.append(f"  {faster:.1f} times as fast as retraining")
    lines.append(
        "UA: error on the forget set, RA/TA: accuracy on retain/test, MIA: forget items called non-members, all in %;"
    )
    lines.append(
        "gap: mean distance to the retrained model over the four, in points. The retrained model is the truth."
    )
    return "\n".join(lines)


TITLES = {"class": f"one class (the digit {FORGOTTEN_CLASS})", "mislabelled": "mislabelled images (5 %)"}


def rows(outcome: Outcome) -> Iterator[tuple[str, Evaluation, float | None]]:
    """The three lines of a scenario."""
    yield "before", outcome.before, None
    yield "after unlearning", outcome.after, outcome.seconds
    yield "retrained (truth)", outcome.retrained, outcome.retraining_seconds


def record(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    """Everything the table and the picture show, as plain values, with what it was made on."""
    return {
        "seed": seed,
        "made_on": info(),
        "scenarios": {
            outcome.scenario: {
                "before": outcome.before.as_dict(),
                "after": outcome.after.as_dict(),
                "retrained": outcome.retrained.as_dict(),
                "seconds": outcome.seconds,
                "retraining_seconds": outcome.retraining_seconds,
                "settings": outcome.result.settings,
                "history": dict(outcome.result.history),
            }
            for outcome in outcomes
        },
    }
