"""docs/memory.md against the memory of fresh processes: the accounting of a step, and what `estimate` predicts."""

from __future__ import annotations

import os

import pytest

if not os.access("/proc/self/clear_refs", os.W_OK):
    pytest.skip("the kernel's own account of a process is not to be had here", allow_module_level=True)

from memory import measured

CLOSE = 0.1


@pytest.mark.parametrize("arm", ["optimistic", "secant"])
def test_a_step_holds_one_buffer_beyond_the_weights_two_gradients_and_the_optimizer(arm):
    """52 M weights in 13 layers, two items: nothing else counts."""
    found = measured("wide_mlp", 2, arm)
    accounted = 5 * found["parameters"]  # weights, momentum, two gradients, and the displaced point
    assert found["steps"] == pytest.approx(accounted, rel=CLOSE)
    assert found["before"] <= (1 + CLOSE) * accounted  # opening the step takes no more
    assert found["after"] <= (1 + CLOSE) * accounted  # nor does closing it
    assert found["predicted"]["peak"] == pytest.approx(found["peak"], rel=CLOSE)


@pytest.mark.parametrize(
    ("model", "items", "arm"),
    [
        ("vit", 4, "exact"),
        ("resnet18", 4, "joint"),
        ("mlp", 64, "scissorhands, cleaned"),
        ("mlp", 8, "optimistic, as it comes"),
        ("mlp", 8, "optimistic, by AdamW"),
        ("resnet18", 4, "optimistic, in bfloat16"),
    ],
)
def test_what_is_predicted_is_what_is_taken(model, items, arm):
    found = measured(model, items, arm)
    assert found["predicted"]["peak"] == pytest.approx(found["peak"], rel=CLOSE)
