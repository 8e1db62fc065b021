"""Which backend computes the loss: said at the start, kept in history and checkpoint, shown in the report."""

import json
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import stand_in_gpu
import torch
import torch.distributed as dist
from driver_runs import TINY, content, pretrain, rows
from photographs import write_classes
from stand_in_gpu import gpu  # noqa: F401

import bam_kernels.loss
from bam_kernels import BAMLoss
from bam_kernels.backends import cpu
from bam_kernels.whole_files import replacing
from driver import checkpoint, cli, exits, history, loss, optim, train, verify_resume
from driver.config import Config, UserError
from driver.distributed import World
from driver.reporting import summary

KERNELS = "reference" if cpu.unavailable() else "cpu slab"
CPU = torch.device("cpu")
CROPS = ["--data.root=pets", "--data.size=16", "--data.local-views=2", "--data.local-size=8", "--data.batch-size=4"]
CROPS += ["--data.augmentation=dino", "--data.workers=0", "--model.name=convnet"]


def ways(directory: Path) -> list[tuple[int, str]]:
    """Steps and ways of the rows of kind "backend"; history.jsonl and the checkpoint must agree."""
    saved = content(directory)
    found = [(row["step"], row["way"]) for row in rows(saved, "backend")]
    assert found == [(row["step"], row["way"]) for row in history.read(directory).of("backend")]
    assert saved["backend"] == found[-1][1]
    return found


class WayByEpsilon(BAMLoss):
    """Loss whose way depends on epsilon, as on a GPU, where small ones need float32 scores."""

    def way(self, student, teacher=None, step=None):
        super().way(student, teacher, step)
        return "cuda slab" if self.epsilon(step) < 0.003 else "triton flash"


# The log, the history, the checkpoint


@pytest.mark.parametrize("dtype, way", [("float32", KERNELS), ("float64", "reference")])
def test_a_run_says_which_backend_computes_its_loss(dtype, way, capsys):
    directory = pretrain("--optim.epochs=1", f"--run.dtype={dtype}")
    assert f"2 steps an epoch; cpu; loss backend: {way}\n" in capsys.readouterr().out
    assert ways(directory) == [(0, way)] and content(directory)["config"]["loss"]["backend"] == "auto"


def test_a_resumed_run_says_that_its_backend_is_another(capsys):
    """Once, and only after a change; the option of the run is not one that another machine could not take."""
    first = pretrain("--optim.epochs=3", "--run.stop-after=1", "--loss.backend=reference", "--run.save-every=1")
    assert "the loss is computed by" not in capsys.readouterr().err
    train.pretrain(cli.parse([f"--run.resume={first}", "--run.stop-after=2"]))
    assert "the loss is computed by" not in capsys.readouterr().err and ways(first) == [(0, "reference")]
    if KERNELS == "reference":
        pytest.skip("no C++ kernels here")
    train.pretrain(cli.parse([f"--run.resume={first}", "--loss.backend=auto", "--run.log-every=1"]))
    said = capsys.readouterr()
    note = "note: the loss is computed by cpu slab from step 4 on, by reference until then; their results differ by rou"
    assert said.err.count(note) == said.err.count("the loss is computed by") == 1
    assert said.out.startswith(f"{first}: ") and "loss backend: cpu slab\n" in said.out
    assert ways(first) == [(0, "reference"), (4, "cpu slab")]


def test_a_schedule_may_change_the_backend(monkeypatch, capsys):
    """Found at the first step after a log line, here at each step."""
    monkeypatch.setattr("driver.loss.BAMLoss", WayByEpsilon)
    options = ["--optim.epochs=3", "--loss.epsilon=0.01", "--loss.epsilon-end=0.0005"]
    directory = pretrain(*options, "--run.log-every=1")
    epsilons = [optim.cosine(step / 6, 0.01, 0.0005) for step in range(6)]
    assert [epsilon < 0.003 for epsilon in epsilons] == [False, False, False, False, True, True]
    assert ways(directory) == [(0, "triton flash"), (4, "cuda slab")]
    said = capsys.readouterr()
    assert (
        "loss backend: triton flash\n" in said.out and said.err.count("computed by cuda slab from step 4 on, by") == 1
    )
    assert ways(pretrain(*options, "--run.log-every=5")) == [(0, "triton flash"), (5, "cuda slab")]


