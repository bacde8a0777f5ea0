"""
The process group and its collectives: one process, and two real gloo processes.

    .venv/bin/python -m pytest tests/test_process_group.py

Needs nothing but requirements-dev.txt; the GPUs in it are only names.
"""
import os
import socket
import subprocess
import sys

import pytest
import torch

import parallel
from parallel import Ranks, stop_requested
from runtime import StopSignals

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_a_single_process_is_rank_0_of_1_without_a_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = parallel.setup("cpu")
    assert ranks == Ranks(0, 0, 1, "cpu", False) and ranks.master_process
    assert parallel.all_gather("a", ranks) == ["a"] and parallel.all_reduce_sum(torch.tensor(3), ranks) == 3
    with parallel.rank0_first(ranks):
        parallel.barrier(ranks)
    for received in (None, "SIGTERM"):
        monkeypatch.setattr(StopSignals, "received", received)
        assert stop_requested(ranks) == received
    parallel.teardown()
    assert not torch.distributed.is_initialized()


def test_device_type_of_a_rank_has_no_index():
    assert Ranks(3, 3, 8, "cuda:3", True).device_type == "cuda" and Ranks(0, 0, 1, "mps", False).device_type == "mps"


def test_more_processes_than_gpus_is_an_error_that_names_the_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="3 processes or more on this machine, which has 2 GPUs: --nproc_per_node=2"):
        parallel.setup("cuda")


TWO_RANKS = """
import os, sys, time, torch, parallel
from runtime import StopSignals, print0
ranks = parallel.setup("cpu")
file = sys.argv[1]
with parallel.rank0_first(ranks):
    if ranks.master_process:
        time.sleep(0.5)  # gives rank 1 the time to be first, if it does not wait
        open(file, "w").close()
    found = os.path.exists(file)
total = parallel.all_reduce_sum(torch.tensor([1.0 + ranks.rank, 10.0], dtype=torch.float64), ranks)
values = parallel.all_gather({"rank": ranks.rank, "state": torch.tensor([ranks.rank])}, ranks)
stops = []
for received in ([None, None], ["SIGTERM", None], [None, "SIGUSR1"], ["SIGTERM", "SIGTERM"], ["SIGINT", "SIGTERM"]):
    StopSignals.received = received[ranks.rank]
    stops.append(parallel.stop_requested(ranks))
parallel.barrier(ranks)
print0("printed once")
print(ranks.rank, ranks.world_size, ranks.ddp, ranks.master_process, found, total.tolist(),
      [(v["rank"], v["state"].item()) for v in values], *stops, flush=True)
parallel.teardown()
assert not torch.distributed.is_initialized()
"""


def test_two_ranks_reduce_gather_wait_for_rank_0_and_agree_on_a_stop(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(tmp_path / "created")], cwd=ROOT, env=env,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    same = "[3.0, 20.0] [(0, 0), (1, 1)] None SIGTERM SIGUSR1 SIGTERM SIGTERM\n"
    assert outputs[0][0] == "printed once\n0 2 True True True " + same
    assert outputs[1][0] == "1 2 True False True " + same
