"""What a step of LUR on a language model holds beside plain fine-tuning: peak memory, each arm in a fresh process.

    python bench/llm_memory.py                     all arms, into bench/results/llm_memory.json
    python bench/llm_memory.py all plain 4 64      one arm: what moves, arm, sequences, tokens

The model has the sizes of SmolLM2-135M and random weights. Plain fine-tuning is torch's AdamW on so many sequences a
step; LUR (fastlur's AdamW) takes as many of each side, in one pass at a time: no pass of either sees more. One arm
trains a novice first. Figures are bytes of memory of one's own (anonymous, resident) at most, less what there was after
the imports and the same run on a tiny model; they begin before the model is made, so that its weights are in them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from machine import dumped, machine  # noqa: E402
from memory import MALLOC, Meter  # noqa: E402

import fastlur  # noqa: E402
from fastlur import targets  # noqa: E402

RESULT = ROOT / "bench" / "results" / "llm_memory.json"
WHOLE = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
TINY = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3}
MOVING, NOVICE = ("all", "lora"), "optimistic, imitating a novice"
ARMS = ("plain", "optimistic", "secant", NOVICE)
SHAPES = [(4, 64)]
STEPS, LR, RANK = 2, 1e-5, 16  # in the second step all vectors are there
LEARNING = 2  # epochs of a novice, whose batch is as that of the others
ASKED = {"all": 1.55, "lora": 1.3}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made(sizes: dict[str, int], moving: str, words: int) -> torch.nn.Module:
    """The model, with adapters of rank 16 on every projection where only these move."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = sizes["hidden_size"] * 8 // 3
    model = LlamaForCausalLM(LlamaConfig(vocab_size=words, intermediate_size=wide, tie_word_embeddings=True, **sizes))
    if moving == "all":
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))


def batch(items: int, tokens: int, words: int, seed: int) -> dict[str, torch.Tensor]:
    """Sequences in which every token counts."""
    ids = torch.randint(0, words, (items, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def plain(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> list[float]:
    """Fine-tuning as everybody writes it; seconds of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    times = []
    model.train()
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(**data).loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return times


def lur(
    model: torch.nn.Module,
    forget: dict[str, torch.Tensor],
    retain: dict[str, torch.Tensor],
    mode: str,
    start: Callable[[], torch.nn.Module] | None,
) -> list[float]:
    """A whole run of `unlearn`, with the training of a novice from `start` where there is one; seconds of each step."""
    ends: list[float] = []
    novice = None if start is None else targets.Novice(epochs=LEARNING, lr=LR, start=start)
    result = fastlur.unlearn(
        model,
        [forget],
        [retain],
        method=fastlur.LUR(gradient=mode),  # type: ignore[arg-type]
        forget_loss=novice,
        steps=STEPS,
        optimizer="adamw",
        lr=LR,
        progress=False,
        callbacks=[lambda event: ends.append(event.seconds)],
    )
    if novice is not None and not result.settings["forget_target"].startswith("Imitation("):
        raise RuntimeError("nothing was imitated")
    return [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]


def life(sizes: dict[str, int], words: int, moving: str, arm: str, items: int, tokens: int) -> dict[str, Any]:
    """One arm from the making of its model on."""
    model = made(sizes, moving, words)
    forget, retain = (batch(items, tokens, words, seed) for seed in (1, 2))
    if arm == "plain":
        times = plain(model, retain)
    else:
        start = partial(made, sizes, moving, words) if arm == NOVICE else None
        times = lur(model, forget, retain, arm.split(",")[0], start)
    held = sum(p.nbytes for p in model.parameters())
    moved = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"parameters": held, "moving": moved, "seconds": round(statistics.median(times[1:]), 3)}


def one(moving: str, arm: str, items: int, tokens: int) -> dict[str, Any]:
    """The peak of an arm, in this process."""
    targets.LEARNED = float("inf")  # a novice is taken, learned or not, since that is not what is measured
    life(TINY, 64, moving, arm, 2, 8)
    meter = Meter(torch.device("cpu"))
    meter.peak()
    found = life(WHOLE, 49152, moving, arm, items, tokens)
    return found | {"peak": meter.peak()}


def measured(moving: str, arm: str, items: int, tokens: int) -> dict[str, Any]:
    """The same in a process of its own."""
    world = os.environ | MALLOC | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "bench")))}
    command = [sys.executable, __file__, moving, arm, str(items), str(tokens)]
    done = subprocess.run(command, env=world, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """All arms of all shapes, one after the other."""
    rows, here = [], machine()
    for items, tokens in SHAPES:
        for moving in MOVING:
            found = {arm: measured(moving, arm, items, tokens) for arm in ARMS}
            base = found["plain"]["peak"]
            row = {
                "model": "SmolLM2-135M's sizes, random weights",
                "moving": moving if moving == "all" else f"LoRA r={RANK}",
                "sequences": items,
                "tokens": tokens,
                "parameters_mib": round(found["plain"]["parameters"] / 2**20, 1),
                "moving_mib": round(found["plain"]["moving"] / 2**20, 1),
                "peak_mib": {arm: round(each["peak"] / 2**20, 1) for arm, each in found.items()},
                "ratio": {arm: round(each["peak"] / base, 3) for arm, each in found.items() if arm != "plain"},
                "asked": ASKED[moving],
                "seconds": {arm: each["seconds"] for arm, each in found.items()},
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            RESULT.write_text(dumped(here, rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        warnings.simplefilter("ignore")
        print(json.dumps(one(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
