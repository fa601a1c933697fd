"""SegmentationData, FolderData and SyntheticData: pixels by hand, order, seeds, counts and their cache; label tables and class lists."""

import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SHARED, break_three, write_png

from mcseg.data import BDD100KData, CamVidData, DataError, FolderData, SyntheticData
from mcseg.data.check import check
from mcseg.data.classlist import table_from_file, table_from_names, table_from_toml
from mcseg.data.labels import LabelTable, pack_color
from mcseg.data.statistics import default_cache_dir
from mcseg.losses import CrossEntropyLoss
from mcseg.module import SegmentationModule
from mcseg.palette import distinct_colors

# The hand-written rows of the CamVid fake: 0..10 are classes, 11 is void.
ROW = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]


def names(data, split):
    return [sample.name for sample in data.samples(split)]


# --- CamVid ------------------------------------------------------------------------------------------------------------


def test_camvid_splits_and_ids(camvid_root):
    data = CamVidData(camvid_root, num_workers=0)
    assert names(data, "train") == ["0001TP_006690", "0006R0_f00930", "0016E5_08430"]
    assert names(data, "val") == ["0016E5_07959", "0016E5_07961"]
    assert names(data, "test") == []
    assert data.num_classes == 11
    assert data.class_names[2] == "pole"
    assert data.palette[4] == (60, 40, 222)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["mask"].dtype == torch.int64
    assert batch["mask"].tolist() == [[ROW] * 9]
    assert batch["name"] == ["0016E5_07959"]


def test_loaders_need_no_setup(camvid_root):
    data = CamVidData(camvid_root, num_workers=0, batch_size=1, crop_size=(9, 12))
    assert len(next(iter(data.train_dataloader()))["name"]) == 1
    assert next(iter(data.val_dataloader()))["name"] == ["0016E5_07959"]


def test_camvid_images_keep_their_pixels_in_evaluation(camvid_root):
    from PIL import Image

    data = CamVidData(camvid_root, num_workers=0, eval_batch_size=2)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    expected = np.asarray(Image.open(camvid_root / "val" / "0016E5_07961.png"))
    assert batch["image"][1].permute(1, 2, 0).numpy().tolist() == expected.tolist()


def test_camvid_reads_jpeg_images(camvid_root):
    from PIL import Image

    for path in camvid_root.glob("*/*.png"):
        if "annot" not in path.parent.name:
            Image.open(path).save(path.with_suffix(".jpg"))
            path.unlink()
    assert names(CamVidData(camvid_root), "val") == ["0016E5_07959", "0016E5_07961"]


def test_a_missing_test_split_is_replaced_by_the_validation_split_with_a_warning(camvid_root):
    data = CamVidData(camvid_root, num_workers=0)
    with pytest.warns(UserWarning, match="no test split found, using the validation split"):
        data.setup("test")
    assert [batch["name"][0] for batch in data.test_dataloader()] == ["0016E5_07959", "0016E5_07961"]


def test_error_of_a_missing_root_names_the_expected_files(tmp_path):
    with pytest.raises(DataError, match=r"data\.root is not set: expected CamVid/train"):
        CamVidData().setup("fit")
    with pytest.raises(
        DataError, match=r"nowhere: no such folder; expected CamVid/train/<id>\.png and .*mcseg download camvid"
    ):
        CamVidData(tmp_path / "nowhere").setup("fit")


@pytest.mark.skipif(not (SHARED / "data" / "camvid").is_dir(), reason="needs the real images of CamVid")
def test_real_camvid_counts():
    root = SHARED / "data" / "camvid"
    data = CamVidData(root)
    assert len(data.samples("train")) == 367
    assert len(data.samples("val")) == 101
    pixels = data.class_pixels()
    # Independent count: histogram of the raw values over all masks
    from PIL import Image

    histogram = np.sum([Image.open(path).histogram()[:12] for path in (root / "trainannot").glob("*.png")], axis=0)
    assert pixels.tolist() == histogram[:11].tolist()
    assert int(pixels.sum()) + int(histogram[11]) == 367 * 360 * 480


