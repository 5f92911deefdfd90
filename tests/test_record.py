"""The record of a run: what it says, and what it keeps to itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import stat

import pytest
import torch
from helpers import Attention, blobs, mlp, run, same, state

import fastlur
from fastlur.content import fingerprint
from fastlur.losses import cross_entropy
from fastlur.methods import METHODS
from fastlur.record import read


@pytest.fixture
def job():
    return mlp(), blobs(12), blobs(20)


def written(directory):
    return json.loads((directory / "result.json").read_text())


def rows(data):
    return [tuple(part[i] for part in data) for i in range(len(data[0]))]


class Beside(torch.nn.Module):
    """A network with a buffer that its state_dict leaves out."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("kept", torch.zeros(4), persistent=False)


class TestWhatItSays:
    def test_model_settings_versions_data_and_history(self, job, tmp_path):
        result = run(*job)
        said = written(result.save(tmp_path / "out"))
        assert said["settings"]["method"]["name"] == "lur"
        assert said["versions"]["torch"] == torch.__version__
        assert said["history"] == result.history
        assert {side: items["items"] for side, items in said["data"].items()} == {"forget": 12, "retain": 20}
        assert (tmp_path / "out" / said["model"]["file"]).stat().st_size == said["model"]["bytes"]

    def test_the_model_comes_back(self, job, tmp_path):
        result = run(*job)
        directory = result.save(tmp_path)
        other = mlp()
        assert read(directory).load(other) is other
        assert same(state(other), state(job[0]))

    def test_a_tied_model_comes_back(self, tmp_path):
        words = lambda n: (torch.randint(0, 11, (n, 6)), torch.randint(0, 11, (n, 6)))
        model = Attention()
        directory = run(model, words(6), words(9)).save(tmp_path)
        other = read(directory).load(Attention())
        assert other.out.weight is other.embed.weight
        assert same(state(other), state(model))

    def test_buffers_that_a_state_dict_leaves_out_come_back(self, tmp_path):
        class Slow(Beside):
            def forward(self, x):
                out = self.body(x)
                if self.training and torch.is_grad_enabled():
                    self.kept += 0.1 * out.detach().mean(0)
                return out + self.kept

        model, other = Slow(), Slow()
        directory = run(model, blobs(12), blobs(20)).save(tmp_path)
        assert bool(model.kept.any())
        read(directory).load(other)
        assert torch.equal(other.kept, model.kept)

    @pytest.mark.parametrize("other", [mlp(7), mlp(classes=5), torch.nn.Linear(6, 4), mlp(dtype=torch.float64)])
    def test_another_model_is_refused_and_stays_as_it_was(self, job, tmp_path, other):
        directory, before = run(*job).save(tmp_path), state(other)
        with pytest.raises(fastlur.ModelError, match="does not fit the record"):
            read(directory).load(other)
        assert same(state(other), before)

    def test_metrics_are_an_evaluation_or_a_dict(self, job, tmp_path):
        result = run(*job)
        measured = fastlur.evaluate(result, forget=job[1], retain=job[2], test=job[2])
        said = written(result.save(tmp_path, before={"ua": 3.0}, after=measured))
        assert said["metrics"] == {"before": {"ua": 3.0}, "after": json.loads(json.dumps(measured.as_dict()))}
        assert "Not measured: figures of a retrained model." in said["statement"]

    @pytest.mark.parametrize("value", [7, {"x": torch.zeros(1)}, object(), [1.0]])
    def test_other_metrics_are_refused_and_nothing_is_written(self, job, tmp_path, value):
        with pytest.raises(fastlur.ArgumentError, match=r"after: a .* is neither"):
            run(*job).save(tmp_path / "out", after=value)
        assert not (tmp_path / "out").exists()

    def test_what_the_method_does_not_guarantee(self, job, tmp_path):
        for method in ("lur", "gradient_ascent", "fine_tune"):
            said = written(run(*job, method=method).save(tmp_path))["statement"]
            assert said[0] == METHODS[method].caveat
        assert METHODS["lur"].caveat != METHODS["fine_tune"].caveat

    def test_every_method_says_so_and_only_retraining_claims_to_be_exact(self):
        for name, method in METHODS.items():
            assert ("pproximate" in method.caveat) == (name != "retrain")

    def test_what_did_not_move_and_checkpoints_that_were_kept_are_named(self, job, tmp_path):
        result = run(*job, parameters="3.*", checkpoint=tmp_path / "c", keep_checkpoints=True)
        said = "\n".join(written(result.save(tmp_path / "out"))["statement"])
        assert "84 of 136 parameters were not moved" in said
        assert "fastlur purge" in said
        plain = "\n".join(written(run(*job).save(tmp_path / "out"))["statement"])
        assert "not moved" not in plain
        assert "purge" not in plain


