"""
Tokenizes web text into shards: reads files or a dataset on the Hugging Face Hub, encodes the
documents with GPT-2's tokenizer on all cores, and writes shards for train_gpt2.py, build-nanogpt
and llm.c.

The shards are those of https://github.com/karpathy/build-nanogpt (fineweb.py): 1-D uint16,
<|endoftext|> before each document. The default dataset is FineWeb-Edu (Penedo et al. 2024,
https://arxiv.org/abs/2406.17557).

    python fineweb.py                            # FineWeb-Edu's 10B tokens into edu_fineweb10B/
    python fineweb.py --name sample-100BT        # or sample-350BT, CC-MAIN-2024-10 (with --out)
    python fineweb.py --dataset roneneldan/TinyStories --name default --out tinystories
    python fineweb.py --input my_texts/ --out my_shards     # parquet, jsonl, txt; no network
    python fineweb.py --val first-shard          # build-nanogpt's shards, byte for byte
    python fineweb.py --verify edu_fineweb10B    # checks shards, also those of other projects

Shards that others have tokenized need no conversion:

    hf download kjj0/finewebedu10B-gpt2 --repo-type dataset --local-dir edu_fineweb10B

Writes edufineweb_val_000000.npy, edufineweb_train_000001.npy, ... and manifest.json:

    version, tokenizer, source, shard_size, val, val_tokens, max_tokens, format, text_column
    shards      [{file, split, tokens, documents (that begin in the shard), sha256}, ...] in order
    next        start of the next shard: split; file, number (of the piece in the file, see
                sources.py), token (in the piece), all counted from 0; skipped: number of documents
                before that piece that were empty or not text
    complete    true after the last shard

Run an interrupted command again to resume it after the last finished shard. The shards are bitwise
identical to those of an uninterrupted run, for any number of workers. Documents keep the order of
the source: training shuffles. The workers are threads: tiktoken and pyarrow release Python's global
interpreter lock, so one process uses all cores.

The folder is locked while a process writes to it. Shards that the manifest does not list are an
error, and never overwritten.
"""
import hashlib
import json
import os
import re
import reprlib
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from run.cli import ArgumentParser, command, exit_now, number, run_main, start

DATASET = "HuggingFaceFW/fineweb-edu"
NAME = "sample-10BT"


def parse_args(argv=None):
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--dataset", default=DATASET, metavar="REPO",
        help=f"dataset on the Hugging Face Hub (default {DATASET})")
    add("--name", help="config of the dataset: sample-100BT, CC-MAIN-2024-10, ..."
        f" (default {NAME} for FineWeb-Edu)")
    add("--revision", default="main", help="branch, tag or commit of the dataset (default main)")
    add("--split", default="train", help="split of the dataset to read (default train)")
    add("--input", nargs="+", metavar="PATH",
        help="read local files or folders instead: parquet, jsonl, txt (.gz, .zst)")
    add("--text-column", default="text", metavar="NAME",
        help="column or JSON field with the text (default text)")
    add("--out", metavar="DIR",
        help="output folder (default edu_fineweb10B, ... for FineWeb-Edu's samples)")
    add("--shard-size", type=number(int, 2), default=10**8, metavar="N",
        help="tokens per shard (default 100M)")
    add("--max-tokens", type=number(int, 0), default=0, metavar="N",
        help="stop after this many tokens, 5B or 5e9 (default: no limit)")
    add("--val-tokens", type=number(int, 1), metavar="N",
        help="approximate tokens in the val split, which ends at a document boundary"
        " (default: one shard, or 10%% of the estimated total if that is less)")
    add("--val", choices=("documents", "first-shard"), default="documents",
        help="documents: the val split ends with a document (default); first-shard: it is the"
        " first --shard-size tokens, as in the lecture, so that the shards of FineWeb-Edu are"
        " build-nanogpt's byte for byte")
    add("--workers", type=number(int, 0, 1024), default=0, metavar="N",
        help="tokenizer threads (default: one per core, two for a dataset on the Hub)")
    add("--format", choices=("npy", "bin"), default="npy",
        help="shard format: NumPy's or llm.c's (default npy)")
    add("--verify", metavar="DIR",
        help="check the shards of a folder, against its manifest.json if it has one, print the"
        " numbers of tokens, and do nothing else")
    args = parser.parse_args(argv)
    if args.val == "first-shard" and args.val_tokens:
        raise ValueError("--val first-shard takes the first --shard-size tokens;"
                         " omit --val-tokens")
    if args.dataset == DATASET:
        args.name = args.name or NAME
        sample = re.fullmatch(r"sample-(\d+B)T", args.name)
        if sample and not args.input and args.out is None:
            args.out = f"edu_fineweb{sample[1]}"
    if not args.out and args.verify is None:
        raise ValueError("--out is missing: the folder for the shards")
    if args.workers == 0:
        has_affinity = hasattr(os, "sched_getaffinity")
        args.workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        if not args.input:
            args.workers *= 2  # half of the threads wait for the network
    return args


