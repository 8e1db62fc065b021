"""The problems find right kernels right, and name the problem and the result that a faulty kernel spoils."""

import itertools
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from cuda_device import DEVICE, kernels_on

from bam_kernels.backends import cuda
from bam_kernels.backends.cuda import shapes
from bam_kernels.backends.cuda.row_kernels import CudaKernels
from bam_kernels.verification import cases, problems

if DEVICE.type != "cpu":
    pytest.skip("faults are planted under the emulator", allow_module_level=True)


@pytest.fixture
def kernels(monkeypatch) -> CudaKernels:
    """Emulated kernels, whose blocks have one warp: small problems then are spread over clusters, or long."""
    made = kernels_on()
    monkeypatch.setattr(shapes, "MOST_THREADS", 32)
    monkeypatch.setattr(cuda, "kernels", lambda: made)
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(problems, "at", "")
    return made


def try_problems(monkeypatch, *names: str) -> dict[str, str]:
    monkeypatch.setattr(cases, "names", lambda way: list(names))
    return problems.try_way("cuda", DEVICE, toy=True)


@pytest.mark.slow
def test_right_kernels_are_verified(kernels, monkeypatch):
    assert try_problems(monkeypatch, *cases.names("cuda")) == {"status": "verified"}


def test_right_kernels_are_verified_on_a_small_problem(kernels, monkeypatch):
    assert try_problems(monkeypatch, "one view", "attention") == {"status": "verified"}


# Faults: each gives a method of the kernels, and a change of its arguments or results.


def without_bias(method, s, bias, *rest, **named):
    return method(s, None, *rest, **named)


def masked_one_row_late(method, s, step, out, positives, bias):
    return method(s, step, out, replaced(positives), bias)


def masked_one_row_late_in_float32(method, s, positives):
    return method(s, replaced(positives))


def replaced(positives):
    return positives._replace(first=positives.first + 1)


def step_half_a_percent_too_large(method, *args, step, **named):
    return method(*args, step=step if isinstance(step, float) else step * 1.005, **named)


def one_weight_too_few(method, *args, top_k=0, **named):
    return method(*args, top_k=max(top_k - 1, 0), **named)


def one_weight_too_many(method, *args, top_k=0, **named):
    return method(*args, top_k=top_k + 1 if top_k else 0, **named)


def last_row_left_as_it_was(method, d, *rest):
    before = d[-1].clone()
    method(d, *rest)[-1] = before
    return d


def last_column_off(method, col, c):
    method(col, c)
    col.mantissa[-1] *= 1.001


def tail_not_written(method, *args, targets=None, **named):
    found = method(*args, targets=targets, **named)
    if targets is not None:
        targets[..., -1] = math.nan
    return found


def small_weights_off(method, *args, targets=None, **named):
    found = method(*args, targets=targets, **named)
    if targets is not None:
        targets[targets < 1e-3] *= 1.2
    return found


def masked_weight_left(method, *args, targets=None, **named):
    found = method(*args, targets=targets, **named)
    if targets is not None:
        targets[targets == 0] = 1e-20
    return found


def overwritten_sums(method, s, scale, row, shift, sums, accumulate):
    return method(s, scale, row, shift, sums, False)


def not_divided(method, col, c):
    pass


CALLS = itertools.count()


