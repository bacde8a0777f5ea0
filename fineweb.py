"""
From text to shards: reads web text, tokenizes it on all cores, writes shards that data.py and other people's readers load.

    python fineweb.py                                       # FineWeb-Edu sample-10BT into edu_fineweb10B/, 10B tokens
    python fineweb.py --name sample-100BT                   # or sample-350BT, CC-MAIN-2024-10 (with --out), ...
    python fineweb.py --dataset roneneldan/TinyStories --name default --out tinystories
    python fineweb.py --input my_texts/ --out my_shards     # parquet, jsonl, txt (.gz, .zst), folders of them; no network
    python fineweb.py --prepared kjj0/finewebedu10B-gpt2 --out edu_fineweb10B     # downloads shards others have made
    python fineweb.py --verify edu_fineweb10B               # checks every count and hash

Writes edufineweb_val_000000.npy, edufineweb_train_000001.npy, ... (1-D uint16; <|endoftext|> before each document, as
https://github.com/karpathy/build-nanogpt does) and manifest.json:

    version, tokenizer, source, shard_size, val_tokens, max_tokens, format, text_column, skip_bad_files: what was asked
    shards      [{file, split, tokens, documents (that begin in it), sha256}, ...] in order
    next        where the next shard begins: its split; file (from 0), number (of a piece of it: a row group, some
                lines), token (of the piece); skipped: documents before that piece that were empty or no text
    bad_files   [{file, name, error}, ...] left out from there on with --skip-bad-files
    complete    true once all is written

Interrupted at any moment, the same command goes on after the last finished shard; the bytes are those of an
uninterrupted run, for any number of workers. Documents stay in the source's order: training shuffles.

The workers are threads: tiktoken and pyarrow work outside Python's lock, so one process fills all cores, holds one
copy of everything, and starts alike on every system.
"""
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data import EOT, NUM_TOKENS, TOKENIZER_SHA256, find_shards, get_tokenizer, open_shard, write_shard
from runtime import ArgumentParser, exit_now, run_main
from sources import READ_ERRORS, BadFile, estimate_tokens, hub_source, is_damage, local_source, patiently, pieces

DATASET, NAME = "HuggingFaceFW/fineweb-edu", "sample-10BT"
END_OF_TEXT = "<|endoftext|>"
MANIFEST = "manifest.json"
VERSION = 1               # of the manifest


# -----------------------------------------------------------------------------
# tokens

@functools.cache
def token_bytes():
    """Length in bytes of every token's text, (NUM_TOKENS) int64; <|endoftext|> counts 0."""
    tokenizer = get_tokenizer()
    return np.array([len(tokenizer.decode_single_token_bytes(i)) for i in range(EOT)] + [0])


def encode(texts, begins=True):
    """Tokens of the texts, 1-D uint16, <|endoftext|> before each; not before the first if it does not begin a document.

    One call of tiktoken for all of them: the special token between two documents keeps their words apart.
    """
    tokenizer = get_tokenizer()
    joined = (END_OF_TEXT if begins else "") + END_OF_TEXT.join(texts)
    if joined.count(END_OF_TEXT) == len(texts) - (not begins):
        try:
            tokens = tokenizer.encode_to_numpy(joined, allowed_special={END_OF_TEXT})
        except UnicodeEncodeError:  # half a surrogate pair, from JSON: replaced, as tiktoken's encode_ordinary does
            joined = joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            tokens = tokenizer.encode_to_numpy(joined, allowed_special={END_OF_TEXT})
    elif len(texts) == 1:  # a text that speaks of <|endoftext|>: there it is ordinary text
        ordinary = tokenizer.encode_to_numpy(joined[len(END_OF_TEXT) if begins else 0:], disallowed_special=())
        tokens = np.concatenate([[EOT] if begins else [], ordinary])
    else:
        return np.concatenate([encode([text], begins or i > 0) for i, text in enumerate(texts)])
    assert tokens.max(initial=0) < NUM_TOKENS, f"id {tokens.max()} does not belong to GPT-2: shards hold 16 bits a token"
    return tokens.astype(np.uint16)


