"""Training from scratch, and a cache of what was trained: files that git ignores and anybody can make again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from fastlur.targets import Novice
from fastlur.world import borrowed_random, derive

from .networks import NETWORKS
from .scenarios import Scenario, scenario
from .splits import Data, split

ROOT = Path(__file__).resolve().parents[2]
NOVICE_PART = 5  # a novice has a fifth of the epochs
BLINDSPOT = 2  # epochs


@dataclass(frozen=True)
class Bench:
    """A network on a data set, and how large everything is; small numbers run the plumbing.

    Attributes:
        network: one of `NETWORKS`.
        dataset: "mnist" or "digits".
        size: training images; None: as many as a split has.
        epochs: None: what the network is trained for.
        steps: of unlearning, for every method that takes steps.
    """

    network: str = "cnn"
    dataset: str = "mnist"
    size: int | None = None
    epochs: int | None = None
    steps: int = 150

    @property
    def trained_for(self) -> int:
        """Epochs."""
        return self.epochs or NETWORKS[self.network].epochs[self.dataset]

    @property
    def name(self) -> str:
        """For files: of a whole study it says no sizes."""
        small = "" if self.size is None else f"-{self.size}x{self.trained_for}x{self.steps}"
        return f"{self.network}-{self.dataset}{small}"

    def scenario(self, name: str, split_name: str) -> Scenario:
        """A job of this bench."""
        return scenario(name, split(self.dataset, split_name, self.size), split_name)

    def model(self) -> nn.Module:
        """A fresh network; draws from the global generator."""
        return NETWORKS[self.network].make(28 if self.dataset == "mnist" else 8)


def cache() -> Path:
    """The folder of trained models; FASTLUR_CACHE says where else."""
    return Path(os.environ.get("FASTLUR_CACHE", ROOT / ".data" / "quality"))


def original(bench: Bench, name: str, split_name: str) -> tuple[nn.Module, float]:
    """The model as given of a scenario, and the seconds it took; scenarios on the same data share it."""
    job = bench.scenario(name, split_name)
    return _cached(bench, f"{job.original}-{split_name}", lambda: train(bench, job.trained_on, split_name))


def retrained(bench: Bench, name: str, split_name: str, number: int) -> tuple[nn.Module, float]:
    """The truth: trained without the forget set, with a seed of its own."""
    what = f"truth-{name}-{split_name}-{number}"
    return _cached(bench, what, lambda: train(bench, bench.scenario(name, split_name).retain, what))


def teacher(bench: Bench, name: str, split_name: str, request: int, kind: str) -> tuple[nn.Module, float]:
    """A novice for a request of a scenario, and the seconds it took: "novice", "blindspot", or a new "head"."""
    epochs = BLINDSPOT if kind == "blindspot" else max(1.0, bench.trained_for / NOVICE_PART)
    given, _ = original(bench, name, split_name)  # before the clock: its training is not the teacher's
    made = Novice(epochs=epochs, lr=NETWORKS[bench.network].lr / 2, part="head" if kind == "head" else "all")

    def learn() -> nn.Module:
        retain = bench.scenario(name, split_name).retain_at(request)
        return made.teacher(given, retain, seed=derive(name, split_name, request))

    return _cached(bench, f"{kind}-{name}-{split_name}-{request}", learn)


def train(bench: Bench, data: Data, seed: str) -> nn.Module:
    """Train a fresh network."""
    recipe = NETWORKS[bench.network]
    images, labels = data
    with borrowed_random(torch.device("cpu")):
        torch.manual_seed(derive("quality", seed))
        model = bench.model()
        steps = bench.trained_for * -(-len(labels) // 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=max(steps, 4))
        for _ in range(bench.trained_for):
            for batch in torch.randperm(len(labels)).split(64):
                if len(batch) > 1:  # batch norm
                    optimizer.zero_grad()
                    torch.autograd.backward(functional.cross_entropy(model(images[batch]), labels[batch]))
                    optimizer.step()
                schedule.step()
    return model.eval()


def _cached(bench: Bench, what: str, make: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """A model from its file, or made and written there whole; seconds of the processor, by the one thread there is."""
    digest = blake2b(repr((bench.network, bench.dataset, bench.size, bench.trained_for)).encode(), digest_size=4)
    path = cache() / f"{bench.network}-{bench.dataset}-{digest.hexdigest()}" / f"{what}.safetensors"
    if not path.exists():
        began = time.process_time()
        model = make()
        spent = time.process_time() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            temporary,
            {"seconds": repr(spent)},
        )
        temporary.replace(path)
    model = bench.model()
    with safetensors.safe_open(path, "pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return model.eval(), float(file.metadata()["seconds"])
