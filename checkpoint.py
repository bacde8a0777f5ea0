"""
Checkpoints: written whole or not at all, read without running code from them.

A run folder log/<exp-name>/ holds pairs of files. A step counts as saved when both are there and complete:

    model_00250.pt   {"model": state dict of raw_model (float32, CPU), "config": GPTConfig as a dict, "step": int,
                      "val_loss": float or None}: enough to sample and evaluate
    state_00250.pt   {"step": int, "optimizers": [state dict, ...], "scaler": state dict, "loader": state dict,
                      "rng": [state of each rank], "log_bytes": size of log.txt, "train_config": dict}: enough to go on

    model, info = load_model("log/shakespeare")     # or a model_*.pt, "gpt2", a Hugging Face folder
"""
import os
import pickle
import re
import zipfile
from dataclasses import asdict, fields

import torch

from model import GPT, GPTConfig, PRETRAINED

# -----------------------------------------------------------------------------
# one file

def save_file(contents, path):
    """torch.save under a temporary name, flushed to the disk, then renamed: path is never half a file.

    Raises OSError (a full disk, say) with nothing left behind and an older path untouched.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(contents, f)
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


def load_file(path):
    """The contents of a checkpoint file, on the CPU; ValueError for one that is cut short, damaged, or holds code."""
    try:
        check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True)
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


def steps_of(run_dir, kind):
    """Set of the steps for which there is a file of a kind, "model" or "state"."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    return {int(m[1]) for m in (re.fullmatch(rf"{kind}_(\d+)\.pt", name) for name in names) if m}


def saved_steps(run_dir):
    """Steps for which both files are there, ascending."""
    return sorted(steps_of(run_dir, "model") & steps_of(run_dir, "state"))


def save(run_dir, raw_model, step, val_loss, state, weights=None):
    """Writes the pair of files of a step. The state comes first: where there is a model file, its state is complete.

    weights: raw_model's state dict, where it is sharded and cannot say it alone.
    """
    model_path, state_path = paths(run_dir, step)
    weights = {name: tensor.detach().cpu() for name, tensor in (weights or raw_model.state_dict()).items()}
    save_file({**state, "step": step}, state_path)
    save_file({"model": weights, "config": asdict(raw_model.config), "step": step, "val_loss": val_loss}, model_path)


def prune(run_dir, keep_last):
    """Removes all but the newest keep_last saved steps, and what a killed process left of older ones."""
    kept = saved_steps(run_dir)[-keep_last:]
    for name in sorted(os.listdir(run_dir)):  # a model before its state: what is left must not look like a loss
        m = re.fullmatch(r"(model|state)_(\d+)\.pt(\.tmp)?", name)
        if m and kept and int(m[2]) not in kept and int(m[2]) < kept[-1]:
            os.remove(os.path.join(run_dir, name))


def load_latest(run_dir):
    """(model contents, state contents, messages) of the newest step that loads, or None if nothing was ever saved.

    messages name the steps passed over and why. Raises ValueError when there are models and none of them loads with
    its state: starting anew would be a loss in silence.
    """
    messages = []
    # a state without its model is what a kill between the two leaves: no loss, unless the model was there once
    for step in sorted(steps_of(run_dir, "model") | steps_of(run_dir, "state"), reverse=True):
        try:
            model, state = (load_file(path) for path in paths(run_dir, step))
            return model, state, messages
        except (ValueError, OSError) as e:
            messages.append(f"passing over step {step}: {e}")
    if steps_of(run_dir, "model"):
        raise ValueError(f"no checkpoint in {run_dir} can be loaded ({'; '.join(messages)});"
                         " move the folder away to start anew")
    return None


# -----------------------------------------------------------------------------
# a model from anywhere

def load_weights(model, weights, source):
    """load_state_dict with an error that names what does not fit, in one line."""
    ours = model.state_dict()
    wrong = sorted(ours.keys() ^ weights.keys())
    wrong += [f"{name} {tuple(weights[name].shape)} for {tuple(ours[name].shape)}"
              for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(f"the weights of {source} are of another shape than this model: {', '.join(wrong[:3])}"
                         f" ({len(wrong)} tensors in all)")
    model.load_state_dict(weights)


def load_model(source, device="cpu"):
    """(GPT on device, in eval mode; {"step", "val_loss"} where known) from a run folder, a model_*.pt file, a name
    such as "gpt2-xl", or a Hugging Face folder."""
    if source in PRETRAINED or os.path.isfile(os.path.join(source, "model.safetensors")):
        return GPT.from_pretrained(source).to(device).eval(), {}
    path = source
    if os.path.isdir(source):
        steps = steps_of(source, "model")
        if not steps:
            raise FileNotFoundError(f"{source} holds no checkpoint, neither a run's model_*.pt nor Hugging Face's"
                                    " model.safetensors; train first, or name another folder")
        path, _ = paths(source, max(steps))
    elif not os.path.exists(source):
        raise FileNotFoundError(f"no checkpoint at {source}; give a run folder (log/...), a model_*.pt file,"
                                f" a Hugging Face folder, or one of {', '.join(PRETRAINED)}")
    contents = load_file(path)
    if not isinstance(contents, dict) or not {"model", "config"} <= contents.keys():
        raise ValueError(f'{path} is no model checkpoint: it lacks "model" and "config"; a run\'s are called model_*.pt')
    names = {f.name for f in fields(GPTConfig)}
    if not isinstance(contents["config"], dict) or not contents["config"].keys() <= names:
        raise ValueError(f"the config in {path} is not a GPTConfig's; its fields are {', '.join(sorted(names))}")
    model = GPT(GPTConfig(**contents["config"]))
    load_weights(model, contents["model"], path)
    info = {"path": path, "step": contents.get("step"), "val_loss": contents.get("val_loss")}
    return model.to(device).eval(), info
