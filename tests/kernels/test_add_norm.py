"""Residual sum and norm: every implementation beside float64, and the codes beside their oracle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import add_norm, dynamic_quantize, explain, use_backend
from octavo.kernels.add_norm import native
from octavo.kernels.add_norm.reference import Norm
from octavo.kernels.add_norm.schema import OPERATOR, WIDEST

triton = pytest.importorskip("octavo.kernels.add_norm.triton")

NO_C = native.LIBRARY.reason()
in_c = pytest.mark.skipif(bool(NO_C), reason=NO_C)
BACKENDS = ("triton", pytest.param("native", marks=in_c), "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# of the largest value; the interpreter cuts bfloat16 off instead of rounding it
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def case(
    rows: tuple[int, ...],
    n: int,
    device: torch.device,
    parts: str = "weight and bias",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(n)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    return {
        "x": floats(*rows, n),
        "residual": floats(*rows, n),
        "weight": floats(n) if "weight" in parts else None,
        "bias": floats(n) if "bias" in parts else None,
    }


def exact(values: dict[str, Any], eps: float = 1e-5) -> torch.Tensor:
    """In float64, from the sum as its dtype holds it."""
    total = (values["x"] + values["residual"]).cpu().double()
    parts = [values[name] for name in ("weight", "bias")]
    doubles = [None if part is None else part.cpu().double() for part in parts]
    return functional.layer_norm(total, total.shape[-1:], *doubles, eps)


@pytest.fixture
def place(backend: str, device: torch.device) -> torch.device:
    """Where an implementation runs."""
    return torch.device("cpu") if backend == "native" else device


def check(values: dict[str, Any], found: tuple[torch.Tensor, ...], eps: float = 1e-5) -> None:
    """The result beside float64's, and the codes with every bit of their oracle's, if any."""
    y, codes, scale = found
    x = values["x"]
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    tolerance = TOLERANCES[y.dtype]
    # a row of one value is all rounding
    atol = tolerance if x.shape[-1] > 1 else 1e-3 + tolerance
    torch.testing.assert_close(y.cpu().double(), exact(values, eps), rtol=tolerance, atol=atol)
    if not codes.numel():
        assert codes.shape == scale.shape == (0,)
        return
    wanted = dynamic_quantize(y, backend="reference")
    assert torch.equal(codes, wanted[0])
    assert torch.equal(scale, wanted[1])


@every_backend
@pytest.mark.parametrize("quantize", [False, True], ids=["", "with codes"])
@pytest.mark.parametrize("parts", ["weight and bias", "weight", "bias", "nothing"])
def test_it_is_the_norm_of_the_sum(
    parts: str, quantize: bool, backend: str, place: torch.device
) -> None:
    for rows, n in (((2, 2), 33), ((2,), 16), ((), 5), ((1, 2), 1), ((2,), 300)):
        values = case(rows, n, place, parts)
        check(values, add_norm(**values, quantize=quantize, backend=backend))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_narrow_floats(dtype: torch.dtype, backend: str, place: torch.device) -> None:
    values = case((3, 2), 48, place, dtype=dtype)
    check(values, add_norm(**values, quantize=True, backend=backend))


@every_backend
def test_eps_counts(backend: str, place: torch.device) -> None:
    values = case((6,), 24, place)
    for eps in (0.0, 0.5):
        check(values, add_norm(**values, eps=eps, backend=backend), eps)


@every_backend
def test_torchs_norm_is_the_same(backend: str, place: torch.device) -> None:
    values = case((6,), 24, place)
    wanted = functional.layer_norm(
        values["x"] + values["residual"], (24,), values["weight"], values["bias"], 1e-5
    )
    y, _, _ = add_norm(**values, backend=backend)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("quantize", [False, True], ids=["", "with codes"])
def test_what_is_not_finite_stays_in_its_row(
    quantize: bool, backend: str, place: torch.device
) -> None:
    values = case((6,), 20, place)
    values["residual"][1, 3], values["residual"][4, 0] = torch.nan, torch.inf
    y, codes, scale = add_norm(**values, quantize=quantize, backend=backend)
    broken = [False, True, False, False, True, False]
    assert y.isnan().all(1).tolist() == broken
    if quantize:
        assert scale.isnan().tolist() == broken
        assert (codes[[1, 4]] == -128).all()


@every_backend
def test_rows_of_zeros(backend: str, place: torch.device) -> None:
    values = case((3,), 20, place, "weight")
    values["residual"][1] = -values["x"][1]
    y, codes, scale = add_norm(**values, quantize=True, backend=backend)
    assert not y[1].any()
    assert not codes[1].any()
    assert float(scale[1]) == pytest.approx(1 / 127)


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with others between them."""
    return torch.stack([tensor, torch.full_like(tensor, 9)], -1)[..., 0]


