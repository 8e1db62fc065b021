"""Balanced self-Attention Matching (BAM): the loss and its gradient as fused kernels."""

from . import reference
from .forecast import plan
from .gradient_cache import GradientCache
from .loss import BAMLoss, bam_loss, bam_targets
from .sinkhorn import sinkhorn_attention
from .stats import BAMStats

__version__ = "0.1.0"
__all__ = ["BAMLoss", "BAMStats", "GradientCache", "bam_loss", "bam_targets", "plan", "reference", "sinkhorn_attention"]