if __name__ == "__main__":
    start(parse_args)

import numpy as np
import pyarrow as pa
from tqdm import tqdm

import data
from data import END_OF_TEXT, EOT, TOKENIZER_SHA256, TokenStream, find_shards, write_shard
from run import files
from run.prepare import (MANIFEST, MANIFEST_VERSION, check_shards, encode_documents, load_manifest,
                         prepare_data)
from sources import (check_files, estimate_tokens, hub_source, local_source, map_in_order,
                     pieces)

# -----------------------------------------------------------------------------
# tokens

def encode(texts, begins=True):
    """Tokens of the texts, 1-D uint16, with EOT before each; unpaired surrogates are replaced.

    begins=False: the first text continues a document, and has no EOT. All texts are encoded in one
    call of tiktoken; the special token between them keeps their words separate.
    """
    joined = END_OF_TEXT + END_OF_TEXT.join(texts)
    try:
        if joined.count(END_OF_TEXT) == len(texts):
            tokens = data.encode(joined, {END_OF_TEXT})
        else:  # a text contains "<|endoftext|>", which is ordinary text there
            tokens = encode_documents(texts)
    except UnicodeError:  # JSON may contain them; replaced as in tiktoken's encode_ordinary
        return encode([text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                       for text in texts], begins)
    return tokens if begins else tokens[1:]


def val_end(shard, val_total, val_tokens, next_token=None):
    """Length to which the last shard of the val split is cut.

    shard: its tokens, 1-D. val_total: number of tokens in the val split with all of them, at least
    val_tokens. next_token: the one after the shard, if there is one.
    """
    limit = len(shard) - (val_total - val_tokens)
    boundaries = np.flatnonzero(shard == EOT)
    if next_token == EOT:
        boundaries = np.append(boundaries, len(shard))
    boundaries = boundaries[boundaries > len(shard) - val_total]  # not the stream's start
    before = boundaries[boundaries <= limit]
    if len(before) > 0:
        return before[-1]
    return boundaries[0] if len(boundaries) > 0 else limit


