"""Pretrain a vision backbone with BAM.

python driver/pretrain.py                      handwritten digits, about a minute on two cores
python driver/pretrain.py --data.root PATH     your own images
python driver/pretrain.py --recipe NAME        a recipe, such as cifar10-resnet18; --recipe NAME --help shows its values
python driver/pretrain.py --virtual-batch 512  a loss over 512 images, with the memory of one micro-batch
torchrun --nproc-per-node 2 driver/pretrain.py  on two ranks, each a GPU or a share of the CPU
python driver/pretrain.py --help               every option
"""

import errno
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from driver.command import parse
from driver.config import UserError
from driver.signals import STOPPED, Stopped
from driver.train import pretrain
from driver.world import World


def main(args: list[str] | None = None) -> int:
    """The exit code: 0, 1 for what the user can put right, 75 after SIGTERM or SIGUSR1, once a checkpoint is written,
    130 after Ctrl-C; 2 (from tyro) for a wrong option.
    """
    world = World.from_environment()
    if not world.first:
        sys.stdout = open(os.devnull, "w")
    try:
        pretrain(world.from_first("options", lambda: parse(args)), world)
    except UserError as error:
        if world.first_to_fail():
            # A loader's worker wraps its error in a traceback; the user's part is the end.
            print(f"\nerror: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if world.first:
            print(f"\n{stopped}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if world.first_to_fail():
            print(f"\nerror: {error}: the disk is full; a checkpoint that was written stays whole", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if world.first:
            print("\ninterrupted; --run.resume RUN_DIR goes on from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError:
        if world.failed():  # this rank missed the one that failed, which has said why
            return 1
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
