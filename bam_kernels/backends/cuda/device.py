"""Attributes of a CUDA device from which launch shapes follow: what it can hold and run at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Attributes of one device, as csrc/cuda/device.cu reads them.

    shared_bytes     most shared memory of a block
    reserved_bytes   shared memory that a block takes in addition
    clusters         how many clusters of 2, 4, 8 and 16 blocks run at once
    programmatic     blocks of a kernel can start while the kernel before it ends
    fault            reason why no kernel can run, or ""
    """

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    shared_bytes: int
    reserved_bytes: int
    clusters: tuple[int, int, int, int]
    programmatic: bool
    fault: str = ""

    @property
    def cluster(self) -> int:
        """Number of blocks of the largest cluster; 1 if there are no clusters."""
        return max((size for size in (2, 4, 8, 16) if self.clusters_of(size)), default=1)

    def clusters_of(self, size: int) -> int:
        """Number of clusters of `size` blocks that run at once."""
        return self.clusters[size.bit_length() - 2]

    def blocks(self, threads: int, shared_bytes: int, most_threads: int) -> int:
        """Number of blocks of a kernel that run at once.

        most_threads: threads of the kernel that fit the registers of a multiprocessor.
        """
        blocks_in_memory = (self.shared_bytes + self.reserved_bytes) // (shared_bytes + self.reserved_bytes)
        return self.multiprocessors * min(most_threads // threads, blocks_in_memory)

    def forms(self) -> str:
        """Text: which forms of the kernels run on this device, and why others do not."""
        clusters = f"rows over clusters of {self.cluster}" if self.cluster > 1 else "no clusters: long rows read twice"
        sinkhorn = "one-launch Sinkhorn" if self.cluster > 1 else "one launch a pass"
        launches = "overlapping launches" if self.programmatic else "launches one after another"
        return f"{clusters}, {sinkhorn}, {launches}"
