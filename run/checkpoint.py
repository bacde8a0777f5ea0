"""
A run's checkpoints, which are written atomically and loaded safely.

    model_00250.pt   {"model": state dict of raw_model (float32, CPU), "config": GPTConfig as a dict, "step": int,
                      "val_loss": float or None}: enough to sample and evaluate
    state_00250.pt   {"step": int, "optimizers": [state dict, ...], "scaler": state dict, "loader": state dict,
                      "rng": [state of each rank], "train_config": dict}: enough to resume

A checkpoint is complete when both of its files are. They hold tensors and plain values; loading them runs no code.
"""
import math
import os
import re
import reprlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import torch

from model import GPTConfig
from run.cli import print0, printable
from run.files import atomic_write
from run.folder import aside, paths, read_log, saved_steps, steps_of
from run.weights import check_weights, load_file, num_bytes

# -----------------------------------------------------------------------------
# one file

def save_file(contents, path, write=torch.save):
    """write(contents, open file) into path, atomically. Raises OSError if it fails (a full disk, say)."""
    try:
        with atomic_write(path) as f:
            write(contents, f)
    except (RuntimeError, OSError) as e:
        # torch's zip writer raises another RuntimeError after the error that stopped it
        while isinstance(e, RuntimeError) and e.__context__:
            e = e.__context__
        raise OSError(f"cannot write {path}: {e}; existing checkpoints are intact") from e


# -----------------------------------------------------------------------------
# the two files of a step

class Checkpoint(NamedTuple):
    """A checkpoint that was loaded: the contents of its two files, and a message for each newer one that was skipped."""
    model: dict
    state: dict
    messages: list

    @property
    def step(self):
        """Number of updates made before it."""
        return self.state["step"]


def model_contents(raw_model, val_loss, weights=None):
    """Contents of the model file without "step"; weights: instead of the model's own state dict."""
    return {"model": weights or raw_model.state_dict(), "config": asdict(raw_model.config), "val_loss": val_loss}


def save(run_dir, step, model, state):
    """Writes the two files of a step, contents as at the top of this file; "step" is added to both.

    The state comes first: if there is a model file, its state file is complete. Raises OSError, before anything is
    written, if the disk has too little room.
    """
    needed = num_bytes((model, state)) * 1.01 + 2**20  # plus what the format adds
    if (free := shutil.disk_usage(run_dir).free) < needed:
        raise OSError(f"cannot write the checkpoint of step {step} into {run_dir}: it needs {needed / 1e9:.3f} GB,"
                      f" {free / 1e9:.3f} GB are free; free some space and start again; existing checkpoints are intact")
    model_path, state_path = paths(run_dir, step)
    save_file({**state, "step": step}, state_path)
    save_file({**model, "step": step}, model_path)


def save_and_prune(run_dir, step, model, state):
    """save, then removes the checkpoints that the run's settings do not keep; runs in the Writer's thread."""
    save(run_dir, step, model, state)
    best, config = None, state["train_config"]
    if config["keep_best"]:
        try:
            log = read_log(os.path.join(run_dir, "log.txt"))
        except (OSError, ValueError) as e:  # the file was edited or removed: which one is the best is not known
            return print0(f"saved {paths(run_dir, step)[0]}; no checkpoint is removed, because --keep-best needs the log: {e}")
        losses = {s: loss for s, loss in log.get("val", []) if not math.isnan(loss)}  # min would keep a NaN that comes first
        best = min((s for s in saved_steps(run_dir) if s in losses), key=losses.get, default=None)
    prune(run_dir, config["keep_last"], best)
    print0(f"saved {paths(run_dir, step)[0]}")


def prune(run_dir, keep_last, best=None):
    """Removes all checkpoints except the newest keep_last and that of step best, and older files that a kill left."""
    steps = saved_steps(run_dir)
    kept = {*steps[-keep_last:], best}
    for name in sorted(os.listdir(run_dir)):  # a model before its state: one without the other would look damaged
        m = re.fullmatch(r"(model|state)_(\d+)\.pt", name)
        if m and steps and int(m[2]) not in kept and int(m[2]) < steps[-1]:
            os.remove(os.path.join(run_dir, name))


