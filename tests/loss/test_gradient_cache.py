"""GradientCache against one plain backward pass over the whole batch, and against a loop over micro-batches by hand."""

import re
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bam_kernels import BAMLoss
from bam_kernels.gradient_cache import GradientCache

V, B, D = 2, 24, 5  # 24 images: 1, 2, 4 and 8 equal micro-batches


class Encoder(nn.Module):
    """(V, b, 7) -> (V, b, D), each image by itself unless `norm` or `dropout` says otherwise."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), *middle, nn.Linear(11, D))

    def forward(self, x):
        return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def encoder(*middle: nn.Module, dtype=torch.float64, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(*middle).to(dtype)


def images(dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(V, B, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters()]


def close(a, b, bound: float) -> None:
    """Every entry, relative to the largest of its tensor."""
    a, b = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (a, b))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert ((x - y).abs() <= bound * y.abs().max()).all(), (x - y).abs().max() / y.abs().max()


def whole(model, x, criterion, teacher=None, **options):
    """Loss and gradients of one plain pass over everything."""
    model.zero_grad()
    loss = criterion(model(x), *([] if teacher is None else [teacher(x).detach()]), **options)
    loss.backward()
    return loss.detach(), gradients(model)


def cached(model, parts, criterion, *arguments, options=None, **more):
    model.zero_grad()
    loss = GradientCache(model, criterion, *arguments, **more)(parts, **(options or {}))
    return loss, gradients(model)


# The whole batch


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_one_pass_over_the_whole_batch(count, dtype, bound):
    model, x, criterion = encoder(dtype=dtype), images(dtype), BAMLoss()
    loss, grads = cached(model, x.chunk(count, dim=1), criterion)
    expected, expected_grads = whole(model, x, criterion)
    assert loss.dtype == dtype and not loss.requires_grad
    close(loss, expected, bound)
    close(grads, expected_grads, bound)


@pytest.mark.parametrize("sizes", [(1, 23), (10, 1, 13), (7, 7, 7, 3)])
def test_micro_batches_of_unequal_size(sizes):
    model, x, criterion = encoder(), images(), BAMLoss(top_k=3)
    loss, grads = cached(model, x.split(sizes, dim=1), criterion)
    expected, expected_grads = whole(model, x, criterion)
    close(loss, expected, 1e-12)
    close(grads, expected_grads, 1e-12)


@pytest.mark.parametrize("count", [1, 4])
def test_two_dimensional_output_with_views(count):
    class Flat(Encoder):
        def forward(self, x):
            return self.layers(x.flatten(0, 1))

    torch.manual_seed(0)
    flat, x, criterion = Flat().double(), images(), BAMLoss(views=V)
    loss, grads = cached(flat, x.chunk(count, dim=1), criterion, views=V)
    expected, expected_grads = whole(flat, x, criterion)
    close(loss, expected, 1e-12)
    close(grads, expected_grads, 1e-12)


@pytest.mark.parametrize("flat", [False, True])
def test_teacher_is_called_once_for_each_without_gradient(flat):
    model, teacher, x = encoder(), encoder(seed=5), images()
    calls = []

    def teach(batch):
        calls.append(torch.is_grad_enabled())
        return teacher(batch).flatten(0, 1) if flat else teacher(batch)

    for count in (1, 3):
        calls.clear()
        loss, grads = cached(model, x.chunk(count, dim=1), BAMLoss(), teach)
        assert calls == [False] * count
        expected, expected_grads = whole(model, x, BAMLoss(), teacher)
        close(loss, expected, 1e-12)
        close(grads, expected_grads, 1e-12)
    assert all(p.grad is None for p in teacher.parameters())


def test_crops_of_two_sizes():
    """A micro-batch is a list: 2 large crops and 3 small ones, which only learn."""

    class Crops(Encoder):
        def forward(self, crops):
            return torch.cat([super(Crops, self).forward(nn.functional.pad(c, (0, 7 - c.shape[-1]))) for c in crops])

    torch.manual_seed(0)
    model = Crops().double()
    large, small = images(), torch.randn(3, B, 4, dtype=torch.float64)
    parts = [list(pair) for pair in zip(large.chunk(4, dim=1), small.chunk(4, dim=1), strict=True)]
    for teacher in (None, lambda crops: crops[0][..., :D]):
        loss, grads = cached(model, parts, BAMLoss(), teacher)
        expected, expected_grads = whole(model, [large, small], BAMLoss(), teacher)
        close(loss, expected, 1e-12)
        close(grads, expected_grads, 1e-12)


def test_stats_options_and_accumulation():
    model, x = encoder(), images()
    criterion = BAMLoss(epsilon=lambda step: 0.1 / step, return_stats=True)
    plain, stats = criterion(model(x), step=2)
    plain.backward()
    before = [g.clone() for g in gradients(model)]
    loss, cached_stats = GradientCache(model, criterion)(x.chunk(3, dim=1), step=2)
    close(loss, plain.detach(), 1e-12)
    close(cached_stats.target_entropy, stats.target_entropy, 1e-12)
    close(gradients(model), [2 * g for g in before], 1e-12)


def test_gradient_of_the_criterions_own_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, z):
            return (self.scale * z).logsumexp((0, 1)).sum()

    model, x, criterion = encoder(), images(), Scaled()
    _, expected_grads = whole(model, x, criterion)
    expected_scale, criterion.scale.grad = criterion.scale.grad, None
    _, grads = cached(model, x.chunk(4, dim=1), criterion)
    close(grads, expected_grads, 1e-12)
    close(criterion.scale.grad, expected_scale, 1e-12)


# Random numbers and buffers: against a loop by hand


class DropPath(nn.Module):
    """Drops the branch of a whole image."""

    def forward(self, x):
        return x + x.square() * torch.rand(len(x), 1, dtype=x.dtype, device=x.device).lt(0.5)


@pytest.mark.parametrize("count", [1, 3])
def test_dropout_and_drop_path_are_replayed(count):
    """By hand: one pass over the micro-batches with every graph kept."""
    model, teacher, x, criterion = (
        encoder(nn.Dropout(0.5), DropPath()),
        encoder(nn.Dropout(0.5), seed=2),
        images(),
        BAMLoss(),
    )
    parts = x.chunk(count, dim=1)
    torch.manual_seed(7)
    z, y = zip(*[(model(part), teacher(part).detach()) for part in parts], strict=True)
    expected = criterion(torch.cat(z, dim=1), torch.cat(y, dim=1))
    expected.backward()
    expected_grads, following = gradients(model), torch.rand(1)

    torch.manual_seed(7)
    loss, grads = cached(model, parts, criterion, teacher)
    assert torch.equal(torch.rand(1), following)
    close(loss, expected.detach(), 1e-12)
    close(grads, expected_grads, 1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_batch_norm_is_updated_once_by_each_micro_batch(count):
    model, hand, x = encoder(nn.BatchNorm1d(11)), encoder(nn.BatchNorm1d(11)), images()
    parts = x.chunk(count, dim=1)
    expected = BAMLoss()(torch.cat([hand(part) for part in parts], dim=1))
    expected.backward()
    loss, grads = cached(model, parts, BAMLoss())
    close(loss, expected.detach(), 1e-12)
    close(grads, gradients(hand), 1e-12)
    for (name, buffer), value in zip(model.named_buffers(), hand.buffers(), strict=True):
        assert torch.equal(buffer, value), name
    assert model.layers[2].num_batches_tracked == count


def test_a_buffer_that_the_output_depends_on():
    """A counter that scales the output: both passes must see the same values."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.ones((), dtype=torch.float64))

        def forward(self, x):
            self.n += 1
            return x * self.n.clone()

    model, hand, x = encoder(Counter()), encoder(Counter()), images()
    parts = x.chunk(4, dim=1)
    expected = BAMLoss()(torch.cat([hand(part) for part in parts], dim=1))
    expected.backward()
    _, grads = cached(model, parts, BAMLoss())
    close(grads, gradients(hand), 1e-12)
    assert model.layers[2].n == hand.layers[2].n == 5


