"""A file is whole: the old one until the new one is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraport.errors import RunFolderError
from loraport.files import atomic_path, synced_by_caller, write_atomic


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "file"]


def test_text_and_bytes_are_written_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "käse\n")
    assert path.read_bytes() == "käse\n".encode()
    write_atomic(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert left_over(tmp_path) == []


def test_an_error_in_the_middle_leaves_the_old_content_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with atomic_path(path) as draft:
            draft.write_text("half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert left_over(tmp_path) == []


def test_a_kill_in_the_middle_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from loraport.files import atomic_path\n"
            "with atomic_path(sys.argv[1]) as draft:\n"
            "    draft.write_text('half')\n"
            "    print('writing', flush=True)\n"
            "    time.sleep(60)\n",
            str(path),
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {letter * 200_000 for letter in "ab"}
    write_atomic(path, "a" * 200_000)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from loraport.files import write_atomic\n"
            "for n in range(200): write_atomic(sys.argv[1], 'ab'[n % 2] * 200_000)\n",
            str(path),
        ]
    )
    seen = set()
    while child.poll() is None:
        seen.add(path.read_text())
        time.sleep(0.001)
    assert seen <= contents


def test_a_full_disk_leaves_the_old_content_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFolderError, match=r"file cannot be written: No space left on device\.") as caught:
        write_atomic(path, "new content")
    assert "Free some space" in str(caught.value)
    assert path.read_text() == "old"
    assert left_over(tmp_path) == []


def test_a_limit_of_the_system_in_the_middle_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import resource, sys\n"
            "from loraport.files import write_atomic\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "write_atomic(sys.argv[1], b'x' * 100_000)\n",
            str(path),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "RunFolderError" in done.stderr
    assert "File too large" in done.stderr
    assert path.read_text() == "old"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("place", ["folder", "missing/file", "file/below"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(RunFolderError) as caught:
        write_atomic(tmp_path / place, "new")
    assert str(tmp_path / place) in str(caught.value)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(left_over(tmp_path)) == ["folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunFolderError, match="Permission denied"):
            write_atomic(tmp_path / "file", "new")
    finally:
        tmp_path.chmod(0o755)


def test_whoever_takes_syncing_on_has_files_written_without_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with synced_by_caller():
        write_atomic(tmp_path / "file", "a")
    assert synced == []
    write_atomic(tmp_path / "file", "b")
    assert len(synced) == 1
