"""Stopping rules: when they end a run, why they say they did, and that an interruption does not change it."""

from __future__ import annotations

import pytest
import torch
from helpers import Interrupted, blobs, mlp, run, same, state

import fastlur
from fastlur.loop import StepEvent
from fastlur.stats import StepStats
from fastlur.stopping import ErrorOn, LossOn, Patience, Reached, TimeBudget


class Series:
    """A metric that takes given values one after the other, then the last one."""

    def __init__(self, *values):
        self.values, self.seen = list(values), 0

    def __call__(self, model):
        self.seen += 1
        return self.values[min(self.seen, len(self.values)) - 1]

    def __repr__(self):
        return "Series()"


def steps_of(stop, steps=40, **options):
    result = run(mlp(), blobs(12), blobs(20), steps=steps, stop=stop, **options)
    return len(result.history["step"]), result.ended


def event(step, seconds=0.0, steps=100):
    nothing = torch.zeros(())
    return StepEvent(step, steps, StepStats(step, nothing, nothing, torch.zeros(3)), mlp(), seconds)


def test_a_target_ends_the_run_at_the_first_look_that_reaches_it():
    assert steps_of(Reached(Series(1, 2, 3, 4), at_least=3, every=5)) == (
        15,
        "test_stopping.Series reached 3, at least 3",
    )
    assert steps_of(Reached(Series(9, 5, 1), at_most=5, every=4)) == (8, "test_stopping.Series reached 5, at most 5")
    assert steps_of(Reached(Series(1.0), at_least=3))[1] == "all steps done"
    assert steps_of(Reached(Series(float("nan")), at_least=3))[1] == "all steps done"


def test_a_forget_target_is_one_that_the_model_has_reached():
    torch.manual_seed(3)
    forget, retain, model = blobs(12), blobs(30), mlp()
    metric = ErrorOn(forget)
    assert metric(model) == pytest.approx(100 - 100 * float((model(forget[0]).argmax(1) == forget[1]).float().mean()))
    rule = Reached(metric, at_least=99, every=1)
    method = fastlur.LUR(forget_weight=2.0)
    result = fastlur.unlearn(model, forget, retain, method=method, lr=0.3, steps=300, stop=rule, progress=False)
    assert "reached" in result.ended
    assert metric(model) >= 99


def test_the_loss_on_data_is_their_mean_cross_entropy_in_eval_mode():
    model, (x, y) = mlp(dropout=0.5).train(), blobs(30)
    wanted = torch.nn.functional.cross_entropy(model.eval()(x), y).detach()
    model.train()
    assert LossOn((x, y), batch_size=7)(model) == pytest.approx(float(wanted), rel=1e-6)
    assert model.training


def test_patience_ends_the_run_when_a_metric_no_longer_improves():
    assert steps_of(Patience(Series(5, 4, 4, 3, 3, 3, 3), looks=2, every=3)) == (
        18,
        "test_stopping.Series has not improved on 3 for 2 looks",
    )
    assert steps_of(Patience(Series(1, 2, 2, 1), looks=2, every=3, better="higher")) == (
        12,
        "test_stopping.Series has not improved on 2 for 2 looks",
    )
    assert steps_of(Patience(Series(5, 4.95, 4.9, 4.85), looks=3, every=3, by=0.2))[0] == 12
    assert steps_of(Patience(Series(*range(99, 0, -1)), looks=1, every=1))[1] == "all steps done"
    assert steps_of(Patience(Series(float("nan")), looks=2, every=3))[0] == 6  # what is no number is no improvement


def test_a_time_budget_counts_what_was_spent_before_an_interruption():
    rule = TimeBudget(10)
    assert rule(event(1, 4.0)) is None
    assert rule(event(2, 9.0)) is None
    saved = rule.state_dict()
    assert rule(event(3, 10.5)) == "10.5 s are over, of 10"
    other = TimeBudget(10)
    other.load_state_dict(saved)
    assert other(event(3, 0.5)) is None
    assert other(event(4, 1.5)) is not None
    assert other(event(1, 4.0)) is None  # another run


