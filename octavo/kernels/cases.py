"""What it takes to measure an operator: cases with seeded data, a check, and what torch offers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from octavo.core.errors import InputError

__all__ = [
    "LINEAR_LAYERS",
    "ONE_CODE",
    "OPERATORS",
    "ROUNDED_ONCE",
    "SHORT",
    "Call",
    "Case",
    "CasesModule",
    "Shapes",
    "by_importance",
    "cases_of",
    "dtype_name",
    "parse_shape",
    "random_codes",
    "seeded",
]

Shapes = Sequence[tuple[int, ...]]

OPERATORS = (
    "int8_gemm",
    "dynamic_quantize",
    "weight_only_gemm",
    "static_quantize",
    "int8_conv2d",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "linear_attention",
    "linear_attention_step",
    "add_norm",
)
"""Operators with cases, each in octavo/kernels/<operator>/cases.py."""
ELSEWHERE = {"linear_attention_step": "linear_attention.step_cases"}
"""Operators that share another one's folder, and where their cases are."""
LINEAR_LAYERS = (
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (8192, 8192),
    (6144, 4096),
    (3072, 768),
    (8192, 28672),
    (768, 3072),
    (4096, 1024),
    (768, 768),
)
"""N and K of linear layers of BERT, Llama and larger."""
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Names of dtypes in tables."""
ROUNDED_ONCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Error of results that are computed in float32 and rounded at the end."""
ONE_CODE = 1e-3
"""Error of codes that are one apart here and there."""
COMPARED_ROWS = 256
"""Rows of a large result that are checked, spread over all of it."""
PEAK_FACTOR = 8
"""How far one value may be off, as a multiple of the tolerance, relative to the largest value."""


@dataclass(frozen=True)
class Case:
    """One call worth measuring.

    Attributes:
        operator: its name.
        name: of the case, unique among the operator's.
        shape: sizes, in the order of the module's AXES.
        dtype: of the result, or of the activations where the result is codes.
        bytes: that the call has to read and write, each once.
        operations: multiplications and additions of the call.
        rate: whose practical limit bounds the operations; a key of `Limits.tops`.
        tolerance: relative error norm that the operator's own result may have.
        make: device -> arguments by name, of seeded random data.
        run: the public function.
        by_row: arguments that hold a row for each row of the result.
        updated: arguments that a call updates in place.
    """

    operator: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    operations: int
    rate: str
    tolerance: float
    make: Callable[[torch.device], dict[str, Any]]
    run: Callable[..., Any]
    by_row: tuple[str, ...]
    updated: tuple[str, ...] = ()

    def keep(self, arguments: Mapping[str, Any]) -> Callable[[], None]:
        """What makes the arguments again what they are now, after a call has updated some."""
        kept = {name: arguments[name].clone() for name in self.updated}

        def restore() -> None:
            for name, value in kept.items():
                arguments[name].copy_(value)

        return restore

    def check(self, arguments: Mapping[str, Any]) -> Callable[[Any, float], str]:
        """What compares results for these arguments with the reference.

        Returns:
            (result, tolerance) -> what is wrong with it, or nothing.
        """
        m = self.shape[0]
        rows = torch.linspace(0, m - 1, min(m, COMPARED_ROWS)).long()
        some = {
            name: value[rows.to(value.device)]
            if name in self.by_row and torch.is_tensor(value) and value.ndim
            else value
            for name, value in arguments.items()
        }
        expected = _tensors(self.run(**some, backend="reference"))

        def compare(result: Any, tolerance: float) -> str:
            found = _tensors(result)
            if len(found) != len(expected):
                return f"it gives {len(found)} tensors, not {len(expected)}"
            for value, wanted in zip(found, expected, strict=True):
                if value.shape[1:] != wanted.shape[1:] or value.shape[:1] != (m,):
                    return f"it gives {list(value.shape)}"
                problem = _difference(value[rows.to(value.device)], wanted, tolerance)
                if problem:
                    return problem
            return ""

        return compare


