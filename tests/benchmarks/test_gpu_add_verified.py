"""benchmarks/gpu/add_verified.py on made-up archives: which ways come into the table, and why others do not."""

import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "benchmarks" / "gpu"))

import add_verified as script  # noqa: E402
from contact import VERIFY  # noqa: E402
from earlier_run import EarlierRun  # noqa: E402

from bam_kernels.verification import identity, verified  # noqa: E402
from bam_kernels.ways import GPU_WAYS  # noqa: E402

CSRC = script.sources("cuda").split()[1]
HERE = {
    "gpu": "NVIDIA H200",
    "capability": "9.0",
    "multiprocessors": "132",
    "driver": "580.159.04",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "library": "0.1.0",
    "sources": identity.python_hash(),
    "extension": f"{CSRC} nvcc 13.0 for 9.0a",
    "python": "cpython-312",
}
ENTRIES = [
    {"way": "cuda", "capability": "9.0", "code": "9.0a", "torch": "2.11", "compiler": "nvcc 13.0"},
    {"way": "flash", "capability": "9.0", "code": "9.0", "torch": "2.11", "compiler": "triton 3.6"},
    {"way": "triton", "capability": "9.0", "code": "9.0", "torch": "2.11", "compiler": "triton 3.6"},
]
ENTRIES = [entry | {"sources": script.sources(entry["way"])} for entry in ENTRIES]


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """The table of the project, empty, in place of its file."""
    file = tmp_path / "verified.json"
    file.write_text("[]\n")
    monkeypatch.setattr(verified, "FILE", file)
    verified.entries.cache_clear()
    yield file
    verified.entries.cache_clear()


