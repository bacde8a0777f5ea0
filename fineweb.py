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
    python fineweb.py --val first-shard                     # FineWeb-Edu in build-nanogpt's shards, byte for byte
    python fineweb.py --verify edu_fineweb10B               # checks all counts and hashes

Writes edufineweb_val_000000.npy, edufineweb_train_000001.npy, ... and manifest.json:

    version, tokenizer, source, shard_size, val, val_tokens, max_tokens, format, text_column, skip_bad_files: the settings
    shards      [{file, split, tokens, documents (number that begin in the shard), sha256}, ...] in order
    next        start of the next shard: split; file, number (of the piece in the file, see sources.py), token (in the
                piece), all counted from 0; skipped: number of documents before that piece that were empty or not text
    bad_files   [{file, name, error}, ...], damaged files of which the rest was skipped (--skip-bad-files)
    complete    true after the last shard

Run an interrupted command again to resume it after the last finished shard. The shards are bitwise identical to those
of an uninterrupted run, for any number of workers. Documents keep the order of the source: training shuffles. The
workers are threads: tiktoken and pyarrow release Python's global interpreter lock, so one process uses all cores.

The folder is locked while a process writes to it. Shards that the manifest does not list are an error, and never overwritten.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import reprlib
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from run.cli import ArgumentParser, exit_now, number, run_main, start

DATASET, NAME = "HuggingFaceFW/fineweb-edu", "sample-10BT"


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
    add("--max-tokens", type=number(int, 0), default=0, metavar="N",
        help="stop after this many tokens, 5B or 5e9 (default: no limit)")
    add("--val-tokens", type=number(int, 1), metavar="N",
        help="approximate tokens in the val split, which ends at a document boundary (default: one shard, or 10%%"
        " of the estimated total if that is less)")
    add("--val", choices=("documents", "first-shard"), default="documents",
        help="documents: the val split ends with a document (default); first-shard: it is the first --shard-size tokens, as in"
        " the lecture, so that the shards of FineWeb-Edu are build-nanogpt's byte for byte")
    add("--workers", type=number(int, 0, 1024), default=0, metavar="N", help="tokenizer threads (default: one per core)")
    add("--format", choices=("npy", "bin"), default="npy", help="shard format: NumPy's or llm.c's (default npy)")
    add("--skip-bad-files", action="store_true", help="skip the rest of a damaged file instead of stopping")
    add("--verify", metavar="DIR", help="check the shards of a folder against its manifest.json, and do nothing else")
    add("--prepared", metavar="REPO", help="download shards that are already tokenized, e.g. kjj0/finewebedu10B-gpt2")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, str) and (not value or not value.isprintable()):
            raise ValueError(f"--{name.replace('_', '-')} {value!r}: must not be empty or contain control characters")
    if args.input and args.prepared:
        raise ValueError("--input and --prepared exclude each other; use one of them")
    if args.val == "first-shard" and args.val_tokens:
        raise ValueError("--val first-shard takes the first --shard-size tokens; omit --val-tokens")
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


if __name__ == "__main__":
    start(parse_args)

import numpy as np
import pyarrow as pa
from tqdm import tqdm

import data
from run import files
from data import EOT, MANIFEST, TOKENIZER_SHA256, TokenStream, get_tokenizer, load_manifest, write_shard
from run.runtime import free_memory
from sources import (estimate_tokens, hub_hash, hub_shards, hub_source, is_damage, local_source, map_in_order, pieces,
                     with_retries)

END_OF_TEXT = "<|endoftext|>"
LOCK = ".fineweb.lock"    # in the output folder, while a process writes there
REPORT_SECONDS = 15       # between two progress lines, where there is no terminal for a progress bar


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
    joined = (END_OF_TEXT if begins else "") + END_OF_TEXT.join(texts)
    if joined.count(END_OF_TEXT) != len(texts) - (not begins):  # a text contains "<|endoftext|>", which is ordinary text there
        if len(texts) > 1:
            return np.concatenate([encode([text], begins or i > 0) for i, text in enumerate(texts)])
        return np.concatenate([np.full(int(begins), EOT, dtype=np.uint16), encode_joined(texts[0], frozenset())])
    return encode_joined(joined, {END_OF_TEXT})


def encode_joined(text, special):
    """data.encode; unpaired surrogates, from JSON, are replaced, as tiktoken's encode_ordinary does."""
    try:
        return data.encode(text, special)
    except UnicodeError:
        return data.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), special)


