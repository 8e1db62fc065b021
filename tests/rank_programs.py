"""What each process of a gloo group does in test_process_groups.py: `python rank_programs.py PROGRAM FOLDER`.

RANK and WORLD_SIZE come from the environment; a program's result goes to FOLDER/RANK.json.
"""

import json
import os
import sys
import time
import weakref
from collections import Counter
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from problems import features

from bam_kernels import bam_loss, sinkhorn_attention

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
V, B, D = 3, 4, 8
TIMEOUT_S = 8  # of the group, where a rank ends or stays away


def embeddings(views: int, seed: int = 0, images: int = B) -> torch.Tensor:
    """This rank's images of the global batch."""
    return features(views, WORLD * images, D, seed=seed)[:, RANK * images : (RANK + 1) * images].contiguous()


ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
GIVEN = {ALL_GATHER: 1, "all_reduce": 0}  # which argument holds what is given
OTHERS = ("all_gather", "all_to_all_single", "barrier", "broadcast", "reduce", "reduce_scatter_tensor")


class Traffic:
    """Counts calls of torch.distributed and the bytes that this process gives to them, in the block."""

    def __enter__(self) -> "Traffic":
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        p2p = mock.patch.object(dist, "P2POp", self._counted_p2p(dist.P2POp))
        self.patches = [mock.patch.object(dist, name, self._counted(name)) for name in (*GIVEN, *OTHERS)]
        self.patches.append(p2p)
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_) -> None:
        for patch in self.patches:
            patch.stop()

    def _counted(self, name: str):
        original = getattr(dist, name)
        shown = name.replace(ALL_GATHER, "all_gather_single")

        def call(*args, **options):
            self.calls[shown] += 1
            if name in GIVEN:
                self.bytes[shown] += args[GIVEN[name]].nbytes
            return original(*args, **options)

        return call

    def _counted_p2p(self, original):
        def make(op, tensor, *args):
            self.calls[op.__name__] += 1
            self.bytes[op.__name__] += tensor.nbytes
            return original(op, tensor, *args)

        return make


def traffic() -> dict:
    """Messages of one step, by problem."""
    results = {}
    for name, R, options in (
        ("no teacher", 0, {}),
        ("teacher", 2, {}),
        ("least epsilon", 0, {"epsilon": 1e-3}),
        ("five iterations", 2, {"iterations": 5}),
        ("regather", 2, {"regather": True}),
        ("slabs", 2, {"memory_budget": 6000}),
        ("no gradient", 0, {}),
    ):
        student = embeddings(V).requires_grad_(name != "no gradient")
        with Traffic() as seen:
            loss = bam_loss(student, embeddings(R, seed=1) if R else None, precision="exact", **options)
            if loss.requires_grad:
                loss.backward()
        results[name] = {"calls": dict(seen.calls), "bytes": dict(seen.bytes)}
    return results


def disagreements() -> dict:
    """One rank's problem differs; the message on every rank, and how long it took. Then a call that agrees."""
    odd = RANK == 1
    problems = {
        "B": lambda: bam_loss(embeddings(V, images=B - odd)),
        "D": lambda: bam_loss(embeddings(V)[..., : D - odd]),
        "dtype": lambda: bam_loss(embeddings(V).to(torch.float64 if odd else torch.float32), backend="reference"),
        "epsilon": lambda: bam_loss(embeddings(V), epsilon=0.04 if odd else 0.05),
        "NaN": lambda: bam_loss(embeddings(V).div(0.0 if odd else 1.0)),
        "argument": lambda: bam_loss(embeddings(V), top_k=-1 if odd else 0),
        "another operation": lambda: (
            sinkhorn_attention(embeddings(V).flatten(0, 1)) if odd else bam_loss(embeddings(V))
        ),
    }
    results = {}
    for name, call in problems.items():
        start = time.perf_counter()
        try:
            call()
            message = "no error"
        except ValueError as error:
            message = str(error)
        results[name] = {"message": message, "seconds": time.perf_counter() - start}
    results["after"] = bam_loss(embeddings(V)).item()
    return results


