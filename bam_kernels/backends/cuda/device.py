"""What a device can hold and run at once: the attributes that launches are shaped by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """As csrc/cuda/device.cu finds it. A block has at most shared_bytes, and takes reserved_bytes more; clusters says
    how many of 2, 4, 8 and 16 blocks run at once; cooperative whether a grid can wait for all of its blocks;
    programmatic whether a kernel's blocks can come on chip while the one before it ends; fault why nothing can run, or
    "".
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
    cooperative: bool
    programmatic: bool
    fault: str = ""

    @property
    def cluster(self) -> int:
        """Blocks of the largest cluster; 1: there are none."""
        return max((size for size in (2, 4, 8, 16) if self.clusters_of(size)), default=1)

    def clusters_of(self, size: int) -> int:
        """How many clusters of that many blocks run at once."""
        return self.clusters[size.bit_length() - 2]

    def blocks(self, threads: int, shared_bytes: int, most_threads: int) -> int:
        """How many blocks of a kernel run at once, most_threads of which fit the registers of a multiprocessor."""
        of_memory = (self.shared_bytes + self.reserved_bytes) // (shared_bytes + self.reserved_bytes)
        return self.multiprocessors * min(most_threads // threads, of_memory)

    def forms(self) -> str:
        """What of the kernels' forms runs here, and why not the others."""
        clusters = f"rows over clusters of {self.cluster}" if self.cluster > 1 else "no clusters: long rows read twice"
        grid = "one-launch Sinkhorn" if self.cooperative else "no cooperative launch: one launch a pass"
        launches = "overlapping launches" if self.programmatic else "launches one after another"
        return f"{clusters}, {grid}, {launches}"
