"""What each process of a gloo group does in test_gradient_cache_ranks.py; `run` starts the processes.

The truth is a plain loop without DistributedDataParallel: the model embeds its rank's micro-batches in turn, with every
graph kept; buffers of rank 0 go to all ranks before each step, and gradients are averaged, both by hand.
"""

import copy
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import gloo
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bam_kernels import BAMLoss, GradientCache

TIMEOUT_S = 20  # of the group, where a rank ends or stays away
LIMIT_S = 150  # of all programs: groups that torch makes for a mesh have a time-out of half an hour
V, B, D, STEPS = 2, 12, 5, 3  # B images on each rank


def run(programs: tuple[Callable[[int], dict], ...], world: int, folder: Path) -> dict[str, list[dict]]:
    """The results of each program by rank; the programs run one after another in the same processes."""
    context = torch.multiprocessing.spawn(_process, (programs, world, str(folder)), nprocs=world, join=False)
    end = time.monotonic() + LIMIT_S
    while not context.join(max(0.0, end - time.monotonic())):
        if time.monotonic() >= end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the ranks had not ended after {LIMIT_S} s")
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return {program.__name__: [results[program.__name__] for results in ranks] for program in programs}


def _process(rank: int, programs: tuple[Callable[[int], dict], ...], world: int, folder: str) -> None:
    gloo.meet(Path(folder), rank, world, TIMEOUT_S)
    torch.save({program.__name__: program(rank) for program in programs}, f"{folder}/{rank}.pt")
    dist.barrier()
    gloo.leave()


class Encoder(nn.Module):
    """(V, b, 7) -> (V, b, D) in two halves, each of which may be wrapped."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        # A bias before a norm would have no gradient but rounding errors.
        self.backbone = nn.Sequential(nn.Linear(7, 11, bias=False), norm(11), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(11, 9, bias=False), nn.BatchNorm1d(9), nn.Linear(9, D))

    def forward(self, x):
        return self.head(self.backbone(x.flatten(0, 1))).unflatten(0, x.shape[:2]).contiguous()


class Spare(Encoder):
    """An encoder with a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 2)


