"""
Checkpoints on a full disk, after kills at every point of a save, and damaged; a run folder's lock
and log, and the trackers that receive the log's values.

    .venv/bin/python -m pytest tests/test_checkpoint.py

Needs no network: W&B and TensorBoard are replaced by fakes that record their calls.
"""
import atexit
import concurrent.futures
import errno
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from common import ONE, TINY, python, text_of_words, tiny_model
from run import checkpoint, folder, weights
from run.folder import Log, check_tracker, read_log
from run.parallel import Ranks
from test_train_gpt2 import limited_file_size, run_here

STATE = {"optimizers": [], "scaler": {}, "loader": {}, "rng": [], "train_config": {}}


def save_step(run_dir, step):
    """Saves a checkpoint of step; returns its model."""
    model = tiny_model(seed=step)
    state = {**STATE, "loader": {"position": 8 * step}}
    checkpoint.save(str(run_dir), step, checkpoint.model_contents(model, 3.5), state)
    return model


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


# -----------------------------------------------------------------------------
# checkpoints: pairs of files

def test_load_latest_returns_what_was_saved(tmp_path):
    save_step(tmp_path, 10)
    model = save_step(tmp_path, 20)
    loaded = checkpoint.load_latest(str(tmp_path))
    assert same_weights(loaded.model["model"], model.state_dict())
    assert loaded.model["config"] == vars(model.config)
    assert (loaded.step, loaded.model["val_loss"], loaded.messages) == (20, 3.5, [])
    assert loaded.state == {**STATE, "loader": {"position": 160}, "step": 20}
    assert sorted(os.listdir(tmp_path)) == [
        "model_00010.pt", "model_00020.pt", "state_00010.pt", "state_00020.pt"]


def test_tied_weights_are_stored_once(tmp_path):
    model = tiny_model(vocab_size=1000, n_embd=32)
    checkpoint.save(str(tmp_path), 1, checkpoint.model_contents(model, None), {})
    wte_bytes = 4 * 1000 * 32
    size = os.path.getsize(tmp_path / "model_00001.pt")
    assert size < 4 * model.num_params() + wte_bytes / 2


def test_a_step_without_both_files_is_skipped(tmp_path):
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    os.remove(tmp_path / "model_00030.pt")
    os.remove(tmp_path / "state_00020.pt")
    (tmp_path / "model_00040.pt.tmp").write_bytes(b"half")
    assert folder.saved_steps(str(tmp_path)) == [10]
    loaded = checkpoint.load_latest(str(tmp_path))
    assert loaded.step == 10
    assert "step 30" in loaded.messages[0] and "model_00030.pt" in loaded.messages[0]
    assert "step 20" in loaded.messages[1] and "state_00020.pt" in loaded.messages[1]


def test_a_run_without_a_model_file_starts_over(tmp_path):
    assert checkpoint.load_latest(str(tmp_path / "nowhere")) is None
    assert checkpoint.load_latest(str(tmp_path)) is None
    save_step(tmp_path, 10)
    os.remove(tmp_path / "model_00010.pt")  # a kill during the first save leaves only the state
    assert checkpoint.load_latest(str(tmp_path)) is None


def test_a_model_without_its_state_is_an_error_and_does_not_start_over_silently(tmp_path):
    save_step(tmp_path, 10)
    os.remove(tmp_path / "state_00010.pt")
    with pytest.raises(ValueError, match="state_00010.pt.*move the folder away to start over"):
        checkpoint.load_latest(str(tmp_path))


def test_files_of_another_step_or_kind_are_an_error(tmp_path):
    for step in (10, 20):
        save_step(tmp_path, step)
    state = (tmp_path / "state_00020.pt").read_bytes()
    (tmp_path / "state_00010.pt").write_bytes(state)
    with pytest.raises(ValueError, match="state_00010.pt is not the state file of step 10"):
        checkpoint.load_pair(str(tmp_path), 10)
    (tmp_path / "model_00020.pt").write_bytes(state)
    with pytest.raises(ValueError, match="model_00020.pt is not the model file of step 20"):
        checkpoint.load_pair(str(tmp_path), 20)


