"""
Sharding modes: ddp, zero and fsdp compute, save and evaluate the same; the memory that each needs.

    ./test.sh tests/test_parallel.py        # no network, no GPU: real gloo ranks on the CPU

torchrun starts this file itself: main() below is what the ranks do, several checks in one start of the processes; their
results come back as JSON. The last tests run train_gpt2.py under torchrun.
"""
import contextlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # for the ranks, which do not read pytest.ini

from run import checkpoint  # noqa: E402
from run import parallel  # noqa: E402
from run.cli import StopSignals, run_main  # noqa: E402
from run.config import TrainConfig, parse_args, preset_settings  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from run.parallel import Ranks, setup, stop_requested, teardown  # noqa: E402
from run.settings import estimate_memory  # noqa: E402
from run.runtime import autocast  # noqa: E402
from train_gpt2 import capture, evaluate_loss, train_step  # noqa: E402
from run import folder
from run import weights

ALONE = Ranks(0, 0, 1, "cpu", False)
MODES = ["ddp", "zero", "fsdp"]
MOVES = [("one", "zero"), ("zero", "fsdp"), ("fsdp", "ddp")]  # all files have the same contents, so each mode is loaded once
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64, total_batch_size=128, batch_size=2, device="cpu",
            compile="off", dtype="float32", sample_every=0, hella_every=0)


class SharedLoader:
    """Micro-batches of 2 sequences out of a step's 8: this rank's, the same set for any number of ranks."""
    B, T = 2, 16

    def __init__(self, ranks, step=0):
        self.ranks, self.position = ranks, step * 4 + ranks.rank

    def next_batch(self):
        generator = torch.Generator().manual_seed(self.position)
        tokens = torch.randint(0, 64, (2, 17), generator=generator) % 7  # something to learn
        self.position += self.ranks.world_size
        return tokens[:, :-1], tokens[:, 1:]

    def state_dict(self):
        return {"position": self.position}


def start(ranks, saved=None, step=0, **changes):
    """A training of the tiny model, new or from full_state's (weights, optimizer states)."""
    config = TrainConfig(**{**TINY, **changes})
    torch.manual_seed(0)
    raw_model = GPT(config.gpt_config())
    if saved:
        raw_model.load_state_dict(saved[0])
    model = parallel.wrap(raw_model, config, parallel.should_compile(config, 20, ranks), 2, config.dtype, ranks)
    optimizers = parallel.make_optimizers(raw_model, config, ranks)
    if saved:
        parallel.load_full_optimizer_state(optimizers, saved[1])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=config.dtype == "float16")
    return SimpleNamespace(config=config, raw_model=raw_model, model=model, optimizers=optimizers, scaler=scaler, ranks=ranks,
                           loader=SharedLoader(ranks, step))


