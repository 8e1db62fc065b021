"""Forms of GPU kernels that the problems of the verification launch, at full size, with nothing computed.

A form of a CUDA kernel is the kernel, named as csrc/cuda names its launch, with a template switch or a branch:
"match_kernel<int16, cluster>: top-k". A form of a Triton kernel is what compile.py calls one.
"""

from collections.abc import Callable
from typing import Any

import torch

from bam_kernels.backends import cuda, triton, unit_rows
from bam_kernels.backends.cuda import shapes
from bam_kernels.backends.cuda.device import Device
from bam_kernels.backends.cuda.row_kernels import CudaKernels
from bam_kernels.engine import attention, rows
from bam_kernels.verification import cases

CPU = torch.device("cpu")
FLOATS = ("float32", "float16", "bfloat16")
ONE_WARP = 256  # most features of an embedding that one warp holds: kNarrow in csrc/cuda/embed.cu


def device(shared_kib: int, multiprocessors: int, clusters: tuple[int, int, int, int]) -> Device:
    programmatic = clusters[0] > 0
    return Device(0, "", (8, 0), multiprocessors, 1 << 36, 1 << 25, shared_kib << 10, 1 << 10, clusters, programmatic)


# Limits that three GPUs have for the code that they run: for 9.0a on a Hopper, for 8.0 on an A100 and a consumer card.
DEVICES = {
    "Hopper": device(227, 132, (66, 33, 16, 8)),
    "A100": device(163, 108, (0, 0, 0, 0)),
    "consumer": device(99, 84, (0, 0, 0, 0)),
}


class Table:
    """Stands for the table of CUDA kernels: notes the forms of each call."""

    def __init__(self) -> None:
        self.forms: set[str] = set()

    def __getattr__(self, method: str) -> Callable[..., None]:
        describe = globals()[f"_{method}"]
        return lambda *arguments: self.forms.update(describe(*arguments))


def _forms(name: str, **branches: Any) -> set[str]:
    return {name} | {f"{name}: {branch.replace('_', ' ')}" for branch, taken in branches.items() if taken}


def _type(scores: tuple[int, bool, int, int]) -> str:
    return "int16" if scores[1] else "float32"


def _is_aligned(type: str, *strides: int) -> bool:
    return all(stride * (4 if type == "float32" else 2) % 16 == 0 for stride in strides)


def _add_chunks(accumulate: bool = False, factor: bool = False, divide: bool = False) -> set[str]:
    return _forms("add_chunks_kernel", accumulate=accumulate, factor=factor, divide=divide)


def _column_lse(s, m, n, scale, row, shift, sums, accumulate, partial, rows, bias, fixed, _, step, positives, where):
    name = f"column_lse_kernel<{_type(s)}{', epilogue' if fixed else ''}>" if shift else "quantize_kernel"
    several = m > rows
    found = _forms(
        name,
        masked=positives[0],
        not_masked=not positives[0],
        aligned=_is_aligned(_type(s), s[3]),
        not_aligned=not _is_aligned(_type(s), s[3]),
        one_chunk=not several,
        several_chunks=several,
        accumulate_in_one_chunk=accumulate and not several,
    )
    return found | (_forms("merge_lse_kernel", accumulate=accumulate) if shift and several else set())


def _mask_positives(*_):
    return _forms("mask_positives_kernel")


def _sinkhorn_pass(s, m, n, scale, row, col, c, accumulate, divide, partial, rows, team, group, where):
    size = group * (2 if s[1] else 4)
    found = _forms(
        f"sinkhorn_pass_kernel<{_type(s)}{', cluster' if team.cluster > 1 else ''}>",
        aligned=_is_aligned(_type(s), s[3]),
        not_aligned=not _is_aligned(_type(s), s[3]),
        **{f"groups_of_{size}_bytes": True},
    )
    return found | _add_chunks(accumulate, True, divide)


def _row_step(s, *_):
    return _forms(f"row_step_kernel<{_type(s)}>")


def _sinkhorn_on_chip(s, m, n, scale, row, col, c, rows, cluster, iterations, where):
    return _forms(
        f"sinkhorn_on_chip_kernel<{_type(s)}>",
        several_iterations=iterations > 1,
        aligned=_is_aligned(_type(s), s[3]),
        not_aligned=not _is_aligned(_type(s), s[3]),
    )


