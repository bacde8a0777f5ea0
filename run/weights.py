"""
Weights from any checkpoint, read safely: loading a file never runs code from it.

    model, info = load_model("log/shakespeare")      # a run folder, any of the files below, a Hugging Face folder, "gpt2"

    ours            model_00250.pt   see checkpoint.py
    build-nanogpt   model_19072.pt   {"model", "config": a pickled GPTConfig object, "step", "val_loss"}
    nanoGPT         ckpt.pt          {"model", "model_args": dict, "iter_num", "best_val_loss", "optimizer", ...}
    llm.c           model_*.bin      256 little-endian int32 (magic 20240326; version, 3 float32 or 5 bfloat16;
                                     max_seq_len, vocab_size, num_layers, num_heads, channels, padded_vocab_size; zeros),
                                     then the tensors in the order of llmc_names, Linear weights as (out, in)
    Hugging Face    config.json and model.safetensors, a folder or a repository on the Hub

Sources: https://github.com/karpathy/build-nanogpt (train_gpt2.py), https://github.com/karpathy/nanoGPT (train.py),
https://github.com/karpathy/llm.c (train_gpt2.py: write_model; train_gpt2.cuh),
https://huggingface.co/openai-community/gpt2 for Hugging Face's files.
"""
import json
import os
import re
import warnings
import zipfile
from dataclasses import fields, replace

import numpy as np
import torch

from model import GPT, GPTConfig, PRETRAINED
from run.files import check_regular
from run.folder import paths, steps_of
from run.runtime import DTYPES

# -----------------------------------------------------------------------------
# files of torch.save

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


# -----------------------------------------------------------------------------
# checks of what was read

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


# -----------------------------------------------------------------------------
# ours, build-nanogpt's, nanoGPT's

class PickledConfig:
    """What build-nanogpt's pickled GPTConfig is loaded as: an object with its fields and no code."""


def allow_pickled_config():
    """Context in which torch.load(weights_only=True) accepts the GPTConfig of the lecture's script, and no other class."""
    return torch.serialization.safe_globals([(PickledConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2")])


def config_of(values, path):
    """The GPTConfig of a dict from a file; ValueError for a field that is missing, unknown, or of another type."""
    allowed = {f.name for f in fields(GPTConfig)}
    if not isinstance(values, dict) or not values.keys() <= allowed:
        unknown = f"; it has {', '.join(sorted(map(str, values.keys() - allowed)))[:80]}" if isinstance(values, dict) else ""
        raise ValueError(f"the config in {path} is not a GPTConfig, whose fields are {', '.join(sorted(allowed))}{unknown}")
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if name not in values:
            raise ValueError(f"the config in {path} lacks {name}")
    try:
        return GPTConfig(**values)
    except ValueError as e:
        raise ValueError(f"the config in {path} is invalid: {e}") from e


def read_pt(contents, path):
    """read_model's result for a file of ours, build-nanogpt's or nanoGPT's, from its contents; ValueError for others."""
    contents = contents if isinstance(contents, dict) else {}
    if "model" not in contents or not contents.keys() & {"config", "model_args"}:
        raise ValueError(f'{path} is not a model checkpoint: it lacks "model" and "config" (model_*.pt of a run) or'
                         ' "model_args" (nanoGPT)')
    if "model_args" in contents:
        kind, config, step, val_loss = "nanoGPT", contents["model_args"], "iter_num", "best_val_loss"
    else:
        kind, config, step, val_loss = "this project", contents["config"], "step", "val_loss"
    if isinstance(config, PickledConfig):
        kind, config = "build-nanogpt", vars(config)
    weights = contents["model"]
    if not isinstance(weights, dict):
        raise ValueError(f'"model" in {path} is not a state dict')
    # torch.compile and DDP prefix the names; the lecture's attention has its causal mask as a buffer
    weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): tensor for name, tensor in weights.items()
               if not str(name).endswith(".attn.bias")}
    check_tensors(weights, path)
    try:
        tie_lm_head(weights)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    info = {"kind": kind, "path": path}
    for name, key, types in (("step", step, (int, type(None))), ("val_loss", val_loss, (int, float, type(None)))):
        value = contents.get(key)
        value = value.item() if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel() == 1 else value
        if type(value) not in types:
            raise ValueError(f'"{key}" in {path} is {value!r:.40}, expected a number')
        info[name] = value
    return config_of(config, path), weights, info


# -----------------------------------------------------------------------------
# llm.c

LLMC_MAGIC, LLMC_HEADER = 20240326, 256         # the header's length in int32
LLMC_VERSIONS = {3: "float32", 5: "bfloat16"}   # both with a padded vocabulary


def llmc_names(n_layer):
    """Our names of the tensors of a model_*.bin, in its order: each kind of tensor over all layers."""
    kinds = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")]
    return ["transformer.wte.weight", "transformer.wpe.weight",
            *(f"transformer.h.{i}.{kind}" for kind in kinds for i in range(n_layer)),
            "transformer.ln_f.weight", "transformer.ln_f.bias"]


def is_llmc(path):
    """Whether read_llmc reads a file: it starts with llm.c's magic, or is a .bin that torch.save (a zip) did not write."""
    with open(path, "rb") as f:
        start = f.read(4)
    return start == LLMC_MAGIC.to_bytes(4, "little") or path.endswith(".bin") and not start.startswith(b"PK")


def read_llmc(path):
    """read_model's result for a model_*.bin, memory-mapped; the padding rows of its vocabulary are skipped."""
    header = np.fromfile(path, dtype="<i4", count=LLMC_HEADER)
    if len(header) < LLMC_HEADER or header[0] != LLMC_MAGIC:
        raise ValueError(f"{path} is not an llm.c model: it starts with {header[:1].tolist()}, not {LLMC_MAGIC}"
                         " (20240520 is a shard of tokens, 20240327 a debug state)")
    if header[1] not in LLMC_VERSIONS:
        raise ValueError(f"{path} has version {header[1]} of llm.c's format; supported are 3 (float32) and 5 (bfloat16)")
    T, V, L, nh, C, rows = header[2:8].tolist()
    config = config_of(dict(block_size=T, vocab_size=V, n_layer=L, n_head=nh, n_embd=C), path)
    size = 4 if header[1] == 3 else 2  # bytes per value
    # wte, wpe, ln_f; per block 12 C x C of matrices, 9 C of their biases, 4 C of norms
    expected = 4 * LLMC_HEADER + size * (rows * C + T * C + 2 * C + L * (12 * C * C + 13 * C))
    if rows < V or expected != os.path.getsize(path):
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes; its header (padded_vocab_size {rows}) says"
                         f" {expected:,}: it is truncated or damaged")
    # mode c, copy on write: torch warns about read-only arrays
    flat = torch.from_numpy(np.memmap(path, dtype="<f4" if size == 4 else "<u2", mode="c", offset=4 * LLMC_HEADER))
    flat = flat if size == 4 else flat.view(torch.bfloat16)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    weights, offset = {}, 0
    for name in llmc_names(L):
        weights[name] = flat[offset:offset + shapes[name].numel()].view(shapes[name])
        offset += rows * C if name == "transformer.wte.weight" else shapes[name].numel()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return config, weights, {"kind": "llm.c", "path": path, "step": None, "val_loss": None}


