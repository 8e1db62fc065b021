"""The decision about a GPU: what is tried when, what is said, and that processes and threads try once."""

import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stand_in_gpu import CRASHES, HANGS, NO_MEMORY, PASSES, WRONG, WRONG_REASON, StandInGpu
from torch._subclasses.fake_tensor import FakeTensorMode

from bam_kernels import BAMLoss, backends
from bam_kernels import __main__ as doctor
from bam_kernels.options import Options
from bam_kernels.verification import problems, store, trial, trust, verified
from bam_kernels.verification.identity import identity
from bam_kernels.verification.store import Verdict

DEVICE = torch.device("cuda", 0)
ALL = ("cuda", "triton", "flash")


def again(monkeypatch) -> trust.Trust:
    """The decision of another process."""
    monkeypatch.setattr(trust, "_trust", {})
    return trust.of_device(DEVICE)


def test_all_verified(gpu, monkeypatch, capsys):
    assert trust.of_device(DEVICE).ways == trust.ways("bam_loss", DEVICE, "auto", (1, 0, ""))[0] == ALL
    before, after = capsys.readouterr().err.splitlines()
    assert before == (
        "bam_kernels: trying the kernels (cuda, triton, flash) on Stand-in H100, once for this GPU and these versions; "
        "it takes minutes if Triton compiles. BAM_KERNELS_VERIFY=off skips this"
    )
    (file,) = gpu.kept()
    assert after.startswith("bam_kernels: cuda verified; triton verified; flash verified (")
    assert after.endswith(f" s, kept in {file})")
    assert again(monkeypatch).ways == ALL and capsys.readouterr().err == ""
    assert gpu.tried() == list(ALL)


def test_failed_is_kept_with_its_output_and_not_tried_again(gpu, monkeypatch, capsys):
    monkeypatch.setitem(trial.LIMITS_S, "running", 0.3)
    gpu.children = {"cuda": CRASHES, "triton": WRONG, "flash": HANGS}
    assert trust.of_device(DEVICE).ways == ()
    said = (
        'cuda failed: crashed with SIGSEGV in problem "teacher"; '
        f"triton failed: {WRONG_REASON}; "
        'flash failed: did not end within 0 s, in problem "teacher"'
    )
    assert said in capsys.readouterr().err
    assert trust.reason(trust.of_device(DEVICE), "auto") == (
        f"no kernels are verified on this GPU ({said}); `python -m bam_kernels.verify` tries them"
    )
    gpu.children = dict.fromkeys(ALL, PASSES)
    assert again(monkeypatch).ways == () and len(gpu.tried()) == 3
    assert trust._trust[0].known["cuda"].output.startswith("before it")


def test_unknown_is_not_kept_and_tried_again_by_another_process_alone(gpu, monkeypatch, capsys):
    gpu.children = dict.fromkeys(ALL, NO_MEMORY)
    assert trust.of_device(DEVICE).ways == trust.of_device(DEVICE).ways == ()
    assert len(gpu.tried()) == 3 and gpu.kept() == []
    assert re.search(
        r"flash unknown: OutOfMemoryError: CUDA out of memory \(\d+ s, not kept\)$", capsys.readouterr().err
    )
    gpu.children = dict.fromkeys(ALL, PASSES)
    assert again(monkeypatch).ways == ALL and len(gpu.tried()) == 6


def test_a_new_way_is_tried_alone(gpu, monkeypatch):
    built = False
    monkeypatch.setattr(backends.cuda, "unavailable", lambda device: None if built else "the extension is not built")
    assert trust.of_device(DEVICE).ways == ("triton", "flash")
    assert trust._trust[0].known["cuda"] == Verdict("unknown", "the extension is not built")
    built = True
    assert again(monkeypatch).ways == ALL
    assert gpu.tried() == ["triton", "flash", "cuda"]


