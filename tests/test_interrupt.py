"""Ctrl-C: the step that is going on is finished, the model is that of a whole step, and the call can be made again."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading

import pytest
import torch
from checkpoints import break_off, go_on, job, whole
from helpers import MODES, blobs, fill_disk, mlp, run, same, state
from torch import nn

import fastlur
from fastlur.checkpoint import Checkpoints
from fastlur.interrupt import Interrupt, Interrupted
from fastlur.losses import BoundedForgetting
from fastlur.methods import METHODS, Trim
from fastlur.statistics import Statistics
from fastlur.step import Step
from fastlur.stopping import Reached


def control_c():
    os.kill(os.getpid(), signal.SIGINT)


def press_in_forward(model, number):
    """Ctrl-C in the middle of a step: in this forward of the model, counted from 1."""
    count = []

    def hook(*_):
        count.append(1)
        if len(count) == number:
            control_c()

    model.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if METHODS[name].steps != 0])
def test_the_model_is_that_of_a_whole_step(name):
    model, seen = mlp(dropout=0.2), {}
    press_in_forward(model, 140)  # more than any method needs before its first step
    remember = lambda event: seen.update({event.step: state(event.model)})
    with pytest.raises(Interrupted, match="after step"):
        run(model, blobs(24), blobs(40), method=name, steps=200, callbacks=[remember])
    assert same(state(model), seen[max(seen)])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_step_is_lost_and_the_run_goes_on_bit_for_bit(tmp_path):
    # a target that is trained first would be interrupted itself
    model, data, options = job(tmp_path, checkpoint_every=50, steps=20, forget_loss=BoundedForgetting())
    expected = whole(model, data, options)
    with pytest.raises(Interrupted, match="after step 7 of 20"):
        fastlur.unlearn(press_in_forward(mlp_like(model), 18), *data, **options)
    assert [path.name for path in tmp_path.glob("*.json")] == ["fastlur-step-00000007.json"]
    resumed, steps = go_on(model, data, options)
    assert steps[0] == 8
    assert same(state(resumed), state(expected))


def test_with_a_budget_nothing_is_saved_between_its_looks(tmp_path):
    """What it would go back to is not in a checkpoint, so an interrupted run goes on from the last look."""
    model, data, options = job(tmp_path, checkpoint_every=5, steps=20, max_retain_loss_increase=50.0)
    expected = whole(model, data, options)
    press = lambda event: control_c() if event.step == 7 else None
    with pytest.raises(Interrupted, match="after step 7 of 20"):
        fastlur.unlearn(mlp_like(model), *data, **options, callbacks=[press])
    resumed, steps = go_on(model, data, options)
    assert steps[0] == 6
    assert same(state(resumed), state(expected))


def test_a_disk_that_is_full_does_not_hide_that_it_was_interrupted(tmp_path, monkeypatch):
    model, data, options = job(tmp_path)

    def press(event):
        fill_disk(monkeypatch)
        control_c()

    with pytest.raises(Interrupted) as caught:
        fastlur.unlearn(model, *data, **options, callbacks=[press])
    assert "No space left" in caught.value.__notes__[0]


def test_the_second_one_stops_at_once_and_theta_is_not_displaced():
    calls, model, seen = [], mlp(), {}

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 9:
            control_c()
            control_c()
        return fastlur.losses.cross_entropy(model, batch)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(
            model,
            blobs(12),
            blobs(20),
            loss=loss,
            forget_loss=BoundedForgetting(),
            steps=20,
            method=fastlur.LUR(gradient="secant", inner_lr=0.5),
            callbacks=[lambda event: seen.update({event.step: state(event.model)})],
        )
    assert not isinstance(caught.value, Interrupted)
    assert same(state(model), seen[max(seen)])


class Pressing:
    """Ctrl-C at one line of the package, by its number among those that run."""

    def __init__(self, at, files, times=1):
        self.at, self.files, self.times, self.count = at, files, times, 0

    def __call__(self, frame, kind, _):
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        if kind == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                for _ in range(self.times):
                    control_c()
        return self

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(None)


WRITING = tuple(f"fastlur/{name}.py" for name in ("step", "update", "statistics", "reach", "interrupt"))
PASSING = tuple(f"fastlur/{name}.py" for name in ("passes", "space", "meta", "curvature", "microbatch", "methods/lur"))


@pytest.mark.parametrize(
    ("kind", "gradient", "files", "every"),
    [
        *((kind, "first_order", WRITING, 1) for kind in ("sgd", "adamw", "caller's")),
        *(("sgd", gradient, PASSING, 7) for gradient in MODES),  # where weights are displaced, and not all of them
        *(pytest.param("sgd", mode, PASSING + WRITING, 1, marks=pytest.mark.slow) for mode in MODES),
    ],
)
def test_at_whatever_line_of_a_step_it_comes_weights_and_statistics_are_of_one_step(kind, gradient, files, every):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    forget, retain = blobs(8), blobs(8)
    at, pressed = 1, True
    while pressed:
        model = copy.deepcopy(first)
        made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with fastlur.MetaStep(model, optimizer=kind if kind != "caller's" else made, gradient=gradient) as step:
            step(forget, retain)
            wholes = [state(model)]
            held = copy.deepcopy(model), copy.deepcopy(step.state_dict())
            pressing = Pressing(at, files)
            try:
                with pressing:
                    step(forget, retain)
                pressed = pressing.count >= at
            except KeyboardInterrupt:
                pass
            found = state(model)
        with fastlur.MetaStep(
            twin := held[0],
            optimizer=kind if kind != "caller's" else torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9),
            gradient=gradient,
        ) as step:
            step.load_state_dict(held[1])
            step(forget, retain)
            wholes.append(state(twin))
        assert any(same(found, each) for each in wholes), f"line {at} of those that run"
        at += every
    assert at > 40


def test_at_whatever_line_of_a_run_it_comes_a_trimmed_model_is_not_left_behind():
    torch.manual_seed(0)
    first, forget, retain = mlp(), blobs(8), blobs(8)
    method = fastlur.LUR(trim=Trim(0.1))
    wholes = [state(first)]
    remember = lambda event: wholes.append(state(event.model))
    run(copy.deepcopy(first), forget, retain, method=method, steps=1, callbacks=[remember])
    at, pressed = 1, True
    while pressed:
        model, pressing = copy.deepcopy(first), Pressing(at, ("fastlur/api.py", "fastlur/interrupt.py"))
        try:
            with pressing:
                run(model, forget, retain, method=method, steps=1)
            pressed = pressing.count >= at
        except KeyboardInterrupt:
            pass
        assert any(same(state(model), each) for each in wholes), f"line {at} of those that run"
        at += 1
    assert at > 60


def test_before_the_first_step_the_model_stays_as_given():
    model, calls = mlp(), []
    before = state(model)

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 4:  # the trial's, the trim's two, then the mask's first
            control_c()
        return fastlur.losses.cross_entropy(model, batch)

    method = fastlur.LUR(trim=Trim(0.1), mask=fastlur.methods.SaliencyMask(0.5))
    with pytest.raises(KeyboardInterrupt):
        run(model, blobs(16), blobs(20), loss=loss, method=method)
    assert same(state(model), before)
    assert len(calls) == 4


def test_after_the_last_step_it_is_not_swallowed():
    model = mlp()
    with pytest.raises(KeyboardInterrupt, match="the run is over"):
        run(model, blobs(12), blobs(20), steps=3, stop=lambda event: event.step == 3 and (control_c() or "enough"))


def test_a_handler_of_the_callers_own_is_left_alone():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        mine = signal.getsignal(signal.SIGINT)
        result = run(mlp(), blobs(12), blobs(20), steps=4, callbacks=[lambda event: control_c()])
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(pressed) == 4
    assert result.ended == "all steps done"


def test_after_the_last_step_what_was_saved_stays(tmp_path):
    """The call does not return, so that its model may be lost with it: the last checkpoint is all there is."""
    model, data, options = job(tmp_path, steps=9, checkpoint_every=2)
    expected = whole(model, data, options)
    # in the rule that ends the run: at a callback's the run would be broken off between two steps, as at any other
    options |= {"stop": lambda event: event.step == 9 and (control_c() or "enough")}
    with pytest.raises(KeyboardInterrupt, match="the run is over"):
        fastlur.unlearn(copy.deepcopy(model), *data, **options)
    assert list(tmp_path.glob("*.json"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        resumed, _ = go_on(model, data, options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert same(state(resumed), state(expected))


def test_a_step_that_was_just_saved_is_not_saved_again(tmp_path, monkeypatch):
    """A second write that fails, as on a full disk, would take the first one along."""
    model, data, options = job(tmp_path, steps=9, checkpoint_every=4)
    made, written = Checkpoints.save, []

    def save(self, step, extra):
        if step.step in written:
            raise fastlur.CheckpointError("no space left on device")
        written.append(step.step)
        made(self, step, extra)
        if step.step == 4:
            control_c()

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Interrupted, match="after step 4") as caught:
        fastlur.unlearn(model, *data, **options)
    assert not getattr(caught.value, "__notes__", [])
    assert [path.name for path in tmp_path.glob("*.json")] == ["fastlur-step-00000004.json"]


@pytest.mark.parametrize("at", ["load_state_dict", "take"])
@pytest.mark.parametrize("times", [1, 2])  # the second would raise at once
def test_while_a_checkpoint_is_brought_back_it_waits_for_the_end(times, at, tmp_path, monkeypatch):
    """Weights of which some are those of the checkpoint and some as given would be nobody's."""
    model, data, options = job(tmp_path, steps=9, checkpoint_every=2)
    expected, seen = whole(model, data, options), {}
    remember = lambda event: seen.update({event.step: state(event.model)})
    whole(model, data, options | {"callbacks": [remember]})
    break_off(model, data, options)
    owner = Step if at == "load_state_dict" else Statistics
    made = getattr(owner, at)

    def pressed(self, value):
        for _ in range(times):
            control_c()
        made(self, value)

    first = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, at, pressed)
        with pytest.raises(KeyboardInterrupt):
            fastlur.unlearn(first, *data, **options)
    assert same(state(first), seen[6 - times])  # the checkpoint is of step 4; after one, the next step is made whole
    assert same(state(go_on(model, data, options)[0]), state(expected))