def test_prune_keeps_the_newest_and_the_best_checkpoints_and_other_files(tmp_path):
    for step in (5, 10, 99999, 100000):
        save_step(tmp_path, step)
    (tmp_path / "log.txt").touch()
    checkpoint.prune(str(tmp_path), 100000, 2, best=5)
    assert folder.saved_steps(tmp_path) == [5, 99999, 100000]
    checkpoint.prune(str(tmp_path), 100000, 3)
    assert folder.saved_steps(tmp_path) == [5, 99999, 100000]
    checkpoint.prune(str(tmp_path), 100000, 1)
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "model_100000.pt", "state_100000.pt"]


def test_prune_removes_an_older_single_file_and_neither_counts_nor_removes_newer_files(tmp_path):
    """A run that resumed before a damaged checkpoint must not keep it in place of its own."""
    for step in (1, 2, 3, 4, 5):
        save_step(tmp_path, step)
    os.remove(tmp_path / "model_00002.pt")
    os.remove(tmp_path / "state_00005.pt")
    checkpoint.prune(str(tmp_path), 3, 2)
    assert folder.steps_of(tmp_path, "model") == {1, 3, 4, 5}
    assert folder.steps_of(tmp_path, "state") == {1, 3, 4}


@pytest.mark.parametrize("keep_best, first, kept", [
    (False, 3.0, [4]),
    (True, 3.0, [2, 4]),
    (True, math.nan, [2, 4]),  # a loss of NaN at the first of them was taken for the lowest
])
def test_keep_best_keeps_the_checkpoint_of_the_lowest_validation_loss(
        tmp_path, capsys, keep_best, first, kept):
    log = f"1 val {first}\n2 val 2.0\n3 val 2.5\n4 val 4.0\n5 val 1.0\n"  # 5 has no checkpoint
    (tmp_path / "log.txt").write_text(log)
    state = {**STATE, "train_config": {"keep_best": keep_best, "keep_last": 1}}
    model = checkpoint.model_contents(tiny_model(), None)
    for step in (1, 2, 3, 4):
        checkpoint.save_and_prune(str(tmp_path), step, model, state)
    assert folder.saved_steps(tmp_path) == kept
    assert capsys.readouterr().out.endswith(f"saved {tmp_path / 'model_00004.pt'}\n")


def test_without_its_log_a_run_that_keeps_the_best_checkpoint_removes_none(tmp_path, capsys):
    state = {**STATE, "train_config": {"keep_best": True, "keep_last": 1}}
    model = checkpoint.model_contents(tiny_model(), None)
    for step in (1, 2):
        checkpoint.save_and_prune(str(tmp_path), step, model, state)
    assert folder.saved_steps(tmp_path) == [1, 2]
    assert "no older checkpoint is removed: [Errno 2] No such file" in capsys.readouterr().out


def test_an_older_checkpoint_that_cannot_be_removed_is_a_line_and_the_others_are(
        tmp_path, monkeypatch, capsys):
    """It ended the run although the new checkpoint was complete, and so did each restart."""
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    remove = os.remove

    def busy(path):
        if path.endswith("model_00001.pt"):
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        remove(path)
        if path.endswith("00002.pt"):  # and another process has removed it, too
            remove(path)
    monkeypatch.setattr(os, "remove", busy)
    state = {**STATE, "train_config": {"keep_best": False, "keep_last": 1}}
    model = checkpoint.model_contents(tiny_model(), None)
    checkpoint.save_and_prune(str(tmp_path), 5, model, state)
    # not the state alone: the model would look damaged
    assert folder.saved_steps(tmp_path) == [1, 5]
    path = tmp_path / "model_00001.pt"
    line = f"cannot remove an older checkpoint, {path}: Device or resource busy"
    assert capsys.readouterr().out == f"{line}\nsaved {tmp_path / 'model_00005.pt'}\n"


