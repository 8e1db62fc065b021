"""What a model that lives in several processes exchanges in its passes, so that it may be passed through in parts.

DistributedDataParallel, the model or any module in it, exchanges buffers before a forward pass and gradients in a
backward pass. SyncBatchNorm and sharded parameters exchange in every forward pass.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def replicas(model: nn.Module) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel in the model, also below torch.compile's and other modules."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def broadcast_buffers(model: nn.Module) -> Iterator[None]:
    """Broadcast buffers on entry, where DistributedDataParallel is about to; no pass in the block does so again.

    What ranks exchange before the first backward pass is then the same for any number of passes on each rank.
    """
    broadcast = []
    try:
        for replica in replicas(model):
            # DistributedDataParallel does so in the second pass with a graph, with collectives of its own.
            if replica.reducer._rebuild_buckets():
                replica._has_rebuilt_buckets = True
            if replica._check_sync_bufs_pre_fwd():
                broadcast.append(replica)
                replica._sync_buffers()
                replica.require_forward_param_sync = False
        yield
    finally:
        for replica in broadcast:
            # As a pass that exchanges gradients leaves it, even if an error came before that pass.
            if replica.require_backward_grad_sync:
                replica.require_forward_param_sync = True


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers end as they began, and DistributedDataParallel broadcasts them next time if it was about to, not here."""
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
    """For a pass before the last: gradients stay on each rank, and no broadcast of buffers follows."""
    found = replicas(model)
    learning = [replica for replica in found if _learns_its_graph(replica)]
    own = getattr(model, "no_sync", None)  # torch.compile hands on that of the module it compiles
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
    """All ranks must pass through the models the same number of times, if layers exchange in every pass.

    Raises: ValueError on every rank, before any pass. Without such layers nothing is exchanged here.
    """
    layers = [layer for model in models for layer in _exchanging_layers(model)]
    if not layers:
        return
    groups = {group: device for _, group, device in layers}
    # A rank beyond these groups may wait for this one where gradients are exchanged.
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
    """Layers that exchange in every pass: name, group, device of what they exchange. The order is that of the model."""
    layers: list[tuple[str, dist.ProcessGroup, torch.device]] = []
    if not dist.is_available() or not dist.is_initialized():
        return layers
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import; without it no module is one of its classes
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
            module.reshard()  # a pass without gradient may leave its parameters whole, which hides the groups
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            device = torch.device(mesh.device_type)
            layers += [("parameters that are DTensor", group, device) for group in mesh.get_all_groups()]
    return [layer for layer in layers if layer[1].size() > 1]


def _learns_its_graph(replica: DistributedDataParallel) -> bool:
    """A static graph is learned in the first backward pass, which must exchange gradients: torch has no other way."""
    return replica.static_graph and not replica._static_graph_delay_allreduce_enqueued
