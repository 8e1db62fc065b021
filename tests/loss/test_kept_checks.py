"""Checks that are made once for calls that are alike: no bad call passes because a good one did before it.

bam_kernels/layout.py defines the dimension letters.
"""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from problems import assert_close, features, needs_cpu_kernels
from repeated_steps import Case, by_engine, check_equal, record, repeated, result
from torch import Tensor

from bam_kernels import BAMLoss, bam_loss, bam_targets, checked_call, reference
from bam_kernels.options import Options
from bam_kernels.simulated import SimulatedRanks

pytestmark = needs_cpu_kernels

# A good option, an equal or similar value that is wrong, and the error.
OPTIONS = {
    "iterations as a float": ({"iterations": 3}, {"iterations": 3.0}, TypeError, "iterations must be an integer"),
    "iterations as True": ({"iterations": 1}, {"iterations": True}, TypeError, "iterations must be an integer"),
    "one iteration as a float": ({"iterations": 1}, {"iterations": 1.0}, TypeError, "iterations must be an integer"),
    "no iteration": ({}, {"iterations": 0}, ValueError, "iterations must be at least 1"),
    "iterations as a text": ({}, {"iterations": "3"}, TypeError, "iterations must be an integer"),
    "epsilon as True": ({"epsilon": 1.0}, {"epsilon": True}, TypeError, "epsilon must be a number"),
    "epsilon as True after 1": ({"epsilon": 1}, {"epsilon": True}, TypeError, "epsilon must be a number"),
    "epsilon below zero": ({}, {"epsilon": -0.05}, ValueError, "epsilon must be positive"),
    "epsilon not a number": ({}, {"epsilon": math.nan}, ValueError, "epsilon must be positive"),
    "temperature as True": ({"temperature": 1.0}, {"temperature": True}, TypeError, "temperature must be a number"),
    "a complex temperature": ({"temperature": 1.0}, {"temperature": 1 + 0j}, TypeError, "temperature must be a number"),
    "views as a float": ({"views": 3}, {"views": 3.0}, TypeError, "views must be an integer"),
    "other views": ({"views": 3}, {"views": 2}, ValueError, "student has 3 views"),
    "target_views as True": ({"target_views": 1}, {"target_views": True}, TypeError, "target_views must be"),
    "too many target_views": ({}, {"target_views": 4}, ValueError, "target_views=4 must be at most"),
    "key_views as a float": ({"key_views": 2}, {"key_views": 2.0}, TypeError, "key_views must be an integer"),
    "top_k as False": ({"top_k": 0}, {"top_k": False}, TypeError, "top_k must be an integer"),
    "top_k as a float": ({"top_k": 3}, {"top_k": 3.0}, TypeError, "top_k must be an integer"),
    "mask_positives as 1": ({}, {"mask_positives": 1}, TypeError, "mask_positives must be True or False"),
    "regather as 0": ({}, {"regather": 0}, TypeError, "regather must be True or False"),
    "memory_budget as a float": ({"memory_budget": 10**6}, {"memory_budget": 1e6}, TypeError, "memory_budget must be"),
    "a memory_budget of one": ({}, {"memory_budget": 1}, ValueError, "does not hold the scores of one image"),
    "target_rows in capitals": ({}, {"target_rows": "Teacher"}, ValueError, "target_rows must be one of"),
    "precision as bytes": ({"precision": "exact"}, {"precision": b"exact"}, ValueError, "precision must be one of"),
    "a list as non_finite": ({}, {"non_finite": ["error"]}, ValueError, "non_finite must be one of"),
    "another backend": ({}, {"backend": "cpp"}, ValueError, "backend must be one of"),
    "engine of another backend": ({"backend": "cpu"}, {"engine": "flash"}, ValueError, 'engine="flash" exists for'),
    "a group of no process": ({}, {"group": "all"}, ValueError, "torch.distributed is not initialised"),
    "an unknown option": ({}, {"epsilom": 0.05}, TypeError, "unexpected keyword argument 'epsilom'"),
    "return_stats as a text": ({}, {"return_stats": "yes"}, TypeError, "return_stats must be True or False"),
    "return_stats as 1": ({}, {"return_stats": 1}, TypeError, "return_stats must be True or False"),
}


