"""Memory of the tensors that operators of torch allocate."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """In its `with` block, notes the memory of all tensors that operators return, besides that of tensors they take.

    peak    largest number of bytes that were alive after an operator
    total   bytes of all tensors, as if none had been freed
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.total = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        taken = {address(x) for x in tensors((arguments, keywords))}
        result = operator(*arguments, **(keywords or {}))
        self._alive = [(storage, size) for storage, size in self._alive if not storage.expired()]
        for x in tensors(result):
            if address(x) not in taken:
                size = x.untyped_storage().nbytes()
                self._alive.append((StorageWeakRef(x.untyped_storage()), size))
                self.total += size
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return result


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
