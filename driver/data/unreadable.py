"""Images that cannot be read: each is named once and replaced by another image; too many of them end the run."""

import errno
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from ..config import UserError
from ..distributed import World
from ..exits import lacks_memory
from ..messages.text import printable
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
MEMORY = "take fewer --data.workers or a smaller --data.batch-size, or ask for more memory"
"""What to do where memory is short."""
TOO_LITTLE = f"too little memory for it; scale it down if it is large, else {MEMORY}"
TOO_MANY_FILES = "too many open files: raise the limit (ulimit -n 4096), or take fewer --data.workers"


def read(
    source: Source, indices: list[int], place: int, transform: Callable[[Any], Any]
) -> tuple[int, Any, list[Report]]:
    """Read image indices[place]: its index, what `transform` makes of it, and a report of its fault if unreadable.

    Another image takes the place of an unreadable one. Its choice among `indices` follows from the unreadable index.
    An image for which memory is too little is unreadable; where it is too little for two of them, the process is short.
    Raises: UserError where none of 100 images is readable, or the process has no more memory or may open no more files.
    """
    index, reports = indices[place], []
    short: list[int] = []  # images for which memory was too little
    for attempt in range(TRIES):
        try:
            image = source.read(index)
        except UserError:
            raise
        except Exception as error:  # on damaged files, decoders raise nearly anything
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # a fault of this process, not the image
                raise UserError(TOO_MANY_FILES) from error
            fault, lacks = fault_of(error), lacks_memory(error)
        else:
            try:
                return index, transform(image), reports
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                fault, lacks = TOO_LITTLE, True
        reports = reports or [(index, fault)]
        if lacks and index not in short:
            short.append(index)
        if len(short) > 1:
            first, second = map(source.name, short)
            raise UserError(f"too little memory to read {first} and, in its place, {second}: {MEMORY}")
        index = indices[seed_of(indices[place], attempt) % len(indices)]
    raise UserError(
        f"{source.name(reports[0][0])}: not a readable image ({reports[0][1]}), nor are others in its place"
    )


def fault_of(error: Exception) -> str:
    """The fault of an unreadable image in one line, without addresses in memory."""
    if lacks_memory(error):
        return TOO_LITTLE
    text = re.sub(r"<([\w.]+)( object)? at 0x[0-9a-fA-F]+>", r"\1", str(error))
    if not isinstance(error, (OSError, ValueError, SyntaxError)):
        text = f"{type(error).__name__} {text}".rstrip()  # e.g. the text of a KeyError is a key alone
    return printable(" ".join(text.split())[:LONGEST], None) or type(error).__name__


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
