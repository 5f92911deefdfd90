"""Fine-tuning on questions and answers, and a cache of what was trained: files that git ignores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch.nn import functional

from fastlur.world import borrowed_random, derive

from .text import Reader, answer_logits, encoded

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 0.1  # of the steps
LARGEST_NORM = 1.0  # of a gradient
WEIGHT_DECAY = 0.01
ALIKE = 6  # batches that are sorted by length among themselves


def cache() -> Path:
    """The folder of trained models; FASTLUR_CACHE says where else."""
    return Path(os.environ.get("FASTLUR_CACHE", ROOT / ".data" / "llm"))


def tune(
    model: Any,
    reader: Reader,
    asked: Sequence[tuple[str, str]],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    precision: str = "fp32",
    said: Callable[[str], None] = lambda _: None,
) -> float:
    """Fine-tune in place on the answers; returns the mean loss of the last epoch in nats a token."""
    per_epoch = -(-len(asked) // batch_size)
    steps = epochs * per_epoch
    warm = max(1, round(WARM_UP * steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    generator = torch.Generator().manual_seed(derive("llm", seed))
    mean = 0.0
    model.train()
    with borrowed_random(torch.device("cpu")):
        torch.manual_seed(derive("llm", "dropout", seed))
        for epoch in range(epochs):
            total = 0.0
            for chosen in _batches([sum(map(len, each)) for each in asked], batch_size, generator):
                batch = encoded(reader, [asked[at] for at in chosen])
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    logits, tokens, _ = answer_logits(model, batch)
                loss = functional.cross_entropy(logits.float(), tokens)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            mean = total / per_epoch
            said(f"epoch {epoch + 1} of {epochs}: {mean:.3f} nats a token")
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()
    return mean


def _batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """An epoch in random order, in batches of pairs of about the same length, so that little is padded."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    found = []
    for at in range(0, len(order), batch_size * ALIKE):
        few = sorted(order[at : at + batch_size * ALIKE], key=lambda each: lengths[each])
        found += [few[start : start + batch_size] for start in range(0, len(few), batch_size)]
    return [found[at] for at in torch.randperm(len(found), generator=generator).tolist()]


def cached(path: Path, model: Any, make: Callable[[], float]) -> dict[str, float]:
    """Weights from a file into the model, or made by `make` in the model and written there whole.

    Returns:
        "seconds" that it took, and the "loss" that `make` returned.
    """
    if not path.exists():
        began = time.perf_counter()
        loss = make()
        told = {"seconds": repr(round(time.perf_counter() - began, 1)), "loss": repr(loss)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        kept = {name: value.detach().clone().contiguous() for name, value in model.named_parameters()}
        safetensors.torch.save_file(kept, temporary, told)
        temporary.replace(path)
    with safetensors.safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))
        told = file.metadata()
    model.eval()
    return {name: float(value) for name, value in told.items()}
