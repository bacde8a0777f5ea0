"""
Files: checks before one is read or written, atomic writes, and locks.

    check_output(path)                # before the work whose result goes there
    with atomic_write(path) as f:     # path appears when it is complete
        f.write(...)
    with locked_folder(path, ...):    # for one process at a time
        ...
"""
import contextlib
import glob
import os
import socket
from pathlib import Path


def check_regular(path):
    """Raises ValueError if path is not a file with contents of its own.

    Reading a device or a FIFO may never end; a clone without Git LFS has pointers to large files.
    """
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file; copy its contents into one")
    with open(path, "rb") as f:
        if f.read(43) == b"version https://git-lfs.github.com/spec/v1\n":
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; get it with"
                             " git lfs pull")


def check_output(path):
    """Raises ValueError unless a file can be written at path: call it before the work."""
    if not path or (os.path.exists(path) and not os.path.isfile(path)):
        raise ValueError(f"{path or 'the empty name'!r} is not the name of a file to write")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"cannot write {path}: {folder} is not an existing folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def temporary_name(path):
    """The name beside path of an incomplete file of this process.

    Removes what killed processes of this machine have left under such names of path.
    """
    prefix = f"{path}.{socket.gethostname()}."
    for leftover in glob.glob(glob.escape(prefix) + "*.tmp"):
        pid = leftover.removeprefix(prefix).removesuffix(".tmp")
        if not pid.isdigit() or is_another(int(pid)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            os.remove(leftover)
    return f"{prefix}{os.getpid()}.tmp"


def is_another(pid):
    """Whether pid is the id of another process that is running on this machine."""
    if os.name == "nt":  # os.kill would send Ctrl-C
        return True
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return pid != os.getpid()


def is_at(f, path):
    """Whether the open file f is still the one at path: an editor, or sed -i, replaces it."""
    try:
        return os.path.samestat(os.fstat(f.fileno()), os.stat(path))
    except OSError:  # there is none; on a network file system f may be stale
        return False


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Context with an open file that becomes path when it is complete.

    It is flushed to disk under another name, then renamed. An exception, or the end of the process,
    leaves no half-written path, and an older file at path untouched. The target of a symbolic link
    is replaced, not the link.
    """
    path = os.path.realpath(path)
    temporary = temporary_name(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def lock(path):
    """The file at path, created if necessary, open and locked until it is closed.

    It is a kernel lock, released however the process ends; the process that has it may remove the
    file. None if the file system has no locks. Raises BlockingIOError if another process has it.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    while True:
        f = open(path, "ab")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.close()
            raise
        except OSError:  # some network file systems
            f.close()
            os.remove(path)
            return None
        # another file, or none, if the last process that had the lock removed it after we opened it
        if is_at(f, path):
            return f
        f.close()


@contextlib.contextmanager
def locked_folder(path, program, flag):
    """Context in which a folder exists and no other process has locked it.

    The lock is that of a file .lock in it. Yields whether the file system has locks; a message is
    printed if not. At the end .lock is removed, and the folders created for it if they are empty.
    Raises ValueError if path is a file or cannot be written, or if another process has the lock;
    the message has its program, and the flag that chooses another folder.
    """
    folder = os.path.abspath(path)  # the process may change its directory
    lock_path = os.path.join(folder, ".lock")
    parents = Path(folder).parents  # the innermost first
    created = [name for name in (folder, *parents) if not os.path.isdir(name)]
    f = None
    try:
        try:
            os.makedirs(folder, exist_ok=True)
            f = lock(lock_path)
        except FileExistsError as e:
            raise ValueError(f"{path} is not a folder; choose another {flag}") from e
        except BlockingIOError as e:
            raise ValueError(f"{path} is in use by another {program}; wait for it or stop it, or"
                             f" choose another {flag}") from e
        except OSError as e:  # a read-only folder or disk
            raise ValueError(f"cannot write in {path} ({e.strerror}); choose another {flag}") from e
        if f is None:
            print(f"{path} cannot be locked on this file system: do not start another {program}"
                  " in it", flush=True)
        yield f is not None
    finally:
        with contextlib.suppress(OSError):  # rmdir fails for a folder that is not empty
            if f is not None:
                os.remove(lock_path)
                f.close()
            for new_folder in created:
                os.rmdir(new_folder)
