"""One thread per process: the tests' models are too small for more, and idle threads spin."""
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take the longest. They are run first: test.sh gives each worker a file at a time,
# and a long one at the end keeps one worker busy while the others have nothing left to do.
LONGEST = ["test_faults.py", "test_train_gpt2.py", "test_notebook.py", "test_hellaswag.py",
           "test_fineweb.py", "test_parallel.py"]


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script(module, *arguments) is (exit status, stdout, stderr) of a script in this process.
    """
    from run.cli import run_main

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        # it would change the whole process
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None, raising=False)
        status = 0
        try:
            run_main(module.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return run


def pytest_collection_modifyitems(items):
    def order(item):
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)
    items.sort(key=order)
