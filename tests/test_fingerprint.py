"""What a function, an object or a tensor does, as a text that two processes agree on."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fastlur.identity import fingerprint


class Scaling:
    def __init__(self, by):
        self.by = by

    def scaled(self, x):
        return x * self.by


class TestFingerprint:
    def test_it_follows_what_functions_are_made_of(self):
        def outer(n):
            def inner(x, y=n):
                return [x for _ in range(n)]

            return lambda z: inner(z)

        assert fingerprint(outer(1)) == fingerprint(outer(1))
        assert fingerprint(outer(1)) != fingerprint(outer(2))
        assert fingerprint(functools.partial(max, 1)) != fingerprint(functools.partial(max, 2))
        assert fingerprint(Scaling(1).scaled) != fingerprint(Scaling(2).scaled)

    def test_it_ends(self):
        held = []
        held.append(held)

        def itself():
            return itself, held

        assert fingerprint(itself) == fingerprint(itself)

    @pytest.mark.parametrize(
        "value", [None, 5, "x", {}, [1, {2, "a"}], object, max, torch.relu, nn.Linear(2, 2), Ellipsis]
    )
    def test_of_anything(self, value):
        assert fingerprint(value) == fingerprint(value)
        assert " at 0x" not in fingerprint(value)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.ones(3).to(torch.float8_e4m3fn),
            torch.complex(torch.ones(2), torch.ones(2)).conj(),
            torch.eye(3).to_sparse(),
            torch.ones(()),
            torch.ones(0),
            torch.ones(2, 3).t(),
        ],
    )
    def test_of_tensors_of_every_kind(self, tensor):
        holding = lambda tensor: lambda: tensor
        assert fingerprint(holding(tensor)) == fingerprint(holding(tensor.clone()))
        if tensor.numel():
            other = torch.zeros(tensor.shape).to(tensor.dtype)
            assert fingerprint(holding(tensor)) != fingerprint(holding(other))
