"""
Reads and writes models in other projects' formats; load_model reads all of them.

    python convert.py info FILE_OR_FOLDER            # prints what it is
    python convert.py export RUN_OR_FILE OUT_DIR     # writes a Hugging Face folder; --dtype bfloat16, --push USER/NAME
    python convert.py convert IN OUT                 # OUT: model.pt (ours), model.bin (llm.c), or a Hugging Face folder

    model, info = load_model("log/shakespeare")      # a run folder, any of the files below, a Hugging Face folder, "gpt2"

    ours            model_00250.pt   see checkpoint.py
    build-nanogpt   model_19072.pt   {"model", "config": a pickled GPTConfig object, "step", "val_loss"}
    nanoGPT         ckpt.pt          {"model", "model_args": dict, "iter_num", "best_val_loss", "optimizer", ...}
    llm.c           model_*.bin      256 little-endian int32 (magic 20240326; version, 3 float32 or 5 bfloat16;
                                     max_seq_len, vocab_size, num_layers, num_heads, channels, padded_vocab_size; zeros),
                                     then the tensors in the order of llmc_names, Linear weights as (out, in)
    Hugging Face    config.json, generation_config.json   of GPT2LMHeadModel
                    model.safetensors                     float32 or bfloat16, 50257 tokens, without the tied lm_head
                    vocab.json, merges.txt                byte for byte OpenAI's encoder.json and vocab.bpe
                    tokenizer.json, tokenizer_config.json the same for the fast tokenizer
                    README.md                             the model card: sizes, settings and scores of the run

Loading runs no code from a file.

Sources: https://github.com/karpathy/build-nanogpt (train_gpt2.py), https://github.com/karpathy/nanoGPT (train.py),
https://github.com/karpathy/llm.c (train_gpt2.py: write_model; train_gpt2.cuh), https://github.com/openai/gpt-2
(src/encoder.py) for the tokenizer, https://huggingface.co/openai-community/gpt2 for Hugging Face's files.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports below, which take seconds, ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import os
import re
import shutil
import tempfile
from argparse import RawDescriptionHelpFormatter
from dataclasses import fields, replace

from cli import ArgumentParser, run_and_report, run_main


def parse_args():
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(description="Print what a checkpoint is, or write it in another format.",
                            formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | export | convert")
    takes = "run folder, file (ours, build-nanogpt's, nanoGPT's, llm.c's), Hugging Face folder, or gpt2 ... gpt2-xl"
    info = commands.add_parser("info", help="print what a checkpoint is")
    info.add_argument("source", help=takes)
    export = commands.add_parser("export", help="write a Hugging Face folder")
    converter = commands.add_parser("convert", help="write another format")
    for command, out in ((export, "folder to create"), (converter, "X.pt (ours), X.bin (llm.c), or a Hugging Face folder")):
        command.add_argument("source", help=takes)
        command.add_argument("out", help=out)
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                             help="dtype of the weights (default float32)")
        command.add_argument("--overwrite", action="store_true", help="replace an existing out")
    export.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the Hugging Face Hub")
    parser.epilog = "\n".join(command.format_help() for command in (info, export, converter))
    return parser.parse_args()


if __name__ == "__main__":
    run_and_report(parse_args)  # --help and an invalid flag end the process here: PyTorch takes a second to import

import numpy as np
import torch

import report
from checkpoint import check_finite, check_tensors, check_weights, load_file, model_contents, paths, save_file, steps_of
from config import PRETRAINED
from data import EOT, NUM_TOKENS, get_tokenizer
from files import check_output, check_regular, is_special
from model import GPT, GPTConfig, from_hf_names, read_hf, tie_lm_head

# -----------------------------------------------------------------------------
# torch.save's files: ours, build-nanogpt's, nanoGPT's

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


def write_llmc(model, f, dtype="float32"):
    """Writes a GPT as llm.c's model_*.bin to the open file f, in float32 or bfloat16, one tensor at a time.

    The vocabulary is cut to 50257 and padded with zero rows to a multiple of 128, as in llm.c; missing biases are zeros.
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


# -----------------------------------------------------------------------------
# Hugging Face: the tokenizer's files

ENDOFTEXT = "<|endoftext|>"


def bytes_to_unicode():
    """{byte: the character that represents it in vocab.json}: printable bytes themselves, the others 256, 257, ...

    vocab.json and merges.txt are text, split at whitespace: the space, 32, is "Ġ".
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def find_merge(token, ranks):
    """The two parts that byte-pair encoding merges last into a token: find_merge(b"the", ranks) -> [b"t", b"he"].

    All merges of a lower rank are applied, lowest first; two parts remain.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, i = min((ranks.get(parts[i] + parts[i + 1], NUM_TOKENS), i) for i in range(len(parts) - 1))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_files(block_size):
    """{file name: text} of the tokenizer's four files, from gpt2.tiktoken."""
    tokenizer, letters = get_tokenizer(), bytes_to_unicode()
    tokens = [tokenizer.decode_single_token_bytes(rank) for rank in range(EOT)]
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token):
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()} | {ENDOFTEXT: EOT}
    merges = [[spell(part) for part in find_merge(token, ranks)] for token in tokens[256:]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    fast = {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": EOT, "content": ENDOFTEXT, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True}],
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": {**byte_level, "trim_offsets": False},
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges}}
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": ENDOFTEXT,
              "add_prefix_space": False, "clean_up_tokenization_spaces": False, "errors": "replace",
              "model_max_length": block_size}
    return {"vocab.json": json.dumps(vocab), "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
            "tokenizer.json": json.dumps(fast, ensure_ascii=False), "tokenizer_config.json": json.dumps(config, indent=2)}


