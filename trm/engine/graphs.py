"""Functions of tensors whose shapes never change: captured once on a GPU, then replayed by one launch.

A function reads its inputs, which are numbers from the host, and whatever tensors of the device it was made with. It
must read no number back, allocate nothing that depends on one, and always write to the same places. On a CPU it is
called instead, between the same buffers, so that tests see what a GPU would.

A function is run once with inputs that harm nobody before it is captured: libraries prepare themselves then, which a
capture does not allow.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trm.device import send

Function = Callable[..., Tensor]


class Graphs:
    """The captured functions of one device, in one pool of memory. They are those of modules, and die with them.

    count, seconds, bytes: what capturing has come to so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.seconds = 0.0
        self.bytes = 0
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if self._stream is not None else None
        self._of: WeakKeyDictionary[nn.Module, dict[Hashable, _Graph]] = WeakKeyDictionary()

    def run(
        self, owner: nn.Module, key: Hashable, function: Function, idle: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Tensor:
        """What `function` gives for inputs on the host, in a tensor that the next run of the same key overwrites.

        key: whatever the function and its shapes depend on, beside `owner`. idle: inputs of the same shapes that may
        be computed at any time.
        """
        graphs = self._of.setdefault(owner, {})
        if key not in graphs:
            started, free = time.perf_counter(), self._free_bytes()
            buffers = [send(tensor, self._device) for tensor in idle]
            try:
                graphs[key] = _Graph(function, buffers, self._stream, self._pool)
            except BaseException:
                if self._pool is not None:  # a capture that failed may still hold on to it
                    self._pool = torch.cuda.graph_pool_handle()
                raise
            self.count += 1
            self.seconds += time.perf_counter() - started
            self.bytes += free - self._free_bytes()
        return graphs[key].run(function, inputs)

    def _free_bytes(self) -> int:
        if self._pool is None:
            return 0
        torch.cuda.empty_cache()  # as a capture begins with
        return int(torch.cuda.mem_get_info(self._device)[0])


class _Graph:
    """One function with its buffers. On a CPU nothing is captured."""

    def __init__(
        self, function: Function, buffers: Sequence[Tensor], stream: torch.cuda.Stream | None, pool: Any
    ) -> None:
        self._buffers = buffers
        self._graph: torch.cuda.CUDAGraph | None = None
        if stream is None:
            self._out = function(*buffers).clone()
            return
        here = torch.cuda.current_stream(stream.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            function(*buffers)
        here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(here),  # where a capture that fails would not come back to
            # of this thread alone: others may be loading a decoder
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._out = function(*buffers)
        self._graph = graph

    def run(self, function: Function, inputs: Sequence[Tensor]) -> Tensor:
        """Fill the buffers, and compute."""
        for buffer, tensor in zip(self._buffers, inputs, strict=True):
            pinned = tensor.pin_memory() if self._graph is not None else tensor
            buffer.copy_(pinned, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._out.copy_(function(*self._buffers))
        return self._out
