"""Files are whole under their name or not there, whatever happens to their writers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glide_ds.files import PARTIAL, locked, probe, replacing, sha256, write_file

WRITER = """
import sys, time
from glide_ds.files import replacing
with replacing(sys.argv[1]) as partial:
    partial.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(target: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(PARTIAL))


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "a.json"
    write_file(target, "old")
    write_file(target, b"new\x00")
    assert target.read_bytes() == b"new\x00"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a"
    write_file(target, "old")

    def write() -> None:
        with replacing(target) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert left_in(tmp_path) == []


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    target = tmp_path / "a"
    write_file(target, "old")
    writer = start_writer(target)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(left_in(tmp_path)) == 1
    write_file(tmp_path / "b", "another file's writer leaves it alone")
    assert len(left_in(tmp_path)) == 1
    write_file(target, "new")
    assert target.read_text() == "new"
    assert left_in(tmp_path) == []


def test_a_writer_that_lives_is_left_alone(tmp_path):
    target = tmp_path / "a"
    writer = start_writer(target)
    try:
        write_file(target, "mine")
        assert target.read_text() == "mine"
        assert len(left_in(tmp_path)) == 1
    finally:
        writer.kill()
        writer.wait()


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    target = tmp_path / "a"
    children = []
    for number in range(8):
        if not (child := os.fork()):
            code = 1
            try:
                for _ in range(20):
                    write_file(target, str(number) * 10_000)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    text = target.read_text()
    assert len(text) == 10_000
    assert len(set(text)) == 1
    assert left_in(tmp_path) == []


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    script = "import sys; from glide_ds.files import locked\nwith locked(sys.argv[1]): print('in', flush=True)"
    with locked(tmp_path / "lock"):
        other = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            other.communicate(timeout=1)
    assert other.communicate(timeout=30)[0] == "in\n"


def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path):
    with locked(tmp_path / "lock"):
        if not (child := os.fork()):
            time.sleep(30)
            os._exit(0)
    try:
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    probe(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        probe(tmp_path / "file" / "below")


def test_a_hash_is_the_content_s(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