# --- a user's folder ---------------------------------------------------------------------------------------------------


def test_folder_fraction_is_a_partition_that_depends_on_the_seed(photo_folder):
    data = FolderData(photo_folder, val_fraction=0.3, test_fraction=0.2)
    parts = [names(data, split) for split in ("train", "val", "test")]
    # An independent draw: the first 8 bytes of the hash as a share of their largest value
    numbers = {f"photo {i}": int(sha256(f"0:photo {i}".encode()).hexdigest()[:16], 16) / 16**16 for i in range(10)}
    assert parts[1] == [name for name, number in numbers.items() if number < 0.3]
    assert parts[2] == [name for name, number in numbers.items() if 0.3 <= number < 0.5]
    assert sorted(parts[0] + parts[1] + parts[2]) == [f"photo {i}" for i in range(10)]
    assert [
        names(FolderData(photo_folder, val_fraction=0.3, test_fraction=0.2), s) for s in ("train", "val", "test")
    ] == parts
    assert names(FolderData(photo_folder, val_fraction=0.3, split_seed=1), "val") != parts[1]


def test_folder_pairs_by_name_and_reads_ids(photo_folder):
    data = FolderData(photo_folder, num_workers=0)
    sample = next(s for s in data.samples("train") if s.name == "photo 3")
    mask = data.reader.mask(sample)
    assert mask[0, 0] == 255
    assert mask[4, 2:7].tolist() == [0, 2, 2, 2, 0]
    assert mask[12, 0] == 1


def test_folder_split_by_list(photo_folder):
    (photo_folder / "train.txt").write_text("photo 1\nphoto 2.jpg\n\nimages/photo 7.jpg\n")
    (photo_folder / "val.txt").write_text("photo 4\n")
    data = FolderData(photo_folder)
    assert names(data, "train") == ["photo 1", "photo 2", "photo 7"]
    assert names(data, "val") == ["photo 4"]
    assert names(data, "test") == []
    (photo_folder / "val.txt").write_text("photo 44\n")
    with pytest.raises(DataError, match=r"val\.txt: lists photo 44 \(1 such name\)"):
        FolderData(photo_folder).samples("val")


@pytest.mark.parametrize("layout", ["images/{split}", "{split}/images"])
def test_folder_split_by_folder(photo_folder, layout):
    for split, indices in {"train": range(6), "val": range(6, 9), "test": range(9, 10)}.items():
        target = photo_folder / layout.format(split=split)
        for kind in ("images", "masks"):
            folder = photo_folder / layout.format(split=split).replace("images", kind)
            folder.mkdir(parents=True, exist_ok=True)
            for index in indices:
                for path in (photo_folder / kind).glob(f"photo {index}.*"):
                    path.rename(folder / path.name)
        assert target.is_dir()
    data = FolderData(photo_folder, num_workers=0)
    assert names(data, "train") == [f"photo {i}" for i in range(6)]
    assert names(data, "test") == ["photo 9"]
    data.setup("fit")


def test_folder_with_coloured_masks(tmp_path):
    root = tmp_path / "c"
    colours = {"wall": (10, 20, 30), "door": (200, 0, 0)}
    (root / "images").mkdir(parents=True)
    for index in range(4):
        write_png(root / "images" / f"{index}.png", np.zeros((4, 5, 3), dtype=np.uint8))
        mask = np.zeros((4, 5, 3), dtype=np.uint8)
        mask[:] = colours["wall"]
        mask[1:3, 2] = colours["door"]
        write_png(root / "masks" / f"{index}_mask.png", mask)
    (root / "classes.txt").write_text("wall 10 20 30\ndoor 200 0 0\n")
    data = FolderData(root, mask_suffix="_mask", num_workers=0)
    ids = data.reader.mask(data.samples("train")[0])
    assert ids.tolist() == [[0] * 5, [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0] * 5]
    assert data.palette[1] == (200, 0, 0)
    assert data.class_pixels().tolist() == [3 * 18, 3 * 2]


