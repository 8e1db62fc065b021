"""What only a GPU can show of BAMLoss(cuda_graph=True): the same numbers as without, from replays of real graphs."""

import warnings

import pytest
import torch
from problems import features

from bam_kernels import BAMLoss
from bam_kernels.backends import cuda, triton
from bam_kernels.graphs import StepGraphs

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
reason = triton.unavailable(torch.device("cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    pytest.mark.skipif(torch.version.hip is not None, reason="no graphs on ROCm"),
]
without_cuda = cuda.unavailable(torch.device("cuda"))
WAYS = (
    pytest.param({"backend": "triton", "engine": "slab"}, id="triton slab"),
    pytest.param({"backend": "triton", "engine": "flash"}, id="triton flash"),
    pytest.param(
        {"backend": "cuda", "engine": "slab"},
        id="cuda slab",
        marks=pytest.mark.skipif(without_cuda is not None, reason=str(without_cuda)),
    ),
)
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def replays(monkeypatch) -> list[None]:
    """Grows by one with each replay. A warning, of a step without a graph, is an error."""
    counted, replay = [], torch.cuda.CUDAGraph.replay

    def noted(graph) -> None:
        counted.append(None)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BAMLoss")
        yield counted


def embeddings(seed: int, views: int = 2, images: int = 96, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return features(views, images, 64, seed=seed).to("cuda", dtype)


def numbers(criterion: BAMLoss, student: torch.Tensor, teacher=None, step=None) -> list[torch.Tensor]:
    """Loss, statistics and gradient; criterion has return_stats."""
    leaf = student.detach().requires_grad_()
    loss, stats = criterion(leaf, teacher, step)
    (grad,) = torch.autograd.grad(loss, leaf)
    return [loss.detach(), *stats, grad]


def equal(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_way
def test_several_shapes_teachers_and_types(way, replays):
    graphed, plain = (BAMLoss(return_stats=True, cuda_graph=chosen, **way) for chosen in (True, False))
    for seed in range(5):
        for views, images, dtype in ((2, 96, torch.float16), (4, 65, torch.float16), (2, 96, torch.float32)):
            student = embeddings(seed, views, images, dtype)
            for teacher in (None, embeddings(10 + seed, 2, images, dtype)):
                assert equal(numbers(graphed, student, teacher), numbers(plain, student, teacher))
    assert len(replays) == 3 * 6


@each_way
def test_other_strides(way, replays):
    graphed, plain = (BAMLoss(return_stats=True, cuda_graph=chosen, **way) for chosen in (True, False))
    wide = torch.cat([embeddings(0), embeddings(1)], dim=-1)
    for student in (embeddings(2), embeddings(3), wide[..., :64], wide[..., 64:]):
        assert equal(numbers(graphed, student), numbers(plain, student.contiguous()))
    assert len(replays) == 2


@each_way
def test_forward_passes_before_their_backward_passes(way, replays):
    graphed, plain = (BAMLoss(cuda_graph=chosen, **way) for chosen in (True, False))
    leaves = [embeddings(seed).requires_grad_() for seed in range(5)]
    losses = [graphed(leaf) for leaf in leaves]
    for leaf, loss in zip(leaves, losses, strict=True):
        found = torch.autograd.grad(loss, leaf)
        expected = plain(leaf)
        assert torch.equal(loss, expected) and equal(found, torch.autograd.grad(expected, leaf))
    assert len(replays) == 3


@each_way
def test_without_gradient_beside_with(way, replays):
    graphed, plain = (BAMLoss(return_stats=True, cuda_graph=chosen, **way) for chosen in (True, False))
    for seed in range(4):
        student = embeddings(seed)
        with torch.inference_mode():
            assert torch.equal(graphed(student)[0], plain(student)[0])
        assert equal(numbers(graphed, student), numbers(plain, student))
    assert len(replays) == 4


@each_way
def test_options_that_change(way, replays, matmul_precision):
    """A schedule of epsilon, an attribute, and torch's flag of float32 products."""
    graphed, plain = (
        BAMLoss(epsilon=lambda step: 0.05 if step < 4 else 0.1, return_stats=True, cuda_graph=chosen, **way)
        for chosen in (True, False)
    )
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for step in range(8):
            student = embeddings(step, dtype=torch.float32)
            assert equal(numbers(graphed, student, step=step), numbers(plain, student, step=step))
    assert len(replays) == 8
    for criterion in (graphed, plain):
        criterion.epsilon = 0.2
    for seed in range(4):
        assert equal(numbers(graphed, embeddings(seed)), numbers(plain, embeddings(seed)))
    assert len(replays) == 10


@each_way
def test_in_the_users_own_capture(way, replays):
    graphed, plain = (BAMLoss(return_stats=True, cuda_graph=chosen, **way) for chosen in (True, False))
    student = embeddings(0)
    for _ in range(3):
        numbers(graphed, student)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = numbers(graphed, student)
    assert len(replays) == 1
    for seed in (1, 2):
        student.copy_(embeddings(seed))
        graph.replay()
        assert equal(found, numbers(plain, student))


@each_way
def test_on_side_streams(way, replays, monkeypatch):
    graphed, plain = (BAMLoss(return_stats=True, cuda_graph=chosen, **way) for chosen in (True, False))
    students = [embeddings(seed) for seed in range(6)]
    expected = [numbers(plain, student) for student in students]
    for i in (0, 1):
        assert equal(numbers(graphed, students[i]), expected[i])
    replay = torch.cuda.CUDAGraph.replay

    def late(graph) -> None:
        """Results are copied out late: a replay on another stream that did not wait would overwrite them."""
        replay(graph)
        torch.cuda._sleep(20_000_000)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", late)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    torch.cuda.synchronize()
    found = []
    for student, stream in zip(students[2:], streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(numbers(graphed, student))
    torch.cuda.synchronize()
    assert all(equal(a, b) for a, b in zip(found, expected[2:], strict=True))
    assert len(replays) == 4


@each_way
def test_a_replay_does_not_wait_for_the_device(way, replays):
    graphed = BAMLoss(return_stats=True, cuda_graph=True, **way)
    student = embeddings(0)
    for _ in range(3):
        expected = numbers(graphed, student)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = numbers(graphed, student)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(found, expected) and len(replays) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@each_way
def test_two_devices_in_turn(way, replays):
    graphed, plain = (BAMLoss(return_stats=True, cuda_graph=chosen, **way) for chosen in (True, False))
    for seed in range(4):
        for device in ("cuda:0", "cuda:1"):
            student = embeddings(seed).to(device)
            found = numbers(graphed, student)
            assert found[-1].device == student.device and equal(found, numbers(plain, student))
    assert len(replays) == 4


@pytest.mark.parametrize("spoils", [False, True])
def test_after_a_capture_that_failed(spoils, replays):
    """An error of Python's, or a wait for the device, which spoils the capture: torch can capture again."""

    def step(student, teacher):
        if torch.cuda.is_current_stream_capturing():
            if not spoils:
                raise ValueError("no capture of this")
            student.sum().item()
        return student.sum(), student.new_ones(6), student * 2

    graphs, student, stream = StepGraphs(), embeddings(0, dtype=torch.float32), torch.cuda.current_stream()
    graphs("key", step, student, None)
    with pytest.warns(UserWarning, match="the capture of a step failed with"):
        graphs("key", step, student, None)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(graphs("key", step, student, None)[2], student * 2) and replays == []
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = student * 2
    graph.replay()
    assert torch.equal(doubled, student * 2)
