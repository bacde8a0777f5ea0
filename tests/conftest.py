"""One thread per process: the tests' models are too small for more, and idle threads spin."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
