"""How a script ends: an error that is the user's to put right is said once, by one rank, without a traceback."""

import os
import sys
from collections.abc import Callable

from .config import UserError
from .world import World


def exit_code(run: Callable[[World], int], interrupted: str = "interrupted") -> int:
    """That of `run` on this rank, the first of which alone prints; 1 for a UserError, 130 for Ctrl-C."""
    world = World.from_environment()
    if not world.first:
        sys.stdout = open(os.devnull, "w")
    try:
        code = run(world)
        if not world.failed():  # else nobody waits: the others are where this rank left them
            world.end()
        return code
    except UserError as error:
        if world.first_to_fail():
            # A loader's worker wraps its error in a traceback; the user's part is the end.
            print(f"\nerror: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if world.first:
            print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except RuntimeError:
        if world.failed():  # this rank missed the one that failed, which has said why
            return 1
        raise