def pack(chunks, shard_size, val_tokens, split="val", val_total=0, val="documents"):
    """Yields (split, tokens, split of the next shard): the stream in shards of shard_size tokens.

    chunks: the stream as uint16 arrays of any length; EOT begins a document. The val split comes
    first. It ends at a document boundary of the shard that reaches val_tokens: the last one of at
    most val_tokens, or else the next one after it; without any, as in one long text, at val_tokens.
    With val="first-shard" it is the first shard_size tokens, which end within a document.
    split, val_total: split of the next token and number of tokens in the val split so far, to
    resume. Raises ValueError if no tokens are left for the train split.
    Example: chunks [[EOT 1 2 EOT 3 4 EOT 5]], 5, 5 -> val [EOT 1 2], train [EOT 3 4 EOT 5]
    """
    shard = np.empty(shard_size, dtype=np.uint16)
    n = 0  # number of tokens in the shard
    for chunk in chunks:
        while len(chunk) > 0:
            if n == shard_size:
                end = n
                next_split = split
                if split == "val" and val == "first-shard":
                    next_split = "train"
                elif split == "val" and val_total >= val_tokens:
                    end = val_end(shard, val_total, val_tokens, chunk[0])
                    next_split = "train"
                if end > 0:
                    yield split, shard[:end], next_split
                rest = shard[end:]
                shard = np.empty(shard_size, dtype=np.uint16)
                shard[:len(rest)] = rest
                n = len(rest)
                split = next_split
            part = chunk[:shard_size - n]
            shard[n:n + len(part)] = part
            n += len(part)
            chunk = chunk[len(part):]
            if split == "val":
                val_total += len(part)
    if split == "val" and val_total == 0:
        raise ValueError("the source contains no text: all of its documents are empty or not text;"
                         " check --text-column")
    if split == "val" and val == "documents" and val_total > val_tokens:
        end = val_end(shard[:n], val_total, val_tokens)
        if end > 0:
            yield "val", shard[:end], "train"
        shard = shard[end:]
        n -= end
        split = "train"
    if split == "val":
        flag = "--val-tokens" if val == "documents" else "--shard-size"
        raise ValueError(f"no tokens are left for the train split: all {val_total:,} are in the val"
                         f" split. Delete the output folder and use a smaller {flag} or more text")
    if n > 0:
        yield split, shard[:n], split


# -----------------------------------------------------------------------------
# the pipeline

def tokenize(piece):
    """(piece, its tokens, number of documents skipped: empty, not text, or not encodable)."""
    parts = [np.empty(0, dtype=np.uint16)]
    skipped = 0
    for texts in piece.batches:
        kept = [text for text in texts if isinstance(text, str) and text]
        skipped += len(texts) - len(kept)
        if not kept:
            continue
        try:
            parts.append(encode(kept, piece.begins))
        except ValueError:  # tiktoken fails on hundreds of thousands of consecutive spaces
            for text in kept:
                try:
                    parts.append(encode([text], piece.begins))
                except ValueError:
                    skipped += 1
    return piece, np.concatenate(parts), skipped


class TokenizedSource:
    """The tokens of a source as one stream, and the place in the source that each comes from.

    A shard usually ends within a document, and within a piece of the source. To resume after it,
    manifest["next"] stores the piece that contains the next token, and the index of that token in
    the piece. chunks() yields the tokens and records at which position of the stream each piece
    starts; locate() converts a position to a place in the source. Position 0 is the first token
    that chunks() yields.
    """

    def __init__(self, source, manifest):
        self.source = source
        self.text_column = manifest["text_column"]
        self.first = manifest["next"]
        self.position = -self.first["token"]  # of the next piece; negative if a part is in a shard
        self.skipped = self.first["skipped"]  # number of documents skipped before the next piece
        # (position, piece, documents skipped before it) of the pieces from the current shard on
        self.starts = deque()

    def chunks(self, limit, workers, bar):
        """Yields uint16 arrays, at most limit tokens in all."""
        todo = pieces(self.source, self.text_column, self.first["file"], self.first["number"])
        for piece, tokens, skipped in map_in_order(tokenize, todo, workers, workers + 4):
            self.starts.append((self.position, piece, self.skipped))
            chunk = tokens[max(0, -self.position):][:limit]
            self.position += len(tokens)
            self.skipped += skipped
            limit -= len(chunk)
            bar.update(len(chunk))
            yield chunk
            if limit == 0:
                return

    def locate(self, position, split):
        """manifest["next"] for a shard that starts at position; positions must not decrease."""
        while len(self.starts) > 1 and self.starts[1][0] <= position:
            self.starts.popleft()
        start, piece, skipped = self.starts[0]
        return {"split": split, "file": piece.file, "number": piece.number,
                "token": position - start, "skipped": skipped}


# -----------------------------------------------------------------------------
# the output folder

def save_manifest(out, manifest):
    """Writes manifest.json atomically."""
    with files.atomic_write(os.path.join(out, MANIFEST), "w") as f:
        json.dump(manifest, f, indent=1)


