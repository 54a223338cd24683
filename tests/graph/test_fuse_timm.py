"""octavo.fuse on models of timm, on machines that have it; timm needs torchvision."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from randomised import randomise, relative_error

import octavo

MODELS = {
    "mobilenetv1_100": (13, 13),
    "mobilenetv2_100": (17, 17),
    "mobilenetv3_large_100": (7, 15),
    "efficientnet_lite0": (16, 16),
    "tf_efficientnet_lite0": (16, 16),
    "mnasnet_100": (17, 17),
    "ghostnet_100": (7, 41),
    "convnext_atto": (0, 12),
    "repvgg_a0": (0, 0),
}
"""Name -> depthwise-separable blocks found, and depthwise convolutions. Where they differ,
squeeze-and-excitation, a concatenation or a LayerNorm stands between the two halves."""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("timm", "torchvision")),
    reason="timm or torchvision is not installed",
)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_gives_what_models_of_timm_give(name: str) -> None:
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    model, x = randomise(timm.create_model(name)), torch.randn(2, 3, 96, 96)
    fused = octavo.fuse(model, x, verbose=False)
    assert relative_error(fused(x), model(x)) < 1e-4
    summary = fused.octavo_summary
    assert (summary.separable, summary.depthwise) == MODELS[name]
    if "convnext" not in name and "ghostnet" not in name and "v3" not in name:
        assert summary.fused == summary.convolutions
