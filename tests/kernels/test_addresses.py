"""Compiled kernels get no tensor of a type or device that they do not take: it is a TypeError, never a wild write."""

import re

import pytest
import torch
from cuda_device import DEVICE, kernels_on, pytestmark  # noqa: F401
from torch import Tensor

from bam_kernels.backends import cpu
from bam_kernels.backends.addresses import FLOAT32, SCORES, address
from bam_kernels.backends.interface import CommonPart, DeviceNumber, Positives, Potential, UnitRows
from bam_kernels.layout import Layout

LAYOUT = Layout(B=2, V=3, L=2, T=2, D=3)
M, N, D = LAYOUT.M, LAYOUT.N, LAYOUT.D
CPU = torch.device("cpu")


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def fixed(*shape: int) -> Tensor:
    return made(*shape, dtype=torch.int16)


def one(n: int) -> Potential:
    return Potential(made(n), made(n))


def rows() -> UnitRows:
    return UnitRows(made(M, D), made(M, dtype=torch.float64), made(M, D))


def match() -> dict:
    """The arguments of every backend's match, all of them given."""
    target, source, gradient = made(2, 2, N), made(3, 2, N), made(3, 2, N)
    given = {"target": target, "source": source, "layout": LAYOUT, "col": one(N), "row_exponent": made(2, 2)}
    out = {"targets": made(2, 2, N), "row_out": one(2), "gradient": gradient}
    return given | out | {"epsilon": 0.1, "temperature": 0.1}


def shared(prefix: str) -> dict[str, dict]:
    """Method -> arguments; `scores` is named as the backend names it."""
    s = {prefix: made(M, N)}
    potentials = {"row": one(M), "col": one(N)}
    return {
        "normalize": {"x": made(M, D)},
        "centre_potential": {"read": made(M, D), "centre": made(D), "epsilon": 0.1},
        "project_": {"d": made(M, D), "rows": rows()},
        "symmetrize_": {"G": made(4, 4)},
        "mask_positives_": {**s, "positives": Positives(LAYOUT, 0, M)},
        "column_lse": {**s, "scale": 1.0, "row": one(M), "shift": made(N), "sums": made(N), "accumulate": False},
        "reciprocal_potential": {"shift": made(N), "sums": made(N)},
        "divide_potential_": {"col": one(N), "c": made(N)},
        "sinkhorn_pass": {**s, "scale": 1.0, **potentials, "c": made(N), "accumulate": False},
        "match": match(),
        "plan_products": {**s, "scale": 1.0, **potentials, "v": made(N), "u": made(M)},
        "plan_subtract_": {"x": made(M, N), **s, "scale": 1.0, **potentials, "u": made(M), "v": made(N)},
        "quantize": {**s, "step": 0.1, "out": fixed(M, N)},
    }


def of_cuda() -> dict[str, dict]:
    """Arguments of each method of the CUDA row kernels, by name; scales and steps are scalars on the device."""
    scale, column = DeviceNumber(1.0, made(1)), {"row": one(M), "shift": made(N), "sums": made(N)}
    epilogue = {"s": made(M, N), "bias": made(N), "step": scale, "out": fixed(M, N), "positives": None}
    return shared("s") | {
        "mean_row": {"x": made(M, D)},
        "mean_unit_row": {"x": made(M, D)},
        "half_rows": {"x": made(M, D), "centre": made(D), "epsilon": 0.1, "message": made(2, 16).half()},
        "product_step": {"centre": made(D), "key_bias": made(N), "row_bias": made(M), "other_bias": made(M)},
        "column_totals": {"shift": made(N), "sums": made(N), "common": 2},
        "total_potential": {"total": made(N, dtype=torch.float64), "common": 2},
        "quantize": {"s": made(M, N), "step": scale, "out": fixed(M, N), "bias": made(N)},
        "finish_scores": {**epilogue, "scale": scale, **column, "accumulate": False},
        "sinkhorn": {"s": made(M, N), "scale": scale, "row": one(M), "iterations": 2},
        "loss_and_stats": {
            "images": made(3, 2),
            "column_sums": made(N),
            "norm": made(M, dtype=torch.float64),
            "layout": LAYOUT,
            "uniform_loss": 1.0,
        },
    }


