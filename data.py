"""
The data path: GPT-2's tokenizer, the shard files, and the loader that reads batches from them.

- get_tokenizer: GPT-2's byte-pair encoding in tiktoken, from the file gpt2.tiktoken; needs no network.
- Shard formats, one writer and one reader each (write_shard, open_shard):
    *.npy          NumPy, 1-D uint16, as fineweb.py and build-nanogpt write them
    *_<n>.bin      llm.c and modded-nanogpt: 256 little-endian int32 (magic 20240520, version 1, number of tokens,
                   zeros), then the tokens as uint16
    train.bin, val.bin   nanoGPT: uint16 without a header
- TokenStream: the shards of a split as one sequence of tokens.
- DataLoaderLite: batches (x, y) for every rank, from one rank-independent cursor.
- prepare_data: shards for --data (a folder of shards, a text file, a folder of text); text is tokenized once.

The order of the data. The stream is cut into windows of T+1 tokens with stride T: window w is tokens [wT, wT+T]. Each
token is a target once per epoch, except the first one and a remainder shorter than T. Step s of training reads windows
[sG, (s+1)G) of the epoch's permutation, G = total_batch_size / T, for any micro-batch size B and number of ranks.

Sources of the formats: https://github.com/karpathy/build-nanogpt (fineweb.py), https://github.com/karpathy/llm.c
(dev/data/data_common.py), https://github.com/karpathy/nanoGPT (data/openwebtext/prepare.py).
"""
import base64
import errno
import functools
import hashlib
import json
import math
import os
import queue
import re
import reprlib
import shutil
import threading
import time
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

from run.files import atomic_write, check_regular

# -----------------------------------------------------------------------------
# the tokenizer

TOKENIZER_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "run", "gpt2.tiktoken")
TOKENIZER_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # that of r50k_base in tiktoken
EOT = 50256           # <|endoftext|>, GPT-2's only special token: precedes every document
NUM_TOKENS = 50257    # size of the tokenizer's vocabulary; a model's vocab_size may be padded beyond it


@functools.cache
def token_ranks():
    """{bytes of a token: its id} of GPT-2; raises ValueError if gpt2.tiktoken is missing or its sha256 is wrong."""
    repair = "it is part of the repository: restore it with git checkout"
    try:
        with open(TOKENIZER_FILE, "rb") as f:
            contents = f.read()
    except OSError as e:
        raise ValueError(f"cannot read {TOKENIZER_FILE} ({e.strerror}); {repair}") from e
    if hashlib.sha256(contents).hexdigest() != TOKENIZER_SHA256:
        raise ValueError(f"{TOKENIZER_FILE} is damaged (its sha256 is not {TOKENIZER_SHA256[:8]}...); {repair}")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in contents.splitlines())}


def encoding_with(pattern):
    """GPT-2's tiktoken.Encoding, which splits text into words by a pattern; raises ValueError as token_ranks does."""
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=token_ranks(), special_tokens={"<|endoftext|>": EOT},
                             explicit_n_vocab=NUM_TOKENS)


_of_this_thread = threading.local()


def get_tokenizer():
    """GPT-2's tiktoken.Encoding, one for each thread, which takes 20 ms and 10 MB; raises ValueError as token_ranks does.

    tiktoken's regular expressions keep their buffers for the first thread that uses an Encoding; any other thread takes and
    returns shared ones, with locks, for every word.
    """
    if not hasattr(_of_this_thread, "tokenizer"):
        # splits text into words before the merges (openai/gpt-2, src/encoder.py); only the group (?:...) is ours: tiktoken
        # matches what is inside with one automaton, and without it tries the alternatives in turn
        pattern = r"""(?:'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"""
        _of_this_thread.tokenizer = encoding_with(pattern)
    return _of_this_thread.tokenizer


