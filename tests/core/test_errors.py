from __future__ import annotations

import pytest

from octavo.core import errors

RAISED = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and not issubclass(value, Warning)
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: error.__name__)
def test_one_except_clause_catches_everything(error: type[Exception]) -> None:
    assert issubclass(error, errors.OctavoError)
    assert error.__doc__
    with pytest.raises(errors.OctavoError, match=r"scale 0\.0"):
        raise error("scale 0.0 is not positive")


def test_the_builtin_that_fits_catches_too() -> None:
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)


def test_a_warning_is_not_an_error() -> None:
    assert issubclass(errors.OctavoWarning, UserWarning)
    assert not issubclass(errors.OctavoWarning, errors.OctavoError)


def test_all_names_every_class() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined <= set(errors.__all__)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  no such node\nat line 3"), "no such node"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 400), "x" * 300),
    ],
)
def test_what_another_library_says_in_one_line(error: Exception, line: str) -> None:
    assert errors.first_line(error) == line