def pack(chunks, shard_size, val_tokens, split="val", val_total=0):
    """Yields (split, tokens, split of the next shard): the chunks' tokens, in order, as shards of shard_size or fewer.

    chunks: uint16 arrays, one stream in which EOT begins a document, cut anywhere. The val split is the documents
    that end within val_tokens. The document that would pass them goes to train, unless it is the first one or fills
    the shard from an earlier one on: then val ends where it ends. split, val_total: where a former call stopped.
    Raises ValueError when nothing is left for train.
    Example: chunks [[EOT 1 2 EOT 3 4 EOT 5]], 5, 5 -> val [EOT 1 2], train [EOT 3 4 EOT 5]
    """
    shard, n = np.empty(shard_size, dtype=np.uint16), 0
    for chunk in chunks:
        while len(chunk):
            part = chunk[:shard_size - n]
            ends_val = False
            if split == "val" and val_total < val_tokens:
                part = part[:val_tokens - val_total]
            elif split == "val":
                borders = np.flatnonzero(part == EOT)
                ends_val = len(borders) > 0
                part = part[:borders[0]] if ends_val else part
            shard[n:n + len(part)] = part
            chunk, n = chunk[len(part):], n + len(part)
            cut = n
            if split == "val":
                crossing, val_total = val_total < val_tokens <= val_total + len(part), val_total + len(part)
                if crossing:
                    borders = np.flatnonzero(shard[:n] == EOT)
                    borders = borders[borders > n - val_total]  # not the stream's very first document
                    ends_val, cut = len(borders) > 0, borders[-1] if len(borders) else n
            if ends_val or n == shard_size:
                rest = shard[cut:n]
                next_split = "train" if ends_val else split
                if cut > 0:
                    yield split, shard[:cut], next_split
                shard, split, n = np.empty(shard_size, dtype=np.uint16), next_split, len(rest)
                shard[:n] = rest
    if split == "val":
        raise ValueError(f"nothing is left to train on: all {val_total:,} tokens are in the val split, which ends with a"
                         f" document; remove the shards and give a smaller --val-tokens (now {val_tokens:,}) or more"
                         " documents. A single text is not split here: train_gpt2.py --data FILE takes it as it is")
    if n > 0:
        yield split, shard[:n], split


# -----------------------------------------------------------------------------
# the pipeline

def map_in_order(function, items, workers, ahead):
    """Yields function(item) of every item, in order, computed by threads; raises what function raised.

    At most `ahead` items are read beyond the one that is yielded: what is in hand does not grow. The threads are
    daemons, for a wait on the network must not hold up the end of the program.
    """
    todo, waiting = queue.SimpleQueue(), deque()

    def work():
        while (task := todo.get()) is not None:
            item, future = task
            try:
                future.set_result(function(item))
            except BaseException as e:  # all of them, tiktoken's Rust panics too: who waits must hear of it
                future.set_exception(e)

    for _ in range(workers):
        threading.Thread(target=work, daemon=True, name="fineweb").start()
    try:
        for item in items:
            waiting.append(Future())
            todo.put((item, waiting[-1]))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for _ in range(workers):
            todo.put(None)


def tokenize(piece):
    """(piece, its tokens, documents skipped because they are empty or no text, bytes of text, error or None)."""
    parts, skipped, error = [np.empty(0, dtype=np.uint16)], 0, None
    try:
        for texts in piece.read():
            kept = [text for text in texts if isinstance(text, str) and text]
            skipped += len(texts) - len(kept)
            try:
                parts.append(encode(kept, piece.begins) if kept else parts[0])
            except ValueError:  # hundreds of thousands of blanks on end are more than tiktoken's pattern can match
                for text in kept:
                    try:
                        parts.append(encode([text], piece.begins))
                    except ValueError:
                        skipped += 1
    except (BadFile, *READ_ERRORS) as e:
        if not is_damage(e):
            raise
        parts, skipped, error = parts[:1], 0, e
    tokens = np.concatenate(parts)
    return piece, tokens, skipped, int(token_bytes()[tokens].sum()), error


