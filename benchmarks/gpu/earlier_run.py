"""Files of an earlier run: the failures to repeat, and results that a new run must not mistake for its own."""

import json
import tarfile
from pathlib import Path

from steps import Run


class EarlierRun:
    """Failures of an earlier run, read from its archive or its folder."""

    def __init__(self, source: Path | None) -> None:
        self.files: dict[str, str] = {}
        if source is None:
            return
        if source.is_dir():
            self.files = {file.name: file.read_text() for file in source.glob("*.json*")}
            return
        with tarfile.open(source) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member) if ".json" in Path(member.name).suffix else None
                if file is not None:
                    self.files[member.name] = file.read().decode()

    def steps(self) -> dict[str, str]:
        """Status of each failed step, by name."""
        ended = json.loads(self.files.get("steps.json", "{}"))
        return {name: step["status"] for name, step in ended.items() if step["status"].startswith("failed")}

    def tests(self) -> dict[str, list[str]]:
        """Ids of the failed tests, by the step that ran them."""
        found: dict[str, list[str]] = {}
        for name, text in self.files.items():
            if name.endswith(".tests.jsonl"):
                failed = [row["test"] for row in map(json.loads, text.splitlines()) if row["outcome"] == "failed"]
                if failed:
                    found[name.removesuffix(".tests.jsonl")] = list(dict.fromkeys(failed))
        return found


def remove(run: Run, files: dict[str, tuple[str, ...]]) -> None:
    """Remove an earlier run's files from the folder of `run`.

    `files` lists them by the step that writes them; those of steps that will not run stay.
    """
    for step, names in files.items():
        for name in names if run.chosen(step) else ():
            (run.out / name).unlink(missing_ok=True)
