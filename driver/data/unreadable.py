"""Images that cannot be read: counted, named once, replaced by others; too many of a set end the run."""

import sys
from collections.abc import Iterable

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..config import UserError
from ..distributed import World
from .random_keys import seed_of
from .sources import Source

Report = tuple[int, str]
"""Number and fault of an unreadable image."""
TRIES = 100
FAULTS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def read(source: Source, numbers: list[int], place: int) -> tuple[int, Image.Image, list[Report]]:
    """Image numbers[place], or the first readable one of a sequence that follows from its number; and its fault, if
    it has one.

    Raises: UserError where none of 100 is readable.
    """
    index, reports = numbers[place], []
    for attempt in range(TRIES):
        try:
            return index, source.read(index), reports
        except FAULTS as error:
            unknown = isinstance(error, UnidentifiedImageError)  # whose text is of a file, or of an address in memory
            fault = "no format that is known" if unknown else str(error) or type(error).__name__
            reports = reports or [(index, fault)]
            index = numbers[seed_of(numbers[place], attempt) % len(numbers)]
    raise UserError(
        f"{source.name(reports[0][0])}: not a readable image ({reports[0][1]}), nor are others in its place"
    )


class Tally:
    """Unreadable images, each once however often it is met; `share` of the set's `images` may be."""

    def __init__(self, source: Source, share: float, images: int) -> None:
        self.source, self.share, self.images = source, share, images
        self.named: set[int] = set()
        self.met: dict[int, str] = {}

    def add(self, reports: Iterable[Report]) -> None:
        """Of this rank, until the next `settle`."""
        self.met.update(reports)

    def settle(self, world: World) -> None:
        """Count what all ranks have met; the first one names what is new. Raises: UserError on each, where there are
        too many.
        """
        met = {index: fault for of_rank in world.gather(self.met) for index, fault in of_rank.items()}
        self.met = {}
        for index in sorted(met.keys() - self.named):
            self.named.add(index)
            name = f"{self.source.name(index)}: not a readable image ({met[index]})"
            if len(self.named) / self.images > self.share:
                world.gather(None)  # a barrier: rank 0 has printed its notes before any rank ends the run
                raise UserError(
                    f"{name}; repair or remove it. {len(self.named)} unreadable, a share above --data.max-unreadable "
                    f"{self.share:g} of {self.images} images"
                )
            if world.first:
                tqdm.write(f"note: {name}; another takes its place ({len(self.named)} so far)", file=sys.stderr)
