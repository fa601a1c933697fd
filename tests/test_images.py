"""Images of any number of bands and any type: values against tifffile and NumPy, refusals, statistics, training, masks."""

import csv
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import tifffile
import torch
from conftest import write_png
from PIL import Image

from mcseg import pictures
from mcseg.callbacks.trackers import shown_bands
from mcseg.data import DataError, FolderData, SyntheticData
from mcseg.data.batches import collate
from mcseg.data.check import check
from mcseg.data.files import read_mask
from mcseg.data.images import ImageFormat, LargeImage, UsedValues
from mcseg.data.sources import Window, image_size, open_source
from mcseg.data.transforms import TrainingTransform
from mcseg.evaluation import Inference
from mcseg.module import SegmentationModule
from mcseg.run.main import main

ENCODER = "tu-test_resnet.r160_in1k"
GEOREFERENCE = {
    33550: (12, 3, (0.5, 0.5, 0.0)),
    33922: (12, 6, (0.0, 0.0, 0.0, 500000.0, 4000000.0, 0.0)),
    34735: (3, 8, (1, 1, 0, 1, 3072, 0, 1, 32633)),
    34737: (2, 7, "WGS 84|"),
}


def random_values(dtype, shape, high=200):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


@pytest.fixture
def tiles(tmp_path):
    """A folder of 10 GeoTIFF tiles of 4 bands of 12 bits in 16, with masks of three classes."""
    root, rng = tmp_path / "tiles", np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    tags = [(code, *tag, True) for code, tag in GEOREFERENCE.items()]
    for index in range(10):
        mask = np.zeros((40, 48), dtype=np.uint8)
        mask[20:] = 1
        mask[4:12, index : index + 10] = 2
        pixels = 1200 * mask[..., None].astype(int) + rng.integers(1, 900, (40, 48, 4))
        tifffile.imwrite(
            root / "images" / f"tile{index}.tif",
            pixels.astype(np.uint16),
            photometric="minisblack",
            planarconfig="contig",
            tile=(16, 32),
            compression="lzw",
            predictor=True,
            metadata=None,
            extratags=tags,
        )
        write_png(root / "masks" / f"tile{index}.png", mask)
    (root / "classes.txt").write_text("background\nground\nthing\n")
    return root


CASES = [
    case
    for case in itertools.product(
        ("u1", "u2", "f4"), (1, 4), ("contig", "separate"), (None, (16, 32)), (None, "zlib", "lzw", "packbits"), "<>"
    )
    if not (case[1] == 1 and case[2] == "separate")
]


