"""CUDA graphs, streams and events that are not there, for CPU tensors, in place of torch.cuda."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class StandInGraph(TorchDispatchMode):
    """Records torch's operators, and replays them on the tensors that they read and wrote, as a CUDA graph does.

    As a mode it is active during the capture.
    """

    def __init__(self, cuda: "StandInCuda") -> None:
        super().__init__()
        self.cuda, self.operators, self.has_ended = cuda, [], False

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        self.operators.append((operator, arguments, options or {}, result))
        return result

    def made(self, operator, result) -> list[torch.Tensor]:
        """Tensors with memory of their own that the operator returned."""
        if any(value.alias_info for value in operator._schema.returns):
            return []
        return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)]

    def end(self) -> None:
        """A capture computes nothing: what it made holds no numbers before the first replay."""
        with _disable_current_modes():
            for operator, _, _, result in self.operators:
                for x in self.made(operator, result):
                    x.fill_(torch.nan if x.is_floating_point() else -1)
        self.has_ended = True

    def replay(self) -> None:
        assert self.has_ended
        self.cuda.note("replay")
        with _disable_current_modes(), torch.no_grad():
            for operator, arguments, options, result in self.operators:
                again = operator(*arguments, **options)
                for x, y in zip(self.made(operator, result), self.made(operator, again), strict=True):
                    x.copy_(y)
        self.cuda.after_replay()

    def reset(self) -> None:
        self.operators, self.has_ended = [], False
        self.cuda.note("reset")


class StandInStream:
    def __init__(self, cuda: "StandInCuda", name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: "StandInEvent") -> None:
        if event.recorded is not None:
            self.cuda.log.append(f"{self.name} waits for {event.recorded}")


class StandInEvent:
    def __init__(self) -> None:
        self.recorded: str | None = None

    def record(self, stream: StandInStream) -> None:
        stream.cuda.replays += 1
        self.recorded = f"event {stream.cuda.replays}"
        stream.cuda.log.append(f"{self.recorded} on {stream.name}")


class StandInCuda:
    """What StepGraphs uses of torch.cuda. `log` says what happened, in order.

    capturing: whether the current stream is being captured, by `graph` or, in tests that set it, by the caller.
    broken_end: the error that ends a capture. after_replay: is called at the end of each replay.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main = StandInStream(self, "main")
        self.current, self.replays = self.main, 0
        self.capturing, self.broken_end = False, None
        self.after_replay = lambda: None
        self.pools: list[object] = []

    def note(self, what: str) -> None:
        self.log.append(f"{what} on {self.current.name}")

    def CUDAGraph(self) -> StandInGraph:
        return StandInGraph(self)

    def Stream(self, device: torch.device) -> StandInStream:
        return StandInStream(self, "side")

    def Event(self) -> StandInEvent:
        return StandInEvent()

    def graph_pool_handle(self) -> object:
        return object()

    def current_stream(self) -> StandInStream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def device(self, device: torch.device):
        yield

    @contextmanager
    def stream(self, stream: StandInStream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: StandInGraph, pool: object, stream: StandInStream, capture_error_mode: str):
        """Stand-in for torch.cuda.graph, which does not restore the stream if the end of a capture fails."""
        assert capture_error_mode == "thread_local" and not self.capturing
        self.pools.append(pool)
        before, self.current, self.capturing = self.current, stream, True
        self.note("capture")
        try:
            with graph:
                yield
        finally:
            self.capturing = False
            if self.broken_end is not None:
                raise self.broken_end
            graph.end()
            self.current = before
