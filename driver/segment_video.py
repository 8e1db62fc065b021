"""Video object segmentation on DAVIS 2017, by carrying the first frame's labels along with frozen features.

python driver/segment_video.py --davis DAVIS --backbone.run RUN_DIR
python driver/segment_video.py --davis DAVIS --backbone.name vit_small_patch16_224 --backbone.weights FILE

Nothing is trained. A patch of a frame takes the labels of the most similar patches near its place, in the first frame
and in the last few frames. Shapes: F frames; h x w patches of D features; C labels, one of them the background.
"""

import json
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from driver.bounds import POSITIVE, at_least
from driver.cli import check_bounds, run_script
from driver.config import UserError, helpful
from driver.distributed import World
from driver.evaluation.davis_metrics import Scores, clip_scores, summary
from driver.evaluation.frozen import Backbone, Frozen
from driver.files import replacing

MULTIPLE = 64
"""The longer side of a frame is cut to a multiple of this, as the published evaluations do."""


@helpful
@dataclass(frozen=True)
class Options:
    """Carry the first frame's object masks through the clips of DAVIS 2017; print J and F."""

    davis: Path
    """Folder of DAVIS 2017, with ImageSets/2017, JPEGImages/480p and Annotations/480p."""
    backbone: Backbone = field(default_factory=Backbone)
    split: str = "val"
    """Name of the list of clips: the file ImageSets/2017/SPLIT.txt."""
    short_side: Annotated[int, at_least(1)] = 480
    """Shorter side of the frames that the network sees, pixels."""
    last_frames: Annotated[int, at_least(1)] = 7
    """Frames just before the current one that give labels, in addition to the first frame."""
    radius: Annotated[int, at_least(0)] = 12
    """Distance, in patches up, down, left and right, within which a patch looks for similar patches. 0: the whole
    frame."""
    top_k: Annotated[int, at_least(1)] = 5
    """Number of most similar patches whose labels a patch takes."""
    temperature: Annotated[float, POSITIVE] = 0.1
    """Softmax temperature of the cosines that weigh the labels of the similar patches."""
    out: Path | None = None
    """Folder for the masks (PNG, as in DAVIS) and scores.json. None: nothing is written."""


def main(options: Options, world: World) -> Scores:
    """Segment every clip of the split; print and return the scores. Raises: UserError on bad options or files."""
    check_bounds(options)
    if world.size > 1:
        raise UserError("segment_video runs on one rank")
    frozen = options.backbone.load()
    clips = {}
    for name in tqdm(clip_names(options), unit="clip"):
        frames, annotations = clip_files(options.davis, name)
        truth = np.stack([read_mask(path) for path in annotations])
        found = segment(frozen, [Image.open(path).convert("RGB") for path in frames], truth[0], options)
        clips[name] = clip_scores(found, truth)
        if options.out is not None:
            write_masks(found, annotations, options.out / name)
    scores = summary(list(clips.values()))
    rows = {name: summary([clip]) for name, clip in clips.items()} | {f"all {len(clips)} clips": scores}
    print(table(rows))
    if options.out is not None:
        text = json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1)
        with replacing(options.out / "scores.json") as temporary:
            temporary.write_text(text + "\n")
    return scores


@torch.no_grad()
def segment(frozen: Frozen, frames: list[Image.Image], first: NDArray, options: Options) -> NDArray[np.uint8]:
    """Masks (F, H, W) of a clip, from the mask (H, W) of its first frame."""
    classes = int(first.max()) + 1
    size = network_size(frames[0].size, options.short_side)
    start = _features(frozen, frames[0], size)
    shape = start.shape[:2]
    labels = F.one_hot(_resize_nearest(first, shape), classes).to(start)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=options.last_frames)
    masks = [first.astype(np.uint8)]
    for frame in frames[1:]:
        present = _features(frozen, frame, size)
        sources, given = zip((start, labels), *recent, strict=True)
        found = propagate(
            present, torch.stack(sources), torch.stack(given), options.radius, options.top_k, options.temperature
        )
        recent.append((present, found))
        masks.append(to_mask(found, size, first.shape))
    return np.stack(masks)


