"""Where the driver's photographs come from: CIFAR-10; and images that cannot be read."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("kornia")
pytest.importorskip("timm")

from driver_runs import content
from photographs import write_images
from torchvision import datasets

from driver import config
from driver.config import UserError
from driver.data import sources
from driver.pretrain import main


def test_cifar10_keeps_its_test_set(monkeypatch):
    class Downloaded(datasets.CIFAR10):
        def __init__(self, root, train, download):
            self.data = torch.randint(256, (6 if train else 4, 32, 32, 3), dtype=torch.uint8).numpy()
            self.targets = [i % 2 for i in range(len(self.data))]

    monkeypatch.setattr(datasets, "CIFAR10", Downloaded)
    source = sources.make_source(config.Data(source="cifar10", root=Path("cifar")))
    assert (source.train.tolist(), source.test.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert source.read(7).size == (32, 32) and source.read(7).tobytes() == source.pixels[1][1].tobytes()

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(Downloaded, "__init__", unreachable)
    with pytest.raises(UserError, match=r"cifar: CIFAR-10 is neither there nor to be downloaded \(no route\)"):
        sources.make_source(config.Data(source="cifar10", root=Path("cifar")))


def test_cifar10_is_downloaded_once_by_ranks_that_begin_together(monkeypatch):
    """A lock is its open file's, of a thread as of a process. The stand-in is slow to write and reads what is there."""
    downloads = []

    class Downloaded(datasets.CIFAR10):
        def __init__(self, root, train, download):
            file = Path(root, "batch")
            whole = file.exists() and file.read_text() == "whole"
            if download and not whole:
                downloads.append(root)
                file.write_text("wh")
                time.sleep(0.3)
                file.write_text("whole")
            elif not whole:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data, self.targets = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy(), [0, 1]

    monkeypatch.setattr(datasets, "CIFAR10", Downloaded)
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(sources.Cifar, [Path("new/cifar")] * 4))
    assert downloads == ["new/cifar"] and all(len(source.labels) == 4 for source in found)
    # What is there is read from a disk that takes no lock file.
    Path("new/cifar/cifar10.lock").unlink()
    sources.Cifar(Path("new/cifar"))
    assert not Path("new/cifar/cifar10.lock").exists() and len(downloads) == 1


# Images that cannot be read


@pytest.mark.parametrize("more", [["--data.workers=1"], ["--data.on-device=True", "--data.workers=0"]])
def test_a_few_unreadable_images_are_named_once_and_replaced(more, capsys):
    write_images(Path("flat"), 24)
    Path("flat/03.png").write_bytes(b"not a picture")
    Path("flat/05.png").write_bytes(Path("flat/06.png").read_bytes()[:300])  # cut short
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4"]
    assert main([*options, *more, "--optim.epochs=3", "--data.max-unreadable=0.1"]) == 0
    said = capsys.readouterr().err
    for name in ("03", "05"):
        assert said.count(f"note: flat/{name}.png: not a readable image") == 1
    assert "another takes its place (2 so far)" in said
    assert content(Path("runs/flat-001"))["step"] == 9


def test_too_many_unreadable_images_end_the_run(capsys):
    write_images(Path("flat"), 24)
    for i in range(3, 10):
        Path(f"flat/{i:02d}.png").write_bytes(b"not a picture")
    options = ["--data.root=flat", "--data.size=16", "--data.batch-size=8", "--model.name=convnet", "--model.width=4"]
    assert main([*options, "--data.workers=0", "--data.max-unreadable=0.1", "--run.log-every=1"]) == 1
    said = capsys.readouterr().err
    assert "7 unreadable, a share above --data.max-unreadable 0.1 of 24 images" in said
    assert "Traceback" not in said
