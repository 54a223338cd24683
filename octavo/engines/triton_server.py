"""An engine as a model repository of NVIDIA's Triton Inference Server.

The configuration follows `model_config.proto` of triton-inference-server/common and the option
names of its ONNX Runtime backend.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from octavo.core.errors import InputError, UnsupportedError
from octavo.core.results import TensorSpec
from octavo.core.version import __version__
from octavo.engines.artifact import Artifact, Manifest
from octavo.engines.engine import Engine
from octavo.export.onnx_model import save_onnx
from octavo.export.onnxruntime_form import KernelDtypes, lower_for_onnxruntime

__all__ = ["export_triton_server"]

DEFAULT_MAX_BATCH = 8
QUEUE_DELAY_US = 100
LARGEST_BATCH = 2**31 - 1
NAMES = "bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64"
TYPES = {"bfloat16": "TYPE_BF16"} | {
    name: f"TYPE_{name.upper().replace('FLOAT', 'FP')}" for name in NAMES.split()
}
"""numpy's names of types -> those of the server."""


def export_triton_server(
    engine: Artifact | Engine,
    folder: str | os.PathLike[str],
    *,
    name: str = "model",
    max_batch_size: int | None = None,
    instance_count: int = 1,
    dynamic_batching: bool = True,
    form: KernelDtypes | None = None,
    threads: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes `<folder>/<name>/config.pbtxt` and `<folder>/<name>/1/model.onnx` or `model.plan`.

    Start the server with `tritonserver --model-repository=<folder>`. The model appears in one
    step: an unfinished folder is never called `name`.

    Args:
        engine: an engine of backend onnxruntime (served on the CPU) or tensorrt (on the GPU).
        folder: the model repository; created where it is missing.
        name: what clients call the model.
        max_batch_size: the most samples the server may put together. None takes the largest of
            the engine's profiles, or 8, where the first axis of every input and output is the
            same dynamic axis, and no batching elsewhere; 0 turns batching off.
        instance_count: copies of the model that run side by side (on each GPU).
        dynamic_batching: let the server put requests together that arrive within 100 us.
        form: for INT8 engines of onnxruntime, which integer types the kernels get; by default
            uint8 activations and int8 weights, which are fast and exact on processors with VNNI.
            The server cannot pass ONNX Runtime the option that keeps sums from saturating on
            older ones: for those give `KernelDtypes("uint8", "uint8")`.
        threads: threads of one instance on a CPU; 0 for one a core.
        overwrite: replace an older folder `name`, all versions of it.

    Returns:
        the model's folder.

    Raises:
        InputError: the name, a number or the batching does not fit, or the folder exists.
        UnsupportedError: the server has no backend for this engine.
    """
    artifact = engine.artifact if isinstance(engine, Engine) else engine
    manifest = artifact.manifest
    if manifest.backend not in ("onnxruntime", "tensorrt"):
        raise UnsupportedError(
            f"this is an engine of backend {manifest.backend}, and Triton Inference Server has no "
            "backend for it (it serves onnxruntime and tensorrt); build the engine with one of "
            "these"
        )
    _check_name(name)
    for label, value, least in (("instance_count", instance_count, 1), ("threads", threads, 0)):
        if value < least:
            raise InputError(f"{label} is {value}; give {least} or more")
    batch = _max_batch(manifest, max_batch_size)
    chosen = form or KernelDtypes()
    config = _config(manifest, name, batch, instance_count, dynamic_batching, chosen, threads)
    target = Path(folder) / name
    with _new_folder(target, overwrite) as temporary:
        version = temporary / "1"
        version.mkdir()
        _write_model(artifact, version, chosen)
        (temporary / "config.pbtxt").write_text(config, encoding="utf-8")
    return target


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", name):
        raise InputError(
            f"the model cannot be called {name!r}: the name is a folder and part of a URL; use "
            "letters, digits, '_', '-' and '.'"
        )


def _max_batch(manifest: Manifest, asked: int | None) -> int:
    """The configuration's max_batch_size; 0 for no batching."""
    if asked is not None and not 0 <= asked <= LARGEST_BATCH:
        raise InputError(f"max_batch_size is {asked}; give 0 for no batching, or the largest batch")
    specs = (*manifest.inputs, *manifest.outputs)
    fixed = next((s for s in specs if not s.shape or not isinstance(s.shape[0], str)), None)
    limits = {name: profile[2][0] for name, profile in manifest.profiles.items() if len(profile[2])}
    largest = min((limits[spec.name] for spec in manifest.inputs if spec.name in limits), default=0)
    if asked:
        if fixed is not None:
            raise InputError(
                f"max_batch_size is {asked} and {fixed} has no dynamic first axis, so requests "
                "cannot be put together; give 0, or export the model with a dynamic batch axis"
            )
        if largest and asked > largest:
            raise InputError(
                f"max_batch_size is {asked} and the engine was built for at most {largest} samples "
                "(its profile); give no more, or build it with a larger profile"
            )
        return asked
    if asked == 0 or fixed is not None or len({spec.shape[0] for spec in specs}) > 1:
        return 0
    return largest or DEFAULT_MAX_BATCH


def _config(
    manifest: Manifest,
    name: str,
    batch: int,
    instances: int,
    dynamic: bool,
    form: KernelDtypes,
    threads: int,
) -> str:
    cpu = manifest.backend == "onnxruntime"
    lines = [
        f"# Written by Octavo {__version__} from an engine of precision {manifest.precision}.",
        *_remarks(manifest, form),
        f"name: {_quote(name)}",
        f"backend: {_quote(manifest.backend)}",
        f"platform: {_quote('onnxruntime_onnx' if cpu else 'tensorrt_plan')}",
        f"max_batch_size: {batch}",
        *(_tensor("input", spec, batch > 0) for spec in manifest.inputs),
        *(_tensor("output", spec, batch > 0) for spec in manifest.outputs),
        f"instance_group [ {{ count: {instances} kind: {'KIND_CPU' if cpu else 'KIND_GPU'} }} ]",
        "version_policy: { latest: { num_versions: 1 } }",
    ]
    if dynamic and batch > 1:
        sizes = ", ".join(map(str, _preferred(manifest, batch)))
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: [ {sizes} ] "
            f"max_queue_delay_microseconds: {QUEUE_DELAY_US} }}"
        )
    if cpu:
        lines += [_parameter("execution_mode", "0"), _parameter("intra_op_thread_count", threads)]
    return "\n".join(lines) + "\n"


