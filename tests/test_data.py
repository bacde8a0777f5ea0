"""
data.py: the tokenizer against tiktoken's r50k_base, the shard formats byte by byte, and the order
of the data for random shard lengths, B, T, ranks and gradient accumulation, against windows sliced
from a list.

    ./test.sh tests/test_data.py     # no network: all data is created here

test_bad_input.py has the data that are refused, test_convert.py transformers' tokenizer.
"""
import errno
import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from common import python
from data import (EOT, DataLoaderLite, TokenStream, bits_per_byte, find_shards, get_tokenizer,
                  iterate_batches, permute, write_shard)

quick = settings(max_examples=40, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXTS = ["", "Hello, I'm a language model,", "  two  spaces\t\ttabs\r\n\r\nlines   ",
         " " * 1000 + "x", "\n" * 300, "naïve café Ünïcödé ß ǅ",
         "日本語の文章 한국어 العربية עברית हिन्दी",
         "👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽‍♀️ e\u0301 \u200b\ufeff\u00a0\u3000x",
         "I'll we've don't it's YOU'RE he'd 'M", "1234567890 ½ Ⅷ ٣٤٥ x9y",
         "<|endoftext|> and <|endoftext|>", "\x00\x01\x7f\x80\x9f", "a" * 500,
         "```python\ndef f(x):\n    return x**2  # !?\n```", "\U0010ffff\u2028\u2029\x85"]


# -----------------------------------------------------------------------------
# the tokenizer

@pytest.fixture(scope="module")
def reference():
    """tiktoken's r50k_base, GPT-2's encoding; the file that it would download is read from disk."""
    def read_file(url):
        assert url.endswith("/r50k_base.tiktoken"), url
        with open(data.TOKENIZER_FILE, "rb") as f:
            return f.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        patch.setattr(tiktoken.load, "read_file", read_file)
        return tiktoken.Encoding(**tiktoken_ext.openai_public.r50k_base())


def test_the_vocabulary_equals_tiktokens(reference):
    ours = get_tokenizer()
    assert ours.n_vocab == reference.n_vocab == data.NUM_TOKENS and ours.eot_token == EOT
    for i in range(EOT + 1):
        assert ours.decode_single_token_bytes(i) == reference.decode_single_token_bytes(i)


@given(st.one_of(st.text(max_size=60), st.sampled_from(TEXTS)))
@settings(max_examples=300, deadline=None)
def test_text_encodes_as_in_tiktoken_and_decodes_to_itself(reference, text):
    tokens = data.encode(text)
    assert tokens.dtype == np.uint16 and tokens.tolist() == reference.encode_ordinary(text)
    assert get_tokenizer().decode(tokens.tolist()) == text


def test_the_lectures_text_has_the_lectures_tokens():
    tokens = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert data.encode("Hello, I'm a language model,").tolist() == tokens


def test_text_that_cannot_be_encoded_is_an_error_without_a_panic():
    with pytest.raises(ValueError, match="run of 1,000,000 whitespace characters from character 4"):
        data.encode("a b" + " " * 1_000_000 + "c")
    with pytest.raises(ValueError, match="not valid Unicode at character 2"):
        data.encode("a\udcff")


def test_a_damaged_tokenizer_file_is_reported_as_itself(tmp_path, monkeypatch):
    """It was once reported as a run of whitespace in the text."""
    with open(data.TOKENIZER_FILE, "rb") as f:
        (tmp_path / "gpt2.tiktoken").write_bytes(f.read()[:-1])
    monkeypatch.setattr(data, "TOKENIZER_FILE", str(tmp_path / "gpt2.tiktoken"))
    monkeypatch.setattr(data, "token_ranks", data.token_ranks.__wrapped__)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="damaged.*git checkout"):
        pool.submit(data.encode, "a text").result()


def test_each_thread_has_its_own_tokenizer():
    """Threads that shared one spent a fifth of their time on its regular expressions' locks."""
    with ThreadPoolExecutor(1) as pool:
        first, second = (pool.submit(get_tokenizer).result() for _ in range(2))
    assert first is second is not get_tokenizer() is get_tokenizer()


# -----------------------------------------------------------------------------
# shard files

TOKENS = np.array([50256, 0, 1, 258, 50255], dtype=np.uint16)


def tokens_of(paths):
    stream = TokenStream([str(path) for path in paths])
    return stream.read(0, len(stream)).tolist()