# -----------------------------------------------------------------------------
# saving while training continues

def fail(*_):
    raise OSError("no room")


@pytest.mark.parametrize("call", ["check", "wait", "start"])
def test_the_writers_error_is_raised_once_at_the_next_call(call):
    writer = checkpoint.Writer()
    writer.start(fail)
    concurrent.futures.wait([writer.pending])
    with pytest.raises(OSError, match="no room"):
        if call == "start":
            writer.start(print)
        else:
            getattr(writer, call)()
    writer.check()
    writer.wait()


def test_the_state_is_written_before_the_model(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(checkpoint, "save_file",
                        lambda contents, path: names.append(os.path.basename(path)))
    save_step(tmp_path, 1)
    assert names == ["state_00001.pt", "model_00001.pt"]


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    older = save_step(tmp_path, 10)  # its model file is the one that cannot be replaced
    contents = checkpoint.model_contents(tiny_model(n_embd=64, vocab_size=1000), None)
    with limited_file_size(100_000):
        with pytest.raises(OSError, match="cannot write .*model_00010.pt.* checkpoints are intact"):
            checkpoint.save(str(tmp_path), 10, contents, STATE)
    assert sorted(os.listdir(tmp_path)) == ["model_00010.pt", "state_00010.pt"]
    loaded = checkpoint.load_latest(str(tmp_path))
    assert same_weights(loaded.model["model"], older.state_dict())


KILL_EVERYWHERE = """
import os, signal, sys, torch
from run import checkpoint
from model import GPT, GPTConfig
STATE = {STATE}
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=31))
contents = checkpoint.model_contents(model, None)
for point in range(9):  # before and after each fsync and each replace of a save, and not at all
    run_dir = os.path.join(sys.argv[1], str(point))
    os.makedirs(run_dir)
    checkpoint.save(run_dir, 1, contents, STATE)
    pid = os.fork()
    if pid == 0:
        points = 0
        def die_here():
            global points
            if points == point:
                os.kill(os.getpid(), signal.SIGKILL)
            points += 1
        def dying(function):
            def call(*args):
                die_here()
                function(*args)
                die_here()
            return call
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        checkpoint.save(run_dir, 2, contents, STATE)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    loaded = checkpoint.load_latest(run_dir)
    assert loaded.model["step"] == loaded.state["step"]
    print(os.WIFSIGNALED(status), loaded.step, end="; ")
""".replace("{STATE}", repr(STATE))


def test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint(tmp_path):
    done = python("-c", KILL_EVERYWHERE, tmp_path)
    assert done.returncode == 0, done.stderr
    # fsync, replace of the state; fsync, replace of the model: step 2 exists only after the last
    assert done.stdout == "True 1; " * 7 + "True 2; " + "False 2; "


# -----------------------------------------------------------------------------
# damaged files; test_faults.py has more

def test_a_flipped_bit_in_any_byte_is_detected_or_harmless(tmp_path):
    """torch.load does not verify checksums: a flipped bit once loaded as another weight."""
    contents = {"model": {"a": torch.arange(16.0)}, "step": 3}
    path = tmp_path / "a.pt"
    checkpoint.save_file(contents, str(path))
    intact = path.read_bytes()
    detected = 0
    for i in range(len(intact)):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 0x10]) + intact[i + 1:])
        try:
            loaded = weights.load_file(str(path))
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            detected += 1
        else:
            assert loaded["step"] == 3 and torch.equal(loaded["model"]["a"], torch.arange(16.0)), i
    assert detected > 500  # the others are padding and fields that torch.load does not read


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_loading_a_checkpoint_maps_its_files_instead_of_copying_them(tmp_path):
    """Each of 8 ranks read 18.7 GB of 1558M's checkpoint into memory of its own."""
    def anonymous():
        with open("/proc/self/status") as f:
            kilobytes = next(line.split()[1] for line in f if line.startswith("RssAnon"))
        return 1024 * int(kilobytes)

    model = tiny_model(n_embd=128, vocab_size=50304)
    moments = {i: {"exp_avg": torch.ones(50304, 128)} for i in range(4)}
    state = {**STATE, "optimizers": [{"state": moments, "param_groups": []}]}
    checkpoint.save(str(tmp_path), 1, checkpoint.model_contents(model, None), state)
    before = anonymous()
    saved = checkpoint.load_latest(str(tmp_path))
    assert anonymous() - before < 0.2 * os.path.getsize(tmp_path / "state_00001.pt")
    exp_avg = saved.state["optimizers"][0]["state"][3]["exp_avg"]
    assert exp_avg.sum() == 50304 * 128