class Within(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Shifted(nn.Module):
    """A criterion with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.loss = nn.Parameter(torch.randn(D)), BAMLoss()

    def forward(self, z):
        return self.loss(z + self.shift)


def made(kind: type[nn.Module], *arguments) -> nn.Module:
    """Float64, with the same parameters on every rank."""
    torch.manual_seed(0)
    return kind(*arguments).double()


def micro_batches(sizes: tuple[int, ...], step: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return list(torch.randn(V, B, 7, generator=generator, dtype=torch.float64).split(sizes, dim=1))


def broadcast_from_first(buffers: Iterable[torch.Tensor]) -> None:
    for buffer in buffers:
        dist.broadcast(buffer, 0)


def step_by_hand(model: nn.Module, criterion: nn.Module, parts: list[torch.Tensor], broadcast: str = "before") -> None:
    """Buffers are broadcast before the first micro-batch, or after it, or "never"."""
    z = []
    for m, part in enumerate(parts):
        if m == 0 and broadcast == "before":
            broadcast_from_first(model.buffers())
        z.append(model(part))
        if m == 0 and broadcast == "after":
            broadcast_from_first(model.buffers())
    criterion(torch.cat(z, dim=1)).backward()
    for parameter in (*model.parameters(), *criterion.parameters()):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def differences(model: nn.Module, criterion: nn.Module, hand: nn.Module, hand_criterion: nn.Module) -> dict:
    """Largest differences of gradients, relative to the largest of each, and of buffers."""
    gradients, buffers = [], []
    pairs = [*zip(model.parameters(), hand.parameters(), strict=True)]
    for p, q in [*pairs, *zip(criterion.parameters(), hand_criterion.parameters(), strict=True)]:
        if q.grad is None:
            assert p.grad is None or not p.grad.any()
            continue
        gradients.append(((p.grad - q.grad).abs().max() / q.grad.abs().max()).item())
    for a, b in zip(model.buffers(), hand.buffers(), strict=True):
        buffers.append((a - b).abs().max().item())
    return {"gradients": gradients, "buffers": buffers}


def two_replicas(module: Encoder) -> nn.Module:
    module.backbone, module.head = DistributedDataParallel(module.backbone), DistributedDataParallel(module.head)
    return module


def own_buffers(module: nn.Module) -> nn.Module:
    replica = DistributedDataParallel(module)
    replica.broadcast_buffers = False  # as an argument it warns since torch 2.13 that it has another name
    return replica


def buffers_after(module: nn.Module) -> nn.Module:
    replica = DistributedDataParallel(module)
    replica._register_buffer_comm_hook(None, lambda _, buffers: broadcast_from_first(buffers.values()))
    return replica


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


FORMS = {
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda module: compiled(DistributedDataParallel(module)),
    "DDP of compiled": lambda module: DistributedDataParallel(compiled(module)),
    "DDP within a module": lambda module: Within(DistributedDataParallel(module)),
    "DDP within a compiled module": lambda module: compiled(Within(DistributedDataParallel(module))),
    "two DDPs": two_replicas,
    "bucket views": lambda module: DistributedDataParallel(module, gradient_as_bucket_view=True),
    "small buckets": lambda module: DistributedDataParallel(module, bucket_cap_mb=1e-4),
    "unused parameters": lambda module: DistributedDataParallel(module, find_unused_parameters=True),
    "own buffers": own_buffers,
    "buffers after the pass": buffers_after,
    "static graph": lambda module: DistributedDataParallel(module, static_graph=True),
    "compiled static graph": lambda module: compiled(DistributedDataParallel(module, static_graph=True)),
}
BROADCAST = {"own buffers": "never", "buffers after the pass": "after"}
EQUAL = [((4, 4, 4), (4, 4, 4))] * STEPS
UNEQUAL = [((12,), (6, 6)), ((4, 8), (4, 4, 4)), ((6, 6), (12,))]  # of rank 0 and 1, step by step


def training(form: str, steps: list[tuple[tuple[int, ...], ...]], criterion: nn.Module) -> dict:
    """Steps with the cache beside steps by hand: differences, and how often gradients and buffers were exchanged."""
    module = made(Spare if form == "unused parameters" else Encoder)
    hand, hand_criterion, exchanged = copy.deepcopy(module), copy.deepcopy(criterion), []
    model = FORMS[form](module)
    if list(criterion.parameters()):
        criterion = DistributedDataParallel(criterion)
    replicas = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    for replica in replicas:
        replica.register_comm_hook(None, averaged(exchanged))
    cache = GradientCache(model, criterion)
    optimizers = [torch.optim.SGD([*m.parameters(), *c.parameters()], lr=0.01)
                  for m, c in ((model, criterion), (hand, hand_criterion))]  # fmt: skip
    results = []
    with mock.patch.object(DistributedDataParallel, "_sync_buffers", autospec=True,
                           side_effect=DistributedDataParallel._sync_buffers) as broadcasts:  # fmt: skip
        for step, sizes in enumerate(steps):
            parts = micro_batches(sizes[dist.get_rank()], step)
            cache(parts)
            step_by_hand(hand, hand_criterion, parts, BROADCAST.get(form, "before"))
            results.append(differences(model, criterion, hand, hand_criterion))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        modules = [call.args[0] for call in broadcasts.call_args_list]
    return {
        "steps": results,
        "exchanges": len(exchanged) / len(replicas),
        "broadcasts": [modules.count(replica) for replica in replicas],
    }


def averaged(exchanged: list[int]) -> Callable:
    """A hook of DistributedDataParallel that averages a bucket, and notes it."""

    def hook(_, bucket):
        exchanged.append(bucket.index())
        total = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return total.then(lambda done: done.value()[0] / dist.get_world_size())

    return hook


def forms(_: int) -> dict:
    results = {form: training(form, EQUAL, BAMLoss()) for form in FORMS}
    results["parameters of the criterion"] = training("DDP", EQUAL, made(Shifted))
    return results


def unequal(_: int) -> dict:
    """Ranks with different numbers of micro-batches, 1 and 2 among them, before and after buckets are rebuilt."""
    same_order = [form for form in FORMS if "static graph" not in form and form != "buffers after the pass"]
    results = {form: training(form, UNEQUAL, BAMLoss()) for form in same_order}
    # A static graph is learned in the first step; then the numbers may differ.
    for form in ("static graph", "compiled static graph"):
        results[form] = training(form, [EQUAL[0], *UNEQUAL], BAMLoss())
    results["parameters of the criterion"] = training("DDP", UNEQUAL, made(Shifted))
    return results


class Failure(Exception):
    pass


def failing(rank: int) -> dict:
    """The model fails in one of the passes over two micro-batches; then a step that works."""
    results = {}
    for fails in range(4):
        module = made(Encoder)
        hand, criterion, calls = copy.deepcopy(module), BAMLoss(), []
        model = DistributedDataParallel(module)

        def fail(*_, calls=calls, fails=fails):
            calls.append(0)
            if len(calls) == fails + 1:
                raise Failure

        handle = module.register_forward_pre_hook(fail)
        try:
            GradientCache(model, criterion)(micro_batches((6, 6)))
            message = "no error"
        except Failure:
            message = "failed"
        flags = [model.require_forward_param_sync, model.require_backward_grad_sync]
        handle.remove()
        model.zero_grad()
        hand.load_state_dict(module.state_dict())
        parts = micro_batches((12,) if rank else (4, 8), 1)
        GradientCache(model, criterion)(parts)
        step_by_hand(hand, criterion, parts)
        results[fails] = {"message": message, "flags": flags, **differences(model, criterion, hand, criterion)}
    return results


def told(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def sharded(*shape: int) -> nn.Module:
    """Parameters sharded over the last dimension of a mesh of all ranks, and copied over the first of two."""
    from torch.distributed.fsdp import fully_shard

    shape = shape or (dist.get_world_size(),)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    return fully_shard(made(Encoder, nn.LayerNorm), mesh=mesh)


@contextmanager
def passes(model: nn.Module):
    """Counts the passes of a model."""
    count = []
    handle = model.register_forward_pre_hook(lambda *_: count.append(1))
    yield count
    handle.remove()


def refusals(rank: int) -> dict:
    """Numbers of micro-batches that differ where each pass exchanges: the messages and how many passes there were."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def evaluated(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model(micro_batches((12,))[0])
        return model

    models = {
        "SyncBatchNorm": made(Encoder, nn.SyncBatchNorm),
        "fully_shard": sharded(),
        "fully_shard after a pass without gradient": evaluated(sharded()),
        "FullyShardedDataParallel": FullyShardedDataParallel(made(Encoder), device_id=torch.device("cpu")),
        "static graph": Within(DistributedDataParallel(made(Encoder), static_graph=True)),
    }
    caches = {name: (model, GradientCache(model, BAMLoss())) for name, model in models.items()}
    teacher = sharded()
    caches["teacher"] = (teacher, GradientCache(DistributedDataParallel(made(Encoder)), BAMLoss(), teacher))
    results = {}
    for name, (model, cache) in caches.items():
        for own in ((12,), (4, 8)), ((4, 8), (4, 4, 4)), ((), (12,)):
            parts = micro_batches(own[rank]) if own[rank] else []
            with passes(model) as count, torch.device("meta"):
                message = told(lambda cache=cache, parts=parts: cache(parts))
            results[name, len(own[0])] = (message, len(count))
    return results


def allowed(rank: int) -> dict:
    """Layers that do not exchange as they are: no refusal, and no all-reduce of the cache."""
    alone = [dist.new_group([number]) for number in range(dist.get_world_size())][rank]
    frozen = made(Encoder, nn.SyncBatchNorm)
    frozen.backbone.eval()
    of_one_rank = made(Encoder, lambda features: nn.SyncBatchNorm(features, process_group=alone))
    models = {
        "DDP": DistributedDataParallel(made(Encoder)),
        "SyncBatchNorm in evaluation": frozen,
        "SyncBatchNorm of a rank alone": Within(of_one_rank),
    }
    models["SyncBatchNorm of a rank alone"].other = DistributedDataParallel(nn.Linear(2, 2))
    parts, results = micro_batches((12,) if rank else (4, 8)), {}
    for name, model in models.items():
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            message = told(lambda model=model: GradientCache(model, square)(parts))
        results[name] = (message, reduced.call_count)
    return results


def square(z: torch.Tensor) -> torch.Tensor:
    return z.square().mean()


def equal_shards(_: int) -> dict:
    """Sharded models, equal numbers of micro-batches: gradients against those by hand."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    parts, criterion = micro_batches((4, 4, 4)), BAMLoss()
    hand, model = made(Encoder, nn.LayerNorm), sharded()
    whole = FullyShardedDataParallel(made(Encoder, nn.LayerNorm), device_id=torch.device("cpu"), use_orig_params=True)
    step_by_hand(hand, criterion, parts, broadcast="never")
    for cached in (model, whole):
        GradientCache(cached, criterion)(parts)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.full_tensor()
    results = {"fully_shard": differences(model, criterion, hand, criterion)}
    with FullyShardedDataParallel.summon_full_params(whole, with_grads=True):
        results["FullyShardedDataParallel"] = differences(whole, criterion, hand, criterion)
    return results


def told_by_others(rank: int) -> dict:
    """One of four ranks has another number; groups are of two ranks, so one exchange does not reach all."""
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    norm = made(Encoder, lambda features: nn.SyncBatchNorm(features, process_group=pair))
    # DistributedDataParallel takes SyncBatchNorm on GPUs only; it stands beside it here, as a model's other half.
    half = Within(norm)
    half.other = DistributedDataParallel(nn.Linear(2, 2))
    parts = micro_batches((4, 8) if rank == 2 else (12,))
    return {
        name: told(lambda model=model: GradientCache(model, square)(parts))
        for name, model in {"mesh of two dimensions": sharded(2, 2), "pairs under DDP": half}.items()
    }