def open_manifest(out, settings):
    """The manifest of folder out, or a new one; ValueError if its settings are not these."""
    manifest = load_manifest(out)
    if manifest is None or not manifest["shards"]:
        start = {"split": "val", "file": 0, "number": 0, "token": 0, "skipped": 0}
        return {"version": MANIFEST_VERSION, **settings, "shards": [], "complete": False,
                "next": start}
    recorded = {**{key: manifest.get(key) for key in settings}, **manifest["source"]}
    current = {**settings, **settings["source"]}
    different = []
    for key in {**recorded, **current}:
        was = recorded.get(key)
        now = current.get(key)
        if key != "source" and was != now:
            different.append(f"{key} was {reprlib.repr(was)}, is {reprlib.repr(now)}")
    if different:
        raise ValueError(f"{out} was created with other flags or from another source:"
                         f" {'; '.join(different)}. Use the same ones to resume, or another --out")
    return manifest


def shard_name(out, manifest, split, index):
    """Name of a shard: edufineweb_train_000001.npy for FineWeb-Edu, else that of the folder."""
    if manifest["shards"]:  # a folder that was renamed keeps the names of its shards
        prefix = manifest["shards"][0]["file"].rsplit("_", 2)[0]
    elif manifest["source"].get("dataset") == DATASET:
        prefix = "edufineweb"
    else:
        prefix = os.path.basename(os.path.abspath(out))
    return f"{prefix}_{split}_{index:06d}.{manifest['format']}"


def read_shard(path):
    """All tokens of a shard, 1-D uint16; ValueError if it is damaged or has ids >= 50257."""
    stream = TokenStream([path])
    return stream.read(0, len(stream))


def shard_entry(path, split, tokens):
    """The manifest's entry of a shard, a file that contains tokens."""
    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"file": os.path.basename(path), "split": split, "tokens": len(tokens),
            "documents": int(np.count_nonzero(tokens == EOT)), "sha256": sha256}


def add_shard(out, manifest, name, split, tokens, next_start):
    """Writes a shard, then the manifest: every shard that the manifest lists is complete.

    A process that was killed between the two has left this shard, with the same tokens;
    ValueError if the file differs.
    """
    path = os.path.join(out, name)
    if not os.path.exists(path):
        write_shard(path, tokens)
    elif not np.array_equal(read_shard(path), tokens):
        raise ValueError(f"{path} exists already and is not the shard to be written there;"
                         " move it to another folder")
    manifest["shards"].append(shard_entry(path, split, tokens))
    manifest["next"] = next_start
    save_manifest(out, manifest)
    tqdm.write(f"{name}: {len(tokens):,} tokens", file=sys.stderr)  # which is not buffered


