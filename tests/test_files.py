"""
Atomic writes, locks and the folders made for them.

    .venv/bin/python -m pytest tests/test_files.py

What check_regular and check_output refuse is in tests/test_bad_input.py.
"""
import fcntl
import os

import pytest

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
        assert sorted(os.listdir(tmp_path)) == ["file", f"file.{os.getpid()}.tmp"]
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


def test_make_folders_tells_which_folders_it_created(tmp_path):
    os.makedirs(tmp_path / "a")
    created = []
    files.make_folders(tmp_path / "a" / "b" / "c", created)
    assert created == [str(tmp_path / "a" / "b" / "c"), str(tmp_path / "a" / "b")]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder"):
        files.make_folders(tmp_path / "file" / "sub", created)
    assert len(created) == 2
