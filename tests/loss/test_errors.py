"""Calls that must fail: the type of the error and the words and numbers its message must hold."""

import math

import pytest
import torch
from problems import features, needs_cpu_kernels

from bam_kernels import BAMLoss, backends, bam_loss, bam_targets, reference, sinkhorn_attention
from bam_kernels.backends import cpu
from bam_kernels.options import Options

Z = features(2, 5, 4)  # two views of five images
FLAT = Z.flatten(0, 1)
Q, K = FLAT, features(1, 6, 4, seed=1)[0]


def with_value(x: torch.Tensor, row: int, value: float) -> torch.Tensor:
    x = x.clone()
    x.flatten(0, -2)[row, 1] = value
    return x


# Arguments of bam_loss, the exception, and what its message holds.
LOSS = {
    "not a tensor": (([1.0],), {}, TypeError, ["student", "torch.Tensor", "list"]),
    "integers": ((Z.long(),), {}, TypeError, ["student", "float32, float16, bfloat16 or float64", "torch.int64"]),
    "one dimension": ((Z[0, 0],), {}, ValueError, ["student", "2-D or 3-D", "(4,)"]),
    "four dimensions": ((Z[None],), {}, ValueError, ["student", "2-D or 3-D", "(1, 2, 5, 4)"]),
    "no views": ((FLAT,), {}, ValueError, ["views is needed", "2-D", "(10, 4)"]),
    "not a multiple": ((FLAT,), {"views": 4}, ValueError, ["student has 10 rows", "multiple of views=4"]),
    "other views": ((Z,), {"views": 3}, ValueError, ["student has 2 views", "views=3"]),
    "no images": ((Z[:, :0],), {}, ValueError, ["student is empty", "(2, 0, 4)"]),
    "no rows": ((FLAT[:0],), {"views": 2}, ValueError, ["student is empty", "(0, 4)"]),
    "no view": ((Z[:0],), {}, ValueError, ["student is empty", "(0, 5, 4)"]),
    "no features": ((Z[..., :0],), {}, ValueError, ["student is empty", "(2, 5, 0)"]),
    "one image": ((Z[:, :1],), {}, ValueError, ["nothing left to attend to", "N=2", "mask_positives=False"]),
    "one row": ((FLAT[:1],), {"views": 1}, ValueError, ["nothing left to attend to", "N=1"]),
    "NaN": ((with_value(Z, 7, math.nan),), {}, ValueError, ["student has 1 row(s)", "non-finite", "row 7"]),
    "infinity": ((with_value(Z, 0, -math.inf),), {}, ValueError, ["student", "non-finite", "row 0"]),
    "NaN of 16 bit": ((with_value(Z, 9, math.nan).half(),), {}, ValueError, ["student", "non-finite", "row 9"]),
    "NaN of a teacher": (
        (Z, with_value(Z, 6, math.nan)),
        {},
        ValueError,
        ["teacher has 1 row(s)", "non-finite", "row 6"],
    ),
    "NaN of an unused view": (
        (Z, with_value(features(3, 5, 4), 14, math.nan)),
        {"target_rows": "student"},
        ValueError,
        ["teacher", "row 14"],
    ),
    "teacher not a tensor": ((Z, 3), {}, TypeError, ["teacher", "torch.Tensor", "int"]),
    "teacher of integers": ((Z, Z.int()), {}, TypeError, ["teacher", "torch.int32"]),
    "teacher of one dimension": ((Z, Z[0, 0]), {}, ValueError, ["teacher", "2-D or 3-D", "(4,)"]),
    "teacher's features": ((Z, Z[..., :3]), {}, ValueError, ["student has 4 features", "teacher has 3"]),
    "teacher's images": ((Z, Z[:, :3]), {}, ValueError, ["teacher has 3 images", "student has 5"]),
    "teacher's rows": ((Z, FLAT[:7]), {}, ValueError, ["teacher has 7 rows", "multiple", "5 images"]),
    "empty teacher": ((Z, Z[:0]), {}, ValueError, ["teacher is empty", "(0, 5, 4)"]),
    "teacher's type": ((Z, Z.half()), {}, TypeError, ["torch.float32", "torch.float16", "autocast"]),
    "teacher's float64": ((Z, Z.double()), {}, TypeError, ["torch.float32", "torch.float64", "autocast"]),
    "teacher's device": ((Z, Z.to("meta")), {}, ValueError, ["student is on cpu", "teacher on meta"]),
    "target views": ((Z,), {"target_views": 3}, ValueError, ["target_views=3", "at most views=2"]),
    "target views of a teacher": ((Z, Z[:1]), {"target_views": 2}, ValueError, ["target_views=2", "teacher's 1 views"]),
    "key views": ((Z,), {"key_views": 3}, ValueError, ["key_views=3", "at most views=2"]),
    "key views of a teacher": ((Z, Z[:1]), {"key_views": 2}, ValueError, ["key_views=2", "teacher's 1 views"]),
    "default key views": (
        (Z, Z[:1]),
        {"target_views": 2, "target_rows": "student"},
        ValueError,
        ["key_views=2", "teacher's 1 views"],
    ),
}

