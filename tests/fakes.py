"""Tiny data sets in the official layouts of the benchmarks.

Names, folders, encodings and values are written by hand and not taken from the package, so that tests can compare the two.
A mask is built from one or two literal rows, so that a test can give its expected result as a row too.
"""

import json
from pathlib import Path

import numpy as np
from conftest import write_png
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix


def write_photo(path: Path, width: int, height: int, seed: int, grey: bool = False) -> None:
    """Write random pixels as PNG or JPEG, by the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if grey else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))


def write_palette_png(path: Path, values, colors) -> None:
    """Write an 8-bit palette PNG that stores ``values``; the palette is padded to 256 colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    flat = [channel for color in colors for channel in color]
    image.putpalette(flat + [1] * (768 - len(flat)))
    image.save(path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_mat(path: Path, content: dict, compressed: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content, do_compression=compressed)


def rows(row, count, dtype=np.uint8):
    """Stack ``row`` ``count`` times."""
    return np.array([row] * count, dtype=dtype)


# --- Cityscapes --------------------------------------------------------------------------------------------------------

# Every id of labelIds.png once, then some again; 40 columns.
CITYSCAPES_IDS = [*range(34), 7, 7, 8, 26, 33, 0]
# As above without train (31) and truck (27).
CITYSCAPES_VAL_IDS = [*range(27), 29, 28, 29, 30, 30, 32, 33, 7, 7, 8, 26, 33, 0]


def cityscapes(root: Path) -> None:
    """Write all four archives into one folder: fine and coarse labels, 40x24 pixels.

    The masks of aachen_000000_000019 (training) and frankfurt_000000_000294 (validation) hold all ids.
    """
    top = rows(CITYSCAPES_IDS, 24)
    top[0] = 3  # out of roi
    top[23] = 1  # ego vehicle
    crossing = np.concatenate([rows([7] * 10 + [8] * 10 + [23] * 10 + [0] * 10, 12), rows([7, 26, 21, 9] * 10, 12)])
    val = np.concatenate([rows([0] * 40, 1), rows([11] * 20 + [21] * 20, 23)])
    fine = {
        "train/aachen/aachen_000000_000019": top,
        "train/aachen/aachen_000001_000019": crossing,
        "train/hamburg/hamburg_000000_000042": rows([24] * 5 + [25] * 5 + [33] * 10 + [31] * 20, 24),
        "val/frankfurt/frankfurt_000000_000294": rows(CITYSCAPES_VAL_IDS, 24),
        "val/munster/munster_000000_000019": val,
        # The test labels are not public; the distributed files hold only void.
        "test/berlin/berlin_000000_000019": np.concatenate([rows([3] * 40, 1), rows([0] * 40, 22), rows([1] * 40, 1)]),
        "test/bielefeld/bielefeld_000000_000321": rows([0] * 40, 24),
    }
    coarse_row = [0] * 15 + [7] * 10 + [26] * 5 + [0] * 10
    coarse = {name: rows(coarse_row, 24) for name in fine if not name.startswith("test/")} | {
        "train_extra/augsburg/augsburg_000000_000020": rows(coarse_row, 24),
        "train_extra/troisdorf/troisdorf_000000_000072": rows([0] * 30 + [21] * 10, 24),
        "train_extra/troisdorf/troisdorf_000000_000073": rows([0] * 40, 24),
    }
    for kind, masks in {"gtFine": fine, "gtCoarse": coarse}.items():
        for seed, (name, ids) in enumerate(masks.items()):
            _cityscapes_labels(root / kind / f"{name}_{kind}", ids)
            image = root / "leftImg8bit" / f"{name}_leftImg8bit.png"
            if not image.exists():
                write_photo(image, 40, 24, 100 * len(kind) + seed)
    # The broken frame of the trainextra archive: black, with one channel
    broken = root / "leftImg8bit/train_extra/troisdorf/troisdorf_000000_000073_leftImg8bit.png"
    write_png(broken, np.zeros((24, 40), dtype=np.uint8))
    write_text(root / "README", "Cityscapes\n")
    write_text(root / "license.txt", "terms\n")


def _cityscapes_labels(stem: Path, ids) -> None:
    write_png(Path(f"{stem}_labelIds.png"), ids)
    objects = ids.astype(np.uint16)
    objects[ids >= 24] = objects[ids >= 24] * 1000 + 1
    write_png(Path(f"{stem}_instanceIds.png"), objects)
    write_png(Path(f"{stem}_color.png"), np.stack([ids * 7, ids, 255 - ids, ids * 0 + 255], axis=-1).astype(np.uint8))
    polygon = [{"label": "road", "polygon": [[0, 0], [39, 0], [39, 23]]}]
    write_text(Path(f"{stem}_polygons.json"), json.dumps({"imgHeight": 24, "imgWidth": 40, "objects": polygon}))


# --- BDD100K -----------------------------------------------------------------------------------------------------------

# Every train id once, void, then some again; 32 columns.
BDD_IDS = [*range(19), 255, 255, 0, 2, 8, 10, 13, 13, 13, 255, 255, 0, 0]


def bdd100k(root: Path, layout: str = "2021", orphans: bool = False) -> None:
    """Write the 10K images and the semantic labels, 32x18 pixels.

    Args:
        layout: "2021" (images/10k, labels/sem_seg) or "legacy" (seg/images, seg/labels).
        orphans: add two images without a mask and two masks without an image, as in packages before June 2021.
    """
    masks = {
        "train/0000f77c-6257be58": rows(BDD_IDS, 18),
        "train/00054602-3bf57337": np.concatenate([rows([10] * 32, 9), rows([0] * 20 + [13] * 12, 9)]),
        "train/ff3ec4c9-0c1a4b7a": rows([255] * 32, 18),  # every crop of this mask is all void
        "val/7d06fefd-f7be05a6": rows(BDD_IDS, 18),
        "val/9aa94005-ff1d4c9a": rows([2] * 16 + [255] * 16, 18),
    }
    images = [*masks, "test/ac6d4f42-00000000", "test/cabc30fc-e7726578"]
    if orphans:
        images += ["train/3d581db5-2564fb7e", "val/80a9e37d-e4548ac1"]
        masks |= {"train/fee92217-63b3f87f": rows([0] * 32, 18), "val/ff55861e-a06b953c": rows([0] * 32, 18)}
    top = root / "bdd100k"
    photos, labels, colors, ending = {
        "2021": ("images/10k", "labels/sem_seg/masks", "labels/sem_seg/colormaps", ""),
        "legacy": ("seg/images", "seg/labels", "seg/color_labels", "_train_id"),
    }[layout]
    for seed, name in enumerate(images):
        write_photo(top / photos / f"{name}.jpg", 32, 18, seed)
    for name, ids in masks.items():
        write_png(top / labels / f"{name}{ending}.png", ids)
        picture = np.stack([ids, ids // 2, 255 - ids, ids * 0 + 255], axis=-1)
        write_png(top / colors / f"{name}{ending.replace('id', 'color')}.png", picture)
    if layout == "2021":
        # The 100K images are another set of images.
        write_photo(top / "images/100k/train/0000f77c-cb820c98.jpg", 32, 18, 90)
        write_photo(top / "images/100k/val/b1c66a42-6f7d68ca.jpg", 32, 18, 91)
        for kind in ("polygons", "rles"):
            for split in ("train", "val"):
                write_text(top / f"labels/sem_seg/{kind}/sem_seg_{split}.json", "[]\n")


# --- Mapillary Vistas --------------------------------------------------------------------------------------------------

# The labels of the configuration files in their order: name, readable name, colour.
MAPILLARY_V12 = """
animal--bird | Bird | 165 42 42
animal--ground-animal | Ground Animal | 0 192 0
construction--barrier--curb | Curb | 196 196 196
construction--barrier--fence | Fence | 190 153 153
construction--barrier--guard-rail | Guard Rail | 180 165 180
construction--barrier--other-barrier | Barrier | 90 120 150
construction--barrier--wall | Wall | 102 102 156
construction--flat--bike-lane | Bike Lane | 128 64 255
construction--flat--crosswalk-plain | Crosswalk - Plain | 140 140 200
construction--flat--curb-cut | Curb Cut | 170 170 170
construction--flat--parking | Parking | 250 170 160
construction--flat--pedestrian-area | Pedestrian Area | 96 96 96
construction--flat--rail-track | Rail Track | 230 150 140
construction--flat--road | Road | 128 64 128
construction--flat--service-lane | Service Lane | 110 110 110
construction--flat--sidewalk | Sidewalk | 244 35 232
construction--structure--bridge | Bridge | 150 100 100
construction--structure--building | Building | 70 70 70
construction--structure--tunnel | Tunnel | 150 120 90
human--person | Person | 220 20 60
human--rider--bicyclist | Bicyclist | 255 0 0
human--rider--motorcyclist | Motorcyclist | 255 0 100
human--rider--other-rider | Other Rider | 255 0 200
marking--crosswalk-zebra | Lane Marking - Crosswalk | 200 128 128
marking--general | Lane Marking - General | 255 255 255
nature--mountain | Mountain | 64 170 64
nature--sand | Sand | 230 160 50
nature--sky | Sky | 70 130 180
nature--snow | Snow | 190 255 255
nature--terrain | Terrain | 152 251 152
nature--vegetation | Vegetation | 107 142 35
nature--water | Water | 0 170 30
object--banner | Banner | 255 255 128
object--bench | Bench | 250 0 30
object--bike-rack | Bike Rack | 100 140 180
object--billboard | Billboard | 220 220 220
object--catch-basin | Catch Basin | 220 128 128
object--cctv-camera | CCTV Camera | 222 40 40
object--fire-hydrant | Fire Hydrant | 100 170 30
object--junction-box | Junction Box | 40 40 40
object--mailbox | Mailbox | 33 33 33
object--manhole | Manhole | 100 128 160
object--phone-booth | Phone Booth | 142 0 0
object--pothole | Pothole | 70 100 150
object--street-light | Street Light | 210 170 100
object--support--pole | Pole | 153 153 153
object--support--traffic-sign-frame | Traffic Sign Frame | 128 128 128
object--support--utility-pole | Utility Pole | 0 0 80
object--traffic-light | Traffic Light | 250 170 30
object--traffic-sign--back | Traffic Sign (Back) | 192 192 192
object--traffic-sign--front | Traffic Sign (Front) | 220 220 0
object--trash-can | Trash Can | 140 140 20
object--vehicle--bicycle | Bicycle | 119 11 32
object--vehicle--boat | Boat | 150 0 255
object--vehicle--bus | Bus | 0 60 100
object--vehicle--car | Car | 0 0 142
object--vehicle--caravan | Caravan | 0 0 90
object--vehicle--motorcycle | Motorcycle | 0 0 230
object--vehicle--on-rails | On Rails | 0 80 100
object--vehicle--other-vehicle | Other Vehicle | 128 64 64
object--vehicle--trailer | Trailer | 0 0 110
object--vehicle--truck | Truck | 0 0 70
object--vehicle--wheeled-slow | Wheeled Slow | 0 0 192
void--car-mount | Car Mount | 32 32 32
void--ego-vehicle | Ego Vehicle | 120 10 10
void--unlabeled | Unlabeled | 0 0 0 | not evaluated
"""

MAPILLARY_V20 = """
animal--bird | Bird | 165 42 42
animal--ground-animal | Ground Animal | 0 192 0
construction--barrier--ambiguous | Ambiguous Barrier | 250 170 31 | not evaluated
construction--barrier--concrete-block | Concrete Block | 250 170 32
construction--barrier--curb | Curb | 196 196 196
construction--barrier--fence | Fence | 190 153 153
construction--barrier--guard-rail | Guard Rail | 180 165 180
construction--barrier--other-barrier | Barrier | 90 120 150
construction--barrier--road-median | Road Median | 250 170 33
construction--barrier--road-side | Road Side | 250 170 34
construction--barrier--separator | Lane Separator | 128 128 128
construction--barrier--temporary | Temporary Barrier | 250 170 35
construction--barrier--wall | Wall | 102 102 156
construction--flat--bike-lane | Bike Lane | 128 64 255
construction--flat--crosswalk-plain | Crosswalk - Plain | 140 140 200
construction--flat--curb-cut | Curb Cut | 170 170 170
construction--flat--driveway | Driveway | 250 170 36
construction--flat--parking | Parking | 250 170 160
construction--flat--parking-aisle | Parking Aisle | 250 170 37
construction--flat--pedestrian-area | Pedestrian Area | 96 96 96
construction--flat--rail-track | Rail Track | 230 150 140
construction--flat--road | Road | 128 64 128
construction--flat--road-shoulder | Road Shoulder | 110 110 110
construction--flat--service-lane | Service Lane | 110 110 110
construction--flat--sidewalk | Sidewalk | 244 35 232
construction--flat--traffic-island | Traffic Island | 128 196 128
construction--structure--bridge | Bridge | 150 100 100
construction--structure--building | Building | 70 70 70
construction--structure--garage | Garage | 150 150 150
construction--structure--tunnel | Tunnel | 150 120 90
human--person--individual | Person | 220 20 60
human--person--person-group | Person Group | 220 20 60 | not evaluated
human--rider--bicyclist | Bicyclist | 255 0 0
human--rider--motorcyclist | Motorcyclist | 255 0 100
human--rider--other-rider | Other Rider | 255 0 200
marking--continuous--dashed | Lane Marking - Dashed Line | 255 255 255
marking--continuous--solid | Lane Marking - Straight Line | 255 255 255
marking--continuous--zigzag | Lane Marking - Zigzag Line | 250 170 29
marking--discrete--ambiguous | Lane Marking - Ambiguous | 250 170 28 | not evaluated
marking--discrete--arrow--left | Lane Marking - Arrow (Left) | 250 170 26
marking--discrete--arrow--other | Lane Marking - Arrow (Other) | 250 170 25
marking--discrete--arrow--right | Lane Marking - Arrow (Right) | 250 170 24
marking--discrete--arrow--split-left-or-straight | Lane Marking - Arrow (Split Left or Straight) | 250 170 22
marking--discrete--arrow--split-right-or-straight | Lane Marking - Arrow (Split Right or Straight) | 250 170 21
marking--discrete--arrow--straight | Lane Marking - Arrow (Straight) | 250 170 20
marking--discrete--crosswalk-zebra | Lane Marking - Crosswalk | 255 255 255
marking--discrete--give-way-row | Lane Marking - Give Way (Row) | 250 170 19
marking--discrete--give-way-single | Lane Marking - Give Way (Single) | 250 170 18
marking--discrete--hatched--chevron | Lane Marking - Hatched (Chevron) | 250 170 12
marking--discrete--hatched--diagonal | Lane Marking - Hatched (Diagonal) | 250 170 11
marking--discrete--other-marking | Lane Marking - Other | 255 255 255
marking--discrete--stop-line | Lane Marking - Stop Line | 255 255 255
marking--discrete--symbol--bicycle | Lane Marking - Symbol (Bicycle) | 250 170 16
marking--discrete--symbol--other | Lane Marking - Symbol (Other) | 250 170 15
marking--discrete--text | Lane Marking - Text | 250 170 15
marking-only--continuous--dashed | Lane Marking (only) - Dashed Line | 255 255 255
marking-only--discrete--crosswalk-zebra | Lane Marking (only) - Crosswalk | 255 255 255
marking-only--discrete--other-marking | Lane Marking (only) - Other | 255 255 255
marking-only--discrete--text | Lane Marking (only) - Test | 255 255 255
nature--mountain | Mountain | 64 170 64
nature--sand | Sand | 230 160 50
nature--sky | Sky | 70 130 180
nature--snow | Snow | 190 255 255
nature--terrain | Terrain | 152 251 152
nature--vegetation | Vegetation | 107 142 35
nature--water | Water | 0 170 30
object--banner | Banner | 255 255 128
object--bench | Bench | 250 0 30
object--bike-rack | Bike Rack | 100 140 180
object--catch-basin | Catch Basin | 220 128 128
object--cctv-camera | CCTV Camera | 222 40 40
object--fire-hydrant | Fire Hydrant | 100 170 30
object--junction-box | Junction Box | 40 40 40
object--mailbox | Mailbox | 33 33 33
object--manhole | Manhole | 100 128 160
object--parking-meter | Parking Meter | 20 20 255
object--phone-booth | Phone Booth | 142 0 0
object--pothole | Pothole | 70 100 150
object--sign--advertisement | Signage - Advertisement | 250 171 30
object--sign--ambiguous | Signage - Ambiguous | 250 172 30 | not evaluated
object--sign--back | Signage - Back | 250 173 30
object--sign--information | Signage - Information | 250 174 30
object--sign--other | Signage - Other | 250 175 30
object--sign--store | Signage - Store | 250 176 30
object--street-light | Street Light | 210 170 100
object--support--pole | Pole | 153 153 153
object--support--pole-group | Pole Group | 153 153 153 | not evaluated
object--support--traffic-sign-frame | Traffic Sign Frame | 128 128 128
object--support--utility-pole | Utility Pole | 0 0 80
object--traffic-cone | Traffic Cone | 210 60 60
object--traffic-light--general-single | Traffic Light - General (Single) | 250 170 30
object--traffic-light--pedestrians | Traffic Light - Pedestrians | 250 170 30
object--traffic-light--general-upright | Traffic Light - General (Upright) | 250 170 30
object--traffic-light--general-horizontal | Traffic Light - General (Horizontal) | 250 170 30
object--traffic-light--cyclists | Traffic Light - Cyclists | 250 170 30
object--traffic-light--other | Traffic Light - Other | 250 170 30
object--traffic-sign--ambiguous | Traffic Sign - Ambiguous | 192 192 192 | not evaluated
object--traffic-sign--back | Traffic Sign (Back) | 192 192 192
object--traffic-sign--direction-back | Traffic Sign - Direction (Back) | 192 192 192
object--traffic-sign--direction-front | Traffic Sign - Direction (Front) | 220 220 0
object--traffic-sign--front | Traffic Sign (Front) | 220 220 0
object--traffic-sign--information-parking | Traffic Sign - Parking | 0 0 196
object--traffic-sign--temporary-back | Traffic Sign - Temporary (Back) | 192 192 192
object--traffic-sign--temporary-front | Traffic Sign - Temporary (Front) | 220 220 0
object--trash-can | Trash Can | 140 140 20
object--vehicle--bicycle | Bicycle | 119 11 32
object--vehicle--boat | Boat | 150 0 255
object--vehicle--bus | Bus | 0 60 100
object--vehicle--car | Car | 0 0 142
object--vehicle--caravan | Caravan | 0 0 90
object--vehicle--motorcycle | Motorcycle | 0 0 230
object--vehicle--on-rails | On Rails | 0 80 100
object--vehicle--other-vehicle | Other Vehicle | 128 64 64
object--vehicle--trailer | Trailer | 0 0 110
object--vehicle--truck | Truck | 0 0 70
object--vehicle--vehicle-group | Vehicle Group | 0 0 142 | not evaluated
object--vehicle--wheeled-slow | Wheeled Slow | 0 0 192
object--water-valve | Water Valve | 170 170 170
void--car-mount | Car Mount | 32 32 32
void--dynamic | Dynamic | 111 74 0
void--ego-vehicle | Ego Vehicle | 120 10 10
void--ground | Ground | 81 0 81
void--static | Static | 111 111 0
void--unlabeled | Unlabeled | 0 0 0 | not evaluated
"""


# The first image of each split holds every label; the third holds all labels of v2.0 that are not evaluated.
_MAPILLARY = {
    "v1.2": {
        "training/-2Z1KKsPcmRbtkjBPA6DeQ": rows([*range(66)] + [65] * 58, 10),
        "training/0035fkbjWljhaftpVM37-g": rows([13] * 8 + [65] * 4 + [64] * 8, 36),
        "training/_8Dd7vwJsbMNLsrqTzZd6g": rows([27] * 15 + [63] * 15, 20),
        "validation/lcEh2jrVyj8VYp8mWnJ_4A": rows([*range(65, -1, -1)] + [65] * 58, 10),
        "validation/zYEyqbpvJFJ9ZnGzOGRJwg": rows([65] * 10 + [19] * 20, 20),
    },
    "v2.0": {
        "training/-2Z1KKsPcmRbtkjBPA6DeQ": rows([*range(124)], 10),
        "training/0035fkbjWljhaftpVM37-g": rows([21] * 8 + [123] * 4 + [120] * 8, 36),
        "training/_8Dd7vwJsbMNLsrqTzZd6g": rows([2, 31, 38, 79, 86, 96, 115, 65, 122, 119] * 3, 20),
        "validation/lcEh2jrVyj8VYp8mWnJ_4A": rows([*range(123, -1, -1)], 10),
        "validation/zYEyqbpvJFJ9ZnGzOGRJwg": rows([123] * 10 + [30] * 20, 20),
    },
}


def mapillary_labels(version: str) -> list[tuple[str, str, list[int], bool]]:
    """Parse (name, readable name, colour, evaluated) of each label."""
    text = {"v1.2": MAPILLARY_V12, "v2.0": MAPILLARY_V20}[version]
    fields = [line.split(" | ") for line in text.strip().splitlines()]
    return [(f[0], f[1], [int(value) for value in f[2].split()], len(f) == 3) for f in fields]


def mapillary_vistas(
    root: Path,
    version: str = "v1.2",
    nested: bool | None = None,
    config: bool | str = True,
    config_name: str = "config.json",
) -> None:
    """Write images of several sizes with palette PNGs, 16-bit instances and panoptic pictures.

    Args:
        version: archive to imitate; "v1.2" has labels of that version only, "v2.0" has labels of both.
        nested: put labels into folders v1.2/ and v2.0/; None does as the archive, so only for "v2.0".
        config: write config files; "wrong" swaps labels in them.
        config_name: name of the config file if the labels are not nested.
    """
    nested = version == "v2.0" if nested is None else nested
    if version == "v2.0" and not nested:
        raise ValueError("the v2.0 archive is always nested, because it holds two versions of the labels")
    for one in ("v1.2", "v2.0") if version == "v2.0" else ("v1.2",):
        labels = mapillary_labels(one)
        for name, ids in _MAPILLARY[one].items():
            split, key = name.split("/")
            folder = root / split / one if nested else root / split
            write_palette_png(folder / "labels" / f"{key}.png", ids, [label[2] for label in labels])
            write_png(folder / "instances" / f"{key}.png", ids.astype(np.uint16) * 256 + 1)
            write_png(folder / "panoptic" / f"{key}.png", np.stack([ids, ids, ids], axis=-1))
        if nested:
            write_text(root / "training" / one / "panoptic" / f"panoptic_20{'18' if one == 'v1.2' else '20'}.json", "{}\n")
        if config:
            write_text(
                root / (f"config_{one}.json" if nested else config_name),
                json.dumps(_mapillary_config(one, labels, wrong=config == "wrong")),
            )
    sizes = {name: ids.shape for name, ids in _MAPILLARY["v1.2"].items()}
    sizes |= {"testing/2nTTdpqRbvXIqeTVEsqPSg": (30, 22), "testing/9aRiCqUOcc-vD3bhcT5cVg": (14, 26)}
    for seed, (name, (height, width)) in enumerate(sizes.items()):
        split, key = name.split("/")
        write_photo(root / split / "images" / f"{key}.jpg", width, height, seed)
    write_text(root / "demo.py", "")
    write_text(root / "README", "Mapillary Vistas\n")


def _mapillary_config(version: str, labels, wrong: bool) -> dict:
    if wrong and version == "v1.2":
        labels = [*labels[:13], labels[14], labels[13], *labels[15:]]  # service lane before road
    elif wrong:
        labels = [*labels[:90], *sorted(labels[90:96]), *labels[96:]]  # traffic lights by alphabet
    return {
        "mapping": "public",
        "version": float(version[1:]),
        "folder_structure": "{split}/{content}/{key:.{22}}.{ext}",
        "labels": [
            {"color": color, "evaluate": evaluated, "instances": False, "name": name, "readable": readable}
            for name, readable, color, evaluated in labels
        ],
    }


# --- SceneParse150 -----------------------------------------------------------------------------------------------------


def sceneparse150(root: Path) -> None:
    """Write both archives into one folder, with images of several sizes."""
    masks = {
        "training/ADE_train_00000001": rows([*range(151)], 10),
        "training/ADE_train_00000002": rows([0] * 5 + [1] * 5 + [4] * 10, 30),
        "training/ADE_train_00020210": rows([13, 150] * 8, 12),
        "validation/ADE_val_00000001": rows([*range(150, -1, -1)], 10),
        "validation/ADE_val_00002000": rows([150] * 12 + [0] * 4, 10),
    }
    top = root / "ADEChallengeData2016"
    for seed, (name, ids) in enumerate(masks.items()):
        write_png(top / "annotations" / f"{name}.png", ids)
        write_photo(top / "images" / f"{name}.jpg", ids.shape[1], ids.shape[0], seed)
    write_text(top / "sceneCategories.txt", "ADE_train_00000001 airport_terminal\nADE_train_00000002 art_gallery\n")
    for index in (1, 2):
        write_photo(root / "release_test/testing" / f"ADE_test_{index:08d}.jpg", 18, 26, 50 + index)


# --- COCO-Stuff 10K ----------------------------------------------------------------------------------------------------


def cocostuff10k(root: Path) -> None:
    """Write version 1.1: images of train2014, one of them grey; .mat files; lists that end with an empty line."""
    maps = {
        "COCO_train2014_000000000077": rows([*range(183)], 9, np.uint16),
        "COCO_train2014_000000000113": rows([1] * 8 + [12] * 4 + [0] * 4 + [182] * 8, 16, np.uint16),
        "COCO_train2014_000000000127": rows([91, 92] * 10, 30, np.uint16),
        "COCO_train2014_000000000825": rows([*range(182, -1, -1)], 9, np.uint16),
        # Ids that official annotations never use (12 to 83), then ids that they use
        "COCO_train2014_000000000934": rows([12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91, 0, 1, 90, 92, 182], 8, np.uint16),
    }
    for seed, (name, ids) in enumerate(maps.items()):
        cocostuff_mat(root / "annotations" / f"{name}.mat", ids, compressed=seed % 2 == 0)
        write_photo(root / "images" / f"{name}.jpg", ids.shape[1], ids.shape[0], seed, grey=name.endswith("113"))
    names = list(maps)
    for split, part in {"train": names[:3], "test": names[3:], "all": names}.items():
        write_text(root / "imageLists" / f"{split}.txt", "\n".join(part) + "\n\n")


def cocostuff_mat(path: Path, ids, compressed: bool = True) -> None:
    """Write one annotation with all fields of the real files."""
    names = np.empty((4, 1), dtype=object)
    names[:, 0] = ["unlabeled", "person", "bicycle", "car"]
    captions = np.empty((2, 1), dtype=object)
    captions[:, 0] = ["A street.", "Some houses."]
    regions = np.arange(ids.size, dtype=np.uint16).reshape(ids.shape)  # of the size of S, but not labels
    content = {"S": ids, "names": names, "captions": captions}
    content |= {"regionMapStuff": regions, "regionLabelsStuff": np.array([[92], [182]], dtype=np.uint16)}
    write_mat(path, content, compressed)


# --- PASCAL VOC 2012 and SBD -------------------------------------------------------------------------------------------

VOC_COLORS = [
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128),
    (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128), (64, 128, 128), (192, 128, 128),
    (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128),
]  # fmt: skip
VOC_IDS = [*range(21), 255, 255, 255] + [15] * 16


def pascal_voc(root: Path, sbd: bool = True, test: bool = False) -> None:
    """Write VOCdevkit/VOC2012 and, beside it, benchmark_RELEASE with SBD.

    The lists of SBD include images of VOC's training and validation lists; their .mat files hold 7 in every pixel.

    Args:
        sbd: write SBD.
        test: write the list and the images of VOC2012test.tar.
    """
    masks = {
        "2007_000032": rows(VOC_IDS, 24),
        "2007_000039": rows([0] * 10 + [255] * 2 + [20] * 12, 40),
        "2007_000063": rows([255] * 2 + [9] * 20 + [12] * 8, 20),
        "2007_000033": rows(VOC_IDS[::-1], 24),
        "2007_000042": rows([0] * 28 + [255] * 2 + [19] * 10, 24),
    }
    only_sbd = {
        "2008_000008": rows([0] * 10 + [13] * 10 + [15] * 10, 20),
        "2008_000015": rows([5] * 7 + [0] * 13, 36),
    }
    top = root / "VOCdevkit/VOC2012"
    for name, ids in masks.items():
        write_palette_png(top / "SegmentationClass" / f"{name}.png", ids, VOC_COLORS + [(224, 224, 192)] * 235)
        write_palette_png(top / "SegmentationObject" / f"{name}.png", (ids != 0) * 1, VOC_COLORS)
    for seed, (name, ids) in enumerate({**masks, **only_sbd, "2007_000027": rows([0] * 9, 7)}.items()):
        write_photo(top / "JPEGImages" / f"{name}.jpg", ids.shape[1], ids.shape[0], seed)
        write_text(top / "Annotations" / f"{name}.xml", "<annotation/>\n")
    lists = {"train": list(masks)[:3], "val": list(masks)[3:], "trainval": sorted(masks)}
    if test:
        lists["test"] = ["2008_000006", "2008_000011"]
        for name in lists["test"]:
            write_photo(top / "JPEGImages" / f"{name}.jpg", 18, 26, int(name[-2:]))
    for split, names in lists.items():
        write_text(top / "ImageSets/Segmentation" / f"{split}.txt", "\n".join(names) + "\n")
    if sbd:
        _sbd(root / "benchmark_RELEASE/dataset", {name: ids * 0 + 7 for name, ids in masks.items()} | only_sbd)


def _sbd(top: Path, maps) -> None:
    for seed, (name, ids) in enumerate(maps.items()):
        if name == "2007_000063":
            continue  # some images of VOC's lists are not in SBD
        write_mat(top / "cls" / f"{name}.mat", {"GTcls": _sbd_struct(ids)}, compressed=seed % 2 == 0)
        write_mat(top / "inst" / f"{name}.mat", {"GTinst": _sbd_struct((ids > 0) * np.uint8(1))})
        write_photo(top / "img" / f"{name}.jpg", ids.shape[1], ids.shape[0], seed)
    write_text(top / "train.txt", "2007_000032\n2007_000033\n2008_000008\n")
    write_text(top / "val.txt", "2007_000039\n2007_000042\n2008_000015\n")


def _sbd_struct(ids) -> dict:
    boundaries = np.empty((20, 1), dtype=object)
    for index in range(20):
        boundaries[index, 0] = csc_matrix(ids.shape, dtype=np.float64)
    present = np.unique(ids[ids > 0]).astype(np.uint8)[:, None]
    return {"Boundaries": boundaries, "Segmentation": ids.astype(np.uint8), "CategoriesPresent": present}


# --- EndoVis 2017 ------------------------------------------------------------------------------------------------------

# Part values of four instruments and of a probe on a grid of 9 x 16 cells; they overlap in rows 2 and 4.
_A, _B, _C, _D, _O = (np.zeros((9, 16), dtype=np.uint8) for _ in range(5))
_A[2, 1:7] = [10, 10, 10, 20, 20, 30]
_B[2, 3:10] = [20, 10, 30, 10, 20, 30, 30]
_C[2, 9] = 10
_C[4, 1:5] = [10, 20, 30, 30]
_D[4, 4:6] = [10, 20]
_O[2, 2] = 40
_O[6, 1:4] = 40

ENDOVIS = {
    1: {
        "Left_Prograsp_Forceps_labels": _A,
        "Maryland_Bipolar_Forceps_labels": _B,
        "Other_labels": _O,
        "Right_Prograsp_Forceps_labels": _C,
    },
    2: {"Left_Prograsp_Forceps_labels": _A, "Other_labels": _O, "Right_Prograsp_Forceps_labels": _B},
    3: {"Left_Large_Needle_Driver_labels": _A, "Right_Large_Needle_Driver_labels": _B},
    4: {
        "Large_Needle_Driver_Left_labels": _A,
        "Large_Needle_Driver_Right_labels": _B,
        "Prograsp_Forceps_labels": _C,
    },
    5: {"Bipolar_Forceps_labels": _A, "Grasping_Retractor_labels": _B, "Vessel_Sealer_labels": _C},
    6: {
        "Left_Large_Needle_Driver_labels": _A,
        "Monopolar_Curved_Scissors_labels": _B,
        "Prograsp_Forceps": _C,
        "Right_Large_Needle_Driver_labels": _D,
    },
    7: {"Left_Bipolar_Forceps": _A, "Right_Vessel_Sealer": _B},
    8: {
        "Bipolar_Forceps_labels": _A,
        "Left_Grasping_Retractor_labels": _B,
        "Monopolar_Curved_Scissors_labels": _C,
        "Right_Grasping_Retractor_labels": _D,
    },
}
ENDOVIS_FRAMES = ("000", "149", "150", "174", "175", "224")


def endovis(root: Path, size=(32, 18), frames=ENDOVIS_FRAMES, sequences=tuple(ENDOVIS), derived: bool = True) -> None:
    """Write the training archives; real frames have 1920x1080 pixels.

    In the frame at position i of ``frames``, the first instrument has the value of the shaft in cell (8, i). The mask of
    frame 000 of Left_Large_Needle_Driver_labels in sequence 3 has three channels.

    Args:
        size: (width, height), multiples of 16 and 9.
        frames: numbers of the frames.
        sequences: numbers of the sequences.
        derived: write merged maps with wrong values beside the instruments, as public preparation scripts do.
    """
    cell = np.ones((size[1] // 9, size[0] // 16), dtype=np.uint8)
    for sequence in sequences:
        top = root / f"instrument_dataset_{sequence}"
        for position, frame in enumerate(frames):
            pixels = np.full((size[1], size[0], 3), (20 * sequence, int(frame), 60), dtype=np.uint8)
            _write_fast(top / "left_frames" / f"frame{frame}.png", pixels)
            if position == 0:
                _write_fast(top / "right_frames" / f"frame{frame}.png", pixels // 2)
            for number, (folder, grid) in enumerate(ENDOVIS[sequence].items()):
                values = grid.copy()
                if number == 0:
                    values[8, position] = 10
                mask = np.kron(values, cell)
                if (sequence, frame, number) == (3, "000", 0):
                    mask = np.stack([mask] * 3, axis=-1)
                _write_fast(top / "ground_truth" / folder / f"frame{frame}.png", mask)
            if derived and sequence < 3:
                for folder, value in {"binary_labels": 255, "parts_labels": 40, "type_labels": 7}.items():
                    wrong = np.full((size[1], size[0]), value, dtype=np.uint8)
                    _write_fast(top / "ground_truth" / folder / f"frame{frame}.png", wrong)
        write_text(top / "camera_calibration.txt", "Camera-0-F: 1 1\n")
    write_text(root / "mappings.json", '{"background": 0, "shaft": 10, "wrist": 20, "claspers": 30, "probe": 40}\n')
    types = [
        "Bipolar_Forceps", "Prograsp_Forceps", "Large_Needle_Driver", "Vessel_Sealer", "Grasping_Retractor",
        "Monopolar_Curved_Scissors", "Other",
    ]  # fmt: skip
    write_text(root / "instrument_type_mapping.json", json.dumps({name: i + 1 for i, name in enumerate(types)}))


# One row of the test labels; binary, parts and types differ in values and positions.
ENDOVIS_TEST_ROWS = {
    "BinarySegmentation": [0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "PartsSegmentation": [0, 30, 100, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "TypeSegmentation": [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0],
}


def endovis_test(
    root: Path, size=(32, 18), count: int = 2, labels: str = "instrument_2017_test/instrument_2017_test"
) -> None:
    """Write the testing archives with their labels: frames from 225 on for sequences 1 to 8, from 000 on for 9 and 10.

    The first row of cells of each label map is a row of ENDOVIS_TEST_ROWS.

    Args:
        size: (width, height), multiples of 16 and 9.
        count: frames of each sequence.
        labels: folder of the labels.
    """
    cell = np.ones((size[1] // 9, size[0] // 16), dtype=np.uint8)
    for sequence in range(1, 11):
        dataset = f"instrument_dataset_{sequence}"
        first = 225 if sequence < 9 else 0
        for number in range(first, first + count):
            name = f"frame{number:03d}.png"
            pixels = np.full((size[1], size[0], 3), (20 * sequence, number % 256, 200), dtype=np.uint8)
            _write_fast(root / dataset / "left_frames" / name, pixels)
            _write_fast(root / dataset / "right_frames" / name, pixels // 2)
            for folder, row in ENDOVIS_TEST_ROWS.items():
                values = np.zeros((9, 16), dtype=np.uint8)
                values[0] = row
                _write_fast(root / labels / dataset / folder / name, np.kron(values, cell))
            rendered = np.full((size[1], size[0]), 224, dtype=np.uint8)
            _write_fast(root / labels / dataset / "TypeSegmentationRescaled" / name, rendered)
        write_text(root / dataset / "camera_calibration.txt", "Camera-0-F: 1 1\n")


def _write_fast(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, compress_level=1)
