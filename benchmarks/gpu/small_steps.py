"""Runs every kernel of a step on problems small enough for a sanitizer: `python benchmarks/gpu/small_steps.py cuda`.

Each named backend runs six problems: with and without a teacher and top-k, in 16 bit and exact, and with a memory
budget too small to keep the scores.
"""

import sys

import torch

from bam_kernels import bam_loss

PROBLEMS = (  # views, teacher's views (0: none), type of the embeddings, options
    (2, 0, torch.float16, {}),
    (4, 2, torch.float16, {"top_k": 3}),
    (2, 0, torch.float32, {"precision": "exact"}),
    (3, 2, torch.float32, {"precision": "exact", "top_k": 3}),
    (2, 0, torch.bfloat16, {"memory_budget": 4000}),
    (2, 2, torch.float16, {"target_rows": "student"}),
)


def main() -> int:
    for backend in sys.argv[1:]:
        device = "cuda" if backend in ("cuda", "triton") else "cpu"
        for V, R, dtype, options in PROBLEMS:
            student = torch.randn(V, 9, 24).to(device, dtype).requires_grad_()
            teacher = torch.randn(R, 9, 24).to(device, dtype) if R else None
            print(f"{backend}: V = {V}, R = {R}, {dtype}, {options}", flush=True)
            bam_loss(student, teacher, backend=backend, **options).backward()
            assert student.grad is not None and torch.isfinite(student.grad).all()
    print("ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
