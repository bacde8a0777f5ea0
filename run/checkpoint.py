"""
A run's checkpoints, which are written atomically and loaded safely.

    model_00250.pt   {"model": state dict of raw_model (float32, CPU), "config": GPTConfig as a
                      dict, "step": int, "val_loss": float or None}: enough to sample and evaluate
    state_00250.pt   {"step": int, "optimizers": [state dict, ...], "scaler": state dict,
                      "loader": state dict, "rng": [state of each rank], "train_config": dict}:
                      enough to resume

A checkpoint is complete when both of its files are. They hold tensors and plain values; loading
them runs no code.
"""
import contextlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import torch

from run.cli import print0
from run.files import atomic_write
from run.folder import paths, read_log, saved_steps, steps_of
from run.weights import load_file

# -----------------------------------------------------------------------------
# writing


def save_file(contents, path, write=torch.save):
    """write(contents, open file) into path, atomically. Raises OSError if it fails."""
    try:
        with atomic_write(path) as f:
            write(contents, f)
    except (RuntimeError, OSError) as e:
        # torch's zip writer raises another RuntimeError after the error that stopped it
        while isinstance(e, RuntimeError) and e.__context__:
            e = e.__context__
        raise OSError(f"cannot write {path}: {e}; existing checkpoints are intact") from e


def model_contents(raw_model, val_loss, weights=None):
    """Contents of the model file without "step"; weights replaces the model's own state dict."""
    return {"model": weights or raw_model.state_dict(), "config": asdict(raw_model.config),
            "val_loss": val_loss}


def save(run_dir, step, model, state):
    """Writes the two files of a step, contents as at the top of this file without "step".

    The state comes first: if there is a model file, its state file is complete.
    """
    model_path, state_path = paths(run_dir, step)
    save_file({**state, "step": step}, state_path)
    save_file({**model, "step": step}, model_path)


def save_and_prune(run_dir, step, model, state):
    """save, then removes the checkpoints that --keep-last and --keep-best do not keep."""
    save(run_dir, step, model, state)
    config = state["train_config"]
    try:
        best = best_step(run_dir) if config["keep_best"] else None
        prune(run_dir, step, config["keep_last"], best)
    except OSError as e:  # log.txt or the folder cannot be read; the new checkpoint is complete
        print0(f"no older checkpoint is removed: {e}")
    print0(f"saved {paths(run_dir, step)[0]}")


def best_step(run_dir):
    """The step with the lowest validation loss of those that have a checkpoint, or None."""
    losses = dict(read_log(os.path.join(run_dir, "log.txt")).get("val", []))
    # without NaN: min would keep one that comes first
    steps = [s for s in saved_steps(run_dir) if s in losses and not math.isnan(losses[s])]
    return min(steps, key=losses.get, default=None)


def prune(run_dir, step, keep_last, best=None):
    """Keeps the newest keep_last checkpoints up to step, and that of step best; removes the others.

    Also removes an older step's single file, which a killed process left. Files after step, which
    another run wrote, are neither counted nor removed. What cannot be removed is reported.
    """
    steps = [s for s in saved_steps(run_dir) if s <= step]
    kept = {*steps[-keep_last:], best}
    for old in sorted(steps_of(run_dir, "model") | steps_of(run_dir, "state")):
        if old >= step or old in kept:
            continue
        try:
            # the model before its state, because a model without its state would look damaged
            for path in paths(run_dir, old):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
        except OSError as e:
            print0(f"cannot remove an older checkpoint, {path}: {e.strerror}")


def rename_skipped(run_dir, step):
    """Renames the checkpoints after step, which a run that resumes from it has skipped, to *.aside.

    They would count in prune once the run is past them, and sample.py would take the newest one. A
    state without its model, which a kill leaves, stays: the next save replaces it.
    """
    for skipped in sorted(steps_of(run_dir, "model")):
        if skipped > step:
            for path in filter(os.path.exists, paths(run_dir, skipped)):
                os.replace(path, f"{path}.aside")
            print0(f"renamed the files of step {skipped} to *.aside")


class Writer:
    """A background thread that writes one checkpoint at a time while training continues.

    Its errors are raised by the next call.
    """

    def __init__(self):
        self.executor = ThreadPoolExecutor(1)
        self.pending = None

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


# -----------------------------------------------------------------------------
# reading


class Checkpoint(NamedTuple):
    """The contents of a checkpoint's two files, and a message for each newer one skipped."""
    model: dict
    state: dict
    messages: list

    @property
    def step(self):
        """Number of updates made before it."""
        return self.state["step"]


def load_pair(run_dir, step):
    """(model contents, state contents) of a step.

    Raises ValueError or FileNotFoundError if it is not a complete checkpoint.
    """
    contents = []
    for path, key in zip(paths(run_dir, step), ("model", "optimizers")):
        # memory-mapped: the ranks of a machine share the file's pages, and each reads only its
        # shard of the optimizer's state
        contents.append(load_file(path, mmap=True))
        if key not in contents[-1] or contents[-1].get("step") != step:
            kind = os.path.basename(path)[:5]
            raise ValueError(f"{path} is not the {kind} file of step {step}")
    return tuple(contents)


def load_latest(run_dir):
    """The newest Checkpoint that is complete and undamaged, or None if there is none.

    Raises ValueError if there are model files and none of them loads with its state: starting over
    would be silent data loss.
    """
    messages = []
    # a kill between the two writes leaves a state without its model: it is skipped
    for step in sorted(steps_of(run_dir, "model") | steps_of(run_dir, "state"), reverse=True):
        try:
            return Checkpoint(*load_pair(run_dir, step), messages)
        except (ValueError, OSError) as e:
            messages.append(f"skipping step {step}: {e}")
    if steps_of(run_dir, "model"):
        raise ValueError(f"no checkpoint in {run_dir} can be loaded ({'; '.join(messages)});"
                         " move the folder away to start over")
    return None
