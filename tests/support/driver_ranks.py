"""Runs of the driver that the same ranks make one after another: several checks for one start of the processes."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def in_turn(W: int, *runs: list[str]) -> str:
    """Let W processes make each run with its options, under the current directory; what they print."""
    from driver.verify_resume import environments_of  # not importable yet where this file is the program

    with ExitStack() as stack:  # all open at once, so that each run meets at a port of its own
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in runs]
        ports = [socket.getsockname()[1] for socket in sockets]
    command = [sys.executable, __file__, json.dumps(list(zip(ports, runs, strict=True)))]
    environments = [environment | {"OMP_NUM_THREADS": "1"} for environment in environments_of(W)]
    ranks = [subprocess.Popen(command, env=e, stdout=subprocess.PIPE, text=True) for e in environments]
    printed = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * W
    return "".join(printed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from driver.pretrain import main

    for port, options in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if code := main(options):
            sys.exit(code)
