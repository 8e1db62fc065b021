"""The README's table of bad input: each call as printed there raises what is printed there."""

import math
import re
from pathlib import Path

import pytest
import torch
from problems import needs_cpu_kernels

from bam_kernels import BAMLoss, GradientCache, bam_loss, sinkhorn_attention

README = (Path(__file__).parent.parent / "README.md").read_text()
ROWS = re.findall(
    r"^\| `((?:bam_loss|BAMLoss|GradientCache|sinkhorn_attention)\(.*)` \| `(\w+Error): (.*)` \|$", README, re.M
)
NAMES = {
    "bam_loss": bam_loss,
    "BAMLoss": BAMLoss,
    "GradientCache": GradientCache,
    "sinkhorn_attention": sinkhorn_attention,
    "model": torch.nn.Linear(8, 8),
    "nan": math.nan,
}


def test_the_table_is_there():
    assert len(ROWS) >= 12


@needs_cpu_kernels
@pytest.mark.parametrize("call,error,message", ROWS, ids=[row[0] for row in ROWS])
def test_bad_input(call, error, message):
    with pytest.raises((ValueError, TypeError)) as raised:
        eval(call, NAMES | {"z": torch.ones(30, 8)})
    assert (type(raised.value).__name__, str(raised.value)) == (error, message)
