"""
The data path: GPT-2's tokenizer, the shard files, and the loader that reads batches from them.

- get_tokenizer: GPT-2's byte-pair encoding in tiktoken, from run/gpt2.tiktoken.
- Shard formats, one writer and one reader (write_shard, open_shard):
    *.npy                NumPy, 1-D uint16, as fineweb.py and build-nanogpt write them
    *_<n>.bin, *_train.bin, *_val.bin
                         llm.c and modded-nanogpt: 256 little-endian int32 (magic 20240520,
                         version 1, number of tokens, zeros), then the tokens as uint16
    train.bin, val.bin   nanoGPT: uint16 without a header
- TokenStream: the shards of a split as one sequence of tokens.
- DataLoaderLite: batches (x, y) for every rank, from one rank-independent cursor.

The order of the data. The stream is cut into windows of T+1 tokens with stride T: window w is
tokens [wT, wT+T]. Each token is a target once per epoch, except the first one and a remainder
shorter than T. Step s of training reads windows [sG, (s+1)G) of the epoch's permutation,
G = total_batch_size / T, for any micro-batch size B and number of ranks.

Sources of the formats: https://github.com/karpathy/build-nanogpt (fineweb.py),
https://github.com/karpathy/llm.c (dev/data/data_common.py), https://github.com/karpathy/nanoGPT
(data/openwebtext/prepare.py).
"""
import base64
import functools
import hashlib
import json
import math
import os
import re
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

from run.cli import print_error
from run.files import atomic_write, check_regular

# -----------------------------------------------------------------------------
# the tokenizer

TOKENIZER_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "run", "gpt2.tiktoken")
TOKENIZER_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # r50k_base
END_OF_TEXT = "<|endoftext|>"
EOT = 50256         # END_OF_TEXT, GPT-2's only special token: precedes every document
NUM_TOKENS = 50257  # size of the vocabulary; a model's vocab_size may be padded beyond it


@functools.cache
def token_ranks():
    """{bytes of a token: its id} of GPT-2; ValueError if the file is not the repository's."""
    with open(TOKENIZER_FILE, "rb") as f:
        contents = f.read()
    if hashlib.sha256(contents).hexdigest() != TOKENIZER_SHA256:
        raise ValueError(f"{TOKENIZER_FILE} is damaged (its sha256 is not"
                         f" {TOKENIZER_SHA256[:8]}...); restore it with git checkout")
    ranks = {}
    for line in contents.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


def encoding_with(pattern):
    """GPT-2's tiktoken.Encoding, which splits text into words by a pattern."""
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=token_ranks(),
                             special_tokens={END_OF_TEXT: EOT}, explicit_n_vocab=NUM_TOKENS)


_of_this_thread = threading.local()


def get_tokenizer():
    """GPT-2's tiktoken.Encoding, one for each thread; it takes 20 ms and 10 MB.

    tiktoken's regular expressions keep their buffers for the first thread that uses an Encoding;
    any other thread takes and returns shared ones, with locks, for every word.
    """
    if not hasattr(_of_this_thread, "tokenizer"):
        # splits text into words before the merges (openai/gpt-2, src/encoder.py); only the group
        # (?:...) is ours: tiktoken matches what is inside with one automaton, and without it tries
        # the alternatives in turn
        pattern = (r"(?:'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
                   r"|\s+(?!\S)|\s+")
        _of_this_thread.tokenizer = encoding_with(pattern)
    return _of_this_thread.tokenizer


def encode(text, special=frozenset()):
    """Token ids of a text, 1-D uint16.

    "<|endoftext|>" in it is ordinary text, or EOT if special contains it. ValueError for about a
    million consecutive spaces, UnicodeError (a ValueError too) for lone surrogates.
    """
    tokenizer = get_tokenizer()
    try:
        # encode_ordinary would abort with a Rust panic where this raises ValueError
        tokens = tokenizer.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except UnicodeEncodeError as e:
        raise UnicodeError(f"the text is not valid Unicode at character {e.start + 1};"
                           " convert it to UTF-8 first") from e
    except ValueError as e:  # a run of whitespace overflows the stack of the regular expressions
        longest = max(re.finditer(r"\s+", text), key=lambda run: len(run[0]))
        raise ValueError(f"the text has a run of {len(longest[0]):,} whitespace characters from"
                         f" character {longest.start() + 1:,} on, more than the tokenizer can"
                         " take; shorten it") from e
    return tokens.astype(np.uint16)


# -----------------------------------------------------------------------------
# shard files

BIN_MAGIC = 20240520  # llm.c's .bin
BIN_VERSION = 1
BIN_HEADER = 256      # length of the header, int32


@dataclass(frozen=True)
class Shard:
    path: str
    offset: int  # bytes before the first token
    tokens: int