def pack(chunks, shard_size, val_tokens, split="val", val_total=0, val="documents"):
    """Yields (split, tokens, split of the next shard): the stream in shards of at most shard_size tokens.

    chunks: the stream as uint16 arrays of any length; EOT begins a document. The val split comes first. It ends at a
    document boundary: the last one in the shard that reaches val_tokens, of at most val_tokens, or else the next one after
    it. With val="first-shard" it is the first shard_size tokens, which end within a document.
    split, val_total: split of the next token and number of tokens in the val split so far, to resume.
    Raises ValueError if no tokens are left for the train split.
    Example: chunks [[EOT 1 2 EOT 3 4 EOT 5]], 5, 5 -> val [EOT 1 2], train [EOT 3 4 EOT 5]
    """
    shard, n = np.empty(shard_size, dtype=np.uint16), 0  # the current shard and the number of tokens in it
    for chunk in chunks:
        while len(chunk):  # the next token is known: whether a document, or the val split, ends before it
            end, next_split = n if n == shard_size else None, split  # the shard's length, None while there is room in it
            if split == "val" and val == "first-shard":
                next_split = split if end is None else "train"
            elif split == "val" and val_total >= val_tokens and chunk[0] == EOT:
                end, next_split = n, "train"
            elif split == "val" and val_total == val_tokens:
                boundaries = np.flatnonzero(shard[:n] == EOT)
                boundaries = boundaries[boundaries > n - val_total]  # not the start of the stream
                end, next_split = (boundaries[-1], "train") if len(boundaries) else (end, split)
            if end is not None:
                if end > 0:
                    yield split, shard[:end], next_split
                rest, split = shard[end:n], next_split
                shard, n = np.empty(shard_size, dtype=np.uint16), len(rest)
                shard[:n] = rest
            part = chunk[:shard_size - n]  # the tokens to append to the shard
            if split == "val" and val == "documents" and val_total < val_tokens:
                part = part[:val_tokens - val_total]
            elif split == "val" and val == "documents" and EOT in part:
                part = part[:np.argmax(part == EOT)]
            shard[n:n + len(part)] = part
            chunk, n = chunk[len(part):], n + len(part)
            val_total += len(part) if split == "val" else 0
    if split == "val" and val_total == 0:
        raise ValueError("the source contains no text: all of its documents are empty or not text; check --text-column")
    if split == "val":
        end, flag = (("ends at a document boundary", f"--val-tokens (now {val_tokens:,})") if val == "documents" else
                     ("is the first shard", f"--shard-size (now {shard_size:,})"))
        raise ValueError(f"no tokens are left for the train split: all {val_total:,} are in the val split, which {end}. Delete"
                         f" the output folder and use a smaller {flag} or more documents. To train on a single text, use"
                         " train_gpt2.py --data FILE")
    if n > 0:
        yield split, shard[:n], split


# -----------------------------------------------------------------------------
# the pipeline

def tokenize(piece):
    """(piece, its tokens, number of skipped documents: empty, not text, or not encodable; None, or the error if damaged).

    The tokens of a damaged piece are those of the documents before the damage.
    """
    parts, skipped, error = [np.empty(0, dtype=np.uint16)], 0, None
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
        error = e
    return piece, np.concatenate(parts), skipped, error


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
        self.tokens, self.began, self.reported = 0, time.monotonic(), time.monotonic()
        self.starts = deque()  # (position, piece, documents skipped before it) of the pieces from the current shard on

    def chunks(self, limit):
        """Yields uint16 arrays from manifest["next"] on, at most limit tokens in all."""
        first, bad = self.manifest["next"], set()
        todo = pieces(self.source, self.manifest["text_column"], bad, first["file"], first["number"])
        for piece, tokens, skipped, error in map_in_order(tokenize, todo, self.workers, self.workers + 4):
            if piece.file in bad:
                continue
            if error is not None:
                self.skip_file(piece.file, error)
                bad.add(piece.file)
            self.starts.append((self.position, piece, self.skipped))
            chunk = tokens[max(0, -self.position):][:limit]
            self.position, self.skipped = self.position + len(tokens), self.skipped + skipped
            self.report(len(chunk))
            limit -= len(chunk)
            yield chunk
            if limit == 0:
                return

    def report(self, n):
        """Advances the progress bar by n tokens; without a terminal, prints a line once in a while."""
        self.bar.set_postfix_str(f"shard {len(self.manifest['shards'])}", refresh=False)
        self.bar.update(n)
        self.tokens += n
        now, done, total = time.monotonic(), self.bar.n + self.tokens, self.bar.total
        if now - self.reported > REPORT_SECONDS:
            self.reported = now
            known = done < total  # the total is a low estimate
            form = "{n_fmt}" + " of about {total_fmt}" * known + " tokens, {rate_fmt}" + ", {remaining} left" * known
            print_progress(tqdm.format_meter(done, total, now - self.began, unit="tok", unit_scale=True, initial=self.bar.n,
                                             bar_format=form))

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

