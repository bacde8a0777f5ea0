"""One thread per process: the tests' models are too small for more, and idle threads spin."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take the longest. They are run first: test.sh gives each worker a file at a time,
# and a long one at the end keeps one worker busy while the others have nothing left to do.
LONGEST = ["test_faults.py", "test_train_gpt2.py", "test_notebook.py", "test_hellaswag.py",
           "test_fineweb.py", "test_parallel.py"]


def pytest_collection_modifyitems(items):
    def order(item):
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)
    items.sort(key=order)