def train(run, steps):
    """[[loss, norm], ...] of that many steps."""
    return [train_step(step, run.model, run.raw_model, run.optimizers, run.scaler, run.loader, 0.01,
                       4 // run.ranks.world_size, 1.0, run.config.dtype, run.ranks)[:2] for step in range(steps)]


# -----------------------------------------------------------------------------
# what the ranks do, under torchrun

class UnequalStream:
    """A val split of 5 windows: with one row per batch, rank 0 of 2 has two batches, rank 1 three."""

    def __len__(self):
        return 5 * 16 + 1

    def read(self, position, length):
        return ((torch.arange(position, position + length) ** 2) % 7).numpy()


def check_losses(ranks, folder):
    """20 steps in each mode, saved after 10, resumed for 5 in another mode; and an evaluation."""
    results = {}
    for mode, again in itertools.product(MODES, (False, True)):
        run = start(ranks, parallel=mode, activation_checkpointing=again)
        name = f"{mode}{'+ac' * again}"
        results[name] = train(run, 10)
        saved = parallel.full_state(run.raw_model, run.optimizers, ranks)
        contents = capture(run.raw_model, None, run.optimizers, run.scaler, run.loader, run.config, ranks)
        results[f"shared {name}"] = len(addresses(contents) & addresses(live_state(run)))
        results[f"captured {name}"] = len(addresses(contents))
        if not again:
            if ranks.master_process:
                checkpoint.save_file(saved, os.path.join(folder, f"{mode}.pt"))
            results[name] += train(run, 10)
            model = parallel.unsharded_model(run.raw_model)
            results[f"val {mode}"] = evaluate_loss(model, UnequalStream(), 1, 16, 80, "float32", ranks)
            results[f"bytes {mode}"] = local_bytes(run)
            run = start(ranks, parallel=mode)
            run.raw_model.loss_chunks = 3
            results[f"{mode}, loss in chunks"] = train(run, 3)
            model = parallel.unsharded_model(run.raw_model)
            assert model.loss_chunks == 3
            results[f"val {mode}, loss in chunks"] = evaluate_loss(model, UnequalStream(), 1, 16, 80, "float32", ranks)
    for before, after in MOVES:
        saved = weights.load_file(os.path.join(folder, f"{before}.pt"))
        results[f"{before} to {after}"] = train(start(ranks, saved, 10, parallel=after), 5)
    return results


def check_float16(ranks, _):
    """Steps in float16 with an overflow on one rank only: every rank must skip that update and lower the scale."""
    results = {}
    for mode in MODES:
        run = start(ranks, parallel=mode, dtype="float16")
        losses = train(run, 2)
        forward, infinite = run.model.forward, []

        def overflow(x, y, forward=forward, infinite=infinite):
            logits, loss = forward(x, y)
            infinite.append(1)
            return logits, loss * (1e30 if ranks.rank == 1 and len(infinite) == 1 else 1)
        run.model.forward = overflow
        before = [parallel.unsharded_tensor(p).clone() for p in run.raw_model.parameters()]
        losses += train(run, 1)
        same = all(torch.equal(a, parallel.unsharded_tensor(b)) for a, b in zip(before, run.raw_model.parameters()))
        run.model.forward = forward
        results[mode] = {"losses": losses + train(run, 2), "skipped": same, "scale": run.scaler.get_scale()}
    return results


def addresses(value):
    """Addresses of the memory of all tensors in a nested value."""
    if isinstance(value, torch.Tensor):
        return {getattr(value, "to_local", lambda: value)().untyped_storage().data_ptr()} - {0}
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return set().union(*map(addresses, values))


def live_state(run):
    """Everything that the next step changes: parameters, gradients, optimizer states."""
    params = list(run.raw_model.parameters())
    states = [dict(getattr(o, "optim", o).state) for o in run.optimizers]
    return [params, [p.grad for p in params if p.grad is not None], run.raw_model.state_dict(), states]


def local_bytes(run):
    """[bytes of parameters, bytes of optimizer state] that this rank holds."""
    def size(tensors):
        return sum(getattr(t, "to_local", lambda t=t: t)().numel() * 4 for t in tensors if t.dim() > 0)
    states = [getattr(o, "optim", o).state for o in run.optimizers]
    return [size(run.raw_model.parameters()), size(t for state in states for s in state.values() for t in s.values())]


def main():
    ranks = setup("cpu")
    results = globals()[sys.argv[1]](ranks, sys.argv[2])
    if ranks.master_process:
        with open(os.path.join(sys.argv[2], "results.json"), "w") as f:
            json.dump(results, f)
    teardown()


def torchrun(*command, ranks=2, timeout=240, cwd=None):
    """Runs a script in gloo ranks; the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=timeout, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def ranks_do(check, folder):
    """The results of one of the functions above in two ranks."""
    process = torchrun(os.path.abspath(__file__), check, str(folder))
    assert process.returncode == 0, process.stderr[-3000:]
    with open(os.path.join(folder, "results.json")) as f:
        return json.load(f)


# -----------------------------------------------------------------------------
# the process group and its collectives

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


def test_a_single_process_on_a_machine_with_several_gpus_says_how_to_use_them_all(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(parallel, "choose_device", lambda device: device)
    for device, count, told in (("cuda", 4, True), ("cuda", 1, False), ("cuda:1", 4, False), ("cpu", 4, False)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        setup(device)
        assert ("torchrun --standalone --nproc_per_node=4 uses all" in capsys.readouterr().out) == told


def test_device_type_of_a_rank_has_no_index():
    assert Ranks(3, 3, 8, "cuda:3", True).device_type == "cuda" and Ranks(0, 0, 1, "mps", False).device_type == "mps"


def set_environment(monkeypatch, **values):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("wrong", [{"LOCAL_RANK": None}, {"WORLD_SIZE": None}, {"MASTER_ADDR": None}, {"MASTER_PORT": None},
                                   {"RANK": "x"}, {"RANK": ""}, {"RANK": "-1"}, {"LOCAL_RANK": "0.5"}, {"WORLD_SIZE": "two"},
                                   {"RANK": "2"}, {"MASTER_PORT": "http"}])
def test_an_environment_that_torchrun_did_not_set_is_an_error(wrong, monkeypatch):
    """RANK without LOCAL_RANK was once a KeyError."""
    torchruns = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    set_environment(monkeypatch, **{name: value for name, value in {**torchruns, **wrong}.items() if value is not None})
    name, value = *wrong, *wrong.values()
    with pytest.raises(ValueError, match=f"environment is not torchrun's: .*{name}={value or ''!r}.*; start several processes"):
        parallel.setup("cpu")


def test_torchrun_on_a_mac_is_an_error_that_names_a_device(monkeypatch):
    """gloo has no collectives for mps: a traceback of DDP's."""
    monkeypatch.setattr(parallel, "choose_device", lambda device: "mps")
    set_environment(monkeypatch, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    with pytest.raises(ValueError, match="cannot communicate on Apple's GPU: .* or give --device cpu"):
        parallel.setup("auto", 0.01)


def test_more_processes_than_gpus_is_an_error_that_names_the_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("run.runtime.check_cuda", lambda index: None)
    set_environment(monkeypatch, RANK="2", LOCAL_RANK="2", WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT="1")
    with pytest.raises(ValueError, match="3 processes or more on this machine, which has 2 GPUs: --nproc_per_node=2"):
        parallel.setup("cuda")


TWO_RANKS = """
import os, sys, time, torch
from run import parallel
from run.cli import StopSignals, exit_now, print0
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
exit_now(0)  # as run_main does: gloo's threads may abort an interpreter shutdown
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


# -----------------------------------------------------------------------------
# the same losses, the same checkpoints

@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(results of check_losses, [loss, norm] of 20 steps of one process, folder with the checkpoints)."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = start(ALONE)
    losses = train(alone, 10)
    checkpoint.save_file(parallel.full_state(alone.raw_model, alone.optimizers, ALONE), str(folder / "one.pt"))
    losses += train(alone, 10)
    return ranks_do("check_losses", folder), losses, folder


def near(results, expected, within=1e-5):
    return torch.allclose(torch.tensor(results), torch.tensor(expected), rtol=0, atol=within)


def test_every_mode_trains_like_one_process(two_ranks):
    results, alone, _ = two_ranks
    for mode in MODES:
        assert len(results[mode]) == 20 and near(results[mode], alone), mode
    assert results["ddp"][-1][0] < results["ddp"][0][0] - 1  # the loss fell: the updates had an effect
    for mode in MODES:
        assert near(results[f"{mode}+ac"], results[mode][:10], 1e-6), mode
        assert near(results[f"{mode}, loss in chunks"], results[mode][:3], 1e-6), mode
        assert near(results[f"val {mode}, loss in chunks"], results["val ddp, loss in chunks"], 1e-6), mode


def test_a_checkpoint_resumes_in_every_mode(two_ranks):
    results, alone, folder = two_ranks
    for before, after in MOVES:
        assert near(results[f"{before} to {after}"], alone[10:15]), (before, after)
    for before in MODES:
        saved = weights.load_file(str(folder / f"{before}.pt"))
        assert near(train(start(ALONE, saved, 10), 5), alone[10:15]), before


def assert_same(value, expected, where=""):
    """The same names, types and shapes, at every depth; tensors of nearly the same values."""
    assert type(value) is type(expected), where
    if isinstance(value, torch.Tensor):
        assert value.dtype == expected.dtype and value.shape == expected.shape, where
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-5), where
    elif isinstance(value, dict):
        assert value.keys() == expected.keys(), where
        for key in value:
            assert_same(value[key], expected[key], f"{where}/{key}")
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(expected), where
        for i, (a, b) in enumerate(zip(value, expected)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert value == expected, where


def test_every_mode_writes_the_checkpoint_of_one_process(two_ranks):
    *_, folder = two_ranks
    one = weights.load_file(str(folder / "one.pt"))
    for mode in MODES:
        assert_same(weights.load_file(str(folder / f"{mode}.pt")), one, mode)


def test_a_captured_checkpoint_shares_no_memory_with_the_training(two_ranks):
    """Under zero on a CPU the moments of rank 0's own parameters were once not copied: AdamW changed them while the writer
    thread wrote them, and most checkpoints were damaged."""
    results, *_ = two_ranks
    tensors = 2 * 12 + 4  # of two blocks; wte, which lm_head shares, wpe, and two of ln_f
    for name in [f"{mode}{again}" for mode in MODES for again in ("", "+ac")]:
        assert results[f"shared {name}"] == 0, name
        # weights, two moments and a step count for each, random numbers of two ranks
        assert results[f"captured {name}"] == 4 * tensors + 2, name


def test_what_is_sharded_is_held_once(two_ranks):
    results, *_ = two_ranks
    weights, moments = results["bytes ddp"]
    assert moments == 2 * weights and results["bytes zero"][0] == weights
    assert results["bytes zero"][1] == pytest.approx(moments / 2, rel=0.1)
    assert results["bytes fsdp"] == pytest.approx([weights / 2, moments / 2], rel=0.01)


def test_ranks_may_evaluate_different_numbers_of_batches(two_ranks):
    results, *_ = two_ranks
    assert results["val zero"] == pytest.approx(results["val ddp"], abs=1e-5)
    assert results["val fsdp"] == pytest.approx(results["val ddp"], abs=1e-5)


def test_a_resumed_run_keeps_the_hyperparameters_it_is_started_with():
    """--weight-decay and --beta2 were once announced as changed, and had no effect: the checkpoint's were loaded."""
    run = start(ALONE)
    train(run, 2)
    other = start(ALONE, parallel.full_state(run.raw_model, run.optimizers, ALONE), 2, weight_decay=0.5, beta2=0.75)
    groups = other.optimizers[0].param_groups
    assert {(group["weight_decay"], group["betas"]) for group in groups} == {(0.5, (0.9, 0.75)), (0.0, (0.9, 0.75))}
    for a, b in zip(parallel.params_of(run.optimizers[0]), parallel.params_of(other.optimizers[0])):
        assert torch.equal(run.optimizers[0].state[a]["exp_avg"], other.optimizers[0].state[b]["exp_avg"])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="mapped files are read from Linux's /proc")
def test_a_resumed_run_does_not_keep_its_checkpoint_mapped(tmp_path):
    """Loaded through a memory map, AdamW's moments kept a checkpoint on the disk after it was pruned."""
    def is_mapped():
        with open("/proc/self/maps") as f:
            return str(tmp_path) in f.read()
    run, path = start(ALONE), str(tmp_path / "state.pt")
    train(run, 1)
    torch.save(parallel.full_state(run.raw_model, run.optimizers, ALONE), path)
    saved = weights.load_file(path, mmap=True)
    assert is_mapped()
    other = start(ALONE, saved, 1)
    del saved
    assert not is_mapped()
    train(other, 1)


@pytest.mark.slow
def test_a_float16_overflow_on_one_rank_is_skipped_by_all(tmp_path):
    results = ranks_do("check_float16", tmp_path)
    for mode in MODES:
        assert results[mode]["skipped"] and results[mode]["scale"] == 512, mode
        for step in (0, 1, 3, 4):
            assert near(results[mode]["losses"][step], results["ddp"]["losses"][step], 1e-3), (mode, step)


# -----------------------------------------------------------------------------
# errors under torchrun

WITH_ERROR = """
import os, sys, train_gpt2
from run import cli
from types import SimpleNamespace
train_step, kind, rank = train_gpt2.train_step, os.environ["KIND"], os.environ["RANK"]
def failing(step, *args):
    if step == 1 and kind == "rank 1" and rank == "1":
        raise ValueError("damaged shard")
    if step == 1 and kind == "bug":
        raise AssertionError("a bug")
    if step == 1 and kind == "killed" and rank == "1":
        os._exit(7)
    return train_step(step, *args)
train_gpt2.train_step = failing
if kind == "stale" and rank == "1":  # it finds a checkpoint that rank 0 does not
    config_from_flags = train_gpt2.config_from_flags
    train_gpt2.config_from_flags = lambda: (config_from_flags()[0], SimpleNamespace(step=2))
cli.run_main(train_gpt2.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, printed", [("all", "error: no data at nowhere;"), ("rank 1", "error: damaged shard"),
                                           ("stale", "error: rank 0 starts from step 0, rank 1 from step 2"),
                                           ("locked", "error: log/shakespeare is in use by another"), ("killed", None),
                                           ("bug", "AssertionError: a bug")])
def test_under_torchrun_an_error_is_printed_by_one_rank_and_is_the_root_cause_in_its_summary(kind, printed, tmp_path,
                                                                                              monkeypatch):
    """An error on all ranks was printed by each; one on rank 0 was line 30 of 70, behind another rank's traceback."""
    write_inputs(tmp_path)
    (tmp_path / "with_error.py").write_text(WITH_ERROR)
    for name, value in (("KIND", kind), ("PYTHONPATH", ROOT)):
        monkeypatch.setenv(name, value)
    flags = [*SMALL, "--total-batch-size", "64", *(["--data", "nowhere"] if kind == "all" else [])]
    with contextlib.ExitStack() as stack:
        if kind == "locked":
            import fcntl
            os.makedirs(tmp_path / "log" / "shakespeare")
            fcntl.flock(stack.enter_context(open(tmp_path / "log" / "shakespeare" / "log.txt", "w")), fcntl.LOCK_EX)
        begin = time.monotonic()
        process = torchrun("with_error.py", *flags, cwd=tmp_path, timeout=60)
        assert process.returncode == 1 and time.monotonic() - begin < 40
    err = process.stderr
    root = err[err.index("Root Cause"):]
    if printed:  # once by the rank, once by torchrun
        assert root.count(printed) == 1 and err.count(printed) == 2, err
    else:
        assert "exitcode  : 7" in root, root
    assert "lost the connection" not in err
    assert err.count("Traceback (most recent call last)") == (3 if kind == "bug" else 1), err  # one is torchrun's own


# -----------------------------------------------------------------------------
# activation checkpointing

@pytest.mark.parametrize("dtype, dropout", [("float32", 0.0), ("float32", 0.2), ("bfloat16", 0.2)])
def test_activation_checkpointing_is_bitwise_identical(dtype, dropout):
    runs = []
    for again in (False, True):
        torch.manual_seed(1)
        run = start(ALONE, activation_checkpointing=again, dtype=dtype, dropout=dropout)
        runs.append((train(run, 4), [p.detach() for p in run.raw_model.parameters()], torch.get_rng_state()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))
    assert torch.equal(runs[0][2], runs[1][2])


def test_activation_checkpointing_stores_only_the_blocks_inputs():
    def kept(again):
        run, sizes = start(ALONE, activation_checkpointing=again, n_layer=8), {}
        weights = {p.untyped_storage().data_ptr() for p in run.raw_model.parameters()}
        x, y = run.loader.next_batch()

        def pack(t):
            if t.untyped_storage().data_ptr() not in weights:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run.model(x, y)
        return sum(sizes.values())
    inputs = 8 * 2 * 16 * 16 * 4  # L B T C, float32
    assert kept(False) - kept(True) > 10 * inputs


# -----------------------------------------------------------------------------
# what is not supported

def test_the_loss_in_chunks_is_not_compiled(monkeypatch):
    """Inductor kept the gradients of all chunks until it summed them: 1.0 GB, without chunks 0.6, uncompiled chunks 0.5."""
    config, graphs, compile_ = TrainConfig(**{**TINY, "vocab_size": 61, "compile": "on"}), [], torch.compile
    raw_model = GPT(config.gpt_config())
    raw_model.loss_chunks = 2

    def record(graph, _):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]  # one for each recomputation
        values = [node.meta.get("example_value") for part in parts for node in part.graph.nodes]
        graphs.append([value.shape for value in values if isinstance(value, torch.Tensor)])
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compile_(model, backend=record))
    torch._dynamo.reset()
    parallel.wrap(raw_model, config, True, 2, "float32", ALONE)
    shapes, = graphs
    assert (2, 16, 16) in shapes and not [shape for shape in shapes if shape[-1:] == (61,)]


