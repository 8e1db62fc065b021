"""Ranges for Nsight: which parts of a step are named, and that none is left open."""

import subprocess
import sys

import pytest
import torch
from problems import features, needs_cpu_kernels

from bam_kernels import bam_loss, ranges
from bam_kernels.simulated import SimulatedRanks


class Recorder:
    """An nvtx domain that writes down what is open when a range begins."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def get_event_attributes(self, message: str) -> str:
        return message

    def push_range(self, attributes: str) -> None:
        self.open.append(attributes)
        self.seen.append(tuple(self.open))

    def pop_range(self) -> None:
        self.open.pop()


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    domain = Recorder()
    monkeypatch.setattr(ranges, "_domain", lambda: domain)
    monkeypatch.setattr(ranges, "_enabled", True)
    return domain


@needs_cpu_kernels
def test_the_parts_of_a_step(recorder):
    student = features(2, 6, 5).requires_grad_()
    keys = torch.nn.functional.normalize(features(4, 6, 5, seed=2).flatten(0, 1), dim=1)
    bam_loss(student, group=SimulatedRanks(2, 1, keys)).backward()
    assert recorder.open == []
    assert ("Sinkhorn", "scores", "gather") in recorder.seen
    assert {names[0] for names in recorder.seen} == {"Sinkhorn", "match", "gradient"}


@needs_cpu_kernels
def test_an_error_leaves_no_range_open(recorder, monkeypatch):
    from bam_kernels.engine.gradient import Gradient

    def fail(*_):
        raise RuntimeError("no gradient")

    monkeypatch.setattr(Gradient, "_add_whole", fail)
    with pytest.raises(RuntimeError, match="no gradient"):
        bam_loss(features(2, 6, 5).requires_grad_())
    assert recorder.open == []


def test_off_by_default_and_on_by_the_environment():
    pytest.importorskip("nvtx")
    code = "import sys; from bam_kernels import ranges; print(ranges._enabled, 'nvtx' in sys.modules)"
    for value, expected in (("0", "False False"), ("1", "True False")):
        environment = {"BAM_KERNELS_NVTX": value, "PATH": ""}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == expected
    with ranges.named_range("nothing is open"):
        pass
    ranges._domain().push_range(ranges._domain().get_event_attributes(message="a real domain"))
    ranges._domain().pop_range()


def test_without_nvtx_ranges_stay_off_and_enable_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(ranges, "_enabled", False)
    ranges._domain.cache_clear()
    with pytest.raises(ImportError, match="pip install nvtx"):
        ranges.enable()
    with ranges.named_range("nothing is open"):
        assert not ranges._enabled
