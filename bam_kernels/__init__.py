"""Balanced self-Attention Matching (BAM), a self-supervised loss for pretraining, with its gradient in fused kernels.

bam_loss, BAMLoss    the loss as a function and as a module
bam_targets          the loss's targets, for inspection
sinkhorn_attention   the balanced attention alone
GradientCache        the loss over more images than fit in memory at once
plan                 memory, messages and time of one step, forecast
reference            these functions in plain PyTorch: the specification
BAMStats             statistics of one evaluation of the loss

Source: Shalam and Korman, "Unsupervised Representation Learning by Balanced Self Attention Matching", ECCV 2024.
"""

from . import reference
from .forecast import plan
from .gradient_cache import GradientCache
from .loss import BAMLoss, bam_loss, bam_targets
from .sinkhorn import sinkhorn_attention
from .stats import BAMStats
from .version import __version__ as __version__

__all__ = ["BAMLoss", "BAMStats", "GradientCache", "bam_loss", "bam_targets", "plan", "reference", "sinkhorn_attention"]
