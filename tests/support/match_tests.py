"""What `match` of every GPU backend must give, against float64.

A module of tests that has a backend's kernels makes `class TestMatch(MatchTests)`, beside fixtures `kernels`, in each
of their forms, and `device`.
"""

import math

import pytest
import torch
from row_problems import MASKED, assert_close, expected_match, match_problem, representable

from bam_kernels.backends.interface import DeviceNumber, Number, Potential
from bam_kernels.layout import Layout

TAU = 0.1
STEP = 1 / 32768
# Epsilon and top-k; the latter at the larger eps alone: one-hot targets of several views tie in their mean.
EPSILONS = [(0.05, 0), (2e-3, 0), (0.05, 4)]


def on_device(p: Potential, device: torch.device) -> Potential:
    return Potential(p.exponent.to(device), p.mantissa.to(device))


def check_match(kernels, device, dimensions, epsilon: float, top_k: int) -> None:
    """P, loss, entropies, G in place of the scores and the rows' potential."""
    epsilon = representable(epsilon)
    layout, scores, col = match_problem(*dimensions, epsilon)
    P, loss, G, target_entropy, source_entropy = expected_match(layout, scores, col, epsilon, TAU, top_k)
    shape = (-1, layout.B, layout.N)
    targets = torch.empty(layout.L, layout.B, layout.N, device=device)
    row_out = Potential(*torch.empty(2, layout.B, device=device))
    kept = scores.to(device, copy=True)
    matched = kernels.match(
        kept.view(shape)[: layout.L],
        kept.view(shape),
        layout,
        on_device(col, device),
        torch.zeros(layout.L, layout.B, device=device),
        epsilon=epsilon,
        temperature=TAU,
        top_k=top_k,
        targets=targets,
        row_out=row_out,
        gradient=kept.view(shape),
    )
    assert_close(targets.cpu(), P, 1e-5, 1e-9)
    assert_close(matched.loss.cpu(), loss, 1e-6, 1e-6 * layout.B)
    assert_close(matched.target_entropy.cpu(), target_entropy, 1e-5, 1e-5)
    assert_close(matched.source_entropy.cpu(), source_entropy, 1e-5)
    assert_close(kept.cpu(), G, 0, 2e-6 * G.abs().max().item())
    x = scores[: layout.B].double().masked_fill(scores[: layout.B] <= MASKED, -math.inf) / epsilon + col.natural_log()
    assert_close(row_out.natural_log().cpu(), -torch.logsumexp(x, 1), 0, 1.5e-6)


def check_fixed_point(kernels, device, step: Number, dtype: torch.dtype, W: int) -> None:
    """int16 scores, and G in 16 bit in their place."""
    epsilon = representable(0.05)
    layout, scores, col = match_problem(3, 2, 2, 2, W, epsilon)
    fixed = kernels.quantize(scores.to(device), STEP, torch.empty(*scores.shape, dtype=torch.int16, device=device))
    rounded = torch.where(fixed.cpu() == -32768, MASKED, fixed.cpu() * STEP)
    P, loss, G, _, _ = expected_match(layout, rounded, col, epsilon, TAU, 0)
    factor = 2.0 ** (14 - math.ceil(math.log2(1 / (layout.B * TAU))))
    images = fixed.view(-1, layout.B, layout.N)
    gradient = images.view(dtype)
    targets = torch.empty(layout.L, layout.B, layout.N, device=device)
    matched = kernels.match(
        images[: layout.L],
        images,
        layout,
        on_device(col, device),
        torch.zeros(layout.L, layout.B, device=device),
        epsilon=epsilon,
        temperature=TAU,
        step=step,
        targets=targets,
        gradient=gradient,
        gradient_factor=factor,
    )
    assert_close(targets.cpu(), P, 1e-5, 1e-9)
    assert_close(matched.loss.cpu(), loss, 1e-6, 1e-6 * layout.B)
    G = G.view(images.shape)
    rounding = 2**-11 if dtype == torch.float16 else 2**-8
    assert_close(gradient.cpu().double() / factor, G, rounding, 2**-24 / factor + 2e-6 * G.abs().max().item())