# -----------------------------------------------------------------------------
# Hugging Face's names and files

HF_WEIGHTS = "model.safetensors"


def is_transposed(name):
    """Whether Hugging Face stores a parameter transposed: "h.0.attn.c_attn.weight" -> True."""
    # OpenAI's checkpoints use a "Conv1D" module, weight (in, out); a Linear's is (out, in)
    return name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")


def tie_lm_head(weights):
    """Adds the lm_head, which files may omit, to a state dict; ValueError if it is not wte."""
    if (wte := weights.get("transformer.wte.weight")) is None:
        return
    lm_head = weights.setdefault("lm_head.weight", wte)
    # bitwise, since NaN is not equal to itself
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (wte, lm_head)]
    if wte.shape != lm_head.shape or not torch.equal(*bits):
        raise ValueError("lm_head.weight and wte.weight differ (an untied lm_head): not a GPT-2")


def from_hf_names(hf_state_dict):
    """The state dict of a GPT2LMHeadModel or GPT2Model in our names and layouts, as views.

    Raises ValueError for an untied lm_head.
    """
    weights = {}
    for name, tensor in hf_state_dict.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks, which old files hold as buffers
        # OpenAI's files and GPT2Model's lack the prefix
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        weights[name] = tensor.t() if is_transposed(name) and tensor.dim() == 2 else tensor
    tie_lm_head(weights)
    return weights


def read_json(path, parse):
    """parse(contents) of a JSON file; ValueError names the file."""
    try:
        with open(path, encoding="utf-8") as f:
            return parse(json.load(f))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{path} is not the {os.path.basename(path)} of a GPT-2: {reason}") from e


def read_hf(name_or_folder):
    """(GPTConfig, state dict as stored, memory-mapped) of what GPT.from_pretrained takes."""
    import safetensors.torch
    config_path, names = hub_file(name_or_folder, "config.json"), ["model.safetensors"]
    config, weights = read_json(config_path, GPTConfig.from_hf), {}
    index = os.path.join(name_or_folder, "model.safetensors.index.json")  # of several files
    if os.path.isfile(index) and not os.path.isfile(os.path.join(name_or_folder, names[0])):
        names = read_json(index, lambda c: {os.path.basename(f) for f in c["weight_map"].values()})
    for name in names:
        path = hub_file(name_or_folder, name)
        try:
            weights |= safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, KeyError) as e:  # KeyError: an unknown dtype
            raise ValueError(f"{path} is truncated or damaged ({e}); download it again") from e
    if config.num_params() > (n := sum(tensor.numel() for tensor in weights.values())):
        raise ValueError(f"{config_path} says {config.num_params():,} parameters, the file {n:,}")
    return config, weights


