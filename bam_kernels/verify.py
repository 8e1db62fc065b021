"""Try the GPU kernels on this machine and keep the verdicts, by which `backend="auto"` chooses.

    python -m bam_kernels.verify                 all ways, on the first GPU
    python -m bam_kernels.verify --device 1

Each way is tried afresh, whatever is kept, in a process of its own, on problems of fixed seed against float64;
docs/gpu.md explains. On a GPU that takes one process at a time, name the ways one by one: --ways cuda.
Exit status 0 if every way that can run on this GPU is verified, 1 if one is not, 2 if there is nothing to try.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from .user_files import write
from .verification import trust
from .verification.identity import Identity, identity
from .verification.store import Verdict
from .verification.trial import CANNOT_RUN, Trial
from .ways import GPU_WAYS
from .whole_files import check_file

PROGRESS_S = 10.0  # between two lines about what the trials do
NOTHING_TO_TRY = 2


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bam_kernels.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=int, default=0, help="index of the GPU (default: 0)")
    parser.add_argument("--ways", nargs="+", choices=GPU_WAYS, default=GPU_WAYS, help="ways to try (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all that was found")
    options = parser.parse_args(args)
    count = device_count()
    if count == 0:
        parser.error("torch sees no GPU")
    if not 0 <= options.device < count:
        parser.error(f"--device {options.device}: torch sees {count} GPU{'s' * (count > 1)}, numbered from 0")
    if options.json is not None:
        try:
            check_file(options.json)
            options.json.open("a").close()  # a file that cannot be written is an error before minutes of work
        except OSError as error:
            parser.error(f"--json {options.json}: {error.strerror}")
    here, verdicts = verify(options.device, dict.fromkeys(options.ways))
    if options.json is not None:
        plain = {"identity": here, "verdicts": {way: asdict(verdict) for way, verdict in verdicts.items()}}
        write(options.json, json.dumps(plain, indent=1) + "\n")
    return exit_status(verdicts)


def device_count() -> int:
    """Number of GPUs that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def verify(index: int, ways: Iterable[str] = GPU_WAYS) -> tuple[Identity, dict[str, Verdict]]:
    """Try ways on device `index`, whatever is known, and print a line for each; returns identity and verdicts."""
    here = identity(index)
    verdicts = trust.try_together(
        list(ways), index, here, lambda text: print(text, flush=True), afresh=True, watch=Progress()
    )
    for way, verdict in verdicts.items():
        if verdict.output and verdict.status != "verified":
            print(f"\nlast lines of {way}:", *verdict.output.splitlines(), sep="\n    ")
    print()
    for way, verdict in verdicts.items():
        print(f"{way:<8}{verdict}", flush=True)
    return here, verdicts


def exit_status(verdicts: Mapping[str, Verdict]) -> int:
    """Exit status for verdicts; the docstring of this module says which."""
    tried = [verdict for verdict in verdicts.values() if not verdict.reason.startswith(CANNOT_RUN)]
    return int(any(verdict.status != "verified" for verdict in tried)) if tried else NOTHING_TO_TRY


class Progress:
    """Prints what the trials do whenever it has changed, at most every PROGRESS_S seconds."""

    def __init__(self) -> None:
        self.begin = self.printed = time.monotonic()
        self.text = ""

    def __call__(self, trials: Mapping[str, Trial]) -> None:
        now = time.monotonic()
        text = "; ".join(f"{way} {trial.doing()}" for way, trial in trials.items())
        if now >= self.printed + PROGRESS_S and text != self.text:
            self.printed, self.text = now, text
            print(f"    {now - self.begin:.0f} s: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