class Results:
    """The tokens of a source as chunks for pack, and where in the source each of them stands."""

    def __init__(self, source, manifest, workers, bar):
        self.source, self.manifest, self.workers, self.bar = source, manifest, workers, bar
        self.position = -manifest["next"]["token"]  # in the stream of chunks, of the next piece's first token
        self.skipped = manifest["next"]["skipped"]
        self.trail = deque()                        # (position, piece, skipped before it), from the shard in hand on

    def chunks(self, room):
        """Yields uint16 arrays from manifest["next"] on, room tokens in all or until the source ends."""
        bad, started, size = {}, time.perf_counter(), 0
        wanted = pieces(self.source, self.manifest["text_column"], bad, self.manifest["next"]["file"],
                        self.manifest["next"]["number"])
        for piece, tokens, skipped, text_size, error in map_in_order(
                lambda piece: self.source.retry(functools.partial(tokenize, piece)), wanted, self.workers, self.workers + 4):
            if piece.file in bad:
                continue
            if error is not None:
                bad[piece.file] = self.note_bad_file(piece.file, error)
                continue
            self.trail.append((self.position, piece, self.skipped))
            chunk = tokens[max(0, -self.position):][:room]
            self.position, self.skipped, size = self.position + len(tokens), self.skipped + skipped, size + text_size
            self.bar.set_postfix_str(f"shard {len(self.manifest['shards'])}, "
                                     f"{size / (time.perf_counter() - started) / 1e6:.1f} MB/s", refresh=False)
            self.bar.update(len(chunk))
            room -= len(chunk)
            yield chunk
            if room == 0:
                return

    def note_bad_file(self, i, error):
        """Records what is wrong with file i, or raises it, as the flags say; returns the error's text."""
        name, text = self.source.names[i], " ".join(str(error).split())
        if not self.manifest["skip_bad_files"]:
            raise ValueError(f"{name} is damaged or cut short ({text}); copy it again, or leave it out by --skip-bad-files")
        tqdm.write(f"leaving out the rest of {name}: {text}")
        self.manifest["bad_files"].append({"file": i, "name": os.path.basename(name), "error": text})
        return text

    def place(self, position, split):
        """What manifest["next"] says of a position in the stream; forgets what lies before it."""
        while len(self.trail) > 1 and self.trail[1][0] <= position:
            self.trail.popleft()
        start, piece, skipped = self.trail[0]
        return {"split": split, "file": piece.file, "number": piece.number, "token": int(position - start), "skipped": skipped}


def save_manifest(out, manifest):
    """Writes manifest.json, whole or not at all."""
    temporary = os.path.join(out, MANIFEST + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, os.path.join(out, MANIFEST))


def load_manifest(out):
    """The manifest of a folder, or None if it has none; ValueError if it is not readable."""
    path = os.path.join(out, MANIFEST)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        try:
            manifest = json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is damaged ({e}); remove that folder to begin anew") from e
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path} has format version {manifest.get('version')}, this program writes {VERSION}")
    return manifest


def open_manifest(out, asked):
    """The manifest to go on with: a new one, or the folder's, if it was begun with the same source and flags."""
    manifest = load_manifest(out)
    if manifest is None:
        others = [path for split in ("train", "val") if os.path.isdir(out) for path in find_shards(out, split)]
        if others:
            raise ValueError(f"{out} holds shards without a {MANIFEST} ({os.path.basename(others[0])}, ...), which this would"
                             " overwrite; choose another --out")
        return {"version": VERSION, **asked, "shards": [], "bad_files": [], "complete": False,
                "next": {"split": "val", "file": 0, "number": 0, "token": 0, "skipped": 0}}
    if not manifest["shards"]:
        return {**manifest, **asked}
    was, now = ({**{key: m.get(key) for key in asked}, **m["source"]} for m in (manifest, asked))
    different = [f"{key} was {shorten(was.get(key))}, is {shorten(now.get(key))}" for key in {**was, **now}
                 if key != "source" and was.get(key) != now.get(key)]
    if different:
        raise ValueError(f"{out} was begun with other flags or another source: {'; '.join(different)}. Use the same ones to"
                         " go on, or another --out")
    # files not passed yet are met again
    manifest["bad_files"] = [bad for bad in manifest["bad_files"] if bad["file"] < manifest["next"]["file"]]
    return manifest


