"""Ctrl-C, kept until a step is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

NOTICE = b"\nstopping after this step; Ctrl-C once more stops at once\n"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, raised between two steps: the model is that of the last one.

    Attributes:
        amid: it came while a step was being made or looked at, so that streams and rules are not all of that step.
    """

    amid = False


class Interrupt:
    """Inside, the first Ctrl-C is only noted; the second raises at once, as does every one outside.

    A handler of the caller's own is left in place, and so is everything off the main thread, where there are none.

    Attributes:
        pending: there was one.
    """

    def __init__(self) -> None:
        self.pending = False

    def __enter__(self) -> Interrupt:
        mine = threading.current_thread() is threading.main_thread()
        self._replaced = mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._replaced:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.pending and kind is None:
            raise KeyboardInterrupt("the run is over, and the model is as it left it")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True
        os.write(2, NOTICE)  # a handler may run inside any print


class Whole:
    """Inside, Ctrl-C waits for the end, whoever handles it: for work that must not be left half done."""

    def __enter__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._came: list[tuple[int, FrameType | None]] = []
        handler: Any = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, lambda number, frame: self._came.append((number, frame)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        for each in self._came:
            self._handler(*each)
