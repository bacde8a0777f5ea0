"""
Runs that cannot be lost: real processes, real signals, real torchrun, damaged files, full disks.

    ./test.sh tests/test_faults.py            # the signals; no network, no GPU
    ./test.sh --all tests/test_faults.py -s   # all of it, with a table of what was survived at the end

Every process has a wall-clock limit. "As the unbroken run" is to the last bit: losses, norms, learning rates, weights.
"""
import glob
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

import checkpoint
import data
from test_train_gpt2 import TINY, command, log_of, start, text, train  # noqa: F401  text is a fixture

STEPS = 24
FLAGS = ["--max-steps", str(STEPS), "--val-every", "5", "--save-every", "2", "--total-batch-size", "512"]  # some 50 ms a step
SURVIVED = {}  # what: how many, printed when the module is done


def survived(what, count=1):
    SURVIVED[what] = SURVIVED.get(what, 0) + count


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints what was survived once all tests are done."""
    yield
    for what, count in SURVIVED.items():
        print(f"\n  {count:3d} x {what}", end="")


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):  # noqa: F811
    """Folder of a run of STEPS steps that nothing happened to."""
    cwd = tmp_path_factory.mktemp("unbroken")
    process = train(cwd, "--data", text, *FLAGS)
    assert process.returncode == 0, process.stderr
    return os.path.join(cwd, "log", "shakespeare")


def assert_as_unbroken(run_dir, unbroken, exact=True):  # noqa: F811
    """The run's log and last weights are those of the unbroken one: to the bit, or the losses to 1e-5."""
    streams = ("train", "val", "norm", "lr")
    ours, theirs = log_of(run_dir, *streams), log_of(unbroken, *streams)
    if exact:
        assert ours == theirs
        a, b = (torch.load(os.path.join(folder, f"model_{STEPS:05d}.pt"))["model"] for folder in (run_dir, unbroken))
        assert all(torch.equal(a[name], b[name]) for name in b)
        return
    assert [line.split()[:2] for line in ours] == [line.split()[:2] for line in theirs]
    for x, y in zip(ours, theirs):
        assert float(x.split()[2]) == pytest.approx(float(y.split()[2]), rel=1e-4, abs=1e-5)


