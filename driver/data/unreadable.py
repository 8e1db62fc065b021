"""Images that cannot be read: each is named once and replaced by another image; too many of them end the run."""

import errno
import re
import sys
from collections.abc import Iterable

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..config import UserError
from ..distributed import World
from .images import Source
from .random_keys import seed_of

Report = tuple[int, str]
"""Index of an unreadable image, and the fault found in it."""
TRIES = 100
FEW = 10
"""Unreadable images from which their share counts."""
FEW_SHARE = 0.25
"""Share of the images up to which fewer unreadable ones than FEW are no error."""
LONGEST = 300
"""Characters of an error's text that are shown."""
TOO_MANY_FILES = "too many open files: raise the limit (ulimit -n 4096), or take fewer --data.workers"


def read(source: Source, indices: list[int], place: int) -> tuple[int, Image.Image | Tensor, list[Report]]:
    """Read image indices[place]: its index, its pixels, and a report of its fault if it is unreadable.

    Another image takes the place of an unreadable one. Its choice among `indices` follows from the unreadable index.
    Raises: UserError where none of 100 images is readable, or the process may open no more files.
    """
    index, reports = indices[place], []
    for attempt in range(TRIES):
        try:
            return index, source.read(index), reports
        except UserError:
            raise
        except Exception as error:  # on damaged files, decoders raise nearly anything
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # a fault of this process, not the image
                raise UserError(TOO_MANY_FILES) from error
            reports = reports or [(index, fault_of(error))]
            index = indices[seed_of(indices[place], attempt) % len(indices)]
    raise UserError(
        f"{source.name(reports[0][0])}: not a readable image ({reports[0][1]}), nor are others in its place"
    )


def fault_of(error: Exception) -> str:
    """The fault of an unreadable image in one line, without addresses in memory."""
    text = re.sub(r"<([\w.]+)( object)? at 0x[0-9a-fA-F]+>", r"\1", str(error))
    if not isinstance(error, (OSError, ValueError, SyntaxError)):
        text = f"{type(error).__name__} {text}".rstrip()  # e.g. the text of a KeyError is a key alone
    return " ".join(text.split())[:LONGEST] or type(error).__name__


class Tally:
    """Counts a source's unreadable images, each once however often it is met, up to a share of all its images.

    The share counts from FEW images on: in a small set a single one may be above it. Fewer are too many above
    FEW_SHARE of the images, or where the share is 0.
    """

    def __init__(self, source: Source, share: float) -> None:
        self.source, self.share, self.images = source, share, len(source.train) + len(source.test)
        self.named: set[int] = set()
        self.met: dict[int, str] = {}

    def add(self, reports: Iterable[Report]) -> None:
        """Note what this rank has met, until the next `settle`."""
        self.met.update(reports)

    def settle(self, world: World) -> None:
        """Count what all ranks have met since the last call; rank 0 names the new images.

        Raises: UserError on every rank where there are too many.
        """
        met = {index: fault for rank_met in world.gather(self.met) for index, fault in rank_met.items()}
        self.met = {}
        for index in sorted(met.keys() - self.named):
            self.named.add(index)
            name = f"{self.source.name(index)}: not a readable image ({met[index]})"
            if self._too_many():
                world.gather(None)  # a barrier: rank 0 has printed its notes before any rank ends the run
                raise UserError(
                    f"{name}; repair or remove it. {len(self.named)} unreadable, a share above --data.max-unreadable "
                    f"{self.share:g} of {self.images} images"
                )
            if world.first:
                tqdm.write(f"note: {name}; another takes its place ({len(self.named)} so far)", file=sys.stderr)

    def _too_many(self) -> bool:
        count = len(self.named)
        few = 0 < self.share and count < FEW and count <= FEW_SHARE * self.images
        return count / self.images > self.share and not few
