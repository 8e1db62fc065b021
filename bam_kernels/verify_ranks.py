"""Check that W ranks give the loss and gradient of one rank, for every kind of problem.

python -m bam_kernels.verify_ranks --world 4                        W processes of this machine, gloo on CPUs
python -m bam_kernels.verify_ranks --world 2 --device cuda          on GPUs: NCCL with one for each rank, else gloo
torchrun --nproc-per-node 8 -m bam_kernels.verify_ranks             the ranks of torchrun: NCCL where there are GPUs

First every collective is called alone and compared with its known result, so that a group of one rank is checked too.
Then each rank computes its share of a global batch within the group, and the whole batch alone. The mean loss over
ranks must equal the loss of the whole batch, and gradients must be W times its gradient. Each share is computed three
times, because the second call is recorded and the third repeats the recording (engine/recorder.py). Largest relative
errors: 1e-12 in float64 (where the backend has it), 1e-5 in float32 with exact products, 2e-3 in float16.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import GroupRanks
from .header import Header
from .loss import bam_loss
from .options import BACKENDS
from .ranks import ONE_RANK

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
GRADIENT_SCALE = 1024.0  # keeps gradients of float16 embeddings within the normal numbers of float16
TIMEOUT = timedelta(minutes=5)
RENDEZVOUS = "BAM_KERNELS_RENDEZVOUS"
CALLS = 3  # with one problem: by the engine, recorded, and repeated

# Name of a case: views V, teacher views R, options.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "no teacher": (2, 0, {}),
    "teacher": (2, 2, {}),
    "teacher's keys, student's rows": (3, 2, {"target_rows": "student"}),
    "multi-crop": (5, 0, {"key_views": 1}),
    "multi-crop, teacher": (5, 2, {}),
    "top-k": (2, 0, {"top_k": 7}),
    "top-k, teacher": (4, 2, {"top_k": 7}),
    "no mask": (2, 0, {"mask_positives": False}),
    "epsilon 0.002": (2, 0, {"epsilon": 0.002}),
    "keys gathered twice": (3, 2, {"regather": True}),
    "scores made again": (3, 0, {"memory_budget": 100_000}),
}


def main(args: list[str] | None = None) -> int:
    """Run the command; the exit status is 0 if every case agrees."""
    parser = argparse.ArgumentParser(prog="python -m bam_kernels.verify_ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=4, help="processes to start; not used under torchrun (default: 4)")
    parser.add_argument("--images", type=int, default=16, help="images per rank (default: 16)")
    parser.add_argument("--features", type=int, default=64, help="features of an embedding (default: 64)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="backend of bam_loss (default: auto)")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="kinds of problem (default: all)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda under torchrun on a machine with GPUs, else cpu",
    )
    parser.add_argument(
        "--group-backend",
        choices=("auto", "nccl", "gloo"),
        default="auto",
        help="auto: nccl where each rank has a GPU to itself, else gloo, whose ranks may share one",
    )
    options = parser.parse_args(args)
    for name in ("world", "images", "features"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.world * options.images < 2:
        parser.error("two images are needed over all ranks")
    try:
        check_environment()
        place = group_place(options.device, options.group_backend, ranks_on_machine(options.world))
    except ValueError as error:
        parser.error(str(error))
    if "RANK" in os.environ:
        return verify(options.images, options.features, options.backend, options.cases, *place)
    return _start(options.world, sys.argv[1:] if args is None else args)


def check_environment() -> None:
    """Check the variables that a launcher sets for ranks, if it has set RANK. Raises: ValueError naming a wrong one."""
    if "RANK" not in os.environ:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        required = name in ("RANK", "WORLD_SIZE")
        if not os.environ.get(name, "" if required else "0").isdecimal():
            raise ValueError(f"{name} must be a number, as torchrun sets it, got {os.environ.get(name)!r}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise ValueError(f"RANK must be less than WORLD_SIZE, got {rank} and {size}")
    if RENDEZVOUS not in os.environ and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise ValueError("RANK is set, but MASTER_ADDR or MASTER_PORT is not; torchrun sets all of them")


def ranks_on_machine(to_start: int) -> int:
    """Number of ranks on this machine. If a launcher does not set LOCAL_WORLD_SIZE, each rank has its own machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "RANK" in os.environ else to_start


def group_place(device: str, backend: str, ranks_here: int) -> tuple[str, str]:
    """Choose "cpu" or "cuda", and "gloo" or "nccl", for `ranks_here` ranks on this machine. Raises: ValueError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        under_torchrun = "RANK" in os.environ and RENDEZVOUS not in os.environ
        device = "cuda" if gpus and under_torchrun else "cpu"
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: torch sees no GPU")
    if backend == "auto":
        backend = "nccl" if device == "cuda" and ranks_here <= gpus else "gloo"
    if backend == "nccl" and device == "cpu":
        raise ValueError("--group-backend nccl needs --device cuda")
    if backend == "nccl" and ranks_here > gpus:
        raise ValueError(
            f"--group-backend nccl needs a GPU for each rank, got {ranks_here} ranks and {gpus} GPUs; gloo shares them"
        )
    return device, backend


def _start(W: int, args: list[str]) -> int:
    """Start one process per rank; the processes rendezvous through a file. Returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bam_kernels.verify_ranks", *args]
        sizes = {"WORLD_SIZE": str(W), "LOCAL_WORLD_SIZE": str(W)}
        environment = os.environ | sizes | {RENDEZVOUS: f"file://{folder}/meeting"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // W)))
        numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(W)]
        processes = [subprocess.Popen(command, env=environment | number) for number in numbers]
        codes = [process.wait() for process in processes]
    return int(any(codes))