def test_npy_shards_are_standard_numpy_files(tmp_path):
    write_shard(str(tmp_path / "ours.npy"), TOKENS)
    read = np.load(tmp_path / "ours.npy")
    assert read.dtype == np.uint16 and read.tolist() == TOKENS.tolist()
    np.save(tmp_path / "numpys.npy", TOKENS)  # as build-nanogpt's fineweb.py writes them
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()


def test_bin_shards_are_byte_identical_to_llm_cs(tmp_path):
    path = tmp_path / "x_train_000001.bin"
    write_shard(str(path), TOKENS)
    contents = path.read_bytes()
    # llm.c: 256 little-endian int32 (20240520, version 1, count, zeros), then uint16
    assert contents[:12] == bytes.fromhex("88d83401" "01000000" "05000000")
    assert contents[12:1024] == bytes(1012)
    assert contents[1024:] == bytes.fromhex("50c4" "0000" "0100" "0201" "4fc4")
    assert tokens_of([path]) == TOKENS.tolist()


def test_find_shards_returns_all_formats_in_order_and_nothing_else(tmp_path):
    shards = ["TinyStories_train.bin", "edufineweb_train_000001.npy", "edufineweb_train_000002.npy",
              "fineweb_train_000010.bin", "train.bin"]
    others = ["edufineweb_val_000000.npy", "train_notes.txt", "xtrain_000001.npy", "X_train.npy",
              "a_train_000001.npy.12.tmp", "manifest.json"]
    for name in [*shards[::-1], *others]:
        (tmp_path / name).touch()
    found = find_shards(str(tmp_path), "train")
    assert found == [str(tmp_path / name) for name in shards]


# -----------------------------------------------------------------------------
# the stream and the loader

def make_stream(folder, lengths):
    """(TokenStream over shards of these lengths, its tokens as an array); token i is i % 50000."""
    tokens = (np.arange(sum(lengths)) % 50000).astype(np.uint16)
    paths = []
    for i, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        suffix = "bin" if i % 2 else "npy"
        paths.append(os.path.join(folder, f"x_train_{i:06d}.{suffix}"))
        write_shard(paths[-1], part)
    return TokenStream(paths), tokens


shard_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)
shard_lengths = shard_lengths.filter(lambda lengths: sum(lengths) > 8)


@given(st.one_of(st.integers(1, 3000), st.sampled_from([2**k + d for k in (6, 12, 16)
                                                        for d in (-1, 0, 1)])),
       st.integers(0, 2**63), st.integers(0, 5))
@quick
def test_permute_is_a_permutation(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, (seed, epoch))), np.arange(n))


def test_permute_differs_between_epochs_and_seeds_and_looks_random():
    n = 10000
    orders = [permute(np.arange(n), n, key) for key in ((1337, 0), (1337, 1), (1338, 0))]
    for i in range(3):
        # a random permutation has one fixed point and a distance of n/3 between neighbours on
        # average (standard error 25)
        assert (orders[i] == np.arange(n)).sum() < 12
        assert abs(np.abs(np.diff(orders[i])).mean() - n / 3) < 150
        assert (orders[i] == orders[(i + 1) % 3]).sum() < 12


def test_the_memory_of_permute_does_not_depend_on_n():
    positions = permute(np.arange(5), 10**15, (0, 0))
    assert len(set(positions.tolist())) == 5
    assert (0 <= positions).all() and (positions < 10**15).all()


def rows_of(loaders, num_steps, grad_accum_steps):
    """[rows read by all ranks in step 0, in step 1, ...]; a row is the tokens of x and y's last."""
    steps = []
    for _ in range(num_steps):
        rows = []
        for loader in [*loaders] * grad_accum_steps:
            x, y = loader.next_batch()
            assert x.dtype == y.dtype == torch.int64
            assert x.shape == y.shape == (loader.B, loader.T)
            assert torch.equal(x[:, 1:], y[:, :-1])
            rows += [tuple(row) for row in torch.cat([x, y[:, -1:]], dim=1).tolist()]
        steps.append(rows)
    return steps


def make_loaders(stream, B, T, W, **kwargs):
    return [DataLoaderLite(stream, B, T, rank, W, **kwargs) for rank in range(W)]


def close(loaders):
    for loader in loaders:
        loader.close()


@given(shard_lengths, st.integers(1, 7), st.sampled_from([1, 2, 4, 6, 12]), st.booleans(),
       st.integers(0, 2**31), st.data())
