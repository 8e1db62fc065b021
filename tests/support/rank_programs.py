"""What each process of a gloo group does in test_process_groups.py: `python rank_programs.py FOLDER PROGRAM...`.

RANK and WORLD_SIZE come from the environment; the results go to FOLDER/RANK.json, by the programs' names.
"""

import copy
import io
import json
import os
import pickle
import sys
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import gloo
import torch
import torch.distributed as dist
from problems import features
from repeated_steps import BEFORE_REPEATS, Case, by_engine, record, repeated, result

from bam_kernels import BAMLoss, bam_loss, bam_targets, sinkhorn_attention
from bam_kernels.ranks import ONE_RANK
from bam_kernels.saved_group import SavedGroup

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
    """Messages of one step, by problem: of the engine, and of a later call, which repeats a recording."""
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
        calls = []
        for _ in range(BEFORE_REPEATS + 1):
            with Traffic() as seen:
                loss = bam_loss(student, embeddings(R, seed=1) if R else None, precision="exact", **options)
                if loss.requires_grad:
                    loss.backward()
            calls.append({"calls": dict(seen.calls), "bytes": dict(seen.bytes)})
        results[name] = calls[0] | {"repeated": calls[-1]}
    return results


PROBLEMS = {
    "no teacher": Case(V=3),
    "teacher": Case(V=3, R=2),
    "least epsilon": Case(options={"epsilon": 1e-3}),
    "regather": Case(options={"regather": True}),
    "slabs": Case(V=3, B=20, options={"memory_budget": 6000}),
    "float16": Case(dtype=torch.float16),
}


def unequal_repeats() -> list[str]:
    """Problems of which a repeated step is not the engine's, bit for bit."""
    unequal = []
    for name, case in PROBLEMS.items():
        record(*case.inputs(RANK), **case.options)
        for seed in (10, 20):
            given = case.inputs(seed + RANK)
            found, expected = repeated(*given, **case.options), by_engine(*given, **case.options)
            if not all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)):
                unequal.append(name)
    return unequal


def repeats() -> dict:
    """Steps that repeat a recording, before and after the process group has been made again under its old name."""
    name = dist.group.WORLD.group_name
    results = {"unequal": unequal_repeats()}
    dist.barrier()
    dist.destroy_process_group()
    given = PROBLEMS["teacher"].inputs(RANK)
    results["alone"] = torch.equal(result(*given)[2], by_engine(*given, group=ONE_RANK)[2])
    folder = Path(sys.argv[1]) / "again"
    folder.mkdir(exist_ok=True)
    gloo.meet(folder, RANK, WORLD, TIMEOUT_S)
    results["same name"] = dist.group.WORLD.group_name == name
    results["unequal again"] = unequal_repeats()
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
    return error_and_seconds()


def absence() -> dict:
    """Rank 1 does not call at all."""
    if RANK == 1:
        time.sleep(TIMEOUT_S + 4)
        return {"message": "slept"}
    return error_and_seconds()


def error_and_seconds() -> dict:
    """What a call of the loss raises, and after how long."""
    start = time.perf_counter()
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


def operations() -> dict:
    """By name: (eager, compiled whole), every operation on every backend that runs here."""

    def made(backend: str) -> dict:
        return {
            f"{backend} loss": lambda z: bam_loss(z, backend=backend),
            f"{backend} targets": lambda z: bam_targets(z, backend=backend),
            f"{backend} plan": lambda z: sinkhorn_attention(z[0], backend=backend),
            f"{backend} potentials": lambda z: sinkhorn_attention(z[0], output="potentials", backend=backend)[1],
        }

    eager = made("cpu") | made("reference") | {"float64 loss": lambda z: bam_loss(z.double())}
    compile_whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    return {name: (function, compile_whole(function)) for name, function in eager.items()}