def shorten(value):
    """A value as it stands in an error message."""
    text = json.dumps(value)
    return text if len(text) < 90 else f"{text[:90]}... (differs)"


def write_one(out, manifest, name, split, tokens, place):
    """Writes a shard, then the manifest that holds it: what the manifest lists is whole."""
    path = os.path.join(out, name)
    write_shard(path, tokens)
    manifest["shards"].append({"file": name, "split": split, "tokens": len(tokens),
                               "documents": int(np.count_nonzero(tokens == EOT)), "sha256": sha256_of(path)})
    manifest["next"] = place
    save_manifest(out, manifest)


def sha256_of(path):
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_shards(source, asked, out, workers):
    """Makes what is missing of the shards of a source in folder out; returns the manifest.

    asked: source, shard_size, ... as in the manifest. Writing has a thread of its own, one shard behind.
    """
    # Arrow's own allocators keep what each thread freed: 0.4 GB more with 64 threads, measured here, for no speed
    pa.set_memory_pool(pa.system_memory_pool())
    manifest = open_manifest(out, asked)
    if manifest["complete"]:
        return manifest
    os.makedirs(out, exist_ok=True)
    save_manifest(out, manifest)
    for name in set(os.listdir(out)) - {shard["file"] for shard in manifest["shards"]}:
        if re.fullmatch(r".*_(train|val)_\d+\.(npy|bin)(\.\d+\.tmp)?", name):  # a shard that was being written
            os.remove(os.path.join(out, name))
    done = sum(shard["tokens"] for shard in manifest["shards"])
    total = min(manifest["max_tokens"] or 1 << 62, estimate_tokens(source, manifest["text_column"]))
    room = shutil.disk_usage(out).free
    if 2 * (total - done) > room:
        raise ValueError(f"{out} has room for {room / 1e9:.2f} GB; about {total - done:,} tokens of 2 bytes are to come,"
                         f" {2 * (total - done) / 1e9:.2f} GB: make room, choose another --out, or give --max-tokens")
    prefix, index = os.path.basename(os.path.abspath(out)), len(manifest["shards"])
    prefix = "edufineweb" if asked["source"].get("dataset") == DATASET else prefix
    bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, smoothing=0.05, disable=None)
    results, position = Results(source, manifest, workers, bar), 0
    chunks = results.chunks(manifest["max_tokens"] - done if manifest["max_tokens"] else 1 << 62)
    written = None
    with ThreadPoolExecutor(1) as writer, bar:
        for split, tokens, next_split in pack(chunks, manifest["shard_size"], manifest["val_tokens"],
                                              manifest["next"]["split"], done):
            position += len(tokens)
            name, index = f"{prefix}_{split}_{index:06d}.{manifest['format']}", index + 1
            if written is not None:
                written.result()
            written = writer.submit(write_one, out, manifest, name, split, tokens, results.place(position, next_split))
        if written is not None:
            written.result()
        manifest["complete"], manifest["next"]["skipped"] = True, results.skipped
        save_manifest(out, manifest)
    return manifest


# -----------------------------------------------------------------------------
# checking, and downloading what others have made