def test_another_gpu_is_tried_for_itself(gpu, monkeypatch):
    trust.of_device(DEVICE)
    gpu.properties.multi_processor_count = 66  # a slice of it
    gpu.children["cuda"] = WRONG
    assert again(monkeypatch).ways == ("triton", "flash")
    assert len(gpu.tried()) == 6 and len(gpu.kept()) == 2


def test_nothing_can_be_kept(gpu, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert trust.of_device(DEVICE).ways == trust.of_device(DEVICE).ways == ALL
    assert gpu.tried() == list(ALL) and "not kept" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["off", "auto", "force", ""])
def test_modes(gpu, monkeypatch, mode, capsys):
    monkeypatch.setenv(trust.MODE, mode)
    assert trust.of_device(DEVICE).ways == (() if mode == "off" else ALL)
    assert len(gpu.tried()) == (0 if mode == "off" else 3)
    assert (
        trust.reason(trust.of_device(DEVICE), "auto").startswith("no kernels are verified on this GPU; `python")
        or mode != "off"
    )
    store.save(identity(0), dict.fromkeys(ALL, Verdict("verified")))
    gpu.children["flash"] = WRONG
    assert again(monkeypatch).ways == (ALL[:2] if mode == "force" else ALL)
    assert len(gpu.tried()) == {"off": 0, "force": 6}.get(mode, 3)
    monkeypatch.setenv(trust.MODE, "auto")
    assert again(monkeypatch).ways == (ALL[:2] if mode == "force" else ALL)


def test_wrong_mode(gpu, monkeypatch):
    monkeypatch.setenv(trust.MODE, "no")
    with pytest.raises(ValueError, match=r"^BAM_KERNELS_VERIFY must be auto, off or force, got 'no'$"):
        trust.of_device(DEVICE)
    assert gpu.tried() == []
    assert doctor._auto_lines(0) == "backend=\"auto\" on GPU 0: BAM_KERNELS_VERIFY must be auto, off or force, got 'no'"


def test_force_without_memory_keeps_what_is_kept(gpu, monkeypatch):
    trust.of_device(DEVICE)
    gpu.children["cuda"] = NO_MEMORY
    monkeypatch.setenv(trust.MODE, "force")
    assert again(monkeypatch).ways == ("triton", "flash")
    monkeypatch.setenv(trust.MODE, "auto")
    assert again(monkeypatch).ways == ALL


def test_the_project_counts_unless_this_machine_has_failed(gpu, monkeypatch):
    monkeypatch.setattr(verified, "ways", lambda here: ("cuda", "triton"))
    store.save(identity(0), {"triton": Verdict("failed", "wrong"), "flash": Verdict("verified")})
    decided = trust.of_device(DEVICE)
    assert decided.ways == ("cuda", "flash") and gpu.tried() == []
    assert decided.known["cuda"].reason == "by this project"


def test_another_operating_system(gpu, monkeypatch):
    monkeypatch.setattr(trust, "os", SimpleNamespace(name="nt"))
    why = "kernels are not tried on this operating system; those of a backend that is named run untried"
    assert trust.ways("bam_loss", DEVICE, "auto", (1, 0, "")) == ((), why) and gpu.tried() == []


@pytest.mark.parametrize("name", ["identity", "store", "trial", "trust", "verified"])
def test_import_on_another_operating_system(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    for signal_name in ("SIGBUS", "SIGTRAP", "SIGSYS", "SIGKILL"):
        monkeypatch.delattr(signal, signal_name)
    for attribute in ("getuid", "waitid", "killpg", "O_NONBLOCK"):
        monkeypatch.delattr(os, attribute)
    file = Path(trust.__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"bam_kernels.verification.{name}_elsewhere", file)
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[spec.name])


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trust.of_device(DEVICE) == trust.Trust((), settled=False)
    assert trust.reason(trust.of_device(DEVICE), "auto") == "torch sees no GPU"


def faked(patch) -> None:
    with FakeTensorMode():
        backends.choose("bam_loss", Options(), DEVICE, torch.float32)


