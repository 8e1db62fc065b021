"""When `backend="auto"` may try kernels: neither while a compiler traces, nor in a graph's capture or a data worker."""

import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from problems import features, needs_cpu_kernels
from stand_in_gpu import gpu  # noqa: F401
from stand_in_ways import StandInWays
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bam_kernels import BAMLoss, backends, bam_loss, reference
from bam_kernels.options import Options
from bam_kernels.verification import identity, store, trial, trust
from bam_kernels.ways import GPU_WAYS, joined

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.filterwarnings("ignore:bam_kernels. computing with the slow PyTorch reference"),
]
Z = features(2, 7, 5)
FOUND = {way: store.Verdict("verified") for way in GPU_WAYS}


@pytest.fixture
def undecided(gpu, monkeypatch):  # noqa: F811
    """A GPU of which nothing is known yet, and whose kernels must not be tried."""
    stand_in = StandInWays(monkeypatch)
    trust._trust.clear()
    # The compiler must see no GPU, whose random state it would keep.
    asked_by = lambda: sys._getframe(2).f_globals["__name__"]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked_by().startswith("bam_kernels."))
    monkeypatch.setattr(trial, "run", lambda *_: pytest.fail("kernels were tried"))
    yield stand_in
    torch.compiler.reset()


def keep(status: str = "verified") -> None:
    """Keep verdicts on disk, as an earlier process did."""
    store.save(identity.identity(0), {way: store.Verdict(status) for way in GPU_WAYS})


def allow_trials(monkeypatch) -> list[tuple[str, ...]]:
    """From now on kernels may be tried, and are found right; returns the ways of each trial."""
    tried = []
    monkeypatch.setattr(
        trial, "run", lambda names, *_: tried.append(tuple(names)) or {way: FOUND[way] for way in names}
    )
    return tried


class Loss(nn.Module):
    def forward(self, z):
        return bam_loss(z)


def compiled(z):
    return torch.compile(bam_loss, fullgraph=True, backend="aot_eager")(z)


def compiled_module(z):
    return torch.compile(lambda x: BAMLoss()(x), fullgraph=True, backend="aot_eager")(z)


def exported(z):
    return torch.export.export(Loss(), (z,)).module()(z)


def exported_without_dynamo(z):
    return torch.export.export(Loss(), (z,), strict=False).module()(z)


def captured(z):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        return bam_loss(z)


MOMENTS = (compiled, compiled_module, exported, exported_without_dynamo, captured)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kept_verdict_counts_at_any_moment(moment, undecided):
    keep()
    assert moment(Z).item() == pytest.approx(reference.bam_loss(Z).item(), rel=1e-5)
    assert undecided.taken() == ["cuda slab"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_not_known_is_left_to_the_reference_and_decided_later(moment, undecided, monkeypatch):
    assert moment(Z).item() == pytest.approx(reference.bam_loss(Z).item(), rel=1e-6)
    assert not undecided.taken()
    tried = allow_trials(monkeypatch)
    bam_loss(Z)
    bam_loss(Z)
    assert undecided.taken() == ["cuda slab"] * 2 and tried == [GPU_WAYS]
    if moment is not captured:
        torch.compiler.reset()
    moment(Z)
    assert undecided.taken() == ["cuda slab"]


def test_a_decision_of_another_thread_during_a_capture_holds_for_later_calls(undecided, monkeypatch):
    """The reference, which the call of the capture takes, is not kept for calls like it."""
    decide, decision = trust.decide, trust.Trust(GPU_WAYS, FOUND)

    def overtaken(index: int, may_try: bool) -> trust.Trust:
        undecided_here = decide(index, may_try)
        trust._trust[index] = decision
        return undecided_here

    monkeypatch.setattr(trust, "decide", overtaken)
    captured(Z)
    assert not undecided.taken() and trust._trust[0] is decision
    bam_loss(Z)
    assert undecided.taken() == ["cuda slab"]


def test_a_failed_verdict_is_not_tried_again_at_any_moment(undecided):
    keep("failed")
    for moment in (captured, bam_loss):
        moment(Z)
    assert not undecided.taken() and trust._trust[0].settled


@pytest.mark.parametrize("kept", [False, True])
def test_tensors_without_memory(kept, undecided, monkeypatch):
    if kept:
        keep()
    with FakeTensorMode():
        z = torch.empty(2, 7, 5, requires_grad=True)
        assert bam_loss(z).requires_grad
        expected = joined(GPU_WAYS) if kept else "reference"
        assert backends.choose("bam_loss", Options(), z.device, z.dtype) == expected
    tried = allow_trials(monkeypatch)
    bam_loss(Z)
    assert tried == ([] if kept else [GPU_WAYS]) and undecided.taken() == ["cuda slab"]


@pytest.mark.parametrize("kept", [False, True])
def test_transforms_are_ordinary_calls(kept, undecided, monkeypatch):
    if kept:
        keep()
    else:
        tried = allow_trials(monkeypatch)
    grad = torch.func.grad(bam_loss)(Z)
    leaf = Z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.bam_loss(leaf), leaf)
    assert ((grad - expected).abs() <= 1e-5 * expected.abs().max()).all()
    losses = torch.func.vmap(bam_loss)(torch.stack((Z, 2 * Z.flip(1))))
    assert ((losses - reference.bam_loss(Z)).abs() <= 1e-5).all()
    assert undecided.taken() == ["cuda slab"] * 3 and (kept or tried == [GPU_WAYS])


class Worker(torch.utils.data.Dataset):
    """What "auto" chooses in a data worker, the loss there, and whether it was decided for good."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[str, float, bool]:
        chosen = backends.choose("bam_loss", Options(), Z.device, Z.dtype)
        return chosen, bam_loss(Z).item(), bool(trust._trust)


@contextmanager
def another_thread_decides():
    """A lock that another thread of the parent held when the worker was forked."""
    with trust._deciding:
        yield


@pytest.mark.parametrize("during", [nullcontext, another_thread_decides])
@pytest.mark.parametrize("kept", [False, True])
def test_a_data_worker(kept, during, undecided, monkeypatch):
    if kept:
        keep()
    with during():
        loader = torch.utils.data.DataLoader(
            Worker(), num_workers=1, batch_size=None, multiprocessing_context="fork", timeout=30
        )
        ((chosen, loss, decided),) = loader
    assert chosen == (joined(GPU_WAYS) if kept else "reference") and decided == kept
    assert loss == pytest.approx(reference.bam_loss(Z).item(), rel=1e-5)
    assert not trust._trust  # of this process
    tried = allow_trials(monkeypatch)
    bam_loss(Z)
    assert tried == ([] if kept else [GPU_WAYS])


def test_a_wrong_variable_is_an_error_of_the_first_call(undecided, monkeypatch):
    monkeypatch.setenv(trust.MODE, "no")
    for call in (bam_loss, captured):
        with pytest.raises(ValueError, match="BAM_KERNELS_VERIFY must be auto, off or force, got 'no'"):
            call(Z)
