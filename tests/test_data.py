"""
data.py: the tokenizer against tiktoken's r50k_base and transformers' GPT2Tokenizer, the shard formats byte by byte, and
the order of the data for random shard lengths, B, T, ranks and gradient accumulation, against windows sliced from a list.

    python -m pytest tests/test_data.py

Needs no network: all data is created here.
"""
import base64
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

import data
from data import EOT, DataLoaderLite, TokenStream, find_shards, get_tokenizer, iterate_batches, open_shard, permute, prepare_data, split_texts, write_shard

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXTS = ["", "Hello, I'm a language model,", "  two  spaces\t\ttabs\r\n\r\nlines   ", " " * 1000 + "x", "\n" * 300,
         "naïve café Ünïcödé ß ǅ", "日本語の文章 한국어 العربية עברית हिन्दी",
         "👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽‍♀️ e\u0301 \u200b\ufeff\u00a0\u3000x",
         "I'll we've don't it's YOU'RE he'd 'M", "1234567890 ½ Ⅷ ٣٤٥ x9y", "<|endoftext|> and <|endoftext|>",
         "\x00\x01\x7f\x80\x9f",
         "a" * 500, "```python\ndef f(x):\n    return x**2  # !?\n```", "\U0010ffff\u2028\u2029\x85"]


# -----------------------------------------------------------------------------
# the tokenizer

@pytest.fixture(scope="module")
def reference():
    """tiktoken's r50k_base, which is GPT-2's encoding; the file that it would download is read from disk."""
    def read_file(url):
        assert url.endswith("/r50k_base.tiktoken"), url
        with open(data.TOKENIZER_FILE, "rb") as f:
            return f.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        patch.setattr(tiktoken.load, "read_file", read_file)
        return tiktoken.Encoding(**tiktoken_ext.openai_public.r50k_base())


@pytest.fixture(scope="module")
def hf_tokenizer():
    """transformers' GPT2Tokenizer, with a vocabulary and merges reconstructed from the ranks."""
    with open(data.TOKENIZER_FILE, "rb") as f:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes_to_unicode in openai/gpt-2, src/encoder.py
    others = [b for b in range(256) if b not in printable]
    characters = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}

    def show(token):
        return "".join(characters[b] for b in token)

    merges = []
    for token, rank in ranks.items():
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:  # apply the merges of lower rank; the two parts that remain are this token's merge
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((show(parts[0]), show(parts[1])))
    return GPT2Tokenizer(vocab={**{show(token): rank for token, rank in ranks.items()}, "<|endoftext|>": EOT}, merges=merges)


def test_the_vocabulary_equals_tiktokens(reference):
    ours = get_tokenizer()
    assert ours.n_vocab == reference.n_vocab == data.NUM_TOKENS and ours.eot_token == EOT
    assert [ours.decode_single_token_bytes(i) for i in range(EOT + 1)] == \
        [reference.decode_single_token_bytes(i) for i in range(EOT + 1)]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_random_text_encodes_as_in_tiktoken_and_decodes_to_itself(reference, text):
    tokens = get_tokenizer().encode_ordinary(text)
    assert tokens == reference.encode_ordinary(text)
    assert get_tokenizer().decode(tokens) == text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("text", TEXTS)
def test_unusual_text_encodes_as_in_tiktoken_and_decodes_to_itself(reference, text):
    tokens = get_tokenizer().encode_ordinary(text)
    assert tokens == reference.encode_ordinary(text)
    assert EOT not in tokens and get_tokenizer().decode(tokens) == text


def test_text_encodes_as_in_transformers(hf_tokenizer):
    with open(os.path.join(ROOT, "input.txt"), encoding="utf-8") as f:
        play = f.read(20000)
    for text in [*TEXTS, play]:
        if "<|endoftext|>" not in text:  # the special token in transformers, ordinary text here
            assert get_tokenizer().encode_ordinary(text) == hf_tokenizer(text)["input_ids"], text[:40]


