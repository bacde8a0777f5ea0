"""
The Hugging Face folder of a model: weights, configs, GPT-2's tokenizer, a model card; and its way to the Hub.

    config.json, generation_config.json   GPT2LMHeadModel's
    model.safetensors                     float32 or bfloat16, vocabulary trimmed to 50257, the tied lm_head left out
    vocab.json, merges.txt                byte for byte OpenAI's encoder.json and vocab.bpe
    tokenizer.json, tokenizer_config.json the same for the fast tokenizer
    README.md                             the model card: sizes, and the run's facts and scores

Sources: https://github.com/openai/gpt-2 (src/encoder.py) for the tokenizer's bytes and merges,
https://huggingface.co/openai-community/gpt2 for the files.
"""
import json
import os
import shutil

import torch

from data import EOT, NUM_TOKENS, get_tokenizer
from plots import read_log

ENDOFTEXT = "<|endoftext|>"

# -----------------------------------------------------------------------------
# the tokenizer

def bytes_to_unicode():
    """{byte: character that stands for it in vocab.json}: printable ones for themselves, the others for 256, 257, ...

    The files of a vocabulary are text, and their lines are cut at spaces: 32, the space, is "Ġ".
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def find_merge(token, ranks):
    """The two parts that byte-pair encoding joins last for a token: find_merge(b"the", ranks) -> [b"t", b"he"].

    The merges below its own rank are made, the lowest first; two parts are left.
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
# the model

def config_files(config, dtype):
    """{file name: text} of config.json and generation_config.json."""
    tokens = {"bos_token_id": EOT, "eos_token_id": EOT}
    model = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
             "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_positions": config.block_size,
             "n_ctx": config.block_size, "vocab_size": NUM_TOKENS, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
             "attn_pdrop": config.dropout, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout,
             "scale_attn_weights": True, "tie_word_embeddings": True, "use_cache": True, "dtype": dtype, **tokens}
    return {"config.json": json.dumps(model, indent=2), "generation_config.json": json.dumps(tokens, indent=2)}


def run_facts(run_dir):
    """{what: value} of a run folder's config.json and log.txt, for the model card; {} where there are none.

    Paths, the command and the machine's files stay out of it: a card is for others.
    """
    facts = {}
    if os.path.isfile(path := os.path.join(run_dir, "config.json")):
        with open(path, encoding="utf-8") as f:
            run = json.load(f)
        config = run.get("config", {})
        if "data" in config:
            facts["training data"] = os.path.basename(os.path.normpath(config["data"]))
        for name in ("optimizer", "lr", "weight_decay", "total_batch_size", "sequence_length", "seed"):
            if name in config:
                facts[name.replace("_", " ") + (", tokens" if name.endswith(("size", "length")) else "")] = config[name]
        facts |= {name: run[name] for name in ("dtype", "device", "world_size", "torch", "commit") if run.get(name)}
    return facts


def run_scores(run_dir, step):
    """{what: value} of the last scores in a run's log.txt up to a step (all of them for None); {} where there is none."""
    path = os.path.join(run_dir, "log.txt")
    streams = read_log(path) if os.path.isfile(path) else {}
    names = {"val": "validation loss (nats a token)", "hella": "HellaSwag acc_norm, completion style",
             "hella_lm_eval": "HellaSwag acc_norm, lm-evaluation-harness style"}
    scores = {}
    for stream, name in names.items():
        values = [value for at, value in streams.get(stream, []) if step is None or at <= step]
        if values:
            scores[name] = f"{values[-1]:.4f}"
    return scores


def model_card(model, name, dtype, info):
    """README.md for the Hub; info is load_model's, whose path tells of the run."""
    config, run_dir, step = model.config, os.path.dirname(info.get("path", "")), info.get("step")
    facts = {"step": f"{step:,}"} if step is not None else {}
    facts |= run_facts(run_dir) if info.get("path") else {}
    scores = run_scores(run_dir, step) if info.get("path") else {}
    if info.get("val_loss") is not None:
        scores["validation loss (nats a token)"] = f"{info['val_loss']:.4f}"
    # what `from_pretrained` gives counts: the trimmed vocabulary, and the zero biases if there were none
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2", "---", f"# {name}", "",
             f"A GPT-2: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, a context of"
             f" {config.block_size} tokens, GPT-2's vocabulary of {NUM_TOKENS}; {model.num_params():,} parameters as trained,"
             f" stored in {dtype}." + ("" if config.bias else " It has no biases; the files hold zeros for them."), "",
             "```python", "from transformers import pipeline",
             'generate = pipeline("text-generation", model="PATH_OR_REPOSITORY")',
             'print(generate("Hello, I\'m a language model,", max_new_tokens=30)[0]["generated_text"])', "```", ""]
    for title, table in (("Scores", scores), ("Training", facts)):
        if table:
            lines += [f"## {title}", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in table.items()),
                      ""]
    return "\n".join(lines)


def write_folder(model, folder, dtype="float32", info=None):
    """Writes the files of this module's docstring into folder, which is made; they appear there when all are complete.

    dtype is "float32" or "bfloat16". Files of other names in the folder stay. ValueError for another vocabulary than GPT-2's.
    """
    from safetensors.torch import save_file
    if model.config.vocab_size < NUM_TOKENS:
        raise ValueError(f"this model has a vocabulary of {model.config.vocab_size}, GPT-2's is {NUM_TOKENS}:"
                         " no tokenizer to export belongs to it")
    folder = os.path.normpath(folder)
    temporary = f"{folder}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        texts = {**config_files(model.config, dtype), **tokenizer_files(model.config.block_size),
                 "README.md": model_card(model, os.path.basename(folder), dtype, info or {})}
        for name, text in texts.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8", newline="\n") as f:
                f.write(text)
        save_file(model.hf_state_dict(NUM_TOKENS, getattr(torch, dtype)), os.path.join(temporary, "model.safetensors"),
                  metadata={"format": "pt"})
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), "rb+") as f:
                os.fsync(f.fileno())
        if not os.path.exists(folder):
            os.rename(temporary, folder)
        else:
            for name in sorted(os.listdir(temporary)):
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -----------------------------------------------------------------------------
# the Hub

def check_token():
    """Raises ValueError where there is no Hugging Face token to push with."""
    from huggingface_hub import get_token
    if get_token() is None:
        raise ValueError("--push needs a Hugging Face token with write access: run `hf auth login`, or set HF_TOKEN")


def push(folder, repo):
    """Uploads folder to the model repository repo ("user/name"), which is made if it is not there; returns its URL."""
    from huggingface_hub import HfApi
    try:
        url = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload GPT-2")
    except Exception as e:  # its HTTP library's errors are neither OSError nor ValueError
        raise OSError(f"could not push to {repo}: {str(e).strip().splitlines()[0]}; the files are in {folder}") from e
    return url