def expected_match_of_image(layout: Layout, scores: torch.Tensor, col: Potential, epsilon: float, i: int):
    """The loss of one image, in float64."""
    one_image = Layout(B=1, V=layout.V, L=layout.L, T=layout.T * layout.B, D=1, W=layout.W)
    rows = scores.view(layout.V, layout.B, layout.N)[:, i]
    return expected_match(one_image, rows, col, epsilon, TAU, 0)[1]


class MatchTests:
    # V, L, B, T, W: one view; multi-crop on two ranks; more targets than two; one target, and three images.
    @pytest.mark.parametrize(
        "dimensions", [(1, 1, 2, 1, 5), (5, 2, 2, 2, 3), (4, 3, 2, 1, 5), (3, 1, 3, 3, 1)], ids=str
    )
    @pytest.mark.parametrize(("epsilon", "top_k"), EPSILONS)
    def test_match(self, kernels, device, dimensions, epsilon, top_k):
        check_match(kernels, device, dimensions, epsilon, top_k)

    # N = 12; N = 48, rows of whole vectors that do not fill their block.
    @pytest.mark.parametrize(("on_device", "W"), [(False, 3), (True, 3), (False, 12)])
    def test_fixed_point_with_a_16_bit_gradient_in_place(self, kernels, device, on_device, W):
        step = DeviceNumber(2.0, torch.tensor(STEP / 2, device=device)) if on_device else STEP
        check_fixed_point(kernels, device, step, torch.float16, W)

    def test_scores_of_a_slab_and_a_teachers_targets(self, kernels, device):
        # Images 1 and 2 of four, targets and sources in tensors of their own, the gradient of int16 scores in float32.
        epsilon = representable(0.05)
        layout, scores, col = match_problem(3, 2, 4, 1, 3, epsilon)
        _, _, G, _, _ = expected_match(layout, scores, col, epsilon, TAU, 0)
        shape, part = (-1, layout.B, layout.N), slice(1, 3)
        alone = [expected_match_of_image(layout, scores, col, epsilon, i) for i in (1, 2)]
        target, source = (scores.to(device, copy=True).view(shape) for _ in range(2))
        gradient = torch.zeros(layout.V, layout.B, layout.N, device=device)
        guess = torch.zeros(layout.L, layout.B, device=device)
        matched = kernels.match(
            target[: layout.L, part],
            source[:, part],
            layout,
            on_device(col, device),
            guess[:, part],
            epsilon=epsilon,
            temperature=TAU,
            gradient=gradient[:, part],
        )
        assert_close(matched.loss.cpu(), sum(alone), 1e-6, 1e-6)
        expected = G.view(shape).clone()
        expected[:, [0, 3]] = 0
        assert_close(gradient.cpu(), expected, 0, 2e-6 * G.abs().max().item())

    def test_targets_may_replace_their_scores(self, kernels, device):
        layout, scores, col = match_problem(2, 2, 2, 1, 6, 0.05)
        expected = expected_match(layout, scores, col, 0.05, TAU, 0)[0]
        s = scores.to(device).view(2, layout.B, layout.N)
        guess = torch.full((2, layout.B), 300.0, device=device)  # far from the row potential
        kernels.match(s, None, layout, on_device(col, device), guess, epsilon=0.05, temperature=1.0, targets=s)
        assert_close(s.cpu(), expected, 2e-5, 1e-9)

    def test_a_low_temperature_needs_no_shift(self, kernels, device):
        epsilon = representable(0.05)
        layout, scores, col = match_problem(2, 2, 2, 2, 3, epsilon)
        tau = 0.007  # 2^(1/tau) is beyond float32
        _, loss, G, _, _ = expected_match(layout, scores, col, epsilon, tau, 0)
        s = scores.to(device).view(2, layout.B, layout.N)
        guess = torch.zeros(2, layout.B, device=device)
        matched = kernels.match(
            s, s, layout, on_device(col, device), guess, epsilon=epsilon, temperature=tau, gradient=s
        )
        assert_close(matched.loss.cpu(), loss, 1e-6)
        assert_close(s.cpu().flatten(0, 1), G, 0, 2e-5 * G.abs().max().item())

    def test_top_k_breaks_ties_by_the_lower_public_column(self, kernels, device):
        # Equal scores everywhere: every column ties. T = 2 key views on W = 3 ranks, so gathered order differs from
        # public.
        layout = Layout(B=2, V=2, L=2, T=2, D=1, W=3, rank=1)
        scores = torch.full((2, 1, layout.N), 0.25, device=device)
        targets = torch.empty_like(scores)
        guess = torch.zeros(2, 1, device=device)
        kernels.match(
            scores,
            None,
            layout,
            on_device(Potential.one(layout.N), device),
            guess,
            epsilon=0.05,
            temperature=TAU,
            top_k=7,
            targets=targets,
        )
        public = layout.to_public(targets.cpu())
        assert_close(public[..., :7], torch.full((2, 1, 7), 1 / 7), 3e-7)
        assert (public[..., 7:] == 0).all()

    def test_top_k_with_some_ties_and_more_columns_than_mass(self, kernels, device):
        # Two large entries, three that tie, the others masked: k = 4 keeps the two and the first two of the ties, and
        # k = 7 all five and two masked columns of no mass.
        layout = Layout(B=1, V=1, L=1, T=1, D=1, W=12)
        scores = torch.full((1, 1, 12), MASKED)
        scores[..., [9, 2]] = 0.5
        scores[..., [11, 4, 7]] = 0.25
        for k, kept in ((4, [2, 9, 4, 7]), (7, [2, 9, 4, 7, 11])):
            targets = torch.empty(1, 1, 12, device=device)
            guess = torch.zeros(1, 1, device=device)
            kernels.match(
                scores.to(device),
                None,
                layout,
                on_device(Potential.one(12), device),
                guess,
                epsilon=0.5,
                temperature=TAU,
                top_k=k,
                targets=targets,
            )
            expected = torch.zeros(12, dtype=torch.float64)
            expected[kept] = torch.softmax(scores[0, 0, kept].double() / 0.5, 0)
            assert_close(targets.cpu()[0, 0], expected, 1e-6)

    def test_top_k_keeps_a_view_whose_kept_mass_underflows(self, kernels, device):
        # View 0 puts all its mass on columns that the mean does not keep; its kept columns are below float32's range.
        layout = Layout(B=1, V=2, L=2, T=1, D=1, W=6)
        scores = torch.tensor([[1.0, 1.0, -1.0, -1.0, -0.99, -1.0], [-1.0, -1.0, 1.0, 1.0, 0.0, 0.0]])
        epsilon = 0.01
        col = Potential(torch.tensor([-70.0, -70.0, 0.0, 0.0, 0.0, 0.0]), torch.ones(6))
        targets = torch.empty(2, 1, 6, device=device)
        guess = torch.zeros(2, 1, device=device)
        s = scores.view(2, 1, 6).to(device)
        kernels.match(
            s, None, layout, on_device(col, device), guess, epsilon=epsilon, temperature=TAU, top_k=2, targets=targets
        )
        log_P = scores.double() / epsilon + col.natural_log()
        kept = torch.softmax(log_P, 1).mean(0).sort(descending=True, stable=True).indices[:2]
        expected = torch.zeros(2, 6, dtype=torch.float64)
        expected[:, kept] = torch.softmax(log_P[:, kept], 1)
        assert_close(targets.cpu().view(2, 6), expected, 1e-4, 1e-7)

    def test_nan_is_not_lost(self, kernels, device):
        layout, scores, col = match_problem(2, 2, 3, 1, 2, 0.05)
        scores[layout.B + 1] = math.nan  # target view 1 of image 1
        s = scores.to(device).view(2, layout.B, layout.N)
        guess = torch.zeros(2, layout.B, device=device)
        G = torch.zeros_like(s)
        matched = kernels.match(
            s, s, layout, on_device(col, device), guess, epsilon=0.05, temperature=TAU, top_k=2, gradient=G
        )
        assert matched.loss.isnan() and matched.target_entropy.isnan() and matched.source_entropy.isnan()
        assert G.isnan().any(-1).any(0).tolist() == [False, True, False]
