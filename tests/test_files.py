"""
Atomic writes, locks and the folders made for them.

    .venv/bin/python -m pytest tests/test_files.py

Needs only requirements-dev.txt. What check_regular and check_output refuse is in tests/test_bad_input.py.
"""
import fcntl
import os

import pytest

from run import files


@pytest.mark.parametrize("mode, old, new", [("wb", b"old", b"new"), ("w", "alt: \u00e4\n", "neu: \u00fc\r\n")])
def test_atomic_write_replaces_the_file_only_when_it_is_complete(tmp_path, mode, old, new):
    path = tmp_path / "file"
    with files.atomic_write(str(path), mode) as f:
        f.write(old)
    with files.atomic_write(str(path), mode) as f:
        f.write(new)
        f.flush()
        assert sorted(os.listdir(tmp_path)) == ["file", f"file.{os.getpid()}.tmp"]
        assert path.read_bytes() == (old if mode == "wb" else old.encode())
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == (new if mode == "wb" else new.encode())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_an_exception_within_atomic_write_leaves_no_file_or_the_old_one(tmp_path, error, exists):
    path = tmp_path / "file"
    if exists:
        path.write_bytes(b"old")
    with pytest.raises(error):
        with files.atomic_write(str(path)) as f:
            f.write(b"new " * 100_000)
            raise error
    assert os.listdir(tmp_path) == ["file"] * exists and (not exists or path.read_bytes() == b"old")


def test_a_lock_excludes_other_processes_until_it_is_closed_also_if_its_holder_removes_the_file(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    first = files.lock(path)
    with pytest.raises(BlockingIOError):
        files.lock(path)
    flock = fcntl.flock

    def removed_meanwhile(f, flags):
        monkeypatch.undo()
        os.remove(path)  # by the first holder, after the second one has opened the file
        first.close()
        flock(f, flags)
    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    second = files.lock(path)
    assert os.path.samestat(os.fstat(second.fileno()), os.stat(path))
    with pytest.raises(BlockingIOError):
        files.lock(path)
    second.close()
    files.lock(path).close()


def test_make_folders_tells_which_folders_it_created(tmp_path):
    os.makedirs(tmp_path / "a")
    created = []
    files.make_folders(tmp_path / "a" / "b" / "c", created)
    assert created == [str(tmp_path / "a" / "b" / "c"), str(tmp_path / "a" / "b")]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder"):
        files.make_folders(tmp_path / "file" / "sub", created)
    assert len(created) == 2
