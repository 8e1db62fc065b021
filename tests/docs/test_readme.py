"""README.md: size, commands, example, and numbers and picture from the result files."""

import importlib.util
import re

import pytest
import torch
from pages import ROOT, Flat, block, commands, text

from driver.pretrain import parse

TEXT = text("README.md")

_spec = importlib.util.spec_from_file_location("speed", ROOT / "docs/images/speed.py")
speed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(speed)


def test_size():
    assert len(TEXT.splitlines()) <= 120 and len(TEXT.split()) <= 700


def test_the_two_commands():
    """.ci/run finds the second command in the README and runs it."""
    assert commands(TEXT) == ["pip install -e . && python driver/pretrain.py", 'pip install -e ".[test]" && pytest']
    assert 'pip install -e ".[test]" && pytest' in TEXT.splitlines()


def test_a_folder_is_pretrained_on_by_its_path_alone():
    (options,) = re.findall(r"`python driver/pretrain.py (--.*?)`", TEXT)
    assert parse(options.split()).recipe == "images"


def test_the_example_trains():
    model = Flat()
    before = model.linear.weight.clone()
    names = {"model": model, "loader": [torch.rand(2, 4, 3, 8, 8)], "optimizer": torch.optim.SGD(model.parameters(), 1)}
    exec(block(TEXT, "BAMLoss"), names)
    assert names["loss"].isfinite() and not torch.equal(model.linear.weight, before)


@pytest.mark.parametrize(
    "machine, panel", [("two CPU cores", speed.CPU), ("one H200", speed.H200)], ids=["cpu", "h200"]
)
def test_its_numbers_are_those_of_the_result_files(machine, panel):
    """A sentence gives the times of bam_kernels, torch.compile and the published code, in this order."""
    (sentence,) = re.findall(rf"On {machine}\b.*? ms\.(?=\s)", TEXT, re.S)
    times = panel.milliseconds()
    ours, compiled, authors = (
        next(ms for label, ms in times.items() if label.startswith(start))
        for start in ("bam_kernels", "torch.compile", "authors")
    )
    said = re.findall(r"([\d.]+) ms", sentence)
    assert said == [f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" for ms in (ours, compiled, authors)]


def test_the_picture_is_drawn(tmp_path):
    speed.picture(tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert "](docs/images/speed.png)" in TEXT
