"""Generated calls on what is there after a run or before one: records, checkpoints, targets, estimates, attacks."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from functools import cache
from pathlib import Path

import torch
from checkpoints import break_off
from generated import ODD, data, mlp, models, mostly, options, tried
from helpers import blobs
from hypothesis import strategies as st

import fastlur
from fastlur.losses import BoundedForgetting
from fastlur.targets import Imitation, Novice, NoviceOrAscent, SecondChoice

SIDES = blobs(9), blobs(20)


@cache
def done():
    """A run that is over."""
    torch.manual_seed(0)
    return fastlur.unlearn(mlp(), *SIDES, steps=1, batch_size=8, forget_loss=BoundedForgetting(), progress=False)


def recording(draw):
    result, said = done(), mostly([None, {"UA": 1.0}], [{"UA": float("nan")}, {1: 2}, {"a": object()}, *ODD])
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        places = [f"{directory}/record", directory]
        where = draw(
            mostly(
                places, ["", f"{directory}/a\0b", "/dev/null/x", *(each for each in ODD if not isinstance(each, str))]
            )
        )
        chosen = {name: draw(said) for name in ("before", "after", "reference")}
        chosen["key_file"] = draw(mostly([None, f"{directory}/key"], [f"{directory}/record/key", "", *ODD]))
        kept = tried(lambda: result.save(where, **chosen), result.model)
        assert (
            not isinstance(where, str) or where or (kept is None and not list(Path(directory).iterdir()))
        )  # not the working directory
        if kept is None:
            return
        asked = {side: draw(data)() for side in draw(st.sets(st.sampled_from(["forget", "retain"])))}
        key = draw(mostly([result.key, f"{directory}/key"], [b"", "0" * 64, directory, *ODD]))
        found = tried(lambda: fastlur.verify(kept, key=key, **asked))
        assert found is None or (str(found) and set(found.matches) == set(asked))
        if draw(st.booleans()):
            _damage(draw, Path(kept))
        model = draw(models)()
        tried(lambda: fastlur.record.read(kept).load(model), model)
        unwanted = draw(mostly([kept], ["", f"{directory}/no", *ODD]))
        removed = tried(lambda: fastlur.purge(unwanted))
        assert not removed  # a record is none of what is purged


def _damage(draw, directory):
    """One file of a record cut short, or a bit of it turned."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    at = draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(content[:at] if draw(st.booleans()) else content)


FREE = {"checkpoint_every", "keep_checkpoints"}  # which a run that goes on may have otherwise
# the first of each is what the run had that was broken off
RUN = {
    "lr": [0.1, 0.03],
    "batch_size": [8, 4],
    "method": ["lur", "neggrad_plus", fastlur.LUR(gradient="secant")],
    "optimizer": ["sgd", "adamw"],
    "momentum": [0.9, 0.5],
    "seed": [0, 1],
    "parameters": [None, "3.*"],
    "forget_loss": [BoundedForgetting(), BoundedForgetting(2.0)],
    "checkpoint_every": [2, 1],
    "keep_checkpoints": [True, False],
    "precision": ["fp32", "bf16"],
}


def resuming(draw):
    """A run broken off, then made again with something changed: it goes on, or is refused as another one."""
    torch.manual_seed(0)
    model = mlp()
    with tempfile.TemporaryDirectory() as directory:
        first = {"steps": 4, "batch_size": 8, "progress": False, "checkpoint": directory, "checkpoint_every": 2}
        first["forget_loss"] = RUN["forget_loss"][0]
        break_off(model, SIDES, first, at=3)
        changed = options(draw, RUN, RUN, most=1)
        chosen = first | changed
        again, sides = copy.deepcopy(model), draw(mostly([SIDES], [(blobs(9), SIDES[1]), (SIDES[0], blobs(21))]))
        other = draw(models) if draw(st.integers(0, 3)) == 3 else None
        again = again if other is None else other()
        steps = []
        call = lambda: fastlur.unlearn(again, *sides, **chosen, callbacks=[lambda event: steps.append(event.step)])
        result = tried(call, again, begun=steps)
        if result is not None:
            assert steps == [3, 4]
            assert other is None
            assert sides is SIDES
            assert not {name for name, value in changed.items() if repr(value) != repr(RUN[name][0])} - FREE
        removed = tried(lambda: fastlur.purge(directory))
        assert removed is not None
        assert not [path for path in Path(directory).iterdir() if path.name.startswith("fastlur-step")]


