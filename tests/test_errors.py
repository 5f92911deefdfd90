"""What code of the caller's raises is told as an error of the package, but for a lack of memory."""

from __future__ import annotations

import pytest
import torch
from helpers import blobs, learnable, mlp, run

import fastlur
from fastlur.curvature import refused
from fastlur.errors import DataError, ModelError, told
from fastlur.loop import StepEvent
from fastlur.stopping import Reached
from fastlur.targets import Novice, SecondChoice

LACKS = {
    "of a device": torch.OutOfMemoryError("out of memory"),
    "of the host": MemoryError(),
    "of the host, as torch says it": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
}


@pytest.fixture(params=LACKS)
def lack(request):
    return LACKS[request.param]


def test_an_error_says_what_was_raised_and_what_to_do():
    said = r"^forget: cannot be read \(ZeroDivisionError: division by zero\); mend it$"
    with pytest.raises(DataError, match=said), told(DataError, "forget: cannot be read", "; mend it"):
        raise ZeroDivisionError("division by zero")


def test_of_several_lines_the_first_and_of_none_the_kind():
    for error, said in ((KeyError(), "KeyError: KeyError"), (OSError("one\ntwo"), "OSError: one")):
        with pytest.raises(DataError, match=rf"x \({said}\)$") as caught, told(DataError, "x"):
            raise error
        assert caught.value.__cause__ is error


def test_our_own_errors_and_a_lack_of_memory_stay_what_they_are(lack):
    for error in (ModelError("model: is none"), lack):
        with pytest.raises(type(error)) as caught, told(DataError, "x"):
            raise error
        assert caught.value is error


def test_nor_is_a_lack_of_memory_a_model_that_cannot_be_differentiated_twice(lack):
    with pytest.raises(type(lack)) as caught, refused():
        raise lack
    assert caught.value is lack
    with pytest.raises(ModelError, match="cannot differentiate this model twice"), refused():
        raise RuntimeError("derivative for aten::x is not implemented")


def looks(model):
    """Calls that try code of the caller's."""
    event = StepEvent(1, 1, None, model, 0.0)
    data = {"forget": learnable(12), "retain": learnable(40)}
    return {
        "unlearn": lambda: run(model, *data.values()),
        "evaluate": lambda: fastlur.evaluate(model, **data, test=learnable(8)),
        "estimate": lambda: fastlur.estimate(model, learnable(12)),
        "a metric": lambda: Reached(lambda seen: float(seen(blobs(2)[0]).sum()), at_most=0.0, every=1).look(event),
    }


@pytest.mark.filterwarnings("ignore:memory ran out with")  # on a device fewer items at a time are tried first
@pytest.mark.parametrize("call", looks(None))
def test_no_call_blames_data_or_model_for_a_lack_of_memory(call, lack):
    def short(*_):
        raise lack

    model = mlp()
    model.register_forward_hook(short)
    with pytest.raises((type(lack), ModelError)) as caught:
        looks(model)[call]()
    assert caught.value is lack or str(caught.value).startswith("model: memory ran out with more than 1 items")


@pytest.mark.parametrize("target", [SecondChoice(), Novice(epochs=20, lr=3e-2)], ids=["second choice", "novice"])
def test_nor_does_a_target(target, lack, monkeypatch):
    def short(*_):
        raise lack

    monkeypatch.setattr("fastlur.fresh.copy.deepcopy", short)
    with pytest.raises(type(lack)) as caught:
        run(mlp(), learnable(12), learnable(40), forget_loss=target)
    assert caught.value is lack


def test_nor_does_a_novice_beside_a_run(lack, monkeypatch):
    def short(*_):
        raise lack

    monkeypatch.setattr("fastlur.fresh.copy.deepcopy", short)
    with pytest.raises(type(lack)):
        Novice(epochs=20, lr=3e-2).teacher(mlp(), learnable(12))
