"""What hypothesis draws calls from, models, data and values sensible and not, and what a call may not change."""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import blobs, mlp
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import fastlur

NOTHING_CHANGED = fastlur.ArgumentError, fastlur.ModelError, fastlur.DataError, fastlur.CheckpointError
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    10**30,
    0.5,
    1.0,
    -0.0,
    -2.5,
    1e300,
    1e-300,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "lur",
    "x\n*",
    b"bytes",
    (),
    [],
    {},
    [None],
    (1, 2, 3),
    {"a": 1},
    object(),
    object,
    lambda *_: None,
    lambda *_: 1 / 0,
    np.float32(0.5),
    np.array([1.0, 2.0]),
    1j,
    torch.tensor(0.3),
    torch.ones(3),
    torch.ones(0),
    torch.tensor(True),
    range(3),
    Ellipsis,
]
odd = st.sampled_from(ODD)
small = st.sampled_from([0, 0.0, 0.1, 0.5, 0.9, 1, 1.0, 2, 3, 1e-3, 7.5])


class Strange(nn.Module):
    """A classifier in front of something that is none."""

    def __init__(self, after: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.body, self.after = mlp(), after

    def forward(self, x: torch.Tensor) -> Any:
        """Whatever."""
        return self.after(self.body(x))


def _frozen(model: nn.Module, but: str = "") -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(but) and name.startswith(but))
    return model


def _with(model: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    change(model)
    return model


def _integers() -> nn.Module:
    model = mlp()
    model.counts = nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    return model


SENSIBLE_MODELS: list[Callable[[], Any]] = [
    mlp,
    lambda: mlp(dropout=0.5).eval(),
    lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)),
    lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).train(),
    lambda: _frozen(mlp(), "3."),
    lambda: _with(mlp(), lambda m: m.register_buffer("extra", torch.zeros(2))),
    _integers,
]
ODD_MODELS: list[Callable[[], Any]] = [
    lambda: None,
    lambda: 5,
    lambda: "model",
    lambda: mlp,
    lambda: nn.Linear,
    nn.Identity,
    nn.Module,
    lambda: _frozen(mlp()),
    lambda: mlp().half(),
    lambda: mlp().double(),
    lambda: mlp().to(torch.complex64),
    lambda: mlp().to("meta"),
    lambda: nn.LazyLinear(4),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
    lambda: mlp(inputs=5),
    lambda: mlp(classes=1),
    lambda: mlp(classes=3),
    lambda: _with(mlp(), lambda m: m[0].weight.data.fill_(float("nan"))),
    lambda: _with(mlp(), lambda m: m[0].weight.data.fill_(1e38)),
    lambda: _with(mlp(), lambda m: setattr(m[3], "bias", m[0].bias)),
    lambda: _with(mlp(), lambda m: m[3].register_parameter("sparse", nn.Parameter(torch.eye(3).to_sparse()))),
    lambda: _with(mlp(), lambda m: m.register_parameter("shared", nn.Parameter(m[0].weight.data[:1]))),
    lambda: _with(mlp(), lambda m: m.register_parameter("empty", nn.Parameter(torch.zeros(0)))),
    lambda: _with(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)), lambda m: m[0].running_var.fill_(float("nan"))),
    lambda: Strange(lambda x: None),
    lambda: Strange(lambda x: x.sum()),
    lambda: Strange(lambda x: x.detach()),
    lambda: Strange(lambda x: x * float("nan")),
    lambda: Strange(lambda x: (x, x)),
    lambda: Strange(lambda x: {"logits": x}),
    lambda: Strange(lambda x: x[:1]),
    lambda: Strange(lambda x: x.argmax(-1)),
    lambda: Strange(lambda x: 1 / 0),
    lambda: torch.jit.trace(mlp(), torch.randn(2, 6)),
]


class Items(Dataset):
    """A data set of one's own."""

    def __init__(self, item: Callable[[int], Any], length: Any = 9) -> None:
        self.item, self.length = item, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Stream(IterableDataset):
    """Items one after the other, of unknown number."""

    def __init__(self, count: int = 9) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return ((torch.full((6,), float(i)), i % 4) for i in range(self.count))