@contextlib.contextmanager
def output_folder(out):
    """Context in which folder out exists and no other fineweb.py writes to it; its value is whether the folder is locked.

    Raises ValueError if out is in use, or if files cannot be created there. Folders created here are removed at the end if
    they are still empty.
    """
    created, lock = [], None
    try:
        files.make_folders(out, created)
        lock = files.lock(os.path.join(out, LOCK))
        if lock is None:
            print(f"{out} cannot be locked on this file system: do not run another fineweb.py in it")
    except BlockingIOError as e:
        raise ValueError(f"{out} is in use by another fineweb.py; wait for it or stop it, or choose another --out") from e
    except OSError as e:
        raise ValueError(f"files cannot be created in {out} ({e.strerror}); choose another --out") from e
    else:
        yield lock is not None
    finally:
        with contextlib.suppress(OSError):  # rmdir refuses a folder that is not empty
            if lock is not None:
                os.remove(os.path.join(out, LOCK))
                lock.close()
            for folder in created:
                os.rmdir(folder)


def save_manifest(out, manifest):
    """Writes manifest.json atomically."""
    with files.atomic_write(os.path.join(out, MANIFEST), "w") as f:
        json.dump(manifest, f, indent=1)


def open_manifest(out, settings):
    """The manifest of folder out, or a new one; ValueError if the folder was created with other settings."""
    manifest = load_manifest(out)
    if manifest is None or not manifest["shards"]:
        return {"version": data.MANIFEST_VERSION, **settings, "shards": [], "bad_files": [], "complete": False,
                "next": {"split": "val", "file": 0, "number": 0, "token": 0, "skipped": 0}}
    manifest.setdefault("val", "documents")  # which earlier versions did not record
    was, now = ({**{key: m.get(key) for key in settings}, **m["source"]} for m in (manifest, settings))
    different = [f"{key} was {reprlib.repr(was.get(key))}, is {reprlib.repr(now.get(key))}" for key in {**was, **now}
                 if key != "source" and was.get(key) != now.get(key)]
    if different:
        raise ValueError(f"{out} was created with other flags or from another source: {'; '.join(different)}. Use the same"
                         " ones to resume, or another --out")
    if (not data.has_fields(manifest["next"], split=str, file=int, number=int, token=int, skipped=int)
            or manifest["next"]["split"] not in ("train", "val")
            or not all(data.has_fields(bad, file=int) for bad in manifest["bad_files"])):
        raise ValueError(f"{os.path.join(out, MANIFEST)} is damaged (next or bad_files): it cannot be resumed; choose another"
                         " --out")
    # damaged files from the current one on will be found again
    manifest["bad_files"] = [bad for bad in manifest["bad_files"] if bad["file"] < manifest["next"]["file"]]
    return manifest


def read_shard(path):
    """All tokens of a shard, 1-D uint16; ValueError if it is damaged or holds ids that are not GPT-2's."""
    stream = TokenStream([path])
    return stream.read(0, len(stream)) if len(stream) else np.empty(0, dtype=np.uint16)


def shard_entry(out, name, split, tokens):
    """The manifest's entry of a shard, the file `name` in folder out, which contains tokens."""
    with open(os.path.join(out, name), "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"file": name, "split": split, "tokens": len(tokens), "documents": int(np.count_nonzero(tokens == EOT)),
            "sha256": sha256}


def add_shard(out, manifest, name, split, tokens, next_start):
    """Writes a shard, then the manifest: every shard that the manifest lists is complete.

    A process that was killed between the two has left this shard, with the same tokens; ValueError if the file differs.
    """
    path = os.path.join(out, name)
    if not os.path.lexists(path):
        write_shard(path, tokens)
    elif not np.array_equal(read_shard(path), tokens):
        raise ValueError(f"{path} exists already and is not the shard to be written there; move it to another folder")
    manifest["shards"].append(shard_entry(out, name, split, tokens))
    manifest["next"] = next_start
    save_manifest(out, manifest)
    print_progress(f"{name}: {len(tokens):,} tokens")


