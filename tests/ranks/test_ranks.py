"""W ranks, as threads, against one process that holds all images; one rank alone; what ranks tell each other.

Real processes are in test_process_groups.py.
"""

import re

import pytest
import torch
from problems import FLOAT32, FLOAT64, GOLDEN_FILES, assert_close, features, load, needs_cpu_kernels
from row_problems import EMPTY
from torch import Tensor

from bam_kernels import bam_loss, bam_targets, reference, sinkhorn_attention
from bam_kernels.backends import cpu
from bam_kernels.engine import slab
from bam_kernels.header import HEADER_BYTES, Header
from bam_kernels.layout import Layout
from bam_kernels.options import Options
from bam_kernels.ranks import ONE_RANK
from bam_kernels.simulated import SimulatedRanks, ThreadRanks, run_ranks

BACKENDS = [
    pytest.param("reference", torch.float64, 1e-12, id="reference-float64"),
    pytest.param("reference", torch.float32, 1e-5, id="reference-float32"),
    pytest.param("cpu", torch.float32, 1e-5, id="cpu-float32", marks=needs_cpu_kernels),
]

# Views V, teacher views R, options; what each reaches is in its name.
CASES = {
    "no teacher": (2, 0, {}),
    "one view": (1, 0, {}),
    "local crops": (5, 0, {"key_views": 1}),
    "targets and keys differ": (4, 0, {"target_views": 1, "key_views": 3}),
    "teacher": (2, 2, {}),
    "teacher and local crops": (4, 2, {"key_views": 1}),
    "student's rows": (3, 2, {"target_rows": "student"}),
    "top-k over ranks": (2, 0, {"top_k": 5}),
    "no mask": (2, 0, {"mask_positives": False}),
    "least epsilon": (2, 0, {"epsilon": 1e-3}),
    "one iteration": (2, 2, {"iterations": 1}),
    "regather": (3, 0, {"regather": True}),
    "regather with a teacher": (3, 2, {"regather": True}),
    "slabs": (3, 0, {"memory_budget": 3000}),
    "slabs with a teacher": (3, 2, {"memory_budget": 5000}),
    "kept targets, slabs of source": (3, 2, {"memory_budget": 9000}),
}


def share(x: Tensor | None, group: ThreadRanks) -> Tensor | None:
    """The images of one rank."""
    return None if x is None else x.chunk(group.W, dim=1)[group.rank].contiguous()


def on_ranks(W: int, student: Tensor, teacher: Tensor | None, **options):
    """Mean loss, gradient of all ranks / W, targets and statistics of every rank."""

    def run(group: ThreadRanks):
        leaf = share(student, group).requires_grad_()
        loss, stats = bam_loss(leaf, share(teacher, group), group=group, return_stats=True, **options)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad, bam_targets(leaf.detach(), share(teacher, group), group=group, **options), stats

    losses, grads, targets, stats = zip(*run_ranks(W, run), strict=True)
    L = len(targets[0]) * W // student.shape[1]
    P = torch.cat([target.unflatten(0, (L, -1)) for target in targets], dim=1).flatten(0, 1)
    return torch.stack(losses).mean(), torch.cat(grads, dim=1) / W, P, stats


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend,dtype,bound", BACKENDS)
@pytest.mark.parametrize("W", [2, 4])
def test_ranks_equal_one_process(W, backend, dtype, bound, case):
    V, R, options = CASES[case]
    options = {"precision": "exact", "backend": backend} | options
    student = features(V, 12, 9, cosine=0.5).to(dtype)
    teacher = features(R, 12, 9, cosine=0.5, seed=1).to(dtype) if R else None
    loss, grad, P, stats = on_ranks(W, student, teacher, **options)

    leaf = student.clone().requires_grad_()
    expected, one = bam_loss(leaf, teacher, return_stats=True, **options)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    looser = 10 if options.get("epsilon") == 1e-3 else 1  # targets there are a hundred times as sensitive to scores
    assert_close(loss, expected.detach().double(), bound * expected.item())
    assert_close(grad, expected_grad.double(), looser * bound * expected_grad.abs().max().item())
    assert_close(P, bam_targets(student, teacher, **options).double(), 10 * looser * bound)
    for name in ("target_entropy", "source_entropy", "kl", "collapse_gap"):
        mean = torch.stack([getattr(rank, name) for rank in stats]).double().mean()
        assert_close(mean, getattr(one, name).double(), looser * bound * 10)
    for rank in stats:
        if options.get("iterations") == 1:
            assert rank.column_residual.isnan()
        else:
            assert_close(rank.column_residual, one.column_residual.double(), looser * bound * 100)
        assert rank.uniform_loss == one.uniform_loss


