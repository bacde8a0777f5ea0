"""
A run folder, log/<exp-name>/: its log, its lock, and its checkpoints, which are written atomically and loaded safely.

    log.txt          `step stream value`, one value a line; step is the number of updates made before it
    config.json      the run's settings, its command, and the versions and hardware it runs on
    model_00250.pt   {"model": state dict of raw_model (float32, CPU), "config": GPTConfig as a dict, "step": int,
                      "val_loss": float or None}: enough to sample and evaluate
    state_00250.pt   {"step": int, "optimizers": [state dict, ...], "scaler": state dict, "loader": state dict,
                      "rng": [state of each rank], "train_config": dict}: enough to resume

A checkpoint is complete when both of its files are. They hold tensors and plain values; loading them runs no code.
"""
import atexit
import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import reprlib
import shutil
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import torch

from cli import first_line, print0, printable
from config import TRACKERS
from files import atomic_write, check_regular, lock, make_folders
from model import GPT, GPTConfig
from runtime import DTYPES, describe_machine

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


def check_zip(path):
    """Raises BadZipFile for a torch.save file with a flipped bit: torch.load does not verify checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch.save compresses nothing; what is compressed, or overlaps, could have any size when it is read
            if (any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries)
                    or sum(entry.file_size for entry in entries) > os.path.getsize(path)):
                raise zipfile.BadZipFile("its entries are compressed or overlap, which torch.save does not do")
            # nor does it write folders (attribute 16), whose contents torch.load would not read
            folders = [entry.filename for entry in entries if entry.external_attr & 16]
            if damaged := folders[0] if folders else archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum or header of {damaged}")


def load_file(path, mmap=False):
    """The contents of a torch.save file, on the CPU; ValueError if it is truncated, damaged, or holds code.

    mmap: leave the tensors in the file until they are read.
    """
    check_regular(path)
    with open(path, "rb") as f:
        start = f.read(2)
    # a zip archive, or a pickle of protocol 2 and later
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"cannot load {path}: it is not a checkpoint, a file that torch.save wrote")
    try:
        check_zip(path)
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols that torch.save does not use
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as e:  # on a damaged file torch's unpickler raises almost anything
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise ValueError(f"cannot load {path}: it contains {code[1]}, not only tensors and plain values, and could run"
                             " code") from e
        reason = re.split(r"WeightsUnpickler error:\s*", str(e))[-1].split("\n")[0][:100]
        raise ValueError(f"cannot load {path}: it is truncated, damaged or not a checkpoint"
                         f" ({type(e).__name__}: {reason})") from e


def aside(paths):
    """A name for each path under which it is kept: path.aside, or with path.2.aside, path.3.aside ... names that are free."""
    for n in itertools.count(1):
        names = [f"{path}.aside" if n == 1 else f"{path}.{n}.aside" for path in paths]
        if not any(os.path.lexists(name) for name in names):
            return names


# -----------------------------------------------------------------------------
# the folder

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


# -----------------------------------------------------------------------------
# its checkpoints

class Checkpoint(NamedTuple):
    """A checkpoint that was loaded: the contents of its two files, and a message for each newer one that was skipped."""
    model: dict
    state: dict
    messages: list

    @property
    def step(self):
        """Number of updates made before it."""
        return self.state["step"]


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


def check_tensors(weights, source):
    """Raises ValueError unless weights, read from a file, are dense floating-point tensors that are wholly in that file."""
    for name, t in weights.items():
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name} of {source} is {t!r:.40}, expected a tensor")
        if (t.layout, t.device.type) != (torch.strided, "cpu") or t.dtype not in (torch.float64, *DTYPES.values()):
            raise ValueError(f"{name} of {source} is {t.dtype}, {t.layout} on {t.device}, expected a dense tensor of floats")
    sizes = [t.numel() * t.element_size() for name, t in weights.items() if name != "lm_head.weight"]  # tied to wte
    if sum(sizes) > num_bytes(weights):
        raise ValueError(f"the tensors of {source} have {sum(sizes):,} bytes, more than are stored: it is damaged")


def check_weights(config, weights, source):
    """Raises ValueError, naming up to three tensors, unless weights are the state dict of a GPT of this GPTConfig.

    What passes can be allocated: a damaged file may describe a model of any size.
    """
    check_tensors(weights, source)
    count = sum(t.numel() for t in weights.values())
    if config.n_layer > len(weights) or config.num_params() > count:
        raise ValueError(f"the weights of {source} do not fit this model: its config says n_layer={config.n_layer} and"
                         f" {config.num_params():,} parameters, they are {len(weights)} tensors with {count:,}")
    with torch.device("meta"):
        ours = GPT(config).state_dict()
    wrong = sorted(map(str, ours.keys() ^ weights.keys()))
    wrong += [f"{name} {tuple(weights[name].shape)} for {tuple(ours[name].shape)}"
              for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(f"the weights of {source} do not fit this model: {', '.join(wrong[:3])}"
                         f" ({len(wrong)} tensors in all)")


def check_finite(model, source):
    """Raises ValueError, naming up to three tensors, if a weight is NaN or infinite."""
    # aminmax propagates NaN and makes no copy: 0.1 s for 124M parameters
    wrong = [name for name, p in model.named_parameters()
             if not all(bound.isfinite() for bound in p.detach().aminmax())]
    if wrong:
        raise ValueError(f"{source} has NaN or infinite weights: {', '.join(wrong[:3])} ({len(wrong)} tensors in all);"
                         " use an earlier checkpoint, or download it again")


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

def copy_to_cpu(tensor):
    """A copy of a tensor in CPU memory, from a GPU in pinned memory, which is several times as fast to copy to."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False).copy_(tensor)


def snapshot(value):
    """value with every tensor in it copied to CPU memory; training may then change the originals.

    Tensors that share memory (the tied wte and lm_head) share it in the copy.
    """
    copies = {}

    def copy(v):
        if isinstance(v, torch.Tensor):
            key = (v.data_ptr(), v.shape, v.stride(), v.dtype) if v.numel() else id(v)
            if key not in copies:
                copies[key] = copy_to_cpu(v.detach())
            return copies[key]
        if isinstance(v, dict):
            return {k: copy(item) for k, item in v.items()}
        return type(v)(copy(item) for item in v) if isinstance(v, (list, tuple)) else v
    return copy(value)


def num_bytes(value):
    """Bytes of the tensors in a nested value, shared memory counted once."""
    sizes, todo = {}, [value]
    while todo:
        v = todo.pop()
        if isinstance(v, torch.Tensor):
            sizes[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        elif isinstance(v, (dict, list, tuple)):
            todo += v.values() if isinstance(v, dict) else v
    return sum(sizes.values())


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
