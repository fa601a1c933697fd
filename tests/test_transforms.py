"""Transforms: image and mask stay aligned, padding is void, the limit on one class holds."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from mcseg.data.sources import Window
from mcseg.data.transforms import TrainingTransform, resize_image, shrinking


def paired(height, width):
    """Make an image whose red and green channels hold row and column, and a mask that holds (row + column) % 250."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    return tv_tensors.Image(image), tv_tensors.Mask(((rows + columns) % 250).to(torch.uint8))


def test_crop_cuts_the_same_window_from_image_and_mask():
    crop = TrainingTransform((12, 20), (1.0, 1.0), max_class_share=1.0)
    corners = set()
    for _ in range(20):
        image, mask = crop(*paired(40, 60))
        rows, columns = image[0].int(), image[1].int()
        assert torch.equal(mask.int(), (rows + columns) % 250)
        assert torch.equal(rows - rows[0, 0], torch.arange(12).view(-1, 1).expand(12, 20).int())
        assert torch.equal(columns - columns[0, 0], torch.arange(20).expand(12, 20).int())
        corners.add((int(rows[0, 0]), int(columns[0, 0])))
    assert len(corners) > 10


def test_scale_enlarges_and_shrinks_the_window():
    for scale in (0.5, 2.0):
        image, mask = TrainingTransform((16, 16), (scale, scale), max_class_share=1.0)(*paired(64, 64))
        steps = (image[0, 1:, 8].float() - image[0, :-1, 8].float())[2:-2].mean()
        assert float(steps) == pytest.approx(1 / scale, abs=0.1)
        assert mask.shape == (16, 16)


def test_window_larger_than_the_image_is_padded_with_void():
    image, mask = TrainingTransform((30, 30), (1.0, 1.0), max_class_share=1.0)(*paired(10, 20))
    assert int((mask != 255).sum()) == 200
    assert int(image[:, mask == 255].max()) == 0
    inside = mask != 255
    assert torch.equal(mask[inside].int(), image[0][inside].int() + image[1][inside].int())


def test_max_class_share_prefers_mixed_windows():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 40:] = 1
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))

    def dominated(max_class_share):
        """Share of crops in which one class has more than 75 % of the pixels."""
        crop = TrainingTransform((16, 16), (1.0, 1.0), max_class_share)
        shares = [float(torch.bincount(crop(image, tv_tensors.Mask(mask))[1].flatten()).max()) / 256 for _ in range(200)]
        return sum(share > 0.75 for share in shares) / len(shares)

    assert dominated(1.0) > 0.6  # most windows are on one side of the border
    assert dominated(0.75) < 0.2  # ten draws nearly always include a mixed window


def test_window_without_labels_is_drawn_again():
    mask = torch.full((64, 64), 255, dtype=torch.uint8)
    mask[:32, ::2], mask[:32, 1::2] = 0, 1
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
    crop = TrainingTransform((8, 8), (1.0, 1.0), 0.99)
    crops = [crop(image, tv_tensors.Mask(mask))[1] for _ in range(100)]
    assert all((m != 255).any() for m in crops)


def test_flip_applies_to_image_and_mask():
    transform = TrainingTransform((10, 10), flip=True)
    directions = set()
    for _ in range(20):
        image, mask = transform(*paired(10, 10))
        assert torch.equal(mask.int(), image[0].int() + image[1].int())
        directions.add(int(image[1, 0, 0]))
    assert directions == {0, 9}


def test_color_jitter_does_not_change_the_mask():
    transform = TrainingTransform((20, 20), color_jitter=0.5)
    image, mask = paired(20, 20)
    results = [transform(image, mask) for _ in range(5)]
    assert all(torch.equal(result[1], mask) for result in results)
    assert not all(torch.equal(result[0], image) for result in results)


def colored(image, factors):
    params = {
        "window": Window(0, 0, *image.shape[1:]),
        "padding": (0, 0, 0, 0),
        "flip": False,
        "factors": torch.tensor(factors),
    }
    return TrainingTransform(tuple(image.shape[1:])).finish_image(image, params)