def test_buffers_are_put_back_when_a_pass_fails():
    model, x = encoder(nn.BatchNorm1d(11)), images()
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(RuntimeError):
        GradientCache(model, BAMLoss())([x, x[..., :3]])
    assert all(map(torch.equal, model.buffers(), before))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_the_device_are_replayed():
    model, x, criterion = encoder(nn.Dropout(0.5)).cuda(), images().cuda(), BAMLoss(backend="reference")
    parts = x.chunk(3, dim=1)
    torch.manual_seed(7)
    expected = criterion(torch.cat([model(part) for part in parts], dim=1))
    expected.backward()
    expected_grads, following = gradients(model), torch.rand(1, device="cuda")

    torch.manual_seed(7)
    loss, grads = cached(model, parts, criterion)
    assert torch.equal(torch.rand(1, device="cuda"), following)
    close(loss, expected.detach(), 1e-12)
    close(grads, expected_grads, 1e-12)


# Mixed precision


def test_bfloat16_autocast():
    """The same casts in both passes, so the gradients are those of one pass under autocast to bfloat16's rounding."""
    model, x, criterion = encoder(dtype=torch.float32), images(torch.float32), BAMLoss()
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = cached(model, x.chunk(4, dim=1), criterion)
        z = model(x)
        assert z.dtype == torch.bfloat16
        expected = criterion(z)
    model.zero_grad()
    expected.backward()
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
    close(loss, expected.detach(), 1e-5)
    close(grads, gradients(model), 2e-2)


