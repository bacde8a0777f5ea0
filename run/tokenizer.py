"""
The tokenizer of a model: that of its Hugging Face folder, or GPT-2's.

    tokenizer = load_tokenizer("swedish-gpt2", model.config.vocab_size)
    ids = tokenizer.encode("Hej")
    text = tokenizer.decode(ids)

A folder's tokenizer is tokenizer.json, or vocab.json and merges.txt, which the package tokenizers
reads. All other checkpoints hold no tokenizer: GPT-2's is assumed if the vocabulary has its size.
"""
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data import EOT, NUM_TOKENS, encode, get_tokenizer
from run.files import check_regular
from run.weights import hf_files

ENDOFTEXT = "<|endoftext|>"


class Tokenizer(NamedTuple):
    encode: Callable           # text -> token ids, a 1-D integer array
    decode: Callable           # a list of token ids -> text
    eot: int                   # <|endoftext|>, which ends a text; -1 without one
    num_tokens: int            # a model's vocab_size may be padded beyond it
    folder: str | None = None  # that its files are in, None for GPT-2's


GPT2 = Tokenizer(encode, lambda ids: get_tokenizer().decode(ids), EOT, NUM_TOKENS)
# GPT-2's vocabulary, and padded to a multiple of 64 or 128, 256, 512
GPT2_SIZES = (NUM_TOKENS, 50304, 50432, 50688)

# -----------------------------------------------------------------------------
# GPT-2's vocabulary as Hugging Face's files spell it


def bytes_to_unicode():
    """{byte: the character that represents it in vocab.json}.

    Printable bytes are themselves, the others 256, 257, ...: vocab.json and merges.txt are text,
    split at whitespace. The space, 32, is "Ġ".
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in characters]
    for i, byte in enumerate(others):
        characters[byte] = chr(256 + i)
    return characters


def gpt2_vocab():
    """{token: id} of GPT-2, as in vocab.json."""
    characters = bytes_to_unicode()
    vocab = {}
    for i in range(EOT):
        token = get_tokenizer().decode_single_token_bytes(i)
        vocab["".join(characters[byte] for byte in token)] = i
    return {**vocab, ENDOFTEXT: EOT}


# -----------------------------------------------------------------------------
# the tokenizer of a Hugging Face folder

# of transformers' tokenizers; tokens are in the first of them
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model",
                   "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja"]
# differs between tokenizers with the same vocabulary: words, case, spaces, Unicode normalization
PROBE = "It's  naïve, ﬁne Cafe\u0301 2024\n\n  x"


def read_fields(folder, name):
    """The object in a JSON file of a folder, {} without one."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_tokenizer(folder):
    """(tokenizers.Tokenizer, id of its end-of-text token) of a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    config = {**read_fields(folder, "special_tokens_map.json"),
              **read_fields(folder, "tokenizer_config.json")}
    fast = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(fast):
        tokenizer = Tokenizer.from_file(fast)
    else:
        vocab = os.path.join(folder, "vocab.json")
        merges = os.path.join(folder, "merges.txt")
        tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(config.get("add_prefix_space", False))
        tokenizer.decoder = decoders.ByteLevel()
    # as saved after training; they would cut or pad a prompt
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # special tokens, which vocab.json does not list
    ids = read_fields(folder, "added_tokens.json")
    for i, token in config.get("added_tokens_decoder", {}).items():
        ids[token["content"]] = int(i)
    eot = config.get("eos_token") or ENDOFTEXT
    if isinstance(eot, dict):
        eot = eot["content"]
    if tokenizer.token_to_id(eot) is not None:
        ids[eot] = tokenizer.token_to_id(eot)
    tokenizer.add_special_tokens(sorted(ids, key=ids.get))
    return tokenizer, ids.get(eot, -1)


def find_tokenizer(source, vocab_size):
    """The Tokenizer of what load_model takes, of this vocab_size; None if it is unknown."""
    names = []
    if hf_files(source):
        names = [name for name in TOKENIZER_FILES if os.path.isfile(os.path.join(source, name))]
    if not set(names) & set(TOKENIZER_FILES[:5]):
        return GPT2 if vocab_size in GPT2_SIZES else None
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise ValueError(f"cannot read the tokenizer of {source}: it has neither tokenizer.json nor"
                         " vocab.json and merges.txt; transformers writes them:"
                         f" AutoTokenizer.from_pretrained({source!r}).save_pretrained({source!r})")
    for name in names:
        check_regular(os.path.join(source, name))
    try:
        tokenizer, eot = read_tokenizer(source)
    except Exception as e:  # the package raises Exception itself
        raise ValueError(f"the tokenizer of {source} is damaged ({e}); download it again") from e

    def encode_text(text):
        text.encode()  # UnicodeError, a ValueError, for lone surrogates
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    vocab = tokenizer.get_vocab()
    if tokenizer.get_vocab_size(with_added_tokens=False) > vocab_size:
        raise ValueError(f"the tokenizer of {source} has {len(vocab)} tokens, its model only"
                         f" {vocab_size}: they do not belong together")
    if vocab == gpt2_vocab() and encode_text(PROBE).tolist() == encode(PROBE).tolist():
        return GPT2
    # tokens may be added to a tokenizer and not to its model
    num_tokens = min(vocab_size, 1 + max(vocab.values()))
    return Tokenizer(encode_text, lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
                     eot if eot < num_tokens else -1, num_tokens, source)


def load_tokenizer(source, vocab_size):
    """find_tokenizer; ValueError instead of None."""
    tokenizer = find_tokenizer(source, vocab_size)
    if tokenizer is None:
        raise ValueError(f"{source} has a vocabulary of {vocab_size} tokens, not GPT-2's"
                         f" {NUM_TOKENS}, and no tokenizer; a Hugging Face folder has one in"
                         " tokenizer.json, or in vocab.json and merges.txt")
    return tokenizer