@pytest.mark.parametrize("optimizer", ["muon"])
def test_muon_goes_on_bitwise_from_its_saved_state(optimizer):
    run = start(ALONE, optimizer=optimizer)
    train(run, 2)
    saved = parallel.full_state(run.raw_model, run.optimizers, ALONE)
    resumed = start(ALONE, saved, 2, optimizer=optimizer)
    losses = train(run, 2)
    assert losses == train(resumed, 2) and len({loss for loss, _ in losses}) == 2


def test_muon_cannot_be_sharded():
    for mode in ("zero", "fsdp"):
        with pytest.raises(ValueError, match="use --optimizer adamw or --parallel ddp"):
            TrainConfig(optimizer="muon", parallel=mode)
        with pytest.raises(ValueError, match="cannot shard muon"):
            TrainConfig(optimizer="muon", parallel=mode)
    assert TrainConfig(optimizer="muon", parallel="ddp").parallel == "ddp"


def test_a_sharding_mode_is_ignored_on_a_single_process(capsys):
    run = start(ALONE, parallel="fsdp")
    assert "--parallel fsdp is ignored on a single process" in capsys.readouterr().out
    assert run.model is run.raw_model and parallel.unsharded_model(run.raw_model) is run.raw_model


# -----------------------------------------------------------------------------
# memory

