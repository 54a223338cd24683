from __future__ import annotations

import ast
import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_models import cnn, cnn_artifact, fake_artifact, images, tokens

import octavo
from octavo.core.errors import InputError, OctavoError, UnsupportedError
from octavo.core.machine import cpu_name
from octavo.core.results import TensorSpec
from octavo.engines import Artifact, Engine, get_backend
from octavo.engines import triton_server as module
from octavo.engines.triton_server import TYPES, export_triton_server
from octavo.export import KernelDtypes, make_session

TOKEN = re.compile(r'#[^\n]*|\s+|"(?:[^"\\]|\\.)*"|[A-Za-z_]\w*|-?\d+|[\[\]{}:,]')


def parse(text: str) -> dict[str, Any]:
    """Protobuf's text format without a schema: field -> list of values."""
    words: list[str] = []
    place = 0
    while place < len(text):
        match = TOKEN.match(text, place)
        assert match is not None, f"not text format: {text[place : place + 40]!r}"
        place = match.end()
        if not match[0].isspace() and not match[0].startswith("#"):
            words.append(match[0])
    stream = iter([*words, ""])
    found, rest = _fields(next(stream), stream)
    assert rest == ""
    return found


def _fields(word: str, stream: Iterator[str]) -> tuple[dict[str, Any], str]:
    fields: dict[str, list[Any]] = defaultdict(list)
    while word and word != "}":
        name, word = word, next(stream)
        assert name.isidentifier()
        if word == ":":
            word = next(stream)
        else:
            assert word in "{[", "only messages go without a colon"
        if word == "[":
            word = next(stream)
            while word != "]":
                fields[name].append(_value(word, stream))
                word = next(stream)
                if word == ",":
                    word = next(stream)
                    assert word != "]"
            fields[name] += []
        else:
            fields[name].append(_value(word, stream))
        word = next(stream)
    return dict(fields), word


def _value(word: str, stream: Iterator[str]) -> Any:
    if word == "{":
        found, end = _fields(next(stream), stream)
        assert end == "}"
        return found
    if word.startswith('"'):
        return ast.literal_eval("b" + word).decode()
    return int(word) if word.lstrip("-").isdecimal() else word


def official(text: str) -> Any:
    """The configuration as Triton's own message, where its client is installed."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    from google.protobuf import text_format

    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    pb2_spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert pb2_spec is not None
    assert pb2_spec.loader is not None
    pb2 = importlib.util.module_from_spec(pb2_spec)
    pb2_spec.loader.exec_module(pb2)
    return text_format.Parse(text, pb2.ModelConfig())


def config(folder: Path) -> dict[str, Any]:
    return parse((folder / "config.pbtxt").read_text(encoding="utf-8"))


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, shape, dtype)


def plan(**changes: Any) -> Artifact:
    given: dict[str, Any] = {
        "backend": "tensorrt",
        "backend_version": "10.13.0",
        "architecture": ("sm_86",),
        "device": "GPU\nof a kind",
        "members": {"model.plan": b"plan", "table.json": b"{}"},
        "profiles": {"x": ((1, 3), (4, 3), (16, 3))},
    }
    return fake_artifact(**{**given, **changes})


def float_model(*specs: TensorSpec, outputs: tuple[TensorSpec, ...] = ()) -> Artifact:
    """An engine of these inputs whose graph is another's: only the configuration matters."""
    members = cnn_artifact("float32").members
    out = outputs or (spec("y", "batch", 2),)
    return fake_artifact(
        members=members, precision="float32", inputs=specs, outputs=out, profiles={}
    )


def test_a_repository_is_laid_out_as_the_server_wants_it(tmp_path: Path) -> None:
    folder = export_triton_server(cnn_artifact(), tmp_path / "models", name="net")
    assert folder == tmp_path / "models" / "net"
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert files == [
        "models",
        "models/net",
        "models/net/1",
        "models/net/1/model.onnx",
        "models/net/config.pbtxt",
    ]


