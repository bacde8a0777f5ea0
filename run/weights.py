"""
Weights from any checkpoint, read safely: loading a file never runs code from it.

    model, info = load_model("log/shakespeare")   # a run, a file, a Hugging Face folder, or "gpt2"

    ours            model_00250.pt   see checkpoint.py
    build-nanogpt   model_19072.pt   {"model", "config": a pickled GPTConfig, "step", "val_loss"};
                                     its forks', too
    nanoGPT         ckpt.pt          {"model", "model_args": dict, "iter_num", "best_val_loss", ...}
    llm.c           model_*.bin      256 little-endian int32 (magic 20240326; version, 3 float32 or
                                     5 bfloat16; max_seq_len, vocab_size, num_layers, num_heads,
                                     channels, padded_vocab_size; zeros), then the tensors in the
                                     order of llmc_names, Linear weights as (out, in)
    Hugging Face    config.json and model.safetensors, or pytorch_model.bin; a folder, or a
                    repository on the Hub

Sources: https://github.com/karpathy/build-nanogpt (train_gpt2.py),
https://github.com/karpathy/nanoGPT (train.py), https://github.com/karpathy/llm.c (train_gpt2.py:
write_model; train_gpt2.cuh), https://huggingface.co/openai-community/gpt2 for Hugging Face's files.
"""
import json
import os
import re
import sys
import zipfile
from dataclasses import replace

import numpy as np
import torch

from model import GPT, GPTConfig, PRETRAINED
from run.cli import first_line, print0
from run.files import check_regular
from run.folder import paths, steps_of

# -----------------------------------------------------------------------------
# files of torch.save: ours, build-nanogpt's, nanoGPT's


def check_zip(path):
    """Raises BadZipFile for a torch.save file with a flipped bit.

    torch.load does not verify checksums.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # torch.save compresses nothing: an entry cannot be larger than its file. Nor does it
            # write folders (attribute 16), whose contents torch.load would not read.
            if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 16:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, or a folder")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


class PickledConfig:
    """What a pickled GPTConfig is loaded as: an object with its fields, no code."""


class PickledDtype:
    """What a pickled numpy.dtype is loaded as."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        self.code = state[1] + self.code  # the byte order, "<f8"


def pickled_scalar(dtype, contents):
    """What a pickled NumPy scalar is loaded as: an int, a float, a bool or a str."""
    return np.frombuffer(contents, dtype.code)[0].item()


