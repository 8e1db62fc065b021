"""Weights from files: what a file is, where the backbone is in it, and whether it fits the backbone of a run."""

from .files import ORIGIN, read
from .loading import load_backbone, load_pretrained

__all__ = ["ORIGIN", "load_backbone", "load_pretrained", "read"]