def make_shards(source, settings, out, workers):
    """Tokenizes a source into folder out, which may have some of the shards; returns the manifest.

    settings: source, shard_size, ... as in the manifest; val_tokens may be None for the default.
    A thread writes each shard while the next one is tokenized.
    """
    # Arrow's own allocators keep memory that a thread has freed, 0.4 GB with 64 threads
    # (measured), and are no faster
    pa.set_memory_pool(pa.system_memory_pool())
    shard_size = settings["shard_size"]
    limit = settings["max_tokens"] or 1 << 62  # all of the source
    total = min(limit, estimate_tokens(source, settings["text_column"]))
    val_tokens = settings["val_tokens"] or max(1, min(shard_size, total // 10))
    if settings["val"] == "first-shard":
        val_tokens = shard_size
    manifest = open_manifest(out, {**settings, "val_tokens": val_tokens})
    os.makedirs(out, exist_ok=True)
    if manifest["complete"]:
        check_shards(out, manifest)
        return manifest

    # a killed process may have left the next shard, which add_shard compares
    index = len(manifest["shards"])
    check_shards(out, manifest,
                 [shard_name(out, manifest, split, index) for split in ("train", "val")])

    done = sum(shard["tokens"] for shard in manifest["shards"])
    free = shutil.disk_usage(out).free
    needed = 2 * (total - done)  # bytes
    if needed > free:
        raise ValueError(f"{out} has {free / 1e9:.2f} GB of free disk space; about"
                         f" {total - done:,} tokens of 2 bytes need {needed / 1e9:.2f} GB:"
                         " free some, choose another --out, or use --max-tokens")

    bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, smoothing=0.05, disable=None)
    stream = TokenizedSource(source, manifest)
    shards = pack(stream.chunks(limit - done, workers, bar), shard_size, val_tokens,
                  manifest["next"]["split"], done, settings["val"])
    position = 0
    with ThreadPoolExecutor(1) as writer, bar:
        written = None
        for split, tokens, next_split in shards:
            position += len(tokens)
            if written is not None:
                written.result()  # raises if the shard before could not be written
            name = shard_name(out, manifest, split, index)
            written = writer.submit(add_shard, out, manifest, name, split, tokens,
                                    stream.locate(position, next_split))
            index += 1
        if written is not None:
            written.result()
        manifest["complete"] = True
        manifest["next"]["skipped"] = stream.skipped
        save_manifest(out, manifest)
    return manifest


# -----------------------------------------------------------------------------
# the commands

def verify(out):
    """Reads every shard of a folder and prints the numbers of tokens.

    Raises ValueError for a damaged shard, ids that are not GPT-2's, and any difference from the
    manifest, if the folder has one.
    """
    if not os.path.isdir(out) or not find_shards(out, "train"):
        raise FileNotFoundError(f"no shards (*_train_000001.npy or .bin) in {out!r}")
    train, val = prepare_data(out)
    manifest = load_manifest(out)
    listed = {entry["file"]: entry for entry in manifest["shards"]} if manifest else {}
    for split, paths in ("val", val), ("train", train):
        documents = 0
        num_tokens = 0
        for path in tqdm(paths, unit="shard", disable=None):
            tokens = read_shard(path)
            entry = shard_entry(path, split, tokens)
            was = listed.get(entry["file"], entry)
            different = [f"{key} was {was[key]}, is {entry[key]}" for key in entry
                         if was[key] != entry[key]]
            if different:
                raise ValueError(f"{path} has changed: {'; '.join(different)}. Restore it, or"
                                 " create the folder again")
            documents += entry["documents"]
            num_tokens += entry["tokens"]
        print(f"{split}: {len(paths):,} shards, {documents:,} documents, {num_tokens:,} tokens")
    if manifest is None:
        print(f"{out}: all headers, sizes and ids are valid; there is no {MANIFEST} to compare")
    else:
        print(f"{out}: all counts and hashes match; {manifest['next']['skipped']:,} documents were"
              " skipped (empty or not text)")


def open_source(args):
    """The Source of the flags; a dataset on the Hub at the commit that args.out has shards of."""
    if args.input:
        source = local_source(args.input)
        check_files(source, args.text_column)
        return source
    commit = None
    manifest = load_manifest(args.out)
    if manifest is not None and manifest["source"].get("dataset") == args.dataset:
        commit = manifest["source"].get("commit")
    return hub_source(args.dataset, args.name, args.split, args.revision, commit)


def main():
    args = parse_args()
    if args.verify is not None:
        return verify(args.verify)
    with files.locked_folder(args.out, "fineweb.py", "--out"):
        source = open_source(args)
        settings = {"tokenizer": {"name": "gpt2", "sha256": TOKENIZER_SHA256},
                    "source": source.description, "shard_size": args.shard_size, "val": args.val,
                    "val_tokens": args.val_tokens, "max_tokens": args.max_tokens,
                    "format": args.format, "text_column": args.text_column}
        manifest = make_shards(source, settings, args.out, args.workers)
    num_tokens = sum(shard["tokens"] for shard in manifest["shards"])
    print(f"{args.out}: {len(manifest['shards'])} shards, {num_tokens:,} tokens;"
          f" {manifest['next']['skipped']:,} documents were skipped (empty or not text);"
          f" {command('train_gpt2.py', '--data', args.out)}")


if __name__ == "__main__":
    try:
        run_main(main)
        exit_now(0)
    except SystemExit as end:
        # interpreter shutdown would wait for worker threads, which may be waiting for the network
        exit_now(end.code or 0)
