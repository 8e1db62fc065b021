"""Try the GPU kernels on this machine and keep the verdicts, by which `backend="auto"` chooses.

    python -m bam_kernels.verify                 all ways, on the first GPU
    python -m bam_kernels.verify --device 1

Each way is tried in a process of its own, on problems of fixed seed against float64; docs/gpu.md explains. Exit status
0 if every way that can run on this GPU is verified, 1 if one is not, 2 without a GPU.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .verification import trust, verified
from .verification.identity import Identity, identity
from .verification.store import Verdict
from .ways import GPU_WAYS


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bam_kernels.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=int, default=0, help="index of the GPU (default: 0)")
    parser.add_argument("--ways", nargs="+", choices=GPU_WAYS, default=list(GPU_WAYS), help="ways (default: all)")
    parser.add_argument("--json", type=Path, help="file for the identity of GPU and software, and the verdicts")
    options = parser.parse_args(args)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= options.device < count:
        parser.error(f"--device {options.device}: torch sees {count} GPUs")
    here, verdicts = verify(options.device, options.ways)
    unavailable = trust.unavailable_ways(options.ways, torch.device("cuda", options.device))
    if options.json is not None:
        entries = {way: verified.entry(way, here) for way in verdicts}
        plain = {"identity": here, "verdicts": {way: asdict(v) for way, v in verdicts.items()}, "entries": entries}
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    return int(any(v.status != "verified" for way, v in verdicts.items() if way not in unavailable))


def verify(index: int, ways: list[str]) -> tuple[Identity, dict[str, Verdict]]:
    """Try ways on device `index`, whatever is known, and print a line for each; returns identity and verdicts."""
    here = identity(index)
    unavailable = trust.unavailable_ways(ways, torch.device("cuda", index))
    left = [way for way in ways if way not in unavailable]
    found = trust.try_together(left, index, here, lambda text: print(text, flush=True), afresh=True) if left else {}
    verdicts = {way: found.get(way) or Verdict("unknown", f"cannot run here: {unavailable[way]}") for way in ways}
    for way, verdict in verdicts.items():
        for line in verdict.output.splitlines():
            print(f"    {line}")
        print(f"{way:<8}{verdict}")
    return here, verdicts


if __name__ == "__main__":
    sys.exit(main())