def test_a_run_that_does_not_know_its_backend(capsys):
    """A checkpoint of an older version resumes without a note, and knows it from then on."""
    directory = pretrain("--optim.epochs=2", "--run.stop-after=1")
    saved = content(directory)
    del saved["backend"]
    saved["history"] = [row for row in saved["history"] if row["kind"] != "backend"]
    with replacing(directory / checkpoint.FILE) as temporary:
        torch.save(saved, temporary)
    capsys.readouterr()
    train.pretrain(cli.parse([f"--run.resume={directory}"]))
    assert "computed by" not in capsys.readouterr().err and ways(directory) == [(2, KERNELS)]


def test_the_report_names_backends_once_each():
    record = history.History()
    assert summary.computed_by(record) == ""
    for step, way in enumerate(("cuda slab", "triton flash", "cuda slab")):
        record.add("backend", step, 0.0, way=way)
    assert summary.computed_by(record) == "cuda slab, triton flash"
    assert json.loads(history._line(record.rows[0])) == {"kind": "backend", "step": 0, "epoch": 0.0, "way": "cuda slab"}


def test_broken_runs_by_another_backend_are_not_equal(monkeypatch, capsys):
    """The two runs differ in nothing else."""
    plain = dict.fromkeys(verify_resume.PARTS, torch.zeros(1)) | {"step": 8}
    monkeypatch.setattr(verify_resume, "run", lambda *_: True)
    monkeypatch.setattr(verify_resume, "content", lambda folder: plain | {"backend": folder.name})
    assert verify_resume.verify(verify_resume.Verify()) == 1
    assert capsys.readouterr().out.startswith("NOT EQUAL: backend differ after SIGKILL at steps ")


# The embeddings by which the start of a run names the backend


@pytest.mark.parametrize(
    "options",
    [
        ["--data.batch-size=256", "--virtual-batch=1024"],  # micro-batches together
        ["--model.teacher-momentum=0.9", "--data.views=3"],  # a teacher that sees two of three views
        ["--model.teacher-momentum=0.9", "--data.views=3", "--model.teacher-views=all", "--model.head-dim=24"],
        [*CROPS, "--model.teacher-momentum=0.9"],
        [*CROPS, "--model.teacher-momentum=0.9", "--model.teacher-views=all"],
        ["--run.dtype=bfloat16"],
        ["--run.dtype=bfloat16", "--model.norm=layer", "--model.head-layers=1"],
        ["--run.dtype=bfloat16", "--model.norm=none"],
        ["--run.dtype=float64", "--model.norm=none"],
    ],
)
def test_embeddings_of_a_step_are_as_in_a_run(options, monkeypatch):
    """Shapes, dtypes and gradients, for student and teacher."""
    if "--data.root=pets" in options:
        pytest.importorskip("torchvision")
        write_classes(Path("pets"), 4)
    seen = []
    monkeypatch.setattr(BAMLoss, "way", lambda self, *embeddings, step: seen.append(described(embeddings)) or "way")
    made = train.Training(cli.parse([*TINY, *options]), CPU, World())
    made.step(next(made.images.views(0)))
    made.log.close()
    assert len(seen) == 2 and seen[0] == seen[1]  # of the start, and of the step
    assert seen[0][0][0][1] == made.G


def described(embeddings) -> list[tuple]:
    return [(x.shape, x.dtype, x.device, x.requires_grad) for x in embeddings]


