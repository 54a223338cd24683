"""observer="auto": never worse than min-max on what was held back, and honest about its trials."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_graphs import Net, run, run_optimized

from octavo.calibration import OBSERVERS, CalibrationOptions, CalibrationTable, calibrate_graph
from octavo.calibration.evaluator import Evaluator, Score
from octavo.calibration.observers import choose_range
from octavo.calibration.search import (
    FACTOR_LIMIT,
    MARGIN,
    equalization_factors,
    observed_ranges,
)
from octavo.calibration.statistics import TensorStatistics
from octavo.core.errors import CalibrationError
from octavo.core.results import Trial
from octavo.export import (
    Chain,
    QuantizedLayer,
    QuantSpec,
    load_onnx,
    place,
    quantize_graph,
)
from octavo.quant import sqnr_db

Array = np.ndarray[Any, Any]


def classifier(seed: int = 0) -> ir.Model:
    net = Net(seed, x=["n", 3, 8, 8])
    y = net.clip(net.conv("x", 8, 3), 0, 6)
    y = net.clip(net.conv(y, 8, 8, group=8), 0, 6)
    y = net.op("Relu", net.conv(y, 8, 8))
    flat = net.op("Flatten", net.op("GlobalAveragePool", y))
    return load_onnx(net.build(net.op("Gemm", flat, net.weight("w", 8, 5), net.weight("b", 5))))


def pictures(count: int, seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(8, 3, 8, 8)).astype(np.float32) for _ in range(count)]


def by_name(table: CalibrationTable) -> dict[str, Trial]:
    names = [trial.name for trial in table.trials]
    assert len(set(names)) == len(names), "two trials of one name"
    return {trial.name: trial for trial in table.trials}


def chosen(table: CalibrationTable) -> Trial:
    (trial,) = [trial for trial in table.trials if trial.chosen]
    return trial


def not_worse(trial: Trial, floor: Trial) -> bool:
    agreements = trial.top1_agreement or 0, floor.top1_agreement or 0
    return trial.sqnr_db >= floor.sqnr_db and agreements[0] >= agreements[1]


def test_the_trials_are_complete() -> None:
    table = calibrate_graph(classifier(), pictures(8))
    trials = by_name(table)
    assert set(OBSERVERS) <= set(trials)
    assert any("equalization" in name for name in trials)
    assert any(name.endswith("bias correction") for name in trials)
    assert next(iter(trials)) == "minmax"
    assert all(trial.seconds > 0 for trial in trials.values())
    assert all(0 <= trial.top1_agreement <= 1 for trial in trials.values())
    winner = chosen(table)
    assert not_worse(winner, trials["minmax"])
    assert bool(table.bias_correction) == ("bias correction" in winner.name)
    assert bool(table.equalization) == ("equalization" in winner.name)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_the_winner_is_never_worse_than_min_max(seed: int, dtype: str) -> None:
    table = calibrate_graph(classifier(seed), pictures(4, seed), CalibrationOptions(dtype=dtype))
    assert not_worse(chosen(table), by_name(table)["minmax"])


def outliers(samples: int, share: float, size: float) -> list[Array]:
    """Normal rows [1, 16]; a few of them hold one value that is far out."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(samples, 1, 16)).astype(np.float32)
    for index in range(0, samples, max(1, int(1 / share))):
        rows[index, 0, index % 16] = size
    return list(rows)


def squashing() -> onnx.ModelProto:
    """Clips what comes in behind the first product, so that outliers do not matter."""
    net = Net(x=["n", 16])
    weight = np.eye(16, dtype=np.float32)
    y = net.op("Gemm", "x", net.const("w", weight), net.const("b", np.zeros(16, np.float32)))
    return net.build(net.clip(y, -3, 3))


def test_where_min_max_is_bad_something_better_is_found() -> None:
    """One value in a thousand is a hundred times as large and means nothing."""
    model = load_onnx(squashing())
    table = calibrate_graph(model, outliers(256, 1 / 64, 400.0))
    trials = by_name(table)
    winner = chosen(table)
    assert winner.sqnr_db > trials["minmax"].sqnr_db + 6
    assert table.tensors["x"].real_range[1] < 350


