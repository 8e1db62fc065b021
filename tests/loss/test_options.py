"""Options as people have them: numbers of numpy and of tensors, modules that are copied and saved, tensors that are
not a rank's own rows; and what is not finite."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from problems import features, needs_cpu_kernels
from torch import Tensor

from bam_kernels import BAMLoss, bam_loss, bam_targets, reference, sinkhorn_attention
from bam_kernels.options import NAMES
from bam_kernels.simulated import run_ranks

SCALARS = [np.float32, np.float64, np.float16, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16)]
BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]


@pytest.mark.parametrize("scalar", SCALARS, ids=["float32", "float64", "float16", "array", "tensor", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_of_numpy_and_torch(backend, scalar):
    z = features(3, 6, 5)
    epsilon, temperature = scalar(0.0625), scalar(0.25)  # which every type holds
    assert len(bam_loss(z, return_stats=np.bool_(True), backend=backend)) == 2
    whole = {"iterations": np.int64(2), "top_k": torch.tensor(3), "mask_positives": np.bool_(True)}
    given = {"epsilon": epsilon, "temperature": temperature, "backend": backend, "views": np.int32(3)} | whole
    plain = {"epsilon": 0.0625, "temperature": 0.25, "iterations": 2, "top_k": 3, "backend": backend}
    expected = bam_loss(z, **plain)
    assert torch.equal(bam_loss(z, **given), expected)
    assert torch.equal(reference.bam_loss(z, **given), reference.bam_loss(z, **plain))
    assert torch.equal(bam_targets(z, **given), bam_targets(z, **plain))
    assert torch.equal(BAMLoss(**given)(z), expected)
    schedule = BAMLoss(**given | {"epsilon": lambda step: epsilon / step})
    assert torch.equal(schedule(z, step=1), expected)
    for function in (sinkhorn_attention, reference.sinkhorn_attention):
        P = function(z[0], epsilon=epsilon, iterations=np.int64(2), normalize=np.bool_(True), backend=backend)
        assert torch.equal(P, function(z[0], epsilon=0.0625, iterations=2, backend=backend))


@pytest.mark.parametrize(
    "value", [np.float32(0), torch.tensor(-1.0), np.float64("nan"), torch.tensor([0.05]), np.ones(2)]
)
def test_scalars_are_checked(value):
    for function in (bam_loss, reference.bam_loss, lambda z, **o: sinkhorn_attention(z[0], **o)):
        with pytest.raises((ValueError, TypeError), match="epsilon must be"):
            function(features(2, 6, 5), epsilon=value)
    with pytest.raises(TypeError, match=r"iterations must be an integer, got 2\.0"):
        bam_loss(features(2, 6, 5), iterations=np.float32(2))


def test_an_option_has_no_derivative():
    """A temperature that is learned would stay as it is, without a word."""
    z, value = features(2, 6, 5), torch.tensor(0.1)
    for loss in (bam_loss, reference.bam_loss):
        with pytest.raises(ValueError, match="temperature is an option, without derivatives"):
            torch.func.jvp(lambda t, loss=loss: loss(z, temperature=t), (value,), (value,))
    with pytest.raises(ValueError, match="epsilon is an option, without derivatives"):
        torch.func.grad(lambda e: sinkhorn_attention(z[0], epsilon=e).sum())(value)
    learned = torch.tensor(0.1, requires_grad=True)
    for function in (bam_loss, reference.bam_loss, lambda z, **o: BAMLoss(**o)(z)):
        with pytest.raises(
            ValueError, match="temperature is an option, without derivatives; got a tensor that has one"
        ):
            function(features(2, 6, 5), temperature=learned)


@pytest.mark.parametrize("make", [BAMLoss, lambda: BAMLoss(epsilon=np.float32(0.0625), top_k=3, return_stats=True)])
def test_a_module_is_copied_and_saved(make):
    loss, z, file = make(), features(2, 6, 5), io.BytesIO()
    loss(z)  # what calls keep beside the options is not saved
    torch.save(loss, file)
    file.seek(0)
    assert tuple(vars(pickle.loads(pickle.dumps(loss)).options)) == NAMES
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(file, weights_only=False)):
        assert repr(other) == repr(loss)
        a, b = other(z), loss(z)
        assert torch.equal(a[0] if isinstance(a, tuple) else a, b[0] if isinstance(b, tuple) else b)


def test_a_copy_keeps_ranks_that_are_threads():
    z = features(2, 6, 5)

    def losses(group) -> list[float]:
        loss, own = BAMLoss(group=group), z[:, group.rank * 3 : group.rank * 3 + 3]
        return [loss(own).item(), copy.deepcopy(loss)(own).item()]

    for whole, copied in run_ranks(2, losses):
        assert whole == copied


FUNCTIONS = {
    "bam_loss": lambda x: bam_loss(x),
    "bam_targets": lambda x: bam_targets(x),
    "BAMLoss": lambda x: BAMLoss()(x),
    "reference": lambda x: reference.bam_loss(x),
    "teacher": lambda x: bam_loss(torch.randn(2, 6, 5), x),
    "sinkhorn_attention": lambda x: sinkhorn_attention(x.reshape(12, 5)),
    "keys": lambda x: sinkhorn_attention(torch.randn(12, 5), x.reshape(12, 5)),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_tensor_spread_over_ranks_is_refused(function, tmp_path):
    """A DTensor holds all ranks' rows, and its products would speak to them."""
    from torch import distributed
    from torch.distributed import tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        x = tensor.distribute_tensor(features(2, 6, 5), mesh)
        with pytest.raises(TypeError, match=r"is a DTensor of shape \(.*\) spread over ranks; .*\.to_local\(\)"):
            function(x)
        assert function(x.to_local()).isfinite().all()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_a_tensor_that_is_not_dense_is_refused(layout):
    x = getattr(torch.randn(12, 5), layout)()
    for function in (lambda x: bam_loss(x, views=2), sinkhorn_attention):
        with pytest.raises(TypeError, match="must be a dense tensor, got torch"):
            function(x)


