"""Targets, loss, entropies and gradient in CUDA C++ against float64: rows on chip, over a cluster, and long ones."""

import emulated
import pytest
import torch
from cuda_device import DEVICE, empty, kernels, one, pytestmark  # noqa: F401
from match_tests import EPSILONS, STEP, TAU, MatchTests, check_fixed_point, check_match
from row_problems import made_scores

from bam_kernels.backends.cuda import launch_match
from bam_kernels.backends.interface import LOG2_E
from bam_kernels.layout import Layout


@pytest.fixture(autouse=True)
def two_images_at_once(monkeypatch) -> None:
    """So that three images with top-k are two launches where rows are long."""
    monkeypatch.setattr(launch_match, "IMAGES_AT_ONCE", 2)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


class TestMatch(MatchTests):
    # Rows of two blocks of one warp; of three, whole octets; rows enough for every stage to be used several times, with
    # octets that are cut; more source rows than a warp has lanes, an odd number, of whole octets.
    @pytest.mark.parametrize(
        "dimensions", [(3, 2, 2, 2, 131), (2, 2, 4, 2, 131), (9, 2, 2, 2, 131), (35, 2, 2, 2, 132)], ids=str
    )
    @pytest.mark.parametrize(("epsilon", "top_k"), EPSILONS)
    def test_match_over_blocks(self, kernels, device, dimensions, epsilon, top_k):  # noqa: F811
        check_match(kernels, device, dimensions, epsilon, top_k)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("W", [3, 132])  # N = 12; N = 528, rows of whole octets
    def test_fixed_point_with_other_gradients(self, kernels, device, dtype, W):  # noqa: F811
        check_fixed_point(kernels, device, STEP, dtype, W)


@pytest.mark.parametrize("hidden", [*range(8), slice(None)], ids=str)
def test_masked_scores_have_no_gradient_where_unmasked_ones_as_low_would(kernels, hidden):  # noqa: F811
    layout = Layout(B=2, V=3, L=2, T=2, D=1, W=10)
    s = torch.randint(-32767, 32768, (3, 2, layout.N), dtype=torch.int16)
    s[:, 1, 16:24][..., hidden] = -32768
    s, gradient, targets = s.to(DEVICE), empty(3, 2, layout.N), empty(2, 2, layout.N)
    options = {"epsilon": 1.0, "temperature": 1.0, "step": 3 / 32768}
    guess = torch.zeros(2, 2, device=DEVICE)
    kernels.match(s[:2], s, layout, one(layout.N), guess, **options, targets=targets, gradient=gradient)
    assert torch.equal(gradient == 0, s == -32768) and torch.equal(targets == 0, s[:2] == -32768)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the emulator runs threads in either order")
@pytest.mark.parametrize("W", [131, 132])  # octets that are cut; N = 528, rows of whole octets, which are read once
def test_no_result_depends_on_the_order_of_threads(kernels, W):  # noqa: F811
    # Source rows enough for every stage on chip to be used again by several of them.
    layout = Layout(B=2, V=9, L=2, T=2, D=1, W=W)
    scores, outcomes = made_scores(layout.M, layout.N), []
    for backwards in (False, True):
        emulated.run_threads_backwards(backwards)
        try:
            s, targets = scores.clone().view(9, 2, -1), empty(2, 2, layout.N)
            guess = torch.zeros(2, 2)
            options = {"epsilon": 0.05, "temperature": TAU, "top_k": 9}
            matched = kernels.match(s[:2], s, layout, one(layout.N), guess, **options, targets=targets, gradient=s)
            outcomes.append([s, targets, matched.loss, matched.target_entropy, matched.source_entropy])
        finally:
            emulated.run_threads_backwards(False)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_scales_are_those_of_the_other_kernels():
    # A scale that rounds differently here and in sinkhorn_pass would cost P accuracy at small eps.
    for step in (1.0, 0.7 / 32000):
        assert launch_match.number(step, DEVICE, LOG2_E / 1e-3)[0] == LOG2_E / 1e-3 * step
