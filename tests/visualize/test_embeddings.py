"""Maps of features."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from passl.exported import ExportError
from passl.visualize.embeddings import METHODS, project
from passl.visualize.principal import Moments, components_of
from passl.visualize.visualdl_embeddings import write_embeddings

# UMAP compiles itself for half a minute at its first use.
EACH = [pytest.param(method, marks=[pytest.mark.slow] * (method == "umap")) for method in METHODS]


def importable(method):
    pytest.importorskip({"tsne": "sklearn", "umap": "umap", "pca": "numpy"}[method])


def rows(count, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width))


@pytest.mark.smoke
def test_pca_is_the_two_largest_directions():
    features = rows(30) * [5, 1, 3, 1, 1, 1] + 7
    centred = features - features.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    directions *= np.sign(directions[[0, 1], np.abs(directions).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(project(features, "pca"), centred @ directions.T, atol=1e-5)


@pytest.mark.parametrize("method", EACH)
def test_near_features_are_near_points(method):
    importable(method)
    features = np.concatenate([rows(20), rows(20, seed=1) + 100])
    points = project(features, method, seed=3)
    assert (points.shape, points.dtype) == ((40, 2), np.float32)
    halves = points[:20], points[20:]
    apart = np.linalg.norm(halves[0].mean(axis=0) - halves[1].mean(axis=0))
    assert apart > 2 * max(np.linalg.norm(half - half.mean(axis=0), axis=1).mean() for half in halves)
    assert np.array_equal(points, project(features, method, seed=3))


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("count", range(7))
def test_few_images(method, count):
    importable(method)
    points = project(rows(count), method)
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()
    if 1 < count < 4:
        # They are in a plane: distances stay.
        wanted = np.linalg.norm(np.diff(rows(count), axis=0), axis=1)
        np.testing.assert_allclose(np.linalg.norm(np.diff(points, axis=0), axis=1), wanted, rtol=1e-5)


@pytest.mark.parametrize("method", EACH)
def test_degenerate_features(method):
    importable(method)
    assert not project(np.full((12, 5), 3.5), method).any()
    for features in (np.repeat(rows(2), 6, axis=0), rows(12, width=1), rows(12) * 1e200, rows(12).astype(np.float16)):
        assert np.isfinite(project(features, method)).all()


def test_seed_and_perplexity_matter():
    pytest.importorskip("sklearn")
    features = rows(40)
    assert not np.array_equal(project(features), project(features, perplexity=5))


@pytest.mark.smoke
def test_errors():
    features = rows(10)
    with pytest.raises(ValueError, match=re.escape("method ('tsn') must be one of tsne, umap, pca")):
        project(features, "tsn")
    with pytest.raises(
        ValueError, match=re.escape("perplexity (10) must be greater than 0 and less than the 10 images")
    ):
        project(features, perplexity=10)
    with pytest.raises(ValueError, match="perplexity is of tsne, not of pca"):
        project(features, "pca", perplexity=3)
    features[[4, 6], 2] = np.nan, np.inf
    with pytest.raises(ValueError, match=re.escape("the features of 2 of 10 images are not finite (the first: row 4)")):
        project(features, "pca")
    with pytest.raises(ValueError, match=r"must be numbers \[N, D\]"):
        project(np.zeros((3, 2, 2)))


@pytest.mark.parametrize(("method", "module"), [("tsne", "sklearn"), ("umap", "umap")])
def test_a_missing_library_is_named_with_its_extra(method, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=f'{module} is not installed: pip install "passl\\[viz\\]"'):
        project(rows(10), method)
    assert project(rows(10), "pca").shape == (10, 2)


# --- principal components ---


@pytest.mark.smoke
def test_moments_in_parts_are_those_of_all():
    features = rows(50) + 1000
    moments = Moments()
    for part in (features[:1], features[1:7], features[7:7], features[7:]):
        moments.add(part)
    got, wanted = moments.components(3), components_of(features, 3)
    np.testing.assert_allclose(got.directions, wanted.directions, atol=1e-9)
    np.testing.assert_allclose(got.variances, wanted.variances)
    np.testing.assert_allclose(got.variances, got.scores(features).var(axis=0))


def test_wide_rows_give_the_same_components():
    features = rows(5, width=40)
    moments = Moments()
    moments.add(features)
    got, wanted = components_of(features, 4), moments.components(4)
    np.testing.assert_allclose(got.directions, wanted.directions, atol=1e-9)
    np.testing.assert_allclose(got.variances, wanted.variances)


def test_signs_do_not_depend_on_the_order_of_rows():
    # Loadings of equal size: rounding must not choose among them.
    features = np.outer(rows(40)[:, 0], [1, -1, 1, -1])
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(40)
        for found in (components_of(features[order], 1), components_of(features[order][:3], 1)):
            np.testing.assert_allclose(found.directions, [[0.5, -0.5, 0.5, -0.5]], atol=1e-6)


def test_rounding_is_no_direction():
    features = np.outer(rows(40)[:, 0], rows(1)[0]).astype(np.float32)
    assert components_of(features, 3).variances[1] == 0
    assert not components_of(np.full((9, 4), 0.1, np.float32), 3).directions.any()
    with pytest.raises(ValueError, match="components of nothing"):
        components_of(np.zeros((0, 4)), 3)


# --- VisualDL ---


def read_back(file):
    from visualdl import LogReader

    reader = LogReader(file_path=str(file))
    ((record,),) = (reader.get_data("embeddings", tag) for tag in reader.get_tags()["embeddings"])
    return record.embeddings


def test_visualdl_reads_features_back(tmp_path):
    features = rows(4).astype(np.float32)
    for _ in range(2):  # the second takes the place of the first
        file = write_embeddings(tmp_path, features, ["a.png", "b.png", "ä.png", "\udcff.png"], ["x", "x", "y", ""])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    found = read_back(file)
    assert list(found.label_meta) == ["class", "path"]
    assert [list(one.label) for one in found.embeddings] == [
        ["x", "a.png"], ["x", "b.png"], ["y", "ä.png"], ["no class", "?.png"],
    ]  # fmt: skip
    np.testing.assert_array_equal(np.array([one.vectors for one in found.embeddings], np.float32), features)


def test_visualdl_keeps_the_records_of_a_run(tmp_path):
    (tmp_path / "vdlrecords.17.log").write_bytes(b"curves")
    file = write_embeddings(tmp_path, rows(1), ["a"])
    assert file.parent == tmp_path / "embeddings"
    assert [list(one.label) for one in read_back(file).embeddings] == [["a"]]
    with pytest.raises(ValueError, match="0 rows of features and 0 x path: one each, and at least one"):
        write_embeddings(tmp_path, rows(0), [])
