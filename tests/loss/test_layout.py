"""Index algebra against loops over (view, rank, image)."""

from itertools import product

import pytest
import torch

from bam_kernels.layout import Layout

# One image, an odd number, and a power of two; T below and at V; no rank beside this one, and some.
SHAPES = [(B, V, T, W) for B in (1, 3, 4) for V, T in ((1, 1), (2, 2), (3, 2), (4, 1)) for W in (1, 2, 3)]
shapes = pytest.mark.parametrize("B,V,T,W", SHAPES)


def layouts(B: int, V: int, T: int, W: int) -> list[Layout]:
    """The layout of every rank."""
    return [Layout(B=B, V=V, L=min(V, 2), T=T, D=8, W=W, rank=rank) for rank in range(W)]


def keys(layout: Layout) -> list[tuple[int, int, int]]:
    """(view, rank, image) of every key in public order."""
    return list(product(range(layout.T), range(layout.W), range(layout.B)))


@shapes
def test_rows_are_view_major(B, V, T, W):
    for layout in layouts(B, V, T, W):
        rows = [(v, i) for v in range(V) for i in range(B)]
        assert layout.M == len(rows)
        assert [(layout.view(row), layout.image(row)) for row in range(layout.M)] == rows


@shapes
def test_column_orders(B, V, T, W):
    for layout in layouts(B, V, T, W):
        assert layout.N == len(keys(layout)) == T * B * W
        public = {layout.public_column(*key): key for key in keys(layout)}
        assert [public[column] for column in range(layout.N)] == keys(layout)
        gathered = {layout.gathered_column(*key): key for key in keys(layout)}
        rank_major = list(product(range(W), range(T), range(B)))
        assert [gathered[column] for column in range(layout.N)] == [(t, r, i) for r, t, i in rank_major]


@shapes
def test_own_columns(B, V, T, W):
    for layout in layouts(B, V, T, W):
        own = range(layout.own_columns, layout.own_columns + T * B)
        assert list(own) == [layout.gathered_column(t, layout.rank, i) for t in range(T) for i in range(B)]


@shapes
def test_positive_mask(B, V, T, W):
    for layout in layouts(B, V, T, W):
        for rows in (layout.M, B):
            mask = layout.positive_mask(rows)
            assert mask.shape == (rows, layout.N)
            for row, (t, r, i) in product(range(rows), keys(layout)):
                positive = r == layout.rank and i == row % B
                assert mask[row, layout.public_column(t, r, i)].item() == positive


@shapes
def test_reordering(B, V, T, W):
    for layout in layouts(B, V, T, W):
        public = torch.arange(2 * layout.N).view(2, layout.N)
        gathered = layout.to_gathered(public)
        for key in keys(layout):
            source, column = layout.public_column(*key), layout.gathered_column(*key)
            assert torch.equal(gathered[:, column], public[:, source])
        assert torch.equal(layout.to_public(gathered), public)
        assert torch.equal(layout.to_gathered(layout.to_public(public)), public)
        assert torch.equal(layout.to_public(public[0]), layout.to_public(public)[0])


@pytest.mark.parametrize("V,L", [(V, L) for V in range(1, 6) for L in range(1, V + 1)])
def test_pairs_of_views(V, L):
    """mean_{t<L} mean_{v != t} X_tv = Σ_v pair_weight Σ_{t in target_terms(v)} X_tv, for any X."""
    layout = Layout(B=2, V=V, L=L, T=1, D=8)
    X = torch.rand(L, V, dtype=torch.float64, generator=torch.Generator().manual_seed(V * 10 + L))
    if V == 1:
        expected = X[0, 0].item()
    else:
        others = [[X[t, v].item() for v in range(V) if v != t] for t in range(L)]
        expected = sum(sum(row) / len(row) for row in others) / L
    terms = [X[t, v].item() for v in range(V) for t in layout.target_terms(v)]
    assert abs(layout.pair_weight * sum(terms) - expected) <= 1e-14