def compiled_operations() -> dict:
    results = {}
    for name, functions in operations().items():
        values = []
        for function in functions:
            z = embeddings(V).requires_grad_()
            value = function(z)
            if value.requires_grad:
                value.backward()
            values.append((value.detach(), z.grad))
        (value, grad), (compiled_value, compiled_grad) = values
        same = torch.equal(value, compiled_value)
        if grad is not None:
            same &= bool(((grad - compiled_grad).abs() <= 1e-6 * grad.abs().max()).all())
        results[name] = same
    different = {"iterations": 3 + RANK, "epsilon": 0.05 + RANK / 100, "key_views": 1 + RANK}
    for option, number in different.items():
        z = embeddings(V, images=B // (1 + RANK) if option == "key_views" else B)
        try:
            torch.compile(lambda z, o={option: number}: bam_loss(z, backend="reference", **o), fullgraph=True)(z)
            results[f"different {option}"] = "no error"
        except ValueError as error:
            results[f"different {option}"] = str(error)
    return results


def compiled_with_a_group() -> dict:
    """A group that a compiled function meets first, given in each way; then in eager mode."""
    z = embeddings(V)
    expected = bam_loss(z).item()
    results = {}
    for backend in ("cpu", "reference"):
        group = dist.new_group(list(range(WORLD)))
        module = BAMLoss(group=group, backend=backend)
        ways = {
            "closure": lambda x, g=group, b=backend: bam_loss(x, group=g, backend=b),
            "module": module,
            "eager": lambda x, g=group, b=backend: bam_loss(x, group=g, backend=b),
        }
        for way, function in ways.items():
            run = function if way == "eager" else torch.compile(function, fullgraph=True, backend="aot_eager")
            results[f"{backend} {way}"] = abs(run(z).item() / expected - 1) < 1e-5
        argument = torch.compile(lambda x, g, b=backend: bam_loss(x, group=g, backend=b), backend="aot_eager")
        results[f"{backend} argument"] = abs(argument(z, dist.group.WORLD).item() / expected - 1) < 1e-5
    return results


def compiled_before(compiled: dict) -> dict:
    """What functions say or do that were compiled and called before there was a group; then without it again."""
    results = {}
    for name, (eager, compiled_function) in compiled.items():
        z = embeddings(V)
        try:
            results[name] = "right" if torch.equal(compiled_function(z), eager(z)) else "wrong"
        except RuntimeError as error:
            results[name] = str(error)
    eager, compiled_function = compiled["cpu loss"]
    dist.barrier()
    dist.destroy_process_group()
    results["alone again"] = torch.equal(compiled_function(embeddings(V)), eager(embeddings(V)))
    return results


def forward_mode() -> dict:
    """The tangents of the others' keys count: against one process."""
    z, t = embeddings(V).double(), embeddings(V, seed=1).double()
    own = torch.func.jvp(lambda x: bam_loss(x, backend="reference"), (z,), (t,))[1]
    whole = torch.func.jvp(
        lambda x: bam_loss(x, group=ONE_RANK),
        tuple(features(V, WORLD * B, D, seed=seed).double() for seed in (0,)),
        tuple(features(V, WORLD * B, D, seed=seed).double() for seed in (1,)),
    )[1]
    dist.all_reduce(own)
    return {"mean": own.item() / WORLD, "whole": whole.item()}


def saved() -> dict:
    """Copies of a module with a process group have that group, or say which one they have lost."""
    pair = dist.new_group([0, 1])
    z = embeddings(V)
    if RANK == 2:
        return {}
    results = {}
    for name, group in (("pair", pair), ("all", dist.group.WORLD if WORLD == 2 else pair)):
        loss, file = BAMLoss(group=group), io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        copies = (
            copy.copy(loss),
            copy.deepcopy(torch.nn.ModuleDict({"loss": loss}))["loss"],
            pickle.loads(pickle.dumps(loss)),
            torch.load(file, weights_only=False),
        )
        results[name] = [other(z).item() == loss(z).item() for other in copies]
    kept = pickle.dumps(BAMLoss(group=pair))
    lost = kept.replace(pair.group_name.encode(), b"x" * len(pair.group_name))
    moved = SavedGroup(pair.group_name, (0, 1, 2))
    for name, make in (("lost", lambda: pickle.loads(lost)), ("other members", lambda: BAMLoss(group=moved))):
        try:
            make()(z)
            results[name] = "no error"
        except ValueError as error:
            results[name] = str(error)
    return results


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
        patch(distributed.GroupRanks, "_needs_host_copy", lambda *_: True),
        patch(distributed, "_HostTransfer", wraps=distributed._HostTransfer) as copied,
    ):
        for name, (dtype, options) in steps.items():
            copied.reset_mock()
            results[name] |= {"through host": step(dtype, **options), "copies": copied.call_count}
    ranks = distributed.GroupRanks(dist.group.WORLD)
    return results | {"needed": [ranks._needs_host_copy(torch.device(device)) for device in ("cpu", "cuda")]}


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
    folder, programs = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    prepared = []
    if programs == ["compiled_before"]:
        prepared.append(operations())
        for _, compiled_function in prepared[0].values():
            compiled_function(embeddings(V))
    gloo.meet(folder, RANK, WORLD, TIMEOUT_S)
    results = {program: globals()[program](*prepared) for program in programs}
    (folder / f"{RANK}.json").write_text(json.dumps(results))
    if programs[-1] not in ("death", "absence", "destruction", "compiled_before"):
        dist.barrier()
    gloo.leave()
