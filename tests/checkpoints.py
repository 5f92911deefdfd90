"""Runs that are broken off and checkpoints that are damaged, for several test files."""

from __future__ import annotations

import copy
import json
from hashlib import blake2b
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import Interrupted, blobs, mlp, same, state

import fastlur
from fastlur.checkpoint import Checkpoints
from fastlur.losses import BoundedForgetting, cross_entropy
from fastlur.step import Step

# what `Two` leaves in its directory
NEWEST = ("fastlur-step-00000002.json", "fastlur-step-00000002.safetensors")
OLDER = ("fastlur-step-00000001.json", "fastlur-step-00000001.safetensors")


def break_at(step):
    """A callback that breaks the run after a step."""

    def callback(event):
        if event.step == step:
            raise Interrupted

    return callback


def job(directory=None, model=None, **options):
    """A model, its data, and the options of a short run."""
    torch.manual_seed(4)
    data = blobs(12), blobs(40)
    model = mlp(dropout=0.3) if model is None else model
    options = {"steps": 9, "batch_size": 8, "progress": False} | options
    if directory is not None:
        options = {"checkpoint": directory, "checkpoint_every": 2} | options
    return model, data, options


def whole(model, data, options):
    """The model after an undisturbed run."""
    model = copy.deepcopy(model)
    left_out = ("checkpoint", "checkpoint_every", "keep_checkpoints")
    fastlur.unlearn(model, *data, **{k: v for k, v in options.items() if k not in left_out})
    return model


def break_off(model, data, options, at=5):
    """Leave the checkpoints of a run broken off after some steps."""
    with pytest.raises(Interrupted):
        fastlur.unlearn(copy.deepcopy(model), *data, **options, callbacks=[break_at(at)])


def go_on(model, data, options):
    """The same call again: the model, and the steps it made."""
    model, steps = copy.deepcopy(model), []
    fastlur.unlearn(model, *data, **options, callbacks=[lambda event: steps.append(event.step)])
    return model, steps


class Two:
    """A step and two checkpoints of it, after step 1 and after step 2, to be damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        losses = {"retain": cross_entropy, "forget": BoundedForgetting()}
        self.step = Step(mlp(2, 2), fastlur.LUR(), losses)
        self.at = Checkpoints(directory, {"a": 1})
        self.weights = {}
        for number in (1, 2):
            self.step(blobs(8, 2, 2), blobs(8, 2, 2))
            self.at.save(self.step, {"history": {}})
            self.weights[number] = state(self.step.space.model)
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}

    def reads(self):
        """Which of the two is restored, None for neither; what is restored is right to the bit."""
        with torch.no_grad():
            for flat in self.step.space.theta.flats:
                flat.fill_(7.0)
        found = self.at.newest()
        if found is None:
            return None
        self.at.restore(self.step, found)
        assert same(state(self.step.space.model), self.weights[self.step.step])
        return self.step.step

    def spoil(self, name, content):
        """Give a file another content."""
        (self.directory / name).write_bytes(content)

    def mend(self):
        """Both as they were."""
        for name, content in self.files.items():
            self.spoil(name, content)

    def close(self):
        """Give everything back."""
        self.at.close()
        self.step.close()


def forged(tmp_path, change):
    """The newest checkpoint with another description and its checksum in order."""
    path = max(tmp_path.glob("*.json"))
    record = json.loads(path.read_bytes())["record"]
    change(record)
    text = json.dumps(record)
    checksum = blake2b(text.encode(), digest_size=32).hexdigest()
    path.write_bytes(json.dumps({"fastlur": "checkpoint", "record": record, "checksum": checksum}).encode())


def forged_tensors(tmp_path, change):
    """The newest checkpoint with other tensors, of which `change` is given the dict, and its checksums in order."""
    file = max(tmp_path.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    file.write_bytes(safetensors.torch.save(tensors))
    checksum = blake2b(file.read_bytes(), digest_size=32).hexdigest()
    forged(tmp_path, lambda record: record.update(checksum=checksum))
