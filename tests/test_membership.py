"""The attacks that LTU fits, and what it looks at: members, strangers, and no retain data but its share."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Interrupted, blobs, images, interrupt, mlp, run, same, state
from test_methods_ltu import F64, flat, opened
from torch import nn

from fastlur.membership import Attackers, features
from fastlur.methods.ltu import LTU, NOISE
from fastlur.space import ParameterSpace


class TestAttackers:
    def test_they_tell_two_kinds_of_outputs_apart_each_blind_to_one_feature(self):
        member, stranger = torch.randn(300, 5, dtype=F64) + 1, torch.randn(200, 5, dtype=F64) - 1
        attackers = Attackers(member, stranger, 6, 0)
        assert float((attackers(member) > 0).double().mean(1).min()) > 0.9
        assert float((attackers(stranger) < 0).double().mean(1).min()) > 0.9
        seen = member.clone().requires_grad_()
        for k in range(6):
            (slope,) = torch.autograd.grad(attackers(seen)[k].sum(), seen)
            assert [feature for feature in range(5) if not bool(slope[:, feature].any())] == [k % 5]

    def test_both_sides_weigh_the_same_whatever_their_sizes(self):
        odds = Attackers(torch.randn(3000, 5), torch.randn(100, 5), 4, 0)(torch.zeros(1, 5))
        assert float(odds.abs().max()) < 1.5  # log 30 = 3.4 if every item weighed the same

    def test_they_depend_on_the_data_and_the_seed_alone(self):
        data = torch.randn(40, 5), torch.randn(30, 5)
        one, two, other = (Attackers(*data, 4, seed)(data[0]) for seed in (1, 1, 2))
        assert torch.equal(one, two)
        assert not torch.allclose(one, other)

    def test_a_model_that_is_sure_of_itself_still_gets_a_gradient(self):
        logits = torch.tensor([[60.0, 0, 0, 0]], requires_grad=True)
        (slope,) = torch.autograd.grad(features(logits, torch.tensor([0]))[0, 0], logits)
        assert float(slope.abs().max()) > 1e-3
        assert bool(torch.isfinite(features(torch.tensor([[500.0, 0, -500, 0]]), torch.tensor([2]))).all())


class TestWhatLTULooksAt:
    @pytest.fixture
    def fitted(self, monkeypatch):
        """The features that attacks were fitted to: members and strangers."""
        found = []

        def watched(members, strangers, count, seed):
            found.append((members, strangers))
            return Attackers(members, strangers, count, seed)

        monkeypatch.setattr("fastlur.methods.ltu.Attackers", watched)
        return found

    def test_strangers_are_the_items_as_disturbed_models_see_them(self, fitted, monkeypatch):
        model, retain, points = mlp(dtype=F64), blobs(24, dtype=F64), []
        at = ParameterSpace.at

        def watched(space, point):
            if point is not None:
                points.append(flat(point.views))
            return at(space, point)

        monkeypatch.setattr(ParameterSpace, "at", watched)
        theta = flat(model.parameters())
        with opened(model, LTU(), retain=retain):
            pass
        ((members, strangers),) = fitted
        wanted = features(model(retain[0]), retain[1]).detach()
        order = torch.cdist(members, wanted).argmin(1)  # the attacks' items come in an order of their own
        assert sorted(order.tolist()) == list(range(24))
        torch.testing.assert_close(members, wanted[order])
        assert len(points) == len(NOISE)
        for noise, point, seen in zip(NOISE, points, strangers.split(24), strict=True):
            drawn = (point / theta - 1) / noise
            assert abs(float(drawn.mean())) < 0.3
            assert 0.8 < float(drawn.std()) < 1.2
            shadow = copy.deepcopy(model)
            nn.utils.vector_to_parameters(point, shadow.parameters())
            torch.testing.assert_close(seen, features(shadow(retain[0]), retain[1]).detach()[order])
        assert not torch.allclose((points[0] / theta - 1) / NOISE[0], (points[1] / theta - 1) / NOISE[1])

    def test_nonmembers_are_the_strangers_where_there_are_some(self, fitted):
        model, unseen = mlp(dtype=F64), blobs(30, dtype=F64)
        with opened(model, LTU(nonmembers=unseen)):
            pass
        ((_, strangers),) = fitted
        torch.testing.assert_close(strangers, features(model(unseen[0]), unseen[1]).detach())

    def test_nonmembers_are_in_the_record_as_a_digest(self):
        one, two = (LTU(nonmembers=blobs(30)).settings()["nonmembers"] for _ in "ab")
        assert one != two
        assert isinstance(one, str) and LTU().settings()["nonmembers"] is None

    def test_retain_data_beyond_the_fraction_never_reach_the_model(self):
        """Ten batches, of which a quarter, that is three, are held and come round."""
        retain, seen = blobs(80, dtype=F64), []
        model = mlp(dtype=F64)
        model.register_forward_pre_hook(lambda _, given: seen.extend(given[0].tolist()))
        forget = blobs(8, dtype=F64)
        with opened(model, LTU(retain_fraction=0.25), forget=forget, retain=retain) as step:
            assert len(step.state.held) == 3
            for number in range(7):
                seen.clear()
                step(forget, tuple(part[8 * number :][:8] for part in retain))
                mine = {tuple(row) for row in seen} - {tuple(row) for row in forget[0].tolist()}
                assert mine == {tuple(row) for row in step.state.held[number % 3][0].tolist()}

    def test_what_lies_beyond_the_fraction_changes_nothing(self):
        retain, forget = blobs(40), blobs(8)
        model = mlp()
        with opened(model, LTU(retain_fraction=0.2), forget=forget, retain=retain) as step:
            held = torch.cat([batch[0] for batch in step.state.held])
        used = (retain[0][:, None] == held).all(-1).any(1)
        assert int(used.sum()) == 8
        other = torch.where(used[:, None], retain[0], torch.randn(40, 6)), retain[1]
        one, two = copy.deepcopy(model), copy.deepcopy(model)
        for each, data in ((one, retain), (two, other)):
            run(each, forget, data, method=LTU(retain_fraction=0.2), steps=4)
        assert same(state(one), state(two))

    def test_an_interrupted_run_on_a_fraction_goes_on_bit_for_bit(self, tmp_path):
        model, data = mlp(dropout=0.2), (blobs(12), blobs(64))
        twin, first = copy.deepcopy(model), copy.deepcopy(model)
        options = {"method": LTU(retain_fraction=0.4, nonmembers=blobs(20), gradient="secant"), "steps": 6}
        run(twin, *data, **options)
        saving = {"checkpoint": tmp_path, "checkpoint_every": 1}
        with pytest.raises(Interrupted):
            run(first, *data, callbacks=[interrupt], **options, **saving)
        run(model, *data, **options, **saving)
        assert same(state(model), state(twin))

    def test_every_pass_is_in_eval_mode_and_statistics_stay(self, cnn):
        modes, before = [], state(cnn)
        cnn[0].register_forward_hook(lambda layer, *_: modes.append(layer.training))
        run(cnn.train(), images(12), images(20), method=LTU(nonmembers=images(9)))
        assert not any(modes[-12:])  # four a step
        assert all(torch.equal(v, before[n]) for n, v in state(cnn).items() if "running" in n or "tracked" in n)