def wait_for(process, pattern):
    """The output up to a line with pattern; fails when the process ends without."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"the process ended ({process.wait()}) without {pattern!r}: {''.join(lines)[-2000:]}")


# -----------------------------------------------------------------------------
# signals

def test_signals_finish_the_step_save_and_say_how_to_go_on(unbroken, text, tmp_path):  # noqa: F811
    """Three signals in three lives of one run, whose end is that of the unbroken one."""
    run_dir = tmp_path / "log" / "shakespeare"
    for number, status, step in ((signal.SIGTERM, 0, 3), (signal.SIGUSR1, 75, 9), (signal.SIGINT, 130, 15)):
        process = start(tmp_path, "--data", text, *FLAGS, "--save-every", "1000")
        wait_for(process, rf"step +{step}/")
        os.kill(process.pid, number)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == status, rest
        stopped = int(re.search(r"stopped at step (\d+) by " + number.name, rest)[1])
        assert checkpoint.saved_steps(run_dir)[-1] == stopped > step - 1
        survived(f"{number.name} while training")
    process = train(tmp_path, *FLAGS)
    assert process.returncode == 0, process.stderr
    assert_as_unbroken(run_dir, unbroken)


def test_a_second_run_in_a_live_folder_is_refused_and_a_dead_one_keeps_no_lock(text, tmp_path):  # noqa: F811
    process = start(tmp_path, "--data", text, "--max-steps", "100000")
    wait_for(process, r"step +2/")
    second = train(tmp_path, "--data", text)
    assert second.returncode == 2 and "is being trained by another process" in second.stderr, second.stderr
    assert second.stderr.count("\n") == 1
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    third = train(tmp_path, "--data", text)
    assert third.returncode == 0, third.stderr
    survived("second run refused in a live folder")


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(text, tmp_path):  # noqa: F811
    """Within a step of 65,536 micro-steps, which takes minutes."""
    process = start(tmp_path, "--data", text, "--max-steps", "100000", "--total-batch-size", str(16 * 2**17))
    wait_for(process, "step +0 | val")
    time.sleep(0.5)  # until it is in its first step
    os.kill(process.pid, signal.SIGINT)
    wait_for(process, "again to stop at once")
    time.sleep(0.7)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130 and not checkpoint.saved_steps(tmp_path / "log" / "shakespeare")
    survived("second Ctrl-C")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_at_any_moment_loses_nothing(number, unbroken, text, tmp_path):  # noqa: F811
    """Before the first step it ends the process with nothing to save; from there on it saves: in steps, evaluations, saves."""
    rng, lives = random.Random(int(number)), 0
    for _ in range(40):
        process = start(tmp_path, "--data", text, *FLAGS)
        time.sleep(rng.uniform(1.0, 8.0))
        if process.poll() is None:
            os.kill(process.pid, number)
            lives += 1
        out = process.communicate(timeout=60)[0]
        assert "Traceback" not in out or "KeyboardInterrupt" in out, out
        if checkpoint.saved_steps(tmp_path / "log" / "shakespeare")[-1:] == [STEPS]:
            break
    process = train(tmp_path, "--data", text, *FLAGS)
    assert process.returncode == 0, process.stderr
    assert_as_unbroken(tmp_path / "log" / "shakespeare", unbroken)
    survived(f"{number.name} at a random moment", lives)


# -----------------------------------------------------------------------------
# kills

@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_nothing(text, tmp_path):  # noqa: F811
    """SIGKILL anywhere: in set-up, steps, validation, and (with a save a step) in saving, pruning and writing the log."""
    steps = ["--max-steps", "150", "--val-every", "5", "--save-every", "1", "--n-embd", "64", "--sample-every", "0"]
    whole = tmp_path / "whole"
    os.mkdir(whole)
    assert train(whole, "--data", text, *steps, timeout=300).returncode == 0
    rng, kills, inside = random.Random(0), 0, 0
    run_dir = tmp_path / "log" / "shakespeare"
    while kills < 34:
        process = start(tmp_path, "--data", text, *steps)
        try:
            wait_for(process, r"step +\d+/")
            time.sleep(rng.uniform(0, 0.3))
            os.killpg(process.pid, signal.SIGKILL)
        except AssertionError:
            break
        process.communicate(timeout=30)
        kills += 1
        inside += bool(glob.glob(str(run_dir / "*.tmp")))
    assert kills >= 30
    process = train(tmp_path, *steps, timeout=300)
    assert process.returncode == 0, process.stderr
    for stream in ("train", "val", "norm", "lr"):
        assert log_of(run_dir, stream) == log_of(whole / "log" / "shakespeare", stream)
    assert not glob.glob(str(run_dir / "*.tmp")) and not glob.glob(str(run_dir / "*.aside"))
    survived("SIGKILL at a random moment", kills)
    survived("of these in the middle of writing a checkpoint", inside)


def ranks_of(process):
    """The training processes under a torchrun, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(part.endswith("train_gpt2.py") for part in child.cmdline()) and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def torchrun(cwd, *flags, nproc=2, launcher=("--standalone",)):
    """A torchrun that restarts its ranks up to 9 times, as a process with its output."""
    train_py = command()[1]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *launcher, f"--nproc_per_node={nproc}",
                             "--max-restarts=9", train_py, *TINY, *flags], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def unbroken_pair(text, tmp_path_factory):  # noqa: F811
    """Folder of an unbroken run on two ranks."""
    cwd = tmp_path_factory.mktemp("pair")
    process = torchrun(cwd, "--data", text, *FLAGS)
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 0, out
    return os.path.join(cwd, "log", "shakespeare")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step +7/", "step +9/", "saved .*model_00012"])
def test_torchrun_restarts_after_a_rank_is_killed(moment, unbroken_pair, text, tmp_path):  # noqa: F811
    """In a step, in the evaluation that comes at step 10, at a save; the group starts again by itself and ends as if
    unbroken. (torchrun's store outlives the ranks that died: runtime.store_of_this_start.)"""
    process = torchrun(tmp_path, "--data", text, *FLAGS)
    wait_for(process, moment)
    ranks_of(process)[1].kill()
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 0, out
    assert "going on with" in out
    assert_as_unbroken(tmp_path / "log" / "shakespeare", unbroken_pair)
    survived("rank of two killed, restarted by torchrun")


