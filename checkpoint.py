"""
Checkpoints: written whole or not at all, read without running code from them.

A run folder log/<exp-name>/ holds pairs of files. A step counts as saved when both are there and complete:

    model_00250.pt   {"model": state dict of raw_model (float32, CPU), "config": GPTConfig as a dict, "step": int,
                      "val_loss": float or None}: enough to sample and evaluate
    state_00250.pt   {"step": int, "optimizers": [state dict, ...], "scaler": state dict, "loader": state dict,
                      "rng": [state of each rank], "log_bytes": size of log.txt, "evaluated": whether the evaluations
                      due at this step are in the log, "skipped": steps skipped, "train_config": dict}: enough to go on

    model, info = load_model("log/shakespeare")     # or a file of ours or of formats.py, "gpt2", a Hugging Face folder

    python checkpoint.py info FILE                   # what it is
    python checkpoint.py export RUN_OR_FILE OUT_DIR  # a Hugging Face folder; --dtype bfloat16, --push USER/NAME
    python checkpoint.py convert IN OUT              # OUT: model.pt (ours), model.bin (llm.c), or a Hugging Face folder
"""
import contextlib
import os
import pickle
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import torch

import formats
import huggingface
from data import NUM_TOKENS
from model import GPT, GPTConfig, PRETRAINED, our_names, read_hf
from runtime import ArgumentParser, run_main

# -----------------------------------------------------------------------------
# one file

def save_file(contents, path, write=torch.save):
    """write(contents, open file) under a temporary name, flushed to the disk, then renamed: path is never half a file.

    Raises OSError (a full disk, say) with nothing left behind and an older path untouched.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(contents, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        # torch's zip writer has errors of its own follow the one that stopped it
        while isinstance(e, RuntimeError) and e.__context__:
            e = e.__context__
        if isinstance(e, (RuntimeError, OSError)):
            raise OSError(f"cannot write {path}: {e}; what was saved before is whole") from e
        raise e


def check_zip(path):
    """Raises BadZipFile for a torch.save file with a flipped bit: torch.load does not look at the checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing and writes no folders (attribute 16), whose contents torch.load would not read
            wrong = [entry.filename for entry in archive.infolist()
                     if entry.file_size != entry.compress_size or entry.external_attr & 16]
            if damaged := wrong[0] if wrong else archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum or header of {damaged}")


def load_file(path, mmap=False):
    """The contents of a checkpoint file, on the CPU; ValueError for one that is cut short, damaged, or holds code.

    mmap leaves tensors in the file until they are looked at.
    """
    try:
        check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, LookupError, NotImplementedError,
            ValueError, OSError) as e:
        if isinstance(e, OSError) and e.filename:  # not there, or not ours to read: it says so itself
            raise
        why = "it is cut short, damaged or no checkpoint"
        if isinstance(e, pickle.UnpicklingError) and "Unsupported" in str(e):
            why = "it holds objects that are not tensors or plain values, which could run code"
        raise ValueError(f"cannot load {path}: {why} ({repr(e).splitlines()[0][:100]})") from e


# -----------------------------------------------------------------------------
# a run folder

def paths(run_dir, step):
    """(model file, state file) of a step."""
    return tuple(os.path.join(run_dir, f"{kind}_{step:05d}.pt") for kind in ("model", "state"))


def step_of(path):
    """The step of a model_*.pt or state_*.pt file; ValueError for another name."""
    if m := re.fullmatch(r"(model|state)_(\d+)\.pt", os.path.basename(path)):
        return int(m[2])
    raise ValueError(f"{path} is not named as a run's checkpoint is: model_00250.pt, with state_00250.pt beside it")


def steps_of(run_dir, kind):
    """Set of the steps for which there is a file of a kind, "model" or "state"."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    return {int(m[1]) for m in (re.fullmatch(rf"{kind}_(\d+)\.pt", name) for name in names) if m}


def saved_steps(run_dir):
    """Steps for which both files are there, ascending."""
    return sorted(steps_of(run_dir, "model") & steps_of(run_dir, "state"))


def contents_of(raw_model, val_loss):
    """What the model file holds but "step"; the tensors are the model's own."""
    return {"model": raw_model.state_dict(), "config": asdict(raw_model.config), "val_loss": val_loss}


