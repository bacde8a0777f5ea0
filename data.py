"""
Tokens on their way to the GPU: the tokenizer, the shard files, the loader.

- get_tokenizer: GPT-2's byte-pair encoding through tiktoken, from gpt2.tiktoken beside this file, without a network.
- Shard formats, one writer and one reader each (write_shard, open_shard):
    *.npy          NumPy, 1-D uint16, as fineweb.py and build-nanogpt write them
    *_<n>.bin      llm.c and modded-nanogpt: 256 little-endian int32 (magic 20240520, version 1, number of tokens,
                   zeros), then the tokens as uint16
    train.bin, val.bin   nanoGPT: nothing but uint16
- TokenStream: the shards of a split as one long sequence of tokens, read through memory maps.
- DataLoaderLite: batches (x, y) for every rank from one cursor that knows nothing of ranks.
- prepare_data: what --data names (shards, a text file, a folder of text) as shards; text is tokenized once.

The loader's rule. The stream is cut into windows of T+1 tokens with stride T: window w is tokens [wT, wT+T], so that
each token but the first is a target exactly once an epoch. Step s of training consumes windows [sG, (s+1)G) of the
order, G = total_batch_size / T, whatever the micro-batch B and the number of ranks are.

Source of the formats: https://github.com/karpathy/build-nanogpt (fineweb.py), https://github.com/karpathy/llm.c
(dev/data/data_common.py), https://github.com/karpathy/nanoGPT (data/openwebtext/prepare.py).
"""
import base64
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import threading
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

# -----------------------------------------------------------------------------
# the tokenizer

TOKENIZER_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gpt2.tiktoken")
TOKENIZER_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # tiktoken's own for r50k_base
EOT = 50256           # <|endoftext|>, GPT-2's only special token: it stands before every document
NUM_TOKENS = 50257    # ids a tokenizer can emit; a model's vocab_size may be padded beyond


@functools.cache
def get_tokenizer():
    """GPT-2's tiktoken.Encoding; raises ValueError when gpt2.tiktoken is missing or is not the file it should be."""
    try:
        with open(TOKENIZER_FILE, "rb") as f:
            contents = f.read()
    except OSError as e:
        raise ValueError(f"cannot read {TOKENIZER_FILE} ({e.strerror}); it is part of the repository: git checkout it") from e
    if hashlib.sha256(contents).hexdigest() != TOKENIZER_SHA256:
        raise ValueError(f"{TOKENIZER_FILE} is damaged (its sha256 is not {TOKENIZER_SHA256[:8]}...): git checkout it")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in contents.splitlines())}
    # the pattern that cuts text into words before the merges: openai/gpt-2 src/encoder.py
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": EOT}, explicit_n_vocab=NUM_TOKENS)


# -----------------------------------------------------------------------------
# shard files

BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 256  # llm.c's .bin; the header's length in int32


@dataclass(frozen=True)
class Shard:
    path: str
    offset: int  # bytes before the first token
    tokens: int