# -----------------------------------------------------------------------------
# Hugging Face: the model's files

WEIGHTS = "model.safetensors"
HF_FILES = ("README.md", "config.json", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
            "vocab.json")  # that write_hf writes beside the weights


def config_files(config, dtype):
    """{file name: text} of config.json and generation_config.json."""
    tokens = {"bos_token_id": EOT, "eos_token_id": EOT}
    model = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
             "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_positions": config.block_size,
             "n_ctx": config.block_size, "vocab_size": NUM_TOKENS, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
             "attn_pdrop": config.dropout, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout,
             "scale_attn_weights": True, "tie_word_embeddings": True, "use_cache": True, "dtype": dtype, **tokens}
    return {"config.json": json.dumps(model, indent=2), "generation_config.json": json.dumps(tokens, indent=2)}


def model_card(model, name, dtype, info):
    """README.md for the Hub. info is load_model's; settings and scores are read from the folder of its path."""
    config, scores = model.config, {}
    if info.get("val_loss") is not None:
        scores[report.SCORES["val"]] = f"{info['val_loss']:.4f}"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2", "---", f"# {name}", "",
             f"A GPT-2: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, a context of"
             f" {config.block_size} tokens, GPT-2's vocabulary of {NUM_TOKENS}; {model.num_params():,} parameters as trained,"
             f" stored in {dtype}." + ("" if config.bias else " It has no biases; the files hold zeros for them."), "",
             "```python", "from transformers import pipeline",
             'generate = pipeline("text-generation", model="PATH_OR_REPOSITORY")',
             'print(generate("Hello, I\'m a language model,", max_new_tokens=30)[0]["generated_text"])', "```", ""]
    if info.get("path"):
        lines += report.sections(os.path.dirname(info["path"]), info.get("step"), scores=scores)
    return "\n".join(lines)


def write_hf(model, folder, dtype="float32", info=None):
    """Writes a Hugging Face folder; its files appear when all of them are complete. dtype: "float32" or "bfloat16".

    Files of other names in an existing folder are kept. ValueError for a vocabulary smaller than GPT-2's.
    """
    from safetensors.torch import save_file as save_safetensors
    if model.config.vocab_size < NUM_TOKENS:
        raise ValueError(f"this model has a vocabulary of {model.config.vocab_size}, GPT-2's is {NUM_TOKENS}:"
                         " GPT-2's tokenizer does not fit it")
    folder = os.path.realpath(folder)
    name, where = os.path.basename(folder), folder if os.path.isdir(folder) else os.path.dirname(folder)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".tmp", dir=where) as private:
        temporary = os.path.join(private, name)
        os.mkdir(temporary)  # with the usual permissions, unlike private
        texts = {**config_files(model.config, dtype), **tokenizer_files(model.config.block_size),
                 "README.md": model_card(model, name, dtype, info or {})}
        for file, text in texts.items():
            with open(os.path.join(temporary, file), "w", encoding="utf-8", newline="\n") as f:
                f.write(text)
        weights = os.path.join(temporary, WEIGHTS)
        save_safetensors(model.hf_state_dict(NUM_TOKENS, getattr(torch, dtype)), weights, metadata={"format": "pt"})
        shutil.copymode(os.path.join(temporary, "config.json"), weights)  # safetensors creates it unreadable for others
        for file in os.listdir(temporary):
            with open(os.path.join(temporary, file), "rb+") as f:
                os.fsync(f.fileno())
        if not os.path.exists(folder):
            os.rename(temporary, folder)
        else:
            for file in sorted(os.listdir(temporary)):
                os.replace(os.path.join(temporary, file), os.path.join(folder, file))


def check_push(repo):
    """Raises ValueError without a Hugging Face token to push with, or for an invalid name of a repository."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id
    validate_repo_id(repo)
    if get_token() is None:
        raise ValueError("--push needs a Hugging Face token with write access: run `hf auth login`, or set HF_TOKEN")


def push(folder, repo):
    """Uploads folder to the model repository repo ("user/name"), created if it does not exist; returns its URL."""
    from huggingface_hub import HfApi
    try:
        url = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload GPT-2")
    except Exception as e:  # the errors of its HTTP library are neither OSError nor ValueError
        raise OSError(f"could not push to {repo}: {str(e).strip().splitlines()[0]}; the files are in {folder}") from e
    return url


# -----------------------------------------------------------------------------
# a model from any source

def is_hf(source):
    """Whether a source is one of OpenAI's models, by name or by its repository on the Hub, or a Hugging Face folder."""
    names = (WEIGHTS, f"{WEIGHTS}.index.json")
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


