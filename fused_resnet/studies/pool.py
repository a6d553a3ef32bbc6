"""Work side by side in processes of its own: told of as it goes, ended together, with errors that a user can read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import torch

Advance = Callable[[float, str], object]
Task = TypeVar("Task")
Found = TypeVar("Found")


class WorkerLost(RuntimeError):
    """A process ended in the middle of its work, or found no memory for it."""


def side_by_side(
    function: Callable[[Task, Advance], Found], tasks: Sequence[Task], processes: int, advance: Advance
) -> list[Found]:
    """``function`` of every task, begun in this order, ``processes`` at a time.

    Several processes import the main module again: a script that gets here keeps what it runs behind
    ``if __name__ == "__main__"``.

    Args:
        function: of a task and of what it tells of work done. It, the tasks and what it returns can be pickled.
        tasks: what is to be done. processes: with 1, or for a single task, this one.
        advance: told of work done and of everything that is being done.

    Raises:
        WorkerLost: a process was killed, or memory ran out. What ``function`` raises comes as it is. Either way, and
            after a KeyboardInterrupt, the processes have ended; where this one is killed, they end when they next tell
            of work done.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        return [function(task, advance) for task in tasks]
    # Not concurrent.futures: its executor may overlook that the process which it started last has been killed. Here
    # each process has a pipe of its own, which ends with it, and no lock that it could take along.
    context = multiprocessing.get_context("spawn")  # after a fork, the threads of the parent's libraries are missing
    started, busy, found = dict[Connection, BaseProcess](), dict[Connection, int](), dict[int, Found]()
    doing = dict[Connection, str]()
    ahead = iter(range(len(tasks)))

    def hand(pipe: Connection) -> None:
        """The next task, if there is one."""
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
                        advance(work, _listed(doing.values()))
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
    """What is raised for what a task raised, in one of so many processes."""
    if not _out_of_memory(error):
        return error
    why = str(error).partition("\n")[0]
    return WorkerLost(f"no memory for {doing} beside {processes - 1} others: {why}")


def _lost(doing: str | None, processes: int) -> WorkerLost:
    """What is raised for a process that is gone."""
    if doing is None:
        return WorkerLost("a process ended before its work began: see above")
    return WorkerLost(
        f"the process at work on {doing} was ended from outside, as a system short of memory does; "
        f"fewer than {processes} take less"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _out_of_memory(error: Exception) -> bool:
    # torch has a class of its own for a GPU's memory only
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _send(pipe: Connection, word: Any) -> bool:
    """False where the other end is gone."""
    try:
        # as bytes: a pipe would move every tensor to shared memory, each with a file descriptor of its own
        pipe.send_bytes(pickle.dumps(word))
    except ConnectionError:
        return False
    return True


def _receive(pipe: Connection) -> Any:
    """None where the other end is gone."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        return None


# ---------------------------------------------------------------------------------------------------- in each process
def _work(pipe: Connection, pickled: bytes) -> None:
    """Does what comes through the pipe, until nobody is at its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that started them decides
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
    """With where it was raised, which no traceback tells in another process."""
    error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an exception whose class needs other arguments than it keeps
        return RuntimeError(f"{type(error).__name__}: {error}\n{error.__notes__[-1]}")
