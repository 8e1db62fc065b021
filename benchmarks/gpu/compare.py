"""Ours beside the competitors on one GPU, row by row: `python benchmarks/gpu/compare.py --out DIR`.

Each row is compared with float64 first; one that is wrong is printed as failing and not timed. Every row is written to
OUT/rows.json (as benchmarks/results/*.json, which plot.py draws) and OUT/rows.jsonl (as the other GPU scripts') when it
is there. A process that crashes or hangs in a row takes that row alone: another one goes on after it.

Times: CUDA events around one run after a write that leaves nothing of its input in the cache, medians with p20 and p80;
then runs by the wall, and the host's share of them. Where launches cost more than kernels, events show the host.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "benchmarks" / "gpu")]

from places import Place, places, predicted  # noqa: E402

STUCK_S = 75.0  # a row that takes longer never ends
MOST_PROCESSES = 6
WRONG = 3  # exit status of a process that has measured all, and found rows of ours wrong


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--seconds", type=float, default=240.0, help="time for all rows (240)")
    parser.add_argument("--authors", type=Path, help="a checkout of the authors' published code")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--plan", action="store_true", help="print the problems and their seconds, and end")
    parser.add_argument("--compile", metavar="PROBLEM", help="fill compilers' caches with a problem's code, and end")
    parser.add_argument("--in-this-process", action="store_true", help="measure here, with no process to follow")
    return parser.parse_args()


def attended(options: argparse.Namespace) -> int:
    """Measure in another process, and in a new one where it ends early."""
    end = time.monotonic() + options.seconds
    for _ in range(MOST_PROCESSES):
        left = end - time.monotonic()
        if left < 2:
            break
        again = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--in-this-process"]
        code = watched(subprocess.Popen([*again, "--seconds", f"{left:.1f}"]), options.out / "now.json")
        if code in (0, WRONG):
            return int(code != 0)
        print(f"the process that measures ended with {code}; going on in a new one", flush=True)
    return 1


def watched(process: subprocess.Popen, now: Path) -> int:
    """The process's exit status; it is killed where no new row has begun for too long."""
    begin = time.time()
    while process.poll() is None:
        last = max(begin, now.stat().st_mtime if now.exists() else 0.0)
        if time.time() > last + STUCK_S:
            process.kill()
        time.sleep(0.1)
    return process.returncode


class Record:
    """The rows of a folder, old and new; what is being measured is in now.json, what has no row in not_measured.json.

    missing: why there is no row, by problem and kind.
    """

    def __init__(self, out: Path) -> None:
        from rows import Rows

        self.out, self.file, self.now = out, out / "rows.json", out / "now.json"
        self.rows = json.loads(self.file.read_text()) if self.file.exists() else []
        self.lines = Rows(out / "rows.jsonl")
        self._missing_file = out / "not_measured.json"
        self.missing: dict[str, dict[str, str]] = {}

    def expect(self, listed: list[Place]) -> None:
        """All that has no row yet is missing, unless an earlier process has said why."""
        said = json.loads(self._missing_file.read_text()) if self._missing_file.exists() else {}
        for place in listed:
            kinds = [kind for kind in place.kinds if kind not in self.kinds(place.name)]
            self.missing[place.name] = {kind: said.get(place.name, {}).get(kind, "not reached") for kind in kinds}
        self._write_missing()

    def leave_out(self, problem: str, kinds: Iterable[str], why: str) -> None:
        for kind in kinds:
            print(f"{problem} {kind}: left out: {why}", flush=True)
            self.missing.setdefault(problem, {})[kind] = why
        self._write_missing()

    def _write_missing(self) -> None:
        self._missing_file.write_text(json.dumps(self.missing, indent=1) + "\n")

    def begin(self, place: Place, kind: str) -> None:
        self.now.write_text(json.dumps({"problem": place.name, "kind": kind}))

    def unfinished(self) -> tuple[str, str] | None:
        """(problem, kind) that an earlier process has begun last, if it came to no end."""
        if not self.now.exists():
            return None
        last = json.loads(self.now.read_text())
        return None if last["kind"] in self.kinds(last["problem"]) else (last["problem"], last["kind"])

    def kinds(self, problem: str) -> list[str]:
        """The kinds of which there are rows."""
        return [row["kind"] for row in self.rows if row["problem"] == problem]

    def of(self, problem: str) -> list[dict]:
        return [row for row in self.rows if row["problem"] == problem]

    def add(self, row: dict) -> None:
        from common import add_ratios, write_json

        self.rows.append(row)
        add_ratios(self.of(row["problem"]))
        write_json(self.file, self.rows)
        if self.missing.get(row["problem"], {}).pop(row["kind"], None) is not None:
            self._write_missing()


def main() -> int:
    options = options_of()
    if options.plan:
        print(predicted(places(options.toy)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compile or options.in_this_process:
        import measuring

        return measuring.compiled(options) if options.compile else measuring.measured(options, Record(options.out))
    return attended(options)


if __name__ == "__main__":
    sys.exit(main())
