"""
Writes models in other projects' formats; run/weights.py reads them.

    python convert.py info model.bin                       # prints what it is
    python convert.py export log/shakespeare my_model      # writes a Hugging Face folder
    python convert.py convert log/shakespeare model.bin    # X.pt (ours), X.bin (llm.c), or a folder

export and convert take --dtype bfloat16 and --overwrite. `hf upload USER/NAME my_model` uploads a
Hugging Face folder:

    config.json, generation_config.json    of GPT2LMHeadModel
    model.safetensors                      float32 or bfloat16, without padding and tied lm_head
    vocab.json, merges.txt                 byte for byte OpenAI's encoder.json and vocab.bpe
    tokenizer.json, tokenizer_config.json  the same for the fast tokenizer
    README.md                              the model card: sizes and scores

A Hugging Face folder's own tokenizer is copied instead (run/tokenizer.py). A model without one,
whose vocabulary is not GPT-2's, is exported without.

Sources: https://github.com/openai/gpt-2 (src/encoder.py) for the tokenizer,
https://huggingface.co/openai-community/gpt2 for Hugging Face's files; those of the other formats
are in run/weights.py.
"""
import contextlib
import json
import os
import sys

from run.cli import ArgumentParser, run_main, start


def parse_args():
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="info | export | convert")
    info = commands.add_parser("info", help="print what a checkpoint is")
    export = commands.add_parser("export", help="write a Hugging Face folder")
    converter = commands.add_parser("convert", help="write another format")
    for command in (info, export, converter):
        command.add_argument("source", help="run folder, file (ours, build-nanogpt's, nanoGPT's,"
                             " llm.c's), Hugging Face folder, or gpt2 ... gpt2-xl")
    export.add_argument("out", help="folder to create")
    converter.add_argument("out", help="X.pt (ours), X.bin (llm.c), or a Hugging Face folder")
    for command in (export, converter):
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                             help="dtype of the weights (default float32)")
        command.add_argument("--overwrite", action="store_true", help="replace existing files")
    helps = [command.format_help() for command in (info, export, converter)]
    parser.epilog = "\n".join([*helps, parser.epilog or ""])
    return parser.parse_args()


if __name__ == "__main__":
    start(parse_args)

import numpy as np
import torch

from data import EOT, NUM_TOKENS, get_tokenizer
from run.checkpoint import model_contents, save_file
from run.files import atomic_write
from run.folder import read_log
from run.tokenizer import (ENDOFTEXT, GPT2, GPT2_SIZES, TOKENIZER_FILES, Tokenizer,
                           find_tokenizer, gpt2_vocab)
from run.weights import (HF_WEIGHTS, LLMC_HEADER, LLMC_MAGIC, LLMC_VERSIONS, is_transposed,
                         llmc_names, load_model, read_model)

# -----------------------------------------------------------------------------
# llm.c


def write_llmc(model, f, dtype="float32"):
    """Writes a GPT as llm.c's model_*.bin to the open file f, in float32 or bfloat16.

    GPT-2's vocabulary, which may be padded, is cut to 50257; any is padded with zero rows to a
    multiple of 128, as in llm.c. Missing biases are zeros.
    """
    config = model.config
    params = {name: p.detach() for name, p in model.named_parameters()}
    versions = {name: version for version, name in LLMC_VERSIONS.items()}
    V = NUM_TOKENS if config.vocab_size in GPT2_SIZES else config.vocab_size
    padded_V = (V + 127) // 128 * 128
    header = np.zeros(LLMC_HEADER, dtype="<i4")
    header[:8] = (LLMC_MAGIC, versions[dtype], config.block_size, V, config.n_layer, config.n_head,
                  config.n_embd, padded_V)
    f.write(header.tobytes())
    for name in llmc_names(config.n_layer):
        if name in params:
            tensor = params[name]
        else:
            weight = params[name.removesuffix("bias") + "weight"]
            tensor = weight.new_zeros(len(weight))
        if name == "transformer.wte.weight":
            padding = tensor.new_zeros(padded_V - V, config.n_embd)
            tensor = torch.cat((tensor[:V], padding))
        tensor = tensor.to("cpu", getattr(torch, dtype)).contiguous()
        f.write(tensor.view(torch.uint8).numpy())


# -----------------------------------------------------------------------------
# Hugging Face: the tokenizer's files