NUM_PARAMS = {"gpt2-124M": 124_475_904, "gpt2-1558M": 1_557_686_400}  # of a vocabulary of 50304


def needs(preset, B, W, dtype="bfloat16", **changes):
    """estimate_memory of a preset on GPUs, GB."""
    config = TrainConfig(**{**preset_settings(preset), "optimizer": "adamw", **changes})
    return sum(estimate_memory(config, NUM_PARAMS[preset], B, dtype, W, compiled=True).values()) / 1e9


def test_the_presets_fit_their_intended_gpus():
    assert needs("gpt2-124M", 4, 1) < 0.85 * 8
    assert needs("gpt2-124M", 64, 8) < 0.9 * 80                                # the lecture's
    assert needs("gpt2-1558M", 4, 8) > 24                                      # ddp
    assert needs("gpt2-1558M", 4, 4, parallel="fsdp", activation_checkpointing=True) < 0.85 * 24


def test_sharding_over_more_ranks_needs_less_memory():
    for again in (False, True):
        for W in (2, 4, 8):
            ddp, zero, fsdp = (needs("gpt2-1558M", 4, W, parallel=mode, activation_checkpointing=again) for mode in MODES)
            assert ddp > zero > needs("gpt2-1558M", 4, 2 * W, parallel="zero", activation_checkpointing=again)
            assert ddp > fsdp > needs("gpt2-1558M", 4, 2 * W, parallel="fsdp", activation_checkpointing=again)
    for mode in MODES:
        less = needs("gpt2-1558M", 4, 8, parallel=mode, activation_checkpointing=True)
        assert needs("gpt2-1558M", 4, 8, parallel=mode) > less
        assert needs("gpt2-1558M", 4, 1, parallel=mode) == needs("gpt2-1558M", 4, 1)  # nothing to shard


