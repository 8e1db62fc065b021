"""What one evaluation of the loss tells about the state of training."""

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True)
class BAMStats:
    """Detached 0-d tensors, natural logarithms. All but `column_residual` are this rank's own.

    target_entropy   mean over t < L and images of H(P_t,i): the floor of the loss
    source_entropy   mean over all M rows of H(A)
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


# torch.export and torch.func.vmap return it like a tuple of tensors.
_pytree.register_dataclass(BAMStats, serialized_type_name="bam_kernels.BAMStats")
