"""INT8 LSTM and GRU on a CPU, beside PyTorch's dynamic quantization and float.

    python -m bench recurrent                  # writes bench/results/recurrent.json
    python -m bench recurrent --hidden 256 --batch 1 --out DIR   # some of the cases

First a character model of each kind is trained on real text, to show what quantization costs a
trained network: SQNR of the layer's output and perplexity on held-out text. Then layers of random
weights are timed, each in a process of its own, in turn; a case is timed only after its output is
checked.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.recurrent_text import Text, held_out, trained
from bench.results_file import write_results
from octavo.layers.recurrent.int8 import Int8GRU, Int8LSTM
from octavo.measure import isolated_latency
from octavo.quant import sqnr_db

KINDS: dict[str, tuple[type[nn.RNNBase], Any]] = {
    "LSTM": (nn.LSTM, Int8LSTM),
    "GRU": (nn.GRU, Int8GRU),
}
LEAST_SQNR_DB = 30.0
SEQUENCE, SHORT = 128, 32
"""Steps of a case, and of one so large that more of them change nothing."""


def quantize_dynamic(model: nn.Module) -> nn.Module:
    """The peer: PyTorch's own dynamic quantization of recurrent layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRU}, torch.qint8)


@torch.no_grad()
def on_text(name: str, text: Text, *, hidden: int = 256, steps: int = 300) -> dict[str, Any]:
    """What both quantizations cost a trained model."""
    kind, int8 = KINDS[name]
    with torch.enable_grad():
        model = trained(kind, text, hidden=hidden, steps=steps)
    ours = copy.deepcopy(model)
    ours.recurrent = int8.from_float(model.recurrent)
    models = {"float": model, "octavo": ours, "quantize_dynamic": quantize_dynamic(model)}
    found = {which: held_out(each, text) for which, each in models.items()}
    pieces = text.held_out[: len(text.held_out) // 128 * 128].reshape(-1, 128)
    x = model.embedding(pieces)
    states = {which: each.recurrent(x)[0] for which, each in models.items()}
    row: dict[str, Any] = {"layer": name, "hidden": hidden, "training_steps": steps}
    for which, (scores, perplexity) in found.items():
        row[which] = {"perplexity": perplexity}
        if which != "float":
            row[which]["output_sqnr_db"] = sqnr_db(states["float"], states[which])
            row[which]["scores_sqnr_db"] = sqnr_db(found["float"][0], scores)
    if row["octavo"]["output_sqnr_db"] < LEAST_SQNR_DB:
        raise RuntimeError(f"{name}: {row['octavo']} is below {LEAST_SQNR_DB} dB")
    return row


def layer_call(
    name: str, hidden: int, batch: int, bidirectional: bool, which: str, threads: int
) -> Callable[[], torch.Tensor]:
    """What a process times: a layer on some steps, and its output."""
    torch.set_num_threads(threads)
    kind, int8 = KINDS[name]
    torch.manual_seed(0)
    layer: nn.Module = kind(hidden, hidden, bidirectional=bidirectional).eval()
    if which == "octavo":
        layer = int8.from_float(layer)
    elif which == "quantize_dynamic":
        layer = quantize_dynamic(nn.ModuleList([layer]))[0]
    steps = SHORT if hidden * batch >= 8192 else SEQUENCE
    x = torch.randn(steps, batch, hidden, generator=torch.Generator().manual_seed(1))

    def call() -> torch.Tensor:
        with torch.no_grad():
            return layer(x)[0]

    return call


def timed(
    name: str, hidden: int, batch: int, bidirectional: bool, rounds: int, threads: int
) -> dict[str, Any]:
    """Latency of one layer, checked first."""
    makers = {
        which: functools.partial(layer_call, name, hidden, batch, bidirectional, which, threads)
        for which in ("octavo", "quantize_dynamic", "float")
    }
    reference = makers["float"]()()
    sqnr = sqnr_db(reference, makers["octavo"]()())
    if sqnr < LEAST_SQNR_DB:
        raise RuntimeError(f"{name}, hidden {hidden}, batch {batch}: {sqnr:.1f} dB; not timed")
    latency = isolated_latency(makers, rounds=rounds)
    row: dict[str, Any] = {
        "layer": name,
        "hidden": hidden,
        "batch": batch,
        "sequence": len(reference),
        "directions": 1 + bidirectional,
        "sqnr_db": sqnr,
    }
    for which, value in latency.items():
        row[which] = {"p20_ms": value.p20, "p50_ms": value.p50, "p80_ms": value.p80}
    row["times_quantize_dynamic"] = latency["quantize_dynamic"].p50 / latency["octavo"].p50
    row["times_float"] = latency["float"].p50 / latency["octavo"].p50
    return row


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of the results file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = Text()
    trained_rows = []
    for name in KINDS:
        row = on_text(name, text)
        trained_rows.append(row)
        parts = [
            f"{which} perplexity {row[which]['perplexity']:.4f}"
            + (f" ({row[which]['output_sqnr_db']:.1f} dB)" if which != "float" else "")
            for which in ("float", "octavo", "quantize_dynamic")
        ]
        print(f"{name} of {row['hidden']} trained on text: {', '.join(parts)}", flush=True)
    rows = []
    for name, hidden, both, batch in itertools.product(
        KINDS, options.hidden, (False, True), options.batch
    ):
        row = timed(name, hidden, batch, both, options.rounds, options.threads)
        rows.append(row)
        print(
            f"{name:<5} hidden {hidden:<5} batch {batch:<3} directions {row['directions']}: octavo "
            f"{row['octavo']['p50_ms']:8.2f} ms, quantize_dynamic "
            f"{row['quantize_dynamic']['p50_ms']:8.2f} ms ({row['times_quantize_dynamic']:.2f} x), "
            f"float {row['float']['p50_ms']:8.2f} ms ({row['times_float']:.2f} x), "
            f"{row['sqnr_db']:.1f} dB",
            flush=True,
        )
    results = {"threads": options.threads, "trained": trained_rows, "layers": rows}
    print(write_results("recurrent", results, out=options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