def find_merge(token, ranks):
    """The two parts that byte-pair encoding merges last.

    Example: find_merge(b"the", ranks) -> [b"t", b"he"]. All merges of a lower rank are applied,
    lowest first; two parts remain.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        pair_ranks = [ranks.get(pair, NUM_TOKENS) for pair in pairs]
        i = pair_ranks.index(min(pair_ranks))
        parts[i:i + 2] = [pairs[i]]
    return parts


def tokenizer_files(block_size):
    """{file name: text} of the tokenizer's four files, from gpt2.tiktoken."""
    vocab = gpt2_vocab()
    spelling = {rank: token for token, rank in vocab.items()}
    tokens = [get_tokenizer().decode_single_token_bytes(rank) for rank in range(EOT)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:  # the first 256 are single bytes
        merges.append([spelling[ranks[part]] for part in find_merge(token, ranks)])
    merges_txt = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    endoftext = {"id": EOT, "content": ENDOFTEXT, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False, "special": True}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [endoftext],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT)
    config = {"tokenizer_class": "GPT2Tokenizer", **special_tokens, "add_prefix_space": False,
              "clean_up_tokenization_spaces": False, "errors": "replace",
              "model_max_length": block_size}
    return {
        "vocab.json": json.dumps(vocab),
        "merges.txt": merges_txt,
        "tokenizer.json": json.dumps(fast, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


# -----------------------------------------------------------------------------
# Hugging Face: the model's files


def config_files(config, dtype, tokenizer=GPT2):
    """{file name: text} of config.json and generation_config.json."""
    eot = tokenizer.eot if tokenizer.eot >= 0 else None
    tokens = {"bos_token_id": eot, "eos_token_id": eot}
    model = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),
        "vocab_size": tokenizer.num_tokens,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": dtype,
        **tokens,
    }
    return {"config.json": json.dumps(model, indent=2),
            "generation_config.json": json.dumps(tokens, indent=2)}


# streams of log.txt that the model card lists
SCORES = {
    "val": "validation loss (nats per token)",
    "val_bpb": "validation loss (bits per byte)",
    "hella": "HellaSwag acc_norm, completion style",
    "hella_lm_eval": "HellaSwag acc_norm, lm-evaluation-harness style",
}


def scores_of(run_dir, step):
    """{stream: score} of the last evaluations up to a step in a run's log.txt; {} without one."""
    path = os.path.join(run_dir, "log.txt")
    if not os.path.isfile(path):
        return {}
    log = read_log(path)
    scores = {}
    for stream in SCORES:
        for log_step, value in log.get(stream, []):
            if step is None or log_step <= step:
                scores[stream] = value
    return scores


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---
# {name}

A GPT-2: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, a context of \
{config.block_size} tokens, a vocabulary of {num_tokens}; {num_params:,} parameters as \
trained, stored in {dtype}.{biases}

```python
from transformers import pipeline
generate = pipeline("text-generation", model="PATH_OR_REPOSITORY")
print(generate("Hello, I'm a language model,", max_new_tokens=30)[0]["generated_text"])
```
"""


def model_card(model, name, dtype, info, num_tokens):
    """README.md for the Hub. info is load_model's; scores are read from the folder of its path."""
    biases = "" if model.config.bias else " It has no biases; the files hold zeros for them."
    card = CARD.format(name=name, config=model.config, num_tokens=num_tokens,
                       num_params=model.num_params(), dtype=dtype, biases=biases)
    scores = {}
    if info:
        scores = scores_of(os.path.dirname(info["path"]), info["step"])
        if info["val_loss"] is not None:
            scores["val"] = info["val_loss"]
    if scores:
        card += "\n## Scores\n\n| | |\n| --- | --- |\n"
        for stream, value in scores.items():
            card += f"| {SCORES[stream]} | {value:.4f} |\n"
    return card


def hf_state_dict(model, vocab_size=50257, dtype=None):
    """The state dict of a GPT2LMHeadModel with these weights, wte cut to vocab_size rows.

    dtype: a torch.dtype, default that of the weights. The tied lm_head is omitted, as in
    Hugging Face's files. Tensors of the same layout and dtype share memory with the model.
    """
    state_dict = {}
    for name, p in model.named_parameters():
        tensor = p.detach().to(dtype or p.dtype)
        if is_transposed(name):
            tensor = tensor.t().contiguous()
        if name == "transformer.wte.weight":
            tensor = tensor[:vocab_size]
        state_dict[name] = tensor
        is_embedding = name.split(".")[1] in ("wte", "wpe")
        if not model.config.bias and not is_embedding:  # Hugging Face's GPT-2 always has biases
            bias = name.removesuffix("weight") + "bias"
            state_dict[bias] = tensor.new_zeros(p.shape[0])
    return state_dict