def hub_file(name_or_folder, filename):
    """Path of a file in a local folder, or of a Hub repository's file in the Hub's cache."""
    if os.path.isdir(name_or_folder):
        path = os.path.join(name_or_folder, filename)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name_or_folder} has no {filename}; a Hugging Face folder"
                                    " has config.json and model.safetensors")
        return path
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    repo = name_or_folder if "/" in name_or_folder else f"openai-community/{name_or_folder}"
    unreachable = None
    try:
        # a single request: hf_hub_download retries for 24 seconds before it reports no connection
        get_hf_file_metadata(hf_hub_url(repo, filename))
    except (OSError, ValueError):
        pass  # the Hub answered, or offline mode is on: hf_hub_download handles both
    except Exception as e:  # its HTTP library's own class: no connection, so use the cache
        unreachable = e
    try:
        return hf_hub_download(repo, filename, local_files_only=unreachable is not None)
    except (OSError, ValueError) as e:  # every error of huggingface_hub is one of the two
        why = str(unreachable or e).strip().splitlines()[0]
        raise FileNotFoundError(f"could not get {filename} from {constants.ENDPOINT}/{repo}:"
                                f" {why}. Without internet, name a local folder of it") from e


# -----------------------------------------------------------------------------
# a model from any source

def is_hf(source):
    """Whether a source is one of OpenAI's models, by name or by its repository on the Hub, or a Hugging Face folder."""
    names = (HF_WEIGHTS, f"{HF_WEIGHTS}.index.json")
    named = source.removeprefix("openai-community/") in PRETRAINED
    return named or any(os.path.isfile(os.path.join(source, name)) for name in names)


def model_file(source):
    """Path of a run folder's newest model file, or source itself if it is a file."""
    if os.path.isdir(source):
        steps = steps_of(source, "model")
        if not steps:
            raise FileNotFoundError(f"{source} holds no checkpoint, neither a run's model_*.pt nor Hugging Face's"
                                    " model.safetensors; train first, or name another folder")
        return paths(source, max(steps))[0]
    if not os.path.exists(source):
        raise FileNotFoundError(f"no checkpoint at {source}; give a run folder (log/...), a model_*.pt file, nanoGPT's"
                                f" ckpt.pt, llm.c's model_*.bin, a Hugging Face folder, or one of {', '.join(PRETRAINED)};"
                                " download other models: hf download USER/NAME --local-dir FOLDER")
    check_regular(source)
    if source.endswith(".safetensors"):
        raise ValueError(f"{source} lacks its config.json; name the folder that holds both")
    return source


def read_model(source):
    """(GPTConfig, state dict under our names, {"kind", "path", "step", "val_loss"}) of what load_model takes.

    The weights are as stored, mostly memory-mapped, and fit the config. "step" and "val_loss" are None if unknown.
    """
    if not source:
        raise ValueError("the name of the checkpoint is empty")
    path = source
    if is_hf(source):
        config, hf_state_dict = read_hf(source)
        try:
            weights = from_hf_names(hf_state_dict)
        except ValueError as e:
            raise ValueError(f"{source}: {e}") from e
        info = {"kind": "Hugging Face", "path": source, "step": None, "val_loss": None}
    elif is_llmc(path := model_file(source)):
        config, weights, info = read_llmc(path)
    else:
        with allow_pickled_config():
            contents = load_file(path, mmap=True)
        config, weights, info = read_pt(contents, path)
    check_weights(config, weights, path)
    return config, weights, info


def load_model(source, device="cpu", block_size=None, dropout=None):
    """(GPT on device, in eval mode; {"path", "step", "val_loss"}, or {} if unknown) of a run folder, a file of any format
    at the top of this module, a Hugging Face folder, or one of OpenAI's names, such as "gpt2-xl".

    block_size: keep the first positions only. dropout: replaces the checkpoint's. ValueError for NaN or infinite weights.
    """
    config, weights, info = read_model(source)
    model = GPT.empty(config if dropout is None else replace(config, dropout=dropout))
    model.load_state_dict(weights)
    check_finite(model, info["path"])
    if block_size is not None:
        model.crop_block_size(block_size)
    known = info["step"] is not None or info["val_loss"] is not None
    return model.to(device).eval(), {name: info[name] for name in ("path", "step", "val_loss")} if known else {}