BAD = [math.nan, math.inf, -math.inf]


def spoilt(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    z = features(2, 6, 5).to(dtype)
    z[1, 3, 2] = value
    return z


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("R", [0, 2])
def test_not_finite_gives_nan_where_that_is_asked_for(R, backend, value):
    """Everything is NaN, and nothing else: what a GPU gives. Without the option it is an error."""
    for student, teacher in [(spoilt(value), features(R, 6, 5) if R else None)] + [
        (features(2, 6, 5), spoilt(value))
    ] * (R > 0):
        x = student.clone().requires_grad_()
        loss, stats = bam_loss(x, teacher, non_finite="nan", return_stats=True, backend=backend)
        loss.backward()
        assert loss.isnan() and loss.shape == () and loss.dtype == torch.float32
        assert x.grad.isnan().all() and x.grad.shape == x.shape
        assert all(value.isnan() and value.shape == () for value in vars(stats).values())
        P = bam_targets(student, teacher, non_finite="nan", backend=backend)
        assert P.isnan().all() and P.shape == (12, 12)
        for function in (bam_loss, bam_targets):
            with pytest.raises(ValueError, match=r"row\(s\) with non-finite values, the first is row 9"):
                function(student, teacher, backend=backend)
    with torch.no_grad():
        assert not bam_loss(features(2, 6, 5), non_finite="nan", backend=backend).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_not_finite_in_every_type(dtype):
    x = spoilt(math.inf, dtype).requires_grad_()
    loss = bam_loss(x, non_finite="nan")
    loss.backward()
    assert loss.isnan() and x.grad.isnan().all() and x.grad.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_gradient_scaler_skips_the_step():
    model, scaler = torch.nn.Linear(5, 4), torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.clone()
    for z, moved in ((spoilt(math.nan), False), (features(2, 6, 5), True)):
        optimizer.zero_grad()
        scaler.scale(BAMLoss(non_finite="nan")(model(z))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.weight, before) != moved
    assert scaler.get_scale() == 32.0


def test_not_finite_hides_no_fault_of_another_rank():
    """The rank with NaN does not go on alone."""
    z = features(2, 6, 5)

    def step(group) -> None:
        own = (z[:, :3] if group.rank else spoilt(math.nan)[:, 3:])[..., : 5 - group.rank]
        with pytest.raises(ValueError, match=r"no room|disagree|rank 1, which reports|target_views=3 must be at most"):
            bam_loss(own, group=group, non_finite="nan", target_views=2 + group.rank)

    run_ranks(2, step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_on_one_rank_is_nan_on_all(backend):
    """No rank waits for another; the next step is right."""
    z = features(2, 6, 5)

    def step(group) -> tuple[Tensor, Tensor]:
        own = (spoilt(math.nan) if group.rank else z)[:, group.rank * 3 : group.rank * 3 + 3].clone().requires_grad_()
        options = {"group": group, "backend": backend}
        with pytest.raises(ValueError, match="with non-finite values"):
            bam_loss(own, **options)
        loss = bam_loss(own, non_finite="nan", **options)
        loss.backward()
        assert loss.isnan() and own.grad.isnan().all()
        return bam_loss(z[:, group.rank * 3 : group.rank * 3 + 3], non_finite="nan", **options)

    assert torch.stack(run_ranks(2, step)).mean().item() == pytest.approx(bam_loss(z, backend=backend).item(), rel=1e-6)


def test_non_finite_is_checked():
    with pytest.raises(ValueError, match="non_finite must be one of error, nan, got 'skip'"):
        bam_loss(features(2, 6, 5), non_finite="skip")