# Options of bam_loss, bam_targets and BAMLoss.
OPTIONS = {
    "views 0": ({"views": 0}, ValueError, ["views must be at least 1", "0"]),
    "views 2.0": ({"views": 2.0}, TypeError, ["views must be an integer", "2.0"]),
    "target_views 0": ({"target_views": 0}, ValueError, ["target_views must be at least 1", "0"]),
    "key_views -1": ({"key_views": -1}, ValueError, ["key_views must be at least 1", "-1"]),
    "key_views True": ({"key_views": True}, TypeError, ["key_views must be an integer", "True"]),
    "temperature 0": ({"temperature": 0}, ValueError, ["temperature must be positive and finite", "0"]),
    "temperature NaN": ({"temperature": math.nan}, ValueError, ["temperature must be positive and finite", "nan"]),
    "temperature text": ({"temperature": "0.1"}, TypeError, ["temperature must be a number", "'0.1'"]),
    "epsilon -1": ({"epsilon": -1.0}, ValueError, ["epsilon must be positive and finite", "-1.0"]),
    "epsilon 1e-45": (
        {"epsilon": 1e-45},
        ValueError,
        ["epsilon must be positive and finite (at least 1e-06)", "1e-45"],
    ),
    "epsilon infinite": ({"epsilon": math.inf}, ValueError, ["epsilon must be positive and finite", "inf"]),
    "epsilon None": ({"epsilon": None}, TypeError, ["epsilon must be a number", "None"]),
    "iterations 0": ({"iterations": 0}, ValueError, ["iterations must be at least 1", "0"]),
    "iterations 1.5": ({"iterations": 1.5}, TypeError, ["iterations must be an integer", "1.5"]),
    "top_k -1": ({"top_k": -1}, ValueError, ["top_k must be at least 0", "-1"]),
    "top_k None": ({"top_k": None}, TypeError, ["top_k must be an integer", "None"]),
    "mask_positives 1": ({"mask_positives": 1}, TypeError, ["mask_positives must be True or False", "1"]),
    "target_rows": ({"target_rows": "key"}, ValueError, ["target_rows must be one of teacher, student", "'key'"]),
    "backend": ({"backend": "c++"}, ValueError, ["backend must be one of auto, reference, cpu, triton, cuda", "'c++'"]),
    "engine": ({"engine": "fast"}, ValueError, ["engine must be one of auto, slab, flash", "'fast'"]),
    "precision": ({"precision": "high"}, ValueError, ["precision must be one of default, exact, fp8", "'high'"]),
    "memory_budget 0": ({"memory_budget": 0}, ValueError, ["memory_budget must be at least 1", "0"]),
    "memory_budget 1e9": ({"memory_budget": 1e9}, TypeError, ["memory_budget must be an integer", "1000000000.0"]),
    "flash on cpu": ({"engine": "flash", "backend": "cpu"}, ValueError, ["flash", "triton", 'backend="cpu"']),
    "flash in the reference": (
        {"engine": "flash", "backend": "reference"},
        ValueError,
        ["flash", "triton", "reference"],
    ),
}