def rename_newer(run_dir, step):
    """Renames the checkpoints after step to *.aside: they do not belong to the run resumed at step.

    Returns their old names. log.txt is copied: the run truncates it. A state file without its model file, which a kill
    during a save leaves behind, is kept: the run overwrites or prunes it.
    """
    newer = [path for s in sorted(steps_of(run_dir, "model")) if s > step
             for path in paths(run_dir, s) if os.path.exists(path)]
    log = [path for path in [os.path.join(run_dir, "log.txt")] if newer and os.path.exists(path)]
    names = aside(newer + log)  # one number for all: they belong together
    for path, name in zip(newer, names):
        os.replace(path, name)
    for path in log:
        shutil.copyfile(path, names[-1])
    return newer


# types of the contents of the two files
MODEL_TYPES = {"step": int, "model": dict, "config": dict}
STATE_TYPES = {"step": int, "optimizers": list, "scaler": dict, "loader": dict, "rng": list, "train_config": dict}
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of float16; else empty


def load_pair(run_dir, step):
    """(model contents, state contents) of a step; ValueError or FileNotFoundError if it is not a complete checkpoint."""
    # memory-mapped: the ranks of a machine share the files' pages, and each reads only its part of the optimizer's state
    model, state = (load_file(path, mmap=True) for path in paths(run_dir, step))
    model_path, state_path = paths(run_dir, step)
    for path, contents, types in ((model_path, model, MODEL_TYPES), (state_path, state, STATE_TYPES)):
        if not isinstance(contents, dict) or not types.keys() <= contents.keys() or contents.get("step") != step:
            raise ValueError(f"{path} is not the {os.path.basename(path)[:5]} file of step {step}")
        if wrong := [name for name, kind in types.items() if not isinstance(contents[name], kind)]:
            raise ValueError(f"{path} is damaged: {wrong[0]} is {reprlib.repr(contents[wrong[0]])}")
    if state["scaler"].keys() not in (set(), SCALER) or not all(
            type(value) in (int, float) and 0 <= value < math.inf for value in state["scaler"].values()):
        raise ValueError(f"{state_path} is damaged: scaler is {reprlib.repr(state['scaler'])}")
    try:
        config = GPTConfig(**model["config"])
    except (ValueError, TypeError) as e:  # unknown or wrong fields
        raise ValueError(f"{model_path} is damaged: its config does not describe a model ({e})") from e
    check_weights(config, model["model"], model_path)
    return model, state


def load_latest(run_dir):
    """The newest Checkpoint that is complete and undamaged, or None if there is none.

    Raises ValueError if there are model files and none of them loads with its state: starting over would be silent data
    loss.
    """
    messages = []
    # a kill between the two writes leaves a state without its model: it is skipped
    for step in sorted(steps_of(run_dir, "model") | steps_of(run_dir, "state"), reverse=True):
        try:
            return Checkpoint(*load_pair(run_dir, step), messages)
        except (ValueError, OSError) as e:
            messages.append(printable(f"skipping step {step}: {e}"))
    if steps_of(run_dir, "model"):
        raise ValueError(f"no checkpoint in {run_dir} can be loaded ({'; '.join(messages)});"
                         " move the folder away to start over")
    return None


# -----------------------------------------------------------------------------
# saving while training continues


class Writer:
    """A background thread that writes one checkpoint at a time; its errors are raised by the next call."""

    def __init__(self):
        self.executor, self.pending = ThreadPoolExecutor(1), None

    def start(self, function, *args):
        """Starts function(*args) in the thread, after waiting for the previous one."""
        self.wait()
        self.pending = self.executor.submit(function, *args)

    def check(self):
        """Raises the thread's error, if any."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self):
        """Waits until the thread has finished; raises its error, if any."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()
