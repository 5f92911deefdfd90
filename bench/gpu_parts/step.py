"""Whole steps, time and peak memory, as ratios to a plain two-loss step in one run.

First the gate: in each precision, what displacement adds to the direction against float64. A mode that does not align
gets no ratio; what it took is kept apart, under "refused". Steps run back to back and are waited for together, as in
a training loop. ScissorHands as published empties the CUDA cache in every step, which the next arm would pay for: it
runs alone, after the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gate
import torch
from arms import FRUGAL, MODES, Arm, bare, lur, opened
from conflict import in_conflict
from measure import Times, ratio
from models import MODELS
from torch import Tensor, nn
from torch.nn import functional

from fastlur.capture import WARM_UP
from fastlur.data import to_device
from fastlur.methods import METHODS
from gpu_parts.book import Book, Options, Row, Skip, device, drop, release, settled
from gpu_parts.timing import captured, launches, sampled, spread, tf32

CLEANED, PUBLISHED = "scissorhands, cleaned, in conflict", "scissorhands, as published, in conflict"
FORMS = {CLEANED: "cleaned", PUBLISHED: "as_published"}
LEAST = {"fp32": gate.LEAST["fp32"], "tf32": gate.LEAST["bf16"], "bf16": gate.LEAST["bf16"]}
GATED_BY = {"lm_1b": "lm_124m"}  # in float64 the large one does not fit
OPERATIONS = ("control", "displace", "dot", "extrapolate", "finish", "project", "regularize", "saliency", "update")
TRITON = tuple(f"{name}_kernel" for name in OPERATIONS)
ROOM = 0.85  # of the device's memory, which arms that stand side by side may take


@dataclass(frozen=True)
class Case:
    """A model, how many items a side, and how its steps run."""

    model: str
    items: int
    precision: str
    layout: str | None = None
    compile: bool = False
    arms: tuple[str, ...] = MODES
    expected: float = 10.0  # seconds

    def __str__(self) -> str:
        more = [each for each in (self.layout, "compiled" if self.compile else None) if each]
        return ", ".join([self.model, f"{self.items} + {self.items}", self.precision, *more])


EVERY = (*MODES, FRUGAL, CLEANED, PUBLISHED)
PLAIN = ("optimistic", "secant", "first_order")
FULL = [  # by importance
    Case("resnet18", 256, "fp32", arms=EVERY, expected=15),
    Case("lm_124m", 8, "bf16", arms=(*MODES, CLEANED), expected=15),
    Case("resnet18", 256, "bf16", "channels_last", arms=(*MODES, CLEANED)),
    Case("resnet18", 256, "tf32", arms=(*MODES, CLEANED, PUBLISHED)),
    Case("resnet18", 256, "bf16", "channels_last", compile=True, arms=PLAIN, expected=45),
    Case("vit_s", 64, "bf16", arms=(*MODES, CLEANED)),
    Case("swin_t", 64, "bf16", arms=(*MODES, CLEANED)),
    Case("lm_1b", 2, "bf16", expected=20),
    Case("resnet18", 16, "fp32", arms=EVERY),  # small batches, where the work beside the passes shows
    Case("resnet18", 256, "bf16"),
    Case("resnet18", 256, "tf32", "channels_last"),
    Case("swin_t", 64, "tf32", arms=(*MODES, PUBLISHED)),
    Case("vit_s", 64, "tf32", arms=(*MODES, PUBLISHED)),
]
FIRST = 5  # of them come before the graph
TINY = [Case("mlp", 8, "fp32", arms=("optimistic", "exact", CLEANED)), Case("mlp", 8, "bf16", arms=("secant",))]


def run(book: Book, options: Options) -> None:
    small = Case("mlp", 8, "fp32") if options.tiny else Case("resnet18", 64, "fp32")
    held: dict[str, nn.Module] = {}
    book.case(f"launches beside the passes: {small.model}", 3, lambda row: beside(row, small, held))
    cases: list[Case | None] = [*(TINY if options.tiny else FULL)]
    cases.insert(FIRST, None)  # a recording that fails may take the device along
    for case in cases:
        if case is None:
            book.case("a whole step in a CUDA graph", 3, lambda row: graph(row, small, held))
            continue
        expected = 0.0 if options.tiny else case.expected
        book.case(str(case), expected, partial(measure, case=case, held=held, book=book, tiny=options.tiny))


def measure(row: Row, case: Case, held: dict[str, nn.Module], book: Book, tiny: bool) -> None:
    """Gate, memory of each arm alone, then times side by side."""
    if case.model != "lm_1b":
        held.pop("lm_1b", None)  # the large one makes room for what comes after it
    row |= {"model": case.model, "batch": case.items, "precision": case.precision}
    row |= {"memory_format": case.layout, "compile": case.compile}
    with tf32(case.precision == "tf32"):
        modes = tuple(arm for arm in case.arms if arm.split(",")[0] in MODES)
        row["alignment_cosine"] = aligned(case, modes, held)
        release()
        model, forget, retain = prepared(case, held)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        wanted = ["bare", *case.arms]
        row["memory"] = {name: memory(row, case, model, forget, retain, name) for name in wanted}
        here = [name for name in wanted if row["memory"][name] is not None]
        assert "bare" in here, f"the plain step does not run: {row['dropped']['bare']}"
        seconds = 0.05 if tiny else min(6.0, max(1.0, book.left() / 10))
        times = timed(row, case, (model, forget, retain), here, seconds)
    least = LEAST[case.precision]
    refused = {mode for mode, cosine in row["alignment_cosine"].items() if not cosine >= least}
    kept = {name: each for name, each in times.items() if name.split(",")[0] not in refused}
    row["seconds"] = {name: spread(each) for name, each in kept.items()}
    row["refused"] = {name: spread(each) for name, each in times.items() if name not in kept}
    settled(row)


def aligned(case: Case, modes: tuple[str, ...], held: dict[str, nn.Module]) -> dict[str, float]:
    """The cosine of each mode on a few items, with the formulas in float64."""
    stand_in = replace(case, model=GATED_BY.get(case.model, case.model), items=min(case.items, 8))
    model, forget, retain = prepared(stand_in, held)
    options = settings(case)
    options.pop("compile")  # what is compiled is the same forward
    precision = "bf16" if case.precision == "bf16" else "fp32"
    few = stand_in.items // (4 if case.model.startswith("lm") else 1) or 1
    some = [tuple(each[:few] for each in batch) for batch in (forget, retain)]
    found = {}
    for mode in dict.fromkeys(each.split(",")[0] for each in modes):
        found[mode] = round(gate.compared(model, *some, mode, precision, **options), 3)
        release()
    return found


def prepared(case: Case, held: dict[str, nn.Module]) -> tuple[nn.Module, Any, Any]:
    """The model, made and trained for some steps where it runs, and a batch of each side."""
    make, batch = MODELS[case.model]
    forget, retain = (tuple(x.to(device()) for x in batch(case.items, seed)) for seed in (0, 1))
    if case.model not in held:
        torch.manual_seed(0)
        with device():
            model = make().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        items = 4 if case.model.startswith("lm") else 32
        with tf32(True):
            for number in range(0 if case.model == "lm_1b" else 25):
                inputs, labels = (x.to(device()) for x in batch(items, 1000 + number))
                optimizer.zero_grad()
                logits: Tensor = model(inputs)
                functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        optimizer.zero_grad()
        held[case.model] = model
    return held[case.model], forget, retain


def settings(case: Case) -> dict[str, Any]:
    """What a step is opened with beside its precision."""
    layout = {} if case.layout is None else {"memory_format": getattr(torch, case.layout)}
    return {"compile": case.compile, **layout}


@contextmanager
def arm(case: Case, model: nn.Module, forget: Any, retain: Any, name: str, capture: bool = False) -> Iterator[Arm]:
    """One arm on a copy of the model; conflicts of ScissorHands are made, not awaited."""
    precision = "bf16" if case.precision == "bf16" else "fp32"
    if case.layout is not None:
        forget, retain = (to_device(each, device(), getattr(torch, case.layout)) for each in (forget, retain))
    if name == "bare":
        yield bare(model, forget, retain, precision, **settings(case))
        return
    form = FORMS.get(name)
    method = lur(name) if form is None else METHODS["scissorhands"](form=form, trim=None)
    options = settings(case) | ({"capture": True} if capture else {})
    with opened(model, method, forget, retain, precision=precision, **options) as step:
        if form is not None:
            in_conflict(step, forget, retain)
        yield lambda: step(forget, retain)


def memory(row: Row, case: Case, model: nn.Module, forget: Any, retain: Any, name: str) -> dict[str, int | None] | None:
    """What an arm takes beyond the model and batches it is given, in bytes; None, and why, where it cannot run."""
    release()
    before = allocated()
    try:
        with arm(case, model, forget, retain, name) as step:
            step()  # allocates moments, chooses algorithms
            if device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()
            found = {"peak_bytes": allocated(peak=True) - before, "resident_bytes": allocated() - before}
            if device().type != "cuda":
                return dict.fromkeys(found)  # not known here
    except Exception as error:
        drop(row, name, error, ours=name.split(",")[0] in MODES)
        return None
    return found


def allocated(peak: bool = False) -> int:
    if device().type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def timed(row: Row, case: Case, given: tuple[nn.Module, Any, Any], names: list[str], seconds: float) -> Times:
    """Seconds of a step of each arm: side by side where they fit, else in pairs with the plain step."""
    together = [name for name in names if name != PUBLISHED]
    groups = [together] if fits(row["memory"], together) else [["bare", name] for name in together[1:]]
    row["side_by_side"] = len(groups) == 1
    times: Times = {}
    row["ratio_to_bare"] = {}
    for group in groups:
        found = side_by_side(case, given, group, seconds if len(groups) == 1 else seconds / 2)
        for name in group[1:]:
            row["ratio_to_bare"][name] = [round(x, 3) for x in ratio(found, name, "bare")]
        times = found | times
    if PUBLISHED in names:
        alone = side_by_side(case, given, [PUBLISHED], seconds / 3)
        base = spread(times["bare"])[0]
        row["ratio_to_bare"][PUBLISHED] = [round(x / base, 3) for x in spread(alone[PUBLISHED])]
        times |= alone
    cosines, least = row["alignment_cosine"], LEAST[case.precision]
    for name in list(row["ratio_to_bare"]):
        if not cosines.get(name.split(",")[0], 1.0) >= least:
            del row["ratio_to_bare"][name]
    return times


def side_by_side(case: Case, given: tuple[nn.Module, Any, Any], names: list[str], seconds: float) -> Times:
    release()
    with ExitStack() as stack:
        return sampled({name: stack.enter_context(arm(case, *given, name)) for name in names}, seconds, fewest=4)


def fits(taken: dict[str, Any], names: list[str]) -> bool:
    """Whether the arms stand beside each other in the device's memory, one of them stepping."""
    if device().type != "cuda":
        return True
    resident = sum(taken[name]["resident_bytes"] for name in names)
    working = max(taken[name]["peak_bytes"] - taken[name]["resident_bytes"] for name in names)
    total = torch.cuda.get_device_properties(0).total_memory
    return resident + working + torch.cuda.memory_allocated() < ROOM * total


