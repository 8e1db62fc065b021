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

from bam_kernels.whole_files import replacing
from driver.bounds import TEMPERATURE, at_least
from driver.cli import check_folder, run_script
from driver.config import UserError, helpful
from driver.data.decode import open_image
from driver.distributed import World
from driver.evaluation.davis_clips import FRAMES, MASKS, Clip, notes, read_clips, read_frame
from driver.evaluation.davis_metrics import Scores, clip_scores, summary
from driver.evaluation.frozen import Backbone, Frozen

SCORES = "scores.json"
MULTIPLE = 64
"""The longer side of a frame is cut to a multiple of this, as the published evaluations do."""
CONSTANT = 1e-5
"""Largest difference within a label's map, as a share of its maximum, that is taken for rounding."""


@helpful
@dataclass(frozen=True)
class Options:
    """Carry the first frame's object masks through the clips of DAVIS 2017; print J and F."""

    davis: Path
    """Folder of DAVIS 2017, with ImageSets/2017, JPEGImages/480p and Annotations/480p. Objects are numbered 1, 2, ...
    in the masks; in masks of 0 and 255 alone, 255 is the object."""
    backbone: Backbone = field(default_factory=Backbone)
    split: str = "val"
    """Name of the list of clips: the file ImageSets/2017/SPLIT.txt."""
    short_side: Annotated[int, at_least(MULTIPLE, 2**14)] = 480
    """Shorter side of the frames that the network sees, pixels: a multiple of the backbone's patch."""
    last_frames: Annotated[int, at_least(1)] = 7
    """Frames just before the current one that give labels, in addition to the first frame."""
    radius: Annotated[int, at_least(0)] = 12
    """Distance, in patches up, down, left and right, within which a patch looks for similar patches. 0: the whole
    frame."""
    top_k: Annotated[int, at_least(1)] = 5
    """Number of most similar patches whose labels a patch takes."""
    temperature: Annotated[float, TEMPERATURE] = 0.1
    """Softmax temperature of the cosines that weigh the labels of the similar patches."""
    out: Path | None = None
    """Folder for the masks (PNG of object numbers, as in DAVIS) and scores.json. None: nothing is written."""


def main(options: Options, world: World) -> Scores | None:
    """Segment every clip of the split; print and return the scores. None: no clip has masks of all frames.

    Raises: UserError on bad options or files.
    """
    if world.size > 1:
        raise UserError("segment_video runs on one rank")
    if options.out is not None:
        check_folder(options.out, f"--out {options.out}", SCORES)
    frozen = options.backbone.load()
    check_patches(options.short_side, frozen.stride)
    clips = read_clips(options.davis, options.split)
    check_purpose(clips, options)
    for note in notes(clips):
        print(f"note: {note}")
    scores = {}
    for clip in tqdm(clips, unit="clip"):
        if not clip.scored and options.out is None:
            continue
        truth = clip.masks()
        found = segment(frozen, [read_frame(path) for path in clip.frames], truth[0], options)
        if clip.scored:
            scores[clip.name] = clip_scores(found, truth)
        if options.out is not None:
            write_masks(found, clip, options.out / clip.name)
    if not scores:
        return None
    whole = summary(list(scores.values()))
    rows = {name: summary([clip]) for name, clip in scores.items()} | {f"all {len(scores)} clips": whole}
    print(table(rows))
    if options.out is not None:
        text = json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1)
        with replacing(options.out / SCORES) as temporary:
            temporary.write_text(text + "\n")
    return whole


def check_purpose(clips: list[Clip], options: Options) -> None:
    """Raise a UserError where there is nothing to score or write, or masks would be written over the data set."""
    out = options.out
    if not any(clip.scored for clip in clips) and (out is None or not any(clip.objects for clip in clips)):
        empty = sum(not clip.objects for clip in clips)
        raise UserError(
            f"--davis {options.davis}: no clip can be scored: of {len(clips)}, {empty} lack an object in the first "
            f"frame and {len(clips) - empty} have a mask of that frame alone (--out FOLDER writes masks without scores)"
        )
    if out is None:
        return
    for folder in (FRAMES, MASKS):
        if out.resolve() == options.davis.joinpath(*folder).resolve():
            raise UserError(f"--out {out}: masks would replace files of --davis {options.davis}; give another folder")
    out.mkdir(parents=True, exist_ok=True)