def test_folder_classes_from_a_list(photo_folder):
    (photo_folder / "classes.txt").unlink()
    assert FolderData(photo_folder, classes=["a", "b", "c"]).class_names == ("a", "b", "c")
    with pytest.raises(DataError, match=r"no class list: looked for .*classes\.toml and .*classes\.txt"):
        FolderData(photo_folder)


def test_check_lists_every_problem(photo_folder):
    assert check(FolderData(photo_folder, num_workers=0), progress=False).problems == []
    break_three(photo_folder)
    (photo_folder / "masks" / "photo 0.png").unlink()
    problems = check(FolderData(photo_folder, num_workers=2), progress=False).problems
    assert len(problems) == 4
    text = "\n".join(sorted(problems))
    for expected in (
        "photo 0.jpg: has no mask",
        "photo 2.jpg: cannot be read",
        "photo 5.png: 1 pixels of the mask have the unknown values 7",
        "photo 8.png: the mask is 32x12 pixels",
    ):
        assert expected in text


def test_check_lists_all_problems_of_one_pair(photo_folder):
    write_png(photo_folder / "masks" / "photo 3.png", np.full((12, 32), 9, dtype=np.uint8))
    photo = photo_folder / "images" / "photo 3.jpg"
    photo.write_bytes(photo.read_bytes()[:-200])  # the header stays intact
    problems = check(FolderData(photo_folder, num_workers=0), progress=False).problems
    assert len(problems) == 3
    for problem, expected in zip(problems, ("cannot be read", "unknown values 9", "32x12 pixels"), strict=True):
        assert expected in problem


def test_check_lists_empty_classes_and_splits(photo_folder):
    (photo_folder / "classes.txt").write_text("background\nground\nthing\nunicorn\n")
    (photo_folder / "train.txt").write_text("photo 1\n")
    problems = check(FolderData(photo_folder, num_workers=0), progress=False).problems
    assert problems == [
        f"the val split is empty; expected names of images in {photo_folder}/val.txt",
        "class unicorn (train id 3) has no pixel in the training labels",
    ]


def test_check_groups_equal_problems(photo_folder):
    """Eight masks with unknown values, a ninth that is missing, a tenth of another size; no class can have a pixel."""
    for index in range(8):
        write_png(photo_folder / "masks" / f"photo {index}.png", np.full((24, 32), 7 + index, dtype=np.uint8))
    (photo_folder / "masks" / "photo 8.png").unlink()
    write_png(photo_folder / "masks" / "photo 9.png", np.zeros((12, 32), dtype=np.uint8))
    (photo_folder / "train.txt").write_text("".join(f"photo {index}\n" for index in range(10)))
    (photo_folder / "val.txt").write_text("photo 1\n")
    values, missing, size, *others = check(FolderData(photo_folder, num_workers=0), progress=False).problems
    assert "photo 0.png: 768 pixels of the mask have the unknown values 7;" in values
    assert values.endswith("; 8 files have this problem: photo 0.png, photo 1.png, photo 2.png, ...")
    assert "photo 8.jpg: has no mask" in missing
    assert "photo 9.png: the mask is 32x12" in size
    assert not [problem for problem in (missing, size) if "files have" in problem]
    assert not [problem for problem in others if "no pixel" in problem]


def test_check_warns_of_classes_absent_from_validation(photo_folder):
    write_png(photo_folder / "masks" / "photo 1.png", np.zeros((24, 32), dtype=np.uint8))
    (photo_folder / "train.txt").write_text("photo 0\nphoto 2\n")
    (photo_folder / "val.txt").write_text("photo 1\n")
    (photo_folder / "classes.txt").write_text("background\nground\nthing\nunicorn\n")
    report = check(FolderData(photo_folder, num_workers=0), progress=False)
    assert report.problems == ["class unicorn (train id 3) has no pixel in the training labels"]
    (warning,) = report.warnings
    assert warning.startswith("classes ground (train id 1) and thing (train id 2) have no pixel in the validation labels; ")


# --- batches -----------------------------------------------------------------------------------------------------------