def test_backward_is_outside_autocast():
    """A layer that keeps itself in float32 has a float32 derivative, not a bfloat16 one."""

    class InFloat32(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model, x = encoder(InFloat32(11, 11), dtype=torch.float32), images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.cat([model(part) for part in x.chunk(4, dim=1)], dim=1)
        expected = BAMLoss()(z)
    expected.backward()
    expected_grad = model.layers[2].weight.grad
    with torch.autocast("cpu", torch.bfloat16):
        cached(model, x.chunk(4, dim=1), BAMLoss())
    close(model.layers[2].weight.grad, expected_grad, 1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_gradient_scaler(count):
    model, x, criterion = encoder(), images(), BAMLoss()
    expected, expected_grads = whole(model, x, criterion)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, grads = cached(model, x.chunk(count, dim=1), criterion, None, scaler)
    close(loss, expected, 1e-12)
    close(grads, [1024 * g for g in expected_grads], 1e-12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.step(optimizer)
    close(gradients(model), expected_grads, 1e-12)


# Surroundings


def test_the_models_own_no_sync_is_entered_for_all_but_the_last():
    """A model that exchanges gradients by itself, such as FullyShardedDataParallel, and is not torch's replica."""

    class Engine(Encoder):
        within, seen = False, ()

        @contextmanager
        def no_sync(self):
            self.within = True
            yield
            self.within = False

        def forward(self, x):
            self.seen += ((torch.is_grad_enabled(), self.within),)
            return super().forward(x)

    for model in (Engine().double(), torch.compile(Engine().double(), backend="eager")):
        GradientCache(model, BAMLoss())(images().chunk(3, dim=1))
        assert model.seen == (*[(False, False)] * 3, (True, True), (True, True), (True, False))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_default_dtype_and_device_are_not_followed(count, dtype):
    model, hand, x = (*(encoder(nn.BatchNorm1d(11), DropPath(), dtype=dtype) for _ in range(2)), images(dtype))
    parts = x.chunk(count, dim=1)
    torch.manual_seed(7)
    expected = torch.cat([hand(part) for part in parts], dim=1).exp().mean()
    expected.backward()
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            loss = GradientCache(model, lambda z: z.exp().mean())(parts)
    finally:
        torch.set_default_dtype(torch.float32)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.dtype == dtype
    close(loss, expected.detach(), bound)
    close(gradients(model), gradients(hand), bound)
    assert all(map(torch.equal, model.buffers(), hand.buffers()))


# Memory


def test_activations_of_one_micro_batch_at_a_time():
    """Bytes that autograd keeps for the model's backward: those of one micro-batch, however many there are."""
    kept = most = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal kept, most
            self.tensor, self.bytes = tensor.detach(), tensor.numel() * tensor.element_size()
            kept += self.bytes
            most = max(most, kept)

        def __del__(self):
            nonlocal kept
            kept -= self.bytes

    class Watched(Encoder):
        def forward(self, x):
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda k: k.tensor):
                return super().forward(x)

    model, x, criterion = Watched(), images(torch.float32), BAMLoss()
    model(x)
    one, most = most, 0
    assert one > 0 == kept
    for count in (1, 2, 4, 8):
        GradientCache(model, criterion)([x] * count)
        assert (kept, most) == (0, one), count


# Bad input


class Returns(nn.Module):
    def __init__(self, *outputs):
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, _):
        return self.outputs.pop(0)


def constant(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (Returns(constant(8)), {}, "the model must return (V, b, D) or (V*b, D), got shape (8,), micro-batch 0"),
        (Returns([1]), {}, "the model must return (V, b, D) or (V*b, D), got list, micro-batch 0"),
        (Returns(constant(8, 3)), {}, "returned shape (8, 3) for micro-batch 0, so views must be given"),
        (Returns(constant(8, 3)), {"views": 3}, "shape (8, 3) for micro-batch 0: 8 rows, not a multiple of 3 views"),
        (Returns(constant(2, 4, 3)), {"views": 4}, "shape (2, 4, 3) for micro-batch 0, but it has views=4"),
        (
            Returns(constant(2, 4, 3), constant(2, 4, 5)),
            {},
            "the model returned (2, 4, 3) torch.float32 for micro-batch 0, (2, 4, 5) torch.float32 for 1",
        ),
        (
            Returns(constant(2, 4, 3), constant(2, 4, 3, dtype=torch.float64)),
            {},
            "(2, 4, 3) torch.float32 for micro-batch 0, (2, 4, 3) torch.float64 for 1",
        ),
        (
            Returns(constant(2, 4, 3), constant(2, 4, 3), constant(2, 5, 3)),
            {},
            "two passes over micro-batch 0 gave embeddings of shape (2, 4, 3), then (2, 5, 3)",
        ),
        (
            Returns(*[constant(2, 4, 3).detach()] * 3),
            {},
            "the model's output for micro-batch 0 has no graph",
        ),
        (
            Returns(constant(2, 4, 3)),
            {"teacher": Returns(constant(9, 3))},
            "the teacher returned shape (9, 3) for micro-batch 0: 9 rows, not a multiple of 4 images",
        ),
        (
            Returns(constant(2, 4, 3)),
            {"teacher": Returns(constant(2, 5, 3))},
            "the teacher returned shape (2, 5, 3) for micro-batch 0, but it has 4 images",
        ),
        (Returns(*[constant(2, 4, 3)] * 2), {"criterion": lambda z: z}, "must return one number"),
        (
            Returns(*[constant(2, 4, 3)] * 2),
            {"criterion": lambda z: z.sum().detach()},
            "the criterion's loss has no graph",
        ),
    ],
)
def test_bad_outputs(model, arguments, message):
    criterion = arguments.pop("criterion", BAMLoss())
    with pytest.raises(ValueError, match="^GradientCache: .*" + re.escape(message)):
        GradientCache(model, criterion, **arguments)([0, 1])


def test_bad_calls():
    model, x = encoder(), images()
    cache = GradientCache(model, BAMLoss())
    with pytest.raises(ValueError, match="micro_batches is empty"):
        cache([])
    with pytest.raises(TypeError, match="must be a sequence of micro-batches, read twice; got Tensor"):
        cache(x)
    with pytest.raises(TypeError, match="got generator"):
        cache(part for part in [x])
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are switched off here"):
        cache([x])
    with pytest.raises(ValueError, match="views must be a positive integer or None, got 0"):
        GradientCache(model, BAMLoss(), views=0)
