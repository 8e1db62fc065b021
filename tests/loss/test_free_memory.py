"""The default memory budget: what is free under cgroups' limits, read when it matters, and what plans make of it."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bam_kernels.engine import cost, memory, plan
from bam_kernels.layout import Layout

MIB, GIB = 1 << 20, 1 << 30
UNLIMITED = str((1 << 63) - 4096)  # as cgroup v1 writes it


@pytest.fixture
def machine(tmp_path) -> tuple[Path, Path]:
    """Roots of /proc and of cgroups, of a machine with 8 GiB available and no cgroup."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:    {8 << 20} kB\n")
    return proc, cgroups


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def v2_group(folder: Path, limit: str, used: int = 0, inactive: int = 0) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 5\nactive_file 7\ninactive_file {inactive}\n")


def v1_group(folder: Path, limit: str, used: int = 0, inactive: int = 0) -> None:
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(folder / "memory.stat", f"inactive_file 3\ntotal_inactive_file {inactive}\n")


# The limit on the cgroup itself, on one above it, on the mount's root.
@pytest.mark.parametrize("level", ["a/b", "a", "."])
def test_every_ancestor_counts_v2(machine, level):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", "0::/a/b\n")
    for folder in ("a/b", "a", "."):
        v2_group(cgroups / folder, "max", 9 * GIB)
    assert memory.host_free_bytes(proc, cgroups) == 8 * GIB
    v2_group(cgroups / level, str(4 * GIB), 3 * GIB, 2 * GIB)
    assert memory.host_free_bytes(proc, cgroups) == 3 * GIB


@pytest.mark.parametrize("level", ["a/b", "a", "."])
def test_every_ancestor_counts_v1(machine, level):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", "12:cpu,cpuacct:/x\n4:hugetlb,memory:/a/b\n1:name=systemd:/y\n0::/\n")
    for folder in ("a/b", "a", "."):
        v1_group(cgroups / "memory" / folder, UNLIMITED, 9 * GIB)
    assert memory.host_free_bytes(proc, cgroups) == 8 * GIB
    v1_group(cgroups / "memory" / level, str(4 * GIB), 3 * GIB, 2 * GIB)
    assert memory.host_free_bytes(proc, cgroups) == 3 * GIB


def test_where_no_limit_is_set_little_is_read(machine, monkeypatch):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", "4:memory:/a\n0::/a\n")
    v1_group(cgroups / "memory" / "a", UNLIMITED)
    v2_group(cgroups / "a", "max")
    read, text = [], memory._text
    monkeypatch.setattr(memory, "_text", lambda file: read.append(file.name) or text(file))
    assert memory.host_free_bytes(proc, cgroups) == 8 * GIB
    assert read == ["meminfo", "cgroup", *2 * ["memory.limit_in_bytes"], *2 * ["memory.max"]]


def test_the_least_of_all_limits_and_of_the_machine(machine):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", "4:memory:/c\n0::/a/b\n")
    v2_group(cgroups / "a" / "b", str(6 * GIB))
    v2_group(cgroups / "a", str(5 * GIB), GIB)
    v1_group(cgroups / "memory" / "c", str(3 * GIB))
    assert memory.host_free_bytes(proc, cgroups) == 3 * GIB
    v1_group(cgroups / "memory" / "c", UNLIMITED)
    assert memory.host_free_bytes(proc, cgroups) == 4 * GIB
    v2_group(cgroups / "a", str(50 * GIB))
    v2_group(cgroups / "a" / "b", str(50 * GIB))
    assert memory.host_free_bytes(proc, cgroups) == 8 * GIB
    v2_group(cgroups / "a", str(GIB), 2 * GIB)  # beyond its limit
    assert memory.host_free_bytes(proc, cgroups) == 0


