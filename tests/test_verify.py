"""`verify` and `purge`, as functions and as commands, on honest, damaged and hostile directories."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from hashlib import blake2b

import pytest
import torch
from checkpoints import break_off, go_on, job
from helpers import blobs, mlp, run, same, state
from safetensors.torch import save, save_file
from test_checkpoint_hostile import HOSTILE_TENSORS
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.__main__ import main
from fastlur.folder import Folder


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


def holding(content):
    """How many tensors that are alive hold these bytes somewhere."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # others, such as a tracer's, hold no numbers
    alive = {id(each): each for each in gc.get_objects() if type(each) in kinds}
    held = {
        each.untyped_storage().data_ptr(): each.untyped_storage()
        for each in alive.values()
        if each.layout == torch.strided and each.nbytes < 1 << 16
    }
    return sum(content in bytes(storage.tolist()) for storage in held.values())


class TestPurge:
    def test_checkpoints_go_and_everything_else_stays(self, result, tmp_path):
        model, both, options = job(tmp_path, method="scrub")
        break_off(model, both, options)
        result.save(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / ".fastlur-step-00000009.json.writing").write_bytes(b'{"fastlur": "check')
        before = save({"a": torch.ones(2)}, metadata={"fastlur": "record"})
        (tmp_path / ("model-" + "0" * 16 + ".safetensors")).write_bytes(before)
        removed = fastlur.purge(tmp_path)
        assert len(removed) == 6
        assert len(list(tmp_path.iterdir())) == 3
        assert fastlur.verify(tmp_path).ok
        assert fastlur.purge(tmp_path) == []

    def test_what_somebody_else_wrote_stays_whatever_its_name(self, result, tmp_path):
        """Through a run that is broken off, goes on and ends, through records, and through a purge."""
        model, both, options = job(tmp_path)
        theirs = save({"weight": torch.ones(3)})
        names = [f"{stem}-{number:08d}.safetensors" for stem in ("step", "fastlur-step") for number in (1, 10000)]
        names += ["step-00000004.json", ".step-00000003.json.writing"]
        names += [f"model-{'0' * 16}.safetensors"]
        for name in names:
            (tmp_path / name).write_bytes(theirs)
        break_off(model, both, options)
        assert fastlur.purge(tmp_path)
        break_off(model, both, options)
        assert go_on(model, both, options)[1] == [5, 6, 7, 8, 9]
        result.save(tmp_path)
        result.save(tmp_path)
        assert fastlur.purge(tmp_path) == []
        assert all((tmp_path / name).read_bytes() == theirs for name in names)

    def test_nor_is_it_written_over(self, tmp_path):
        theirs = tmp_path / "fastlur-step-00000004.safetensors"
        theirs.write_bytes(save({"weight": torch.ones(3)}))
        before = theirs.read_bytes()
        with pytest.raises(fastlur.CheckpointError, match=f"{theirs.name} is there, and fastlur did not write it"):
            go_on(*job(tmp_path))
        assert theirs.read_bytes() == before

    def test_of_a_damaged_record_the_weights_stay(self, result, tmp_path):
        directory = result.save(tmp_path)
        (directory / "result.json").write_text("{}")
        assert fastlur.purge(directory) == []

    def test_a_link_goes_and_what_it_points_at_stays(self, tmp_path):
        (tmp_path / "precious").write_text("mine")
        (tmp_path / "fastlur-step-00000001.safetensors").symlink_to(tmp_path / "precious")
        assert fastlur.purge(tmp_path) == ["fastlur-step-00000001.safetensors"]
        assert (tmp_path / "precious").read_text() == "mine"

    def test_a_run_that_goes_on_is_not_disturbed(self, tmp_path):
        held = Folder(tmp_path)
        assert held.lock()
        (tmp_path / "fastlur-step-00000001.json").write_text("")
        with pytest.raises(fastlur.CheckpointError, match="in use"):
            fastlur.purge(tmp_path)
        held.unlock()
        assert fastlur.purge(tmp_path) == ["fastlur-step-00000001.json"]

    def test_what_cannot_be_removed_is_an_error(self, tmp_path):
        break_off(*job(tmp_path))
        (tmp_path / "fastlur-step-00000001.json").mkdir()
        with pytest.raises(fastlur.CheckpointError, match=r"cannot be purged of 1 files.*\(4 files were removed\)"):
            fastlur.purge(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["fastlur-step-00000001.json"]
        for place in (tmp_path / "nowhere", "a\0b"):
            with pytest.raises(fastlur.CheckpointError, match="cannot be purged"):
                fastlur.purge(place)

    def test_what_cannot_be_looked_at_is_an_error_and_the_rest_goes(self, tmp_path, monkeypatch):
        break_off(*job(tmp_path))
        unread, *others = sorted(path.name for path in tmp_path.iterdir())
        made = Folder.head

        def head(self, name, count):
            if name == unread:
                raise PermissionError(13, "Permission denied", name)
            return made(self, name, count)

        monkeypatch.setattr(Folder, "head", head)
        with pytest.raises(fastlur.CheckpointError, match="Permission denied"):
            fastlur.purge(tmp_path)
        assert others
        assert unread in [path.name for path in tmp_path.iterdir()]
        assert len(list(tmp_path.iterdir())) <= 2  # its pair speaks by its mark alone

    def test_an_empty_path_is_not_the_working_directory(self, tmp_path, monkeypatch, capsys):
        break_off(*job(tmp_path))
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.iterdir())
        for use in (fastlur.purge, fastlur.verify):
            with pytest.raises(fastlur.FastlurError, match="an empty path"):
                use("")
        for command in ("purge", "verify"):
            assert main([command, ""]) == 1
            assert "an empty path" in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("method", ["scrub", "mox", "bad_teacher", "selective_amnesia", "scissorhands", "lur"])
    def test_a_run_that_is_over_holds_no_copy_of_the_old_weights(self, tmp_path, method):
        torch.manual_seed(1871)  # weights that no model another test has left behind holds too
        model = mlp(inputs=6)
        old = model[0].weight.detach().numpy().tobytes()
        assert holding(old) == 1
        copies = torch.cat([torch.zeros(3), model[0].weight.detach().reshape(-1)])
        assert holding(old) == 2
        del copies
        result = run(model, blobs(12), blobs(20), method=method, checkpoint=tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert holding(old) == 0
        assert result.model is model


class TestCommands:
    def call(self, *arguments):
        command = [sys.executable, "-m", "fastlur", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_verify_and_purge_as_a_program(self, result, tmp_path):
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

    def test_verify_with_data(self, result, data, tmp_path, capsys):
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

    def test_purge(self, tmp_path, capsys):
        (tmp_path / "fastlur-step-00000001.json").write_text("")
        assert main(["purge", str(tmp_path)]) == 0
        assert capsys.readouterr().out == "removed fastlur-step-00000001.json\n"
        assert main(["purge", str(tmp_path)]) == 0
        assert capsys.readouterr().out == "nothing to remove\n"
        assert main(["purge", str(tmp_path / "nowhere")]) == 1
        assert "cannot be purged" in capsys.readouterr().err