def write_shard(path, tokens):
    """Writes tokens (1-D uint16 array) to path, whole or not at all; the format follows the suffix, .npy or .bin."""
    assert tokens.dtype == np.uint16 and tokens.ndim == 1, (tokens.dtype, tokens.ndim)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            if path.endswith(".npy"):
                np.save(f, tokens)
            else:
                header = np.zeros(BIN_HEADER, dtype="<i4")
                header[:3] = BIN_MAGIC, BIN_VERSION, len(tokens)
                f.write(header.tobytes())
                f.write(tokens.astype("<u2", copy=False).tobytes())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def open_shard(path):
    """The Shard in a file, after its header has been checked against its size; ValueError says what is wrong with it."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if path.endswith(".npy"):
            try:
                version = np.lib.format.read_magic(f)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read_header(f)
            except ValueError as e:
                raise ValueError(f"{path} is not a .npy file ({e}); write it again with fineweb.py") from e
            if dtype != np.uint16 or len(shape) != 1:
                raise ValueError(f"{path} holds {dtype} of shape {shape}; a shard is 1-D uint16")
            shard = Shard(path, f.tell(), shape[0])
        elif os.path.basename(path) in ("train.bin", "val.bin"):
            shard = Shard(path, 0, size // 2)
        else:
            contents = f.read(4 * BIN_HEADER)
            header = np.frombuffer(contents, dtype="<i4", count=len(contents) // 4)
            if len(header) < BIN_HEADER or header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
                raise ValueError(f"{path} does not begin with the header of llm.c's shards (magic {BIN_MAGIC}, version"
                                 f" {BIN_VERSION}); it begins with {header[:2].tolist()}")
            shard = Shard(path, 4 * BIN_HEADER, int(header[2]))
    if shard.tokens < 0 or size != shard.offset + 2 * shard.tokens:
        raise ValueError(f"{path} should hold {shard.tokens:,} tokens, {shard.offset + 2 * shard.tokens:,} bytes, but has"
                         f" {size:,} bytes: it is cut short or not a shard; write or download it again")
    return shard


def find_shards(folder, split):
    """Paths of the shards of split "train" or "val" in a folder, in order; empty when there are none."""
    pattern = re.compile(rf"(.*_)?{split}_\d+\.(npy|bin)|{split}\.bin")
    names = sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))
    return [os.path.join(folder, name) for name in names]


class TokenStream:
    """The tokens of several shards as one sequence, without borders.

    Nothing stays open or mapped between two reads: the resident memory does not grow with what has been read, and a
    thousand shards need no thousand file descriptors.
    """

    def __init__(self, paths, vocab_size=NUM_TOKENS):
        self.shards = [open_shard(path) for path in paths]
        self.starts = np.cumsum([0] + [shard.tokens for shard in self.shards])  # first token of each shard, and the end
        self.vocab_size = vocab_size

    def __len__(self):
        return int(self.starts[-1])

    def fingerprint(self):
        """Hash of the shards' sizes and of the first tokens of each: other data hardly has the same."""
        digest = hashlib.sha256(json.dumps(self.starts.tolist()).encode())
        for shard, start in zip(self.shards, self.starts.tolist()):
            digest.update(self.read(start, min(1024, shard.tokens)).tobytes() if shard.tokens else b"")
        return digest.hexdigest()[:16]

    def read(self, start, length):
        """Tokens [start, start+length) as a uint16 array; ValueError names the shard of an id >= vocab_size."""
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
        try:
            if os.path.getsize(shard.path) != shard.offset + 2 * shard.tokens:
                raise ValueError("its size is another")
            tokens = np.memmap(shard.path, dtype="<u2", mode="r", offset=shard.offset + 2 * begin, shape=(n,))
        except (OSError, ValueError) as e:
            raise ValueError(f"cannot read tokens {begin:,} to {begin + n:,} of {shard.path} ({e});"
                             " it changed since training began") from e
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"{shard.path} has the id {tokens.max()} among its tokens {begin:,} to {begin + n:,};"
                             f" allowed are ids below {self.vocab_size}: it is damaged or made with another tokenizer")
        return np.array(tokens)


# -----------------------------------------------------------------------------
# the loader

def permute(positions, n, key):
    """Where a seeded permutation of range(n) sends each of positions (int64 array), without building the permutation.

    A Feistel network over the smallest even number of bits that holds n is a permutation of those bits' numbers;
    one that falls outside range(n) goes through again until it is inside ("cycle walking", Black and Rogaway 2002).
    Memory is that of positions, whatever n is: an epoch of 350B tokens costs what one of 10M does.
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


def to_batch(windows, device):
    """x and y, (B, T) int64 on device, from windows, a (B, T+1) uint16 array: y is what follows x."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if torch.device(device).type == "cuda":  # from pinned memory the copy does not wait for the GPU
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in (x, y))
    return x.to(device), y.to(device)


