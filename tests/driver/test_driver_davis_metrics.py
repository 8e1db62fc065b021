"""J and F of video segmentation against numbers worked out by hand, and the propagation of labels.

All numbers follow from the published evaluation of DAVIS 2017, semi-supervised.
"""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from videos import square

from driver import segment_video
from driver.evaluation import davis_metrics, frozen
from driver.evaluation.davis_metrics import VOID

# J and F


def test_region_and_contour_of_squares():
    """A 20-pixel square moved by d: J = (20 - d) / (20 + d). The tolerance of 60 x 90 is ceil(0.8653) = 1 pixel."""
    truth = square(20, 30)
    assert davis_metrics.region(truth, truth) == davis_metrics.contour(truth, truth) == 1
    for d in (1, 5, 20):
        assert davis_metrics.region(square(20, 30 + d), truth) == pytest.approx((20 - d) / (20 + d))
    assert davis_metrics.contour(square(20, 31), truth) == 1  # one pixel is within the tolerance
    assert 0 < davis_metrics.contour(square(20, 33), truth) < 0.7  # top and bottom meet, the sides do not
    assert davis_metrics.contour(square(0, 60), truth) == 0
    empty = np.zeros_like(truth)
    for score in (davis_metrics.region, davis_metrics.contour):
        assert score(empty, empty) == 1 and score(empty, truth) == score(truth, empty) == 0


def test_contour_by_dilation_with_a_disk():
    """The definition of the benchmark, on ragged masks; 200 x 300 has a tolerance of 3 pixels."""
    rng = np.random.default_rng(0)
    coarse = [rng.random((10, 15)) < 0.5 for _ in range(2)]
    found, truth = (np.kron(mask, np.ones((20, 20), bool)) for mask in coarse)
    found[7:150, 100:203] = np.roll(truth, 2, axis=0)[7:150, 100:203]
    a, b = davis_metrics.boundary(found), davis_metrics.boundary(truth)
    y, x = np.mgrid[-3:4, -3:4]
    disk = x**2 + y**2 <= 9
    precision = (a & binary_dilation(b, disk)).sum() / a.sum()
    recall = (b & binary_dilation(a, disk)).sum() / b.sum()
    assert davis_metrics.contour(found, truth) == pytest.approx(2 * precision * recall / (precision + recall))
    assert 0.1 < precision < 0.9


def test_scores_of_a_clip():
    """Two objects over six frames, of which the first and the last do not count; the second is lost from frame 3."""
    truth = np.stack([square(5, 5 + t) * 1 + square(35, 60 - t) * 2 for t in range(6)])
    found = truth.copy()
    found[3:][found[3:] == 2] = 0
    found[[0, 5]] = 0
    scores = davis_metrics.clip_scores(found, truth)
    assert scores.shape == (2, 2, 4)
    assert (scores == [[[1, 1, 1, 1], [1, 1, 0, 0]]] * 2).all()
    whole = davis_metrics.summary([scores])
    assert (whole.j_mean, whole.j_recall, whole.f_mean, whole.j_and_f) == (0.75, 0.75, 0.75, 0.75)
    # An object counts once, whatever its clip's length.
    assert davis_metrics.summary([scores, np.zeros((2, 1, 90))]).j_mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="masks must be"):
        davis_metrics.clip_scores(found[:, :10], truth)


@pytest.mark.parametrize("moved, j, f", [(0, 1, 1), (1, 1 / 3, 1), (2, 0, 5 / 8), (3, 0, 3 / 8), (4, 0, 0)])
def test_small_squares_by_hand(moved, j, f):
    """A square of 2 x 2 pixels at rows and columns 2 and 3 of 6 x 8, and one moved right. Tolerance ceil(0.08) = 1.

    J: moved by 1, the squares share 2 of 6 pixels. The contour has 8 pixels: rows and columns 1 to 3 without (2, 2),
    the one pixel that equals its neighbours right and below.
    F: moved by 1, each found pixel is on the true contour or beside it.
    Moved by 2, found columns are 3 to 5: 3 pixels of column 3 are on the true contour, (1, 4) and (3, 4) beside it, and
    column 5 is two pixels away: 5 of 8. The true contour has as many matches, by symmetry, so F = P = R = 5 / 8.
    Moved by 3, only the 3 pixels of column 4 are beside the true column 3: 3 of 8.
    """
    truth, found = square(2, 2, 2, (6, 8)), square(2, 2 + moved, 2, (6, 8))
    assert davis_metrics.boundary(truth).sum() == 8
    assert davis_metrics.region(found, truth) == pytest.approx(j)
    assert davis_metrics.contour(found, truth) == pytest.approx(f)


def test_the_tolerance_includes_its_radius():
    """75 x 100 has the diagonal 125 and the tolerance 0.008 * 125 = 1; of 76 x 100 it is ceil(1.005) = 2."""
    for height, matches in ((75, 1), (76, 2)):
        rows = np.arange(height)[:, None] + np.zeros((1, 100), int)
        for d in range(4):  # the contours of two half-planes are d rows apart
            assert davis_metrics.contour(rows >= 30 + d, rows >= 30) == float(d <= matches)


