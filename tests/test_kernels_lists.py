"""Lists of tensors: one launch a dtype, tables made once, and what the launchers refuse."""

import ast
import sys
import weakref
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    UNEVEN,
    clones,
    close,
    double,
    draw,
    eight,
    full_of_nan,
    kernels,
    modules,
    number,
    operate,
    same,
    scalars,
)

from fastlur import _extension, reference

table = modules["table"]
FOLDER = Path(modules["table"].__file__).parent
without_gpu = pytest.mark.skipif(
    CUDA, reason="counts the interpreter's launches; test_kernels_gpu.py asks the profiler"
)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    from triton.runtime import interpreter

    names, call = [], interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


ONCE = ["dot_kernel", "finish_kernel", "displace_kernel", "project_kernel", "regularize_kernel", "finish_kernel"]
ONCE += ["control_kernel", "update_kernel", "extrapolate_kernel", "saliency_kernel"]


@without_gpu
@pytest.mark.parametrize("sizes", [[5000], [63] * 20, [0, 63, 0]], ids=["flat", "list", "one not empty"])
def test_every_operation_is_one_launch_and_a_sum_is_two(sizes, launches):
    operate(eight(sizes))
    assert launches == ONCE


@without_gpu
def test_two_dtypes_are_two_launches_but_one_last_stage(launches):
    operate(eight([63, 5, 63, 5], [torch.float32, torch.bfloat16] * 2))
    assert sorted(launches) == sorted(ONCE + [name for name in ONCE if name not in ("finish_kernel", "control_kernel")])


@without_gpu
@pytest.mark.parametrize("sizes", [[5000], [63] * 62, [9] * 600], ids=["flat", "ResNet-18's number", "many"])
@pytest.mark.parametrize("dtypes", [1, 2])
def test_the_vector_work_of_a_step_is_three_launches_a_dtype_and_two_more(sizes, dtypes, launches):
    """However many tensors: displacement, dots and update; the end of the sums and the decision come once a step."""
    if len(sizes) < dtypes:
        pytest.skip("one tensor has one dtype")
    kinds = [(torch.float32, torch.bfloat16)[i % dtypes] for i in range(len(sizes))]
    theta, a, u, first, _, _, _, out = eight(sizes, kinds)
    control, hyper, loss, alpha, _, _ = scalars()
    kernels.displace(out, theta, a, alpha)
    dots, _ = kernels.grad_dot(a, u)
    kernels.step_control(control, dots, loss, hyper)
    kernels.meta_update(theta, a, u, first, None, None, None, None, control, hyper)
    each = ["displace_kernel"] * dtypes + ["dot_kernel"] * dtypes
    assert launches == [*each, "finish_kernel", "control_kernel", *["update_kernel"] * dtypes]


@without_gpu
def test_tensors_without_elements_launch_nothing_but_the_last_stage(launches):
    operate(eight([0, 0]))
    assert launches == ["finish_kernel", "finish_kernel", "control_kernel"]


def test_a_list_gives_what_its_tensors_give_one_by_one():
    many = eight(UNEVEN)
    alone = [clones(each) for each in many]
    control = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, device=DEVICE)
    hyper = torch.tensor([0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, 1.0], dtype=torch.float64, device=DEVICE)
    kernels.meta_update(*many[:7], None, control, hyper)
    for place in range(len(UNEVEN)):
        kernels.meta_update(*([each[place]] for each in alone[:7]), None, control, hyper)
    assert all(same(left, right) for left, right in zip(many, alone, strict=True))


def test_mixed_dtypes_and_layouts_in_one_list():
    kinds = [DTYPES[i % 4] for i in range(len(UNEVEN))]
    theta, d = draw(UNEVEN, kinds, 0), draw(UNEVEN, kinds, 1)
    d[3] = draw([UNEVEN[3]], kinds[3], 1, contiguous=False)[0]
    theta[-1] = theta[-1].view(90, 100).t()
    d[-1] = d[-1].view(100, 90)
    out, truth = full_of_nan(theta), double(theta)
    kernels.displace(out, theta, d, number(0.1))
    reference.displace(truth, double(theta), double(d), number(0.1))
    close(out, truth, [t.abs() + 0.1 * v.abs() for t, v in zip(theta, d, strict=True)], steps=3)