def test_off_the_main_thread_there_is_nothing_to_handle():
    ended = []
    thread = threading.Thread(target=lambda: ended.append(run(mlp(), blobs(12), blobs(20)).ended))
    thread.start()
    thread.join()
    assert ended == ["all steps done"]


def test_a_loader_whose_workers_die_of_the_same_key_is_no_error(tmp_path):
    class Dies(list):
        """Batches; the fourth is not delivered, since its worker has heard Ctrl-C too."""

        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 3 and pressing:
                    control_c()
                    raise RuntimeError("DataLoader worker exited unexpectedly")
                yield batch

    pressing = []
    model, (forget, _), options = job(tmp_path)
    retain = Dies([blobs(8) for _ in range(6)])
    data = (forget, retain)
    expected = whole(model, data, options)
    with pytest.raises(Interrupted, match="after step 3 of 9"):
        fastlur.unlearn(mlp_like(model), *data, **options, callbacks=[lambda event: pressing.append(1)])
    pressing.clear()
    resumed, steps = go_on(model, data, options)
    assert steps[0] == 4
    assert same(state(resumed), state(expected))


def look():
    """What a metric does; replaced in a test, since what a rule refers to by a global name is not compared."""


def test_nor_is_a_metric_that_reads_such_a_loader(tmp_path, monkeypatch):
    """Rules would have missed a look if that step were saved, so the last checkpoint that was written counts."""
    looks = []

    def dying():
        looks.append(1)
        if len(looks) == 6:
            control_c()
            raise RuntimeError("DataLoader worker exited unexpectedly")

    rule = Reached(lambda model: look() or 1.0, at_most=0.0, every=1)
    model, data, options = job(tmp_path, checkpoint_every=4, stop=rule)
    expected = whole(model, data, options)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "look", dying)
        with pytest.raises(Interrupted, match="after step 6 of 9"):
            fastlur.unlearn(mlp_like(model), *data, **options)
    assert [path.name for path in tmp_path.glob("*.json")] == ["fastlur-step-00000004.json"]
    resumed, steps = go_on(model, data, options)
    assert steps[0] == 5
    assert same(state(resumed), state(expected))


def test_a_checkpoint_that_fails_in_the_same_step_is_told(tmp_path, monkeypatch):
    model, data, options = job(tmp_path, checkpoint_every=4)

    def press(event):
        if event.step == 4:
            fill_disk(monkeypatch)
            control_c()

    with pytest.raises(fastlur.CheckpointError, match="No space left"):
        fastlur.unlearn(model, *data, **options, callbacks=[press])


def test_inside_only_the_first_is_noted():
    with Interrupt() as interrupt:
        control_c()
        assert interrupt.pending
        with pytest.raises(KeyboardInterrupt):
            control_c()
        interrupt.pending = False


def mlp_like(model):
    made = mlp(dropout=model[2].p)
    made.load_state_dict(model.state_dict())
    return made
