"""Statistics of one evaluation of the loss, to follow training and to see collapse."""

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True)
class BAMStats:
    """Statistics of one evaluation of `bam_loss`: detached 0-d tensors; entropies and losses in nats.

    Every value is a mean over this rank's rows, except column_residual, which covers all ranks.

    target_entropy   mean over target views t < L and images i of the entropy H(P_t,i): the lower bound of the loss
    source_entropy   mean over all M rows of the entropy H(A)
    kl               loss - target_entropy
    column_residual  max_j |c_j / mean(c) - 1| of the column sums that enter the last column step, over all ranks;
                     NaN where iterations = 1
    uniform_loss     log(N - T), or log N without the mask: the loss of collapsed features
    collapse_gap     uniform_loss - loss
    """

    target_entropy: Tensor
    source_entropy: Tensor
    kl: Tensor
    column_residual: Tensor
    uniform_loss: Tensor
    collapse_gap: Tensor


# torch.export and torch.func.vmap treat BAMStats as a tuple of tensors.
_pytree.register_dataclass(BAMStats, serialized_type_name="bam_kernels.BAMStats")
