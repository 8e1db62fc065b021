"""Pretrain a vision backbone with BAM.

python driver/pretrain.py                      the handwritten digits, about a minute on two cores
python driver/pretrain.py --data.root PATH     your own images
python driver/pretrain.py --recipe NAME        a recipe, such as cifar10-resnet18; --recipe NAME --help shows its values
python driver/pretrain.py --virtual-batch 512  a loss over 512 images, in the memory of one micro-batch
torchrun --nproc-per-node 2 driver/pretrain.py  on two ranks, each a GPU or a share of the CPU
python driver/pretrain.py --help               every option
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from driver.cli import parse
from driver.distributed import World
from driver.exits import STOPPED, Stopped, exit_code, outlive_output, say
from driver.train import pretrain


def main(args: list[str] | None = None) -> int:
    """Pretrain as the command line says, and return the exit code of this process.

    0    the run has ended as asked
    1    after an error that the user can put right
    2    after a wrong option, from tyro
    75   after SIGTERM or SIGUSR1, once a checkpoint is written
    130  after Ctrl-C
    141  where the reader of --help has gone

    A run whose standard output or standard error is lost goes on: its results are in its directory.
    """

    def run(world: World) -> int:
        try:
            options = world.from_first("options", lambda: parse(args))
            outlive_output()
            pretrain(options, world)
        except Stopped as stopped:
            if world.first:
                say(str(stopped))
            return STOPPED
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
