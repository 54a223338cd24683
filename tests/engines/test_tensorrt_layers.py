"""Reports from texts as engine inspectors of TensorRT 8, 10 and 11 write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.core.errors import BuildError
from octavo.core.results import LayerInfo, LayerReport
from octavo.engines.tensorrt.layers import parse_layers

VECTOR = "Thirty-two wide channel vectorized row major Int8 format"


def tensors(*formats: str) -> list[dict[str, Any]]:
    """Tensors as TensorRT 10 describes them."""
    return [
        {"Name": "t", "Location": "Device", "Dimensions": [1, 8, 4, 4], "Format/Datatype": text}
        for text in formats
    ]


def new_tensors(*types: str) -> list[dict[str, Any]]:
    """Tensors as TensorRT 11 describes them."""
    form = "(NHWC) Channel major format"
    return [{"Name": "t", "Strides": [1], "Datatype": kind, "Format": form} for kind in types]


def layer(name: str, kind: str, inputs: Any, outputs: Any, *nodes: str, **more: Any) -> Any:
    metadata = more.pop("between", "").join(f"[ONNX Layer: {node}]" for node in nodes)
    fields = {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs}
    return {**fields, "Metadata": metadata, "StreamId": 0, **more}


def parse(
    *layers: Any, reasons: dict[str, str] | None = None, quantized: bool = True
) -> LayerReport:
    text = json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]}, ensure_ascii=False)
    return parse_layers(text, reasons or {}, quantized=quantized)


def only(*layers: Any, **settings: Any) -> LayerInfo:
    (info,) = parse(*layers, **settings).layers
    return info


def test_a_fused_int8_convolution_of_tensorrt_10() -> None:
    name = "w0.int8 + QuantizeLinear:w0.q + Conv:c0 + Relu:r0"
    info = only(
        layer(
            name,
            "CaskConvolution",
            tensors(VECTOR),
            tensors(VECTOR),
            "Conv:c0",
            "Relu:r0",
            between="\x1e",
            ParameterType="Convolution",
            Weights={"Type": "Int8", "Count": 216},
            TacticName="sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32",
        )
    )
    assert info == LayerInfo(name, "Conv", "int8", "compute", "")


def test_reformats_are_counted_apart_and_idle_layers_left_out() -> None:
    report = parse(
        layer("QuantizeLinear:x.q", "Reformat", tensors("Row major linear FP32"), tensors(VECTOR)),
        layer("a", "NoOp", tensors(VECTOR), tensors(VECTOR)),
        layer("__mye2418_0_myl0_0", "shape_call", [], []),
        layer("wait 3", "wait", [], []),
        layer("c", "Constant", [], tensors("Row major linear FP32")),
        layer("Transpose:t", "Shuffle", tensors(VECTOR), tensors(VECTOR), "Transpose:t"),
        layer("Cast:k", "Cast", tensors("Half"), tensors("Float"), "Cast:k"),
        layer("Conv:c0", "CaskGemmConvolution", tensors(VECTOR), tensors(VECTOR), "Conv:c0"),
    )
    assert report.counts() == {"int8": 1, "reformat": 3}
    assert [layer.precision for layer in report.layers] == ["int8", "int8", "float32", "int8"]


def test_generated_kernels_around_a_convolution_as_the_compiler_of_11_splits_them() -> None:
    """From a build of EfficientNet-Lite0 with TensorRT for RTX 1.7, shortened."""
    report = parse(
        layer(
            "__myl_MulMinMaxRounCastReplConc_myl0_1",
            "kgen",
            new_tensors("Float"),
            new_tensors("Int8"),
            "QuantizeLinear:inputs.q",
            "Conv:getitem",
            "DequantizeLinear:inputs.dq",
            Constants=new_tensors("Float"),
        ),
        layer(
            "Conv:getitem_myl0_2",
            "correlation",
            new_tensors("Int8"),
            new_tensors("Float"),
            "Conv:getitem",
            "DequantizeLinear:inputs.dq",
            "DequantizeLinear:w.dq",
            Constants=new_tensors("Int8", "Float", "Float"),
            TacticName="__myelin_CASK_STUB",
        ),
        layer(
            "__myl_MulAddMaxMinMulMinMaxRounCast_myl0_3",
            "kgen",
            new_tensors("Float"),
            new_tensors("Int8"),
            "Conv:getitem",
            "Clip:hardtanh",
            "QuantizeLinear:hardtanh.q",
        ),
        layer(
            "__myl_CastMulMulAddMulMinMaxRounCast_myl0_61",
            "kgen",
            new_tensors("Int8", "Float"),
            new_tensors("Int8"),
            "Conv:getitem",
            "DequantizeLinear:getitem_78.dq",
            "Add:add_479",
            "QuantizeLinear:add_479.q",
        ),
        layer("__myl_Move_myl0_70", "kgen", new_tensors("Float"), new_tensors("Float")),
        layer("__myl_Mean_myl0_71", "kgen", new_tensors("Int8"), new_tensors("Int8")),
        layer(
            "__myl_FcAdd_myl0_72",
            "runtime_fusion",
            new_tensors("Half"),
            new_tensors("Float"),
            "Gemm:linear",
        ),
    )
    found = [(info.op, info.precision, info.kind) for info in report.layers]
    assert found == [
        ("QuantizeLinear", "int8", "reformat"),
        ("Conv", "int8", "compute"),
        ("Clip", "float32", "compute"),
        ("Add", "float32", "compute"),
        ("kgen", "float32", "reformat"),
        ("kgen", "int8", "compute"),
        ("Gemm", "float16", "compute"),
    ]
    assert report.counts() == {"float16": 1, "float32": 2, "int8": 2, "reformat": 2}


def test_reasons_come_from_the_manifest_by_the_node_or_name_tensorrt() -> None:
    reasons = {"Conv:c1": "excluded by the caller", "Conv:c": "wrong one"}
    report = parse(
        layer("Conv:c1_myl0_4", "correlation", new_tensors("Half"), new_tensors("Half"), "Conv:c1"),
        layer("Conv:c1 + Relu:r1", "CaskConvolution", tensors("Half"), tensors("Half")),
        layer("Conv:c1_myl1_9", "correlation", new_tensors("Half"), new_tensors("Half")),
        layer("Conv:c2", "CaskConvolution", tensors("Float"), tensors("Float"), "Conv:c2"),
        layer("PWN(Sigmoid:s)", "PointWiseV2", tensors("Half"), tensors("Half"), "Sigmoid:s"),
        reasons=reasons,
    )
    assert [info.reason for info in report.layers] == [
        *["excluded by the caller"] * 3,
        "TensorRT chose float32 for it",
        "TensorRT chose float16 for it",
    ]


def test_float_engines_need_no_reasons() -> None:
    conv = layer("Conv:c", "CaskConvolution", tensors("Float"), tensors("Float"), "Conv:c")
    assert only(conv, quantized=False).reason == ""


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear FP32", "float32"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Channel major INT8 format where column stride % 32 == 0", "int8"),
        ("Row major linear BFloat16 format", "bfloat16"),
        ("Row major linear FP8 format", "float8"),
        ("Row major linear UInt8 format", "uint8"),
        ("Row major linear Int64 format", "int64"),
        ("Half", "float16"),
        ("Float", "float32"),
        ("Bool", "bool"),
        ("INT4", "int4"),
    ],
)
def test_every_spelling_of_a_type_is_known(text: str, precision: str) -> None:
    old = only(layer("n", "Pooling", tensors(text), tensors(text)))
    new = only(layer("n", "Pooling", [{"DataType": text}], [{"Datatype": text}]))
    assert (old.precision, new.precision) == (precision, precision)


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        ("sm80_xmma_fprop_implicit_gemm_indexed_i8f32_i8i32_f32_nhwckrsc", "int8"),
        ("sm86_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "float16"),
        ("sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc", "float32"),
        ("ampere_scudnn_128x32_sgemm_small", "float32"),
        ("turing_fp16_s1688cudnn_fp16_256x64", "float16"),
        ("", "unknown"),
    ],
)
def test_the_kernels_name_tells_where_the_shapes_are_not_known(tactic: str, precision: str) -> None:
    unknown = tensors("N/A due to dynamic shapes")
    info = only(layer("Conv:c", "CaskConvolution", unknown, unknown, TacticName=tactic))
    assert info.precision == precision


def test_weights_of_int8_alone_make_no_int8_layer() -> None:
    info = only(
        layer(
            "Conv:c",
            "CaskConvolution",
            tensors("Half"),
            tensors("Half"),
            Weights={"Type": "Int8", "Count": 9},
            TacticName="sm80_xmma_fprop_f16f16_f16f32_f32",
        )
    )
    assert info.precision == "float16"


@pytest.mark.parametrize("fields", [{"Weights": {"Type": "Half"}}, {"Precision": "FP16"}])
def test_what_a_layer_states_itself_is_the_last_resort(fields: dict[str, Any]) -> None:
    assert only(layer("c", "CaskConvolution", [], [], **fields)).precision == "float16"


def test_the_int8_kernel_decides_where_the_first_input_is_something_else() -> None:
    tactic = "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n"
    mixed = new_tensors("Half", "Int8")
    info = only(
        layer("__myl_Fc", "fusion", mixed, new_tensors("Half"), "MatMul:m", TacticName=tactic)
    )
    assert (info.op, info.precision) == ("MatMul", "int8")


def test_attention_that_is_one_kernel_is_a_matrix_product() -> None:
    info = only(
        layer(
            "_gemm_mha_v2_myl0_4",
            "kgen",
            new_tensors("Int8"),
            new_tensors("Half"),
            "MatMul:qk",
            "Softmax:s",
            "MatMul:av",
        )
    )
    assert (info.op, info.precision, info.kind) == ("MatMul", "int8", "compute")


def test_nodes_may_have_brackets_and_text_between_them() -> None:
    metadata = "first [ONNX Layer: Conv:a[0].conv]\x1fthen [ONNX Layer: Relu:r]"
    conv = layer("n", "CaskConvolution", tensors("Half"), tensors("Half"), Metadata=metadata)
    info = only(conv, reasons={"Conv:a[0].conv": "because"})
    assert info.reason == "because"


def test_engines_built_without_details_have_names_only() -> None:
    report = parse("Conv:c0 + Relu:r0", "Reformatting CopyNode for Output Tensor 0 to Gemm:y")
    assert [info.precision for info in report.layers] == ["unknown", "unknown"]
    assert [info.op for info in report.layers] == ["Conv", "unknown"]


@pytest.mark.parametrize(
    "text", ["", "Name: a, LayerType: b", '{"Bindings": []}', "[]", '{"Layers": 3}']
)
def test_another_text_is_an_error(text: str) -> None:
    with pytest.raises(BuildError, match="something else than layers"):
        parse_layers(text, {}, quantized=True)