def test_training_batches(camvid_root):
    data = CamVidData(camvid_root, num_workers=0, batch_size=2, crop_size=(6, 10), max_class_share=1.0)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 1  # the third image alone would be a smaller batch
    assert batches[0]["image"].shape == (2, 3, 6, 10)
    assert batches[0]["image"].dtype == torch.uint8
    assert set(batches[0]["mask"].unique().tolist()) <= {*range(11), 255}


def test_training_batches_depend_on_the_seed_with_and_without_workers(camvid_root):
    def batch(workers, seed):
        torch.manual_seed(seed)
        data = CamVidData(camvid_root, num_workers=workers, batch_size=2, crop_size=(6, 10))
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    for workers in (0, 1):
        first, again, other = batch(workers, 5), batch(workers, 5), batch(workers, 6)
        assert first["name"] == again["name"]
        assert torch.equal(first["image"], again["image"])
        assert torch.equal(first["mask"], again["mask"])
        assert not torch.equal(first["image"], other["image"])


def test_image_scale_resizes_the_image_but_not_the_mask(camvid_root):
    data = CamVidData(camvid_root, num_workers=0, image_scale=0.5)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 3, 4, 6)  # 9 * 0.5 rounds to 4
    assert batch["mask"].tolist() == [[ROW] * 9]


def test_images_of_different_sizes_in_one_batch_are_refused(photo_folder):
    for kind in ("images", "masks"):
        write_png(photo_folder / kind / "wide.png", np.zeros((10, 40, 3) if kind == "images" else (10, 40), dtype=np.uint8))
    (photo_folder / "train.txt").write_text("photo 1\n")
    (photo_folder / "val.txt").write_text("photo 2\nwide\n")
    data = FolderData(photo_folder, num_workers=0, eval_batch_size=2)
    data.setup("validate")
    with pytest.raises(DataError, match=r"40x10 and 32x24"):
        next(iter(data.val_dataloader()))


