"""Modules as graphs: dynamic batches, restored modes, reasons for failures, and port names."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_graphs import run, values_of
from torch import nn

from octavo.core.errors import ExportError, InputError
from octavo.export import (
    TorchExport,
    export_torch,
    fingerprint,
    input_specs,
    module_ports,
    output_specs,
    place,
)
from octavo.export.torch_export import torch_fingerprint


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU6()
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.act(self.bn(self.conv(x)))))
        return torch.relu(x + y)


class Picture(nn.Module):
    """Convolutions with BatchNorm, residual blocks, and a Linear that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([Residual(8), Residual(8)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.shared = nn.Linear(8, 8)
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.pool(x).flatten(1)
        x = self.shared(self.shared(x))
        return self.head(self.drop(x))


class Words(nn.Module):
    """A transformer block on [batch, tokens, channels]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
        return x + self.mlp(self.norm2(x))


def trained(module: nn.Module) -> nn.Module:
    """Gives BatchNorm statistics that make folding it visible."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.fixture(scope="module")
def picture() -> tuple[nn.Module, TorchExport]:
    module = trained(Picture())
    return module, export_torch(module, torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="module")
def words() -> tuple[nn.Module, TorchExport]:
    module = trained(Words())
    return module, export_torch(module, torch.randn(1, 5, 8))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["picture", "words"])
def test_any_batch_runs_after_an_example_of_one(
    name: str, batch: int, request: pytest.FixtureRequest
) -> None:
    module, exported = request.getfixturevalue(name)
    (spec,) = input_specs(exported.model)
    assert spec.shape[0] == "batch"
    assert output_specs(exported.model)[0].shape[0] == "batch"
    x = torch.randn(batch, *spec.shape[1:])
    with torch.no_grad():
        expected = module(x).numpy()
    found = run(exported.model, {spec.name: x.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def observed(module: nn.Module, ports: dict[str, str], x: torch.Tensor) -> dict[str, Any]:
    """What hooks see at each port; a list, as a module may be called often."""
    seen: dict[str, list[np.ndarray]] = {port: [] for port in ports}
    parts = dict(module.named_modules())

    def watch(port: str) -> Any:
        def before(_module: nn.Module, args: Any) -> None:
            seen[port].append(args[0].numpy().copy())

        def after(_module: nn.Module, _args: Any, y: torch.Tensor) -> None:
            seen[port].append(y.numpy().copy())

        name, _, end = port.rpartition(".")
        if end == "input":
            return parts[name].register_forward_pre_hook(before)
        return parts[name].register_forward_hook(after)

    handles = [watch(port) for port in ports]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["picture", "words"])
def test_ports_name_the_tensors_that_hooks_see(name: str, request: pytest.FixtureRequest) -> None:
    module, exported = request.getfixturevalue(name)
    ports = module_ports(exported.model)
    (spec,) = input_specs(exported.model)
    x = torch.randn(2, *spec.shape[1:])
    seen = observed(module, ports, x)
    values = values_of(exported.model, list(set(ports.values())), {spec.name: x.numpy()})
    for port, tensor in ports.items():
        assert len(seen[port]) == 1, f"{port} is called {len(seen[port])} times"
        np.testing.assert_allclose(
            seen[port][0], values[tensor], rtol=1e-4, atol=1e-5, err_msg=f"{port} -> {tensor}"
        )


def test_ports_of_residual_blocks(picture: tuple[nn.Module, TorchExport]) -> None:
    ports = module_ports(picture[1].model)
    for block in ("blocks.0", "blocks.1"):
        for port in ("conv.input", "bn.output", "act.output", "conv2.input", "bn2.output"):
            assert f"{block}.{port}" in ports
        assert f"{block}.output" in ports
        # folded into the BatchNorm behind it, the convolution's own result no longer exists
        assert f"{block}.conv.output" not in ports
    assert {"stem.0.input", "stem.output", "stem.2.output", "head.input", "head.output"} <= set(
        ports
    )
    assert ports["blocks.0.output"] == ports["blocks.1.conv.input"]


def test_ports_of_a_module_called_twice_are_left_out(
    picture: tuple[nn.Module, TorchExport],
) -> None:
    assert not [port for port in module_ports(picture[1].model) if port.startswith("shared")]


def test_every_linear_of_a_transformer_has_its_input(words: tuple[nn.Module, TorchExport]) -> None:
    module, exported = words
    ports = module_ports(exported.model)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    assert {f"{name}.input" for name in linear} <= set(ports)
    weights = {layer.weight for layer in place(exported.model).layers if layer.weight}
    assert weights == {f"{name}.weight.T" for name in linear}, "patterns could not find them"


def test_other_graphs_have_no_ports(picture: tuple[nn.Module, TorchExport]) -> None:
    model = picture[1].model.clone()
    for node in model.graph:
        node.metadata_props.clear()
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"constant_{index}"
    assert module_ports(model) == {}


class KeywordInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, x: torch.Tensor, *, scale: torch.Tensor, table: torch.Tensor, double: bool = False
    ) -> torch.Tensor:
        y = self.layer(x) * scale + table.sum(0)
        return y * 2 if double else y


def test_keyword_inputs_and_fixed_ones_beside_the_batch() -> None:
    module = KeywordInputs().eval()
    example = {
        "scale": torch.randn(1, 4),
        "x": torch.randn(1, 4),
        "table": torch.randn(2, 4),  # as long as the two samples that torch.export is given
        "double": True,
    }
    model = export_torch(module, example).model
    shapes = {spec.name: spec.shape for spec in input_specs(model)}
    assert shapes == {"scale": ("batch", 4), "x": ("batch", 4), "table": (2, 4)}
    feeds = {"scale": torch.randn(3, 4), "x": torch.randn(3, 4), "table": torch.randn(2, 4)}
    expected = module(**feeds, double=True).detach().numpy()
    found = run(model, {name: x.numpy() for name, x in feeds.items()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, x * 2


def test_several_inputs_and_outputs() -> None:
    module = Sum()
    model = export_torch(module, [torch.randn(5, 4), torch.randn(5, 4)]).model
    assert [spec.shape for spec in input_specs(model)] == [("batch", 4)] * 2
    x, y = np.ones((1, 4), np.float32), np.full((1, 4), 2, np.float32)
    total, double = run(model, {"x": x, "y": y})
    np.testing.assert_array_equal(total, x + y)
    np.testing.assert_array_equal(double, x * 2)


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 3, 4) + 1


def test_a_fixed_batch_is_refused_with_the_way_out() -> None:
    with pytest.raises(ExportError, match=r"static shape of 2.*dynamic_batch=False"):
        export_torch(Fixed(), torch.randn(2, 12))
    model = export_torch(Fixed(), torch.randn(2, 12), dynamic_batch=False).model
    assert input_specs(model)[0].shape == (2, 12)


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(4)
        self.nested = nn.Sequential(nn.Linear(4, 4), nn.Dropout())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the lookup table is missing")


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


@pytest.mark.parametrize("make", [Picture, Raises])
def test_mixed_modes_are_restored(make: Callable[[], nn.Module]) -> None:
    module = make().train()
    frozen = module.blocks[1].bn if isinstance(module, Picture) else module.frozen
    frozen.eval()
    before = modes(module)
    assert len(set(before.values())) == 2
    if isinstance(module, Picture):
        export_torch(module, torch.randn(2, 3, 8, 8))
    else:
        with pytest.raises(ExportError):
            export_torch(module, torch.randn(2, 4))
    assert modes(module) == before
    assert logging.getLogger("torch.onnx").level == logging.NOTSET


def test_the_reason_of_a_failure_is_given() -> None:
    with pytest.raises(ExportError, match="cannot export Raises: the lookup table is missing"):
        export_torch(Raises(), torch.randn(2, 4))


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


def test_control_flow_on_data_is_refused() -> None:
    with pytest.raises(ExportError, match=r"cannot export DataDependent: .*data-dependent"):
        export_torch(DataDependent(), torch.randn(2, 4))


class Pooled(nn.Module):
    """A reshape after a pool, as classifiers end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.point(torch.relu(self.stem(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("what", ["weights", "input"])
@pytest.mark.slow
def test_channels_last_gives_the_same_graph(what: str) -> None:
    module, example = Pooled().eval(), torch.randn(2, 3, 8, 8)
    expected = fingerprint(export_torch(module, example).model)
    if what == "weights":
        module = module.to(memory_format=torch.channels_last)
    else:
        example = example.to(memory_format=torch.channels_last)
    assert fingerprint(export_torch(module, example).model) == expected
    if what == "weights":
        assert module.stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("example", [5, "text", None])
def test_examples_that_are_no_inputs(example: Any) -> None:
    with pytest.raises(InputError, match="give a tensor, a tuple or a dict"):
        export_torch(Sum(), example)


@pytest.mark.parametrize(
    "example",
    [(torch.ones(2, 3, 8, 8), torch.ones(2)), {"picture": torch.ones(2, 3, 8, 8)}],
    ids=["labels", "name"],
)
def test_inputs_that_forward_does_not_take(example: Any) -> None:
    with pytest.raises(InputError, match=r"Pooled\.forward\(x.* cannot take .* is the labels"):
        export_torch(Pooled(), example)


@pytest.mark.parametrize("example", [(), {}, ("text", 3)])
def test_examples_without_a_tensor(example: Any) -> None:
    with pytest.raises(InputError, match="hold no tensor"):
        export_torch(Sum(), example)


def test_exporting_twice_gives_the_same_fingerprint(
    picture: tuple[nn.Module, TorchExport],
) -> None:
    module, exported = picture
    again = export_torch(module, torch.randn(4, 3, 8, 8))
    assert fingerprint(again.model) == fingerprint(exported.model)


def test_no_paths_of_this_machine_in_the_graph(picture: tuple[nn.Module, TorchExport]) -> None:
    for node in picture[1].model.graph:
        assert set(node.metadata_props) <= {"pkg.torch.onnx.name_scopes"}
        assert isinstance(ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"]), list)


def test_torch_fingerprint_sees_values_names_and_types() -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    mark = torch_fingerprint(module)
    assert torch_fingerprint(module.eval()) == mark
    twin = nn.Linear(4, 4)
    twin.load_state_dict(module.state_dict())
    assert torch_fingerprint(twin) == mark
    assert torch_fingerprint(nn.Sequential(module)) != mark
    assert torch_fingerprint(module.double()) != mark
    with torch.no_grad():
        twin.bias[0] += 1e-6
    assert torch_fingerprint(twin) != mark
