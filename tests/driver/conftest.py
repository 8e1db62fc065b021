"""Every test of the driver writes its runs under an empty directory of its own."""

from driver_runs import elsewhere  # noqa: F401