def another_order(method, *args):
    loss, stats = method(*args)
    return loss * (1 + 2**-23 * (next(CALLS) // 2 % 2)), stats  # two calls make the results once


def gradient_of_an_image_off(method, G):
    sums = method(G)
    G[0] *= 1.05
    return sums


FAULTS = [
    ("one launch", "quantize", masked_one_row_late, "loss"),
    ("one launch", "mask_positives_", masked_one_row_late_in_float32, "loss"),
    ("one launch", "match", step_half_a_percent_too_large, "targets"),
    ("one launch", "match", one_weight_too_few, "loss"),
    ("one launch", "match", one_weight_too_many, "loss"),
    ("one launch", "match", masked_weight_left, "targets"),
    ("one launch", "project_", last_row_left_as_it_was, "gradient"),
    ("one launch", "symmetrize_", gradient_of_an_image_off, "gradient"),
    ("one launch", "loss_and_stats", another_order, "loss"),
    ("one launch", "column_lse", overwritten_sums, "gradient"),
    ("one view", "finish_scores", without_bias, "loss"),
    ("one view", "divide_potential_", last_column_off, "loss"),
    ("one view", "match", tail_not_written, "targets"),
    ("one view", "match", small_weights_off, "targets"),
    ("attention", "divide_potential_", not_divided, "gradients"),
]


@pytest.mark.parametrize(("problem", "kernel", "fault", "result"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_fault_is_found(problem, kernel, fault, result, kernels, monkeypatch):
    method = getattr(kernels, kernel)

    def faulty(*args: Any, **named: Any) -> Any:
        return fault(method, *args, **named)

    monkeypatch.setattr(kernels, kernel, faulty)
    found = try_problems(monkeypatch, problem)
    assert found["status"] == "failed"
    assert re.match(rf"{problem}: .*numbers of the {result} (are wrong|differ from run to run) \(", found["reason"])


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        ("cpu", 0, "1 of 1 numbers of the loss are wrong (some)"),
        ("cpu", 1, "numbers of the loss differ from run to run (some)"),
        ("cuda", 0, "1 of 1 numbers of the loss are wrong (some)"),
        ("cuda", 1, "numbers of the loss differ from run to run (some)"),
        ("cuda", 2, "numbers of the loss differ from run to run (some)"),
    ],
)
def test_every_call_of_a_run_is_compared(place, wrong, said, monkeypatch):
    """Two calls; on a GPU, where the third repeats what the second has recorded, three."""
    calls = itertools.count()

    def compute() -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(2.0 if next(calls) == wrong else 1.0)}

    monkeypatch.setattr(problems, "poison", lambda device: None)
    run = cases.Run("some", compute, {"loss": cases.Bound(1e-6, 0.0)})
    case = cases.Case(lambda: {"loss": torch.tensor(1.0, dtype=torch.float64)}, [run])
    with pytest.raises(problems.Wrong, match=re.escape(said)):
        problems.run_case(case, torch.device(place))
    assert next(calls) == (3 if place == "cuda" else 2)


def test_what_is_printed_tells_where_and_how_a_kernel_is_wrong(kernels, monkeypatch, capsys):
    """All results of the run that is wrong, some wrong numbers beside the right ones, and what was right before."""
    method = kernels.symmetrize_
    monkeypatch.setattr(kernels, "symmetrize_", lambda G: gradient_of_an_image_off(method, G))
    assert try_problems(monkeypatch, "one launch")["status"] == "failed"
    printed = capsys.readouterr().out
    *_, targets = printed.splitlines()
    assert targets.startswith("    targets               largest error 0.")
    wrong = re.findall(r"^      \[\d, \d, \d+\]: (\S+), not (\S+)$", printed, re.MULTILINE)
    assert len(wrong) == problems.SHOWN and all(found != right for found, right in wrong)


def test_what_was_right_is_printed_last(kernels, monkeypatch, capsys):
    assert try_problems(monkeypatch, "one view", "attention") == {"status": "verified"}
    one_view, attention = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"one view: right, largest error 0\.\d+ of its bound", one_view)
    assert attention.startswith("attention: right, ")


def test_an_error_is_printed_with_its_place(monkeypatch, capsys):
    monkeypatch.setattr(problems, "at", "teacher")

    def launch_wrongly(*_):
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(problems, "try_way", launch_wrongly)
    assert problems.main(["cuda", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "in launch_wrongly" in printed and printed.rstrip().endswith("RuntimeError: CUDA error: invalid argument")


@pytest.mark.parametrize("name", [name for name, problem in cases.PROBLEMS.items() if problem.top_k])
def test_rounding_does_not_decide_which_weights_are_kept(name):
    for case in itertools.chain.from_iterable(cases.cases(name, "cuda", DEVICE, toy=toy) for toy in (True, False)):
        assert isinstance(case.truth, partial)
        *inputs, options = case.truth.args
        if top_k := options.pop("top_k", 0):
            largest = weights(*inputs, options).topk(top_k + 1).values
            assert (largest[:, -2] > 1.4 * largest[:, -1]).all()


def weights(_loss, targets, z, y, group, options):
    """Mean over views of the weights of all keys, for each image."""
    return targets(z, y, group=group, **options).unflatten(0, (-1, z.shape[1])).mean(0)


def test_a_crash_leaves_no_core_file(monkeypatch):
    limits = []
    monkeypatch.setattr(problems.resource, "getrlimit", lambda kind: (5, 7))
    monkeypatch.setattr(problems.resource, "setrlimit", lambda *kind_and_limits: limits.append(kind_and_limits))
    problems.leave_no_core_file()
    assert limits == [(problems.resource.RLIMIT_CORE, (0, 7))]
