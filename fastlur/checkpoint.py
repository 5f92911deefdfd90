"""Checkpoints: the whole state of a run in two files, written whole or not at all, and read back with a checksum.

`step-N.safetensors` holds the tensors, `step-N.json` everything else and the checksum of the former; the second is
written last, so that a checkpoint exists when its JSON does. The last two are kept. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastlur.budget import RetainBudget
from fastlur.errors import CheckpointError
from fastlur.history import History
from fastlur.loop import StepEvent
from fastlur.step import Step

KEPT = 2
OURS = re.compile(r"\.?step-\d{8}\.(json|safetensors)(\.writing)?")
NAME = re.compile(r"step-(\d{8})\.json")


class Checkpoints:
    """The checkpoints of one run in one directory.

    Args:
        directory: made if it does not exist.
        settings: what determines the run; a checkpoint of other settings is refused.

    Raises:
        CheckpointError: the directory cannot be made or written to.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.directory, self.settings = Path(directory), settings
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write("probe", b"")
            (self.directory / "probe").unlink()
        except OSError as error:
            raise CheckpointError(f"checkpoint={str(directory)!r} cannot be written to: {error}") from error

    def save(self, step: Step, extra: dict[str, Any]) -> None:
        """Write the state after the step just done.

        Raises:
            CheckpointError: it could not be written; older checkpoints are as they were.
        """
        state = step.state_dict()
        tensors = {f"buffer/{k}": v for k, v in step.space.model.named_buffers()}
        tensors |= {f"weight/{k}": v for k, v in zip(step.space.names, step.space.theta.views, strict=True)}
        for vector, named in state["vectors"].items():
            tensors |= {f"vector/{vector}/{name}": tensor for name, tensor in named.items()}
        tensors |= {f"method/{name}": tensor for name, tensor in state["tensors"].items()}
        tensors["control"] = state["control"]
        optimizer = _pack(state["optimizer"], "optimizer", tensors)
        payload = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        stem = f"step-{state['step']:08d}"
        record = {
            "settings": self.settings,
            "step": state["step"],
            "method": state["method"],
            "vectors": sorted(state["vectors"]),
            "optimizer": optimizer,
            "checksum": blake2b(payload, digest_size=32).hexdigest(),
            **extra,
        }
        text = json.dumps(record)
        try:
            self._write(f"{stem}.safetensors", payload)
            self._write(f"{stem}.json", json.dumps({"record": record, "checksum": _digest(text)}).encode())
        except OSError as error:
            raise CheckpointError(f"checkpoint {stem} could not be written: {error}") from error
        for old in self._steps()[KEPT:]:
            self._remove(old)

    def load(self, step: Step) -> dict[str, Any] | None:
        """Bring a run to the newest readable checkpoint; returns what `save` was given as `extra`, or None.

        Raises:
            CheckpointError: there are checkpoints, but of another run, or not one is intact.
        """
        faults = []
        for number in self._steps():
            try:
                record, tensors = self._read(number)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                faults.append(f"step {number}: {error}")
                continue
            self._same_run(record["settings"])
            self._restore(step, record, tensors)
            return record
        if faults:
            raise CheckpointError(
                f"checkpoint: none in {str(self.directory)!r} is intact ({'; '.join(faults)}); remove it"
            )
        return None

    def purge(self) -> None:
        """Remove every checkpoint: they still hold the weights that were to be forgotten."""
        for file in self.directory.iterdir():
            if OURS.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _read(self, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        stem = self.directory / f"step-{number:08d}"
        outer = json.loads(stem.with_suffix(".json").read_bytes())
        record: dict[str, Any] = outer["record"]
        if _digest(json.dumps(record)) != outer["checksum"]:
            raise ValueError("its description is damaged")
        payload = stem.with_suffix(".safetensors").read_bytes()
        if blake2b(payload, digest_size=32).hexdigest() != record["checksum"]:
            raise ValueError("its tensors are damaged")
        return record, safetensors.torch.load(payload)

    def _same_run(self, theirs: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(self.settings))
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                raise CheckpointError(
                    f"checkpoint={str(self.directory)!r} is of another run: {key} was {theirs.get(key)!r}, now "
                    f"{mine.get(key)!r}; {'pass the model as it was at the start, or ' if key == 'model' else ''}"
                    "use another directory, or remove it to start afresh"
                )

    @staticmethod
    def _restore(step: Step, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, view in zip(step.space.names, step.space.theta.views, strict=True):
                view.copy_(tensors[f"weight/{name}"])
            for name, buffer in step.space.model.named_buffers():
                buffer.copy_(tensors[f"buffer/{name}"])
        vectors = {
            vector: {name: tensors[f"vector/{vector}/{name}"] for name in step.space.names}
            for vector in record["vectors"]
        }
        optimizer = _unpack(record["optimizer"], tensors)
        plain = {"step": record["step"], "method": record["method"]}
        own = {k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")}
        state = plain | {"control": tensors["control"], "vectors": vectors, "tensors": own}
        step.load_state_dict(state | {"optimizer": optimizer})

    def _steps(self) -> list[int]:
        found = (NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _remove(self, number: int) -> None:
        stem = self.directory / f"step-{number:08d}"
        for suffix in (".json", ".safetensors"):
            stem.with_suffix(suffix).unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        """A file whole or not at all: temporary name, flush to disk, rename, flush the directory."""
        temporary = self.directory / f".{name}.writing"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / name)
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Checkpointer:
    """An observer that saves every so many steps; when made, it first brings the run to where it was interrupted.

    Args:
        directory: of the checkpoints.
        settings: what determines the run.
        step: the step, which goes on from the newest checkpoint if there is one.
        history: likewise.
        budget: the retain budget, whose baseline is that of the interrupted run.
        every: steps between two checkpoints.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: dict[str, Any],
        step: Step,
        history: History,
        budget: RetainBudget | None,
        every: int,
    ) -> None:
        self.checkpoints = Checkpoints(directory, settings)
        self.step, self.history, self.budget, self.every = step, history, budget, every
        found = self.checkpoints.load(step)
        if found is not None:
            history.restore(found["history"])
            if budget is not None:
                budget.resume(found["baseline"])

    def __call__(self, event: StepEvent) -> None:
        """Save, if it is time to; only a state whose losses and gradients were finite is saved."""
        if event.step % self.every == 0 and event.step < event.steps:
            self.step.check()
            baseline = None if self.budget is None else self.budget.baseline
            self.checkpoints.save(self.step, {"history": self.history.columns(), "baseline": baseline})

    def purge(self) -> None:
        """Remove the checkpoints of a run that is over."""
        self.checkpoints.purge()


def model_digest(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers."""
    digest = blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON for any nesting of dicts, lists and numbers, its tensors moved into `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    return {"plain": value}


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = next(iter(value.items()))
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _unpack(item, tensors) for key, item in content}
        case "list":
            return [_unpack(item, tensors) for item in content]
        case "tuple":
            return tuple(_unpack(item, tensors) for item in content)
    return content