# In a container: a namespace of its own, a path of the host's that is not mounted, one outside the namespace.
@pytest.mark.parametrize("path", ["/", "/docker/0123abcd", "/../../kubepods/pod", "/../memory"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_container_sees_its_cgroup_as_the_root(machine, version, path):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", f"0::{path}\n" if version == "v2" else f"7:memory:{path}\n0::{path}\n")
    v2_group(cgroups.parent / "memory", "1")  # where a path that leads above the mount would end
    if version == "v2":
        v2_group(cgroups, str(2 * GIB), GIB)
    else:
        v1_group(cgroups / "memory", str(2 * GIB), GIB)
    assert memory.host_free_bytes(proc, cgroups) == GIB


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("memory.max", ""),
        ("memory.max", "many\n"),
        ("memory.max", "-1\n"),
        ("memory.max", "9" * 5000),
        ("memory.max", None),
        ("memory.current", "1.5\n"),
        ("memory.current", None),
    ],
)
def test_odd_files_are_no_limit(machine, file, text):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", "0::/a\n")
    v2_group(cgroups / "a", str(GIB))
    assert memory.host_free_bytes(proc, cgroups) == GIB
    (cgroups / "a" / file).unlink()
    if text is not None:
        write(cgroups / "a" / file, text)
    assert memory.host_free_bytes(proc, cgroups) == 8 * GIB


@pytest.mark.parametrize("text", [None, "", "inactive_file\n", "inactive_file x\n", "inactive_filed 7\n"])
def test_without_statistics_all_that_is_used_counts(machine, text):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", "0::/a\n")
    v2_group(cgroups / "a", str(2 * GIB), GIB, GIB)
    assert memory.host_free_bytes(proc, cgroups) == 2 * GIB
    (cgroups / "a" / "memory.stat").unlink()
    if text is not None:
        write(cgroups / "a" / "memory.stat", text)
    assert memory.host_free_bytes(proc, cgroups) == GIB


@pytest.mark.parametrize(
    "memberships", ["", "\n\n", "0:\n", "memory\n", "0::\n", "x:y:z:/a\n", "x::/a\n", "\0\n", "1:memory"]
)
def test_odd_memberships_are_none(machine, memberships):
    proc, cgroups = machine
    v2_group(cgroups / "a", "1")
    write(proc / "self" / "cgroup", memberships)
    assert memory.host_free_bytes(proc, cgroups) == 8 * GIB


@pytest.mark.parametrize("meminfo", [None, "MemTotal: 5 kB\n", "MemAvailable: x kB\n", "MemAvailable:\n"])
def test_without_meminfo_half_of_the_machine(machine, meminfo):
    proc, cgroups = machine
    (proc / "meminfo").unlink()
    if meminfo is not None:
        write(proc / "meminfo", meminfo)
    half = memory.host_free_bytes(proc, cgroups)
    assert half > MIB
    write(proc / "self" / "cgroup", "0::/\n")
    v2_group(cgroups, str(MIB))
    assert memory.host_free_bytes(proc, cgroups) == MIB


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc/meminfo")
def test_this_machine():
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < memory.free_bytes(torch.device("cpu")) < int(total.split()[1]) << 10


CPU, GPU = torch.device("cpu"), torch.device("cuda:3")
# 8192 images of 2 views: 1 GiB of float32 scores.
SHAPE = {
    "rows": 16384,
    "images": 8192,
    "columns": 16384,
    "target_views": 2,
    "source_views": 2,
    "shared": True,
    "sixteen_bit": False,
    "ranks": 1,
    "regather": False,
}


def planned(budget: int | None = None, device: torch.device = CPU, **changed: int) -> plan.SlabPlan:
    return plan.plan_slabs("bam_loss", budget=budget, device=device, **SHAPE | changed)


@pytest.fixture
def free(monkeypatch) -> list[int]:
    """The last element is what is read as free; one is added, the same, by every reading."""
    values = [100 * GIB]

    def read(device: torch.device) -> int:
        values.append(values[-1])
        return values[-1]

    monkeypatch.setattr(memory, "free_bytes", read)
    return values


def test_a_changed_limit_changes_the_plan(free):
    whole = planned()
    assert whole.cached and whole.score_bytes == GIB
    free.append(3 * GIB)
    slabs = planned()
    assert not slabs.cached and slabs.score_bytes == 3 * GIB // 4
    free.append(100 * GIB)
    assert planned() == whole


