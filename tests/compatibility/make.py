"""Writes the files of tests/compatibility/0.1; run by Octavo 0.1 (commit f78b620), once:

python tests/compatibility/make.py tests/compatibility/0.1
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from old_models import Images, Tokens, images, settled, tokens

import octavo
from octavo import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.kernels import use_backend


def main(folder: Path) -> None:
    """Every kind of file, and what the models in them gave."""
    expected = {}
    torch.set_grad_enabled(False)
    text, picture = settled(Tokens()), settled(Images())
    data = [tokens(seed) for seed in range(3)]
    quantized = octavo.quantize(
        text,
        Int8Dynamic(),
        data,
        include=["*"],
        overrides={
            "second": Int8Static("minmax", smooth=0.5),
            "narrow": Int4WeightOnly(16),
            "wide": Int8WeightOnly(),
        },
        verbose=False,
    )
    octavo.save_quantized(quantized, folder / "tokens.safetensors")
    table = octavo.calibrate(
        picture,
        [images(seed) for seed in range(3)],
        observer="minmax",
        equalization=True,
        bias_correction=True,
        verbose=False,
    )
    table.save(folder / "images.json")
    graph = octavo.quantize(
        picture, Int8Static(), table, example_inputs=images(0), include=["*"], verbose=False
    )
    octavo.save_quantized(graph, folder / "images.safetensors")
    engine = octavo.build(
        picture, example_inputs=images(0), calibration=table, output=folder / "images.octavo",
        verbose=False,
    )  # fmt: skip
    with use_backend("reference"):
        expected["images"] = graph(images(9)).numpy()
    with use_backend("auto"):
        expected["tokens"] = quantized(tokens(9)).numpy()
    expected["engine"] = engine(images(9).numpy())
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
