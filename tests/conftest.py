"""One thread a process: the models of the tests are too small for more, and threads that wait spin."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