def write_shard(path, tokens):
    """Writes tokens (1-D uint16) to path atomically; the suffix, .npy or .bin, is the format."""
    assert tokens.dtype == np.uint16 and tokens.ndim == 1, (tokens.dtype, tokens.ndim)
    with atomic_write(path) as f:
        if path.endswith(".npy"):
            # as np.save, which does not say so when the disk is full
            header = np.lib.format.header_data_from_array_1_0(tokens)
            np.lib.format.write_array_header_1_0(f, header)
        else:
            header = np.zeros(BIN_HEADER, dtype="<i4")
            header[:3] = BIN_MAGIC, BIN_VERSION, len(tokens)
            f.write(header.tobytes())
        f.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def open_shard(path):
    """The Shard in a file; ValueError if its header is invalid or disagrees with its size."""
    check_regular(path)
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if path.endswith(".npy"):
            try:
                np.lib.format.read_magic(f)
                shape, _, dtype = np.lib.format.read_array_header_1_0(f)
            except OSError:  # the file cannot be read
                raise
            except Exception as e:  # ValueError, or an error of Python's parser
                raise ValueError(f"{path} is not a valid .npy file ({str(e)[:80]!r}); create it"
                                 " again with fineweb.py") from e
            if dtype != np.uint16 or len(shape) != 1:
                raise ValueError(f"{path} holds {dtype} of shape {shape}; a shard is 1-D uint16")
            shard = Shard(path, f.tell(), shape[0])
        elif os.path.basename(path) in ("train.bin", "val.bin"):
            shard = Shard(path, 0, size // 2)
        else:
            contents = f.read(4 * BIN_HEADER)
            header = np.frombuffer(contents, dtype="<i4", count=len(contents) // 4)
            if len(header) < BIN_HEADER or tuple(header[:2]) != (BIN_MAGIC, BIN_VERSION):
                raise ValueError(f"{path} has no valid llm.c header (magic {BIN_MAGIC}, version"
                                 f" {BIN_VERSION}); it starts with {header[:2].tolist()}")
            shard = Shard(path, 4 * BIN_HEADER, int(header[2]))
    expected = shard.offset + 2 * shard.tokens
    if size != expected:
        raise ValueError(f"{path} should hold {shard.tokens:,} tokens, {expected:,} bytes, but has"
                         f" {size:,} bytes: it is truncated or not a shard; create or download it"
                         " again")
    return shard


def read_tokens(f, shard, begin, n):
    """Tokens [begin, begin+n) of a shard, 1-D uint16, from its open file; ValueError if it ends."""
    tokens = np.empty(n, dtype="<u2")
    rest = tokens.view(np.uint8)
    f.seek(shard.offset + 2 * begin)
    while len(rest) > 0:  # Linux reads at most 2 GiB - 4 KiB at once
        count = f.readinto(rest)
        if count == 0:
            raise ValueError("it ends before them")
        rest = rest[count:]
    return tokens


def find_shards(folder, split):
    """Paths of the shards of split "train" or "val" in a folder, in order."""
    pattern = re.compile(rf"(.*_)?{split}(_\d+\.npy|(_\d+)?\.bin)")
    names = sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))
    return [os.path.join(folder, name) for name in names]