SENSIBLE_DATA: list[Callable[[], Any]] = [
    lambda: blobs(9),
    lambda: TensorDataset(*blobs(7)),
    lambda: DataLoader(TensorDataset(*blobs(9)), batch_size=4, shuffle=True),
    lambda: [blobs(4), blobs(3)],
    lambda: Subset(TensorDataset(*blobs(9)), [1, 3, 5, 7]),
    lambda: Items(lambda i: (np.random.default_rng(i).normal(size=6).astype("float32"), i % 4)),
    lambda: {"input": blobs(9)[0], "labels": blobs(9)[1]},
]
ODD_DATA: list[Callable[[], Any]] = [
    *[lambda value=value: value for value in ODD],
    lambda: blobs(1),
    lambda: blobs(0),
    lambda: (blobs(9)[0], blobs(8)[1]),
    lambda: (blobs(9)[0], torch.rand(9)),
    lambda: (blobs(9)[0], torch.full((9,), 7)),
    lambda: (blobs(9)[0], torch.full((9,), -100)),
    lambda: (blobs(9)[0], torch.full((9,), -1)),
    lambda: (blobs(9)[0], torch.rand(9, 4)),
    lambda: (blobs(9)[0] * float("nan"), blobs(9)[1]),
    lambda: (blobs(9)[0] * 1e38, blobs(9)[1]),
    lambda: (blobs(9)[0][:, :3], blobs(9)[1]),
    lambda: (torch.randint(0, 3, (9, 6)), blobs(9)[1]),
    lambda: (blobs(9)[0].double(), blobs(9)[1]),
    lambda: (blobs(9)[0].requires_grad_(), blobs(9)[1]),
    lambda: (blobs(9)[0], blobs(9)[1].float()),
    lambda: (blobs(9)[0], blobs(9)[1].to(torch.uint8)),
    lambda: (blobs(9)[0], blobs(9)[1].bool()),
    lambda: blobs(9)[0],
    lambda: (blobs(9)[0].numpy(), blobs(9)[1].numpy()),
    lambda: (blobs(9)[0].to("meta"), blobs(9)[1].to("meta")),
    lambda: iter([blobs(4)]),
    lambda: (each for each in [blobs(4)]),
    lambda: [blobs(4), None],
    lambda: [[1, 2], [3, 4]],
    lambda: ["a", "b"],
    lambda: [blobs(4), (blobs(2)[0][:, :5], blobs(2)[1])],
    lambda: [{"x": blobs(4)[0], "labels": blobs(4)[1]}],
    lambda: Items(lambda i: i),
    lambda: Items(lambda i: None),
    lambda: Items(lambda i: 1 / 0),
    lambda: Items(lambda i: (torch.randn(6), 2 if i < 5 else None)),
    lambda: Items(lambda i: (torch.randn(6), "label")),
    lambda: Items(lambda i: (torch.randn(6 + i % 2), 1)),
    lambda: Items(lambda i: (torch.randn(6), 1), 0),
    lambda: Items(lambda i: (torch.randn(6), 1), "many"),
    lambda: Items(lambda i: (torch.randn(6), 1), -3),
    Stream,
    lambda: Stream(0),
    lambda: DataLoader(Stream(), batch_size=2),
    lambda: DataLoader(TensorDataset(*blobs(9)), batch_size=1),
    lambda: DataLoader(TensorDataset(*blobs(9)), batch_size=None),
    lambda: DataLoader(TensorDataset(*blobs(9)), batch_size=20, drop_last=True),
    lambda: DataLoader(Items(lambda i: {"x": torch.randn(6)}), batch_size=3),
]


def mostly(sensible: list[Any], strange: list[Any]) -> st.SearchStrategy[Any]:
    """Three times out of four something sensible."""
    return st.integers(0, 3).flatmap(lambda n: st.sampled_from(strange if n == 3 else sensible))


models = mostly(SENSIBLE_MODELS, ODD_MODELS)
data = mostly(SENSIBLE_DATA, ODD_DATA)