def write_hf(model, folder, dtype="float32", info=None, tokenizer=GPT2):
    """Writes a Hugging Face folder. dtype: "float32" or "bfloat16"; info is load_model's.

    Other files in an existing folder are kept. Its files are replaced when all new ones are on
    disk; until its weights are, the folder has none, so that they always fit its config.json.
    """
    from safetensors.torch import save
    state_dict = hf_state_dict(model, tokenizer.num_tokens, getattr(torch, dtype))
    files = {HF_WEIGHTS: save(state_dict, metadata={"format": "pt"})}
    name = os.path.basename(os.path.abspath(folder))
    texts = {
        **config_files(model.config, dtype, tokenizer),
        "README.md": model_card(model, name, dtype, info, tokenizer.num_tokens),
    }
    if tokenizer.folder is None:
        texts |= tokenizer_files(model.config.block_size)
    for file, text in texts.items():
        files[file] = text.encode()
    for file in TOKENIZER_FILES:
        if tokenizer.folder and os.path.isfile(os.path.join(tokenizer.folder, file)):
            with open(os.path.join(tokenizer.folder, file), "rb") as f:
                files[file] = f.read()
    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:  # renames the files at its end, the first one last
        for file, contents in files.items():
            f = stack.enter_context(atomic_write(os.path.join(folder, file)))
            f.write(contents)
            f.flush()
            os.fsync(f.fileno())
        for file in (HF_WEIGHTS, *TOKENIZER_FILES):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, file))


# -----------------------------------------------------------------------------
# the command


def describe(source):
    """The lines that `info` prints."""
    config, weights, info = read_model(source)
    # the lm_head is wte
    tensors = [tensor for name, tensor in weights.items() if name != "lm_head.weight"]
    num_params = sum(tensor.numel() for tensor in tensors)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    tokenizer = find_tokenizer(source, config.vocab_size)
    if tokenizer is None:
        vocabulary = "not GPT-2's"
    else:
        vocabulary = "its own tokenizer's" if tokenizer.folder else "GPT-2's"
        if tokenizer.num_tokens < config.vocab_size:
            vocabulary += f" {tokenizer.num_tokens}, padded"
    biases = "with" if config.bias else "without"
    lines = [
        info["path"],
        f"  kind        a checkpoint of {info['kind']}",
        f"  model       {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels,"
        f" context {config.block_size}, {biases} biases",
        f"  parameters  {num_params:,}, {', '.join(sorted(dtypes))}, {num_bytes / 1e6:,.1f} MB",
        f"  vocabulary  {config.vocab_size} ({vocabulary})",
    ]
    if info["step"] is not None:
        lines.append(f"  step        {info['step']}")
    if info["val_loss"] is not None:
        lines.append(f"  val loss    {info['val_loss']:.4f}")
    return "\n".join(lines)


def convert(source, out, suffix, dtype):
    """Writes source's model to out: suffix is ".pt", ".bin", or "" for a Hugging Face folder."""
    model, info = load_model(source)
    tokenizer = find_tokenizer(source, model.config.vocab_size)
    if suffix and tokenizer and tokenizer.folder:
        raise ValueError(f"{source} has its own tokenizer, which a {suffix} file cannot hold, and"
                         " it would be taken for GPT-2's; write a folder")
    if suffix == ".pt":
        contents = model_contents(model.to(getattr(torch, dtype)), info.get("val_loss"))
        save_file({**contents, "step": info.get("step")}, out)
    elif suffix == ".bin":
        save_file(model, out, lambda model, f: write_llmc(model, f, dtype))
    else:
        if tokenizer is None:
            print(f"note: {source} has no tokenizer, and its vocabulary is not GPT-2's: {out} gets"
                  " none; copy tokenizer.json, or vocab.json and merges.txt, into it",
                  file=sys.stderr)
            tokenizer = Tokenizer(None, None, -1, model.config.vocab_size, source)
        write_hf(model, out, dtype, info, tokenizer)


def main():
    args = parse_args()
    if args.command == "info":
        print(describe(args.source))
        return
    suffix = os.path.splitext(args.out)[1] if args.command == "convert" else ""
    if suffix not in (".pt", ".bin", ""):
        raise ValueError(f"{args.out}: {suffix} is not a format to write; give X.pt, X.bin, or a"
                         " folder. The command export takes a folder of any name.")
    if os.path.exists(args.out) and not args.overwrite:
        raise ValueError(f"{args.out} exists already; --overwrite replaces it")
    convert(args.source, args.out, suffix, args.dtype)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