def encode(text, special=frozenset()):
    """Token ids of a text, 1-D uint16; "<|endoftext|>" in it is ordinary text, or EOT if special contains it.

    Raises ValueError for a text that tiktoken cannot encode: about a million consecutive blanks overflow the stack of its
    regular expressions (encode_ordinary then aborts with a Rust panic, which encode_to_numpy turns into an exception), and
    lone surrogates are not text (UnicodeError, a ValueError too).
    """
    try:
        tokens = get_tokenizer().encode_to_numpy(text, allowed_special=special, disallowed_special=())
        assert tokens.max(initial=0) < NUM_TOKENS, f"id {tokens.max()} is not one of GPT-2's: a shard has 16 bits per token"
        return tokens.astype(np.uint16)
    except UnicodeEncodeError as e:
        raise UnicodeError(f"the text is not valid Unicode at character {e.start + 1}; convert it to UTF-8 first") from e
    except ValueError as e:
        longest = max(re.finditer(r"\s+", text), key=lambda m: m.end() - m.start(), default=None)
        if longest is None:
            raise
        raise ValueError(f"the text has {longest.end() - longest.start():,} consecutive blanks from character"
                         f" {longest.start() + 1:,} on, more than the tokenizer can take; shorten them") from e


# -----------------------------------------------------------------------------
# shard files

BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 256  # llm.c's .bin; the header's length in int32


@dataclass(frozen=True)
class Shard:
    path: str
    offset: int  # bytes before the first token
    tokens: int


def write_shard(path, tokens):
    """Writes tokens (1-D uint16 array) to path atomically; the suffix, .npy or .bin, selects the format."""
    assert tokens.dtype == np.uint16 and tokens.ndim == 1, (tokens.dtype, tokens.ndim)
    try:
        with atomic_write(path) as f:
            if path.endswith(".npy"):  # as np.save, whose error for a full disk has neither errno nor path
                np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(tokens))
            else:
                header = np.zeros(BIN_HEADER, dtype="<i4")
                header[:3] = BIN_MAGIC, BIN_VERSION, len(tokens)
                f.write(header.tobytes())
            f.write(np.ascontiguousarray(tokens, dtype="<u2").data)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(os.path.dirname(path) or ".").free
            raise OSError(f"the disk is full: {path} needs {2 * len(tokens):,} bytes, {free:,} are free; free some, then run"
                          " the same command again") from e
        raise


def open_shard(path):
    """The Shard in a file; raises ValueError if its header is invalid or does not agree with the file's size."""
    check_regular(path)
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if path.endswith(".npy"):
            try:
                version = np.lib.format.read_magic(f)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read_header(f)
            except OSError:
                raise
            except Exception as e:  # ValueError, or what Python's parser raises: TokenError, MemoryError, IndexError, ...
                raise ValueError(f"{path} is not a valid .npy file ({str(e)[:80]!r}); create it again with fineweb.py") from e
            if dtype != np.uint16 or len(shape) != 1:
                raise ValueError(f"{path} holds {dtype} of shape {shape}; a shard is 1-D uint16")
            shard = Shard(path, f.tell(), shape[0])
        elif os.path.basename(path) in ("train.bin", "val.bin"):
            shard = Shard(path, 0, size // 2)
        else:
            contents = f.read(4 * BIN_HEADER)
            header = np.frombuffer(contents, dtype="<i4", count=len(contents) // 4)
            if len(header) < BIN_HEADER or header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
                raise ValueError(f"{path} has no valid llm.c header (magic {BIN_MAGIC}, version {BIN_VERSION}); it"
                                 f" starts with {header[:2].tolist()}")
            shard = Shard(path, 4 * BIN_HEADER, int(header[2]))
    if shard.tokens < 0 or size != shard.offset + 2 * shard.tokens:
        raise ValueError(f"{path} should hold {shard.tokens:,} tokens, {shard.offset + 2 * shard.tokens:,} bytes, but has"
                         f" {size:,} bytes: it is truncated or not a shard; create or download it again")
    return shard


def find_shards(folder, split):
    """Paths of the shards of split "train" or "val" in a folder, in order."""
    pattern = re.compile(rf"(.*_)?{split}_\d+\.(npy|bin)|{split}\.bin")
    names = sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))
    return [os.path.join(folder, name) for name in names]


