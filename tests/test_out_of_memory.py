"""A run that runs out of memory takes its batches in parts from then on, and nothing else changes; or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import break_off, go_on, job
from helpers import MODES, mlp, run, same, state
from hungry import Hungry, memory_for, twins, wide
from torch import nn

import fastlur
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.microbatch import MicroBatches

pytestmark = [
    pytest.mark.usefixtures("no_collecting"),
    pytest.mark.filterwarnings("ignore:memory ran out", "ignore:MOX"),
]


class TestRuns:
    @pytest.mark.parametrize("fails", ["forward", "backward"])
    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_every_method_ends_where_it_would_have_ended(self, name, fails):
        model, short, result = memory_for(5, method=name, model=Hungry(fails=fails))
        assert result.settings["micro_batch"] in (3, 5) or METHODS[name].steps == 0
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("gradient", [mode for mode in MODES if mode != "exact"])
    @pytest.mark.parametrize("order", ["retain_first", "forget_first"])
    def test_every_gradient_of_lur_but_the_exact_one(self, gradient, order):
        method = fastlur.LUR(gradient=gradient, order=order, trim=Trim(0.5), mask=SaliencyMask(0.5))
        model, short, _ = memory_for(5, method=method)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("keep_graph", [True, False])
    def test_the_exact_one_says_what_to_do(self, keep_graph):
        model, seen = Hungry(50), {}

        def shrink(event):
            seen[event.step] = state(event.model)
            model.limit = 5 if event.step == 2 else 50

        method = fastlur.LUR(gradient="exact", keep_graph=keep_graph)
        with pytest.raises(fastlur.ModelError, match=r"gradient='exact' ran out of memory .*use 'optimistic' or"):
            run(model, wide(12), wide(40), method=method, batch_size=12, steps=5, callbacks=[shrink])
        assert same(state(model), seen[2])

    def test_it_is_found_out_before_anything_changes_and_recorded(self):
        _, short = twins(5)
        with pytest.warns(UserWarning, match="memory ran out with 12 items"):
            result = run(short, wide(12), wide(40), batch_size=12, steps=2)
        assert result.settings["micro_batch"] == 3
        _, short = twins(50)
        assert run(short, wide(12), wide(40), batch_size=12, steps=2).settings["micro_batch"] is None

    @pytest.mark.parametrize("fails", ["forward", "backward"])
    @pytest.mark.parametrize("method", ["lur", "eupmu", "scissorhands", "boundary_expand"])
    def test_on_the_way_too(self, method, fails):
        model, short = twins(50, fails=fails)
        data = wide(12), wide(40)

        def shrink(event):
            short.limit = 5 if event.step == 3 else short.limit

        run(model, *data, steps=6, batch_size=12, method=method)
        with pytest.warns(UserWarning, match="takes 3 at a time"):
            run(short, *data, steps=6, batch_size=12, callbacks=[shrink], method=method)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def test_an_interrupted_run_goes_on_in_the_same_parts_bit_for_bit(self, tmp_path):
        """Whatever memory there is when it goes on: other parts would be other roundings."""
        model, data, options = job(tmp_path, Hungry(5, dropout=0.2), batch_size=12)
        data = tuple((x.double(), y) for x, y in data)
        whole = copy.deepcopy(model)
        left_out = ("checkpoint", "checkpoint_every")
        fastlur.unlearn(whole, *data, **{k: v for k, v in options.items() if k not in left_out})
        break_off(model, data, options)
        richer = copy.deepcopy(model)
        richer.limit = 10**9
        resumed, steps = go_on(richer, data, options)
        assert steps[0] == 5
        assert same(state(resumed), state(whole))

    def test_a_step_of_ones_own(self):
        model, short = twins(5)
        batches = [(wide(12), wide(12)) for _ in range(3)]
        for each in (model, short):
            with fastlur.MetaStep(each) as step:
                for pair in batches:
                    step(*pair)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


class MinusMean(nn.Module):
    """Looks at the whole batch, and is no layer that anybody knows."""

    def forward(self, x):
        return x - x.mean(0)


class Counts(nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Balances(nn.Module):
    """Leaves a value on itself that a loss may add, as a mixture of experts does."""

    def forward(self, x):
        self.balance = x.square().mean()
        return x


class Remembers(nn.Module):
    """Leaves on itself what does not depend on the batch, such as a table of angles."""

    def forward(self, x):
        self.angles = torch.arange(x.shape[1], dtype=x.dtype).cos()
        return x * self.angles


REFUSED = {
    "batch norm": (lambda: nn.BatchNorm1d(8), "'layer', a BatchNorm1d, normalises by the whole batch"),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(8, track_running_stats=False),
        "'layer', a BatchNorm1d, normalises by the whole batch",
    ),
    "a layer of one's own": (MinusMean, "its outputs depend on the whole batch"),
    "a counter": (Counts, "a forward moves its buffers"),
    "a note": (Balances, "a forward leaves 'layer.balance' on it, in parts that of the last"),
}


class TestRefused:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_looks_at_the_whole_batch_is_refused_before_anything_changes(self, case):
        make, said = REFUSED[case]
        model = Hungry(5, layer=make())
        before = state(model)
        with pytest.raises(fastlur.ModelError, match=f"memory ran out with .*{said}.*lower batch_size") as caught:
            run(model, wide(12), wide(40), batch_size=12, method=fastlur.LUR(trim=Trim(0.1)))
        assert "\n" not in str(caught.value)
        assert same(state(model), before)
        assert model.training

    def test_a_note_that_is_the_same_for_any_batch_is_no_obstacle(self):
        model, short, _ = memory_for(5, model=Hungry(layer=Remembers()))
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def test_on_the_way_the_model_is_as_after_the_last_step(self):
        model, seen = Hungry(50, layer=nn.BatchNorm1d(8)), {}

        def shrink(event):
            seen[event.step] = state(event.model)
            model.limit = 5 if event.step == 3 else 50

        with pytest.raises(fastlur.ModelError, match="BatchNorm1d"):
            run(model, wide(12), wide(40), batch_size=12, steps=6, callbacks=[shrink])
        assert same(state(model), seen[3])

    def test_batch_norm_that_keeps_its_statistics_is_no_obstacle(self):
        """Passes of this method run in eval mode."""
        model = Hungry(layer=nn.BatchNorm1d(8)).eval()
        model, short, _ = memory_for(5, method="gradient_ascent", model=model)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize(
        ("limit", "fails", "said"),
        [
            (0, "backward", "with one item at a time"),
            (0, "forward", "too few to see"),
            (1, "forward", "too few to see"),
        ],
    )
    def test_a_model_that_is_too_large_for_one_item_or_for_two(self, limit, fails, said):
        model = Hungry(limit, fails)
        before = state(model)
        with pytest.raises(fastlur.ModelError, match=f"memory ran out .*{said}"):
            run(model, wide(12), wide(40), batch_size=12)
        assert same(state(model), before)

    @pytest.mark.parametrize("output", [lambda x: x.sum(), lambda x: x.t(), lambda x: "text", lambda x: (x, object())])
    def test_outputs_that_cannot_be_put_together(self, output):
        made = MicroBatches(mlp(), lambda x: output(x), 2, {True})
        with pytest.raises(fastlur.ModelError, match=r"model: returned .*lower batch_size"):
            made(torch.randn(5, 6))

    def test_a_model_in_parts_has_the_models_attributes(self):
        model = mlp()
        made = MicroBatches(model, model, 2, set())
        assert made.training
        assert made.state_dict().keys() == model.state_dict().keys()
        x = torch.randn(7, 6)
        torch.testing.assert_close(made(x), model(x))
