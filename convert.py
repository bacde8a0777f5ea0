"""
Writes models in other projects' formats; run/weights.py reads them.

    python convert.py info FILE_OR_FOLDER            # prints what it is
    python convert.py export RUN_OR_FILE OUT_DIR     # writes a Hugging Face folder; --dtype bfloat16, --push USER/NAME
    python convert.py convert IN OUT                 # OUT: model.pt (ours), model.bin (llm.c), or a Hugging Face folder

    Hugging Face    config.json, generation_config.json   of GPT2LMHeadModel
                    model.safetensors                     float32 or bfloat16, 50257 tokens, without the tied lm_head
                    vocab.json, merges.txt                byte for byte OpenAI's encoder.json and vocab.bpe
                    tokenizer.json, tokenizer_config.json the same for the fast tokenizer
                    README.md                             the model card: sizes and scores

Sources: https://github.com/openai/gpt-2 (src/encoder.py) for the tokenizer, https://huggingface.co/openai-community/gpt2 for
Hugging Face's files; those of the other formats are in run/weights.py.
"""
import json
import os
import re
import shutil
import tempfile
from argparse import RawDescriptionHelpFormatter
from dataclasses import replace

from run.cli import ArgumentParser, run_main, start


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
    start(parse_args)

import numpy as np
import torch

from data import EOT, NUM_TOKENS, get_tokenizer
from run.checkpoint import model_contents, save_file
from run.files import check_output, is_special
from run.folder import read_log, steps_of
from run.weights import (HF_WEIGHTS, LLMC_HEADER, LLMC_MAGIC, LLMC_VERSIONS, is_transposed, llmc_names, load_model, read_model)

# -----------------------------------------------------------------------------
# llm.c


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


# streams of log.txt that the model card lists
SCORES = {"val": "validation loss (nats per token)", "val_bpb": "validation loss (bits per byte)",
          "hella": "HellaSwag acc_norm, completion style", "hella_lm_eval": "HellaSwag acc_norm, lm-evaluation-harness style"}


def scores_of(run_dir, step):
    """{name: score} of the last evaluations up to a step in a run's log.txt; {} without the file."""
    path, scores = os.path.join(run_dir, "log.txt"), {}
    log = read_log(path) if os.path.isfile(path) else {}
    for stream, name in SCORES.items():
        values = [value for at, value in log.get(stream, []) if step is None or at <= step]
        if values:
            scores[name] = values[-1]
    return scores


def model_card(model, name, dtype, info):
    """README.md for the Hub. info is load_model's; scores are read from the folder of its path."""
    config = model.config
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2", "---", f"# {name}", "",
             f"A GPT-2: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, a context of"
             f" {config.block_size} tokens, GPT-2's vocabulary of {NUM_TOKENS}; {model.num_params():,} parameters as trained,"
             f" stored in {dtype}." + ("" if config.bias else " It has no biases; the files hold zeros for them."), "",
             "```python", "from transformers import pipeline",
             'generate = pipeline("text-generation", model="PATH_OR_REPOSITORY")',
             'print(generate("Hello, I\'m a language model,", max_new_tokens=30)[0]["generated_text"])', "```", ""]
    scores = scores_of(os.path.dirname(info["path"]), info.get("step")) if info.get("path") else {}
    if info.get("val_loss") is not None:
        scores[SCORES["val"]] = info["val_loss"]
    if scores:
        lines += ["## Scores", "", "| | |", "| --- | --- |", *(f"| {name} | {value:.4f} |" for name, value in scores.items()), ""]
    return "\n".join(lines)


def hf_state_dict(model, vocab_size=50257, dtype=None):
    """The state dict of a GPT2LMHeadModel with these weights, wte cut to vocab_size rows.

    dtype: a torch.dtype, default that of the weights. The tied lm_head is omitted, as in
    Hugging Face's files. Tensors of the same layout and dtype share memory with the model.
    """
    state_dict = {}
    for name, p in model.named_parameters():
        tensor = p.detach().to(dtype or p.dtype)
        state_dict[name] = tensor.t().contiguous() if is_transposed(name) else tensor
        if not model.config.bias and name.split(".")[1] not in ("wte", "wpe"):
            # Hugging Face's GPT-2 always has biases
            state_dict[name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))
    state_dict["transformer.wte.weight"] = state_dict["transformer.wte.weight"][:vocab_size]
    return state_dict


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
        weights = os.path.join(temporary, HF_WEIGHTS)
        save_safetensors(hf_state_dict(model, NUM_TOKENS, getattr(torch, dtype)), weights, metadata={"format": "pt"})
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
    check_output(os.path.join(path, HF_WEIGHTS) if os.path.isdir(path) else path)
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
    if HF_WEIGHTS not in present and (others := sorted({*present} & {*HF_FILES})):
        raise ValueError(f"{out} has a {others[0]} and no {HF_WEIGHTS}: export did not write it; choose another folder")
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
