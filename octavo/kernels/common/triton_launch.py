"""What launchers of Triton kernels share: facts about the device, and the epilogue's arguments."""

from __future__ import annotations

import functools

import torch

from octavo.kernels.common.epilogue import Epilogue

__all__ = ["device_facts", "end_arguments", "end_constants", "pointers"]


@functools.cache
def device_facts(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Capability and multiprocessors; under the interpreter none, and as few as a test needs."""
    if device.type != "cuda":
        return None, 4
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def pointers(absent: torch.Tensor, *values: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The values, contiguous; in the place of one that is not there `absent`, which is not read."""
    return tuple(absent if value is None else value.contiguous() for value in values)


def end_arguments(e: Epilogue, absent: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """What `triton_finish` takes behind out_ptr; `absent` for pointers that are never read."""
    parts = (e.scale_x, e.scale_w, e.bias, e.residual, e.residual_scale, e.out_scale)
    return *pointers(absent, *parts), e.residual_zero_point, e.out_zero_point


def end_constants(e: Epilogue) -> dict[str, bool | str]:
    """The constants of `triton_finish` that follow from an epilogue."""
    return {
        "TOKEN": e.scale_x is not None and e.scale_x.ndim > 0,
        "CHANNEL": e.scale_w is not None and e.scale_w.ndim > 0,
        "BIAS": e.bias is not None,
        "RESIDUAL": e.residual is not None,
        "REQUANTIZE": e.out_scale is not None,
        "RAW": e.out_dtype == torch.int32,
        "ACTIVATION": e.activation,
    }
