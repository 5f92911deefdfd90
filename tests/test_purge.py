"""`purge`, as a function and as a command, and that a run that is over leaves no copy of the old weights."""

from __future__ import annotations

import gc

import pytest
import torch
from checkpoints import break_off, go_on, job
from helpers import blobs, mlp, run
from safetensors.torch import save

import fastlur
from fastlur.__main__ import main
from fastlur.folder import Folder


@pytest.fixture
def result():
    return run(mlp(), blobs(12), blobs(20))


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


def test_checkpoints_go_and_everything_else_stays(result, tmp_path):
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


def test_what_somebody_else_wrote_stays_whatever_its_name(result, tmp_path):
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


def test_nor_is_it_written_over(tmp_path):
    theirs = tmp_path / "fastlur-step-00000004.safetensors"
    theirs.write_bytes(save({"weight": torch.ones(3)}))
    before = theirs.read_bytes()
    with pytest.raises(fastlur.CheckpointError, match=f"{theirs.name} is there, and fastlur did not write it"):
        go_on(*job(tmp_path))
    assert theirs.read_bytes() == before


def test_of_a_damaged_record_the_weights_stay(result, tmp_path):
    directory = result.save(tmp_path)
    (directory / "result.json").write_text("{}")
    assert fastlur.purge(directory) == []


def test_a_link_goes_and_what_it_points_at_stays(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "fastlur-step-00000001.safetensors").symlink_to(tmp_path / "precious")
    assert fastlur.purge(tmp_path) == ["fastlur-step-00000001.safetensors"]
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_run_that_goes_on_is_not_disturbed(tmp_path):
    held = Folder(tmp_path)
    assert held.lock()
    (tmp_path / "fastlur-step-00000001.json").write_text("")
    with pytest.raises(fastlur.CheckpointError, match="in use"):
        fastlur.purge(tmp_path)
    held.unlock()
    assert fastlur.purge(tmp_path) == ["fastlur-step-00000001.json"]


def test_what_cannot_be_removed_is_an_error(tmp_path):
    break_off(*job(tmp_path))
    (tmp_path / "fastlur-step-00000001.json").mkdir()
    with pytest.raises(fastlur.CheckpointError, match=r"cannot be purged of 1 files.*\(4 files were removed\)"):
        fastlur.purge(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fastlur-step-00000001.json"]
    for place in (tmp_path / "nowhere", "a\0b"):
        with pytest.raises(fastlur.CheckpointError, match="cannot be purged"):
            fastlur.purge(place)


def test_what_cannot_be_looked_at_is_an_error_and_the_rest_goes(tmp_path, monkeypatch):
    break_off(*job(tmp_path))
    unread, *others = sorted(path.name for path in tmp_path.iterdir())
    refuse_to_read(monkeypatch, unread)
    with pytest.raises(fastlur.CheckpointError, match="Permission denied"):
        fastlur.purge(tmp_path)
    assert others
    assert unread in [path.name for path in tmp_path.iterdir()]
    assert len(list(tmp_path.iterdir())) <= 2  # its pair speaks by its mark alone


def test_weights_that_cannot_be_looked_at_keep_no_checkpoint(result, tmp_path, monkeypatch):
    break_off(*job(tmp_path))
    result.save(tmp_path)
    unread = tmp_path / f"model-{'0' * 16}.safetensors"
    unread.write_bytes(b"?")
    refuse_to_read(monkeypatch, unread.name)
    with pytest.raises(fastlur.CheckpointError, match=r"Permission denied.*\(4 files were removed\)"):
        fastlur.purge(tmp_path)
    assert fastlur.verify(tmp_path).ok
    assert len(list(tmp_path.iterdir())) == 3


def refuse_to_read(monkeypatch, refused):
    """A file whose beginning cannot be read from here on."""
    made = Folder.head

    def head(self, name, count):
        if name == refused:
            raise PermissionError(13, "Permission denied", name)
        return made(self, name, count)

    monkeypatch.setattr(Folder, "head", head)


def test_an_empty_path_is_not_the_working_directory(tmp_path, monkeypatch, capsys):
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
def test_a_run_that_is_over_holds_no_copy_of_the_old_weights(tmp_path, method):
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


def test_the_command(tmp_path, capsys):
    (tmp_path / "fastlur-step-00000001.json").write_text("")
    assert main(["purge", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "removed fastlur-step-00000001.json\n"
    assert main(["purge", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert main(["purge", str(tmp_path / "nowhere")]) == 1
    assert "cannot be purged" in capsys.readouterr().err