def test_of_a_teacher_the_source_is_made_again_before_the_target_is(free):
    """Rows of one set of scores are kept, and some of the other's made at once, as with a budget that is given."""
    for budget in (GIB + GIB // 2, GIB // 2):
        free.append(4 * budget)
        assert planned(shared=False) == planned(budget, shared=False)
        assert planned(shared=False).cached == (budget > GIB)


def test_small_changes_of_what_is_free_leave_the_plan_alone(free):
    free.append(2 * GIB)
    before = planned()
    assert before.score_bytes == GIB // 2
    free.append(2 * GIB + GIB // 5)
    assert planned() is before
    free.append(2 * GIB - 5)
    assert GIB // 2 * 7 // 8 <= planned().score_bytes < GIB // 2


def test_small_problems_are_kept_and_nothing_is_read(free):
    free.append(0)
    side = 4096  # 64 MiB
    small = planned(rows=side, images=side // 2, columns=side)
    assert small.cached and small.score_bytes == plan.ALWAYS_BYTES and len(free) == 2
    assert planned(plan.ALWAYS_BYTES, rows=side, images=side // 2, columns=side) == small
    larger = planned(rows=side + 2, images=side // 2 + 1, columns=side)
    assert not larger.cached and larger.score_bytes <= plan.ALWAYS_BYTES and len(free) == 3


def test_a_budget_that_is_given_is_taken_and_nothing_is_read(free):
    assert planned(GIB - 1).score_bytes < GIB - 1 and not planned(GIB - 1).cached
    assert planned(5 * MIB, rows=1024, images=512, columns=1024).cached
    assert len(free) == 1
    with pytest.raises(ValueError, match="memory_budget=131071 bytes does not hold the scores of one image: 2 rows"):
        planned(131071)


def test_an_image_that_what_is_free_does_not_hold(free):
    free.append(4 * 80 * MIB)
    with pytest.raises(ValueError, match="memory_budget=83886080 bytes does not hold the scores of one image"):
        planned(columns=16 * MIB)


def test_the_engine_follows_from_what_is_free_at_each_call(free):
    """Flash kernels that are a little faster than slabs that are kept are not taken, but rather than slabs made again.

    Ranks may have different memory free, and must choose alike.
    """
    alone, of_two = (
        cost.Problem(Layout(B=8192, V=2, L=2, T=2, D=64, W=W), True, 3, True, True, False, False) for W in (1, 2)
    )
    rates = replace(cost.H200, flash_flops=400e12, exponentials=4e12)
    slab_s = sum(cost.slab_seconds(alone, cost.slabs_of("", alone, sys.maxsize, CPU), rates).values())
    flash_s = sum(cost.flash_seconds(alone, rates).values())
    assert slab_s < cost.KEPT_MARGIN * flash_s

    def chosen(problem: cost.Problem, budget: int | None = None) -> str:
        return cost.choose_way(problem, ("triton", "flash"), 0, budget, CPU, rates)

    assert chosen(alone) == "triton"
    free.append(2 * GIB)
    assert chosen(alone) == chosen(alone, GIB // 2) == "flash"
    free.append(100 * GIB)
    assert chosen(alone) == "triton"
    readings = len(free)
    free.append(0)
    assert chosen(of_two) == "triton" and len(free) == readings + 1


class Driver:
    """What a GPU's driver says, and how often it was asked."""

    def __init__(self, monkeypatch) -> None:
        self.capturing, self.free, self.asked = False, 100 * GIB, 0
        monkeypatch.setattr(memory, "_last_read", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 * MIB))

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        assert not self.capturing
        self.asked += 1
        return self.free, 141 * GIB


def test_a_gpu_has_free_what_torch_has_reserved_and_does_not_use(monkeypatch):
    driver = Driver(monkeypatch)
    driver.free = GIB
    assert memory.free_bytes(GPU) == 2 * GIB
    assert planned(device=GPU).score_bytes == GIB // 2 and driver.asked == 2


def test_a_capture_takes_the_last_value_that_was_read(monkeypatch):
    driver = Driver(monkeypatch)
    driver.capturing = True
    assert planned(device=GPU).cached  # never read
    driver.capturing, driver.free = False, GIB
    assert planned(device=GPU).score_bytes == GIB // 2
    driver.capturing, driver.free = True, 100 * GIB
    assert planned(device=GPU).score_bytes == GIB // 2
    assert planned(device=torch.device("cuda:4")).cached  # another device
    driver.capturing = False
    assert planned(device=GPU).cached and driver.asked == 2
