from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
import torch
from torch import nn

import octavo
from octavo.core.errors import InputError
from octavo.core.progress import NoProgress
from octavo.pipelines.compare import runnable


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    onnx.save(tiny_models.cnn(), folder / "float.onnx")
    octavo.build(
        tiny_models.cnn(), calibration=tiny_models.cnn_table(), output=folder / "int8.octavo"
    )
    samples = tiny_models.images(20)
    np.savez(folder / "data.npz", x=samples, labels=np.arange(20) % 4)
    return folder


def test_engine_against_onnx(files: Path) -> None:
    found = octavo.compare(files / "float.onnx", files / "int8.octavo", files / "data.npz")
    assert found.names == ("float.onnx", "int8.octavo")
    assert found.samples == 20
    assert 15 < found.accuracy.sqnr_db < 60
    assert found.accuracy.top1_agreement is not None
    assert found.accuracy.top1_accuracy is not None, "labels come from the file"
    assert found.reference_accuracy is not None
    assert all(latency.p50 > 0 for latency in found.latency_ms)
    assert all(size > 0 for size in found.size_bytes)


def test_a_model_equals_itself(files: Path) -> None:
    samples = [tiny_models.images(6), tiny_models.images(3, 9)]
    with octavo.load(files / "int8.octavo") as engine:
        found = octavo.compare(engine, files / "int8.octavo", samples, progress=NoProgress())
    assert found.samples == 9
    assert found.accuracy.sqnr_db == float("inf")
    assert found.accuracy.max_error == 0
    assert found.accuracy.top1_accuracy is None
    assert found.reference_accuracy is None


def test_a_module_keeps_its_mode_and_its_size_counts_shared_weights_once() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5))
    module.train()
    module[2].eval()
    engine = octavo.build(
        module, example_inputs=torch.zeros(1, 3, 8, 8), precision="float32", verbose=False
    )
    found = octavo.compare(module, engine, [tiny_models.images(5)], labels=[0, 1, 2, 3, 0])
    assert found.accuracy.sqnr_db > 100, "dropout is off while comparing"
    assert (module.training, module[1].training, module[2].training) == (True, True, False)
    tied = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    tied[1].weight = tied[0].weight
    assert runnable(tied).size_bytes == (64 + 8 + 8) * 4


def test_refusals(files: Path) -> None:
    samples = [tiny_models.images(2)]
    with pytest.raises(InputError, match="int cannot be compared"):
        octavo.compare(3, files / "float.onnx", samples)
    with pytest.raises(InputError, match="both models are torch modules"):
        octavo.compare(nn.Flatten(), nn.Flatten(), samples)
    with pytest.raises(InputError, match="no data"):
        octavo.compare(files / "float.onnx", files / "float.onnx", [])
    with pytest.raises(InputError, match=r"labels of shape \[3\]"):
        octavo.compare(files / "float.onnx", files / "float.onnx", samples, labels=[0, 1, 2])


def test_outputs_of_different_shapes_are_refused(files: Path) -> None:
    other = tiny_models.cnn()
    del other.graph.output[:]
    other.graph.output.append(onnx.helper.make_tensor_value_info("f", 1, ["batch", 8]))
    onnx.save(other, files / "other.onnx")
    with pytest.raises(InputError, match=r"\[2, 4\] and \[2, 8\]"):
        octavo.compare(files / "float.onnx", files / "other.onnx", [tiny_models.images(2)])


def test_the_result_is_a_plain_dataclass(files: Path) -> None:
    found = octavo.compare(files / "float.onnx", files / "float.onnx", [tiny_models.images(2)])
    assert dataclasses.is_dataclass(found)