def test_prediction_batches_have_names_and_sizes_and_no_mask(photo_folder):
    (photo_folder / "images" / "sub").mkdir()
    write_png(photo_folder / "images" / "sub" / "x.png", np.zeros((8, 9, 3), dtype=np.uint8))
    write_png(photo_folder / "images" / "photo 1.png", np.zeros((8, 9, 3), dtype=np.uint8))
    data = CamVidData(predict_root=photo_folder / "images", num_workers=0)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    sizes = {batch["name"][0]: batch["size"][0] for batch in batches}
    assert len(sizes) == 12  # photo 1.jpg and photo 1.png keep their extensions
    assert sizes["photo 1_jpg"] == (24, 32)
    assert sizes["photo 1_png"] == (8, 9)
    assert sizes["sub/x"] == (8, 9)
    assert all("mask" not in batch for batch in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: found 0"),
        ({"crop_size": (0, 5)}, "data.crop_size: found 0"),
        ({"scale_range": (2.0, 0.5)}, r"data.scale_range: found \[2.0, 0.5\]"),
        ({"max_class_share": 0.0}, "data.max_class_share: found 0.0"),
        ({"color_jitter": 2.0}, "data.color_jitter: found 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        SyntheticData(**options)


# --- synthetic ---------------------------------------------------------------------------------------------------------


def test_synthetic_scenes_depend_on_seed_split_and_index():
    data = SyntheticData(train_scenes=3, val_scenes=2, test_scenes=1, size=(32, 48), num_workers=0)
    data.setup("fit")
    data.setup("test")
    scenes = [data.reader.image(s) for split in ("train", "val", "test") for s in data.samples(split)]
    assert len(scenes) == 6
    assert len({scene.numpy().tobytes() for scene in scenes}) == 6
    other = SyntheticData(train_scenes=3, size=(32, 48), seed=1).reader
    assert not torch.equal(other.image(data.samples("train")[0]), scenes[0])
    again = SyntheticData(train_scenes=3, size=(32, 48)).reader.pair(data.samples("train")[0])
    assert torch.equal(again[0], scenes[0])
    assert torch.equal(again[1], data.reader.mask(data.samples("train")[0]))


# --- counts ------------------------------------------------------------------------------------------------------------


def test_class_pixels(camvid_root):
    assert CamVidData(camvid_root, num_workers=0).class_pixels().tolist() == [3 * 9] * 11


@pytest.mark.parametrize("workers", [0, 2])
def test_class_pixels_are_cached_until_a_mask_changes(camvid_root, workers, monkeypatch):
    data = CamVidData(camvid_root, num_workers=workers)
    counts = data.class_pixels()
    files = list(default_cache_dir().glob("*.json"))
    assert len(files) == 1
    monkeypatch.setattr("mcseg.data.statistics._MaskCounts.__getitem__", None)  # counting again would fail
    assert torch.equal(CamVidData(camvid_root).class_pixels(), counts)
    monkeypatch.undo()
    write_png(camvid_root / "trainannot" / "0001TP_006690.png", np.full((9, 12), 3, dtype=np.uint8))
    assert CamVidData(camvid_root, num_workers=workers).class_pixels().tolist() == [18, 18, 18, 18 + 108] + [18] * 7


@pytest.mark.parametrize("damage", ["{", '{"key": "x", "class_pixels": []}', "[]", '{"class_pixels": [1]}'])
def test_a_corrupt_cache_is_replaced_by_a_new_count(camvid_root, damage):
    counts = CamVidData(camvid_root, num_workers=0).class_pixels()
    path = next(default_cache_dir().glob("*.json"))
    path.write_text(damage)
    with pytest.warns(UserWarning, match="cache of label counts cannot be used"):
        assert torch.equal(CamVidData(camvid_root, num_workers=0).class_pixels(), counts)
    assert json.loads(path.read_text())["class_pixels"] == counts.tolist()


def test_an_unwritable_cache_gives_a_warning(camvid_root, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    data = CamVidData(camvid_root, num_workers=0, cache_dir=blocked / "cache")
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert data.class_pixels().tolist() == [27] * 11


def count_as_rank(rank, root, folder):
    """Count in one of two processes, and record the masks that it reads."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    data = CamVidData(root, num_workers=0, cache_dir=f"{folder}/cache")
    read, names = data.reader.__class__.counts, []
    data.reader.__class__.counts = lambda self, sample: names.append(sample.name) or read(self, sample)
    counts = [data.class_pixels().tolist() for _ in range(2)]  # the second count reads no mask
    Path(folder, f"rank{rank}.json").write_text(json.dumps([counts, names]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_count(camvid_root, tmp_path):
    write_png(camvid_root / "trainannot" / "0001TP_006690.png", np.full((9, 12), 3, dtype=np.uint8))
    torch.multiprocessing.spawn(count_as_rank, (str(camvid_root), str(tmp_path)), nprocs=2)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    expected = [18, 18, 18, 18 + 108] + [18] * 7
    assert results[0][0] == results[1][0] == [expected, expected]
    assert results[0][1] == ["0001TP_006690", "0016E5_08430"]
    assert results[1][1] == ["0006R0_f00930"]


def test_unknown_value_in_a_training_mask_stops_the_count(photo_folder):
    break_three(photo_folder)
    (photo_folder / "train.txt").write_text("photo 5\n")
    with pytest.raises(DataError, match="unknown values 7"):
        FolderData(photo_folder, num_workers=0).class_pixels()


@pytest.mark.parametrize(("processes", "share"), [(1, 8), (2, 4), (8, 1)])
def test_total_batch_size_does_not_depend_on_the_number_of_processes(processes, share):
    data = SyntheticData(train_scenes=16, num_workers=0, total_batch_size=8, batch_size=3)
    data.trainer = SimpleNamespace(world_size=processes, global_rank=0, state=SimpleNamespace(status="finished"))
    assert data.train_dataloader().batch_size == share


def test_a_total_batch_size_that_the_processes_do_not_divide_is_refused():
    data = SyntheticData(train_scenes=16, num_workers=0, total_batch_size=6)
    data.trainer = SimpleNamespace(world_size=4)
    with pytest.raises(DataError, match="data.total_batch_size: found 6 for 4 processes, expected a multiple of 4"):
        data.train_dataloader()


def test_max_side_applies_to_the_image_but_not_the_mask_in_evaluation():
    data = SyntheticData(val_scenes=1, size=(40, 100), num_workers=0, max_side=50, image_scale=0.5)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 3, 10, 25)
    assert batch["mask"].shape == (1, 40, 100)


def test_check_reads_images_without_public_labels(tmp_path):
    fakes.bdd100k(tmp_path, orphans=True)
    photo = tmp_path / "bdd100k/images/10k/test/ac6d4f42-00000000.jpg"
    photo.write_bytes(photo.read_bytes()[:-60])
    report = check(BDD100KData(tmp_path, num_workers=0), progress=False)
    assert report.images == {"train": 3, "val": 2, "test": 2}
    assert report.pixels["test"].sum() == 0
    problems = "\n".join(report.problems)
    assert "ac6d4f42-00000000.jpg: cannot be read" in problems
    assert "skipped 1 images without a mask: 3d581db5-2564fb7e" in problems
    assert "skipped 1 masks without an image: fee92217-63b3f87f" in problems
    assert "has no mask" not in problems


def test_masks_are_int64_in_a_module_and_in_a_plain_loop(tmp_path):
    dtypes = []

    class Recorder(SegmentationModule):
        def training_step(self, batch, batch_idx):
            dtypes.append(batch["mask"].dtype)
            return super().training_step(batch, batch_idx)

    data = SyntheticData(train_scenes=2, val_scenes=2, size=(32, 48), crop_size=(32, 32), batch_size=2, num_workers=0)
    module = Recorder("unet", "tu-test_resnet.r160_in1k", num_classes=8, objective=CrossEntropyLoss())
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = next(iter(data.train_dataloader()))["mask"].dtype
    trainer.fit(module, data)
    after = next(iter(data.val_dataloader()))["mask"].dtype
    assert {before, *dtypes, after} == {torch.int64}
    assert next(iter(trainer.train_dataloader))["mask"].dtype == torch.uint8  # before the transfer to the device


def test_rare_crops_use_the_counts_of_training_pixels(photo_folder):
    """Class 2 has 6 of the 768 pixels of an image."""

    def share_with_rare_class(share):
        options = {"num_workers": 0, "batch_size": 8, "crop_size": (9, 9), "scale_range": (1, 1), "max_class_share": 1.0}
        data = FolderData(photo_folder, rare_crop_share=share, **options)
        masks = torch.cat([batch["mask"] for _ in range(10) for batch in data.train_dataloader()])
        return data, float((masks == 2).flatten(1).any(1).float().mean())

    data, rare_share = share_with_rare_class(1.0)
    assert rare_share > share_with_rare_class(0.0)[1] + 0.3
    weights = data.train_transform.class_weights
    assert torch.allclose(weights * data.class_pixels(), torch.ones(3, dtype=torch.float64))
    with pytest.raises(DataError, match="data.rare_crop_share: found 2, expected 0 to 1"):
        FolderData(photo_folder, rare_crop_share=2)


def test_held_out_images_replace_the_validation_split(camvid_root):
    data = CamVidData(camvid_root, held_out=["0006R0_*"], num_workers=0, crop_size=(8, 8), batch_size=1)
    data.setup("fit")
    names = [[n for batch in loader for n in batch["name"]] for loader in (data.train_dataloader(), data.val_dataloader())]
    assert sorted(names[0]) == ["0001TP_006690", "0016E5_08430"]
    assert names[1] == ["0006R0_f00930"]
    whole = CamVidData(camvid_root, num_workers=0)
    assert (3 * data.class_pixels() == 2 * whole.class_pixels()).all()  # two of three equal masks remain


def test_held_out_pattern_without_an_image_is_an_error(camvid_root):
    data = CamVidData(camvid_root, held_out=["0006R0_*", "Seq05VD_*"])
    with pytest.raises(DataError, match=r"held_out: no training image is named Seq05VD_\*; .* such as 0001TP_006690"):
        data.setup("fit")


NAMES = ("a", "b", "c")
COLORS = ((0, 0, 0), (10, 20, 30), (255, 0, 255))


def test_index_values_become_train_ids_and_void():
    table = LabelTable(NAMES, COLORS, {7: 0, 3: 1, 200: 2, 11: 255})
    raw = np.array([[7, 3, 200], [11, 7, 3]], dtype=np.uint8)
    assert table.train_ids(raw, "m.png").tolist() == [[0, 1, 2], [255, 0, 1]]


def test_16_bit_values():
    table = LabelTable(NAMES, COLORS, {1000: 0, 40000: 1, 0: 2})
    raw = np.array([[1000, 40000, 0]], dtype=np.uint16)
    assert table.train_ids(raw, "m.png").tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_values_outside_any_table_are_unknown_not_wrapped(dtype):
    table = LabelTable(NAMES, COLORS, {0: 0, 1: 1, 2: 2})
    for value in (-1, 256, 65536, 1 << 20):
        with pytest.raises(DataError, match=str(value)):
            table.train_ids(np.array([[0, value]], dtype=dtype), "m.png")


def test_colours_become_train_ids():
    table = LabelTable(
        NAMES, COLORS, {pack_color(c): i for i, c in enumerate(COLORS)} | {pack_color((9, 9, 9)): 255}, by_color=True
    )
    raw = np.array([[[0, 0, 0], [10, 20, 30]], [[255, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    assert table.train_ids(raw, "m.png").tolist() == [[0, 1], [2, 255]]


def test_unknown_values_are_named_with_their_file():
    table = table_from_names(["a", "b"])
    raw = np.array([[0, 1, 5], [5, 9, 255]], dtype=np.uint8)
    with pytest.raises(DataError, match=r"masks/x\.png: 3 pixels .* unknown values 5, 9; expected 0-1, 255"):
        table.train_ids(raw, "masks/x.png")


def test_unknown_colours_are_named():
    table = LabelTable(NAMES, COLORS, {pack_color(c): i for i, c in enumerate(COLORS)}, by_color=True)
    with pytest.raises(DataError, match=r"1 pixels .* unknown colours \(1, 2, 3\)"):
        table.train_ids(np.array([[[0, 0, 0], [1, 2, 3]]], dtype=np.uint8), "x.png")


def test_unlisted_values_map_to_the_given_id():
    table = LabelTable(NAMES, COLORS, {1: 0}, unlisted=255)
    assert table.train_ids(np.array([[1, 2, 77]], dtype=np.uint8), "x.png").tolist() == [[0, 255, 255]]


def test_grey_mask_saved_as_rgb_is_an_index_mask():
    raw = np.repeat(np.array([[0, 1], [1, 255]], dtype=np.uint8)[..., None], 3, axis=2)
    assert table_from_names(["a", "b"]).train_ids(raw, "x.png").tolist() == [[0, 1], [1, 255]]


def test_coloured_mask_for_an_index_table():
    with pytest.raises(DataError, match="mask is coloured, expected one channel"):
        table_from_names(["a", "b"]).train_ids(np.array([[[0, 1, 2]]], dtype=np.uint8), "x.png")


@pytest.mark.parametrize(
    ("names", "palette", "raw_ids", "message"),
    [
        (("a",), ((0, 0, 0),), {0: 0}, "1 classes, expected 2 to 254"),
        (("a", "a"), COLORS[:2], {0: 0}, "found more than once: a"),
        (("a", "b"), COLORS, {0: 0}, "3 colours for 2 classes"),
        (("a", "b"), COLORS[:2], {0: 2}, "train id 2; expected 0 to 1"),
    ],
)
def test_invalid_tables_are_refused(names, palette, raw_ids, message):
    with pytest.raises(DataError, match=message):
        LabelTable(names, palette, raw_ids)


def test_distinct_colors_differ_and_none_is_black():
    colors = distinct_colors(254)
    assert len(set(colors)) == 254
    assert (0, 0, 0) not in colors


def test_class_list_as_text(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# comment\nroad 128 64 128\n\nstreet light 250, 170, 30\n")
    indices = table_from_file(path, by_color=False)
    assert indices.names == ("road", "street light")
    assert indices.palette == ((128, 64, 128), (250, 170, 30))
    assert dict(indices.raw_ids) == {0: 0, 1: 1, 255: 255}
    colours = table_from_file(path, by_color=True)
    assert dict(colours.raw_ids) == {128 * 65536 + 64 * 256 + 128: 0, 250 * 65536 + 170 * 256 + 30: 1}


def test_class_list_as_toml(tmp_path):
    path = tmp_path / "classes.toml"
    path.write_text('void = [7]\n[[classes]]\nname = "off"\nid = 0\n[[classes]]\nname = "on"\nid = 255\ncolor = [1, 2, 3]\n')
    table = table_from_file(path, by_color=False)
    assert table.names == ("off", "on")
    assert table.train_ids(np.array([[0, 255, 7]], dtype=np.uint8), "x").tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a list `classes`"),
        ({"classes": [{"name": "a", "idx": 1}]}, "unknown key idx"),
        ({"classes": [{"name": "a", "id": 3}, {"name": "b", "id": 3}]}, "a, b have the same id"),
        ({"classes": [{"name": "a", "id": -1}, {"name": "b"}]}, "found the id -1"),
        ({"classes": [{"name": "a", "color": [1, 2]}, {"name": "b"}]}, r"found the colour \[1, 2\]"),
    ],
)
def test_malformed_class_lists(content, message):
    with pytest.raises(DataError, match=message):
        table_from_toml(content, "classes.toml")


# Class list -> names, and the mask value of each class
CLASS_FILES = {
    "ids first": ("0 background\n1 street light\n", {"background": 0, "street light": 1}),
    "ids and colons": ("0: background\n7: road\n", {"background": 0, "road": 7}),
    "ids last": ("background 1\nroad 2\n", {"background": 1, "road": 2}),
    "colours": ("background 0 0 0\nroad 128 64 128\n", {"background": 0, "road": 1}),
    "colours first": ("64 128 64\tAnimal\n192 0 128\tArch way\n", {"Animal": 0, "Arch way": 1}),
    "header of Kaggle": ("name,r,g,b\nAnimal,64,128,64\nlane 1, 192, 0, 128\n", {"Animal": 0, "lane 1": 1}),
    "header of Roboflow": ("Pixel Value, Class\n0, background\n3, cat\n", {"background": 0, "cat": 3}),
    "labelmap of CVAT": ("# label:color_rgb:parts:actions\nsky:0,0,0::\nroad:1,2,3::\n", {"sky": 0, "road": 1}),
    "header of one word": ("class\nroad\nsky\n", {"road": 0, "sky": 1}),
    "void as 255": ("id;name\n0;road\n4;sky\n255;void\n", {"road": 0, "sky": 4}),
    "numbers of names": ("lane 1\nlane 2\nroad\n", {"lane 1": 0, "lane 2": 1, "road": 2}),
    "quoted": ('"zone 1"\n"2 wheels"\nroad, wet\n', {"zone 1": 0, "2 wheels": 1, "road, wet": 2}),
}


@pytest.mark.parametrize("kind", CLASS_FILES)
def test_forms_of_class_lists(tmp_path, kind):
    text, expected = CLASS_FILES[kind]
    (tmp_path / "classes.txt").write_text(text)
    table = table_from_file(tmp_path / "classes.txt", by_color=False)
    assert {table.names[train]: raw for raw, train in table.raw_ids.items() if train != 255} == expected
    assert table.raw_ids[255] == 255
    assert table.names == tuple(expected)


def test_colours_below_a_header(tmp_path):
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nAnimal,64,128,64\nArchway, 192, 0, 128\n")
    table = table_from_file(tmp_path / "class_dict.csv", by_color=True)
    assert dict(table.raw_ids) == {0x408040: 0, 0xC00080: 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 road\nsky\n", r"line 1: found '0 road'.*classes\.toml"),
        ("name,r,g,b\nroad,1,2\nsky,1,2,3\n", r"line 2: found 'road,1,2', expected the columns of the header, name, R G B"),
        ("road 300 0 0\nsky 1 2 3\n", r"class road: found the colour \[300, 0, 0\]"),
    ],
)
def test_unclear_class_lists_are_refused(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        table_from_file(tmp_path / "classes.txt", by_color=False)