def test_the_configuration_of_an_onnxruntime_engine(tmp_path: Path) -> None:
    folder = export_triton_server(
        cnn_artifact(), tmp_path, name="net", max_batch_size=32, instance_count=3, threads=2
    )
    assert config(folder) == {
        "name": ["net"],
        "backend": ["onnxruntime"],
        "platform": ["onnxruntime_onnx"],
        "max_batch_size": [32],
        "input": [{"name": ["x"], "data_type": ["TYPE_FP32"], "dims": [3, 8, 8]}],
        "output": [{"name": ["y"], "data_type": ["TYPE_FP32"], "dims": [4]}],
        "instance_group": [{"count": [3], "kind": ["KIND_CPU"]}],
        "version_policy": [{"latest": [{"num_versions": [1]}]}],
        "dynamic_batching": [{"preferred_batch_size": [32], "max_queue_delay_microseconds": [100]}],
        "parameters": [
            {"key": ["execution_mode"], "value": [{"string_value": ["0"]}]},
            {"key": ["intra_op_thread_count"], "value": [{"string_value": ["2"]}]},
        ],
    }


def test_the_configuration_of_a_tensorrt_engine(tmp_path: Path) -> None:
    folder = export_triton_server(plan(), tmp_path, name="net", instance_count=2)
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    found = config(folder)
    assert found["platform"] == ["tensorrt_plan"]
    assert found["backend"] == ["tensorrt"]
    assert found["max_batch_size"] == [16], "the largest batch of its profile"
    assert found["dynamic_batching"][0]["preferred_batch_size"] == [4, 16], "tuned and largest"
    assert found["instance_group"] == [{"count": [2], "kind": ["KIND_GPU"]}]
    assert "parameters" not in found
    text = (folder / "config.pbtxt").read_text()
    assert "TensorRT 10.13.0: the server has to bring that version" in text
    assert [path.name for path in (folder / "1").iterdir()] == ["model.plan"]


HOSTILE = 'a"b\\c\nd\tü\u2028{}#'


@pytest.mark.parametrize(
    "make",
    [
        lambda: cnn_artifact("int8"),
        lambda: cnn_artifact("float32"),
        plan,
        lambda: float_model(spec(HOSTILE, "batch", 3), outputs=(spec(HOSTILE + "2", "batch"),)),
        lambda: float_model(spec("i", "n", "length", dtype="int64"), spec("m", "n", dtype="bool")),
        lambda: float_model(spec("s"), spec("x", 2, 3, dtype="float16"), outputs=(spec("y"),)),
    ],
    ids=["int8", "float", "tensorrt", "hostile", "dynamic", "scalar"],
)
def test_tritons_own_parser_reads_the_same(tmp_path: Path, make: Callable[[], Artifact]) -> None:
    artifact = make()
    folder = export_triton_server(artifact, tmp_path)
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    message, mine = official(text), parse(text)
    assert message.max_batch_size == mine["max_batch_size"][0]
    assert message.platform == mine["platform"][0]
    assert message.backend == mine["backend"][0]
    assert message.version_policy.latest.num_versions == 1
    assert message.instance_group[0].Kind.Name(message.instance_group[0].kind).startswith("KIND_")
    for kind, specs in (("input", artifact.manifest.inputs), ("output", artifact.manifest.outputs)):
        tensors = getattr(message, kind)
        assert [tensor.name for tensor in tensors] == [one.name for one in specs]
        assert [list(tensor.dims) for tensor in tensors] == [one["dims"] for one in mine[kind]]
        reshaped = [tensor.HasField("reshape") for tensor in tensors]
        assert reshaped == ["reshape" in one for one in mine[kind]]
    assert bool(message.dynamic_batching.preferred_batch_size) == ("dynamic_batching" in mine)


def test_tritons_own_types_have_these_names() -> None:
    message = official("")
    kinds = message.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
    assert set(TYPES.values()) == set(kinds) - {"TYPE_INVALID", "TYPE_STRING"}


