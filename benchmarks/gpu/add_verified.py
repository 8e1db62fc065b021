"""Adds what a contact run has shown to be right to the table of kernels that this project has verified.

    python benchmarks/gpu/add_verified.py contact.tar.gz

A way is added if that run's step `verify-WAY` has verified it, and every probe, test, memory check and check of ranks
of its backend has passed in the same run. The run must be of this checkout's sources. An entry replaces those of other
sources. Exit status 0 if every way is in the table afterwards, 1 if one is not.
"""

import argparse
import json
import runpy
import sys
import tarfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from contact import VERIFY, Contact
from earlier_run import EarlierRun
from steps import REPOSITORY, Step

sys.path[:0] = [str(REPOSITORY)]

from bam_kernels.verification import verified  # noqa: E402
from bam_kernels.verification.identity import python_hash  # noqa: E402
from bam_kernels.verification.verified import Entry  # noqa: E402
from bam_kernels.ways import WAYS  # noqa: E402

ORDER = ("way", "capability", "code", "torch", "compiler", "sources")  # of entries in the table
OTHERS = {"cuda": ("triton",), "triton": ("cuda", "sm80", "memcheck")}  # in names of steps of the other backend


def required(backend: str) -> list[Step]:
    """Steps of a contact run that must pass before kernels of a backend count as verified."""
    made = Contact(Path(), None, toy=False)
    steps = [*made.probes(backend), *made.probes_for_older(), *made.tests(), *made.memory_checks(), *made.ranks()]
    return [step for step in steps if not any(word in step.name for word in OTHERS[backend])]


def shortfalls(run: EarlierRun, way: str) -> list[str]:
    """Why steps of the run that has tried a way do not show that the kernels of its backend are right."""
    ended: dict[str, Any] = json.loads(run.files.get("steps.json", "{}"))
    of_run = ended.get(VERIFY[way], {}).get("run")
    found = []
    for step in required(WAYS[way].backend):
        outcome = ended.get(step.name, {"status": "not run"})
        if outcome["status"] != "passed":
            found.append(f"{step.name} {outcome['status']}")
        elif of_run is None or outcome.get("run") != of_run:
            found.append(f"{step.name} is of another run than {VERIFY[way]}")
        elif "pytest" in step.command and '"outcome": "passed"' not in run.files.get(f"{step.name}.tests.jsonl", ""):
            found.append(f"{step.name} has no test that passed")
    return found


def sources(way: str) -> str:
    """Hash of this checkout's sources, as an entry of a way has it."""
    if way != "cuda":
        return python_hash()
    with patch("setuptools.setup"):
        return f"{python_hash()} {runpy.run_path(str(REPOSITORY / 'setup.py'))['sources_hash']('')}"


def candidates(run: EarlierRun) -> dict[str, Entry | str]:
    """For each way: its entry, or why it has none. Raises: ValueError if the run has tried no way."""
    if not any(f"{name}.json" in run.files for name in VERIFY.values()):
        raise ValueError(f"it has none of {', '.join(f'{name}.json' for name in VERIFY.values())}")
    return {way: _candidate(run, way) for way in VERIFY}


def _candidate(run: EarlierRun, way: str) -> Entry | str:
    file = f"{VERIFY[way]}.json"
    try:
        found: Any = json.loads(run.files.get(file) or "null")
        status, reason = (found["verdicts"][way][name] for name in ("status", "reason"))
        entry = verified.entry(way, found["identity"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"there is no {file} that {VERIFY[way]} completed ({error!r})"
    if status != "verified":
        return f"{status}: {reason}"
    if entry is None:
        return "the run had no CUDA kernels for this GPU"
    if entry["sources"] != sources(way):
        return f"it ran other sources, {entry['sources']}; this checkout has {sources(way)}"
    return "; ".join(shortfalls(run, way)) or entry


def key(entry: Entry) -> Entry:
    """What an entry is about: all but the sources."""
    return {name: value for name, value in entry.items() if name != "sources"}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="archive or folder that contact.py wrote")
    options = parser.parse_args(args)
    try:
        found = candidates(EarlierRun(options.archive))
    except (OSError, ValueError, tarfile.TarError) as error:
        parser.error(f"{options.archive}: {error}")
    entries = [dict(entry) for entry in verified.entries()]
    for way, entry in found.items():
        if isinstance(entry, str):
            print(f"{way:<8}left out: {entry}")
            continue
        older = [one for one in entries if key(one) == key(entry) and one != entry]
        print(f"{way:<8}{'is there' if entry in entries else 'replaced' if older else 'added'}: {json.dumps(entry)}")
        entries = [one for one in entries if key(one) != key(entry)] + [entry]
    ordered = sorted([entry[name] for name in ORDER] for entry in entries)
    text = json.dumps([dict(zip(ORDER, values, strict=True)) for values in ordered], indent=1)
    verified.FILE.write_text(f"{text}\n")
    return int(any(isinstance(entry, str) for entry in found.values()))


if __name__ == "__main__":
    sys.exit(main())
