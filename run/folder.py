"""
A run's folder, log/<exp-name>/: its names, lock, settings, log and trackers.

    log.txt          `step stream value`, one value a line; step counts the updates made before it
    config.json      the run's settings, its command, and the versions and hardware it runs on
    model_00250.pt   with state_00250.pt, a checkpoint; see checkpoint.py
"""
import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import sys

from run.cli import first_line, interpreter, print0
from run.files import atomic_write, is_at, locked_folder
from run.runtime import describe_machine

# -----------------------------------------------------------------------------
# the folder


def paths(run_dir, step):
    """(model file, state file) of a step."""
    model_path = os.path.join(run_dir, f"model_{step:05d}.pt")
    state_path = os.path.join(run_dir, f"state_{step:05d}.pt")
    return model_path, state_path


def steps_of(run_dir, kind):
    """Set of the steps that have a file of a kind, "model" or "state"."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    matches = [re.fullmatch(rf"{kind}_(\d+)\.pt", name) for name in names]
    return {int(match[1]) for match in matches if match}


def saved_steps(run_dir):
    """Steps that have both files, ascending."""
    return sorted(steps_of(run_dir, "model") & steps_of(run_dir, "state"))


def lock_run(run_dir):
    """Locks a run folder, created if necessary, until this process ends.

    Temporary files that a killed process left are removed. Raises ValueError if another process has
    the lock, or if config.json is not of a run, which would overwrite it.
    """
    read_config(run_dir)
    stack = contextlib.ExitStack()
    is_locked = stack.enter_context(locked_folder(run_dir, "training process", "--exp-name"))
    atexit.register(stack.close)
    if is_locked:
        for name in os.listdir(run_dir):
            if re.fullmatch(r"((model|state)_\d+\.pt|config\.json|log\.txt)\..*\.tmp", name):
                os.remove(os.path.join(run_dir, name))


def write_config(run_dir, config, ranks):
    """Writes config.json on rank 0: the settings (a dict), the command, versions and hardware."""
    if not ranks.master_process:
        return
    description = {"config": config, "command": sys.argv, "world_size": ranks.world_size,
                   "torchrun_id": os.environ.get("TORCHELASTIC_RUN_ID"),
                   **describe_machine(ranks.device)}
    with atomic_write(os.path.join(run_dir, "config.json"), "w") as f:
        json.dump(description, f, indent=2)


def read_config(run_dir):
    """The settings in a run folder's config.json, a dict; {} without the file.

    Raises ValueError if the file is not of a run: Hugging Face's folders have one of that name.
    """
    path = os.path.join(run_dir, "config.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f)["config"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not the config.json of a run ({e!r}); move it away, or choose"
                         " another folder") from e


# -----------------------------------------------------------------------------
# log.txt

# streams of a step's update; the others are evaluations before it
TRAINING_STREAMS = {"train", "lr", "norm", "tok_per_sec", "epoch"}


def parse_line(line):
    """(step, stream, value) of a line of log.txt, bytes; None for another line, such as a note."""
    try:
        step, stream, value = line.decode().split()
        return int(step), stream, float(value)
    except ValueError:
        return None


def read_log(path):
    """{stream: [(step, value), ...] in the file's order} of a log.txt.

    A truncated last line, which a kill or a power failure leaves, is ignored. Other lines that are
    not `step stream value` are skipped with one message.
    """
    streams = {}
    skipped = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                break
            entry = parse_line(line)
            if entry is None:
                skipped.append(number)
            else:
                step, stream, value = entry
                streams.setdefault(stream, []).append((step, value))
    if skipped:
        report_skipped(path, len(skipped), skipped[0])
    return streams


@functools.cache  # a log is read several times: one message
def report_skipped(path, count, first):
    print0(f"{path}: skipped {count} lines that are not `step stream value`, the first is line"
           f" {first}")


def logged_evaluations(run_dir, step):
    """The evaluations of a step in log.txt, a set of streams; a stop interrupted the others."""
    path = os.path.join(run_dir, "log.txt")
    if not os.path.exists(path):
        return set()
    return {stream for stream, points in read_log(path).items()
            if stream not in TRAINING_STREAMS and step in dict(points)}


def cut_log(path, first_step):
    """Moves the lines of log.txt that a run repeats from first_step on to log.txt.aside.

    Evaluations of first_step are kept, like all earlier steps: they were logged before its update.
    A run that starts at step 0 keeps nothing. Other lines, such as notes, are kept.
    """
    kept, cut = [], []
    with open(path, "a+b") as f:  # created if it does not exist
        f.seek(0)
        for line in f:
            step, stream, _ = parse_line(line) or (-1, None, None)
            is_later = step > first_step or (step == first_step and stream in TRAINING_STREAMS)
            # a kill or a power failure truncates the last line
            if first_step == 0 or is_later or not line.endswith(b"\n"):
                cut.append(line.rstrip(b"\n") + b"\n")
            else:
                kept.append(line)
    if cut:
        with open(f"{path}.aside", "ab") as f:
            f.writelines(cut)
        with atomic_write(path) as f:
            f.writelines(kept)
        print0(f"moved {len(cut)} lines from {path} to {path}.aside: this run repeats the steps"
               f" from {first_step} on")


def evaluation_line(step, values):
    """The printed line of {stream: value}: "step   250 | val 3.2100 | val_bpb 0.9700"."""
    fields = [f"{stream} {value:.4f}" for stream, value in values.items()]
    return " | ".join([f"step {step:5d}", *fields])


class Log:
    """Writes log.txt, prints evaluations, and sends all values to a tracker, on rank 0 only.

        log(250, val=3.21)                          # appends "250 val 3.21" and prints it
        log(250, quiet=True, train=3.3, lr=6e-4)    # appends both without printing
        log(250, val=None)                          # does nothing: the evaluation was interrupted

    settings: the run's config, a dict. first_step: the step that the run starts from, see cut_log.
    """

    def __init__(self, run_dir, settings, first_step, ranks):
        self.file = None
        self.tracker = None
        if not ranks.master_process:
            return
        path = os.path.join(run_dir, "log.txt")
        cut_log(path, first_step)
        self.path = os.path.abspath(path)  # the process may change its directory
        self._current_file()
        name = settings["tracker"]
        try:
            if name == "tensorboard":
                self.tracker = open_tensorboard(run_dir, first_step)
            elif name == "wandb":
                self.tracker = open_wandb(run_dir, settings)
        except Exception as e:  # no login, no network, no disk space
            raise ValueError(f"--tracker {name} cannot be started ({first_line(e)}); --tracker none"
                             " trains without it") from e

    def _current_file(self):
        """The file at self.path, open; opened again if the user has replaced it."""
        if self.file is None or not is_at(self.file, self.path):
            # line-buffered: what was logged survives a kill
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        return self.file

    def __call__(self, step, quiet=False, **values):
        values = {stream: value for stream, value in values.items() if value is not None}
        if not values:
            return
        if not quiet:
            print0(evaluation_line(step, values))
        if self.file:
            f = self._current_file()
            for stream, value in values.items():
                f.write(f"{step} {stream} {value}\n")
        if self.tracker:
            try:
                self.tracker(step, values)
            except Exception as e:  # of any type; log.txt has the values, so the run continues
                self.tracker = None
                print0(f"the tracker failed at step {step}, it receives no more values:"
                       f" {first_line(e)}")

    def flush(self):
        """Flushes log.txt to the disk."""
        if self.file:
            os.fsync(self._current_file().fileno())


# -----------------------------------------------------------------------------
# trackers


def check_tracker(name):
    """Raises ValueError if the package of a tracker is not installed."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    # W&B leaves a folder wandb/ where it runs; as a package it has a spec, but no file
    if spec is None or spec.origin is None:
        raise ValueError(f"--tracker {name} needs the package {name}, which is not installed:"
                         f" {interpreter()} -m pip install {name}, or --tracker none")


def open_tensorboard(run_dir, first_step):
    """A function (step, {stream: value}); TensorBoard drops older values from first_step on."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(run_dir, purge_step=first_step)
    atexit.register(writer.close)  # flushes its queue
    # one card with both losses, under "Custom Scalars"
    writer.add_custom_scalars({"loss": {"loss": ["Multiline", ["loss/train", "loss/val"]]}})

    def track(step, values):
        for stream, value in values.items():
            # a section of TensorBoard has the tags with the same prefix
            tag = f"loss/{stream}" if stream.startswith(("train", "val")) else stream
            writer.add_scalar(tag, value, step)

    return track


def open_wandb(run_dir, settings):
    """A function (step, {stream: value}); the id of W&B's run is in wandb_id.txt, to resume it."""
    import wandb
    path = os.path.join(run_dir, "wandb_id.txt")
    run_id = None
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            run_id = f.read().strip()
    run = wandb.init(project="gpt2", name=settings["exp_name"], id=run_id, resume="allow",
                     config=settings, dir=run_dir)
    with atomic_write(path, "w") as f:
        f.write(run.id)
    # W&B's own counter only increases; ours goes back to a checkpoint
    run.define_metric("*", step_metric="step")

    def track(step, values):
        run.log({"step": step, **values})

    return track
