"""Everything that a GPU has to show, unattended: that the kernels are correct there, then what they take, then tiles.

    python benchmarks/h200.py --out results                 # goes on where it stopped; call it until it says "all done"
    python benchmarks/h200.py --out /tmp/toy --toy          # the same on any machine, at toy sizes

Each part is a command of its own with a time limit. What it prints goes to OUT/PART.log, its rows to OUT/PART.json, and
how it ended to OUT/parts.json, at once. A part that has passed is not run again, one that has failed only where --parts
names it; one that cannot run here says why. A part whose limit does not fit into what is left of --seconds waits for
the next call. Exit status 1 where a part has failed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import options_of

REPOSITORY = Path(__file__).parents[1]
PYTHON = sys.executable

# Every kernel of a step once, at sizes that a sanitizer's tenfold time allows: six problems.
TINY = """
import sys, torch
from bam_kernels import bam_loss
device, backends = torch.device(sys.argv[1]), sys.argv[2:]
for backend in backends:
    for V, R, dtype, options in (
        (2, 0, torch.float16, {}), (4, 2, torch.float16, {"top_k": 3}), (2, 0, torch.float32, {"precision": "exact"}),
        (3, 2, torch.float32, {"precision": "exact", "top_k": 3}), (2, 0, torch.bfloat16, {"memory_budget": 4000}),
        (2, 2, torch.float16, {"target_rows": "student"}),
    ):
        student = torch.randn(V, 9, 24, device=device, dtype=dtype, requires_grad=True)
        teacher = torch.randn(R, 9, 24, device=device, dtype=dtype) if R else None
        bam_loss(student, teacher, backend=backend, **options).backward()
        assert torch.isfinite(student.grad).all()
