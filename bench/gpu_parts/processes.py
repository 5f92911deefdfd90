"""Commands that leave nothing behind: what they started, and what that started, ends with them.

What goes on running on the GPU would be in every figure that is taken afterwards.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
KEPT = 20  # lines of stderr
Done = subprocess.CompletedProcess[str]


def contained(command: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> Done:
    """Run a command from the repository's root and collect what it says; its process group ends with it.

    The group is its own, but the session is the caller's, so that whoever ends the caller's session ends this too.

    Raises:
        subprocess.TimeoutExpired: it was ended after so many seconds.
    """
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, process_group=0, **said)  # type: ignore[call-overload]
    try:
        out, fault = child.communicate(timeout=max(seconds, 1))
    finally:
        _kill_group(child.pid)
        child.wait()
        for stream in (child.stdout, child.stderr):
            stream.close()
    return subprocess.CompletedProcess(command, child.returncode, out, fault)


def process(command: list[str], seconds: float) -> str | None:
    """Run a command in a session of its own and end all of the session when it ends or its time is up.

    Returns:
        None where all was well; else what happened, and below it the last lines that it wrote to stderr.
    """
    environment = os.environ | {"FASTLUR_SUITE": "1", "PYTHONUNBUFFERED": "1"}
    child: Any = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    last: deque[str] = deque(maxlen=KEPT)
    reader = threading.Thread(target=_pass_on, args=(child.stderr, last), daemon=True)
    reader.start()
    fault = None
    try:
        status = child.wait(seconds)
        fault = None if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        fault = f"ended from outside after {seconds:.0f} s"
    finally:
        _kill_session(child.pid)
        child.wait()
        reader.join(5)
        if not reader.is_alive():
            child.stderr.close()
    return None if fault is None else "\n".join([fault, *last])


def _pass_on(stream: Any, last: deque[str]) -> None:
    for line in stream:
        last.append(line.rstrip())
        sys.stderr.write(line)


def _kill_session(leader: int) -> None:
    """Every process of the session, whatever groups it has made; without /proc, the leader's group alone."""
    _kill_group(leader)
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            session = int(entry.read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(entry.parent.name), signal.SIGKILL)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone already; macOS says the latter of zombies
        os.killpg(leader, signal.SIGKILL)
