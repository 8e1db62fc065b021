"""Weights from files: what a file is, where the backbone is in it, and whether it fits the backbone of a run."""

from .checksums import save
from .files import read
from .loading import load_backbone, load_pretrained

__all__ = ["load_backbone", "load_pretrained", "read", "save"]
