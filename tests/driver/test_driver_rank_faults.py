"""Ranks of the driver that cannot meet, that are lost under way, or that do not answer: one line each, exit code 1."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import broken_ranks
import pytest
import torch
import torch.distributed as dist
from broken_ranks import Fault, broken
from driver_runs import TINY, torchrun

from driver import cli, distributed, exits, train
from driver.config import LostWorker, UserError
from driver.distributed import World
from driver.ranks import meeting
from driver.ranks.environment import Place, place_in

TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


# Environment variables


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer of at least 1, got 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be an integer of at least 1, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer of at least 1, got '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be an integer of at least 1, got '-2'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be an integer"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be an integer"),
        ({"WORLD_SIZE": None}, "RANK is '0', but WORLD_SIZE is not set"),
        ({"RANK": None}, "RANK is not set, and WORLD_SIZE is 2: several ranks need RANK, WORLD_SIZE"),
        ({"RANK": "one"}, r"RANK must be an integer from 0 to 1 \(WORLD_SIZE is 2\), got 'one'"),
        ({"RANK": "-1"}, "RANK must be an integer from 0 to 1 .*got '-1'"),
        ({"RANK": "2"}, "RANK must be an integer from 0 to 1 .*got '2'"),
        ({"RANK": "3", "WORLD_SIZE": "1"}, "RANK must be an integer from 0 to 0 .*got '3'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be an integer of at least 0, got 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be an integer of at least 0, got '-1'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR must be a host name or an IP address, without a port, got ''"),
        ({"MASTER_ADDR": "node0:29500"}, "without a port, got 'node0:29500'"),
        ({"MASTER_ADDR": "tcp://node0"}, "without a port, got 'tcp://node0'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be an integer from 1 to 65535, got 'http'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT must be an integer from 1 to 65535, got '0'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be an integer from 1 to 65535, got '65536'"),
    ],
)
def test_a_variable_without_meaning_is_one_line(changes, words, monkeypatch, capsys):
    """A script ends with exit code 1 and one line before any port is opened."""
    for name in ("LOCAL_RANK", *TWO):
        monkeypatch.delenv(name, raising=False)
    for name, value in (TWO | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "meet", lambda place: pytest.fail("met"))
    assert exits.exit_code(lambda _: pytest.fail("ran")) == 1
    with pytest.raises(UserError, match=words) as error:
        World.from_environment()
    assert capsys.readouterr().err == f"\nerror: {error.value}\n" and "\n" not in str(error.value)


def test_variables_of_torchrun_and_of_slurm():
    assert place_in({}) is None and place_in({"WORLD_SIZE": "1"}) is None
    assert place_in(TWO | {"WORLD_SIZE": "1", "MASTER_PORT": "none"}) is None
    assert place_in(TWO | {"RANK": "1"}) == Place(1, 2, 1, "127.0.0.1", 29500, False, "0")
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2", "LOCAL_RANK": "0"}
    assert place_in(TWO | agent | {"RANK": "1"}) == Place(1, 2, 0, "127.0.0.1", 29500, True, "2")
    for host in ("node-0.cluster_a.local", "::1", "fe80::1%eth0"):
        assert place_in(TWO | {"MASTER_ADDR": host}).host == host


def test_a_rank_without_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK is 2, and this rank sees 2 GPUs: start one rank per GPU"):
        World(2, 4, 2).choose_device("auto")


# Meeting


@contextmanager
def listener(answer: bytes = b""):
    """Port at which a program listens that is no store: it says `answer` to each connection, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    kept.append(connection)
                    connection.sendall(answer)
                except OSError:
                    return

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def place(rank: int, port: int, size: int = 2, host: str = "127.0.0.1") -> Place:
    return Place(rank, size, rank, host, port, False, "0")


@pytest.fixture
def hasty(monkeypatch):
    """Ranks say after 0.2 seconds whom they wait for, and give up after a second."""
    for name, seconds in {"NOTICE_S": 0.2, "MEETING_S": 1, "ANSWER_S": 1}.items():
        monkeypatch.setattr(meeting, name, seconds)