@every_backend
def test_arguments_stay_as_they_are_and_may_have_any_strides(
    backend: str, place: torch.device
) -> None:
    values = case((3, 4), 18, place)
    before = {name: value.clone() for name, value in values.items()}
    wanted = add_norm(**values, quantize=True, backend=backend)
    for name, value in values.items():
        assert torch.equal(value, before[name])
    wide = {name: apart(value) for name, value in values.items()}
    turned = {**values, "x": values["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    for other in (wide, turned):
        for one, two in zip(add_norm(**other, quantize=True, backend=backend), wanted, strict=True):
            assert torch.equal(one, two)
            assert one.is_contiguous()
    row = {**values, "residual": values["residual"][:1].expand(3, -1, -1)}
    check(row, add_norm(**row, quantize=True, backend=backend))


@every_backend
def test_nothing_to_add(backend: str, place: torch.device) -> None:
    values = case((2, 0), 8, place)
    if backend == "native":
        assert native.reason(values["x"], values["residual"], Norm(None, None, 0.0), True) == (
            "there is nothing to add"
        )
        backend = "auto"
    y, codes, scale = add_norm(**values, quantize=True, backend=backend)
    assert y.shape == codes.shape == (2, 0, 8)
    assert scale.shape == (2, 0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_not_asked(
    dtype: torch.dtype, backend: str, place: torch.device
) -> None:
    values = case((5,), 40, place)
    wanted = add_norm(**values, quantize=True, backend=backend)
    torch.set_default_dtype(dtype)
    try:
        found = add_norm(**values, quantize=True, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@in_c
def test_any_number_of_threads_gives_the_same_bits() -> None:
    values, most = case((301,), 1000, torch.device("cpu")), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(add_norm(**values, quantize=True, backend="native"))
    finally:
        torch.set_num_threads(most)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    check(values, found[0])


@in_c
def test_results_at_once_have_memory_of_their_own() -> None:
    values = case((128,), 600, torch.device("cpu"))  # as large as those that are used again
    first = add_norm(**values, backend="native")[0]
    kept = first.clone()
    add_norm(values["residual"], values["residual"], backend="native")
    assert torch.equal(first, kept)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_that_a_program_takes_together(rows: int, device: torch.device) -> None:
    values = case((5,), 20, device)
    norm = Norm(values["weight"], values["bias"], 1e-5)
    config = {"ROWS": rows, "BLOCK": 32, "num_warps": 4}
    check(values, triton.add_norm(values["x"], values["residual"], norm, True, config))


@pytest.mark.parametrize("quantize", [False, True], ids=["", "with codes"])
def test_what_the_launcher_offers_for_tuning(
    quantize: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates of one key give the rule's result, and have the rule's fields."""
    asked: list[str] = []

    def choose(operator: str, key: str, where: Any, rule: Any, others: Any, run: Any) -> Any:
        assert (operator, where) == ("add_norm", values["x"].device)
        for config in itertools.islice(others(), 0, None, 4):
            assert config.keys() == rule.keys()
            check(values, run(config))
        asked.append(key)
        return rule

    monkeypatch.setattr(triton, "best_config", choose)
    values = case((3,), 40, device)
    check(values, add_norm(**values, quantize=quantize, backend="triton"))
    assert asked == ["4x40 4" + (" codes" if quantize else "")]


def test_the_operator_is_sound(device: torch.device) -> None:
    for parts, quantize in (("weight and bias", True), ("nothing", False)):
        values = case((2, 3), 17, device, parts)
        norm = Norm(values["weight"], values["bias"], 1e-5)
        given = OPERATOR.flat(values["x"], values["residual"], norm, quantize)
        every = ("test_schema", "test_autograd_registration", "test_faketensor")
        every = (*every, "test_aot_dispatch_dynamic") if quantize else every
        torch.library.opcheck(OPERATOR.overload, (*given, "auto"), test_utils=every)
        for backend in ("triton", "reference"):  # whether one writes to its arguments
            call = (*given, backend)
            torch.library.opcheck(OPERATOR.overload, call, test_utils="test_schema")


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = case((3,), 8, torch.device("cpu"))
    add_norm(**values)
    assert explain("add_norm").implementation == ("reference" if NO_C else "native")
    add_norm(**{name: value.half() for name, value in values.items()})
    decision = explain("add_norm")
    assert decision.implementation == "reference"
    assert dict(decision.reasons) == {
        "triton": "the tensors are on the CPU, where Triton has no compiler",
        "native": "it computes in float32",
    }
    with use_backend("reference"):
        add_norm(**values)
    assert str(explain("add_norm")) == "add_norm: reference"


def test_without_c_it_is_the_reference(without_native: None) -> None:
    values = case((3,), 8, torch.device("cpu"))
    check(values, add_norm(**values, quantize=True))
    decision = explain("add_norm")
    assert decision.implementation == "reference"
    assert dict(decision.reasons)["native"] == "a test"


def _code(values: dict[str, Any], quantize: bool, way: str) -> tuple[Any, str]:
    """What calls the operator as a compiler made it, and the code that the compiler saw."""

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
            weight, bias = values["weight"], values["bias"]
            return add_norm(x, residual, weight, bias, quantize=quantize)

    given = values["x"], values["residual"]
    if way == "export":
        program = torch.export.export(Layer(), given)
        return program.module()(*given), program.graph_module.code
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph.code)
        return graph

    found = torch.compile(Layer(), fullgraph=True, backend=keep)(*given)
    (code,) = seen
    return found, code


@pytest.mark.parametrize("way", ["compile", "export"])
def test_compilers_see_one_operator_with_the_same_bits(way: str) -> None:
    if way == "compile" and NO_C:
        pytest.skip(NO_C)
    values = case((3,), 8, torch.device("cpu"))
    found, code = _code(values, True, way)
    assert code.count("octavo.add_norm") == 1
    assert all(map(torch.equal, found, add_norm(**values, quantize=True)))


def test_without_c_a_compiler_sees_plain_operations(without_native: None) -> None:
    values = case((3,), 8, torch.device("cpu"))
    found, code = _code(values, False, "compile")
    assert "add_norm" not in code
    torch.testing.assert_close(found[0], add_norm(**values)[0])


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias"])
def test_gradients_are_torchs(name: str) -> None:
    values = case((3,), 8, torch.device("cpu"))
    values[name].requires_grad_()
    add_norm(**values)[0].square().sum().backward()
    found, values[name].grad = values[name].grad, None
    total = values["x"] + values["residual"]
    norm = functional.layer_norm(total, (8,), values["weight"], values["bias"])
    norm.square().sum().backward()
    torch.testing.assert_close(found, values[name].grad)


def test_codes_have_no_gradient() -> None:
    values = case((3,), 8, torch.device("cpu"))
    values["x"].requires_grad_()
    y, *rest = add_norm(**values, quantize=True)
    check({**values, "x": values["x"].detach()}, tuple(one.detach() for one in (y, *rest)))
    with pytest.raises(UnsupportedError, match=r"octavo::add_norm has no gradient; .*no_grad"):
        y.sum().backward()


GOOD = case((2,), 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 4).double()}, r"x is torch.float64 \[2, 4\]; it must be float16, bf"),
        ({"x": torch.ones(2, 4).int()}, "x is torch.int32"),
        ({"x": torch.tensor(1.0)}, r"x is torch.float32 \[\]; it must be .* \[..., N\]"),
        ({"x": torch.ones(2, 0)}, r"x is torch.float32 \[2, 0\]; it must be"),
        ({"residual": torch.ones(4)}, r"residual is torch.float32 \[4\]; it must be .* \[2, 4\]"),
        ({"residual": torch.ones(2, 4).half()}, "residual is torch.float16 .* be torch.float32"),
        ({"residual": torch.ones(2, 4).to("meta")}, "residual is on meta and x on cpu; move one"),
        ({"weight": torch.ones(2)}, r"weight is torch.float32 \[2\]; it must be .* \[4\]"),
        ({"weight": torch.ones(4).half()}, "weight is torch.float16"),
        ({"bias": torch.ones(1, 4)}, r"bias is torch.float32 \[1, 4\]; it must be .* \[4\]"),
        ({"eps": -1e-5}, "eps is -1e-05; it must be finite and not negative"),
        ({"eps": float("nan")}, "eps is nan; it must be finite"),
        ({"eps": float("inf")}, "eps is inf; it must be finite"),
        ({"backend": "cudnn"}, "no backend 'cudnn'; choose from auto, triton, native, reference"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_norm(**{**GOOD, **changes})


def test_backends_that_cannot_run_a_call_say_so() -> None:
    half = {name: value.half() for name, value in GOOD.items()}
    with pytest.raises(UnsupportedError, match=r"'native' of add_norm cannot run this: .*; use"):
        add_norm(**half, backend="native")
    wide = torch.ones(1, WIDEST + 1)
    with pytest.raises(UnsupportedError, match="rows of 16385 are wider than 16384; use backend"):
        add_norm(wide, wide, backend="triton")
