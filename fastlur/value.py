"""The value of a loss, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastlur.errors import DataError, ModelError, first_line, not_scalar


@contextmanager
def in_memory() -> Iterator[None]:
    """Inside, the lack of memory is an error that says what to do: a graph of a graph is not taken in parts."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = first_line(error)
        raise ModelError(
            f"gradient='exact' ran out of memory ({said}); use 'optimistic' or 'secant', which can take a batch in "
            "parts, keep_graph=False, or a smaller batch_size"
        ) from None


def scalar(value: Any, name: str) -> Tensor:
    """The value of the loss called `name`, if it can be minimised.

    Raises:
        DataError: it is not a scalar tensor, or depends on no moving parameter.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError(not_scalar(name, value))
    if torch.is_grad_enabled() and not value.requires_grad:
        raise DataError(f"{name}: depends on no parameter that may move; check `parameters`, and detach() in the loss")
    return value.reshape(())
