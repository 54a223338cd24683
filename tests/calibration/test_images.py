from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import octavo.calibration.images as module
from octavo.calibration.data import Batches, load_data
from octavo.calibration.images import PRESETS
from octavo.core.errors import CalibrationError, InputError, MissingDependencyError, OctavoWarning
from octavo.core.results import TensorSpec

PICTURE = (TensorSpec("image", ("batch", 3, 8, 8), "float32"),)


def joined(batches: Batches, name: str = "image") -> np.ndarray:
    return np.concatenate([batch[name] for batch in batches])


def picture(path: Path, colour: Any = (10, 20, 30), size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp", "PNG"])
@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("unit", [10 / 255, 20 / 255, 30 / 255]),
        ("minus-one-one", [10 / 127.5 - 1, 20 / 127.5 - 1, 30 / 127.5 - 1]),
        ("efficientnet-lite", [-117 / 128, -107 / 128, -97 / 128]),
        (
            "imagenet",
            [
                (10 / 255 - 0.485) / 0.229,
                (20 / 255 - 0.456) / 0.224,
                (30 / 255 - 0.406) / 0.225,
            ],
        ),
    ],
)
def test_presets_normalize(tmp_path: Path, suffix: str, preset: str, expected: list[float]) -> None:
    picture(tmp_path / f"a.{suffix}")
    (batch,) = load_data(tmp_path, PICTURE, preset=preset)
    x = batch["image"]
    assert x.shape == (1, 3, 8, 8)
    assert x.dtype == np.float32
    lossy = suffix in ("jpg", "jpeg", "webp")
    tolerance = 6 / 50 if lossy else 1e-6
    np.testing.assert_allclose(x[0].mean((1, 2)), expected, atol=tolerance)


def test_every_preset_is_described() -> None:
    source = Path(module.__file__).read_text()
    assert all(f'- "{name}":' in source for name in PRESETS)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layout_and_type_follow_the_model(tmp_path: Path, layout: str, dtype: str) -> None:
    noise(40, 30).save(tmp_path / "a.png")
    shape = ("n", 3, 6, 8) if layout == "nchw" else ("n", 6, 8, 3)
    (batch,) = load_data(tmp_path, [TensorSpec("i", shape, dtype)], preset="unit")
    (plain,) = load_data(tmp_path, [TensorSpec("i", ("n", 3, 6, 8), "float32")], preset="unit")
    got = batch["i"] if layout == "nchw" else batch["i"].transpose(0, 3, 1, 2)
    assert batch["i"].dtype == dtype
    np.testing.assert_allclose(got, plain["i"], atol=0 if dtype == "float32" else 1e-3)


