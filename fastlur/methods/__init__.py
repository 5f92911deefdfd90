"""The methods, one file each, found by their presence. A method is a `Recipe` with a `direction` (see `base`)."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from fastlur.errors import ArgumentError, nearest
from fastlur.methods.base import Cost, Direction, Method, Recipe, State
from fastlur.methods.components import SaliencyMask, Trim

if TYPE_CHECKING:  # for type checkers, which do not see what is found below; a test keeps it whole
    from fastlur.methods.bad_teacher import BadTeacher as BadTeacher
    from fastlur.methods.boundary_expand import BoundaryExpand as BoundaryExpand
    from fastlur.methods.boundary_shrink import BoundaryShrink as BoundaryShrink
    from fastlur.methods.eupmu import EUPMU as EUPMU
    from fastlur.methods.fine_tune import FineTune as FineTune
    from fastlur.methods.gradient_ascent import GradientAscent as GradientAscent
    from fastlur.methods.gru import GRU as GRU
    from fastlur.methods.l1_sparse import L1Sparse as L1Sparse
    from fastlur.methods.ltu import LTU as LTU
    from fastlur.methods.lur import LUR as LUR
    from fastlur.methods.mox import MOX as MOX
    from fastlur.methods.neggrad_plus import NegGradPlus as NegGradPlus
    from fastlur.methods.pcgrad import PCGrad as PCGrad
    from fastlur.methods.random_label import RandomLabel as RandomLabel
    from fastlur.methods.retrain import Retrain as Retrain
    from fastlur.methods.salun import SalUn as SalUn
    from fastlur.methods.scissorhands import ScissorHands as ScissorHands
    from fastlur.methods.scrub import SCRUB as SCRUB
    from fastlur.methods.selective_amnesia import SelectiveAmnesia as SelectiveAmnesia
    from fastlur.methods.ssd import SSD as SSD

__all__ = [
    "METHODS",
    "Cost",
    "Direction",
    "Recipe",
    "SaliencyMask",
    "State",
    "Trim",
    "available",
    "preset",
    "resolve",
]

COMPONENTS = {"trim": "fastlur.methods.Trim()", "mask": "fastlur.methods.SaliencyMask()"}


def _found() -> dict[str, type[Recipe]]:
    """The named recipes of the modules beside this one, LUR first.

    Raises:
        ImportError: two of them have one name.
    """
    recipes: list[type[Recipe]] = []
    for entry in iter_modules(__path__):
        module = import_module(f"{__name__}.{entry.name}")
        mine = [
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
        ]
        recipes += [
            value for value in mine if issubclass(value, Recipe) and value is not Recipe and "name" in vars(value)
        ]
    return _by_name(recipes)


def _by_name(recipes: list[type[Recipe]]) -> dict[str, type[Recipe]]:
    found: dict[str, type[Recipe]] = {}
    for recipe in sorted(recipes, key=lambda recipe: (recipe.name != "lur", recipe.name)):
        other = found.setdefault(recipe.name, recipe)
        if other is not recipe:
            both = " and ".join(f"{each.__module__}.{each.__qualname__}" for each in (other, recipe))
            raise ImportError(f"{both} both have the name {recipe.name!r}; rename one of them")
    return found


METHODS: dict[str, type[Recipe]] = _found()
globals().update({recipe.__name__: recipe for recipe in METHODS.values()})  # fastlur.methods.ScissorHands and so on


def available() -> dict[str, str]:
    """The methods by name, each with one line about it: what it does, and what a step costs with its defaults."""
    return {
        name: f"{(recipe.__doc__ or '').strip().splitlines()[0]} ({recipe().cost})" for name, recipe in METHODS.items()
    }


def preset(method: str, name: str) -> dict[str, Any]:
    """Published settings as keyword arguments of `unlearn`.

    Example:
        >>> fastlur.unlearn(model, forget, retain, **fastlur.methods.preset("salun", "cifar10"))   # doctest: +SKIP

    Args:
        method: the method's name.
        name: the preset's, one of `fastlur.methods.METHODS[method].presets`.

    Raises:
        ArgumentError: there is no such method or preset.
    """
    recipe = _recipe(method)
    if not isinstance(name, str) or name not in recipe.presets:
        known = nearest(name, recipe.presets) if recipe.presets else "it has none"
        raise ArgumentError(f"name={name!r} is no preset of {method}; {known}")
    settings = dict(recipe.presets[name])
    return settings | {"method": recipe(**settings.pop("method", {}))}


def resolve(method: str | Method) -> Method:
    """A method by name with its defaults, or the instance of a `Recipe` itself.

    Raises:
        ArgumentError: no such name (the nearest one is suggested), or no instance of a `Recipe`.
    """
    if isinstance(method, str):
        return _recipe(method)()
    if not isinstance(method, Recipe):
        raise ArgumentError(
            f"method={method!r} is neither a name nor an instance of a subclass of fastlur.methods.Recipe, which has "
            "everything that a method needs but its direction"
        )
    for part, example in COMPONENTS.items():
        value = getattr(method, part)
        if value is not None and (isinstance(value, type) or not callable(value)):
            raise ArgumentError(f"{part}={value!r} is no component; pass {example}, or None")
    return method


def _recipe(name: str) -> type[Recipe]:
    if not isinstance(name, str) or name not in METHODS:
        raise ArgumentError(f"method={name!r} is unknown; {nearest(name, METHODS)}")
    return METHODS[name]
