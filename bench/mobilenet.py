"""Two mobile networks, float and INT8: in PyTorch as it comes, fused, in INT8 layers, and engines.

    python -m bench mobilenet

EfficientNet-Lite0 with its ImageNet weights and pytorchcv's MobileNetV2 with random ones, on crops
of photographs, 1 and 32 a call. Every form runs in a process of its own, in turn; closeness is that
of the output to the float model's. On a GPU the PyTorch forms run there. Returns 1 if the fused
model is slower than PyTorch's channels_last. (INT8 layers and engine agree bit for bit under the
exact reference, which the tests check; here both run their fastest kernels, whose codes may be one
apart.)
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo
from bench.results_file import options, write_results
from octavo.core.progress import TerminalProgress
from octavo.demo import images
from octavo.measure import isolated_latency
from octavo.quant import sqnr_db

BATCHES = (1, 32)
EAGER, CHANNELS_LAST, COMPILED = "PyTorch eager", "PyTorch channels_last", "torch.compile"
FUSED, INT8, INT8_COMPILED = "Octavo fuse", "Octavo INT8", "Octavo INT8, compiled"
ENGINES = {"ONNX Runtime float32": "float32", "ONNX Runtime INT8": "int8"}


def lite0() -> nn.Module:
    """EfficientNet-Lite0, pretrained."""
    return images.efficientnet_lite0()


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0 with random weights, and statistics of BatchNorm that are not all one."""
    from pytorchcv.models.mobilenetv2 import mobilenetv2_w1

    torch.manual_seed(0)
    model: nn.Module = mobilenetv2_w1(pretrained=False).eval()
    photos = torch.from_numpy(images.crops(images.CALIBRATION_PHOTOS, 32, seed=2))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(photos)  # the statistics of photographs
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "EfficientNet-Lite0": lite0,
    "MobileNetV2": mobilenet_v2,
}


def torch_call(
    network: str, form: str, folder: Path, batch: int, device: str
) -> Callable[[], object]:
    """What a process times: one form of a network in PyTorch."""
    warnings.simplefilter("ignore")
    model, x = NETWORKS[network](), _photos(batch).to(device)
    if form == FUSED:
        model = octavo.fuse(model, x[:2], verbose=False)
    elif form in (INT8, INT8_COMPILED):
        model = octavo.load_quantized(model, folder / f"{network}.safetensors")
    model = model.to(device)
    if form != EAGER:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if form in (COMPILED, INT8_COMPILED):
        model = torch.compile(model)  # type: ignore[assignment]

    def call() -> object:
        with torch.inference_mode():
            y = model(x)
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    return call


def engine_call(path: Path, batch: int) -> Callable[[], object]:
    """What a process times: an engine."""
    engine, x = octavo.load(path), _photos(batch).numpy()
    return lambda: engine(x)


def _photos(count: int) -> torch.Tensor:
    return torch.from_numpy(images.crops(images.EVALUATION_PHOTOS, count, seed=1))


def main() -> int:
    """Runs the comparison, prints tables and writes bench/results/mobilenet.json."""
    asked = options(__doc__, "five")
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"device": device}
    with tempfile.TemporaryDirectory() as name:
        for network in NETWORKS:
            folder = Path(name)
            closeness = _prepare(network, folder)
            latency = {
                f"batch {batch}": _latency(network, folder, batch, device, asked.rounds)
                for batch in BATCHES
            }
            results[network] = {"closeness": closeness, "latency_ms": latency}
    print(write_results("mobilenet", results, out=asked.out))
    broken = [problem for network in NETWORKS for problem in _problems(network, results[network])]
    print("\n".join(broken) or "all limits kept")
    return int(bool(broken))


def _prepare(network: str, folder: Path) -> dict[str, Any]:
    """Makes the INT8 forms of one table, and compares all forms with the float model."""
    model, x = NETWORKS[network](), _photos(120)
    photos = images.crops(images.CALIBRATION_PHOTOS, 96, seed=0)
    batches = [torch.from_numpy(photos[i : i + 32]) for i in range(0, 96, 32)]
    table = octavo.calibrate(model, batches, verbose=False)
    recipe = octavo.Int8Static(smooth=None)
    int8 = octavo.quantize(model, recipe, table, example_inputs=batches[0], verbose=False)
    octavo.save_quantized(int8, folder / f"{network}.safetensors")
    outputs: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        reference = model(x)
        outputs[FUSED] = octavo.fuse(model, x[:2], verbose=False)(x)
        outputs[INT8] = int8(x)
    for name, precision in ENGINES.items():
        given = table if precision == "int8" else None
        path = folder / f"{network} {precision}.octavo"
        octavo.build(
            model,
            calibration=given,
            example_inputs=batches[0],
            precision=precision,
            output=path,
            verbose=False,
        )
        with octavo.load(path) as engine:
            outputs[name] = torch.as_tensor(engine(x))
    rows: dict[str, Any] = {
        name: {
            "sqnr_db": round(sqnr_db(reference, y), 2),
            "top1_agreement": round(float((y.argmax(1) == reference.argmax(1)).float().mean()), 4),
        }
        for name, y in outputs.items()
    }
    between = sqnr_db(outputs["ONNX Runtime INT8"], outputs[INT8])
    rows["INT8 layers against INT8 engine"] = {"sqnr_db": round(min(between, 999.0), 2)}
    for name, row in rows.items():
        print(f"{network}: {name:<32} {row['sqnr_db']:7.1f} dB", flush=True)
    return {"photos": len(x), **rows}


def _latency(
    network: str, folder: Path, batch: int, device: str, rounds: int
) -> dict[str, dict[str, float]]:
    forms = (EAGER, CHANNELS_LAST, COMPILED, FUSED, INT8, INT8_COMPILED)
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        form: functools.partial(torch_call, network, form, folder, batch, device) for form in forms
    }
    for name, precision in ENGINES.items():
        path = folder / f"{network} {precision}.octavo"
        makers[name] = functools.partial(engine_call, path, batch)
    found = isolated_latency(makers, rounds=rounds, progress=TerminalProgress())
    for name, latency in found.items():
        print(
            f"{network}, {batch:>2} a call: {name:<24} {latency.p50:8.2f} ms "
            f"({latency.p20:.2f} to {latency.p80:.2f})",
            flush=True,
        )
    return {name: asdict(latency) for name, latency in found.items()}


def _problems(network: str, rows: dict[str, Any]) -> list[str]:
    found = []
    for batch, latency in rows["latency_ms"].items():
        ratio = latency[FUSED]["p50"] / latency[CHANNELS_LAST]["p50"]
        if ratio > 1:
            found.append(f"BROKEN {network}, {batch}: fused takes {ratio:.3f} of channels_last")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
