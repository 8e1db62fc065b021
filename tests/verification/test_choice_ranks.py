"""Ranks that have verified different kernels: all use what all have verified, and say so where that is nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import get_ident

import pytest
import torch
from problems import features, loss_and_grad, needs_cpu_kernels
from stand_in_ways import ways  # noqa: F401

from bam_kernels import bam_loss, checked_call, reference
from bam_kernels.checked_call import CheckedCall
from bam_kernels.header import Header, NonFinite, ways_header
from bam_kernels.options import Options
from bam_kernels.simulated import SimulatedRanks, run_ranks
from bam_kernels.verification import trust
from bam_kernels.ways import GPU_WAYS

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "choice_rank_programs.py"
pytestmark = [
    needs_cpu_kernels,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


def common(*of_ranks: Header | tuple[str, ...]) -> tuple[str, ...]:
    """What rank 0 takes; each rank sends its ways, or another header."""
    headers = [sent if isinstance(sent, Header) else ways_header("bam_loss", sent) for sent in of_ranks]
    return headers[0].common_ways([header.encoded for header in headers])


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ([("cuda", "triton"), ("triton",), GPU_WAYS, ("triton",)], ("triton",)),
        ([GPU_WAYS] * 3, GPU_WAYS),
        ([("triton", "flash"), ("cuda", "triton", "flash")], ("triton", "flash")),
        ([("cuda",), ("triton",)], ()),
        ([("cuda",), ()], ()),
        ([(), ("cuda",)], ()),
        ([(), ()], ()),
    ],
)
def test_ways_of_all_ranks(of_ranks, expected):
    assert common(*of_ranks) == expected


def test_a_rank_that_names_its_backend_or_fails():
    """The header of its call comes instead; each rank that compares names the difference."""
    named = Header("bam_loss", {"backend": "cuda", "B": 4})
    words = r"^bam_loss: ranks disagree on backend: 'auto' on ranks 0, 2; 'cuda' on rank 1$"
    with pytest.raises(ValueError, match=words):
        common(GPU_WAYS, named, GPU_WAYS)
    with pytest.raises(ValueError, match=words):
        named.check([header.encoded for header in (ways_header("bam_loss", GPU_WAYS), named,
                                                     ways_header("bam_loss", ("cuda",)))])  # fmt: skip
    with pytest.raises(ValueError, match="ranks disagree on operation: 'bam_loss' on rank 0; 'bam_targets' on rank 1"):
        common(GPU_WAYS, ways_header("bam_targets", GPU_WAYS))
    with pytest.raises(ValueError, match="bam_loss: stopped because of rank 1, which reports: views must be"):
        common(GPU_WAYS, Header("bam_loss", {}, "views must be given"))
    with pytest.raises(NonFinite, match="stopped because of rank 1"):
        common(GPU_WAYS, Header("bam_loss", {}, "student has 1 row", non_finite=True))


def test_ranks_with_other_rates_take_the_first_way(monkeypatch):
    """With rates of its own, each would choose another way."""
    own = ways_header("bam_loss", GPU_WAYS)
    other = Header("bam_loss", own.values | {"rates": {"exponentials": 1e12}})
    assert common(own, other) == common(other, own) == ("cuda",)
    assert common(other, other) == GPU_WAYS
    assert common(ways_header("bam_loss", ("triton", "flash")), other) == ("triton",)


def test_threads(ways, monkeypatch):  # noqa: F811
    """Each has verdicts of its own."""
    of_rank = [("cuda", "triton"), GPU_WAYS, ("triton", "flash")]
    verdicts = {}
    monkeypatch.setattr(trust, "of_device", lambda device: trust.Trust(verdicts[get_ident()]))
    z = features(2, 12, 5)

    def step(group):
        verdicts[get_ident()] = of_rank[group.rank]
        own = z[:, 4 * group.rank : 4 * group.rank + 4]
        return [loss_and_grad(bam_loss, own, group=group) for _ in range(2)]

    results = run_ranks(3, step)
    assert ways.taken() == ["triton slab"] * 6
    loss, grad = loss_and_grad(reference.bam_loss, z.double())
    for call in range(2):
        assert sum(result[call][0] for result in results) / 3 == pytest.approx(loss.item(), rel=1e-5)
        found = torch.cat([result[call][1] for result in results], 1) / 3
        assert ((found - grad).abs() <= 1e-5 * grad.abs().max()).all()


def test_a_simulated_rank_has_its_own_verdicts(ways):  # noqa: F811
    ways.trust("triton")
    keys = torch.nn.functional.normalize(features(2, 8, 5).flatten(0, 1), dim=1)
    bam_loss(features(2, 4, 5), group=SimulatedRanks(2, 0, keys))
    assert ways.taken() == ["triton slab"]


def test_ranks_that_have_not_compared_do_not_wait(ways, monkeypatch):  # noqa: F811
    """While a compiler traces, say: own verdicts count, and afterwards those of all."""

    class Group:
        asked = 0

        def common_ways(self, operation, own, device):
            self.asked += 1
            return ("triton", "flash")

    group = Group()
    monkeypatch.setattr(trust, "ranks_named", lambda name: group)
    ways.trust("cuda", "triton")

    def trusted() -> tuple[str, ...]:
        return trust.ways("bam_loss", torch.device("cpu"), "auto", (2, 0, "group"))[0]

    with monkeypatch.context() as patch:
        patch.setattr(trust, "_must_not_wait", lambda: True)
        assert trusted() == ("cuda", "triton") and group.asked == 0
    assert trusted() == ("triton",)
    monkeypatch.setattr(trust, "_must_not_wait", lambda: True)
    assert trusted() == ("triton",) and group.asked == 1


def test_a_kept_call_takes_what_ranks_have_verified_since(ways, monkeypatch):  # noqa: F811
    """Ranks that compare later, then another group of an equal name; with one rank the first choice is kept."""

    class Group:
        def __init__(self, *verified: str) -> None:
            self.common_ways = lambda *_: verified

    z, groups = features(2, 4, 5), [Group("triton", "flash"), Group("flash")]
    several, one = (
        CheckedCall("bam_loss", Options(), Options().layout("bam_loss", z, None), ranks, True)
        for ranks in ((2, 0, "group"), (1, 0, ""))
    )
    monkeypatch.setattr(trust, "ranks_named", lambda name: groups[0])
    ways.trust("cuda", "triton", "flash")
    with monkeypatch.context() as patch:
        patch.setattr(trust, "_must_not_wait", lambda: True)
        assert several.ways(z) == one.ways(z) == "cuda+triton+flash"
    assert several.ways(z) == "triton+flash"
    del groups[0]
    assert several.ways(z) == "flash"
    with monkeypatch.context() as patch:
        patch.setattr(checked_call, "choose", lambda *_: pytest.fail("chosen again"))
        assert one.ways(z) == "cuda+triton+flash"


def run(folder: Path, W: int, *programs: str) -> dict[int, dict]:
    """Results of W processes, by rank."""
    environment = os.environ | {"WORLD_SIZE": str(W), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder), *programs]
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(W)]
    assert [process.wait(timeout=120) for process in processes] == [0] * W
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(W)}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[int, dict]:
    return run(tmp_path_factory.mktemp("four"), 4)


CASES = {
    "some": "triton slab",
    "all": "cuda slab",
    "faster": "triton slab",
    "flash": "triton flash",
    "other rates": "cuda slab",
    "nothing in common": "reference",
    "a rank without any": "reference",
    "none": "reference",
}


@pytest.mark.parametrize("case", CASES)
def test_processes_take_what_all_have_verified(case, four):
    """Loss and gradient are those of one process; ranks compare once for each group."""
    z = features(2, 12, 5)
    loss, grad = loss_and_grad(reference.bam_loss, z.double())
    results = [four[rank][case] for rank in range(4)]
    for call in range(2):
        assert [result["said"][call] for result in results] == [CASES[case]] * 4
        assert [result["ran"][call] for result in results] == [None if CASES[case] == "reference" else CASES[case]] * 4
        assert sum(result["loss"][call] for result in results) / 4 == pytest.approx(loss.item(), rel=1e-5)
        found = torch.cat([torch.tensor(result["grad"][call]) for result in results], 1) / 4
        assert ((found - grad).abs() <= 1e-5 * grad.abs().max()).all()
    assert [result["comparisons"] for result in results] == [1] * 4


def test_ranks_without_common_kernels_warn_once_and_say_what_to_type(four):
    lacks = "no kernels are verified on this GPU (cuda failed: for a test; triton failed: for a test; flash failed: "
    lacks += "for a test); `python -m bam_kernels.verify` tries them"
    differs = "kernels ({}) are verified on the GPU of this rank, but none on those of all ranks; "
    differs += "`python -m bam_kernels.verify` on each machine tries them"
    expected = {
        "none": [lacks] * 4,
        "a rank without any": [differs.format("cuda, triton, flash")] * 3 + [lacks],
        "nothing in common": [differs.format(own) for own in ("cuda", "triton", "cuda", "triton")],
        "some": [],
    }
    for case, texts in expected.items():
        found = [text for rank in range(4) for text in four[rank][case]["warnings"]]
        assert found == [f"bam_kernels: computing with the slow PyTorch reference: {text}" for text in texts]


def test_subgroups_compare_by_themselves(four):
    """Ranks 0 and 1 have verified CUDA, ranks 2 and 3 Triton; and a group of one rank compares nothing."""
    assert [four[rank]["pairs"] for rank in range(4)] == [["cuda slab", 1]] * 2 + [["triton slab", 1]] * 2
    assert [four[rank]["alone"] for rank in range(4)] == [["cuda slab", 0]] * 2 + [["triton slab", 0]] * 2


def test_a_named_backend_beside_auto_is_an_error_on_every_rank(four):
    for rank in range(4):
        words = "bam_loss: ranks disagree on backend: 'auto' on ranks 0, 1, 3; 'cuda' on rank 2"
        assert four[rank]["named"] == words


@pytest.mark.slow
def test_ranks_that_first_call_in_a_transform_or_a_compiled_function(tmp_path):
    """Ranks compare in torch.func's transforms. In a compiled function they do not: there equal verdicts run, and
    different ones are an error of every rank when the function runs."""
    for result in run(tmp_path, 2, "compiled").values():
        assert result["grad"] == result["vmap"] == ["triton slab", 1, True]
        assert result["compiled"] == {
            "equal": "cuda slab",
            "different": "bam_loss: ranks disagree on backend: 'triton' on rank 0; 'cuda' on rank 1",
            "compared": "triton slab",
        }