def test_under_fsdp_an_evaluation_needs_the_unsharded_weights_and_their_casts():
    """The casts were not counted: a run that the plan let start would run out of memory in its first evaluation."""
    for dtype, per_parameter in (("bfloat16", 6), ("float32", 4)):
        needed = needs("gpt2-1558M", 1, 1000, dtype, parallel="fsdp", activation_checkpointing=True)
        assert needed > per_parameter * NUM_PARAMS["gpt2-1558M"] / 1e9


def test_the_optimizer_state_is_16_bytes_per_parameter_divided_by_the_ranks_that_shard_it():
    config = TrainConfig(parallel="fsdp")
    for W in (2, 8):
        needed = estimate_memory(config, NUM_PARAMS["gpt2-124M"], 4, "bfloat16", W, compiled=True)
        assert needed["state"] == 16 * NUM_PARAMS["gpt2-124M"] / W


MEASURE = """
import sys
import checkpoint, train_gpt2
train_gpt2.keep_freed_memory = lambda: None  # resident memory is then memory in use
# the copy that a checkpoint is written from is not part of the estimate
train_gpt2.capture = lambda *args: (None, None)
checkpoint.save_and_prune = lambda *args: None
def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024
def reset_peak(*args, wrap=train_gpt2.parallel.wrap):
    model = wrap(*args)  # the compiler needs memory that the steps do not
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return model
base, train_gpt2.parallel.wrap = status("VmRSS"), reset_peak
try:
    train_gpt2.main()
finally:
    print("bytes", status("VmHWM") - base, flush=True)
"""


GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}


def saved_bytes(dtype, n_layer=1, V=512, B=2):
    """Bytes that the compiled forward of a GPT (T = C = 128) keeps for its backward."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    torch._dynamo.reset()
    storages = {}  # views share one

    def count(graph, _):
        for node in graph.graph.nodes:
            if node.op == "placeholder" and isinstance(node.meta["val"], torch.Tensor):
                storage = node.meta["val"].untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        return make_boxed_func(graph)
    model = torch.compile(GPT(GPTConfig(n_layer=n_layer, n_head=2, n_embd=128, block_size=128, vocab_size=V)),
                          backend=aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=count,
                                               decompositions=select_decomp_table(),
                                               partition_fn=min_cut_rematerialization_partition))
    x, y = (torch.zeros((B, 128), dtype=torch.long) for _ in range(2))
    with autocast("cpu", dtype):
        model(x, y)[1].backward()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype, per_block, per_logit", [("bfloat16", 36, 2), ("float16", 36, 2), ("float32", 64, 4)])
def test_the_estimates_constants_are_what_a_compiled_step_saves(dtype, per_block, per_logit):
    """Bytes per block, token and channel, and per logit. The rest is a few numbers per token: LayerNorm's statistics."""
    def per_token(**changes):
        return (saved_bytes(dtype, **changes, B=4) - saved_bytes(dtype, **changes, B=2)) / (2 * 128)
    assert (per_token(n_layer=2) - per_token()) / 128 == pytest.approx(per_block, abs=0.25)
    assert (per_token(V=1024) - per_token()) / 512 == pytest.approx(per_logit, abs=0.01)
    small, deeper, wider = (
        estimate_memory(TrainConfig(n_layer=n_layer, vocab_size=V, block_size=128, total_batch_size=128, sample_every=0,
                                    hella_every=0), 0, 1, dtype, 1, compiled=True)["micro-batch"]
        for n_layer, V in ((1, 512), (2, 512), (1, 1024)))
    assert (deeper - small) / (128 * 768) == per_block
    gradients = 2 * 4 * 512 * 768  # of wte and lm_head, which do not depend on the tokens
    assert (wider - small - gradients) / (128 * 512) == 2 * per_logit  # logits and their gradient


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("W, flags", [(1, []), (1, ["--activation-checkpointing"]), (1, ["--compile", "on"]),
                                      (2, ["--parallel", "fsdp"]), (2, ["--parallel", "zero"])])
