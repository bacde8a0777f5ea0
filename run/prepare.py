"""
The shards for --data: a folder of shards, checked against its manifest.json; or a text file, or a
folder of them, tokenized once.

    train, val = prepare_data("edu_fineweb10B")   # paths of the shards
    train, val = prepare_data("input.txt")        # in .tokens beside it

fineweb.py tokenizes corpora that do not fit into memory.
"""
import contextlib
import hashlib
import json
import os

import numpy as np

from data import END_OF_TEXT, EOT, encode, find_shards, open_shard, write_shard
from run.cli import command
from run.files import check_regular

# -----------------------------------------------------------------------------
# manifest.json

MANIFEST = "manifest.json"  # fineweb.py writes it beside its shards and describes its fields
MANIFEST_VERSION = 1


def has_fields(value, **kinds):
    """Whether value, from JSON, is a dict with these keys and types."""
    return isinstance(value, dict) and all(isinstance(value.get(key), kind)
                                           for key, kind in kinds.items())


def load_manifest(folder):
    """The manifest of a folder, None if it has none; ValueError if it is damaged."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.lexists(path):
        return None
    check_regular(path)
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        if not has_fields(manifest, version=int, source=dict, shards=list, next=dict,
                          complete=bool):
            raise ValueError("a field is missing or of another type")
        if manifest["version"] != MANIFEST_VERSION:
            raise ValueError(f"its format version is {manifest['version']}, supported is"
                             f" {MANIFEST_VERSION}")
        for shard in manifest["shards"]:
            if (not has_fields(shard, file=str, split=str, tokens=int, documents=int, sha256=str)
                    or shard["split"] not in ("train", "val")):
                raise ValueError(f"the shard {str(shard)[:100]} is invalid")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged or not of fineweb.py ({e}); restore it, or move it"
                         " away: shards without it can be trained on") from e
    return manifest


def check_shards(folder, manifest, also=()):
    """ValueError unless a folder has its manifest's shards, and no others except those in also."""
    tokens_of = {shard["file"]: shard["tokens"] for shard in manifest["shards"]}
    found = {os.path.basename(path) for split in ("train", "val")
             for path in find_shards(folder, split)}
    unlisted = sorted(found - tokens_of.keys() - set(also))
    if unlisted:
        raise ValueError(f"{folder} holds {len(unlisted)} shards that no {MANIFEST} lists"
                         f" ({unlisted[0]}, ...): they are not fineweb.py's, or of another run;"
                         " move them to another folder")
    for name, expected in tokens_of.items():
        path = os.path.join(folder, name)
        tokens = open_shard(path).tokens if os.path.lexists(path) else "no"
        if tokens != expected:
            raise ValueError(f"{path} has {tokens} tokens, but {expected} in {MANIFEST}: it was"
                             " removed or replaced; restore it, or create the folder again")


# -----------------------------------------------------------------------------
# text

OTHER_FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".gz", ".zst")  # not plain text


def not_utf8(path, reason):
    """The ValueError for a file whose text is in another encoding than UTF-8."""
    return ValueError(f"{path} is not UTF-8 text ({reason}); convert it: iconv -f ENCODING"
                      " -t UTF-8, where ENCODING may be UTF-16 or LATIN1")


