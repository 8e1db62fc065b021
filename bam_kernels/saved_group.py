"""Stand-in for a process group in a pickle: torch cannot pickle a group, so its name and members are saved."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SavedGroup:
    """Name and members (ranks of the default group) of a saved process group; name "" is the default group."""

    name: str
    members: tuple[int, ...]

    def find(self, operation: str) -> Any:
        """Find the group in this process. Raises: ValueError if no group here has this name and these members."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            raise ValueError(f"{operation}: {self._description()}, but torch.distributed is not initialised")
        if not self.name:
            return distributed.group.WORLD
        try:
            resolve: Any = distributed.distributed_c10d._resolve_process_group
            group = resolve(self.name)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{operation}: {self._description()}; this process has none of that name") from error
        members = tuple(distributed.get_process_group_ranks(group))
        if members != self.members:
            raise ValueError(
                f"{operation}: {self._description()}; here the group of that name has ranks {list(members)}"
            )
        return group

    def _description(self) -> str:
        return f"group was saved as the process group {self.name or 'of all ranks'!r} with ranks {list(self.members)}"


def picklable_group(group: Any) -> Any:
    """Replace a process group by its SavedGroup; return anything else unchanged."""
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        return group
    members = tuple(distributed.get_process_group_ranks(group))
    return SavedGroup("" if group is distributed.group.WORLD else group.group_name, members)
