"""Environment variables that switch something on."""

import os


def is_on(name: str) -> bool:
    """Whether an environment variable is 1; 0, empty and unset are off. Raises: ValueError naming any other value."""
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"