def save(run_dir, step, model_contents, state):
    """Writes the pair of files of a step. The state comes first: where there is a model file, its state is complete.

    model_contents: from contents_of; state: as in the head of this file. "step" is put into both.
    Raises OSError, before anything is written, when the disk has too little room.
    """
    needed = num_bytes((model_contents, state)) * 1.01 + 2**20  # and what the format adds
    if (free := shutil.disk_usage(run_dir).free) < needed:
        raise OSError(f"cannot write the checkpoint of step {step} into {run_dir}: it takes {needed / 1e9:.3f} GB,"
                      f" {free / 1e9:.3f} GB are free; make room and start again, what was saved before is whole")
    model_path, state_path = paths(run_dir, step)
    save_file({**state, "step": step}, state_path)
    save_file({**model_contents, "step": step}, model_path)


def prune(run_dir, keep_last, best=None):
    """Removes all but the newest keep_last saved steps and step best, and what a killed process left of older ones."""
    steps = saved_steps(run_dir)
    kept = {*steps[-keep_last:], best}
    for name in sorted(os.listdir(run_dir)):  # a model before its state: what is left must not look like a loss
        m = re.fullmatch(r"(model|state)_(\d+)\.pt(\.tmp)?", name)
        if m and steps and int(m[2]) not in kept and int(m[2]) < steps[-1]:
            os.remove(os.path.join(run_dir, name))


def set_aside(run_dir, step):
    """Renames the files of all models past step, and their states, to *.aside, and returns their old names: a run that
    goes on from step must not take them for its own newest ones. A state alone, which a kill in a save leaves, stays:
    nothing takes it for a checkpoint, and the run writes over it or prunes it."""
    newer = [path for s in sorted(steps_of(run_dir, "model")) if s > step
             for path in paths(run_dir, s) if os.path.exists(path)]
    for path in newer:
        os.replace(path, f"{path}.aside")
    return newer


@contextlib.contextmanager
def lock_run(run_dir):
    """Holds the run folder, made if need be, for this process; ValueError when a living process holds it already.

    The lock is the kernel's, on log.txt: it ends with the process however that ends. A folder of which nothing came is
    removed again.
    """
    log_dir, path = os.path.dirname(os.path.abspath(run_dir)), os.path.join(run_dir, "log.txt")
    first_run = not os.path.exists(log_dir)
    os.makedirs(run_dir, exist_ok=True)
    with open(path, "ab") as f:
        try:
            import fcntl  # not on Windows
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(f"{run_dir} is being trained by another process; wait for it or stop it, or choose another"
                             " --exp-name") from e
        except (ImportError, OSError) as e:  # some network file systems have no locks
            print(f"{run_dir} cannot be locked ({e}): take care to start no second run in it", flush=True)
        try:
            yield
        finally:
            if os.listdir(run_dir) == ["log.txt"] and os.path.getsize(path) == 0:
                shutil.rmtree(log_dir if first_run else run_dir)


# -----------------------------------------------------------------------------
# saving while training goes on

def snapshot(value):
    """value with every tensor in it copied to the CPU's memory, so that training may change the original meanwhile.

    Tensors that share their memory (the tied wte and lm_head) share it in the copy.
    """
    copies = {}

    def copy(v):
        if isinstance(v, torch.Tensor):
            key = (v.data_ptr(), v.shape, v.stride(), v.dtype) if v.numel() else id(v)
            if key not in copies:
                copies[key] = v.detach().to("cpu", copy=True)
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
    """A thread that writes while training goes on, one thing at a time; its errors are raised by the next call."""

    def __init__(self):
        self.executor, self.pending = ThreadPoolExecutor(1), None

    def start(self, function, *args):
        """Begins function(*args), after what is still being written."""
        self.wait()
        self.pending = self.executor.submit(function, *args)

    def check(self):
        """Raises the error that the thread met, if any."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self):
        """Waits until all is written; raises what went wrong."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


# -----------------------------------------------------------------------------
# going on

