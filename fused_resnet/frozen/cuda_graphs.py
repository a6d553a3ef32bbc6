"""CUDA graphs of a function of one tensor: its launches recorded once per input shape, and started as one.

A graph reads and writes the very memory that it was recorded with. So an input is copied into the graph's own, the
result is returned as a copy, and two calls never overlap on the device: each waits for the event that the one before
recorded, whatever thread and stream it came from. All graphs of one ``Graphs`` share a memory pool, as no two run at
once. Source: PyTorch's notes on CUDA graphs (torch.cuda.graph).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fused_resnet.backends import warn_once
from fused_resnet.base.locks import Lock

# Shapes that get a graph; each keeps memory and takes as long as several calls to record.
SHAPES = 8
# Calls before one is recorded: plans are measured and libraries set themselves up outside the graph.
_WARM_UP = 2
# One recording at a time in a process.
_recording = Lock()


def _can_record(x: Tensor) -> bool:
    """Not what a caller is recording already."""
    return x.device.type == "cuda" and x.numel() > 0 and not torch.cuda.is_current_stream_capturing()


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    x: Tensor
    out: Any


class Graphs:
    """The graphs of a function, one for each of the first ``SHAPES`` input shapes; other inputs, and all of them where
    recording failed (``refused`` says why), are computed without.

    Copies and pickles of it start empty. Threads may call it at once.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._graphs: dict[Any, _Graph] = {}
        self._lock = Lock()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def __repr__(self) -> str:
        if self.refused is not None:
            return f"no CUDA graph: {self.refused}"
        return f"CUDA graphs of {len(self._graphs)} input shapes"

    def __call__(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """function(x); its tensors are the caller's own."""
        if not _can_record(x):
            return function(x)
        with self._lock.held(), torch.cuda.device(x.device):
            graph = self._graphs.get((x.shape, x.dtype))
            if graph is None and self.refused is None:
                graph = self._record(function, x)
            if graph is not None:
                return self._replay(graph, x)
        return function(x)

    def _record(self, function: Callable[[Tensor], Any], x: Tensor) -> _Graph | None:
        """None where there are enough graphs, or none can be had."""
        if len(self._graphs) >= SHAPES:
            warn_once(f"cuda_graph: {SHAPES} input shapes of this model have a graph, others run without")
            return None
        if self._done is None:
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        static = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            # torch.cuda.graph alone would leave its stream the current one where recording fails
            with _recording.held(), torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    function(static)
                # other threads may go on allocating
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    out = function(static)
        except RuntimeError as error:
            self.refused = f"{type(error).__name__}: {error}".splitlines()[0]
            warn_once(f"cuda_graph: this model can't be recorded and runs without a graph ({self.refused})")
            return None
        finally:
            current.wait_stream(stream)
        made = self._graphs[(x.shape, x.dtype)] = _Graph(graph, static, out)
        return made

    def _replay(self, graph: _Graph, x: Tensor) -> Any:
        assert self._done is not None
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        graph.x.copy_(x)
        graph.graph.replay()
        out = tree_map_only(Tensor, torch.clone, graph.out)
        self._done.record(stream)
        return out