def test_every_byte_has_a_token():
    for b in range(256):
        token = get_tokenizer().encode_single_token(bytes([b]))
        assert get_tokenizer().decode_single_token_bytes(token) == bytes([b]) and token < 256


def test_ids_of_the_lectures_example():
    assert get_tokenizer().encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


def test_a_damaged_or_missing_tokenizer_file_is_an_error(tmp_path, monkeypatch):
    with open(data.TOKENIZER_FILE, "rb") as f:
        contents = f.read()
    monkeypatch.setattr(data, "TOKENIZER_FILE", str(tmp_path / "gpt2.tiktoken"))
    with pytest.raises(ValueError, match="cannot read.*git checkout"):
        data.token_ranks.__wrapped__()
    (tmp_path / "gpt2.tiktoken").write_bytes(contents[:-1])
    with pytest.raises(ValueError, match="damaged.*git checkout"):
        data.token_ranks.__wrapped__()


def test_each_thread_has_its_own_tokenizer():
    """Threads that shared one spent a fifth of their time on the locks of its regular expressions."""
    with ThreadPoolExecutor(1) as pool:
        first, second = (pool.submit(get_tokenizer).result() for _ in range(2))
    assert first is second is not get_tokenizer() is get_tokenizer()
    assert first.encode_ordinary("Hello, I'm") == get_tokenizer().encode_ordinary("Hello, I'm")


# -----------------------------------------------------------------------------
# shard files

TOKENS = np.array([50256, 0, 1, 258, 50255], dtype=np.uint16)


def test_npy_shards_are_standard_numpy_files(tmp_path):
    write_shard(str(tmp_path / "ours.npy"), TOKENS)
    read = np.load(tmp_path / "ours.npy")
    assert read.dtype == np.uint16 and read.tolist() == TOKENS.tolist()
    np.save(tmp_path / "numpys.npy", TOKENS)  # as build-nanogpt's fineweb.py writes them
    assert TokenStream([str(tmp_path / "numpys.npy")]).read(0, 5).tolist() == TOKENS.tolist()


def test_bin_shards_are_byte_identical_to_llm_cs(tmp_path):
    path = str(tmp_path / "x_train_000001.bin")
    write_shard(path, TOKENS)
    contents = (tmp_path / "x_train_000001.bin").read_bytes()
    # llm.c: 256 little-endian int32 (20240520, version 1, count, zeros), then uint16
    assert contents[:12] == bytes.fromhex("88d83401") + bytes.fromhex("01000000") + bytes.fromhex("05000000")
    assert contents[12:1024] == bytes(1012)
    assert contents[1024:] == bytes.fromhex("50c4" "0000" "0100" "0201" "4fc4")
    assert TokenStream([path]).read(1, 3).tolist() == [0, 1, 258]


def test_nanogpts_bin_without_header_is_read(tmp_path):
    for name in ("train.bin", "val.bin"):
        TOKENS.tofile(tmp_path / name)
    train, val = prepare_data(str(tmp_path))
    assert TokenStream(train).read(0, 5).tolist() == TokenStream(val).read(0, 5).tolist() == TOKENS.tolist()


def test_find_shards_returns_all_formats_in_order_and_nothing_else(tmp_path):
    names = ["edufineweb_train_000002.npy", "edufineweb_train_000001.npy", "edufineweb_val_000000.npy", "train_notes.txt",
             "fineweb_train_000010.bin", "xtrain_000001.npy", "a_train_000001.npy.12.tmp", "manifest.json"]
    for name in names:
        (tmp_path / name).touch()
    found = [os.path.basename(path) for path in find_shards(str(tmp_path), "train")]
    assert found == ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy", "fineweb_train_000010.bin"]


def bin_header(*values):
    header = np.zeros(256, dtype="<i4")
    header[:len(values)] = values
    return header.tobytes()