class TestWhatItKeepsToItself:
    def test_without_the_key_a_guess_cannot_be_tested(self, job, tmp_path):
        result = run(*job)
        text = (result.save(tmp_path) / "result.json").read_text()
        assert result.key.hex() not in text
        assert not any(fingerprint(item).hex() in text for item in rows(job[1]))
        assert result.key.hex() not in repr(result)

    def test_two_runs_on_the_same_data_cannot_be_linked_nor_the_two_sides(self, job, tmp_path):
        one, two = (run(*job).save(tmp_path / name) for name in "ab")
        hashes = [written(d)["data"][side]["hashes"] for d, side in itertools.product((one, two), ("forget", "retain"))]
        same_sides = run(job[0], job[1], (*job[1][:1], job[1][1].clone()), allow_overlap=True).data
        hashes += [items.hashes for items in same_sides.values()]
        assert len(set().union(*hashes)) == sum(map(len, hashes))

    def test_the_key_is_drawn_without_touching_anybodys_random_state(self, job):
        before = torch.get_rng_state()
        keys = {run(*job).key for _ in range(3)}
        assert len(keys) == 3
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_key_goes_where_the_user_says_for_his_eyes_only(self, job, tmp_path):
        result, place = run(*job), tmp_path / "run.key"
        result.save(tmp_path / "out", key_file=place)
        assert bytes.fromhex(place.read_text()) == result.key
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        result.save(tmp_path / "out", key_file=place)  # once more is no harm
        with pytest.raises(fastlur.ArgumentError, match="another key"):
            run(*job).save(tmp_path / "out", key_file=place)

    @pytest.mark.parametrize("inside", ["run.key", "deeper/../run.key"])
    def test_the_key_does_not_lie_in_the_record(self, job, tmp_path, inside):
        with pytest.raises(fastlur.ArgumentError, match="lies in the record"):
            run(*job).save(tmp_path / "out", key_file=tmp_path / "out" / inside)

    def test_a_link_is_not_written_through_for_a_key(self, job, tmp_path):
        (tmp_path / "run.key").symlink_to(tmp_path / "precious")
        with pytest.raises(fastlur.FastlurError):
            run(*job).save(tmp_path / "out", key_file=tmp_path / "run.key")
        assert not (tmp_path / "precious").exists()


def test_it_is_of_the_run_and_of_no_later_one(job, tmp_path):
    """A second request that changes the same model, or anything else that does."""
    result = run(*job)
    with torch.no_grad():
        result.model[0].bias[0] += 1e-6
    with pytest.raises(fastlur.RecordError, match="has changed since the run"):
        result.save(tmp_path / "record", key_file=tmp_path / "key")
    assert not list(tmp_path.iterdir())


def test_what_a_forward_leaves_beside_the_state_is_no_change(tmp_path):
    """As a cache of positions does, which grows with what is asked: `evaluate` comes before `save(after=…)`."""

    class Caching(Beside):
        def forward(self, x):
            self.kept = torch.zeros(max(len(x), len(self.kept)))
            return self.body(x)

    result = run(Caching(), blobs(12), blobs(20))
    after = fastlur.evaluate(result.model, forget=blobs(12), retain=blobs(200), test=blobs(30))
    assert result.save(tmp_path, after=after) == tmp_path


def test_a_state_that_cannot_be_read_costs_no_run(monkeypatch):
    model, steps = mlp(), []
    refuse = lambda event: setattr(event.model, "state_dict", lambda *_, **__: 1 / 0) or steps.append(event.step)
    result = run(model, blobs(12), blobs(20), steps=3, callbacks=[refuse])
    assert result.digest is None
    assert steps == [1, 2, 3]


def test_a_state_that_cannot_be_read_any_more_is_not_called_changed(job, tmp_path):
    result = run(*job)
    result.model.state_dict = lambda *_, **__: 1 / 0
    with pytest.raises(fastlur.RecordError, match="its state cannot be read, as it could at the end of the run"):
        result.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["path", "key_file"])
def test_an_empty_path_is_not_the_working_directory(job, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastlur.ArgumentError, match=f"{kind}=''"):
        run(*job).save(**({"path": ""} if kind == "path" else {"path": "record", "key_file": ""}))
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Secretive:
    secret: object
    by: float = 2.0

    def __call__(self, model, batch):
        return -cross_entropy(model, batch) * self.by


def with_secret(model, batch, secret=None, by=1.0):
    return -cross_entropy(model, batch) * by


@pytest.mark.parametrize("kind", ["partial", "dataclass", "closure", "text"])
def test_what_a_loss_or_a_metric_holds_is_not_in_it(job, tmp_path, kind):
    """Neither as values nor as a hash, by which a guess could be tested."""
    secret = torch.full((3,), 0.123456789) if kind != "text" else "the very words"
    loss = {
        "partial": functools.partial(with_secret, secret=secret, by=3.0),
        "dataclass": Secretive(secret),
        "closure": lambda model, batch: with_secret(model, batch, secret),
        "text": functools.partial(with_secret, secret=secret),
    }[kind]
    rules = [
        fastlur.stopping.Reached(lambda model: float(len(secret)), at_least=99),
        fastlur.stopping.Patience(functools.partial(lambda s, model: 1.0, secret), looks=99),
        lambda event: secret is None,
        fastlur.stopping.TimeBudget(600),
    ]
    result = run(*job, forget_loss=loss, stop=rules, method=fastlur.LUR(inner_lr=0.1))
    directory = result.save(tmp_path)
    text = (directory / "result.json").read_text()
    for found in ("0.1234", "very words", "tensor("):
        assert found not in text
    settings = json.dumps(json.loads(text)["settings"])
    assert "#" not in settings
    assert {"partial": "by=3.0", "dataclass": "Secretive(by=2.0)"}.get(kind, "") in settings
    assert "Reached(" in settings and "at_least=99" in settings and "TimeBudget(seconds=600" in settings


def test_what_is_not_measured_is_null(job, tmp_path):
    text = (run(*job, method="fine_tune", steps=2).save(tmp_path) / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["history"]["forget_loss"] == [None, None]
