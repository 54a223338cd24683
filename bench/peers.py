"""What other packages offer for the same calls; each is used where it is installed.

Every peer gets what the case's codes stand for, in the form in which it wants it, prepared before
anything is timed. One that cannot be prepared or cannot run says so in its row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from octavo.kernels import dynamic_quantize, int8_gemm
from octavo.kernels.cases import Call, Case
from octavo.kernels.weight_only_gemm.cases import weight_of

REQUANTIZED = 0.03
"""Error of a peer that quantizes the float values once more, with scales of its own."""
SHORT_NORMALIZER = 0.05
"""Error of a peer whose normaliser and features are rounded to the type of the inputs."""

Arguments = Mapping[str, Any]
Maker = Callable[[Case, Arguments], Callable[[], Any]]


def absent() -> dict[str, str]:
    """Packages that peers would come from and that are not here."""
    packages = sorted({package for peers in PEERS.values() for _, package, _, _ in peers})
    return {
        package: "not installed"
        for package in packages
        if importlib.util.find_spec(package) is None
    }


def peer_calls(case: Case, arguments: Arguments) -> list[Call]:
    """Every installed peer of the operator, and our own forms that only the project measures."""
    missing = absent()
    found = [
        Call(name, _prepared(make, case, arguments), tolerance)
        for name, package, tolerance, make in PEERS.get(case.operator, ())
        if package not in missing
    ]
    if case.operator == "int8_gemm":
        call = _quantize_and_multiply(case, arguments)
        found.append(Call("octavo with quantization", call, REQUANTIZED, ours=True))
    return found


def _prepared(make: Maker, case: Case, arguments: Arguments) -> Callable[[], Any]:
    try:
        return make(case, arguments)
    except Exception as error:  # a peer that cannot be prepared says so when it is called
        reason = error

        def fail() -> None:
            raise reason

        return fail


def _float_operands(case: Case, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    x = arguments["x_q"] * arguments["scale_x"][:, None]
    w = arguments["w_q"] * arguments["scale_w"][:, None]
    return x.to(case.dtype), w.to(case.dtype)


def _quantize_and_multiply(case: Case, arguments: Arguments) -> Callable[[], Any]:
    x, _ = _float_operands(case, arguments)
    rest = {name: arguments[name] for name in ("bias", "activation") if name in arguments}

    def call() -> torch.Tensor:
        codes, scale = dynamic_quantize(x)
        return int8_gemm(
            codes,
            arguments["w_q"],
            scale,
            arguments["scale_w"],
            out_dtype=arguments["out_dtype"],
            **rest,
        )

    return call


def _finish(case: Case, arguments: Arguments) -> Callable[[torch.Tensor], torch.Tensor]:
    from octavo.kernels.common.epilogue import ACTIVATIONS

    bias, activate = arguments.get("bias"), ACTIVATIONS[arguments.get("activation", "none")]

    def finish(y: torch.Tensor) -> torch.Tensor:
        return activate(y if bias is None else y + bias).to(case.dtype)

    return finish


def _torchao_int8(case: Case, arguments: Arguments) -> Callable[[], Any]:
    from torchao.kernel.intmm import int_scaled_matmul

    x, w = arguments["x_q"], arguments["w_q"].T
    scale_x, scale_w = arguments["scale_x"][:, None], arguments["scale_w"]
    finish = _finish(case, arguments)
    return lambda: finish(int_scaled_matmul(x, w, scale_x) * scale_w)


def _gemlite_int8(case: Case, arguments: Arguments) -> Callable[[], Any]:
    from gemlite.helper import A8W8_int8_dynamic

    x, w = _float_operands(case, arguments)
    layer = A8W8_int8_dynamic(device=x.device).from_weights(w)
    finish = _finish(case, arguments)
    return lambda: finish(layer(x))


def _dequantized(case: Case, arguments: Arguments) -> torch.Tensor:
    return weight_of(arguments, case.shape[2]).dequantize().to(case.dtype)


def _torchao_weight_only(case: Case, arguments: Arguments) -> Callable[[], Any]:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    w = _dequantized(case, arguments)
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device=w.device)
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    if arguments["bits"] == 8:
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        config = Int4WeightOnlyConfig(
            group_size=arguments["group_size"],
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    quantize_(linear, config)
    x = arguments["x"]

    def call() -> Any:
        with torch.no_grad():
            return linear(x)

    return call


def _gemlite_weight_only(case: Case, arguments: Arguments) -> Callable[[], Any]:
    from gemlite.helper import A16W8, A16Wn

    x, bits, group = arguments["x"], arguments["bits"], arguments["group_size"]
    if bits == 8:
        layer = A16W8(device=x.device).from_weights(_dequantized(case, arguments))
    else:
        weight = weight_of(arguments, case.shape[2])
        half = 0 if weight.zero_point is not None else 1 << (bits - 1)
        zeros = torch.full_like(weight.scale, half) if half else weight.zero_point
        layer = A16Wn(device=x.device).from_weights(
            (weight.values.int() + half).to(torch.uint8),
            weight.scale.reshape(-1, 1),
            zeros.to(weight.scale.dtype).reshape(-1, 1),
            bits,
            group or case.shape[2],
        )
    return lambda: layer(x)


def _torchao_quantize(_case: Case, arguments: Arguments) -> Callable[[], Any]:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        quantize_affine,
    )

    x = arguments["x"]
    if "smooth" in arguments:
        raise NotImplementedError("it has no divisor")
    block = (1, x.shape[-1])

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = choose_qparams_affine(
            x,
            MappingType.SYMMETRIC,
            block,
            torch.int8,
            quant_min=-127,
            quant_max=127,
            scale_dtype=torch.float32,
        )
        codes = quantize_affine(x, block, scale, zero, torch.int8, -127, 127)
        return codes, scale.reshape(-1)

    return call


def _torchao_quantize_static(case: Case, arguments: Arguments) -> Callable[[], Any]:
    from torchao.quantization.quant_primitives import quantize_affine

    x, scale = arguments["x"], arguments["scale"]
    block = (case.shape[0], 1) if scale.ndim else case.shape
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return lambda: quantize_affine(x, block, scale, zero, torch.int8, -128, 127)


def _fla(kernel: str) -> Maker:
    def make(_case: Case, arguments: Arguments) -> Callable[[], Any]:
        from fla.ops import linear_attn

        if not arguments["causal"]:
            raise NotImplementedError("it is causal only")
        attend = getattr(linear_attn, kernel)

        def call() -> torch.Tensor:
            q, k = (torch.nn.functional.elu(arguments[name]) + 1 for name in "qk")
            return attend(q, k, arguments["v"], scale=1.0, normalize=True)[0]

        return call

    return make


def _fla_step(_case: Case, arguments: Arguments) -> Callable[[], Any]:
    """Its state is new with every step, and its own normaliser knows no earlier tokens."""
    from fla.ops.linear_attn import fused_recurrent_linear_attn

    q, k, v, kv, normalizer = (arguments[name] for name in ("q", "k", "v", "kv", "normalizer"))

    def call() -> tuple[torch.Tensor, ...]:
        queries, keys = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        token = (x[:, None] for x in (queries, keys, v))
        sums, state = fused_recurrent_linear_attn(
            *token, scale=1.0, initial_state=kv, output_final_state=True, normalize=False
        )
        normalizer.add_(keys)
        below = (queries * normalizer).sum(-1, keepdim=True)
        return (sums[:, 0] / below).to(v.dtype), state, normalizer

    return call


PEERS: dict[str, tuple[tuple[str, str, float, Maker], ...]] = {
    "int8_gemm": (
        ("torchao", "torchao", 0.01, _torchao_int8),
        ("gemlite with quantization", "gemlite", REQUANTIZED, _gemlite_int8),
    ),
    "dynamic_quantize": (("torchao", "torchao", REQUANTIZED, _torchao_quantize),),
    "static_quantize": (("torchao", "torchao", REQUANTIZED, _torchao_quantize_static),),
    "weight_only_gemm": (
        ("torchao", "torchao", 0.1, _torchao_weight_only),
        ("gemlite", "gemlite", REQUANTIZED, _gemlite_weight_only),
    ),
    "linear_attention": (
        ("fla chunk", "fla", SHORT_NORMALIZER, _fla("chunk_linear_attn")),
        ("fla recurrent", "fla", SHORT_NORMALIZER, _fla("fused_recurrent_linear_attn")),
    ),
    "linear_attention_step": (("fla recurrent", "fla", SHORT_NORMALIZER, _fla_step),),
}
"""Operator -> peers: name, package, tolerance, and what prepares the call. torchao's int4 has
scales and zero points of its own in bfloat16, hence the wide tolerance."""
