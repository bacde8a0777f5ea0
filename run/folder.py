"""
A run's folder, log/<exp-name>/: its names, lock, settings, log and trackers.

    log.txt          `step stream value`, one value a line; step is the number of updates made before it
    config.json      the run's settings, its command, and the versions and hardware it runs on
    model_00250.pt, state_00250.pt    a checkpoint, see checkpoint.py
"""
import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys

from run.cli import first_line, print0
from run.config import TRACKERS
from run.files import atomic_write, check_regular, lock, make_folders
from run.runtime import describe_machine

# -----------------------------------------------------------------------------
# the folder

def aside(paths):
    """A name for each path under which it is kept: path.aside, or with path.2.aside, path.3.aside ... names that are free."""
    for n in itertools.count(1):
        names = [f"{path}.aside" if n == 1 else f"{path}.{n}.aside" for path in paths]
        if not any(os.path.lexists(name) for name in names):
            return names


def paths(run_dir, step):
    """(model file, state file) of a step."""
    return tuple(os.path.join(run_dir, f"{kind}_{step:05d}.pt") for kind in ("model", "state"))


def step_of(path):
    """The step of a model_*.pt or state_*.pt file; ValueError for another name."""
    if m := re.fullmatch(r"(model|state)_(\d+)\.pt", os.path.basename(path)):
        return int(m[2])
    raise ValueError(f"{path} is not named like a checkpoint: model_00250.pt, with state_00250.pt beside it")


