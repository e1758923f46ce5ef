"""Functions of one table of numbers: captured once on a GPU, then replayed by one launch.

The table comes from the host, (R, N) in int64, and never changes its shape. A function reads it and whatever tensors of
the device it was made with. It must read no number back, allocate nothing that depends on one, and always write to the
same places. On a CPU it is called instead, between the same buffers, so that tests see what a GPU would.

A function is run once with a table that harms nobody before it is captured: libraries prepare themselves then, which a
capture does not allow. One that cannot be captured is launched kernel by kernel from then on.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trm.device import refill, send

logger = logging.getLogger(__name__)

Function = Callable[[Tensor], Tensor]

_one_at_a_time = threading.Lock()  # to prepare a function: a decoder may be tried while others decode
_failed: list[torch.cuda.CUDAGraph] = []  # captures that torch still looks at


class Graphs:
    """The functions of one device. They are those of modules, and die with them: nothing here keeps a module alive.

    count: functions so far, plain: those among them that could not be captured. seconds, bytes: what preparing them
    has come to.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.plain = 0
        self.seconds = 0.0
        self.bytes = 0
        self._device = device
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._of: WeakKeyDictionary[nn.Module, dict[Hashable, _Graph]] = WeakKeyDictionary()

    def run(
        self, owner: nn.Module, key: Hashable, function: Function, table: Tensor, idle: Callable[[], Tensor]
    ) -> Tensor:
        """What `function` gives for a table on the host, in a tensor that only the next run of the same key overwrites.

        owner, key: whatever the function and its shapes depend on. idle: a table of the same shape that may be computed
        at any time.
        """
        graphs = self._of.setdefault(owner, {})
        if key not in graphs:
            with _one_at_a_time:
                started = time.perf_counter()
                graphs[key] = self._prepared(key, function, send(idle(), self._device))
                self.count += 1
                self.seconds += time.perf_counter() - started
        return graphs[key].run(function, table)

    def _prepared(self, key: Hashable, function: Function, table: Tensor) -> "_Graph":
        if self._recorder is None:
            return _Graph(table, torch.empty_like(function(table)))
        # Not in the pool, where another graph may overwrite it before it is read.
        out = torch.empty_like(self._recorder.warm_up(function, table))
        self.bytes += table.nbytes + out.nbytes
        try:
            replay, num_bytes = self._recorder.capture(lambda: out.copy_(function(table)))
        except RuntimeError:
            self.plain += 1
            logger.warning("a call of the model is not captured, and slower for that: %s", key, exc_info=True)
            return _Graph(table, out)
        self.bytes += num_bytes
        return _Graph(table, out, replay)


class _Graph:
    """One function's buffers, and what computes it between them where it was captured."""

    def __init__(self, table: Tensor, out: Tensor, replay: Callable[[], None] | None = None) -> None:
        self._table = table
        self._out = out
        self._replay = replay

    def run(self, function: Function, table: Tensor) -> Tensor:
        """Fill the table, and compute."""
        refill(self._table, table)
        if self._replay is not None:
            self._replay()
        else:
            self._out.copy_(function(self._table))
        return self._out


class Recorder:
    """Captures on a stream of its own, into one pool of memory: what graphs use between their ends, they share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Function, table: Tensor) -> Tensor:
        """Run a function where it will be captured."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                return function(table)
        finally:
            here.wait_stream(self._stream)

    def capture(self, compute: Callable[[], object]) -> tuple[Callable[[], None], int]:
        """What replays a computation, and the bytes that this takes."""
        torch.cuda.empty_cache()  # a capture cannot take what lies idle there
        free = self._free_bytes()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                # Of this thread alone: others go on launching.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    compute()
                finally:
                    graph.capture_end()
        except BaseException:
            self._recover(graph)
            raise
        return graph.replay, free - self._free_bytes()

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a capture leaves behind that did not come to its end. Torch does not.

        The random generator would capture for ever. So would the allocator, and never again give back idle memory where
        there is too little; its pool cannot be captured into again. Torch's allocator of pinned memory looks at the
        graph from then on.
        """
        device = torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError:
            return  # the capture did come to its end, though its function failed: all is given back with the graph
        torch._C._cuda_releasePool(device, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        _failed.append(graph)

    def _free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])
