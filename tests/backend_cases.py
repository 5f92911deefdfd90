"""Every backend through `fastlur.ops`, on a GPU where there is one; without one the kernels run in the interpreter."""

from contextlib import contextmanager
from unittest import mock

import pytest
from kernel_cases import DEVICE, kernels

from fastlur import backends

__all__ = ["BACKENDS", "DEVICE", "through"]

BACKENDS = ("torch", "triton", "extension")


@contextmanager
def through(name):
    """Inside, this backend serves; a test is skipped where it is not there."""
    if name == "triton" and DEVICE == "cpu":
        # on CPU tensors only here: the interpreter is no backend, but it runs the code of one
        with mock.patch.object(backends, "resolve", return_value=("triton", kernels)):
            yield
        return
    reason = backends.unavailable(name, DEVICE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with backends.backend(name):
        yield