def _match(target, source, dimensions, *rest):
    _L, V, *_, top_k = dimensions
    targets, row_out, gradient, team, stages = rest[8], rest[10], rest[11], rest[12], rest[13]
    long = "_long" if team.threads == 0 else ""
    return _forms(
        f"match{long}_kernel<{_type(target)}{', cluster' if team.cluster > 1 else ''}>",
        targets=targets,
        row_out=row_out[0],
        source=V,
        gradient=gradient[0],
        top_k=top_k,
        one_view=V == 1,
        odd_views=V % 2,
        few_rows_at_once=stages == shapes.FEW_STAGES and team.cluster == 1 and _type(target) == "int16",
        aligned=_is_aligned(_type(target), target[3]),
        not_aligned=not _is_aligned(_type(target), target[3]),
    )


def _plan_products(s, m, n, scale, row, col, v, u, y, w, accumulate, *_):
    rows = _forms(f"row_products_kernel<{_type(s)}>") if y else set()
    columns = _forms(f"column_products_kernel<{_type(s)}>", u=u, no_u=not u) | _add_chunks(accumulate, True)
    return rows | (columns if w else set())


def _plan_subtract(s, m, n, scale, row, col, u, v, *_):
    return _forms(f"plan_subtract_kernel<{_type(s)}>", u=u, v=v)


def _warps(name: str, d: int) -> set[str]:
    return {f"{name}: {'one warp' if d <= ONE_WARP else 'several warps'} a row"}


def _normalize(x, m, d, centre, read, norm, bias, scale, row, message, where):
    branches = {"centre": centre, "no_centre": read and not centre, "norms_alone": not read, "message": message[0]}
    return _forms(f"normalize_kernel<{FLOATS[x[1]]}>", **branches) | _warps("normalize_kernel", d)


def _mean_row(x, norm, *_):
    return _forms(f"mean_row_kernel<{FLOATS[x[1]]}>", norm=norm, no_norm=not norm)


def _product_step(centre, d, key_bias, n, row_bias, m, other_bias, *_):
    return _forms("product_step_kernel", other_rows=other_bias, no_other_rows=not other_bias)


def _centre_potential(read, m, d, *_):
    return _forms("centre_potential_kernel") | _warps("centre_potential_kernel", d)


def _project(d, x, norm, factor, m, features, *_):
    return _forms(f"project_kernel<{FLOATS[x[1]]}>") | _warps("project_kernel", features)


def _symmetrize(G, type, *_):
    return _forms(f"symmetrize_kernel<{FLOATS[type]}>") | _add_chunks()


def _reciprocal_potential(*_):
    return _forms("reciprocal_potential_kernel")


def _column_totals(*_):
    return _forms("column_totals_kernel")


def _total_potential(*_):
    return _forms("total_potential_kernel")


def _divide_potential(*_):
    return _forms("divide_potential_kernel")


def _loss_and_stats(images, count, sums, n, norm, *_):
    return _forms("loss_and_stats_kernel", norm=norm, no_norm=not norm)


def run_problems(way: str, problems: list[str] | None = None) -> None:
    """Make all calls of the problems once, at full size; results are left as they are."""
    for name in problems or cases.names(way):
        for case in cases.cases(name, way, CPU, toy=False):
            for run in case.runs:
                run.compute()


def leave_out_arithmetic(monkeypatch) -> None:
    """No products, and embeddings and norms that may be anything."""
    monkeypatch.setattr(rows, "check_finite", lambda *_: None)
    monkeypatch.setattr(attention, "_check_products", lambda *_: None)
    monkeypatch.setattr(unit_rows, "multiply", lambda a, b, out, add=False: out)
    monkeypatch.setattr(cases, "embeddings", lambda views, images, D, seed: torch.zeros(views, images, D))


def cuda_forms(monkeypatch, device: Device) -> set[str]:
    """Forms of CUDA kernels that the problems launch on a device."""
    leave_out_arithmetic(monkeypatch)
    table = Table()
    kernels = CudaKernels(table, lambda index: device, "cpu")
    monkeypatch.setattr(cuda, "kernels", lambda: kernels)
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    run_problems("cuda")
    return table.forms


def triton_forms(monkeypatch, way: str, problems: list[str] | None = None) -> set[tuple[str, ...]]:
    """Forms of Triton kernels that the problems launch."""
    from bam_kernels.backends.triton import compile, row_kernels

    forms = set()

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        forms.add(compile.form(kernel, args, options))

    leave_out_arithmetic(monkeypatch)
    kernels = row_kernels.TritonKernels(record)
    monkeypatch.setattr(triton, "kernels", lambda: kernels)
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    run_problems(way, problems)
    return forms
