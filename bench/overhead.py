"""Time that small INT8 layers take outside their C, in microseconds, as JSON: for `bench.beside`.

    PYTHONPATH=CHECKOUT python bench/overhead.py

Each call is timed, and so is the C in it, with the same arguments: the functions of our C files,
and oneDNN's convolution. One thread; the layers are those of a transformer of width 384 and of the
blocks of EfficientNet-Lite0, for one token and one picture.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from octavo.layers import Int8Conv2d, Int8Linear
from octavo.quant import QParams

BLOCKS = {
    "project 32 -> 16 at 112": (32, 16, 112, "none"),
    "project 96 -> 24 at 56": (96, 24, 56, "none"),
    "project 144 -> 40 at 28": (144, 40, 28, "none"),
    "expand 192 -> 1152 at 7": (192, 1152, 7, "relu6"),
    "project 1152 -> 320 at 7": (1152, 320, 7, "none"),
}
"""1 x 1 convolutions: channels, the side of the picture, and what follows."""


def main() -> int:
    """Measures and prints."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, float] = {}
    with torch.no_grad():
        for name, options in (("dynamic", {}), ("static", {"input_scale": torch.tensor(0.02)})):
            linear = Int8Linear.from_float(nn.Linear(384, 384), **options).eval()
            found[f"Int8Linear {name}, 1 x 384 -> 384"] = outside(linear, torch.randn(1, 384))
        qparams = QParams(torch.tensor(0.03), torch.tensor(0), "int8")
        for name, (inputs, outputs, side, activation) in BLOCKS.items():
            layer = Int8Conv2d.from_float(
                nn.Conv2d(inputs, outputs, 1), qparams, qparams, activation=activation,
                in_codes=True,
            )  # fmt: skip
            codes = torch.randint(-128, 127, (1, inputs, side, side), dtype=torch.int8)
            last = codes.contiguous(memory_format=torch.channels_last)
            found[f"Int8Conv2d {name}"] = outside(layer.eval(), last)
    print(json.dumps(found))
    return 0


def outside(layer: nn.Module, x: torch.Tensor) -> float:
    """Microseconds of a call, less those of the C that it runs."""
    for _ in range(50):  # weights are packed, and a shape is known when it is seen again
        layer(x)
    inside: list[float] = []

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            inside.append(microseconds(lambda: run(*given)))
            return run(*given)

        return call

    real = torch.ops.onednn.qconv2d_pointwise
    kept = [(one, name, getattr(one, name)) for one in libraries() for name in one.functions]
    for one, name, run in kept:
        setattr(one, name, timed(run))
    torch.ops.onednn.qconv2d_pointwise = type("Timed", (), {"default": timed(real.default)})
    try:
        layer(x)
    finally:
        torch.ops.onednn.qconv2d_pointwise = real
        for one, name, run in kept:
            setattr(one, name, run)
    return microseconds(lambda: layer(x)) - sum(inside)


def libraries() -> Iterator[Any]:
    """The C files that are loaded, wherever a version of Octavo has them."""
    for module in list(sys.modules.values()):
        found = getattr(module, "LIBRARY", None)
        if type(found).__name__ == "Library":
            yield found


def microseconds(call: Callable[[], object], calls: int = 200, rounds: int = 15) -> float:
    """Median of the rounds' means."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    raise SystemExit(main())
