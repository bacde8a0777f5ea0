"""
Faults that a run survives, with real processes, signals and torchrun, damaged files and full disks.

    ./test.sh tests/test_faults.py        # signals and damaged files; no network, no GPU
    ./test.sh --all tests/test_faults.py  # all of it

Every process has a wall-clock limit. A run equals the uninterrupted one if losses, norms, learning
rates and weights are bitwise identical.
"""
import os
import pickle
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

import data
import train_gpt2
from common import ENV, ROOT
from run import checkpoint, folder, weights
from run.prepare import prepare_data
from test_train_gpt2 import (Ended, TINY, command, log_of, run_here, start, text,  # noqa: F401
                             train, wait_for)

STEPS = 18
FLAGS = ["--max-steps", str(STEPS), "--val-every", "5", "--save-every", "2",
         "--total-batch-size", "256"]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):  # noqa: F811
    """Folder of an uninterrupted run of STEPS steps."""
    cwd = tmp_path_factory.mktemp("uninterrupted")
    assert run_here(cwd, *TINY, "--data", text, *FLAGS) == 0
    return os.path.join(cwd, "log", "shakespeare")


def assert_equals_uninterrupted(run_dir, uninterrupted, exact=True):  # noqa: F811
    """The run's log and last weights equal those of the uninterrupted one.

    Bitwise, or if not exact the losses to 1e-4.
    """
    streams = ("train", "val", "norm", "lr")
    ours, theirs = log_of(run_dir, *streams), log_of(uninterrupted, *streams)
    if exact:
        assert ours == theirs
        a, b = (torch.load(folder.paths(place, STEPS)[0])["model"]
                for place in (run_dir, uninterrupted))
        assert all(torch.equal(a[name], b[name]) for name in b)
        return
    assert [line.split()[:2] for line in ours] == [line.split()[:2] for line in theirs]
    a, b = ([float(line.split()[2]) for line in lines] for lines in (ours, theirs))
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def run_code(code, cwd, *flags):
    """Starts a training process that runs code instead of train_gpt2.py."""
    return subprocess.Popen([sys.executable, "-c", code, *command(*flags)[2:]], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**ENV, "PYTHONPATH": ROOT})


# -----------------------------------------------------------------------------
# signals

