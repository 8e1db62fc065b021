"""What `backend="auto"` chooses among verified ways, that all public functions choose alike, and what it costs."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from problems import features, needs_cpu_kernels
from stand_in_ways import ways  # noqa: F401

from bam_kernels import BAMLoss, backends, bam_loss, bam_targets, reference, sinkhorn_attention, tuned
from bam_kernels.engine import cost
from bam_kernels.gradient_cache import GradientCache
from bam_kernels.layout import Layout
from bam_kernels.options import Options
from bam_kernels.ways import GPU_WAYS, joined, split

pytestmark = needs_cpu_kernels
CPU = torch.device("cpu")
RATES = dict.fromkeys(tuned.RATES, 1e12)
TRITON_IS_FASTER = RATES | {"cuda_exponentials": 0.9e12}
FLASH_IS_FASTER = RATES | {"flash_flops": 1e15, "memory_bytes": 1e9}


@pytest.fixture
def measured(ways, monkeypatch, tmp_path):  # noqa: F811
    """Rates of a tuning file, from the moment that they are given."""

    def give(rates: dict[str, float]) -> None:
        file = tmp_path / "gpu.json"
        monkeypatch.setenv(tuned.FILE, str(file))
        tuned.save(tuned.Tuning(rates), file)

    return give


def chosen(engine: str = "auto", **options) -> str:
    return backends.choose("bam_loss", Options(**options), CPU, torch.float32, engine)


@pytest.mark.parametrize(
    ("trusted", "by_engine"),
    [
        (("cuda",), {"auto": "cuda", "slab": "cuda"}),
        (("triton",), {"auto": "triton", "slab": "triton"}),
        (("flash",), {"auto": "flash", "flash": "flash", "slab": "reference"}),
        (GPU_WAYS, {"auto": "cuda+triton+flash", "slab": "cuda+triton", "flash": "flash"}),
        ((), {"auto": "reference", "slab": "reference"}),
    ],
)
@pytest.mark.filterwarnings("ignore:bam_kernels. computing with the slow PyTorch reference")
def test_choices_by_engine(trusted, by_engine, ways):  # noqa: F811
    ways.trust(*trusted)
    assert {engine: chosen(engine) for engine in by_engine} == by_engine
    assert backends.choose("bam_loss", Options(), CPU, torch.float64) == "reference"
    # A backend that is named needs no verdict.
    assert chosen(backend="cuda") == "cuda" and chosen(backend="triton") == "triton+flash"
    assert chosen("flash", backend="triton") == "flash"


def test_no_way_at_all_is_said_once_with_what_to_type(ways):  # noqa: F811
    ways.trust()
    with pytest.warns(UserWarning) as given:
        losses = [bam_loss(features(2, 5, 4)).item() for _ in range(2)]
    assert losses == [reference.bam_loss(features(2, 5, 4)).item()] * 2 and not ways.taken()
    assert [str(one.message) for one in given] == [
        "bam_kernels: computing with the slow PyTorch reference: no kernels are verified on this GPU (cuda failed: "
        "for a test; triton failed: for a test; flash failed: for a test); `python -m bam_kernels.verify` tries them"
    ]


def test_an_engine_that_is_not_verified_says_why(ways):  # noqa: F811
    ways.trust("cuda", "triton")
    words = r'bam_loss: engine="flash" cannot run here: no kernels of engine="flash" are verified on this GPU '
    words += r"\(flash failed: for a test\); `python -m bam_kernels\.verify` tries them$"
    with pytest.raises(ValueError, match=words):
        bam_loss(features(2, 5, 4), engine="flash")
    ways.trust("flash")
    with pytest.warns(UserWarning, match=r'no kernels of engine="slab" are verified on this GPU \(cuda failed: for'):
        bam_loss(features(2, 5, 4), engine="slab")
    assert not ways.taken()


def test_flash_alone_is_used_for_what_it_takes(ways):  # noqa: F811
    ways.trust("flash")
    bam_loss(features(2, 5, 4))
    assert ways.taken() == ["triton flash"]
    for D, options in ((4, {"top_k": 3}), (513, {})):
        z = features(2, 5, D)
        backends._warn_once.cache_clear()
        with pytest.warns(UserWarning, match=r'computing with the slow .* no kernels of engine="slab" are verified'):
            assert bam_loss(z, **options).item() == reference.bam_loss(z, **options).item()
    assert not ways.taken()


def problem(**changed) -> cost.Problem:
    layout = Layout(**({"B": 512, "V": 2, "L": 2, "T": 2, "D": 128, "R": 0, "W": 1, "rank": 0} | changed))
    return cost.Problem(layout, True, 3, True, True, False, False)


@pytest.mark.parametrize("trusted", [("cuda",), ("triton",), ("flash",), ("cuda", "triton"), ("cuda", "flash")])
@pytest.mark.parametrize("rates", [RATES, TRITON_IS_FASTER, FLASH_IS_FASTER], ids=["equal", "triton", "flash"])
def test_the_way_by_rates(trusted, rates):
    at = cost.Rates(**rates, link_bytes=1.0, latency_s=1.0)
    found = cost.choose_way(problem(), trusted, 0, None, CPU, at)
    expected = trusted[0]  # the order of preference
    if "triton" in trusted and rates is TRITON_IS_FASTER:
        expected = "triton"
    if "flash" in trusted and rates is FLASH_IS_FASTER:
        expected = "flash"
    assert found == expected


@pytest.mark.parametrize(
    ("shape", "top_k", "regather", "expected"),
    [
        ({}, 0, False, "flash"),
        ({"D": 513}, 0, False, "cuda"),
        ({}, 5, False, "cuda"),
        ({"W": 2}, 0, True, "cuda"),
    ],
)
def test_problems_that_flash_does_not_take(shape, top_k, regather, expected):
    at = cost.Rates(**FLASH_IS_FASTER, link_bytes=1e9, latency_s=1e-6)
    x = replace(problem(**shape), regather=regather)
    assert cost.choose_way(x, GPU_WAYS, top_k, None, CPU, at) == expected


def test_scores_that_do_not_fit_are_left_to_flash():
    assert cost.choose_way(problem(), GPU_WAYS, 0, 100, CPU, cost.H200) == "flash"
    assert cost.choose_way(problem(), ("cuda", "triton"), 0, 100, CPU, cost.H200) == "cuda"


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (RATES, "cuda slab"),  # of an older version: the CUDA kernels count as equally fast
        (RATES | {"cuda_exponentials": 1e12}, "cuda slab"),
        (TRITON_IS_FASTER, "triton slab"),
        (FLASH_IS_FASTER, "triton flash"),
    ],
    ids=["without CUDA", "equal", "triton", "flash"],
)
def test_rates_of_a_tuning_file_decide(rates, expected, measured, ways):  # noqa: F811
    """All public functions, forward and backward, choose alike; attention has row kernels alone."""
    measured(rates)
    z = features(2, 64, 128).requires_grad_()
    assert BAMLoss().way(z) == expected
    bam_loss(z).backward()
    BAMLoss()(z)
    bam_targets(z)
    with torch.autocast("cpu", torch.bfloat16):
        bam_loss(z)
    GradientCache(torch.nn.Linear(128, 128), BAMLoss())([z.detach()[:, :32], z.detach()[:, 32:]])
    assert ways.taken() == [expected] * 5
    rows = "triton slab" if rates is TRITON_IS_FASTER else "cuda slab"
    sinkhorn_attention(z[0], differentiable=True).sum().backward()
    assert ways.taken() == [rows] * 2
    ways.trust("cuda", "triton")
    bam_loss(z)
    assert ways.taken() == [rows]


WAYS_SAID = {
    "plain": ({}, 0, {}, None),
    "teacher": ({}, 2, {"target_rows": "student"}, None),
    "top-k": ({}, 0, {"top_k": 3}, None),
    "schedule": ({"epsilon": lambda step: 0.1 / step}, 0, {}, 2),
    "statistics": ({"return_stats": True}, 0, {}, None),
    "slab": ({}, 0, {"engine": "slab"}, None),
    "flash": ({}, 0, {"engine": "flash"}, None),
    "named": ({}, 0, {"backend": "triton", "engine": "slab"}, None),
}


@pytest.mark.parametrize("trusted", [GPU_WAYS, ("cuda", "flash"), ("triton", "flash")], ids=joined)
@pytest.mark.parametrize("case", WAYS_SAID)
def test_the_way_that_is_said_is_the_one_that_runs(case, trusted, ways):  # noqa: F811
    ways.trust(*trusted)
    own, R, options, step = WAYS_SAID[case]
    criterion = BAMLoss(**own, **options)
    student, teacher = features(3, 9, 6).requires_grad_(), features(R, 9, 6, seed=1) if R else None
    said = criterion.way(student, teacher, step)
    assert not ways.taken()
    criterion(student, teacher, step)
    assert ways.taken() == [said]


def test_the_way_that_is_said_without_a_gpu(monkeypatch):
    z = features(2, 5, 4)
    assert BAMLoss().way(z) == "cpu slab"
    assert BAMLoss().way(z.double()) == BAMLoss(backend="reference").way(z) == "reference"
    with pytest.raises(ValueError, match="BAMLoss: epsilon is a schedule, so forward needs step"):
        BAMLoss(epsilon=lambda step: 0.1).way(z)


def test_rates_that_are_given_hold_at_once(measured):
    """The rates that are kept between calls are those of the file that was read last."""
    measured(TRITON_IS_FASTER)
    assert cost.fastest_rows(("cuda", "triton")).backend == "triton"
    measured(RATES)
    assert cost.fastest_rows(("cuda", "triton")).backend == "cuda"


def test_a_file_of_an_older_version_is_read(measured, tmp_path):
    measured(RATES)
    assert "cuda_exponentials" not in json.loads((tmp_path / "gpu.json").read_text())["rates"]
    assert cost.rates().cuda_exponentials is None and cost.rates().product_flops == 1e12
    for wrong in (0, -1.0, "fast"):
        measured(RATES | {"cuda_exponentials": wrong})
        with pytest.raises(ValueError, match=r"gpu\.json: not a file that `python -m bam_kernels\.tune` wrote"):
            cost.rates()


def test_a_later_call_asks_neither_torch_nor_the_disk(ways, monkeypatch):  # noqa: F811
    """Once decided, "auto" costs microseconds."""
    bam_loss(features(2, 5, 4))
    for name in ("is_available", "is_initialized", "get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, n=name: pytest.fail(f"torch.cuda.{n} was called"))
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr("os.open", lambda *_, **__: pytest.fail("a file was opened"))
    with warnings.catch_warnings(action="error"):
        assert chosen() == "cuda+triton+flash"
        bam_loss(features(2, 5, 4))
    assert ways.taken() == ["cuda slab"] * 2


def test_names_of_ways():
    for names in ((), ("cuda",), GPU_WAYS):
        assert split(joined(names)) == names