def print_progress(text):
    """Prints a line where there is no terminal, and hence no progress bar."""
    if not sys.stderr.isatty():
        print(text, flush=True)


def make_shards(source, settings, out, workers, locked=False):
    """Tokenizes a source into folder out, which may already have some of the shards; returns the manifest.

    settings: source, shard_size, ... as in the manifest; val_tokens may be None for the default. A thread writes each shard
    while the next one is tokenized. locked: no other process writes to out.
    """
    memory = free_memory("cpu")
    if memory and 4 * settings["shard_size"] > memory:  # one shard is filled while another one is written
        raise ValueError(f"--shard-size {settings['shard_size']:,}: two shards of 2 bytes per token do not fit into the"
                         f" {memory / 1e9:.1f} GB of memory available; use a smaller one")
    # Arrow's own allocators keep memory that a thread has freed, 0.4 GB with 64 threads (measured), and are no faster
    pa.set_memory_pool(pa.system_memory_pool())
    limit = settings["max_tokens"] or 1 << 62  # all of the source
    total = min(limit, estimate_tokens(source, settings["text_column"]))
    val_tokens = settings["val_tokens"] or max(1, min(settings["shard_size"], total // 10))
    val_tokens = settings["shard_size"] if settings["val"] == "first-shard" else val_tokens
    manifest = open_manifest(out, {**settings, "val_tokens": val_tokens})
    os.makedirs(out, exist_ok=True)
    # a folder that was renamed keeps the names of its shards
    prefix = "edufineweb" if settings["source"].get("dataset") == DATASET else os.path.basename(os.path.abspath(out))
    prefix = manifest["shards"][0]["file"].rsplit("_", 2)[0] if manifest["shards"] else prefix
    index, position = len(manifest["shards"]), 0
    # a killed process may have left the next shard, which add_shard compares, and temporary files
    following = [f"{prefix}_{split}_{index:06d}.{manifest['format']}" for split in ("train", "val")]
    data.check_unlisted(out, manifest, following if not manifest["complete"] else ())
    data.check_listed(out, manifest)
    if manifest["complete"]:
        return manifest
    for name in os.listdir(out) if locked else ():
        if re.fullmatch(r"(.+)\.\d+\.tmp", name) and name.rsplit(".", 2)[0] in (MANIFEST, *following):
            os.remove(os.path.join(out, name))
    done = sum(shard["tokens"] for shard in manifest["shards"])
    free = shutil.disk_usage(out).free
    if 2 * (total - done) > free:
        raise ValueError(f"{out} has {free / 1e9:.2f} GB of free disk space; about {total - done:,} tokens of 2 bytes need"
                         f" {2 * (total - done) / 1e9:.2f} GB: free some, choose another --out, or use --max-tokens")
    bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, smoothing=0.05, disable=None)
    stream = TokenizedSource(source, manifest, workers, bar)
    with ThreadPoolExecutor(1) as writer, bar:
        written = writer.submit(int)  # nothing yet
        for split, tokens, next_split in pack(stream.chunks(limit - done), manifest["shard_size"], val_tokens,
                                              manifest["next"]["split"], done, settings["val"]):
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
    data.check_unlisted(out, manifest)
    data.check_listed(out, manifest)
    counts = {"train": np.zeros(3, dtype=int), "val": np.zeros(3, dtype=int)}  # documents, tokens, bytes of text
    boundaries, position = [], 0  # where documents begin, in the stream of all shards
    for entry in tqdm(manifest["shards"], unit="shard", disable=None):
        tokens = read_shard(os.path.join(out, entry["file"]))
        actual = shard_entry(out, entry["file"], entry["split"], tokens)
        different = [f"{key} was {entry[key]}, is {actual[key]}" for key in actual if entry[key] != actual[key]]
        if different:
            raise ValueError(f"{os.path.join(out, entry['file'])} has changed: {'; '.join(different)}. Restore it, or create"
                             " the folder again")
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
    if len(lengths):
        print(f"tokens per document: min {lengths.min():,}, median {int(np.median(lengths)):,}, mean {lengths.mean():,.0f},"
              f" max {lengths.max():,}")
    print(f"{out}: {len(manifest['shards'])} shards, all counts and hashes match; {manifest['next']['skipped']:,} documents"
          f" were skipped (empty or not text), {len(manifest['bad_files'])} damaged files were skipped in whole or in part")


def download_prepared(repo, out, revision, max_tokens):
    """Downloads the .bin and .npy shards of a dataset on the Hub into folder out, and writes a manifest of them.

    Shards in the manifest of an earlier run are downloaded again only if their size or hash is not the Hub's. If max_tokens
    is not 0, stops once the shards hold that many tokens and both splits have one.
    """
    from huggingface_hub import hf_hub_download
    manifest = load_manifest(out) or {"version": data.MANIFEST_VERSION, "source": {"prepared": repo}, "shards": [],
                                      "bad_files": [], "next": {"skipped": 0}, "complete": False}
    source, listed = manifest["source"], {shard["file"]: shard for shard in manifest["shards"]}
    if source.get("prepared") != repo or source.setdefault("revision", revision) != revision:
        raise ValueError(f"{out} was created from {reprlib.repr(source)}, not {repo} at {revision}; choose another --out")
    commit, found = hub_shards(repo, revision, source.get("commit"))
    source.setdefault("commit", commit)
    if gone := sorted(listed.keys() - found.keys()):  # a manifest without the commit, of an earlier version
        raise ValueError(f"{out} has shards that {repo} no longer has ({gone[0]}, ...); choose another --out")
    data.check_unlisted(out, manifest, found)
    total = 0
    for name, (size, digest, is_lfs) in tqdm(found.items(), unit="shard", disable=None):
        path, split = os.path.join(out, name), name.rsplit("_", 2)[1]
        exists = os.path.exists(path)
        if not exists and name not in listed and max_tokens and total >= max_tokens and any(
                shard["split"] == split for shard in listed.values()):
            continue
        same = exists and os.path.getsize(path) == size and digest == (
            listed[name]["sha256"] if name in listed and is_lfs else hub_hash(path, is_lfs))
        if exists and not same and name not in listed:
            raise ValueError(f"{path} exists already and is not the shard of {repo}; move it to another folder")
        if not same:
            if exists:
                os.remove(path)  # huggingface_hub accepts a file of any size if it wrote it less than a second ago
            with_retries(lambda name=name: hf_hub_download(repo, name, repo_type="dataset", revision=source["commit"],
                                                           local_dir=out))
            if hub_hash(path, is_lfs) != digest:
                raise ValueError(f"{path} was damaged by the download: its hash is not that of {repo}'s shard. Delete the file,"
                                 " then run the same command again")
        if not same or name not in listed:
            listed[name] = shard_entry(out, name, split, read_shard(path))
            save_manifest(out, {**manifest, "shards": list(listed.values()), "complete": False})
            print_progress(f"{name}: {listed[name]['tokens']:,} tokens")
        total += listed[name]["tokens"]
    save_manifest(out, {**manifest, "shards": list(listed.values()), "complete": True})


# -----------------------------------------------------------------------------
# the command

def main():
    args = parse_args()
    if args.verify:
        return verify(args.verify)
    with output_folder(args.out) as locked:
        if args.prepared:
            return download_prepared(args.prepared, args.out, args.revision, args.max_tokens)
        if args.input:
            source = local_source(args.input)
        else:
            was = (load_manifest(args.out) or {"source": {}})["source"]
            same = all(was.get(key) == getattr(args, key) for key in ("dataset", "name", "split", "revision"))
            source = hub_source(args.dataset, args.name, args.split, args.revision, was.get("commit") if same else None)
        settings = {"tokenizer": {"name": "gpt2", "sha256": TOKENIZER_SHA256}, "source": source.description,
                    **{key: getattr(args, key) for key in ("shard_size", "val", "val_tokens", "max_tokens", "format",
                                                           "text_column", "skip_bad_files")}}
        manifest = make_shards(source, settings, args.out, args.workers, locked)
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    print(f"{args.out}: {len(manifest['shards'])} shards, {tokens:,} tokens; python train_gpt2.py --data {args.out}")


if __name__ == "__main__":
    try:
        run_main(main)
        exit_now(0)
    except SystemExit as end:  # interpreter shutdown would wait for worker threads, which may be waiting for the network
        exit_now(end.code or 0)
