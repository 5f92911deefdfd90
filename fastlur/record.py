"""The record of a run: a description and the model it describes, replaced as one, read back with checksums.

`result.json` names the file of the weights, and the weights are named after their content. They are written first, so
that a directory holds the old record until the moment the description is renamed, and the new one from then on. The
checksums find damage; they are no signature. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastlur.errors import ArgumentError, ModelError, RecordError
from fastlur.folder import SUFFIX, Folder
from fastlur.ours import RECORD, is_marked, metadata, told_apart

FORMAT = 1
DESCRIPTION = "result.json"
WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
LEFT = re.compile(r"\.(result\.json|model-[0-9a-f]{16}\.safetensors)" + re.escape(SUFFIX))
LARGEST = 1 << 30  # bytes of a description, which holds the history and a hash an item
TRIES = 20  # readings while somebody keeps on writing


@dataclass(frozen=True)
class Record:
    """A record that was intact when it was read.

    Attributes:
        path: its directory.
        content: the description, as plain values.
    """

    path: Path
    content: dict[str, Any]

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.path / str(self.content["model"]["file"])

    def load(self, model: nn.Module) -> nn.Module:
        """Give a model of the same architecture the recorded weights and buffers; returns it.

        Raises:
            ModelError: it does not fit; it is as it was.
            RecordError: the weights are not those of the record any more.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"model: a {type(model).__name__} is no torch.nn.Module")
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            raise ModelError("model: has parameters of no shape yet; pass a batch through it first")
        described = self.content["model"]
        try:
            payload = Folder(self.path, make=False).read(described["file"], described["bytes"])
            if _digest(payload) != described["checksum"]:
                raise ValueError("the weights have changed since the record was read")
            tensors = safetensors.torch.load(payload)
        except (OSError, ValueError, SafetensorError) as error:
            raise RecordError(f"record {os.fspath(self.path)!r}: {error}") from error
        own = {name: value for name, value in _state(model).items() if isinstance(value, Tensor)}
        given = {_address(own[name]) for name in tensors if name in own}
        unfit = [name for name, value in own.items() if _address(value) not in given]
        unfit += [name for name, saved in tensors.items() if name not in own or _kind(own[name]) != _kind(saved)]
        if unfit:
            raise ModelError(
                f"model: does not fit the record: {', '.join(sorted(unfit)[:3])}; pass one of the same kind and dtype"
            )
        model.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            for name in tensors.keys() - model.state_dict().keys():
                own[name].copy_(tensors[name])
        return model


def write(directory: str | os.PathLike[str], model: nn.Module, content: Mapping[str, Any]) -> Path:
    """Write a record, whole or not at all; one that is there is replaced, and its weights are removed.

    Raises:
        RecordError: it cannot be written; what was there is as it was.
    """
    where = f"record {os.fspath(directory)!r}"
    try:
        folder = Folder(directory)
        free = folder.lock()
    except (OSError, ValueError) as error:
        raise RecordError(f"{where} cannot be written: {error}; choose a directory that can") from error
    if not free:
        raise RecordError(f"{where} is in use by another process; wait for it, or choose another directory")
    try:
        before = folder.names()
        payload = safetensors.torch.save(_tensors(model), metadata=metadata(RECORD))
        checksum = _digest(payload)
        name = f"model-{checksum[:16]}.safetensors"
        described = {"file": name, "bytes": len(payload), "checksum": checksum}
        text = json.dumps({"format": FORMAT, "model": described, **content})
        record = json.loads(text, parse_constant=lambda _: None)  # NaN and infinities, which JSON does not know
        text = json.dumps({**record, "checksum": _checksum(record)}, indent=1)
        try:
            folder.write(name, payload)
            folder.write(DESCRIPTION, text.encode())
        except BaseException:
            if name not in before:
                with suppress(OSError):
                    _drop_unless_described(folder, name)
            raise
        _tidy(folder, name)
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{where} cannot be written: {error}") from error
    finally:
        folder.unlock()
    return folder.path