# What the machine or the backend cannot do with CPU tensors.
EXECUTION = {
    "float64 on cpu": ({"backend": "cpu"}, torch.float64, TypeError, ["float64", 'backend="cpu"', '"reference"']),
    "float64 on triton": ({"backend": "triton"}, torch.float64, TypeError, ["float64", 'backend="triton"']),
    "triton": (
        {"backend": "triton"},
        torch.float32,
        ValueError,
        ['backend="triton" cannot run here', "TRITON_INTERPRET"],
    ),
    "cuda": ({"backend": "cuda"}, torch.float32, ValueError, ['backend="cuda" cannot run here', "cpu"]),
    "fp8": ({"precision": "fp8"}, torch.float32, ValueError, ['precision="fp8"', 'backend="auto"']),
    "fp8 on cpu": ({"precision": "fp8", "backend": "cpu"}, torch.float32, ValueError, ["fp8", 'backend="cpu"']),
    "fp8 in the reference": ({"precision": "fp8", "backend": "reference"}, torch.float32, ValueError, ["fp8"]),
}

ATTENTION = {
    "not a tensor": (([1.0],), {}, TypeError, ["q must be a torch.Tensor", "list"]),
    "k not a tensor": ((Q, 1), {}, TypeError, ["k must be a torch.Tensor", "int"]),
    "integers": ((Q.int(),), {}, TypeError, ["q", "torch.int32"]),
    "three dimensions": ((Z,), {}, ValueError, ["q must be 2-D", "(2, 5, 4)"]),
    "k of one dimension": ((Q, Q[0]), {}, ValueError, ["k must be 2-D", "(4,)"]),
    "features": ((Q, K[:, :3]), {}, ValueError, ["q has 4 features", "k has 3"]),
    "types": ((Q, K.half()), {}, TypeError, ["q is torch.float32", "k is torch.float16", "autocast"]),
    "devices": ((Q, K.to("meta")), {}, ValueError, ["q is on cpu", "k on meta"]),
    "empty q": ((Q[:0], K), {}, ValueError, ["must not be empty", "q (0, 4)", "k (6, 4)"]),
    "empty k": ((Q, K[:0]), {}, ValueError, ["must not be empty", "k (0, 4)"]),
    "no features": ((Q[:, :0],), {}, ValueError, ["must not be empty", "q (10, 0)"]),
    "NaN": ((with_value(Q, 3, math.nan),), {}, ValueError, ["q has 1 row(s)", "non-finite", "row 3"]),
    "infinite k": ((Q, with_value(K, 5, math.inf)), {"normalize": False}, ValueError, ["k has 1 row(s)", "row 5"]),
    "epsilon": ((Q,), {"epsilon": 0.0}, ValueError, ["epsilon must be positive and finite", "0.0"]),
    "epsilon text": ((Q,), {"epsilon": "small"}, TypeError, ["epsilon must be a number", "'small'"]),
    "iterations": ((Q,), {"iterations": 0}, ValueError, ["iterations must be at least 1", "0"]),
    "iterations None": ((Q,), {"iterations": None}, TypeError, ["iterations must be an integer", "None"]),
    "normalize 1": ((Q,), {"normalize": 1}, TypeError, ["normalize must be True or False", "1"]),
    "differentiable None": (
        (Q,),
        {"differentiable": None},
        TypeError,
        ["differentiable must be True or False", "None"],
    ),
    "mask": ((Q,), {"mask": "diagonal"}, ValueError, ["mask must be one of none, self, block", "'diagonal'"]),
    "output": ((Q,), {"output": "f"}, ValueError, ["output must be one of plan, potentials", "'f'"]),
    "backend": ((Q,), {"backend": "gpu"}, ValueError, ["backend must be one of", "'gpu'"]),
    "precision": ((Q,), {"precision": "tf32"}, ValueError, ["precision must be one of", "'tf32'"]),
    "views 0": ((Q,), {"mask": "block", "views": 0}, ValueError, ["views must be at least 1", "0"]),
    "key_views 1.0": ((Q,), {"mask": "block", "key_views": 1.0}, TypeError, ["key_views must be an integer", "1.0"]),
    "views without block": ((Q,), {"views": 2}, ValueError, ["views", 'mask="block"', 'mask="none"']),
    "key_views without block": ((Q,), {"key_views": 1, "mask": "self"}, ValueError, ["key_views", 'mask="self"']),
    "self with k": ((Q, K), {"mask": "self"}, ValueError, ['mask="self"', "k=None"]),
    "self alone": ((Q[:1],), {"mask": "self"}, ValueError, ["nothing left to attend to", 'mask="self" with 1 key']),
    "block rows": ((Q,), {"mask": "block", "views": 3}, ValueError, ["q has 10 rows", "multiple of views=3"]),
    "block keys": ((Q, K), {"mask": "block", "views": 2}, ValueError, ["k has 6 rows", "2 * 5"]),
    "block key_views": (
        (Q,),
        {"mask": "block", "views": 2, "key_views": 3},
        ValueError,
        ["key_views=3", "at most views=2"],
    ),
    "block of one image": ((Q,), {"mask": "block", "views": 10}, ValueError, ["nothing left to attend to", "N=10"]),
    "fp8": ((Q,), {"precision": "fp8"}, ValueError, ['precision="fp8"', "backend="]),
    "triton": ((Q,), {"backend": "triton"}, ValueError, ['backend="triton" cannot run here', "TRITON_INTERPRET"]),
    "cuda": ((Q,), {"backend": "cuda"}, ValueError, ['backend="cuda" cannot run here', "cpu"]),
    "float64 on cpu": ((Q.double(),), {"backend": "cpu"}, TypeError, ["float64", 'backend="cpu"']),
}


