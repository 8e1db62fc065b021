"""Standard output and standard error that are closed, full, without a reader, or short of characters."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from driver_runs import ROOT, TINY, content

from driver import exits, history
from driver.config import UserError
from driver.messages.streams import guarded


def without_reader() -> io.TextIOWrapper:
    """Stream into a pipe whose reader has gone, as that of `head`."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def lines(world) -> int:
    """A script that prints three lines, and leaves a file at its end."""
    for i in range(3):
        print(i)
    Path("whole").touch()
    return 0


def outliving(world) -> int:
    exits.outlive_output()
    lines(world)
    return os.write(sys.stdout.fileno(), b"from C") - len(b"from C")


@pytest.mark.parametrize(
    "output, code, said", [(without_reader, 141, ""), (full, 1, "error: standard output: No space left on device")]
)
def test_a_result_that_cannot_be_printed(output, code, said, monkeypatch, capsys):
    """Without a reader, the script ends without words, as Unix tools do."""
    stream = output()
    monkeypatch.setattr(sys, "stdout", stream)
    assert exits.exit_code(lines) == code
    assert capsys.readouterr().err.strip() == said and not Path("whole").exists()
    assert sys.stdout is stream
    stream.close()  # the interpreter does so at its end, and would print an error


@pytest.mark.parametrize("output, why", [(without_reader, "Broken pipe"), (full, "No space left on device")])
def test_a_run_outlives_its_output(output, why, monkeypatch, capsys):
    stream = output()
    monkeypatch.setattr(sys, "stdout", stream)
    assert exits.exit_code(outliving) == 0
    assert capsys.readouterr().err.strip() == f"note: standard output is lost ({why}); the run goes on"
    assert Path("whole").exists()
    stream.close()


@pytest.mark.parametrize("output", [without_reader, full])
def test_progress_that_cannot_be_shown(output, monkeypatch, capsys):
    """Errors of standard error end nothing. Another error keeps its exit code."""
    stream = output()
    monkeypatch.setattr(sys, "stderr", stream)

    def run(world):
        print("progress", file=sys.stderr)
        if Path("whole").exists():
            raise UserError("bad")
        return lines(world)

    assert [exits.exit_code(run) for _ in range(2)] == [0, 1]
    assert capsys.readouterr().out == "0\n1\n2\n"
    stream.close()


def test_what_is_printed_before_an_error_is_kept(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        exits.exit_code(lambda _: print("before") or 1 // 0)
    assert capsys.readouterr().out == "before\n"


def test_characters_that_the_encoding_lacks(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert exits.exit_code(lambda _: print("Bücher \udcfc") or 0) == 0
    with guarded(pytest.fail):
        sys.stderr.write("█\n")
    written = [stream.buffer.getvalue() for stream in (sys.stdout, sys.stderr)]
    assert written == [b"B\\xfccher \\udcfc\n", b"\\u2588\n"]


def test_other_ranks_print_nothing(monkeypatch, capsys):
    """Their null device takes any character, whatever the locale's encoding is."""
    monkeypatch.setattr(exits.World, "from_environment", lambda: exits.World(rank=1))

    def run(world):
        assert sys.stdout.errors == "backslashreplace"
        print("Bücher \udcfc")
        return 0

    assert exits.exit_code(run) == 0 and capsys.readouterr().out == ""


def test_streams_that_do_not_exist(monkeypatch):
    """Python has None for a stream whose file is closed when it starts."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with guarded(pytest.fail):
        print("nowhere", file=sys.stderr)
        assert not sys.stdout.isatty()


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | head -c 1"])
def test_a_run_without_output_is_whole(redirection):
    """A file of the run must not get the free number of a closed stream, and with it what C code prints."""
    options = " ".join([*TINY, "--optim.epochs=2"])
    command = f"set -o pipefail; '{sys.executable}' '{ROOT}/driver/pretrain.py' {options} {redirection}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    end = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert end.returncode == 0, end
    assert "Exception" not in end.stderr and "Traceback" not in end.stderr
    directory = Path("runs/digits-001")
    names = {"checkpoint.pt", "config.yaml", "dashboard.png", "history.jsonl", "images.tsv.gz", "report.html"}
    assert {path.name for path in directory.iterdir()} == names
    assert history.read(directory).rows == content(directory)["history"]


@pytest.mark.slow
def test_help_without_a_reader():
    command = f"set -o pipefail; '{sys.executable}' '{ROOT}/driver/pretrain.py' --help | true"
    end = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert end.returncode == exits.BROKEN_PIPE == 141 and end.stderr == ""
