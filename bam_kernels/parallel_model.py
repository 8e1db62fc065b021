"""Control when a model on several ranks broadcasts buffers and exchanges gradients, for GradientCache.

DistributedDataParallel, the model or any module in it, broadcasts buffers before a forward pass and exchanges gradients
in a backward pass. SyncBatchNorm and sharded parameters communicate in every forward pass.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def replicas(model: nn.Module) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel module in the model, at any depth, also inside a module of torch.compile."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def broadcast_buffers(model: nn.Module) -> Iterator[None]:
    """Broadcast buffers on entry if DistributedDataParallel would in the next pass, and in no pass of the block.

    The ranks then communicate equally often before the first backward pass, whatever their numbers of passes.
    """
    broadcast = []
    try:
        for replica in replicas(model):
            # Otherwise the second pass with a graph would rebuild buckets, with collectives of its own.
            if replica.reducer._rebuild_buckets():
                replica._has_rebuilt_buckets = True
            if replica._check_sync_bufs_pre_fwd():
                broadcast.append(replica)
                replica._sync_buffers()
                replica.require_forward_param_sync = False
        yield
    finally:
        for replica in broadcast:
            # A pass that exchanges gradients leaves the flag True; set it also if an error came before that pass.
            if replica.require_backward_grad_sync:
                replica.require_forward_param_sync = True


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore all buffers on leaving the block, and put off the broadcast of buffers until after the block."""
    before = [buffer.clone() for buffer in model.buffers()]
    broadcast_flags = [(replica, replica.require_forward_param_sync) for replica in replicas(model)]
    for replica, _ in broadcast_flags:
        replica.require_forward_param_sync = False
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        for replica, broadcast in broadcast_flags:
            replica.require_forward_param_sync = broadcast


@contextmanager
def skip_gradient_exchange(model: nn.Module) -> Iterator[None]:
    """Keep gradients on each rank in a pass before the last; no broadcast of buffers follows the pass."""
    found = replicas(model)
    learning = [replica for replica in found if _learns_its_graph(replica)]
    own = getattr(model, "no_sync", None)  # a module of torch.compile hands on the no_sync of the module it compiles
    with ExitStack() as stack:
        if own is not None and getattr(own, "__self__", None) not in found:
            stack.enter_context(own())
        for replica in found:
            if replica not in learning:
                stack.enter_context(replica.no_sync())
        yield
    for replica in learning:
        replica.require_forward_param_sync = False


def check_pass_count(operation: str, models: list[nn.Module], number: int) -> None:
    """Check that all ranks make the same number of passes, if layers of the models communicate in every pass.

    Without such layers nothing is communicated here.
    Raises: ValueError on every rank, before any pass.
    """
    layers = [layer for model in models for layer in _exchanging_layers(model)]
    if not layers:
        return
    groups = {group: device for _, group, device in layers}
    # Ranks outside these groups may wait for this rank in the exchange of gradients.
    groups |= {replica.process_group: replica.device for model in models for replica in replicas(model)}
    reach = torch.tensor([number, -number], dtype=torch.int64, device="cpu")
    for group, device in groups.items():
        reach = reach.to(device)
        dist.all_reduce(reach, op=dist.ReduceOp.MAX, group=group)
    most, least = reach.tolist()
    if most != -least:
        names = ", ".join(dict.fromkeys(name for name, _, _ in layers))
        raise ValueError(
            f"{operation}: micro_batches must be as many on every rank, since layers exchange in every pass "
            f"({names}); got {number} on this rank, {-least} to {most} on all ranks"
        )


def _exchanging_layers(model: nn.Module) -> "list[tuple[str, dist.ProcessGroup, torch.device]]":
    """Layers that communicate in every pass, in the model's order: name, group, device of the tensors they send."""
    layers: list[tuple[str, dist.ProcessGroup, torch.device]] = []
    if not dist.is_available() or not dist.is_initialized():
        return layers
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import; if nobody imported it, no module is FSDP
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            group = module.process_group or dist.group.WORLD
            assert group is not None
            layers.append(("SyncBatchNorm", group, next(model.parameters()).device))
        elif isinstance(module, DistributedDataParallel) and _learns_its_graph(module):
            name = "DistributedDataParallel(static_graph=True) in its first step"
            layers.append((name, module.process_group, module.device))
        elif fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            layers.append(("FullyShardedDataParallel", module.process_group, module.compute_device))
        elif fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()  # a pass without gradient may leave the parameters unsharded, without their groups
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            device = torch.device(mesh.device_type)
            layers += [("parameters that are DTensor", group, device) for group in mesh.get_all_groups()]
    return [layer for layer in layers if layer[1].size() > 1]


def _learns_its_graph(replica: DistributedDataParallel) -> bool:
    """Whether the next backward pass learns a static graph: torch then needs it to exchange gradients."""
    return replica.static_graph and not replica._static_graph_delay_allreduce_enqueued
