"""Scores J and F of DAVIS: how well the masks found in a clip agree with the annotated masks.

Masks are integers (F, H, W): F frames of H x W pixels; 0 is the background, 1 to O are the objects, 255 is void.
Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR 2016, and
the DAVIS 2017 challenge, semi-supervised, as its published code evaluates it: the first frame, which is given, and the
last frame do not count; O is the largest number in the first annotated mask; void counts as background.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

TOLERANCE = 0.008
"""Largest distance between two contours that counts as a match, as a share of the frame's diagonal."""
RECALLED = 0.5
"""Score above which an object counts as found in a frame."""

VOID = 255
"""Value of annotated pixels that belong to no object and not to the background."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Scores in [0, 1], as means over objects. Recall is the share of frames with a score above 0.5."""

    j_and_f: float
    j_mean: float
    j_recall: float
    f_mean: float
    f_recall: float


def region(found: Mask, truth: Mask) -> float:
    """J, the Jaccard index: pixels in both over pixels in either; 1 where both masks are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def contour(found: Mask, truth: Mask) -> float:
    """F = 2 P R / (P + R): P is the share of the found contour within the tolerance of the true one, R the reverse.

    1 where neither mask has a contour, 0 where one alone has. The tolerance is 0.008 of the diagonal, rounded up.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    a, b = boundary(found), boundary(truth)
    if not a.any() or not b.any():
        return float(not a.any() and not b.any())
    precision = np.mean(distance_transform_edt(~b)[a] <= radius)
    recall = np.mean(distance_transform_edt(~a)[b] <= radius)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: Mask) -> Mask:
    """Pixels that differ from the pixel right, below, or below right of them. The edge of the frame is no boundary."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def clip_scores(found: NDArray[np.integer], truth: NDArray[np.integer]) -> NDArray[np.float64]:
    """Scores (2, O, F - 2): J and F of every object of the first annotated mask, without the first and last frame.

    Numbers that only later masks have count as background. An object without a pixel in the first mask, but with a
    smaller number than another, counts as an object, as in the published code.
    Raises: ValueError on masks of different or wrong shapes, or found objects that the first mask lacks.
    """
    if found.shape != truth.shape or truth.ndim != 3 or len(truth) < 3:
        raise ValueError(f"masks must be (F, H, W) with F >= 3, got {found.shape} found and {truth.shape} annotated")
    truth = np.where(truth == VOID, 0, truth)
    count, most = int(truth[0].max()), int(found[1:-1].max())
    if most > count:
        raise ValueError(f"found masks must hold objects 0 to {count}, as the first annotated mask does, got {most}")
    frames = list(zip(found[1:-1], truth[1:-1], strict=True))
    return np.array(
        [[[score(f == o, t == o) for f, t in frames] for o in range(1, count + 1)] for score in (region, contour)],
        dtype=np.float64,
    ).reshape(2, count, len(frames))


def summary(clips: list[NDArray[np.float64]]) -> Scores:
    """Mean scores over the objects of all clips; each object counts once, whatever the length of its clip.

    Raises: ValueError where there is no object.
    """
    if not any(clip.shape[1] for clip in clips):
        raise ValueError(f"there must be at least one object to average over, got none in {len(clips)} clips")
    objects = [[(frames.mean(), (frames > RECALLED).mean()) for clip in clips for frames in clip[i]] for i in (0, 1)]
    (j, j_recall), (f, f_recall) = (np.mean(rows, axis=0).tolist() for rows in objects)
    return Scores((j + f) / 2, j, j_recall, f, f_recall)
