"""LayerNorm(linear(x) + residual) in C: what it computes, where it stands, when it steps back."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo import Int8Dynamic, Int8Static
from octavo.kernels import use_backend
from octavo.layers import Int8Linear
from octavo.layers.linear import add_norm
from octavo.layers.linear.add_norm import AddNorm

here = pytest.mark.skipif(bool(add_norm.LIBRARY.why_not()), reason=add_norm.LIBRARY.why_not())


class Output(nn.Module):
    """As many of transformers' encoders end their blocks."""

    def __init__(self, k: int = 48, n: int = 32, **norm: Any) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(k, n), nn.Dropout(0.5)
        self.LayerNorm = nn.LayerNorm(n, **norm)
        for p in self.LayerNorm.parameters():
            nn.init.normal_(p)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        return self.LayerNorm(hidden_states + input_tensor)


class Plain(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(torch.add(residual, self.dense(x)))


class Scaled(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + 2 * self.dense(x))


class Halved(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(torch.add(residual, self.dense(x), alpha=0.5))


class Twice(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + self.dense(x)) + residual


class Doubled(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        self.dense(x)
        return self.LayerNorm(residual + residual)


class Turned(Output):
    def forward(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Sized(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.size is None:
            return self.LayerNorm(self.dense(x) + residual)
        return residual

    size = None


class Block(nn.Module):
    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.output(x, residual)


KNOWN, OTHERS = (Output, Plain), (Scaled, Halved, Twice, Doubled, Turned, Sized)
for kind in (*KNOWN, *OTHERS):
    kind.__module__ = "transformers.models.of_a_test"


def block(output: nn.Module, recipe: Any = None, data: Any = None) -> nn.Module:
    model = Block(output).eval()
    return octavo.quantize(model, recipe or Int8Dynamic(), data, include=["*"], verbose=False)


def given(*rows: int, k: int = 48, n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(sum(rows))
    return torch.randn(*rows, k, generator=random), torch.randn(*rows, n, generator=random)


def own_code(output: AddNorm, *args: Any) -> torch.Tensor:
    with torch.no_grad():
        return output.kind.forward(output, *args)


@pytest.fixture
def calls(count_calls: Callable[[Any, str], list[int]]) -> list[int]:
    """Grows with every call of the C."""
    return count_calls(add_norm, "_in_place")


@here
@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("norm", [{}, {"eps": 0.5}, {"bias": False}, {"elementwise_affine": False}])
@pytest.mark.parametrize("n", [1, 5, 16, 33, 384])
def test_it_is_the_norm_of_the_sum(
    kind: type[Output], norm: dict[str, Any], n: int, calls: list[int]
) -> None:
    torch.manual_seed(n)
    model = block(kind(7, n, **norm))
    x, residual = given(3, 5, k=7, n=n)
    before = residual.clone()
    with torch.no_grad():
        found = model(x, residual)
        total = model.output.dense(x).double() + residual.double()
        wanted = copy.deepcopy(model.output.LayerNorm).double()(total)
    assert len(calls) == 1
    assert torch.equal(residual, before)
    # a row of one value is all rounding
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 if n > 1 else 1e-3)


@here
def test_values_that_are_not_finite_stay_in_their_row(calls: list[int]) -> None:
    model = block(Output())
    x, residual = given(6)
    residual[1, 3], residual[4, 0] = float("nan"), float("inf")
    with torch.no_grad():
        found = model(x, residual)
    assert found.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert len(calls) == 1


@here
def test_any_number_of_threads_gives_the_same_bits() -> None:
    model, most = block(Output(64, 1000)), torch.get_num_threads()
    x, residual = given(301, k=64, n=1000)
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found.append(model(x, residual))
    finally:
        torch.set_num_threads(most)
    assert all(torch.equal(one, found[0]) for one in found)


def _hooked(model: nn.Module) -> None:
    model.output.dense.register_forward_hook(lambda *_: None)


def _dropping(model: nn.Module) -> None:
    model.output.dropout.train()


def _norm_in_half(model: nn.Module) -> None:
    model.output.LayerNorm.half()


class HalfNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def _norm_of_a_subclass(model: nn.Module) -> None:
    model.output.LayerNorm = HalfNorm(32)


def _norm_of_rows(model: nn.Module) -> None:
    model.output.LayerNorm = nn.LayerNorm((4, 32))


def _other_norm(model: nn.Module) -> None:
    model.output.LayerNorm = nn.Identity()


@here
@pytest.mark.parametrize(
    "change", [_hooked, _dropping, _norm_in_half, _norm_of_a_subclass, _norm_of_rows, _other_norm]
)
def test_a_changed_module_runs_its_own_code(
    change: Callable[[nn.Module], None], calls: list[int]
) -> None:
    model, args = block(Output()), given(4)
    change(model)

    def outcome(call: Callable[..., torch.Tensor]) -> Any:
        torch.manual_seed(0)
        try:
            return call(*args).tolist()
        except RuntimeError as error:  # torch refuses to mix these dtypes
            return str(error)

    with torch.no_grad():
        assert outcome(model) == outcome(lambda *a: own_code(model.output, *a))
    assert not calls


@here
def test_calls_that_c_cannot_take_run_the_modules_code(calls: list[int]) -> None:
    model = block(Output())
    x, residual = given(4, 6)
    wanted = own_code(model.output, x, residual)
    strided = residual.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        assert torch.equal(model.output(hidden_states=x, input_tensor=residual), wanted)
        assert torch.equal(model(x, strided), wanted)
        assert torch.equal(model(x, residual[:1]), own_code(model.output, x, residual[:1]))
        assert model(x.bfloat16(), residual.bfloat16()).dtype == torch.bfloat16
        with use_backend("reference"):
            model(x, residual)
        with pytest.raises(TypeError):
            model(x, None)
    assert model(x, residual).requires_grad, "the norm's weights want a gradient"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with torch.no_grad():
            model(x, residual)
    finally:
        handle.remove()
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(model(x, residual), wanted, rtol=1e-5, atol=1e-5)
    assert calls


@pytest.mark.parametrize("kind", OTHERS)
def test_other_code_stays_in_its_place(kind: type[Output]) -> None:
    assert type(block(kind()).output) is kind


def test_only_dynamic_layers_and_modules_without_hooks() -> None:
    hooked = Output()
    hooked.register_forward_hook(lambda *_: None)
    assert type(block(hooked).output) is Output
    data = [given(8)]
    static = block(Output(), Int8Static(smooth=None), [tuple(one) for one in data])
    assert isinstance(static.output.dense, Int8Linear)
    assert type(static.output) is Output


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_stand_for_themselves(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, Output.__module__, sys.modules[__name__])
    model, args = block(Output()), given(4)
    kept = pickle.dumps(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(kept)  # noqa: S301
    assert isinstance(twin.output, AddNorm)
    names = {*Block(Output()).state_dict(), "output.dense.weight_scale"}
    assert twin.state_dict().keys() == names
    with torch.no_grad():
        wanted = model(*args)
        assert torch.equal(twin(*args), wanted)
        model.output.LayerNorm.weight.zero_()
        assert torch.equal(twin(*args), wanted)
    assert "of Output" in repr(model)


def test_a_checkpoint_has_it_again(tmp_path: Path) -> None:
    model, args = block(Output()), given(4)
    octavo.save_quantized(model, tmp_path / "model.safetensors")
    loaded = octavo.load_quantized(Block(Output()).eval(), tmp_path / "model.safetensors")
    assert isinstance(loaded.output, AddNorm)
    with torch.no_grad():
        assert torch.equal(loaded(*args), model(*args))


def _compiled(model: nn.Module, args: tuple[torch.Tensor, ...], way: str) -> tuple[Any, str]:
    """What calls the model, and the code that a compiler saw."""
    if way == "export":
        program = torch.export.export(model, args)
        return program.module(), program.graph_module.code
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.append(graph.code)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    compiled(*args)
    (code,) = seen
    return compiled, code


@here
@pytest.mark.parametrize("way", ["compile", "export"])
def test_compilers_see_one_operator_with_the_same_bits(way: str) -> None:
    model, args = block(Output()), given(4)
    with torch.no_grad():
        made, code = _compiled(model, args, way)
        assert code.count("octavo.add_norm") == 1
        assert torch.equal(made(*args), model(*args))


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("way", ["compile", "export"])
def test_without_c_compilers_see_the_modules_code(way: str) -> None:
    model, args = block(Output()), given(4)
    with torch.no_grad():
        made, code = _compiled(model, args, way)
        assert "add_norm" not in code
        torch.testing.assert_close(made(*args), model(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["compile", "export"])
def test_where_a_gradient_is_wanted_compilers_see_the_modules_code(way: str) -> None:
    model, args = block(Output()), given(4)
    made, code = _compiled(model, args, way)
    assert "add_norm" not in code
    assert made(*args).requires_grad


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 17), (0, 4)])
@pytest.mark.parametrize("parts", [2, 1, 0])
def test_the_operator_is_a_proper_one(shape: tuple[int, ...], parts: int) -> None:
    x, residual, weight, bias = (
        torch.randn(*size) for size in (shape, shape, shape[-1:], shape[-1:])
    )
    args = x, residual, weight if parts else None, bias if parts == 2 else None, 1e-5
    torch.library.opcheck(torch.ops.octavo.add_norm, args)
    wanted = nn.functional.layer_norm(x + residual, shape[-1:], args[2], args[3], 1e-5)
    torch.testing.assert_close(torch.ops.octavo.add_norm(*args), wanted, rtol=1e-5, atol=1e-5)
    double = [one.double() if isinstance(one, torch.Tensor) else one for one in args]
    assert torch.ops.octavo.add_norm(*double).dtype == torch.float64
    strided = x.T.contiguous().T if x.ndim == 2 else x
    found = torch.ops.octavo.add_norm(strided, residual[:1].expand(shape), *args[2:])
    wanted = nn.functional.layer_norm(x + residual[:1], shape[-1:], args[2], args[3], 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
