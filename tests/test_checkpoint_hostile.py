"""A checkpoint made by an attacker cannot run code, reach outside its directory or leave a wrong model behind."""

from __future__ import annotations

import json
import os
import struct
from hashlib import blake2b

import pytest
import torch
from checkpoints import NEWEST
from helpers import blobs, same, state

import fastlur


def forged(two, change, tensors=None):
    """A checkpoint 3 with all its checksums in order, made by somebody who knows how."""
    record = json.loads(two.files[NEWEST[0]])["record"] | {"step": 3}
    payload = two.files[NEWEST[1]] if tensors is None else tensors
    record["checksum"] = blake2b(payload, digest_size=32).hexdigest()
    changed = change(record)
    record = record if changed is None else changed
    two.spoil("fastlur-step-00000003.safetensors", payload)
    checksum = blake2b(json.dumps(record).encode(), digest_size=32).hexdigest()
    two.spoil(
        "fastlur-step-00000003.json",
        json.dumps({"fastlur": "checkpoint", "record": record, "checksum": checksum}).encode(),
    )


def tensors_file(header, content=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


HOSTILE_TENSORS = {
    "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "empty": b"",
    "a header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "a header of all the memory there is": struct.pack("<Q", 2**63 - 1) + b"{}",
    "a header that is no JSON": tensors_file(b"\xff" * 64),
    "a deeply nested header": tensors_file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "an absurd size": tensors_file(
        {"weight/0.weight": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64 - 1]}}
    ),
    "a size that overflows": tensors_file(
        {"weight/0.weight": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}
    ),
    "offsets beyond the end": tensors_file(
        {"weight/0.weight": {"dtype": "F32", "shape": [9], "data_offsets": [10**6, 10**6 + 36]}}, b"\0" * 36
    ),
    "offsets backwards": tensors_file({"weight/0.weight": {"dtype": "F32", "shape": [9], "data_offsets": [36, 0]}}),
    "a negative size": tensors_file({"weight/0.weight": {"dtype": "F32", "shape": [-9], "data_offsets": [0, 36]}}),
    "names that are paths": tensors_file(
        {"../../../tmp/x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
}


def _put(*path_and_value):
    *path, last, value = path_and_value

    def change(record):
        at = record
        for each in path:
            at = at[each]
        at[last] = value

    return change


HOSTILE_RECORDS = {
    "no record": lambda record: [],
    "nothing in it": lambda record: {},
    "a list for settings": _put("settings", []),
    "no vectors": _put("vectors", 5),
    "vectors that are paths": _put("vectors", ["../../../../tmp/x"]),
    "an optimizer out of nothing": _put("optimizer", {}),
    "an optimizer that is none": _put("optimizer", {"dict": [["state", {"tensor": "weight/0.weight"}]]}),
    "an object": _put("optimizer", {"py/reduce": "os.system"}),
    "random states of another kind": _put("random", {"plain": None}),
    "a random state that is too short": _put(
        "random", "dict", [["torch", {"tensor": "control"}], ["python", {"tuple": []}], ["numpy", {"list": []}]]
    ),
    "a method of another kind": _put("method", "os.system"),
    "deeply nested": lambda record: _put("optimizer", _nested(300))(record),
}


def _nested(depth):
    value = {"plain": None}
    for _ in range(depth):
        value = {"list": [value]}
    return value


class TestHostileFiles:
    """Checksums are no signatures: whoever can write there can make them. What is read is data all the same."""

    @pytest.mark.parametrize("case", HOSTILE_TENSORS)
    def test_tensors_that_are_none(self, two, case):
        forged(two, lambda record: None, HOSTILE_TENSORS[case])
        before = state(two.step.space.model)
        with pytest.raises(fastlur.CheckpointError, match="step 3 does not fit this run"):
            two.at.restore(two.step, two.at.newest())
        assert same(state(two.step.space.model), before)

    @pytest.mark.parametrize("case", HOSTILE_RECORDS)
    def test_descriptions_that_are_none(self, two, case):
        forged(two, HOSTILE_RECORDS[case])
        before, random_states = state(two.step.space.model), torch.get_rng_state()
        found = self.found(two)
        if found is None or found.record["step"] == 2:
            return
        with pytest.raises(fastlur.CheckpointError) as caught:
            two.at.restore(two.step, found)
        assert "\n" not in str(caught.value)
        assert same(state(two.step.space.model), before)
        assert torch.equal(torch.get_rng_state(), random_states)

    @staticmethod
    def found(two):
        try:
            return two.at.newest()
        except fastlur.CheckpointError:
            return None

    @pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 10_000, b'{"record": 1e999}', b"\xff\xfe", b"null", b"[]"])
    def test_text_that_is_no_description_gives_the_older_one(self, two, text):
        two.spoil("fastlur-step-00000003.json", text)
        assert two.reads() == 2

    def test_pickles_under_our_names_are_not_run(self, two, tmp_path_factory):
        import pickle

        place = tmp_path_factory.mktemp("outside")
        marker = place / "ran"

        class Runs:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        bomb = pickle.dumps(Runs())
        archive = place / "bomb.pt"
        torch.save({"x": Runs()}, archive)
        for content in (bomb, archive.read_bytes()):
            for name in NEWEST:
                two.spoil(name, content)
                assert two.reads() == 1
                two.mend()
            forged(two, lambda record: None, content)
            with pytest.raises(fastlur.CheckpointError):
                two.at.restore(two.step, two.at.newest())
            for name in ("fastlur-step-00000003.json", "fastlur-step-00000003.safetensors"):
                (two.directory / name).unlink()
        assert not marker.exists()
        pickle.loads(bomb)
        assert marker.exists()  # it was a live one

    @pytest.mark.parametrize(
        "name", [".fastlur-step-00000003.safetensors.writing", ".fastlur-step-00000003.json.writing"]
    )
    def test_links_are_not_written_through(self, two, tmp_path_factory, name):
        outside = tmp_path_factory.mktemp("outside") / "precious"
        outside.write_text("mine")
        (two.directory / name).symlink_to(outside)
        two.step(blobs(8, 2, 2), blobs(8, 2, 2))
        two.at.save(two.step, {"history": {}})
        assert outside.read_text() == "mine"
        assert not any(path.is_symlink() for path in two.directory.iterdir())

    def test_links_under_our_names_are_replaced_and_removed_and_what_they_point_at_stays(self, two, tmp_path_factory):
        outside = tmp_path_factory.mktemp("outside") / "precious"
        outside.write_text("mine")
        for name in ("fastlur-step-00000003.json", "fastlur-step-00000003.safetensors", "fastlur-step-00000000.json"):
            (two.directory / name).symlink_to(outside)
        two.step(blobs(8, 2, 2), blobs(8, 2, 2))
        two.at.save(two.step, {"history": {}})
        two.at.purge()
        assert outside.read_text() == "mine"
        assert list(two.directory.iterdir()) == []

    @pytest.mark.parametrize("kind", ["link", "pipe", "directory", "device"])
    def test_what_is_no_plain_file_is_not_read(self, two, tmp_path_factory, kind):
        for name in NEWEST:
            place = two.directory / name
            place.unlink()
            if kind == "link":
                copy = tmp_path_factory.mktemp("elsewhere") / name
                copy.write_bytes(two.files[name])
                place.symlink_to(copy)
            elif kind == "pipe":
                os.mkfifo(place)  # reading it would wait for ever
            elif kind == "directory":
                place.mkdir()
            else:
                place.symlink_to("/dev/zero")
        assert two.reads() == 1

    def test_a_description_larger_than_any_is_not_read(self, two):
        with (two.directory / "fastlur-step-00000003.json").open("wb") as file:
            file.truncate(1 << 40)  # takes no room on the disk
        assert two.reads() == 2

    def test_nor_one_with_more_than_its_steps_can_fill(self, two):
        """The text of an intact one, with blanks that mean nothing: 17 MB are too many after three steps."""
        forged(two, lambda record: None)
        place = two.directory / "fastlur-step-00000003.json"
        text = place.read_bytes()
        place.write_bytes(text + b" " * (1 << 20))
        assert two.at.newest().record["step"] == 3
        place.write_bytes(text + b" " * (17 << 20))
        assert two.at.newest().record["step"] == 2

    def test_one_that_could_not_be_read_again_is_not_written(self, two):
        two.step(blobs(8, 2, 2), blobs(8, 2, 2))
        with pytest.raises(
            fastlur.CheckpointError, match=r"its description has \d+ bytes, and could not be read again"
        ):
            two.at.save(two.step, {"history": {}, "rules": ["x" * (17 << 20)]})
        assert two.reads() == 2

    def test_a_file_that_is_exchanged_after_it_was_looked_at_is_not_taken(self, two, monkeypatch):
        """Between the checksum and the reading, and while it is read."""
        found, before = two.at.newest(), state(two.step.space.model)
        two.spoil(NEWEST[1], two.files["fastlur-step-00000001.safetensors"])
        with pytest.raises(fastlur.CheckpointError, match="its tensors have changed since they were found"):
            two.at.restore(two.step, found)
        assert same(state(two.step.space.model), before)
        two.mend()
        found = two.at.newest()
        from fastlur import checkpoint

        opened = checkpoint.safe_open

        def exchanged(path, **options):
            other = two.directory / "other"
            other.write_bytes(two.files["fastlur-step-00000001.safetensors"])
            other.replace(two.directory / NEWEST[1])
            return opened(path, **options)

        monkeypatch.setattr(checkpoint, "safe_open", exchanged)
        two.at.restore(two.step, found)
        assert same(state(two.step.space.model), two.weights[2])

    def test_names_cannot_leave_the_directory(self, two):
        for name in ("../x", "a/b", "..", ".", "", "/etc/passwd", "a\0b"):
            for action in (two.at.folder.read, two.at.folder.write):
                with pytest.raises(OSError, match="is no name of a file"):
                    action(name, 9 if action == two.at.folder.read else b"")
        assert sorted(path.name for path in two.directory.iterdir()) == sorted(two.files)

    def test_numbers_of_steps_are_digits(self, two):
        for name in (
            "fastlur-step-../../xx.json",
            "fastlur-step-0000000٣.json",
            "fastlur-step-00000003.json/..",
            "fastlur-step-99999999999.json",
        ):
            if "/" not in name:
                two.spoil(name, b"{}")
        assert two.reads() == 2
