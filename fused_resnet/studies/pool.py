"""Runs tasks side by side in processes: reports progress, ends all together, and raises errors that a user can read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import torch

Advance = Callable[[float, str], object]
Task = TypeVar("Task")
Found = TypeVar("Found")


class WorkerLost(RuntimeError):
    """A process ended in the middle of its work, or ran out of memory."""


def side_by_side(
    function: Callable[[Task, Advance], Found], tasks: Sequence[Task], processes: int, advance: Advance
) -> list[Found]:
    """The results of ``function`` for every task. Tasks begin in this order, ``processes`` at a time.

    The processes import the main module again, so a script that calls this guards its code with
    ``if __name__ == "__main__"``.

    Args:
        function: called with a task and a callback that reports work done. The function, the tasks and the results can
            be pickled.
        tasks: the tasks. processes: with 1, or for a single task, the tasks run in this process.
        advance: called with the amount of work done and the names of the running tasks.

    Raises:
        WorkerLost: a process was killed, or memory ran out. Exceptions of ``function`` are raised as they are. In all
            these cases, and after a KeyboardInterrupt, the processes have ended. If this process is killed, they end
            when they next report work done.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        return [function(task, advance) for task in tasks]
    # Not concurrent.futures: its executor may not notice that the process which it started last has been killed. Here
    # each process has a pipe of its own, which closes when the process ends, and shares no lock.
    context = multiprocessing.get_context("spawn")  # a forked child lacks the threads of the parent's libraries
    started, busy, doing = dict[Connection, BaseProcess](), dict[Connection, int](), dict[Connection, str]()
    found, ahead = dict[int, Found](), iter(range(len(tasks)))

    def hand(pipe: Connection) -> None:
        """Starts the next task, if there is one."""
        if (i := next(ahead, None)) is not None:
            busy[pipe] = i
            _send(pipe, tasks[i])

    try:
        for _ in range(processes):
            pipe, theirs = context.Pipe()
            started[pipe] = context.Process(target=_work, args=(theirs, pickle.dumps(function)))
            started[pipe].start()
            theirs.close()
            hand(pipe)
        while busy:
            for ready in wait(list(busy)):
                pipe = cast(Connection, ready)
                match _receive(pipe):
                    case "told", work, what:
                        doing[pipe] = what
                        advance(work, ", ".join(dict.fromkeys(doing.values())))
                    case "done", result:
                        found[busy.pop(pipe)] = result
                        doing.pop(pipe, None)
                        hand(pipe)
                    case "failed", error:
                        raise _failure(error, doing.get(pipe), processes)
                    case None:
                        raise _lost(doing.get(pipe), processes)
        return [found[i] for i in range(len(tasks))]
    finally:
        _end(started)


def _end(started: dict[Connection, BaseProcess]) -> None:
    for pipe, process in started.items():
        if process.pid is not None:
            process.kill()
            process.join()
        pipe.close()


def _failure(error: Exception, doing: str | None, processes: int) -> Exception:
    """The error to raise for an error of the task ``doing``, run by one of ``processes`` processes."""
    # torch has a class for a GPU's memory only
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        why = str(error).partition("\n")[0]
        return WorkerLost(f"no memory for {doing} beside {processes - 1} others: {why}")
    return error


def _lost(doing: str | None, processes: int) -> WorkerLost:
    """The error to raise for a process that has ended before its task ``doing`` did."""
    if doing is None:
        return WorkerLost("a process ended before it began its work: see above")
    why = "was killed from outside, probably for lack of memory"
    return WorkerLost(f"the process at work on {doing} {why}; fewer processes than {processes} need less")


def _send(pipe: Connection, word: Any) -> bool:
    """Sends a message. Returns False if the other end is closed."""
    try:
        # as bytes: a pipe would move each tensor to shared memory, with a file descriptor per tensor
        pipe.send_bytes(pickle.dumps(word))
    except ConnectionError:
        return False
    return True


def _receive(pipe: Connection) -> Any:
    """Receives a message; None if the other end is closed."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        return None


# ---------------------------------------------------------------------------------------------------- in each process
def _work(pipe: Connection, pickled: bytes) -> None:
    """Runs the tasks that come through the pipe, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; only the parent handles it
    function = pickle.loads(pickled)

    def say(*word: Any) -> None:
        if not _send(pipe, word):
            os._exit(1)

    while (task := _receive(pipe)) is not None:
        try:
            done = function(task, lambda work, what: say("told", work, what))
        except Exception as error:
            say("failed", _portable(error))
        else:
            say("done", done)


def _portable(error: Exception) -> Exception:
    """The exception with a note that says where it was raised: tracebacks do not pass between processes."""
    error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # the class takes other arguments than it keeps, so it can't be pickled
        return RuntimeError(f"{type(error).__name__}: {error}\n{error.__notes__[-1]}")
