"""Which operators of torch run, in order."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


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
