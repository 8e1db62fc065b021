"""How a script ends: an error that is the user's to put right is said once, by one rank, without a traceback."""

import os
import sys
from collections.abc import Callable

from .config import UserError
from .world import World


def exit_code(run: Callable[[World], int], interrupted: str = "interrupted") -> int:
    """Call `run` and return the exit code of this process: what `run` returns, 1 for a UserError, 130 for Ctrl-C.

    Only rank 0 prints to standard output; an error is printed once, by the rank that met it first. With several ranks,
    after an error on one of them, this process ends here with its exit code and does not return: see `World.abandon`.
    """
    world = World.from_environment()
    if not world.first:
        sys.stdout = open(os.devnull, "w")
    try:
        code = run(world)
        if not world.failed():
            world.end()
            return code
    except UserError as error:
        code = 1
        if world.first_to_fail():
            # A loader's worker wraps its error in a traceback; the user's part is the end.
            say(f"error: {str(error).rsplit('UserError: ', 1)[-1]}")
    except KeyboardInterrupt:
        code = 130
        if world.first:
            say(interrupted)
    except RuntimeError:
        if not world.failed():
            raise
        code = 1  # this rank missed the one that failed, which has said why
    world.abandon(code)
    return code


def say(text: str) -> None:
    """Print `text` to standard error, on a line below the progress bar.

    Text and newlines go out in one write, because several ranks may write to one terminal.
    """
    sys.stderr.write(f"\n{text}\n")
