"""Pretrain a vision backbone with BAM.

python driver/pretrain.py                      handwritten digits, about a minute on two cores
python driver/pretrain.py --data.root PATH     your own images
python driver/pretrain.py --help               every option
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from driver.config import UserError, parse
from driver.train import pretrain


def main(args: list[str] | None = None) -> int:
    """The exit code: 0, 1 for what the user can put right, 130 after Ctrl-C; 2 (from tyro) for a wrong option."""
    try:
        pretrain(parse(args))
    except UserError as error:
        # A loader's worker wraps its error in a traceback; the user's part is the end.
        print(f"\nerror: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; --run.resume RUN_DIR goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
