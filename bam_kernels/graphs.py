"""CUDA graphs of whole steps of the loss: captured once for each problem, then replayed.

layout.py defines the dimension letters.
"""

import sys
import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .engine.step import Result

MOST_GRAPHS = 8
LIBRARY = __name__.partition(".")[0]

Step = Callable[[Tensor, Tensor | None], Result]

# PyTorch allows one capture at a time in a process.
_capture_lock = Lock()


@dataclass(frozen=True)
class _Graph:
    """A captured step: the tensors that a replay reads and writes, and the stream on which the inputs were made."""

    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: Result
    stream: Any


class _Device:
    """What the graphs of one device share.

    One memory pool serves all of them: a replay reads nothing that an earlier replay left there, its results are copied
    out before the next begins, and replays are ordered. torch lends a pool's memory again only to the stream that it
    was first lent to, so all captures take place on one stream. Each object has its own stream, on which no step runs
    outside captures: cuBLAS has one workspace for a stream, which so lies in the pool and lives as long as the graphs.
    If modules shared the stream, destroying the graphs of one would free the workspace of all: pytorch#193402.
    """

    def __init__(self, cuda: Any, device: torch.device) -> None:
        self.capture_stream = cuda.Stream(device)
        self.pool = cuda.graph_pool_handle()
        self.last_stream: Any = None  # of the last replay, whose copies out `done` follows
        self.done = cuda.Event()

    def order(self, stream: Any) -> None:
        """Make a replay on `stream` wait for the last one, because graphs share memory."""
        if stream != self.last_stream:
            stream.wait_event(self.done)  # waits for nothing before the first replay
            self.last_stream = stream


