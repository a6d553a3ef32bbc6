"""Processes side by side: what they return and tell, and that none is left behind, whatever ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.studies.pool import Advance, WorkerLost, side_by_side
from fused_resnet.training import ResumeError

SLEEPS = """
import os, signal, sys, time
from pathlib import Path
from fused_resnet.studies.pool import side_by_side

def sleep(folder, advance):
    Path(folder, str(os.getpid())).touch()
    while True:
        time.sleep(0.1)
        advance(1, "sleeps")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    side_by_side(sleep, sys.argv[1:] * 2, 2, lambda *words: None)
"""


def square(task: tuple[Path, int], advance: Advance) -> tuple[int, torch.Tensor]:
    """The first two wait for each other, and so run at a time; the third for both to be done, and known to be."""
    folder, number = task
    (folder / f"begun {number}").touch()
    advance(1, f"task {number}")
    wait_for(lambda: len(list(folder.glob("begun*"))) >= 2)
    if number == 4:
        wait_for(lambda: len(list(folder.glob("done*"))) == 2)
        time.sleep(0.5)
    advance(2, f"task {number}")
    (folder / f"done {number}").touch()
    return os.getpid(), torch.full((2, 3), number**2).t()


class NeedsTwo(Exception):
    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")


def fail(task: tuple[Path, str], advance: Advance) -> None:
    folder, how = task
    (folder / f"{os.getpid()} {how}").touch()
    advance(1, f"task {how}")
    wait_for(lambda: len(list(folder.iterdir())) > 1)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "error":
        raise ResumeError("lr is 0.1 in the checkpoint and 0.2 now")
    if how == "unpicklable":
        raise NeedsTwo("one", "two")
    if how == "memory":
        torch.empty(2**50)
    time.sleep(600)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """No such process, or one that has ended and that nobody asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_results_come_in_order_and_work_is_told(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    tasks = [(tmp_path, n) for n in (5, 3, 4)]
    found = side_by_side(square, tasks, 2, lambda *words: told.append(words))
    assert [int(x[0, 0]) for _, x in found] == [25, 9, 16] and all(x.stride() == (1, 3) for _, x in found)
    assert os.getpid() not in (pids := {pid for pid, _ in found}) and len(pids) == 2
    assert sum(work for work, _ in told) == 9 and any(what.count("task") == 2 for _, what in told)
    assert told[-1] == (2, "task 4")  # what is done is no longer named
    # a single process, or a single task, is this one
    assert {pid for pid, _ in side_by_side(square, tasks[:2], 1, print)} == {os.getpid()}
    assert side_by_side(square, tasks[:1], 2, print)[0][0] == os.getpid() and side_by_side(square, [], 2, print) == []


@pytest.mark.parametrize(
    ("how", "expected", "message"),
    [("killed", WorkerLost, r"^the process at work on task killed was ended from outside"),
     ("memory", WorkerLost, r"^no memory for task memory beside 1 others: .*DefaultCPUAllocator"),
     ("error", ResumeError, r"^lr is 0\.1 in the checkpoint and 0\.2 now(\n|$)"),
     ("unpicklable", RuntimeError, r"^NeedsTwo: one and two\n(.|\n)*in fail\n")],
)  # fmt: skip
def test_an_error_ends_all(how: str, expected: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(expected, match=message):
        side_by_side(fail, [(tmp_path, "sleeps"), (tmp_path, how)], 2, lambda *words: None)
    pids = [int(path.name.split()[0]) for path in tmp_path.iterdir()]
    assert len(pids) == 2 and all(map(gone, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(number: Any, tmp_path: Path) -> None:
    (script := tmp_path / "sleeps.py").write_text(SLEEPS)
    (folder := tmp_path / "pids").mkdir()
    started = subprocess.Popen([sys.executable, script, folder], start_new_session=True, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: len(list(folder.iterdir())) == 2)
        if number == signal.SIGINT:  # as a terminal does
            os.killpg(started.pid, number)
        else:
            started.kill()
        pids = [int(path.name) for path in folder.iterdir()]
        wait_for(lambda: all(map(gone, pids)))
        error = started.communicate(timeout=60)[1].decode()
        assert started.returncode == -number and error.count("KeyboardInterrupt") == (number == signal.SIGINT)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