def propagate(query: Tensor, sources: Tensor, labels: Tensor, radius: int, top_k: int, temperature: float) -> Tensor:
    """Labels (h, w, C) of a frame: for each patch, the softmax-weighted mean of the labels of the most similar patches.

    query (h, w, D) and sources (n, h, w, D) have unit rows; labels (n, h, w, C). Source patches are at most `radius`
    rows and columns away (0: anywhere); the top_k with the highest cosines have weights exp(cosine / temperature).
    Memory: w times the patches in reach, since the frame is done row by row.
    """
    h, w, _ = query.shape
    radius = radius or max(h, w)
    columns = torch.arange(w, device=query.device)
    too_far = (columns[:, None] - columns).abs() > radius
    out = []
    for i in range(h):
        rows = slice(max(0, i - radius), i + radius + 1)
        near, given = sources[:, rows], labels[:, rows]
        cosine = torch.einsum("jd,nkld->jnkl", query[i], near)
        cosine = cosine.masked_fill(too_far[:, None, None], -torch.inf).flatten(1)
        best, index = cosine.topk(min(top_k, cosine.shape[1]), dim=1)
        weight = (best / temperature).softmax(1)
        out.append(torch.einsum("jk,jkc->jc", weight, given.flatten(0, 2)[index]))
    return torch.stack(out)


def to_mask(labels: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Mask (H, W) from labels (h, w, C): each label's map is upsampled and stretched to [0, 1]; the largest wins."""
    maps = F.interpolate(labels.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].flatten(1)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    stretched = torch.where(high > 0, (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny), maps)
    mask = stretched.argmax(0).view(size).cpu().numpy().astype(np.uint8)
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def network_size(image_size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Size (height, width) of the frame that the network sees, from PIL's (width, height); the longer side is cut."""
    width, height = image_size
    longer = short_side * max(width, height) // min(width, height) // MULTIPLE * MULTIPLE
    return (longer, short_side) if height > width else (short_side, longer)


def _features(frozen: Frozen, frame: Image.Image, size: tuple[int, int]) -> Tensor:
    """Unit features (h, w, D) of a frame."""
    resized = frame.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    return F.normalize(frozen.patches(image)[0].permute(1, 2, 0).float(), dim=-1)


def _resize_nearest(mask: NDArray, shape: tuple[int, int]) -> Tensor:
    image = Image.fromarray(mask.astype(np.uint8)).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).long()


def clip_names(options: Options) -> list[str]:
    path = options.davis / "ImageSets" / "2017" / f"{options.split}.txt"
    if not path.is_file():
        raise UserError(f"--davis {options.davis}: no {path.relative_to(options.davis)} there; is it DAVIS 2017?")
    return path.read_text().split()


def clip_files(davis: Path, name: str) -> tuple[list[Path], list[Path]]:
    """Paths of a clip's frames and annotations. Raises: UserError where they do not match, or are fewer than 3."""
    frames = sorted((davis / "JPEGImages" / "480p" / name).glob("*.jpg"))
    annotations = sorted((davis / "Annotations" / "480p" / name).glob("*.png"))
    if [path.stem for path in frames] != [path.stem for path in annotations] or len(frames) < 3:
        raise UserError(
            f"clip {name}: at least 3 frames are needed, each with an annotation of its name; got {len(frames)} frames "
            f"and {len(annotations)} annotations"
        )
    return frames, annotations


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Object numbers (H, W) in a palette or grey PNG. Raises: UserError on a PNG of another kind."""
    image = Image.open(path)
    if image.mode not in ("P", "L"):
        raise UserError(f"{path}: an annotation must be a palette or grey PNG, got mode {image.mode}")
    return np.array(image)


def write_masks(found: NDArray[np.uint8], annotations: list[Path], folder: Path) -> None:
    """Write a clip's masks as PNG files, with the palette of its annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    palette = Image.open(annotations[0]).getpalette()
    for mask, path in zip(found, annotations, strict=True):
        image = Image.fromarray(mask)
        if palette is not None:
            image.putpalette(palette)
        image.save(folder / path.name)


def table(rows: dict[str, Scores]) -> str:
    """Table of the scores, in per cent, as lines of text."""
    width = max(len(name) for name in rows)
    lines = [f"{'':{width}}    J&F  J mean  J recall  F mean  F recall"]
    for name, row in rows.items():
        cells = (row.j_and_f, row.j_mean, row.j_recall, row.f_mean, row.f_recall)
        lines.append(
            f"{name:{width}}  " + "  ".join(f"{100 * x:{n}.1f}" for x, n in zip(cells, (5, 6, 8, 6, 8), strict=True))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(Options, main))