def test_where_clipping_is_bad_nothing_is_clipped() -> None:
    """Rare values are all that the output consists of."""
    net = Net(x=["n", 1, 64, 64])
    y = net.op("Conv", "x", net.const("w", np.ones((1, 1, 1, 1), np.float32)))
    model = load_onnx(net.build(net.op("Mul", net.op("Mul", y, y), y)))
    random = np.random.default_rng(0)
    pixels = random.normal(size=(64, 1, 1, 64, 64)).astype(np.float32)
    pixels[1::2, 0, 0, 5, 7] = random.uniform(19, 20, 32)
    table = calibrate_graph(model, list(pixels))
    trials = by_name(table)
    assert trials["percentile"].sqnr_db < trials["minmax"].sqnr_db - 6, "the case is not nasty"
    assert not_worse(chosen(table), trials["minmax"])
    assert table.tensors["x"].real_range[1] > 19


def test_of_equal_trials_the_first_wins() -> None:
    """All observers agree on two values, so nothing is better than min-max."""
    net = Net(x=["n", 8])
    model = load_onnx(net.build(net.op("MatMul", "x", net.weight("w", 8, 8))))
    data = [np.sign(np.random.default_rng(0).normal(size=(16, 8))).astype(np.float32)]
    table = calibrate_graph(model, data)
    assert len({trial.sqnr_db for trial in table.trials}) == 1
    assert chosen(table).name == "minmax"


def test_the_measure_is_what_an_engine_gives() -> None:
    """Scores are recomputed here from the table alone."""
    model, data = classifier(3), pictures(6, 3)
    table = calibrate_graph(model, data)
    samples = np.concatenate(data)
    held = samples[3::4][:24]  # every fourth is held back, 24 at most
    spec = table.spec(place(model).tensors)
    want = run(model, {"x": held})[0]
    have = run(quantize_graph(model, spec).model, {"x": held})[0]
    winner = chosen(table)
    assert sqnr_db(want, have) == pytest.approx(winner.sqnr_db, abs=0.5)
    assert (want.argmax(1) == have.argmax(1)).mean() == pytest.approx(winner.top1_agreement)


def test_the_float_model_itself_scores_best() -> None:
    model, held = classifier(), [{"x": np.concatenate(pictures(2))}]
    judge = Evaluator(model, place(model), held)
    score = judge.score(QuantSpec({}))
    assert score == Score(200.0, 1.0)


def test_models_without_classes_are_judged_by_noise_alone() -> None:
    net = Net(x=["n", 3, 8, 8])
    y = net.conv(net.op("Relu", net.conv("x", 4, 3)), 4, 4)
    table = calibrate_graph(load_onnx(net.build(y)), pictures(4))
    assert {trial.top1_agreement for trial in table.trials} == {None}
    assert not_worse(chosen(table), by_name(table)["minmax"])


def test_outputs_of_changing_shape_are_judged_too() -> None:
    net = Net(x=["n", "t", 8])
    y = net.op("Add", net.op("MatMul", "x", net.weight("w", 8, 8)), net.weight("b", 8))
    model = load_onnx(net.build(net.op("Gelu", y)))
    random = np.random.default_rng(0)
    batches = [random.normal(size=(2, 2 + t, 8)).astype(np.float32) for t in range(8)]
    table = calibrate_graph(model, batches)
    assert np.isfinite([trial.sqnr_db for trial in table.trials]).all()


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_a_model_without_a_float_output_cannot_be_judged() -> None:
    net = Net(x=["n", 8])
    net.outputs = [onnx.helper.make_tensor_value_info("top", onnx.TensorProto.INT64, None)]
    net.op("ArgMax", net.op("MatMul", "x", net.weight("w", 8, 8)), out="top", axis=1)
    model = load_onnx(net.build())
    data = [np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)]
    with pytest.raises(CalibrationError, match=r"no float output to compare; .* named observer"):
        calibrate_graph(model, data)
    assert calibrate_graph(model, data, CalibrationOptions("minmax")).tensors


