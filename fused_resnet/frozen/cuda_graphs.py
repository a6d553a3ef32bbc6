"""CUDA graphs of a function of one tensor: records its launches once per input shape, and starts them as one.

A graph reads and writes the memory that it was recorded with. So an input is copied into the graph's memory, and the
result is returned as a copy. Two calls never overlap on the device: each waits for the event that the one before
recorded, whatever its thread and stream. All graphs of one ``Graphs`` share a memory pool, because no two run at once.
Source: PyTorch's notes on CUDA graphs (torch.cuda.graph).
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

# The number of shapes that get a graph. Each graph keeps memory, and recording one takes as long as several calls.
SHAPES = 8
# Calls before a recording, so that measurements and libraries' set-up happen outside the graph.
_WARM_UP = 2
# Only one recording runs at a time in a process.
_recording = Lock()


def _can_record(x: Tensor) -> bool:
    """Whether the caller is not recording a graph itself."""
    return x.device.type == "cuda" and x.numel() > 0 and not torch.cuda.is_current_stream_capturing()


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    x: Tensor
    out: Any


class Graphs:
    """The graphs of a function, one for each of the first ``SHAPES`` input shapes.

    Other inputs are computed without a graph. If a recording failed (``refused`` says why), all inputs are. Copies and
    pickles start empty. Several threads may call it at once.
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
        """function(x). The caller owns the tensors of the result."""
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
        """Records a graph; None if there are enough graphs, or if none can be recorded."""
        if len(self._graphs) >= SHAPES:
            warn_once(f"cuda_graph: {SHAPES} input shapes of this model have a graph, others run without")
            return None
        if self._done is None:
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        static = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            # after a failed recording torch.cuda.graph alone would leave its stream as the current one
            with _recording.held(), torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    function(static)
                # other threads may continue to allocate
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
