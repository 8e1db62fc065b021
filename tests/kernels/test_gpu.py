"""What only a GPU can show of the loss: streams, capture, no synchronisation, memory, a second device, the compiler."""

import pytest
import torch
from problems import COSINES, check_against_float64, features, loss_and_grad

from bam_kernels import bam_loss, checked_call, plan
from bam_kernels.backends import cuda, triton
from bam_kernels.engine.recording import Recording
from bam_kernels.simulated import SimulatedRanks

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
reason = triton.unavailable(torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]

without_cuda = cuda.unavailable(torch.device("cuda"))
# Triton's two, and the slab engine on the CUDA kernels.
ENGINES = (
    "slab",
    "flash",
    pytest.param("cuda", marks=pytest.mark.skipif(without_cuda is not None, reason=str(without_cuda))),
)


def way(engine: str) -> dict[str, str]:
    return {"backend": "cuda", "engine": "slab"} if engine == "cuda" else {"backend": "triton", "engine": engine}


def embeddings(views: int = 2, images: int = 96, D: int = 64, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return features(views, images, D).to("cuda", dtype)


def step(student: torch.Tensor, engine: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return loss_and_grad(bam_loss, student, **way(engine), **options)


def relative(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("R", [0, 2])
def test_sizes_of_use_against_float64(engine, cosine, R, dtype):
    """Larger than the interpreter takes: several tiles, slabs and chunks everywhere."""
    student = features(4, 160, 200, cosine=cosine).cuda()
    teacher = features(R, 160, 200, cosine=cosine, seed=1).cuda() if R else None
    precision = "exact" if dtype == torch.float32 else "default"
    check_against_float64(student, teacher, dtype, cosine, **way(engine), precision=precision)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_waits_for_the_device(engine):
    student = embeddings()
    expected = step(student, engine)  # compiles the kernels and makes the plans
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [step(student, engine) for _ in range(3)]  # the first is recorded, the others repeat it
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for again in found for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("R", [0, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_repeated_step_is_the_step_of_the_engine(engine, R):
    """Other inputs in other memory, on the current stream and on another, with NaN in the memory that it is given."""

    def drawn(seed: int) -> list[torch.Tensor | None]:
        student, teacher = (features(V, 96, 64, seed=seed + V) if V else None for V in (4, R))
        return [x.to("cuda", torch.float16) if x is not None else None for x in (student, teacher)]

    def loss_and_gradient(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return loss_and_grad(bam_loss, *drawn(seed), **way(engine))

    expected = []
    for seed in range(6):
        checked_call.forget()
        expected.append(loss_and_gradient(10 * seed))
    checked_call.forget()
    stream = torch.cuda.Stream()
    for seed, (loss, gradient) in enumerate(expected):
        held = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(16)]
        del held
        with torch.cuda.stream(stream if seed % 2 else torch.cuda.current_stream()):
            found = loss_and_gradient(10 * seed)
        torch.cuda.synchronize()
        assert torch.equal(found[0], loss) and torch.equal(found[1], gradient)
    (call,) = checked_call._calls.values()
    (recording,) = next(iter(call._steps.values()))._recordings.values()
    assert isinstance(recording, Recording)


@pytest.mark.parametrize("engine", ENGINES)
def test_replayed_as_a_graph(engine):
    student = embeddings().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(bam_loss(student, **way(engine)), student)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = bam_loss(student, **way(engine))
        (dz,) = torch.autograd.grad(loss, student)
    for seed in (1, 2):
        with torch.no_grad():
            student.copy_(features(2, 96, 64, seed=seed))
        graph.replay()
        expected = step(student.detach(), engine)
        assert torch.equal(loss, expected[0]) and torch.equal(dz, expected[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_side_stream(engine):
    student = embeddings()
    expected = step(student, engine)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on another stream would overtake
        late = student * 1.0
        found = step(late, engine)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("engine", ENGINES)
def test_the_second_device(engine):
    expected = step(embeddings(), engine)
    found = step(embeddings().to("cuda:1"), engine)
    assert found[1].device.index == 1
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


def check_compiled_under_autocast(engine: str, compiler: str) -> None:
    network = torch.nn.Linear(32, 64).cuda()
    images = torch.randn(192, 32).cuda()

    def loss_of(x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return bam_loss(network(x), views=2, **way(engine))

    def gradient(function):
        network.zero_grad()
        function(images).backward()
        return network.weight.grad.clone()

    eager, compiled = gradient(loss_of), gradient(torch.compile(loss_of, fullgraph=True, backend=compiler))
    assert relative(compiled, eager.double()) <= 1e-2  # the compiler may round the network's product elsewhere


@pytest.mark.parametrize("engine", ENGINES)
def test_one_graph_under_autocast(engine):
    """Traced, forward and backward, and run without code made for it, which takes long and has nothing of ours."""
    check_compiled_under_autocast(engine, "aot_eager")


def test_the_default_compiler_under_autocast(monkeypatch):
    # The compiler works in this process: its worker processes, each of which imports torch, may take a minute to start.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    check_compiled_under_autocast("slab", "inductor")


def test_flash_memory_is_linear():
    """M = 2048 rows against N = 524,288 keys of 256 simulated ranks, D = 256: inputs, outputs and 64 MB."""
    B, D, W = 1024, 256, 256
    keys = torch.nn.functional.normalize(torch.randn(2 * B * W, D).cuda(), dim=1)
    group = SimulatedRanks(W, 0, keys)
    student, teacher = (embeddings(2, B, D) for _ in range(2))
    forecast = plan(views=2, images=B, features=D, ranks=W, teacher_views=2, sixteen_bit=True, engine="flash")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = loss_and_grad(bam_loss, student, teacher, backend="triton", engine="flash", group=group)
    peak = torch.cuda.max_memory_allocated() - before
    held = 2 * len(keys) * D  # the gathered keys in fp16
    assert torch.isfinite(loss) and peak <= held + 64 * 2**20 and peak <= 1.1 * forecast.total_bytes + 2**20