# -----------------------------------------------------------------------------
# the run folder: its lock and its config.json

@pytest.fixture
def lock(monkeypatch):
    """A function that locks a run folder; without one it calls what was registered for the exit."""
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)

    def call(run_dir=None):
        if run_dir is not None:
            folder.lock_run(str(run_dir))
        else:
            while registered:
                registered.pop()()

    yield call
    call()


def names_in(folder):
    """Paths of everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_locking_a_run_folder_removes_what_a_killed_process_was_writing(tmp_path, lock):
    """Their names hold the id of that process, so no later save would overwrite them."""
    temporary = ["state_00008.pt.12.tmp", "model_00008.pt.node7.12.tmp", "config.json.7.tmp",
                 "log.txt.node7.12.tmp"]
    other = ["model_00004.pt", "notes.tmp", "loss.png.12.tmp"]
    for name in temporary + other:
        (tmp_path / name).write_text("x")
    lock(tmp_path)
    lock()
    assert names_in(tmp_path) == sorted(other)


def test_a_run_stays_locked_while_its_log_is_edited_and_later_lines_are_in_the_new_file(
        tmp_path, lock):
    """sed -i replaces the file, which was the lock, too: a second training was let in."""
    lock(tmp_path)
    log = open_log(tmp_path)
    log(0, quiet=True, train=3.5)
    subprocess.run(["sed", "-i", "s/3.5/3.25/", tmp_path / "log.txt"], check=True)
    with pytest.raises(ValueError, match="is in use by another training process"):
        folder.lock_run(str(tmp_path))
    log(1, quiet=True, train=3.0)
    log.flush()
    assert (tmp_path / "log.txt").read_text() == "0 train 3.25\n1 train 3.0\n"
    os.remove(tmp_path / "log.txt")
    log.flush()
    log(2, quiet=True, train=2.5)
    assert (tmp_path / "log.txt").read_text() == "2 train 2.5\n"
    lock()
    assert os.listdir(tmp_path) == ["log.txt"]  # without a lock file


def test_a_run_folder_that_cannot_be_locked_keeps_its_temporary_files(
        tmp_path, lock, monkeypatch, capsys):
    """Another process may be writing them."""
    (tmp_path / "state_00008.pt.12.tmp").write_text("x")
    monkeypatch.setattr("fcntl.flock", fail)
    lock(tmp_path)
    assert "cannot be locked on this file system" in capsys.readouterr().out
    lock()
    assert names_in(tmp_path) == ["state_00008.pt.12.tmp"]


def test_a_run_that_wrote_nothing_removes_only_the_empty_folders_that_it_created(tmp_path, lock):
    """It once removed a log folder with all that later runs had saved in it."""
    os.makedirs(tmp_path / "four" / "existing")
    for run_dir in ("one/empty", "two/empty", "three/used", "four/existing", "five/new/deep"):
        lock(tmp_path / run_dir)
    os.makedirs(tmp_path / "two" / "other")
    (tmp_path / "two" / "other" / "model_00001.pt").write_text("x")
    (tmp_path / "three" / "used" / "log.txt").write_text("0 val 3.0\n")
    lock()
    assert names_in(tmp_path) == [
        "four", "four/existing", "three", "three/used", "three/used/log.txt", "two", "two/other",
        "two/other/model_00001.pt"]


def test_config_json_has_the_settings_the_command_the_versions_and_the_hardware(tmp_path):
    assert folder.read_config(str(tmp_path)) == {}
    folder.write_config(str(tmp_path), {"lr": 0.1}, Ranks(0, 0, 2, "cpu", True))
    assert folder.read_config(str(tmp_path)) == {"lr": 0.1}
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["command"] == sys.argv and description["device"]
    assert (description["world_size"], description["config"]) == (2, {"lr": 0.1})
    assert description["torch"] == torch.__version__
    assert os.listdir(tmp_path) == ["config.json"]


# -----------------------------------------------------------------------------
# log.txt

@pytest.mark.parametrize("torn", ["", "1", "12 ", "1 train ", "1 train 2.5"])
def test_a_log_is_read_into_its_streams_without_a_truncated_last_line(tmp_path, torn):
    lines = "0 val 10.95\n0 train 10.9\n0 lr 8.39e-07\n1 train 10.5\n"
    (tmp_path / "log.txt").write_text(lines + torn)
    assert read_log(str(tmp_path / "log.txt")) == {
        "val": [(0, 10.95)], "train": [(0, 10.9), (1, 10.5)], "lr": [(0, 8.39e-07)]}


def test_unknown_lines_of_a_log_are_skipped_with_one_message(tmp_path, capsys):
    """A blank line or a comment stopped the curves."""
    contents = "0 train 3.0\n1 train\n# lower lr\n\n2 train high\n\udcff\n2 train 1.0\n"
    path = tmp_path / "log.txt"
    path.write_bytes(contents.encode(errors="surrogateescape"))
    for _ in range(2):  # as with --keep-best, at each save
        assert read_log(str(path)) == {"train": [(0, 3.0), (2, 1.0)]}
    assert capsys.readouterr().out == (f"{path}: skipped 5 lines that are not `step stream value`,"
                                       " the first is line 2\n")


def open_log(run_dir, tracker="none", first_step=0, ranks=ONE):
    settings = {"tracker": tracker, "exp_name": "a", "n_embd": 8}
    return Log(str(run_dir), settings, first_step, ranks)


# a run of 3 steps that evaluates at every second: step 2 has evaluations before its checkpoint and
# training values after it
BEFORE_2 = "0 val 3.5\n0 train 3.5\n0 lr 0.1\n1 train 3.0\n1 lr 0.1\n1 epoch 1\n"
EVALUATIONS_OF_2 = "2 val 2.5\n2 hella 0.25\n"
AFTER_2 = "2 train 2.5\n2 lr 0.1\n3 train 2.0\n4 val 1.5\n"
NOTE = "a note of mine\n\n\udcff\n"


@pytest.mark.parametrize("contents, kept, cut", [
    (BEFORE_2 + EVALUATIONS_OF_2 + AFTER_2, BEFORE_2 + EVALUATIONS_OF_2, AFTER_2),
    (BEFORE_2 + EVALUATIONS_OF_2, BEFORE_2 + EVALUATIONS_OF_2, ""),
    (BEFORE_2 + AFTER_2, BEFORE_2, AFTER_2),  # a stop interrupted the evaluations
    # "9999 train 1.0" dropped all that follows
    ("9999 train 1.0\n" + BEFORE_2 + "2 val 2.5\n", BEFORE_2 + "2 val 2.5\n", "9999 train 1.0\n"),
    (NOTE + BEFORE_2 + NOTE + "3 val 2.5\n" + NOTE, NOTE + BEFORE_2 + NOTE + NOTE, "3 val 2.5\n"),
    # a truncated last line counted as logged: it was dropped, and not repeated
    *((BEFORE_2 + torn, BEFORE_2, torn + "\n") for torn in ("2 hella 0.2", "2 train 2.5", "2")),
])
def test_a_resumed_run_keeps_earlier_steps_notes_and_the_evaluations_of_its_step(
        tmp_path, capsys, contents, kept, cut):
    path, aside = tmp_path / "log.txt", tmp_path / "log.txt.aside"
    path.write_bytes(contents.encode(errors="surrogateescape"))
    evaluations = folder.logged_evaluations(str(tmp_path), 2)
    capsys.readouterr()
    log = open_log(tmp_path, first_step=2)
    assert path.read_bytes() == kept.encode(errors="surrogateescape")
    assert {f"2 {stream}" for stream in evaluations} == set(re.findall("2 (?:val|hella)", kept))
    printed = capsys.readouterr().out
    if cut:  # nothing is lost
        assert aside.read_text() == cut
        assert printed.startswith(f"moved {len(cut.splitlines())} lines from {path} to {aside}")
    else:
        assert not aside.exists() and printed == ""
    log(2, quiet=True, train=2.25)
    assert path.read_bytes() == (kept + "2 train 2.25\n").encode(errors="surrogateescape")


def test_a_new_run_moves_the_log_of_an_earlier_one_without_checkpoints_aside(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.write_text("my notes")
    for stream in ("first", "second"):
        open_log(tmp_path)(0, quiet=True, **{stream: 1.0})
    assert (tmp_path / "log.txt.aside").read_text() == "my notes\n0 first 1.0\n"
    assert path.read_text() == "0 second 1.0\n"
    assert capsys.readouterr().out.count(f"moved 1 lines from {path} to {path}.aside") == 2


def test_log_appends_each_value_at_once_and_prints_evaluations(tmp_path, capsys):
    calls = []
    log = open_log(tmp_path)
    log.tracker = lambda *call: calls.append(call)
    log(0, val=3.25)
    # before it is closed: a kill loses nothing
    assert (tmp_path / "log.txt").read_text() == "0 val 3.25\n"
    log(0, quiet=True, train=3.5, lr=6e-4)
    log(250, hella=0.25, hella_lm_eval=0.295)
    log(250, val=None)  # an evaluation that was interrupted
    log.flush()
    assert (tmp_path / "log.txt").read_text() == (
        "0 val 3.25\n0 train 3.5\n0 lr 0.0006\n250 hella 0.25\n250 hella_lm_eval 0.295\n")
    assert capsys.readouterr().out == (
        "step     0 | val 3.2500\nstep   250 | hella 0.2500 | hella_lm_eval 0.2950\n")
    assert calls == [(0, {"val": 3.25}), (0, {"train": 3.5, "lr": 6e-4}),
                     (250, {"hella": 0.25, "hella_lm_eval": 0.295})]


def test_log_of_other_ranks_writes_and_prints_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = open_log(tmp_path, tracker="wandb", ranks=Ranks(1, 1, 2, "cpu", True))
    log(0, val=3.25)
    log.flush()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


# -----------------------------------------------------------------------------
# trackers

@pytest.fixture
def wandb_calls(monkeypatch):
    """The calls of a fake package wandb, as tuples."""
    calls = []
    run = types.SimpleNamespace(
        id="abc123",
        log=lambda values: calls.append(("log", values)),
        define_metric=lambda name, step_metric: calls.append(("metric", name, step_metric)))

    def init(**kwargs):
        calls.append(("init", kwargs))
        return run

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb.py")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return calls


def test_wandb_finds_a_resumed_run_by_its_id_and_receives_the_values(tmp_path, wandb_calls):
    for step in range(2):
        open_log(tmp_path, tracker="wandb")(step, val=3.25, lr=0.5)
    assert [call[1]["id"] for call in wandb_calls if call[0] == "init"] == [None, "abc123"]
    assert [call[1] for call in wandb_calls if call[0] == "log"] == [
        {"step": 0, "val": 3.25, "lr": 0.5}, {"step": 1, "val": 3.25, "lr": 0.5}]


def test_tensorboard_receives_the_values_and_drops_those_after_the_checkpoint(
        tmp_path, monkeypatch):
    calls = []
    writer = types.SimpleNamespace(add_scalar=lambda *call: calls.append(call),
                                   add_custom_scalars=calls.append,
                                   close=lambda: calls.append("closed"))

    def summary_writer(folder, purge_step):
        calls.append((folder, purge_step))
        return writer

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=summary_writer))
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    log = open_log(tmp_path, tracker="tensorboard", first_step=500)
    log(501, quiet=True, train=3.5, val_655360=3.4, lr=0.1)
    registered[0]()
    card = {"loss": {"loss": ["Multiline", ["loss/train", "loss/val"]]}}
    assert calls == [(str(tmp_path), 500), card, ("loss/train", 3.5, 501),
                     ("loss/val_655360", 3.4, 501), ("lr", 0.1, 501), "closed"]


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    """An exception of W&B once stopped the training."""
    def fail(*_, **__):
        raise RuntimeError("server\nsays no")

    log = open_log(tmp_path)
    log.tracker = fail
    log(1, quiet=True, train=3.5)
    log(2, quiet=True, train=3.25)
    assert read_log(str(tmp_path / "log.txt")) == {"train": [(1, 3.5), (2, 3.25)]}
    assert capsys.readouterr().out == ("the tracker failed at step 1, it receives no more values:"
                                       " RuntimeError: server\n")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail))
    with pytest.raises(ValueError, match=r"--tracker wandb cannot be started \(RuntimeError: serv"):
        open_log(tmp_path, tracker="wandb")


def train(cwd, *flags):
    """Exit status of a training run log/tiny in a folder, in this process."""
    (cwd / "text.txt").write_text(text_of_words(200))
    return run_here(cwd, *TINY, "--data", "text.txt", "--exp-name", "tiny", "--val-every", "2",
                    "--save-every", "2", "--device", "cpu", *flags)


def logged_values(run_dir):
    """{(stream, step): value} of the log of train's run."""
    streams = read_log(str(run_dir / "log" / "tiny" / "log.txt"))
    return {(stream, step): value for stream, points in streams.items() for step, value in points}


