"""
Tokenizes web text into shards: reads files or a dataset on the Hugging Face Hub, encodes the documents with GPT-2's
tokenizer on all cores, and writes shards for train_gpt2.py, build-nanogpt and llm.c.

The shards are those of https://github.com/karpathy/build-nanogpt (fineweb.py): 1-D uint16, <|endoftext|> before each
document. The default dataset is FineWeb-Edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557).

    python fineweb.py                                       # FineWeb-Edu sample-10BT into edu_fineweb10B/, 10B tokens
    python fineweb.py --name sample-100BT                   # or sample-350BT, CC-MAIN-2024-10 (with --out), ...
    python fineweb.py --dataset roneneldan/TinyStories --name default --out tinystories
    python fineweb.py --input my_texts/ --out my_shards     # parquet, jsonl, txt (.gz, .zst) and folders; no network
    python fineweb.py --prepared kjj0/finewebedu10B-gpt2 --out edu_fineweb10B     # downloads tokenized shards
    python fineweb.py --verify edu_fineweb10B               # checks all counts and hashes

Writes edufineweb_val_000000.npy, edufineweb_train_000001.npy, ... and manifest.json:

    version, tokenizer, source, shard_size, val_tokens, max_tokens, format, text_column, skip_bad_files: the settings
    shards      [{file, split, tokens, documents (number that begin in the shard), sha256}, ...] in order
    next        start of the next shard: split; file, number (of the piece in the file, see sources.py), token (in the
                piece), all counted from 0; skipped: number of documents before that piece that were empty or not text
    bad_files   [{file, name, error}, ...], damaged files of which the rest was skipped (--skip-bad-files)
    complete    true after the last shard

Run an interrupted command again to resume it after the last finished shard. The shards are bitwise identical to those
of an uninterrupted run, for any number of workers. Documents keep the order of the source: training shuffles. The
workers are threads: tiktoken and pyarrow release Python's global interpreter lock, so one process uses all cores.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports below, which take seconds, ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import functools
import hashlib
import json
import os
import re
import reprlib
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data import EOT, NUM_TOKENS, TOKENIZER_SHA256, TokenStream, atomic_write, find_shards, get_tokenizer, write_shard
from runtime import ArgumentParser, exit_now, number, run_main
from sources import estimate_tokens, hub_source, is_damage, local_source, pieces, with_retries

DATASET, NAME = "HuggingFaceFW/fineweb-edu", "sample-10BT"
END_OF_TEXT = "<|endoftext|>"
MANIFEST = "manifest.json"
VERSION = 1               # of the manifest's format


# -----------------------------------------------------------------------------
# tokens

@functools.cache
def token_bytes():
    """Length in bytes of the text of every token, (NUM_TOKENS,) int64; 0 for <|endoftext|>."""
    tokenizer = get_tokenizer()
    return np.array([len(tokenizer.decode_single_token_bytes(i)) for i in range(EOT)] + [0])


def encode(texts, begins=True):
    """Tokens of the texts, 1-D uint16, with EOT before each; with begins=False, the first text continues a document.

    All texts are encoded in one call of tiktoken; the special token between them keeps their words separate.
    """
    tokenizer = get_tokenizer()
    joined = (END_OF_TEXT if begins else "") + END_OF_TEXT.join(texts)
    if joined.count(END_OF_TEXT) == len(texts) - (not begins):
        try:
            tokens = tokenizer.encode_to_numpy(joined, allowed_special={END_OF_TEXT})
        except UnicodeEncodeError:  # an unpaired surrogate, from JSON: replaced, as tiktoken's encode_ordinary does
            joined = joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            tokens = tokenizer.encode_to_numpy(joined, allowed_special={END_OF_TEXT})
    elif len(texts) == 1:  # the text itself contains "<|endoftext|>", which is ordinary text there
        ordinary = tokenizer.encode_to_numpy(joined[len(END_OF_TEXT) if begins else 0:], disallowed_special=())
        tokens = np.concatenate([[EOT] if begins else [], ordinary])
    else:
        return np.concatenate([encode([text], begins or i > 0) for i, text in enumerate(texts)])
    assert tokens.max(initial=0) < NUM_TOKENS, f"id {tokens.max()} is not one of GPT-2's: a shard has 16 bits per token"
    return tokens.astype(np.uint16)


def pack(chunks, shard_size, val_tokens, split="val", val_total=0):
    """Yields (split, tokens, split of the next shard): the stream in shards of at most shard_size tokens.

    chunks: the stream as uint16 arrays of any length; EOT begins a document. The val split comes first. It ends at a
    document boundary: the last one before val_tokens in the shard that reaches val_tokens, or else the next one after it.
    split, val_total: split of the next token and number of tokens in the val split so far, to resume.
    Raises ValueError if no tokens are left for the train split.
    Example: chunks [[EOT 1 2 EOT 3 4 EOT 5]], 5, 5 -> val [EOT 1 2], train [EOT 3 4 EOT 5]
    """
    shard, n = np.empty(shard_size, dtype=np.uint16), 0  # the current shard and the number of tokens in it
    for chunk in chunks:
        while len(chunk):
            part = chunk[:shard_size - n]  # the tokens to append to the shard
            val_end = None                 # length of the shard without the tokens after the end of the val split
            crossing = split == "val" and val_total < val_tokens <= val_total + len(part)
            if crossing:
                part = part[:val_tokens - val_total]
            elif split == "val" and val_total >= val_tokens and EOT in part:
                part = part[:np.argmax(part == EOT)]
                val_end = n + len(part)
            shard[n:n + len(part)] = part
            chunk, n = chunk[len(part):], n + len(part)
            val_total += len(part) if split == "val" else 0
            if crossing:
                boundaries = np.flatnonzero(shard[:n] == EOT)
                boundaries = boundaries[boundaries > n - val_total]  # not the start of the stream
                val_end = boundaries[-1] if len(boundaries) else None
            if val_end is not None or n == shard_size:
                end = n if val_end is None else val_end
                rest, next_split = shard[end:n], split if val_end is None else "train"
                if end > 0:
                    yield split, shard[:end], next_split
                shard, split, n = np.empty(shard_size, dtype=np.uint16), next_split, len(rest)
                shard[:n] = rest
    if split == "val":
        raise ValueError(f"no tokens are left for the train split: all {val_total:,} are in the val split, which ends at a"
                         f" document boundary. Delete the output folder and use a smaller --val-tokens (now {val_tokens:,})"
                         " or more documents. To train on a single text, use train_gpt2.py --data FILE")
    if n > 0:
        yield split, shard[:n], split


# -----------------------------------------------------------------------------
# the pipeline

def map_in_order(function, items, workers, ahead):
    """Yields function(item) for every item, in order, computed by threads; an exception in function is raised here.

    At most `ahead` items are read in advance, so memory stays bounded.
    """
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tokenize(piece):
    """(piece, its tokens, number of skipped documents: empty, not text, or not encodable; None, or the error if damaged)."""
    parts, skipped = [np.empty(0, dtype=np.uint16)], 0
    try:
        for texts in piece.read():
            kept = [text for text in texts if isinstance(text, str) and text]
            skipped += len(texts) - len(kept)
            try:
                parts.append(encode(kept, piece.begins) if kept else parts[0])
            except ValueError:  # tiktoken's regex engine fails on hundreds of thousands of consecutive spaces
                for text in kept:
                    try:
                        parts.append(encode([text], piece.begins))
                    except ValueError:
                        skipped += 1
    except Exception as e:
        if not is_damage(e):
            raise
        return piece, parts[0], 0, e
    return piece, np.concatenate(parts), skipped, None


class TokenizedSource:
    """The tokens of a source as one stream, and the place in the source that each token of the stream comes from.

    A shard usually ends within a document, and within a piece of the source. To resume after it, manifest["next"] stores
    the piece that contains the next token, and the index of that token in the piece. chunks() yields the tokens and
    records at which position of the stream each piece starts; locate() converts a position to a place in the source.
    Position 0 is the first token that chunks() yields.
    """

    def __init__(self, source, manifest, workers, bar):
        self.source, self.manifest, self.workers, self.bar = source, manifest, workers, bar
        self.position = -manifest["next"]["token"]  # of the next piece; negative if an earlier run has written a part of it
        self.skipped = manifest["next"]["skipped"]  # documents skipped before the next piece
        self.starts = deque()  # (position, piece, documents skipped before it) of the pieces from the current shard on

    def chunks(self, limit):
        """Yields uint16 arrays from manifest["next"] on, at most limit tokens in all."""
        first, bad = self.manifest["next"], set()
        todo = pieces(self.source, self.manifest["text_column"], bad, first["file"], first["number"])
        for piece, tokens, skipped, error in map_in_order(
                lambda piece: self.source.retry(lambda: tokenize(piece)), todo, self.workers, self.workers + 4):
            if error is not None and piece.file not in bad:
                self.skip_file(piece.file, error)
                bad.add(piece.file)
            if piece.file in bad:
                continue
            self.starts.append((self.position, piece, self.skipped))
            chunk = tokens[max(0, -self.position):][:limit]
            self.position, self.skipped = self.position + len(tokens), self.skipped + skipped
            self.bar.set_postfix_str(f"shard {len(self.manifest['shards'])}", refresh=False)
            self.bar.update(len(chunk))
            limit -= len(chunk)
            yield chunk
            if limit == 0:
                return

    def skip_file(self, i, error):
        """Records in the manifest that file i is damaged; without --skip-bad-files raises ValueError."""
        name, text = self.source.names[i], " ".join(str(error).split())
        if not self.manifest["skip_bad_files"]:
            raise ValueError(f"{name} is damaged or truncated ({text}); copy it again, or skip it with --skip-bad-files")
        tqdm.write(f"skipping the rest of {name}: {text}")
        self.manifest["bad_files"].append({"file": i, "name": os.path.basename(name), "error": text})

    def locate(self, position, split):
        """manifest["next"] for a shard that starts at position; later calls must not ask for an earlier position."""
        while len(self.starts) > 1 and self.starts[1][0] <= position:
            self.starts.popleft()
        start, piece, skipped = self.starts[0]
        return {"split": split, "file": piece.file, "number": piece.number, "token": position - start, "skipped": skipped}


# -----------------------------------------------------------------------------
# the output folder

def save_manifest(out, manifest):
    """Writes manifest.json atomically."""
    with atomic_write(os.path.join(out, MANIFEST), "w") as f:
        json.dump(manifest, f, indent=1)


def load_manifest(out):
    """The manifest of a folder, None if it has none; ValueError if it is damaged or of another version."""
    path = os.path.join(out, MANIFEST)
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); delete that folder to start over") from e
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path} has format version {manifest.get('version')}; supported is {VERSION}")
    return manifest


def open_manifest(out, settings):
    """The manifest of folder out, or a new one; ValueError if the folder was created with other settings."""
    manifest = load_manifest(out)
    if manifest is None:
        others = [path for split in ("train", "val") if os.path.isdir(out) for path in find_shards(out, split)]
        if others:
            raise ValueError(f"{out} holds shards without a {MANIFEST} ({os.path.basename(others[0])}, ...), which would be"
                             " overwritten; choose another --out")
        return {"version": VERSION, **settings, "shards": [], "bad_files": [], "complete": False,
                "next": {"split": "val", "file": 0, "number": 0, "token": 0, "skipped": 0}}
    if not manifest["shards"]:
        return {**manifest, **settings}
    was, now = ({**{key: m.get(key) for key in settings}, **m["source"]} for m in (manifest, settings))
    different = [f"{key} was {reprlib.repr(was.get(key))}, is {reprlib.repr(now.get(key))}" for key in {**was, **now}
                 if key != "source" and was.get(key) != now.get(key)]
    if different:
        raise ValueError(f"{out} was created with other flags or from another source: {'; '.join(different)}. Use the same"
                         " ones to resume, or another --out")
    # damaged files from the current one on will be found again
    manifest["bad_files"] = [bad for bad in manifest["bad_files"] if bad["file"] < manifest["next"]["file"]]
    return manifest


def read_shard(path):
    """All tokens of a shard, 1-D uint16; ValueError if it is damaged or holds ids that are not GPT-2's."""
    stream = TokenStream([path])
    return stream.read(0, len(stream))