def verify(out):
    """Checks all that manifest.json says of a folder, and prints what is in it; ValueError names the first fault."""
    manifest = load_manifest(out)
    if manifest is None:
        raise FileNotFoundError(f"no {MANIFEST} in {out}; fineweb.py writes one beside its shards")
    counts = {"train": [0, 0, 0], "val": [0, 0, 0]}  # documents, tokens, bytes of text
    lengths, open_document = [], 0                   # tokens of each document, <|endoftext|> included
    for entry in tqdm(manifest["shards"], unit="shard", disable=None):
        path = os.path.join(out, entry["file"])
        shard = open_shard(path)
        if sha256_of(path) != entry["sha256"]:
            raise ValueError(f"{path} is not as it was written: its sha256 differs; delete {out} and make it again")
        documents = 0
        for start in range(0, shard.tokens, 1 << 22):
            n = min(1 << 22, shard.tokens - start)
            tokens = np.fromfile(path, dtype="<u2", count=n, offset=shard.offset + 2 * start)
            if tokens.max() >= NUM_TOKENS:
                raise ValueError(f"{path} holds id {tokens.max()}; allowed are ids below {NUM_TOKENS}")
            borders = np.flatnonzero(tokens == EOT)
            if len(borders):
                inner = np.diff(borders)
                lengths.append(np.concatenate([[open_document + borders[0]], inner]))
                open_document = n - borders[-1]
            else:
                open_document += n
            documents += len(borders)
            counts[entry["split"]][2] += int(token_bytes()[tokens].sum())
        if (shard.tokens, documents) != (entry["tokens"], entry["documents"]):
            raise ValueError(f"{path} holds {shard.tokens:,} tokens in {documents:,} documents; {MANIFEST} says"
                             f" {entry['tokens']:,} in {entry['documents']:,}")
        counts[entry["split"]][0] += documents
        counts[entry["split"]][1] += shard.tokens
    if not manifest["complete"]:
        raise ValueError(f"{out} is not complete: {len(manifest['shards'])} shards are there and right, more are to come;"
                         " run the command that began it once more")
    for split, (documents, tokens, size) in counts.items():
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {size / max(1, tokens - documents):.3f} bytes a token")
    lengths = np.concatenate([*lengths, [open_document]])[1:]  # the first is what stands before the first document: nothing
    print(f"tokens a document: shortest {lengths.min():,}, median {int(np.median(lengths)):,},"
          f" mean {lengths.mean():,.0f}, longest {lengths.max():,}")
    print(f"{out}: {len(manifest['shards'])} shards, every count and sha256 as written; {manifest['next']['skipped']:,}"
          f" documents were empty or no text, {len(manifest['bad_files'])} files left out in whole or in part")


def download_prepared(repo, out, revision, max_tokens):
    """Downloads the .bin and .npy shards of a dataset repository into folder out, and writes a manifest of them.

    Files that are there with the right size are not fetched again, and a part of one is gone on with. With max_tokens,
    no more shards than hold that many.
    """
    from huggingface_hub import HfApi, hf_hub_download
    info = patiently(lambda: HfApi().dataset_info(repo, revision=revision, files_metadata=True))
    sizes = {f.rfilename: f.size for f in info.siblings if re.search(r"_(train|val)_\d+\.(npy|bin)$", f.rfilename)}
    if not sizes:
        raise ValueError(f"{repo} holds no shards (*_train_000001.bin, *_val_000000.bin or .npy); --dataset tokenizes text")
    order = sorted(sizes, key=lambda name: ("_val_" not in name, name))
    shards, tokens = [], 0
    for name in tqdm(order, unit="shard", disable=None):
        if max_tokens and tokens >= max_tokens:
            break
        path = os.path.join(out, name)
        if os.path.exists(path) and os.path.getsize(path) != sizes[name]:
            os.remove(path)  # the library below would take a file that it wrote less than a second ago for whole
        if not os.path.exists(path):
            patiently(lambda name=name: hf_hub_download(repo, name, repo_type="dataset", revision=info.sha, local_dir=out))
        shard = open_shard(path)
        documents = int(np.count_nonzero(np.fromfile(path, dtype="<u2", offset=shard.offset) == EOT))
        shards.append({"file": name, "split": "val" if "_val_" in name else "train", "tokens": shard.tokens,
                       "documents": documents, "sha256": sha256_of(path)})
        tokens += shard.tokens
    save_manifest(out, {"version": VERSION, "source": {"prepared": repo, "commit": info.sha}, "shards": shards,
                        "bad_files": [], "next": {"skipped": 0}, "complete": True})


