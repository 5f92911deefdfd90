"""`verify`, as a function and as a command, on honest, damaged and hostile directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import blake2b

import pytest
import torch
from helpers import blobs, mlp, run, same, state
from safetensors.torch import save_file
from test_checkpoint_hostile import HOSTILE_TENSORS
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.__main__ import main


@pytest.fixture
def data():
    return blobs(12), blobs(20)


@pytest.fixture
def result(data):
    return run(mlp(), *data)


class TestVerify:
    def test_a_record_is_intact(self, result, tmp_path):
        assert fastlur.verify(result.save(tmp_path)).ok

    @pytest.mark.parametrize("which", ["result.json", "weights"])
    def test_one_flipped_bit_anywhere_is_found(self, result, tmp_path, which):
        directory = result.save(tmp_path)
        file = fastlur.record.read(directory).weights if which == "weights" else directory / which
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 200)):
            spoiled = bytearray(content)
            spoiled[place] ^= 1 << place % 8
            file.write_bytes(spoiled)
            try:
                found = fastlur.verify(directory).record.content
            except fastlur.RecordError:
                continue
            file.write_bytes(content)
            assert found == fastlur.record.read(directory).content  # white space between the values
        file.write_bytes(content)
        assert fastlur.verify(directory).ok

    @pytest.mark.parametrize("missing", ["result.json", "weights", "directory"])
    def test_what_is_missing_is_named(self, result, tmp_path, missing):
        directory = result.save(tmp_path)
        if missing == "directory":
            directory = tmp_path / "nowhere"
        else:
            (fastlur.record.read(directory).weights if missing == "weights" else directory / missing).unlink()
        with pytest.raises(fastlur.RecordError, match=r"is not intact: .*No such file"):
            fastlur.verify(directory)
        assert not (tmp_path / "nowhere").exists()

    def test_the_items_are_recognised_in_any_order_and_container(self, result, data, tmp_path):
        directory, order = result.save(tmp_path), torch.randperm(12)
        (inputs, targets), retain = data
        shuffled = inputs[order], targets[order]
        for forget in (
            shuffled,
            TensorDataset(*shuffled),
            DataLoader(TensorDataset(*shuffled), 5),
            {"inputs": inputs, "targets": targets},
        ):
            found = fastlur.verify(directory, forget=forget, retain=retain, key=result.key)
            assert found.ok
            assert "the 12 given are those of the record" in str(found)

    def test_other_items_are_told_and_counted(self, result, data, tmp_path):
        directory, (inputs, targets) = result.save(tmp_path), data[0]
        changed = inputs.clone()
        changed[3, 2] += 1e-6
        for given, match in {
            (changed, targets): (12, 12, 11),
            (inputs[:5], targets[:5]): (5, 12, 5),
            (inputs, (targets + 1) % 4): (12, 12, 0),
            data[1]: (20, 12, 0),
        }.items():
            found = fastlur.verify(directory, forget=given, key=result.key)
            assert tuple(vars(found.matches["forget"]).values()) == match
            assert not found.ok

    def test_another_key_recognises_nothing(self, result, data, tmp_path):
        found = fastlur.verify(result.save(tmp_path), forget=data[0], key=bytes(32))
        assert found.matches["forget"].common == 0

    def test_data_that_draw_at_random_are_recognised_as_they_were_passed(self, data, tmp_path):
        class Noisy(TensorDataset):
            def __getitem__(self, index):
                x, y = super().__getitem__(index)
                return x + torch.randn(()), y

        noisy = Noisy(*data[0])
        result = run(mlp(), noisy, data[1])
        before = torch.get_rng_state()
        assert fastlur.verify(result.save(tmp_path), forget=noisy, key=result.key).ok
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("key", [None, b"short", "nowhere.key", 5])
    def test_what_is_no_key_is_refused(self, result, data, tmp_path, key):
        with pytest.raises(fastlur.ArgumentError, match="key"):
            fastlur.verify(result.save(tmp_path), forget=data[0], key=key)

    def test_data_that_are_none_are_refused(self, result, tmp_path):
        class Broken(torch.utils.data.Dataset):
            def __len__(self):
                return 3

            def __getitem__(self, index):
                raise ZeroDivisionError

        for given in (5, [], iter([]), Broken()):
            with pytest.raises(fastlur.FastlurError):
                fastlur.verify(result.save(tmp_path), forget=given, key=result.key)


def forge(directory, change=lambda record: None, weights=None):
    """Change a record as somebody would who can make its checksums."""
    text = directory / "result.json"
    record = json.loads(text.read_text())
    del record["checksum"]
    if weights is not None:
        (directory / record["model"]["file"]).write_bytes(weights)
        record["model"] |= {"bytes": len(weights), "checksum": blake2b(weights, digest_size=32).hexdigest()}
    change(record)
    checksum = blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=32).hexdigest()
    text.write_text(json.dumps({**record, "checksum": checksum}))


def _name(name):
    return lambda record: record["model"].update(file=name)


HOSTILE = {
    "a path out of it": _name("../outside.safetensors"),
    "an absolute path": _name("/etc/passwd"),
    "a name that is no text": _name(7),
    "another of its files": _name("result.json"),
    "a size that is no number": lambda record: record["model"].update(bytes="many"),
    "no model": lambda record: record.pop("model"),
    "another format": lambda record: record.update(format=99),
}


class TestHostileRecords:
    def test_a_forgery_that_changes_nothing_passes(self, result, tmp_path):
        directory = result.save(tmp_path)
        forge(directory)
        assert fastlur.verify(directory).ok

    @pytest.mark.parametrize("case", HOSTILE)
    def test_descriptions(self, result, tmp_path, case):
        directory = result.save(tmp_path / "record")
        (tmp_path / "outside.safetensors").write_bytes(fastlur.record.read(directory).weights.read_bytes())
        forge(directory, HOSTILE[case])
        with pytest.raises(fastlur.RecordError, match="is not intact"):
            fastlur.verify(directory)

    @pytest.mark.parametrize("case", HOSTILE_TENSORS)
    def test_weights(self, result, tmp_path, case):
        directory = result.save(tmp_path)
        forge(directory, weights=HOSTILE_TENSORS[case])
        model = mlp()
        before = state(model)
        with pytest.raises(fastlur.FastlurError):
            fastlur.record.read(directory).load(model)
        assert same(state(model), before)

    @pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b"null", b"[]", b"{}", b""])
    def test_text_that_is_no_description(self, result, tmp_path, text):
        directory = result.save(tmp_path)
        (directory / "result.json").write_bytes(text)
        with pytest.raises(fastlur.RecordError, match="is not intact"):
            fastlur.verify(directory)

    @pytest.mark.parametrize("kind", ["link", "pipe", "directory", "endless"])
    @pytest.mark.parametrize("which", ["result.json", "weights"])
    def test_what_is_no_plain_file_is_not_read(self, result, tmp_path, kind, which):
        directory = result.save(tmp_path / "record")
        place = fastlur.record.read(directory).weights if which == "weights" else directory / which
        if kind == "link":
            place.symlink_to(place.rename(tmp_path / "elsewhere"))
        else:
            place.unlink()
            {"pipe": os.mkfifo, "directory": os.mkdir, "endless": lambda p: p.symlink_to("/dev/zero")}[kind](place)
        with pytest.raises(fastlur.RecordError, match="is not intact"):
            fastlur.verify(directory)

    def test_links_are_not_written_through(self, result, tmp_path):
        directory, outside = tmp_path / "record", tmp_path / "precious"
        result.save(directory)
        outside.write_text("mine")
        weights = fastlur.record.read(directory).weights
        for name in ("result.json", ".result.json.writing", weights.name, f".{weights.name}.writing"):
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(outside)
        result.save(directory)
        assert outside.read_text() == "mine"
        assert fastlur.verify(directory).ok

    @pytest.mark.parametrize(
        "change", [{"data": {}}, {"data": 5}, {"settings": {"batch_size": -1, "seed": 0}}, {"settings": []}]
    )
    def test_records_without_usable_hashes(self, result, data, tmp_path, change):
        directory = result.save(tmp_path)
        forge(directory, lambda record: record.update(change))
        with pytest.raises(fastlur.RecordError, match="no hashes to compare with"):
            fastlur.verify(directory, forget=data[0], key=result.key)

    @pytest.mark.parametrize(
        "change", [{"settings": []}, {"versions": 5}, {"statement": 7}, {"settings": {"method": "lur"}}]
    )
    def test_what_it_says_of_itself_may_be_of_any_kind(self, result, tmp_path, change):
        directory = result.save(tmp_path)
        forge(directory, lambda record: record.update(change))
        assert "intact" in str(fastlur.verify(directory))

    def test_it_cannot_print_a_verdict_of_its_own(self, result, tmp_path):
        directory = result.save(tmp_path)
        lie = "0.1\nforget: the 100 given are those of the record\x1b[31m"
        forge(directory, lambda record: record.update(versions={"fastlur": lie}, statement=[lie]))
        said = str(fastlur.verify(directory))
        assert not [line for line in said.splitlines() if line.startswith("forget: ")]
        assert "\x1b" not in said


class TestCommand:
    def call(self, *arguments):
        command = [sys.executable, "-m", "fastlur", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_as_a_program(self, result, tmp_path):
        directory = result.save(tmp_path)
        good = self.call("verify", directory)
        assert good.returncode == 0
        assert "intact" in good.stdout
        assert "not certified deletion" in good.stdout
        (directory / "result.json").write_text("{}")
        bad = self.call("verify", directory)
        assert bad.returncode == 1
        assert "is not intact" in bad.stderr
        assert "Traceback" not in bad.stderr

    def test_with_data(self, result, data, tmp_path, capsys):
        directory = result.save(tmp_path / "record", key_file=tmp_path / "key")
        for name, (inputs, targets) in zip(("forget", "retain"), data, strict=True):
            save_file({"inputs": inputs, "targets": targets}, tmp_path / name)
        both = ["--forget", str(tmp_path / "forget"), "--retain", str(tmp_path / "retain")]
        key = ["--key", str(tmp_path / "key")]
        assert main(["verify", str(directory), *both, *key]) == 0
        assert "forget: the 12 given are those of the record" in capsys.readouterr().out
        assert main(["verify", str(directory), "--forget", str(tmp_path / "retain"), *key]) == 1
        assert "of 20 given 0 are in the record" in capsys.readouterr().out
        assert main(["verify", str(directory), *both]) == 2
        assert "key" in capsys.readouterr().err
        assert main(["verify", str(directory), "--forget", str(tmp_path / "key"), *key]) == 2
        assert "cannot be read as safetensors" in capsys.readouterr().err