@quick
def test_each_step_reads_its_windows_of_the_epochs_permutation_for_any_B_and_W(
        tmp_path_factory, lengths, T, G, shuffle, seed, draw):
    stream, tokens = make_stream(str(tmp_path_factory.mktemp("shards")), lengths)
    n = (len(tokens) - 1) // T  # windows of T+1 tokens with stride T
    windows = [tuple(tokens[w * T:w * T + T + 1].tolist()) for w in range(n)]
    num_steps = 2 * n // G + 2  # past the ends of two epochs
    order = []
    for epoch in range(num_steps * G // n + 1):
        here = permute(np.arange(n), n, (seed, epoch)).tolist() if shuffle else range(n)
        order += [windows[w] for w in here]
    B = draw.draw(st.sampled_from([b for b in (1, 2, 3, 4, 6, 12) if G % b == 0]))
    W = draw.draw(st.sampled_from([w for w in (1, 2, 3, 4) if G // B % w == 0]))
    loaders = make_loaders(stream, B, T, W, shuffle=shuffle, seed=seed)
    try:
        for s, rows in enumerate(rows_of(loaders, num_steps, G // (B * W))):
            assert sorted(rows) == sorted(order[s * G:(s + 1) * G]), (s, B, W)
        assert {loader.position for loader in loaders} == {num_steps * G}
        assert loaders[0].epoch == num_steps * G / n
    finally:
        close(loaders)


@given(shard_lengths, st.integers(1, 6), st.integers(0, 9), st.booleans(), st.data())
@settings(quick, max_examples=10)
def test_a_restored_loader_continues_at_the_saved_position_for_any_B_and_W(
        tmp_path_factory, lengths, T, k, shuffle, draw):
    stream, _ = make_stream(str(tmp_path_factory.mktemp("shards")), lengths)
    arrangements = st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (1, 2)])  # G = 4
    (B1, W1), (B2, W2) = draw.draw(arrangements), draw.draw(arrangements)
    original = make_loaders(stream, B1, T, W1, shuffle=shuffle)
    restored = make_loaders(stream, B2, T, W2, shuffle=shuffle)
    try:
        rows_of(original, k, 4 // (B1 * W1))
        state = json.loads(json.dumps(original[0].state_dict()))  # plain values
        assert all(loader.state_dict() == state for loader in original)
        rows_of(restored, 1, 4 // (B2 * W2))  # has already prefetched from another position
        for loader in restored:
            loader.load_state_dict(state)
        want = rows_of(original, 5, 4 // (B1 * W1))
        got = rows_of(restored, 5, 4 // (B2 * W2))
        assert [sorted(rows) for rows in got] == [sorted(rows) for rows in want]
        if (B1, W1) == (B2, W2):
            assert got == want
    finally:
        close(original + restored)


def test_a_state_of_other_data_is_an_error_with_both_values_unless_forced(tmp_path):
    stream, _ = make_stream(str(tmp_path), [100])
    state = DataLoaderLite(stream, 2, 5).state_dict()
    other = DataLoaderLite(stream, 2, 4, seed=7)
    with pytest.raises(ValueError, match="T was 5, is 4; seed was 1337, is 7"):
        other.load_state_dict({**state, "position": 6})
    other.load_state_dict({**state, "position": 6}, force=True)
    assert other.position == 6


def test_the_fingerprint_differs_for_other_data_of_the_same_length(tmp_path):
    rng = np.random.default_rng(0)
    fingerprints = set()
    for name, sizes in (("a", (50, 30)), ("b", (50, 30)), ("c", (30, 50))):
        paths = [str(tmp_path / f"{name}_train_{i:06d}.npy") for i in range(2)]
        for path, size in zip(paths, sizes):
            write_shard(path, rng.integers(0, 50257, size).astype(np.uint16))
        assert TokenStream(paths).fingerprint() == TokenStream(paths).fingerprint()
        fingerprints.add(TokenStream(paths).fingerprint())
    assert len(fingerprints) == 3


@given(shard_lengths, st.integers(1, 5), st.integers(1, 7), st.integers(1, 300), st.integers(1, 16))
@quick
def test_iterate_batches_yields_each_window_once_for_any_B_and_W(
        tmp_path_factory, lengths, T, B, max_tokens, W):
    """Every rank yields as many batches, or evaluations would hang."""
    stream, tokens = make_stream(str(tmp_path_factory.mktemp("shards")), lengths)
    ranks = [list(iterate_batches(stream, B, T, max_tokens, rank, W)) for rank in range(W)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for x, y in batches
            for row in torch.cat([x, y[:, -1:]], dim=1).tolist()]
    num_windows = min((len(tokens) - 1) // T, max_tokens // T)
    assert rows == [tokens[w * T:w * T + T + 1].tolist() for w in range(num_windows)]
    # in two parts
    cut = max_tokens // 3
    parts = [*iterate_batches(stream, B, T, cut),
             *iterate_batches(stream, B, T, max_tokens, first_token=cut)]
    assert [row for x, _ in parts for row in x.tolist()] == [row[:T] for row in rows]


@pytest.mark.parametrize("B", [1, 2, 5])
def test_batches_have_the_strides_of_a_new_tensor_for_any_B(B, tmp_path):
    """A single row of a larger array has its strides: torch.compile compiled a second graph."""
    stream, _ = make_stream(str(tmp_path), [300])
    loader = DataLoaderLite(stream, B, 10)
    batches = [loader.next_batch(), *iterate_batches(stream, B, 10, 100)]
    loader.close()
    assert all(t.stride() == (10, 1) and t.storage_offset() == 0 for xy in batches for t in xy)


# -----------------------------------------------------------------------------
# bits per byte

@pytest.mark.parametrize("T, max_tokens", [(8, 10**6), (8, 40), (3, 7)])
def test_bits_per_byte_are_the_losses_bits_over_the_bytes_of_the_targets(T, max_tokens, tmp_path):
    """With documents of one to four bytes per character; EOT is a target without bytes."""
    texts = ["naïve café, to be or not to be", "日本語 and an 🙂, that is the question"] * 3
    tokens = [token for text in texts for token in [EOT, *data.encode(text)]]
    write_shard(str(tmp_path / "a.npy"), np.array(tokens, dtype=np.uint16))
    stream = TokenStream([str(tmp_path / "a.npy")])
    losses, num_bytes = [], 0
    for _, y in iterate_batches(stream, 2, T, max_tokens):
        for token in y.flatten().tolist():
            losses.append(0.1 * len(losses))  # nats
            if token != EOT:
                num_bytes += len(get_tokenizer().decode_single_token_bytes(token))
    bits = sum(losses) / math.log(2)
    mean = sum(losses) / len(losses)
    assert mean * bits_per_byte(stream, T, max_tokens) == pytest.approx(bits / num_bytes)


def test_bits_per_byte_counts_every_target_of_a_long_stream(tmp_path):
    """More targets than the 2**20 that are read at once, and the last token is one of them."""
    one, nine = data.encode("a"), data.encode(" language")  # of 1 and 9 bytes
    tokens = np.full(2**20 + 11, one[0], dtype=np.uint16)
    tokens[[2**20, 2**20 + 1, -1]] = nine[0]  # the last of the first block, and beyond
    write_shard(str(tmp_path / "a.npy"), tokens)
    stream = TokenStream([str(tmp_path / "a.npy")])
    num_targets = 2**20 + 10
    expected = num_targets / (math.log(2) * (num_targets + 3 * 8))
    assert bits_per_byte(stream, 2, 10**9) == expected


# -----------------------------------------------------------------------------
# reading while training

def next_batches_until_error(loader):
    with pytest.raises(ValueError) as error:
        for _ in range(50):
            loader.next_batch()
    return str(error.value)


def test_next_batch_raises_while_a_shard_is_damaged_and_then_continues(tmp_path):
    """The prefetch thread ended with its first error; the second next_batch waited forever."""
    stream, tokens = make_stream(str(tmp_path), [300])
    path = tmp_path / "x_train_000000.npy"
    contents = path.read_bytes()
    loader = DataLoaderLite(stream, 2, 10, shuffle=False)
    loader.next_batch()
    os.truncate(path, len(contents) // 2)
    message = next_batches_until_error(loader)
    assert str(path) in message and "has changed" in message
    position = loader.position
    assert next_batches_until_error(loader) == message
    path.write_bytes(contents)
    x, _ = loader.next_batch()
    assert x[0].tolist() == tokens[position * 10:position * 10 + 10].tolist()
    loader.close()


def test_files_stay_open_between_reads_within_a_bound(tmp_path):
    """A batch of shuffled windows opened a file for each of them: 3 ms for 64."""
    stream, tokens = make_stream(str(tmp_path), [50] * 6)
    stream.max_open = 4
    for _ in range(3):
        for start in (0, 60, 120, 170):
            assert stream.read(start, 20).tolist() == tokens[start:start + 20].tolist()
    files = list(stream.files.values())
    assert len(files) == 4
    stream.read(0, 20)
    assert list(stream.files.values()) == files
    for start in range(0, 280, 20):
        assert stream.read(start, 20).tolist() == tokens[start:start + 20].tolist()
        assert len(stream.files) == 4 and not any(f.closed for f in stream.files.values())
    assert any(f.closed for f in files)
    # a file is opened again only if it is the same shard, of the same size and tokens
    for other in (TOKENS, tokens[:50][::-1]):
        write_shard(str(tmp_path / "x_train_000000.npy"), other)
        for _ in range(2):
            with pytest.raises(ValueError, match="x_train_000000.npy .*has changed"):
                stream.read(0, 5)


class FailingReader(io.FileIO):
    """A file whose next reads raise the errors (numbers) of its list, which all files share."""
    errors = []

    def readinto(self, buffer):
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super().readinto(buffer)


@pytest.fixture
def failing(monkeypatch):
    """A TokenStream's files are FailingReaders; returns the list of the errors to raise."""
    errors = []
    monkeypatch.setattr(FailingReader, "errors", errors)
    monkeypatch.setattr(TokenStream, "RETRY_WAITS", (0, 0, 0), raising=False)
    monkeypatch.setattr(data, "open", lambda path, *_, **__: FailingReader(path), raising=False)
    return errors


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_read_that_fails_for_a_moment_is_tried_again(number, tmp_path, capsys, failing):
    """It ended the run with "it has changed since training started"."""
    stream, tokens = make_stream(str(tmp_path), [300])
    loader = DataLoaderLite(stream, 2, 10, shuffle=False)
    path, f = next(iter(stream.files.items()))
    failing += [number] * 3
    x, _ = loader.next_batch()
    loader.close()
    assert x.flatten().tolist() == tokens[:20].tolist()
    assert stream.files[path] is not f and f.closed  # an open file may stay stale
    line = f"cannot read {path}: {os.strerror(number)}; trying again in 0 s\n"
    assert capsys.readouterr().err == 3 * line


def test_a_read_that_fails_for_long_is_an_error_that_names_the_cause(tmp_path, failing):
    stream, _ = make_stream(str(tmp_path), [300])
    failing += [errno.EIO] * 4
    with pytest.raises(OSError, match="x_train_000000.npy: Input/output error, after 3 retries$"):
        stream.read(0, 5)


@pytest.fixture
def few_files():
    """This process can open 20 more files."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as f:
        resource.setrlimit(resource.RLIMIT_NOFILE, (f.fileno() + 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_are_named(few_files, tmp_path, monkeypatch):
    """They were "it has changed since training started"."""
    monkeypatch.setattr(TokenStream, "RETRY_WAITS", (0, 0, 0), raising=False)
    stream, _ = make_stream(str(tmp_path), [50])
    others = []  # of another part of the program
    with pytest.raises(OSError):
        while True:
            others.append(open(os.devnull))
    with pytest.raises(OSError, match=r"\.npy: Too many open files, after 3 retries"):
        stream.read(0, 50)
    for f in others:
        f.close()


def test_a_read_that_returns_less_than_was_asked_for_is_continued(tmp_path, monkeypatch):
    """Linux reads at most 2,147,479,552 bytes at once: a larger shard seemed truncated."""
    stream, tokens = make_stream(str(tmp_path), [300])

    class Reader(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:97])
    monkeypatch.setattr("builtins.open", lambda path, *args, **kwargs: Reader(path))
    assert stream.read(5, 290).tolist() == tokens[5:295].tolist()


READ_200_MB = """
import sys, psutil
from data import DataLoaderLite, TokenStream
stream = TokenStream([sys.argv[1]])
loader, process = DataLoaderLite(stream, 64, 8192), psutil.Process()  # 1 MB per batch
for _ in range(20):
    loader.next_batch()
before = process.memory_info().rss
for _ in range(180):
    loader.next_batch()
print((process.memory_info().rss - before) / 1e6)
"""


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_the_tokens_read(tmp_path):
    path = tmp_path / "train.bin"
    with open(path, "wb") as f:
        f.truncate(200_000_000)  # sparse: zeros that take no disk space
    done = python("-c", READ_200_MB, path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50  # MB; an open memory map would add the 180 MB read
