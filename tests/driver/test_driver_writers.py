"""Checkpoints under kills and several writers; the sources write files in one place."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from driver_runs import ROOT

# Killed


PROGRAM = """
import mmap, os, random, signal, sys
from pathlib import Path
import torch
from torch import nn
from driver import checkpoint
from driver.files import remove_unfinished

torch.set_num_threads(1)
run, network = Path(), nn.Linear(64, 64)
state = checkpoint.State(network, None, network)  # not an optimiser, which takes seconds to import
done = mmap.mmap(-1, 8)  # last step whose save has returned, for all processes

def save(keep_last=2, keep=False):
    state.step = state.epoch = last_done() + 1
    checkpoint.save(state, {}, run, keep_last, keep)
    done[:] = state.step.to_bytes(8, "big")

def last_done():
    return int.from_bytes(done[:], "big")

def start(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print("FAILED", repr(error), flush=True)
            os._exit(1)
    return pid

def ends(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def forever():
    while True:
        save()

def check():
    steps = {path.name: torch.load(path, weights_only=True)["step"] for path in run.glob("*.pt")}
    assert steps["checkpoint.pt"] in (last_done(), last_done() + 1), (steps, last_done())
    done[:] = steps["checkpoint.pt"].to_bytes(8, "big")
    assert steps.keys() >= {f"epoch-{step:04d}.pt" for step in kept}, (steps, kept)
    left = list(run.glob("*.writing"))
    remove_unfinished(run, r"(checkpoint|step-\\d+|epoch-\\d+)\\.pt", at_once=True)
    assert not list(run.glob("*.writing")) and not set(run.iterdir()) - set(map(Path, steps))
    return len(left)

kept = set()
save()
"""
RANDOM_KILLS = """
import time
moments, left = random.Random(0), 0
for _ in range(40):
    child = start(forever)
    time.sleep(moments.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    assert ends(child) == -signal.SIGKILL
    left += check()
print(f"kills 40, left {left}, steps {last_done()}")
"""
KILL_AT_EACH_CALL = """
def kill_at(number):
    calls = 0
    def counting(call):
        def counted(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)
        return counted
    for name in ("open", "link", "replace", "unlink", "fsync", "close"):
        setattr(os, name, counting(getattr(os, name)))
    save(keep=True)

number = killed = 0
while True:
    number += 1
    code = ends(start(lambda: kill_at(number)))
    check()
    kept |= {int(path.stem[6:]) for path in run.glob("epoch-*.pt")}
    if code == 0:
        break
    assert code == -signal.SIGKILL
    killed += 1
print("kills", killed)
"""
TWO_WRITERS = """
children = [start(forever) for _ in range(2)]
seen = set()
for _ in range(500):
    seen.add(torch.load("checkpoint.pt", weights_only=True)["step"])
assert len(seen) > 9, seen
for child in children:
    os.kill(child, signal.SIGKILL)
    assert ends(child) == -signal.SIGKILL, ends
torch.load("checkpoint.pt", weights_only=True)
print("read 500")
"""


@pytest.mark.parametrize(
    "work, said",
    [
        (RANDOM_KILLS, r"kills 40, left [1-9]\d*, steps \d{2,}"),
        (KILL_AT_EACH_CALL, r"kills ([2-9]\d)"),
        (TWO_WRITERS, "read 500"),
    ],
    ids=["40 kills", "a kill before each call", "two writers"],
)
def test_a_checkpoint_is_whole_whoever_is_killed(work, said):
    """A checkpoint whose save has returned is not lost, none is torn, and the next start finds nothing to clear."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM + work]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert found.returncode == 0 and "FAILED" not in found.stdout, found.stdout + found.stderr
    assert re.search(said, found.stdout), found.stdout


# The sources


WRITES = re.compile(
    r"(torch|np|image|picture)\.save\w*|save_file|.*\b(write_text|write_bytes|savefig|tofile|mkstemp|NamedTemporaryFile)"
)
ALLOWED = {
    ("bam_kernels/whole_files.py", "os.open"): "the one writer",
    ("bam_kernels/verification/store.py", "os.open"): "a lock's file",
    ("bam_kernels/verify.py", "options.json.open"): "a trial whether the file can be written",
    ("bam_kernels/backends/triton/compile.py", "Path(path).write_bytes"): "a file in a temporary folder",
    ("driver/files.py", "os.open"): "a lock's file",
    ("driver/data/sources.py", "FileIO"): "a lock's file",
    ("driver/weights/exports.py", "path.open"): "the checksum, into the unfinished file of `replacing`",
    ("driver/history.py", "path.open"): "lines are added to history.jsonl",
    ("driver/reporting/gallery.py", "picture.save"): "into memory",
    ("driver/reporting/plots.py", "figure.savefig"): "into memory, or the unfinished file of `replacing`",
    ("driver/verify_resume.py", "(folder / 'output').open"): "what a run prints, in a temporary folder",
    ("driver/exits.py", "open"): "/dev/null",
    ("driver/messages/streams.py", "open"): "/dev/null",
    ("driver/messages/streams.py", "os.open"): "/dev/null",
}
"""Calls that open or write a file outside a block of `replacing`, and why they may."""


def writes(call: ast.Call) -> bool:
    """Whether a call opens a file to write it, or writes one."""
    name, given = ast.unparse(call.func), [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [str(node.value) for node in given if isinstance(node, ast.Constant)]
    opens = re.search(r"(^|\.)(open|FileIO)$", name) and (
        any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", mode) for mode in modes)
        or re.search(r"O_(CREAT|WRONLY|RDWR)", ast.unparse(call))
    )
    return bool(opens or WRITES.fullmatch(name))


def writing_calls(path: Path) -> set[str]:
    """Functions called in a source file that write a file, outside blocks of `replacing`."""
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    safe = [block for block in blocks if any("replacing(" in ast.unparse(item) for item in block.items)]
    inside = {id(node) for block in safe for node in ast.walk(block)}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in inside)
    return {ast.unparse(call.func) for call in calls if writes(call)}


def test_files_are_written_in_one_place():
    paths = [path for top in ("driver", "bam_kernels") for path in (ROOT / top).rglob("*.py")]
    found = {(str(path.relative_to(ROOT)), name) for path in paths for name in writing_calls(path)}
    assert found == set(ALLOWED)
    assert [path.name for path in paths if "os.replace(" in path.read_text()] == ["whole_files.py"]