def test_color_scale_equals_torchvisions_three_adjustments():
    image = torch.randint(90, 140, (3, 24, 30), dtype=torch.uint8)  # no intermediate value is clipped
    for factors in ([1.3, 1.0, 1.0], [1.0, 0.6, 1.0], [1.0, 1.0, 0.2], [0.8, 1.2, 1.3]):
        brightness, contrast, saturation = factors
        expected = functional.adjust_brightness(image.float() / 255, brightness)
        expected = functional.adjust_saturation(functional.adjust_contrast(expected, contrast), saturation)
        changed = colored(image, factors)
        assert (changed.float() - 255 * expected).abs().max() < 0.6  # rounding changes up to half a grey level


def test_color_scale_clips():
    bright = colored(torch.full((3, 2, 2), 250, dtype=torch.uint8), [1.5, 1.0, 1.0])
    assert bright.unique().tolist() == [255]


def test_resize_image():
    image = torch.randint(0, 256, (3, 9, 15), dtype=torch.uint8)
    assert resize_image(image, 1.0) is image
    assert resize_image(image, 2.0).shape == (3, 18, 30)


def test_max_side_shrinks_larger_images_only():
    assert shrinking((30, 40), None) == 1
    assert shrinking((30, 40), 40) == 1
    assert shrinking((80, 40), 40) == 0.5
    # At half the size, the window covers twice as many rows and columns of the file.
    image, _ = TrainingTransform((16, 16), (1.0, 1.0), max_side=64)(*paired(64, 128))
    assert float((image[0, 1:, 8].float() - image[0, :-1, 8].float())[2:-2].mean()) == pytest.approx(2, abs=0.1)
    image, _ = TrainingTransform((16, 16), (1.0, 1.0), max_side=128)(*paired(64, 128))
    assert float((image[0, 1:, 8].float() - image[0, :-1, 8].float()).mean()) == 1


def test_padding_of_a_resized_window():
    """Half of a 40x40 window over a 20x30 image: 10x15 pixels of the image, the rest padding, in image and mask."""
    first_rows = set()
    for _ in range(10):
        image = torch.full((3, 20, 30), 9, dtype=torch.uint8)
        mask = torch.full((20, 30), 4, dtype=torch.uint8)
        crop = TrainingTransform((20, 20), (0.5, 0.5), flip=True)
        image, mask = crop(tv_tensors.Image(image), tv_tensors.Mask(mask))
        rows, columns = (mask == 4).any(1), (mask == 4).any(0)
        assert (int(rows.sum()), int(columns.sum())) == (10, 15)
        assert int((mask == 255).sum()) == 400 - 150
        assert torch.equal(image[0] == 9, mask == 4)
        assert torch.equal(image[0] == 0, mask == 255)
        first_rows.add(int(rows.int().argmax()))
    assert len(first_rows) > 3


def test_crops_around_rare_classes():
    mask = torch.zeros(80, 120, dtype=torch.uint8)
    mask[40:48, 60:68] = 1  # 64 of 9600 pixels
    mask[:8] = 255
    image = tv_tensors.Image(torch.zeros(3, 80, 120, dtype=torch.uint8))

    def share_with_rare_class(share, weights):
        crop = TrainingTransform((16, 16), rare_crop_share=share, class_weights=torch.tensor(weights))
        return sum(bool((crop(image, tv_tensors.Mask(mask))[1] == 1).any()) for _ in range(200)) / 200

    assert share_with_rare_class(1.0, [0.0, 1.0]) == 1
    assert share_with_rare_class(0.0, [0.0, 1.0]) < 0.25
    assert 0.4 < share_with_rare_class(0.5, [0.0, 1.0]) < 0.75
    assert share_with_rare_class(1.0, [1.0, 0.0]) < 0.25  # centred on the frequent class
    # Windows stay inside the image for a class in the corner, and are drawn uniformly if nothing is labelled.
    mask[:] = 255
    mask[79, 119] = mask[76, 116] = 1
    crop = TrainingTransform((16, 16), rare_crop_share=1.0, class_weights=torch.tensor([1.0, 1.0]))
    assert int((crop(image, tv_tensors.Mask(mask))[1] == 1).sum()) == 2
    mask[:] = 255
    assert (crop(image, tv_tensors.Mask(mask))[1] == 255).all()