def test_a_training_run_sends_every_value_of_its_log(tmp_path, wandb_calls):
    assert train(tmp_path, "--tracker", "wandb", "--max-steps", "2") == 0
    kind, arguments = wandb_calls[0]
    assert kind == "init" and arguments.pop("config")["n_embd"] == 16
    assert arguments == {"project": "gpt2", "name": "tiny", "id": None, "resume": "allow",
                         "dir": os.path.join("log", "tiny")}
    assert wandb_calls[1] == ("metric", "*", "step")
    sent = {}
    for _, values in wandb_calls[2:]:
        step = values.pop("step")
        sent |= {(stream, step): value for stream, value in values.items()}
    assert sent == logged_values(tmp_path)
    assert {stream for stream, _ in sent} == {
        "train", "val", "val_bpb", "lr", "norm", "tok_per_sec"}


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # W&B leaves a folder wandb/ where it runs; it is not a package
    folder_spec = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    specs = {"wandb": folder_spec, "tensorboard": None}
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    for name in specs:
        with pytest.raises(ValueError, match=f"--tracker {name} needs the package {name}, which"):
            check_tracker(name)
    check_tracker("none")


# -----------------------------------------------------------------------------
# the training loop

class BlockingWriter(checkpoint.Writer):
    """Finishes each write before training continues, so that when an error is raised is certain."""

    def start(self, function, *args):
        super().start(function, *args)
        concurrent.futures.wait([self.pending])


@pytest.mark.parametrize("max_steps", ["2", "6"])
def test_a_failed_save_ends_the_run_at_once(tmp_path, monkeypatch, capsys, max_steps):
    """After the last step too, where only the final wait raises the error."""
    monkeypatch.setattr(checkpoint, "Writer", BlockingWriter)
    monkeypatch.setattr(checkpoint, "save_and_prune", fail)
    assert train(tmp_path, "--max-steps", max_steps) == 2
    assert capsys.readouterr().err == "error: no room\n"
    steps = {step for stream, step in logged_values(tmp_path) if stream == "train"}
    assert max(steps) == min(2, int(max_steps) - 1)
