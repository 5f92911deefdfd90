"""Runs that are killed with SIGKILL at random moments and made again until they are done.

This file is both sides: run as a program it imports torch once, then forks a process a life, which makes the call of
`unlearn` and reports each step and each write of a checkpoint as it begins and ends. `Reaper` is the other side.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

EVERY = 5
SLOW = 0.01  # seconds that a flush to the disk is held up, so that a kill can fall into it
PATIENCE = 240  # seconds without a word


class Reaper:
    """Kills a run again and again.

    Attributes:
        kills: how many so far, each after at least one step of that life.
        while_writing: how many of them fell between the beginning and the end of a write.
        redone: for every life but the first, how many steps it made that an earlier one had already made.
    """

    def __init__(self, method: str, steps: int) -> None:
        program = [sys.executable, str(Path(__file__)), method, str(steps)]
        self._nursery = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._read = b""
        self.kills = self.while_writing = 0
        self.redone: list[int] = []
        self.furthest = 0

    def close(self) -> None:
        """End the nursery."""
        self._nursery.stdin.close()
        self._nursery.wait(PATIENCE)
        self._nursery.stdout.close()

    def live(self, directory: Path, out: Path, moment: tuple[str, int, float] | None = None) -> bool:
        """One life: True if it came to its end, False if it was killed.

        Args:
            directory: of the checkpoints.
            out: the file of the final weights.
            moment: None to let it live; else "step" or "write", how many of them to let begin, seconds to wait then.
        """
        self._nursery.stdin.write(f"{directory}\t{out}\n".encode())
        kind, word, *_ = self._line().split()
        assert kind == "pid"
        child, first, last, writing, left = int(word), None, None, False, moment and moment[1]
        while True:
            words = self._line().split()
            match words[0]:
                case "step":
                    last = int(words[1])
                    if first is None:
                        first = last
                        self._count(first)
                    self.furthest = last
                case "write":
                    writing = True
                case "written":
                    writing = False
                case "done":
                    assert self._line() == "dead 0"
                    return True
                case "dead":
                    raise AssertionError(f"it died by itself: {words}")
            if moment is not None and first is not None and words[0] == moment[0]:
                left -= 1
                if left == 0:
                    break
        time.sleep(moment[2])
        os.kill(child, signal.SIGKILL)
        done = False
        while (words := self._line().split())[0] != "dead":  # what it still said before it died
            done |= words[0] == "done"
            if words[0] == "step":
                self.furthest = int(words[1])
            writing = words[0] == "write" if words[0] in ("write", "written") else writing
        if done:
            return True
        assert words[1] == str(-signal.SIGKILL)
        self.kills += 1
        self.while_writing += writing
        return False

    def _count(self, first: int) -> None:
        if self.furthest:
            self.redone.append(self.furthest - (first - 1))

    def _line(self) -> str:
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._nursery.stdout], [], [], PATIENCE)
            assert ready, "not a word"
            more = os.read(self._nursery.stdout.fileno(), 1 << 16)
            assert more, "the nursery is gone"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()


def moment(drawn: random.Random) -> tuple[str, int, float]:
    """Some moment: after a few steps, or while something is written."""
    if drawn.random() < 0.5:
        return "step", drawn.randint(1, 2 * EVERY), drawn.random() * 0.004
    return "write", drawn.randint(1, 4), drawn.random() * 2 * SLOW


def main(method: str, steps: int) -> None:
    """The nursery."""
    import fastlur.api  # noqa: F401  (once, before the forks)

    if method == "ltu":
        import torch._dynamo  # noqa: F401  (which optimizers of torch would import in every life)

    for line in sys.stdin:
        directory, out = line.rstrip("\n").split("\t")
        child = os.fork()
        if not child:
            status = 1
            try:
                life(Path(directory), Path(out), method, steps)
                status = 0
            finally:
                os._exit(status)
        tell(f"pid {child}")
        _, status = os.waitpid(child, 0)
        tell(f"dead {os.waitstatus_to_exitcode(status)}")


def tell(text: str) -> None:
    """One line, whole."""
    os.write(1, f"{text}\n".encode())


def life(directory: Path, out: Path, method: str, steps: int) -> None:
    """The call of `unlearn`, its checkpoints written slowly."""
    import safetensors.torch
    import torch
    from helpers import blobs, learnable
    from torch import nn

    import fastlur
    from fastlur import folder
    from fastlur.methods import SaliencyMask
    from fastlur.targets import Novice

    write, flush = folder.Folder.write, os.fsync

    def slowly(handle: int) -> None:
        time.sleep(SLOW)
        flush(handle)

    def reported(self: folder.Folder, name: str, content: bytes) -> None:
        tell(f"write {name}")
        write(self, name, content)
        tell("written")

    folder.Folder.write = reported  # type: ignore[method-assign]
    folder.os.fsync = slowly  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 4))
    settings = {
        "lur": fastlur.LUR(mask=SaliencyMask(0.8)),
        "mox": fastlur.methods.MOX(alpha=0.2, momentum=0.7),
        "retrain": fastlur.methods.Retrain(reinitialise=True),
    }
    forget, retain = learnable(12), learnable(40)
    result = fastlur.unlearn(
        model,
        forget,
        retain,
        method=settings.get(method, method),
        steps=steps,
        batch_size=8,
        optimizer="adamw",
        checkpoint=directory,
        checkpoint_every=EVERY,
        keep_checkpoints=True,
        progress=False,
        forget_loss=Novice(epochs=20) if method == "lur" else None,
        callbacks=[lambda event: tell(f"step {event.step}")],
        stop=fastlur.stopping.Patience(fastlur.stopping.LossOn(blobs(20)), looks=10**6, every=3),
    )
    if method == "lur":
        assert result.settings["forget_target"].startswith("Imitation")  # so that a checkpoint holds it as well
    half = out.with_suffix(".half")
    half.write_bytes(safetensors.torch.save(model.state_dict()))
    half.replace(out)
    tell("done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