# --- groups


def test_tensors_of_a_group_share_the_widest_range() -> None:
    net = Net(x=["n", 3, 8, 8])
    left = net.op("Relu", net.conv("x", 8, 3), out="left")
    right = net.op("Mul", net.conv("x", 8, 3), net.const("k", np.float32(20)), out="right")
    joined = net.op("Concat", left, right, axis=1, out="joined")
    pooled = net.op("MaxPool", joined, kernel_shape=[2, 2], strides=[2, 2], out="pooled")
    model = load_onnx(net.build(net.conv(pooled, 4, 16)))
    assert {frozenset(group) for group in place(model).groups} == {
        frozenset({left, right, joined, pooled})
    }
    for observer in ("auto", *OBSERVERS):
        for dtype in ("int8", "uint8"):
            table = calibrate_graph(model, pictures(3), CalibrationOptions(observer, dtype=dtype))
            entries = [table.tensors[name] for name in (left, right, joined, pooled)]
            assert len({(entry.scale, entry.zero_point) for entry in entries}) == 1
            if observer == "minmax":
                assert entries[0].real_range[1] >= 0.99 * max(entry.high for entry in entries)


def seen(low: float, high: float) -> TensorStatistics:
    statistics = TensorStatistics()
    statistics.update("x", np.array([low, high], np.float32), 0)
    statistics.end_batch()
    return statistics


def test_observed_ranges() -> None:
    statistics = {"a": seen(-1, 1), "b": seen(0, 3), "c": seen(-2, 0), "d": TensorStatistics()}
    ranges = observed_ranges(statistics, [("a", "b", "unseen")], "minmax", "uint8")
    assert ranges["a"] == ranges["b"] == choose_range((-1.0, 3.0), "uint8")
    assert ranges["c"] == choose_range((-2.0, 0.0), "uint8")
    assert float(ranges["d"].scale) > 0, "a tensor that was always empty"


# --- factors


def chain(bound: float | None, depthwise: bool) -> Chain:
    layer = QuantizedLayer("Conv:a", "Conv", "a", ("x",), "w", 0)
    return Chain("t", layer, (layer,), bound, depthwise)


def factors(peaks: list[float], bound: float | None = None, depthwise: bool = True) -> Array:
    statistics = TensorStatistics(channel_peak=np.array(peaks, np.float32))
    return equalization_factors(chain(bound, depthwise), {"t": statistics})


def test_quiet_channels_are_raised_to_the_loudest() -> None:
    np.testing.assert_allclose(factors([8.0, 4.0, 8.0, 2.0]), [1, 2, 1, 4])
    np.testing.assert_allclose(factors([8.0, 4.0], depthwise=False), [1, np.sqrt(2)])


def test_factors_are_limited() -> None:
    np.testing.assert_allclose(factors([8.0, 1e-3, 0.0]), [1, FACTOR_LIMIT, FACTOR_LIMIT])
    np.testing.assert_allclose(factors([0.0, 0.0]), [1.0, 1.0], atol=FACTOR_LIMIT)


def test_behind_a_bound_there_is_room() -> None:
    found = factors([6.0, 3.0, 2.0], bound=6.0)
    np.testing.assert_allclose(found, [1, 2 / MARGIN, 3 / MARGIN], rtol=1e-6)
    assert (found * [6.0, 3.0, 2.0] <= 6).all()
    # a ReLU6 whose values stay below 2 has nothing to win by going up to 6
    assert factors([2.0, 1.0], bound=6.0).max() <= 2


def test_the_engine_agrees_with_the_judge() -> None:
    """Optimized and portable graph of the winner give the same classes."""
    model, data = classifier(1), pictures(4, 1)
    table = calibrate_graph(model, data)
    graph = quantize_graph(model, table.spec(place(model).tensors)).model
    x = {"x": pictures(1, 77)[0]}
    assert sqnr_db(run(graph, x)[0], run_optimized(graph, x)[0]) > 30