MANIFEST = "manifest.json"  # fineweb.py writes it beside its shards and describes its fields
MANIFEST_VERSION = 1


def has_fields(value, **kinds):
    """Whether value, from JSON, is a dict with these keys and types of values; integers must not be negative."""
    return isinstance(value, dict) and all(type(value.get(key)) is kind and (kind is not int or value[key] >= 0)
                                           for key, kind in kinds.items())


def load_manifest(folder):
    """The manifest of a folder, None if it has none; ValueError if it is damaged or of another version."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.lexists(path):
        return None
    check_regular(path)
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        if has_fields(manifest, version=int) and manifest["version"] != MANIFEST_VERSION:
            raise ValueError(f"its format version is {manifest['version']}, supported is {MANIFEST_VERSION}")
        if not has_fields(manifest, version=int, source=dict, shards=list, next=dict,
                          complete=bool) or not has_fields(manifest["next"], skipped=int):
            raise ValueError("a field is missing or of another type")
        names = set()
        for shard in manifest["shards"]:
            if (not has_fields(shard, file=str, split=str, tokens=int, documents=int, sha256=str) or shard["file"] in names
                    or shard["split"] not in ("train", "val")
                    or not re.fullmatch(rf"([^/]*_)?{shard['split']}_\d+\.(npy|bin)", shard["file"])):
                raise ValueError(f"the shard {reprlib.repr(shard)} is invalid or listed twice")
            names.add(shard["file"])
        if manifest["complete"] and not names:
            raise ValueError("it lists no shards")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged or not of fineweb.py ({e}); restore it, or move it away: shards without it can be"
                         " trained on") from e
    return manifest


def check_unlisted(folder, manifest, also=()):
    """Raises ValueError if a folder holds a shard that neither its manifest nor also, names of files, contains."""
    found = {os.path.basename(path) for split in ("train", "val") for path in find_shards(folder, split)}
    if unlisted := sorted(found - {shard["file"] for shard in manifest["shards"]} - set(also)):
        raise ValueError(f"{folder} holds {len(unlisted)} shards that no {MANIFEST} lists ({unlisted[0]}, ...): they are not"
                         " fineweb.py's, or of another run; move them to another folder")


def check_listed(folder, manifest):
    """Raises ValueError if a shard of a folder's manifest is missing or has another number of tokens."""
    for shard in manifest["shards"]:
        path = os.path.join(folder, shard["file"])
        tokens = open_shard(path).tokens if os.path.lexists(path) else "no"
        if tokens != shard["tokens"]:
            raise ValueError(f"{path} has {tokens} tokens, but {shard['tokens']} in {MANIFEST}: it was removed or replaced;"
                             " restore it, or create the folder again")


