from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from PIL import Image
from safetensors.numpy import load_file

import octavo
from octavo.calibration import CalibrationTable
from octavo.cli import main
from octavo.cli.commands import parse_profile
from octavo.core.errors import InputError
from octavo.pipelines import doctor as doctor_module

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the program in this process: run("build", ...) -> exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        return code, output, errors

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(tiny_models.cnn(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=tiny_models.images(24), labels=np.arange(24) % 4)
    return tmp_path


def test_from_data_to_a_comparison(run: Run, folder: Path) -> None:
    model, data, table = folder / "model.onnx", folder / "data.npz", folder / "table.json"
    code, output, _ = run("calibrate", model, data, "-o", table, "--batch-size", 8)
    assert code == 0
    assert "minmax" in output
    assert "chosen" in output
    assert f"24 samples: {table}" in output
    code, output, _ = run("build", model, "-o", folder / "int8.octavo", "--calibration", table)
    assert code == 0
    assert "int8" in output.lower()
    code, output, _ = run("build", model, "-o", folder / "f.octavo", "--precision", "float32")
    assert code == 0
    code, output, _ = run("compare", folder / "f.octavo", folder / "int8.octavo", data)
    assert code == 0
    assert "SQNR" in output
    assert "right, the reference" in output
    for name in ("int8.octavo", "table.json", "model.onnx"):
        code, output, _ = run("inspect", folder / name)
        assert code == 0, name
        assert output.strip(), name


def test_build_calibrates_on_data_itself(run: Run, folder: Path) -> None:
    target = folder / "int8.octavo"
    code, output, _ = run(
        "build", folder / "model.onnx", "-o", target, "--calibration", folder / "data.npz"
    )
    assert code == 0
    assert "chosen" in output
    assert octavo.load(target).precision == "int8"


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
def test_run_saves_what_the_engine_gives(run: Run, folder: Path, suffix: str) -> None:
    engine = octavo.build(folder / "model.onnx", precision="float32", output=folder / "f.octavo")
    target = folder / f"out{suffix}"
    assert run("run", folder / "f.octavo", folder / "data.npz", "-o", target)[0] == 0
    expected = engine(tiny_models.images(24))
    if suffix == ".npy":
        found = np.load(target)
    else:
        found = (np.load(target) if suffix == ".npz" else load_file(target))["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_folder_of_images_with_a_preset(run: Run, folder: Path) -> None:
    model = tiny_models.cnn()
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
    onnx.save(model, folder / "model.onnx")
    table = folder / "t.json"
    arguments = ("calibrate", folder / "model.onnx", pictures, "-o", table, "--observer", "mse")
    assert run(*arguments, "--preset", "unit", "--limit", 5)[0] == 0
    assert CalibrationTable.load(table).samples == 5
    code, _, errors = run(*arguments)
    assert code == 1
    assert "preset" in errors


def test_options_reach_the_table(run: Run, folder: Path) -> None:
    table = folder / "t.json"
    code, _, _ = run(
        *("calibrate", folder / "model.onnx", folder / "data.npz", "-o", table),
        *("--observer", "percentile", "--dtype", "uint8", "--exclude", "*y", "--bias-correction"),
    )
    assert code == 0
    found = CalibrationTable.load(table)
    assert found.observer == "percentile"
    assert found.exclude == ("*y",)
    assert found.bias_correction
    assert {entry.dtype for entry in found.tensors.values()} == {"uint8"}


ERRORS = [
    (("build", "no.onnx", "-o", "e"), 1, "there is no file no.onnx"),
    (("build", "model.onnx", "-o", "e"), 1, "precision int8 needs calibration"),
    (("build", "model.onnx", "-o", "e", "--backend", "x"), 1, "no backend is called 'x'"),
    (("build", "model.onnx", "-o", "e", "--precision", "int3"), 1, "no precision 'int3'"),
    (("build", "model.onnx", "-o", "e", "--precision", "float32", "--profile", "x=1:2"), 1, "MIN"),
    (("build", "model.onnx"), 2, "--output"),
    (("calibrate", "model.onnx", "none.npz", "-o", "t"), 1, "none.npz"),
    (("calibrate", "model.onnx", "data.npz", "-o", "t", "--observer", "x"), 1, "observer is call"),
    (("run", "model.onnx", "data.npz", "-o", "o.npz"), 1, "not an Octavo engine file"),
    (("run", "e.octavo", "data.npz", "-o", "o.txt"), 1, "give a name that ends in"),
    (("inspect", "nothing"), 1, "there is no file nothing"),
    (("inspect", "data.npz"), 1, "no Octavo engine"),
    (("export-triton-server", "data.npz", "repo"), 1, "no Octavo engine"),
    (("frobnicate",), 2, "No such command"),
    (("demo", "--nonsense"), 2, "No such option"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), ERRORS, ids=lambda value: str(value)[:40]
)
def test_errors_are_one_paragraph(
    run: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    found, output, errors = run(*arguments)
    assert found == code
    assert message in errors
    assert "Traceback" not in output + errors
    if code == 1:
        assert errors.startswith("octavo: ")
        assert len(errors.strip().splitlines()) == 1
    assert sorted(folder.iterdir()) == before, "nothing is left behind"


def test_debug_shows_the_traceback(folder: Path) -> None:
    with pytest.raises(InputError):
        main(["build", str(folder / "model.onnx"), "-o", "e", "--backend", "x", "--debug"])


def test_a_defect_is_one_paragraph_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a\ndefect")

    monkeypatch.setattr(doctor_module, "examine", broken)
    code, _, errors = run("doctor")
    assert code == 1
    assert errors.count("\n") == 1
    assert "unexpected ZeroDivisionError: a defect" in errors
    assert "--debug" in errors
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "doctor"])


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_module, "examine", interrupted)
    code, output, errors = run("doctor")
    assert code in (1, 130)
    assert "Traceback" not in output + errors


