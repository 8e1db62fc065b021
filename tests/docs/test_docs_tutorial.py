"""docs/tutorial.md: its steps run one after another, as they are printed, on a few of its pictures."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, commands, prose, text

for package in ("torchvision", "timm", "kornia", "safetensors"):
    pytest.importorskip(package)

TEXT = text("docs/tutorial.md")
# One epoch of 80 pictures; the options come last, where they replace those of the page.
SMALLER = {
    "pretrain.py": ["--data.batch-size=16", "--optim.epochs=1", "--optim.warmup-epochs=0", "--run.eval-every=0"],
    "linear.py": ["--epochs=1"],
    "knn.py": ["--k", "10"],
}


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def thin_out() -> None:
    """Leave 8 pictures of each class to train on and 2 to test with."""
    for folder in Path("pictures").glob("*/*"):
        for picture in sorted(folder.iterdir())[8 if folder.parent.name == "train" else 2 :]:
            picture.unlink()


@pytest.mark.slow
def test_the_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pictures, classifier = blocks(TEXT, "python")
    install, *steps = commands(TEXT)
    assert install == 'pip install -e ".[driver]"'
    run("-c", make_pictures)
    assert len(list(Path("pictures").glob("*/*/*.png"))) == 1797 and "1,797" in TEXT
    thin_out()
    printed = {}
    for step in steps:
        _, script, *options = shlex.split(step)
        name = Path(script).name
        epochs = ["--optim.epochs=2"] if "--run.resume" in options else []
        printed[name] = printed.get(name, "") + run(str(ROOT / script), *options, *SMALLER.get(name, []), *epochs)
    assert list(printed) == ["pretrain.py", "knn.py", "linear.py", "export.py"]
    for row in ("raw pixels", "network, before BAM", "network, after 1 epoch of BAM"):
        assert row in printed["pretrain.py"]
    assert "10-NN" in printed["knn.py"] and "80 training images of 10 classes" in printed["knn.py"]
    assert 'timm.create_model("resnet18"' in printed["export.py"]
    for file in re.findall(r"`(runs/pictures-001/[\w.]+)`", prose(TEXT)):
        assert Path(file).is_file()
    assert re.search(r"^\d+ of 20 pictures are right$", run("-c", classifier), re.M)