def of_cpu() -> dict[str, dict]:
    """Arguments of each method of the CPU row kernels, by name."""
    norm = made(M, dtype=torch.float64)
    of_both = shared("scores")
    return of_both | {
        # On GPUs torch makes the centred rows, and adds the common part.
        "centre_potential": of_both["centre_potential"] | {"centred": made(2, D)},
        "project_": of_both["project_"] | {"common": CommonPart(made(2), made(D), 0.5)},
        "mean_row": {"x": made(M, D)},
        "require_finite": {"norm": norm},
        "loss_and_stats": {
            "images": made(3, 2, dtype=torch.float64),
            "column_sums": made(N),
            "norm": norm,
            "layout": LAYOUT,
            "uniform_loss": 1.0,
        },
    }


BACKENDS = {"cpu": of_cpu(), "cuda": of_cuda()}
# What a method is given and does not read, and an embedding, which may be of any float type on the CPU.
UNREAD = {("project_", "rows.read"), *((of, "x") for of in ("normalize", "mean_row", "mean_unit_row"))}


def mapped(x: object, change, path: str = "") -> object:
    """x with every tensor in it replaced by change(path, tensor)."""
    if isinstance(x, Tensor):
        return change(path, x)
    if isinstance(x, DeviceNumber):
        return DeviceNumber(x.factor, change(f"{path}.scalar", x.scalar))
    if isinstance(x, Potential | UnitRows | CommonPart):
        return type(x)(*(mapped(part, change, f"{path}.{name}") for name, part in x._asdict().items()))
    return {key: mapped(part, change, key) for key, part in x.items()} if isinstance(x, dict) else x


def cases() -> list[tuple[str, str, str]]:
    """(backend, method, path of a tensor)."""
    found = []
    for backend, methods in BACKENDS.items():
        for method, given in methods.items():
            mapped(given, lambda path, x, backend=backend, method=method: found.append((backend, method, path)))
    return [case for case in found if case[1:] not in UNREAD]


def kernels(backend: str):
    return cpu.kernels() if backend == "cpu" else kernels_on()


def on_device(backend: str, given: dict, spoilt: str = "", spoil=None) -> object:
    """The arguments on the backend's device, one tensor of them spoilt."""
    device = DEVICE if backend == "cuda" else CPU
    return mapped(given, lambda path, x: spoil(x.to(device)) if path == spoilt else x.to(device).clone())


def other_type(x: Tensor) -> Tensor:
    """Half the bytes of float64, twice those of float32, four times those of int16."""
    return x.to(torch.float32 if x.dtype == torch.float64 else torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_given_here_is_taken(backend):
    for method, given in BACKENDS[backend].items():
        getattr(kernels(backend), method)(**on_device(backend, given))


@pytest.mark.parametrize(("backend", "method", "path"), cases())
def test_another_type_or_device_is_refused(backend, method, path):
    call, given = getattr(kernels(backend), method), BACKENDS[backend][method]
    with pytest.raises(TypeError, match=r"takes a tensor of torch\.\w+.* there, got one of torch\.float(32|64), shape"):
        call(**on_device(backend, given, path, other_type))
    with pytest.raises(TypeError, match="on meta"):
        call(**on_device(backend, given, path, lambda x: x.to("meta")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_must_lie_on_the_device(backend):
    with pytest.raises(TypeError, match="on meta"):
        kernels(backend).normalize(made(M, D).to("meta"))


def test_embeddings_in_float64_are_not_cuda_s():
    with pytest.raises(TypeError, match=r"torch\.float32 or torch\.float16 or torch\.bfloat16 there"):
        kernels("cuda").normalize(made(M, D, dtype=torch.float64).to(DEVICE))


def test_tensors_that_agree_on_a_wrong_device_are_refused():
    with pytest.raises(TypeError, match=f"these kernels run on {DEVICE.type} tensors, got one on meta"):
        kernels("cuda").divide_potential_(mapped(one(3), lambda path, x: x.to("meta")), made(3).to("meta"))


def test_the_message_names_both_sides():
    said = re.escape(
        "a kernel on cpu takes a tensor of torch.float32 or torch.int16 there, "
        "got one of torch.bfloat16, shape (2, 3), on cpu"
    )
    with pytest.raises(TypeError, match=f"^{said}$"):
        address(made(2, 3).bfloat16(), CPU, SCORES)
    with pytest.raises(TypeError, match=r"got one of torch\.float32, shape \(2, 3\), on meta$"):
        address(made(2, 3).to("meta"), CPU, FLOAT32)
    assert address(None, CPU) == 0
