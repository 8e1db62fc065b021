"""The extension's list of launches: recorded as they ran, run again on other memory."""

import threading

import pytest
import torch
from problems import needs_cpu_kernels
from torch import Tensor

from bam_kernels.backends.extension import _C

pytestmark = needs_cpu_kernels

M, D = 5, 6
SIZES = (M * D, M * D, M)  # of x, unit rows and norms
TYPES = (torch.float32, torch.float32, torch.float64)


def memory() -> list[Tensor]:
    """Rows x, and NaN where kernels write unit rows and norms."""
    x, unit, norm = (torch.full((n,), torch.nan, dtype=dtype) for n, dtype in zip(SIZES, TYPES, strict=True))
    return [x.normal_(), unit, norm]


def addresses(tensors: list[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def recorded(tensors: list[Tensor]):
    """A list with a launch of `normalize`, and one that requires its norms to be finite; both have run."""
    launches = _C.LaunchList()
    kernels = _C.cpu_kernels("plain").recorded(launches)
    x, unit, norm = addresses(tensors)
    kernels.normalize(x, M, D, D, unit, norm, 1)
    kernels.require_finite(norm, M)
    return launches


def placed(tensors: list[Tensor]):
    """The launches of `recorded`, placed so that each tensor is the start of a base of its own."""
    launches = recorded(tensors)
    launches.place(0, [(0, 0), (1, 0), (2, 0)])
    launches.place(1, [(2, 0)])
    return launches


def check(tensors: list[Tensor]) -> None:
    x, unit, norm = tensors
    rows = x.view(M, D).double()
    assert ((norm - rows.norm(dim=1)).abs() <= 1e-6).all()
    assert ((unit.view(M, D) - rows / rows.norm(dim=1, keepdim=True)).abs() <= 1e-6).all()


def test_launches_run_as_they_are_recorded():
    tensors = memory()
    launches = recorded(tensors)
    check(tensors)
    x, unit, norm = addresses(tensors)
    assert len(launches) == 2
    assert launches.addresses(0) == [x, unit, norm] and launches.addresses(1) == [norm]


def test_kernels_without_a_list_record_nothing():
    launches = _C.LaunchList()
    kernels, tensors = _C.cpu_kernels("plain"), memory()
    kernels.recorded(launches)
    x, unit, norm = addresses(tensors)
    kernels.normalize(x, M, D, D, unit, norm, 1)
    check(tensors)
    assert len(launches) == 0


def test_launches_run_again_on_other_memory():
    first = memory()
    launches = placed(first)
    kept = [x.clone() for x in first]
    for _ in range(3):
        other = memory()
        launches.run(0, 2, addresses(other), 0)
        check(other)
    for x, copy in zip(first, kept, strict=True):
        assert torch.equal(x, copy)


def test_places_within_a_base():
    """All in one workspace, in another order, at offsets in bytes."""
    launches = recorded(memory())
    launches.place(0, [(1, 0), (0, 64), (0, 512)])
    launches.place(1, [(0, 512)])
    workspace = torch.full((1024,), 255, dtype=torch.uint8)
    x = memory()[0]
    launches.run(0, 2, addresses([workspace, x]), 0)
    check([x, workspace[64 : 64 + 4 * M * D].view(torch.float32), workspace[512 : 512 + 8 * M].view(torch.float64)])
    rest = workspace.clone()
    rest[64 : 64 + 4 * M * D] = 255
    rest[512 : 512 + 8 * M] = 255
    assert (rest == 255).all()


def test_a_part_of_the_list():
    launches, other = placed(memory()), memory()
    bases = addresses(other)
    launches.run(0, 0, bases, 0)
    assert other[1].isnan().all()
    with pytest.raises(ValueError, match="a row has values that are not finite"):
        launches.run(1, 2, bases, 0)  # norms that `normalize` has not written
    launches.run(0, 1, bases, 0)
    launches.run(1, 2, bases, 0)
    check(other)


def test_a_place_is_needed_for_each_address():
    launches = recorded(memory())
    for places in ([], [(0, 0), (1, 0)], [(0, 0), (1, 0), (2, 0), (2, 0)]):
        with pytest.raises(ValueError, match="a place is needed for each address"):
            launches.place(0, places)
    with pytest.raises(IndexError):
        launches.place(2, [])
    with pytest.raises(TypeError):
        launches.place(0, [(-1, 0), (1, 0), (2, 0)])


def test_nothing_runs_without_places_or_bases():
    launches, other = recorded(memory()), memory()
    with pytest.raises(IndexError):  # before `place`
        launches.run(0, 1, addresses(other), 0)
    launches.place(0, [(0, 0), (1, 0), (2, 0)])
    with pytest.raises(IndexError):  # base 2 is missing
        launches.run(0, 1, addresses(other)[:2], 0)
    with pytest.raises(IndexError):  # there is no launch 2
        launches.run(2, 3, addresses(other), 0)
    with pytest.raises(IndexError):
        launches.addresses(2)
    assert other[1].isnan().all() and other[2].isnan().all()


def test_an_error_of_a_launch_leaves_the_list_usable():
    launches = placed(memory())
    for _ in range(2):
        bad = memory()
        bad[0][7] = torch.inf
        with pytest.raises(ValueError, match="a row has values that are not finite"):
            launches.run(0, 2, addresses(bad), 0)
        good = memory()
        launches.run(0, 2, addresses(good), 0)
        check(good)


def test_a_launch_that_fails_is_not_recorded():
    launches, norm = _C.LaunchList(), torch.full((M,), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        _C.cpu_kernels("plain").recorded(launches).require_finite(norm.data_ptr(), M)
    assert len(launches) == 0


def test_threads_share_a_list():
    launches = placed(memory())
    given = [[memory() for _ in range(50)] for _ in range(4)]

    def run(of_thread: list[list[Tensor]]) -> None:
        for tensors in of_thread:
            launches.run(0, 2, addresses(tensors), 0)

    threads = [threading.Thread(target=run, args=(of_thread,)) for of_thread in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_thread in given:
        for tensors in of_thread:
            check(tensors)


def test_the_list_outlives_the_kernels():
    """Kernels may be freed before their launches run again. An address that was null stays null."""
    launches, n = _C.LaunchList(), 4
    kernels = _C.cpu_kernels("plain").recorded(launches)
    s, row, y = torch.zeros(2, n), torch.zeros(2, 2), torch.zeros(2)
    col, v = torch.zeros(2, n), torch.ones(n)
    row[1], col[1] = 1.0, 1.0
    pairs = [(x[0].data_ptr(), x[1].data_ptr()) for x in (row, col)]
    kernels.plan_products((s.data_ptr(), False, 0, n), 2, n, 1.0, *pairs, v.data_ptr(), 0, y.data_ptr(), 0, 1)
    assert y.tolist() == [n, n] and 0 not in launches.addresses(0)
    del kernels
    used = [s, *row, *col, v, y]
    assert launches.addresses(0) == addresses(used)
    launches.place(0, [(i, 0) for i in range(len(used))])
    other = [x.clone() for x in used]
    other[5] *= 3
    launches.run(0, 1, addresses(other), 0)
    assert other[6].tolist() == [3 * n, 3 * n] and y.tolist() == [n, n]