def is_plain(value: object) -> bool:
    """Whether JSON can hold it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def read(directory: str | os.PathLike[str]) -> Record:
    """Read a record and compare its checksums.

    Raises:
        RecordError: there is none, or it is not intact.
        ArgumentError: no path.
    """
    if not isinstance(directory, str | os.PathLike):
        raise ArgumentError(f"directory={directory!r} must be the path of a record's directory")
    for left in reversed(range(TRIES)):
        try:
            folder = Folder(directory, make=False)
            content = describe(folder)
            described = content["model"]
            if folder.size(described["file"]) != described["bytes"]:
                raise ValueError(f"{described['file']} is not {described['bytes']} bytes long")
            with folder.opened(described["file"]) as (checksum, path):
                if checksum != described["checksum"]:
                    raise ValueError(f"{described['file']} is damaged")
                with safe_open(path, framework="pt") as file:
                    file.keys()
            return Record(folder.path, content)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            # one that is being replaced has its old weights removed under a reader; the new one is there by then
            if isinstance(error, FileNotFoundError) and left:
                continue
            said = str(error) or type(error).__name__
            raise RecordError(f"record {os.fspath(directory)!r} is not intact: {said}") from error
    raise AssertionError


def describe(folder: Folder) -> dict[str, Any]:
    """The description in a directory, its own checksum compared and the weights not looked at.

    Raises:
        OSError, ValueError, KeyError, TypeError, RecursionError: there is none, or it is not intact.
    """
    content = json.loads(folder.read(DESCRIPTION, LARGEST))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{DESCRIPTION} describes no model")
    if content.pop("checksum", None) != _checksum(content):
        raise ValueError(f"{DESCRIPTION} is damaged")
    if content.get("format") != FORMAT:
        raise ValueError(f"{DESCRIPTION} is of format {content.get('format')!r}, not {FORMAT}")
    if not isinstance(content["model"]["file"], str) or not WEIGHTS.fullmatch(content["model"]["file"]):
        raise ValueError(f"{content['model']['file']!r} is no name of weights")
    if not isinstance(content["model"]["bytes"], int):
        raise ValueError("the size of the weights is no number")
    return content


def orphans(folder: Folder) -> tuple[list[str], list[str]]:
    """What broken-off writes have left, half-written files and weights that an intact description does not name.

    And, of files that may be such weights, why they cannot be looked at.
    """
    names = folder.names()
    half = [name for name in names if LEFT.fullmatch(name)]
    try:
        kept = describe(folder)["model"]["file"] if DESCRIPTION in names else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return half, []  # without knowing which weights are the record's, none are
    old, unread = told_apart(names, lambda name: _is_old(folder, name, kept))
    return half + old, unread


def _tidy(folder: Folder, kept: str) -> None:
    """Nothing but this record: weights of the one before are what somebody may have wanted gone."""
    for name in folder.names():
        if LEFT.fullmatch(name) or _is_old(folder, name, kept):
            folder.remove(name)


def _is_old(folder: Folder, name: str, kept: str | None) -> bool:
    """Whether it is the weights of another record; a file of such a name that we did not write is somebody's."""
    return bool(WEIGHTS.fullmatch(name)) and name != kept and is_marked(folder, name, RECORD)


def _drop_unless_described(folder: Folder, name: str) -> None:
    """The rename may have happened before the failure."""
    try:
        kept = describe(folder)["model"]["file"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = None
    if name != kept:
        folder.remove(name)


def _state(model: nn.Module) -> dict[str, Any]:
    """The state_dict, and the buffers that it leaves out: they may have moved, and a forward reads them."""
    return dict(model.named_buffers()) | model.state_dict()


def _kind(value: Tensor) -> object:
    return value.shape, value.dtype


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = _state(model)
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise RecordError(
            f"model: {other[0]!r} in its state_dict is no tensor and cannot be recorded; save it yourself"
        )
    return {name: value.detach().cpu().contiguous() for name, value in _distinct(state).items()}


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name a tensor, the first of those tied."""
    seen: dict[object, str] = {}
    return {name: value for name, value in state.items() if seen.setdefault(_address(value), name) == name}


def _address(value: Tensor) -> object:
    if not value.numel():
        return id(value)
    return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def _checksum(content: Any) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=32).hexdigest()
