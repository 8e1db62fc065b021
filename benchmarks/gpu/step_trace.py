"""Profiles one eager step on device and host with torch's profiler: `step_trace.py --out DIR`.

Prints a table of kernels, then the host's launches and the gaps between them. Each backend's trace is written as a
gzipped file for chrome://tracing or Perfetto, unless it is too large to be archived.
"""

import gzip
import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from one_step import step_parser, wait, warm_step
from steps import LARGEST_ARCHIVED, table

LONGEST = 8  # number of gaps in the table
Event = dict[str, Any]


def trace_step(backend: str, shape: str, views: int, out: Path) -> list[Event]:
    """Profile one step, write its trace, and return its events."""
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    step = warm_step(backend, shape, views, device)
    gpu = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    for _ in range(2):  # the first run also starts the profiler itself
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *gpu]) as profile:
            step()
            wait(device)
    file = out / f"trace-{backend}-{shape}.json"
    profile.export_chrome_trace(str(file))
    text = file.read_bytes()
    file.unlink()
    small = gzip.compress(text, 6)
    if len(small) <= LARGEST_ARCHIVED:
        file.with_name(file.name + ".gz").write_bytes(small)
    else:
        print(f"the trace is left out: {len(small)} bytes")
    return [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]


def kernels(events: list[Event]) -> str:
    """Table of all kernels and copies on the device (on a CPU torch's operators), the longest total first."""
    categories = {"kernel", "gpu_memcpy", "gpu_memset"}
    ran = [event for event in events if event.get("cat") in categories]
    ran = ran or [event for event in events if event.get("cat") == "cpu_op"]
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in ran:
        by_name[event["name"]].append(event["dur"])
    rows = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    cells = [[f"{sum(us):.1f}", str(len(us)), f"{median(us):.1f}", name[:100]] for name, us in rows]
    return table(["us in all", "launches", "median us", "kernel"], cells)


def launches(events: list[Event]) -> str:
    """Summary of the host's launches in one step, and a table of the longest gaps between two launches."""
    made = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and is_launch(e["name"])]
    made.sort(key=lambda event: event["ts"])
    if len(made) < 2:
        return "no launches"
    launched = {number(e): e["name"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")}
    pairs = list(pairwise(made))
    gaps = [after["ts"] - before["ts"] - before["dur"] for before, after in pairs]
    all_us = made[-1]["ts"] + made[-1]["dur"] - made[0]["ts"]
    inside = sum(event["dur"] for event in made)
    head = f"{len(made)} launches over {all_us:.0f} us of the host, {inside:.0f} us inside them; "
    head += f"between two of them {median(gaps):.1f} us (median), {max(gaps):.0f} us at most"
    longest = sorted(zip(gaps, pairs, strict=True), key=lambda item: -item[0])[:LONGEST]
    cells = [[f"{gap:.1f}", *(launched.get(number(e), e["name"])[:50] for e in pair), ""] for gap, pair in longest]
    return head + "\n" + table(["us between", "after", "before", ""], cells)


def is_launch(name: str) -> bool:
    return "Launch" in name or "MemcpyAsync" in name or "MemsetAsync" in name


def number(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def main() -> int:
    parser = step_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the traces (default: .)")
    options = parser.parse_args()
    for backend in options.backends:
        events = trace_step(backend, options.shape, options.views, options.out)
        print(f"\n{backend}, {options.shape} with a teacher, one eager step")
        print(f"{kernels(events)}\n{launches(events)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