def test_tiff_files_are_read_as_stored_whole_and_in_windows(tmp_path):
    """Each type, number of bands, order of the bands, tiles or strips, compression and byte order."""
    for dtype, bands, order, tile, compression, byteorder in CASES:
        values = random_values(dtype, (50, 71, bands))
        stored = {"contig": values, "separate": values.transpose(2, 0, 1)}[order]
        tifffile.imwrite(
            path := tmp_path / "image.tif",
            stored[..., 0] if bands == 1 else stored,
            photometric="minisblack",
            planarconfig=order if bands > 1 else None,
            tile=tile,
            compression=compression,
            predictor=compression in ("zlib", "lzw"),
            byteorder=byteorder,
            rowsperstrip=None if tile else 16,
            metadata=None,
        )
        with open_source(path, bands) as source:
            expected = values.transpose(2, 0, 1)
            assert source.header == (50, 71, bands, np.dtype(dtype), False)
            assert np.array_equal(source.values(None), expected)
            assert np.array_equal(source.values(Window(13, 40, 41, 70)), expected[:, 13:41, 40:70])
    assert len(CASES) == 144


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_png_files_of_16_bits_keep_all_bits(tmp_path, bands):
    imagecodecs = pytest.importorskip("imagecodecs")
    values = random_values(np.uint16, (20, 30, bands), 65536)
    (tmp_path / "i.png").write_bytes(imagecodecs.png_encode(values.squeeze()))
    image = ImageFormat(bands).read(tmp_path / "i.png")
    assert image.dtype == torch.float32
    assert np.array_equal((image.double() * 65535).round().numpy(), values.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("first", [True, False], ids=["bands first", "bands last"])
def test_arrays_with_bands_first_or_last(tmp_path, suffix, first):
    values = random_values(np.uint8, (20, 30, 5))
    stored = values.transpose(2, 0, 1) if first else values
    if suffix == ".npy":
        np.save(tmp_path / "i.npy", stored)
    else:
        tifffile.imwrite(tmp_path / "i.tif", stored)  # without more arguments, each page is a plane of the first axis
    assert torch.equal(ImageFormat(5).read(tmp_path / f"i{suffix}"), torch.from_numpy(values.transpose(2, 0, 1).copy()))


def test_orientation_of_a_tiff_file(tmp_path):
    values = random_values(np.uint16, (20, 30, 3))
    tifffile.imwrite(tmp_path / "i.tif", values, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    expected = np.rot90(values, -1).transpose(2, 0, 1)
    assert image_size(tmp_path / "i.tif") == (30, 20)
    image = ImageFormat(value_range=(0, 255)).read(tmp_path / "i.tif")
    assert np.array_equal((255 * image).round().numpy(), expected)


def test_copies_in_a_cloud_optimised_file_are_not_read(tmp_path):
    values = random_values(np.uint8, (64, 64, 3))
    with tifffile.TiffWriter(tmp_path / "i.tif") as writer:
        writer.write(values, photometric="rgb", tile=(16, 16), metadata=None)
        writer.write(values[::2, ::2], photometric="rgb", tile=(16, 16), subfiletype=1, metadata=None)
    assert np.array_equal(ImageFormat().read(tmp_path / "i.tif").permute(1, 2, 0), values)


@pytest.mark.parametrize(
    ("dtype", "value_range", "stored", "expected"),
    [
        (np.uint8, None, [0, 51, 255], [0, 51, 255]),
        (np.uint8, (0, 51), [0, 51, 25.5], [0, 1, 25 / 51]),
        (np.uint16, None, [0, 13107, 65535], [0, 0.2, 1]),
        (np.uint16, (0, 4095), [0, 819, 4095], [0, 0.2, 1]),
        (np.int16, (-100, 100), [-300, -100, 50], [0, 0, 0.75]),
        (np.float32, None, [0.25, 1.5, -0.5], [0.25, 1, 0]),
        (np.float32, (0, 10000), [2500, np.nan, 12000], [0.25, 0, 1]),
    ],
)
def test_values_and_their_range(tmp_path, dtype, value_range, stored, expected):
    np.save(tmp_path / "i.npy", np.array([stored]).astype(dtype))
    image = ImageFormat(1, value_range).read(tmp_path / "i.npy")
    assert image.dtype == (torch.uint8 if dtype == np.uint8 and value_range is None else torch.float32)
    assert image.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_dark_images_of_a_wide_range_are_read(tmp_path):
    for name, values in {"zero": np.zeros((4, 5)), "dark": np.linspace(0, 2, 20).reshape(4, 5)}.items():
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
        image = ImageFormat(1, (0, 4095)).read(tmp_path / f"{name}.npy")
        assert image[0].numpy() == pytest.approx(values / 4095, abs=1e-7)


def test_pixels_without_data_become_0(tmp_path):
    values = random_values(np.uint16, (20, 30)) + 1
    values[3, 4] = 65535
    tifffile.imwrite(tmp_path / "i.tif", values, extratags=[(42113, 2, 0, "65535", True)])
    image = ImageFormat(1, (0, 1000)).read(tmp_path / "i.tif")
    assert image[0, 3, 4] == 0
    assert image[0, 5, 6] == pytest.approx(values[5, 6] / 1000)


REFUSED = {
    "more bands": (np.uint8, (8, 9, 5), 3, None, "has 5 bands, expected 3 (data.bands) in every image; set data.bands to 5"),
    "fewer bands": (
        np.uint8,
        (8, 9, 3),
        4,
        None,
        "has 3 bands, expected 4 (data.bands) in every image; set data.bands to 3",
    ),
    "colours for grey": (np.uint8, (8, 9, 3), 1, None, "has 3 bands, expected 1 (data.bands)"),
    "integers of any range": (np.int16, (8, 9, 3), 3, None, "an image of 16-bit signed integers, which may have any range"),
    "numbers far above 1": (np.float32, (8, 9, 3), 3, None, "which do not fit the range 0 to 1 (data.value_range)"),
    "numbers far above the range": (
        np.uint16,
        (8, 9, 3),
        3,
        (0, 10),
        "which do not fit the range 0 to 10 (data.value_range)",
    ),
    "numbers of 0 to 1 in a wide range": (
        np.float32,
        (8, 9, 4),
        4,
        (0, 4095),
        "which do not fit the range 0 to 4095 (data.value_range); set it to the smallest and largest value of all images",
    ),
    "8 bits for 12": (
        np.uint8,
        (8, 9, 3),
        3,
        (0, 4095),
        "whose largest value is 255, but data.value_range is [0, 4095], so it would be too dark; convert it to the type of the "
        "other images, or set data.value_range to [0, 255]",
    ),
    "text": (np.str_, (8, 9, 3), 3, None, "an array of <U"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_images_of_another_kind_are_refused_by_name(tmp_path, kind):
    dtype, shape, bands, value_range, expected = REFUSED[kind]
    values = random_values(np.uint8, shape).astype(dtype)
    np.save(tmp_path / "i.npy", values / np.float32(255) if "of 0 to 1" in kind else values)
    with pytest.raises(DataError, match=re.escape(expected)) as error:
        ImageFormat(bands, value_range).read(tmp_path / "i.npy")
    assert str(error.value).startswith(f"{tmp_path}/i.npy: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_left_out_only_where_it_is_opaque(tmp_path, dtype):
    values = random_values(dtype, (20, 30, 4))
    values[..., 3] = opaque = np.iinfo(dtype).max
    tifffile.imwrite(tmp_path / "i.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    assert len(ImageFormat(3).read(tmp_path / "i.tif")) == 3
    assert len(ImageFormat(4).read(tmp_path / "i.tif")) == 4
    values[7, 8, 3] -= 1
    tifffile.imwrite(tmp_path / "i.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(
        DataError, match=rf"has transparent pixels \(alpha from {opaque - 1} to {opaque}, {opaque} is opaque"
    ):
        ImageFormat(3).read(tmp_path / "i.tif")
    assert ImageFormat(4).read(tmp_path / "i.tif")[3, 7, 8] < opaque


def test_a_range_far_below_that_of_the_type():
    used = UsedValues(ImageFormat())
    used.add("a", np.dtype(np.uint16), 1023)
    used.add("b", np.dtype(np.uint16), 4011)
    used.add("c", np.dtype(np.uint8), 250)
    used.add("d", np.dtype(np.float32), None)
    assert used.problems() == [
        "b: 4011 is the largest value in 2 images of 16 bits, which would be nearly black; set data.value_range to [0, 4095], "
        "or to [0, 65535] to read them as they are"
    ]
    used.add("e", np.dtype(np.uint16), 50000)
    assert used.problems() == []


def folder(root, **options):
    return FolderData(root, num_workers=0, batch_size=2, crop_size=(24, 24), **options)


def test_check_and_fit_refuse_bands_and_ranges(tiles):
    for options, expected in (
        ({}, "has 4 bands, expected 3 (data.bands) in every image; set data.bands to 4, or convert the images"),
        ({"bands": 4}, "is the largest value in 10 images of 16 bits, which would be nearly black; set data.value_range to [0, 4095]"),
    ):  # fmt: skip
        assert len(
            matching := [line for line in check(folder(tiles, **options), progress=False).problems if expected in line]
        )
        assert "\n" not in matching[0]
        with pytest.raises(DataError, match=re.escape(expected).replace("10", r"\d", 1)):
            folder(tiles, **options).setup("fit")
    data = folder(tiles, bands=4, value_range=(0, 4095))
    assert check(data, progress=False).problems == []
    data.setup("fit")


def test_files_of_different_bands_are_one_line(tiles):
    for path in sorted((tiles / "images").iterdir())[:3]:
        tifffile.imwrite(path, tifffile.imread(path)[..., :3], photometric="rgb")
    problems = check(folder(tiles, bands=4, value_range=(0, 4095), val_fraction=0.1), progress=False).problems
    assert len([line for line in problems if "has 3 bands, expected 4" in line]) in (1, 2)  # one for each split


def test_statistics_of_the_bands(tiles):
    data = folder(tiles, bands=4, value_range=(0, 4095))
    pixels = np.concatenate([tifffile.imread(sample.image).reshape(-1, 4) / 4095 for sample in data.samples("train")])
    mean, std = data.band_statistics()
    assert mean.tolist() == pytest.approx(pixels.mean(0), rel=1e-5)
    assert std.tolist() == pytest.approx(pixels.std(0), rel=1e-4)


def test_statistics_of_8_bit_images(photo_folder):
    data = folder(photo_folder)
    pixels = np.concatenate([np.array(Image.open(sample.image)).reshape(-1, 3) / 255 for sample in data.samples("train")])
    assert data.band_statistics()[0].tolist() == pytest.approx(pixels.mean(0))
    assert folder(photo_folder).band_statistics()[1].tolist() == pytest.approx(pixels.std(0))  # from the cache


def test_jitter_of_other_than_three_bands_is_brightness_and_contrast_of_each(tmp_path):
    image = torch.rand(5, 16, 16) * 0.2 + 0.3
    transform = TrainingTransform((16, 16), color_jitter=0.2)
    params = transform.draw(torch.zeros(16, 16, dtype=torch.uint8))
    brightness, contrast, _ = params["factors"].tolist()
    mean = image.mean((1, 2), keepdim=True)
    expected = brightness * (contrast * image + (1 - contrast) * mean)
    assert torch.allclose(transform.finish_image(image, params), expected.clamp(0, 1), atol=1e-5)


def test_jitter_of_floating_point_equals_that_of_8_bits():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    transform = TrainingTransform((16, 16), color_jitter=0.5)
    params = transform.draw(torch.zeros(16, 16, dtype=torch.uint8))
    changed = transform.finish_image(image, params).float()
    assert ((255 * transform.finish_image(image / 255, params)) - changed).abs().max() <= 0.51


def test_files_of_8_and_16_bits_make_one_batch():
    items = [{"image": torch.full((3, 2, 2), 51, dtype=torch.uint8)}, {"image": torch.full((3, 2, 2), 0.5)}]
    batch = collate([item | {"name": "n", "mask": torch.zeros(2, 2, dtype=torch.uint8)} for item in items])
    assert batch["image"][:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.5])


def test_the_drawn_scenes_have_three_bands():
    with pytest.raises(DataError, match=r"data\.bands: found 4, but the drawn scenes are RGB"):
        SyntheticData(bands=4)


def test_the_network_takes_the_bands():
    module = SegmentationModule("unet", ENCODER, num_classes=3, in_channels=6)
    assert module.network.model.encoder(torch.rand(1, 6, 64, 64))[0].shape[1] == 6
    assert module(torch.rand(1, 6, 40, 50)).shape == (1, 3, 40, 50)
    with pytest.raises(ValueError, match=r"network_options: found in_channels, which is given by the bands of the data"):
        SegmentationModule("unet", ENCODER, num_classes=3, network_options={"in_channels": 4})


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_trainer_refuses_data_of_other_bands(tiles, verb):
    """Without the command, nothing links the bands of data and network."""
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    data = folder(tiles, bands=4, value_range=(0, 4095))
    module = SegmentationModule("unet", ENCODER, num_classes=data.num_classes)
    expected = "images of 4 bands (data.bands), the network takes 3; give SegmentationModule in_channels=4, or the data"
    with pytest.raises(ValueError, match=re.escape(expected)):
        getattr(trainer, verb)(module, data)


def test_a_large_image_is_read_in_windows(tiles, monkeypatch):
    """The labels of an image that is read in windows are those of the same image in memory."""
    monkeypatch.setattr("mcseg.data.batches._WINDOWED_PIXELS", 1000)
    options = {"bands": 4, "value_range": (0, 4095), "predict_root": tiles / "images/tile3.tif"}
    data = folder(tiles, **options)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert isinstance(batch["image"], LargeImage)
    assert batch["size"] == [(40, 48)]
    pixels = torch.from_numpy(tifffile.imread(tiles / "images/tile3.tif") / np.float32(4095)).permute(2, 0, 1)[None]
    assert torch.allclose(batch["image"][:, :, 5:33, 7:40], pixels[:, :, 5:33, 7:40])
    assert torch.allclose(batch["image"].reduced(3), pixels[0, :, ::3, ::3])
    network = torch.nn.Conv2d(4, 5, 3, padding=1)
    for settings in ({"window": (16, 24)}, {"window": (16, 24), "scales": (1.0, 0.5), "flip": True}, {}):
        labels = [Inference(**settings)(network, image, (40, 48)) for image in (batch["image"], pixels)]
        assert (labels[0] != labels[1]).float().mean() < 1e-3
        assert len(labels[0].unique()) > 1
    assert not isinstance(next(iter(folder(tiles, **options, max_side=20).predict_dataloader()))["image"], LargeImage)


def test_images_of_many_pixels_need_a_setting(tmp_path):
    write_png(tmp_path / "i.png", np.zeros((30, 40), np.uint8))
    expected = (
        r"i\.png: has 1,200 pixels \(40x30\), expected at most 1,000 \(data.max_pixels\).*; .* set data.max_pixels to 1200"
    )
    with pytest.raises(DataError, match=expected):
        ImageFormat(max_pixels=1000).read(tmp_path / "i.png")
    with pytest.raises(DataError, match=expected):
        read_mask(tmp_path / "i.png", max_pixels=1000)
    assert ImageFormat(max_pixels=1200).read(tmp_path / "i.png").shape == (3, 30, 40)


def test_pictures_show_the_chosen_bands_stretched(tiles):
    data = folder(tiles, bands=4, value_range=(0, 4095), show_bands=[4, 2, 1])
    image = data.reader.image(data.samples("train")[0])
    picture = np.asarray(pictures.image_picture(shown_bands(SimpleNamespace(datamodule=data), image)))
    for channel, band in enumerate([3, 1, 0]):
        low, high = np.percentile(image[band], (2, 98))
        expected = np.clip((image[band].numpy() - low) / (high - low) * 255, 0, 255)
        assert np.abs(picture[..., channel] - expected).max() <= 1
    assert len(shown_bands(SimpleNamespace(datamodule=None), image[:2])) == 1
    with pytest.raises(DataError, match=r"data\.show_bands: found \[5\], expected one or three numbers from 1 to 4"):
        folder(tiles, bands=4, show_bands=[5])


def run(verb, root, *settings):
    tiny = ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    tiny += ["--trainer.enable_progress_bar", "false"]
    main([verb, "folder", "--data.root", str(root), *tiny, *settings])


@pytest.mark.slow
def test_a_folder_of_four_bands_trains_and_predicts(tiles, capsys, monkeypatch):
    """The checkpoint has the statistics; prediction takes bands and range from it, and keeps the georeference."""
    bands = ["--data.bands", "4"]
    run(
        *(
            "fit",
            tiles,
            *bands,
            "--data.value_range",
            "[0,4095]",
            "--data.show_bands",
            "[4,1,2]",
            "--model.encoder",
            ENCODER,
            "--model.encoder_weights",
            "null",
        ),
        *("--data.crop_size", "[32,32]", "--data.batch_size", "4", "--trainer.max_epochs", "1"),
        *("--trainer.default_root_dir", "run", "--trainer.enable_model_summary", "false"),
    )
    with open("run/metrics.csv") as file:
        assert any(row["val/miou"] for row in csv.DictReader(file))
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    data = folder(tiles, bands=4, value_range=(0, 4095))
    pixels = np.concatenate([tifffile.imread(sample.image).reshape(-1, 4) / 4095 for sample in data.samples("train")])
    assert checkpoint["state_dict"]["network.mean"].flatten().tolist() == pytest.approx(pixels.mean(0), rel=1e-4)
    assert checkpoint["hyper_parameters"]["in_channels"] == 4

    weights = ["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.default_root_dir", "out"]
    seen, setup = [], FolderData.setup

    def watched(data, stage):
        seen.append((data.images.bands, data.show_bands))
        setup(data, stage)

    monkeypatch.setattr(FolderData, "setup", watched)
    run("predict", tiles, *weights, "--data.predict_root", str(tiles / "images"))
    assert checkpoint["prediction_settings"]["show_bands"] == [4, 1, 2]
    assert seen == [(4, (4, 1, 2))]
    module = SegmentationModule.load_from_checkpoint("run/checkpoints/last.ckpt", map_location="cpu").eval()
    image = torch.from_numpy(tifffile.imread(tiles / "images/tile3.tif") / np.float32(4095)).permute(2, 0, 1)
    with torch.inference_mode():
        expected = module(image[None]).argmax(1)[0]
    with tifffile.TiffFile("out/masks/tile3.tif") as file:
        assert np.array_equal(file.asarray(), expected)
        for code, tag in GEOREFERENCE.items():
            assert file.pages[0].tags[code].value == tag[2]
    assert np.array_equal(read_mask(Path("out/masks/tile3.tif")), expected)  # readers of masks see the same ids
    assert image_size(Path("out/overlays/tile3.jpg")) == (40, 48)

    with pytest.raises(SystemExit):
        run("predict", tiles, "--data.bands", "2", *weights, "--data.predict_root", str(tiles / "images"))
    expected = "takes images of 4 bands, the data have 2 (data.bands); set data.bands to 4"
    assert expected in capsys.readouterr().err
