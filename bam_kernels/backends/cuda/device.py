"""What a device can hold and run at once: the attributes that launches are shaped by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """As csrc/cuda/device.cu finds it. shared_bytes is of a block; cluster the blocks of the largest one, 1: none;
    cooperative says whether a grid can wait for all of its blocks; programmatic whether a kernel's blocks can come on
    chip while the one before it ends; fault why nothing can run, or "".
    """

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    shared_bytes: int
    cluster: int
    cooperative: bool
    programmatic: bool
    fault: str = ""

    def forms(self) -> str:
        """What of the kernels' forms runs here, and why not the others."""
        clusters = f"rows over clusters of {self.cluster}" if self.cluster > 1 else "no clusters: long rows read twice"
        grid = "one-launch Sinkhorn" if self.cooperative else "no cooperative launch: one launch a pass"
        launches = "overlapping launches" if self.programmatic else "launches one after another"
        return f"{clusters}, {grid}, {launches}"
