"""The authors' published loss, imported unchanged from a checkout outside this project.

The published class does not run as released: it reads an attribute that it never sets, allocates with .cuda() and
calls torch.distributed unconditionally. Attributes set from here, in memory, let it compute one process's loss.
Repository: DanielShalam/BAM.
"""

import contextlib
import importlib
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from hardware import commit_of
from problem import Problem
from torch import Tensor


class OneProcess:
    """Stands in for torch.distributed as the loss uses it: rank 0 of W ranks, with reductions left local."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, W: int) -> None:
        self.W = W

    def is_initialized(self) -> bool:
        return False

    def get_world_size(self) -> int:
        return self.W

    def get_rank(self) -> int:
        return 0

    def all_reduce(self, tensor: Tensor, op: Any = None) -> None:
        return None


def load(path: Path) -> ModuleType:
    """Import bam/bam_loss.py of the checkout, with an empty module for `diffdist`, which one process does not need."""
    absent = {} if "diffdist" in sys.modules else {"diffdist": types.ModuleType("diffdist")}
    with mock.patch.dict(sys.modules, absent), mock.patch.object(sys, "path", [str(path), *sys.path]):
        return importlib.import_module("bam.bam_loss")


class Authors:
    """The published loss for one problem, from given scores and from embeddings."""

    def __init__(self, path: Path, problem: Problem) -> None:
        self.problem = problem
        self.version = commit_of(path)
        layout, options = problem.layout, problem.options
        module = load(path)
        module.dist = OneProcess(layout.W)
        if layout.W > 1:
            module.gather_sort_tensors = lambda z, n_crops: problem.all_keys(z)
        published = module.DistillBAMLoss if layout.R else module.BAMLoss
        with contextlib.redirect_stdout(io.StringIO()):
            self.loss = published(
                n_crops=layout.V,
                n_lrg_crops=layout.L,
                n_tgt_crops=layout.T,
                ot_reg_scheduler=[options.epsilon],
                softmax_temperature=options.temperature,
                num_sinkhorn_iters=options.iterations,
                top_k=options.top_k,
            )
        self.loss.masking_fn = True if options.top_k else None
        self.loss.ot_reg = options.epsilon
        # The loss would fill this mask in a Python loop at its first step.
        self.loss.pos_mask = layout.positive_mask(layout.M, problem.student.device)

    @contextlib.contextmanager
    def _without_cuda_calls(self) -> Iterator[None]:
        """On a CPU, make Tensor.cuda() return the tensor itself."""
        if self.problem.student.device.type == "cuda":
            yield
            return
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor, **_: tensor):
            yield

    def sinkhorn(self, scores: Tensor) -> Tensor:
        """Target P (M, N) of all rows of the scores."""
        with self._without_cuda_calls():
            return self.loss._sinkhorn(scores)

    def from_scores(self, source: Tensor, target: Tensor | None) -> Tensor:
        """Loss from source scores and, with a teacher, target scores."""
        with self._without_cuda_calls():
            return self.loss.compute_loss(source) if target is None else self.loss.compute_loss(source, target)

    def whole(self, student: Tensor, teacher: Tensor | None) -> Tensor:
        """Loss from embeddings."""
        with self._without_cuda_calls():
            return self.loss(student, teacher, epoch=0)

    @contextlib.contextmanager
    def record_targets(self) -> Iterator[list[Tensor]]:
        """Collect the targets P (L*B, N) of each loss computed within the context, after any top-k selection."""
        layout, made = self.problem.layout, []
        balance = self.loss._sinkhorn

        def recording_balance(scores: Tensor) -> Tensor:
            P = balance(scores)
            kept = P[: layout.L * layout.B]
            if self.problem.options.top_k:
                kept = self.loss.keep_top_values(kept, n_crops=layout.L)
                kept = kept / kept.sum(-1, keepdim=True)
            made.append(kept.clone())
            return P

        with mock.patch.object(self.loss, "_sinkhorn", recording_balance):
            yield made