@pytest.mark.parametrize("contents, words", [
    (bin_header(20240521, 1, 2) + bytes(4), "magic 20240520"), (bin_header(20240520, 2, 2) + bytes(4), "version 1"),
    (bin_header(20240520, 1, 3) + bytes(4), "should hold 3 tokens"), (bin_header(20240520, 1, 1) + bytes(4), "should hold 1"),
    (bin_header(20240520, 1, -1), "should hold -1"), (b"", "no valid llm.c header"),
    (b"\x88\xd8\x34\x01\x01", "no valid llm.c header"),
])
def test_a_bin_with_a_wrong_header_or_length_is_an_error_with_its_name(tmp_path, contents, words):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"x_train_000001.bin.*{words}"):
        open_shard(str(path))


@pytest.mark.parametrize("array, words", [
    (TOKENS.astype(np.int64), "int64"), (TOKENS.astype(">u2"), ">u2"), (TOKENS.astype(np.float32), "float32"),
    (TOKENS.reshape(1, 5), r"\(1, 5\)"),
])
def test_an_npy_of_another_dtype_or_rank_is_an_error_with_its_name(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=f"x.npy holds .*{words}.*1-D uint16"):
        open_shard(str(tmp_path / "x.npy"))


def test_a_truncated_npy_is_an_error_with_its_name(tmp_path):
    np.save(tmp_path / "x.npy", TOKENS)
    whole = (tmp_path / "x.npy").read_bytes()
    for length in (0, 3, 9, 60, len(whole) - 2, len(whole) - 1):
        (tmp_path / "x.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.npy"):
            open_shard(str(tmp_path / "x.npy"))


def test_a_bin_of_an_odd_number_of_bytes_is_an_error_with_its_name(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(7))
    with pytest.raises(ValueError, match="train.bin.*7 bytes"):
        open_shard(str(tmp_path / "train.bin"))


def test_an_id_outside_the_vocabulary_is_an_error_with_the_shards_name(tmp_path):
    write_shard(str(tmp_path / "a.npy"), TOKENS)
    stream = TokenStream([str(tmp_path / "a.npy")], vocab_size=50256)
    assert stream.read(1, 4).tolist() == TOKENS[1:].tolist()
    with pytest.raises(ValueError, match="a.npy has the id 50256.*below 50256"):
        stream.read(0, 5)


def test_a_failed_write_leaves_the_old_shard_and_no_other_file(tmp_path, monkeypatch):
    write_shard(str(tmp_path / "a.npy"), TOKENS)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_shard(str(tmp_path / "a.npy"), TOKENS[:2])
    assert os.listdir(tmp_path) == ["a.npy"] and len(np.load(tmp_path / "a.npy")) == 5


# -----------------------------------------------------------------------------
# the stream and the loader

def make_stream(folder, lengths):
    """(TokenStream over shards of these lengths, all of its tokens as an array); token i is i % 50000."""
    tokens = (np.arange(sum(lengths)) % 50000).astype(np.uint16)
    paths = []
    for i, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        paths.append(os.path.join(folder, f"x_train_{i:06d}.{('npy', 'bin')[i % 2]}"))
        write_shard(paths[-1], part)
    return TokenStream(paths), tokens


shard_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 8)


@given(shard_lengths, st.data())
@quick
def test_a_stream_reads_across_shard_boundaries(tmp_path_factory, lengths, draw):
    stream, tokens = make_stream(str(tmp_path_factory.mktemp("shards")), lengths)
    assert len(stream) == len(tokens)
    start = draw.draw(st.integers(0, len(tokens) - 1))
    length = draw.draw(st.integers(1, len(tokens) - start))
    read = stream.read(start, length)
    assert read.dtype == np.uint16 and read.tolist() == tokens[start:start + length].tolist()


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
@quick
def test_permute_is_a_permutation(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, (seed, epoch)).tolist()) == list(range(n))


def test_permute_is_a_permutation_near_powers_of_two():
    for n in [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 65537]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, (1, 2))), np.arange(n)), n


