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
            files = [file for file in source.iterdir() if ".json" in file.suffix]  # not traces, .json.gz
            self.files = {file.name: file.read_text() for file in files}
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
        by_step: dict[str, list[str]] = {}
        for name, text in self.files.items():
            if name.endswith(".tests.jsonl"):
                failed = [row["test"] for row in map(json.loads, text.splitlines()) if row["outcome"] == "failed"]
                if failed:
                    by_step[name.removesuffix(".tests.jsonl")] = list(dict.fromkeys(failed))
        return by_step


def remove(run: Run, files: dict[str, tuple[str, ...]]) -> None:
    """Remove an earlier run's files from the folder of `run`.

    `files` lists file names by the step that writes them; files of steps that will not run stay.
    """
    for step, names in files.items():
        for name in names if run.chosen(step) else ():
            (run.out / name).unlink(missing_ok=True)
