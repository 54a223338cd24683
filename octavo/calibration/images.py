"""Pictures in a folder, as the arrays that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from octavo.core.arrays import Array
from octavo.core.errors import CalibrationError, InputError, MissingDependencyError
from octavo.core.results import TensorSpec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PRESETS", "ImageFolder", "Preset"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class Preset:
    """How a picture becomes an input: a centre crop of the model's size, (value - mean) / std.

    Attributes:
        mean: of the red, green and blue values in 0..255.
        std: likewise.
        crop_first: cut the centre out and resize that, instead of resizing the picture and
            cutting the centre out.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_first: bool = False


def _every_channel(value: float) -> tuple[float, float, float]:
    return (value, value, value)


PRESETS: Mapping[str, Preset] = {
    "imagenet": Preset(
        mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
    ),
    "efficientnet-lite": Preset(_every_channel(127.0), _every_channel(128.0), crop_first=True),
    "unit": Preset(_every_channel(0.0), _every_channel(255.0)),
    "minus-one-one": Preset(_every_channel(127.5), _every_channel(127.5)),
}
"""Preprocessing by name.

- "imagenet": as torchvision evaluates its classifiers. The short side is resized (bilinear,
  antialiased) to 8/7 of the model's size, 256 for 224, the centre is cut out, and values are
  normalized by the mean and standard deviation of ImageNet.
- "efficientnet-lite": as TensorFlow's EfficientNet is evaluated. A centred square with a border of
  32 pixels less is cut out and resized (bicubic); values are (x - 127) / 128.
- "unit": the crop of "imagenet"; values 0..1.
- "minus-one-one": the crop of "imagenet"; values -1..1.
"""

CROP_PADDING = 32


class ImageFolder:
    """The pictures of a folder and its sub-folders, sorted by path.

    Args:
        folder: where to look for .png, .jpg, .jpeg, .bmp and .webp files; hidden ones are ignored.
        specs: the model's inputs: one, float [N, 3, H, W] or [N, H, W, 3] of fixed H and W.
        preset: a name in `PRESETS`.
        limit: take at most so many, evenly spaced, so that every class keeps its share.

    Attributes:
        paths: the pictures.
        samples: how many there are.
        labels: int64 class of each picture, where every picture lies in a sub-folder: the
            sub-folder's name where all names are numbers, else its place among the sorted names;
            None where pictures lie side by side or in a single sub-folder that is no number.

    Raises:
        CalibrationError: no pictures.
        InputError: no such preset, or a model that does not take a picture.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(
        self, folder: Path, specs: Sequence[TensorSpec], preset: str | None, limit: int | None
    ) -> None:
        if preset is None or preset not in PRESETS:
            asked = "no preset was given" if preset is None else f"there is no preset {preset!r}"
            raise InputError(
                f"{folder} is a folder of images and {asked}; choose how the model was trained to "
                f"see them: preset={', '.join(map(repr, PRESETS))}"
            )
        self._preset = PRESETS[preset]
        self._spec = specs[0]
        self._first, self._height, self._width = _image_shape(specs, folder)
        self._image = _pillow()
        found = _find(folder)
        labels = _labels([path.relative_to(folder) for path in found])
        kept = min(len(found), limit or len(found))
        places = [index * len(found) // kept for index in range(kept)]
        self.paths = [found[place] for place in places]
        self.samples = len(self.paths)
        self.labels = None if labels is None else labels[places]

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Decodes pictures `start` to `stop`: input name -> array.

        Raises:
            InputError: a file that is damaged or has more than 8 bits a channel; names it.
        """
        arrays = [self._decode(path) for path in self.paths[start:stop]]
        return {self._spec.name: np.stack(arrays)}

    def _decode(self, path: Path) -> Array:
        try:
            with self._image.open(path) as file:
                if file.mode.startswith(("I", "F")):
                    raise InputError(
                        f"{path} has more than 8 bits a channel (mode {file.mode}), which Pillow "
                        "would clip; convert it to 8 bits"
                    )
                picture = file.convert("RGB")
        except InputError:
            raise
        except Exception as error:  # each format of Pillow raises its own kinds
            raise InputError(
                f"{path} is not a readable image ({type(error).__name__}: {error}); remove or "
                "replace it"
            ) from error
        values: Array = np.asarray(self._crop(picture), dtype=np.float32)
        preset = self._preset
        values = (values - np.asarray(preset.mean)) / np.asarray(preset.std)
        if self._first:
            values = values.transpose(2, 0, 1)
        return values.astype(self._spec.dtype)

    def _crop(self, picture: Image) -> Image:
        """The centre of a picture in the model's size."""
        resampling = self._image.Resampling
        width, height = picture.size
        size = (self._width, self._height)
        if self._preset.crop_first:
            scale = min(
                height / (self._height + CROP_PADDING), width / (self._width + CROP_PADDING)
            )
            across, down = max(1, int(self._width * scale)), max(1, int(self._height * scale))
            left, top = (width - across + 1) // 2, (height - down + 1) // 2
            part = picture.crop((left, top, left + across, top + down))
            return part.resize(size, resampling.BICUBIC)
        down, across = round(self._height * 8 / 7), round(self._width * 8 / 7)
        if down * width >= across * height:
            across = int(down * width / height)
        else:
            down = int(across * height / width)
        left, top = round((across - self._width) / 2), round((down - self._height) / 2)
        # The crop in the picture's own pixels: the same values as resizing all of a picture of
        # any shape, without ever holding it.
        box = (
            left * width / across,
            top * height / down,
            (left + self._width) * width / across,
            (top + self._height) * height / down,
        )
        return picture.resize(size, resampling.BILINEAR, box=box)


def _image_shape(specs: Sequence[TensorSpec], folder: Path) -> tuple[bool, int, int]:
    """Whether channels come first, and the height and width of the model's only input."""
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise InputError(
            f"{folder} is a folder of images and the model has {len(specs)} inputs ({names}); "
            "give their arrays in a .npz or .safetensors file"
        )
    spec = specs[0]
    shape = spec.shape
    for first, axes in ((True, (1, 2, 3)), (False, (3, 1, 2))):
        if len(shape) != 4 or shape[axes[0]] != 3 or spec.dtype not in ("float16", "float32"):
            continue
        height, width = shape[axes[1]], shape[axes[2]]
        if isinstance(height, int) and isinstance(width, int):
            return first, height, width
    raise InputError(
        f"{folder} is a folder of images, and the model's input {spec} is not float32 or float16 "
        "of shape [N, 3, H, W] or [N, H, W, 3] with fixed H and W; give arrays in a .npy file, or "
        "export the model with a fixed image size"
    )


def _pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingDependencyError(
            f"reading images needs Pillow, which cannot be imported ({error}); install it with: "
            'pip install "octavo[images]"'
        ) from error
    return PIL.Image


def _find(folder: Path) -> list[Path]:
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if not found:
        raise CalibrationError(
            f"there are no images in {folder} or below it; Octavo reads "
            f"{', '.join(sorted(SUFFIXES))} files"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _labels(paths: Sequence[Path]) -> Array | None:
    if any(len(path.parts) < 2 for path in paths):
        return None
    names = sorted({path.parts[0] for path in paths})
    if all(name.isascii() and name.isdecimal() for name in names):
        return np.array([int(path.parts[0]) for path in paths], dtype=np.int64)
    if len(names) < 2:
        return None
    index = {name: place for place, name in enumerate(names)}
    return np.array([index[path.parts[0]] for path in paths], dtype=np.int64)