class TokenStream:
    """The tokens of several shards as one sequence.

    The MAX_OPEN files opened last stay open, since a batch of shuffled windows reads from many shards. They are read, not
    memory-mapped: resident memory does not grow with what has been read.
    """
    MAX_OPEN = 128  # a thousand shards must not need a thousand file descriptors

    def __init__(self, paths, vocab_size=NUM_TOKENS):
        self.shards = [open_shard(path) for path in paths]
        self.starts = np.cumsum([0] + [shard.tokens for shard in self.shards])  # first token of each shard, and the end
        self.vocab_size = vocab_size
        self.files = {}  # path -> open file, in the order in which they were opened
        self.lock = threading.Lock()  # the position of a file is shared by the threads that read it

    def __len__(self):
        return int(self.starts[-1])

    def fingerprint(self):
        """Hash of the shards' sizes and of the first 1,024 tokens of each, to recognize other data on resume."""
        digest = hashlib.sha256(json.dumps(self.starts.tolist()).encode())
        for shard, start in zip(self.shards, self.starts.tolist()):
            digest.update(self.read(start, min(1024, shard.tokens)).tobytes() if shard.tokens else b"")
        return digest.hexdigest()[:16]

    def read(self, start, length):
        """Tokens [start, start+length) as a uint16 array; ValueError if an id is >= vocab_size or a shard has changed."""
        pieces = []
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while length > 0:
            shard = self.shards[i]
            begin = start - int(self.starts[i])
            n = min(length, shard.tokens - begin)
            if n > 0:
                pieces.append(self._read_shard(shard, begin, n))
            start, length, i = start + n, length - n, i + 1
        return np.concatenate(pieces)

    def _read_shard(self, shard, begin, n):
        tokens = np.empty(n, dtype="<u2")
        rest = tokens.view(np.uint8)
        try:
            with self.lock:
                f = self._open(shard)
                f.seek(shard.offset + 2 * begin)
                while len(rest):  # Linux reads at most 2 GiB - 4 KiB at once
                    if not (count := f.readinto(rest)):
                        raise ValueError("it ends before them")
                    rest = rest[count:]
        except (OSError, ValueError) as e:
            raise ValueError(f"cannot read tokens {begin:,} to {begin + n:,} of {shard.path} ({e});"
                             " it has changed since training started") from e
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"{shard.path} has the id {tokens.max()} among its tokens {begin:,} to {begin + n:,};"
                             f" allowed are ids below {self.vocab_size}: the shard is damaged or uses another tokenizer")
        return tokens.astype(np.uint16, copy=False)

    def _open(self, shard):
        """The open file of a shard; ValueError if its size has changed."""
        info, f = os.stat(shard.path), self.files.get(shard.path)
        if info.st_size != shard.offset + 2 * shard.tokens:
            raise ValueError("its size is different")
        if f and not os.path.samestat(os.fstat(f.fileno()), info):  # replaced by another file
            self.files.pop(shard.path).close()
            f = None
        if f is None:
            if len(self.files) == self.MAX_OPEN:
                self.files.pop(next(iter(self.files))).close()
            f = self.files[shard.path] = open(shard.path, "rb", buffering=0)
        return f


# -----------------------------------------------------------------------------
# the loader

