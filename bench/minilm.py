"""A sentence-embedding model with its Linear layers in INT8, beside float and what torch offers.

    python -m bench minilm

Latency of all-MiniLM-L6-v2 on real sentences, batch 8, 128 tokens, each form in a process of its
own, in turn (eager ones also in one process, where they share a heap); closeness of the embeddings
of sentences that calibration has not seen. torchao is measured where it is installed. Returns 1 if
a limit is broken.
"""

from __future__ import annotations

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import octavo
from bench.results_file import options, write_results
from octavo import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.core.progress import TerminalProgress
from octavo.demo import text
from octavo.measure import interleaved_latency, isolated_latency
from octavo.quant import sqnr_db

FLOAT, OURS = "PyTorch float32", "Octavo Int8Dynamic"
TORCH, TORCHAO = "torch quantize_dynamic", "torchao int8 dynamic"
LIMITS = {
    "eager: times as fast as float": 3.0,
    "eager: times as fast as quantize_dynamic": 1.2,
    "eager, one process: times as fast as float": 3.0,
    "eager, one process: times as fast as quantize_dynamic": 1.2,
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
    model = text.minilm()
    texts = text.sentences()
    closeness = _closeness(model, texts[::2], texts[1::2])
    eager, compiled = (FLOAT, TORCH, OURS), (FLOAT, TORCHAO, OURS)
    if importlib.util.find_spec("torchao") is None:
        compiled = (FLOAT, OURS)
    latency = {
        "eager": _latency(eager, False, asked.rounds),
        "eager, one process": _latency(eager, False, asked.rounds, apart=False),
        "compiled": _latency(compiled, True, asked.rounds),
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
    batches = [text.tokenize(calibration[i : i + 8]) for i in range(0, len(calibration), 8)]
    tokens = [text.tokenize(evaluation[i : i + 8]) for i in range(0, len(evaluation), 8)]
    recipes: dict[str, tuple[Any, Any]] = {
        "Int8Dynamic": (Int8Dynamic(), None),
        "Int8Dynamic, smooth auto": (Int8Dynamic(smooth="auto"), batches),
        "Int8Static": (Int8Static(), batches),
        "Int8WeightOnly": (Int8WeightOnly(), None),
        "Int4WeightOnly": (Int4WeightOnly(), None),
        "Int4WeightOnly, GPTQ": (Int4WeightOnly(), batches),
    }
    reference = torch.cat([text.embed(model, part) for part in tokens])

    def compare(name: str, quantized: nn.Module, seconds: float) -> dict[str, float]:
        found = torch.cat([text.embed(quantized, part) for part in tokens])
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
    peer = _quantize_dynamic(text.minilm())
    rows[TORCH] = compare(TORCH, peer, time.perf_counter() - start)
    if importlib.util.find_spec("torchao") is None:
        print("torchao is not installed and is left out; pip install torchao")
    else:
        start = time.perf_counter()
        peer = _torchao(text.minilm())
        rows[TORCHAO] = compare(TORCHAO, peer, time.perf_counter() - start)
    return {"sentences": len(evaluation), **rows}


def _quantize_dynamic(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return made


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _ours(model: nn.Module) -> nn.Module:
    return octavo.quantize(model, Int8Dynamic(), verbose=False)


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FLOAT: lambda model: model,
    TORCH: _quantize_dynamic,
    OURS: _ours,
    TORCHAO: _torchao,
}


def model_call(form: str, compiled: bool) -> Callable[[], object]:
    """What is timed: one form of the model, on eight texts of 128 tokens."""
    warnings.simplefilter("ignore")
    model, texts = FORMS[form](text.minilm()), text.sentences()
    batch = text.tokenize([" ".join(texts[i * 6 : i * 6 + 6]) for i in range(8)], length=128)
    if compiled:
        model = torch.compile(model)  # type: ignore[assignment]

    def call() -> object:
        with torch.no_grad():
            return model(**batch)

    return call


def _latency(
    forms: Sequence[str], compiled: bool, rounds: int, *, apart: bool = True
) -> dict[str, dict[str, float]]:
    progress = TerminalProgress()
    if apart:
        makers = {form: functools.partial(model_call, form, compiled) for form in forms}
        found = isolated_latency(makers, rounds=rounds, progress=progress)
    else:
        calls = {form: model_call(form, compiled) for form in forms}
        found = interleaved_latency(calls, rounds=rounds, progress=progress)
    how = ("compiled" if compiled else "eager") + ("" if apart else ", one process")
    for name, latency in found.items():
        times = f"{latency.p50:8.1f} ms ({latency.p20:.1f} to {latency.p80:.1f})"
        print(f"{how}: {name:<26} {times}", flush=True)
    return {name: asdict(latency) for name, latency in found.items()}


def _figures(latency: dict[str, Any], closeness: dict[str, Any]) -> dict[str, float]:
    eager, compiled = latency["eager"], latency["compiled"]

    def ratio(rows: dict[str, Any], name: str) -> float:
        return round(rows[name]["p50"] / rows[OURS]["p50"], 3)

    shared = latency["eager, one process"]
    figures = {
        "eager: times as fast as float": ratio(eager, FLOAT),
        "eager: times as fast as quantize_dynamic": ratio(eager, TORCH),
        "eager, one process: times as fast as float": ratio(shared, FLOAT),
        "eager, one process: times as fast as quantize_dynamic": ratio(shared, TORCH),
        "compiled: times as fast as float": ratio(compiled, FLOAT),
    }
    if TORCHAO in compiled:
        figures["compiled: times as fast as torchao"] = ratio(compiled, TORCHAO)
    for name in ("Int8Dynamic", "Int8Static", "Int4WeightOnly, GPTQ"):
        figures[f"cosine: {name}"] = closeness[name]["cosine_mean"]
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