@pytest.mark.parametrize(
    ("inputs", "outputs", "asked", "batch"),
    [
        ([("n", 3)], [("n", 2)], None, 8),
        ([("n", 3)], [("n", 2)], 1, 1),
        ([("n", 3)], [("n", 2)], 0, 0),
        ([(4, 3)], [(4, 2)], None, 0),
        ([("n", 3), (1, 3)], [("n", 2)], None, 0),
        ([("n", 3)], [("m", 2)], None, 0),
        ([("n", 3)], [("m", 2)], 5, 5),
        ([()], [("n", 2)], None, 0),
        ([("n",)], [("n",)], None, 8),
    ],
)
def test_batching_needs_one_dynamic_axis_everywhere(
    tmp_path: Path, inputs: Any, outputs: Any, asked: int | None, batch: int
) -> None:
    artifact = float_model(
        *(spec(f"x{i}", *shape) for i, shape in enumerate(inputs)),
        outputs=tuple(spec(f"y{i}", *shape) for i, shape in enumerate(outputs)),
    )
    found = config(export_triton_server(artifact, tmp_path, max_batch_size=asked))
    assert found["max_batch_size"] == [batch]
    assert ("dynamic_batching" in found) == (batch > 1)
    for entry, shape in zip(found["input"], inputs, strict=True):
        dims = [axis if isinstance(axis, int) else -1 for axis in shape[batch > 0 :]]
        assert entry["dims"] == (dims or [1]), "the server wants at least one dimension"
        # a reshape to nothing is for batches only: see ValidateIOShape in the server
        assert ("reshape" in entry) == (batch > 0 and not dims)


