"""What ranks tell each other before they exchange anything: the problem, and whether one of them cannot take part.

Number, order and size of all later messages follow from the header, so ranks that agree cannot wait for each other in
vain, and ranks that do not are told what differs.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

HEADER_BYTES = 1024
FAULT_CHARACTERS = 300
SCHEDULED = ("epsilon", "temperature")


class NonFinite(ValueError):
    """Input with infinite or NaN values."""


@dataclass(frozen=True)
class Header:
    """The operation, what must be equal on all ranks, and this rank's own fault if it has one.

    non_finite: the fault is NonFinite input.
    """

    operation: str
    values: dict[str, Any]
    fault: str = ""
    non_finite: bool = False

    def encoded(self) -> bytes:
        """JSON in HEADER_BYTES bytes."""
        fault = self.fault.encode("ascii", "replace").decode()[:FAULT_CHARACTERS]
        fields = {"operation": self.operation, **self.values, "fault": fault, "non-finite": self.non_finite}
        text = json.dumps(fields, separators=(",", ":")).encode()
        assert len(text) <= HEADER_BYTES, f"header of {len(text)} bytes"
        return text.ljust(HEADER_BYTES)

    def kind(self) -> bytes:
        """What messages follow from: all but what a schedule may change at every step."""
        fixed = {key: value for key, value in self.values.items() if key not in SCHEDULED}
        return replace(self, values=fixed).encoded()

    def check(self, encoded: list[bytes]) -> None:
        """Raise what the ranks' headers tell. This rank's own fault is for the caller to raise. ValueError."""
        if (self.fault and not self.non_finite) or all(other == encoded[0] for other in encoded):
            return
        headers = [json.loads(other) for other in encoded]
        faults = [
            (header["non-finite"], rank, header["fault"]) for rank, header in enumerate(headers) if header["fault"]
        ]
        for non_finite, rank, fault in sorted(faults):  # NaN last: it need not end the run, and a fault does
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