def clip(*frames: np.ndarray) -> np.ndarray:
    """A clip (F, H, W) whose first frame, which does not count, and last one are copies of their neighbours."""
    return np.stack([frames[0], *frames, frames[-1]])


SMALL = square(2, 2, 2, (6, 8))


def test_void_is_background():
    """2 of 6 found pixels are void in the truth: they count as found wrongly, J = 4 / 6; void in the truth alone is 0.

    So does the published code in the semi-supervised evaluation; it leaves void pixels out in the unsupervised one.
    """
    truth = np.where(SMALL, 1, 0)
    truth[2:4, 4] = VOID
    found = np.where(SMALL | (truth == VOID), 1, 0)
    scores = davis_metrics.clip_scores(clip(found), clip(truth))
    assert scores.shape == (2, 1, 1) and scores[0] == pytest.approx(4 / 6)
    assert (davis_metrics.clip_scores(clip(SMALL * 1), clip(truth)) == 1).all()


def test_only_void_is_no_object():
    truth = clip(SMALL * VOID)
    scores = davis_metrics.clip_scores(np.zeros_like(truth), truth)
    assert scores.shape == (2, 0, 1)
    with pytest.raises(ValueError, match="at least one object"):
        davis_metrics.summary([scores])
    one = davis_metrics.clip_scores(clip(SMALL * 1), clip(SMALL * 1))
    assert davis_metrics.summary([scores, one]).j_and_f == 1  # a clip without objects has no weight


def test_objects_are_those_of_the_first_frame():
    """Object 2 comes later and counts as background: found as object 1 it costs J = 4 / 8 there."""
    later = np.where(SMALL, 1, 0)
    later[2:4, 5:7] = 2
    truth = np.stack([SMALL * 1, later, later, later])
    scores = davis_metrics.clip_scores(np.stack([SMALL * 1, SMALL * 1, (later > 0) * 1, later]), truth)
    assert scores.shape == (2, 1, 2) and scores[0, 0].tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="objects 0 to 1, as the first annotated mask does, got 2"):
        davis_metrics.clip_scores(truth, truth)


def test_an_absent_object():
    """An object that is gone scores 1 where nothing is found, else 0; one that is not found scores 0."""
    gone, there = np.zeros((6, 8), int), SMALL * 1
    scores = davis_metrics.clip_scores(
        np.stack([there, gone, there, gone, gone]), np.stack([there, gone, gone, there, gone])
    )
    assert scores[0, 0].tolist() == scores[1, 0].tolist() == [1, 0, 0]


def test_recall_is_above_one_half():
    """J of 0.5 is not recalled: of 0.5, 0.5 and 0.8 one third is, and the mean is 0.6."""
    whole = davis_metrics.summary([np.array([[[0.5, 0.5, 0.8]], [[1.0, 1.0, 0.0]]])])
    assert whole.j_recall == pytest.approx(1 / 3) and whole.j_mean == pytest.approx(0.6)
    assert whole.f_recall == whole.f_mean == pytest.approx(2 / 3) and whole.j_and_f == pytest.approx(0.6 / 2 + 1 / 3)


def restated(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """J and F of one object in one frame, pixel by pixel."""
    height, width = truth.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    either, both = (sum(bool(op(found[p], truth[p])) for p in pixels) for op in (np.logical_or, np.logical_and))

    def contour(mask: np.ndarray) -> list[tuple[int, int]]:
        near = [(0, 1), (1, 0), (1, 1)]
        inside = lambda y, x: (min(y, height - 1), min(x, width - 1))  # noqa: E731  # the frame's edge is no contour
        return [(y, x) for y, x in pixels if any(mask[inside(y + v, x + u)] != mask[y, x] for v, u in near)]

    def share(a: list[tuple[int, int]], b: list[tuple[int, int]], radius: float) -> float:
        return sum(any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in b) for y, x in a) / len(a)

    a, b = contour(found), contour(truth)
    if not a or not b:
        return both / either if either else 1.0, float(a == b)
    radius = np.ceil(0.008 * np.sqrt(height**2 + width**2))
    precision, recall = share(a, b, radius), share(b, a, radius)
    f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return both / either if either else 1.0, f