# -----------------------------------------------------------------------------
# the command

def describe(source):
    """The lines that `info` prints."""
    config, weights, info = read_model(source)
    tensors = [tensor for name, tensor in weights.items() if name != "lm_head.weight"]  # tied to wte
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    count, size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
    padding = config.vocab_size - NUM_TOKENS
    vocab = "GPT-2's" if padding == 0 else f"GPT-2's {NUM_TOKENS}, padded" if 0 < padding < 1024 else "not GPT-2's"
    lines = {"kind": f"a checkpoint of {info['kind']}",
             "model": f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, context {config.block_size},"
                      f" {'with' if config.bias else 'without'} biases",
             "parameters": f"{count:,}, {dtypes}, {size / 1e6:,.1f} MB", "vocabulary": f"{config.vocab_size} ({vocab})",
             "step": info["step"], "val loss": info["val_loss"] and f"{info['val_loss']:.4f}"}
    return "\n".join([info["path"], *(f"  {name:<11} {value}" for name, value in lines.items() if value is not None)])


def check_out(source, out, dtype, overwrite, folder):
    """The format to write: ".pt", ".bin", or "" for a folder; ValueError if it may not be written to out.

    Without overwrite nothing is replaced; with it, a file of that format, or the files of export in a folder that export wrote.
    """
    suffix = "" if out.endswith("/") or os.path.isdir(out) else os.path.splitext(out)[1]
    if suffix == ".safetensors":
        raise ValueError(f"{out}: give a folder, which also gets config.json and the tokenizer; or a .pt or .bin file")
    if re.match(r"\.[A-Za-z]", suffix) and (folder or suffix not in (".pt", ".bin")):
        raise ValueError(f"{out}: {suffix} is not a format to write; give {'' if folder else 'X.pt, X.bin, or '}a folder, with"
                         " / at its end if its name has a dot")
    suffix = suffix if suffix in (".pt", ".bin") else ""
    if suffix == ".pt" and dtype != "float32":
        raise ValueError(f"--dtype {dtype}: our own files are float32; llm.c's .bin and Hugging Face folders have bfloat16")
    if not suffix and is_special(out):  # before realpath, which invents a path for a pipe
        raise ValueError(f"{out} is not a folder, which a Hugging Face model is; choose another name")
    path = os.path.realpath(out) if out else out  # what a symbolic link names is replaced, not the link
    present = os.listdir(path) if os.path.isdir(path) else []
    check_output(os.path.join(path, WEIGHTS) if os.path.isdir(path) else path)
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(source, path):
        raise ValueError(f"{out} is the source itself; choose another name")
    if steps_of(path, "model"):
        raise ValueError(f"{out} is a run folder, whose config.json would be lost; choose another folder")
    if re.fullmatch(r"(model|state)_\d+\.pt", os.path.basename(path)) and steps_of(os.path.dirname(path), "model"):
        raise ValueError(f"{out} would be a checkpoint of that run; choose another folder")
    if (present or os.path.isfile(path)) and not overwrite:
        raise ValueError(f"{out} exists already; --overwrite replaces it")
    if not suffix and os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"{out} is not a folder, which a Hugging Face model is; choose another name")
    if WEIGHTS not in present and (others := sorted({*present} & {*HF_FILES})):
        raise ValueError(f"{out} has a {others[0]} and no {WEIGHTS}: export did not write it; choose another folder")
    return suffix


def convert(source, out, dtype, overwrite, folder):
    """Writes source's model to out atomically: a Hugging Face folder if folder is true or out is neither a .pt nor a .bin."""
    suffix = check_out(source, out, dtype, overwrite, folder)
    model, info = load_model(source)
    vocab_size, bias = min(model.config.vocab_size, NUM_TOKENS), True
    if suffix == ".pt":
        save_file({**model_contents(model, info.get("val_loss")), "step": info.get("step")}, out)
        vocab_size, bias = model.config.vocab_size, model.config.bias
    elif suffix == ".bin":
        save_file(model, out, lambda model, f: write_llmc(model, f, dtype))
    else:
        write_hf(model, out, dtype, info)
    written = replace(model.config, vocab_size=vocab_size, bias=bias)  # other projects' formats have all biases
    print(f"wrote {out}: {written.num_params():,} parameters, {dtype}")


def main():
    args = parse_args()
    if args.command == "info":
        print(describe(args.source))
        return
    if args.command == "export" and args.push is not None:
        check_push(args.push)
    convert(args.source, args.out, args.dtype, args.overwrite, args.command == "export")
    if args.command == "export" and args.push is not None:
        print(f"pushed to {push(args.out, args.push)}")


if __name__ == "__main__":
    run_main(main)
