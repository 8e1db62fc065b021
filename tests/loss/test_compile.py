"""The operators as torch.library sees them, and whole training steps under torch.compile."""

import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import emulated
import numpy as np
import pytest
import torch
from problems import assert_close, features, loss_arguments, needs_cpu_kernels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bam_kernels import BAMLoss, bam_loss, bam_targets, sinkhorn_attention
from bam_kernels.backends import cuda

pytestmark = needs_cpu_kernels

SCALES = torch.tensor([0.1, 0.05], dtype=torch.float64)  # temperature, epsilon
EPSILON = SCALES[1]


@pytest.fixture(autouse=True)
def compile_afresh():
    yield
    torch.compiler.reset()


def leaf(x: Tensor, requires_grad: bool = True) -> Tensor:
    return x.clone().requires_grad_(requires_grad)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("R,target_rows", [(0, "teacher"), (2, "teacher"), (2, "student")])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck_of_the_loss(needs_grad, R, target_rows, dimensions):
    student, teacher = features(3, 6, 8), features(R, 6, 8, seed=1) if R else None
    arguments = loss_arguments(student, teacher, target_rows=target_rows, precision="exact")
    if dimensions == 2:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1) if R else None
    args = (leaf(student, needs_grad), teacher, *arguments)
    torch.library.opcheck(torch.ops.bam_kernels.loss.default, (*args, needs_grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck_of_the_loss_in_16_bit(dtype):
    student, teacher = features(3, 6, 8).to(dtype), features(2, 6, 8, seed=1).to(dtype)
    args = (*loss_arguments(student, teacher, top_k=4, memory_budget=10**6), True)
    torch.library.opcheck(torch.ops.bam_kernels.loss.default, (leaf(student), teacher, *args))


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("wants_plan", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_of_attention(requires_grad, wants_plan, keys):
    q, k = features(1, 18, 8)[0], features(1, 12, 8, seed=1)[0] if keys else None
    args = (leaf(q, requires_grad), leaf(k, requires_grad) if keys else None, EPSILON, 3, "block", [3, 2, 1, 0])
    torch.library.opcheck(
        torch.ops.bam_kernels.sinkhorn_attention.default, (*args, True, wants_plan, "exact", "cpu", "")
    )


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("keys", [False, True])
def test_opcheck_of_attention_backward(keys, by_columns):
    q, k = features(1, 18, 8)[0], features(1, 12, 8, seed=1)[0] if keys else None
    if by_columns:
        q = q.T.contiguous().T
    problem = (EPSILON, 3, "block", [3, 2, 1, 0], True, "exact", "cpu")
    plan, f, g = torch.ops.bam_kernels.sinkhorn_attention(q, k, *problem[:5], True, "exact", "cpu", "")
    for given in ((plan, torch.ones_like(plan), None, None), (None, None, torch.ones_like(f), torch.ones_like(g))):
        torch.library.opcheck(torch.ops.bam_kernels.sinkhorn_attention_backward.default, (q, k, *problem, *given))


class Model(nn.Module):
    """Embeddings of three views by one layer, and the loss."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 8)
        self.loss = BAMLoss(views=3, **options)

    def forward(self, images: Tensor, teacher: Tensor | None = None) -> Tensor:
        return self.loss(self.layer(images).relu(), teacher)


def step(function, model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Loss, statistics if any, and the gradients of the parameters."""
    model.zero_grad()
    output = function(*inputs)
    loss, stats = output if isinstance(output, tuple) else (output, None)
    loss.backward()
    values = [] if stats is None else list(vars(stats).values())
    return [loss.detach(), *values, *(p.grad.clone() for p in model.parameters())]


def check_step(model: nn.Module, *inputs: Tensor, **compile_options) -> None:
    """Compiled as one graph, the step is the eager one to the rounding of the layer's fused arithmetic."""
    compiled = torch.compile(model, fullgraph=True, **compile_options)
    for actual, expected in zip(step(compiled, model, *inputs), step(model, model, *inputs), strict=True):
        assert_close(actual, expected.double(), 1e-5 * expected.abs().max().item() + 1e-6)


def images(batch: int, views: int = 3, D: int = 12, seed: int = 0) -> Tensor:
    return features(views, batch, D, seed=seed).flatten(0, 1)


def test_training_step_with_the_default_compiler():
    check_step(Model(), images(6))


@pytest.mark.parametrize("options", [{}, {"return_stats": True}, {"top_k": 3, "target_rows": "student"}], ids=str)
def test_training_step_with_a_teacher(options):
    check_step(Model(**options), images(6), images(6, views=2, D=8, seed=1), backend="aot_eager")


@pytest.mark.parametrize("dynamic,graphs", [(None, 2), (True, 1)])
def test_any_batch(dynamic, graphs):
    """By default torch compiles the first batch as it is, and the second for any other."""
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=(counter := Counter()))
    for batch in (6, 11, 4):
        actual, expected = step(compiled, model, images(batch)), step(model, model, images(batch))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert counter.graphs == graphs


@pytest.mark.parametrize("steps", [3, 10])
def test_epsilon_schedule(steps):
    """Every step has its epsilon; torch gives up after eight compilations of one function."""
    loss = BAMLoss(views=3, epsilon=lambda step: 0.1 / (1 + step))
    compiled = torch.compile(loss, fullgraph=True, backend=Counter())
    for number in range(steps):
        assert compiled(images(6), step=number).item() == loss(images(6), step=number).item()


class Counter:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph


def test_training_step_under_autocast():
    """The layer gives bfloat16; the loss and the gradients of the parameters stay float32."""
    model = Model()

    def autocast_step(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    compiled = torch.compile(autocast_step, fullgraph=True, backend="aot_eager")
    actual, expected = step(compiled, model, images(6)), step(autocast_step, model, images(6))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b.double(), 1e-2 * b.abs().max().item())


def test_functions_without_gradient():
    def evaluate(student: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            loss = bam_loss(student, views=3, precision="exact")
            return loss, sinkhorn_attention(student, mask="block", views=3, precision="exact")

    student = images(6).requires_grad_()
    actual = torch.compile(evaluate, fullgraph=True, backend="aot_eager")(student)
    for a, b in zip(actual, evaluate(student), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("output", ["plan", "potentials"])
def test_differentiable_attention(output):
    weights = torch.randn(18, 12, generator=torch.Generator().manual_seed(2))

    def loss(q: Tensor, k: Tensor) -> Tensor:
        options = {"mask": "block", "views": 3, "key_views": 2, "output": output, "precision": "exact"}
        result = sinkhorn_attention(q, k, differentiable=True, **options)
        if output == "plan":
            return (weights * result).sum()
        return (weights[:, 0] * result[0]).sum() + (weights[0] * result[1]).sum()

    def gradients(function) -> tuple[Tensor, ...]:
        leaves = leaf(images(6)), leaf(images(6, views=2, seed=1))
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(compiled, gradients(loss), strict=True))


OPERATIONS = {
    "loss": lambda z, **options: bam_loss(z, **options),
    "statistics": lambda z, **options: BAMLoss(return_stats=True, **options)(z)[1].kl,
    "targets": lambda z, **options: bam_targets(z, **options),
    "attention": lambda z, **options: sinkhorn_attention(z[0], z[1], differentiable=True, **options),
    "potentials": lambda z, **options: sinkhorn_attention(z[0], mask="self", output="potentials", **options)[1],
}
of_operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
WAYS = {
    "cpu": (torch.float32, {"backend": "cpu"}),
    "reference": (torch.float32, {"backend": "reference"}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {"backend": "reference"}),
    "exact reference": (torch.float32, {"backend": "reference", "precision": "exact"}),
}
in_every_way = pytest.mark.parametrize("dtype,options", WAYS.values(), ids=WAYS)


@of_operations
@in_every_way
def test_every_operation_is_one_graph(operation, dtype, options):
    """The eager values bit for bit, and the eager gradients."""
    z = features(2, 7, 5).to(dtype)
    compiled = torch.compile(lambda x: operation(x, **options), fullgraph=True, backend="aot_eager")
    actual, expected = leaf(z), leaf(z)
    a, b = compiled(actual), operation(expected, **options)
    assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    if b.requires_grad:
        weights = torch.randn(b.shape, dtype=b.dtype)
        (a * weights).sum().backward()
        (b * weights).sum().backward()
        tolerance = 0.0 if options.get("backend") == "cpu" else 1e-6  # gradients may be added in another order
        assert ((actual.grad - expected.grad).abs() <= tolerance * expected.grad.abs().max()).all()


@of_operations
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_number_of_images(operation, backend):
    """Exported with a dynamic number of images, by both exporters."""

    class Exported(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return operation(z, backend=backend)

    for strict in (True, False):
        shapes = ({1: torch.export.Dim("images", min=2)},)
        program = torch.export.export(Exported(), (features(2, 7, 5),), dynamic_shapes=shapes, strict=strict)
        other = features(2, 12, 5)
        assert torch.equal(program.module()(other), operation(other, backend=backend))


def test_statistics_are_exported():
    program = torch.export.export(BAMLoss(return_stats=True), (features(2, 7, 5),))
    loss, stats = program.module()(features(2, 7, 5))
    assert stats == BAMLoss(return_stats=True)(features(2, 7, 5))[1] and loss.isfinite()


@of_operations
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference", "triton", "cuda"])
def test_without_memory(operation, backend):
    """Tensors of the device meta, and fake ones, have results of the right shape and type."""
    expected = operation(leaf(features(2, 7, 5)), backend="reference")
    given = [torch.empty(2, 7, 5, device="meta", requires_grad=True)]
    results = [operation(given[0], backend=backend)]
    if backend in ("auto", "cpu", "reference"):
        with FakeTensorMode():
            given.append(torch.empty(2, 7, 5, requires_grad=True))
            results.append(operation(given[1], backend=backend))
    for z, result in zip(given, results, strict=True):
        assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, z.device)
        assert result.requires_grad == expected.requires_grad


@of_operations
@pytest.mark.filterwarnings("ignore:bam_kernels. computing with the slow PyTorch reference")
def test_the_choice_of_a_backend_is_one_graph(operation):
    with FakeTensorMode():
        z = torch.empty(2, 7, 5, device="cuda", requires_grad=True)
        compiled = torch.compile(operation, fullgraph=True, backend=(counter := Counter()))
        assert compiled(z).is_cuda and counter.graphs == 1


@pytest.mark.parametrize("later", ["highest", "medium"])
def test_exact_products_whatever_the_flag_is_later(later, matmul_precision):
    """The flag counts when a compiled function runs, and precision="exact" has no use for it."""
    z = features(2, 40, 64)
    for options in ({"backend": "reference", "precision": "exact"}, {"backend": "cpu", "precision": "exact"}):
        compiled = torch.compile(lambda x, o=options: bam_loss(x, **o), fullgraph=True, backend="aot_eager")
        torch.set_float32_matmul_precision("highest")
        expected, actual = leaf(z), leaf(z)
        loss = bam_loss(expected, **options)
        loss.backward()
        compiled(leaf(z))
        torch.set_float32_matmul_precision(later)
        found = compiled(actual)
        found.backward()
        assert torch.equal(found, loss) and torch.equal(actual.grad, expected.grad)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("compiler", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("operation", ["loss", "attention"])
def test_no_derivative_is_lost(operation, compiler, kernels):
    """What a compiled operator cannot carry is an error, or runs in eager mode where it may."""
    z, t = features(2, 7, 5), features(2, 7, 5, seed=1)

    def value(x: Tensor) -> Tensor:
        return OPERATIONS[operation](x, backend=kernels).square().sum()

    tangent = lambda x: torch.func.jvp(value, (x,), (t,))[1]  # noqa: E731
    for transform in (tangent, torch.func.vmap(torch.func.grad(value)), torch.func.vmap(value)):
        torch.compiler.reset()
        with pytest.raises(Exception, match=r"compiler\.disable|Observed exception|non-Tensor"):
            torch.compile(transform, fullgraph=True, backend=compiler)(
                z if transform is tangent else torch.stack((z, t))
            )
    torch.compiler.reset()
    if compiler != "eager":  # torch 2.14 fails there within torch.func.grad, whatever the function
        grad = torch.compile(torch.func.grad(value), backend=compiler)(z)
        assert_close(grad, torch.func.grad(value)(z).double(), 1e-5)
    many = torch.compile(torch.func.vmap(value), backend=compiler)(torch.stack((z, t)))
    assert_close(many, torch.stack((value(z), value(t))).double(), 1e-5)
    if kernels == "reference":
        assert_close(torch.compile(tangent, backend=compiler)(z), tangent(z).double(), 1e-5)
    else:
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.compile(tangent, backend=compiler)(z)
    expected = tangent(z).double() if kernels == "reference" else None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, t)
        try:
            found = torch.autograd.forward_ad.unpack_dual(torch.compile(value, backend=compiler)(dual)).tangent
            assert_close(found, expected, 1e-5)
        except NotImplementedError:
            assert kernels == "cpu"


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("operation", ["loss", "attention"])
def test_no_second_derivative_is_lost(operation, compiler, kernels):
    """By what a compiled function is given; of its own intermediates the compiler keeps no graph."""
    functions = {
        "loss": (features(2, 7, 5), lambda x: bam_loss(x, backend=kernels)),
        "attention": (
            features(1, 7, 5)[0],
            lambda x: sinkhorn_attention(x, differentiable=True, backend=kernels).square().sum(),
        ),
    }
    z, function = functions[operation]
    x = leaf(z)
    (g,) = torch.autograd.grad(torch.compile(function, backend=compiler)(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"is not differentiable|double backward"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_numbers_of_every_kind_are_one_graph(kernels):
    """A temperature that is a float, numpy's or a 0-d tensor may change at every call."""
    z = features(2, 7, 5)

    def value(x: Tensor, temperature) -> Tensor:
        loss = bam_loss(x, temperature=temperature, epsilon=temperature / 2, backend=kernels)
        return loss + sinkhorn_attention(x[0], epsilon=temperature, backend=kernels)[0, 0]

    for number in (float, np.float32, torch.tensor):
        torch.compiler.reset()
        compiled = torch.compile(value, fullgraph=True, backend=(counter := Counter()))
        for step in range(12):
            given = number(0.05 + step / 64)
            assert_close(compiled(z, given), value(z, given).double(), 1e-5)
        assert counter.graphs <= 2
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(Exception, match=r"(temperature|epsilon) must be positive and finite"):
            compiled(z, torch.tensor(wrong))


@pytest.fixture
def a_device_is_found(monkeypatch):
    """The extension says that there is a GPU, by functions that the compiler cannot look into."""
    found = {f.name: getattr(emulated.HOPPER, f.name) for f in fields(emulated.HOPPER) if f.name != "index"}
    extension = SimpleNamespace(
        with_cuda=True,
        cuda_devices=torch.compiler.disable(lambda: (1, "")),
        cuda_device=torch.compiler.disable(lambda index: found),
    )
    monkeypatch.setattr(cuda, "_C", extension)
    cuda.query_device.cache_clear()
    yield
    cuda.query_device.cache_clear()


@pytest.mark.parametrize(
    "way",
    [{"backend": "cuda"}, {"backend": "triton", "engine": "slab"}, {"backend": "triton", "engine": "flash"}],
    ids=lambda way: "-".join(way.values()),
)
def test_a_step_with_a_gpu_backend_is_one_graph(way, a_device_is_found):
    """On CUDA tensors without memory: the compiler traces all that is not in the operators. It cannot look into the
    functions by which backend="cuda" asks for the device."""

    def both(student: Tensor) -> tuple[Tensor, Tensor]:
        P = sinkhorn_attention(student, mask="block", views=3, backend=way["backend"])
        return bam_loss(student, views=3, **way), P

    with FakeTensorMode():
        student = torch.empty(18, 12, device="cuda", requires_grad=True)
        loss, P = torch.compile(both, fullgraph=True, backend=(counter := Counter()))(student)
    assert loss.requires_grad and loss.shape == () and P.shape == (18, 18) and loss.is_cuda and P.is_cuda
    assert counter.graphs == 1


def test_the_compiler_is_imported_by_those_who_compile():
    program = "import sys, bam_kernels; sys.exit('torch._dynamo' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
