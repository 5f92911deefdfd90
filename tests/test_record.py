"""The record of a run: what it says, what it keeps to itself, and that it is whole or not there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import signal
import stat
import threading
import time

import pytest
import torch
from helpers import Attention, blobs, mlp, run, same, state
from safetensors.torch import save

import fastlur
from fastlur import folder as folders
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
        class Slow(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.body = mlp()
                self.register_buffer("shift", torch.zeros(4), persistent=False)

            def forward(self, x):
                out = self.body(x)
                if self.training and torch.is_grad_enabled():
                    self.shift += 0.1 * out.detach().mean(0)
                return out + self.shift

        model, other = Slow(), Slow()
        directory = run(model, blobs(12), blobs(20)).save(tmp_path)
        assert bool(model.shift.any())
        read(directory).load(other)
        assert torch.equal(other.shift, model.shift)

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


def spoiled(method, at, count):
    """`method`, failing at its call number `at`."""

    def call(*args, **kwargs):
        count.append(1)
        if len(count) == at:
            raise OSError(28, "No space left on device")
        return method(*args, **kwargs)

    return call


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

    class Caching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp()
            self.register_buffer("cache", torch.zeros(1), persistent=False)

        def forward(self, x):
            self.cache = torch.zeros(max(len(x), len(self.cache)))
            return self.layer(x)

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


class TestWholeOrNotAtAll:
    @pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "os.open"])
    def test_a_failure_at_any_moment_leaves_the_old_record_or_the_new_one(self, job, tmp_path, monkeypatch, call):
        directory = run(*job).save(tmp_path)
        old = read(directory).content["model"]["checksum"]
        for at in itertools.count(1):
            result, count = run(*job), []
            with monkeypatch.context() as patch:
                where, _, name = call.rpartition(".")
                real = {"os.fsync": os.fsync, "os.open": os.open, "pathlib.Path.replace": folders.Path.replace}[call]
                patch.setattr(f"{where}.{name}", spoiled(real, at, count))
                failed = False
                try:
                    result.save(directory)
                except fastlur.RecordError:
                    failed = True
            now = read(directory).content["model"]["checksum"]
            if not failed:
                assert now != old
                break
            if now != old:  # the rename had happened
                assert read(directory).content["history"] == result.history
            old = now
        assert at > 2
        assert len(list(directory.iterdir())) == 2

    def test_the_first_record_that_cannot_be_written_leaves_nothing(self, job, tmp_path, monkeypatch):
        monkeypatch.setattr(folders.Path, "replace", spoiled(folders.Path.replace, 2, []))
        with pytest.raises(fastlur.RecordError, match="No space left"):
            run(*job).save(tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_reader_beside_a_writer_sees_one_of_them_whole(self, job, tmp_path):
        results = [run(*job) for _ in range(2)]
        states = []
        for index, result in enumerate(results):
            result.model, result.digest = mlp(), None
            result.settings = {"which": index}
            states.append(state(result.model))
        results[0].save(tmp_path)
        done = threading.Event()

        def write():
            for number in range(60):
                results[number % 2].save(tmp_path)
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = set()
        while not done.is_set():
            found = read(tmp_path)
            seen.add(found.content["settings"]["which"])
        writer.join()
        assert seen == {0, 1}
        assert same(state(read(tmp_path).load(mlp())), states[1])

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_writer_killed_at_random_moments_leaves_one_of_its_records(self, job, tmp_path):
        results = [run(*job) for _ in range(2)]
        for index, result in enumerate(results):
            result.model, result.settings, result.digest = mlp(), {"which": index}, None
        results[0].save(tmp_path)
        randomly, flush, left = random.Random(0), os.fsync, 0
        for _ in range(20):
            heard, says = os.pipe()
            child = os.fork()
            if not child:  # nothing but saving, with flushes that take their time
                try:
                    os.fsync = lambda handle: (time.sleep(0.003), flush(handle))
                    for number in itertools.count():
                        results[number % 2].save(tmp_path)
                        os.write(says, b".")
                finally:
                    os._exit(1)
            os.close(says)
            assert os.read(heard, 1)  # it has saved once
            os.close(heard)
            time.sleep(0.03 * randomly.random())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = read(tmp_path)
            assert same(state(found.load(mlp())), state(results[found.content["settings"]["which"]].model))
            left += len(os.listdir(tmp_path)) > 2
        assert left  # kills fell into writes
        fastlur.purge(tmp_path)
        assert len(os.listdir(tmp_path)) == 2

    def test_what_a_killed_writer_left_goes_with_the_next(self, job, tmp_path):
        directory = run(*job).save(tmp_path)
        (directory / ("model-" + "0" * 16 + ".safetensors")).write_bytes(save({}, metadata={"fastlur": "record"}))
        (directory / ".result.json.writing").write_bytes(b"half")
        (directory / "notes.txt").write_text("mine")
        run(*job).save(directory)
        assert len(list(directory.iterdir())) == 3
        assert (directory / "notes.txt").read_text() == "mine"

    def test_only_the_new_weights_are_there_afterwards(self, job, tmp_path):
        files = [written(run(*job).save(tmp_path))["model"]["file"] for _ in range(3)]
        assert sorted(path.name for path in tmp_path.iterdir()) == [files[-1], "result.json"]

    def test_a_directory_that_cannot_be_written_to_is_an_error_of_the_package(self, job, tmp_path):
        (tmp_path / "file").write_text("")
        for place in (tmp_path / "file", tmp_path / "file" / "under", "a\0b"):
            with pytest.raises(fastlur.RecordError, match="cannot be written"):
                run(*job).save(place)
        with pytest.raises(fastlur.ArgumentError, match="path=5"):
            run(*job).save(5)

    def test_another_writer_is_kept_out(self, job, tmp_path):
        held = folders.Folder(tmp_path)
        assert held.lock()
        with pytest.raises(fastlur.RecordError, match="in use"):
            run(*job).save(tmp_path)
        held.unlock()
        run(*job).save(tmp_path)

    def test_a_model_with_something_else_in_its_state_is_an_error_of_the_package(self, tmp_path):
        class Odd(torch.nn.Linear):
            def get_extra_state(self):
                return {"a": 1}

            def set_extra_state(self, state):
                pass

        result = run(Odd(6, 4), blobs(8), blobs(9))
        with pytest.raises(fastlur.RecordError, match="is no tensor"):
            result.save(tmp_path / "out")


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
