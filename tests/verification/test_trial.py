"""What the end of a process that tries the kernels means, and that nothing of it is left behind."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from stand_in_gpu import CRASHES, HANGS, NO_MEMORY, PASSES, WRONG, WRONG_REASON

from bam_kernels.verification import store, trial
from bam_kernels.verification.identity import identity

WAY = "triton"
# The program, the status, and the whole reason.
ENDS = {
    "passes": (PASSES, "verified", ""),
    "wrong": (WRONG, "failed", WRONG_REASON),
    "segmentation fault": (CRASHES, "failed", 'crashed with SIGSEGV in problem "teacher"'),
    "abort": ("begin(); os.abort()", "failed", 'crashed with SIGABRT in problem "teacher"'),
    "crash of the compiler": (
        "begin('compiling', 'one launch (match)'); os.kill(os.getpid(), signal.SIGFPE)",
        "failed",
        'crashed with SIGFPE in problem "one launch (match)"',
    ),
    "result, then crash": (PASSES + "; os.abort()", "failed", 'crashed with SIGABRT in problem "teacher"'),
    "result, then error": (
        PASSES + "; sys.exit(7)",
        "unknown",
        'ended with status 7 and no result in problem "teacher"',
    ),
    "crash while starting": ("os.abort()", "unknown", "was ended by SIGABRT while starting"),
    "crash before the first problem": (
        "report(identity=here); os.abort()",
        "unknown",
        "was ended by SIGABRT while starting",
    ),
    "error while starting": (
        "print('no such module'); sys.exit(1)",
        "unknown",
        "ended with status 1 and no result while starting: no such module",
    ),
    "nothing printed": ("", "unknown", "ended with status 0 and no result while starting"),
    "killed": ("begin(); os.kill(os.getpid(), 9)", "unknown", 'was ended by SIGKILL in problem "teacher"'),
    "terminated": ("begin(); os.kill(os.getpid(), 15)", "unknown", 'was ended by SIGTERM in problem "teacher"'),
    "signal without a name": (
        "begin(); os.kill(os.getpid(), 40)",
        "unknown",
        'was ended by signal 40 in problem "teacher"',
    ),
    "no memory": (NO_MEMORY, "unknown", "OutOfMemoryError: CUDA out of memory"),
    "no identity": (
        "report(stage='running'); report(status='verified')",
        "unknown",
        "the new process did not say which GPU it sees",
    ),
    "another GPU": (
        "here['gpu'] = 'H200'; begin(); report(status='verified')",
        "unknown",
        "the new process sees gpu H200, not Stand-in H100",
    ),
    "crash on another GPU": (
        "here['gpu'] = 'H200'; here['slices'] = '2'; begin(); os.abort()",
        "unknown",
        "the new process sees gpu H200, not Stand-in H100; slices 2, not None",
    ),
    "closes its output and goes on": (
        "begin(); report(status='verified'); os.close(1); os.close(2); time.sleep(0.2)",
        "verified",
        "",
    ),
    "closes its output and crashes": (
        "begin(); report(status='verified'); os.close(1); os.close(2); time.sleep(0.2); os.abort()",
        "failed",
        'crashed with SIGABRT in problem "teacher"',
    ),
}


def try_(gpu, program: str) -> store.Verdict:
    gpu.children[WAY] = program
    return trial.run([WAY], 0, identity(0))[WAY]


@pytest.mark.parametrize(("program", "status", "reason"), ENDS.values(), ids=ENDS)
def test_end(gpu, program, status, reason):
    found = try_(gpu, program)
    assert (found.status, found.reason) == (status, reason)


LIMITS = {
    "starting": (
        "print('importing'); sys.stdout.flush(); time.sleep(1000)",
        "unknown",
        "starting took longer than 1 s: importing",
    ),
    "compiling": ("begin('compiling', 'one launch'); time.sleep(1000)", "unknown", "compiling took longer than 0 s"),
    "running": (HANGS, "failed", 'did not end within 0 s, in problem "teacher"'),
    "result, then hang": (PASSES + "; time.sleep(1000)", "failed", 'did not end within 0 s, in problem "teacher"'),
    "stopped": (
        "begin(); os.kill(os.getpid(), signal.SIGSTOP)",
        "failed",
        'did not end within 0 s, in problem "teacher"',
    ),
    "slow": (
        "begin()\nfor i in range(99): print('one more', flush=True); time.sleep(0.02)",
        "unknown",
        'was too slow: still at work after 0 s, in problem "teacher"',
    ),
    "output closed": (
        "begin(); os.close(1); os.close(2); time.sleep(1000)",
        "failed",
        'did not end within 0 s, in problem "teacher"',
    ),
    "deaf": (
        "[signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]; " + HANGS,
        "failed",
        'did not end within 0 s, in problem "teacher"',
    ),
}


@pytest.mark.parametrize(("program", "status", "reason"), LIMITS.values(), ids=LIMITS)
def test_hang(gpu, monkeypatch, program, status, reason):
    for stage in trial.LIMITS_S:
        monkeypatch.setitem(trial.LIMITS_S, stage, 1.0 if stage == "starting" else 0.3)
    monkeypatch.setattr(trial, "KILLED_S", 9.0)
    begin = time.monotonic()
    found = try_(gpu, program)
    assert (found.status, found.reason) == (status, reason)
    assert found.seconds >= 0.3 and time.monotonic() - begin < trial.KILLED_S


def test_only_the_time_at_work_counts_and_all_of_it(gpu, monkeypatch):
    monkeypatch.setitem(trial.LIMITS_S, "running", 0.5)
    compiles = "report(stage='compiling'); time.sleep(0.3); report(stage='running'); "
    assert try_(gpu, f"begin(); {compiles * 2} report(status='verified')").status == "verified"
    works = "report(stage='compiling'); report(stage='running'); time.sleep(0.2); "
    assert try_(gpu, f"begin(); {works * 4} report(status='verified')").reason.startswith("was too slow: still at work")


def test_time_in_which_this_process_is_stopped_does_not_count(gpu, monkeypatch):
    monkeypatch.setitem(trial.LIMITS_S, "running", 0.6)
    monkeypatch.setattr(trial, "STEP_S", 0.1)
    monkeypatch.setattr(trial, "wait_for_output", lambda trials: time.sleep(0.5))
    found = try_(gpu, "begin(); time.sleep(0.8); report(status='verified')")
    assert found.status == "verified" and found.seconds < 0.6


def note_compilation(times):
    return lambda trials: times.extend([time.monotonic()] * any(one.compiles for one in trials.values()))


def test_each_way_has_its_own_time_and_compilation_is_told(gpu):
    gpu.children = {"cuda": PASSES, "triton": f"begin('compiling'); time.sleep(0.6); {PASSES}", "flash": CRASHES}
    told = []
    found = trial.run(gpu.children, 0, identity(0), note_compilation(told))
    assert {way: verdict.status for way, verdict in found.items()} == dict(
        cuda="verified", triton="verified", flash="failed"
    )
    assert found["triton"].seconds > found["cuda"].seconds + 0.3
    assert told[-1] - told[0] > 0.4


def test_compilation_is_not_told_for_ways_that_have_ended(gpu):
    gpu.children = {"cuda": NO_MEMORY, "triton": f"report(stage='running'); time.sleep(0.8); {PASSES}"}
    told = []
    trial.run(gpu.children, 0, identity(0), note_compilation(told))
    assert time.monotonic() - told[-1] > 0.4


FLOOD = {
    "lines": "for i in range(50_000): print('x' * 99)",
    "one long line": "os.write(1, b'x' * (20 << 20))",
    "bytes": "for i in range(20): os.write(1, os.urandom(1 << 16))",
    "wide characters": "os.write(1, ('\\U0001F600' * 1000 + '\\n').encode() * 60)",
    "terminal": "print('\\x1b[2J\\x07\\r\\x9b31mred\\t' * 10)",
    "empty lines": "print('\\n' * 100_000)",
}


@pytest.mark.parametrize("flood", FLOOD.values(), ids=FLOOD)
def test_flood_of_output(gpu, flood, monkeypatch):
    monkeypatch.setattr(trial, "POLL_S", 0.05)
    found = try_(gpu, f"begin()\n{flood}\nsys.stdout.flush()\nprint('\\nlast', flush=True)\nos.abort()")
    assert (found.status, found.reason) == ("failed", 'crashed with SIGABRT in problem "teacher"')
    assert found.seconds < 8  # a pipe's 64 KiB at each POLL_S would take longer
    lines = found.output.split("\n")
    assert len(lines) <= trial.LINES and lines[-1] == "last"
    assert all(len(line) <= trial.LINE_CHARACTERS and line.isprintable() and line for line in lines)
    assert store.save(identity(0), {way: found for way in gpu.children})
    assert store.load(identity(0))[WAY] == found


BROKEN = ["{", "[]", "5", "null", '"stage"', "[" * 50_000, '{"stage": []}', '{"stage": "asleep"}', '{"status": {}}']
BROKEN += ['{"status": "fine"}', '{"identity": 5}', '{"identity": "xy"}', "\\xff\\xfe", "9" * 9999, '{"at": "stage"']


def test_broken_reports_do_not_matter(gpu):
    begin = f"report(identity=here); report(stage='running')\nfor text in {BROKEN!r}:\n    print('@bam ' + text)\n"
    assert try_(gpu, f"{begin}\nsys.stdout.flush(); report(status='verified')").status == "verified"
    found = try_(gpu, f"{begin}\nsys.stdout.flush(); os.abort()")
    assert found.reason == "crashed with SIGABRT while running"
    assert set(found.output.split("\n")) == {"a report that cannot be read"}


def test_reasons_cannot_act_on_a_terminal(gpu):
    found = try_(gpu, "begin(); report(status='failed', reason='\\x1b[31m\\ud800' + 'x' * 9999)")
    assert found.reason == "?[31m?" + "x" * (trial.LINE_CHARACTERS - 6)


def test_first_lines_of_a_crash_remain_where_little_follows(gpu):
    found = try_(
        gpu, "print('first')\nbegin()\nprint('second')\nsys.stdout.flush()\nos.write(1, b'no end of line')\nos.abort()"
    )
    assert found.output == "first\nsecond\nno end of line"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


GRANDCHILD = "other = subprocess.Popen(['sleep', '1000']); print('pid', other.pid, flush=True)\n"


@pytest.mark.parametrize("end", [HANGS, "begin(); os.abort()"], ids=["hangs", "crashes"])
def test_what_the_process_has_started_ends_with_it(gpu, monkeypatch, end):
    monkeypatch.setattr(trial, "KILLED_S", 9.0)
    monkeypatch.setitem(trial.LIMITS_S, "running", 0.3)
    begin = time.monotonic()
    found = try_(gpu, GRANDCHILD + end)
    assert found.status == "failed" and time.monotonic() - begin < trial.KILLED_S
    pid = int(found.output.removeprefix("pid "))
    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def test_a_process_that_has_left_the_session_is_not_waited_for(gpu, monkeypatch):
    monkeypatch.setattr(trial, "KILLED_S", 9.0)
    begin = time.monotonic()
    found = try_(gpu, GRANDCHILD.replace("'1000']", "'10'], start_new_session=True") + PASSES)
    assert found.status == "verified" and time.monotonic() - begin < trial.KILLED_S


def test_processes_that_cannot_be_killed_are_left_behind_together(gpu, monkeypatch):
    monkeypatch.setitem(trial.LIMITS_S, "running", 0.1)
    monkeypatch.setattr(trial, "KILLED_S", 0.4)
    gpu.children, left = dict.fromkeys(gpu.children, HANGS), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *process_and_signal: left.append(process_and_signal))
        begin = time.monotonic()
        found = trial.run(gpu.children, 0, identity(0))
        seconds = time.monotonic() - begin
    for process, kill in left:
        os.killpg(process, kill)
        os.waitpid(process, 0)
    assert {verdict.status for verdict in found.values()} == {"failed"} and len(left) == 3
    assert 0.4 < seconds < 1.0


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    """Processes that this one has started, also those that have ended and were not waited for."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize(
    "program", [PASSES, CRASHES, HANGS, "os.close(1)"], ids=["passes", "crashes", "hangs", "closes"]
)
def test_nothing_is_left(gpu, monkeypatch, program):
    monkeypatch.setitem(trial.LIMITS_S, "running", 0.3)
    before = descriptors(), threading.active_count(), children()
    try_(gpu, program)
    assert (descriptors(), threading.active_count(), children()) == before


