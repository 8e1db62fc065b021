"""Fixtures of the tests of trials and verdicts."""

from stand_in_gpu import gpu

__all__ = ["gpu"]
