"""Compares the first losses of driver runs on several backends: `python curves.py float64 float32 cuda triton`.

Each name stands for its newest run under ./runs. The first run is the truth. The distance of the second shows what
rounding alone does, which grows from step to step. In each of the first steps the others may be ten times as far.
"""

import json
import sys
from pathlib import Path

STEPS = 8
FACTOR, FLOOR = 10.0, 1e-6


def losses(name: str) -> list[float]:
    newest = max(Path("runs").glob(f"{name}-*"))
    rows = map(json.loads, (newest / "history.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"][:STEPS]


def differences(found: list[float], truth: list[float]) -> list[float]:
    """Largest relative difference from the truth up to each step."""
    each = [abs(a / b - 1) for a, b in zip(found, truth, strict=True)]
    return [max(each[: i + 1]) for i in range(len(each))]


def main() -> int:
    first, second, *others = sys.argv[1:]
    truth = losses(first)
    rounding = differences(losses(second), truth)
    print(f"{first}: " + " ".join(f"{loss:.6f}" for loss in truth))
    print(f"{second}: up to " + " ".join(f"{x:.0e}" for x in rounding))
    wrong = []
    for name in others:
        found = differences(losses(name), truth)
        alike = len(found) == STEPS and all(x <= FACTOR * y + FLOOR for x, y in zip(found, rounding, strict=True))
        wrong += [] if alike else [name]
        print(f"{name}: up to " + " ".join(f"{x:.0e}" for x in found) + ("" if alike else "  TOO FAR"))
    print(f"too far: {', '.join(wrong)}" if wrong else f"{len(others)} backends begin as the reference does")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
