"""Methods with an objective of their own: teachers, and the two ways to move a boundary."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Attention, Interrupted, blobs, images, interrupt, mlp, same, state
from test_methods_baselines import F64, LR, descend, entropy, flat, gradient, moved
from torch import Tensor, nn
from torch.nn import functional

import fastlur
from fastlur import methods
from fastlur.methods.boundary_shrink import nearest_classes

NAMES = ("scrub", "bad_teacher", "boundary_shrink", "boundary_expand")


@pytest.fixture
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return blobs(8, dtype=F64), blobs(8, dtype=F64)


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


class TestScrub:
    def test_the_run_alternates_then_repairs(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        teacher, twin = copy.deepcopy(model), copy.deepcopy(model)
        descend(model, gradient(model, entropy(model, retain)))  # not where KL has no gradient
        method = methods.SCRUB(alpha=0.5, gamma=0.7, temperature=2.0, max_part=0.7, max_every=2)
        twin.load_state_dict(model.state_dict())
        teacher.load_state_dict(model.state_dict())
        kinds = []
        moved(method, model, forget, retain, steps=6, callbacks=[lambda e: kinds.append(e.stats.retain_loss.item())])
        for step in range(1, 7):
            if step in (2, 4):
                loss = -kl(teacher(forget[0]).detach(), twin(forget[0]), 2.0)
            else:
                loss = 0.5 * kl(teacher(retain[0]).detach(), twin(retain[0]), 2.0) + 0.7 * entropy(twin, retain)
            descend(twin, gradient(twin, loss))
        torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))
        assert [kind != kind for kind in kinds] == [False, True, False, True, False, False]

    def test_a_run_of_one_step_moves_the_model(self, data):
        model = mlp(dtype=F64)
        before = flat(model.parameters())
        moved(methods.SCRUB(), model, *data, steps=1)
        assert float((flat(model.parameters()) - before).norm()) > 1e-3

    def test_the_distance_is_capped(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        method = methods.SCRUB(max_part=1.0, max_every=2, cap=1e-6, alpha=0.0)
        twin = copy.deepcopy(model)
        moved(method, model, forget, retain, steps=2)  # a min-step, then a max-step beyond the cap
        descend(twin, gradient(twin, entropy(twin, retain)))
        torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))

    def test_one_forward_of_the_student_gives_both_terms_and_moves_statistics_once(self, cnn):
        calls = []
        cnn[0].register_forward_hook(lambda layer, *_: calls.append(layer.training))
        fastlur.unlearn(cnn, images(8), images(8), method=methods.SCRUB(max_part=0.0), steps=2, progress=False)
        assert calls[-4:] == [False, True] * 2  # teacher, student
        assert len(calls) == 8  # the others are the trial of the data before the run
        assert int(cnn[1].num_batches_tracked) == 2


class TestBadTeacher:
    def test_two_steps_are_the_rule(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        teacher, twin, fresh = (copy.deepcopy(model) for _ in range(3))
        torch.manual_seed(0)
        seen = {}

        class Watched(methods.BadTeacher):
            def prepare(self, passes):
                seen["state"] = super().prepare(passes)
                return seen["state"]

        method = Watched(forget_weight=0.6, temperature=2.0)
        moved(method, model, forget, retain, steps=2)
        with torch.no_grad():
            for p, view in zip(fresh.parameters(), seen["state"].bad.point.views, strict=True):
                p.copy_(view)
        assert not torch.allclose(flat(fresh.parameters()), flat(teacher.parameters()), atol=0.1)
        for _ in range(2):
            good = kl(teacher(retain[0]).detach(), twin(retain[0]), 2.0)
            bad = kl(fresh(forget[0]).detach(), twin(forget[0]), 2.0)
            descend(twin, gradient(twin, good + 0.6 * bad))
        torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))

    def test_the_ignorant_teacher_depends_on_the_seed_alone_and_disturbs_nothing(self, cnn):
        forget, retain = images(8), images(8)
        start, first, second, third = (copy.deepcopy(cnn) for _ in range(4))
        torch.manual_seed(5)
        for model, seed in ((first, 1), (second, 1), (third, 2)):
            fastlur.unlearn(model, forget, retain, method="bad_teacher", steps=2, seed=seed, progress=False)
        assert same(state(first), state(second))
        assert not same(state(first), state(third))
        fastlur.unlearn(cnn, forget, retain, method="bad_teacher", steps=2, lr=0.0, progress=False)
        kept = {name: value for name, value in state(cnn).items() if "running" not in name and "num" not in name}
        assert same(kept, {name: state(start)[name] for name in kept})


class TestBoundaryShrink:
    def test_the_first_step_is_the_rule(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        forget = 0.3 * forget[0], forget[1]
        x = forget[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(entropy(model, (x, forget[1])), x)

        def across(step):
            logits = model(forget[0] + step * slope.sign()).detach()
            rows = zip(logits, forget[1], strict=True)
            return torch.tensor([max((v, c) for c, v in enumerate(row) if c != y)[1] for row, y in rows])

        nearest = across(2.0 * forget[0].std(correction=0))
        for other in (0.0, 2.0, -2.0 * forget[0].std(correction=0)):  # the step, its length and its sign matter here
            assert not torch.equal(nearest, across(other))
        r, f = gradient(model, entropy(model, retain)), gradient(model, entropy(model, (forget[0], nearest)))
        method = methods.BoundaryShrink(epsilon=2.0, forget_weight=0.5, retain_weight=0.25)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(moved(method, model, forget, retain), 0.25 * r + 0.5 * f)
        alone = methods.BoundaryShrink(epsilon=2.0, forget_weight=0.5, retain_weight=0.0)
        torch.testing.assert_close(moved(alone, twin, forget, retain), 0.5 * f)

    def test_the_neighbours_are_those_of_the_model_as_given(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        seen = []

        class Watched(methods.BoundaryShrink):
            def direction(self, passes, held):
                seen.append(nearest_classes(held.given, forget, 0.3))
                return super().direction(passes, held)

        moved(Watched(retain_weight=0.0), model, forget, retain, steps=200, lr=0.5)
        assert all(torch.equal(labels, seen[0]) for labels in seen)
        assert torch.equal(model(forget[0]).argmax(-1), seen[0])

    def test_tokens_go_to_the_likeliest_other_class_and_ignored_targets_stay_ignored(self):
        model = Attention()
        tokens = torch.randint(0, 11, (20, 6))
        targets = torch.where(torch.rand(20, 6) < 0.3, -100, tokens.flip(1))
        seen = []

        class Watched(methods.BoundaryShrink):
            def direction(self, passes, held):
                seen.append(nearest_classes(held.given, (tokens, targets), 0.3))
                return super().direction(passes, held)

        with torch.no_grad():
            logits = model(tokens).flatten(0, 1)
        data = (tokens, targets), (tokens.flip(0), tokens)
        fastlur.unlearn(model, *data, method=Watched(), steps=1, batch_size=20, allow_overlap=True, progress=False)
        ignored = targets.flatten() == -100
        assert torch.equal(seen[0] == -100, ignored)
        wanted = logits.scatter(1, targets.flatten().clamp(min=0)[:, None], -torch.inf).argmax(-1)
        assert torch.equal(seen[0][~ignored], wanted[~ignored])


class TestBoundaryExpand:
    def test_the_steps_are_those_of_a_wider_layer_cut_off_at_the_end(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        wide, seen = copy.deepcopy(model), {}

        class Watched(methods.BoundaryExpand):
            def prepare(self, passes):
                seen["state"] = super().prepare(passes)
                seen["row"] = seen["state"].row.clone()
                return seen["state"]

        moved(Watched(forget_weight=0.5, retain_weight=0.25, row_lr=LR), model, forget, retain, steps=3)
        wide[3] = nn.Linear(12, 5, dtype=F64)
        with torch.no_grad():
            wide[3].weight.copy_(torch.cat([mlp_last(model, data).weight, seen["row"][None, :-1]]))
            wide[3].bias.copy_(torch.cat([mlp_last(model, data).bias, seen["row"][-1:]]))
        for _ in range(3):
            shadow = torch.full((8,), 4)
            kept = functional.cross_entropy(wide(retain[0])[:, :4], retain[1])
            loss = 0.25 * kept + 0.5 * functional.cross_entropy(wide(forget[0]), shadow)
            descend(wide, gradient(wide, loss))
        torch.testing.assert_close(model[3].weight, wide[3].weight[:4])
        torch.testing.assert_close(model[0].weight, wide[0].weight)
        torch.testing.assert_close(seen["state"].row[:-1], wide[3].weight[4])

    def test_the_model_has_its_own_shape_at_every_moment(self, cnn):
        shapes = {name: value.shape for name, value in cnn.state_dict().items()}
        seen = []

        def look(event):
            seen.append({name: value.shape for name, value in event.model.state_dict().items()})
            assert event.model(images(2)[0]).shape == (2, 10)

        fastlur.unlearn(cnn, images(8), images(8), method="boundary_expand", steps=2, callbacks=[look], progress=False)
        assert seen == [shapes, shapes]
        assert not cnn[10]._forward_hooks

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)),
            nn.Sequential(
                nn.Flatten(), nn.Linear(64, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 10, 2), nn.Flatten()
            ),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.AdaptiveAvgPool1d(10)),
        ],
    )
    def test_a_model_that_does_not_end_in_a_linear_layer_is_refused_as_it_was(self, model):
        before = state(model)
        with pytest.raises(fastlur.ModelError, match="use method='boundary_shrink'"):
            fastlur.unlearn(model, images(8), images(8), method="boundary_expand", steps=1, progress=False)
        assert same(before, state(model))


def mlp_last(model, data):
    """The last layer as it was: the fixture's random numbers fix it."""
    torch.manual_seed(0)
    blobs(8, dtype=F64), blobs(8, dtype=F64)
    return mlp(dtype=F64)[3]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: methods.SCRUB(max_every=0), "max_every=0"),
        (lambda: methods.SCRUB(max_part=1.5), "max_part=1.5"),
        (lambda: methods.SCRUB(cap=0), "cap=0"),
        (lambda: methods.BadTeacher(temperature=0), "temperature=0"),
        (lambda: methods.BoundaryShrink(epsilon=-1), "epsilon=-1"),
        (lambda: methods.BoundaryExpand(row_lr=float("inf")), "row_lr=inf"),
    ],
)
def test_arguments_out_of_range(make, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_a_forget_loss_that_would_not_be_used(name, data):
    with pytest.raises(fastlur.ArgumentError, match="forget_loss"):
        moved(name, mlp(dtype=F64), *data, forget_loss=fastlur.losses.negative_cross_entropy)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_goes_on_bit_for_bit(name, cnn, tmp_path):
    data = images(12), images(20)
    whole, part, again = (copy.deepcopy(cnn) for _ in range(3))
    options = {"method": name, "steps": 4, "batch_size": 8, "progress": False}
    fastlur.unlearn(whole, *data, **options)
    options |= {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interrupted):
        fastlur.unlearn(part, *data, **options, callbacks=[interrupt])
    fastlur.unlearn(again, *data, **options)
    assert same(state(whole), state(again))


def test_the_divergence_counts_what_the_targets_count():
    teacher, student = torch.randn(2, 6, 4, dtype=F64)
    targets = torch.tensor([0, 1, -100, 2, -100, 3])
    kept = targets >= 0
    found = fastlur.losses.divergence(teacher, student, targets, 3.0)
    torch.testing.assert_close(found, kl(teacher[kept], student[kept], 3.0))