class DataLoaderLite:
    """Endless batches for one rank. All ranks together read the windows in one order, step after step.

    position is the number of windows that all ranks have consumed: the only state. The next micro-batch of this rank
    is the B positions from position + rank * B on; epoch e holds positions [e * n, (e + 1) * n), n = windows in the
    stream, in an order of its own when shuffle is on. A thread reads ahead while the device computes.
    """

    def __init__(self, stream, B, T, process_rank=0, num_processes=1, shuffle=True, seed=1337, device="cpu"):
        self.stream, self.B, self.T, self.device = stream, B, T, device
        self.process_rank, self.num_processes = process_rank, num_processes
        self.shuffle, self.seed = shuffle, seed
        self.num_windows = max(0, (len(stream) - 1) // T)
        if self.num_windows < 1:
            raise ValueError(f"{len(stream):,} tokens are too few for one sequence of {T}; give more text or a smaller T")
        self.position = 0
        self.fingerprint = stream.fingerprint()
        self._prefetched = None  # the reading thread's queue, started by the first next_batch

    @property
    def epoch(self):
        """Epochs begun so far, counted from 0, with a fraction for the part that is consumed."""
        return self.position / self.num_windows

    def window_indices(self, position):
        """Numbers of the windows (B, int64) that this rank reads when all ranks have consumed position windows."""
        positions = position + self.process_rank * self.B + np.arange(self.B, dtype=np.int64)
        epochs, windows = positions // self.num_windows, positions % self.num_windows
        if self.shuffle:
            for epoch in np.unique(epochs):  # more than one where a batch holds the end of an epoch
                here = epochs == epoch
                windows[here] = permute(windows[here], self.num_windows, (self.seed, int(epoch)))
        return windows

    def _read_ahead(self, batches, position, stop):
        """The thread: puts (position, windows or the error met) into the queue until stop is set."""
        while not stop.is_set():
            try:
                item = np.stack([self.stream.read(w * self.T, self.T + 1) for w in self.window_indices(position).tolist()])
            except Exception as e:  # raised again by next_batch, where the training loop can see it
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
            self.close()  # the thread has ended: a further next_batch must try again, not wait for ever
            raise item
        assert position == self.position, (position, self.position)
        self.position += self.B * self.num_processes
        return to_batch(item, self.device)

    def close(self):
        """Stops the reading thread; the next next_batch starts one anew from position.

        Call it before the process ends: a thread that Python finds inside NumPy at its exit can abort the process.
        """
        if self._prefetched is not None:
            self._stop.set()
            self._thread.join()
            self._prefetched = None

    def state_dict(self):
        """The place in the data, the same on every rank, and what it is a place in."""
        return {"position": self.position, "num_windows": self.num_windows, "T": self.T,
                "shuffle": self.shuffle, "seed": self.seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state, force=False):
        """Goes to a place that state_dict gave, at any B and number of ranks; ValueError if it is in other data, unless
        force says to go on there all the same."""
        mine = self.state_dict()
        different = [f"{name} {state[name]} there, {mine[name]} here" for name in state
                     if name != "position" and state[name] != mine[name]]
        if different and not force:
            raise ValueError(f"the checkpoint was trained on other data or in another order: {'; '.join(different)};"
                             " --force goes on all the same")
        self.close()
        self.position = state["position"]


def iterate_batches(stream, B, T, max_tokens, process_rank=0, num_processes=1, device="cpu"):
    """Yields this rank's x, y of the stream's first max_tokens tokens, in order, every window on exactly one rank.

    The windows are the same for any B and number of ranks; the last batch of a rank may have fewer than B rows. All
    ranks yield equally often: one that has no window left yields x, y of no rows.
    """
    num_windows = min(max_tokens, len(stream) - 1) // T
    mine = range(num_windows * process_rank // num_processes, num_windows * (process_rank + 1) // num_processes)
    for start in range(mine.start, mine.start + -(-num_windows // num_processes), B):
        if start >= mine.stop:
            yield tuple(torch.empty((0, T), dtype=torch.long, device=device) for _ in range(2))
            return
        rows = range(start, min(start + B, mine.stop))
        yield to_batch(np.stack([stream.read(w * T, T + 1) for w in rows]), device)


# -----------------------------------------------------------------------------
# from what --data names to shards

def prepare_data(path):
    """(train shard paths, val shard paths) of a folder of shards, a text file, or a folder of *.txt files.

    Text is tokenized once, into a folder beside it that carries the name, size and time of what was read; a second
    call finds it there. Raises FileNotFoundError or ValueError for a path with nothing to train on.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no data at {path}; --data takes a folder of shards (python fineweb.py makes one),"
                                " a text file, or a folder of .txt files")
    if os.path.isdir(path):
        shards = find_shards(path, "train"), find_shards(path, "val")
        if all(shards):
            return shards
        if any(shards):
            missing = "val" if shards[0] else "train"
            raise ValueError(f"{path} has no shard named *_{missing}_NNNNNN.npy or .bin; training needs train and val")
        texts = sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".txt"))
        if not texts:
            raise FileNotFoundError(f"{path} holds neither shards (*_train_000001.npy, *_val_000000.npy) nor .txt files")
    else:
        texts = [path]
    folder = tokenize_texts(texts)
    return find_shards(folder, "train"), find_shards(folder, "val")


def split_texts(texts):
    """(train documents, val documents): about the last tenth of the characters is val.

    The cut is the last border in the ninth tenth: between two documents, else after a blank line, else at a line's end;
    where there is none, it falls at nine tenths.
    Example: ["a line\\n" * 10] -> ["a line\\n" * 9], ["a line\\n"]
    """
    ends = np.cumsum([len(text) for text in texts])
    i = int(np.searchsorted(ends, ends[-1] * 9 // 10, side="right"))  # the document in which the last tenth begins
    start = int(ends[i]) - len(texts[i])
    eight_tenths, nine_tenths = int(ends[-1]) * 8 // 10 - start, int(ends[-1]) * 9 // 10 - start  # counted in document i
    if i > 0 and eight_tenths <= 0:
        return texts[:i], texts[i:]
    text, eight_tenths = texts[i], max(0, eight_tenths)
    blank, newline = (text.rfind(border, eight_tenths, nine_tenths) for border in ("\n\n", "\n"))
    cut = blank + 2 if blank >= 0 else newline + 1 if newline >= 0 else nine_tenths
    return [*texts[:i], text[:cut]], [text[cut:], *texts[i + 1:]]


def tokenize_texts(paths):
    """Folder with one train and one val shard of the given UTF-8 text files; made once, then found by its name.

    A corpus that does not fit in memory is fineweb.py's work, not this function's.
    """
    stats = [(os.path.basename(p), (s := os.stat(p)).st_size, s.st_mtime_ns) for p in paths]
    key = hashlib.sha256(json.dumps(["split_texts 2, one document a file", stats]).encode()).hexdigest()[:12]
    parent = os.path.join(os.path.dirname(os.path.abspath(paths[0])), ".tokens")
    name = os.path.splitext(os.path.basename(paths[0]))[0]
    folder = os.path.join(parent, f"{name}-{key}")
    if os.path.isdir(folder):
        return folder
    texts = []
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as f:
                texts.append(f.read())
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text: byte {e.start} ({e.reason}); convert it first") from e
    if not any(texts):
        raise ValueError(f"{paths[0]} is empty; there is nothing to train on")
    tokenizer = get_tokenizer()
    temporary = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(temporary, exist_ok=True)  # a run killed here may have had this process id: in containers they recur
    try:
        for split, index, documents in zip(("train", "val"), (1, 0), split_texts(texts)):
            tokens = [np.array([EOT, *tokenizer.encode_ordinary(document)], dtype=np.uint16) for document in documents]
            write_shard(os.path.join(temporary, f"{name}_{split}_{index:06d}.npy"), np.concatenate(tokens))
        if not os.path.isdir(folder):  # another run may have made the same one meanwhile
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
