"""
Other projects' checkpoints under our names, and llm.c's written too. No reader runs code out of a file.

    build-nanogpt   model_19072.pt   {"model", "config": a pickled GPTConfig object, "step", "val_loss"}
    nanoGPT         ckpt.pt          {"model", "model_args": dict, "iter_num", "best_val_loss", "optimizer", ...}
    llm.c           model_*.bin      256 little-endian int32 (magic 20240326; version, 3 float32 or 5 bfloat16;
                                     max_seq_len, vocab_size, num_layers, num_heads, channels, padded_vocab_size; zeros),
                                     then the tensors in the order of llmc_names, Linear weights as (out, in)

Each reader returns (GPTConfig, weights under our names, facts): facts has "kind", "path", "step", "val_loss".

Sources: https://github.com/karpathy/build-nanogpt (train_gpt2.py), https://github.com/karpathy/nanoGPT (train.py),
https://github.com/karpathy/llm.c (train_gpt2.py: write_model; train_gpt2.cuh).
"""
import os
import re
from dataclasses import fields

import numpy as np
import torch

from data import NUM_TOKENS
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# torch.save's files: ours, build-nanogpt's, nanoGPT's

class PickledConfig:
    """What build-nanogpt's pickled GPTConfig becomes: an object with its fields, and no code."""


def allow_pickled_config():
    """Context in which torch.load(weights_only=True) takes a GPTConfig object of the lecture's script, and no other class."""
    return torch.serialization.safe_globals([(PickledConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2")])


def config_of(values, path):
    """The GPTConfig of a dict out of a file; ValueError for a field that is missing, unknown, or of another type."""
    allowed = {f.name: (int, float) if f.type is float else f.type for f in fields(GPTConfig)}
    if not isinstance(values, dict) or not values.keys() <= allowed.keys():
        unknown = f"; it has {', '.join(sorted(map(str, values.keys() - allowed.keys())))}" if isinstance(values, dict) else ""
        raise ValueError(f"the config in {path} is not a GPTConfig's, whose fields are {', '.join(sorted(allowed))}{unknown}")
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if name not in values:
            raise ValueError(f"the config in {path} lacks {name}")
    for name, value in values.items():
        if not isinstance(value, allowed[name]):
            raise ValueError(f"the config in {path} has {name}={value!r}, which is no {allowed[name]}")
    try:
        return GPTConfig(**values)
    except ValueError as e:
        raise ValueError(f"the config in {path} is of no model: {e}") from e


def read_pt(contents, path):
    """Ours, build-nanogpt's or nanoGPT's, of what torch.load gave for path; ValueError for what is none of them."""
    contents = contents if isinstance(contents, dict) else {}
    if "model" not in contents or not contents.keys() & {"config", "model_args"}:
        raise ValueError(f'{path} is no model checkpoint: it lacks "model" and "config" (a run\'s are called model_*.pt) or'
                         ' "model_args" (nanoGPT)')
    if "model_args" in contents:
        kind, config, step, val_loss = "nanoGPT", contents["model_args"], "iter_num", "best_val_loss"
    else:
        kind, config, step, val_loss = "this project", contents["config"], "step", "val_loss"
    if isinstance(config, PickledConfig):
        kind, config = "build-nanogpt", vars(config)
    weights = contents["model"]
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f'"model" in {path} is no state dict')
    # prefixes that torch.compile and DDP leave
    weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}  # a causal mask
    wte = weights.get("transformer.wte.weight")
    if wte is not None and not torch.equal(weights.setdefault("lm_head.weight", wte), wte):
        raise ValueError(f"{path}: lm_head.weight and wte.weight differ; GPT-2 has one matrix for both, so this is not one")
    facts = {"kind": kind, "path": path}
    for name, value in (("step", contents.get(step)), ("val_loss", contents.get(val_loss))):
        facts[name] = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return config_of(config, path), weights, facts


# -----------------------------------------------------------------------------
# llm.c

LLMC_MAGIC, LLMC_HEADER = 20240326, 256         # the header's length in int32
LLMC_VERSIONS = {3: "float32", 5: "bfloat16"}   # both with a padded vocabulary


def llmc_names(n_layer):
    """The tensors of a model_*.bin in its order, under our names: within the blocks, each kind over all layers."""
    kinds = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")]
    return ["transformer.wte.weight", "transformer.wpe.weight",
            *(f"transformer.h.{i}.{kind}" for kind in kinds for i in range(n_layer)),
            "transformer.ln_f.weight", "transformer.ln_f.bias"]


def is_llmc(path):
    """Whether a file is to be read by read_llmc: a .bin that is not torch.save's (a zip)."""
    with open(path, "rb") as f:
        start = f.read(4)
    return start == LLMC_MAGIC.to_bytes(4, "little") or path.endswith(".bin") and not start.startswith(b"PK")


def read_llmc(path):
    """The model in a model_*.bin, memory-mapped; the rows past vocab_size, which llm.c never looks at, are left out."""
    header = np.fromfile(path, dtype="<i4", count=LLMC_HEADER)
    if len(header) < LLMC_HEADER or header[0] != LLMC_MAGIC:
        raise ValueError(f"{path} is no model of llm.c: it begins with {header[:1].tolist()}, not with {LLMC_MAGIC}"
                         " (20240520 begins a shard of tokens, 20240327 a debug state)")
    if header[1] not in LLMC_VERSIONS:
        raise ValueError(f"{path} has version {header[1]} of llm.c's format; 3 (float32) and 5 (bfloat16) can be read")
    T, V, L, nh, C, rows = header[2:8].tolist()
    config = config_of(dict(block_size=T, vocab_size=V, n_layer=L, n_head=nh, n_embd=C), path)
    size = 4 if header[1] == 3 else 2  # bytes a number
    # wte, wpe, ln_f, and in a block 12 C x C of matrices, 9 C of their biases, 4 C of norms
    expected = 4 * LLMC_HEADER + size * (rows * C + T * C + 2 * C + L * (12 * C * C + 13 * C))
    if rows < V or expected != os.path.getsize(path):
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes; its header (padded_vocab_size {rows}) says"
                         f" {expected:,}: it is cut short or damaged")
    # mode c: writes would stay in memory; torch warns of arrays that cannot be written
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


def write_llmc(model, f, dtype="float32"):
    """Writes a GPT as llm.c's model_*.bin (this file's docstring) to the open file f, in float32 or bfloat16.

    The vocabulary is cut to GPT-2's 50257 and padded with zero rows to a multiple of 128, as llm.c has it; a model
    without biases gets zeros. One tensor at a time is copied.
    """
    config, weights = model.config, {name: p.detach() for name, p in model.named_parameters()}
    V = min(config.vocab_size, NUM_TOKENS)
    rows = -(-V // 128) * 128
    header = np.zeros(LLMC_HEADER, dtype="<i4")
    version = next(version for version, name in LLMC_VERSIONS.items() if name == dtype)
    header[:8] = (LLMC_MAGIC, version, config.block_size, V, config.n_layer, config.n_head, config.n_embd, rows)
    f.write(header.tobytes())
    for name in llmc_names(config.n_layer):
        tensor = weights[name] if name in weights else torch.zeros(weights[name.removesuffix("bias") + "weight"].shape[0])
        if name == "transformer.wte.weight":
            tensor = torch.cat((tensor[:V], tensor.new_zeros(rows - V, config.n_embd)))
        tensor = tensor.to("cpu", getattr(torch, dtype)).contiguous()
        f.write(tensor.view(torch.uint8).numpy())
