"""Header that ranks compare before all other messages: the options and shapes of a call, and this rank's error.

Number, order and size of all later messages follow from the header. Ranks with equal headers therefore never wait for a
message that does not come; ranks with different headers raise an error that says what differs.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .tuned import tuning
from .ways import joined, split

HEADER_BYTES = 1024
FAULT_CHARACTERS = 300
SCHEDULED = ("epsilon", "temperature")
WAYS_FIELD, RATES_FIELD = "verified", "rates"


class NonFinite(ValueError):
    """Input with infinite or NaN values."""


def ways_header(operation: str, ways: tuple[str, ...]) -> "Header":
    """Header of a rank that chooses its backend among verified ways, sent before the header of a call."""
    return Header(operation, {"backend": "auto", WAYS_FIELD: joined(ways), RATES_FIELD: tuning().rates})


@dataclass(frozen=True)
class Header:
    """Header of one call.

    operation: name of the public function. values: options and shapes that must be equal on all ranks.
    fault: message of this rank's error, or "". non_finite: the error is NonFinite.
    """

    operation: str
    values: dict[str, Any]
    fault: str = ""
    non_finite: bool = False

    @cached_property
    def encoded(self) -> bytes:
        """The header as JSON, padded to HEADER_BYTES bytes."""
        fault = self.fault.encode("ascii", "replace").decode()[:FAULT_CHARACTERS]
        fields = {"operation": self.operation, **self.values, "fault": fault, "non-finite": self.non_finite}
        text = json.dumps(fields, separators=(",", ":")).encode()
        assert len(text) <= HEADER_BYTES, f"header of {len(text)} bytes"
        return text.ljust(HEADER_BYTES)

    @cached_property
    def kind(self) -> bytes:
        """The header without the scheduled options: it changes only when number, order or size of messages may."""
        fixed = {key: value for key, value in self.values.items() if key not in SCHEDULED}
        return replace(self, values=fixed).encoded

    def common_ways(self, encoded: list[bytes]) -> tuple[str, ...]:
        """Ways that are verified on all ranks, from `encoded`, the headers of all ranks as `ways_header` makes them.

        Ranks with different rates would choose different ways, so they get the first way alone.
        Raises: ValueError as `check`, also if a rank has named its backend and sent the header of a call.
        """
        headers = [json.loads(other) for other in encoded]
        ways, rates = ([header.pop(field, None) for header in headers] for field in (WAYS_FIELD, RATES_FIELD))
        own = {key: value for key, value in self.values.items() if key not in (WAYS_FIELD, RATES_FIELD)}
        replace(self, values=own).check([json.dumps(header).encode() for header in headers])
        common = tuple(way for way in split(ways[0]) if all(way in split(of_rank) for of_rank in ways))
        return common if all(of_rank == rates[0] for of_rank in rates) else common[:1]

    def check(self, encoded: list[bytes]) -> None:
        """Raise the first error or difference in `encoded`, the headers of all ranks in rank order.

        Returns if this rank has an error of its own, which the caller raises.
        Raises: ValueError; NonFinite if non-finite input is the only fault.
        """
        if (self.fault and not self.non_finite) or all(other == encoded[0] for other in encoded):
            return
        headers = [json.loads(other) for other in encoded]
        faults = [
            (header["non-finite"], rank, header["fault"]) for rank, header in enumerate(headers) if header["fault"]
        ]
        for non_finite, rank, fault in sorted(faults):  # NonFinite last: the caller may go on after it
            if self.fault and non_finite:
                return
            error = NonFinite if non_finite else ValueError
            raise error(f"{self.operation}: stopped because of rank {rank}, which reports: {fault}")
        for key in {key: None for header in headers for key in header}:
            by_value: dict[str, list[int]] = {}
            for rank, header in enumerate(headers):
                by_value.setdefault(repr(header.get(key)), []).append(rank)
            if len(by_value) > 1:
                differences = "; ".join(f"{value} on {_ranks_text(ranks)}" for value, ranks in by_value.items())
                raise ValueError(f"{self.operation}: ranks disagree on {key}: {differences}")


def _ranks_text(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    if len(ranks) > 4:
        return f"ranks {shown} and {len(ranks) - 4} more"
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