def test_a_port_in_use_is_named():
    with listener() as port, pytest.raises(UserError, match=rf"^port {port} of .* is in use: by another run") as error:
        meeting.meet(place(0, port))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "host, fault",
    [
        ("127.0.0.1", r"where nobody answers \(Connection refused\)"),
        ("no.such.host.invalid", "whose name does not resolve"),
        ("a" * 70, "which is no host name|whose name does not resolve"),
    ],
)
def test_a_rank_0_that_does_not_come_is_awaited_with_words(host, fault, hasty, capsys):
    port = free_port()
    words = rf"rank 1 of 2 has waited 1 s for rank 0 at {host}:{port} .*{fault}.* Is rank 0 running"
    with pytest.raises(UserError, match=words):
        meeting.meet(place(1, port, host=host))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rank 1 of 2 waits for rank 0 at {host}:{port}")


@pytest.mark.parametrize("said", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"])
def test_another_program_at_the_port_is_no_wait_for_ever(said, hasty):
    with listener(said) as port, pytest.raises(UserError, match=f"what listens at 127.0.0.1:{port} .*is no rank 0"):
        meeting.meet(place(1, port))


class Ranks:
    """Ranks that meet in threads of this process; what became of each: "met", its error, or its exit code."""

    def __init__(self, *places: Place) -> None:
        self.ends: list[object] = [None] * len(places)
        self.stores: list[dist.Store] = []
        threads = [threading.Thread(target=self._meet, args=pair) for pair in enumerate(places)]
        for thread in threads:
            thread.start()
            thread.join(0.3)  # one after another
        for thread in threads:
            thread.join(20)

    def _meet(self, number: int, where: Place) -> None:
        try:
            self.stores.append(meeting.meet(where))
            self.ends[number] = "met"
        except UserError as error:
            self.ends[number] = str(error)
        except SystemExit as error:
            self.ends[number] = error.code


def test_ranks_meet_and_those_that_torchrun_starts_anew_too():
    """The store of torchrun keeps what ranks of an earlier attempt have written."""
    port = free_port()
    first = Ranks(place(0, port), place(1, port))
    assert first.ends == ["met", "met"]
    again = [Place(rank, 2, rank, "127.0.0.1", port, True, "1") for rank in range(2)]
    assert Ranks(*again).ends == ["met", "met"]


def test_ranks_that_are_missing_are_named_once(hasty, capsys):
    port = free_port()
    ends = Ranks(place(0, port, 4), place(1, port, 4)).ends
    assert ends[0].startswith("rank 0 has waited 1 s for ranks 2, 3; 2 of 4 ranks are here. Start as many processes")
    assert ends[1] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 0 waits for ranks ") and line.endswith(" of 4 ranks are here")


def test_two_processes_of_one_rank_and_another_number_of_ranks():
    port = free_port()
    ends = Ranks(place(0, port, 3), place(1, port, 3), place(1, port, 3)).ends
    (message,) = (end for end in ends if end != 1)  # the others end without words
    assert message.startswith("two processes have RANK 1: ") and message.count(f"process {os.getpid()}") >= 1
    port = free_port()
    ends = Ranks(place(0, port, 2), place(1, port, 3)).ends
    assert ends[0] == 1 and "WORLD_SIZE is 3 here" in ends[1] and ends[1].endswith("and 2 on another rank")


def test_a_rank_of_another_run_does_no_harm():
    """The other run's rank 0 has ended, as the port was in use; its rank 1 finds the store of this run."""
    port = free_port()
    run = Ranks(place(0, port), place(1, port))
    (late,) = Ranks(place(1, port)).ends
    assert late.startswith("two processes have RANK 1") and "a MASTER_PORT of its own" in late
    assert run.ends == ["met", "met"] and run.stores[0].add(meeting.FAILURES, 0) == 0


# Loss of a rank


@pytest.mark.parametrize(
    "error, words",
    [
        (dist.DistNetworkError("Failed to recv, got 0 bytes."), "another rank has ended."),
        (dist.DistStoreError("wait timeout after 1800000ms, keys: /options"), "another rank does not answer"),
        (RuntimeError("[gloo/transport/tcp/x.cc:1] Timed out waiting 1800000ms for recv"), "does not answer"),
        (dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"), "has ended."),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_errors_of_torch_where_a_rank_is_lost(error, words):
    text = exits.lost_rank(error)
    assert text is None if words is None else words in text and "\n" not in text and ".cc" not in text


@pytest.mark.parametrize("error", [LostWorker("a worker"), KeyboardInterrupt(), RuntimeError("[gloo/transport] end")])
def test_the_message_names_the_checkpoint_to_go_on_from(error, monkeypatch, capsys):
    """The message names the run's directory or the resumed file, or says that there is no checkpoint yet."""

    def run(*options: str) -> str:
        given = cli.parse([*TINY, *options])
        exits.exit_code(lambda world: train.pretrain(given, world) and 0)
        return capsys.readouterr().err

    def fail(training: train.Training) -> None:
        training.save()
        raise error

    def fail_before(training: train.Training) -> None:
        raise error

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(train.Training, "begin", fail_before)
    assert run("--run.name=none").endswith("; no checkpoint was written yet\n")
    error.__notes__ = []
    monkeypatch.setattr(train.Training, "begin", fail)
    assert run("--run.name=some").endswith("; --run.resume runs/some-001 goes on from the last checkpoint\n")
    error.__notes__ = []
    monkeypatch.setattr(train.Training, "begin", fail_before)
    named = "runs/some-001/checkpoint.pt"
    assert run(f"--run.resume={named}").endswith(f"; --run.resume {named} goes on from the last checkpoint\n")


@pytest.mark.parametrize("script", ["pretrain", "knn", "linear"])
def test_torch_keeps_its_stack_to_itself(script):
    """Torch reads its log level when it is imported, so each script of several ranks sets it before."""
    program = (
        "import os, runpy, sys\n"
        "class Watch:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('TORCH_CPP_LOG_LEVEL'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch)\n"
        f"runpy.run_path({str(broken_ranks.ROOT / 'driver' / script)!r} + '.py', run_name='__main__')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert found.stdout == "ERROR\n", found.stderr


def test_a_mistake_of_the_user_has_no_such_note(monkeypatch):
    with pytest.raises(UserError) as error:
        train.pretrain(cli.parse([*TINY, "--virtual-batch=100"]))
    assert not hasattr(error.value, "__notes__")


def lines(text: str) -> list[str]:
    """Lines that are no progress bar."""
    return [line for line in text.splitlines() if line.strip() and "%|" not in line]


FAULTS = [
    (Fault("step", 1, time=2), "has ended.", "--run.resume runs/digits-001 goes on"),
    (Fault("step", 0, time=2), "has ended.", "--run.resume runs/digits-001 goes on"),
    (Fault("images", 0), "has ended.", "no checkpoint was written yet"),
    (Fault("start", 0), "has ended.", "no checkpoint was written yet"),
    (Fault("start", 1), "does not answer", "no checkpoint was written yet"),
    (Fault("evaluation", 0), "has ended.", "no checkpoint was written yet"),
    (Fault("save", 0), "has ended.", "no checkpoint was written yet"),
    (Fault("save", 0, time=2), "has ended.", "--run.resume runs/digits-001 goes on"),
    (Fault("finish", 0), "has ended.", "--run.resume runs/digits-001 goes on"),
    (Fault("step", 1, "SIGSTOP", 2), "does not answer", "--run.resume runs/digits-001 goes on"),
    (Fault("step", 0, "SIGSTOP", 2), "does not answer", "--run.resume runs/digits-001 goes on"),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault, what, how", FAULTS, ids=lambda value: getattr(value, "place", ""))
def test_the_other_rank_of_a_lost_one_says_one_line(fault, what, how):
    """Two processes; one is killed or stopped, with the store or without it."""
    ranks = broken(fault)
    survivor = ranks[1 - fault.rank]
    assert survivor.returncode == 1, survivor.stderr
    (line,) = lines(survivor.stderr)
    assert line.startswith("error: another rank ") and what in line and how in line, line
    assert ranks[fault.rank].returncode == -signal.SIGKILL


@pytest.mark.slow
def test_torchrun_starts_ranks_anew_after_one_was_killed():
    """The second attempt meets in the store of the first one, and makes a run of its own."""
    script = Path("killed.py")
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(broken_ranks.ROOT)!r})\n"
        "from driver import pretrain, train\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        "    train.Training.begin = lambda _: os.kill(os.getpid(), 9)\n"
        "sys.exit(pretrain.main())\n"
    )
    run = torchrun(2, *broken_ranks.RUN, script=script, restarts=1)
    assert run.returncode == 0 and run.stdout.count("written: ") == 1, run.stderr
    # torchrun may end the other rank of the first attempt before that rank notices.
    assert run.stderr.count("error: another rank has ended.") <= 1
    assert os.path.isdir("runs/digits-002")
