"""What methods add up over data beforehand is right in few bits as well, and of the items that count."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import blobs, mlp, run
from torch import nn

from fastlur.data import Feed, source
from fastlur.losses import cross_entropy
from fastlur.methods import SCRUB, SSD, SaliencyMask, SelectiveAmnesia, Trim
from fastlur.methods.importance import importance
from fastlur.passes import Passes
from fastlur.space import ParameterSpace


def passes_over(model, data, batch_size):
    space = ParameterSpace(model)
    sources = {"forget": source(data, "forget", batch_size), "retain": source(data, "retain", batch_size)}
    losses = {"retain": cross_entropy, "forget": cross_entropy}
    feed = Feed(sources, 0, torch.device("cpu"))
    return Passes(space, losses, {"forget": 1.0, "retain": 1.0}, feed=feed, steps=9)


class Halves(nn.Module):
    """In whatever type its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.fixture
def pair():
    """The same numbers in bf16 and in fp32, and many items alike."""
    few = Halves().bfloat16()
    wide = copy.deepcopy(few).float()
    return few, wide, (torch.randn(6).bfloat16().float().expand(1500, 6), torch.zeros(1500, dtype=torch.long))


class TestFewBits:
    def test_the_importance_is_that_of_float32(self, pair):
        few, wide, data = pair
        found = [importance(passes_over(model, data, 500), "forget", None, "x", 1)[0].views[0] for model in (few, wide)]
        torch.testing.assert_close(found[0].float(), found[1], rtol=0.05, atol=1e-6)

    def test_so_is_selective_amnesias(self, pair):
        few, wide, data = pair
        found = [SelectiveAmnesia().prepare(passes_over(m, data, 2)).fisher.views[0] for m in (few, wide)]
        assert found[0].dtype == torch.bfloat16
        torch.testing.assert_close(found[0].float(), found[1], rtol=0.05, atol=1e-6)
        run(Halves().bfloat16(), blobs(8), blobs(8), method=SelectiveAmnesia())

    @pytest.mark.parametrize("part", [Trim(0.5), SaliencyMask(0.5)])
    def test_a_trim_and_a_mask_add_up_in_float32(self, part, pair, monkeypatch):
        from fastlur import ops

        few, wide, data = pair
        seen, real = [], ops.threshold
        monkeypatch.setattr(ops, "threshold", lambda s, share: seen.append([t.clone() for t in s]) or real(s, share))
        for model in (few, wide):
            part(passes_over(model, data, 2))
        for mine, its in zip(*seen, strict=True):
            torch.testing.assert_close(mine.float(), its, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:retain. 20 of 32 items have no label")
def test_items_that_do_not_count_have_no_importance():
    model, (x, y) = mlp(), blobs(12)
    marked = torch.cat([x, torch.randn(20, 6)]), torch.cat([y, torch.full((20,), -100)])
    for group, batch_size in ((1, 4), (None, 4)):
        passes = passes_over(copy.deepcopy(model), marked, batch_size)
        order = list(passes.feed.batches("forget", None, "x"))
        found, count = importance(passes, "forget", None, "x", group)
        parts = [(a[i : i + (group or 4)], b[i : i + (group or 4)]) for a, b in order for i in range(0, 4, group or 4)]
        parts = [part for part in parts if bool((part[1] != -100).any())]
        squares = []
        for part in parts:
            got = torch.autograd.grad(cross_entropy(model, part), list(model.parameters()))
            squares.append(torch.cat([g.reshape(-1) for g in got]) ** 2)
        assert count == len(parts) < len(marked[1]) // (group or 1)
        mine = torch.cat([view.reshape(-1) for view in found.views])
        torch.testing.assert_close(mine, torch.stack(squares).mean(0))
    run(model, blobs(8), marked, method=SSD())


class TestSCRUB:
    @pytest.mark.parametrize("steps", range(2, 30))
    @pytest.mark.parametrize("every", [1, 4, 100])
    def test_a_run_of_two_steps_or_more_forgets(self, steps, every):
        method = SCRUB(max_every=every)
        kinds = [method.is_max_step(step, steps) for step in range(1, steps + 1)]
        assert any(kinds)
        assert every == 1 or not kinds[0]
        assert not any(SCRUB(max_part=0.0, max_every=every).is_max_step(step, steps) for step in range(1, steps + 1))

    def test_statistics_move_once_where_the_loss_changes_its_inputs(self):
        model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))
        loss = lambda model, batch: cross_entropy(model, (batch[0] + 0.1, batch[1]))
        run(model, blobs(8), blobs(8), method=SCRUB(max_part=0.0), loss=loss, steps=3)
        assert int(model[1].num_batches_tracked) == 3
