"""docs/contributing.md: the examples touch as few files as it says, and those that are only
examples work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GIT = shutil.which("git")
MOST = {"layer": 3, "kernel": 5, "backend": 3, "observer": 2, "fusion": 2}
"""Files that adding a part may touch, its test among them."""


def diff_of(part: str) -> str:
    return (DOCS / "examples" / f"{part}.diff").read_text()


def touched(part: str) -> list[str]:
    return re.findall(r"^diff --git a/\S+ b/(\S+)$", diff_of(part), re.MULTILINE)


@pytest.mark.parametrize("part", MOST)
def test_an_addition_touches_few_files_and_the_page_counts_them(part: str) -> None:
    files = touched(part)
    assert len(files) <= MOST[part]
    assert any(name.startswith("tests/") for name in files)
    page = (DOCS / "contributing.md").read_text()
    assert re.search(rf"examples/{part}\.diff\) \| {len(files)} \|", page)
    assert f"[{len(files)} files](examples/{part}.diff)" in page


@pytest.mark.parametrize("part", ["layer", "kernel", "fusion"])
def test_what_is_part_of_octavo_is_where_its_diff_put_it(part: str) -> None:
    assert all((ROOT / name).is_file() for name in touched(part))


@pytest.mark.skipif(GIT is None, reason="git applies the diff")
def test_the_examples_work_when_they_are_added(tmp_path: Path) -> None:
    for name in ("octavo", "tests", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    parts = ("backend", "observer")
    diffs = [str(DOCS / "examples" / f"{part}.diff") for part in parts]
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run([str(GIT), "apply", *diffs], cwd=tmp_path, env=outside, check=True)
    files = [name for part in parts for name in touched(part)]
    tests = [name for name in files if name.startswith("tests/")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", *tests]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**outside, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


def test_the_tests_run_without_pytest_cov() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:pytest_cov", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "tests/test_readme.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_the_example_runs_as_it_is_written" in done.stdout