def test_scores_equal_a_restatement():
    """Three objects of blocks of pixels, some in rows at the edge, with void and objects that come later."""
    rng = np.random.default_rng(0)
    truth, found = (np.kron(rng.integers(0, 4, (5, 4, 5)), np.ones((1, 3, 3), int)) for _ in range(2))
    found[:3] = np.where(rng.random(found[:3].shape) < 0.8, truth[:3], found[:3])
    truth[0][truth[0] == 3] = 0
    truth[0, 0, 0] = 2  # two objects, and 3 comes later
    found[found == 3] = 0
    truth[:, :, 4] = VOID
    found[3][found[3] == 2] = 0
    truth[3][truth[3] == 2] = 0
    scores = davis_metrics.clip_scores(found, truth)
    assert scores.shape == (2, 2, 3) and scores[:, 1, 2].tolist() == [1, 1]
    for o in (1, 2):
        for t in (1, 2, 3):
            assert scores[:, o - 1, t - 1].tolist() == pytest.approx(restated(found[t] == o, truth[t] == o))
    assert 0.2 < scores.mean() < 0.95


# Propagation


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_propagation_equals_brute_force(radius):
    n, h, w, D, C, k, tau = 3, 4, 5, 6, 3, 4, 0.1
    generator = torch.Generator().manual_seed(0)
    query, sources = (torch.randn(*shape, D, generator=generator).double() for shape in ((h, w), (n, h, w)))
    query, sources = (x / x.norm(dim=-1, keepdim=True) for x in (query, sources))
    labels = torch.rand(n, h, w, C, generator=generator).double()
    found = segment_video.propagate(query, sources, labels, radius, k, tau)
    for i in range(h):
        for j in range(w):
            near = [
                (float(query[i, j] @ sources[m, p, q]), labels[m, p, q])
                for m in range(n)
                for p in range(h)
                for q in range(w)
                if not radius or max(abs(p - i), abs(q - j)) <= radius
            ]
            best = sorted(near, key=lambda pair: -pair[0])[:k]
            weights = torch.tensor([np.exp(cosine / tau) for cosine, _ in best]).double()
            expected = sum(weight * label for weight, (_, label) in zip(weights, best, strict=True)) / weights.sum()
            assert ((found[i, j] - expected).abs() <= 1e-9).all()


def test_patches_that_are_equally_near_all_count():
    """Three equal patches in a row and reach 1: label 1 of the first patch is shared by 2, then 3, then 2 patches."""
    ones, labels = torch.ones(1, 3, 1), torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1)
    found = segment_video.propagate(ones, ones[None], labels, 1, 1, 0.1)
    assert found.flatten().tolist() == pytest.approx([1 / 2, 1 / 3, 0])


def mask_of(*maps: list[float]) -> list[int]:
    """Mask of 1 x n pixels from maps of n patches, one map a label."""
    labels = torch.tensor(maps).T[None]
    n = labels.shape[1]
    return segment_video.to_mask(labels, (1, n), (1, n))[0].tolist()


def test_masks_from_labels():
    """Each map is stretched to [0, 1]: 0.3 is the most that object 1 has, and wins where the background has 0.7."""
    assert mask_of([0.7, 0.9, 1.0], [0.3, 0.1, 0.0]) == [1, 0, 0]
    assert mask_of([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]) == [0, 0, 0]  # the object was lost
    assert mask_of([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]) == [1, 1, 1]  # the object fills the frame
    almost = [1.0, 1 - 6e-8, 1.0]
    assert mask_of([0.0, 0.0, 0.0], almost) == [1, 1, 1]
    assert mask_of(almost, [0.0, 0.0, 0.0]) == [0, 0, 0]
    assert mask_of([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]) == [0, 0, 2]  # object 1 of 2 was lost


def test_frames_are_resized_without_a_low_pass_filter():
    """8 columns to 2: column 0 is the mean of columns 1 and 2 alone, column 1 of columns 5 and 6."""

    class Pixels(torch.nn.Module):
        def forward_intermediates(self, images, **_):
            return [images]

    from PIL import Image

    row = np.array([0, 200, 100, 0, 0, 50, 50, 255], np.uint8)
    frame = Image.fromarray(np.stack([np.stack([row, row * 0 + 150, row * 0], -1)] * 2))
    pixels = frozen.Frozen(torch.nn.Identity(), Pixels(), 8, torch.device("cpu"))
    found = segment_video._features(pixels, frame, (2, 2))
    assert (found[0, :, 0] / found[0, :, 1]).tolist() == pytest.approx([150 / 150, 50 / 150], rel=1e-4)


@pytest.mark.parametrize("size, expected", [((854, 480), (480, 832)), ((480, 854), (832, 480)), ((96, 64), (480, 704))])
def test_frame_sizes(size, expected):
    assert segment_video.network_size(size, 480) == expected


@pytest.mark.parametrize(
    "short_side, stride, expected",
    [(476, 14, (476, 840)), (480, 8, (480, 832)), (480, 32, (480, 832)), (64, 16, (64, 64))],
)
def test_patches_cover_the_frame(short_side, stride, expected):
    """854 x 480 pixels: 476 * 854 / 480 = 846, of which 60 patches of 14 cover 840."""
    size = segment_video.network_size((854, 480), short_side, stride)
    assert size == expected and size[0] % stride == size[1] % stride == 0
    segment_video.check_patches(short_side, stride)