def check_weights(model, weights, source):
    """Raises ValueError, in one line, for weights that are not those of such a model, naming what does not fit."""
    ours = model.state_dict()
    wrong = sorted(ours.keys() ^ weights.keys())
    wrong += [f"{name} {tuple(weights[name].shape)} for {tuple(ours[name].shape)}"
              for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(f"the weights of {source} are of another shape than this model: {', '.join(wrong[:3])}"
                         f" ({len(wrong)} tensors in all)")


def load_pair(run_dir, step):
    """(model contents, state contents) of a step; ValueError or FileNotFoundError when they are no whole pair of it."""
    model, state = (load_file(path) for path in paths(run_dir, step))
    model_path, state_path = paths(run_dir, step)
    wanted = {"optimizers", "scaler", "loader", "rng", "log_bytes", "train_config"}
    for path, contents, keys in ((model_path, model, {"model", "config"}), (state_path, state, wanted)):
        if not isinstance(contents, dict) or not keys <= contents.keys() or contents.get("step") != step:
            raise ValueError(f"{path} is not the {os.path.basename(path)[:5]} file of step {step}")
    with torch.device("meta"):
        empty = GPT(GPTConfig(**model["config"]))
    check_weights(empty, model["model"], model_path)
    return model, state


def load_latest(run_dir):
    """(model contents, state contents, messages) of the newest step that loads, or None if nothing was ever saved.

    messages name the steps passed over and why. Raises ValueError when there are models and none of them loads with
    its state: starting anew would be a loss in silence.
    """
    messages = []
    # a state without its model is what a kill between the two leaves: no loss, unless the model was there once
    for step in sorted(steps_of(run_dir, "model") | steps_of(run_dir, "state"), reverse=True):
        try:
            return *load_pair(run_dir, step), messages
        except (ValueError, OSError, TypeError) as e:
            messages.append(f"passing over step {step}: {e}")
    if steps_of(run_dir, "model"):
        raise ValueError(f"no checkpoint in {run_dir} can be loaded ({'; '.join(messages)});"
                         " move the folder away to start anew")
    return None


# -----------------------------------------------------------------------------
# a model from anywhere

def load_weights(model, weights, source):
    """load_state_dict with check_weights' errors."""
    check_weights(model, weights, source)
    model.load_state_dict(weights)


def is_hf(source):
    """Whether a source is one of OpenAI's names, or a Hugging Face folder."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return source in PRETRAINED or any(os.path.isfile(os.path.join(source, name)) for name in names)


def model_file(source):
    """Path of the file that a run folder's newest model is in, or source itself if it is a file."""
    if os.path.isdir(source):
        steps = steps_of(source, "model")
        if not steps:
            raise FileNotFoundError(f"{source} holds no checkpoint, neither a run's model_*.pt nor Hugging Face's"
                                    " model.safetensors; train first, or name another folder")
        return paths(source, max(steps))[0]
    if not os.path.exists(source):
        raise FileNotFoundError(f"no checkpoint at {source}; give a run folder (log/...), a model_*.pt file, nanoGPT's"
                                f" ckpt.pt, llm.c's model_*.bin, a Hugging Face folder, or one of {', '.join(PRETRAINED)}")
    if source.endswith(".safetensors"):
        raise ValueError(f"{source} lacks its config.json; name the folder that holds both")
    return source


def read_model(source):
    """(GPTConfig, weights under our names, facts) from a run folder, a file of ours, build-nanogpt's, nanoGPT's or
    llm.c's, a name such as "gpt2-xl", or a Hugging Face folder.

    The weights are as stored, mostly memory-mapped. facts: "kind", "path", "step", "val_loss", None where unknown.
    """
    if is_hf(source):
        config, weights = read_hf(source)
        return config, our_names(weights), {"kind": "Hugging Face", "path": source, "step": None, "val_loss": None}
    path = model_file(source)
    if formats.is_llmc(path):
        return formats.read_llmc(path)
    with formats.allow_pickled_config():
        contents = load_file(path, mmap=True)
    return formats.read_pt(contents, path)


def load_model(source, device="cpu", block_size=None, dropout=None):
    """(GPT on device, in eval mode; {"path", "step", "val_loss"}, or {} where none is known) of what read_model takes.

    block_size keeps the first positions alone; dropout takes the place of the checkpoint's.
    """
    config, weights, facts = read_model(source)
    model = GPT.empty(config if dropout is None else replace(config, dropout=dropout))
    load_weights(model, weights, source)
    if block_size is not None:
        model.crop_block_size(block_size)
    known = facts["step"] is not None or facts["val_loss"] is not None
    return model.to(device).eval(), {name: facts[name] for name in ("path", "step", "val_loss")} if known else {}


# -----------------------------------------------------------------------------
# command line

def describe(source):
    """What a checkpoint is, as the lines that `info` prints."""
    config, weights, facts = read_model(source)
    with torch.device("meta"):
        check_weights(GPT(config), weights, source)
    tensors = [tensor for name, tensor in weights.items() if name != "lm_head.weight"]  # which is wte
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    count, size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
    padding = config.vocab_size - NUM_TOKENS
    vocab = "GPT-2's" if padding == 0 else f"GPT-2's {NUM_TOKENS}, padded" if 0 < padding < 1024 else "not GPT-2's"
    lines = {"kind": f"a checkpoint of {facts['kind']}",
             "model": f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, context {config.block_size},"
                      f" {'with' if config.bias else 'without'} biases",
             "parameters": f"{count:,}, {dtypes}, {size / 1e6:,.1f} MB", "vocabulary": f"{config.vocab_size} ({vocab})",
             "step": facts["step"], "val loss": facts["val_loss"]}
    return "\n".join([facts["path"], *(f"  {name:<11} {value}" for name, value in lines.items() if value is not None)])


def convert(source, out, dtype, overwrite, folder):
    """Writes source's model to out, whole or not at all; a Hugging Face folder if asked for, or if out has no known suffix."""
    suffix = "" if folder else os.path.splitext(out)[1]
    if suffix == ".safetensors":
        raise ValueError(f"{out}: give a folder, which also gets config.json and the tokenizer; or a .pt or .bin file")
    if os.path.isdir(out) and steps_of(out, "model"):
        raise ValueError(f"{out} is a run folder, whose config.json would be lost; name another one")
    if (os.path.isfile(out) or os.path.isdir(out) and os.listdir(out)) and not overwrite:
        raise ValueError(f"{out} is there already; --overwrite replaces it")
    model, info = load_model(source)
    if suffix == ".pt":
        if dtype != "float32":
            raise ValueError(f"--dtype {dtype}: our own files are float32; llm.c's .bin and Hugging Face folders have bfloat16")
        save_file({**contents_of(model, info.get("val_loss")), "step": info.get("step")}, out)
    elif suffix == ".bin":
        save_file(model, out, lambda model, f: formats.write_llmc(model, f, dtype))
    else:
        huggingface.write_folder(model, out, dtype, info)
    print(f"wrote {out}: {model.num_params():,} parameters, {dtype}")


def main():
    parser = ArgumentParser(description="What a checkpoint is, and what else it can be.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | export | convert")
    takes = "run folder, file (ours, build-nanogpt's, nanoGPT's, llm.c's), Hugging Face folder, or gpt2 ... gpt2-xl"
    info = commands.add_parser("info", help="print what a checkpoint is", allow_abbrev=False)
    info.add_argument("source", help=takes)
    export = commands.add_parser("export", help="write a Hugging Face folder", allow_abbrev=False)
    converter = commands.add_parser("convert", help="write another format", allow_abbrev=False)
    for command, out in ((export, "folder to make"), (converter, "X.pt (ours), X.bin (llm.c), or a Hugging Face folder")):
        command.add_argument("source", help=takes)
        command.add_argument("out", help=out)
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default float32)")
        command.add_argument("--overwrite", action="store_true", help="replace what is at out")
    export.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the Hugging Face Hub")
    args = parser.parse_args()
    if args.command == "info":
        print(describe(args.source))
        return
    if args.command == "export" and args.push:
        huggingface.check_token()
    convert(args.source, args.out, args.dtype, args.overwrite, args.command == "export")
    if args.command == "export" and args.push:
        print(f"pushed to {huggingface.push(args.out, args.push)}")


if __name__ == "__main__":
    run_main(main)