class Archive:
    """A contact run in which everything has passed, before a test changes its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        steps = {step.name: step for backend in script.OTHERS for step in script.required(backend)}
        self.steps = {name: {"status": "passed", "run": "r1"} for name in [*steps, *VERIFY.values(), "times"]}
        self.verdicts = {way: {"status": "verified", "reason": ""} for way in ("cuda", "triton", "flash")}
        self.here = dict(HERE)
        passed = json.dumps({"test": "a", "outcome": "passed"}) + "\n"
        self.files = {f"{name}.tests.jsonl": passed for name, step in steps.items() if "pytest" in step.command}

    def write(self) -> Path:
        files = {"steps.json": json.dumps(self.steps), **self.files}
        for way, verdict in self.verdicts.items():
            files.setdefault(f"{VERIFY[way]}.json", json.dumps({"identity": self.here, "verdicts": {way: verdict}}))
        with tarfile.open(self.folder / "contact.tar.gz", "w:gz") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        return self.folder / "contact.tar.gz"


@pytest.fixture
def archive(tmp_path) -> Archive:
    return Archive(tmp_path)


def add(archive: Archive, capsys) -> tuple[int, dict[str, str]]:
    """Exit status, and what is printed of each way."""
    verified.entries.cache_clear()
    status = script.main([str(archive.write())])
    return status, {line[:8].rstrip(): line[8:] for line in capsys.readouterr().out.splitlines()}


def test_all_that_is_required_has_passed(archive, table, capsys):
    """Entries are sorted, hold for builds for more architectures too, and are not added twice."""
    status, said = add(archive, capsys)
    assert status == 0 and {text.split(":")[0] for text in said.values()} == {"added"}
    assert json.loads(table.read_text()) == ENTRIES
    verified.entries.cache_clear()
    for_users = HERE | {"extension": f"{CSRC} nvcc 13.0 for 8.0+PTX 9.0a 10.0a", "torch": "2.11.1", "triton": "3.6.2"}
    assert set(verified.ways(for_users)) == {"cuda", "triton", "flash"}
    assert verified.ways(HERE | {"capability": "8.0"}) == verified.ways(HERE | {"torch": "2.12.0"}) == ()
    before = table.read_text()
    status, said = add(archive, capsys)
    assert status == 0 and {text.split(":")[0] for text in said.values()} == {"is there"}
    assert table.read_text() == before


def test_entries_of_other_sources_are_replaced_and_others_stay(archive, table, capsys):
    older = [entry | {"sources": "0" * 16} for entry in ENTRIES]
    others = [ENTRIES[0] | {"capability": "8.0", "code": "8.0", "sources": "1" * 16}, ENTRIES[1] | {"torch": "2.14"}]
    table.write_text(json.dumps(older[1:] + others))
    archive.verdicts["flash"] = {"status": "failed", "reason": "teacher: wrong"}
    status, said = add(archive, capsys)
    assert status == 1 and said["cuda"].startswith("added: {") and said["triton"].startswith("replaced: {")
    assert said["flash"] == "left out: failed: teacher: wrong"
    assert json.loads(table.read_text()) == [others[0], ENTRIES[0], older[1], others[1], ENTRIES[2]]


@pytest.mark.parametrize(
    "step, outcome, left_out",
    [
        ("probe-cuda-stats", {"status": "failed with 1", "run": "r1"}, ["cuda"]),
        ("probe-cuda-match-long-sm80", {"status": "not run: build.py has not made sm_80", "run": "r1"}, ["cuda"]),
        ("probe-triton-flash", {"status": "failed: longer than 60 s", "run": "r1"}, ["triton", "flash"]),
        ("tests-sm80", None, ["cuda"]),
        ("tests-gpu", {"status": "failed with 1", "run": "r1"}, ["cuda", "triton", "flash"]),
        ("memcheck", {"status": "not run: compute-sanitizer is not here", "run": "r1"}, ["cuda"]),
        ("ranks-gloo-triton", {"status": "passed", "run": "r0"}, ["triton", "flash"]),
        ("ranks-nccl-cuda", {"status": "passed"}, ["cuda"]),
        ("verify-triton", {"status": "passed"}, ["triton"]),
        ("times", {"status": "failed with 1", "run": "r1"}, []),
    ],
)
def test_a_step_that_does_not_count_keeps_the_ways_of_its_backend_out(archive, table, capsys, step, outcome, left_out):
    assert archive.steps.pop(step)
    if outcome is not None:
        archive.steps[step] = outcome
    status, said = add(archive, capsys)
    assert status == bool(left_out) and [way for way in said if said[way].startswith("left out")] == left_out
    reason = f"{step} is of another run" if outcome and outcome["status"] == "passed" else step
    assert step.startswith("verify") or all(reason in said[way] for way in left_out)
    assert {entry["way"] for entry in json.loads(table.read_text())} == {"cuda", "triton", "flash"} - set(left_out)


def test_an_archive_that_does_not_say_of_which_run_its_steps_are(archive, table, capsys):
    archive.steps = {name: {"status": "passed"} for name in archive.steps}
    status, said = add(archive, capsys)
    assert status == 1 and all("probe-triton-flash is of another run" in said[way] for way in ("triton", "flash"))


def test_tests_that_were_all_skipped_show_nothing(archive, table, capsys):
    archive.files["tests-cuda.tests.jsonl"] = json.dumps({"test": "a", "outcome": "skipped"}) + "\n"
    del archive.files["tests-triton.tests.jsonl"]
    status, said = add(archive, capsys)
    assert status == 1 and said["cuda"] == "left out: tests-cuda has no test that passed"
    assert said["triton"] == said["flash"] == "left out: tests-triton has no test that passed"
    assert json.loads(table.read_text()) == []


@pytest.mark.parametrize(
    "field, value, left_out",
    [
        ("sources", "0" * 16, ["cuda", "triton", "flash"]),
        ("extension", f"{'0' * 16} nvcc 13.0 for 9.0a", ["cuda"]),
        ("extension", "", ["cuda"]),
    ],
)
def test_a_run_of_other_sources_adds_nothing(archive, table, capsys, field, value, left_out):
    archive.here[field] = value
    status, said = add(archive, capsys)
    assert status == 1 and [way for way in said if said[way].startswith("left out")] == left_out
    reason = f"it ran other sources, {archive.here['sources']}" if value else "the run had no CUDA kernels"
    assert all(reason in said[way] for way in left_out)


@pytest.mark.parametrize("text", ["", '{"identity": {', '{"verdicts": {"triton": 3}}', "[]"])
def test_a_way_without_the_result_of_its_trial_is_left_out(archive, table, capsys, text):
    """A trial that a limit has ended leaves an empty file. Other ways keep their verdicts."""
    archive.files["verify-triton.json"] = text
    status, said = add(archive, capsys)
    assert status == 1 and said["triton"].startswith("left out: there is no verify-triton.json that verify-triton comp")
    assert {entry["way"] for entry in json.loads(table.read_text())} == {"cuda", "flash"}


def test_a_run_that_has_tried_no_way_is_refused(archive, table, capsys):
    archive.verdicts.clear()
    with pytest.raises(SystemExit):
        script.main([str(archive.write())])
    said = capsys.readouterr().err
    assert "contact.tar.gz: it has none of verify-cuda.json, verify-triton.json, verify-flash.json" in said
    with pytest.raises(SystemExit):
        script.main([str(archive.folder / "missing.tar.gz")])
    assert "missing.tar.gz: " in capsys.readouterr().err
    assert table.read_text() == "[]\n"


def test_a_folder_is_read_like_its_archive(archive, table, tmp_path):
    """The folder also holds a compressed trace, which is not text and must not be read as text."""
    folder = tmp_path / "out"
    with tarfile.open(archive.write()) as tar:
        tar.extractall(folder, filter="data")
    (folder / "trace-512x512x256.json.gz").write_bytes(b"\x1f\x8b\xff")
    (folder / "cache").mkdir()
    assert EarlierRun(folder).files == EarlierRun(tmp_path / "contact.tar.gz").files
    assert script.main([str(folder)]) == 0 and json.loads(table.read_text()) == ENTRIES


def test_the_steps_of_each_backend():
    names = {backend: {step.name for step in script.required(backend)} for backend in script.OTHERS}
    assert names["cuda"] & names["triton"] == {"tests-gpu"}
    assert {"tests-cuda", "tests-sm80", "memcheck", "memcheck-rows", "ranks-nccl-cuda"} < names["cuda"]
    assert {"tests-triton", "ranks-gloo-triton", "probe-triton-flash", "probe-triton-step"} < names["triton"]
    run = SimpleNamespace(files={"steps.json": "{}"})
    assert tuple(VERIFY) == GPU_WAYS and f"{min(names['cuda'])} not run" in script.shortfalls(run, "cuda")


def test_the_table_of_the_project_is_in_order():
    verified.entries.cache_clear()
    entries = verified.entries()
    rows = [tuple(entry[name] for name in script.ORDER) for entry in entries]
    assert all(list(entry) == list(script.ORDER) for entry in entries) and rows == sorted(set(rows))
    assert len({row[:-1] for row in rows}) == len(rows)
