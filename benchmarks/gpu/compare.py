"""Measures our kernels and their competitors on one GPU, row by row: `python benchmarks/gpu/compare.py --out DIR`.

Each row is compared with float64 first; a wrong row is printed as failing and not timed. As soon as a row is measured
it is written to OUT/rows.json, which plot.py draws, and to OUT/rows.jsonl, in the format of the other GPU scripts. If
the measuring process crashes or hangs, only its current row is lost: a new process continues after it.

Times are taken by CUDA events around one run, after a write that clears the input from the cache: medians with p20 and
p80. Then runs are timed by the wall clock, with the host's share. If launches cost more than kernels, the events show
the time of the host.
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

from comparisons import Comparison, comparisons, seconds_table  # noqa: E402

STUCK_S = 75.0  # a row that takes longer is taken to hang
MOST_PROCESSES = 6
WRONG = 3  # exit status of a process that has measured all rows and found rows of ours wrong


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--seconds", type=float, default=240.0, help="seconds for all rows (default: 240)")
    parser.add_argument("--authors", type=Path, help="checkout of the authors' published code")
    parser.add_argument("--toy", action="store_true", help="run toy sizes on the CPU")
    parser.add_argument("--plan", action="store_true", help="print the problems and their expected seconds, then exit")
    parser.add_argument(
        "--compile",
        nargs="+",
        metavar="PROBLEM KIND",
        help="fill the compilers' caches for a problem, or for these kinds of its rows, then exit",
    )
    parser.add_argument("--in-this-process", action="store_true", help="measure here, without a supervisor")
    return parser.parse_args()


def measure_in_processes(options: argparse.Namespace) -> int:
    """Measure in a subprocess, and in a new one whenever it ends early; returns the exit status."""
    end = time.monotonic() + options.seconds
    for _ in range(MOST_PROCESSES):
        left = end - time.monotonic()
        if left < 2:
            break
        again = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--in-this-process"]
        code = wait_or_kill(subprocess.Popen([*again, "--seconds", f"{left:.1f}"]), options.out / "now.json")
        if code in (0, WRONG):
            return int(code != 0)
        print(f"the process that measures ended with {code}; going on in a new one", flush=True)
    return 1


def wait_or_kill(process: subprocess.Popen, now: Path) -> int:
    """Wait for the process and return its exit status; kill it if no new row has begun for STUCK_S seconds."""
    begin = time.time()
    while process.poll() is None:
        last = max(begin, now.stat().st_mtime if now.exists() else 0.0)
        if time.time() > last + STUCK_S:
            process.kill()
        time.sleep(0.1)
    return process.returncode


class Record:
    """The rows in a folder, of this process and of earlier ones.

    now.json names the row that is being measured. not_measured.json holds `missing`: why a row is absent, by problem
    and kind.
    """

    def __init__(self, out: Path) -> None:
        from rows import Rows

        self.out, self.file, self.now = out, out / "rows.json", out / "now.json"
        self.rows = json.loads(self.file.read_text()) if self.file.exists() else []
        self.lines = Rows(out / "rows.jsonl")
        self._missing_file = out / "not_measured.json"
        self.missing: dict[str, dict[str, str]] = {}

    def expect(self, listed: list[Comparison]) -> None:
        """Note every row that is absent so far as "not reached", or with the reason that an earlier process gave."""
        reasons = json.loads(self._missing_file.read_text()) if self._missing_file.exists() else {}
        for comparison in listed:
            kinds = [kind for kind in comparison.kinds if kind not in self.kinds(comparison.name)]
            self.missing[comparison.name] = {
                kind: reasons.get(comparison.name, {}).get(kind, "not reached") for kind in kinds
            }
        self._write_missing()

    def leave_out(self, problem: str, kinds: Iterable[str], why: str) -> None:
        for kind in kinds:
            print(f"{problem} {kind}: left out: {why}", flush=True)
            self.missing.setdefault(problem, {})[kind] = why
        self._write_missing()

    def _write_missing(self) -> None:
        self._missing_file.write_text(json.dumps(self.missing, indent=1) + "\n")

    def begin(self, comparison: Comparison, kind: str) -> None:
        self.now.write_text(json.dumps({"problem": comparison.name, "kind": kind}))

    def unfinished(self) -> tuple[str, str] | None:
        """(problem, kind) of the row that an earlier process began and did not finish, if any."""
        if not self.now.exists():
            return None
        last = json.loads(self.now.read_text())
        return None if last["kind"] in self.kinds(last["problem"]) else (last["problem"], last["kind"])

    def kinds(self, problem: str) -> list[str]:
        """The kinds of rows that the problem has so far."""
        return [row["kind"] for row in self.rows if row["problem"] == problem]

    def rows_of(self, problem: str) -> list[dict]:
        return [row for row in self.rows if row["problem"] == problem]

    def add(self, row: dict) -> None:
        from report import add_ratios, write_json

        self.rows.append(row)
        add_ratios(self.rows_of(row["problem"]))
        write_json(self.file, self.rows)
        if self.missing.get(row["problem"], {}).pop(row["kind"], None) is not None:
            self._write_missing()


def main() -> int:
    options = parse_options()
    if options.plan:
        print(seconds_table(comparisons(options.toy)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compile or options.in_this_process:
        import measurement

        return (
            measurement.compile_rows(options)
            if options.compile
            else measurement.measure_all(options, Record(options.out))
        )
    return measure_in_processes(options)


if __name__ == "__main__":
    sys.exit(main())
