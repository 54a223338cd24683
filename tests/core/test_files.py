from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.core.files import atomic_path, atomic_write, sha256_bytes


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("data", [b"", b"\x00\xff" * 3, "scale \u00d7 2\n"], ids=repr)
def test_what_is_written_is_read_back(tmp_path: Path, data: bytes | str) -> None:
    target = tmp_path / "table.json"
    assert atomic_write(str(target), data) == target
    assert target.read_bytes() == (data if isinstance(data, bytes) else data.encode("utf-8"))
    assert list(tmp_path.iterdir()) == [target]


def test_folders_are_created(tmp_path: Path) -> None:
    target = atomic_write(tmp_path / "a" / "b" / "c.txt", "x")
    assert target.read_text() == "x"


def test_the_old_file_is_whole_until_the_block_ends(tmp_path: Path) -> None:
    target = atomic_write(tmp_path / "engine.bin", b"old")
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent, "renaming is atomic on one file system only"
        assert temporary.suffix == ".tmp"
        temporary.write_bytes(b"half of the n")
        assert target.read_bytes() == b"old"
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_writer_that_raises_changes_nothing(
    tmp_path: Path, old: bytes | None, error: type[BaseException]
) -> None:
    target = tmp_path / "table.json"
    if old is not None:
        target.write_bytes(old)

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_writer_that_loses_its_file_changes_nothing(tmp_path: Path) -> None:
    target = atomic_write(tmp_path / "table.json", b"old")
    with pytest.raises(FileNotFoundError), atomic_path(target) as temporary:
        temporary.unlink()
    assert target.read_bytes() == b"old"


def test_a_target_that_is_a_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"):
        atomic_write(target, b"x")
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_are_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    new = atomic_write(tmp_path / "new", b"")
    private = tmp_path / "private"
    private.touch(0o600)
    atomic_write(private, b"")
    assert mode(new) == mode(private) == 0o666 & ~umask
    assert os.umask(umask) == umask, "the umask of the process must stay as it was"


def test_a_writer_that_puts_its_own_private_file_does_not_keep_it_private(
    tmp_path: Path, umask: int
) -> None:
    target = tmp_path / "weights.safetensors"
    with atomic_path(target) as temporary:
        other = tmp_path / "other"
        other.touch(0o600)
        other.replace(temporary)
    assert mode(target) == 0o666 & ~umask


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "table"
    contents = [bytes([digit]) * 200_000 for digit in range(8)]
    threads = [threading.Thread(target=atomic_write, args=(target, data)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [target]


def test_sha256_of_known_text() -> None:
    # The examples of FIPS 180-2.
    assert sha256_bytes(b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert sha256_bytes(memoryview(b"")).startswith("e3b0c44298fc1c149afbf4c8996fb924")
