"""`python -m bam_kernels.verify` and the doctor: what they print, keep and return, on a GPU that is not there."""

import json
import re

import pytest
import torch
from pages import blocks, text
from stand_in_gpu import CRASHES, NO_MEMORY, PASSES, WRONG, WRONG_LINES, WRONG_REASON

from bam_kernels import __main__ as doctor
from bam_kernels import verify
from bam_kernels.backends import cuda
from bam_kernels.verification import problems, store, trial, trust, verified
from bam_kernels.verification.identity import identity
from bam_kernels.verification.store import Verdict

LACKS = "Triton is not installed (No module named 'triton'); pip install triton"
CANNOT = f"report(identity=here); report(status='unknown', reason={f'cannot run here: {LACKS}'!r})"
NO_START = "raise SystemExit('no such file')"
SLOW = """
begin('compiling', 'teacher (_pass)'); time.sleep(0.6)
begin('running', 'one launch'); time.sleep(0.6)
report(status='verified')
"""


def lines(capsys) -> list[str]:
    """Lines for the ways, which come last."""
    return capsys.readouterr().out.split("\n\n")[-1].splitlines()


def test_all_ways_are_verified(gpu, capsys, tmp_path):
    assert verify.main(["--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("trying the kernels (cuda, triton, flash) on Stand-in H100; it takes minutes if Triton")
    assert f"kept in {gpu.kept()[0]})\n" in out and "BAM_KERNELS_VERIFY" not in out
    assert out.endswith("\n\ncuda    verified\ntriton  verified\nflash   verified\n")
    found = json.loads((tmp_path / "found.json").read_text())
    here = identity(0)
    assert found["identity"] == here and set(store.load(here)) == set(gpu.tried()) == {"cuda", "triton", "flash"}
    assert {way: verdict["status"] for way, verdict in found["verdicts"].items()} == dict.fromkeys(
        gpu.tried(), "verified"
    )


@pytest.mark.parametrize(
    "child, line, kept",
    [
        (WRONG, f"failed: {WRONG_REASON}", True),
        (CRASHES, 'failed: crashed with SIGSEGV in problem "teacher"', True),
        (NO_MEMORY, "unknown: OutOfMemoryError: CUDA out of memory", False),
        (NO_START, "unknown: ended with status 1 and no result while starting: no", False),
    ],
    ids=["wrong", "crash", "no memory", "no start"],
)
def test_a_way_that_is_not_verified_has_its_reason(gpu, capsys, child, line, kept):
    gpu.children |= {"triton": child, "cuda": f"print('right', flush=True); {PASSES}"}
    assert verify.main([]) == 1
    out = capsys.readouterr().out
    ended = out.split("\n\n")[-1].splitlines()
    assert ended[0] == "cuda    verified" and ended[1].startswith(f"triton  {line}") and ended[2] == "flash   verified"
    assert ("triton" in store.load(identity(0))) == kept
    printed = {WRONG: WRONG_LINES.replace("\n", "\n    "), CRASHES: "before it", NO_START: "no such file"}.get(child)
    assert (f"\nlast lines of triton:\n    {printed}\n" in out) if printed else ("last lines" not in out)
    assert "last lines of cuda" not in out  # although it has printed some


def test_the_file_has_what_a_verified_way_has_printed(gpu, tmp_path):
    gpu.children["cuda"] = f"print('teacher: right', flush=True); {PASSES}"
    assert verify.main(["--ways", "cuda", "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["verdicts"]["cuda"]["output"] == "teacher: right"


def test_a_way_that_cannot_run_is_no_failure_unless_it_is_the_only_one(gpu, capsys):
    gpu.children |= {"triton": CANNOT, "flash": CANNOT}
    assert verify.main([]) == 0
    assert lines(capsys) == [
        "cuda    verified",
        f"triton  unknown: cannot run here: {LACKS}",
        f"flash   unknown: cannot run here: {LACKS}",
    ]
    assert verify.main(["--ways", "triton", "triton"]) == 2
    assert lines(capsys) == [f"triton  unknown: cannot run here: {LACKS}"]
    assert gpu.tried().count("triton") == 2 and set(store.load(identity(0))) == {"cuda"}


@pytest.mark.parametrize(
    "count, options, error",
    [
        (0, [], "torch sees no GPU"),
        (1, ["--device", "1"], "--device 1: torch sees 1 GPU, numbered from 0"),
        (2, ["--device", "-1"], "--device -1: torch sees 2 GPUs, numbered from 0"),
        (1, ["--json", "missing/found.json"], "--json missing/found.json: No such file or directory"),
        (1, ["--json", "."], "--json .: Is a directory"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_tried(gpu, capsys, monkeypatch, count, options, error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(SystemExit) as ended:
        verify.main(options)
    assert ended.value.code == 2 and gpu.tried() == []
    assert capsys.readouterr().err.endswith(f"python -m bam_kernels.verify: error: {error}\n")


def test_kept_verdicts_are_tried_again_and_give_way_to_new_ones_alone(gpu, capsys):
    """A way without a result this time keeps its verdict: a hang is not tried again by itself."""
    here = identity(0)
    hung = Verdict("failed", "did not end within 60 s in teacher", 70.0, "2026-11-26")
    store.save(here, {"cuda": hung, "triton": hung})
    gpu.children["triton"] = NO_MEMORY
    assert verify.main(["--ways", "cuda", "triton"]) == 1
    assert lines(capsys) == ["cuda    verified", "triton  unknown: OutOfMemoryError: CUDA out of memory"]
    kept = store.load(here)
    assert kept["cuda"].status == "verified" and kept["triton"] == hung
    gpu.children["cuda"] = NO_MEMORY
    assert verify.main(["--ways", "cuda"]) == 1
    assert "s, not kept)\n" in capsys.readouterr().out and store.load(here) == kept


class Doing:
    """Stands for a trial that does `text`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def doing(self) -> str:
        return self.text


def test_what_the_trials_do_is_printed_when_it_has_changed_and_not_too_often(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(verify.time, "monotonic", lambda: now[0])
    progress, trials = verify.Progress(), {"cuda": Doing("starting"), "triton": Doing("starting")}
    for seconds, does in [(5, "starting"), (10.5, "running teacher"), (15, "ended"), (30, "ended"), (50, "ended")]:
        now[0], trials["cuda"].text = 100.0 + seconds, does
        progress(trials)
    said = capsys.readouterr().out
    assert said == "    10 s: cuda running teacher; triton starting\n    30 s: cuda ended; triton starting\n"


def test_a_trial_says_what_it_does(gpu, capsys, monkeypatch):
    monkeypatch.setattr(verify, "PROGRESS_S", 0.0)
    gpu.children["triton"] = SLOW
    assert verify.main(["--ways", "cuda", "triton"]) == 0
    said = [line.partition(" s: ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert said[-2:] == ["cuda ended; triton compiling teacher (_pass)", "cuda ended; triton running one launch"]


def test_the_process_itself_finds_that_a_way_cannot_run(gpu, monkeypatch):
    """Not the command, whose own context would leave a GPU for one process no room for the trial."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(cuda, "unavailable", lambda device: "the extension was built without CUDA")
    found = problems.try_way("cuda", torch.device("cuda", 0), toy=True)
    assert found == {"status": "unknown", "reason": "cannot run here: the extension was built without CUDA"}
    monkeypatch.undo()
    assert verify.exit_status({"cuda": Verdict(**found)}) == 2


# The doctor

NOT_TRIED = "what is found right when a program first uses it, by trying the kernels in other processes"


def auto(index: int = 0) -> dict[str, str]:
    """The doctor's lines about a GPU, by their first word; the heading as "head"."""
    head, *rest = doctor._auto_lines(index).splitlines()
    return {"head": head} | {line[:12].rstrip(): line[12:] for line in rest}


def test_the_doctor_shows_what_is_known_and_tries_nothing(gpu, monkeypatch):
    said = auto()
    assert said["head"] == 'backend="auto" on GPU 0, Stand-in H100; BAM_KERNELS_VERIFY=auto'
    assert said["cuda"] == "not tried: python -m bam_kernels.verify" and said["it uses"] == NOT_TRIED
    assert auto(1)["flash"] == "not tried: python -m bam_kernels.verify --device 1"
    monkeypatch.setenv(trust.MODE, "off")
    assert auto()["it uses"] == "the slow PyTorch reference" and auto()["head"].endswith("=off")
    hung = Verdict("failed", "did not end within 60 s in teacher", 70.0, "2026-11-26")
    store.save(identity(0), {"cuda": Verdict("verified", "", 9.0, "2026-11-27"), "triton": hung})
    monkeypatch.setattr(verified, "ways", lambda here: ("flash",))
    said = auto()
    assert said["cuda"] == "verified (2026-11-27, on this machine)"
    assert said["triton"] == "failed: did not end within 60 s in teacher (2026-11-26, on this machine)"
    assert said["flash"] == "verified: by this project"
    assert said["it uses"] == "cuda or flash, by shape"
    monkeypatch.setenv(trust.MODE, "force")
    assert auto()["it uses"] == NOT_TRIED
    assert gpu.tried() == []


def test_the_doctor_says_why_a_way_cannot_run(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda device: "the extension was built without CUDA")
    store.save(identity(0), {way: Verdict("failed", "wrong", 1.0, "2026-11-27") for way in ("triton", "flash")})
    said = auto()
    assert said["cuda"] == "cannot run here: the extension was built without CUDA"
    assert said["it uses"] == "the slow PyTorch reference"


@pytest.fixture
def backends_agree(monkeypatch):
    monkeypatch.setattr(doctor, "_report", lambda *of_backend: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 0)


def test_the_doctor_tries_all_gpus_where_it_is_asked_to(gpu, backends_agree, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert doctor.main() == 0 and gpu.tried() == []
    assert doctor.main(["--verify"]) == 0 and len(gpu.tried()) == 6
    out = capsys.readouterr().out
    assert out.count("it uses     cuda or triton or flash, by shape") == 2
    gpu.children["flash"] = WRONG
    assert doctor.main(["--verify"]) == 1
    assert doctor.main() == 0  # what was found before is shown, and is no fault of a backend


def test_the_doctor_needs_no_gpu(backends_agree, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "auto" not in out and "nothing to try" not in out
    assert doctor.main(["--verify"]) == 0
    assert capsys.readouterr().out.startswith("nothing to try: torch sees no GPU\n")


# The examples of docs/gpu.md

EXAMPLES = blocks(text("docs/gpu.md"), "text")


def plain(printed: str) -> list[str]:
    """Lines without what differs from run to run: durations, and where verdicts are kept."""
    return re.sub(r"kept in \S+\)", "kept)", re.sub(r"\d+ s([,:])", r"N s\1", printed)).splitlines()


@pytest.fixture
def example(gpu):
    gpu.properties.name = "Example GPU"
    gpu.children["triton"] = WRONG
    return gpu


def test_the_lines_of_a_program_are_those_of_the_page(example, capsys):
    assert trust.of_device(torch.device("cuda", 0)).ways == ("cuda", "flash")
    assert plain(capsys.readouterr().err) == plain(EXAMPLES[0])


def test_the_lines_of_the_command_are_those_of_the_page(example, capsys, monkeypatch):
    assert verify.main([]) == 1
    ended = "cuda ended; triton running one launch; flash ended"
    monkeypatch.setattr(verify, "PROGRESS_S", 0.0)
    printed = capsys.readouterr().out.splitlines(keepends=True)
    verify.Progress()({way: Doing(does) for way, does in (word.split(" ", 1) for word in ended.split("; "))})
    printed.insert(1, capsys.readouterr().out)
    assert ["$ python -m bam_kernels.verify", *plain("".join(printed))] == plain(EXAMPLES[1])


def test_the_lines_of_the_doctor_are_those_of_the_page(example):
    date = "2026-11-27 12:00:00"
    wrong = Verdict("failed", WRONG_REASON, 90.0, date)
    right = {way: Verdict("verified", "", 5.0, date) for way in ("cuda", "flash")}
    store.save(identity(0), {"triton": wrong, **right})
    assert ["$ python -m bam_kernels", *doctor._auto_lines(0).splitlines()] == EXAMPLES[2].splitlines()


def test_the_limits_are_those_of_the_page():
    minutes = {stage: round(seconds / 60) for stage, seconds in trial.LIMITS_S.items()}
    page = " ".join(text("docs/gpu.md").split())
    assert f"Time to start ({minutes['starting']} minutes) and to compile ({minutes['compiling']} minutes)" in page
    most_s = trial.LIMITS_S["running"] + trial.KILLED_S + store.TOUCH_S
    assert "Running takes at most a minute" in page and 55 <= most_s <= trust.WAIT_S == 60
    assert all(f"| `{mode}` |" in page for mode in trust.MODES) and trust.MODE in page
