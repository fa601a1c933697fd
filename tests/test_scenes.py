"""Drawn scenes: reproducible, imbalanced as documented, with labels that match the image."""

import hashlib
import itertools

import numpy as np
import pytest

from mcseg.data.scenes import SCENE_CLASSES, SCENE_PALETTE, draw_scene

N_SCENES = 150
VOID = 255
# name -> smallest and largest share of the labelled pixels, in percent
SHARES = {
    "road": (50.0, 56.0),
    "building": (20.0, 32.0),
    "sky": (7.0, 14.0),
    "vegetation": (5.0, 9.5),
    "vehicle": (2.0, 5.0),
    "person": (0.5, 1.5),
    "pole": (0.3, 0.8),
    "light": (0.05, 0.2),
}


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene((2024, index)) for index in range(N_SCENES)]


@pytest.fixture(scope="module")
def counts(scenes):
    """Count the pixels of each label in each scene, (scenes, 256)."""
    return np.stack([np.bincount(labels.ravel(), minlength=256) for _, labels in scenes])


def digest(image, labels):
    return hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()


def contrast(image, labels, name):
    """Largest channel difference between each pixel of a class and the median of its neighbours of other classes."""
    index = SCENE_CLASSES.index(name)
    differences = []
    for row, col in np.argwhere(labels == index):
        window = (slice(max(0, row - 3), row + 4), slice(max(0, col - 3), col + 4))
        other = image[window][labels[window] != index]
        if len(other):
            differences.append(np.abs(image[row, col] - np.median(other, axis=0)).max())
    return differences


def test_names_and_colours():
    assert len(SCENE_CLASSES) == len(set(SCENE_CLASSES)) == 8
    assert set(SCENE_CLASSES) == set(SHARES)
    assert all(len(colour) == 3 and all(0 <= value <= 255 for value in colour) for colour in SCENE_PALETTE)
    differences = [np.abs(np.subtract(a, b)).sum() for a, b in itertools.combinations(SCENE_PALETTE, 2)]
    assert len(SCENE_PALETTE) == 8
    assert min(differences) > 90


def test_bytes_depend_on_the_seed_and_not_on_numpys_global_state():
    np.random.seed(0)  # noqa: NPY002  tests that the global state has no effect
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw_scene([3, 14])
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    second = draw_scene((3, 14))
    assert digest(*first) == digest(*second)


def test_different_seeds_give_different_scenes():
    digests = {digest(*draw_scene(seed)) for seed in [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (2**40, 1)]}
    assert len(digests) == 6


def test_known_scene():
    """Detect unintended changes of the drawing, which would change the data set and all results on it."""
    image, labels = draw_scene((2024, 0))
    ids, counts = np.unique(labels, return_counts=True)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
        0: 11978,
        1: 1967,
        2: 7377,
        3: 93,
        4: 1900,
        5: 536,
        6: 211,
        7: 43,
        255: 471,
    }
    assert digest(image, labels) == "869e0aba3c5d1eb3b0f1feab0e3db262b1683947b673fa3b03281929e47c9602"


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (64, 200), (150, 50), (128, 192), (512, 1024)])
def test_sizes(height, width):
    for index in range(2 if height > 200 else 8):
        image, labels = draw_scene((5, index), height, width)
        assert image.shape == (height, width, 3)
        assert labels.shape == (height, width)
        assert image.dtype == labels.dtype == np.uint8
        assert image.flags.c_contiguous
        assert labels.flags.c_contiguous
        assert labels[(labels >= len(SCENE_CLASSES))].tolist() == [VOID] * int((labels == VOID).sum())
        assert image.std() > 10


def test_class_shares_at_a_larger_size():
    labels = np.stack([draw_scene((6, index), 256, 384)[1] for index in range(40)])
    share = np.bincount(labels.ravel(), minlength=256)[: len(SCENE_CLASSES)] / (labels != VOID).sum()
    assert share[SCENE_CLASSES.index("road")] > 0.45
    assert 0.0003 < share[SCENE_CLASSES.index("light")] < 0.003
    assert 0.002 < share[SCENE_CLASSES.index("pole")] < 0.01


def test_only_ids_of_classes_and_void(counts):
    used = set(np.flatnonzero(counts.sum(axis=0)).tolist())
    assert used == {*range(len(SCENE_CLASSES)), VOID}


def test_shares_of_the_classes(counts):
    total = counts.sum(axis=0)[: len(SCENE_CLASSES)]
    share = dict(zip(SCENE_CLASSES, (100 * total / total.sum()).tolist(), strict=True))
    outside = {name: share[name] for name, (low, high) in SHARES.items() if not low <= share[name] <= high}
    assert not outside
    ordered = [share[name] for name in SHARES]
    assert ordered == sorted(ordered, reverse=True)
    # Roughly geometric: no class is more than six times as frequent as the next
    assert all(common / rare < 6 for common, rare in itertools.pairwise(ordered))


def test_void_share(counts):
    assert 0.007 < counts[:, VOID].sum() / counts.sum() < 0.02


def test_each_class_is_in_a_third_of_the_scenes_and_rare_classes_not_in_all(counts):
    occurrence = (counts[:, : len(SCENE_CLASSES)] > 0).mean(axis=0)
    assert occurrence.min() > 1 / 3
    assert occurrence[[SCENE_CLASSES.index(name) for name in ("person", "pole", "light")]].max() < 1


@pytest.mark.parametrize(("name", "margin"), [("light", 25), ("pole", 15), ("person", 25)])
def test_rare_classes_are_visible_at_their_labels(scenes, name, margin):
    values = [value for image, labels in scenes[:40] for value in contrast(image.astype(float), labels, name)]
    assert len(values) > 300
    assert np.mean(values) > margin


def test_rare_classes_stand_out_more_than_noise(scenes):
    """Labels shifted to the side have less contrast, so the contrast is due to the objects."""
    aligned, shifted = [], []
    for image, labels in scenes[:40]:
        aligned += contrast(image.astype(float), labels, "pole")
        shifted += contrast(image.astype(float), np.roll(labels, 5, axis=1), "pole")
    assert np.mean(aligned) > 1.15 * np.mean(shifted)


def test_sky_is_smoother_than_buildings(scenes):
    rough = {"sky": [], "building": []}
    for image, labels in scenes[:40]:
        step = np.abs(np.diff(image.astype(float).mean(axis=2), axis=1))
        for name, values in rough.items():
            inside = labels == SCENE_CLASSES.index(name)
            values.append(step[inside[:, 1:] & inside[:, :-1]].mean())
    assert np.mean(rough["building"]) > 1.3 * np.mean(rough["sky"])


@pytest.mark.parametrize("seed", [(-1,), (0.5,)])
def test_invalid_seeds_are_refused(seed):
    with pytest.raises((ValueError, TypeError)):
        draw_scene(seed)
