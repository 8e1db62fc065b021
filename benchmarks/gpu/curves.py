"""Whether runs of the driver on several backends begin alike: `python benchmarks/gpu/curves.py reference cuda triton`.

Each name is that of the newest run under ./runs; their first eight losses are compared with the first name's. Later,
rounding has grown to something that can be seen.
"""

import json
import sys
from pathlib import Path

STEPS = 8
LARGEST = 1e-3


def losses(name: str) -> list[float]:
    newest = max(Path("runs").glob(f"{name}-*"))
    rows = map(json.loads, (newest / "history.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"][:STEPS]


def main() -> int:
    first, *others = sys.argv[1:]
    expected, agreed = losses(first), True
    print(f"{first}: {expected}")
    for name in others:
        found = losses(name)
        worst = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        agreed &= len(found) == STEPS and worst <= LARGEST
        print(f"{name}: {len(found)} steps, largest relative difference of the loss {worst:.1e}")
    return int(not agreed)


if __name__ == "__main__":
    sys.exit(main())