def verify(images: int, features: int, backend: str, cases: list[str], device_type: str, group_backend: str) -> int:
    """Run the cases as the rank that the environment (RANK, WORLD_SIZE) names. Returns the exit status."""
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(
        group_backend,
        init_method=os.environ.get(RENDEZVOUS),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    show = partial(print, flush=True) if dist.get_rank() == 0 else _print_nothing
    show(f"{dist.get_world_size()} ranks of {images} images, {device.type}, {dist.get_backend()}")
    wrong = wrong_exchanges(device)
    agreed = max_over_ranks([len(wrong)], device) == [0]
    for name in wrong:
        print(f"rank {dist.get_rank()}: WRONG {name}", flush=True)
    show(f"the exchanges by themselves: {'right' if agreed else 'WRONG'}")
    bounds = {t: b for t, b in BOUNDS.items() if t != torch.float64 or backend in ("auto", "reference")}
    heads = "   ".join(f"{f'{t}: loss'.removeprefix('torch.'):>14} {'gradient':>9}" for t in bounds)
    show(f"{'':<32}{heads}")
    for number, name in enumerate(cases):
        V, R, options = CASES[name]
        texts = []
        for dtype, bound in bounds.items():
            options = options | {"backend": backend, "precision": "default" if dtype == torch.float16 else "exact"}
            loss, gradient = max_over_ranks(_errors(V, R, options, images, features, dtype, device, number), device)
            agreed &= loss <= bound and gradient <= bound
            texts.append(f"{loss:>14.1e} {gradient:>9.1e}")
        show(f"{name:<32}{'   '.join(texts)}")
    show("the ranks agree with one" if agreed else "THE RANKS DO NOT AGREE WITH ONE")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if agreed else 1


def _print_nothing(text: str) -> None:
    """Print nothing: only rank 0 prints."""


def max_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise maximum of `numbers` over all ranks."""
    worst = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def wrong_exchanges(device: torch.device) -> list[str]:
    """Names of the collectives whose result on this rank is not the known one."""
    assert dist.group.WORLD is not None
    ranks = GroupRanks(dist.group.WORLD)
    W, rank = ranks.W, ranks.rank

    def full(number: int, dtype: torch.dtype) -> Tensor:
        return torch.full((3, 2), number, dtype=dtype, device=device)

    def parts(dtype: torch.dtype) -> Callable[[int], Tensor]:
        return lambda other: full(W * other + rank + 1, dtype)

    ranks.agree(Header("verify_ranks", {}), device)
    right = {}
    for dtype in (torch.float64, torch.float32):
        right[f"sum of {dtype}"] = ranks.sum(full(rank + 1, dtype)) == W * (W + 1) // 2
        right[f"maximum of {dtype}"] = ranks.max(full(rank + 1, dtype)) == W
        right[f"scatter of {dtype}"] = ranks.scatter(parts(dtype)) == W * W * rank + W * (W + 1) // 2
    for dtype in BOUNDS:
        blocks = [(first, rows.clone()) for first, rows in ranks.gather(full(rank + 1, dtype), lambda unit: unit)]
        arrived = torch.cat([rows for _, rows in sorted(blocks, key=lambda block: block[0])])
        senders = torch.arange(1, W + 1, dtype=torch.int64, device=device).repeat_interleave(3)
        right[f"gathering of {dtype}"] = arrived == senders[:, None]
        room = torch.zeros_like(arrived)
        own = room[3 * rank : 3 * rank + 3].fill_(rank + 1)
        for _ in ranks.gather(own, lambda unit: unit, room):
            pass
        right[f"gathering of {dtype} in place"] = room == senders[:, None]
    return [name for name, equal in right.items() if not equal.all()]


def _errors(
    V: int, R: int, options: dict[str, Any], B: int, D: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[float, float]:
    """Relative errors of the mean loss and of this rank's gradient against one rank; NaN counts as infinite."""
    W, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator("cpu").manual_seed(seed)

    def random_rows(*shape: int) -> Tensor:
        return torch.randn(*shape, D, generator=generator, dtype=torch.float32, device="cpu")

    common = random_rows()

    def embeddings(views: int) -> Tensor:
        return (common + random_rows(1, W * B) + random_rows(views, W * B)).to(device, dtype)

    z, y = embeddings(V), embeddings(R) if R else None
    own = slice(rank * B, (rank + 1) * B)
    expected_loss, expected_dz = _loss_and_gradient(z, y, group=ONE_RANK, **options)
    expected_dz = W * expected_dz[:, own]
    errors = []
    for _ in range(CALLS):
        loss, dz = _loss_and_gradient(z[:, own], y[:, own] if y is not None else None, **options)
        dist.all_reduce(loss)
        loss_error = (loss / W / expected_loss - 1).abs()
        errors.append(torch.stack([loss_error, (dz - expected_dz).norm() / expected_dz.norm()]))
    worst = torch.stack(errors).nan_to_num(nan=float("inf")).amax(0)
    return worst[0].item(), worst[1].item()


def _loss_and_gradient(student: Tensor, teacher: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss: Any = bam_loss(student, teacher, **options)
    (dz,) = torch.autograd.grad(loss * GRADIENT_SCALE, student)
    return loss.detach(), dz.to(torch.promote_types(dz.dtype, torch.float32))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo sometimes aborts the process while it is torn down
