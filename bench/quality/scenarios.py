"""What is to be forgotten, what kept, and what a model is trained on beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlur.world import derive

from .splits import Data, Split

SCENARIOS = ("random10", "random50", "class", "half_class", "mislabelled", "backdoor", "continual")
TITLES = {
    "random10": "a random tenth",
    "random50": "a random half",
    "class": "one class",
    "half_class": "half of one class",
    "mislabelled": "mislabelled images (5 %) that the model memorised",
    "backdoor": "a planted backdoor (5 %)",
    "continual": "three requests one after another: a random 5 %, a class, another 5 %",
}
CLASS = 3
FEW = 0.05  # of the training images mislabelled, poisoned, or asked to be forgotten by one request
POISONED = 0  # what poisoned images are labelled
PATCH = 3  # pixels of a trigger's side at 28 × 28; 2 at 8 × 8


@dataclass
class Scenario:
    """A job for a method.

    Attributes:
        name: one of `SCENARIOS`.
        original: what the model as given was trained on, by name: "clean", "mislabelled" or "backdoor".
        trained_on: that.
        requests: forget sets in the order in which they are asked for.
        retain: what is to be kept at the end.
        test: what no model was trained on; without the classes that are to go.
        triggered: test images with the trigger, labelled as the attacker wants them; None: there is no backdoor.
    """

    name: str
    original: str
    trained_on: Data
    requests: list[Data]
    retain: Data
    test: Data
    triggered: Data | None = field(default=None)

    @property
    def forget(self) -> Data:
        """All requests together."""
        return joined(self.requests)

    def retain_at(self, request: int) -> Data:
        """What is to be kept when that request comes: later ones are still part of it."""
        return joined([self.retain, *self.requests[request + 1 :]])


def scenario(name: str, split: Split, seed: str) -> Scenario:
    """Build one; the seed draws what is forgotten."""
    (images, labels), test = split
    generator = torch.Generator().manual_seed(derive("quality", name, seed))
    count = len(labels)
    order = torch.randperm(count, generator=generator)
    few = int(FEW * count)
    of_class = order[labels[order] == CLASS]
    requests = {
        "random10": [order[: count // 10]],
        "random50": [order[: count // 2]],
        "class": [of_class],
        "half_class": [of_class[: len(of_class) // 2]],
        "mislabelled": [order[:few]],
        "backdoor": [order[labels[order] != POISONED][:few]],
    }
    if name == "continual":
        others = order[labels[order] != CLASS]
        chosen = [others[:few], of_class, others[few : 2 * few]]
    else:
        chosen = requests[name]
    triggered, original = None, "clean"
    if name in ("mislabelled", "backdoor"):
        original = name
        gone = chosen[0]
        images, labels = images.clone(), labels.clone()
        if name == "mislabelled":
            labels[gone] = (labels[gone] + torch.randint(1, 10, gone.shape, generator=generator)) % 10
        else:
            images[gone], labels[gone] = stamped(images[gone]), POISONED
            victims = test[1] != POISONED
            triggered = stamped(test[0][victims]), torch.full_like(test[1][victims], POISONED)
    if name in ("class", "continual"):
        left = test[1] != CLASS
        test = test[0][left], test[1][left]
    kept = torch.ones(count, dtype=torch.bool)
    kept[torch.cat(chosen)] = False
    return Scenario(
        name,
        original,
        (images, labels),
        [(images[each], labels[each]) for each in chosen],
        (images[kept], labels[kept]),
        test,
        triggered,
    )


def stamped(images: Tensor) -> Tensor:
    """The images with a white square in the lower right corner."""
    side = PATCH if images.shape[-1] >= 28 else 2
    images = images.clone()
    images[..., -side - 1 : -1, -side - 1 : -1] = 1.0
    return images


def joined(parts: list[Data]) -> Data:
    """Several sets as one."""
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
