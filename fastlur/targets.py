"""What a forget item should be answered once it is forgotten: forget losses with a target instead of a direction.

    fastlur.unlearn(model, forget, retain, forget_loss=fastlur.targets.Novice(epochs=5))

Climbing away from an answer says nothing about where to go, and the right end differs from set to set: a class that is
gone is answered by its neighbours, a random item almost as before, a mislabelled one by its true label. A target is an
estimate of what the retrained model would say. All are bounded below, so that there is nothing to run away to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fastlur import checks
from fastlur.answers import kept
from fastlur.data import Feed, source
from fastlur.errors import ArgumentError, ModelError, nearest, told, unknown
from fastlur.fresh import began, copied, frozen, renew
from fastlur.imitation import Imitation as Imitation  # public here
from fastlur.losses import BoundedForgetting, cross_entropy, divergence, logits_and_targets
from fastlur.methods.base import check_range
from fastlur.microbatch import MicroBatches
from fastlur.passes import Loss, Passes
from fastlur.update import warn_of_rounding
from fastlur.world import borrowed_random, derive, passing, seed_torch

Part = Literal["all", "head"]
LEARNED = 0.5  # of the loss of guessing; a novice that is no better has nothing to teach
WELL_LEARNED = 0.1  # likewise, of one that nobody has asked for
FEWEST, MOST = 100, 500  # steps of such a one
LOOKS = 8  # retain batches that this is judged on
WARM_UP = 0.1  # of a novice's steps


class Made:
    """A target that is made from the model and the data of a run, before its first step.

    Attributes:
        models: of the model's size that it holds and asks for every forget batch, for `fastlur.estimate`.
    """

    models: ClassVar[int] = 1

    def prepare(self, passes: Passes) -> Loss:
        """The loss to descend along, made once; draws random numbers."""
        raise NotImplementedError

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """What stands in until it is made, so that data and model can be tried: KL from no opinion, shape ()."""
        logits, targets = logits_and_targets(model, batch)
        return divergence(torch.zeros_like(logits), logits, targets)


@dataclass(frozen=True)
class SecondChoice(Made):
    """What the model as given would say were the true label no answer; costs a copy of the model.

    Right where what is forgotten can have no other trace than its label, such as a whole class.

    Args:
        sharpness: see `Imitation`.
    """

    sharpness: float = 1.0

    def __post_init__(self) -> None:
        check_range("sharpness", self.sharpness, example=1.0)

    def prepare(self, passes: Passes) -> Loss:
        """Keep a copy of the model."""
        return Imitation(frozen(copied(passes.space.model)), self.sharpness, without_truth=True)


@dataclass(frozen=True)
class Novice(Made):
    """What the same network says that has had a few epochs of the retain data only, sharpened.

    A novice has learned what is common and not yet what is particular, and has never seen a forget item: it tells what
    generalises to them, as retraining would. Its answers are less sure than those of a network that has been trained to
    the end, hence the sharpening q ∝ p².

    It is made before the first step, from a copy of the model whose moving parameters are drawn anew (by their modules'
    `reset_parameters`; entries shuffled where a module has none), by AdamW with a short warm-up and a linear decay, and
    costs as much as that many epochs over the retain data do. While it is trained three more vectors of the model's
    size are held, afterwards one; of text, where that takes less room, its answers to the forget items instead. A
    checkpoint holds either as well. A novice that does not come to half of the loss
    of guessing has nothing to teach, and of some models none can be made (one that cannot be copied, or trained on
    these data): a warning says so, and `BoundedForgetting` takes its place.

    Args:
        epochs: over the retain data, > 0; a fifth of what the model was trained for is a good choice.
        sharpness: the power, ≥ 0.
        lr: the highest learning rate.
        part: "all", or "head": only the last layer is drawn anew and trained, for models that cannot be trained from
            scratch in a few epochs. What the layers before it know of the forget items stays known.
        weight: see `Imitation`.
        temperature: see `Imitation`.
        start: what the model was fine-tuned from, where the novice begins instead of anew; then an epoch at the rate
            of that fine-tuning serves, also for a language model, which nobody can train from scratch. It has the
            parameters of the model, of one with adapters new adapters too, in any precision (the novice has the
            model's). A module is copied and left as it is; of a function that makes one, such as one that loads it,
            what it returns becomes the novice, so that no second copy is held.

    Raises:
        ArgumentError: a value out of range, or a start that neither is a module nor makes one.
    """

    epochs: float = 3.0
    sharpness: float = 2.0
    lr: float = 3e-3
    part: Part = "all"
    weight: float = 1.0
    start: nn.Module | Callable[[], nn.Module] | None = field(default=None, repr=False)
    temperature: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.start is not None and not callable(self.start):
            raise ArgumentError(f"start: a {type(self.start).__name__} neither is a torch.nn.Module nor makes one")
        check_range("epochs", self.epochs, low=1e-6, example=3)
        check_range("weight", self.weight, low=1e-6, example=1.0)
        check_range("sharpness", self.sharpness, example=2.0)
        check_range("temperature", self.temperature, low=1e-3, high=1e3, example=2.0)
        check_range("lr", self.lr, low=1e-12, example=3e-3)
        if unknown(self.part, get_args(Part)):
            raise ArgumentError(f"part={self.part!r} is unknown; {nearest(self.part, get_args(Part))}")

    def prepare(self, passes: Passes) -> Loss:
        """Train the novice, and judge what it has learned."""
        try:
            return self.judged(passes, LEARNED)
        except ModelError as error:
            warnings.warn(f"Novice: {error}. BoundedForgetting takes its place", stacklevel=2)
            return BoundedForgetting()

    def judged(self, passes: Passes, learned: float) -> Imitation:
        """Train the novice on a run's retain data; its retain loss must come to this part of that of guessing.

        Raises:
            ModelError: it does not, or it cannot be trained.
        """
        retain, device, rows = passes.losses["retain"], passes.space.device, passes.spare.rows
        teacher = self._taught(passes.space.model, passes.feed, retain, passes.precision, rows)
        asked = _in_parts(teacher, rows)
        losses, guessing = [], math.inf
        with torch.no_grad(), passing(teacher, device, passes.precision, training=False), torch.no_grad():
            for batch in passes.feed.batches("retain", LOOKS, draw="novice judged"):
                losses.append(retain(asked, batch).double())
                guessing = math.log(logits_and_targets(asked, batch)[0].shape[-1])
        found = float(torch.stack(losses).mean())
        if not found < learned * guessing:  # not a number is no success either
            said = f"its retain loss is {found:.3g} after {self.epochs:g} epochs, that of guessing {guessing:.3g}"
            raise ModelError(f"{said}; give it more epochs, or another lr")
        with passing(teacher, device, passes.precision, training=False):
            answers = kept(passes.feed, teacher, asked)
        return Imitation(answers or teacher, self.sharpness, weight=self.weight, temperature=self.temperature)

    def teacher(
        self,
        model: nn.Module,
        retain: Any,
        *,
        loss: Loss | None = None,
        batch_size: int = 128,
        seed: int = 0,
        precision: str = "fp32",
    ) -> nn.Module:
        """The novice itself, for an `Imitation` that serves several runs; the model is left as it is.

        Args:
            model: of its kind the novice is to be.
            retain: what it learns, in any form `unlearn` takes.
            loss: retain loss; None: cross-entropy.
            batch_size: for data that do not come in batches.
            seed: of its weights and of the order of the data.
            precision: "fp32", or "bf16" for autocast.

        Raises:
            ArgumentError: `loss`, `batch_size`, `seed` or `precision` is none.
            ModelError: no module, one in which nothing moves, or one that cannot be copied or trained on these data.
            DataError: `retain` is no data.
        """
        checks.module(model)
        checks.losses(loss=loss)
        checks.positive_ints(batch_size=batch_size)
        checks.seed(seed)
        checks.one_of("precision", precision, checks.PRECISIONS)
        warn_of_rounding(p.dtype for p in model.parameters() if p.requires_grad)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        feed = Feed({"retain": source(retain, "retain", batch_size)}, seed, device)
        with borrowed_random(device):
            seed_torch(derive(seed, "novice"), device)
            with told(ModelError, "model: one of its kind cannot be trained on these data"):
                return self._taught(model, feed, loss or cross_entropy, precision)

    def _taught(self, model: nn.Module, feed: Feed, loss: Loss, precision: str, rows: int | None = None) -> nn.Module:
        teacher = copied(model) if self.start is None else began(self.start, model)
        moving = [p for p in teacher.parameters() if p.requires_grad]
        if not moving:
            raise ModelError("model: no parameter asks for a gradient, so that nothing of it could learn")
        if self.part == "head":
            last = [m for m in teacher.modules() if any(p.requires_grad for p in m.parameters(recurse=False))][-1]
            moving = [p for p in last.parameters(recurse=False) if p.requires_grad]
            for parameter in teacher.parameters():
                parameter.requires_grad_(any(parameter is p for p in moving))
        if self.start is None:
            renew(teacher, moving)
        per_epoch = feed.per_epoch("retain")
        if per_epoch is None:
            raise ModelError("the retain data do not tell their length, so that an epoch of them has none either")
        steps = max(1, round(self.epochs * per_epoch))
        device = moving[0].device
        lean = device.type in ("cpu", "cuda")  # no temporaries, of which the other form makes two of a tensor's size
        optimizer = torch.optim.AdamW(moving, lr=self.lr, weight_decay=1e-4, fused=lean)
        asked = _in_parts(teacher, rows)
        for step, batch in enumerate(_batches(feed, steps, per_epoch)):
            rate = self.lr * min(1.0, (step + 1) / (WARM_UP * steps)) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            with passing(teacher, device, precision, training=self.part == "all"):
                torch.autograd.backward(loss(asked, batch), inputs=moving)
            optimizer.step()
        return frozen(teacher)


@dataclass(frozen=True)
class NoviceOrAscent(Novice):
    """A `Novice` where one can be had at a bounded price, and `BoundedForgetting` where not: the default of LUR.

    The novice learns for six epochs of the retain data at a rate of 6e-3, but for 100 steps at least and 500 at most,
    so that it never costs more than 500 forwards and backwards of a retain batch. The model is drawn to its answers,
    hardly sharpened, at a temperature of 2 and with three times the weight of an ascent, since they are an end to
    come to; these numbers were chosen together (docs/quality.md). It is taken if its retain loss then is a tenth of
    that of guessing or less; a poorer one would have the model forget what it is to keep. It is not in models that
    cannot learn so fast from scratch (large ones, those that were pretrained), in data that do not tell their length,
    where the model takes a batch in parts, and where anything fails. `result.settings["forget_target"]` tells which
    it was.
    """

    epochs: float = 6.0
    sharpness: float = 1.1
    lr: float = 6e-3
    weight: float = 3.0
    temperature: float = field(default=2.0, kw_only=True)

    def prepare(self, passes: Passes) -> Loss:
        """Train a novice, or do not."""
        per_epoch = passes.feed.per_epoch("retain") if passes.has_feed else None
        if per_epoch is None or passes.spare.rows is not None:
            return BoundedForgetting()
        steps = min(max(self.epochs * per_epoch, FEWEST), MOST)
        try:
            return replace(self, epochs=steps / per_epoch).judged(passes, WELL_LEARNED)
        except Exception:  # nobody has asked for it, so that nothing in it may stop the run
            return BoundedForgetting()


def _in_parts(teacher: nn.Module, rows: int | None) -> Any:
    """Over so many rows at a time as the model itself."""
    return teacher if rows is None else MicroBatches(teacher, teacher, rows, set(), asked=True)


def _batches(feed: Feed, steps: int, per_epoch: int) -> Iterator[Any]:
    """So many batches of the retain data, in an order drawn anew in every epoch."""
    for epoch in range(-(-steps // per_epoch)):
        left = min(per_epoch, steps - epoch * per_epoch)
        yield from feed.batches("retain", left, draw=("novice", epoch))


def prepared(loss: Loss, passes: Passes) -> Loss:
    """The loss itself, or what it makes of itself before the first step."""
    make: Callable[[Passes], Loss] | None = getattr(loss, "prepare", None)
    return loss if make is None else make(passes)
