"""The vector operations: bandwidth against that of a copy, launches, and time against torch's own spellings.

An operation that is not right has no figure: each backend is compared with float64 first, at the size measured (at 1e9
elements float64 does not fit beside it; the tests have that size). Arms go round buffers of 256 MiB together, or they
would measure the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import operations
import torch
from measure import medians
from operations import CACHE, rotating, vectors
from shapes import Shapes, language_1b, numel, resnet18
from spellings import ALPHA, DECAY, LR, MOMENTUM, OPERATIONS, Arm, Vectors, compiled, eager
from traffic import TRAFFIC

from fastlur import backends, ops
from fastlur.operands import control_scalars, hyper_parameters
from gpu_parts.book import Book, Options, Row, Skip, device, drop, release, settled
from gpu_parts.needs import here
from gpu_parts.timing import captured, launches, sampled, spread

IN_62, IN_201 = "ResNet-18, 62 tensors", "1.1 B LM, 201 tensors"
FULL: dict[str, Shapes] = {
    IN_62: resnet18(),
    "1e8 flat": [(100_000_000,)],
    IN_201: language_1b(),
    "1e9 flat": [(1_000_000_000,)],
}
TINY: dict[str, Shapes] = {"small list": [(65,), (3, 7), (1,)], "1e3 flat": [(1000,)]}
FIRST = ("grad_dot", "displace", "sgd", "adamw")  # what a step is made of
OPTIMIZERS = ("sgd", "adamw")
LARGE = 5e8  # elements; from here on float64 copies do not fit


def run(book: Book, options: Options) -> None:
    layouts = TINY if options.tiny else FULL
    seconds = 0.02 if options.tiny else 0.4
    first = ("sgd",) if options.tiny else FIRST
    book.case("Triton serves", 0, served)
    vectorial = tuple(each for each in OPERATIONS if each != "step_control")
    others = () if options.tiny else tuple(each for each in vectorial if each not in FIRST)
    for layout, shapes in list(layouts.items())[::2]:  # the lists
        book.case(f"the vector work of a step: {layout}", 6, partial(whole, shapes=shapes, seconds=seconds))
    plain(book, first, layouts, seconds)
    in_lists, in_one = list(layouts.items())[:2]
    compiler = "eager" if options.tiny else "inductor"  # which takes half a minute for an operation on a CPU
    beside_compiled(book, first, in_lists, 15, seconds, compiler)
    plain(book, others, layouts, seconds)
    beside_compiled(book, first, in_one, 10, seconds, compiler)


def served(row: Row) -> None:
    """On CUDA it must: it is what users of a GPU get."""
    row["backends"] = {name: backends.unavailable(name, device().type) for name in ("triton", "extension", "torch")}
    if device().type != "cuda":
        raise Skip("there is no CUDA device")
    assert row["backends"]["triton"] is None, row["backends"]["triton"]


def beside_compiled(
    book: Book, operations: tuple[str, ...], layout: tuple[str, Shapes], likely: float, seconds: float, compiler: str
) -> None:
    """A case for each of the operations beside torch's compiler."""
    where, shapes = layout
    for name in operations:
        run_one = partial(tuned, name=name, layout=where, shapes=shapes, seconds=seconds, compiler=compiler)
        book.case(f"{name}, compiled: {where}", likely, run_one)


def plain(book: Book, operations: tuple[str, ...], layouts: dict[str, Shapes], seconds: float) -> None:
    """A case for each of the operations in each layout."""
    for layout, shapes in layouts.items():
        for name in operations:
            run_one = partial(one, name=name, layout=layout, shapes=shapes, seconds=seconds)
            book.case(f"{name}: {layout}", 3 if numel(shapes) < LARGE else 5, run_one)