def test_stop_requests_finish_the_step_save_and_exit_with_their_status(
        uninterrupted, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """One run, stopped five times. A closed stdout (`| head`) once ended it without a save."""
    run_dir = tmp_path / "log" / "shakespeare"
    flags = ["--data", text, *FLAGS, "--save-every", "1000"]
    process = start(tmp_path, *flags, stderr=subprocess.PIPE)
    wait_for(process, "step +1/")
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ("stdout cannot be written (Broken pipe): stop requested;"
                                     " finishing the step, then saving\n")
    steps = folder.saved_steps(run_dir)
    for number, status in ((signal.SIGTERM, 0), (signal.SIGUSR1, 75), (signal.SIGINT, 130),
                           (signal.SIGHUP, 129)):
        def step_line(step, *_, second=steps[-1] + 1, number=number):
            if step == second:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(train_gpt2, "step_line", step_line)
        assert run_here(tmp_path, *TINY, *flags) == status
        stopped = re.search(rf"stopped at step (\d+) by {number.name};", capsys.readouterr().out)
        steps.append(int(stopped[1]))
        kept = {*steps[-2:], checkpoint.best_step(run_dir)} - {None}
        assert folder.saved_steps(run_dir) == sorted(kept) and steps[-1] > steps[-2] + 1
    monkeypatch.undo()
    assert run_here(tmp_path, *FLAGS) == 0
    assert_equals_uninterrupted(run_dir, uninterrupted)


@pytest.mark.slow
def test_a_closed_terminal_saves_although_nothing_can_be_printed(
        uninterrupted, text, tmp_path):  # noqa: F811
    """The kernel sends SIGHUP, and every write to stdout and stderr fails with EIO."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, command("--data", text, *FLAGS, "--save-every", "1000"))
    printed = b""
    while not re.search(rb"step +7/", printed):
        printed += os.read(terminal, 10000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert folder.saved_steps(tmp_path / "log" / "shakespeare")[-1] >= 7
    assert train(tmp_path, *FLAGS).returncode == 0
    assert_equals_uninterrupted(tmp_path / "log" / "shakespeare", uninterrupted)


@pytest.mark.slow
def test_a_run_whose_picture_cannot_be_written_is_a_success(text, tmp_path):  # noqa: F811
    (tmp_path / "log" / "shakespeare" / "loss.png").mkdir(parents=True)  # in the way
    process = train(tmp_path, "--data", text)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert "finished; curves: not drawn, IsADirectoryError" in process.stdout
    assert folder.saved_steps(tmp_path / "log" / "shakespeare") == [4, 8]


SLOW_SAVE = """
import time, train_gpt2
from run import checkpoint
from run.cli import StopSignals, run_main
def slowly(contents, path):
    if "model" in path:
        print("writing the model", flush=True)
        while StopSignals.received is None:
            time.sleep(0.01)
    save_file(contents, path)
save_file, checkpoint.save_file = checkpoint.save_file, slowly
run_main(train_gpt2.main)
"""


@pytest.mark.slow
def test_a_signal_while_the_last_checkpoint_is_written_does_not_lose_it(text, tmp_path):  # noqa: F811
    """The handlers were once restored too early, and the process died in the save."""
    process = run_code(SLOW_SAVE, tmp_path, "--data", text, "--save-every", "8")
    wait_for(process, "writing the model")
    os.kill(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0, out
    assert folder.saved_steps(tmp_path / "log" / "shakespeare") == [8]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_at_a_random_moment_loses_no_step(
        number, uninterrupted, text, tmp_path):  # noqa: F811
    """A signal before the loop saves nothing; later ones save: in steps, evaluations and saves."""
    rng = random.Random(int(number))
    for _ in range(40):
        process = start(tmp_path, "--data", text, *FLAGS)
        time.sleep(rng.uniform(1.0, 8.0))
        if process.poll() is None:
            os.kill(process.pid, number)
        out = process.communicate(timeout=60)[0]
        assert "Traceback" not in out or "KeyboardInterrupt" in out, out
        if folder.saved_steps(tmp_path / "log" / "shakespeare")[-1:] == [STEPS]:
            break
    process = train(tmp_path, "--data", text, *FLAGS)
    assert process.returncode == 0, process.stderr
    assert_equals_uninterrupted(tmp_path / "log" / "shakespeare", uninterrupted)


# -----------------------------------------------------------------------------
# kills

@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_no_result(text, tmp_path):  # noqa: F811
    """SIGKILL anywhere: in startup, steps, validation, saving, pruning and logging."""
    steps = ["--max-steps", "150", "--val-every", "5", "--save-every", "1", "--n-embd", "64"]
    whole = tmp_path / "whole"
    os.mkdir(whole)
    assert train(whole, "--data", text, *steps, timeout=300).returncode == 0
    rng, kills = random.Random(0), 0
    run_dir = tmp_path / "log" / "shakespeare"
    while kills < 34:
        process = start(tmp_path, "--data", text, *steps)
        try:
            wait_for(process, r"step +\d+/")
            time.sleep(rng.uniform(0, 0.3))
            os.killpg(process.pid, signal.SIGKILL)
        except Ended:
            assert process.returncode == 0
            break
        process.communicate(timeout=30)
        kills += 1
    assert kills >= 30
    process = train(tmp_path, *steps, timeout=300)
    assert process.returncode == 0, process.stderr
    for stream in ("train", "val", "norm", "lr"):
        assert log_of(run_dir, stream) == log_of(whole / "log" / "shakespeare", stream)
    assert not list(run_dir.glob("*.tmp"))


def ranks_of(process):
    """The training processes under a torchrun, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            rank = child.environ().get("RANK")
            if rank is not None and any("train_gpt2.py" in part for part in child.cmdline()):
                found[int(rank)] = child
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def torchrun(cwd, *flags, nproc=2, launcher=("--standalone",)):
    """A torchrun that restarts its ranks up to 9 times, as a process with its output."""
    launcher = ["-m", "torch.distributed.run", *launcher, f"--nproc_per_node={nproc}"]
    return subprocess.Popen([sys.executable, *launcher, "--max-restarts=9", *command(*flags)[1:]],
                            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=ENV)


@pytest.fixture(scope="module")
def uninterrupted_pair(text, tmp_path_factory):  # noqa: F811
    """Folder of an uninterrupted run on two ranks."""
    cwd = tmp_path_factory.mktemp("pair")
    process = torchrun(cwd, "--data", text, *FLAGS)
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 0, out
    return os.path.join(cwd, "log", "shakespeare")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step +7/", "step +9/", "saved .*model_00012"])
def test_torchrun_restarts_after_a_rank_is_killed(
        moment, uninterrupted_pair, text, tmp_path):  # noqa: F811
    """In a step, in the evaluation at step 10, at a save.

    torchrun's store outlives the ranks that died (parallel.store_of_this_start).
    """
    process = torchrun(tmp_path, "--data", text, *FLAGS)
    wait_for(process, moment)
    ranks_of(process)[1].kill()
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 0, out
    assert "resuming" in out
    assert_equals_uninterrupted(tmp_path / "log" / "shakespeare", uninterrupted_pair)


def new_store():
    """A store for torchrun's rendezvous, on a free port that the kernel chooses."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.slow
def test_two_nodes_survive_the_loss_of_a_rank(uninterrupted_pair, text, tmp_path):  # noqa: F811
    """Two torchrun agents with a c10d rendezvous on 127.0.0.1, as on two machines."""
    store = new_store()
    rendezvous = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{store.port}",
                  "--rdzv_conf=is_host=0", "--rdzv_id=faults", "--local_addr=127.0.0.1"]
    agents = [torchrun(tmp_path, "--data", text, *FLAGS, nproc=1, launcher=rendezvous)
              for _ in range(2)]
    deadline = time.monotonic() + 90
    while not folder.saved_steps(tmp_path / "log" / "shakespeare"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim = next(ranks_of(agent)[1] for agent in agents if 1 in ranks_of(agent))
    victim.kill()
    outputs = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert_equals_uninterrupted(tmp_path / "log" / "shakespeare", uninterrupted_pair)


@pytest.mark.slow
def test_train_sbatch_saves_at_slurms_signal_and_requeues(
        uninterrupted_pair, text, tmp_path):  # noqa: F811
    """With stand-ins for srun, scontrol and scancel: one node, two ranks."""
    scripts = {
        "srun": f'echo $$ > {tmp_path}/srun.pid; exec "$@"',
        "scontrol": '[ "$1" = show ] && echo 127.0.0.1 && exit;'
                    f' kill -0 "$(cat {tmp_path}/srun.pid)" && set early;'
                    f' echo "$@" >> {tmp_path}/requeued',
        "scancel": f'[ "$*" = "--signal=TERM 7.0" ] && kill -TERM "$(cat {tmp_path}/srun.pid)"',
        ".venv/bin/python": f'exec {sys.executable} "$@"'}
    os.makedirs(tmp_path / ".venv" / "bin")
    for name, line in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        os.chmod(tmp_path / name, 0o755)
    os.symlink(os.path.join(ROOT, "train_gpt2.py"), tmp_path / "train_gpt2.py")
    env = {**ENV, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
           "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1",
           "SLURM_GPUS_ON_NODE": "2"}
    script = ["bash", os.path.join(ROOT, "train.sbatch"), *TINY, "--data", text, *FLAGS]

    def submit(store):
        return subprocess.Popen(script, env={**env, "MASTER_PORT": str(store.port)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                start_new_session=True)

    store = new_store()
    job = submit(store)
    wait_for(job, r"step +7/")
    os.kill(job.pid, signal.SIGUSR1)  # to the script only, as --signal=B: does
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and "stopped at step" in out, out
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    store = new_store()
    job = submit(store)
    out = job.communicate(timeout=180)[0]
    assert job.returncode == 0 and "resuming" in out, out
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # only once
    assert_equals_uninterrupted(tmp_path / "log" / "shakespeare", uninterrupted_pair)


@pytest.mark.slow
def test_the_number_of_ranks_may_change_on_resume(text, tmp_path):  # noqa: F811
    """1 -> 2 -> 1 ranks: the same windows in the same order, so the losses of one rank."""
    flags = ["--data", text, *FLAGS, "--dropout", "0"]
    whole = tmp_path / "whole"
    os.mkdir(whole)
    assert train(whole, *flags).returncode == 0
    for ranks, step in ((1, 6), (2, 14)):
        process = start(tmp_path, *flags, ranks=ranks)
        wait_for(process, rf"step +{step}/")
        # torchrun's ranks are in sessions of their own
        children = list(ranks_of(process).values())
        for child in children:
            child.kill()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        psutil.wait_procs(children, timeout=30)
    process = train(tmp_path, *flags)
    assert process.returncode == 0, process.stderr
    assert "1 processes, were 2" in process.stdout
    assert_equals_uninterrupted(tmp_path / "log" / "shakespeare", whole / "log" / "shakespeare",
                                exact=False)


# -----------------------------------------------------------------------------
# damage

class Evil:
    """Runs code when it is unpickled: creates a folder."""

    def __reduce__(self):
        return (os.mkdir, ("evil",))


def damage(path, kind):
    """Damages the file at path."""
    size = os.path.getsize(path)
    if kind == "removed":
        os.remove(path)
    elif kind == "text":
        with open(path, "w") as f:
            f.write("404: Not Found")
    elif kind == "code":
        with open(path, "wb") as f:
            pickle.dump({"model": Evil(), "config": {}, "step": 4}, f)
    elif kind == "of another step":
        torch.save({**torch.load(path), "step": 99}, path)
    else:
        os.truncate(path, int(kind.split()[1]) * (size - 1) // 4)


# test_checkpoint.py has flipped bits
DAMAGES = ["removed", "text", "code", "of another step", *(f"cut {i}" for i in range(5))]


def test_every_damaged_file_is_skipped_with_a_message_and_runs_no_code(
        uninterrupted, tmp_path, monkeypatch):
    """The previous checkpoint is loaded."""
    monkeypatch.chdir(tmp_path)
    older, newest = folder.saved_steps(uninterrupted)[-2:]
    for i in range(2):  # the model file, the state file
        for kind in DAMAGES:
            shutil.copytree(uninterrupted, "run")
            damaged = folder.paths("run", newest)[i]
            damage(damaged, kind)
            model, state, messages = checkpoint.load_latest("run")
            assert model["step"] == state["step"] == older, kind
            message, = messages
            assert f"skipping step {newest}: " in message and damaged in message
            assert "\n" not in message
            shutil.rmtree("run")
    assert not os.path.exists("evil")


def test_damaged_and_foreign_newer_checkpoints_are_skipped_and_renamed(
        uninterrupted, tmp_path, capsys):
    """They counted in --keep-last once the run was past them, and sample.py took the newest."""
    run_dir = tmp_path / "log" / "shakespeare"
    shutil.copytree(uninterrupted, run_dir)
    model, state = folder.paths(run_dir, STEPS)
    shutil.copy(model, run_dir / "model_99999.pt")  # without its state
    damaged_model, damaged_state = folder.paths(run_dir, STEPS - 1)
    os.rename(model, damaged_model)
    os.rename(state, damaged_state)
    os.truncate(damaged_model, 1000)
    assert run_here(tmp_path, *FLAGS) == 0
    printed = capsys.readouterr().out
    assert f"skipping step {STEPS - 1}: cannot load" in printed
    assert "skipping step 99999: " in printed
    assert f"from step {STEPS - 2}, with its settings" in printed
    assert folder.saved_steps(run_dir) == [STEPS - 2, STEPS]  # --keep-last 2
    assert weights.model_file(run_dir) == model
    assert {str(path) for path in run_dir.glob("*.pt.aside")} == {
        f"{damaged_model}.aside", f"{damaged_state}.aside", f"{run_dir}/model_99999.pt.aside"}
    assert_equals_uninterrupted(run_dir, uninterrupted)


@pytest.mark.slow
def test_other_data_is_an_error_unless_forced(uninterrupted, tmp_path):
    """A text with the same number of tokens, which the number of windows does not reveal."""
    run_dir = tmp_path / "log" / "shakespeare"
    shutil.copytree(uninterrupted, run_dir)
    path = checkpoint.load_latest(run_dir).state["train_config"]["data"]
    shards = tmp_path / "shards"
    os.mkdir(shards)
    train_paths, val_paths = prepare_data(path)
    stream = data.TokenStream(train_paths)
    tokens = stream.read(0, len(stream))
    data.write_shard(str(shards / "a_train_000001.npy"), tokens[::-1].copy())
    shutil.copy(val_paths[0], shards / "a_val_000000.npy")
    flags = [*FLAGS, "--data", "shards", "--max-steps", str(STEPS + 1)]
    process = train(tmp_path, *flags)
    assert process.returncode == 2 and "trained on other data" in process.stderr
    process = train(tmp_path, *flags, "--force")
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "overwritten"])
def test_shards_damaged_under_a_running_loader_stop_it_in_one_line(kind, tmp_path):
    os.makedirs(tmp_path / "shards")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        tokens = rng.integers(0, 50257, 20000).astype(np.uint16)
        data.write_shard(str(tmp_path / "shards" / f"a_{split}_000000.npy"), tokens)
    process = start(tmp_path, "--data", "shards", "--max-steps", "100000", "--save-every", "10",
                    "--val-every", "0")
    wait_for(process, "saved ")
    path = str(tmp_path / "shards" / "a_train_000000.npy")
    if kind == "cut":
        os.truncate(path, 1000)
    else:
        with open(path, "r+b") as f:
            f.seek(200)
            f.write(b"\xff" * 39000)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and re.search("^error: .*a_train_000000.npy", out, re.M), out
    assert checkpoint.load_latest(tmp_path / "log" / "shakespeare").messages == []