# -----------------------------------------------------------------------------
# the command

def parse_args(argv=None):
    """The flags; ValueError for what cannot be."""
    parser = ArgumentParser(description="Text into shards of GPT-2 tokens.", allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default=DATASET, help=f"dataset on the Hub (default {DATASET})")
    add("--name", default=None, help=f"its config: sample-10BT, sample-100BT, CC-MAIN-... (default {NAME} for FineWeb-Edu)")
    add("--revision", default="main", help="branch, tag or commit of the dataset (default main)")
    add("--split", default="train", help="split of the dataset to read (default train)")
    add("--input", nargs="+", metavar="PATH", help="read these files or folders instead: parquet, jsonl, txt (.gz, .zst)")
    add("--text-column", default="text", help="column or field that holds the text (default text)")
    add("--out", help="folder of the shards (default edu_fineweb10B and the like for FineWeb-Edu's samples)")
    add("--shard-size", type=int, default=10**8, help="tokens a shard (default 100M)")
    add("--max-tokens", type=int, default=0, help="stop there (default: all there is)")
    add("--val-tokens", type=int, help="tokens of the val split, which ends with a document (default one"
        " shard, or a tenth as estimated from the size if that is less)")
    add("--workers", type=int, default=0, help="threads that tokenize (default: one for each core)")
    add("--format", choices=("npy", "bin"), default="npy", help="of the shards: NumPy's or llm.c's (default npy)")
    add("--skip-bad-files", action="store_true", help="leave out files that are damaged, instead of stopping")
    add("--verify", metavar="DIR", help="check the shards of a folder against its manifest.json")
    add("--prepared", metavar="REPO", help="download tokenized shards, such as kjj0/finewebedu10B-gpt2, into --out")
    args = parser.parse_args(argv)
    for name, least in (("shard_size", 2), ("max_tokens", 0), ("workers", 0), ("val_tokens", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be {least} or more")
    if args.dataset == DATASET:
        args.name = args.name or NAME
        if not args.input and not args.prepared and (sample := re.fullmatch(r"sample-(\d+B)T", args.name)):
            args.out = args.out or f"edu_fineweb{sample[1]}"
    if not args.out and not args.verify:
        raise ValueError("--out is missing: the folder that the shards go to")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.workers = args.workers or cores
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
        was = (load_manifest(args.out) or {"source": {}})["source"]  # of a branch, go on with the commit of the beginning
        same = all(was.get(key) == getattr(args, key) for key in ("dataset", "name", "split", "revision"))
        source = hub_source(args.dataset, args.name, args.split, args.revision, was["commit"] if same else None)
    total = min(args.max_tokens or 1 << 62, estimate_tokens(source, args.text_column))
    val_tokens = args.val_tokens or max(1, min(args.shard_size, total // 10))
    asked = {"tokenizer": {"name": "gpt2", "sha256": TOKENIZER_SHA256}, "source": source.description,
             "shard_size": args.shard_size, "val_tokens": val_tokens, "max_tokens": args.max_tokens, "format": args.format,
             "text_column": args.text_column, "skip_bad_files": args.skip_bad_files}
    workers = args.workers if args.input else 2 * args.workers  # half of them wait for the network
    manifest = make_shards(source, asked, args.out, workers)
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    print(f"{args.out}: {len(manifest['shards'])} shards, {tokens:,} tokens; python train_gpt2.py --data {args.out}")


if __name__ == "__main__":
    try:
        run_main(main)
    except SystemExit as end:  # Python's own end is an abort if one of the daemon threads is inside Arrow's C++ just then
        exit_now(end.code or 0)
