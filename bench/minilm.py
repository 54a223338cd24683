"""A sentence-embedding model with its Linear layers in INT8, beside float and what torch offers.

    python -m bench minilm

Latency of all-MiniLM-L6-v2 on real sentences, batch 8, 128 tokens, in one process and in turn;
closeness of the embeddings of sentences that calibration has not seen. torchao is measured where
it is installed. Returns 1 if a limit is broken.
"""

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import octavo
from bench.results_file import options, write_results
from octavo import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.core.progress import TerminalProgress
from octavo.measure import interleaved_latency
from octavo.pipelines import demo_text
from octavo.quant import sqnr_db

FLOAT, OURS = "PyTorch float32", "Octavo Int8Dynamic"
TORCH, TORCHAO = "torch quantize_dynamic", "torchao int8 dynamic"
LIMITS = {
    "eager: times as fast as float": 3.0,
    "eager: times as fast as quantize_dynamic": 1.2,
    "compiled: times as fast as float": 2.5,
    "compiled: times as fast as torchao": 1.0,
    "cosine: Int8Dynamic": 0.997,
    "cosine: Int8Static": 0.99,
    "cosine: Int4WeightOnly, GPTQ": 0.97,
}


def main() -> int:
    """Runs the comparison, prints a table and writes bench/results/minilm.json."""
    asked = options(__doc__, "five")
    warnings.simplefilter("ignore")
    model = demo_text.minilm()
    texts = demo_text.sentences()
    closeness = _closeness(model, texts[::2], texts[1::2])
    batch = demo_text.tokenize([" ".join(texts[i * 6 : i * 6 + 6]) for i in range(8)], length=128)
    ours = octavo.quantize(model, Int8Dynamic(), verbose=False)
    latency = {
        "eager": _latency(
            {FLOAT: model, TORCH: _quantize_dynamic(model), OURS: ours}, batch, asked.rounds
        ),
        "compiled": _latency(_compiled(model, ours), batch, asked.rounds),
    }
    figures = _figures(latency, closeness)
    results = {"closeness": closeness, "latency_ms": latency, "figures": figures}
    print(write_results("minilm", results, out=asked.out))
    for name, limit in LIMITS.items():
        found = figures.get(name)
        state = "absent" if found is None else "kept" if found >= limit else "BROKEN"
        print(f"{state:<7}{name}: {'-' if found is None else f'{found:.4g}'}, at least {limit}")
    return int(any(figures.get(name, limit) < limit for name, limit in LIMITS.items()))


def _closeness(model: nn.Module, calibration: list[str], evaluation: list[str]) -> dict[str, Any]:
    """How close the embeddings of each recipe are to those in float."""
    batches = [demo_text.tokenize(calibration[i : i + 8]) for i in range(0, len(calibration), 8)]
    tokens = [demo_text.tokenize(evaluation[i : i + 8]) for i in range(0, len(evaluation), 8)]
    recipes: dict[str, tuple[Any, Any]] = {
        "Int8Dynamic": (Int8Dynamic(), None),
        "Int8Dynamic, smooth auto": (Int8Dynamic(smooth="auto"), batches),
        "Int8Static": (Int8Static(), batches),
        "Int8WeightOnly": (Int8WeightOnly(), None),
        "Int4WeightOnly": (Int4WeightOnly(), None),
        "Int4WeightOnly, GPTQ": (Int4WeightOnly(), batches),
    }
    reference = torch.cat([demo_text.embed(model, part) for part in tokens])

    def compare(name: str, quantized: nn.Module, seconds: float) -> dict[str, float]:
        found = torch.cat([demo_text.embed(quantized, part) for part in tokens])
        cosine = torch.cosine_similarity(reference.double(), found.double())
        row = {
            "cosine_mean": round(float(cosine.mean()), 5),
            "cosine_min": round(float(cosine.min()), 5),
            "sqnr_db": round(sqnr_db(reference, found), 2),
            "seconds": round(seconds, 1),
        }
        print(
            f"{name:<26} cosine {row['cosine_mean']:.4f}, least {row['cosine_min']:.4f}, "
            f"{row['sqnr_db']:.1f} dB, made in {seconds:.1f} s",
            flush=True,
        )
        return row

    rows = {}
    for name, (recipe, data) in recipes.items():
        start = time.perf_counter()
        quantized = octavo.quantize(model, recipe, data, verbose=False)
        rows[name] = compare(name, quantized, time.perf_counter() - start)
    start = time.perf_counter()
    rows[TORCH] = compare(TORCH, _quantize_dynamic(model), time.perf_counter() - start)
    if importlib.util.find_spec("torchao") is None:
        print("torchao is not installed and is left out; pip install torchao")
    else:
        start = time.perf_counter()
        rows[TORCHAO] = compare(TORCHAO, _torchao(model), time.perf_counter() - start)
    return {"sentences": len(evaluation), **rows}


def _quantize_dynamic(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
    )
    return made


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = copy.deepcopy(model)
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return made


def _compiled(model: nn.Module, ours: nn.Module) -> dict[str, nn.Module]:
    models = {FLOAT: model, OURS: ours}
    if importlib.util.find_spec("torchao") is not None:
        models[TORCHAO] = _torchao(model)
    return {name: torch.compile(each) for name, each in models.items()}  # type: ignore[misc]


def _latency(
    models: dict[str, nn.Module], batch: dict[str, torch.Tensor], rounds: int
) -> dict[str, dict[str, float]]:
    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: model(**batch)

    with torch.no_grad():
        found = interleaved_latency(
            {name: call(model) for name, model in models.items()},
            rounds=rounds,
            progress=TerminalProgress(),
        )
    for name, latency in found.items():
        print(f"{name:<26} {latency.p50:8.1f} ms ({latency.p20:.1f} to {latency.p80:.1f})")
    return {name: asdict(latency) for name, latency in found.items()}


def _figures(latency: dict[str, Any], closeness: dict[str, Any]) -> dict[str, float]:
    eager, compiled = latency["eager"], latency["compiled"]

    def ratio(rows: dict[str, Any], name: str) -> float:
        return round(rows[name]["p50"] / rows[OURS]["p50"], 3)

    figures = {
        "eager: times as fast as float": ratio(eager, FLOAT),
        "eager: times as fast as quantize_dynamic": ratio(eager, TORCH),
        "compiled: times as fast as float": ratio(compiled, FLOAT),
    }
    if TORCHAO in compiled:
        figures["compiled: times as fast as torchao"] = ratio(compiled, TORCHAO)
    for name in ("Int8Dynamic", "Int8Static", "Int4WeightOnly, GPTQ"):
        figures[f"cosine: {name}"] = closeness[name]["cosine_mean"]
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