def test_the_estimate_is_close_to_the_memory_of_real_training(W, flags, tmp_path):
    """The peak resident memory of 124M's processes in three steps, less that of Python with torch, is within 15%.

    glibc is set to return freed memory to the kernel; by default it keeps up to twice as much."""
    (tmp_path / "text.txt").write_text("the king and his queen will not come to this house " * 3000)
    (tmp_path / "measure.py").write_text(MEASURE)
    argv = ["--preset", "gpt2-124M", "--data", "text.txt", "--sequence-length", "256", "--batch-size", "1", "--device", "cpu",
            "--total-batch-size", str(2 * W * 256), "--max-steps", "3", "--val-every", "0", "--hella-every", "0",
            "--sample-every", "0", "--save-every", "0", "--dtype", "float32", "--compile", "off", *flags]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={W}"] if W > 1 else []
    process = subprocess.run([sys.executable, *launcher, "measure.py", *argv], cwd=tmp_path, capture_output=True, text=True,
                             timeout=580, env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **GIVE_BACK})
    assert process.returncode == 0, process.stderr[-3000:]
    config = TrainConfig(**{**preset_settings("gpt2-124M"), **parse_args(argv)})
    estimate = sum(estimate_memory(config, NUM_PARAMS["gpt2-124M"], 1, "float32", W, config.compile == "on").values())
    for line in re.findall(r"^bytes (\d+)", process.stdout, re.MULTILINE):
        assert int(line) == pytest.approx(estimate, rel=0.15)