@pytest.fixture(autouse=True)
def flag_is_restored(matmul_precision):
    """No call, failed or not, leaves torch's process-wide flag changed; precision="exact" changes it meanwhile."""
    torch.set_float32_matmul_precision("high")
    yield
    assert torch.get_float32_matmul_precision() == "high"


def check_error(function, error: type[Exception], words: list[str], *args, **options) -> None:
    with pytest.raises(error) as raised:
        function(*args, **options)
    assert type(raised.value) is error
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("case", LOSS)
@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("function", [bam_loss, bam_targets, reference.bam_loss, reference.bam_targets])
def test_arguments_of_the_loss(function, precision, case):
    args, options, error, words = LOSS[case]
    check_error(function, error, [function.__name__, *words], *args, precision=precision, **options)


@pytest.mark.parametrize("case", LOSS)
def test_arguments_of_the_module(case):
    args, options, error, words = LOSS[case]
    check_error(BAMLoss(**options), error, ["bam_loss", *words], *args)


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_the_loss(case):
    """The module reports them when it is made."""
    options, error, words = OPTIONS[case]
    for function in (bam_loss, bam_targets, reference.bam_loss, reference.bam_targets):
        check_error(function, error, [function.__name__, *words], Z, **options)
    check_error(BAMLoss, error, ["BAMLoss", *words], **options)


@needs_cpu_kernels
@pytest.mark.parametrize("case", EXECUTION)
def test_what_a_backend_cannot_do(case):
    options, dtype, error, words = EXECUTION[case]
    for function in (bam_loss, bam_targets, BAMLoss(**options)):
        name = getattr(function, "__name__", "bam_loss")
        named = {} if isinstance(function, BAMLoss) else options
        check_error(function, error, [name, *words], Z.to(dtype), **named)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_flash_is_never_silently_another_engine(dtype):
    check_error(bam_loss, ValueError, ['engine="flash"'], Z.to(dtype), engine="flash")


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("precision", ["default", "exact"])
def test_arguments_of_attention(case, precision):
    args, options, error, words = ATTENTION[case]
    check_error(sinkhorn_attention, error, ["sinkhorn_attention", *words], *args, **{"precision": precision} | options)


@pytest.mark.parametrize(
    "case", [case for case in ATTENTION if case not in ("fp8", "triton", "cuda", "float64 on cpu")]
)
def test_arguments_of_the_reference_attention(case):
    args, options, error, words = ATTENTION[case]
    check_error(reference.sinkhorn_attention, error, ["sinkhorn_attention", *words], *args, **options)


