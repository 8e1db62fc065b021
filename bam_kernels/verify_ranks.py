"""The same numbers on W ranks as on one: loss and gradient of every kind of problem, by command.

python -m bam_kernels.verify_ranks --world 4                        W processes of this machine, gloo on CPUs
python -m bam_kernels.verify_ranks --world 2 --device cuda          on GPUs: NCCL with one for each rank, else gloo
torchrun --nproc-per-node 8 -m bam_kernels.verify_ranks             the ranks of torchrun: NCCL where there are GPUs

First the exchanges by themselves, each with a known result: a group of one rank is otherwise not used. Then each rank
computes its share of a global batch in the group, and the whole batch alone. The ranks' mean loss must be that of the
whole batch, and their gradients W times its gradient: to 1e-12 in float64 (where the backend has it), 1e-5 in float32
with exact products, 2e-3 in float16.
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
GRADIENT_SCALE = 1024.0  # keeps the gradients of float16 embeddings among its normal numbers
TIMEOUT = timedelta(minutes=5)
RENDEZVOUS = "BAM_KERNELS_RENDEZVOUS"

# Views V, teacher views R, options.
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
    """Exit status 0 if every case agrees."""
    parser = argparse.ArgumentParser(prog="python -m bam_kernels.verify_ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=4, help="processes to start; not used under torchrun (4)")
    parser.add_argument("--images", type=int, default=16, help="images per rank (16)")
    parser.add_argument("--features", type=int, default=64, help="features (64)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what computes the loss (auto)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="kinds of problem (all)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU under torchrun where it has some"
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
        place = group_place(options.device, options.group_backend, ranks_on_machine(options.world))
    except ValueError as error:
        parser.error(str(error))
    if "RANK" in os.environ:
        return verify(options.images, options.features, options.backend, options.cases, *place)
    return _start(options.world, sys.argv[1:] if args is None else args)


def ranks_on_machine(to_start: int) -> int:
    """How many ranks share this machine. A launcher that says nothing of it is taken to give each rank its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "RANK" in os.environ else to_start


def group_place(device: str, backend: str, ranks_here: int) -> tuple[str, str]:
    """("cpu" or "cuda", "gloo" or "nccl") for that many ranks on this machine. Raises: ValueError."""
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
    """One process per rank, which find each other through a file."""
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
    """Run the cases as one rank of the group that the environment describes."""
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
    """What the ranks other than the first print."""


def max_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The largest of the ranks' numbers, place by place."""
    worst = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def wrong_exchanges(device: torch.device) -> list[str]:
    """Names of the exchanges that give this rank something else than follows from the ranks' numbers."""
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
    return [name for name, equal in right.items() if not equal.all()]


def _errors(
    V: int, R: int, options: dict[str, Any], B: int, D: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[float, float]:
    """Relative errors of the mean loss and of this rank's gradient; NaN counts as infinite."""
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
    loss, dz = _loss_and_gradient(z[:, own], y[:, own] if y is not None else None, **options)
    dist.all_reduce(loss)
    expected_dz = W * expected_dz[:, own]
    loss_error = (loss / W / expected_loss - 1).abs()
    dz_error = (dz - expected_dz).norm() / expected_dz.norm()
    loss_text, dz_text = torch.stack([loss_error, dz_error]).nan_to_num(nan=float("inf")).tolist()
    return loss_text, dz_text


def _loss_and_gradient(student: Tensor, teacher: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss: Any = bam_loss(student, teacher, **options)
    (dz,) = torch.autograd.grad(loss * GRADIENT_SCALE, student)
    return loss.detach(), dz.to(torch.promote_types(dz.dtype, torch.float32))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a group of gloo sometimes aborts while it is torn down