def _end_allocation(device: torch.device, pool: Any) -> None:
    """Let allocations leave a pool. In older versions of torch they stay if a capture's end fails: pytorch#180395."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if device.type == "cuda" and end is not None:
        with suppress(RuntimeError):  # they have left
            end(device.index, pool)


def _frames_of_libraries() -> int:
    """Number of frames from the caller of this function to the first that is neither of this library nor of torch."""
    frame: FrameType | None = sys._getframe(1)
    frames = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (LIBRARY, "torch"):
        frame, frames = frame.f_back, frames + 1
    return frames


def _plain(step: Step, student: Tensor, teacher: Tensor | None) -> Result:
    # A replay needs no such block, which costs microseconds: no tensor that it reads or writes asks for a gradient.
    with torch.no_grad():
        return step(student, teacher)


class StepGraphs:
    """Captured steps of one module, one for each problem. Calls may come from several threads and streams.

        loss, stats, dz = graphs(key, step, student, teacher)

    The first call with a problem runs the step as it is. The second runs it too and then captures it, so that kernels
    are compiled and libraries set up, in the capturing thread, before the capture. Later calls copy the tensors in,
    replay, and copy the results out.
    Where no graph is possible, `step` runs as it is, and a warning says why, once for each reason: tensors that are not
    on a CUDA device, ROCm, more than MOST_GRAPHS problems, a capture that failed, and reasons of the caller. While the
    caller captures the current stream, the step becomes a part of the caller's graph, without a warning.
    Memory: a graph keeps a copy of its inputs, and its results; all graphs share the memory of their intermediate
    results and a workspace of cuBLAS. It is kept until this object is freed.
    Copies and pickles of this object have no graphs.

    cuda, device_type: torch.cuda and the type of its devices, or a stand-in and the type that it serves.
    """

    def __init__(self, cuda: Any = torch.cuda, device_type: str = "cuda") -> None:
        self._cuda, self._device_type = cuda, device_type
        self._lock = Lock()  # from the copies in to the copies out, and around captures
        self._graphs: dict[Hashable, _Graph | None] = {}  # None: the problem was seen, and has no graph
        self._devices: dict[torch.device, _Device] = {}
        self._warned: set[str] = set()
        self._failed: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return StepGraphs, ()

    def __call__(
        self, key: Hashable, step: Step, student: Tensor, teacher: Tensor | None, refusal: str | None = None
    ) -> Result:
        """Result of step(student, teacher) without autograd: loss (), stats (6,), and dz, like the student or empty.

        student, teacher: detached.
        key: everything that decides what `step` does but shapes, dtypes and device: options, ways, needs_grad, torch's
        flags. step: launches work of the current stream alone, and keeps no tensor of a call for the next.
        refusal: the caller's reason for no graph.
        """
        refusal = refusal or self._refusal(student.device)
        if refusal is not None:
            self.warn(refusal)
            return _plain(step, student, teacher)
        with self._cuda.device(student.device):
            if self._cuda.is_current_stream_capturing():
                return _plain(step, student, teacher)
            return self._run(key, step, student, teacher)

    def _refusal(self, device: torch.device) -> str | None:
        if device.type != self._device_type:
            return f"the embeddings are on {device.type}, not on a CUDA device"
        if torch.version.hip is not None:
            # hipBLASLt sets itself up for each stream, and hangs if it does so during a capture: pytorch#179943.
            return "on ROCm a capture may hang"
        return None

    def warn(self, reason: str) -> None:
        """Warn that a call runs without a graph, once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            message = f"BAMLoss: cuda_graph=True runs without a graph: {reason}"
            warnings.warn(message, stacklevel=_frames_of_libraries() + 1)

    def _run(self, key: Hashable, step: Step, student: Tensor, teacher: Tensor | None) -> Result:
        """Replay the problem's graph, or run the step and maybe capture it. The student's device is current."""
        tensors = (student,) if teacher is None else (student, teacher)
        # Without strides: graphs read contiguous copies.
        problem = (key, student.device, *[(x.shape, x.dtype) for x in tensors])
        with self._lock:
            graph = self._graphs.get(problem)
            if graph is not None:
                return self._replay(graph, tensors)
            seen = problem in self._graphs
            if not seen and len(self._graphs) < MOST_GRAPHS:
                self._graphs[problem] = None
            elif not seen:
                self.warn(f"it had {MOST_GRAPHS} different shapes, types or options, and this is one more")
        result = _plain(step, student, teacher)
        if seen:
            with self._lock:
                if self._graphs[problem] is None and self._failed is None:
                    self._graphs[problem] = self._capture(step, tensors)
        return result

    def _replay(self, graph: _Graph, tensors: tuple[Tensor, ...]) -> Result:
        device = self._devices[tensors[0].device]
        stream = self._cuda.current_stream()
        device.order(stream)
        for static, given in zip(graph.inputs, tensors, strict=True):
            if stream != graph.stream:
                static.record_stream(stream)  # keeps its memory from others while this stream reads it
            static.copy_(given)
        graph.graph.replay()
        loss, stats, dz = graph.outputs
        result = loss.clone(), stats.clone(), dz.clone()  # the next replay overwrites the outputs
        device.done.record(stream)
        return result

    def _capture(self, step: Step, tensors: tuple[Tensor, ...]) -> _Graph | None:
        """Capture a step without running it; after an error warn and return None."""
        device = tensors[0].device
        if device not in self._devices:
            self._devices[device] = _Device(self._cuda, device)
        graph = self._cuda.CUDAGraph()
        # A tensor made in inference mode could not be written outside it. Leaving that mode turns gradients on.
        with torch.inference_mode(False), torch.no_grad():
            inputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
            try:
                outputs = self._captured(graph, self._devices[device], step, inputs)
            except Exception as error:
                graph.reset()
                _end_allocation(device, self._devices[device].pool)
                self._failed = graph  # kept, because the allocator of pinned memory may still refer to it
                self.warn(f"the capture of a step failed with {type(error).__name__}: {error}")
                return None
        return _Graph(graph, inputs, outputs, self._cuda.current_stream())

    def _captured(self, graph: Any, device: _Device, step: Step, inputs: tuple[Tensor, ...]) -> Result:
        """Outputs of a captured step. Raises: the step's error, or that of the capture if the step has none."""
        cuda, stream, cause = self._cuda, device.capture_stream, None
        # thread_local: other threads, which pin memory or serve NCCL, may go on and do not spoil the capture.
        # cuda.stream: torch.cuda.graph does not leave its stream if the end of a capture fails.
        capture = cuda.graph(graph, pool=device.pool, stream=stream, capture_error_mode="thread_local")
        try:
            with _capture_lock, cuda.stream(stream), capture:
                try:
                    return step(*inputs) if len(inputs) == 2 else step(inputs[0], None)
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            raise cause or error from None