def beside(row: Row, case: Case, held: dict[str, nn.Module]) -> None:
    """What a step puts on the device in all, and of that what is this package's own."""
    model, forget, retain = prepared(case, held)
    row["launches"], row["own"] = {}, {}
    for name in ("bare", "optimistic"):
        with arm(case, model, forget, retain, name) as step:
            counted = launches(step)
            row["launches"][name] = None if counted is None else sum(counted.values())
            row["own"][name] = {kernel: count for kernel, count in (counted or {}).items() if own(kernel)}


def own(kernel: str) -> bool:
    """Whether a kernel is this package's: the extension's by its namespace, Triton's by its name."""
    return "fastlur::" in kernel or kernel in TRITON


def graph(row: Row, case: Case, held: dict[str, nn.Module]) -> None:
    """Whole steps recorded once and replayed: ours as `capture=True` does it, the plain one by torch's own means."""
    if device().type != "cuda":
        raise Skip("there is no CUDA device")
    in_graphs(row, case, *prepared(case, held), seconds=2.0)
    settled(row)


def in_graphs(row: Row, case: Case, model: nn.Module, forget: Any, retain: Any, seconds: float) -> None:
    made: dict[str, Callable[[], object]] = {}
    row["captured"] = {}
    with ExitStack() as stack:
        for name in ("bare", "optimistic"):
            made[name] = stack.enter_context(arm(case, model, forget, retain, name))
            made[name]()
            try:
                if name == "bare":
                    made["bare, graph"] = captured(stack.enter_context(arm(case, model, forget, retain, name)))
                else:
                    replayed = stack.enter_context(arm(case, model, forget, retain, name, capture=True))
                    for _ in range(WARM_UP + 1):  # the last one records
                        replayed()
                    made[f"{name}, graph"] = replayed
                row["captured"][name] = True
            except Exception as error:
                row["captured"][name] = False
                drop(row, f"{name}, graph", error, ours=name != "bare")
        row["seconds"] = {name: spread(each) for name, each in sampled(made, seconds).items()}