def test_doctor_names_every_backend_and_what_is_missing(run: Run) -> None:
    code, output, _ = run("doctor")
    assert code == 0
    for word in (
        "processor",
        "exact with",
        "backend onnxruntime",
        "backend tensorrt",
        "extra demo",
        "octavo[tensorrt",
    ):
        assert word in output


def test_version_and_help(run: Run) -> None:
    assert run("--version")[:2] == (0, f"{octavo.__version__}\n")
    code, output, _ = run("--help")
    assert code == 0
    for command in ("demo", "calibrate", "build", "run", "compare", "inspect", "doctor"):
        assert command in output


def test_profiles() -> None:
    name, profile = parse_profile("x=1x3x8x8:2x3x8x8:4x3x8x8")
    assert name == "x"
    assert (profile.min, profile.opt, profile.max) == ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    with pytest.raises(InputError, match="not in order"):
        parse_profile("x=4x3:2x3:1x3")


def test_as_a_process(folder: Path) -> None:
    """Exit codes and clean output of the real program."""

    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "octavo", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = process("build", "model.onnx", "-o", "e.octavo", "--calibration", "data.npz")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout, "no colours in a pipe"
    failed = process("run", "e.octavo", "none.npz", "-o", "o.npz")
    assert failed.returncode == 1
    assert failed.stderr.startswith("octavo: ")
    assert "Traceback" not in failed.stderr
    assert process("run").returncode == 2


def test_triton_server_repository(run: Run, folder: Path) -> None:
    octavo.build(folder / "model.onnx", precision="float32", output=folder / "f.octavo")
    code, output, _ = run("export-triton-server", folder / "f.octavo", folder / "repository")
    assert code == 0
    assert "--model-repository" in output
    assert (folder / "repository" / "f" / "config.pbtxt").is_file()
    assert (folder / "repository" / "f" / "1" / "model.onnx").is_file()


def test_engine_manifest_is_json_that_others_can_read(run: Run, folder: Path) -> None:
    import zipfile

    octavo.build(folder / "model.onnx", precision="float32", output=folder / "f.octavo")
    with zipfile.ZipFile(folder / "f.octavo") as archive:
        assert json.loads(archive.read("manifest.json"))["backend"] == "onnxruntime"
