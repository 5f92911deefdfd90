"""The protocol of a method: three small functions. Whoever adds a method adds one file and touches nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from fastlur.passes import Loss, Passes
from fastlur.space import Vector


class Direction(NamedTuple):
    """The vector to descend along, as a sum of two: what retaining and what forgetting contribute.

    A method that only knows the sum gives it as `retain` alone.
    """

    retain: Vector
    forget: Vector | None = None


class State(Protocol):
    """What a method carries from step to step; it alone knows what is in it."""

    def vectors(self) -> dict[str, Vector]:
        """The vectors that the next step depends on, by name: what a checkpoint must hold."""
        ...

    def resume(self, names: Sequence[str]) -> dict[str, Vector]:
        """The vectors to read back, given the names that `vectors` had; the caller fills them."""
        ...


class Method(Protocol):
    """A way to forget.

    Attributes:
        name: as `unlearn(method=…)` takes it.
        forget_weight: the factor λ on the forget loss.
    """

    name: ClassVar[str]

    @property
    def forget_weight(self) -> float:
        """λ ≥ 0."""
        ...

    def default_forget_loss(self, task: str) -> Loss:
        """The forget loss where the user gives none."""
        ...

    def prepare(self, passes: Passes) -> State:
        """Once, before the first step."""
        ...

    def direction(self, passes: Passes, state: Any) -> Direction:
        """Per step: two vectors whose sum is the direction to descend along (the second may be absent)."""
        ...

    def finish(self, passes: Passes, state: Any) -> None:
        """Once, after the last step."""
        ...

    def settings(self) -> dict[str, Any]:
        """What distinguishes this instance, as plain JSON values."""
        ...