AMOUNTS = {"weight": [1.0, 3.0], "temperature": [0.5, 2.0]}
TARGETS = {
    Imitation: {"teacher": [mlp], "sharpness": [0.0, 1.0, 2.0], "without_truth": [True], **AMOUNTS},
    SecondChoice: {"sharpness": [0.0, 2.0]},
    Novice: {"epochs": [0.5, 2], "sharpness": [1.0], "lr": [1e-3], "part": ["all", "head"], **AMOUNTS},
    NoviceOrAscent: {"epochs": [0.5], "sharpness": [1.0], "lr": [1e-3], "part": ["all", "head"], **AMOUNTS},
}


def aiming(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(list(TARGETS)))
    chosen = options(draw, TARGETS[kind], TARGETS[kind])
    if kind is Imitation:
        chosen["teacher"] = draw(mostly([mlp], [lambda: 5, lambda: mlp(classes=3), lambda: mlp(inputs=5)]))()
    target = tried(lambda: kind(**chosen))
    if target is None:
        return
    assert repr(target)
    model = draw(models)()
    if kind is Novice and draw(st.booleans()):
        more = options(draw, {"batch_size": [4], "seed": [0, 3]}, ["batch_size", "seed", "loss"])
        retain = draw(data)()
        tried(lambda: target.teacher(model, retain, **more), model)
        return
    steps = []
    sides, use = (blobs(9), blobs(20)), {"steps": 1, "batch_size": 8, "progress": False, "forget_loss": target}
    use["callbacks"] = [lambda event: steps.append(event.step)]
    tried(lambda: fastlur.unlearn(model, *sides, **use), model, begun=steps)


def estimating(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    model = draw(models)()
    batch = draw(mostly([blobs(8)], [blobs(1), blobs(0), (blobs(4)[0], torch.full((4,), 9)), *ODD]))
    sensible = {
        "method": ["lur", "scissorhands", "salun", "retrain", fastlur.LUR(gradient="exact"), "lurr"],
        "forget": [None, blobs(3)],
        "forget_loss": [BoundedForgetting(), SecondChoice(), lambda model, batch: 1.0],
        "optimizer": ["sgd", "adamw", "adam"],
        "parameters": [None, "*bias", "none.*"],
        "precision": ["fp32", "bf16"],
        "memory_format": [torch.channels_last],
    }
    found = tried(lambda: fastlur.estimate(model, batch, **options(draw, sensible, [*sensible, "loss"])), model)
    if found is not None:
        assert found.peak > 0
        assert str(found)


def attacking(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    model, forget, others = draw(models)(), draw(data)(), draw(data)()
    if draw(st.booleans()):
        sensible = {
            "retrained": [None, mlp(), [mlp(), mlp()]],
            "original": [None, mlp()],
            "retain": [None, blobs(9)],
            "share": [0.5],
            "steps": [(0, 1), (0,)],
            "lr": [0.1],
            "batch_size": [2],
            "draws": [1, 2],
        }
        chosen = {"steps": (0, 2), "draws": 1} | options(draw, sensible, set(sensible) - {"steps", "draws"})
        found = tried(lambda: fastlur.audit.relearning(model, forget, **chosen), model)
    else:
        sensible = {"count": [1, 2], "lr": [0.1], "smooth": [0.0], "noises": [1, 2], "candidates": [3, 100]}
        # a number of iterations that is absurd is no hostile value but a wish; it would be granted
        chosen = {"iterations": draw(mostly([1, 2], [0, -1, 0.5, None, "many", True]))}
        chosen |= {"noises": 1} | options(draw, sensible, set(sensible) - {"count", "noises", "candidates"})
        before = draw(mostly([mlp()], [model]))
        after = draw(mostly([None], [model, 5, mlp(classes=3)]))
        after = mlp() if after is None else after  # another one of that kind
        found = tried(lambda: fastlur.audit.inversion(before, after, forget, others, **chosen), before)
    assert found is None or str(found)


HALF = torch.arange(9) < 5
SHADOWS = [(mlp(), HALF), (mlp(), ~HALF)]


def scoring(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    model, items = draw(models)(), draw(mostly([lambda: blobs(9)], [draw(data)]))()
    sensible = {
        "shadows": [None, SHADOWS, SHADOWS[:1], [(mlp(), [True])], [(None, None)]],
        "train": [None, lambda kept: SHADOWS[0][0], lambda kept: None],
        "count": [2, 4],
        "reference": [None, mlp()],
        "pooled": [None, True, False],
        "batch_size": [3],
        "seed": [5],
    }
    chosen = {"shadows": SHADOWS} | options(draw, sensible, set(sensible) - {"count"})
    if chosen.get("train") is not None:
        chosen.pop("shadows")
    found = tried(lambda: fastlur.likelihood_ratio_attack(model, items, **chosen), model)
    assert found is None or str(found)