class PickledArray:
    """What a pickled NumPy array is loaded as: nothing, its contents are not needed."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


def stand_ins(path):
    """[(what is loaded, name of what was pickled), ...]: the only names that a file may contain.

    pickle names a class by its module, which is any script's; the class itself is never imported.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    found = [(PickledConfig, name) for name in names if name.endswith(".GPTConfig")]
    found += [(PickledDtype, "numpy.dtype"), (PickledArray, "numpy.ndarray")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # the latter is NumPy 1's
        found += [(pickled_scalar, f"{module}.scalar"), (PickledArray, f"{module}._reconstruct")]
    return found


def load_file(path, mmap=False):
    """The contents of a torch.save file, on the CPU.

    mmap: leave the tensors in the file until they are read. Raises ValueError if the file is
    truncated, damaged, or contains code.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    check_regular(path)
    try:
        is_zip = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not
        if is_zip:
            check_zip(path)
        with torch.serialization.safe_globals(stand_ins(path) if is_zip else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as e:  # zipfile and torch raise almost anything for a damaged file
        code = re.search(r"GLOBAL (\S+)", str(e))
        if code:
            raise ValueError(f"cannot load {path}: it contains {code[1]}, not only tensors and"
                             " plain values, and could run code") from e
        raise ValueError(f"cannot load {path}: it is truncated, damaged or not a checkpoint"
                         f" ({first_line(e)})") from e


def config_of(values, path):
    """The GPTConfig of a dict from a file; ValueError for an invalid field. Others are ignored."""
    try:
        fields = {name: values[name] for name in GPTConfig.__dataclass_fields__ if name in values}
        config = GPTConfig(**fields)
    except (TypeError, ValueError) as e:
        raise ValueError(f"the config in {path} is not of a GPT-2: {e}") from e
    others = [str(name) for name in values if name not in fields]
    if others:
        print0(f"{path}: ignoring fields of its config that GPT-2 lacks: {', '.join(others)}",
               file=sys.stderr)
    return config


def read_pt(path):
    """(GPTConfig, state dict, {"kind", "step", "val_loss"}) of a file of torch.save."""
    contents = load_file(path, mmap=True)
    is_model = isinstance(contents, dict) and isinstance(contents.get("model"), dict)
    if not is_model or not {"config", "model_args"} & contents.keys():
        raise ValueError(f'{path} is not a model checkpoint: it lacks "model" and "config"'
                         ' (model_*.pt of a run) or "model_args" (nanoGPT)')
    kind = "this project"
    config, step, val_loss = (contents.get(name) for name in ("config", "step", "val_loss"))
    if isinstance(config, PickledConfig):
        kind = "build-nanogpt"
        config = vars(config)
    if "model_args" in contents:  # beside "config", the settings of the run
        kind = "nanoGPT"
        config = contents["model_args"]
        step, val_loss = contents.get("iter_num"), contents.get("best_val_loss")
    if isinstance(val_loss, torch.Tensor):  # nanoGPT's
        val_loss = val_loss.item()
    weights = {}
    for name, tensor in contents["model"].items():
        if not name.endswith(".attn.bias"):  # the causal mask, a buffer in the lecture's attention
            # torch.compile and DDP prefix the names
            weights[re.sub(r"^(_orig_mod\.|module\.)+", "", name)] = tensor
    info = {"kind": kind, "step": step, "val_loss": val_loss}
    return config_of(config, path), tie_lm_head(weights, path), info


# -----------------------------------------------------------------------------
# llm.c

LLMC_MAGIC = 20240326
LLMC_HEADER = 256                               # length in int32
LLMC_VERSIONS = {3: "float32", 5: "bfloat16"}   # both with a padded vocabulary


def llmc_names(n_layer):
    """Our names of the tensors of a model_*.bin, in its order: each kind over all layers."""
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{i}.{module}.{kind}" for i in range(n_layer)]
    return [*names, "transformer.ln_f.weight", "transformer.ln_f.bias"]


def read_llmc(path):
    """(GPTConfig, state dict, {"kind"}) of a model_*.bin, without its padding rows."""
    header = np.fromfile(path, dtype="<i4", count=LLMC_HEADER)
    if len(header) < LLMC_HEADER or header[0] != LLMC_MAGIC:
        raise ValueError(f"{path} is not an llm.c model: it starts with {header[:1].tolist()}, not"
                         f" {LLMC_MAGIC} (20240520 is a shard of tokens, 20240327 a debug state)")
    version, T, V, L, nh, C, padded_V = header[1:8].tolist()
    if version not in LLMC_VERSIONS:
        raise ValueError(f"{path} has version {version} of llm.c's format; supported are"
                         " 3 (float32) and 5 (bfloat16)")
    shape = dict(block_size=T, vocab_size=V, n_layer=L, n_head=nh, n_embd=C)
    config = config_of(shape, path)
    dtype = getattr(torch, LLMC_VERSIONS[version])
    padding = max(padded_V - V, 0) * C   # values
    expected = 4 * LLMC_HEADER + dtype.itemsize * (config.num_params() + padding)
    if os.path.getsize(path) != expected:
        raise ValueError(f"{path} is truncated or damaged: expected {expected:,} bytes, found"
                         f" {os.path.getsize(path):,}")
    # memory-mapped; mode c, copy on write: torch warns about read-only arrays
    values = torch.from_numpy(np.memmap(path, mode="c", offset=4 * LLMC_HEADER)).view(dtype)
    with torch.device("meta"):  # for the shapes
        params = dict(GPT(config).named_parameters())
    weights = {}
    offset = 0
    for name in llmc_names(L):
        size = params[name].numel()
        weights[name] = values[offset:offset + size].view(params[name].shape)
        offset += size
        if name == "transformer.wte.weight":
            offset += padding
    return config, tie_lm_head(weights, path), {"kind": "llm.c"}


# -----------------------------------------------------------------------------
# Hugging Face's names and files

HF_WEIGHTS = "model.safetensors"
# in the order in which transformers looks for them; an index is of weights in several files
HF_FILES = [HF_WEIGHTS, f"{HF_WEIGHTS}.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json"]


def hf_files(folder):
    """Those of HF_FILES that a folder has; [] for another source."""
    return [name for name in HF_FILES if os.path.isfile(os.path.join(folder, name))]


def is_transposed(name):
    """Whether Hugging Face stores a parameter transposed: "h.0.attn.c_attn.weight" -> True."""
    # OpenAI's checkpoints use a "Conv1D" module, weight (in, out); a Linear's is (out, in)
    return name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")


def tie_lm_head(weights, source):
    """weights with wte and the lm_head, of which files may omit one; ValueError if they differ."""
    names = ("transformer.wte.weight", "lm_head.weight")
    found = [weights[name] for name in names if name in weights]
    if not found:
        return weights  # check_weights names what is missing
    found.sort(key=lambda tensor: tensor.itemsize)  # one of the two may be rounded
    rounded = found[-1].to(found[0].dtype)
    # as bytes, because NaN is not equal to itself
    if not torch.equal(found[0].view(torch.uint8), rounded.view(torch.uint8)):
        raise ValueError(f"lm_head.weight and wte.weight of {source} differ (an untied lm_head):"
                         " not a GPT-2")
    return {**weights, **dict.fromkeys(names, found[-1])}


def from_hf_names(hf_state_dict, source="the state dict"):
    """The state dict of a GPT2LMHeadModel or GPT2Model in our names and layouts, as views.

    Raises ValueError for an untied lm_head.
    """
    weights = {}
    lacks_prefix = not any(name.startswith("transformer.") for name in hf_state_dict)
    for name, tensor in hf_state_dict.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks, which old files hold as buffers
        if lacks_prefix and name != "lm_head.weight":  # OpenAI's files and GPT2Model's
            name = f"transformer.{name}"
        weights[name] = tensor.t() if is_transposed(name) else tensor
    return tie_lm_head(weights, source)


def read_json(path, parse):
    """parse(contents) of a JSON file; ValueError names the file."""
    try:
        with open(path, encoding="utf-8") as f:
            return parse(json.load(f))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else e
        name = os.path.basename(path)
        raise ValueError(f"{path} is not the {name} of a GPT-2: {reason}") from e


def read_hf(name_or_folder):
    """(GPTConfig, state dict, {"kind"}) of a Hugging Face folder or a repository on the Hub."""
    import safetensors.torch
    config = read_json(hub_file(name_or_folder, "config.json"), GPTConfig.from_hf)
    names = hf_files(name_or_folder)[:1] or [HF_WEIGHTS]
    if names[0].endswith(".json"):
        index_path = hub_file(name_or_folder, names[0])
        names = read_json(index_path, lambda index: sorted(set(index["weight_map"].values())))
    weights = {}
    for name in names:
        path = hub_file(name_or_folder, name)
        try:
            if name.endswith(".bin"):
                weights |= load_file(path, mmap=True)
            else:
                weights |= safetensors.torch.load_file(path)
        # KeyError: an unknown dtype, TypeError: not a dict
        except (safetensors.SafetensorError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is truncated or damaged ({e}); download it again") from e
    return config, from_hf_names(weights, name_or_folder), {"kind": "Hugging Face"}


def hub_file(name_or_folder, filename):
    """Path of a file in a local folder, or of a Hub repository's file in the Hub's cache."""
    if os.path.isdir(name_or_folder):
        path = os.path.join(name_or_folder, filename)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name_or_folder} has no {filename}; a Hugging Face folder"
                                    " has config.json and model.safetensors")
        check_regular(path)
        return path
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    repo = name_or_folder
    if "/" not in repo:
        repo = f"openai-community/{repo}"
    connection_error = None
    try:
        # a single request: hf_hub_download retries for 24 seconds before it reports no connection
        get_hf_file_metadata(hf_hub_url(repo, filename))
    except (OSError, ValueError):
        pass  # the Hub answered, or offline mode is on: hf_hub_download handles both
    except Exception as e:  # its HTTP library's own class: no connection, so use the cache
        connection_error = e
    try:
        return hf_hub_download(repo, filename, local_files_only=connection_error is not None)
    except (OSError, ValueError) as e:  # every error of huggingface_hub is one of the two
        reason = first_line(connection_error or e)
        raise FileNotFoundError(f"could not get {filename} from {constants.ENDPOINT}/{repo}:"
                                f" {reason}. Without internet, name a local folder of it") from e


# -----------------------------------------------------------------------------
# a model from any source


def model_file(source):
    """Path of a run folder's newest model file, or source itself if it is a file."""
    if os.path.isdir(source):
        steps = steps_of(source, "model")
        if not steps:
            raise FileNotFoundError(f"{source} holds no checkpoint, neither a run's model_*.pt nor"
                                    " Hugging Face's model.safetensors; train first, or name"
                                    " another folder")
        return paths(source, max(steps))[0]
    if not os.path.exists(source):
        raise FileNotFoundError(f"no checkpoint at {source}; give a run folder (log/...), a"
                                " model_*.pt file, nanoGPT's ckpt.pt, llm.c's model_*.bin, a"
                                f" Hugging Face folder, or one of {', '.join(PRETRAINED)};"
                                " download other models: hf download USER/NAME --local-dir FOLDER")
    check_regular(source)
    if source.endswith(".safetensors") or os.path.basename(source).startswith("pytorch_model"):
        raise ValueError(f"{source} lacks its config.json; name the folder that holds both")
    return source


def check_weights(config, weights, path):
    """Raises ValueError, naming up to three tensors, unless weights fit a GPT of this config."""
    others = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{path} is not a state dict of a GPT-2: it has other values than tensors,"
                         f" {', '.join(others[:3])}")
    found = sum(t.numel() for t in weights.values())
    # a damaged config may describe a GPT that is too large even for the meta device
    if config.num_params() > 2 * found:
        raise ValueError(f"the weights of {path} do not fit this model: expected"
                         f" {config.num_params():,} parameters, found {found:,}")
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    hint = ""
    if any(".h." in name for name in wrong):  # not for a classifier's head, score.weight
        hint = "; the checkpoint may have another n_layer"
    for name in expected.keys() & weights.keys():
        if expected[name].shape != weights[name].shape:
            wrong.append(f"{name} {tuple(weights[name].shape)} for {tuple(expected[name].shape)}")
    if wrong:
        raise ValueError(f"the weights of {path} do not fit this model: {', '.join(wrong[:3])} are"
                         f" missing, unexpected or of another shape ({len(wrong)} in all){hint}")


