"""
Files: checks before one is read or written, atomic writes, and locks.

    check_output(path)                # before the work whose result goes there
    with atomic_write(path) as f:     # path appears when it is complete
        f.write(...)
    f = lock(path)                    # until f is closed
"""
import contextlib
import os
import re


def check_regular(path):
    """Raises ValueError if path is a folder, a device, a FIFO or a socket: reading one of these may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file; copy its contents into one")


def check_output(path):
    """Raises ValueError unless a file can be written at path: call it before the work whose result goes there."""
    folder = os.path.dirname(os.path.realpath(path) if os.path.islink(path) else path) or "."
    if not path or os.path.isdir(path):
        raise ValueError(f"{path or 'the empty name'!r} is not the name of a file to write")
    if not os.path.isdir(folder):
        raise ValueError(f"cannot write {path}: {folder} is not an existing folder")
    if not os.access(path if is_special(path) else folder, os.W_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def is_special(path):
    """Whether path is a device, a FIFO or a socket, or the name of an open file, such as /dev/stdout."""
    return open_file(path) is not None or os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def open_file(path):
    """The descriptor that a name such as /dev/stdout or /dev/fd/63 (process substitution) stands for; None for others."""
    match = re.fullmatch(r"/dev/(stdin|stdout|stderr)|(?:/dev|/proc/self)/fd/(\d+)", path)
    return match and (int(match[2]) if match[2] else ("stdin", "stdout", "stderr").index(match[1]))


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Context with an open file that becomes path when it is complete: flushed to disk under another name, then renamed.

    An exception, or the end of the process, leaves no half-written path, and an older file at path untouched. The target
    of a symbolic link is replaced, not the link. A device, a FIFO or an open file is written to as it is: /dev/stdout may be
    a file that the shell has redirected it to, which must keep what was printed before.
    """
    encoding = dict(encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "\n")
    if is_special(path):
        descriptor = open_file(path)
        with open(path if descriptor is None else descriptor, mode, closefd=descriptor is None, **encoding) as f:
            yield f
        return
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, **encoding) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def make_folders(path, created):
    """Creates a folder and its parents; inserts those that did not exist into the list created, the innermost first."""
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return
    make_folders(os.path.dirname(path), created)
    try:
        os.mkdir(path)
        created.insert(0, path)
    except FileExistsError as e:
        if not os.path.isdir(path):  # else another process has just created it
            raise ValueError(f"{path} is not a folder; choose another name") from e


def lock(path):
    """The file at path, created if necessary, open and locked until it is closed; None if the file system has no locks.

    It is a kernel lock, released however the process ends. Raises BlockingIOError if another process holds it. Who holds
    it may remove the file.
    """
    while True:
        f = open(path, "ab")
        try:
            import fcntl  # not on Windows
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # removed by the last holder after we had opened it
                if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                    return f
        except BlockingIOError:
            f.close()
            raise
        except (ImportError, OSError):  # some network file systems
            f.close()
            return None
        f.close()
