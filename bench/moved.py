"""Bytes that the plans of the convolution kernels move, against the least there is: arithmetic.

    python -m bench moved
    python -m bench moved --only depthwise_conv2d

Least: every tensor once. Planned: of the depthwise kernels, what their programs load and store,
where most of what two programs need comes from the L2 cache the second time; of int8_conv2d, what
passes between memory and the chip. Nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from octavo.kernels.cases import Case, cases_of

OPERATORS = ("depthwise_conv2d", "depthwise_separable_conv2d", "int8_conv2d")


def planned(operator: str) -> Iterator[tuple[Case, int]]:
    """The registered cases of an operator, and the bytes of their plans under the rule's tiles."""
    module = cases_of(operator)
    for case in module.cases():
        yield case, module.planned_bytes(case)  # type: ignore[attr-defined]


def main() -> int:
    """Prints a table for each operator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=OPERATORS, action="append", help="this operator alone")
    for operator in parser.parse_args().only or OPERATORS:
        for case, moved in planned(operator):
            print(
                f"{operator:<28}{case.name:<44}{case.bytes / 1e6:>9.2f} MB least"
                f"{moved / 1e6:>9.2f} MB planned{moved / case.bytes:>7.2f} x"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