print("ran")
"""

# The newest run of each name, in its first steps: later rounding has grown to something that can be seen.
CURVES = """
import json, sys
from pathlib import Path
def losses(name):
    newest = max(Path("runs").glob(f"{name}-*"))
    rows = map(json.loads, (newest / "history.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]
reference, *others = sys.argv[1:]
for other in others:
    pairs = list(zip(losses(reference), losses(other), strict=True))[:8]
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    print(f"{other}: {len(pairs)} steps, largest relative difference of the loss {worst:.1e}")
    assert len(pairs) == 8 and worst <= 1e-3
"""


@dataclass
class H200Options:
    out: Path
    """Where logs and rows go."""
    toy: bool = False
    """Small shapes and few repetitions: whether every part runs, not what it takes."""
    parts: tuple[str, ...] = ()
    """Only these; none: all."""
    seconds: float = 530.0
    """This call's time; a part whose limit does not fit waits for the next call."""
    authors: Path | None = None
    """A checkout of the authors' published code."""


@dataclass(frozen=True)
class Part:
    name: str
    limit_s: float
    command: list[str]
    needs: str | None = None  # why it cannot run here
    environment: dict[str, str] = field(default_factory=dict)


def parts(options: H200Options) -> list[Part]:
    """In the order in which they run: what is wrong comes before what it takes."""
    cuda = torch.cuda.is_available()
    no_gpu = None if cuda else "torch sees no GPU here"
    device, backends = ("cuda", ["cuda", "triton"]) if cuda else ("cpu", ["cpu"])
    made = [
        Part("doctor", 120, [PYTHON, "-m", "bam_kernels"]),
        Part("tiny", 120, [PYTHON, "-c", TINY, device, *backends]),
        Part("tests-gpu", 400, pytest(*tests("test_gpu.py")), no_gpu),
        Part("tests-cuda", 400, pytest(*tests("test_cuda*.py", but="compile")), no_gpu),
        Part("tests-triton", 500, pytest(*tests("interpreted/test_*.py")), no_gpu),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    rows = [*pytest(*tests("test_cuda_[km]*.py", but="memory")), "-k", "(cluster or long) and (pass or blocks or 132)"]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        missing = None if sanitizer else "compute-sanitizer is not there"
        under = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        # Each tensor is its own piece of memory then, so that what lies between two is seen.
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        made.append(Part(tool, 300, [*under, PYTHON, "-c", TINY, device, "cuda"], no_gpu or missing, apart))
        # Rows over the blocks of a cluster, and too long for the chip, which six tiny problems do not have.
        if tool != "initcheck":
            made.append(Part(f"{tool}-rows", 200, [*under, *rows], no_gpu or missing, apart))
    for backend in ("reference", *backends):
        given = ["--optim.epochs=2", "--run.log-every=1", "--model.norm=layer"]
        given += ["--run.dtype=float32", "--run.deterministic=True"]
        given += [f"--run.name={backend}", f"--loss.backend={backend}"]
        made.append(Part(f"driver-{backend}", 200, [PYTHON, str(REPOSITORY / "driver" / "pretrain.py"), *given]))
    made.append(Part("driver-curves", 60, [PYTHON, "-c", CURVES, "reference", *backends]))
    made += measurements(options) + tuning(options, no_gpu)
    profiler = None if shutil.which("ncu") else "ncu is not there"
    return [*made, Part("counters", 300, counters(options), no_gpu or profiler)]


def pytest(*files: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]


def tests(pattern: str, but: str | None = None) -> list[str]:
    found = sorted((REPOSITORY / "tests").glob(pattern))
    return [str(file) for file in found if but is None or but not in file.name]


def measurements(options: H200Options) -> list[Part]:
    """Beside the competitors at some shapes, then ours over keys and features: all one rank's share of 2048 rows."""
    on_gpu, toy = torch.cuda.is_available(), options.toy
    ours = ["triton-int16", "cuda-int16", "triton-flash-int16"] if on_gpu else ["cpu"]
    theirs = ["compile", "compile-autocast", "gemms", "flash-sinkhorn", "flash-sinkhorn-tf32"]
    theirs += ["authors", "authors-autocast"] if options.authors else []
    rows, features = ("2048", (128, 256, 1024, 4096)) if not toy else ("32", (16,))
    keys = (8192, 65536, 524288, 2048) if not toy else (64,)
    compared = ("2048x8192x4096", "2048x8192x256", "2048x65536x1024") if not toy else ("32x64x16",)
    teacher, top_k = ["--teacher", "--teacher-views", "8"], ["--top-k", "128" if not toy else "8"]
    modes = {"": [], "-teacher": teacher, "-topk": top_k, "-teacher-topk": teacher + top_k}
    common = ["--repetitions", "20" if not toy else "2"]
    common += ["--authors", str(options.authors.absolute())] if options.authors else []

    def measured(benchmark: str, name: str, shapes: Sequence[str], *given: str) -> Part:
        return Part(name, 400, script(benchmark, options, name, "--shapes", *shapes, *common, *given))

    def loss(name: str, shapes: Sequence[str], *given: str, views: str = "8") -> Part:
        return measured("loss", name, shapes, "--parts", "whole", "--views", views, *given)

    graphs = ["triton-int16-graph", "cuda-int16-graph"] if on_gpu else []
    small = "512x512x256" if not toy else "16x16x16"
    both = [*ours, *theirs]
    made = [loss(f"loss-{shape}-teacher", [shape], "--rows", *both, *teacher) for shape in compared]
    made += [measured("sinkhorn", f"sinkhorn-{shape}", [shape], "--rows", *both) for shape in compared]
    for mode, given in {"": [], "-teacher": ["--teacher"]}.items():
        made.append(loss(f"loss-{small}{mode}", [small], "--rows", *both, *graphs, *given, views="2"))
    made += [loss(f"loss-{shape}", [shape], "--rows", *both) for shape in compared]
    for N in keys:
        ladder = [f"{rows}x{N}x{D}" for D in features]
        made += [loss(f"ladder-{N}{mode}", ladder, "--rows", *ours, *given) for mode, given in modes.items()]
        given = ["--parts", "from-scores", "--rows", *ours]
        made.append(measured("sinkhorn", f"sinkhorn-ladder-{N}", ladder[:1], *given))
    return made


def script(name: str, options: H200Options, part: str, *given: str) -> list[str]:
    rows = options.out.absolute() / f"{part}.json"
    return [PYTHON, str(REPOSITORY / "benchmarks" / f"{name}.py"), *given, "--json", str(rows)]


def tuning(options: H200Options, no_gpu: str | None) -> list[Part]:
    shapes = ["2048x8192x256", "2048x8192x4096"] if not options.toy else ["64x128x32"]
    found = {"BAM_KERNELS_TUNED": str(options.out.absolute() / "tuned")}  # not for the other parts
    return [Part("tune", 500, [PYTHON, "-m", "bam_kernels.tune", "--shapes", *shapes], no_gpu, found)]


def counters(options: H200Options) -> list[str]:
    """Each kernel's share of the memory and arithmetic rates in a Sinkhorn problem and a loss, by Nsight Compute."""
    command = ["ncu", "--clock-control", "none", "--section", "SpeedOfLight", "--section", "LaunchStats"]
    command += ["-k", "regex:sinkhorn_pass|match|column_lse|add_chunks", "--launch-count", "40", "--csv"]
    given = ["--shapes", "2048x8192x256", "--repetitions", "1", "--warmup-s", "0", "--parts", "whole"]
    given += ["--views", "8", "--teacher", "--teacher-views", "8"]
    return [*command, *script("loss", options, "counters", *given, "--rows", "triton-int16", "cuda-int16")]


def ended(part: Part, out: Path) -> dict[str, object]:
    """Run it, and say how it ended."""
    begin = time.monotonic()
    with (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            part.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=out,
            env=os.environ | part.environment,
            start_new_session=True,
        )
        try:
            code = process.wait(part.limit_s)
            status = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started too: a sanitizer's or profiler's program
            process.wait()
            status = f"failed: longer than {part.limit_s:.0f} s"
    return {"status": status, "seconds": round(time.monotonic() - begin, 1)}


def main(options: H200Options) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    file, end = options.out / "parts.json", time.monotonic() + options.seconds
    done = json.loads(file.read_text()) if file.exists() else {}
    chosen = [part for part in parts(options) if not options.parts or part.name in options.parts]
    unknown = set(options.parts) - {part.name for part in chosen}
    if unknown:
        raise ValueError(f"parts: {sorted(unknown)} are none of {[part.name for part in parts(options)]}")
    left = False
    for part in chosen:
        status = done.get(part.name, {}).get("status", "")
        if status == "passed" or (status.startswith("failed") and not options.parts):
            continue
        if part.needs is not None:
            done[part.name] = {"status": f"not run: {part.needs}"}
        elif time.monotonic() + part.limit_s > end:
            left = True
            continue
        else:
            done[part.name] = ended(part, options.out)
        print(f"{part.name:<34} {done[part.name]['status']}", flush=True)
        file.write_text(json.dumps(done, indent=1) + "\n")
    print("more is left: the same command goes on" if left else "all done")
    return int(any(done.get(part.name, {}).get("status", "").startswith("failed") for part in chosen))


if __name__ == "__main__":
    sys.exit(main(options_of(H200Options, __doc__)))