def read_text(path):
    """The text of a UTF-8 file; a byte order mark is not part of it."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            text = f.read()
    except UnicodeDecodeError as e:
        raise not_utf8(path, e) from e
    if "\0" in text[:4]:
        raise not_utf8(path, "it has the zero bytes of UTF-16")
    return text


def split_texts(texts):
    """(train documents, val documents): val is about the last 10% of the characters.

    The cut is the last boundary between 80% and 90%: between two documents, else after a blank
    line, else after a line; without any, it is at 90%.
    Example: ["a line\\n" * 10] -> ["a line\\n" * 9], ["a line\\n"]
    """
    ends = np.cumsum([len(text) for text in texts])
    total = int(ends[-1])
    i = int(np.searchsorted(ends, total * 9 // 10, side="right"))  # the document 90% falls into
    start = int(ends[i]) - len(texts[i])
    low = total * 8 // 10 - start   # 80% and 90%, as offsets in document i
    high = total * 9 // 10 - start
    if i > 0 and low <= 0:
        return texts[:i], texts[i:]
    text = texts[i]
    cut = high
    for boundary in ("\n\n", "\n"):
        found = text.rfind(boundary, max(0, low), high)
        if found >= 0:
            cut = found + len(boundary)
            break
    return [*texts[:i], text[:cut]], [text[cut:], *texts[i + 1:]]


def encode_documents(texts):
    """Tokens of the texts, 1-D uint16, with EOT before each; raises what data.encode raises."""
    eot = np.array([EOT], dtype=np.uint16)
    return np.concatenate([part for text in texts for part in (eot, encode(text))])


def tokenize_texts(paths):
    """Folder with one train and one val shard of the given text files.

    It is .tokens/NAME-KEY beside the first file, created once and then reused: the key is a hash of
    the names, sizes and modification times of the files. All of the text is in memory.
    """
    for path in paths:
        check_regular(path)
        if path.endswith((".npy", ".bin")):
            raise ValueError(f"{path} is a single shard; --data takes the folder of the train and"
                             " val shards")
        if path.lower().endswith(OTHER_FORMATS):
            raise ValueError(f"{path} is not plain text; create shards with"
                             f" {command('fineweb.py', '--input')}, which reads .parquet, .jsonl,"
                             " .json and .txt files, also .gz and .zst, and use --data with their"
                             " folder")
    files = []
    for path in paths:
        stat = os.stat(path)
        files.append((os.path.basename(path), stat.st_size, stat.st_mtime_ns))
    key = json.dumps(["split_texts 2, documents end at <|endoftext|>", files])
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    parent = os.path.join(os.path.dirname(os.path.abspath(paths[0])), ".tokens")
    name = os.path.splitext(os.path.basename(paths[0]))[0]
    folder = os.path.join(parent, f"{name}-{key}")
    shards = [os.path.join(folder, f"{name}_train_000001.npy"),
              os.path.join(folder, f"{name}_val_000000.npy")]
    with contextlib.suppress(OSError, ValueError):  # they are missing or incomplete
        for shard in shards:
            open_shard(shard)
        return folder
    texts = [text for path in paths for text in read_text(path).split(END_OF_TEXT) if text]
    if not texts:
        raise ValueError(f"{paths[0]} is empty: there is nothing to train on")
    splits = [encode_documents(documents) for documents in split_texts(texts)]
    try:
        os.makedirs(folder, exist_ok=True)
        # another process that tokenizes the text at the same time writes the same bytes
        for shard, tokens in zip(shards, splits):
            write_shard(shard, tokens)
    except OSError as e:
        raise OSError(f"cannot create {parent} for the tokens of {paths[0]} ({e.strerror}): copy"
                      " the text to a folder that can be written, and use --data with the"
                      " copy") from e
    return folder


# -----------------------------------------------------------------------------
# --data

def check_folder(path, train, val):
    """ValueError unless the train and val shards of a folder can be trained on.

    A folder without fineweb.py's manifest.json, such as those of build-nanogpt and llm.c, is only
    checked for both splits.
    """
    manifest = load_manifest(path)
    if manifest:
        if not manifest["complete"]:
            raise ValueError(f"{path} is incomplete: fineweb.py is still running or was"
                             " interrupted; wait for it, or run its command again to resume it")
        check_shards(path, manifest)
    if not train or not val:
        missing = "val" if train else "train"
        raise ValueError(f"{path} has no shard named *_{missing}_NNNNNN.npy or .bin; training needs"
                         " train and val")
    is_nanogpts = os.path.basename(train[0]) == "train.bin"
    if is_nanogpts and os.path.exists(os.path.join(path, "meta.pkl")):
        raise ValueError(f"{path} holds nanoGPT's character-level data (meta.pkl): its ids are"
                         " characters, not GPT-2's tokens. Use --data with the text file itself")


def prepare_data(path):
    """(train shard paths, val shard paths) of a folder of shards, a text file, or a folder of .txt.

    FileNotFoundError or ValueError for a path with nothing to train on, and for an incomplete set
    of shards.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no data at {path}; --data takes a folder of shards"
                                f" ({command('fineweb.py')} creates one), a text file, or a folder"
                                " of .txt files")
    texts = [path]
    if os.path.isdir(path):
        train, val = find_shards(path, "train"), find_shards(path, "val")
        if train or val:
            check_folder(path, train, val)
            return train, val
        texts = [os.path.join(path, name) for name in sorted(os.listdir(path))
                 if name.endswith(".txt")]
        if not texts:
            raise FileNotFoundError(f"{path} holds neither shards (*_train_000001.npy,"
                                    " *_val_000000.npy) nor .txt files;"
                                    f" {command('fineweb.py', '--input')} creates shards of parquet"
                                    " and jsonl files")
    folder = tokenize_texts(texts)
    return find_shards(folder, "train"), find_shards(folder, "val")