@dataclass(frozen=True)
class Call:
    """Something to time beside the operator, or the operator itself.

    Attributes:
        name: who it is.
        run: makes the result of the case from its arguments, prepared beforehand.
        tolerance: relative error norm that its result may have.
        bytes: that this one has to move, where it is not the case's number: a float matrix
            product reads more.
        rate: whose limit bounds its operations, where it is not the case's.
        ours: whether Octavo runs, and not what it is compared with.
    """

    name: str
    run: Callable[[], Any]
    tolerance: float
    bytes: int | None = None
    rate: str | None = None
    ours: bool = False


class CasesModule(Protocol):
    """What octavo/kernels/<operator>/cases.py holds."""

    AXES: str
    """Names of a shape's sizes, like MxNxK."""
    BACKENDS: tuple[str, ...]
    """Implementations worth measuring; which of them can run a case they say themselves."""

    def cases(self, shapes: Shapes | None = None, dtype: torch.dtype = ...) -> list[Case]:
        """Cases of these shapes, or all that are registered, the most important first."""
        ...

    def small_shapes(self) -> list[tuple[int, ...]]:
        """A few shapes that a CPU is done with in seconds."""
        ...

    def baselines(self, case: Case, arguments: Mapping[str, Any]) -> list[Call]:
        """What torch itself offers for the same result."""
        ...


def cases_of(operator: str) -> CasesModule:
    """The cases of an operator.

    Raises:
        InputError: there is none of this name.
    """
    if operator not in OPERATORS:
        raise InputError(f"no operator {operator!r}; choose from {', '.join(OPERATORS)}")
    place = ELSEWHERE.get(operator, f"{operator}.cases")
    return cast("CasesModule", importlib.import_module(f"octavo.kernels.{place}"))


def parse_shape(text: str, axes: str) -> tuple[int, ...]:
    """Reads "16x4096x4096".

    Raises:
        InputError: it does not have a positive number for each axis.
    """
    parts = text.lower().split("x")
    if len(parts) != len(axes.split("x")) or not all(part.isdecimal() for part in parts):
        raise InputError(f"shape {text!r} is not of the form {axes}, like 16x4096x4096 for MxNxK")
    shape = tuple(map(int, parts))
    if 0 in shape:
        raise InputError(f"shape {text!r} is empty; give sizes from 1")
    return shape


def by_importance(rows: Sequence[int], others: Shapes) -> list[tuple[int, ...]]:
    """All shapes (m, *rest), the earlier of both lists first."""
    ranked = [(i + j, i, (m, *rest)) for i, m in enumerate(rows) for j, rest in enumerate(others)]
    return [shape for _, _, shape in sorted(ranked, key=lambda one: one[:2])]


def seeded(device: torch.device, seed: int) -> dict[str, Any]:
    """Options of torch's random functions, for data that are the same each time."""
    return {"generator": torch.Generator(device).manual_seed(seed), "device": device}


def random_codes(*shape: int, **options: Any) -> torch.Tensor:
    """int8 codes of this shape; options as of `seeded`."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, **options)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as torch writes it, like float16."""
    return str(dtype).removeprefix("torch.")


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _difference(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> str:
    one, two = found.double(), wanted.double()
    if not bool(torch.isfinite(one).all()):
        return "it holds values that are not finite"
    error = float((one - two).norm() / two.norm().clamp_min(1e-30))
    if error > tolerance:
        return f"its relative error is {error:.2g}, and {tolerance:.2g} is allowed"
    worst = float((one - two).abs().max()) if one.numel() else 0.0
    peak = float(two.abs().max()) if two.numel() else 0.0
    if worst > PEAK_FACTOR * tolerance * peak:
        return f"one of its values is off by {worst:.2g}, the largest being {peak:.2g}"
    return ""