def check_finite(model, path):
    """Raises ValueError, naming up to three tensors, if a weight is NaN or infinite."""
    # aminmax propagates NaN and makes no copy: 0.1 s for 124M parameters
    wrong = [name for name, p in model.named_parameters()
             if not all(bound.isfinite() for bound in p.detach().aminmax())]
    if wrong:
        raise ValueError(f"{path} has NaN or infinite weights: {', '.join(wrong[:3])}"
                         f" ({len(wrong)} tensors in all); use an earlier checkpoint, or download"
                         " it again")


def read_model(source):
    """(GPTConfig, state dict under our names, info) of what load_model takes.

    The weights are as stored, mostly memory-mapped, and fit the config. info is {"path", "step",
    "val_loss", "kind"}; the second and third are None if unknown.
    """
    if not source:
        raise ValueError("the name of the checkpoint is empty")
    if hf_files(source) or source.removeprefix("openai-community/") in PRETRAINED:
        path, read = source, read_hf
    else:
        path = model_file(source)
        read = read_llmc if path.endswith(".bin") else read_pt
    config, weights, info = read(path)
    check_weights(config, weights, path)
    return config, weights, {"path": path, "step": None, "val_loss": None, **info}


def load_model(source, device="cpu", block_size=None, dropout=None):
    """(GPT on device, in eval mode; {"path", "step", "val_loss"}, or {} if unknown).

    source: a run folder, a file of any format at the top of this module, a Hugging Face folder, or
    one of OpenAI's names, such as "gpt2-xl". block_size: keep the first positions only. dropout:
    replaces the checkpoint's. Raises ValueError for NaN or infinite weights.
    """
    config, weights, info = read_model(source)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    model = GPT.empty(config)
    model.load_state_dict(weights)
    check_finite(model, info["path"])
    if block_size is not None:
        model.crop_block_size(block_size)
    model = model.to(device).eval()
    if info["step"] is None and info["val_loss"] is None:
        return model, {}
    return model, {name: info[name] for name in ("path", "step", "val_loss")}