def check_good_calls(case: Case, **options) -> None:
    """Check that valid calls repeat their recording and give the results of the engine."""
    for seed in (1, 2):
        check_equal(repeated(*case.inputs(seed), **options), by_engine(*case.inputs(seed), **options))


@pytest.mark.parametrize("function", [bam_loss, bam_targets])
@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, function):
    good, bad, error, words = OPTIONS[name]
    if function is bam_targets and "return_stats" in bad:
        words = "unexpected keyword argument 'return_stats'"
    case = Case(V=3, R=2)
    record(*case.inputs(0), **good)
    function(*case.inputs(0), **good)
    for _ in range(2):
        with pytest.raises(error, match=words):
            function(*case.inputs(0), **good | bad)
    check_good_calls(case, **good)


STUDENT, TEACHER = Case(V=3, R=2).inputs(0)


def with_nan(x: Tensor, row: int, value: float = math.nan) -> Tensor:
    changed = x.clone()
    changed.flatten(0, 1)[row, 3] = value
    return changed


INPUTS = {
    "a list": (lambda: (STUDENT.tolist(), TEACHER), TypeError, "student must be a torch.Tensor, got list"),
    "an array": (lambda: (STUDENT, TEACHER.numpy()), TypeError, "teacher must be a torch.Tensor, got ndarray"),
    "1-D": (lambda: (STUDENT.flatten(), TEACHER), ValueError, "student must be 2-D or 3-D"),
    "4-D teacher": (lambda: (STUDENT, TEACHER[None]), ValueError, "teacher must be 2-D or 3-D"),
    "no views": (lambda: (STUDENT.flatten(0, 1), TEACHER), ValueError, "views is needed for a 2-D student"),
    "no images": (lambda: (STUDENT[:, :0], TEACHER), ValueError, "student is empty"),
    "one image": (lambda: (STUDENT[:, :1], TEACHER[:, :1]), ValueError, "nothing left to attend to"),
    "other images": (lambda: (STUDENT, TEACHER[:, 1:]), ValueError, "teacher has 6 images in dimension 1, student has"),
    "other features": (lambda: (STUDENT, TEACHER[..., 1:]), ValueError, "student has 13 features, teacher has 12"),
    "teacher in float16": (lambda: (STUDENT, TEACHER.half()), TypeError, "they may differ under autocast only"),
    "student in bfloat16": (lambda: (STUDENT.bfloat16(), TEACHER), TypeError, "they may differ under autocast only"),
    "student in float64": (lambda: (STUDENT.double(), TEACHER), TypeError, "they may differ under autocast only"),
    "integers": (lambda: (STUDENT.int(), TEACHER), TypeError, "student must be float32, float16, bfloat16 or float64"),
    "sparse student": (lambda: (STUDENT.to_sparse(), TEACHER), TypeError, "student must be a dense tensor"),
    "sparse teacher": (lambda: (STUDENT, TEACHER.to_sparse()), TypeError, "teacher must be a dense tensor"),
    "nested": (lambda: (torch.nested.nested_tensor([*STUDENT]), TEACHER), TypeError, "student must be a dense tensor"),
    "teacher on another device": (lambda: (STUDENT, TEACHER.to("meta")), ValueError, "student is on cpu, teacher on"),
    "NaN": (lambda: (with_nan(STUDENT, 5), TEACHER), ValueError, r"student has 1 row\(s\) .*the first is row 5"),
    "infinity": (lambda: (STUDENT, with_nan(TEACHER, 9, math.inf)), ValueError, "teacher has 1 row.* is row 9"),
    "NaN in both": (lambda: (with_nan(STUDENT, 20), with_nan(TEACHER, 0)), ValueError, "student has 1 row.* is row 20"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_bad_inputs(name, needs_grad):
    make, error, words = INPUTS[name]
    case = Case(V=3, R=2)
    record(*case.inputs(0))
    for _ in range(2):
        bam_loss(*case.inputs(0))
    for _ in range(3):
        student, teacher = make()
        if needs_grad and isinstance(student, Tensor) and student.is_floating_point():
            student = student.detach().requires_grad_()
        with pytest.raises(error, match=words):
            bam_loss(student, teacher)
    check_good_calls(case)


def test_rows_of_a_student_that_do_not_fit():
    student = STUDENT.flatten(0, 1)
    record(student, views=3)
    for rows in (20, 1):
        with pytest.raises(ValueError, match=f"student has {rows} rows, not a multiple of views=3"):
            bam_loss(student[:rows], views=3)
    check_equal(repeated(student, views=3), by_engine(student, views=3))


@pytest.mark.parametrize("R", [0, 2])
def test_float64_after_float32(R):
    """The reference computes it; a named backend refuses, and names the function that was called."""
    student, teacher = Case(V=3, R=R).inputs(0)
    record(student, teacher)
    record(student, teacher, backend="cpu")
    given = student.double(), teacher.double() if R else None
    loss = bam_loss(*given)
    assert loss.dtype == torch.float64 and torch.equal(loss, reference.bam_loss(*given))
    for name, function in (
        ("bam_loss", bam_loss),
        ("bam_targets", bam_targets),
        ("BAMLoss", BAMLoss(backend="cpu").way),
    ):
        options = {} if name == "BAMLoss" else {"backend": "cpu"}
        with pytest.raises(TypeError, match=f'{name}: float64 is computed by backend="reference" only, got .*"cpu"'):
            function(*given, **options)
    check_equal(repeated(student, teacher, backend="cpu"), by_engine(student, teacher, backend="cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_are_not_finite(dtype, value):
    """non_finite="nan" gives NaN and raises nothing; good calls still repeat their recording afterwards."""
    case = Case(V=3, R=2, dtype=dtype)
    record(*case.inputs(0), non_finite="nan")
    for which in (0, 1):
        given = list(case.inputs(1))
        given[which] = with_nan(given[which], 4, value)
        for _ in range(3):
            loss, stats, grad = result(*given, non_finite="nan")
            assert loss.isnan() and stats.isnan().all() and grad.isnan().all()
            assert grad.shape == given[0].shape and grad.dtype == dtype
            with pytest.raises(ValueError, match=f"{('student', 'teacher')[which]} has 1 row.* is row 4"):
                bam_loss(*given)
    check_good_calls(case, non_finite="nan")
    first = with_nan(case.inputs(1)[0], 4, value), case.inputs(1)[1]
    checked_call.forget()
    for _ in range(3):  # also before anything is recorded, and while it is
        assert result(*first, non_finite="nan")[0].isnan()
    result(*case.inputs(1), non_finite="nan")
    check_good_calls(case, non_finite="nan")


def test_types_that_differ_under_autocast_alone():
    student, teacher = Case(V=3, R=2).inputs(0)
    teacher = teacher.half()
    for _ in range(3):
        for _ in range(2):
            with pytest.raises(TypeError, match="they may differ under autocast only"):
                bam_loss(student, teacher)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                found = result(student, teacher)
            repeated(student, teacher)
        check_equal(found, by_engine(student, teacher.float()))


def test_autocast_changes_no_number():
    case = Case(V=3, R=2)
    expected = [by_engine(*case.inputs(seed)) for seed in range(6)]
    for seed in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=seed % 2 > 0):
            check_equal((repeated if seed > 1 else result)(*case.inputs(seed)), expected[seed])


SCALARS = {
    "tensor": lambda: (torch.tensor(0.05, dtype=torch.float64), lambda x, value: x.fill_(value)),
    "array": lambda: (np.array(0.05), lambda x, value: x.fill(value)),
}


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
@pytest.mark.parametrize("field", ["epsilon", "temperature"])
def test_a_number_that_is_changed_in_place(field, scalar):
    number, change = scalar()
    student, _ = Case().inputs(0)
    criterion = BAMLoss(epsilon=lambda step: number)
    for value in (0.05, 0.1, 0.05, 0.2):
        change(number, value)
        for _ in range(3):
            expected = by_engine(student, **{field: value})
            check_equal(result(student, **{field: number}), expected)
            if field == "epsilon":
                assert torch.equal(criterion(student, step=1), expected[0])
    change(number, -1.0)
    with pytest.raises(ValueError, match=rf"{field} must be positive and finite .* got -1\.0"):
        bam_loss(student, **{field: number})


def test_scalars_of_numpy():
    student, _ = Case(V=3).inputs(0)
    plain = {"epsilon": 0.0625, "iterations": 2, "mask_positives": True, "top_k": 3}
    of_numpy = {"epsilon": np.float32(0.0625), "iterations": np.int64(2), "mask_positives": np.bool_(True)}
    for _ in range(3):
        check_equal(result(student, **plain), by_engine(student, **plain))
        check_equal(result(student, **plain | of_numpy), by_engine(student, **plain))
        check_equal(result(student, **plain | {"epsilon": np.float64(0.0625)}), by_engine(student, **plain))
        with pytest.raises(TypeError, match="iterations must be an integer"):
            bam_loss(student, **plain | {"iterations": np.float64(2.0)})
        with pytest.raises(ValueError, match="epsilon must be positive"):
            bam_loss(student, **plain | {"epsilon": np.float64("nan")})


# Process groups


@pytest.fixture
def store():
    yield dist.HashStore()
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_process_group_that_comes_later_and_goes(store):
    """One process of gloo computes what it did without a group; a group that is gone is an error."""
    case = Case(V=3, R=2)
    record(*case.inputs(0))
    expected = [by_engine(*case.inputs(seed)) for seed in range(4)]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.new_group([0])
    for seed in range(4):
        check_equal(result(*case.inputs(seed)), expected[seed])
        check_equal(result(*case.inputs(seed), group=group), expected[seed])
    dist.destroy_process_group()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"group is given, but .* is not initialised"):
            bam_loss(*case.inputs(0), group=group)
    check_good_calls(case)


def test_a_default_group_of_two_ranks_that_comes_later(store):
    """The checked layout counts the keys of both ranks. No loss is computed, because the fake backend sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    student, teacher = Case(V=3, R=2).inputs(0)
    record(student, teacher)
    before = checked_call.checked_call("bam_loss", student, teacher, Options())
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    during = checked_call.checked_call("bam_loss", student, teacher, Options())
    dist.destroy_process_group()
    after = checked_call.checked_call("bam_loss", student, teacher, Options())
    assert [(x.layout.W, x.layout.rank, x.layout.N) for x in (before, during)] == [(1, 0, 14), (2, 1, 28)]
    assert after is before and after.step("cpu") is not during.step("cpu")


def test_simulated_ranks_after_one_rank():
    """Other keys, W and rank; and other keys with equal W and rank."""
    student, _ = Case().inputs(0)
    record(student)
    keys = torch.nn.functional.normalize(features(1, 28, 13, seed=5)[0], dim=1)
    losses = []
    for ranks in (SimulatedRanks(2, 0, keys), SimulatedRanks(2, 0, -keys), SimulatedRanks(2, 1, keys)):
        found = [result(student, group=ranks) for _ in range(4)]
        checked_call.forget()
        expected = result(student, group=ranks)
        for x in found:
            check_equal(x, expected)
        losses.append(expected[0].item())
        record(student)
        check_equal(repeated(student), by_engine(student))
    assert len({*losses, by_engine(student)[0].item()}) == 4
    with pytest.raises(ValueError, match="SimulatedRanks: keys is"):
        bam_loss(student, group=SimulatedRanks(2, 0, keys[:14]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_group_is_kept(store, backend):
    """A process group ends its threads only when nobody holds it; simulated ranks hold keys."""
    student, _ = Case().inputs(0)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group, simulated = dist.new_group([0]), SimulatedRanks(2, 0, features(1, 28, 13)[0])
    gone = weakref.ref(group), weakref.ref(simulated)
    for ranks in (group, simulated):
        for _ in range(3):
            bam_loss(student.clone().requires_grad_(), group=ranks, backend=backend).backward()
            bam_targets(student, group=ranks, backend=backend)
    dist.destroy_process_group(group)
    del group, simulated, ranks
    gc.collect()
    assert [x() for x in gone] == [None, None]


def test_a_group_in_place_of_another_with_the_reference(store):
    """The second group computes although the first, which had equal ranks, is destroyed."""
    student = Case().inputs(0)[0].double()
    expected = bam_loss(student)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    for _ in range(2):
        group = dist.new_group([0])
        for _ in range(2):
            assert_close(bam_loss(student, group=group), expected, 0.0)
            bam_targets(student, group=group)
        dist.destroy_process_group(group)
