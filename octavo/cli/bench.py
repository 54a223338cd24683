"""The command that measures an operator on this machine, beside what torch itself offers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from octavo.core.errors import InputError, UnsupportedError
from octavo.core.files import atomic_write

if TYPE_CHECKING:
    import torch

    from octavo.kernels.benchmark import Row
    from octavo.kernels.cases import Case, CasesModule
    from octavo.measure.limits import Limits

__all__ = ["bench"]

DTYPES = ("float32", "float16", "bfloat16")
GPU_CASES = 12
OPERATORS = (
    "int8_gemm, weight_only_gemm, dynamic_quantize, static_quantize, int8_conv2d, "
    "depthwise_conv2d, depthwise_separable_conv2d, linear_attention, linear_attention_step or "
    "add_norm."
)


def bench(
    operator: Annotated[str, Argument(help=OPERATORS)],
    shape: Annotated[
        list[str] | None, Option(help="MxNxK, or MxK for activations; repeat it.")
    ] = None,
    dtype: Annotated[str | None, Option(help="float32, float16 or bfloat16.")] = None,
    device: Annotated[
        str | None, Option(help="cuda, cuda:1 or cpu; by default a GPU, if there is one.")
    ] = None,
    compiled: Annotated[
        bool, Option("--compile", help="Also measure torch's baselines under Inductor.")
    ] = False,
    cold: Annotated[
        bool, Option("--cold", help="Overwrite the L2 cache before each call.")
    ] = False,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure an operator here, beside torch: results are checked before anything is timed."""
    from octavo.core.progress import default_progress
    from octavo.kernels.benchmark import measure_case
    from octavo.kernels.cases import cases_of
    from octavo.measure.limits import measure_limits

    module = cases_of(operator)
    place = _device(device)
    cases = _cases(module, shape, dtype, place)
    limits = measure_limits(place)
    rows: list[Row] = []
    with default_progress().task(f"Measuring {operator}", len(cases)) as advance:
        for case in cases:
            caches = ("cold" if cold else "warm",)
            rows += measure_case(case, place, limits, compiled=compiled, caches=caches)
            advance(1)
    _show(rows, limits, place)
    if json_file is not None:
        _write(json_file, rows, limits, place)
        typer.echo(f"figures: {json_file}")
    wrong = [row for row in rows if row.ours and row.note.startswith("WRONG")]
    if wrong:
        raise UnsupportedError(
            f"{wrong[0].who} is wrong on {wrong[0].case}: {wrong[0].note}; its speed was not "
            "measured. This is a defect; please report it"
        )


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; use cuda, cuda:1 or cpu") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(f"there is no {name} here; use --device cpu")
    if found.type not in ("cuda", "cpu"):
        raise InputError(f"device {name!r} cannot be measured; use cuda or cpu")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def _cases(
    module: CasesModule, shapes: list[str] | None, dtype: str | None, device: torch.device
) -> list[Case]:
    import torch

    from octavo.kernels.cases import parse_shape

    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    if dtype is None:
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        kind = getattr(torch, dtype)
    if shapes:
        return module.cases([parse_shape(text, module.AXES) for text in shapes], kind)
    if device.type == "cuda":
        return module.cases(None, kind)[:GPU_CASES]
    return module.cases(module.small_shapes(), kind)


def _show(rows: list[Row], limits: Limits, device: torch.device) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", no_wrap=True)
    for head in ("p20 us", "p50", "p80", "TOPS", "GB/s", "limit", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    for case in dict.fromkeys(row.case for row in rows):
        table.add_row(Text(case, "bold"))
        for row in rows:
            if row.case == case and row.p50_us is not None:
                table.add_row(*_cells(rows, row))
    console = Console(markup=False, highlight=False)
    console.print(table)
    tops = ", ".join(f"{name} {value:.3g} TOPS" for name, value in limits.tops.items())
    console.print(
        f"limit: share of what {_name(device)} does at best, measured now: copy "
        f"{limits.copy_gbs:.3g} GB/s, {tops}. ratio: speed over that of the best baseline."
    )
    for rate, reason in limits.absent.items():
        console.print(f"no limit for {rate}: {reason}")
    untimed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.p50_us is None:
            untimed.setdefault((row.who, row.note), []).append(row.case)
    for (who, note), cases in untimed.items():
        console.print(f"not timed: {who} ({', '.join(cases)}): {note}")


def _cells(rows: list[Row], row: Row) -> list[str | Text]:
    from octavo.kernels.benchmark import best_ratio

    ratio = best_ratio(rows, row) if row.ours else None
    times = [value for value in (row.p20_us, row.p50_us, row.p80_us) if value is not None]
    return [
        Text(f"  {row.who}", "bold" if row.who == "octavo" else ""),
        *(f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in times),
        f"{row.tops:.3g}" if row.tops else "",
        f"{row.gbs:.3g}" if row.gbs is not None else "",
        f"{row.limit_percent:.0f} %" if row.limit_percent is not None else "",
        f"{ratio:.2f}" if ratio is not None else "",
    ]


def _name(device: torch.device) -> str:
    import torch

    from octavo.core.machine import cpu_name

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _write(path: Path, rows: list[Row], limits: Limits, device: torch.device) -> None:
    from octavo.core.machine import machine_facts

    document = {
        "device": _name(device),
        "machine": machine_facts(),
        "limits": asdict(limits),
        "rows": [asdict(row) for row in rows],
    }
    atomic_write(path, json.dumps(document, indent=1) + "\n")
