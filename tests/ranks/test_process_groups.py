"""Real processes over gloo: the same numbers as one process, messages counted, and faults between ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import features, needs_cpu_kernels

from bam_kernels import bam_loss, plan, verify_ranks
from bam_kernels.distributed import GroupRanks
from bam_kernels.header import HEADER_BYTES

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "rank_programs.py"
V, B, D, TIMEOUT_S = 3, 4, 8, 8  # those of the programs


Results = dict[str, dict[int, dict]]  # by program, then by rank


def run(programs: tuple[str, ...], W: int, folder: Path, survivors: tuple[int, ...] | None = None) -> Results:
    """Results of programs that W processes run one after another; only of the ranks that are expected to end well."""
    environment = os.environ | {"WORLD_SIZE": str(W), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder), *programs]
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(W)]
    codes = [process.wait(timeout=180) for process in processes]
    expected = tuple(range(W)) if survivors is None else survivors
    assert all(codes[rank] == 0 for rank in expected), codes
    ranks = {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in expected}
    return {program: {rank: results[program] for rank, results in ranks.items()} for program in programs}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Results:
    programs = ("traffic", "compiled", "compiled_operations", "compiled_with_a_group", "forward_mode", "saved")
    return run(programs, 2, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Results:
    programs = ("disagreements", "through_host", "saved", "subgroup", "repeats")
    return run(programs, 3, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("W", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(W, tmp_path):
    """The command itself: every case, float64 to 1e-12, float32 to 1e-5 and float16 to 2e-3."""
    command = [sys.executable, "-m", "bam_kernels.verify_ranks", "--world", str(W), "--images", "5", "--features", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the exchanges by themselves: right" in done.stdout and "the ranks agree with one" in done.stdout
    assert all(f"\n{name} " in done.stdout for name in verify_ranks.CASES)


@pytest.mark.slow
def test_triton_ranks_equal_one_process(tmp_path):
    """Processes of Triton's interpreter: float32, and fp16 keys that are centred before they are sent."""
    pytest.importorskip("triton")
    cases = ["no teacher", "teacher's keys, student's rows", "keys gathered twice", "scores made again"]
    command = [sys.executable, "-m", "bam_kernels.verify_ranks", "--world", "2", "--images", "3", "--features", "12"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--backend", "triton", "--cases", *cases],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and "the ranks agree with one" in done.stdout, done.stdout + done.stderr
    assert "float64" not in done.stdout and all(f"\n{name} " in done.stdout for name in cases)


@pytest.fixture
def alone(tmp_path, monkeypatch) -> None:
    """This process is the only rank of a group that a command started."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", verify_ranks.RENDEZVOUS: f"file://{tmp_path}/meeting"}.items():
        monkeypatch.setenv(name, value)


def test_a_wrong_gradient_is_seen(alone, monkeypatch, capsys):
    def wrong(student, teacher, **options):
        loss, dz = original(student, teacher, **options)
        return loss, dz if "group" in options else dz * (1 + 1e-4)

    original = verify_ranks._loss_and_gradient
    monkeypatch.setattr(verify_ranks, "_loss_and_gradient", wrong)
    assert verify_ranks.main(["--images", "5", "--features", "12"]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exchange", "fault"),
    [
        ("sum", torch.neg),
        ("max", torch.neg),
        ("scatter", torch.neg),
        ("gather", lambda blocks: [(0, -next(blocks)[1])]),
    ],
)
def test_a_wrong_exchange_of_a_rank_alone_is_seen(exchange, fault, alone, monkeypatch, capsys):
    original = getattr(GroupRanks, exchange)
    monkeypatch.setattr(verify_ranks, "CASES", {})
    for patched in (lambda *args: fault(original(*args)), original):
        monkeypatch.setattr(GroupRanks, exchange, patched)
        ended = verify_ranks.main([])
        Path(os.environ[verify_ranks.RENDEZVOUS].removeprefix("file://")).unlink(missing_ok=True)
        assert ended == (patched is not original)
        assert (f"rank 0: WRONG {exchange}" in capsys.readouterr().out) == (patched is not original)


@pytest.mark.parametrize(
    ("device", "backend", "ranks", "gpus", "torchrun", "expected"),
    [
        ("auto", "auto", 4, 2, False, ("cpu", "gloo")),
        ("auto", "auto", 2, 2, True, ("cuda", "nccl")),
        ("auto", "auto", 2, 0, True, ("cpu", "gloo")),
        ("cuda", "auto", 2, 1, False, ("cuda", "gloo")),  # ranks share the GPU
        ("cuda", "auto", 1, 1, False, ("cuda", "nccl")),
        ("cuda", "gloo", 1, 1, True, ("cuda", "gloo")),
        ("cpu", "auto", 2, 2, True, ("cpu", "gloo")),
        ("cuda", "auto", 2, 0, False, "torch sees no GPU"),
        ("auto", "nccl", 2, 2, False, "nccl needs --device cuda"),
        ("cuda", "nccl", 2, 1, False, "a GPU for each rank, got 2 ranks and 1 GPUs"),
    ],
)
def test_where_ranks_run(device, backend, ranks, gpus, torchrun, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("RANK", raising=False)
    if torchrun:
        monkeypatch.setenv("RANK", "0")
    if isinstance(expected, tuple):
        assert verify_ranks.group_place(device, backend, ranks) == expected
        return
    with pytest.raises(ValueError, match=expected):
        verify_ranks.group_place(device, backend, ranks)


@pytest.mark.parametrize("launcher", [{}, {"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "2"}])
def test_a_launcher_may_leave_out_how_many_ranks_a_machine_has(launcher, alone, monkeypatch):
    """One GPU; not the processes that --world would start."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(verify_ranks, "verify", lambda *arguments: arguments[-2:])
    shared = launcher.get("LOCAL_WORLD_SIZE") == "2"
    assert verify_ranks.main(["--device", "cuda"]) == ("cuda", "gloo" if shared else "nccl")


def test_nothing_starts_where_it_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(verify_ranks, "_start", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit):
        verify_ranks.main(["--group-backend", "nccl", "--world", "2"])
    assert "nccl needs --device cuda" in capsys.readouterr().err


def test_messages_of_a_step_between_two(pair):
    check_messages(pair["traffic"], 2)


def test_messages_of_a_step_between_four(tmp_path):
    check_messages(run(("traffic",), 4, tmp_path)["traffic"], 4)


def test_repeated_steps(three):
    """Bit for bit those of the engine; and again in a new process group that has the name of one that is gone."""
    for results in three["repeats"].values():
        assert results == {"unequal": [], "alone": True, "same name": True, "unequal again": []}


def check_messages(results: dict[int, dict], W: int) -> None:
    """A header, W - 1 blocks of keys, a sum of N numbers per iteration, W - 1 blocks of key gradients; nothing else."""
    shapes = {
        "no teacher": {},
        "teacher": {"teacher_views": 2},
        "least epsilon": {"epsilon": 1e-3},
        "five iterations": {"teacher_views": 2, "iterations": 5},
        "regather": {"teacher_views": 2, "regather": True},
        "slabs": {"teacher_views": 2, "memory_budget": 6000},
        "no gradient": {"needs_grad": False},
    }
    for steps in results.values():
        assert steps.keys() == shapes.keys()
        N, block = 2 * B * W, 2 * B * D * 4
        for name, shape in shapes.items():
            step, iterations = steps[name], shape.get("iterations", 3)
            assert step.pop("repeated") == step
            gathers = 2 if name == "regather" else 1
            scatters = name in ("no teacher", "least epsilon")
            maximum = name == "least epsilon"  # of each column, where one float64 does not hold all sums
            assert step["calls"] == {
                "all_gather_single": 1,
                "isend": (gathers + scatters) * (W - 1),
                "irecv": (gathers + scatters) * (W - 1),
                "all_reduce": iterations + maximum,
            }, name
            sums = 8 * N + 4 * N * (iterations - 1 + maximum)
            assert step["bytes"] == {
                "all_gather_single": HEADER_BYTES,
                "isend": (gathers + scatters) * (W - 1) * block,
                "irecv": (gathers + scatters) * (W - 1) * block,
                "all_reduce": sums,
            }, name
            forecast = plan(views=V, images=B, features=D, ranks=W, **shape).messages
            assert {m.exchange: (m.count, m.bytes) for m in forecast} == {
                "header": (1, HEADER_BYTES),
                "key blocks": (gathers * (W - 1), gathers * (W - 1) * block),
                "column sums": (iterations + maximum, sums),
                **({"key gradient blocks": (W - 1, (W - 1) * block)} if scatters else {}),
            }, name


def test_ranks_that_differ_are_told_within_seconds(three):
    ranks = three["disagreements"]
    words = {
        "B": "ranks disagree on B: 4 on ranks 0, 2; 3 on rank 1",
        "D": "ranks disagree on D: 8 on ranks 0, 2; 7 on rank 1",
        "dtype": "ranks disagree on student's type",
        "epsilon": "ranks disagree on epsilon: 0.05 on ranks 0, 2; 0.04 on rank 1",
        "NaN": "bam_loss: student has 12 row(s) with non-finite values",
        "argument": "bam_loss: top_k must be at least 0, got -1",
        "another operation": "ranks disagree on operation: 'bam_loss' on ranks 0, 2; 'sinkhorn_attention' on rank 1",
    }
    for number, results in ranks.items():
        for name, text in words.items():
            assert text in results[name]["message"], (number, name)
            assert results[name]["seconds"] < 5
            told = "stopped because of rank 1" in results[name]["message"]
            assert told == (number != 1 and name in ("NaN", "argument"))
    whole = bam_loss(features(V, 3 * B, D))
    mean = sum(results["after"] for results in ranks.values()) / 3
    assert mean == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("program", ["death", pytest.param("absence", marks=pytest.mark.slow)])
def test_no_rank_waits_for_ever(program, tmp_path):
    """The others end within the group's time-out with an error that says what was under way."""
    for result in run((program,), 3, tmp_path, survivors=(0, 2))[program].values():
        assert "of 3 failed while" in result["message"] and "as when another rank ends" in result["message"]
        assert result["seconds"] < TIMEOUT_S + 10


def test_a_group_that_is_destroyed_has_gone(tmp_path):
    """Nothing here holds it: it ends its threads, before Python does."""
    for result in run(("destruction",), 2, tmp_path)["destruction"].values():
        assert not result["held"]
        assert "rank 0 of 1: the process group has been made or destroyed since" in result["message"]


def test_tensors_of_a_gpu_go_through_the_host_over_gloo(three):
    for result in three["through_host"].values():
        assert result.pop("needed") == [False, True]
        for name, steps in result.items():
            assert steps["direct"] == steps["through host"]
            assert steps["copies"] == (6 if name == "regather" else 4)  # two steps of the ring for each time round it


def test_compiled_step(pair):
    for result in pair["compiled"].values():
        assert result["compiled"] == result["eager"]


def test_compiled_operations(pair):
    """Also what the reference exchanges; ranks that differ are told so when a compiled function runs."""
    for result in pair["compiled_operations"].values():
        iterations, epsilon = result.pop("different iterations"), result.pop("different epsilon")
        assert "bam_loss: ranks disagree on iterations: '3' on rank 0; '4' on rank 1" in iterations
        assert "bam_loss: ranks disagree on epsilon: 0.05 on rank 0; 0.06" in epsilon
        assert "bam_loss: ranks disagree on T: '1' on rank 0; '2' on rank 1" in result.pop("different key_views")
        assert all(result.values()), result


def test_a_compiled_function_with_a_group(pair):
    for result in pair["compiled_with_a_group"].values():
        assert all(result.values()), result


def test_forward_mode(pair):
    for result in pair["forward_mode"].values():
        assert result["mean"] == pytest.approx(result["whole"], rel=1e-10)


@pytest.mark.slow
def test_what_was_compiled_before_the_group(tmp_path):
    """The loss has the ranks that there are; what has a size that follows from them says that it was made for one."""
    for rank, result in run(("compiled_before",), 2, tmp_path)["compiled_before"].items():
        assert result.pop("cpu loss") == "right" and result.pop("alone again") is True
        said = f"compiled or recorded as rank 0 of 1, but this process is now rank {rank} of 2"
        assert all(said in message for message in result.values()), result


@pytest.mark.parametrize("ranks", ["pair", "three"])
def test_a_module_with_a_group_is_copied_and_saved(ranks, request):
    results = request.getfixturevalue(ranks)["saved"]
    for rank in (0, 1):
        assert results[rank]["pair"] == results[rank]["all"] == [True] * 4
        assert "this process has none of that name" in results[rank]["lost"]
        assert "with ranks [0, 1, 2]; here the group of that name has ranks [0, 1]" in results[rank]["other members"]


def test_subgroups(three):
    ranks = three["subgroup"]
    whole = bam_loss(features(V, 2 * B, D)).item()
    assert (ranks[0]["loss"] + ranks[2]["loss"]) / 2 == pytest.approx(whole, rel=1e-6)
    assert ranks[1]["loss"] == pytest.approx(whole, rel=1e-6)
    assert "this process is not a member of group" in ranks[1]["message"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"RANK": "one"}, "RANK must be a number, as torchrun sets it, got 'one'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a number, as torchrun sets it, got ''"),
        ({"RANK": "2"}, "RANK must be less than WORLD_SIZE, got 2 and 2"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE must be a number, as torchrun sets it, got 'two'"),
        ({"MASTER_PORT": ""}, "RANK is set, but MASTER_ADDR or MASTER_PORT is not; torchrun sets all of them"),
    ],
)
def test_verify_ranks_says_which_variable_has_no_meaning(changes, words, monkeypatch, capsys):
    known = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (known | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(verify_ranks, "verify", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit) as end:
        verify_ranks.main([])
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(f"error: {words}")