class TokenStream:
    """The tokens of several shards as one sequence.

    The max_open files opened last stay open, since a batch of shuffled windows reads from many
    shards. They are read, not memory-mapped: resident memory does not grow with what was read.
    """
    HEAD = 1024               # a shard is recognized by its first tokens
    RETRY_WAITS = (1, 5, 30)  # seconds: a network file system may fail for a moment (ESTALE, EIO)

    def __init__(self, paths, vocab_size=NUM_TOKENS):
        self.shards = [open_shard(path) for path in paths]
        # first token of each shard, and the end
        self.starts = np.cumsum([0] + [shard.tokens for shard in self.shards])
        self.vocab_size = vocab_size
        self.max_open = 128  # a thousand shards must not need a thousand file descriptors
        self.files = {}      # path -> open file, in the order in which they were opened
        self.heads = {}      # path -> its first HEAD tokens, as bytes
        self.lock = threading.Lock()  # the threads that read share the files' positions

    def __len__(self):
        return int(self.starts[-1])

    def fingerprint(self):
        """Hash of the shards' sizes and of the first HEAD tokens of each, to recognize data."""
        digest = hashlib.sha256(json.dumps(self.starts.tolist()).encode())
        for shard, start in zip(self.shards, self.starts.tolist()):
            if shard.tokens:
                digest.update(self.read(start, min(self.HEAD, shard.tokens)).tobytes())
        return digest.hexdigest()[:16]

    def read(self, start, length):
        """Tokens [start, start+length) as uint16.

        ValueError if an id is >= vocab_size, or if a shard has changed since it was opened. OSError
        if it still cannot be read after RETRY_WAITS.
        """
        pieces = []
        i = int(np.searchsorted(self.starts, start, side="right")) - 1  # the shard start is in
        while length > 0:
            shard = self.shards[i]
            begin = start - int(self.starts[i])
            n = min(length, shard.tokens - begin)
            if n > 0:
                pieces.append(self._read_shard(shard, begin, n))
            start += n
            length -= n
            i += 1
        return np.concatenate(pieces)

    def _read_shard(self, shard, begin, n):
        """Tokens [begin, begin+n) of a shard."""
        for wait in (*self.RETRY_WAITS, None):
            try:
                with self.lock:
                    tokens = read_tokens(self._open(shard), shard, begin, n)
                break
            except ValueError as e:
                raise ValueError(f"cannot read tokens {begin:,} to {begin + n:,} of {shard.path}"
                                 f" ({e}); it has changed since training started") from e
            except OSError as e:
                message = f"cannot read {shard.path}: {e.strerror}"
                if wait is None:
                    raise OSError(f"{message}, after {len(self.RETRY_WAITS)} retries") from e
                print_error(f"{message}; trying again in {wait} s")
                self._close_files()
                time.sleep(wait)
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"{shard.path} has the id {tokens.max()} among its tokens {begin:,} to"
                             f" {begin + n:,}; allowed are ids below {self.vocab_size}: the shard"
                             " is damaged or uses another tokenizer")
        return tokens.astype(np.uint16, copy=False)

    def _open(self, shard):
        """The open file of a shard; ValueError if it has changed in the meantime."""
        if shard.path not in self.files:
            if open_shard(shard.path) != shard:
                raise ValueError("its size is different")
            if len(self.files) >= self.max_open:
                oldest = next(iter(self.files))
                self.files.pop(oldest).close()
            f = open(shard.path, "rb", buffering=0)
            head = read_tokens(f, shard, 0, min(self.HEAD, shard.tokens)).tobytes()
            if self.heads.setdefault(shard.path, head) != head:
                raise ValueError("its first tokens are different")
            self.files[shard.path] = f
        return self.files[shard.path]

    def _close_files(self):
        """Closes all files: on a network file system an open one may stay stale."""
        with self.lock:
            for f in self.files.values():
                f.close()
            self.files.clear()


# -----------------------------------------------------------------------------
# the loader