def permute(positions, n, key):
    """The images of positions (int64 array) under a seeded permutation of range(n), which is never built in memory.

    A Feistel network over the smallest even number of bits that holds n permutes all numbers of that many bits; a
    result outside range(n) is encrypted again until it is inside ("cycle walking", Black and Rogaway 2002). Memory
    depends on positions only: an epoch of 350B tokens costs no more than one of 10M.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)   # bits in each half
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    round_keys = np.random.SeedSequence(key).generate_state(6, np.uint64)

    def encrypt(values):
        left, right = values >> shift, values & mask
        for round_key in round_keys:
            # splitmix64's mixing function (Steele et al. 2014)
            z = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
        return (left << shift) | right

    values = encrypt(np.asarray(positions, dtype=np.uint64))
    while (outside := values >= n).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def make_batch(windows, device):
    """x and y, (B, T) int64 on the CPU, from windows, a (B, T+1) uint16 array: y is x shifted by one.

    They are in pinned memory if the device is a GPU: a copy from there does not make the CPU wait.
    """
    tokens = torch.from_numpy(windows.astype(np.int64))
    # clone: contiguous() returns a single row as it is, with the strides of the larger array, for which torch.compile
    # compiles another graph
    batch = [t.clone(memory_format=torch.contiguous_format) for t in (tokens[:, :-1], tokens[:, 1:])]
    return [t.pin_memory() for t in batch] if is_cuda(device) else batch


def to_device(batch, device):
    """x and y of make_batch on the device."""
    return tuple(t.to(device, non_blocking=is_cuda(device)) for t in batch)


def to_batch(windows, device):
    """x and y, (B, T) int64 on device, from windows, a (B, T+1) uint16 array: y is x shifted by one."""
    return to_device(make_batch(windows, device), device)


def is_cuda(device):
    """Whether a device, "cuda:0" or "cpu", is an NVIDIA or AMD GPU."""
    return torch.device(device).type == "cuda"


class DataLoaderLite:
    """Endless batches for one rank; together the ranks read the windows of the stream in one order.

    position, the number of windows that all ranks have consumed, is the only state. This rank's next micro-batch is
    the B positions from position + rank * B on. Epoch e is positions [e * n, (e + 1) * n), n = windows in the stream;
    with shuffle each epoch has its own permutation. A prefetch thread reads ahead while the device computes.
    """

    def __init__(self, stream, B, T, process_rank=0, num_processes=1, shuffle=True, seed=1337, device="cpu"):
        self.stream, self.B, self.T, self.device = stream, B, T, device
        self.process_rank, self.num_processes = process_rank, num_processes
        self.shuffle, self.seed = shuffle, seed
        self.num_windows = max(0, (len(stream) - 1) // T)
        if self.num_windows < 1:
            raise ValueError(f"{len(stream):,} tokens are too few for one sequence of {T}; use more text or a smaller T")
        self.position = 0
        self.fingerprint = stream.fingerprint()
        self._prefetched = None  # the prefetch thread's queue; the first next_batch starts the thread

    @property
    def epoch(self):
        """Epochs consumed so far, a float."""
        return self.position / self.num_windows

    def window_indices(self, position):
        """Indices of the windows (B, int64) that this rank reads next when all ranks have consumed position windows."""
        positions = position + self.process_rank * self.B + np.arange(self.B, dtype=np.int64)
        epochs, windows = positions // self.num_windows, positions % self.num_windows
        if self.shuffle:
            for epoch in np.unique(epochs):  # two if the batch crosses the end of an epoch
                here = epochs == epoch
                windows[here] = permute(windows[here], self.num_windows, (self.seed, int(epoch)))
        return windows

    def _read_ahead(self, batches, position, stop):
        """The prefetch thread: puts (position, batch or an exception) into the queue until stop is set."""
        if is_cuda(self.device) and torch.device(self.device).index is not None:
            torch.cuda.set_device(self.device)  # a thread starts with GPU 0, where pin_memory would create a context
        while not stop.is_set():
            try:
                windows = self.window_indices(position).tolist()
                item = make_batch(np.stack([self.stream.read(w * self.T, self.T + 1) for w in windows]), self.device)
            except Exception as e:  # raised by next_batch, in the training loop's thread
                item = e
            while not stop.is_set():
                try:
                    batches.put((position, item), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            position += self.B * self.num_processes

    def next_batch(self):
        """The next x, y, each (B, T) int64 on the device."""
        if self._prefetched is None:
            self._prefetched, self._stop = queue.Queue(maxsize=4), threading.Event()
            self._thread = threading.Thread(target=self._read_ahead, args=(self._prefetched, self.position, self._stop),
                                            daemon=True, name="DataLoaderLite")
            self._thread.start()
        position, item = self._prefetched.get()
        if isinstance(item, Exception):
            self.close()  # the thread has ended: the next call must restart it, not wait forever
            raise item
        assert position == self.position, (position, self.position)
        self.position += self.B * self.num_processes
        return to_device(item, self.device)

    def close(self):
        """Stops the prefetch thread; a later next_batch starts another one at position.

        Call it before the process ends: a thread inside NumPy during interpreter shutdown can abort the process.
        """
        if self._prefetched is not None:
            self._stop.set()
            self._thread.join()
            self._prefetched = None

    def state_dict(self):
        """The position in the data, the same on every rank, and what identifies the data and its order."""
        return {"position": self.position, "num_windows": self.num_windows, "T": self.T,
                "shuffle": self.shuffle, "seed": self.seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state, force=False):
        """Restores the position of a state_dict, at any B and number of ranks; ValueError for other data unless force."""
        mine = self.state_dict()
        if state.keys() != mine.keys() or type(state["position"]) is not int or state["position"] < 0:
            raise ValueError(f"the checkpoint's position in the data is damaged: {state!r:.200}; resume from an older one")
        different = [f"{name} was {state[name]}, is {mine[name]}" for name in state
                     if name != "position" and state[name] != mine[name]]
        if different and not force:
            raise ValueError(f"the checkpoint was trained on other data or in another order: {'; '.join(different)};"
                             " another --exp-name starts a run on it, --force resumes anyway")
        self.close()
        self.position = state["position"]


def iterate_batches(stream, B, T, max_tokens, process_rank=0, num_processes=1, device="cpu"):
    """Yields this rank's x, y of the stream's first max_tokens tokens, in order, each window on exactly one rank.

    The windows are the same for any B and number of ranks; the last batch of a rank may have fewer than B rows. Every
    rank yields the same number of batches: a rank without windows left yields x, y with zero rows.
    """
    num_windows = min(max_tokens, len(stream) - 1) // T
    mine = range(num_windows * process_rank // num_processes, num_windows * (process_rank + 1) // num_processes)
    for start in range(mine.start, mine.start + -(-num_windows // num_processes), B):
        if start >= mine.stop:
            yield tuple(torch.empty((0, T), dtype=torch.long, device=device) for _ in range(2))
            return
        rows = range(start, min(start + B, mine.stop))
        yield to_batch(np.stack([stream.read(w * T, T + 1) for w in rows]), device)


def bits_per_byte(stream, T, max_tokens):
    """The factor from a mean loss over the targets of iterate_batches, in nats per token, to bits per byte of their text.

    Bits per byte compare models with different tokenizers. <|endoftext|>, a target too, has no bytes.
    """
    tokenizer, lengths = get_tokenizer(), np.zeros(2**16, dtype=np.uint8)
    lengths[:EOT] = [len(tokenizer.decode_single_token_bytes(i)) for i in range(EOT)]
    num_targets, num_bytes = min(max_tokens, len(stream) - 1) // T * T, 0
    for start in range(1, num_targets + 1, 2**20):
        num_bytes += int(lengths[stream.read(start, min(2**20, num_targets + 1 - start))].sum(dtype=np.int64))
    return num_targets / (math.log(2) * max(1, num_bytes))


# -----------------------------------------------------------------------------
# shards for --data

OTHER_FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".gz", ".zst")  # not text to train on as it is

def prepare_data(path):
    """(train shard paths, val shard paths) of a folder of shards, a text file, or a folder of *.txt files.

    Text is tokenized once, into .tokens beside it; the key is the name, size and modification time of the files.
    Raises FileNotFoundError or ValueError for a path with nothing to train on, and for shards that are not all there.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no data at {path}; --data takes a folder of shards (python fineweb.py creates one),"
                                " a text file, or a folder of .txt files")
    if os.path.isdir(path):
        shards = find_shards(path, "train"), find_shards(path, "val")
        if any(shards):
            check_folder(path, shards)
            return shards
        texts = sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".txt"))
        if not texts:
            raise FileNotFoundError(f"{path} holds neither shards (*_train_000001.npy, *_val_000000.npy) nor .txt files;"
                                    " python fineweb.py --input creates shards of parquet and jsonl files")
    else:
        texts = [path]
    folder = tokenize_texts(texts)
    return find_shards(folder, "train"), find_shards(folder, "val")


