from __future__ import annotations

import io

from rich.console import Console

from octavo.core.fusions import FuseSummary, Fusion, Unfused
from octavo.core.swaps import LayerSwap, SwapSummary
from octavo.reports import print_fusions, print_swaps

SUMMARY = FuseSummary(
    method="torch.fx",
    notes=(),
    fusions=(
        *(Fusion(f"stage{i}.conv", "pointwise + BN", (), 1) for i in range(3)),
        Fusion("stem", "convolution + BN + relu", (), 1),
        Fusion("stage1.dw", "depthwise + BN + pointwise + BN", (), 2),
    ),
    unfused=(
        Unfused("stage2.dw", "depthwise", "Conv2d 'stage2.last' follows"),
        Unfused("stage3.dw", "depthwise", "Conv2d 'stage3.last' follows"),
        Unfused("norm", "BatchNorm", "it follows the input, no convolution"),
    ),
    convolutions=8,
    depthwise=3,
    separable=1,
    error=None,
)


def printed(summary: FuseSummary) -> str:
    stream = io.StringIO()
    print_fusions(summary, Console(file=stream, width=100))
    return " ".join(stream.getvalue().split())


def test_layers_that_differ_by_numbers_share_a_line() -> None:
    text = printed(SUMMARY)
    assert "6 of 8 convolutions are fused" in text
    assert "depthwise-separable blocks: 1 of 3" in text
    assert "pointwise + BN 3 stage*.conv" in text
    assert "stage*.dw 2 depthwise Conv2d 'stage*.last' follows" in text
    assert "norm 1 BatchNorm it follows the input" in text


def test_how_the_order_is_known_is_said() -> None:
    fields = {"fusions": (), "unfused": (), "convolutions": 0, "depthwise": 0, "separable": 0}
    text = printed(FuseSummary("recorded", ("torch.fx cannot.",), **fields, error=1.25e-6))
    assert "torch.fx cannot. The order of the layers is that of one run" in text
    assert "differ by 1.2e-06 (relative)" in text or "differ by 1.3e-06 (relative)" in text
    assert "give example_inputs" in printed(FuseSummary("nn.Sequential", (), **fields, error=None))


def test_swaps_that_differ_by_numbers_share_a_line() -> None:
    layers = (
        *(
            LayerSwap(f"b{i}.fc", "Linear", "int8, rows", "GPTQ", 40.0 + i, 4000, 1000)
            for i in (0, 1)
        ),
        LayerSwap("head", "Linear", "", "too small", None, 400, 400),
        LayerSwap("", "Linear", "int8", "GPTQ", None, 400, 100),
    )
    stream = io.StringIO()
    summary = SwapSummary(layers, 8800, 2500, note="Read this.")
    print_swaps(summary, Console(file=stream, width=100))
    text = " ".join(stream.getvalue().split())
    assert (
        "3 of 4 layers with weights are quantized; the model takes 2.50 kB instead of 8.80 kB."
        in text
    )
    assert "b*.fc 2 Linear int8 2.00 kB GPTQ; 40.0 to 41.0 dB rows was 8.00 kB" in text
    assert "head 1 Linear as before 400 B too small" in text
    assert "(the model) 1 Linear int8 100 B" in text
    assert text.endswith("Read this.")
