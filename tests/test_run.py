"""A run as a whole: its length, its history, its observers, what it gives back, and going on after an interruption."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from helpers import MODES, blobs, images, mlp, same, state
from safetensors.torch import save
from torch import nn

import fastlur
from fastlur.demo import residual_cnn


@pytest.fixture
def job():
    return mlp(), blobs(20), blobs(50)


class TestResult:
    def test_the_history_has_one_entry_a_step(self, job):
        result = fastlur.unlearn(*job, steps=40, progress=False)
        assert set(result.history) == {
            "step",
            "lr",
            "forget_loss",
            "retain_loss",
            "cosine",
            "forget_norm",
            "retain_norm",
        }
        assert {len(column) for column in result.history.values()} == {40}
        assert result.history["step"] == list(range(1, 41))
        assert result.history["lr"][0] == pytest.approx(0.1)
        assert result.history["lr"][-1] == pytest.approx(0.1 / 40)
        json.dumps(result.history)

    def test_summary_and_figures(self, job):
        result = fastlur.unlearn(*job, steps=5, progress=False)
        assert result.model is job[0]
        assert "5 steps" in result.summary()
        assert result.seconds > 0
        assert result.peak_memory > 2**20
        assert result.ended == "all steps done"

    def test_default_length(self, job):
        assert len(fastlur.unlearn(*job, progress=False).history["step"]) == 150

    def test_recorded_losses_are_what_the_losses_were(self, job):
        seen = []

        def loss(model, batch):
            value = fastlur.losses.cross_entropy(model, batch)
            seen.append(float(value.detach()))
            return value

        result = fastlur.unlearn(*job, loss=loss, method=fastlur.LUR(gradient="first_order"), steps=4, progress=False)
        assert result.history["retain_loss"] == pytest.approx(seen[-4:])

    def test_recorded_cosine_is_that_of_the_two_gradients(self, job):
        model, forget, retain = job
        with fastlur.MetaStep(model, gradient="first_order", lr=0.0, inner_lr=0.0, forget_weight=0.3) as step:
            stats = step(forget, retain)
        params = list(model.parameters())
        r = torch.autograd.grad(fastlur.losses.cross_entropy(model, retain), params)
        f = torch.autograd.grad(-0.3 * fastlur.losses.cross_entropy(model, forget), params)
        r, f = (torch.cat([g.flatten() for g in gs]) for gs in (r, f))
        assert float(stats.cosine) == pytest.approx(float(nn.functional.cosine_similarity(r, f, dim=0)), abs=1e-6)
        assert float(stats.forget_norm) == pytest.approx(float(f.norm()), rel=1e-5)
        assert float(stats.retain_norm) == pytest.approx(float(r.norm()), rel=1e-5)


class TestObservers:
    def test_callbacks_see_every_step_and_the_model(self, job):
        events = []
        fastlur.unlearn(*job, steps=4, callbacks=[events.append], progress=False)
        assert [(e.step, e.steps) for e in events] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert all(e.model is job[0] for e in events)
        assert all(e.stats.retain_loss.dim() == 0 for e in events)

    @pytest.mark.parametrize("how", ["stop", "stops", "callbacks"])
    def test_a_rule_ends_the_run(self, job, how):
        rule = lambda event: event.step == 3 and "enough"
        options = {"stop": {"stop": rule}, "stops": {"stop": [rule]}, "callbacks": {"callbacks": [rule]}}[how]
        result = fastlur.unlearn(*job, steps=9, progress=False, **options)
        assert len(result.history["step"]) == 3
        assert result.ended == "enough"

    def test_a_callback_that_evaluates_changes_nothing(self, job):
        model, forget, retain = job
        twin = copy.deepcopy(model)

        def look(event):
            event.model.eval()
            fastlur.evaluate(event.model, forget=forget, retain=retain, test=retain)

        fastlur.unlearn(model, forget, retain, steps=5, progress=False)
        fastlur.unlearn(twin, forget, retain, steps=5, progress=False, callbacks=[look])
        assert same(state(model), state(twin))

    def test_progress_goes_to_standard_error(self, job, capsys):
        fastlur.unlearn(*job, steps=3)
        out = capsys.readouterr()
        assert out.out == ""
        assert "3/3" in out.err


class TestRetainBudget:
    def run(self, limit, lr=0.3):
        torch.manual_seed(3)
        model = residual_cnn(width=4)
        forget, retain = images(16), images(48)
        seen = {}

        def remember(event):
            seen[event.step] = state(event.model)

        result = fastlur.unlearn(
            model,
            forget,
            retain,
            method=fastlur.LUR(forget_weight=20.0, normalize_by="own"),
            forget_loss=fastlur.losses.negative_cross_entropy,
            schedule="constant",
            lr=lr,
            max_grad_norm=math.inf,
            steps=60,
            batch_size=16,
            max_retain_loss_increase=limit,
            progress=False,
            callbacks=[remember],
        )
        return model, result, seen

    def test_it_stops_and_rolls_back_to_the_last_state_within_it(self):
        model, result, seen = self.run(0.5, lr=3e-4)
        last = len(result.history["step"])
        assert 20 <= last < 60
        assert last % 10 == 0
        assert "rolled back" in result.ended
        assert same(state(model), seen[last - 10])  # buffers too

    def test_a_generous_one_changes_nothing(self):
        free, _, _ = self.run(None, lr=1e-3)
        bounded, result, _ = self.run(1e9, lr=1e-3)
        assert result.ended == "all steps done"
        assert same(state(free), state(bounded))


class Killed(BaseException):
    pass


def kill_at(step):
    def callback(event):
        if event.step == step:
            raise Killed

    return callback


class TestResume:
    def arguments(self, gradient, **more):
        torch.manual_seed(8)
        model = residual_cnn(width=4)
        return (model, images(20), images(70)), {
            "method": fastlur.LUR(gradient=gradient),
            "steps": 12,
            "batch_size": 16,
            "checkpoint_every": 3,
            "progress": False,
        } | more

    @pytest.mark.parametrize("gradient", MODES)
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw", "custom"])
    def test_an_interrupted_run_goes_on_bit_for_bit(self, tmp_path, gradient, optimizer):
        def custom(model):
            return torch.optim.Adam(model.parameters(), 1e-3) if optimizer == "custom" else optimizer

        args, options = self.arguments(gradient)
        whole = fastlur.unlearn(*args, **options, optimizer=custom(args[0]))
        for place in (5, 10):
            args, options = self.arguments(gradient, checkpoint=tmp_path / "checkpoints")
            with pytest.raises(Killed):
                fastlur.unlearn(*args, **options, optimizer=custom(args[0]), callbacks=[kill_at(place)])
        steps = []
        args, options = self.arguments(gradient, checkpoint=tmp_path / "checkpoints")
        resumed = fastlur.unlearn(
            *args, **options, optimizer=custom(args[0]), callbacks=[lambda e: steps.append(e.step)]
        )
        assert steps == [10, 11, 12]
        assert same(state(resumed.model), state(whole.model))
        assert resumed.history == whole.history
        assert list((tmp_path / "checkpoints").iterdir()) == []

    @pytest.mark.parametrize("kind", ["shuffled loader", "loader with a generator", "augmenting data set"])
    def test_data_that_draw_at_random_are_recognised(self, tmp_path, kind):
        from torch.utils.data import DataLoader, Dataset, TensorDataset

        class Noisy(Dataset):
            def __len__(self):
                return 20

            def __getitem__(self, i):
                return torch.full((6,), float(i)) + torch.randn(6), i % 4

        def retain():
            torch.manual_seed(1)
            plain = TensorDataset(*blobs(40))
            if kind == "augmenting data set":
                return Noisy()
            generator = torch.Generator().manual_seed(3) if "generator" in kind else None
            return DataLoader(plain, 8, shuffle=True, generator=generator)

        def go(**more):
            torch.manual_seed(2)
            model, forget = mlp(), blobs(16)
            data = retain()
            torch.manual_seed(torch.seed() % 2**31)  # another process begins in another random state
            options = {"steps": 8, "batch_size": 8, "progress": False, "checkpoint_every": 2}
            return fastlur.unlearn(model, forget, data, **options, **more)

        whole = go()
        with pytest.raises(Killed):
            go(checkpoint=tmp_path, callbacks=[kill_at(5)])
        assert same(state(go(checkpoint=tmp_path).model), state(whole.model))

    def test_another_run_is_refused_with_the_difference_named(self, tmp_path):
        args, options = self.arguments("optimistic", checkpoint=tmp_path)
        with pytest.raises(Killed):
            fastlur.unlearn(*args, **options, callbacks=[kill_at(7)])
        for change, said in (
            ({"lr": 0.01}, r"lr was 0\.1, now 0\.01"),
            ({"method": fastlur.LUR(gradient="secant")}, "method was"),
            ({"steps": 13}, "steps was 12, now 13"),
            ({"parameters": "10.*"}, "moving parameters was"),
            ({"forget_loss": fastlur.losses.BoundedForgetting(3.0)}, "forget_loss was"),
            ({"loss": lambda m, b: fastlur.losses.cross_entropy(m, b)}, "loss was"),
            ({"memory_format": torch.channels_last}, "memory_format was"),
        ):
            args, options = self.arguments("optimistic", checkpoint=tmp_path)
            with pytest.raises(fastlur.CheckpointError, match=said):
                fastlur.unlearn(*args, **(options | change))
        (model, forget, retain), options = self.arguments("optimistic", checkpoint=tmp_path)
        with pytest.raises(fastlur.CheckpointError, match="forget data was"):
            fastlur.unlearn(model, (forget[0] + 1, forget[1]), retain, **options)
        model[0].weight.data.add_(1)
        with pytest.raises(fastlur.CheckpointError, match="model was"):
            fastlur.unlearn(model, forget, retain, **options)

    def test_the_end_leaves_no_old_weights_behind(self, tmp_path):
        args, options = self.arguments("optimistic", checkpoint=tmp_path)
        (tmp_path / "fastlur-step-00000005.safetensors").write_bytes(
            save({"a": torch.ones(2)}, metadata={"fastlur": "checkpoint"})
        )
        (tmp_path / ".fastlur-step-00000006.json.writing").write_bytes(b'{"fastlur": "check')
        (tmp_path / "notes.txt").write_text("mine")
        fastlur.unlearn(*args, **options)
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

    def test_only_the_last_two_are_kept(self, tmp_path):
        args, options = self.arguments("optimistic", checkpoint=tmp_path)
        with pytest.raises(Killed):
            fastlur.unlearn(*args, **options, callbacks=[kill_at(11)])
        names = sorted(file.name for file in tmp_path.iterdir())
        assert names == [f"fastlur-step-0000000{n}.{kind}" for n in (6, 9) for kind in ("json", "safetensors")]

    @pytest.mark.parametrize("damage", ["newest tensors", "newest description", "both"])
    def test_a_damaged_checkpoint_gives_the_older_one_or_an_error(self, tmp_path, damage):
        args, options = self.arguments("optimistic")
        whole = fastlur.unlearn(*args, **options)
        args, options = self.arguments("optimistic", checkpoint=tmp_path)
        with pytest.raises(Killed):
            fastlur.unlearn(*args, **options, callbacks=[kill_at(10)])
        files = sorted(tmp_path.glob("*.safetensors")) if damage == "both" else sorted(tmp_path.glob("*.json"))[-1:]
        if damage == "newest tensors":
            files = sorted(tmp_path.glob("*.safetensors"))[-1:]
        for file in files:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        args, options = self.arguments("optimistic", checkpoint=tmp_path)
        if damage == "both":
            with pytest.raises(fastlur.CheckpointError, match=r"none .* is intact"):
                fastlur.unlearn(*args, **options)
        else:
            assert same(state(fastlur.unlearn(*args, **options).model), state(whole.model))


class TestMetaStepState:
    @pytest.mark.parametrize("gradient", MODES)
    def test_state_dict_goes_on_bit_for_bit(self, gradient):
        torch.manual_seed(1)
        start = mlp(dropout=0.2)
        data = [(blobs(8), blobs(8)) for _ in range(6)]
        whole = copy.deepcopy(start)
        with fastlur.MetaStep(whole, gradient=gradient, optimizer="adamw", lr=0.01) as step:
            for batch in data:
                step(*batch)
        part = copy.deepcopy(start)
        with fastlur.MetaStep(part, gradient=gradient, optimizer="adamw", lr=0.01) as step:
            for batch in data[:3]:
                step(*batch)
            saved, weights = step.state_dict(), state(part)
            step(*data[0])
        other = copy.deepcopy(start)
        other.load_state_dict(weights)
        with fastlur.MetaStep(other, gradient=gradient, optimizer="adamw", lr=0.01) as step:
            step.load_state_dict(saved)
            for batch in data[3:]:
                step(*batch)
        assert same(state(whole), state(other))

    def test_a_state_of_another_step_is_refused(self):
        step = fastlur.MetaStep(mlp(), gradient="secant")
        other = fastlur.MetaStep(mlp(), gradient="secant", optimizer="adamw")
        third = fastlur.MetaStep(mlp(), gradient="optimistic")
        fourth = fastlur.MetaStep(mlp(classes=5), gradient="secant")
        for saved, said in (
            (other.state_dict(), "holds"),
            (third.state_dict(), "was taken with"),
            (fourth.state_dict(), "has shape"),
            ({}, "has no control"),
        ):
            with pytest.raises(fastlur.CheckpointError, match=said):
                step.load_state_dict(saved)


def test_sgd_and_adamw_are_torchs_own():
    """One first_order step with α = 0 is a plain optimizer step on the sum of the losses."""
    for name, make in {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, weight_decay=0.05),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.05, betas=(0.9, 0.999)),
    }.items():
        for clip in (None, 0.05):
            model = mlp(dtype=torch.float64)
            plain, foreign = copy.deepcopy(model), copy.deepcopy(model)
            options = {"gradient": "first_order", "inner_lr": 0.0, "max_grad_norm": clip}
            optimizer = make(plain.parameters())
            ours = fastlur.MetaStep(model, optimizer=name, lr=0.1, momentum=0.8, weight_decay=0.05, **options)
            theirs = fastlur.MetaStep(foreign, optimizer=make(foreign.parameters()), **options)
            for _ in range(5):
                forget, retain = blobs(8, dtype=torch.float64), blobs(8, dtype=torch.float64)
                ours(forget, retain)
                theirs(forget, retain)
                optimizer.zero_grad()
                (fastlur.losses.cross_entropy(plain, retain) - fastlur.losses.cross_entropy(plain, forget)).backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
                optimizer.step()
            ours.close()
            theirs.close()
            for p, q, r in zip(plain.parameters(), model.parameters(), foreign.parameters(), strict=True):
                torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(r, p, rtol=1e-5, atol=1e-7)
