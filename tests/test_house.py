"""The shape of the house: no circles, few doors at each root, and the field's words for names."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import octavo

ROOT = Path(octavo.__file__).parent
SOURCES = ("octavo", "bench")

WORDS = frozenset(
    {
        "bodies",
        "body",
        "branch",
        "branches",
        "codes",
        "contest",
        "divider",
        "edits",
        "form",
        "forms",
    }
    | {"judge", "like", "made", "miss", "misses", "note", "pair", "pairs", "places", "refusal"}
    | {"refused", "scene", "skipped", "step", "steps", "tiles", "trial", "under", "unit", "units"}
    | {"way", "ways", "why"}
)
"""Words of our own for what the field has names for; CONTRIBUTING.md says which."""
ALLOWED = {
    "AttentionPair": "a teacher's layer and its student's, which are a pair",
    "attention_pairs": "likewise",
    "Entropy.step": "bins from one candidate to the next",
    "LinearAttention.step": "a decoding step",
    "ModelLike": "Python's word for what may stand for a model",
    "Trial": "a candidate that calibration has tried",
    "trial_value": "likewise",
    "gru_steps": "time steps",
    "lstm_steps": "time steps",
    "BuildMonitor.step_complete": "TensorRT's name",
    "Row.note": "a remark beside a figure, in files of figures too",
    "SwapSummary.note": "a remark of the summary",
}
"""Public names with one of these words, and what it means there."""


@pytest.fixture(scope="module")
def imports() -> Mapping[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    graph = grimp.build_graph(*SOURCES, exclude_type_checking_imports=True)
    return {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}


def acyclic(edges: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_modules_import_each_other(imports: Mapping[str, set[str]]) -> None:
    acyclic(imports)


def test_no_folders_import_each_other(imports: Mapping[str, set[str]]) -> None:
    """Of the rooms of one folder, each with all that is in it, none imports in a circle."""
    folders = {name.rpartition(".")[0] for name in imports}
    for folder in folders:
        inside = f"{folder}." if folder else ""

        def room(name: str, inside: str = inside) -> str | None:
            return name.removeprefix(inside).split(".")[0] if name.startswith(inside) else None

        edges: dict[str, set[str]] = {}
        for name, others in imports.items():
            mine = room(name)
            if mine is not None:
                theirs = {room(other) for other in others}
                edges.setdefault(mine, set()).update(theirs - {mine, None})  # type: ignore[arg-type]
        acyclic(edges)


def entries(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if not one.name.startswith("__pycache__")]


def test_rooms_are_small() -> None:
    assert len(entries(ROOT / "layers")) <= 6
    lines = [len(path.read_text().splitlines()) for path in (ROOT / "pipelines").rglob("*.py")]
    assert sum(lines) <= 1200


def public_names() -> Iterator[tuple[str, str]]:
    """(module, name) of all that modules export, and of what their classes show."""
    for info in pkgutil.walk_packages(octavo.__path__, "octavo."):
        leaf = info.name.rpartition(".")[2]
        if leaf == "__main__" or leaf.startswith("triton"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            yield info.name, name
            value = getattr(module, name)
            if inspect.isclass(value) and value.__module__ == info.name:
                shown = {*vars(value), *getattr(value, "__annotations__", {})}
                yield from ((info.name, f"{name}.{one}") for one in sorted(shown) if one[0] != "_")


def words(name: str) -> set[str]:
    leaf = name.rpartition(".")[2]
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", leaf)}


def test_public_names_are_the_fields_words() -> None:
    found = []
    for module, name in public_names():
        ours = words(name) & WORDS
        if "codes" in ours and module.startswith(("octavo.quant", "octavo.kernels")):
            ours -= {"codes"}  # defined there: the integers of a quantized tensor
        if module == "octavo.kernels" or "linear_attention" in module:
            ours -= {"step"}  # one of decoding
        if ours and name not in ALLOWED:
            found.append(f"{module}: {name} ({', '.join(sorted(ours))})")
    assert not found, "\n".join(found)


def test_what_is_allowed_is_there() -> None:
    names = {name for _, name in public_names()}
    assert names.issuperset(ALLOWED)