def death() -> dict:
    """Rank 1 ends in the middle of a call, once the header has been exchanged."""
    from bam_kernels.distributed import GroupRanks

    bam_loss(embeddings(V))
    if RANK == 1:
        with mock.patch.object(GroupRanks, "gather", lambda *_: os._exit(7)):
            bam_loss(embeddings(V))
    start = time.perf_counter()
    try:
        bam_loss(embeddings(V))
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    return {"message": message, "seconds": time.perf_counter() - start}


def absence() -> dict:
    """Rank 1 does not call at all."""
    start = time.perf_counter()
    if RANK == 1:
        time.sleep(TIMEOUT_S + 4)
        return {"message": "slept"}
    try:
        bam_loss(embeddings(V))
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    return {"message": message, "seconds": time.perf_counter() - start}


def compiled() -> dict:
    """A training step under torch.compile, whole, against the eager one."""
    layer = torch.nn.Linear(D, D)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.weight)

    def loss(images: torch.Tensor) -> torch.Tensor:
        return bam_loss(layer(images), views=V)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        value = function(embeddings(V).flatten(0, 1))
        value.backward()
        results.append([value.item(), *layer.weight.grad.flatten().tolist()])
    return {"eager": results[0], "compiled": results[1]}


def subgroup() -> dict:
    """Ranks 0 and 2 share a batch; rank 1 has its own and no part in theirs."""
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    whole = features(V, 2 * B, D)
    number = {0: 0, 1: None, 2: 1}[RANK]
    if number is None:
        try:
            bam_loss(whole, group=pair)
            message = "no error"
        except ValueError as error:
            message = str(error)
        return {"message": message, "loss": bam_loss(whole, group=alone).item()}
    return {"loss": bam_loss(whole[:, number * B : (number + 1) * B], group=pair).item()}


def through_host() -> dict:
    """What neighbours send goes through copies, as tensors of a GPU do over gloo; each step without and with them."""
    from bam_kernels import distributed

    def step(dtype: torch.dtype, **options) -> list:
        z = embeddings(V).to(dtype).requires_grad_()
        loss = bam_loss(z, backend="reference" if dtype == torch.float64 else "auto", **options)
        loss.backward()
        return [loss.item(), *z.grad.flatten().tolist()]

    steps = {
        "float32": (torch.float32, {}),
        "float64": (torch.float64, {}),
        "regather": (torch.float32, {"regather": True}),
    }
    results = {name: {"direct": step(dtype, **options)} for name, (dtype, options) in steps.items()}
    patch = mock.patch.object
    with (
        patch(distributed.GroupRanks, "_through_host", lambda *_: True),
        patch(distributed, "_FromHost", wraps=distributed._FromHost) as copied,
    ):
        for name, (dtype, options) in steps.items():
            copied.reset_mock()
            results[name] |= {"through host": step(dtype, **options), "copies": copied.call_count}
    ranks = distributed.GroupRanks(dist.group.WORLD)
    return results | {"needed": [ranks._through_host(torch.device(device)) for device in ("cpu", "cuda")]}


def destruction() -> dict:
    """The group is destroyed after one step, before a backward pass that would need it."""
    group = weakref.ref(dist.group.WORLD)
    z = embeddings(V).requires_grad_()
    bam_loss(z).backward()
    loss = bam_loss(z, backend="reference")
    dist.destroy_process_group()
    try:
        loss.backward()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    return {"held": group() is not None, "message": message}


if __name__ == "__main__":
    program, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    (folder / f"{RANK}.json").write_text(json.dumps(globals()[program]()))
    if program not in ("death", "absence", "destruction"):
        dist.barrier()
    os._exit(0)  # a group whose peers have gone may abort while it is torn down
