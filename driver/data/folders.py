"""Image files in folders, with a class per subfolder. torchvision is optional: only photographs need it."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..config import UserError
from .decode import DEFAULT, Decoder
from .images import Source
from .inventory import file_size
from .parts import TEST_NAMES, split


class Files(Source):
    """Image files in folders: `train/` beside `val/` or `test/`, or one folder that is split here."""

    def __init__(self, root: Path, held_out: float, decode: Decoder = DEFAULT) -> None:
        self.root, self.decode = root, decode
        if not root.is_dir():
            raise UserError(f"--data.root {root}: {'not a folder' if root.exists() else 'no such folder'}")
        test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
        if test is not None and (root / "train").is_dir():
            paths, labels = list_images(root / "train")
            test_paths, test_labels = list_images(test)
            self.train, self.test = torch.arange(len(paths)), len(paths) + torch.arange(len(test_paths))
            self.paths, self.labels = paths + test_paths, torch.cat([labels, test_labels])
        else:
            self.paths, self.labels = list_images(root)
            self.train, self.test = split(self.labels, held_out)

    def read(self, index: int) -> Image.Image:
        return self.decode(Path(self.paths[index]))

    def name(self, index: int) -> str:
        return self.paths[index]

    def entry(self, index: int) -> tuple[str, int]:
        path = self.paths[index]
        return path.removeprefix(f"{self.root}/"), file_size(path)


def list_images(root: Path) -> tuple[list[str], Tensor]:
    """Image files and their labels (n,) int64, a class per subfolder.

    Where no subfolder has an image, the folder's own files, all of class 0. Raises: UserError where there is no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    files = sorted(str(path) for path in root.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    samples = []
    if any(entry.is_dir() for entry in root.iterdir()):
        samples = ImageFolder(str(root), allow_empty=True).samples
    if samples:
        if files:
            print(f"note: {len(files)} images beside the class subfolders of {root} are left out")
        return [path for path, _ in samples], torch.tensor([label for _, label in samples])
    if not files:
        raise UserError(
            f"--data.root {root}: no images in it or in its subfolders (looked for {' '.join(sorted(IMG_EXTENSIONS))})"
        )
    return files, torch.zeros(len(files), dtype=torch.int64)