SIZES = [(256, 256), (300, 200), (200, 300), (640, 480), (31, 57), (224, 224), (57, 31)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", [224, 32])
def test_imagenet_is_resize_of_the_short_side_then_centre_crop(
    tmp_path: Path, size: tuple[int, int], target: int
) -> None:
    image = noise(*size)
    image.save(tmp_path / "a.png")
    spec = [TensorSpec("i", ("n", 3, target, target), "float32")]
    (batch,) = load_data(tmp_path, spec, preset="unit")
    # as torchvision's Resize and CenterCrop define it
    short = round(target * 256 / 224)
    width, height = size
    if width <= height:
        whole = (short, int(short * height / width))
    else:
        whole = (int(short * width / height), short)
    resized = image.resize(whole, Image.Resampling.BILINEAR)
    left, top = round((whole[0] - target) / 2), round((whole[1] - target) / 2)
    crop = np.asarray(resized.crop((left, top, left + target, top + target)))
    difference = np.abs(batch["i"][0] * 255 - crop.transpose(2, 0, 1))
    assert difference.max() <= 1.01, "more than the rounding of one step"
    assert difference.mean() < 0.05


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", [224, 64])
def test_efficientnet_lite_is_tensorflows_padded_centre_crop(
    tmp_path: Path, size: tuple[int, int], target: int
) -> None:
    image = noise(*size)
    image.save(tmp_path / "a.png")
    spec = [TensorSpec("i", ("n", 3, target, target), "float32")]
    (batch,) = load_data(tmp_path, spec, preset="efficientnet-lite")
    width, height = size
    side = int(target / (target + 32) * min(width, height))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    part = image.crop((left, top, left + side, top + side))
    expected = np.asarray(part.resize((target, target), Image.Resampling.BICUBIC), np.float32)
    np.testing.assert_allclose(batch["i"][0], (expected.transpose(2, 0, 1) - 127) / 128, atol=1e-6)


def test_pictures_that_are_not_square_fill_models_that_are_not(tmp_path: Path) -> None:
    for index, size in enumerate([(500, 100), (100, 500), (1, 3), (3, 1), (1, 1)]):
        noise(*size).save(tmp_path / f"{index}.png")
    Image.new("L", (60000, 2)).save(tmp_path / "strip.png")
    for preset in PRESETS:
        spec = [TensorSpec("i", ("n", 3, 16, 48), "float32")]
        assert joined(load_data(tmp_path, spec, preset=preset), "i").shape == (6, 3, 16, 48)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("L", (20, 20), 255).convert(mode).save(
        tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    )
    (batch,) = load_data(tmp_path, PICTURE, preset="unit")
    np.testing.assert_allclose(batch["image"], 1, atol=0.02)


def test_sixteen_bit_pictures_are_refused_because_pillow_clips_them(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep.png")
    batches = load_data(tmp_path, PICTURE, preset="unit")
    with pytest.raises(InputError, match=r"deep\.png has more than 8 bits a channel .* to 8 bits"):
        list(batches)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0"])
def test_unreadable_pictures_are_named_when_it_is_their_turn(
    tmp_path: Path, content: bytes
) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    batches = iter(load_data(tmp_path, PICTURE, preset="unit", batch_size=1))
    assert next(batches)["image"].shape == (1, 3, 8, 8)
    with pytest.raises(InputError, match=r"b\.png is not a readable image .* remove or replace"):
        next(batches)


def test_truncated_pictures_are_named(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "bmp", "webp"):
        path = tmp_path / f"cut.{suffix}"
        noise(200, 200).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=rf"cut\.{suffix} is not a readable image"):
            list(load_data(tmp_path, PICTURE, preset="unit"))
        path.unlink()


def test_pictures_are_found_below_sorted_and_hidden_ones_ignored(tmp_path: Path) -> None:
    for index, name in enumerate(["b/2.png", "a/z/1.png", "a/0.jpg", "c.png"]):
        picture(tmp_path / name, (index, index, index))
    picture(tmp_path / "a" / "._0.jpg")
    picture(tmp_path / ".checkpoints" / "0.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    batches = load_data(tmp_path, PICTURE, preset="unit", batch_size=3)
    levels = (joined(batches)[:, 0, 0, 0] * 255).round().astype(int).tolist()
    assert levels == [2, 1, 0, 3]
    assert batches.labels is None, "c.png lies in no class"
    assert [len(batch["image"]) for batch in batches] == [3, 1]


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for name in ["dog/1.png", "cat/1.png", "cat/2.png", "eel/x/1.png"]:
        picture(tmp_path / name)
    labels = load_data(tmp_path, PICTURE, preset="unit").labels
    assert labels is not None
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 0, 1, 2]


def test_folders_called_by_number_are_that_class(tmp_path: Path) -> None:
    for name in ["2/a.png", "10/a.png", "281/a.png"]:
        picture(tmp_path / name)
    labels = load_data(tmp_path, PICTURE, preset="unit").labels
    assert labels is not None
    assert labels.tolist() == [10, 2, 281], "sorted as text, '10' comes before '2'"


def test_a_single_folder_is_no_class(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    assert load_data(tmp_path, PICTURE, preset="unit").labels is None


def test_a_limit_keeps_every_class(tmp_path: Path) -> None:
    for index in range(5):
        for name in "abcd":
            picture(tmp_path / name / f"{index}.png")
    batches = load_data(tmp_path, PICTURE, preset="unit", limit=8)
    assert batches.samples == 8
    assert batches.labels is not None
    assert np.bincount(batches.labels).tolist() == [2, 2, 2, 2]
    assert load_data(tmp_path, PICTURE, preset="unit", limit=99).samples == 20


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there are no images in .*\.png, \.webp files"):
        load_data(tmp_path, PICTURE, preset="unit")
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"no preset was given; choose .*'efficientnet-lite'"):
        load_data(tmp_path, PICTURE)
    with pytest.raises(InputError, match="there is no preset 'imagnet'; choose"):
        load_data(tmp_path, PICTURE, preset="imagnet")
    with pytest.raises(InputError, match=r"the model has 2 inputs \(ids, mask\); give their"):
        load_data(
            tmp_path,
            [TensorSpec("ids", ("n", 4), "int64"), TensorSpec("mask", ("n", 4), "int64")],
            preset="unit",
        )
    for shape, dtype in [
        (("n", 3, "h", "w"), "float32"),
        (("n", 1, 8, 8), "float32"),
        (("n", 3, 8), "float32"),
        (("n", 3, 8, 8), "uint8"),
    ]:
        with pytest.raises(InputError, match="is not float32 or float16 of shape"):
            load_data(tmp_path, [TensorSpec("i", shape, dtype)], preset="unit")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "octavo\[images\]"'):
        load_data(tmp_path, PICTURE, preset="unit")


def test_fixed_batches_of_pictures(tmp_path: Path) -> None:
    for index in range(5):
        picture(tmp_path / f"{index}.png")
    spec = [TensorSpec("i", (2, 3, 8, 8), "float32")]
    with pytest.warns(OctavoWarning, match="the last 1 of 5 samples"):
        batches = load_data(tmp_path, spec, preset="unit")
    assert [batch["i"].shape[0] for batch in batches] == [2, 2]