def check_folder(path, shards):
    """Raises ValueError unless the train and val shards of a folder can be trained on: none missing, none of another source.

    A folder without fineweb.py's manifest.json, such as those of build-nanogpt and llm.c, is only checked for both splits.
    """
    if manifest := load_manifest(path):
        if not manifest["complete"]:
            raise ValueError(f"{path} is incomplete: fineweb.py is still running or was interrupted; wait for it, or run its"
                             " command again to resume it")
        check_unlisted(path, manifest)
        check_listed(path, manifest)
    if not all(shards):
        missing = "val" if shards[0] else "train"
        raise ValueError(f"{path} has no shard named *_{missing}_NNNNNN.npy or .bin; training needs train and val")
    if os.path.basename(shards[0][0]) == "train.bin" and os.path.exists(os.path.join(path, "meta.pkl")):
        raise ValueError(f"{path} holds nanoGPT's character-level data (meta.pkl): its ids are characters, not GPT-2's"
                         " tokens. Use --data with the text file itself")


def split_texts(texts):
    """(train documents, val documents): val is about the last 10% of the characters.

    The cut is the last boundary between 80% and 90%: between two documents, else after a blank line, else after a line;
    without any, it is at 90%.
    Example: ["a line\\n" * 10] -> ["a line\\n" * 9], ["a line\\n"]
    """
    ends = np.cumsum([len(text) for text in texts])
    i = int(np.searchsorted(ends, ends[-1] * 9 // 10, side="right"))  # the document that 90% falls into
    start = int(ends[i]) - len(texts[i])
    low, high = int(ends[-1]) * 8 // 10 - start, int(ends[-1]) * 9 // 10 - start  # 80% and 90%, as offsets in document i
    if i > 0 and low <= 0:
        return texts[:i], texts[i:]
    text, low = texts[i], max(0, low)
    blank, newline = (text.rfind(boundary, low, high) for boundary in ("\n\n", "\n"))
    cut = blank + 2 if blank >= 0 else newline + 1 if newline >= 0 else high
    return [*texts[:i], text[:cut]], [text[cut:], *texts[i + 1:]]


def tokenize_texts(paths):
    """Folder with one train and one val shard of the given UTF-8 text files; created once, then reused.

    All of the text is held in memory; fineweb.py tokenizes larger corpora. A byte order mark is not part of the text.
    """
    for path in paths:
        check_regular(path)
        if path.endswith((".npy", ".bin")):
            raise ValueError(f"{path} is a single shard; --data takes the folder of the train and val shards")
        if path.lower().endswith(OTHER_FORMATS):
            raise ValueError(f"{path} is not plain text; create shards with python fineweb.py --input, which reads .parquet,"
                             " .jsonl, .json and .txt files, also .gz and .zst, and use --data with their folder")
    stats = [(os.path.basename(p), (s := os.stat(p)).st_size, s.st_mtime_ns) for p in paths]
    key = hashlib.sha256(json.dumps(["split_texts 2, one document a file", stats]).encode()).hexdigest()[:12]
    parent = os.path.join(os.path.dirname(os.path.abspath(paths[0])), ".tokens")
    name = os.path.splitext(os.path.basename(paths[0]))[0]
    folder = os.path.join(parent, f"{name}-{key}")
    if os.path.isdir(folder):
        return folder
    size = sum(size for _, size, _ in stats)
    if hasattr(os, "sysconf") and 4 * size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ValueError(f"{paths[0]}: {size / 1e9:.1f} GB of text do not fit into memory with their tokens; create shards with"
                         " python fineweb.py --input, which reads in parts")
    texts = []
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="") as f:
                texts.append(f.read())
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text: byte {e.start} ({e.reason}); convert it first") from e
    if not any(texts):
        raise ValueError(f"{paths[0]} is empty: there is nothing to train on")
    splits = [np.concatenate([tokens for text in documents for tokens in ([EOT], encode(text))]).astype(np.uint16)
              for documents in split_texts(texts)]
    temporary = f"{folder}.{os.getpid()}.{time.time_ns()}.tmp"  # in containers, a killed process may have had the same id
    try:
        os.makedirs(temporary)
    except OSError as e:
        raise OSError(f"cannot create {parent} for the tokens of {paths[0]} ({e.strerror}): copy the text to a folder that can"
                      " be written, and use --data with the copy") from e
    try:
        for split, index, tokens in zip(("train", "val"), (1, 0), splits):
            write_shard(os.path.join(temporary, f"{name}_{split}_{index:06d}.npy"), tokens)
        if not os.path.isdir(folder):  # another process may have created it meanwhile
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