@pytest.mark.slow
def test_two_nodes_survive_the_loss_of_a_rank(unbroken_pair, text, tmp_path):  # noqa: F811
    """Two torchrun agents that meet at a c10d rendezvous on 127.0.0.1, as two machines would."""
    port = random.Random(os.getpid()).randrange(20000, 40000)
    agents = [torchrun(tmp_path, "--data", text, *FLAGS, nproc=1, launcher=(
        "--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=faults",
        "--local_addr=127.0.0.1")) for _ in range(2)]
    first = [agent for agent in agents]
    time.sleep(1)
    deadline = time.monotonic() + 90
    while not {rank for agent in first for rank in ranks_of(agent)} == {0, 1}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while not checkpoint.saved_steps(tmp_path / "log" / "shakespeare"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim = next(child for agent in agents for rank, child in ranks_of(agent).items() if rank == 1)
    victim.kill()
    outputs = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert_as_unbroken(tmp_path / "log" / "shakespeare", unbroken_pair)
    survived("rank killed on one of two nodes")


@pytest.mark.slow
def test_train_sbatch_saves_at_its_signal_and_is_requeued(unbroken_pair, text, tmp_path):  # noqa: F811
    """The batch script of Slurm with stand-ins for srun, scontrol and scancel: one node, two ranks."""
    stand_ins = {"srun": f'echo $$ > {tmp_path}/srun.pid; exec "$@"',
                 "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 && exit; kill -0 "$(cat {tmp_path}/srun.pid)" && set early;'
                             f'echo "$@" >> {tmp_path}/requeued',
                 "scancel": f'[ "$*" = "--signal=TERM 7.0" ] && kill -TERM "$(cat {tmp_path}/srun.pid)"'}
    os.makedirs(tmp_path / ".venv" / "bin")
    for name, line in {**stand_ins, ".venv/bin/python": f'exec {sys.executable} "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        os.chmod(tmp_path / name, 0o755)
    root = os.path.dirname(command()[1])
    os.symlink(os.path.join(root, "train_gpt2.py"), tmp_path / "train_gpt2.py")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SLURM_SUBMIT_DIR": str(tmp_path),
           "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
           "MASTER_PORT": str(port)}

    def submit():
        return subprocess.Popen(["bash", os.path.join(root, "train.sbatch"), *TINY, "--data", text, *FLAGS], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    job = submit()
    wait_for(job, r"step +7/")
    os.kill(job.pid, signal.SIGUSR1)  # to the script alone, as --signal=B: has it
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and "stopped at step" in out, out
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    job = submit()
    out = job.communicate(timeout=180)[0]
    assert job.returncode == 0 and "going on with" in out, out
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # done: not once more
    assert_as_unbroken(tmp_path / "log" / "shakespeare", unbroken_pair)
    survived("Slurm's signal, saved and requeued")


@pytest.mark.slow
def test_the_number_of_ranks_may_change_between_lives(text, tmp_path):  # noqa: F811
    """1 -> 2 -> 1 ranks: the same windows in the same order, and losses as on one rank all along."""
    flags = ["--data", text, *FLAGS, "--dropout", "0"]
    whole = tmp_path / "whole"
    os.mkdir(whole)
    assert train(whole, *flags).returncode == 0
    for ranks, step in ((1, 6), (2, 14)):
        process = start(tmp_path, *flags, ranks=ranks)
        wait_for(process, rf"step +{step}/")
        os.killpg(process.pid, signal.SIGKILL)
        for child in ranks_of(process).values() if ranks > 1 and psutil.pid_exists(process.pid) else ():
            child.kill()
        process.wait(timeout=30)
        time.sleep(3)  # torchrun's ranks are in sessions of their own: they notice that it is gone
        subprocess.run(["pkill", "-9", "-f", f"--data {text} "], check=False)
    process = train(tmp_path, *flags)
    assert process.returncode == 0 and "1 processes, were 2" in process.stdout, process.stderr + process.stdout
    assert_as_unbroken(tmp_path / "log" / "shakespeare", whole / "log" / "shakespeare", exact=False)
    survived("change of the number of ranks", 2)


# -----------------------------------------------------------------------------
# damage

class Evil:
    """Unpickled as code would be: makes a file."""

    def __reduce__(self):
        return (os.mkdir, ("evil",))


def damages(path):
    """{name: function that damages the file at path}."""
    size = os.path.getsize(path)

    def cut(n):
        os.truncate(path, n)

    def flip(at):
        with open(path, "r+b") as f:
            f.seek(at)
            byte = f.read(1)
            f.seek(at)
            f.write(bytes([byte[0] ^ 64]))

    def write(contents):
        torch.save(contents, path)

    def evil():
        with open(path, "wb") as f:
            pickle.dump({"model": Evil(), "config": {}, "step": 4}, f)

    def wrong_shapes():
        contents = torch.load(path)
        if "model" in contents:
            contents["model"]["transformer.wpe.weight"] = torch.zeros(3, 3)
        else:
            contents["optimizers"] = "none"
            del contents["loader"]
        write(contents)
    rng = random.Random(size)
    return {"zero length": lambda: cut(0), **{f"cut {i}": lambda: cut(rng.randrange(1, size)) for i in range(3)},
            "last byte gone": lambda: cut(size - 1), **{f"flipped {i}": lambda: flip(rng.randrange(size)) for i in range(6)},
            "code in it": evil, "not there": lambda: os.remove(path), "another dict": lambda: write({"a": 1}),
            "a tensor": lambda: write(torch.zeros(3)), "wrong shapes": wrong_shapes,
            "another step's": lambda: write({**torch.load(path), "step": 99}), "noise": lambda: write(b"noise")}


def test_every_damage_is_passed_over_by_name_and_none_runs_code(unbroken, tmp_path, monkeypatch):
    """Each file of the newest pair, each kind of damage: the pair before it is taken, or the same contents where a flipped
    bit lies between what the file holds."""
    monkeypatch.chdir(tmp_path)
    steps = checkpoint.saved_steps(unbroken)[-2:]
    run_dir = str(tmp_path / "run")
    original = {path: checkpoint.load_file(path) for step in steps for path in checkpoint.paths(unbroken, step)}
    newest = checkpoint.paths(unbroken, steps[1])
    for k, source in enumerate(newest):
        for name in damages(source):
            os.makedirs(run_dir)
            for path in original:
                shutil.copy(path, run_dir)
            damaged = os.path.join(run_dir, os.path.basename(source))
            damages(damaged)[name]()
            model, state, messages = checkpoint.load_latest(run_dir)
            if model["step"] == steps[1]:  # nothing of what counts was touched
                assert name.startswith("flipped") and not messages, name
                assert all(torch.equal(v, original[newest[0]]["model"][n]) for n, v in model["model"].items())
                assert str(state) == str(original[newest[1]])
            else:
                assert model["step"] == state["step"] == steps[0] and len(messages) == 1, name
                assert f"passing over step {steps[1]}: " in messages[0] and damaged in messages[0], (name, messages)
                assert "\n" not in messages[0]
            survived(f"damaged {('model', 'state')[k]} file")
            shutil.rmtree(run_dir)
    assert not os.path.exists("evil")


def test_a_run_goes_on_past_a_damaged_checkpoint_and_keeps_it_aside(unbroken, text, tmp_path):  # noqa: F811
    run_dir = tmp_path / "log" / "shakespeare"
    shutil.copytree(unbroken, run_dir)
    newest = checkpoint.saved_steps(run_dir)[-1]
    os.truncate(checkpoint.paths(run_dir, newest)[0], 1000)
    process = train(tmp_path, "--data", text, *FLAGS)
    assert process.returncode == 0 and f"passing over step {newest}" in process.stdout, process.stderr
    assert (run_dir / f"model_{newest:05d}.pt.aside").exists()
    assert_as_unbroken(run_dir, unbroken)


@pytest.mark.slow
def test_resume_from_an_older_checkpoint_sets_the_newer_aside(unbroken, text, tmp_path):  # noqa: F811
    run_dir = tmp_path / "moved" / "elsewhere"
    shutil.copytree(unbroken, run_dir)
    older, newest = checkpoint.saved_steps(run_dir)[-2:]
    process = train(tmp_path, "--resume", f"moved/elsewhere/model_{older:05d}.pt", *FLAGS)
    assert process.returncode == 0 and f"from step {older}" in process.stdout, process.stderr
    assert (run_dir / f"model_{newest:05d}.pt.aside").exists()
    assert_as_unbroken(run_dir, unbroken)
    survived("older checkpoint gone on from")


@pytest.mark.parametrize("flags, message", [
    (["--n-embd", "32"], "n_embd cannot change"),
    (["--optimizer", "adamw"], "optimizer cannot change"),
    (["--seed", "5"], "with another seed this would not be the same run; --force goes on"),
    (["--total-batch-size", "256"], "with another total_batch_size"),
    (["--resume", "never"], "already holds a run"),
    (["--resume", "nowhere"], "--resume nowhere: not there"),
    (["--resume", "log/shakespeare", "--exp-name", "x"], "leave --exp-name and --log-dir out"),
    (["--resume", "log/shakespeare/log.txt"], "is not named as a run's checkpoint"),
    (["--batch-size", "3"], "--batch-size that would fit: [1, 2, 4, 8, 16, 32]"),
])
def test_wrong_flags_on_resume_are_one_line_and_change_nothing(flags, message, unbroken, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    import runtime
    import train_gpt2
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken, "log/shakespeare")
    before = {name: os.stat(f"log/shakespeare/{name}").st_mtime_ns for name in os.listdir("log/shakespeare")}
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--preset", "shakespeare", "--max-steps", "30", *flags])
    with pytest.raises(SystemExit) as e:
        runtime.run_main(train_gpt2.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and message in err
    assert before == {name: os.stat(f"log/shakespeare/{name}").st_mtime_ns for name in os.listdir("log/shakespeare")}


@pytest.mark.slow
def test_other_data_is_refused_and_forced(unbroken, tmp_path):
    """A text of the same length in tokens, so that the count of windows does not tell it."""
    run_dir = tmp_path / "log" / "shakespeare"
    shutil.copytree(unbroken, run_dir)
    state_config = checkpoint.load_latest(run_dir)[1]["train_config"]
    shards = tmp_path / "shards"
    os.mkdir(shards)
    train_paths, val_paths = data.prepare_data(state_config["data"])
    tokens = data.TokenStream(train_paths).read(0, len(data.TokenStream(train_paths)))
    data.write_shard(str(shards / "a_train_000001.npy"), tokens[::-1].copy())
    shutil.copy(val_paths[0], shards / "a_val_000000.npy")
    process = train(tmp_path, *FLAGS, "--data", "shards", "--max-steps", str(STEPS + 1))
    assert process.returncode == 2 and "trained on other data" in process.stderr and "--force" in process.stderr
    process = train(tmp_path, *FLAGS, "--data", "shards", "--max-steps", str(STEPS + 1), "--force")
    assert process.returncode == 0, process.stderr
    survived("other data refused on resume")


@pytest.mark.slow
def test_shards_damaged_under_a_running_loader_stop_it_in_one_line(tmp_path):
    for damage in ("cut", "removed", "overwritten"):
        cwd = tmp_path / damage
        os.makedirs(cwd / "shards")
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            data.write_shard(str(cwd / "shards" / f"a_{split}_000000.npy"), rng.integers(0, 50257, 20000).astype(np.uint16))
        process = start(cwd, "--data", "shards", "--max-steps", "100000", "--save-every", "10", "--val-every", "0")
        wait_for(process, "saved ")
        path = str(cwd / "shards" / "a_train_000000.npy")
        if damage == "cut":
            os.truncate(path, 1000)
        elif damage == "removed":
            os.remove(path)
        else:
            with open(path, "r+b") as f:
                f.seek(200)
                f.write(b"\xff" * 39000)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and re.search(r"^error: .*a_train_000000.npy", out, re.M), out
        assert checkpoint.load_latest(cwd / "log" / "shakespeare")[2] == []
        survived("shard damaged under the loader")


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(unbroken, text, tmp_path):  # noqa: F811
    """A tmpfs with room for one checkpoint and a bit; with more room the run goes on as if nothing had happened."""
    disk = tmp_path / "disk"
    os.mkdir(disk)
    size = sum(os.path.getsize(path) for path in checkpoint.paths(unbroken, STEPS))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        process = train(disk, "--data", text, *FLAGS)
        assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
        assert "takes" in process.stderr and "are free" in process.stderr
        saved = checkpoint.load_latest(disk / "log" / "shakespeare")
        assert saved[1]["step"] == 2 and not glob.glob(str(disk / "log" / "shakespeare" / "*.tmp"))
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
        process = train(disk, "--data", text, *FLAGS)
        assert process.returncode == 0, process.stderr
        assert_as_unbroken(disk / "log" / "shakespeare", unbroken)
        survived("disk full")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
