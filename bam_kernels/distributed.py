"""Ranks that are the processes of a torch.distributed group: gloo on CPUs, NCCL or gloo on GPUs.

Over gloo, ranks may share a GPU; messages between neighbours then go through host memory.

All-gather and reduce-scatter are rings: each rank sends to its right neighbour and receives from its left neighbour,
whatever W is. Keys travel in blocks of one rank, so that a product can start with each block that has arrived while the
next block is under way. Key gradients are added up on their way round the ring.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from .environment import is_on
from .header import HEADER_BYTES, Header, ways_header

CHECK_EVERY_CALL = "BAM_KERNELS_CHECK_RANKS"


class GroupRanks:
    """Collectives over one process group. Raises: RuntimeError naming the exchange that failed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = ref(group)  # weak: destroying a group ends its threads only if nobody else holds the group
        self.W, self.rank, self.name = group.size(), group.rank(), f"group-{group.group_name}"
        self._left = dist.get_global_rank(group, (self.rank - 1) % self.W)
        self._right = dist.get_global_rank(group, (self.rank + 1) % self.W)
        self._agreed_kinds: set[bytes] = set()

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError(f"bam_kernels: the process group {self.name} has been destroyed")
        return group

    def agree(self, header: Header, device: torch.device) -> None:
        """Compare headers of all ranks: on CPUs at every call, on GPUs once for each kind of header.

        On GPUs, reading the gathered headers waits for the device; BAM_KERNELS_CHECK_RANKS=1 compares at every call.
        """
        encoded, kind = header.encoded, header.kind
        every_call = is_on(CHECK_EVERY_CALL) or device.type == "cpu"
        if kind in self._agreed_kinds and not every_call:
            return
        header.check(self._gather_headers(header, encoded, device))
        if not every_call:
            self._agreed_kinds.add(kind)

    def common_ways(self, operation: str, ways: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
        header = ways_header(operation, ways)
        return header.common_ways(self._gather_headers(header, header.encoded, device))

    def _gather_headers(self, header: Header, encoded: bytes, device: torch.device) -> list[bytes]:
        """All-gather of one header of each rank."""
        own = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(device)
        whole = own.new_empty(self.W * HEADER_BYTES)
        with self._explain_failure(f"{header.operation}: comparing the problem"):
            # Before torch 2.14, all_gather_single is called all_gather_into_tensor.
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            all_gather(whole, own, group=self.group)
        return [bytes(row) for row in whole.view(self.W, HEADER_BYTES).tolist()]

    def gather(
        self, own: Tensor, as_sent: Callable[[Tensor], Tensor], room: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Ring all-gather: step t sends the block of rank - t to the right while the caller uses the block."""
        block, n = own.contiguous(), len(own)
        for step in range(self.W):
            arriving, sender = None, (self.rank - step - 1) % self.W  # of the block that arrives
            if step < self.W - 1:
                arriving = torch.empty_like(block) if room is None else room[sender * n : (sender + 1) * n]
            with self._explain_failure("gathering keys"):
                pending = self._exchange(block, arriving) if arriving is not None else []
            yield (self.rank - step) % self.W * n, block
            with self._explain_failure("gathering keys"):
                _wait(pending)
            if arriving is not None:
                block = arriving

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        with self._explain_failure("adding up columns"):
            pending = dist.all_reduce(x, group=self.group, async_op=True)
        if meanwhile is not None:
            meanwhile()
        with self._explain_failure("adding up columns"):
            _wait([pending])
        return x

    def max(self, x: Tensor) -> Tensor:
        with self._explain_failure("comparing columns"):
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        """Ring reduce-scatter: the sum for rank r starts at rank r + 1 and gains each rank's part on its way to r."""
        arriving: Tensor | None = None
        pending: list[_Pending] = []
        for step in range(self.W):
            total = part((self.rank - 1 - step) % self.W)
            with self._explain_failure("adding up key gradients"):
                _wait(pending)
                if arriving is not None:
                    total += arriving
                if step < self.W - 1:
                    arriving = torch.empty_like(total)
                    pending = self._exchange(total, arriving)
        return total

    def _exchange(self, right: Tensor, left: Tensor) -> "list[_Pending]":
        """Start to send `right` to the right neighbour and to receive `left` from the left neighbour."""
        if self._needs_host_copy(right.device):
            received = torch.empty_like(left, device="cpu")
            return [_HostTransfer(self._send_and_receive(right.to("cpu", copy=True), received), received, left)]
        return [*self._send_and_receive(right, left)]

    def _send_and_receive(self, right: Tensor, left: Tensor) -> list[dist.Work]:
        send = dist.P2POp(dist.isend, right, self._right, self.group)
        receive = dist.P2POp(dist.irecv, left, self._left, self.group)
        return dist.batch_isend_irecv([send, receive])

    def _needs_host_copy(self, device: torch.device) -> bool:
        """Whether messages go through host memory: gloo sends and receives CPU tensors only."""
        return device.type != "cpu" and self.group._get_backend(device).name() == "gloo"

    @contextmanager
    def _explain_failure(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"bam_kernels: rank {self.rank} of {self.W} failed while {doing}, as when another rank ends, leaves "
                f"or stalls beyond the group's time-out ({error})"
            ) from error


class _HostTransfer:
    """A pending exchange of copies in host memory; `wait` copies the received tensor to its destination."""

    def __init__(self, works: list[dist.Work], received: Tensor, destination: Tensor) -> None:
        self._works, self._received, self._destination = works, received, destination

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._destination.copy_(self._received)


_Pending = dist.Work | _HostTransfer


def _wait(pending: list[_Pending]) -> None:
    """Wait for messages, and forget them: what is pending holds the memory that it sends and receives."""
    for work in pending:
        work.wait()
    pending.clear()
