"""Who runs: by order on a CPU, by measurement on a GPU; one asked for by name, or nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fake_gpu import FACTS, GPU, FakeGpu
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from octavo import kernels
from octavo.core.errors import InputError, OctavoError, OctavoWarning, UnsupportedError
from octavo.kernels import explain, int8_gemm, use_backend
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.dispatch import operator, store
from octavo.kernels.dispatch import select as dispatch
from octavo.kernels.dispatch.operator import Operator, forget_plans
from octavo.kernels.dispatch.select import Choice, Implementation, select
from octavo.kernels.int8_gemm import dequantize, schema

CPU = torch.device("cpu")


def implementation(
    name: str, reason: str = "", role: Any = "any", result: Any = 1.0
) -> Implementation:
    def run(*_arguments: object) -> torch.Tensor:
        if isinstance(result, Exception):
            raise result
        return torch.full((2,), result)

    return Implementation(name, lambda *_: reason, run, role)


ALL = (
    implementation("triton"),
    implementation("int_mm"),
    implementation("reference", role="last"),
    implementation("float", "", "measured"),
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    fake = FakeGpu(monkeypatch, tmp_path)
    fake.times = {"triton": 3.0, "int_mm": 2.0, "float": 5.0, "reference": 90.0}
    return fake


def choose(
    given: Any = ALL, backend: str = "auto", bucket: Any = (64, "bf16"), device: Any = GPU
) -> Choice:
    return select("int8_gemm", given, backend, (), device=device, bucket=bucket)


def auto(given: Any = ALL, **where: Any) -> str:
    return choose(given, **where).implementation.name


def test_the_fastest_runs_and_its_time_is_told(gpu: FakeGpu) -> None:
    found = choose()
    assert found.implementation is ALL[1]
    assert found.settled
    assert "reference" not in gpu.timed, "the oracle competes only where nothing else can run"
    decision = found.decision
    assert decision.implementation == "int_mm"
    assert dict(decision.microseconds) == {"int_mm": 2.0, "triton": 3.0, "float": 5.0}
    assert str(decision) == "int8_gemm: int_mm, 2.0 us (triton took 3.0 us; float took 5.0 us)"


def test_it_is_measured_once(gpu: FakeGpu) -> None:
    auto()
    times = len(gpu.timed)
    gpu.times["triton"] = 1.0
    assert auto() == "int_mm"
    gpu.forget()
    assert auto() == "int_mm", "from the file"
    assert len(gpu.timed) == times
    assert auto(bucket=(128, "bf16")) == "triton"
    entries = gpu.document()["entries"]
    assert set(entries) == {
        "64-bf16 of triton, int_mm, float",
        "128-bf16 of triton, int_mm, float",
    }


def test_a_file_that_names_nobody_is_measured_again(gpu: FakeGpu) -> None:
    auto()
    (path,) = gpu.files()
    path.write_text(path.read_text().replace('"chosen": "int_mm"', '"chosen": "cutlass"'))
    gpu.forget()
    assert auto() == "int_mm"
    assert gpu.document()["entries"]["64-bf16 of triton, int_mm, float"]["chosen"] == "int_mm"


def test_a_winner_that_cannot_run_the_next_call_is_not_taken(gpu: FakeGpu) -> None:
    assert auto() == "int_mm"
    found = choose((ALL[0], implementation("int_mm", "M is 3"), *ALL[2:]))
    assert found.implementation.name == "triton"
    assert found.decision.reasons == (("int_mm", "M is 3"),)
    assert "int_mm not: M is 3" in str(found.decision)


def test_the_oracle_competes_where_no_kernel_runs(gpu: FakeGpu) -> None:
    none = (implementation("triton", "no"), implementation("int_mm", "no"), *ALL[2:])
    assert auto(none) == "float"
    gpu.times["reference"] = 1.0
    assert auto(none, bucket=("another",)) == "reference"


def test_one_that_fails_or_is_wrong_loses(gpu: FakeGpu) -> None:
    gpu.times["float"] = 1.0
    failing = implementation("int_mm", result=RuntimeError("no memory"))
    wrong = implementation("float", "", "measured", result=7.0)
    found = choose((ALL[0], failing, ALL[2], wrong))
    assert found.implementation.name == "triton"
    assert dict(found.decision.reasons) == {
        "int_mm": "failed: RuntimeError: no memory",
        "float": "failed: its result differs from the first candidate's",
    }


def test_all_failing_is_an_error(gpu: FakeGpu) -> None:
    bad = RuntimeError("no kernel image")
    with pytest.raises(OctavoError, match=r"no candidate for int8_gemm .* runs: .*no kernel image"):
        auto((implementation("a", result=bad), implementation("b", result=bad)))


@pytest.mark.parametrize("how", ["capture", "tracing", "OCTAVO_TUNE"])
def test_where_nothing_can_be_measured_the_rule_decides(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    reason = {
        "capture": "a CUDA graph is being captured",
        "tracing": "torch.compile is tracing",
        "OCTAVO_TUNE": "OCTAVO_TUNE=0",
    }[how]
    with monkeypatch.context() as patch:
        if how == "capture":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        elif how == "tracing":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        else:
            patch.setenv("OCTAVO_TUNE", "0")
        found = choose()
        assert found.implementation.name == "triton"
        assert found.decision.unmeasured == reason
        assert str(found.decision) == f"int8_gemm: triton (by rule, not measured: {reason})"
        assert not found.settled, "no plan is kept of it"
    assert gpu.timed == []
    assert auto() == "int_mm", "later it is measured"


def test_a_file_counts_inside_a_capture(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    auto()
    gpu.forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert auto() == "int_mm"


def test_one_candidate_needs_no_measurement(gpu: FakeGpu) -> None:
    assert auto((ALL[0], ALL[2])) == "triton"
    assert auto(bucket=None) == "triton"
    assert gpu.timed == []


def test_a_name_never_gives_another(gpu: FakeGpu) -> None:
    assert auto(backend="triton") == "triton"
    assert gpu.timed == []
    refusing = (implementation("triton", "too old"), *ALL[1:])
    with pytest.raises(UnsupportedError, match=r"backend 'triton' .* cannot run this: too old"):
        choose(refusing, "triton")
    with pytest.raises(InputError, match="choose from auto, triton, int_mm, reference, float"):
        choose(ALL, "cuda")


def test_on_a_cpu_the_order_decides_and_inexact_ones_are_left_out(gpu: FakeGpu) -> None:
    assert auto(device=CPU) == "triton"
    refusing = (implementation("triton", "no"), ALL[3], ALL[2])
    found = choose(refusing, device=CPU)
    assert found.implementation is ALL[2]
    assert str(found.decision) == "int8_gemm: reference (triton not: no)"
    with pytest.raises(UnsupportedError, match="nothing can run int8_gemm: "):
        auto((implementation("triton", "no"),), device=CPU)
    assert gpu.timed == []


def test_versions_of_torch_have_choices_of_their_own(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto()
    monkeypatch.setattr(store, "device_facts", lambda _device: {**FACTS, "torch": "3.0"})
    gpu.forget()
    gpu.times["triton"] = 1.0
    assert auto() == "triton"
    assert len(gpu.files()) == 2


def test_a_damaged_file_is_told_and_rebuilt(gpu: FakeGpu) -> None:
    auto()
    (path,) = gpu.files()
    path.write_text(path.read_text()[:-40])
    gpu.forget()
    with pytest.warns(OctavoWarning, match="is not used, since it is not JSON"):
        assert auto() == "int_mm"
    assert json.loads(path.read_text())["entries"]


def test_triton_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert dispatch.triton_reason(torch.ones(1)) == "triton is not installed"
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "Triton has no compiler" in dispatch.triton_reason(torch.ones(1))
    assert dispatch.triton_reason(torch.ones(1, device="meta")) == "the tensors are on meta"


def epilogue(out_dtype: torch.dtype, m: int, n: int) -> Epilogue:
    random = torch.Generator().manual_seed(m)
    return Epilogue(
        torch.rand(m, generator=random) * 1e-3,
        torch.rand(n, generator=random) * 1e-2,
        torch.randn(n, generator=random),
        None,
        None,
        "relu",
        out_dtype,
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 63), (5, 8, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_as_floats_give_the_same(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (m, k), generator=random, dtype=torch.int8)
    w = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
    e = epilogue(dtype, m, n)
    exact = (x.double() @ w.double().T) * e.scale_x.double()[:, None] * e.scale_w.double()
    exact = (exact + e.bias.double()).relu()
    found = int8_gemm(
        x, w, e.scale_x, e.scale_w, bias=e.bias, activation="relu", out_dtype=dtype,
        backend="dequantize",
    )  # fmt: skip
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=2 * step, atol=2e-6)


def test_codes_as_floats_refuse_what_must_be_exact() -> None:
    x = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(UnsupportedError, match="accumulators are floats, which are not exact eno"):
        int8_gemm(x, x, out_dtype=torch.int32, backend="dequantize")
    one = torch.tensor(1.0)
    with pytest.raises(UnsupportedError, match=r"not exact enough for torch\.int8"):
        int8_gemm(x, x, one, one, out_dtype=torch.int8, out_scale=one, backend="dequantize")
    with pytest.raises(UnsupportedError, match="there is nothing to multiply"):
        int8_gemm(x[:0], x, one, one, backend="dequantize")
    raw = Epilogue(None, None, None, None, None, "none", torch.float32)
    assert "are on meta" in dequantize.reason(x.to("meta"), x.to("meta"), raw)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by an operator's name with every call that takes what is registered with torch."""
    names: list[str] = []
    run = Operator._seen

    def watched(self: Operator, *given: Any) -> Any:
        names.append(self.name)
        return run(self, *given)

    monkeypatch.setattr(Operator, "_seen", watched)
    return names


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_plain_calls_skip_the_operator_and_others_do_not(seen: list[str]) -> None:
    x = torch.ones(3, 4, dtype=torch.int8)
    one = torch.tensor(1.0)

    def call(scale: torch.Tensor = one, x: torch.Tensor = x) -> torch.Tensor:
        return int8_gemm(x, x, scale, scale, out_dtype=torch.float32, backend="reference")

    expected = call()
    needs = torch.tensor(1.0, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(call(needs), expected)
    assert not seen
    with pytest.raises(UnsupportedError, match="octavo::int8_gemm has no gradient; quantized lay"):
        call(needs).sum().backward()
    assert len(seen) == 1
    with FakeTensorMode() as mode:
        call(mode.from_tensor(one), mode.from_tensor(x))
    make_fx(lambda scale: call(scale))(one)
    torch.jit.trace(call, (one,), check_trace=False)
    torch.func.grad(lambda z: call().sum() * z)(one)
    with torch.device("cpu"):
        call()
    assert seen == ["int8_gemm"] * 6


def test_what_is_a_plain_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)

    def plain(*arguments: Any) -> bool:
        return operator._kind(arguments, "auto") is not None

    assert plain(x, None, torch.nn.Parameter(x, requires_grad=False), ((x, 3), "relu"))
    with torch.inference_mode():
        assert plain(torch.ones(2), torch.nn.Parameter(x))
    assert not plain(x, ((torch.nn.Parameter(x), 3), "relu")), "a gradient may be asked for"
    assert not plain(x.to("meta"))
    assert not plain(torch.ones(2, dtype=torch.complex64).conj().imag), "its sign is to come"

    class Sub(torch.Tensor):
        pass

    assert not plain(x.as_subclass(Sub))
    with FlopCounterMode(display=False):
        assert not plain(x)
    found: list[bool] = []
    torch.vmap(lambda one: found.append(plain(one)) or one)(x)
    assert found == [False]
    monkeypatch.delattr(torch._C, "_get_tracing_state")
    assert operator._watchers() == ()
    monkeypatch.setattr(operator, "_WATCHERS", ())
    assert not plain(x), "a torch that cannot tell takes the operator"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["dynamic_quantize", "static_quantize", "weight_only_gemm"])
