"""AddNorm: what it stands for, where it stands, and when its norm is torch's own module again."""

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
from octavo.kernels import explain, use_backend
from octavo.kernels.add_norm import native
from octavo.kernels.dynamic_quantize import schema as dynamic_quantize
from octavo.layers import Int8Linear
from octavo.layers.linear import add_norm
from octavo.layers.linear.add_norm import AddNorm

NO_C = native.LIBRARY.reason()


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


class Switched(Output):
    """Its code asks for a setting of its own, and is taken for what it does with that."""

    on = True

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.on:
            return self.LayerNorm(self.dense(x) + residual)
        return residual


class Off(Switched):
    on = False


class OnlyInTraining(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.LayerNorm(self.dense(x) + residual)
        return residual


class OnlyInEvaluation(Output):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.training:
            return residual
        return self.LayerNorm(self.dense(x) + residual)


class Other(Output):
    """The norm comes before the sum."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x)) + residual


class Block(nn.Module):
    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.output(x, residual)


KNOWN = (Output, Plain, Switched)
OTHERS = (
    *(Scaled, Halved, Twice, Doubled, Turned, Off),
    *(OnlyInTraining, OnlyInEvaluation, Other),
)
for kind in (*KNOWN, *OTHERS):
    kind.__module__ = "transformers.models.of_a_test"


def block(output: nn.Module, recipe: Any = None, data: Any = None) -> nn.Module:
    model = Block(output).eval()
    return octavo.quantize(model, recipe or Int8Dynamic(), data, include=["*"], verbose=False)


def given(*rows: int, k: int = 48, n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(sum(rows))
    return torch.randn(*rows, k, generator=random), torch.randn(*rows, n, generator=random)


def by_torch(output: AddNorm, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Of its layers, each called by itself."""
    return output.LayerNorm(output.dropout(output.dense(x)) + residual)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call of the operator, whether it quantizes."""
    made: list[bool] = []
    run = add_norm.add_norm

    def noting(*args: Any, quantize: bool = False, **options: Any) -> Any:
        made.append(quantize)
        return run(*args, quantize=quantize, **options)

    monkeypatch.setattr(add_norm, "add_norm", noting)
    return made


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("norm", [{}, {"eps": 0.5}, {"bias": False}, {"elementwise_affine": False}])
def test_it_is_the_norm_of_the_sum(
    kind: type[Output], norm: dict[str, Any], calls: list[bool]
) -> None:
    model = block(kind(7, 33, **norm))
    assert isinstance(model.output, AddNorm)
    x, residual = given(3, 5, k=7, n=33)
    before = residual.clone()
    with torch.no_grad():
        found = model(x, residual)
        total = model.output.dense(x).double() + residual.double()
        wanted = copy.deepcopy(model.output.LayerNorm).double()(total)
    assert calls == [False]
    assert torch.equal(residual, before)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    if not NO_C:
        assert explain("add_norm").implementation == "native"


def _norm_with_a_hook(output: AddNorm) -> None:
    output.LayerNorm.register_forward_hook(lambda *args: args[2] * 2)


def _norm_in_half(output: AddNorm) -> None:
    output.LayerNorm.half()


class HalfNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def _norm_of_a_subclass(output: AddNorm) -> None:
    output.LayerNorm = HalfNorm(32)


def _norm_of_rows(output: AddNorm) -> None:
    output.LayerNorm = nn.LayerNorm((4, 32))


def _other_norm(output: AddNorm) -> None:
    output.LayerNorm = nn.Identity()


def _outcome(call: Callable[..., torch.Tensor], *args: Any) -> Any:
    torch.manual_seed(0)
    try:
        return call(*args).tolist()
    except RuntimeError as error:  # torch refuses to mix these dtypes
        return str(error)


@pytest.mark.parametrize(
    "change", [_norm_with_a_hook, _norm_in_half, _norm_of_a_subclass, _norm_of_rows, _other_norm]
)
def test_a_norm_that_was_changed_is_called_itself(
    change: Callable[[AddNorm], None], calls: list[bool]
) -> None:
    model, args = block(Output()), given(4)
    change(model.output)
    with torch.no_grad():
        assert _outcome(model, *args) == _outcome(lambda *a: by_torch(model.output, *a), *args)
    assert not calls


def _double(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2


def _layer_with_a_hook(output: AddNorm) -> None:
    output.dense.register_forward_hook(_double)


def _other_layer(output: AddNorm) -> None:
    output.dense = nn.Linear(48, 32)


def _dropping(output: AddNorm) -> None:
    output.dropout.train()


def _dropout_with_a_hook(output: AddNorm) -> None:
    output.dropout.register_forward_hook(_double)


@pytest.mark.parametrize(
    "change", [_layer_with_a_hook, _other_layer, _dropping, _dropout_with_a_hook]
)
def test_what_comes_before_the_norm_may_change(
    change: Callable[[AddNorm], None], calls: list[bool]
) -> None:
    model, args = block(Output()), given(4)
    change(model.output)
    with torch.no_grad():
        torch.manual_seed(0)
        found = model(*args)
        torch.manual_seed(0)
        wanted = by_torch(model.output, *args)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert calls == [False]


def test_calls_that_do_not_fit_run_the_modules_layers(calls: list[bool]) -> None:
    model = block(Output())
    x, residual = given(4, 6)
    narrow = x.bfloat16(), residual.bfloat16()
    with torch.no_grad():
        assert torch.equal(model(x, residual[:1]), by_torch(model.output, x, residual[:1]))
        for args in (narrow, (narrow[0], residual), (x, narrow[1])):
            found = _outcome(model, *args)
            assert found == _outcome(lambda *a: by_torch(model.output, *a), *args)
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = model(x, residual), by_torch(model.output, x, residual)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
        with pytest.raises(TypeError):
            model(x, None)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            model(x, residual)
        finally:
            handle.remove()
    assert not calls


def test_calls_that_fit(calls: list[bool]) -> None:
    model = block(Output())
    x, residual = given(4, 6)
    with torch.no_grad():
        wanted = by_torch(model.output, x, residual)
        strided = residual.transpose(0, 1).contiguous().transpose(0, 1)
        for found in (
            model(x, residual),
            model.output(hidden_states=x, input_tensor=residual),
            model.output(x, input_tensor=residual),
            model(x, strided),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert calls == [False] * 4


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("x",), {}),
        ((), {"input_tensor": "residual"}),
        (("x", "residual", "x"), {}),
        (("x", "residual"), {"scale": "x"}),
        (("x", "residual"), {"hidden_states": "x"}),
    ],
    ids=["too few", "only the second", "too many", "unknown", "twice"],
)
def test_arguments_that_the_module_does_not_take(
    args: tuple[str, ...], kwargs: dict[str, str]
) -> None:
    values = dict(zip(("x", "residual"), given(4), strict=True))
    for output in (Output(), block(Output()).output):
        with pytest.raises(TypeError):
            output(*[values[one] for one in args], **{k: values[v] for k, v in kwargs.items()})


def test_all_of_it_in_half() -> None:
    model, args = block(Output()).half(), [one.half() for one in given(4)]
    with torch.no_grad():
        found = model(*args)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, by_torch(model.output, *args), rtol=2e-3, atol=2e-3)


def test_the_reference_can_be_asked_for() -> None:
    model, args = block(Output()), given(4)
    with torch.no_grad(), use_backend("reference"):
        model(*args)
    assert str(explain("add_norm")) == "add_norm: reference"


@pytest.mark.parametrize("wanted_by", ["weights", "residual"])
def test_gradients_are_those_of_the_modules_layers(wanted_by: str) -> None:
    model = block(Output())
    x, residual = given(4)
    residual.requires_grad_(wanted_by == "residual")
    norm = model.output.LayerNorm.requires_grad_(wanted_by == "weights")
    leaves = [residual] if wanted_by == "residual" else list(norm.parameters())
    found, wanted = (
        torch.autograd.grad(run(x, residual).square().sum(), leaves)
        for run in (model, lambda *args: by_torch(model.output, *args))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


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


@pytest.mark.parametrize("way", ["compile", "export"])
def test_compilers_see_one_operator_with_the_same_bits(way: str) -> None:
    if way == "compile" and NO_C:
        pytest.skip(NO_C)
    model, args = block(Output()), given(4)
    with torch.no_grad():
        made, code = _compiled(model, args, way)
        assert code.count("octavo.add_norm") == 1
        assert torch.equal(made(*args), model(*args))


@pytest.mark.usefixtures("without_native")
def test_without_c_a_compiler_sees_plain_operations() -> None:
    model, args = block(Output()), given(4)
    with torch.no_grad():
        made, code = _compiled(model, args, "compile")
        assert "add_norm" not in code
        torch.testing.assert_close(made(*args), model(*args), rtol=1e-5, atol=1e-5)


def test_where_a_gradient_is_wanted_a_compiler_sees_plain_operations() -> None:
    model, args = block(Output()), given(4)
    made, code = _compiled(model, args, "compile")
    assert "add_norm" not in code
    weight = model.output.LayerNorm.weight
    found, wanted = (
        torch.autograd.grad(run(*args).square().sum(), weight)[0]
        for run in (made, lambda *given: by_torch(model.output, *given))
    )
    torch.testing.assert_close(found, wanted)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = Output()

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.output(x, residual)


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.dense(x))


class Encoder(nn.Module):
    """A block as transformers has it: what ends with a norm, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.intermediate = Attention(), Intermediate()
        self.output = Output()

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = self.attention(x, residual)
        return self.output(self.intermediate(y), y)


class Elsewhere(Encoder):
    """The same in a library that is not known."""


for one in (Attention, Intermediate, Encoder):
    one.__module__ = "transformers.models.of_a_test"
Elsewhere.__module__ = "elsewhere"


def encoder(kind: type[Encoder] = Encoder) -> nn.Module:
    torch.manual_seed(0)
    return octavo.quantize(kind().eval(), Int8Dynamic(), include=["*"], verbose=False)


def alone(model: nn.Module) -> nn.Module:
    """The same model, each layer for itself."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if hasattr(module, "shared"):
            module.shared = None
    return made


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is quantized by itself, for a layer or for several."""
    made: list[tuple[int, ...]] = []
    operator = dynamic_quantize.OPERATOR

    def noting(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        made.append(tuple(x.shape))
        return operator(x, *rest, **options)

    monkeypatch.setattr(dynamic_quantize, "OPERATOR", noting)
    return made


def test_a_norm_quantizes_for_the_layer_behind_it(
    calls: list[bool], quantizations: list[tuple[int, ...]]
) -> None:
    model, args = encoder(), given(4)
    assert model.attention.output.shared is model.intermediate.dense.shared is not None
    assert model.output.shared is None
    with torch.no_grad():
        found = model(*args)
        assert calls == [True, False]
        # that of 32 values a row comes from the norm
        assert (4, 32) not in quantizations
        assert torch.equal(found, alone(model)(*args))
        # whoever changes the tensor in between gets its own codes
        model.attention.register_forward_hook(lambda *given: given[2] * 2)
        assert torch.equal(model(*args), alone(model)(*args))
    assert model.intermediate.dense.shared._last is None


def test_where_a_gradient_is_wanted_the_norm_does_not_quantize(calls: list[bool]) -> None:
    model = encoder()
    x, residual = given(4)
    wanted = alone(model)(x, residual)
    calls.clear()
    torch.testing.assert_close(model(x, residual.requires_grad_()), wanted)
    assert calls == [False, False]


def test_in_other_dtypes_and_other_libraries_the_norm_does_not_quantize(
    calls: list[bool],
) -> None:
    model, args = encoder().half(), [one.half() for one in given(4)]
    with torch.no_grad():
        assert torch.equal(model(*args), alone(model)(*args))
    assert not any(calls)
    other = encoder(Elsewhere)
    assert isinstance(other.attention.output, AddNorm)
    assert other.attention.output.shared is other.intermediate.dense.shared is None


@pytest.mark.parametrize("way", ["compile", "export"])
def test_compilers_see_that_the_norm_quantizes(way: str) -> None:
    if way == "compile" and NO_C:
        pytest.skip(NO_C)
    model, args = encoder(), given(4)
    with torch.no_grad():
        made, code = _compiled(model, args, way)
        assert torch.equal(made(*args), model(*args))
    assert code.count("octavo.add_norm") == 2
    # of the inputs of `attention.output.dense` and `output.dense`
    assert code.count("octavo.dynamic_quantize") == 2


def test_copies_share_among_themselves(tmp_path: Path) -> None:
    model, args = encoder(), given(4)
    octavo.save_quantized(model, tmp_path / "model.safetensors")
    loaded = octavo.load_quantized(Encoder().eval(), tmp_path / "model.safetensors")
    for other in (copy.deepcopy(model), loaded):
        shared = other.attention.output.shared
        assert shared is other.intermediate.dense.shared
        assert shared is not model.intermediate.dense.shared
        with torch.no_grad():
            assert torch.equal(other(*args), model(*args))
