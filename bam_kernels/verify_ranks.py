"""The same numbers on W ranks as on one: loss and gradient of every kind of problem, by command.

python -m bam_kernels.verify_ranks --world 4                        W processes of this machine, gloo
torchrun --nproc-per-node 8 -m bam_kernels.verify_ranks             the ranks of torchrun: NCCL where there are GPUs

Each rank computes its share of a global batch in the group, and the whole batch alone. The ranks' mean loss must be
that of the whole batch, and their gradients W times its gradient: to 1e-12 in float64 (where the backend has it), 1e-5
in float32 with exact products, 2e-3 in float16.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .loss import bam_loss
from .options import BACKENDS
from .ranks import ONE_RANK

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
GRADIENT_SCALE = 1024.0  # keeps the gradients of float16 embeddings among its normal numbers
TIMEOUT = timedelta(minutes=5)

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
    options = parser.parse_args(args)
    for name in ("world", "images", "features"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.world * options.images < 2:
        parser.error("two images are needed over all ranks")
    if "RANK" in os.environ:
        return verify(options.images, options.features, options.backend, options.cases)
    return _start(options.world, sys.argv[1:] if args is None else args)


def _start(W: int, args: list[str]) -> int:
    """One process per rank, which find each other through a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bam_kernels.verify_ranks", *args]
        environment = os.environ | {"WORLD_SIZE": str(W), "BAM_KERNELS_RENDEZVOUS": f"file://{folder}/meeting"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // W)))
        processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(W)]
        codes = [process.wait() for process in processes]
    return int(any(codes))


def verify(images: int, features: int, backend: str, cases: list[str]) -> int:
    """Run the cases as one rank of the group that the environment describes."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.is_available() and "BAM_KERNELS_RENDEZVOUS" not in os.environ
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=os.environ.get("BAM_KERNELS_RENDEZVOUS"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    told = dist.get_rank() == 0
    if told:
        print(f"{dist.get_world_size()} ranks of {images} images, {device.type}, {dist.get_backend()}", flush=True)
    bounds = {t: b for t, b in BOUNDS.items() if t != torch.float64 or backend in ("auto", "reference")}
    if told:
        heads = "   ".join(f"{f'{t}: loss'.removeprefix('torch.'):>14} {'gradient':>9}" for t in bounds)
        print(f"{'':<32}{heads}", flush=True)
    agreed = True
    for number, name in enumerate(cases):
        V, R, options = CASES[name]
        texts = []
        for dtype, bound in bounds.items():
            options = options | {"backend": backend, "precision": "default" if dtype == torch.float16 else "exact"}
            worst = torch.tensor(_errors(V, R, options, images, features, dtype, device, number), device=device)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            loss, gradient = worst.tolist()
            agreed &= loss <= bound and gradient <= bound
            texts.append(f"{loss:>14.1e} {gradient:>9.1e}")
        if told:
            print(f"{name:<32}{'   '.join(texts)}", flush=True)
    if told:
        print("the ranks agree with one" if agreed else "THE RANKS DO NOT AGREE WITH ONE", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if agreed else 1


def _errors(
    V: int, R: int, options: dict[str, Any], B: int, D: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[float, float]:
    """Relative errors of the mean loss and of this rank's gradient; NaN counts as infinite."""
    W, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(D, generator=generator)

    def embeddings(views: int) -> Tensor:
        x = common + torch.randn(1, W * B, D, generator=generator) + torch.randn(views, W * B, D, generator=generator)
        return x.to(device, dtype)

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
