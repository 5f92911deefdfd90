"""RMU: what it pushes where, which parameters feel it, and that hooks are gone afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import state
from tiny_lm import TinyLM, padded, rows, texts, to_the_left
from torch import nn

import fastlur
from fastlur.llm import RMU
from fastlur.llm.representation import hidden, layer_of, unit_vector


def states(model, ids, number):
    """The output of a block for one item, by running the blocks by hand."""
    x = model.embed(ids)[None] + model.place(torch.arange(len(ids)))
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None]
    for block in model.layers[: number + 1]:
        (x,) = block(x, seen)
    return x[0]


def per_token(model, batch, number, wanted):
    """Squared distances of the states that predict an answer's token, by item and place."""
    found = []
    for row, (ids, labels) in enumerate(rows(batch)):
        h = states(model, ids, number)
        found += [(h[i - 1] - wanted(row, ids, i - 1)).square().mean() for i in range(1, len(ids)) if labels[i] != -100]
    return torch.stack(found).mean()


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("layer", [0, 1, -1, "layers.0", lambda model: model.layers[0]])
def test_forgetting_is_the_distance_from_the_random_direction(layer):
    model, batch = TinyLM(), texts(6)
    number = layer % 2 if isinstance(layer, int) else 0
    u = torch.rand(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u = 2.5 * u / u.norm()
    found = RMU(layer, coefficient=2.5, seed=3).forget(model, batch)
    wanted = per_token(model, batch, number, lambda *_: u)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    for a, b in zip(gradients(found, model), gradients(wanted, model), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_retaining_is_the_distance_from_the_reference():
    model, retain, seen = TinyLM(), texts(6, seed=1), []
    given = copy.deepcopy(model)

    class Looking(fastlur.LUR):
        name = "looking"

        def prepare(self, passes):
            seen.append(passes.losses["retain"])
            raise InterruptedError

    rmu = RMU(0, retain_weight=7.0)
    with pytest.raises(InterruptedError):
        fastlur.unlearn(
            model, texts(6), retain, method=Looking(), loss=rmu.retain, forget_loss=rmu.forget, progress=False
        )
    assert float(seen[0](model, retain).detach()) == 0
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    before = [states(given, ids, 0).detach() for ids, _ in rows(retain)]
    found, wanted = seen[0](model, retain), 7 * per_token(model, retain, 0, lambda row, ids, place: before[row][place])
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    for a, b in zip(gradients(found, model), gradients(wanted, model), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("moved", [lambda b: padded(b, 3), to_the_left, lambda b: to_the_left(b, 2)])
def test_padding_makes_no_difference(moved):
    model = TinyLM()
    for loss in (RMU(1).forget, RMU(1).retain):
        torch.testing.assert_close(loss(model, moved(texts(6))), loss(model, texts(6)))


def test_layers_behind_do_not_move_and_no_hook_stays():
    model, rmu = TinyLM(blocks=3), RMU(1, coefficient=3.0, retain_weight=1.0)
    before = state(model)
    forget = texts(7)
    far = float(rmu.forget(model, forget).detach())
    fastlur.unlearn(
        model, forget, texts(9, seed=1), loss=rmu.retain, forget_loss=rmu.forget, steps=30, lr=0.05, progress=False
    )
    now = state(model)
    moved = {
        name.split(".")[0] + name.split(".")[1] * name.startswith("layers")
        for name in now
        if not torch.equal(now[name], before[name])
    }
    assert moved == {"embed", "place", "layers0", "layers1"}
    assert float(rmu.forget(model, forget).detach()) < far
    assert not any(module._forward_hooks for module in model.modules())


def test_the_hook_is_gone_after_an_error_too():
    model = TinyLM()
    with pytest.raises(TypeError):
        hidden(model, {"input_ids": texts(2)["input_ids"], "unknown": 1}, 0)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_direction_is_of_length_one_and_told_by_the_seed():
    cpu = torch.device("cpu")
    u = unit_vector(50, 1, torch.float64, cpu)
    assert float(u.norm()) == pytest.approx(1)
    assert torch.equal(u, unit_vector(50, 1, torch.float64, cpu))
    assert not torch.equal(u, unit_vector(50, 2, torch.float64, cpu))
    assert bool((u > 0).all())


class TestLayers:
    def test_are_found_by_number_name_and_function(self):
        model = nn.ModuleDict({"inner": TinyLM(blocks=3)})
        blocks = model["inner"].layers
        assert layer_of(model, -1) is blocks[2]
        assert layer_of(model, "inner.layers.1") is layer_of(model, "layers.1") is blocks[1]
        assert layer_of(model, lambda m: m["inner"].norm) is model["inner"].norm

    @pytest.mark.parametrize(
        ("layer", "said"),
        [
            (5, "2 blocks"),
            (-3, "2 blocks"),
            ("layers.9", "fits no module"),
            ("first", r"fits layers\.0\.first, layers\.1\.first"),
            (lambda m: None, "NoneType"),
        ],
    )
    def test_that_are_not_there_are_refused(self, layer, said):
        with pytest.raises(fastlur.ArgumentError, match=said):
            RMU(layer).forget(TinyLM(), texts(3))

    def test_that_run_twice_or_put_out_no_states_are_refused(self):
        model = TinyLM()
        model.layers[1] = model.layers[0]
        with pytest.raises(fastlur.ModelError, match="runs 2 times"):
            RMU(0).forget(model, texts(3))
        model.idle = nn.Linear(2, 2)
        with pytest.raises(fastlur.ModelError, match="put out nothing"):
            RMU("idle").forget(model, texts(3))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layer": 1.5}, r"layer=1\.5"),
        ({"layer": True}, "layer=True"),
        ({"layer": 0, "coefficient": 0}, "coefficient=0"),
        ({"layer": 0, "retain_weight": -1}, "retain_weight=-1"),
        ({"layer": 0, "seed": 0.5}, r"seed=0\.5"),
        ({"layer": 0, "keep": "no"}, "keep='no'"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        RMU(**wrong)


def test_a_record_says_what_the_losses_were():
    rmu = RMU(0, coefficient=3.5, retain_weight=2.5)
    result = fastlur.unlearn(
        TinyLM(), texts(5), texts(6, seed=1), loss=rmu.retain, forget_loss=rmu.forget, steps=1, progress=False
    )
    assert "coefficient=3.5" in result.settings["forget_loss"]
    assert "retain_weight=2.5" in result.settings["loss"]


def test_a_model_that_is_run_in_parts_gives_the_same():
    from fastlur.microbatch import MicroBatches

    model, batch, loss = TinyLM(), texts(7), RMU(0).forget
    whole = loss(model, batch)
    parts = loss(MicroBatches(model, model, 3, set()), batch)
    torch.testing.assert_close(parts, whole)
    for a, b in zip(gradients(parts, model), gradients(whole, model), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b)