def whole(row: Row, shapes: Shapes, seconds: float) -> None:
    """Out and back, dots, decision and update: ours by every backend and in a graph, and torch's, launches counted."""
    v = vectors(shapes, 0)
    arms: dict[str, Arm] = {}
    for backend in serving():
        arms[backend] = forced(backend, step_of_ours(v))
    spelled = {name: eager(name, v) for name in ("displace", "grad_dot", "sgd")}

    def by_torch(update: str) -> Arm:
        out, dots, last = (
            spelled[n][h] for n, h in (("displace", "foreach"), ("grad_dot", "foreach"), ("sgd", update))
        )
        return lambda: (out(), out(), dots(), last())

    arms |= {"torch: foreach": by_torch("foreach"), "torch: foreach, fused optimizer": by_torch("fused")}
    counted = {name: launches(arm) for name, arm in arms.items()}
    row["launches"] = {name: None if each is None else sum(each.values()) for name, each in counted.items()}
    row["launched"] = {name: each for name, each in counted.items() if name in backends.PREFERENCE["cuda"]}
    in_graphs(row, arms)
    times = measured(row, arms, 2 * seconds)
    row["gigabytes_per_second"] = {
        name: round((2 * TRAFFIC["displace"] + 2 + TRAFFIC["sgd"]) * 4 * numel(shapes) / spent / 1e9, 1)
        for name, spent in times.items()
    }
    settled(row)


