"""The calibration table: a versioned JSON file that every backend reads its scales from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from octavo.calibration.entries import (
    Count,
    Frozen,
    InputEntry,
    PositiveFloat,
    TensorEntry,
    WeightEntry,
)
from octavo.core.errors import ArtifactError, CalibrationError
from octavo.core.files import atomic_write
from octavo.core.results import TensorHistogram, Trial
from octavo.core.version import __version__
from octavo.export.qdq import QuantSpec

__all__ = ["SCHEMA_VERSION", "CalibrationTable", "InputEntry", "TensorEntry", "WeightEntry"]

SCHEMA_VERSION = 1

Float32 = Annotated[float, Field(ge=-3.4e38, le=3.4e38, allow_inf_nan=False)]


class CalibrationTable(Frozen):
    """What calibration found out about one model; immutable.

    Attributes:
        schema_version: version of this file format.
        octavo_version: which Octavo wrote it.
        fingerprint: what identifies the model: "onnx" (see `octavo.export.fingerprint`) and, for
            tables collected in PyTorch, "torch".
        observer: which observer chose the ranges; "mixed" where tensors differ.
        samples: how many samples were seen.
        tensors: activation name -> entry.
        weights: weight name -> scales.
        equalization: tensor name -> factor per channel.
        bias_correction: name of a layer's output -> what is added to its bias.
        exclude: patterns of nodes kept in float.
        inputs: what a module was exported with; empty for an ONNX file.
        trials: the candidates that were compared.
    """

    schema_version: Literal[1] = 1
    octavo_version: str = __version__
    fingerprint: dict[str, str]
    observer: str
    samples: Count
    tensors: dict[str, TensorEntry]
    weights: dict[str, WeightEntry] = Field(default_factory=dict)
    equalization: dict[str, tuple[PositiveFloat, ...]] = Field(default_factory=dict)
    bias_correction: dict[str, tuple[Float32, ...]] = Field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    inputs: dict[str, InputEntry] = Field(default_factory=dict)
    trials: tuple[Trial, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the table as JSON, in one step."""
        return atomic_write(path, self.dumps())

    def dumps(self) -> str:
        """The table as JSON, one line per entry, so that two tables can be compared as text."""
        fields = []
        for name, value in self.model_dump(mode="json").items():
            text = json.dumps(value)
            if isinstance(value, dict) and value:
                entries = ",\n".join(
                    f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()
                )
                text = f"{{\n{entries}\n }}"
            fields.append(f" {json.dumps(name)}: {text}")
        return "{\n" + ",\n".join(fields) + "\n}\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Reads a table.

        Raises:
            ArtifactError: no such file, not a table, a damaged one, or one of an unknown version.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read the calibration table {path}: {error}") from error
        return cls.loads(data, str(path))

    @classmethod
    def loads(cls, data: bytes, name: str = "calibration table") -> CalibrationTable:
        """Reads a table from its JSON text; `name` is what errors call it.

        Raises:
            ArtifactError: as `load`.
        """
        try:
            header = _Header.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(
                f"{name} is not a calibration table: {_reason(error)}; make one with "
                "`octavo calibrate`"
            ) from error
        if header.schema_version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{name} has schema version {header.schema_version}, this Octavo {__version__} "
                f"reads {SCHEMA_VERSION}; calibrate again, or install the Octavo that wrote it"
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(
                f"{name} is damaged at {_reason(error)}; calibrate again"
            ) from error

    def check_model(self, fingerprint: Mapping[str, str]) -> None:
        """Refuses a model other than the table's.

        Raises:
            CalibrationError: the fingerprints differ, or have no kind in common.
        """
        common = set(fingerprint) & set(self.fingerprint)
        if not common:
            raise CalibrationError(
                f"this table belongs to a {' or '.join(sorted(self.fingerprint))} model and the "
                f"model given is {' or '.join(sorted(fingerprint))}; give the model that was "
                "calibrated"
            )
        for kind in sorted(common):
            if fingerprint[kind] != self.fingerprint[kind]:
                raise CalibrationError(
                    f"this table belongs to another model ({kind} fingerprint "
                    f"{self.fingerprint[kind][:12]}, the model has {fingerprint[kind][:12]}); "
                    "calibrate this model"
                )

    def spec(self, tensors: Iterable[str], ports: Mapping[str, str] | None = None) -> QuantSpec:
        """What the table says about a graph.

        Args:
            tensors: names of the graph's tensors that can be quantized.
            ports: port -> tensor name, for a table that was collected in PyTorch.

        Returns:
            scales for those of the tensors that the table knows, by name or by a port.
        """
        entries = dict(self.tensors)
        for port, tensor in (ports or {}).items():
            if port in self.tensors:
                entries.setdefault(tensor, self.tensors[port])
        return QuantSpec(
            activations={name: entries[name].qparams for name in tensors if name in entries},
            equalization=self.equalization,
            bias_correction=self.bias_correction,
            exclude=self.exclude,
        )

    def example_inputs(self) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | None:
        """Inputs of the kind that the model was exported with; None where the table has none."""
        made = {name: entry.example() for name, entry in self.inputs.items()}
        keyword = any(entry.keyword for entry in self.inputs.values())
        return (made if keyword else tuple(made.values())) or None

    def merge(self, other: CalibrationTable) -> CalibrationTable:
        """The table of two sets of data: of each tensor the wider range, all counts added.

        Raises:
            CalibrationError: the tables belong to different models, types or excluded layers, or
                hold corrections that were fitted to their own data.
        """
        self.check_model(other.fingerprint)
        for field in ("exclude", "equalization", "bias_correction"):
            if getattr(self, field) != getattr(other, field):
                raise CalibrationError(
                    f"the tables differ in {field} and cannot be merged; calibrate once over all "
                    "the data instead"
                )
        merged = dict(other.tensors)
        for name, entry in self.tensors.items():
            merged[name] = entry.merge(merged[name], name) if name in merged else entry
        return self.model_copy(
            update={
                "tensors": merged,
                "samples": self.samples + other.samples,
                "observer": self.observer if self.observer == other.observer else "mixed",
                "weights": self.weights if merged == self.tensors else {},
                "trials": (),
            }
        )

    def histograms(self, names: Iterable[str]) -> tuple[TensorHistogram, ...]:
        """Histograms and chosen ranges of tensors, for a report."""
        found = [self.tensors[name].for_report(name) for name in names]
        return tuple(one for one in found if one is not None)


class _Header(BaseModel):
    schema_version: int


def _reason(error: ValidationError) -> str:
    """The first thing that validation found wrong, without the offending text itself."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "its beginning"
    return f"{place}: {first['msg']}"[:300]