def shard_entry(out, name, split, tokens):
    """The manifest's entry of a shard, the file `name` in folder out, which contains tokens."""
    with open(os.path.join(out, name), "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"file": name, "split": split, "tokens": len(tokens), "documents": int(np.count_nonzero(tokens == EOT)),
            "sha256": sha256}


def add_shard(out, manifest, name, split, tokens, next_start):
    """Writes a shard, then the manifest: every shard that the manifest lists is complete."""
    write_shard(os.path.join(out, name), tokens)
    manifest["shards"].append(shard_entry(out, name, split, tokens))
    manifest["next"] = next_start
    save_manifest(out, manifest)


def make_shards(source, settings, out, workers):
    """Tokenizes a source into folder out, which may already have some of the shards; returns the manifest.

    settings: source, shard_size, ... as in the manifest; val_tokens may be None for the default. A thread writes each shard
    while the next one is tokenized.
    """
    # Arrow's own allocators keep memory that a thread has freed, 0.4 GB with 64 threads (measured), and are no faster
    pa.set_memory_pool(pa.system_memory_pool())
    limit = settings["max_tokens"] or 1 << 62  # all of the source
    total = min(limit, estimate_tokens(source, settings["text_column"]))
    val_tokens = settings["val_tokens"] or max(1, min(settings["shard_size"], total // 10))
    manifest = open_manifest(out, {**settings, "val_tokens": val_tokens})
    if manifest["complete"]:
        return manifest
    os.makedirs(out, exist_ok=True)
    for name in set(os.listdir(out)) - {MANIFEST, *(shard["file"] for shard in manifest["shards"])}:
        if re.fullmatch(r"(.*_(train|val)_\d+\.(npy|bin)|manifest\.json)(\.(\d+\.)?tmp)?", name):  # of an interrupted run
            os.remove(os.path.join(out, name))
    done = sum(shard["tokens"] for shard in manifest["shards"])
    free = shutil.disk_usage(out).free
    if 2 * (total - done) > free:
        raise ValueError(f"{out} has {free / 1e9:.2f} GB of free disk space; about {total - done:,} tokens of 2 bytes need"
                         f" {2 * (total - done) / 1e9:.2f} GB: free some, choose another --out, or use --max-tokens")
    prefix = "edufineweb" if settings["source"].get("dataset") == DATASET else os.path.basename(os.path.abspath(out))
    index, position = len(manifest["shards"]), 0
    bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, smoothing=0.05, disable=None)
    stream = TokenizedSource(source, manifest, workers, bar)
    with ThreadPoolExecutor(1) as writer, bar:
        written = writer.submit(save_manifest, out, manifest)
        for split, tokens, next_split in pack(stream.chunks(limit - done), manifest["shard_size"], val_tokens,
                                              manifest["next"]["split"], done):
            position += len(tokens)
            name, index = f"{prefix}_{split}_{index:06d}.{manifest['format']}", index + 1
            written.result()  # raises if the shard before could not be written
            written = writer.submit(add_shard, out, manifest, name, split, tokens, stream.locate(position, next_split))
        written.result()
        manifest["complete"], manifest["next"]["skipped"] = True, stream.skipped
        save_manifest(out, manifest)
    return manifest


# -----------------------------------------------------------------------------
# verifying shards, and downloading tokenized ones

def verify(out):
    """Checks the shards of a folder against its manifest.json and prints statistics; ValueError for the first mismatch."""
    manifest = load_manifest(out)
    if manifest is None:
        raise FileNotFoundError(f"no {MANIFEST} in {out}; fineweb.py writes one beside its shards")
    counts = {"train": np.zeros(3, dtype=int), "val": np.zeros(3, dtype=int)}  # documents, tokens, bytes of text
    boundaries, position = [], 0  # where documents begin, in the stream of all shards
    for entry in tqdm(manifest["shards"], unit="shard", disable=None):
        tokens = read_shard(os.path.join(out, entry["file"]))
        actual = shard_entry(out, entry["file"], entry["split"], tokens)
        different = [f"{key} was {entry[key]}, is {actual[key]}" for key in entry if entry[key] != actual[key]]
        if different:
            raise ValueError(f"{os.path.join(out, entry['file'])} has changed: {'; '.join(different)}. Delete {out} and create"
                             " it again")
        blocks = np.array_split(tokens, len(tokens) // 2**22 + 1)  # less memory: an index takes 8 bytes per token
        counts[entry["split"]] += actual["documents"], len(tokens), sum(token_bytes()[block].sum() for block in blocks)
        boundaries.append(position + np.flatnonzero(tokens == EOT))
        position += len(tokens)
    if not manifest["complete"]:
        raise ValueError(f"{out} is incomplete: its {len(manifest['shards'])} shards are correct, more are missing; run the"
                         " command that created it again")
    for split, (documents, tokens, size) in counts.items():
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {size / max(1, tokens - documents):.3f} bytes per token")
    lengths = np.diff(np.concatenate([*boundaries, [position]]))
    print(f"tokens per document: min {lengths.min():,}, median {int(np.median(lengths)):,}, mean {lengths.mean():,.0f},"
          f" max {lengths.max():,}")
    print(f"{out}: {len(manifest['shards'])} shards, all counts and hashes match; {manifest['next']['skipped']:,} documents"
          f" were skipped (empty or not text), {len(manifest['bad_files'])} damaged files were skipped in whole or in part")


def download_prepared(repo, out, revision, max_tokens):
    """Downloads the .bin and .npy shards of a dataset on the Hub into folder out, and writes a manifest of them.

    Files of the right size are not downloaded again; a partial download is resumed. If max_tokens is not 0, stops once
    the shards hold that many tokens.
    """
    from huggingface_hub import HfApi, hf_hub_download
    info = with_retries(lambda: HfApi().dataset_info(repo, revision=revision, files_metadata=True))
    sizes = {f.rfilename: f.size for f in info.siblings if re.search(r"_(train|val)_\d+\.(npy|bin)$", f.rfilename)}
    if not sizes:
        raise ValueError(f"{repo} has no shards (*_train_000001.bin, *_val_000000.bin or .npy); use --dataset for text")
    shards, total = [], 0
    for name in tqdm(sorted(sizes, key=lambda name: ("_val_" not in name, name)), unit="shard", disable=None):
        if max_tokens and total >= max_tokens:
            break
        path = os.path.join(out, name)
        if os.path.exists(path) and os.path.getsize(path) != sizes[name]:
            os.remove(path)  # huggingface_hub accepts a file of any size if it wrote it less than a second ago
        if not os.path.exists(path):
            with_retries(lambda name=name: hf_hub_download(repo, name, repo_type="dataset", revision=info.sha, local_dir=out))
        tokens = read_shard(path)
        shards.append(shard_entry(out, name, "val" if "_val_" in name else "train", tokens))
        total += len(tokens)
    save_manifest(out, {"version": VERSION, "source": {"prepared": repo, "commit": info.sha}, "shards": shards,
                        "bad_files": [], "next": {"skipped": 0}, "complete": True})


# -----------------------------------------------------------------------------
# the command

def parse_args(argv=None):
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(description="Tokenize text into shards for training.")
    add = parser.add_argument
    add("--dataset", default=DATASET, metavar="REPO", help=f"dataset on the Hugging Face Hub (default {DATASET})")
    add("--name", help=f"config of the dataset: sample-100BT, CC-MAIN-2024-10, ... (default {NAME} for FineWeb-Edu)")
    add("--revision", default="main", help="branch, tag or commit of the dataset (default main)")
    add("--split", default="train", help="split of the dataset to read (default train)")
    add("--input", nargs="+", metavar="PATH", help="read local files or folders instead: parquet, jsonl, txt (.gz, .zst)")
    add("--text-column", default="text", metavar="NAME", help="column or JSON field with the text (default text)")
    add("--out", metavar="DIR", help="output folder (default edu_fineweb10B, ... for FineWeb-Edu's samples)")
    add("--shard-size", type=number(int, 2), default=10**8, metavar="N", help="tokens per shard (default 100M)")
    add("--max-tokens", type=number(int, 0), default=0, metavar="N", help="stop after this many tokens (default: no limit)")
    add("--val-tokens", type=number(int, 1), metavar="N",
        help="approximate tokens in the val split, which ends at a document boundary (default: one shard, or 10%%"
        " of the estimated total if that is less)")
    add("--workers", type=number(int, 0), default=0, metavar="N", help="tokenizer threads (default: one per core)")
    add("--format", choices=("npy", "bin"), default="npy", help="shard format: NumPy's or llm.c's (default npy)")
    add("--skip-bad-files", action="store_true", help="skip the rest of a damaged file instead of stopping")
    add("--verify", metavar="DIR", help="check the shards of a folder against its manifest.json, and do nothing else")
    add("--prepared", metavar="REPO", help="download shards that are already tokenized, e.g. kjj0/finewebedu10B-gpt2")
    args = parser.parse_args(argv)
    if args.dataset == DATASET:
        args.name = args.name or NAME
        if not args.input and not args.prepared and (sample := re.fullmatch(r"sample-(\d+B)T", args.name)):
            args.out = args.out or f"edu_fineweb{sample[1]}"
    if not args.out and not args.verify:
        raise ValueError("--out is missing: the folder for the shards")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # with a dataset on the Hub, half of the threads wait for the network
    args.workers = (args.workers or cores) * (1 if args.input else 2)
    return args


def main():
    args = parse_args()
    if args.verify:
        return verify(args.verify)
    if args.prepared:
        return download_prepared(args.prepared, args.out, args.revision, args.max_tokens)
    if args.input:
        source = local_source(args.input)
    else:
        was = (load_manifest(args.out) or {"source": {}})["source"]
        same = all(was.get(key) == getattr(args, key) for key in ("dataset", "name", "split", "revision"))
        source = hub_source(args.dataset, args.name, args.split, args.revision, was["commit"] if same else None)
    settings = {"tokenizer": {"name": "gpt2", "sha256": TOKENIZER_SHA256}, "source": source.description,
                "shard_size": args.shard_size, "val_tokens": args.val_tokens, "max_tokens": args.max_tokens,
                "format": args.format, "text_column": args.text_column, "skip_bad_files": args.skip_bad_files}
    manifest = make_shards(source, settings, args.out, args.workers)
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    print(f"{args.out}: {len(manifest['shards'])} shards, {tokens:,} tokens; python train_gpt2.py --data {args.out}")


if __name__ == "__main__":
    try:
        run_main(main)
        exit_now(0)
    except SystemExit as end:  # interpreter shutdown would wait for worker threads, which may be waiting for the network
        exit_now(end.code or 0)
