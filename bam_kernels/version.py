"""Version of the library, read without the rest of it: by setup tools, and by verdicts on kernels."""

__version__ = "0.1.0"
