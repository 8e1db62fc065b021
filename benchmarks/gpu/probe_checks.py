"""Checks of probe.py: each compares what kernels of a GPU backend write with the result in float64.

A check takes m x n scores or m rows of n features. Operands are drawn on the CPU, so that a failure can be repeated
anywhere.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from row_problems import MASKED, expected_match, log2, made_scores, masked, match_problem, representable
from torch import Tensor

from bam_kernels import bam_loss, bam_targets, reference
from bam_kernels.backends.interface import FIXED_STEPS, HALF_UNIT, LOG2_E, Positives, Potential
from bam_kernels.engine.sums import loss_and_stats
from bam_kernels.layout import Layout

STEP = 1 / 32768  # a power of two, so that int16 and float32 scores have equally rounded scales
EPSILON, TAU = representable(0.05), 0.1
ZONE, UNTOUCHED = 64, 77  # number of guard elements on each side of an output, and their value


def poison(device: torch.device) -> None:
    """Fill memory with NaN in small and large blocks and free it: the allocator hands it out next."""
    if device.type == "cuda":
        held = [torch.full((1 << 18,), math.nan, device=device) for _ in range(32)]
        held += [torch.full((1 << 24,), math.nan, device=device) for _ in range(4)]
        del held


class Findings:
    """What a probe's kernels wrote, how far it is from the truth, and what was wrong."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.guarded: list[Tensor] = []
        self.operands: dict[str, Tensor] = {}
        self.results: list[Tensor] = []
        self.wrong: list[str] = []
        self.worst = 0.0

    def set_operands(self, **operands: Tensor) -> None:
        """Keep the operands of the checks that follow, to be saved with a wrong result."""
        self.operands = {name: x.detach().cpu() for name, x in operands.items()}

    def guarded_output(self, device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor for output, full of NaN (or 12345), between guard zones in which nothing may be written."""
        whole = torch.full((2 * ZONE + math.prod(shape),), UNTOUCHED, dtype=dtype, device=device)
        self.guarded.append(whole)
        return whole[ZONE:-ZONE].fill_(math.nan if dtype.is_floating_point else 12345).view(shape)

    def expect_form(self, expected: str, found: str) -> None:
        """Note an error if the scores do not take the form that the probe is named for."""
        if found != expected:
            print(f"  WRONG: rows in the form {found!r}, not {expected!r}")
            self.wrong.append(f"form {found}")

    def check_zones(self) -> None:
        """Note an error if a kernel has written before or past an output."""
        for whole in self.guarded:
            touched = (torch.cat((whole[:ZONE], whole[-ZONE:])) != UNTOUCHED).nonzero().flatten().tolist()
            if touched:
                places = [place - ZONE if place < ZONE else f"+{place - ZONE}" for place in touched]
                print(f"    WRONG: written outside an output of {len(whole) - 2 * ZONE} elements, at {places[:8]}")
                self.wrong.append("written outside an output")
                return

    def check(self, what: str, found: Tensor, expected: Tensor, relative: float, absolute: float = 0.0) -> None:
        """Check that every element is within relative * |expected| + absolute of `expected`; NaN never is."""
        found, expected = found.detach().cpu(), expected.detach().cpu().double()
        self.results.append(found.clone())
        error = (found.double() - expected).abs() / (relative * expected.abs() + absolute)
        error = torch.where(found.double() == expected, 0.0, error)  # equal infinities
        largest = error.max().item() if error.numel() else 0.0
        right = bool((error <= 1).all())
        norm = ((found.double() - expected).norm() / expected.norm()).item()
        print(
            f"  {what:<44} error {norm:8.1e}, largest {largest:.2g} of its bound{'' if right else '   WRONG'}",
            flush=True,
        )
        self.worst = max(self.worst, largest) if not math.isnan(largest) else math.inf
        if not right:
            self.wrong.append(what)
            where = (~(error <= 1)).nonzero()
            print(
                f"    {len(where)} of {error.numel()} elements, the first at {where[0].tolist() if len(where) else []}"
            )
            if error.numel() <= 1 << 22:
                self.save(what, found, expected)

    def save(self, what: str, found: Tensor, expected: Tensor) -> None:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        small = {name: x for name, x in self.operands.items() if x.nbytes <= 2 << 20}
        file = self.prefix.with_name(f"{self.prefix.name}-{len(self.wrong)}.pt")
        torch.save({"what": what, "found": found, "expected": expected.float(), **small}, file)


def one(n: int, device: torch.device) -> Potential:
    return Potential(torch.zeros(n, device=device), torch.ones(n, device=device))


def embed(kernels: Any, device: torch.device, m: int, d: int, findings: Findings) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = (torch.randn(m, d) * 3).to(dtype)
        findings.set_operands(x=x)
        rows = x.double()
        size = rows.norm(dim=1)
        unit = rows / size[:, None]
        on_device = x.to(device)
        read = kernels.normalize(on_device)
        findings.check(f"norms of {dtype}", read.norm, size, 1e-12)
        findings.check(f"unit rows of {dtype}", read.read, unit, 1e-6, 1e-9)
        centre = unit.mean(0).float()
        half, potential = kernels.half_rows(on_device, centre.to(device), EPSILON)
        findings.check(f"half rows of {dtype}", half.read.double() / HALF_UNIT, unit - centre, 2**-11, 1e-6)
        bias = (unit - centre) @ centre.double()
        findings.check(f"bias of {dtype}", half.bias.double() / HALF_UNIT**2, bias, 1e-6, 1e-9)
        findings.check(f"row potential of {dtype}", log2(potential), unit @ centre.double() / EPSILON * LOG2_E, 0, 2e-6)
        step = kernels.product_step(centre.to(device), half.bias, half.bias)
        largest = (half.read.double() / HALF_UNIT).norm(dim=1).max().cpu()
        bound = torch.minimum(largest * largest + half.bias.double().abs().max().cpu() / HALF_UNIT**2, largest)
        findings.check(f"step of {dtype}", step.scalar, (bound * HALF_UNIT**2 / FIXED_STEPS)[None] / step.factor, 0.01)
        gradient = torch.randn(m, d)
        g = gradient.double()
        expected = 0.25 * (g - unit * (unit * g).sum(1, keepdim=True)) / size[:, None]
        projected = kernels.project_(gradient.to(device, copy=True), half, 0.25)
        findings.check(f"projection of {dtype}", projected, expected, 1e-5, 1e-6)


def symmetrize(kernels: Any, device: torch.device, m: int, _: int, findings: Findings) -> None:
    for dtype in (torch.float32, torch.float16):
        G = torch.randn(m, m).to(dtype)
        findings.set_operands(G=G)
        on_device = G.to(device, copy=True)
        sums = kernels.symmetrize_(on_device)
        expected = G.float() + G.float().T
        findings.check(f"G + transpose(G), {dtype}", on_device, expected.to(dtype), 0, 1e-30)
        findings.check(f"column sums, {dtype}", sums, G.double().sum(0), 0, 1e-5 * m**0.5)


def columns(kernels: Any, device: torch.device, m: int, n: int, findings: Findings) -> None:
    layout = Layout(B=2, V=-(-m // 2), L=1, T=2, D=1, W=n // 4, rank=1)
    s, bias = made_scores(m, n), made_scores(1, n, 1)[0] / 4
    findings.set_operands(s=s, bias=bias)
    positives = Positives(layout, 0, layout.M)
    mask = layout.to_gathered(layout.positive_mask(layout.M))[:m]
    by_hand = kernels.mask_positives_(s.to(device), positives)
    findings.check("masked scores", by_hand, torch.where(mask, MASKED, s), 0, 1e-30)
    fixed = kernels.quantize(
        s.to(device), STEP, findings.guarded_output(device, m, n, dtype=torch.int16), positives, bias.to(device)
    )
    exact = ((s.double() + bias.double()).clamp(STEP - 1, 1 - STEP) / STEP).masked_fill(mask, -32768)
    findings.check("fixed point", fixed, exact, 0, 0.51)
    scale, row = LOG2_E / EPSILON * STEP, one(m, device)
    out = findings.guarded_output(device, m, n, dtype=torch.int16)
    shift, sums = findings.guarded_output(device, 2, n)
    kernels.finish_scores(
        s.to(device), bias.to(device), STEP, out, positives, scale, row, shift, sums, accumulate=False
    )
    findings.check("epilogue's fixed point", out, fixed.cpu(), 0, 1e-30)
    for name, scores, factor in (("int16", fixed, STEP), ("float32", by_hand, 1.0)):
        values = scores.cpu().double()
        values = torch.where(
            values == (-32768 if factor != 1.0 else values.new_tensor(MASKED)), -math.inf, values * factor
        )
        expected = torch.logsumexp(values / EPSILON, 0) * LOG2_E
        if name == "int16":
            findings.check("epilogue's column sums", shift.double() + sums.double().log2(), expected, 0, 3e-6)
        shift, sums = findings.guarded_output(device, 2, n)
        kernels.column_lse(scores, LOG2_E / EPSILON * factor, row, shift, sums, accumulate=False)
        findings.check(f"column sums of {name}", shift.double() + sums.double().log2(), expected, 0, 3e-6)
        potential = kernels.reciprocal_potential(shift, sums)
        findings.check(f"their potential, {name}", log2(potential), -expected, 0, 4e-6)


def in_both_types(
    kernels: Any, device: torch.device, s: Tensor, findings: Findings
) -> list[tuple[str, Tensor, float, Tensor]]:
    """(name, scores, value of one step, float64 scores) for float32 and int16 scores."""
    q = kernels.quantize(s.to(device), STEP, findings.guarded_output(device, *s.shape, dtype=torch.int16))
    values = q.cpu().double()
    exact = torch.where(values == -32768, -math.inf, values * STEP)
    return [("float32", s.to(device), 1.0, masked(s)), ("int16", q, STEP, exact)]


def sinkhorn_pass(kernels: Any, device: torch.device, m: int, n: int, findings: Findings) -> None:
    s = made_scores(m, n)
    s[m // 2, n - 1] = s[0, 1] = MASKED
    findings.set_operands(s=s)
    for name, scores, step, exact in in_both_types(kernels, device, s, findings):
        for epsilon in (EPSILON, representable(1e-3)):
            g = -exact.amax(0) / epsilon * LOG2_E
            col = Potential(g.floor().float().to(device), torch.exp2(g - g.floor()).float().to(device))
            row, c = one(m, device), findings.guarded_output(device, n)
            kernels.sinkhorn_pass(scores, LOG2_E / epsilon * step, row, col, c, accumulate=False)
            x = exact * LOG2_E / epsilon + log2(col).cpu()
            f = -torch.logsumexp(x / LOG2_E, 1) * LOG2_E
            findings.check(f"row potentials of {name} at {epsilon:.3g}", log2(row), f, 0, 2e-6)
            expected = torch.exp2(x + f[:, None]).sum(0)
            findings.check(f"column sums of {name} at {epsilon:.3g}", c, expected, 5e-6, 1e-9)
            at_once = Potential(*(part.clone() for part in col))
            kernels.sinkhorn_pass(
                scores, LOG2_E / epsilon * step, one(m, device), at_once, c, accumulate=False, divide=True
            )
            kernels.divide_potential_(col, c)
            findings.check(f"divided in the pass, {name} at {epsilon:.3g}", log2(at_once), log2(col), 0, 1e-30)


def match(kernels: Any, device: torch.device, images: int, n: int, findings: Findings) -> None:
    V, L, T = 3, 2, 2
    layout, scores, col = match_problem(V, L, images, T, n // (T * images), EPSILON)
    on_device = Potential(col.exponent.to(device), col.mantissa.to(device))
    shape = (V, images, layout.N)
    findings.set_operands(scores=scores, exponent=col.exponent, mantissa=col.mantissa)
    for name, s, step, exact in in_both_types(kernels, device, scores, findings):
        for top_k in (0, 7):
            if top_k and name == "int16":
                continue  # rounded scores have ties, so that the top k differ
            given = torch.where(exact == -math.inf, MASKED, exact)
            P, loss, G, target_entropy, source_entropy = expected_match(layout, given, col, EPSILON, TAU, top_k)
            kept = findings.guarded_output(device, *shape, dtype=s.dtype).copy_(s.view(shape))
            gradient, factor = kept, 1.0
            if name == "int16":
                gradient = kept.view(torch.float16)
                factor = 2.0 ** (14 - math.ceil(math.log2(1 / (layout.B * TAU))))
            targets = findings.guarded_output(device, L, images, layout.N)
            row_out = Potential(findings.guarded_output(device, images), findings.guarded_output(device, images))
            matched = kernels.match(
                kept[:L],
                kept,
                layout,
                on_device,
                torch.zeros(L, images, device=device),
                epsilon=EPSILON,
                temperature=TAU,
                step=step,
                top_k=top_k,
                targets=targets,
                row_out=row_out,
                gradient=gradient,
                gradient_factor=factor,
            )
            what = f"{name}, top-k {top_k}"
            findings.check(f"targets of {what}", targets, P, 1e-5, 1e-9)
            findings.check(f"loss of {what}", matched.loss, loss, 1e-6, 1e-6 * images)
            findings.check(f"target entropy of {what}", matched.target_entropy, target_entropy, 1e-5, 1e-5)
            findings.check(f"source entropy of {what}", matched.source_entropy, source_entropy, 1e-5)
            rounding = 2**-11 if name == "int16" else 0.0
            floor = 2e-6 * G.abs().max().item() + (2**-24 / factor if name == "int16" else 0.0)
            findings.check(f"gradient of {what}", gradient.double() / factor, G.view(shape), rounding, floor)
            x = exact[:images] / EPSILON + col.natural_log()
            findings.check(f"row potential of {what}", row_out.natural_log(), -torch.logsumexp(x, 1), 0, 2e-6)


def plan(kernels: Any, device: torch.device, m: int, n: int, findings: Findings) -> None:
    s, u, v, x = made_scores(m, n), torch.randn(m), torch.randn(n), torch.randn(m, n)
    findings.set_operands(s=s, u=u, v=v, x=x)
    row = Potential(torch.full((m,), -20.0), torch.full((m,), 1.5))
    E = torch.exp(s.double() / 0.05 + row.natural_log()[:, None])
    on_device = s.to(device), LOG2_E / 0.05, Potential(row.exponent.to(device), row.mantissa.to(device)), one(n, device)
    y, w = kernels.plan_products(*on_device, v.to(device), u.to(device))
    findings.check("E v", y, E @ v.double(), 0, 1e-5 * (E @ v.double().abs()).max().item())
    findings.check("transpose(E) u", w, E.T @ u.double(), 0, 1e-5 * (E.T @ u.double().abs()).max().item())
    left = x.to(device, copy=True)
    kernels.plan_subtract_(left, *on_device, u.to(device), v.to(device))
    findings.check("x - E (u + v)", left, x.double() - E * (u.double()[:, None] + v.double()), 1e-5, 1e-5)


def stats(kernels: Any, device: torch.device, images: int, n: int, findings: Findings) -> None:
    layout = Layout(B=images, V=3, L=2, T=2, D=1)
    given = torch.rand(3, images), 1 + torch.rand(n), torch.rand(3 * images).double()
    findings.set_operands(images=given[0], sums=given[1], norm=given[2])
    loss, statistics = kernels.loss_and_stats(*(x.to(device) for x in given), layout, 7.5)
    expected_loss, expected = loss_and_stats(given[0].double(), given[1].double(), given[2], layout, 7.5)
    findings.check("loss", loss, expected_loss, 1e-6)
    findings.check("statistics", statistics, expected, 1e-6, 1e-7)


def on_chip(kernels: Any, device: torch.device, m: int, n: int, findings: Findings) -> None:
    s = made_scores(m, n)
    s[m // 2, n - 1] = s[0, 1] = MASKED
    findings.set_operands(s=s)
    for name, scores, step, exact in in_both_types(kernels, device, s, findings):
        if not kernels.fits_on_chip(m, n, scores.dtype, device):
            print(f"  {name}: {m} x {n} does not fit on this chip")
            continue
        for iterations in (1, 2, 4):
            row = one(m, device)
            col, sums = kernels.sinkhorn(scores, LOG2_E / EPSILON * step, row, iterations)
            f, g, c = torch.zeros(m, 1).double(), -torch.logsumexp(exact / EPSILON, 0), None
            for _ in range(iterations - 1):
                f = -torch.logsumexp(exact / EPSILON + g, 1, keepdim=True)
                c = torch.exp(exact / EPSILON + f + g).sum(0)
                g = g - c.log()
            what = f"{name} after {iterations}"
            findings.check(f"column potentials of {what}", col.natural_log(), g, 0, 4e-6)
            findings.check(f"row potentials of {what}", row.natural_log(), f[:, 0], 0, 4e-6)
            if c is not None:
                findings.check(f"column sums of {what}", sums, c, 2e-5)


def _step(kernels: Any, device: torch.device, images: int, d: int, findings: Findings, **engine: str) -> None:
    """Compare loss, gradient and targets of the public functions on this backend with the float64 reference."""
    named = {"backend": kernels.backend, **engine}
    for R in (0, 2):
        z, y = torch.randn(4, images, d), torch.randn(R, images, d) if R else None
        findings.set_operands(z=z, **({"y": y} if y is not None else {}))
        for dtype, precision, bound in ((torch.float32, "exact", 2e-5), (torch.float16, "default", 2e-3)):
            student, teacher = z.to(dtype), y.to(dtype) if y is not None else None
            exact = student.double().requires_grad_()
            truth: Any = reference.bam_loss(exact, teacher.double() if teacher is not None else None)
            (dz,) = torch.autograd.grad(truth, exact)
            P = reference.bam_targets(student.double(), teacher.double() if teacher is not None else None)
            leaf = student.to(device).requires_grad_()
            on_device = teacher.to(device) if teacher is not None else None
            print(f"    bam_loss, {dtype}, R = {R} ...", flush=True)
            loss: Any = bam_loss(leaf, on_device, precision=precision, **named)
            (found_dz,) = torch.autograd.grad(loss * 1024, leaf)
            found_P = bam_targets(leaf.detach(), on_device, precision=precision, **named)
            what = f"{str(dtype).removeprefix('torch.')}, R = {R}"
            findings.check(f"loss of {what}", loss, truth, bound)
            scale = bound * dz.abs().max().item()
            findings.check(f"dz of {what}", found_dz.double() / 1024, dz, bound, scale)
            findings.check(f"P of {what}", found_P, P, 5 * bound, bound * P.max().item())


def step(kernels: Any, device: torch.device, images: int, d: int, findings: Findings) -> None:
    with_emulated_kernels(kernels, device)
    _step(kernels, device, images, d, findings, engine="slab")


def flash_step(kernels: Any, device: torch.device, images: int, d: int, findings: Findings) -> None:
    _step(kernels, device, images, d, findings, engine="flash")


def with_emulated_kernels(kernels: Any, device: torch.device) -> None:
    """Make the public functions use these CUDA kernels, and CPU tensors if the device is the CPU."""
    if kernels.backend == "cuda":
        from bam_kernels.backends import cuda

        cuda.kernels = lambda: kernels.kernels
        if device.type == "cpu":
            cuda.unavailable = lambda device: None


CHECKS: dict[str, Callable[[Any, torch.device, int, int, Findings], None]] = {
    check.__name__: check
    for check in (embed, symmetrize, columns, sinkhorn_pass, match, plan, stats, on_chip, step, flash_step)
}