def test_permute_differs_between_epochs_and_seeds_and_looks_random():
    n = 10000
    orders = [permute(np.arange(n), n, key) for key in ((1337, 0), (1337, 1), (1338, 0))]
    for i in range(3):
        # a random permutation has one fixed point and a distance of n/3 between neighbours on average (standard error 25)
        assert (orders[i] == np.arange(n)).sum() < 12
        assert abs(np.abs(np.diff(orders[i])).mean() - n / 3) < 150
        assert (orders[i] == orders[(i + 1) % 3]).sum() < 12


def test_the_memory_of_permute_does_not_depend_on_n():
    positions = permute(np.arange(5), 10**15, (0, 0))
    assert len(set(positions.tolist())) == 5 and (0 <= positions).all() and (positions < 10**15).all()


def rows_of(loaders, num_steps, grad_accum_steps):
    """[rows read by all ranks in step 0, in step 1, ...]; a row is the tokens of x and the last one of y."""
    steps = []
    for _ in range(num_steps):
        rows = []
        for _ in range(grad_accum_steps):
            for loader in loaders:
                x, y = loader.next_batch()
                assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (loader.B, loader.T)
                assert torch.equal(x[:, 1:], y[:, :-1])
                rows += [(*row, last) for row, last in zip(x.tolist(), y[:, -1].tolist())]
        steps.append(rows)
    return steps


def make_loaders(stream, B, T, W, **kwargs):
    return [DataLoaderLite(stream, B, T, rank, W, **kwargs) for rank in range(W)]


def close(loaders):
    for loader in loaders:
        loader.close()