# -----------------------------------------------------------------------------
# train_gpt2.py under torchrun

WORDS = "the king and his queen will not come to this house tonight for love or war my lord".split()
SMALL = ["--preset", "shakespeare", "--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16",
         "--total-batch-size", "192", "--batch-size", "2", "--max-steps", "4", "--val-every", "2", "--sample-every", "2",
         "--save-every", "2", "--hella-every", "2", "--hellaswag", "hellaswag.jsonl", "--val-tokens", "80", "--compile", "off",
         "--device", "cpu", "--dtype", "float32", "--optimizer", "adamw", "--lr", "0.01", "--data", "text.txt"]


def write_inputs(folder):
    """A text, and five HellaSwag examples: an odd number of both validation windows (80 / 16) and examples."""
    rng = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(400)))
    endings = ["is king.", "will come to this house.", "is not", "and my lord"]
    examples = [{"ctx": f"the queen {label}", "activity_label": "Reigning", "label": label, "endings": endings}
                for label in (0, 1, 2, 3, 1)]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))


def log_values(run_dir, *streams):
    """{(step, stream): value} of a run's log."""
    return {(step, stream): value for stream in streams for step, value in folder.read_log(run_dir / "log.txt")[stream]}


def train_py(*flags, ranks, cwd):
    """Runs train_gpt2.py to its end, as one process or under torchrun; the finished process."""
    script = os.path.join(ROOT, "train_gpt2.py")
    if ranks > 1:
        return torchrun(script, *SMALL, *flags, ranks=ranks, cwd=cwd)
    return subprocess.run([sys.executable, script, *SMALL, *flags], capture_output=True, text=True, timeout=240, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, first, then", [(2, "ddp", "fsdp"), (2, "fsdp", "ddp"), (3, "fsdp", "fsdp"), (3, "fsdp", "ddp"),
                                                (3, "zero", "fsdp")])
def test_every_mode_evaluates_samples_and_resumes_like_one_process(ranks, first, then, tmp_path):
    """Two steps in the first mode, then resumed in another.

    Once train_gpt2.py evaluated the sharded model: 3 ranks with samples crashed ("mixed torch.Tensor and DTensor"), 2 ranks
    with an odd number of validation windows hung, since the ranks ran different numbers of batches.
    """
    write_inputs(tmp_path)
    streams = ("train", "norm", "val", "hella", "hella_lm_eval", "hella_acc")
    whole = train_py("--exp-name", "one", ranks=1, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    half = train_py("--exp-name", "fsdp", "--parallel", first, "--max-steps", "2", ranks=ranks, cwd=tmp_path)
    assert half.returncode == 0, half.stderr[-3000:]
    rest = train_py("--exp-name", "fsdp", "--parallel", then, ranks=ranks, cwd=tmp_path)
    assert rest.returncode == 0 and "resuming" in rest.stdout, rest.stderr[-3000:]
    one, fsdp = (log_values(tmp_path / "log" / name, *streams) for name in ("one", "fsdp"))
    assert fsdp.keys() == one.keys() and len(one) == 2 * 4 + 4 * 3
    for key, value in one.items():
        assert fsdp[key] == pytest.approx(value, abs=1e-4), key
    samples = re.findall(r"^sample \d: .*", rest.stdout, re.MULTILINE)
    assert sorted(samples) == sorted(re.findall(r"^sample \d: .*", whole.stdout, re.MULTILINE)[-len(samples):])
    assert len(samples) == 8  # four at step 2, which are printed again, and four at step 4


if __name__ == "__main__":
    run_main(main)