def of_worker(patch) -> None:
    patch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
    backends.choose("bam_loss", Options(), DEVICE, torch.float32)


def captured(patch) -> None:
    patch.setattr(torch.cuda, "is_initialized", lambda: True)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backends.choose("bam_loss", Options(), DEVICE, torch.float32)


@pytest.mark.parametrize("moment", [faked, of_worker, captured])
@pytest.mark.parametrize("mode", ["auto", "force"])
def test_moments_at_which_nothing_is_tried(gpu, monkeypatch, moment, mode):
    monkeypatch.setenv(trust.MODE, mode)
    backends._warn_once.cache_clear()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="reference") as caught:
        patch.setattr(trust, "_deciding", None)  # nor may it wait for a thread that tries
        moment(patch)
    assert gpu.tried() == [] and trust._trust == {}
    (warning,) = (str(one.message) for one in caught if "reference" in str(one.message))
    assert warning.endswith(
        "no kernels are verified on this GPU, and they are not tried while a graph is captured or compiled, or in "
        "a data worker; run `python -m bam_kernels.verify` first"
    )
    assert trust.of_device(DEVICE).ways == ALL and gpu.tried() == list(ALL)


def test_a_kept_verdict_counts_at_any_moment(gpu, monkeypatch):
    trust.of_device(DEVICE)
    captured(monkeypatch)
    assert again(monkeypatch).ways == ALL and trust._trust[0].settled


@pytest.mark.parametrize(
    ("initialized", "context_on"), [(False, None), (True, 0), (True, 3)], ids=["no CUDA", "this GPU", "another GPU"]
)
def test_construction_of_the_loss(gpu, monkeypatch, initialized, context_on):
    """A rank that has a model on GPU 3, and has not selected it, leaves GPU 0 alone."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index == context_on, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for backend in ("reference", "triton"):
        BAMLoss(backend=backend)
    assert gpu.tried() == []
    BAMLoss()
    assert gpu.tried() == (list(ALL) if context_on == 0 else [])


def test_one_warning_that_says_what_to_type(gpu):
    gpu.children = dict.fromkeys(ALL, WRONG)
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            assert backends.choose("bam_loss", Options(), DEVICE, torch.float32) == "reference"
    (warning,) = (str(one.message) for one in caught)
    assert warning.startswith("bam_kernels: computing with the slow PyTorch reference: no kernels are verified on this")
    assert warning.endswith("`python -m bam_kernels.verify` tries them") and WRONG_REASON in warning


def test_an_engine_that_is_not_verified(gpu):
    gpu.children["flash"] = WRONG
    assert trust.of_device(DEVICE).ways == ("cuda", "triton")
    assert trust.reason(trust.of_device(DEVICE), "flash") == (
        f'no kernels of engine="flash" are verified on this GPU (flash failed: {WRONG_REASON}); '
        "`python -m bam_kernels.verify` tries them"
    )


def test_standard_error_that_is_closed(gpu, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        assert trust.of_device(DEVICE).ways == ALL
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=len), object()], ids=["none", "no flush", "no write"])
def test_standard_error_that_is_no_file(gpu, monkeypatch, capsys, stream):
    """As in a program without a console, or one that collects its output by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert trust.of_device(DEVICE).ways == ALL
    assert capsys.readouterr() == ("", "")