def test_a_time_budget_ends_a_run():
    steps, ended = steps_of(TimeBudget(1e-9))
    assert steps == 1
    assert ended.endswith("of 1e-09")


def test_what_a_metric_does_to_modes_and_random_state_is_not_seen_by_the_run():
    def careless(model):
        model.eval()
        torch.manual_seed(5)
        return 1.0

    torch.manual_seed(0)
    plain, looked = mlp(dropout=0.4), mlp(dropout=0.4)
    looked.load_state_dict(plain.state_dict())
    data, drawn = (blobs(12), blobs(20)), []
    draws = lambda event: drawn.append(torch.rand(()).item()) and None
    for model, stop in ((plain, None), (looked, Reached(careless, at_least=2, every=1))):
        torch.manual_seed(1)
        run(model, *data, steps=6, stop=stop, callbacks=[draws])
    assert same(state(plain), state(looked))
    assert drawn[:6] == drawn[6:]


@pytest.mark.parametrize("place", [3, 7, 8])
def test_patience_is_not_renewed_by_an_interruption(tmp_path, place):
    """The looks are at 2, 4, 6 …; the checkpoints after 2, 4, 6 …: of the same step."""

    class AtStep:
        at = 0

        def __call__(self, model):
            return 10 - min(self.at, 5)

        def __repr__(self):
            return "AtStep()"

    def go(at=None, **more):
        torch.manual_seed(2)
        metric = AtStep()

        def follow(event):
            metric.at = event.step
            if event.step == at:
                raise Interrupted

        rule = Patience(metric, looks=3, every=2)
        return run(mlp(), blobs(12), blobs(30), steps=60, stop=rule, callbacks=[follow], **more)

    whole = go()
    assert len(whole.history["step"]) == 12
    with pytest.raises(Interrupted):
        go(place, checkpoint=tmp_path, checkpoint_every=2)
    resumed = go(checkpoint=tmp_path, checkpoint_every=2)
    assert resumed.ended == whole.ended
    assert resumed.history == whole.history
    assert same(state(resumed.model), state(whole.model))


def test_another_rule_is_another_run(tmp_path):
    def breaks(event):
        if event.step == 3:
            raise Interrupted

    def go(stop, callbacks=()):
        torch.manual_seed(0)
        options = {"checkpoint": tmp_path, "checkpoint_every": 1, "callbacks": callbacks}
        return run(mlp(), blobs(12), blobs(20), steps=9, stop=stop, **options)

    with pytest.raises(Interrupted):
        go(TimeBudget(100), [breaks])
    with pytest.raises(fastlur.CheckpointError, match=r"stop was \['TimeBudget\(100\)'\], now \['TimeBudget\(50\)'\]"):
        go(TimeBudget(50))
    go(TimeBudget(100))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TimeBudget(0), "seconds=0"),
        (lambda: TimeBudget(float("nan")), "seconds=nan"),
        (lambda: Reached(Series(1)), "give one of them"),
        (lambda: Reached(Series(1), 1, 2), "give one of them"),
        (lambda: Reached(3, 1), "metric=3 cannot be called"),
        (lambda: Reached(Series(1), at_least="a"), "at_least='a'"),
        (lambda: Reached(Series(1), at_least=1, every=0), "every=0"),
        (lambda: Patience(Series(1), looks=0), "looks=0"),
        (lambda: Patience(Series(1), better="smaller"), "better='smaller'.*known: higher, lower"),
        (lambda: Patience(Series(1), by=-1), "by=-1"),
        (lambda: ErrorOn((torch.zeros(2, 2), torch.zeros(2).long()), batch_size=0), "batch_size=0"),
    ],
)
def test_rules_refuse_bad_settings(make, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        make()


def test_a_metric_must_return_a_number():
    with pytest.raises(fastlur.DataError, match="returned a NoneType, no number"):
        steps_of(Reached(lambda model: None, at_least=1))
    with pytest.raises(fastlur.DataError, match="ErrorOn: is empty"):
        ErrorOn([])