def _remarks(manifest: Manifest, form: KernelDtypes) -> list[str]:
    if manifest.backend == "tensorrt":
        where = ", ".join(manifest.architecture) + (
            f" ({manifest.device})" if manifest.device else ""
        )
        return [
            f"# Runs on {_one_line(where)} with TensorRT {_one_line(manifest.backend_version)}: "
            "the server has to bring that version.",
        ]
    if not manifest.precision.startswith("int8"):
        return []
    remark = f"# INT8 layers have {form}."
    if form.activation == "uint8" and form.weight == "int8":
        remark += (
            " On x86 the processor needs VNNI: elsewhere sums\n# saturate, and the model has to be "
            'exported with form=KernelDtypes("uint8", "uint8").'
        )
    return [remark]


def _preferred(manifest: Manifest, batch: int) -> list[int]:
    """The batch an engine is tuned for, and the largest."""
    tuned = {shapes[1][0] for shapes in manifest.profiles.values() if shapes[1]}
    return sorted({size for size in tuned if 1 < size < batch} | {batch})


def _tensor(kind: str, spec: TensorSpec, batched: bool) -> str:
    if spec.dtype not in TYPES:
        raise UnsupportedError(
            f"{kind} {spec} is {spec.dtype}, which Triton Inference Server has no type for; it has "
            f"{', '.join(TYPES)}"
        )
    axes = spec.shape[1:] if batched else spec.shape
    dims = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in axes)
    text = f"name: {_quote(spec.name)} data_type: {TYPES[spec.dtype]} dims: [ {dims or 1} ]"
    if not dims and batched:  # the server wants a dimension, the model a bare number per sample
        text += " reshape: { shape: [ ] }"
    return f"{kind} [ {{ {text} }} ]"


def _parameter(key: str, value: object) -> str:
    return f"parameters {{ key: {_quote(key)} value: {{ string_value: {_quote(str(value))} }} }}"


def _quote(text: str) -> str:
    """A string of protobuf's text format: bytes outside printable ASCII in octal."""
    plain = {ord('"'): '\\"', ord("\\"): "\\\\"}
    return '"{}"'.format(
        "".join(
            plain.get(byte, chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")
            for byte in text.encode()
        )
    )


def _one_line(text: str) -> str:
    return json.dumps(text)[1:-1]


def _write_model(artifact: Artifact, folder: Path, form: KernelDtypes) -> None:
    if artifact.manifest.backend == "tensorrt":
        (folder / "model.plan").write_bytes(artifact.members["model.plan"])
        return
    with tempfile.TemporaryDirectory(prefix="octavo-") as scratch:
        for name, content in artifact.members.items():
            (Path(scratch) / name).write_bytes(content)
        model = ir.load(Path(scratch) / "model.onnx")
        if artifact.manifest.precision.startswith("int8"):
            model = lower_for_onnxruntime(model, form).model
        save_onnx(model, folder / "model.onnx")


@contextlib.contextmanager
def _new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder that takes the name of `target` when the block ends well."""
    if target.exists() and (not overwrite or not target.is_dir()):
        raise InputError(
            f"{target} exists; choose another name, or give overwrite=True to replace the folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        new, old = Path(scratch) / "new.tmp", Path(scratch) / "old"
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
