"""Whatever happens to a checkpoint's files, a run goes on from a right one or says that it cannot: never a wrong model.

`make check-slow` tries every byte of both files instead of a sample.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import NEWEST, OLDER, Two, break_off, go_on, job, whole
from helpers import blobs, same, state

import fastlur
from fastlur import folder as folder_module
from fastlur.checkpoint import Checkpoints


def flipped(content, bit):
    spoiled = bytearray(content)
    spoiled[bit // 8] ^= 1 << bit % 8
    return bytes(spoiled)


def sample(size, count):
    """The first and last places, and others at random."""
    drawn = random.Random(1).sample(range(size), min(count, size))
    return sorted({*range(min(size, 24)), size - 1, *drawn})


class TestDamage:
    @pytest.mark.parametrize("name", NEWEST)
    def test_a_flipped_bit_anywhere_gives_the_older_one(self, two, name):
        self.flip(two, name, sample(8 * len(two.files[name]), 150))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", NEWEST)
    def test_a_flipped_bit_in_every_byte_gives_the_older_one(self, two, name):
        drawn = random.Random(2)
        self.flip(two, name, [8 * byte + drawn.randrange(8) for byte in range(len(two.files[name]))])

    def flip(self, two, name, bits):
        """`reads` has compared every bit of what it restored with what was saved."""
        found = []
        for bit in bits:
            two.spoil(name, flipped(two.files[name], bit))
            found.append(two.reads())
        assert set(found) <= {1, 2}
        assert found.count(2) <= 0.02 * len(found)  # as in `"a" :1` for `"a": 1`, nothing that means anything
        print(f"\n{len(found)} bits of {name}: {found.count(1)} times the older one")

    @pytest.mark.parametrize("name", NEWEST)
    def test_a_file_cut_off_at_any_length_gives_the_older_one(self, two, name):
        for length in sample(len(two.files[name]), 60):
            two.spoil(name, two.files[name][:length])
            assert two.reads() == 1
        two.spoil(name, two.files[name] + b"\0")
        assert two.reads() == 1

    @pytest.mark.parametrize("pair", [(NEWEST[0], OLDER[0]), (NEWEST[1], OLDER[1]), (NEWEST[0], OLDER[1])])
    def test_both_damaged_is_an_error_that_names_both(self, two, pair):
        for length in (0, 1, 7, 100):
            for name in pair:
                two.spoil(name, two.files[name][:length])
            with pytest.raises(
                fastlur.CheckpointError, match=r"none in .* is intact \(step 2: .*; step 1: .*\)"
            ) as one:
                two.reads()
            assert "\n" not in str(one.value)
        two.mend()
        assert two.reads() == 2

    def test_files_that_change_places_are_noticed(self, two):
        for name in OLDER:
            two.spoil(name.replace("1", "9"), two.files[name])
        assert two.reads() == 2  # not the old one under a new name
        two.mend()
        two.spoil(NEWEST[1], two.files[OLDER[1]])
        assert two.reads() == 1

    def test_a_missing_file_is_no_checkpoint(self, two):
        for gone in NEWEST:
            two.mend()
            (two.directory / gone).unlink()
            assert two.reads() == 1
        assert two.reads() == 1

    def test_what_a_crash_left_is_removed_when_the_run_goes_on(self, two):
        left = (
            ".fastlur-step-00000003.json.writing",
            "fastlur-step-00000003.safetensors",
            ".fastlur-step-00000003.safetensors.writing",
        )
        ending = lambda name: "safetensors" if "safetensors" in name else "json"
        for name in left:
            two.spoil(name, two.files[f"fastlur-step-00000002.{ending(name)}"][:50])
        for name in ("notes.txt", "fastlur-step-1.json", "fastlur-step-00000003.json.bak"):
            two.spoil(name, b"half")
        assert two.reads() == 2
        assert not {path.name for path in two.directory.iterdir()} & set(left)
        assert (two.directory / "notes.txt").read_bytes() == b"half"
        assert (two.directory / "fastlur-step-00000003.json.bak").exists()

    @pytest.mark.parametrize("name", NEWEST)
    def test_a_whole_run_over_a_damaged_checkpoint_ends_like_an_undisturbed_one(self, tmp_path, name):
        args = job(tmp_path)
        break_off(*args)
        file = tmp_path / name.replace("2", "4")
        file.write_bytes(flipped(file.read_bytes(), 8 * 200))
        resumed, steps = go_on(*args)
        assert steps[0] == 3
        assert same(state(resumed), state(whole(*args)))


CALLS = 12  # two files: made, half written, written, flushed to the disk, renamed, the directory flushed


class Failing:
    """Lets one call after another of those that write fail, by its number."""

    def __init__(self, monkeypatch, at, code=errno.ENOSPC):
        self.count, self.at, self.code = 0, at, code
        real_open, real_fsync, real_fdopen, real_replace = os.open, os.fsync, open, Path.replace

        class File:
            def __init__(self, handle, *mode, **options):
                self.file = real_fdopen(handle, *mode, **options)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(_, content):
                _.file.write(content[: len(content) // 2])
                self.fail()
                _.file.write(content[len(content) // 2 :])

            def flush(_):
                _.file.flush()
                self.fail()

            def fileno(self):
                return self.file.fileno()

        def opened(path, flags, *mode):
            if flags & os.O_CREAT:
                self.fail()
            return real_open(path, flags, *mode)

        def flushed(handle):
            self.fail()
            real_fsync(handle)

        def replaced(path, target):
            self.fail()
            return real_replace(path, target)

        monkeypatch.setattr(folder_module.os, "open", opened)
        monkeypatch.setattr(folder_module.os, "fsync", flushed)
        monkeypatch.setattr(folder_module, "open", File, raising=False)
        monkeypatch.setattr(Path, "replace", replaced)

    def fail(self):
        self.count += 1
        if self.count == self.at:
            raise OSError(self.code, os.strerror(self.code))


class TestDisk:
    def test_a_disk_that_fills_up_at_any_call_leaves_the_older_checkpoints(self, two, monkeypatch):
        two.step(blobs(8, 2, 2), blobs(8, 2, 2))
        for number in range(1, CALLS + 1):
            with monkeypatch.context() as patch:
                failing = Failing(patch, number)
                with pytest.raises(fastlur.CheckpointError, match=r"3 could not be written: .*No space left on device"):
                    two.at.save(two.step, {"history": {}})
            assert failing.count == number
            assert sorted(path.name for path in two.directory.iterdir()) == sorted(two.files)
            assert two.reads() == 2
            two.step(blobs(8, 2, 2), blobs(8, 2, 2))
        with monkeypatch.context() as patch:
            failing = Failing(patch, CALLS + 1)
            two.at.save(two.step, {"history": {}})
        assert failing.count == CALLS

    def test_nor_does_memory_that_runs_out(self, two, monkeypatch):
        def short(*_, **__):
            raise MemoryError

        two.step(blobs(8, 2, 2), blobs(8, 2, 2))
        monkeypatch.setattr("fastlur.checkpoint.safetensors.torch.save", short)
        with pytest.raises(fastlur.CheckpointError, match="3 could not be written: MemoryError"):
            two.at.save(two.step, {"history": {}})
        monkeypatch.undo()
        assert two.reads() == 2

    def test_a_run_whose_disk_is_full_says_so_and_goes_on_later(self, tmp_path, monkeypatch):
        args = job(tmp_path)
        undisturbed = whole(*args)
        with monkeypatch.context() as patch:
            Failing(patch, 6 + 2 * CALLS + 8)  # after the trial file, in the third checkpoint
            with pytest.raises(fastlur.CheckpointError, match="fastlur-step-00000006 could not be written"):
                go_on(*args)
        resumed, steps = go_on(*args)
        assert steps == [5, 6, 7, 8, 9]
        assert same(state(resumed), state(undisturbed))

    def test_a_limit_of_the_system_on_the_size_of_files(self, tmp_path):
        code = (
            "import resource, sys, torch, fastlur\n"
            "x, y = torch.randn(40, 64), torch.arange(40) % 4\n"
            "model = torch.nn.Linear(64, 4)\n"
            "before = model.weight.clone()\n"
            "seen = {}\n"
            "def limit(event):\n"
            "    seen[event.step] = event.model.weight.detach().clone()\n"
            "    if event.step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "try:\n"
            "    fastlur.unlearn(model, (x[:8], y[:8]), (x[8:], y[8:]), steps=9, progress=False,\n"
            "                    checkpoint=sys.argv[1], checkpoint_every=2, callbacks=[limit])\n"
            "except fastlur.CheckpointError as error:\n"
            "    print(error, torch.equal(model.weight, seen[4]), max(seen))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert "fastlur-step-00000004 could not be written: [Errno 27] File too large True 4" in done.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "fastlur-step-00000002.json",
            "fastlur-step-00000002.safetensors",
        ]

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
    def test_a_directory_that_cannot_be_written_is_refused_before_anything_changes(self, tmp_path, monkeypatch, code):
        model, data, options = job(tmp_path, method="ssd")
        before = state(model)
        with monkeypatch.context() as patch:
            Failing(patch, 1, code)
            with pytest.raises(fastlur.CheckpointError, match="cannot be written to") as caught:
                fastlur.unlearn(model, *data, **options)
        assert repr(str(tmp_path)) in str(caught.value)
        assert same(state(model), before)

    def test_a_file_or_nothing_where_the_directory_should_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere", "a\0b"):
            model, data, options = job(place)
            with pytest.raises(fastlur.CheckpointError, match="cannot be written to"):
                fastlur.unlearn(model, *data, **options)

    @pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="nothing is read-only for root")
    def test_a_read_only_directory(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(fastlur.CheckpointError, match="cannot be written to"):
            fastlur.unlearn(job()[0], *job()[1], checkpoint=tmp_path)

    def test_weights_that_cannot_be_removed_at_the_end_are_warned_of_and_the_result_is_not_lost(self, tmp_path):
        model, data, options = job(tmp_path)

        def obstruct(event):
            if event.step == 9:
                (tmp_path / "fastlur-step-00000001.json").mkdir()

        with pytest.warns(UserWarning, match="holds weights from before, and they could not be removed"):
            result = fastlur.unlearn(model, *data, **options, callbacks=[obstruct])
        assert result.ended == "all steps done"
        assert not list(tmp_path.glob("*.safetensors"))  # the others are gone
        assert result.settings["checkpoints_kept"]  # and a record says that some are not


def test_a_checkpoint_of_another_run_is_not_restored_however_intact(tmp_path):
    made = Two(tmp_path)
    made.close()
    with pytest.raises(fastlur.CheckpointError, match="a was 1, now 2"):
        Checkpoints(tmp_path, {"a": 2}).newest()
