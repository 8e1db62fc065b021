"""What each gloo process of test_choice_ranks.py does: `python choice_rank_programs.py FOLDER [compiled]`.

RANK and WORLD_SIZE come from the environment; the results go to FOLDER/RANK.json.
"""

import json
import os
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import gloo
import pytest
import torch
import torch.distributed as dist
from problems import features, loss_and_grad
from stand_in_ways import StandInWays

from bam_kernels import BAMLoss, backends, bam_loss, loss, tuned
from bam_kernels.distributed import GroupRanks
from bam_kernels.ways import GPU_WAYS

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TIMEOUT_S = 30
RATES = dict.fromkeys(tuned.RATES, 1e12)
TRITON_IS_FASTER, FLASH_IS_FASTER = (
    RATES | {"cuda_exponentials": 1e11},
    RATES | {"flash_flops": 1e18, "memory_bytes": 1e6},
)
# By case, the ways that each rank has verified, and the rates of its tuning file.
CASES = {
    "some": ([("cuda", "triton"), ("triton",), GPU_WAYS, ("triton",)], [{}] * 4),
    "all": ([GPU_WAYS] * 4, [{}] * 4),
    "faster": ([GPU_WAYS] * 4, [TRITON_IS_FASTER] * 4),
    "flash": ([GPU_WAYS, ("triton", "flash")] * 2, [FLASH_IS_FASTER] * 4),
    "other rates": ([GPU_WAYS] * 4, [RATES, TRITON_IS_FASTER, FLASH_IS_FASTER, {}]),
    "nothing in common": ([("cuda",), ("triton",)] * 2, [{}] * 4),
    "a rank without any": ([GPU_WAYS] * 3 + [()], [{}] * 4),
    "none": ([()] * 4, [{}] * 4),
}


def own(images: int = 3) -> torch.Tensor:
    """This rank's images of a global batch."""
    return features(2, WORLD * images, 5)[:, RANK * images : (RANK + 1) * images].contiguous()


class Comparisons:
    """Counts comparisons of verified ways in the block."""

    def __enter__(self) -> "Comparisons":
        self.count = 0
        original = GroupRanks.common_ways

        def counted(*args):
            self.count += 1
            return original(*args)

        self.patch = mock.patch.object(GroupRanks, "common_ways", counted)
        self.patch.start()
        return self

    def __exit__(self, *_) -> None:
        self.patch.stop()


def with_verdicts(ways: StandInWays, trusted: tuple[str, ...], rates: dict[str, float]) -> None:
    ways.trust(*trusted)
    backends._warn_once.cache_clear()
    tuned.tuning = lambda: tuned.Tuning(rates)
    for module in (sys.modules["bam_kernels.header"], sys.modules["bam_kernels.engine.cost"]):
        module.tuning = tuned.tuning


def case(ways: StandInWays, trusted: tuple[str, ...], rates: dict[str, float]) -> dict:
    """Two steps on a group of all ranks."""
    with_verdicts(ways, trusted, rates)
    group = dist.new_group(list(range(WORLD)))
    found = {"said": [], "ran": [], "loss": [], "grad": []}
    with Comparisons() as compared, warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            found["said"].append(BAMLoss(group=group).way(own()))
            value, grad = loss_and_grad(bam_loss, own(), group=group)
            found["loss"].append(value.item())
            found["grad"].append(grad.tolist())
            found["ran"].append(next(iter(ways.taken()), None))
    texts = [str(one.message) for one in given if "bam_kernels" in str(one.message)]
    return found | {"comparisons": compared.count, "warnings": texts}


def subgroups(ways: StandInWays) -> dict:
    with_verdicts(ways, ("cuda",) if RANK < 2 else ("triton",), {})
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    alone = [dist.new_group([rank]) for rank in range(WORLD)]
    found = {}
    for name, group in (("pairs", pairs[RANK // 2]), ("alone", alone[RANK])):
        with Comparisons() as compared:
            bam_loss(own(), group=group)
            bam_loss(own(), group=group)
        found[name] = [ways.taken()[-1], compared.count]
    return found


def transforms(ways: StandInWays) -> dict:
    with_verdicts(ways, ("triton",) if RANK == 1 else GPU_WAYS, {})
    found = {}
    functions = {
        "grad": lambda loss: torch.func.grad(loss)(own()),
        "vmap": lambda loss: torch.func.vmap(loss)(torch.stack((own(), own()))),
    }
    for name, function in functions.items():
        loss = partial(bam_loss, group=dist.new_group(list(range(WORLD))))
        with Comparisons() as compared:
            result = function(loss)
            expected = torch.stack([loss(own())] * 2) if name == "vmap" else loss_and_grad(loss, own())[1]
        found[name] = [ways.taken()[0], compared.count, torch.equal(result, expected)]
    return found


def message(call) -> str:
    """What a call raises. Errors are not reported to other ranks, as for tensors on GPUs."""
    with mock.patch.object(loss, "share_errors_with_ranks", lambda *_: nullcontext()):
        try:
            call()
        except ValueError as error:
            return str(error)
    return "no error"


def named(ways: StandInWays) -> str:
    with_verdicts(ways, GPU_WAYS, {})
    group = dist.new_group(list(range(WORLD)))
    return message(lambda: bam_loss(own(), group=group, backend="cuda" if RANK == 2 else "auto"))


def compiled(ways: StandInWays) -> dict:
    def loss_of(group, x):
        return torch.compile(lambda z: bam_loss(z, group=group), fullgraph=True, backend="aot_eager")(x)

    found = {}
    for name, trusted in (("equal", GPU_WAYS), ("different", ("triton",) if RANK == 0 else GPU_WAYS)):
        with_verdicts(ways, trusted, {})
        torch.compiler.reset()
        group = dist.new_group(list(range(WORLD)))
        found[name] = message(lambda group=group: loss_of(group, own()))
        found[name] = next(iter(ways.taken()), "") if name == "equal" else found[name]
    torch.compiler.reset()
    bam_loss(own(), group=group)
    ways.taken()
    loss_of(group, own())
    return found | {"compared": ways.taken()[0]}


if __name__ == "__main__":
    gloo.meet(Path(sys.argv[1]), RANK, WORLD, TIMEOUT_S)
    patch = pytest.MonkeyPatch()
    ways = StandInWays(patch)
    patch.setattr(torch.cuda, "is_available", lambda: sys._getframe(1).f_globals["__name__"].startswith("bam_kernels."))
    if sys.argv[2:] == ["compiled"]:
        results = transforms(ways) | {"compiled": compiled(ways)}
    else:
        results = {name: case(ways, trusted[RANK], rates[RANK]) for name, (trusted, rates) in CASES.items()}
        results |= subgroups(ways) | {"named": named(ways)}
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(results))
    dist.barrier()
    gloo.leave()