def test_every_operator_gives_the_same_when_it_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=random)
    call: Any = {
        "dynamic_quantize": lambda x: kernels.dynamic_quantize(x, backend="reference"),
        "static_quantize": lambda x: kernels.static_quantize(x, torch.tensor(0.1)),
        "weight_only_gemm": lambda x: kernels.weight_only_gemm(
            x, torch.ones(3, 8, dtype=torch.int8), torch.ones(3), bits=8, backend="reference"
        ),
    }[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    expected = call(x)
    with monkeypatch.context() as patch:
        patch.setattr(operator, "_kind", lambda *_: None)
        torch.testing.assert_close(call(x), expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(call(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(call(x.clone().requires_grad_()), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.vmap(call)(x[:, None]), call(x[:, None]))
    assert name in str(make_fx(call)(x).code)
    with FakeTensorMode() as mode:
        assert isinstance(pytree.tree_leaves(call(mode.from_tensor(x)))[0], FakeTensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_the_operator() -> None:
    x, one = torch.ones(3, 4, dtype=torch.int8), torch.tensor(1.0)

    def call(scale: torch.Tensor) -> torch.Tensor:
        return int8_gemm(x, x, one, scale, out_dtype=torch.float32, backend="reference")

    traced = torch.jit.trace(call, (torch.tensor(3.0),), check_trace=False)
    assert "octavo::int8_gemm" in str(traced.graph)
    assert torch.equal(traced(one * 2), call(one * 2))
    assert "octavo.int8_gemm" in make_fx(call)(one).code
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(one), call(one))


class Part(NamedTuple):
    values: torch.Tensor
    more: torch.Tensor | None = None
    name: str = "part"


class How(NamedTuple):
    scale: torch.Tensor | None
    pads: tuple[int, int]
    dtype: torch.dtype
    part: Part
    least: int = 0


checked: list[torch.Size] = []


def _check(
    x: torch.Tensor, how: How, parts: tuple[Part, ...], factor: float, axis: int | None
) -> None:
    checked.append(x.shape)
    if x.ndim != 2:
        raise InputError("x is no matrix")


def _sum(
    x: torch.Tensor, how: How, parts: tuple[Part, ...], factor: float, axis: int | None
) -> torch.Tensor:
    y = x * factor + how.least
    for part in (how.part, *parts):
        y = y + part.values
        y = y if part.more is None else y * part.more
    return y.to(how.dtype)


SUM = Operator(
    "sum_of_a_test",
    _check,
    (
        Implementation("narrow", lambda x, *_: "x is wide" if x.shape[1] > 3 else "", _sum),
        Implementation("reference", lambda *_: "", _sum, "last"),
    ),
    lambda x, how, *_: x.new_empty(x.shape, dtype=how.dtype),
)


@pytest.fixture
def how() -> How:
    checked.clear()
    return How(None, (1, 2), torch.float64, Part(torch.ones(3)), 7)


def test_a_schema_follows_from_annotations() -> None:
    assert str(SUM.overload._schema) == (
        "octavo::sum_of_a_test(Tensor x, Tensor? how_scale, SymInt[] how_pads, "
        "ScalarType how_dtype, Tensor how_part_values, Tensor? how_part_more, str how_part_name, "
        "int how_least, Tensor[] parts_values, Tensor[] parts_more, float factor, int? axis, "
        "str backend) -> Tensor"
    )
    step = torch.ops.octavo.linear_attention_step.default._schema
    assert [one.name for one in step.arguments if one.is_write] == ["state_kv", "state_normalizer"]


@pytest.mark.parametrize("parts", ["none", "plain", "whole"])
def test_records_become_flat_and_records_again(parts: str, how: How) -> None:
    several = {
        "none": (),
        "plain": (Part(torch.ones(3)), Part(torch.zeros(3))),
        "whole": tuple(Part(torch.ones(3) * i, torch.ones(3) + i) for i in range(3)),
    }[parts]
    x = torch.ones(2, 3)
    arguments = (x, how, several, 0.5, None)
    assert SUM._nested(SUM.flat(*arguments)) == arguments
    torch.library.opcheck(SUM.overload, (*SUM.flat(*arguments), "reference"))
    assert torch.equal(SUM(*arguments), SUM.overload(*SUM.flat(*arguments), "auto"))


def test_a_kind_of_call_is_validated_once(how: How) -> None:
    x = torch.ones(2, 3)
    rest: tuple[Any, ...] = (how, (), 0.5, None)
    assert torch.equal(SUM(x, *rest), SUM(x + 1, *rest) - 0.5)
    assert len(checked) == 1
    others: list[tuple[Any, ...]] = [
        (x[:1], *rest),
        (x.half(), *rest),
        (x, how._replace(least=8), *rest[1:]),
        (x, how._replace(part=Part(x)), *rest[1:]),
        (x, how, (how.part,), 0.5, None),
        (x, how, (how.part, how.part), 0.5, None),
        (x, how, (), 0.25, None),
        (x, how, (), 0.5, 1),
    ]
    for _ in range(2):
        for one in others:
            SUM(*one)
    assert len(checked) == 1 + len(others)
    forget_plans()
    SUM(x, *rest)
    assert len(checked) == 2 + len(others)
    for _ in range(2):
        with pytest.raises(InputError, match="x is no matrix"):
            SUM(x[0], *rest)
    assert len(checked) == 4 + len(others), "what is refused is looked at each time"


def test_a_further_call_tells_who_ran_it(how: How) -> None:
    rest: tuple[Any, ...] = ((), 0.5, None)
    wide, narrow = torch.ones(2, 4), torch.ones(2, 3)
    of_wide = how._replace(part=Part(wide))
    for _ in range(2):
        SUM(wide, of_wide, *rest)
        assert str(explain("sum_of_a_test")) == "sum_of_a_test: reference (narrow not: x is wide)"
        SUM(narrow, how, *rest)
        assert explain("sum_of_a_test").implementation == "narrow"
        SUM(narrow, how, *rest, backend="reference")
        assert explain("sum_of_a_test").implementation == "reference"
        with use_backend("reference"):
            SUM(narrow, how, *rest)
        assert explain("sum_of_a_test").implementation == "reference"
        with pytest.raises(UnsupportedError, match="cannot run this: x is wide; use backend 'aut"):
            SUM(wide, of_wide, *rest, backend="narrow")
    with pytest.raises(InputError, match=r"'relu' has not run in this process; known: \["):
        explain("relu")


def test_a_gradient_is_refused_wherever_it_is_asked_for(how: How) -> None:
    for place in ("x", "record", "tuple"):
        x, w, v = torch.ones(2, 3), torch.ones(3), torch.ones(3)
        asked = {"x": x, "record": w, "tuple": v}[place].requires_grad_()
        y = SUM(x, how._replace(part=Part(w)), (Part(v),), 0.5, None)
        assert y.requires_grad, place
        with pytest.raises(UnsupportedError, match="octavo::sum_of_a_test has no gradient"):
            (y + asked).sum().backward()
        with torch.no_grad():
            assert not SUM(x, how, (Part(v),), 0.5, None).requires_grad


def test_plans_are_not_kept_for_ever(how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "MOST_PLANS", 2)
    for rows in (1, 2, 3, 3, 1):
        SUM(torch.ones(rows, 3), how, (), 0.5, None)
    assert [len(shape) and shape[0] for shape in checked] == [1, 2, 3, 1]


def test_a_choice_that_is_not_settled_is_made_anew(
    how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU where nothing can be measured at the moment."""
    found = select("sum_of_a_test", SUM.implementations, "auto", (torch.ones(2, 3),))
    choices = iter([found._replace(settled=settled) for settled in (False, False, True)])
    monkeypatch.setattr(operator, "select", lambda *_, **__: next(choices))
    for _ in range(5):
        SUM(torch.ones(2, 3), how, (), 0.5, None)
    assert len(checked) == 3


def test_a_program_that_was_exported_is_validated(how: How) -> None:
    flat = SUM.flat(torch.ones(2, 3), how, (), 0.5, None)
    SUM.overload(*flat, "auto")
    flat[0] = torch.ones(3)
    with pytest.raises(InputError, match="x is no matrix"):
        SUM.overload(*flat, "auto")


def test_what_makes_int8_products_alike() -> None:
    def kind(m: int, n: int = 8, dtype: torch.dtype = torch.float16, **options: Any) -> Any:
        x, w = torch.ones(m, 16, dtype=torch.int8), torch.ones(n, 16, dtype=torch.int8)
        return schema._bucket(x, w, epilogue(dtype, m, n)._replace(**options))

    assert kind(17) == kind(32)
    assert kind(2) == kind(16)
    different = [kind(1), kind(16), kind(17), kind(33), kind(17, 9), kind(17, 8, torch.float32)]
    different += [kind(17, activation="gelu"), kind(17, bias=None)]
    assert len(set(different)) == len(different)
    empty = torch.ones(2, 0, dtype=torch.int8)
    assert schema._bucket(empty, empty, epilogue(torch.float16, 2, 2))[0] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("OCTAVO_TUNE", raising=False)
    x = torch.randint(-128, 128, (64, 256), dtype=torch.int8, device="cuda")
    one = torch.tensor(0.01, device="cuda")
    found = int8_gemm(x, x, one, one)
    decision = explain("int8_gemm")
    assert len(decision.microseconds) >= 2
    assert decision.implementation == min(decision.microseconds, key=lambda pair: pair[1])[0]
    torch.testing.assert_close(
        found, int8_gemm(x, x, one, one, backend="reference"), rtol=2e-3, atol=1e-3
    )
    graph = torch.cuda.CUDAGraph()
    y = torch.randint(-128, 128, (128, 256), dtype=torch.int8, device="cuda")
    int8_gemm(y, x, one, one, backend="triton")  # compiled outside the capture
    with torch.cuda.graph(graph):
        int8_gemm(y, x, one, one)
    assert explain("int8_gemm").unmeasured == "a CUDA graph is being captured"
    int8_gemm(y, x, one, one)
    assert explain("int8_gemm").microseconds, "measured after the capture"
