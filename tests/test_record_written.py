"""A record is written whole or not at all, whatever fails, kills or reads beside."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time

import pytest
import torch
from helpers import blobs, mlp, run, same, state
from safetensors.torch import save

import fastlur
from fastlur import folder as folders
from fastlur.record import read


@pytest.fixture
def job():
    return mlp(), blobs(12), blobs(20)


def spoiled(method, at, count):
    """`method`, failing at its call number `at`."""

    def call(*args, **kwargs):
        count.append(1)
        if len(count) == at:
            raise OSError(28, "No space left on device")
        return method(*args, **kwargs)

    return call


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "os.open"])
def test_a_failure_at_any_moment_leaves_the_old_record_or_the_new_one(job, tmp_path, monkeypatch, call):
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


def test_the_first_record_that_cannot_be_written_leaves_nothing(job, tmp_path, monkeypatch):
    monkeypatch.setattr(folders.Path, "replace", spoiled(folders.Path.replace, 2, []))
    with pytest.raises(fastlur.RecordError, match="No space left"):
        run(*job).save(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_reader_beside_a_writer_sees_one_of_them_whole(job, tmp_path):
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
def test_a_writer_killed_at_random_moments_leaves_one_of_its_records(job, tmp_path):
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


def test_what_a_killed_writer_left_goes_with_the_next(job, tmp_path):
    directory = run(*job).save(tmp_path)
    (directory / ("model-" + "0" * 16 + ".safetensors")).write_bytes(save({}, metadata={"fastlur": "record"}))
    (directory / ".result.json.writing").write_bytes(b"half")
    (directory / "notes.txt").write_text("mine")
    run(*job).save(directory)
    assert len(list(directory.iterdir())) == 3
    assert (directory / "notes.txt").read_text() == "mine"


def test_only_the_new_weights_are_there_afterwards(job, tmp_path):
    files = [read(run(*job).save(tmp_path)).content["model"]["file"] for _ in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [files[-1], "result.json"]


def test_a_directory_that_cannot_be_written_to_is_an_error_of_the_package(job, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "under", "a\0b"):
        with pytest.raises(fastlur.RecordError, match="cannot be written"):
            run(*job).save(place)
    with pytest.raises(fastlur.ArgumentError, match="path=5"):
        run(*job).save(5)


def test_another_writer_is_kept_out(job, tmp_path):
    held = folders.Folder(tmp_path)
    assert held.lock()
    with pytest.raises(fastlur.RecordError, match="in use"):
        run(*job).save(tmp_path)
    held.unlock()
    run(*job).save(tmp_path)


def test_a_model_with_something_else_in_its_state_is_an_error_of_the_package(tmp_path):
    class Odd(torch.nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    result = run(Odd(6, 4), blobs(8), blobs(9))
    with pytest.raises(fastlur.RecordError, match="is no tensor"):
        result.save(tmp_path / "out")