@pytest.mark.parametrize("path", [p for p in GOLDEN_FILES if not p.stem.endswith("w1")], ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu_kernels)])
def test_golden_files_on_their_ranks(path, backend):
    problem = load(path)
    W = int(path.stem[-1])
    tolerance, dtype = (FLOAT64, torch.float64) if backend == "reference" else (FLOAT32, torch.float32)
    teacher = problem.teacher.to(dtype) if problem.teacher is not None else None
    options = {"backend": backend, "precision": "exact"} | problem.options
    loss, grad, P, _ = on_ranks(W, problem.student.to(dtype), teacher, **options)
    problem.check_loss(loss, tolerance)
    problem.check_grad(grad, tolerance)
    problem.check_target(P, tolerance)


@pytest.mark.parametrize("backend,dtype,bound", BACKENDS)
@pytest.mark.parametrize("mask,views,key_views", [("none", 1, None), ("self", 1, None), ("block", 3, 2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_attention_of_ranks(normalize, mask, views, key_views, backend, dtype, bound):
    W, options = 3, {"mask": mask, "views": views, "key_views": key_views, "normalize": normalize, "epsilon": 0.3}
    options |= {"backend": backend, "precision": "exact"}
    q = features(views, 12, 7).to(dtype)
    k = features(2, 12, 7, seed=1).to(dtype) if mask == "block" else None

    def run(group: ThreadRanks):
        own = share(q, group).flatten(0, 1), share(k, group).flatten(0, 1) if k is not None else None
        plan = sinkhorn_attention(*own, group=group, **options)
        return plan, *sinkhorn_attention(*own, group=group, output="potentials", **options)

    plans, fs, gs = zip(*run_ranks(W, run), strict=True)
    whole = q.flatten(0, 1), k.flatten(0, 1) if k is not None else None
    expected = sinkhorn_attention(*whole, **options)
    f, g = sinkhorn_attention(*whole, output="potentials", **options)
    P = torch.cat([plan.unflatten(0, (views, -1)) for plan in plans], dim=1).flatten(0, 1)
    assert_close(P, expected.double(), 10 * bound)
    assert_close(torch.cat([x.view(views, -1) for x in fs], 1).flatten(), f.double(), 100 * bound)
    for column_potential in gs:
        assert_close(column_potential, g.double(), 100 * bound)


@needs_cpu_kernels
@pytest.mark.parametrize("epsilon", [0.05, 0.0])  # sums as multiples of one number for all columns, or of each its own
def test_column_potential_of_all_ranks(epsilon):
    """Sums of one size, of other sizes, empty on one rank, empty on all."""
    shift = torch.tensor([[3.0, -20.0, EMPTY, EMPTY], [3.0, 28.0, 5.0, EMPTY]])
    sums = torch.tensor([[1.5, 1.0, 0.0, 0.0], [1.25, 1.75, 1.5, 0.0]])

    def run(group: ThreadRanks):
        return slab._column_potential(
            cpu.kernels(), shift[group.rank].clone(), sums[group.rank].clone(), epsilon, group, None
        )

    for col in run_ranks(2, run):
        assert col.exponent[3] == 0 and col.mantissa[3] == 1
        found = torch.exp2(col.exponent.double()) * col.mantissa
        expected = 1 / (sums * torch.exp2(shift.double())).sum(0)
        assert_close(found[:3], expected[:3], 2e-7)


def test_attention_of_ranks_has_no_gradient():
    def run(group: ThreadRanks):
        return sinkhorn_attention(features(1, 4, 3)[0], group=group, differentiable=True)

    with pytest.raises(NotImplementedError, match="differentiable=True is for one rank, the process group has 2"):
        run_ranks(2, run)


@needs_cpu_kernels
def test_one_image_per_rank():
    """No row of a rank attends to any of the rank's own keys: they have no local column sum."""
    student = features(3, 4, 6)
    loss, grad, _, _ = on_ranks(4, student, None, precision="exact")
    leaf = student.clone().requires_grad_()
    expected = bam_loss(leaf, precision="exact")
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    assert_close(loss, expected.item(), 1e-6)
    assert_close(grad, expected_grad.double(), 1e-6)


@needs_cpu_kernels
def test_repeats_are_equal_bit_for_bit():
    student, teacher = features(3, 12, 9), features(2, 12, 9, seed=1)
    for y in (None, teacher):
        first, second = (on_ranks(3, student, y, precision="exact") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@needs_cpu_kernels
@pytest.mark.parametrize("R,regather", [(0, False), (2, False), (2, True)])
def test_one_rank_alone(R, regather):
    """Simulated: the other ranks' keys are given, columns are summed over the rank's own rows."""
    W, V, B, D = 3, 3, 4, 8
    student, teacher = features(V, W * B, D).double(), features(R, W * B, D, seed=1).double() if R else None
    keys = torch.nn.functional.normalize((student if teacher is None else teacher)[:2], dim=-1)
    gathered = keys.unflatten(1, (W, B)).transpose(0, 1).reshape(-1, D)
    own = slice(B, 2 * B)
    results = []
    for dtype in (torch.float64, torch.float32):
        group = SimulatedRanks(W, 1, gathered.to(dtype))
        leaf = student[:, own].to(dtype).requires_grad_()
        y = teacher[:, own].to(dtype) if teacher is not None else None
        loss = bam_loss(leaf, y, group=group, regather=regather, precision="exact")
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert_close(results[1][0], results[0][0], 1e-5)
    assert_close(results[1][1], results[0][1], 1e-5)


def test_what_simulated_ranks_send_can_be_kept():
    made = []

    def as_sent(unit: Tensor) -> Tensor:
        made.append(len(unit))
        return 2 * unit

    keys, own = torch.arange(16.0).view(8, 2), torch.ones(2, 2)
    # Block by block as ranks would send; what is kept in the fewest blocks.
    for keep_sent, calls, blocks in ((False, 6, [(2, 2), (0, 2), (6, 2), (4, 2)]), (True, 3, [(2, 2), (0, 2), (4, 4)])):
        group = SimulatedRanks(4, 1, keys, keep_sent=keep_sent)
        first, second = ([(row, block.clone()) for row, block in group.gather(own, as_sent)] for _ in range(2))
        assert [(row, len(block)) for row, block in first] == [(row, len(block)) for row, block in second] == blocks
        for (row, block), (_, again) in zip(first, second, strict=True):
            expected = own if row == 2 else 2 * keys[row : row + len(block)]
            assert torch.equal(block, again) and torch.equal(block, expected)
        assert len(made) == calls
        made.clear()


@pytest.mark.parametrize("backend,dtype,tolerance", BACKENDS)
@pytest.mark.parametrize("R,regather", [(0, False), (2, False), (2, True)])
def test_kept_blocks_give_the_same_loss_and_gradient(R, regather, backend, dtype, tolerance):
    """Rank 1 of 4, at the first call, which keeps what ranks send, and at the second, which takes it."""
    W, V, B, D = 4, 3, 4, 8
    student, teacher = features(V, B, D).to(dtype), features(R, B, D, seed=1).to(dtype) if R else None
    keys = torch.nn.functional.normalize(features(1, W * 2 * B, D, seed=2)[0], dim=-1).to(dtype)
    results = []
    for keep_sent in (False, True):
        group = SimulatedRanks(W, 1, keys, keep_sent=keep_sent)
        for _ in range(1 + keep_sent):
            leaf = student.clone().requires_grad_()
            options = {"regather": regather, "backend": backend, "precision": "exact", "key_views": 2}
            loss = bam_loss(leaf, teacher, group=group, **options)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    (expected_loss, expected_gradient), *kept = results
    for loss, gradient in kept:
        assert_close(loss, expected_loss, tolerance)
        assert_close(gradient, expected_gradient, tolerance)


def test_bad_simulation():
    with pytest.raises(ValueError, match=r"keys has 7 rows, not a multiple of W=2"):
        SimulatedRanks(2, 0, torch.ones(7, 3))
    with pytest.raises(ValueError, match=r"rank=2 must be at least 0 and below W=2"):
        SimulatedRanks(2, 2, torch.ones(8, 3))
    with pytest.raises(ValueError, match=re.escape("keys is (8, 3), must be W times (6, 3), W=2")):
        bam_loss(features(2, 3, 3), group=SimulatedRanks(2, 0, torch.ones(8, 3)), backend="reference")


def different(group: ThreadRanks, what: str):
    """Rank 1 of a group brings another problem than the rest."""
    odd = group.rank == 1
    z = features(2, 3 if odd and what == "B" else 4, 5 if odd and what == "D" else 6)
    if odd and what == "dtype":
        z = z.double()
    if odd and what == "NaN":
        z[1, 2, 0] = float("nan")
    teacher = features(2, 4, 6, seed=1) if odd and what == "teacher" else None
    options = {"epsilon": 0.04} if odd and what == "epsilon" else {}
    if odd and what == "argument":
        options = {"top_k": -1}
    z.requires_grad_(not (odd and what == "needs_grad"))
    return bam_loss(z, teacher, group=group, backend="reference", **options)


@pytest.mark.parametrize(
    "what,words",
    [
        ("B", "ranks disagree on B: 4 on ranks 0, 2; 3 on rank 1"),
        ("D", "ranks disagree on D: 6 on ranks 0, 2; 5 on rank 1"),
        ("dtype", "ranks disagree on student's type: 'torch.float32' on ranks 0, 2; 'torch.float64' on rank 1"),
        ("teacher", "ranks disagree on R: 0 on ranks 0, 2; 2 on rank 1"),
        ("epsilon", "ranks disagree on epsilon: 0.05 on ranks 0, 2; 0.04 on rank 1"),
        ("needs_grad", "ranks disagree on needs_grad: True on ranks 0, 2; False on rank 1"),
        ("NaN", "stopped because of rank 1, which reports: bam_loss: student has 1 row(s) with non-finite values"),
        ("argument", "stopped because of rank 1, which reports: bam_loss: top_k must be at least 0, got -1"),
    ],
)
def test_ranks_that_differ_are_told(what, words):
    """Every rank ends with an error that names the cause; the one at fault with its own."""

    def run(group: ThreadRanks) -> str:
        with pytest.raises(ValueError) as raised:
            different(group, what)
        return str(raised.value)

    messages = run_ranks(3, run)
    assert words in messages[0] and words in messages[2], messages
    cause = words.removeprefix("stopped because of rank 1, which reports: ")
    assert cause in messages[1] and "stopped because" not in messages[1], messages


def test_header_says_which_ranks():
    def header(epsilon: float) -> Header:
        return Header("bam_loss", {"epsilon": epsilon})

    encoded = [header(0.1 if rank < 6 else 0.2).encoded for rank in range(7)]
    with pytest.raises(ValueError, match=r"epsilon: 0.1 on ranks 0, 1, 2, 3 and 2 more; 0.2 on rank 6"):
        header(0.1).check(encoded)
    assert all(len(text) == HEADER_BYTES for text in encoded)
    header(0.1).check(encoded[:6])


def test_a_schedule_makes_no_new_kind_of_header():
    """GPUs wait for the others' headers once a kind: epsilon may move as long as the messages stay what they are."""

    def kind(**given) -> bytes:
        options = Options(**given)
        return Header(
            "bam_loss", options.header(Layout(B=2, V=2, L=2, T=2, D=3), torch.empty(0), None, "triton", True)
        ).kind

    assert kind(epsilon=0.05) == kind(epsilon=0.02) == kind(epsilon=0.05, temperature=0.2)
    assert kind(epsilon=0.05) != kind(epsilon=0.001)  # one sum no longer holds the columns' range
    assert kind(epsilon=0.05) != kind(epsilon=0.05, iterations=4)
    fault = Header("bam_loss", {"epsilon": 0.05}, "not finite").kind
    assert fault != Header("bam_loss", {"epsilon": 0.05}).kind


def test_header_holds_the_longest_fault():
    text = Header("sinkhorn_attention", {f"option {i}": 1e-300 for i in range(18)}, "é" * 5000).encoded
    assert len(text) == HEADER_BYTES


def test_errors_of_ranks_reach_the_caller():
    def run(group: ThreadRanks):
        if group.rank == 1:
            raise KeyError("rank 1 went wrong")
        return bam_loss(features(2, 4, 6), group=group, backend="reference")

    with pytest.raises(KeyError, match="rank 1 went wrong"):
        run_ranks(2, run)


def test_group_of_one_is_no_group():
    z = features(2, 5, 4)
    assert bam_loss(z, group=ONE_RANK).item() == bam_loss(z).item() == run_ranks(1, lambda g: bam_loss(z, group=g))[0]
    assert reference.bam_loss(z, group=ONE_RANK).item() == reference.bam_loss(z).item()