def test_threads_try_once(gpu):
    found = []
    threads = [threading.Thread(target=lambda: found.append(trust.of_device(DEVICE))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpu.tried() == list(ALL) and found == [found[0]] * 8 and found[0].ways == ALL


def test_interrupt(gpu, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    gpu.children = dict.fromkeys(ALL, HANGS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Lock, "touch", lambda lock: interrupted())
        trust.of_device(DEVICE)
    assert gpu.kept() == [] and trust._trust == {}
    gpu.children = dict.fromkeys(ALL, PASSES)
    assert trust.of_device(DEVICE).ways == ALL


def wait_until(true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("end", [PASSES, WRONG, NO_MEMORY], ids=["verified", "failed", "unknown"])
@pytest.mark.parametrize(("afresh", "local_rank"), [(False, "0"), (True, "3")])
def test_who_waits_takes_what_was_found(gpu, monkeypatch, tmp_path, end, afresh, local_rank):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    gpu.children = {"triton": f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n{end}"}
    here, said, found = identity(0), [[], []], [{}, {}]

    def decide(rank: int) -> None:
        found[rank] = trust.try_together(["triton"], 0, here, said[rank].append, afresh=afresh)

    waits, wait = threading.Event(), store.Lock.wait
    monkeypatch.setattr(store.Lock, "wait", lambda lock, seconds: waits.set() or wait(lock, seconds))
    store.save(here, {"cuda": Verdict("verified")})
    threads = [threading.Thread(target=decide, args=[rank]) for rank in range(2)]
    threads[0].start()
    wait_until(gpu.tried)
    threads[1].start()
    assert waits.wait(20)
    (tmp_path / "go").touch()
    for thread in threads:
        thread.join()
    assert gpu.tried() == ["triton"] and found[0] == found[1] and len(said[0]) == 2
    waiting = "another process tries the kernels on Stand-in H100; waiting for its verdict"
    assert said[1] == ([waiting] if local_rank == "0" else [])


@pytest.mark.parametrize("afresh", [False, True])
def test_a_holder_that_hangs(gpu, monkeypatch, afresh):
    monkeypatch.setattr(trust, "WAIT_S", 0.3)
    here = identity(0)
    store.save(here, {"cuda": Verdict("verified")})
    with store.Lock(here) as holder:
        holder.acquire()
        found = trust.try_together(["cuda", "triton"], 0, here, lambda text: None, afresh=afresh)
    late = Verdict("unknown", "another process has tried the kernels for more than 0 s")
    assert found == {"cuda": late if afresh else Verdict("verified"), "triton": late}
    assert gpu.tried() == [] and trust.WAIT_S >= 0.3


def test_waiting_lasts_longer_than_any_trial_without_compilation():
    assert store.TOUCH_S + trial.LIMITS_S["running"] + trial.KILLED_S < trust.WAIT_S <= 60


PROCESS = """
import sys
from pathlib import Path
import pytest, torch
from stand_in_gpu import StandInGpu
from bam_kernels.verification import trust
patch = pytest.MonkeyPatch()
gpu = StandInGpu(patch, Path(sys.argv[1]))
gpu.children = dict.fromkeys(gpu.children, sys.argv[2])
input()  # until it may begin
print(trust.of_device(torch.device("cuda", 0)).ways, flush=True)
"""


def start(gpu: StandInGpu, child: str) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", PROCESS, str(gpu.folder), child]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def test_a_process_that_waits_takes_over_from_one_that_is_killed(gpu, monkeypatch):
    """The killed process leaves no child, no lock and no verdict; the other keeps what it has found."""
    ends = inspect.getsource(problems.end_with_parent)
    note = f"open({str(gpu.folder / 'child')!r} + way, 'w').write(str(os.getpid()))"
    killed, other = start(gpu, f"{ends}\nend_with_parent()\n{note}\n{HANGS}"), start(gpu, PASSES)
    try:
        print(file=killed.stdin, flush=True)
        wait_until(lambda: len([file for file in gpu.folder.glob("child*") if file.read_text()]) == 3)
        print(file=other.stdin, flush=True)
        assert "another process tries the kernels on Stand-in H100; waiting" in other.stderr.readline()
        assert gpu.kept() == []
        killed.kill()
        assert other.stdout.readline() == f"{ALL}\n"
    finally:
        for process in (killed, other):
            process.kill()
            process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{file.read_text()}").exists() for file in gpu.folder.glob("child*")))
    assert again(monkeypatch).ways == ALL and len(gpu.tried()) == 6
