"""Images that cannot be read: counted, named once, replaced by others; too many end the run."""

import sys
from collections.abc import Iterable

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .config import UserError
from .keyed import seed_of
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
    """Unreadable images of this rank; `share` of what it reads may be."""

    def __init__(self, source: Source, share: float, images: int) -> None:
        self.source, self.share, self.images = source, share, images
        self.named: set[int] = set()
        self.seen = self.faults = 0

    def note(self, count: int, reports: Iterable[Report]) -> None:
        """Of `count` more images. Raises: UserError where there are too many."""
        self.seen += count
        for index, fault in reports:
            self.faults += 1
            name = f"{self.source.name(index)}: not a readable image ({fault})"
            # Before as many are seen as there are, the share is of those that there are.
            if self.faults > self.share * max(self.seen, self.images):
                raise UserError(
                    f"{name}; repair or remove it. {self.faults} unreadable, a share above --data.max-unreadable "
                    f"{self.share:g} of {max(self.seen, self.images)} images"
                )
            if index not in self.named:
                self.named.add(index)
                tqdm.write(f"note: {name}; another takes its place ({len(self.named)} so far)", file=sys.stderr)
