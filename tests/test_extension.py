"""The compiled extension as a library: what it refuses, and how it is loaded."""

import re
import shutil

import pytest
import torch
from building import ROOT, run
from extension_cases import DTYPES, control, double, hyper, numbers

from fastlur import _extension as extension
from fastlur import reference

pytestmark = pytest.mark.usefixtures("compiled")


def test_empty_lists():
    total, each = extension.grad_dot([], [])
    assert torch.equal(total, torch.zeros(3).double()) and each.shape == (0, 3)
    extension.displace([], [], [], numbers(1.0))
    assert extension.regularize([], [], None, None, hyper()).item() == 0
    extension.meta_update([], [], None, [], [], None, None, None, control(), hyper())
    extension.project([], [], numbers(-1.0, 1.0, 1.0), "symmetric")
    extension.extrapolate([], [], [], numbers(1.0), numbers(1.0))
    extension.saliency([], [], None)


def test_places_may_differ_in_dtype():
    a = [torch.randn(100).to(dtype) for dtype in DTYPES]
    b = [torch.randn(100).to(dtype) for dtype in DTYPES]
    _, each = extension.grad_dot(a, b)
    torch.testing.assert_close(each, reference.grad_dot(double(a), double(b))[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: extension.grad_dot([x], [x, x]), "2 tensors"),
        (lambda x: extension.grad_dot([x], [x[:5]]), "shape"),
        (lambda x: extension.grad_dot([x], [x.double()]), "dtype"),
        (lambda x: extension.grad_dot([x.int()], [x.int()]), "float32"),
        (lambda x: extension.displace([x], [x], [x], torch.tensor(1.0)), "float64"),
        (
            lambda x: extension.meta_update([x], [x], None, [x], None, None, None, None, numbers(1.0), hyper()),
            "control",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.zeros(10))


def test_an_unknown_projection_is_refused():
    with pytest.raises(ValueError, match="'sideways' is no projection"):
        extension.project([torch.zeros(1)], [torch.zeros(1)], numbers(-1.0, 1.0, 1.0), "sideways")


def test_autograd_notices_what_is_written():
    leaf, weight = torch.randn(10, requires_grad=True), torch.randn(10)
    product = (leaf * weight).sum()
    extension.displace([weight], [torch.zeros(10)], [torch.ones(10)], numbers(1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_the_layout_is_that_of_the_reference():
    text = (ROOT / "csrc" / "layout.h").read_text()
    for names in re.findall(r"enum \w+ \{([^}]*)\}", text):
        for place, name in enumerate(names.split(",")):
            assert getattr(reference, name.strip()) == place


def test_another_library_than_the_one_that_is_loaded_is_refused(tmp_path):
    here = extension.library()
    assert extension.load() is None and extension.load(here) is None
    for other in (tmp_path / "none.so", shutil.copy(here, tmp_path / "copy.so")):
        assert str(here) in extension.load(other) and "another process" in extension.load(other)
    assert extension.library() == here and extension.loaded()


def test_no_message_tells_where_it_was_built():
    with pytest.raises(RuntimeError, match="dtype that does not go with") as error:
        extension.displace([torch.ones(3)], [torch.ones(3)], [torch.ones(3).double()], numbers(1.0))
    assert str(ROOT) not in str(error.value) and "csrc/" in str(error.value)


def test_a_library_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    code = "from fastlur import _extension as e; print(e.load()); print(e.missing())"
    done = run(ROOT, ["-c", code], FASTLUR_EXT_PATH=str(tmp_path / "broken.so"))
    assert done.returncode == 0 and done.stdout.count("broken.so cannot be loaded") == 2