@torch.no_grad()
def segment(frozen: Frozen, frames: list[Image.Image], first: NDArray, options: Options) -> NDArray[np.uint8]:
    """Masks (F, H, W) of a clip, from the mask (H, W) of its first frame."""
    classes = int(first.max()) + 1
    size = network_size(frames[0].size, options.short_side, frozen.stride)
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
    rows and columns away (0: anywhere); the top_k with the highest cosines, and all that equal the last of them, have
    weights exp(cosine / temperature).
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
        least = cosine.topk(min(top_k, cosine.shape[1]), dim=1).values[:, -1:]
        weight = (cosine.masked_fill(cosine < least, -torch.inf) / temperature).softmax(1)
        out.append(weight @ given.flatten(0, 2))
    return torch.stack(out)


def to_mask(labels: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Mask (H, W) from labels (h, w, C): each label's map is upsampled and stretched to [0, 1]; the largest wins.

    A map that is constant but for rounding is not stretched: a label of the whole frame, or of none of its patches.
    """
    maps = F.interpolate(labels.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].flatten(1)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    constant = high - low <= CONSTANT * high
    stretched = torch.where(constant, maps, (maps - low) / (high - low).where(~constant, 1.0))
    mask = stretched.argmax(0).view(size).cpu().numpy().astype(np.uint8)
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def check_patches(short_side: int, stride: int) -> None:
    """Raise a UserError where patches of `stride` pixels do not cover the shorter side of the frames."""
    if below := short_side % stride:
        near = f"{short_side - below} or {short_side - below + stride}"
        raise UserError(f"--short-side {short_side}: must be a multiple of the backbone's patch of {stride}, as {near}")


def network_size(image_size: tuple[int, int], short_side: int, stride: int = 1) -> tuple[int, int]:
    """Size (height, width) of the frame that the network sees, from PIL's (width, height); the longer side is cut.

    `stride` is the side of the network's patches, which cover the frame without a rest.
    """
    multiple = stride if MULTIPLE % stride else MULTIPLE
    width, height = image_size
    longer = short_side * max(width, height) // min(width, height) // multiple * multiple
    return (longer, short_side) if height > width else (short_side, longer)


def _features(frozen: Frozen, frame: Image.Image, size: tuple[int, int]) -> Tensor:
    """Unit features (h, w, D) of a frame, resized without a low-pass filter as in the published evaluation."""
    image = torch.from_numpy(np.array(frame)).to(frozen.device).permute(2, 0, 1)[None].float() / 255
    image = F.interpolate(image, size=size, mode="bilinear")
    return F.normalize(frozen.patches(image)[0].permute(1, 2, 0).float(), dim=-1)


def _resize_nearest(mask: NDArray, shape: tuple[int, int]) -> Tensor:
    image = Image.fromarray(mask.astype(np.uint8)).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).long()


def write_masks(found: NDArray[np.uint8], clip: Clip, folder: Path) -> None:
    """Write a clip's masks as PNG files of object numbers, with the palette of its first annotation."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_image(clip.annotations[0]) as first:
        palette = first.getpalette()
    for mask, path in zip(found, clip.frames, strict=True):
        image = Image.fromarray(mask)
        if palette is not None:
            image.putpalette(palette + [0] * (768 - len(palette)))  # Pillow cuts numbers to the palette's length
        with replacing(folder / f"{path.stem}.png") as temporary:
            image.save(temporary, "PNG")


def table(rows: dict[str, Scores]) -> str:
    """Table of the scores, in per cent, as lines of text."""
    width = max(len(name) for name in rows)
    lines = [f"{'':{width}}  J&F-Mean  J-Mean  J-Recall  F-Mean  F-Recall"]
    for name, row in rows.items():
        cells = (row.j_and_f, row.j_mean, row.j_recall, row.f_mean, row.f_recall)
        lines.append(
            f"{name:{width}}  " + "  ".join(f"{100 * x:{n}.1f}" for x, n in zip(cells, (8, 6, 8, 6, 8), strict=True))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(Options, main))
