"""Which operators of torch run, in order."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of torch that only look at tensors, or allocate them.
NO_LAUNCH = {"empty", "empty_like", "new_empty", "view", "alias", "detach", "slice", "select", "unbind", "t"}
NO_LAUNCH |= {"permute", "transpose", "split"}


def launches_nothing(name: str, arguments: Any, result: Any) -> bool:
    """Whether an operator of a 16-bit step launches nothing on a GPU; a CPU casts to float32 for its products."""
    of_no_rows = isinstance(result, torch.Tensor) and result.numel() == 0
    casts_for_cpu = name == "_to_copy" and arguments[0].dtype == torch.float16
    return name in NO_LAUNCH or of_no_rows or casts_for_cpu


class RecordedOperators(TorchDispatchMode):
    """Within it the name of each operator goes to `names`, but for those where left_out(name, arguments, result)."""

    def __init__(self, names: list[str], left_out: Callable[[str, Any, Any], bool] = lambda *_: False) -> None:
        super().__init__()
        self.names, self.left_out = names, left_out

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        name, result = operator.overloadpacket.__name__, operator(*arguments, **(options or {}))
        if not self.left_out(name, arguments, result):
            self.names.append(name)
        return result
