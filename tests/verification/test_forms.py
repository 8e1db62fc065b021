"""The problems of the verification force every form of the kernels that a GPU has."""

import re
from collections.abc import Iterator

import emulated
import pytest
import recorded_forms
from recorded_forms import DEVICES

from bam_kernels.backends.extension import _C

# Branches of CUDA kernels, by the name of their launch. A device has clusters, or rows of more lengths in a block.
ALIGNED = ("aligned", "not aligned")
CHUNKS = ("one chunk", "several chunks")
SUMS = (*ALIGNED, *CHUNKS, "accumulate in one chunk")
# Branches by the number of features: a row of few is one warp's, of more several warps'.
WARPS = {
    f"{kernel}_kernel: {warps} a row"
    for kernel in ("normalize", "centre_potential", "project")
    for warps in ("one warp", "several warps")
}
MATCH = (*ALIGNED, "targets", "source", "gradient", "top k")
SHORT = {
    "column_lse_kernel<float32>": (*SUMS, "not masked"),
    "column_lse_kernel<float32, epilogue>": (*SUMS, "masked", "not masked"),
    "quantize_kernel": (*ALIGNED, *CHUNKS, "masked", "not masked"),
    "match_kernel<int16>": (*MATCH, "odd views", "one view", "few rows at once"),
    "match_kernel<float32>": (*MATCH, "odd views", "one view", "row out"),
    "sinkhorn_pass_kernel<int16>": (*ALIGNED, "groups of 8 bytes"),
    "sinkhorn_pass_kernel<float32>": (*ALIGNED, "groups of 8 bytes"),
}
LONG = {
    "match_long_kernel<int16>": MATCH,
    "match_long_kernel<float32>": MATCH,
    "row_step_kernel<int16>": (),
    "row_step_kernel<float32>": (),
}
CLUSTERS = {
    "match_kernel<int16, cluster>": (*MATCH, "odd views"),
    "match_kernel<float32, cluster>": (*MATCH, "odd views", "row out"),
    "sinkhorn_pass_kernel<int16, cluster>": (*ALIGNED, "groups of 8 bytes"),
    "sinkhorn_pass_kernel<float32, cluster>": (*ALIGNED, "groups of 8 bytes"),
    "sinkhorn_on_chip_kernel<int16>": (*ALIGNED, "several iterations"),
    "sinkhorn_on_chip_kernel<float32>": (*ALIGNED, "several iterations"),
}
NO_CLUSTERS = {
    "match_long_kernel<int16>": ("odd views",),
    "match_long_kernel<float32>": ("odd views", "row out"),
    "sinkhorn_pass_kernel<int16>": ("groups of 4 bytes",),
    "sinkhorn_pass_kernel<float32>": ("groups of 4 bytes",),
}
OTHERS = {
    "merge_lse_kernel": ("accumulate",),
    "add_chunks_kernel": ("accumulate", "divide", "factor"),
    "mask_positives_kernel": (),
    "reciprocal_potential_kernel": (),
    "column_totals_kernel": (),
    "total_potential_kernel": (),
    "divide_potential_kernel": (),
    "row_products_kernel<float32>": (),
    "column_products_kernel<float32>": ("u", "no u"),
    "column_products_kernel<int16>": ("no u",),
    "plan_subtract_kernel<float32>": ("u", "v"),
    "symmetrize_kernel<float16>": (),
    "symmetrize_kernel<float32>": (),
    "normalize_kernel<float32>": ("centre", "no centre", "norms alone", "message"),
    "normalize_kernel<float16>": ("centre", "norms alone", "message"),
    "normalize_kernel<bfloat16>": ("centre", "norms alone", "message"),
    "mean_row_kernel<float32>": ("norm", "no norm"),
    "mean_row_kernel<float16>": ("norm", "no norm"),
    "mean_row_kernel<bfloat16>": ("norm",),
    "product_step_kernel": ("other rows", "no other rows"),
    "centre_potential_kernel": (),
    "project_kernel<float32>": (),
    "project_kernel<float16>": (),
    "project_kernel<bfloat16>": (),
    "loss_and_stats_kernel": ("norm", "no norm"),
}
# No public function launches these: attention has float32 scores, and int16 scores are summed when they are made.
UNUSED = {"plan_subtract_kernel<int16>", "column_lse_kernel<int16>"}


def expected(has_clusters: bool) -> Iterator[str]:
    yield from WARPS
    for kernels in (SHORT, LONG, OTHERS, CLUSTERS if has_clusters else NO_CLUSTERS):
        for kernel, branches in kernels.items():
            yield kernel
            yield from (f"{kernel}: {branch}" for branch in branches)


@pytest.mark.skipif(_C is None, reason="launch shapes need the extension")
@pytest.mark.parametrize("name", DEVICES)
def test_every_form_of_the_cuda_kernels_is_forced(name, monkeypatch):
    device = DEVICES[name]
    found = recorded_forms.cuda_forms(monkeypatch, device)
    assert found == set(expected(device.cluster > 1))


def test_no_cuda_kernel_is_forgotten():
    launched = set()
    for source in emulated.SOURCES.glob("*.cu"):
        launched |= set(re.findall(r'"(\w+_kernel(?:<[^"]+>)?)"', source.read_text()))
    known = {name.replace(", cluster", "") for name in (*SHORT, *LONG, *CLUSTERS, *OTHERS)} | UNUSED
    assert len(launched) > 20
    assert {re.sub(r"<.*", "", name) for name in launched} == {re.sub(r"<.*", "", name) for name in known}
    assert {name for name in launched if "<" in name} <= known


def test_every_form_of_the_triton_kernels_is_forced(monkeypatch):
    pytest.importorskip("triton")
    from bam_kernels.backends.triton import compile

    all_forms = set()
    compile.call_all(lambda label: lambda k, grid, *args, **o: all_forms.add(compile.form(k, args, o)), small=True)
    found = recorded_forms.triton_forms(monkeypatch, "triton") | recorded_forms.triton_forms(monkeypatch, "flash")
    left = {form for form in all_forms - found if not is_unused(form)}
    assert not left
    assert all_forms & found


def is_unused(form: tuple[str, ...]) -> bool:
    """Whether no public function launches this form, or each of its switches is forced in another form."""
    kernel, switches = form[0], set(form[1:])
    if {"MASK_POSITIVES=False", "PRECISION=tf32"} <= switches:
        return True
    of_attention = kernel in ("row_products", "plan_subtract") or (
        kernel.startswith("match") and "no source" in switches and "no row_out_exponent" not in switches
    )
    scores_are_int16 = "no scale_pointer" not in switches and "no step" not in switches
    if of_attention and scores_are_int16:
        return True
    if kernel == "column_products":  # of a product with u in the gradient of attention, which has float32 scores
        return scores_are_int16 and "no u" not in switches
    if kernel == "plan_subtract":  # it subtracts the part of u and the part of v one after the other
        return not switches & {"no u", "no v"}
    return kernel == "column_lse" and {"no fixed", "no bias"} <= switches and scores_are_int16