def test_dynamic_batching_can_be_left_to_the_clients(tmp_path: Path) -> None:
    found = config(export_triton_server(cnn_artifact(), tmp_path, dynamic_batching=False))
    assert found["max_batch_size"] == [8]
    assert "dynamic_batching" not in found


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("limit", [None, 1000], ids=["inline", "external data"])
def test_the_exported_model_gives_the_engines_numbers_bit_for_bit(
    tmp_path: Path, precision: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, x = Engine(cnn_artifact(precision), get_backend("onnxruntime").open), images(9)
    expected = engine(x)
    if limit:
        monkeypatch.setattr("octavo.export.onnx_model.PROTOBUF_LIMIT", limit)
    forms = [KernelDtypes(), KernelDtypes("uint8", "uint8")]
    for index, form in enumerate(forms):
        folder = export_triton_server(engine, tmp_path, name=f"net{index}", form=form)
        path = folder / "1" / "model.onnx"
        assert (path.parent / "model.onnx.data").exists() == bool(limit)
        onnx.checker.check_model(path, full_check=True)
        exact_everywhere = index == 1 or precision == "float32" or "VNNI" in cpu_name()
        session = (
            onnxruntime.InferenceSession(str(path)) if exact_everywhere else make_session(path)
        )
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
    engine.close()
    export_triton_server(engine, tmp_path, name="after")


def test_the_configuration_fits_the_models_own_inputs(tmp_path: Path) -> None:
    for name, model in (("cnn", cnn()), ("fixed", cnn(batch=2)), ("tokens", tokens())):
        engine = octavo.build(model, precision="float32")
        folder = export_triton_server(engine, tmp_path, name=name)
        session, found = (
            onnxruntime.InferenceSession(str(folder / "1" / "model.onnx")),
            config(folder),
        )
        batched = found["max_batch_size"][0] > 0
        assert batched == (name == "cnn"), "tokens has an output that is not a batch"
        for mine, real in (
            *zip(found["input"], session.get_inputs(), strict=True),
            *zip(found["output"], session.get_outputs(), strict=True),
        ):
            assert mine["name"] == [real.name]
            shape = [axis if isinstance(axis, int) else -1 for axis in real.shape]
            assert ([-1] if batched else []) + mine["dims"] == shape
        assert found["input"][0]["data_type"] == ["TYPE_INT64" if name == "tokens" else "TYPE_FP32"]


def test_a_reader_of_the_configuration_learns_what_the_processor_needs(tmp_path: Path) -> None:
    def text(name: str, **arguments: Any) -> str:
        artifact = arguments.pop("artifact", cnn_artifact())
        folder = export_triton_server(artifact, tmp_path, name=name, **arguments)
        return (folder / "config.pbtxt").read_text()

    assert "uint8 activations, int8 weights" in text("default")
    assert "needs VNNI" in text("again")
    safe = text("safe", form=KernelDtypes("uint8", "uint8"))
    assert "uint8 weights" in safe
    assert "VNNI" not in safe
    assert "VNNI" not in text("float", artifact=cnn_artifact("float32"))


def test_engines_for_rtx_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tensorrt-rtx, and Triton .* no backend for it"):
        export_triton_server(plan(backend="tensorrt-rtx"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (plan, {"name": ""}, "cannot be called ''"),
        (plan, {"name": "../up"}, r"cannot be called '\.\./up': .* letters, digits"),
        (plan, {"name": ".hidden"}, "cannot be called"),
        (plan, {"name": "a\n"}, "cannot be called"),
        (plan, {"instance_count": 0}, "instance_count is 0; give 1 or more"),
        (plan, {"threads": -1}, "threads is -1; give 0 or more"),
        (plan, {"max_batch_size": -1}, "max_batch_size is -1; give 0 for no batching"),
        (plan, {"max_batch_size": 2**31}, "max_batch_size is 2147483648"),
        (plan, {"max_batch_size": 17}, "at most 16 samples .its profile.; give no more"),
        (
            lambda: float_model(spec("x", 2, 3)),
            {"max_batch_size": 4},
            r"max_batch_size is 4 and x: float32\[2, 3\] has no dynamic first axis",
        ),
        (
            lambda: float_model(spec("x", "n", 3), outputs=(spec("y", 1),)),
            {"max_batch_size": 4},
            r"y: float32\[1\] has no dynamic first axis",
        ),
        (
            lambda: float_model(spec("x", "n", dtype="object")),
            {},
            "is object, which Triton .* no type for",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, make: Callable[[], Artifact], arguments: dict[str, Any], message: str
) -> None:
    artifact = make()
    with pytest.raises(OctavoError, match=message):
        export_triton_server(artifact, tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_a_folder_that_exists_is_kept_unless_asked(tmp_path: Path) -> None:
    folder = export_triton_server(plan(), tmp_path, name="net")
    (folder / "2").mkdir()
    with pytest.raises(InputError, match=r"net exists; choose another name, or give overwrite=Tr"):
        export_triton_server(cnn_artifact(), tmp_path, name="net")
    assert config(folder)["backend"] == ["tensorrt"]
    export_triton_server(cnn_artifact(), tmp_path, name="net", overwrite=True)
    assert config(folder)["backend"] == ["onnxruntime"]
    assert not (folder / "2").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file exists"):
        export_triton_server(plan(), tmp_path, name="file", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_export_leaves_the_repository_as_it_was(
    tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        export_triton_server(plan(), tmp_path, name="net")

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_onnx", fail)
    with pytest.raises(OSError, match="no space"):
        export_triton_server(cnn_artifact(), tmp_path, name="net", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == (["net"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "net" / "1" / "model.plan").read_bytes() == b"plan"


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_triton_server(plan(), tmp_path, name="net")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("interrupted")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="interrupted"):
        export_triton_server(cnn_artifact(), tmp_path, name="net", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert config(folder)["backend"] == ["tensorrt"]


def test_other_users_may_read_the_repository(tmp_path: Path) -> None:
    folder = export_triton_server(cnn_artifact(), tmp_path)
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "file").touch()
    for mine, other in (("", ""), ("1", ""), ("config.pbtxt", "file"), ("1/model.onnx", "file")):
        assert (folder / mine).stat().st_mode == (tmp_path / "reference" / other).stat().st_mode