def test_the_second_call_with_the_same_tensors_makes_no_table(monkeypatch):
    lists = eight(UNEVEN)
    operate(lists)
    monkeypatch.setattr(table, "_plan", None)
    operate(lists)


def test_tables_are_bounded_and_hold_no_tensor_alive():
    lists = [draw([3, 4], seed=seed) for seed in range(table.KEPT + 5)]
    for each in lists:
        kernels.saliency(each, each, None)
    assert len(table._kept) == table.KEPT
    alive = [weakref.ref(x) for each in lists for x in each]
    del lists, each
    assert not any(x() is not None for x in alive)


def test_an_address_that_returns_with_another_size_or_dtype_gets_a_table_of_its_own():
    x, other = draw([1025, 7])
    for part in (x[:63], x, x[:1024], x[:64], x[:128].view(torch.float64), x[:32].view(torch.bfloat16)):
        part.copy_(draw([part.numel()], part.dtype)[0])
        want = clones([part, other])
        kernels.saliency([part, other], [part, other], None)
        assert same([part, other], [w.abs() for w in want])
        assert bool((part >= 0).all())


@pytest.mark.parametrize("aligned", [True, False])
def test_wide_accesses_are_promised_only_where_all_addresses_allow(aligned):
    buffer = torch.zeros(64, device=DEVICE)
    lists = [[buffer[:8], buffer[8:15]], [buffer[16:24], buffer[24:31] if aligned else buffer[25:32]]]
    (group,) = table.plan(lists, 4).groups
    assert group.aligned == aligned


def test_blocks_are_told_apart_in_a_table():
    """The first program of each tensor, the sizes, and the owner of each program, for blocks of four."""
    (group,) = table.plan([draw([9, 0, 4, 1])], 4).groups
    assert group.table[:2].tolist() == [[0, 3, 4], [9, 4, 1]]
    assert group.owner.tolist() == [0, 0, 0, 1, 2]
    assert group.programs == 5


def test_what_the_launchers_refuse():
    a, b = draw([5, 6]), draw([5, 6])
    with pytest.raises(ValueError, match="zip"):
        kernels.grad_dot(a, b[:1])
    with pytest.raises(ValueError, match="number 1 differ in size"):
        kernels.grad_dot(a, [b[0], b[1][:5]])
    with pytest.raises(TypeError, match="int64"):
        kernels.grad_dot(a, [b[0], b[1].long()])


def test_the_layout_is_that_of_the_reference():
    names = [name for name in vars(modules["layout"]) if name.isupper()]
    assert len(names) == reference.HYPER + reference.CONTROL
    for name in names:
        assert getattr(modules["layout"], name).value == getattr(reference, name), name


def test_every_backend_knows_the_same_projections():
    assert modules["project"].KINDS == _extension.KINDS == reference.PROJECTIONS


def test_the_launchers_are_those_of_the_reference():
    import inspect

    for name in kernels.__all__:
        mine, theirs = (inspect.signature(getattr(where, name)) for where in (kernels, reference))
        assert mine == theirs, name


def test_kernels_import_torch_triton_and_each_other_only():
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [] if node.level == 1 else [node.module or ".."]
            else:
                continue
            for name in imported:
                top = name.split(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{path.name}: {name}"


@without_gpu
def test_tables_that_a_graph_reads_are_kept_for_good(monkeypatch):
    """A graph has their addresses: others, however many, may not take their place."""
    lists = [draw([5, 7], seed=0), draw([5, 7], seed=1)]
    recorded = table.plan(lists, 64)
    monkeypatch.setattr(table, "_captured", {})
    monkeypatch.setattr(table, "is_capturing", lambda device: True)
    assert table.plan(lists, 64) is recorded
    with pytest.raises(RuntimeError, match="call once with the same tensors before capturing a graph"):
        table.plan([draw([3, 4], seed=2)], 64)
    monkeypatch.setattr(table, "is_capturing", lambda device: False)
    others = [[draw([3, 4], seed=seed)] for seed in range(table.KEPT + 1)]  # held, so that addresses differ
    for each in others:
        table.plan(each, 64)
    assert table.plan(lists, 64) is recorded
    tables = [group.table for group in recorded.groups]
    assert all(
        any(kept is x for each in table._captured.values() for x in (g.table for g in each.groups)) for kept in tables
    )