class Watch:
    """Everything that a refused call must leave as it was, and what a call that works must leave alone."""

    def __init__(self, *models: Any) -> None:
        self.models = [model for model in models if isinstance(model, nn.Module)]
        self.before = self._look()

    def changed(self, contents: bool = True) -> str | None:
        """What has changed; `contents` False: but for the values of parameters and buffers."""
        for (name, before), (_, now) in zip(self.before, self._look(), strict=True):
            if (contents or name not in ("values", "buffers", "gradients")) and before != now:
                return name
        return None

    def _look(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [
            ("torch's random state", torch.get_rng_state().numpy().tobytes()),
            ("NumPy's random state", repr(np.random.get_state())),
            ("Python's random state", random.getstate()),
            ("grad mode", torch.is_grad_enabled()),
            ("autocast", torch.is_autocast_enabled("cpu")),
            ("default dtype", torch.get_default_dtype()),
            ("deterministic algorithms", torch.are_deterministic_algorithms_enabled()),
        ]
        for model in self.models:
            parameters, modules = list(model.named_parameters(remove_duplicate=False)), list(model.modules())
            found += [
                ("parameters", [(name, id(p), p.requires_grad, p.dtype) for name, p in parameters]),
                ("layout", [(p.stride(), p.layout) for _, p in parameters if _plain(p)]),
                ("storage", [_own(p) for _, p in parameters if _plain(p)]),
                ("modes", [module.training for module in modules]),
                ("hooks", [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]),
                ("parameters' hooks", [len(p._post_accumulate_grad_hooks or ()) for _, p in parameters if _plain(p)]),
                ("values", [_bytes(p) for _, p in parameters]),
                ("gradients", [None if p.grad is None else _bytes(p.grad) for _, p in parameters if _plain(p)]),
                ("buffers", [(name, _bytes(buffer)) for name, buffer in model.named_buffers()]),
            ]
        return found


def _plain(parameter: Any) -> bool:
    return parameter.layout == torch.strided and not isinstance(parameter, nn.UninitializedParameter)


def _own(parameter: torch.Tensor) -> Any:
    """How much memory lies behind it: more than its own, while it is in flat storage."""
    return "meta" if parameter.is_meta else parameter.untyped_storage().nbytes()


def _bytes(value: torch.Tensor) -> Any:
    if isinstance(value, nn.UninitializedParameter) or value.is_meta:
        return None
    value = value.detach()
    value = value.to_dense() if value.layout != torch.strided else value
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def options(draw, sensible, strange, most=3):
    """Some of the sensible options, and now and then a value that is none."""
    names = draw(st.lists(st.sampled_from(sorted(sensible)), max_size=most, unique=True))
    chosen = {name: draw(st.sampled_from(sensible[name])) for name in names}
    if draw(st.integers(0, 2)) == 2:
        chosen[draw(st.sampled_from(sorted(strange)))] = draw(odd)
    return chosen


calls = {"worked": 0, "refused": 0, "passed on": 0}


def tried(call: Callable[[], Any], *models: Any, begun: list[int] | None = None) -> Any:
    """Make a call: it works, or is refused in one line by a documented error with nothing changed.

    What a callable of the caller's raises may be passed on as it is; the world is as it was, the model a whole one.

    Args:
        call: the call.
        models: that it may change.
        begun: the steps that it made, if somebody counts them: what is refused after the first one has changed weights,
            and what the model or torch in it raises over a later batch is passed on; never what our own code does.

    Returns:
        What it returned; None if it did not.
    """
    watch, refused, passed = Watch(*models), None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call()
        except fastlur.FastlurError as error:
            refused = error
        except Exception as error:
            if of_ours(error) or not (begun or _of_the_caller(error)):
                raise
            passed = error
    if refused is None:
        calls["worked" if passed is None else "passed on"] += 1
        assert not (what := watch.changed(contents=False)), f"{what} changed"
        return result if passed is None else None
    calls["refused"] += 1
    assert str(refused), "a message without a word"
    assert "\n" not in str(refused), f"several lines: {refused}"
    early = isinstance(refused, NOTHING_CHANGED) and not begun
    assert not (what := watch.changed(early)), f"{what} changed, although it was refused: {refused!r}"
    return None


def of_ours(error: Exception) -> bool:
    """Whether code of the package itself raised what is none of its documented errors."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return Path(last.filename).is_relative_to(Path(fastlur.__file__).parent)


def _of_the_caller(error: Exception) -> bool:
    """Whether it was raised by a callable of the caller's: a model, a component, a rule or a callback."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return last.filename == __file__
