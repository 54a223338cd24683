"""A model that was calibrated: its graph, what is quantized in it, and with which scales.

What can be quantized is found once for a model, here; all that follows reads it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from octavo.calibration.calibrate import CalibrationOptions, calibrate_graph
from octavo.calibration.data import load_data
from octavo.calibration.sources import ModelSource, resolve_model
from octavo.calibration.table import CalibrationTable
from octavo.core.errors import CalibrationError
from octavo.core.progress import Progress, default_progress
from octavo.export.equalization import find_chains
from octavo.export.onnx_model import input_specs, module_of
from octavo.export.placement import COMPUTE, Placement, place
from octavo.export.qdq import QuantSpec
from octavo.export.torch_export import torch_fingerprint
from octavo.export.unsigned import unsigned_spec

__all__ = ["Placed", "weights_outside"]


@dataclass(frozen=True)
class Placed:
    """A model and its scales.

    Attributes:
        source: the float model.
        placement: what can be quantized in its graph, and what cannot and why.
        table: the scales.
    """

    source: ModelSource
    placement: Placement
    table: CalibrationTable

    @classmethod
    def calibrated(
        cls,
        source: ModelSource,
        data: Iterable[Any] | str | os.PathLike[str],
        options: CalibrationOptions,
        progress: Progress | None = None,
    ) -> Placed:
        """A model with the scales that real data gives it.

        Args:
            source: the float model.
            data: batches, or the path of a file of samples.
            options: what to compare or apply.
            progress: where to show progress; by default bars on a terminal.

        Raises:
            CalibrationError: no batches, NaN or infinity in the data, or nothing to quantize.
            InputError: data that does not fit the model.
        """
        if isinstance(data, (str, os.PathLike)):
            data = load_data(data, input_specs(source.graph))
        placement = place(source.graph, options.exclude)
        table = calibrate_graph(
            source.graph,
            data,
            options,
            placement=placement,
            progress=progress or default_progress(),
        )
        known = {"fingerprint": dict(source.fingerprint), "inputs": dict(source.inputs)}
        return cls(source, placement, table.model_copy(update=known))

    @classmethod
    def known(cls, source: ModelSource, table: CalibrationTable) -> Placed:
        """A model with the scales that it was given before.

        Raises:
            CalibrationError: the table belongs to another model.
        """
        table.check_model(source.fingerprint)
        return cls(source, place(source.graph, table.exclude), table)

    def spec(self, *, unsigned: bool) -> QuantSpec:
        """What the table says about the graph.

        Args:
            unsigned: for a back end that takes uint8 activations: unsigned values for tensors
                that are never negative.
        """
        spec = self.table.spec(self.placement.tensors, self.source.ports)
        return unsigned_spec(self.source.graph, spec, self.placement) if unsigned else spec

    @classmethod
    def of_table(cls, model: nn.Module, table: CalibrationTable, example: Any) -> Placed:
        """A module with the table that was made of it.

        Args:
            model: exported again, with inputs of the kind that the table knows.
            table: of this model.
            example: what to export it with instead; None for nothing.

        Raises:
            CalibrationError: the table belongs to another model.
            InputError: neither the table nor `example` has inputs.
        """
        if "torch" in table.fingerprint:  # said before the wrong inputs meet the wrong model
            table.check_model({"torch": torch_fingerprint(model)})
        example = table.example_inputs() if example is None else example
        return cls.known(resolve_model(model, example), table)

    def equalized(self) -> tuple[tuple[str, ...], ...]:
        """Names of the modules between which the table moves range: quantized together or not."""
        chains = find_chains(self.source.graph, self.placement)
        return tuple(
            tuple(
                module_of(one.weight or "") or one.name
                for one in (chain.producer, *chain.consumers)
            )
            for chain in chains
            if chain.tensor in self.table.equalization
        )

    def check_equalization(self, names: Collection[str]) -> None:
        """Refuses a table that moves range between a layer in INT8 and one that stays in float.

        Args:
            names: of the modules that are quantized.

        Raises:
            CalibrationError: there is such a pair.
        """
        for together in self.equalized():
            staying = [name for name in together if name not in names]
            if staying:
                raise CalibrationError(
                    f"the table equalizes the weights around {staying[0]!r}, which stays in "
                    "float; calibrate with it in exclude, or with equalization=False"
                )


def weights_outside(source: ModelSource, names: Collection[str]) -> tuple[str, ...]:
    """Weights of a graph that belong to none of the modules named, as patterns to exclude."""
    held = [
        node.inputs[1].name or ""
        for node in source.graph.graph
        if node.op_type in COMPUTE and node.inputs[1] and node.inputs[1].is_initializer()
    ]
    return tuple(dict.fromkeys(weight for weight in held if module_of(weight) not in names))
