"""Cases: seeded, checked against the reference, and honest about bytes and operations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench import moved
from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels.benchmark import Row, best_ratio, measure_case
from octavo.kernels.cases import OPERATORS, Call, Case, by_importance, cases_of, parse_shape
from octavo.measure.limits import Limits

CPU = torch.device("cpu")
LIMITS = Limits(10.0, {"int8": 1.0, "float32": 0.1})
SHAPES = {
    "int8_gemm": (17, 64, 96),
    "dynamic_quantize": (17, 96),
    "weight_only_gemm": (3, 64, 128),
    "static_quantize": (17, 96),
    "int8_conv2d": (9, 16, 8, 24, 3, 1, 1),
    "depthwise_conv2d": (3, 17, 9, 7, 3, 2),
    "depthwise_separable_conv2d": (3, 17, 9, 12, 3, 1),
    "linear_attention": (9, 40, 2, 16),
    "linear_attention_step": (9, 2, 16),
    "add_norm": (17, 96),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own, and are slow without a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def small(operator: str) -> list[Case]:
    return cases_of(operator).cases([SHAPES[operator]], torch.float32)


@every_operator
def test_registered_cases_are_many_and_named_apart(operator: str) -> None:
    cases = cases_of(operator).cases()
    assert len({case.name for case in cases}) == len(cases) > 50
    for case in cases:
        assert case.operator == operator
        assert case.bytes > 0
        assert len(case.shape) == len(cases_of(operator).AXES.split("x"))


def test_the_shapes_of_the_plan_are_there() -> None:
    shapes = {case.shape for case in cases_of("int8_gemm").cases()}
    layers = {(768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096), (4096, 6144)}
    layers |= {(4096, 28672), (14336, 4096), (8192, 8192), (28672, 8192)}
    rows = (1, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    assert shapes == {(m, n, k) for m in rows for k, n in layers}


def test_the_convolutions_of_the_plan_are_there() -> None:
    shapes = {case.shape for case in cases_of("depthwise_conv2d").cases()}
    layers = {(32, 112, 3, 1), (64, 112, 3, 2), (128, 56, 3, 1), (256, 28, 3, 1), (512, 14, 3, 1)}
    layers |= {(1024, 7, 3, 1), (144, 56, 3, 1), (384, 14, 3, 1), (960, 7, 3, 1)}
    layers |= {(96, 56, 7, 1), (768, 7, 7, 1)}
    assert {(b, c, h, h, k, s) for b in (1, 32, 128) for c, h, k, s in layers} <= shapes
    assert {(b, c, 1, 2048, 5, 1) for b in (1, 32, 128) for c in (1024, 4096)} <= shapes
    blocks = {case.shape[1:] for case in cases_of("depthwise_separable_conv2d").cases()}
    assert {(c, h, k, s) for c, h, _, k, s in blocks} >= layers - {(768, 7, 7, 1)}


def test_bytes_and_operations_of_convolutions_by_hand() -> None:
    floats, coded = cases_of("depthwise_conv2d").cases([(2, 3, 5, 7, 3, 2)], torch.float16)
    assert floats.bytes == 2 * 3 * (5 * 7 + 3 * 4) * 2 + 3 * 9 * 2 + 4 * 3
    assert coded.bytes == 2 * 3 * (5 * 7 + 3 * 4) + 3 * 9 + 4 * 3 * 2 + 8
    assert floats.operations == coded.operations == 2 * (2 * 3 * 3 * 4) * 9
    (block, coded) = cases_of("depthwise_separable_conv2d").cases([(2, 3, 5, 4, 3, 1)], torch.half)
    assert block.bytes == 2 * 25 * (3 + 4) * 2 + 3 * (9 + 4) * 2 + 4 * (3 + 4)
    assert coded.bytes == 2 * 25 * (3 + 4) + 3 * (9 + 4) + 4 * (3 + 4) * 2 + 12
    assert block.operations == 2 * 2 * 25 * 3 * (9 + 4)


def test_bytes_and_operations_by_hand() -> None:
    bare, fused = cases_of("int8_gemm").cases([(2, 3, 5)], torch.bfloat16)
    assert bare.bytes == 2 * 5 + 3 * 5 + 2 * 3 * 2 + 4 * 2 + 4 * 3
    assert fused.bytes == bare.bytes + 4 * 3
    assert bare.operations == fused.operations == 2 * 2 * 3 * 5
    plain, smooth = cases_of("dynamic_quantize").cases([(2, 8)], torch.float16)
    assert plain.bytes == 2 * 8 * 2 + 2 * 8 + 4 * 2
    assert smooth.bytes == plain.bytes + 4 * 8
    one, channels = cases_of("static_quantize").cases([(2, 8)], torch.float16)
    assert one.bytes == 2 * 8 * 2 + 2 * 8 + 4
    assert channels.bytes == one.bytes + 4 * 7
    floats, codes = cases_of("int8_conv2d").cases([(2, 8, 5, 6, 3, 2, 2)], torch.float16)
    inputs = 2 * 5 * 5 * 8 + 6 * 4 * 9 + 4 * 6 + 4 * 6 + 4
    assert floats.bytes == inputs + 2 * 3 * 3 * 6 * 2
    assert codes.bytes == inputs + 2 * 3 * 3 * 6 + 4
    assert floats.operations == 2 * (2 * 3 * 3 * 6) * (4 * 9)
    (step,) = cases_of("linear_attention_step").cases([(2, 3, 8)], torch.bfloat16)
    assert step.bytes == 2 * 3 * (2 * 4 * (8 * 8 + 8) + 2 * 4 * 8)
    assert step.operations == 2 * 3 * 8 * 8 * (2 + 2)
    grouped = cases_of("weight_only_gemm").cases([(1, 4, 256)], torch.float16)[0]
    assert grouped.bytes == 4 * 256 // 2 + 4 * 2 * 2 + (256 + 4) * 2


# operator and side of the kernel -> the most that a plan moves, as a multiple of the least
MOST_MOVED = {
    ("depthwise_conv2d", 3): 2.1,
    ("depthwise_conv2d", 5): 3.6,
    ("depthwise_conv2d", 7): 5.5,
    # 7 x 7 pixels, whose programs each read all weights
    ("depthwise_separable_conv2d", 3): 13.2,
    ("depthwise_separable_conv2d", 5): 5.5,
    ("depthwise_separable_conv2d", 7): 2.8,
    ("int8_conv2d", 1): 1.0,
    ("int8_conv2d", 3): 1.1,
    ("int8_conv2d", 7): 1.1,
}


@pytest.mark.parametrize("operator", moved.OPERATORS)
def test_what_plans_move(operator: str) -> None:
    worst: dict[tuple[str, int], float] = {}
    for case, planned in moved.planned(operator):
        place = (operator, case.shape[4])
        assert planned >= case.bytes
        worst[place] = max(worst.get(place, 0), planned / case.bytes)
    wanted = {place: most for place, most in MOST_MOVED.items() if place[0] == operator}
    assert worst == {place: pytest.approx(most, rel=0.06) for place, most in wanted.items()}


@every_operator
def test_bytes_are_those_of_all_arguments_and_results(operator: str) -> None:
    """The minimum that measurements are counted against: every tensor read or written once."""
    for dtype in (torch.float32, torch.float16):
        for case in cases_of(operator).cases([SHAPES[operator]], dtype):
            arguments = case.make(CPU)
            results = case.run(**arguments, backend="reference")
            tensors = [*arguments.values(), *(results if type(results) is tuple else (results,))]
            moved = sum(one.nbytes for one in tensors if torch.is_tensor(one))
            assert case.bytes == moved, case.name


@every_operator
def test_arguments_are_seeded_and_fit_the_operator(operator: str) -> None:
    for case in small(operator):
        one, two = case.make(CPU), case.make(CPU)
        for name, value in one.items():
            if torch.is_tensor(value):
                assert torch.equal(value, two[name]), name
                assert value.ndim == 0 or value.float().std() > 0
        assert case.check(one)(case.run(**one), case.tolerance) == ""


@every_operator
def test_every_baseline_agrees_with_the_reference(operator: str) -> None:
    for case in small(operator):
        arguments = case.make(CPU)
        compare, restore = case.check(arguments), case.keep(arguments)
        calls = cases_of(operator).baselines(case, arguments)
        assert calls
        for call in calls:
            restore()
            assert compare(call.run(), call.tolerance) == "", call.name


@every_operator
@pytest.mark.parametrize("row", [0, 8, -1])
def test_a_wrong_row_is_found(operator: str, row: int) -> None:
    case = small(operator)[0]
    arguments = case.make(CPU)
    compare, result = case.check(arguments), case.run(**arguments)
    values = result[0] if isinstance(result, tuple) else result
    values[row % len(values)] += 1
    problem = compare(result, case.tolerance)
    assert problem.startswith(("its relative error is", "one of its values is off by"))


def test_what_a_check_says() -> None:
    case = small("int8_gemm")[0]
    compare, result = case.check(case.make(CPU)), case.run(**case.make(CPU))
    assert compare(result[:, :-1], 1.0) == "it gives [17, 63]"
    assert compare((result, result), 1.0) == "it gives 2 tensors, not 1"
    assert compare(result * float("nan"), 1.0) == "it holds values that are not finite"
    # one value alone hardly moves the norm
    result[3, 3] += 0.02 * float(result.abs().max())
    assert compare(result, 0.001) != ""


def test_large_results_are_checked_by_rows_of_every_part() -> None:
    case = cases_of("dynamic_quantize").cases([(1000, 4)], torch.float32)[0]
    arguments = case.make(CPU)
    codes, scale = case.run(**arguments)
    codes[500:506] = 0
    assert case.check(arguments)((codes, scale), 0.0) != ""


def test_measuring_checks_first() -> None:
    case = small("int8_gemm")[0]
    timed: list[str] = []

    def peers(_case: Case, _arguments: Any) -> list[Call]:
        def wrong() -> torch.Tensor:
            timed.append("wrong")
            return torch.zeros(17, 64)

        def broken() -> torch.Tensor:
            raise RuntimeError("no such kernel\nmore")

        return [Call("wrong", wrong, 0.1), Call("broken", broken, 0.1)]

    rows = measure_case(case, CPU, LIMITS, peers=peers, caches=("warm",), samples=2, seconds=0.01)
    by_name = {row.who: row for row in rows}
    assert by_name["wrong"].note.startswith("WRONG: its relative error is 1")
    assert by_name["wrong"].p50_us is None
    assert timed == ["wrong"], "it ran for the check alone"
    assert by_name["broken"].note == "RuntimeError: no such kernel"
    ours = by_name["octavo"]
    assert ours.p50_us is not None
    assert ours.p50_us > 0
    assert ours.note.startswith("int8_gemm: ")
    assert ours.tops == pytest.approx(case.operations / ours.p50_us / 1e6, rel=1e-3)
    assert ours.limit_percent == pytest.approx(
        LIMITS.percent(case.bytes, case.operations, "int8", ours.p50_us), abs=0.01
    )
    linear = by_name["F.linear fp32"]
    assert not linear.ours
    assert linear.gbs == pytest.approx(
        (17 * 96 + 64 * 96 + 17 * 64) * 4 / (linear.p50_us or 1) / 1e3, rel=1e-3
    )


def test_calls_that_update_their_arguments_start_from_the_same() -> None:
    """Or the second one would seem wrong."""
    case = small("linear_attention_step")[0]
    arguments = case.make(CPU)
    before, restore = arguments["kv"].clone(), case.keep(arguments)
    case.run(**arguments)
    assert not torch.equal(arguments["kv"], before)
    restore()
    assert torch.equal(arguments["kv"], before)
    rows = measure_case(case, CPU, LIMITS, caches=("warm",), samples=2, seconds=0.01)
    assert {row.who for row in rows if row.p50_us} == {"octavo", "torch einsum"}


def test_cold_and_warm_are_rows_of_their_own() -> None:
    case = small("dynamic_quantize")[0]
    rows = measure_case(case, CPU, LIMITS, samples=1, seconds=0.001)
    assert [row.cache for row in rows if row.who == "octavo"] == ["cold", "warm"]


def test_the_ratio_is_to_the_best_of_the_same_case_and_cache() -> None:
    row = Row("op", "a", "1", "float32", "octavo", True, "cold", 1.0, 2.0, 3.0)
    others = [
        dataclasses.replace(row, who="slow", ours=False, p50_us=9.0),
        dataclasses.replace(row, who="quick", ours=False, p50_us=5.0),
        dataclasses.replace(row, who="warm", ours=False, p50_us=1.0, cache="warm"),
        dataclasses.replace(row, who="other", ours=False, p50_us=1.0, case="b"),
        dataclasses.replace(row, who="ours", p50_us=1.0),
        dataclasses.replace(row, who="broken", ours=False, p50_us=None),
    ]
    assert best_ratio([row, *others], row) == 2.5
    assert best_ratio([row], row) is None


def test_importance_takes_the_earlier_of_both_first() -> None:
    shapes = by_importance((16, 1), ((8,), (4,)))
    assert shapes == [(16, 8), (16, 4), (1, 8), (1, 4)]


def test_shapes_as_text() -> None:
    assert parse_shape("16x4096X768", "MxNxK") == (16, 4096, 768)
    for text in ("16x4", "16x4xK", "16x-4x8", ""):
        with pytest.raises(InputError, match="is not of the form MxNxK"):
            parse_shape(text, "MxNxK")
    with pytest.raises(InputError, match="shape '16x0' is empty; give sizes from 1"):
        parse_shape("16x0", "MxK")


def test_unknown_operators_are_refused() -> None:
    with pytest.raises(InputError, match="no operator 'conv'; choose from int8_gemm, dynamic_qua"):
        cases_of("conv")


def test_named_bodies_say_why_they_cannot_run() -> None:
    case = small("int8_gemm")[0]
    with pytest.raises(UnsupportedError, match="backend 'triton' of int8_gemm cannot run this"):
        case.run(**case.make(CPU), backend="triton")
    rows = measure_case(case, CPU, LIMITS, caches=("warm",), samples=1, seconds=0.001)
    reason = next(row.note for row in rows if row.who == "octavo triton")
    assert "the tensors are on the CPU" in reason