@pytest.mark.parametrize("function", [bam_loss, bam_targets, BAMLoss, sinkhorn_attention], ids=lambda f: f.__name__)
def test_unknown_keyword(function):
    args = () if function is BAMLoss else (Q,)
    check_error(
        function, TypeError, [function.__name__, "unexpected keyword argument", "'tempreture'"], *args, tempreture=1
    )


def test_group_without_torch_distributed():
    words = ["group", "torch.distributed is not initialised"]
    for function in (bam_loss, bam_targets, reference.bam_loss, reference.bam_targets):
        check_error(function, ValueError, [function.__name__, *words], Z, group=object())
    check_error(BAMLoss(group=object()), ValueError, ["bam_loss", *words], Z)
    for function in (sinkhorn_attention, reference.sinkhorn_attention):
        check_error(function, ValueError, ["sinkhorn_attention", *words], Q, group=object())


def test_stats_of_targets():
    """An option of bam_loss that bam_targets has not."""
    check_error(bam_targets, TypeError, ["bam_targets", "'return_stats'"], Z, return_stats=True)


def test_return_stats_is_a_bool():
    words = ["return_stats must be True or False", "'yes'"]
    check_error(bam_loss, TypeError, ["bam_loss", *words], Z, return_stats="yes")
    check_error(BAMLoss, TypeError, ["BAMLoss", *words], return_stats="yes")


def test_schedule():
    check_error(BAMLoss(epsilon=lambda step: 0.1), ValueError, ["BAMLoss", "schedule", "step", "None"], Z)
    check_error(BAMLoss(epsilon=lambda step: -0.1), ValueError, ["epsilon must be positive", "-0.1"], Z, step=0)
    check_error(BAMLoss(epsilon=lambda step: "x"), TypeError, ["epsilon must be a number", "'x'"], Z, step=0)


@needs_cpu_kernels
@pytest.mark.parametrize("R,rows", [(0, 2), (2, 4)])
def test_memory_budget(R, rows):
    """One image's rows of 2*5 float32 scores: two source rows and, from a teacher, two target rows."""
    teacher = Z if R else None
    least = rows * 10 * 4
    for precision in ("default", "exact"):
        words = ["bam_loss", f"memory_budget={least - 1} bytes", f"{rows} rows of 10", f"{least} bytes"]
        check_error(bam_loss, ValueError, words, Z, teacher, memory_budget=least - 1, precision=precision)
    assert bam_loss(Z, teacher, memory_budget=least).isfinite()


def test_missing_extension(monkeypatch):
    """A named backend says what to install; auto computes with the reference and says so."""
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_import_error", ImportError("no module named _C"), raising=False)
    words = ['backend="cpu" cannot run here', "extension is not built", "pip install"]
    for function in (bam_loss, bam_targets):
        check_error(function, ValueError, [function.__name__, *words], Z, backend="cpu")
    check_error(sinkhorn_attention, ValueError, ["sinkhorn_attention", *words], Q, backend="cpu")
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="slow PyTorch reference: the extension is not built"):
        assert bam_loss(Z).item() == reference.bam_loss(Z).item()
    assert torch.equal(sinkhorn_attention(Q), reference.sinkhorn_attention(Q))


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "torch sees no GPU$"),
        ("xpu", "there are no kernels for xpu tensors$"),
    ],
)
def test_auto_says_why_it_computes_with_the_reference(device, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"slow PyTorch reference: {words}"):
        assert backends.choose("bam_loss", Options(), torch.device(device), torch.float32) == "reference"


def test_all_bad_rows_are_counted():
    student = with_value(with_value(Z, 8, math.nan), 4, math.inf)
    check_error(bam_loss, ValueError, ["student has 2 row(s)", "the first is row 4"], student)


@needs_cpu_kernels
def test_errors_reach_the_caller_under_autocast():
    """Types may differ there; the rest is checked as ever."""
    with torch.autocast("cpu", torch.bfloat16):
        check_error(bam_loss, ValueError, ["teacher has 1 row(s)"], Z.bfloat16(), with_value(Z, 6, math.nan))
        assert torch.is_autocast_enabled("cpu")