def test_embeddings_of_a_step_take_no_memory_and_leave_the_head_as_it_is():
    options = cli.parse([*TINY, "--model.teacher-momentum=0.9"])
    network, _ = train.make_networks(options, 1, CPU, torch.float32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    embeddings = loss.step_embeddings(options, network, True, optim.Arithmetic.of("float32", CPU), 1 << 20)
    assert [x.shape for x in embeddings] == [(2, 1 << 20, 8)] * 2
    assert all(x.untyped_storage().nbytes() <= 4 * 8 for x in embeddings)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


# Kernels that are tried at the start


@pytest.fixture
def in_sight(gpu, monkeypatch):  # noqa: F811
    """A stand-in GPU on which this process has a CUDA context."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return gpu


def loss_of(world: World, chosen: Config | None = None) -> BAMLoss:
    chosen = chosen or cli.parse([])
    return loss.make_loss(chosen.loss, optim.Schedules(chosen, 2, 512), CPU, torch.float32, world)


def test_kernels_are_tried_before_the_loss_and_said_on_standard_error(in_sight, capsys):
    loss_of(World())
    said = capsys.readouterr()
    assert said.out == "" and sorted(in_sight.tried()) == sorted(stand_in_gpu.trust.GPU_WAYS)
    assert said.err.count("bam_kernels: trying the kernels (") == said.err.count("verified; ") // 2 == 1
    loss_of(World())
    assert capsys.readouterr().err == "" and len(in_sight.tried()) == len(stand_in_gpu.trust.GPU_WAYS)


def test_a_wrong_value_of_the_variable_is_one_clear_line(in_sight, monkeypatch, capsys):
    monkeypatch.setenv("BAM_KERNELS_VERIFY", "perhaps")
    monkeypatch.setattr(exits.World, "from_environment", World)
    assert exits.exit_code(lambda world: loss_of(world) and 0) == 1
    said = capsys.readouterr().err.strip()
    assert said == "error: --loss: BAM_KERNELS_VERIFY must be auto, off or force, got 'perhaps'"
    assert in_sight.tried() == []


# Ranks


def test_ranks_wait_for_one_that_tries_kernels(monkeypatch):
    """The loss is not called on any rank before all have made their decision."""
    store, order = dist.HashStore(), []
    chosen = cli.parse([])  # not in the threads: tyro's cache is for one

    def decide() -> None:
        time.sleep(0.3 if threading.current_thread().name == "1" else 0)
        order.append("decided")

    monkeypatch.setattr(bam_kernels.loss, "decide_early", decide)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(BAMLoss, "forward", lambda *_, step: order.append("called"))
    ranks = [
        threading.Thread(target=loss_of, args=(World(rank, 3, rank, store), chosen), name=str(rank), daemon=True)
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(10)
    assert order == ["decided"] * 3 + ["called"] * 6


def test_a_rank_that_waits_in_vain_says_for_whom():
    store = dist.HashStore()
    store.set("loss 2", "")
    with pytest.raises(UserError, match=r"^loss: after 0 s some ranks are not ready: 0, 3, 4 and 1 more$"):
        World(1, 6, 1, store).meet("loss", 0.2)
    store.add("failures", 1)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^loss: another rank has failed$"):
        World(2, 6, 2, store).meet("loss", 10)
    assert time.monotonic() - began < 5


def test_a_rank_whose_store_is_gone_ends():
    server = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=10), wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, 2, False, timedelta(seconds=10))
    waiting = threading.Timer(0.3, lambda: held.clear())
    held = [server]
    del server
    waiting.start()
    with pytest.raises(UserError, match=r"^loss: rank 0 has ended or been stopped$"):
        World(1, 2, 1, client).meet("loss", 10)


@pytest.mark.parametrize("rank, times", [(0, 1), (1, 0)])
def test_rank_0_alone_warns_of_the_reference(rank, times, monkeypatch):
    monkeypatch.setattr(exits.World, "from_environment", lambda: World(rank, 2, rank, dist.HashStore()))
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    def run(_: World) -> int:
        warnings.warn("bam_kernels: computing with the slow PyTorch reference: no kernels", stacklevel=2)
        warnings.warn("of torch", stacklevel=2)
        return 0

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert exits.exit_code(run) == 0
    said = [str(warning.message)[:12] for warning in seen if warning.category is UserWarning]
    assert said.count("bam_kernels:") == times and said.count("of torch") == 1
