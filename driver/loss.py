"""BAM loss of a run, called before anything is written, and embeddings of a step, by which the library picks kernels.

V views of the student, R of a teacher; n images of this rank in a step, over all its micro-batches; D features.
"""

import torch
from torch import Tensor

from bam_kernels import BAMLoss

from .config import Config, Loss, UserError
from .distributed import World
from .model import Network
from .optim import Arithmetic, Schedules

TEACHER_VIEWS = 2
"""Views that a teacher sees with --model.teacher-views global."""
PATIENCE_S = 1800.0
"""Seconds that a rank waits for others, which may try GPU kernels: more than the limits of trials add up to."""


def make_loss(loss: Loss, schedules: Schedules, device: torch.device, dtype: torch.dtype, world: World) -> BAMLoss:
    """BAM loss with these options, called on two images with the epsilon of the first and of the last step.

    Raises: UserError where the loss cannot run here, so that nothing has been written yet.
    """
    try:
        bam = BAMLoss(
            temperature=loss.temperature,
            epsilon=schedules.epsilon,
            iterations=loss.iterations,
            top_k=loss.top_k,
            backend=loss.backend,
            return_stats=True,
        )
        # One rank of a machine may have tried its kernels for minutes, and NCCL waits ten for a message.
        world.meet("loss", PATIENCE_S)
        for step in (0, schedules.total):
            bam(torch.eye(4, device=device, dtype=dtype).view(2, 2, 4), step=step)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--loss: {error}") from error
    return bam


def step_embeddings(
    options: Config, network: Network, with_teacher: bool, arithmetic: Arithmetic, n: int
) -> list[Tensor]:
    """Embeddings (V, n, D) of one step, and with a teacher also (R, n, D): shapes and dtypes as in a run, no memory."""
    data, head = options.data, network.head
    with torch.no_grad(), arithmetic.context():
        embedding = head.eval()(torch.zeros_like(head[0].weight[:1]))  # its dtype depends on autocast and the norm
    head.train()
    number, D = embedding[0, 0], embedding.shape[1]
    V = data.views + data.local_views
    student = number.expand(V, n, D).requires_grad_()
    if not with_teacher:
        return [student]
    R = V if options.model.teacher_views == "all" else TEACHER_VIEWS
    return [student, number.expand(R, n, D)]
