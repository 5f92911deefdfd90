"""Virtual batch normalisation: batch norm by the statistics of a reference batch instead of the batch's own.

Forget batches are seldom like the data: one class, one person, one trigger. Normalised by themselves they are not what
the network sees in use, where statistics are those of everything, and what is learned on them does not carry over:
answers that were right in training are wrong afterwards. By the statistics of retain items they hold, if gradients go
through the statistics too; without that (the running statistics of evaluation, or another pass's as constants) runs
diverged. A feature that no retain item has is scaled by the square root of 1/eps, as it will be in use.

Source: the idea of a reference batch is that of Salimans et al., "Improved Techniques for Training GANs", arXiv
1606.03498. There it is one batch for all time and the item counts as well; here it is drawn anew in every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fastlur.errors import lacks_memory
from fastlur.losses import wide
from fastlur.rows import rows_of, spaced_rows

REFERENCE = 4  # one in so many retain items lends statistics, ...
LEAST = 16  # ... but not fewer than these, where there are as many
RECOMPUTED = "it recomputes or moves saved tensors, as checkpointing does"


class VirtualNorm:
    """The batch norm layers of a model, to be lent statistics."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def by(self, *references: Callable[[], object]) -> Iterator[None]:
        """Inside, layers in train mode normalise by the statistics that they have in the reference, which runs first.

        It is a forward of the same model. Its graph is kept, so that gradients flow through the statistics. No running
        statistics move, neither in it nor inside; what else a layer counts is the affair of `Statistics.frozen`. A
        layer that is called several times a forward has those of its every call. Of several references the first counts
        that does not fail: a loss may not take a part of a batch.

        Raises:
            Recomputed: a part of the model is run again in the backward pass, when nothing is lent any more.
        """
        lent = [_Lent(layer) for layer in self._layers]
        before = [{name: value for name, value in vars(each.layer).items() if name == "forward"} for each in lent]
        try:
            with disable_saved_tensors_hooks(RECOMPUTED):
                for each in lent:
                    vars(each.layer)["forward"] = each.forward
                _first_of(references, lent)
                for each in lent:
                    each.lends = True
                yield
        except RuntimeError as error:
            if RECOMPUTED in str(error):
                raise Recomputed(RECOMPUTED) from error
            raise
        finally:
            for each, own in zip(lent, before, strict=True):
                vars(each.layer).pop("forward", None)
                vars(each.layer).update(own)


class Recomputed(RuntimeError):
    """The model checkpoints its activations."""

    def warn(self) -> None:
        """Say what is done instead."""
        warnings.warn(
            f"normalize_by='retain' cannot be had of this model ({self}); forget passes are normalised by their own "
            "statistics ('own' does so without this warning)",
            stacklevel=3,
        )


def reference_of(retain: Any) -> Any:
    """The items of a retain batch that lend their statistics."""
    rows = rows_of(retain) or 0
    return spaced_rows(retain, max(-(-rows // REFERENCE), min(rows, LEAST)))


def _first_of(references: Sequence[Callable[[], object]], lent: list[_Lent]) -> None:
    """Run the first reference that does not fail; what others have noted until they failed is dropped."""
    *tries, last = references
    for reference in tries:
        try:
            reference()
            return
        except Exception as error:
            if lacks_memory(error) or RECOMPUTED in str(error):
                raise
            for each in lent:
                each.noted.clear()
    last()


class _Lent(TorchFunctionMode):
    """What a layer scales and shifts by, a pair a call of the reference; inside, batch norm by a batch is by these.

    The layer's own forward stays what it is, since layers of other libraries do more than to normalise.

    Attributes:
        layer: whose forward runs inside.
        noted: the pairs.
        lends: False: a forward notes its own statistics; True: it takes those noted, in their order.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.layer = layer
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.lends = False
        self._own: Callable[..., Any] = layer.forward
        self._calls = 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The layer's own, with what batch norm in it is by."""
        with self:
            return self._own(*inputs, **named)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace batch norm by the batch; run everything else as it is."""
        kwargs = kwargs or {}
        found = self._normalized(*args, **kwargs) if func is functional.batch_norm else None
        return func(*args, **kwargs) if found is None else found

    def _normalized(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if not training or (self.lends and not self.noted):  # the reference may not have come by
            return None
        if self.lends:
            scale, shift = self.noted[self._calls % len(self.noted)]
            self._calls += 1
        else:
            variance, mean = torch.var_mean(wide(input), [0, *range(2, input.dim())], correction=0)
            scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
            shift = -mean * scale if bias is None else bias - mean * scale
            self.noted.append((scale, shift))
        # torch's batch norm of mean 0 and variance 1 is a scale and a shift a channel, with a backward of one walk
        zero, one = torch.zeros_like(scale).detach(), torch.ones_like(scale).detach()
        return functional.batch_norm(input, zero, one, scale, shift, False, 0.0, 0.0)