def step_of_ours(v: Vectors) -> Arm:
    control = control_scalars(device())
    hyper = hyper_parameters(device(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, clip=1.0)
    alpha, losses = (torch.tensor(x, dtype=torch.float64, device=device()) for x in (ALPHA, [1.0, 1.0]))

    def step() -> None:
        ops.displace(v[4], v[2], v[0], alpha)
        ops.displace(v[4], v[2], v[1], alpha)
        dots, _ = ops.grad_dot(v[0], v[1])
        ops.step_control(control, dots, losses, hyper)
        ops.meta_update(v[2], v[0], v[1], v[3], control=control, hyper=hyper)

    return step


def one(row: Row, name: str, layout: str, shapes: Shapes, seconds: float) -> None:
    """One operation: our backends, those in a graph, torch's eager spellings, and a copy."""
    size = numel(shapes)
    row |= {"operation": name, "layout": layout, "elements": size}
    interpreter = ["triton"] if device().type == "cpu" and here("triton") else []
    checked = dict.fromkeys([*serving(), *interpreter])
    wrong = {backend: fault for backend in checked if (fault := fault_of(backend, name, shapes))}
    row["wrong"] = wrong
    sets = rounds(size)
    held = [vectors(shapes, seed) for seed in range(sets)]
    arms: dict[str, Arm] = {"copy": rotating(operations.copies(size, sets))}
    for backend in serving():
        if backend not in wrong:
            arms[backend] = rotating([forced(backend, operations.ours(name, v)) for v in held])
    spelled = [eager(name, v) for v in held]
    arms |= {f"torch: {how}": rotating([each[how] for each in spelled]) for how in spelled[0]}
    if sets == 1:  # a graph of one buffer in the cache would be no figure
        in_graphs(row, arms)
    summary(row, measured(row, arms, seconds), size)
    assert not wrong, f"not what float64 says: {wrong}"
    settled(row)


def tuned(row: Row, name: str, layout: str, shapes: Shapes, seconds: float, compiler: str) -> None:
    """One operation beside torch's compiler, which gets the spelling by lists and by _foreach."""
    row |= {"operation": name, "layout": layout, "elements": numel(shapes), "wrong": {}}
    sets = rounds(numel(shapes))
    held = [vectors(shapes, seed) for seed in range(sets)]
    best = backends.serving(device().type)
    several: dict[str, list[Arm]] = {best: [operations.ours(name, v) for v in held]}
    several["torch: compiled"] = compiled(name, held, compiler)
    several["torch: foreach"] = [eager(name, v)["foreach"] for v in held]
    # an optimizer's step is compiled anew for every optimizer, a quarter of a minute each time
    few = several["torch: foreach"][:1] if name in OPTIMIZERS else several["torch: foreach"]
    several["torch: compiled foreach"] = [torch.compile(arm, backend=compiler) for arm in few]
    operations.check(name, shapes, several, held[0])
    arms = {"copy": rotating(operations.copies(numel(shapes), sets))}
    arms |= {how: rotating(each) for how, each in several.items()}
    if sets == 1:
        in_graphs(row, arms)
    row["one_buffer"] = [how for how, each in several.items() if len(each) < sets]  # some of it stays in the cache
    summary(row, measured(row, arms, seconds), numel(shapes))
    settled(row)


def rounds(size: int) -> int:
    """How many buffers the arms go round."""
    return 1 if device().type == "cpu" else max(1, CACHE // (4 * size))


def measured(row: Row, arms: dict[str, Arm], seconds: float) -> dict[str, float]:
    """Medians, written into the row with their quartiles; an arm that cannot run is dropped, and the row says why."""
    for name, arm in list(arms.items()):
        try:
            arm()
        except Exception as error:
            drop(row, name, error, ours=name.partition(",")[0] in backends.PREFERENCE["cuda"])
            del arms[name]
            release()
    times = sampled(arms, seconds)
    row["seconds"] = {name: spread(each) for name, each in times.items()}
    return medians(times)


def summary(row: Row, times: dict[str, float], size: int) -> None:
    """Bandwidths, and how many times as fast as torch's spellings the backends are."""
    row["copy_gigabytes_per_second"] = round(2 * 4 * size / times["copy"] / 1e9, 2)
    mine = [each for each in times if each != "copy" and not each.startswith("torch: ")]
    theirs = {each: spent for each, spent in times.items() if each.startswith("torch: ")}
    row["gigabytes_per_second"] = {
        each: round(TRAFFIC[row["operation"]] * 4 * size / times[each] / 1e9, 2) for each in mine
    }
    # from seconds: of a few bytes on a slow machine the bandwidth is rounded to nothing
    copied = 2 / times["copy"]
    row["of_copy"] = {each: round(TRAFFIC[row["operation"]] / times[each] / copied, 3) for each in mine}
    if theirs:
        best = min(theirs, key=lambda each: theirs[each])
        row["best_torch"] = best.removeprefix("torch: ")
        row["times_as_fast_as_best_torch"] = {each: round(theirs[best] / times[each], 2) for each in mine}
    if "torch: foreach" in theirs:
        row["times_as_fast_as_foreach"] = {each: round(theirs["torch: foreach"] / times[each], 2) for each in mine}


def in_graphs(row: Row, arms: dict[str, Arm]) -> None:
    """Our backends once more as CUDA graphs."""
    if device().type != "cuda":
        return
    for backend in [each for each in arms if each in ("triton", "extension")]:
        try:
            arms[f"{backend}, graph"] = captured(arms[backend])
        except Exception as error:
            drop(row, f"{backend}, graph", error, ours=True)


def fault_of(backend: str, name: str, shapes: Shapes) -> str | None:
    """In what an operation of a backend is not what it is in float64."""
    if numel(shapes) >= LARGE:
        return None
    try:
        with through(backend):
            v = operations.vectors(shapes, 0)
            mine = operations.ours(name, v)

            def served() -> object:  # `check` itself asks for plain torch when it makes the truth
                with through(backend):
                    return mine()

            operations.check(name, shapes, {backend: [served]}, v)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # not compiled, not launched, not right: it has no figure, and the others have
        return f"{type(error).__name__}: {error}"[:400]
    return None


def serving() -> list[str]:
    """The backends that are there."""
    return [b for b in ("triton", "extension", "torch") if backends.unavailable(b, device().type) is None]


def through(backend: str) -> AbstractContextManager[Any]:
    if backend == "triton" and device().type == "cpu":
        from kernel_cases import interpreted

        return interpreted()
    return backends.backend(backend)


def forced(backend: str, arm: Callable[[], object]) -> Arm:
    """The arm, served by this backend."""

    def run() -> object:
        with through(backend):
            return arm()

    return run
