"""What a quantized number is: parameters, the four verbs, packing and error measures."""

from octavo.quant.affine import (
    choose_qparams,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
)
from octavo.quant.error import accuracy, cosine, max_error, sqnr_db, top_k_agreement
from octavo.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from octavo.quant.packing import pack, unpack
from octavo.quant.qparams import QTYPES, QDType, QParams

__all__ = [
    "QTYPES",
    "Granularity",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QDType",
    "QParams",
    "accuracy",
    "choose_qparams",
    "cosine",
    "dequantize",
    "fake_quantize",
    "max_error",
    "pack",
    "qparams_from_range",
    "quantize",
    "sqnr_db",
    "top_k_agreement",
    "unpack",
]