@given(shard_lengths, st.integers(1, 7), st.sampled_from([1, 2, 4, 6, 12]), st.booleans(), st.integers(0, 2**31), st.data())
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
        steps = rows_of(loaders, num_steps, G // (B * W))
        for s, rows in enumerate(steps):
            assert sorted(rows) == sorted(order[s * G:(s + 1) * G]), (s, B, W)
        assert {loader.position for loader in loaders} == {num_steps * G}
        assert loaders[0].epoch == num_steps * G / n
    finally:
        close(loaders)


@given(shard_lengths, st.integers(1, 6), st.integers(0, 9), st.booleans(), st.data())
@settings(quick, max_examples=10)
def test_a_restored_loader_continues_at_the_saved_position_for_any_B_and_W(tmp_path_factory, lengths, T, k, shuffle, draw):
    stream, _ = make_stream(str(tmp_path_factory.mktemp("shards")), lengths)
    arrangements = st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (1, 2)])  # (B, W) for G = 4
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
        want, got = rows_of(original, 5, 4 // (B1 * W1)), rows_of(restored, 5, 4 // (B2 * W2))
        assert [sorted(rows) for rows in got] == [sorted(rows) for rows in want]
        if (B1, W1) == (B2, W2):
            assert got == want
    finally:
        close(original + restored)


def test_two_epochs_have_different_orders_and_the_same_windows(tmp_path):
    stream, _ = make_stream(str(tmp_path), [401])
    loader = DataLoaderLite(stream, 4, 10)
    first, second = rows_of([loader], 2, 10)
    loader.close()
    assert first != second and sorted(first) == sorted(second) and len(set(first)) == 40


def test_a_state_of_other_data_is_an_error_with_both_values(tmp_path):
    stream, _ = make_stream(str(tmp_path), [100])
    state = DataLoaderLite(stream, 2, 5).state_dict()
    with pytest.raises(ValueError, match="T was 5, is 4"):
        DataLoaderLite(stream, 2, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 1337, is 7"):
        DataLoaderLite(stream, 2, 5, seed=7).load_state_dict(state)


def test_too_few_tokens_for_one_window_is_an_error(tmp_path):
    stream, _ = make_stream(str(tmp_path), [5, 5])
    assert DataLoaderLite(stream, 1, 9).num_windows == 1
    with pytest.raises(ValueError, match="10 tokens are too few for one sequence of 10"):
        DataLoaderLite(stream, 1, 10)


@given(shard_lengths, st.integers(1, 5), st.integers(1, 7), st.integers(1, 300), st.integers(1, 5))
@quick
def test_iterate_batches_yields_each_window_once_for_any_B_and_W(tmp_path_factory, lengths, T, B, max_tokens, W):
    stream, tokens = make_stream(str(tmp_path_factory.mktemp("shards")), lengths)
    rows = [row for rank in range(W) for x, y in iterate_batches(stream, B, T, max_tokens, rank, W)
            for row in torch.cat([x, y[:, -1:]], dim=1).tolist()]
    num_windows = min((len(tokens) - 1) // T, max_tokens // T)
    assert rows == [tokens[w * T:w * T + T + 1].tolist() for w in range(num_windows)]


# -----------------------------------------------------------------------------
# errors while a loader runs

@pytest.mark.parametrize("T, max_tokens", [(8, 10**6), (8, 40), (3, 7)])
def test_bits_per_byte_are_the_losses_bits_over_the_bytes_of_the_targets_text(T, max_tokens, tmp_path):
    """With two documents of one to four bytes per character; <|endoftext|> is a target without bytes."""
    texts = ["naïve café, to be or not to be", "日本語 and an 🙂, that is the question"] * 3
    tokens = [token for text in texts for token in [data.EOT, *data.get_tokenizer().encode_ordinary(text)]]
    data.write_shard(str(tmp_path / "a.npy"), np.array(tokens, dtype=np.uint16))
    stream = data.TokenStream([str(tmp_path / "a.npy")])
    losses, num_bytes = [], 0
    for _, y in data.iterate_batches(stream, 2, T, max_tokens):
        for token in y.flatten().tolist():
            losses.append(0.1 * len(losses))  # nats
            if token != data.EOT:
                num_bytes += len(data.get_tokenizer().decode_single_token_bytes(token))
    bits = sum(loss / math.log(2) for loss in losses)
    mean = sum(losses) / len(losses)
    assert mean * data.bits_per_byte(stream, T, max_tokens) == pytest.approx(bits / num_bytes)


def next_batches_until_error(loader):
    with pytest.raises(ValueError) as error:
        for _ in range(50):
            loader.next_batch()
    return str(error.value)


@pytest.mark.parametrize("change", ["truncated", "extended", "removed", "invalid id"])
def test_next_batch_raises_when_a_shard_has_changed(tmp_path, change):
    stream, _ = make_stream(str(tmp_path), [300, 300])
    loader = DataLoaderLite(stream, 2, 10, shuffle=False)
    loader.next_batch()
    path = str(tmp_path / "x_train_000001.bin")
    if change == "removed":
        os.remove(path)
    elif change == "invalid id":
        write_shard(path, np.full(300, 60000, dtype=np.uint16))
    else:
        write_shard(path, np.zeros(30 if change == "truncated" else 900, dtype=np.uint16))
    message = next_batches_until_error(loader)
    assert path in message and ("60000" in message if change == "invalid id" else "changed" in message)


def test_next_batch_raises_again_after_an_error_and_continues_when_the_shard_is_back(tmp_path):
    """The prefetch thread ends with its first error; a second next_batch once waited for it forever."""
    stream, tokens = make_stream(str(tmp_path), [300])
    path = stream.shards[0].path
    loader = DataLoaderLite(stream, 2, 10, shuffle=False)
    os.rename(path, path + ".away")
    assert next_batches_until_error(loader) == next_batches_until_error(loader)
    os.rename(path + ".away", path)
    x, _ = loader.next_batch()
    assert x[0].tolist() == tokens[:10].tolist()
    loader.close()


def test_files_stay_open_between_reads_within_a_bound(tmp_path, monkeypatch):
    """A batch of shuffled windows opened a file for each of them: 3 ms for 64, more on a network file system."""
    stream, tokens = make_stream(str(tmp_path), [50] * 6)
    monkeypatch.setattr(stream, "MAX_OPEN", 4)
    opened, real_open = [], open
    monkeypatch.setattr("builtins.open", lambda path, *args, **kwargs: opened.append(path) or real_open(path, *args, **kwargs))
    for _ in range(3):
        for start in (0, 60, 120, 170):
            assert stream.read(start, 20).tolist() == tokens[start:start + 20].tolist()
    assert len(opened) == 4
    for start in range(0, 280, 20):
        assert stream.read(start, 20).tolist() == tokens[start:start + 20].tolist()
        assert len(stream.files) == 4 and not any(f.closed for f in stream.files.values())
    # a shard that is replaced by another file of the same size is read from the new file
    write_shard(stream.shards[5].path, np.full(50, 7, dtype=np.uint16))
    assert stream.read(280, 5).tolist() == [7] * 5


def test_a_read_that_returns_less_than_was_asked_for_is_continued(tmp_path, monkeypatch):
    """Linux reads at most 2,147,479,552 bytes at once: a larger shard, read as a whole by --verify, seemed truncated."""
    stream, tokens = make_stream(str(tmp_path), [300])

    class Reader(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:97])
    monkeypatch.setattr("builtins.open", lambda path, *args, **kwargs: Reader(path))
    assert stream.read(5, 290).tolist() == tokens[5:295].tolist()


@pytest.mark.parametrize("B", [1, 2, 5])
def test_batches_have_the_strides_of_a_new_tensor_for_any_B(B, tmp_path):
    """contiguous() keeps the strides of a single row of a larger array: torch.compile compiled a second graph for B = 1."""
    stream, _ = make_stream(str(tmp_path), [300])
    loader = DataLoaderLite(stream, B, 10)
    batches = [loader.next_batch(), *iterate_batches(stream, B, 10, 100)]
    loader.close()
    assert all(t.stride() == (10, 1) and t.storage_offset() == 0 for batch in batches for t in batch)


READ_200_MB = """
import os, sys, psutil
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
    done = subprocess.run([sys.executable, "-c", READ_200_MB, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50  # MB; an open memory map would add the 180 MB read


# -----------------------------------------------------------------------------
# prepare_data

def tokens_of(paths):
    stream = TokenStream(paths)
    return stream.read(0, len(stream)).tolist()


PLAY = "".join(f"SPEAKER {i}:\nWhat light, what light?\nIt is the {i}th.\n\n" for i in range(40))


def test_a_text_file_becomes_a_train_and_a_val_shard_with_all_of_its_text(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    train, val = (tokens_of(paths) for paths in prepare_data(str(tmp_path / "play.txt")))
    assert train[0] == val[0] == EOT and EOT not in train[1:] + val[1:]
    texts = [get_tokenizer().decode(tokens[1:]) for tokens in (train, val)]
    assert "".join(texts) == PLAY and texts[1].startswith("SPEAKER")
    assert 0.85 < len(texts[0]) / len(PLAY) <= 0.9


def test_carriage_returns_and_unicode_are_preserved(tmp_path):
    text = "línea uno\r\nzwei 日本\r\n\r\n" * 30
    (tmp_path / "t.txt").write_bytes(text.encode())
    assert "".join(get_tokenizer().decode(tokens_of(paths)[1:]) for paths in prepare_data(str(tmp_path / "t.txt"))) == text


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + PLAY.encode())
    assert "".join(get_tokenizer().decode(tokens_of(paths)[1:]) for paths in prepare_data(str(tmp_path / "t.txt"))) == PLAY


def test_each_text_file_of_a_folder_is_a_document_after_endoftext(tmp_path):
    documents = [f"document {i} " + "word " * 20 for i in range(20)]
    for i, text in enumerate(documents):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    (tmp_path / "notes.md").write_text("not a .txt file")
    train, val = prepare_data(str(tmp_path))
    tokens = tokens_of(train) + tokens_of(val)
    assert tokens == [token for text in documents for token in (EOT, *get_tokenizer().encode_ordinary(text))]
    assert tokens_of(train).count(EOT) == 18 and tokens_of(val).count(EOT) == 2


def test_a_text_whose_folder_cannot_be_written_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    """It was "[Errno 30] Read-only file system: '.../.tokens/...'"."""
    (tmp_path / "t.txt").write_text("a line\n" * 20)

    def makedirs(path):
        raise OSError(errno.EROFS, "Read-only file system", path)
    monkeypatch.setattr(data.os, "makedirs", makedirs)
    message = f"cannot create {tmp_path}/.tokens for the tokens of {tmp_path}/t.txt (Read-only file system): copy the text to"
    with pytest.raises(OSError, match=re.escape(message)):
        prepare_data(str(tmp_path / "t.txt"))


def test_text_is_tokenized_again_only_if_the_file_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    first = prepare_data(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(data, "get_tokenizer", lambda: pytest.fail("tokenized again"))
        assert prepare_data(str(path)) == first
    path.write_text(PLAY + "THE END\n" * 20)
    again = prepare_data(str(path))
    assert again != first and get_tokenizer().decode(tokens_of(again[1])).endswith("THE END\n")
    # the same size but another modification time
    os.utime(path, ns=(1, 1))
    assert prepare_data(str(path)) != again


PREPARE_AND_KILL = """
import os, signal, sys, data
write = data.write_shard
def write_then_kill(path, tokens):
    write(path, tokens)
    os.kill(os.getpid(), signal.SIGKILL)
data.write_shard = write_then_kill
data.prepare_data(sys.argv[1])
"""


def test_a_process_killed_while_tokenizing_leaves_no_cache_folder(tmp_path, monkeypatch):
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    killed = subprocess.Popen([sys.executable, "-c", PREPARE_AND_KILL, str(path)], cwd=ROOT)
    assert killed.wait(timeout=120) == -signal.SIGKILL
    left, = os.listdir(tmp_path / ".tokens")
    assert left.endswith(".tmp")
    monkeypatch.setattr(os, "getpid", lambda: killed.pid)  # in a container the next process may have the same id
    train, val = prepare_data(str(path))
    assert "".join(get_tokenizer().decode(tokens_of(paths)[1:]) for paths in (train, val)) == PLAY
    final, = set(os.listdir(tmp_path / ".tokens")) - {left}  # only the process that created a folder removes it
    assert sorted(os.listdir(tmp_path / ".tokens" / final)) == ["play_train_000001.npy", "play_val_000000.npy"]


def test_prepare_data_returns_the_shards_of_a_folder(tmp_path):
    for name in ("x_train_000001.npy", "x_train_000002.npy", "x_val_000000.npy"):
        write_shard(str(tmp_path / name), TOKENS)
    (tmp_path / "readme.txt").write_text("about these shards")
    train, val = prepare_data(str(tmp_path))
    assert [os.path.basename(p) for p in train + val] == ["x_train_000001.npy", "x_train_000002.npy", "x_val_000000.npy"]


def test_prepare_data_raises_for_paths_without_training_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data at .*nowhere"):
        prepare_data(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="neither shards .* nor .txt"):
        prepare_data(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty.txt is empty"):
        prepare_data(str(tmp_path / "empty.txt"))
    (tmp_path / "latin1.txt").write_bytes("abc café".encode("latin-1"))
    with pytest.raises(ValueError, match="latin1.txt is not UTF-8 text: byte 7"):
        prepare_data(str(tmp_path / "latin1.txt"))
    write_shard(str(tmp_path / "x_train_000001.npy"), TOKENS)
    with pytest.raises(ValueError, match="no shard named .*_val_"):
        prepare_data(str(tmp_path))


# -----------------------------------------------------------------------------
# split_texts

@given(st.lists(st.text("ab \n", max_size=80), min_size=1, max_size=8).filter(lambda texts: sum(map(len, texts)) >= 2))
@settings(max_examples=300, deadline=None)
def test_a_split_keeps_all_text_and_val_is_10_to_20_percent(texts):
    train, val = split_texts(texts)
    assert "".join(train + val) == "".join(texts)
    total, in_val = len("".join(texts)), len("".join(val))
    assert total / 10 <= in_val <= total / 5 + 1
    # at most one document is cut in two
    assert train + val == texts or len(train + val) == len(texts) + 1 and train[-1] + val[0] in texts


def test_a_split_prefers_document_boundaries_then_blank_lines_then_line_ends():
    assert split_texts(["a line\n" * 10]) == (["a line\n" * 9], ["a line\n"])
    text = "x" * 83 + "\n\n" + "y" * 4 + "\n" + "z" * 10
    assert split_texts([text]) == ([text[:85]], [text[85:]])
    text = text.replace("\n\n", "xx")
    assert split_texts([text]) == ([text[:90]], [text[90:]])
    assert split_texts(["x" * 100]) == (["x" * 90], ["x" * 10])
    assert split_texts(["x" * 85, "y\n" * 7 + "y"]) == (["x" * 85], ["y\n" * 7 + "y"])


def test_val_stays_small_with_an_early_blank_line_or_a_long_last_document():
    """A blank line just after the middle once put the second half into val, and so did the second of two books."""
    text = "a\n" * 55 + "\n" + "b\n" * 45
    assert len(split_texts([text])[1][0]) < 25
    train, val = split_texts(["a\n" * 50, "b\n" * 50])
    assert (train, val) == (["a\n" * 50, "b\n" * 40], ["b\n" * 10])


def test_512_ranks_read_the_same_windows_as_one_process():
    """window_indices of 512 ranks across the end of an epoch, against one rank with the same total batch."""
    class Stream:
        def __len__(self):
            return 5_000 * 16 + 1

        def fingerprint(self):
            return ""
    ranks = [data.DataLoaderLite(Stream(), 2, 16, rank, 512, True, 7) for rank in range(512)]
    single = data.DataLoaderLite(Stream(), 1024, 16, 0, 1, True, 7)
    seen = []
    for step in range(10):
        position = step * 1024
        together = np.concatenate([rank.window_indices(position) for rank in ranks])
        assert (together == single.window_indices(position)).all()
        seen.append(together)
    seen = np.concatenate(seen)
    assert sorted(seen[:5000].tolist()) == list(range(5000)) == sorted(seen[5000:10000].tolist())
    assert seen[:5000].tolist() != seen[5000:10000].tolist()


def test_all_ranks_yield_the_same_number_of_batches():
    tokens = np.arange(8 * 11 + 1, dtype=np.uint16)

    class Stream:
        def __len__(self):
            return len(tokens)

        def read(self, start, length):
            return tokens[start:start + length]
    for world, B in ((2, 3), (3, 1), (3, 2), (5, 2), (16, 1)):
        batches = [list(data.iterate_batches(Stream(), B, 8, 10**6, rank, world)) for rank in range(world)]
        assert len({len(b) for b in batches}) == 1
        firsts = sorted(int(row[0]) for b in batches for x, _ in b for row in x)
        assert firsts == [8 * i for i in range(11)], (world, B)


def test_the_fingerprint_differs_for_other_data_of_the_same_length(tmp_path):
    rng = np.random.default_rng(0)
    prints = []
    for name, sizes in (("a", (50, 30)), ("b", (50, 30)), ("c", (30, 50))):
        paths = [str(tmp_path / f"{name}_train_{i:06d}.npy") for i in range(2)]
        for path, size in zip(paths, sizes):
            data.write_shard(path, rng.integers(0, 50257, size).astype(np.uint16))
        prints += [data.TokenStream(paths).fingerprint()] * 2
    assert len(set(prints)) == 3


def test_encode_equals_tiktoken_and_refuses_a_million_blanks_without_a_panic():
    for text in ("", "Hello, I'm a language model", "a<|endoftext|>b", "é😀" * 10 + " " * 1000 + "x"):
        assert data.encode(text).tolist() == data.get_tokenizer().encode_ordinary(text)
    with pytest.raises(ValueError, match="1,000,000 consecutive blanks from character 4 on"):
        data.encode("a b" + " " * 1_000_000 + "c")
    with pytest.raises(ValueError, match="not valid Unicode at character 2"):
        data.encode("a\udcff")