def steps_of(run_dir, kind):
    """Set of the steps that have a file of a kind, "model" or "state"."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    return {int(m[1]) for m in (re.fullmatch(rf"{kind}_(\d+)\.pt", name) for name in names) if m}


def saved_steps(run_dir):
    """Steps that have both files, ascending."""
    return sorted(steps_of(run_dir, "model") & steps_of(run_dir, "state"))


def lock_run(run_dir):
    """Locks a run folder, created if necessary, until this process ends; ValueError if another running process holds it.

    It is a kernel lock on log.txt, released however the process ends. Temporary files that a killed process left are
    removed; so are, at exit, a log.txt created here that is still empty and the folders created for it. ValueError if a
    run would overwrite a log.txt or config.json that is not of a run.
    """
    folder = os.path.abspath(run_dir)  # the process may change its directory
    path = os.path.join(folder, "log.txt")
    check_files(run_dir)
    created = []
    make_folders(folder, created)
    is_new = not os.path.exists(path)
    try:
        f = lock(path)
    except BlockingIOError as e:
        raise ValueError(f"{run_dir} is in use by another training process; wait for it or stop it, or choose another"
                         " --exp-name") from e
    if f is None:
        print0(f"{run_dir} cannot be locked on this file system: do not start a second run in it")
    else:
        for name in os.listdir(folder):  # what a killed process was writing: the lock excludes a running one
            if re.fullmatch(r"((model|state)_\d+\.pt|config\.json)\.(\d+\.)?tmp", name):
                os.remove(os.path.join(folder, name))

    def unlock():
        with contextlib.suppress(OSError):  # rmdir refuses a folder that holds anything
            if is_new and os.path.getsize(path) == 0:
                os.remove(path)
                for place in created:
                    os.rmdir(place)
        if f is not None:
            f.close()
    atexit.register(unlock)


def check_files(run_dir):
    """Raises ValueError if a run would overwrite a log.txt or config.json in run_dir that is not of a run."""
    path = os.path.join(run_dir, "log.txt")
    try:
        read_config(run_dir)
        check_regular(path)
        if os.path.exists(path) and not steps_of(run_dir, "model"):  # a resumed run keeps what is in its log
            read_log(path)
    except ValueError as e:
        raise ValueError(f"{e}; {run_dir} is not the folder of a run: choose another --exp-name") from e


def write_config(run_dir, config, dtype, ranks):
    """Writes config.json on rank 0: the settings (a dict), and the command, versions and hardware."""
    if not ranks.master_process:
        return
    description = {"config": config, "command": sys.argv, "world_size": ranks.world_size, "dtype": dtype,
                   "torchrun_id": os.environ.get("TORCHELASTIC_RUN_ID"), **describe_machine(ranks.device)}
    with atomic_write(os.path.join(run_dir, "config.json"), "w") as f:
        json.dump(description, f, indent=2)


def read_config(run_dir):
    """The settings in a run folder's config.json, a dict; {} without the file, ValueError if it is not a run's."""
    path = os.path.join(run_dir, "config.json")
    check_regular(path)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f)["config"])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} is not the config.json of a run ({e!r}); move it away to continue without it") from e


# -----------------------------------------------------------------------------
# log.txt

TRAINING_STREAMS = {"train", "lr", "norm", "tok_per_sec", "epoch"}  # of the step's update; others are evaluations


def read_log(path):
    """{stream: [(step, value), ...] in the file's order} of a log.txt; ValueError names an invalid line.

    A truncated last line, which a kill or a power failure leaves, is ignored.
    """
    check_regular(path)
    streams = {}
    with open(path, "rb") as f:
        # of a file that is no log a line may be as long as the file
        for number, line in enumerate(iter(lambda: f.readline(1000), b""), 1):
            if re.fullmatch(rb"\d+( \w*( \S*)?)?", line):  # no newline
                break
            try:
                step, stream, value = line.decode().split()
                if not 0 <= int(step) < 2**53:  # a float64 of the plots has no more digits
                    raise ValueError(step)
                streams.setdefault(stream, []).append((int(step), float(value)))
            except ValueError as e:
                got = line.decode(errors="replace").strip()[:60]
                raise ValueError(f"{path}, line {number}: expected `step stream value`, got {got!r}") from e
    return streams


def kept_log(run_dir, step):
    """(num_bytes, streams): length of the part of log.txt that a run resumed at step keeps; set of step's evaluations in it.

    Evaluations of a step are logged before its update, so they are kept, like all earlier steps. An evaluation that a stop
    interrupted is not in the log: the resumed run repeats it.
    """
    size, last, evaluated = 0, -1, set()
    with contextlib.suppress(FileNotFoundError), open(os.path.join(run_dir, "log.txt"), "rb") as f:
        for line in f:
            if not line.endswith(b"\n"):  # truncated by a kill or a power failure
                break
            words = line.decode(errors="replace").split()
            if len(words) == 3 and words[0].isdigit():
                at, stream = int(words[0]), words[1]
                if at > step or at == step and stream in TRAINING_STREAMS:
                    break
                last = at if stream in TRAINING_STREAMS else last
                evaluated |= {stream} if at == step else set()
            size += len(line)
    if last < step - 1:
        print0(f"{run_dir}/log.txt is incomplete: it lacks steps {last + 1} to {step - 1} before the checkpoint")
    return size, evaluated


def check_tracker(name):
    """Raises ValueError unless name is one of TRACKERS, and the tracker's package is installed."""
    if type(name) is not str or name not in TRACKERS:  # of a damaged checkpoint
        raise ValueError(f"--tracker is {name!r:.100}, must be one of {', '.join(TRACKERS)}")
    spec = None if name == "none" else importlib.util.find_spec(name)
    if name != "none" and getattr(spec, "origin", None) is None:  # a folder of that name has a spec without a file
        raise ValueError(f"--tracker {name} needs the package {name}, which is not installed: pip install {name},"
                         " or --tracker none")


def evaluation_line(step, values):
    """The printed line of {stream: value}: "step   250 | val 3.2100 | val_bpb 0.9700"."""
    return " | ".join([f"step {step:5d}", *(f"{stream} {value:.4f}" for stream, value in values.items())])


class Log:
    """Writes log.txt, prints evaluations, and sends all values to TensorBoard or Weights & Biases, on rank 0 only.

        log(250, val=3.21)                          # appends "250 val 3.21" and prints it
        log(250, quiet=True, train=3.3, lr=6e-4)    # appends both without printing
        log(250, val=None)                          # does nothing: the evaluation was interrupted

    settings: the run's config, a dict. keep_bytes: from kept_log, 0 for a new run; log.txt is truncated to it. The log of an
    earlier run without checkpoints is copied to log.txt.aside first.
    """

    def __init__(self, run_dir, settings, keep_bytes, first_step, ranks):
        self.file = self.tracker = None
        if ranks.master_process:
            path = os.path.join(run_dir, "log.txt")
            if keep_bytes == 0 and os.path.exists(path) and os.path.getsize(path) > 0:
                # a copy: the file itself is locked
                shutil.copyfile(path, aside([path])[0])
                print0(f"copied {path} to *.aside: it is of an earlier run, which has no checkpoint")
            # line-buffered: what was logged survives a kill
            self.file = open(path, "a", encoding="utf-8", buffering=1)
            self.file.truncate(keep_bytes)
            try:
                self.tracker = self.open_tracker(settings["tracker"], run_dir, settings, first_step)
            except Exception as e:  # no login, no network, no disk space
                raise ValueError(f"--tracker {settings['tracker']} cannot be started ({first_line(e)}); --tracker none trains"
                                 " without it") from e

    def __call__(self, step, quiet=False, **values):
        values = {stream: value for stream, value in values.items() if value is not None}
        if values and not quiet:
            print0(evaluation_line(step, values))
        for stream, value in values.items():
            if self.file:
                self.file.write(f"{step} {stream} {value}\n")
        if self.tracker and values:
            try:
                self.tracker(step, values)
            except Exception as e:  # whatever the package raises: the values are in log.txt, the run continues
                self.tracker = None
                print0(f"the tracker failed at step {step}, it receives no more values: {first_line(e)}")

    def flush(self):
        """Flushes log.txt to the disk."""
        if self.file:
            os.fsync(self.file.fileno())

    @staticmethod
    def open_tracker(name, run_dir, settings, first_step):
        """A function (step, {stream: value}) that sends values to a tracker; None for "none".

        A resumed run continues there: TensorBoard drops the values from first_step on; W&B finds the run by the id in
        wandb_id.txt and receives those steps again.
        """
        if name == "none":
            return None
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(run_dir, purge_step=first_step)

            def close():
                with contextlib.suppress(Exception):  # the run is over, and its values are in log.txt
                    writer.close()  # flushes its queue
            atexit.register(close)

            def track(step, values):
                for stream, value in values.items():
                    writer.add_scalar(stream, value, step)
            return track
        import wandb
        path = os.path.join(run_dir, "wandb_id.txt")
        run_id = open(path, encoding="utf-8").read().strip() if os.path.exists(path) else None
        run = wandb.init(project="gpt2", name=settings["exp_name"], id=run_id, resume="allow", config=settings, dir=run_dir)
        with atomic_write(path, "w") as f:
            f.write(run.id)
        run.define_metric("*", step_metric="step")  # W&B's own counter only increases; ours goes back to a checkpoint
        return lambda step, values: run.log({"step": step, **values})
