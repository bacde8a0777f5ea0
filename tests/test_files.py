"""
Atomic writes, locks and the folders made for them.

    .venv/bin/python -m pytest tests/test_files.py

What check_regular and check_output refuse is in tests/test_bad_input.py.
"""
import errno
import fcntl
import os
import subprocess
import sys

import pytest

from common import ROOT
from run import files


@pytest.mark.parametrize("mode, old, new", [
    ("wb", b"old", b"new"),
    ("w", "alt: \u00e4\n", "neu: \u00fc\r\n"),
])
def test_atomic_write_replaces_the_file_only_when_it_is_complete(tmp_path, mode, old, new):
    path = tmp_path / "file"
    with files.atomic_write(str(path), mode) as f:
        f.write(old)
    before = path.read_bytes()
    with files.atomic_write(str(path), mode) as f:
        f.write(new)
        f.flush()
        temporary, = set(os.listdir(tmp_path)) - {"file"}
        assert temporary.startswith("file.") and temporary.endswith(".tmp")
        assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == (new if mode == "wb" else new.encode())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_within_atomic_write_leaves_no_file_or_the_old_one(tmp_path, error):
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        with pytest.raises(error):
            with files.atomic_write(str(tmp_path / name)) as f:
                f.write(b"new " * 100_000)
                raise error
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"old"


WRITE_AND_WAIT = """
import sys
from run.files import atomic_write
with atomic_write(sys.argv[1]) as f:
    f.write(b"x")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_the_next_writer_removes_what_a_killed_one_has_left_and_nothing_else(tmp_path):
    """Half-written files, whose names hold a process id, stayed for ever."""
    path = tmp_path / "a[1].png"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE_AND_WAIT, path], cwd=ROOT,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    writers[0].kill()
    writers[0].wait()
    other = ["a[1].png.elsewhere.12.tmp", "a[1].png.12.notes.tmp", "b.png.12.tmp"]
    for name in other:
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == 5
    with files.atomic_write(path) as f:
        f.write(b"y")
    running, = set(os.listdir(tmp_path)) - {path.name, *other}
    assert f".{writers[1].pid}." in running and path.read_bytes() == b"y"
    writers[1].communicate()  # ends its input
    assert writers[1].returncode == 0 and path.read_bytes() == b"x"


def test_a_name_that_a_killed_process_of_the_same_id_has_left_is_removed(tmp_path):
    """In a container the next process may have the same id."""
    name = files.temporary_name(tmp_path / "a.png")
    open(name, "w").close()
    assert files.temporary_name(tmp_path / "a.png") == name and os.listdir(tmp_path) == []


def test_a_lock_excludes_other_processes_until_it_is_closed(tmp_path):
    first = files.lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        files.lock(tmp_path / "lock")
    first.close()
    files.lock(tmp_path / "lock").close()


def test_a_lock_is_of_the_file_at_its_path(tmp_path, monkeypatch):
    """The process that has it may remove the file after another process has opened it."""
    path = tmp_path / "lock"
    first = files.lock(path)
    flock = fcntl.flock

    def remove_then_flock(f, flags):
        monkeypatch.undo()
        os.remove(path)
        first.close()
        flock(f, flags)

    monkeypatch.setattr(fcntl, "flock", remove_then_flock)
    second = files.lock(path)
    assert os.path.samestat(os.fstat(second.fileno()), os.stat(path))
    second.close()


def test_a_file_system_without_locks_leaves_no_lock_file(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("no locks")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert files.lock(tmp_path / "lock") is None and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, reason", [
    ("file/x", "Not a directory"), ("a", "Permission denied")])
def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_choose(
        name, reason, tmp_path, monkeypatch):
    """In a read-only run folder it was "Permission denied: '.lock'", a file nobody knows."""
    (tmp_path / "file").touch()
    (tmp_path / "a").mkdir()

    def denied(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    if name == "a":  # a process of root has every permission
        monkeypatch.setattr(files, "open", denied, raising=False)
    message = rf"cannot write in {tmp_path}/{name} \({reason}\); choose another --out"
    with pytest.raises(ValueError, match=message):
        with files.locked_folder(str(tmp_path / name), "fineweb.py", "--out"):
            pass
