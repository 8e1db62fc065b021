"""Processes of a test that meet over gloo."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def meet(folder: Path, rank: int, world: int, timeout_s: float) -> None:
    """Make the default process group, by a file of the folder; each process has one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )


def leave() -> None:
    """End this process at once: a group whose peers have gone may abort while Python tears it down."""
    os._exit(0)