def permute(positions, n, key):
    """The images of positions (int64) under a seeded permutation of range(n).

    The permutation is never built in memory: an epoch of 350B tokens costs no more than one of 10M.
    A Feistel network over the smallest even number of bits that holds n permutes all numbers of
    that many bits; a result outside range(n) is encrypted again until it is inside ("cycle
    walking", Black and Rogaway 2002).
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
    while (values >= n).any():
        outside = values >= n
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def make_batch(windows, device):
    """x and y, (B, T) int64 on the CPU, from windows, (B, T+1) uint16: y is x shifted by one.

    For a GPU they are in pinned memory: a copy from there does not make the CPU wait.
    """
    # astype copies: x and y have the strides of new arrays for any B, as torch.compile expects
    x = torch.from_numpy(windows[:, :-1].astype(np.int64))
    y = torch.from_numpy(windows[:, 1:].astype(np.int64))
    if is_cuda(device):
        x, y = x.pin_memory(), y.pin_memory()
    return x, y


def to_device(batch, device):
    """x and y of make_batch on the device."""
    x, y = batch
    non_blocking = is_cuda(device)
    return x.to(device, non_blocking=non_blocking), y.to(device, non_blocking=non_blocking)


def to_batch(windows, device):
    """x and y, (B, T) int64 on the device, from windows, (B, T+1) uint16: y is x shifted by one."""
    return to_device(make_batch(windows, device), device)


def is_cuda(device):
    """Whether a device, "cuda:0" or "cpu", is an NVIDIA or AMD GPU."""
    return torch.device(device).type == "cuda"


class DataLoaderLite:
    """Endless batches for one rank; together the ranks read the stream's windows in one order.

    position, the number of windows that all ranks have consumed, is the only state. This rank's
    next micro-batch is the B positions from position + process_rank * B on. Epoch e is positions
    [e * n, (e + 1) * n), n = windows in the stream; with shuffle each epoch has its own
    permutation. A prefetch thread reads ahead while the device computes.
    """
    PREFETCH = 4  # batches to read ahead

    def __init__(self, stream, B, T, process_rank=0, num_processes=1, shuffle=True, seed=1337,
                 device="cpu"):
        self.stream = stream
        self.B = B
        self.T = T
        self.process_rank = process_rank
        self.num_processes = num_processes
        self.shuffle = shuffle
        self.seed = seed
        self.device = device
        self.num_windows = (len(stream) - 1) // T
        self.position = 0
        self.fingerprint = stream.fingerprint()
        self._thread = None    # the prefetch thread, started by the first next_batch
        self._ahead = deque()  # its batches, as futures

    @property
    def epoch(self):
        """Epochs consumed so far, a float."""
        return self.position / self.num_windows

    def window_indices(self, position):
        """Windows (B, int64) that this rank reads when all ranks have consumed position windows."""
        positions = position + self.process_rank * self.B + np.arange(self.B, dtype=np.int64)
        epochs = positions // self.num_windows
        windows = positions % self.num_windows
        if self.shuffle:
            for epoch in np.unique(epochs):  # two if the batch crosses the end of an epoch
                here = epochs == epoch
                key = (self.seed, int(epoch))
                windows[here] = permute(windows[here], self.num_windows, key)
        return windows

    def _read_batch(self, position):
        """This rank's x, y at a position, on the CPU; runs in the prefetch thread."""
        windows = [self.stream.read(w * self.T, self.T + 1)
                   for w in self.window_indices(position).tolist()]
        return make_batch(np.stack(windows), self.device)

    def _start_thread(self):
        def use_device():
            # a thread starts with GPU 0, where pin_memory would create a context
            if is_cuda(self.device) and torch.device(self.device).index is not None:
                torch.cuda.set_device(self.device)
        self._thread = ThreadPoolExecutor(1, "DataLoaderLite", initializer=use_device)

    def next_batch(self):
        """The next x, y, each (B, T) int64 on the device."""
        if self._thread is None:
            self._start_thread()
        stride = self.B * self.num_processes  # windows that all ranks read at once
        while len(self._ahead) < self.PREFETCH:
            position = self.position + len(self._ahead) * stride
            self._ahead.append(self._thread.submit(self._read_batch, position))
        try:
            batch = self._ahead.popleft().result()  # raises what _read_batch raised
        except Exception:
            self.close()  # a later call reads the same position again
            raise
        self.position += stride
        return to_device(batch, self.device)

    def close(self):
        """Stops the prefetch thread; a later next_batch starts another one at position.

        Call it before the process ends: a thread inside NumPy during interpreter shutdown can
        abort the process.
        """
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = None
        self._ahead.clear()

    def state_dict(self):
        """The position, the same on every rank, and what identifies the data and their order."""
        return {"position": self.position, "num_windows": self.num_windows, "T": self.T,
                "shuffle": self.shuffle, "seed": self.seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state, force=False):
        """Restores the position of a state_dict, at any B and number of ranks.

        ValueError for other data, or another order, unless force.
        """
        current = self.state_dict()
        different = [f"{name} was {state[name]}, is {current[name]}" for name in state
                     if name != "position" and state[name] != current[name]]
        if different and not force:
            raise ValueError("the checkpoint was trained on other data or in another order:"
                             f" {'; '.join(different)}; another --exp-name starts a run on it,"
                             " --force resumes anyway")
        self.close()
        self.position = state["position"]


def iterate_batches(stream, B, T, max_tokens, process_rank=0, num_processes=1, device="cpu",
                    first_token=0):
    """Yields this rank's x, y of the first max_tokens tokens, each window on exactly one rank.

    The windows are the same for any B and number of ranks; the last batch of a rank may have fewer
    than B rows. Every rank yields the same number of batches: a rank without windows left yields
    x, y with zero rows. The windows before first_token are skipped.
    """
    skipped = first_token // T
    num_windows = min(max_tokens, len(stream) - 1) // T - skipped
    start = skipped + num_windows * process_rank // num_processes
    end = skipped + num_windows * (process_rank + 1) // num_processes
    most = math.ceil(num_windows / num_processes)  # windows of the rank that has most
    for first in range(start, start + most, B):
        windows = [stream.read(w * T, T + 1) for w in range(first, min(first + B, end))]
        rows = np.array(windows, dtype=np.uint16).reshape(-1, T + 1)
        yield to_batch(rows, device)


def bits_per_byte(stream, T, max_tokens):
    """The factor from a mean loss in nats per token to bits per byte of the text.

    The loss is the mean over the targets of iterate_batches. Bits per byte compare models with
    different tokenizers. <|endoftext|>, a target too, has no bytes.
    """
    tokenizer = get_tokenizer()
    lengths = np.zeros(2**16, dtype=np.uint8)  # bytes of each token's text
    lengths[:EOT] = [len(tokenizer.decode_single_token_bytes(i)) for i in range(EOT)]
    num_targets = min(max_tokens, len(stream) - 1) // T * T  # tokens 1 to num_targets
    num_bytes = 0
    for start in range(1, num_targets + 1, 2**20):  # in blocks, which bound the memory
        block = stream.read(start, min(2**20, num_targets + 1 - start))
        num_bytes += int(lengths[block].sum(dtype=np.int64))
    return num_targets / (math.log(2) * max(1, num_bytes))