@pytest.mark.parametrize("at", ["while waiting", "while starting"])
def test_interrupt(gpu, monkeypatch, at):
    begun = gpu.command

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    before = descriptors(), children()
    gpu.children = dict.fromkeys(gpu.children, HANGS)
    if at == "while starting":
        monkeypatch.setattr(trial, "command", lambda way, index: begun(way, index) if way == "cuda" else interrupted())
    with pytest.raises(KeyboardInterrupt):
        trial.run(["cuda", "triton"], 0, identity(0), interrupted)
    assert (descriptors(), children()) == before and "cuda" in gpu.tried()


@pytest.mark.parametrize("executable", [None, "", "/nowhere/python", "frozen"])
def test_no_interpreter(monkeypatch, executable):
    if executable == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", executable)
    found = trial.run(["cuda"], 0, {})["cuda"]
    why = "No such file or directory: '/nowhere/python'" if executable == "/nowhere/python" else "this program knows no"
    assert (
        found.status == "unknown" and found.reason.startswith("no process could be started: ") and why in found.reason
    )


def test_environment(monkeypatch):
    """Debugging switches of the program must not make right kernels fail, nor MPS carry a crash to other programs."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "TRITON_INTERPRET"}
    dropped |= {"NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING"}
    for name in dropped:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv(trial.MODE, "force")
    found = trial.environment()
    assert not dropped & set(found) and found[trial.MODE] == "off" and found["CUDA_VISIBLE_DEVICES"] == "3"
    assert found["CUDA_MPS_PIPE_DIRECTORY"] == os.devnull


@pytest.mark.parametrize("found_by", ["its folder", "a link to its folder", "other means", "before another came"])
def test_modules_are_found_in_the_same_order(found_by, monkeypatch, tmp_path):
    """Site-packages may hold packages with names of Python's own modules, so they come after these as ever."""
    package, link, other = str(trial.PACKAGE.parent), tmp_path / "link", tmp_path / "bam_kernels" / "__init__.py"
    link.symlink_to(package)
    other.parent.mkdir()
    other.touch()
    own = {"its folder": [package], "a link to its folder": [str(link)], "other means": []}
    own = own.get(found_by, [str(tmp_path), package])
    monkeypatch.setattr(sys, "path", ["", "/standard library", tmp_path, *own, "/other"])
    first = [package] if len(own) != 1 else []
    expected = [*first, "/standard library", *own, "/other"]
    assert trial.environment()["PYTHONPATH"].split(os.pathsep) == expected


def test_ignored_ends_of_children(gpu):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert try_(gpu, PASSES).status == "verified"
        assert try_(gpu, CRASHES).status == "unknown"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_among_many_threads_and_open_files(gpu):
    stop = threading.Event()
    others = [threading.Thread(target=stop.wait) for _ in range(64)]
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]  # select() takes descriptors below 1024
    for other in others:
        other.start()
    try:
        assert {verdict.status for verdict in trial.run(gpu.children, 0, identity(0)).values()} == {"verified"}
    finally:
        stop.set()
        for file in files:
            os.close(file)


def test_the_real_program_starts(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = trial.run(["cuda"], 0, {})["cuda"]
    assert found.status == "unknown" and ("NVIDIA" in found.reason or "CUDA" in found.reason), found
