"""
fineweb.py and sources.py: packing, tokenization, input formats, resume, damaged files, the Hub.

    python -m pytest tests/test_fineweb.py -m "not slow"
    GPT2_REAL_DATA=DIR python -m pytest tests/test_fineweb.py   # also tests on DIR/fineweb_edu_like/*.parquet

Needs no network: texts are created in tmp_path, and the Hub is an HTTP server in this file on 127.0.0.1. The results
are compared with tiktoken, one document at a time, and with a naive packing of Python lists.
"""
import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import fineweb
import sources
from data import EOT, get_tokenizer

ROOT = os.path.dirname(os.path.abspath(fineweb.__file__))
WORDS = "the of a model learns tokens, 1984 naïve 北京 \n\n  don't x=1; emoji 🤖 end.".split(" ")


def make_texts(n, seed=0):
    """n documents of very different lengths, from a seed."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice((1, 5, 40, 400)))) or "x" for _ in range(n)]


def write_parquet(path, texts, rows=20, **columns):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()), **columns}), path, row_group_size=rows)


def true_tokens(texts):
    """The expected tokens in all shards, from tiktoken, one document at a time."""
    return [t for text in texts for t in [EOT, *get_tokenizer().encode_ordinary(text)]]


def read_stream(out):
    """[val tokens, train tokens], read with data.TokenStream."""
    streams = [data.TokenStream(data.find_shards(out, split)) for split in ("val", "train")]
    return [stream.read(0, len(stream)).tolist() for stream in streams]


def contents(out):
    """{file name: bytes} of all files in a folder, temporary ones too."""
    return {name: open(os.path.join(out, name), "rb").read() for name in sorted(os.listdir(out))}


def command(*args, **env):
    """fineweb.py in a new process."""
    return subprocess.run([sys.executable, os.path.join(ROOT, "fineweb.py"), *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout=120)


def run(monkeypatch, *args):
    """fineweb.main() in this process."""
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, args)])
    fineweb.main()


@pytest.fixture
def corpus(tmp_path):
    """(folder of two parquet files, their texts)."""
    texts = make_texts(120)
    os.makedirs(tmp_path / "corpus")
    write_parquet(tmp_path / "corpus" / "000.parquet", texts[:70])
    write_parquet(tmp_path / "corpus" / "001.parquet", texts[70:])
    return tmp_path / "corpus", texts


# -----------------------------------------------------------------------------
# packing

def naive_pack(stream, shard_size, val_tokens):
    """[(split, tokens), ...] as pack's docstring defines them, computed on a list; None if train would be empty."""
    boundaries = [i for i, t in enumerate(stream) if t == EOT]
    end = None
    if len(stream) > val_tokens:
        first = (val_tokens - 1) // shard_size * shard_size  # the shard in which val_tokens is reached
        inside = [b for b in boundaries if first <= b <= val_tokens and b > 0]
        after = [b for b in boundaries if b > val_tokens]
        end = inside[-1] if inside else after[0] if after else None
    if end is None:
        return None
    shards = [("val", stream[i:min(i + shard_size, end)]) for i in range(0, end, shard_size)]
    return shards + [("train", stream[i:i + shard_size]) for i in range(end, len(stream), shard_size)]


def cut(stream, cuts):
    """The stream as arrays, cut at the positions cuts (modulo its length)."""
    places = [0, *sorted(c % (len(stream) + 1) for c in cuts), len(stream)]
    return [np.array(stream[a:b], dtype=np.uint16) for a, b in zip(places, places[1:])]


documents = st.lists(st.integers(0, 35).map(lambda n: [EOT, *range(n)]), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(documents, st.integers(1, 45), st.lists(st.integers(0, 400), max_size=6), st.integers(2, 12))
def test_pack_equals_a_naive_packing_for_any_chunks(documents, val_tokens, cuts, shard_size):
    stream = [t for document in documents for t in document]
    expected = naive_pack(stream, shard_size, val_tokens)
    if expected is None:
        with pytest.raises(ValueError, match="--val-tokens"):
            list(fineweb.pack(cut(stream, cuts), shard_size, val_tokens))
        return
    shards = list(fineweb.pack(cut(stream, cuts), shard_size, val_tokens))
    assert [(split, tokens.tolist()) for split, tokens, _ in shards] == expected
    # resumed after any shard, it yields the rest
    for i in range(1, len(shards)):
        done = sum(len(tokens) for _, tokens, _ in shards[:i])
        rest = fineweb.pack(cut(stream[done:], cuts), shard_size, val_tokens, shards[i - 1][2], done)
        assert [(split, tokens.tolist()) for split, tokens, _ in rest] == expected[i:]


def test_pack_matches_its_docstring_example():
    chunk = np.array([EOT, 1, 2, EOT, 3, 4, EOT, 5], dtype=np.uint16)
    shards = [(split, tokens.tolist()) for split, tokens, _ in fineweb.pack([chunk], 5, 5)]
    assert shards == [("val", [EOT, 1, 2]), ("train", [EOT, 3, 4, EOT, 5])]


def test_a_document_that_ends_at_val_tokens_is_in_the_val_split():
    """It went to train, whether or not the val split ends with a shard there."""
    chunk = np.array([EOT, 1, 2, EOT, 3, 4, EOT, 5], dtype=np.uint16)
    for shard_size in (3, 6, 8):
        val = [tokens for split, tokens, _ in fineweb.pack([chunk[:6], chunk[6:]], shard_size, 6) if split == "val"]
        assert np.concatenate(val).tolist() == chunk[:6].tolist()


# -----------------------------------------------------------------------------
# --val first-shard

def lecture_shards(documents, shard_size):
    """[(split, tokens), ...]: the loop of build-nanogpt's fineweb.py.

    There, a document longer than the rest of its shard and the next one is an error of NumPy's; here its middle is a shard.
    """
    shards, all_tokens, token_count = [], np.empty(shard_size, dtype=np.uint16), 0

    def write():
        shards.append(("val" if not shards else "train", all_tokens[:token_count].copy()))
    for tokens in documents:
        while token_count + len(tokens) >= shard_size:
            remainder = shard_size - token_count
            all_tokens[token_count:] = tokens[:remainder]
            token_count = shard_size
            write()
            tokens, token_count = tokens[remainder:], 0
        all_tokens[token_count:token_count + len(tokens)] = tokens
        token_count += len(tokens)
    if token_count:
        write()
    return shards


FIRST_SHARD = ("--val", "first-shard", "--shard-size")


@pytest.mark.parametrize("texts, shard_size", [
    (make_texts(30, seed=11), 1000), (make_texts(30, seed=11), 197),  # documents of several shards
    (["x y z"] * 5, 4), (["x y z"] * 15, 16), (["x y z"] * 15, 18), (["x y z"] * 15, 59)])
def test_first_shard_gives_the_files_of_the_lecture(tmp_path, monkeypatch, texts, shard_size):
    write_parquet(tmp_path / "a.parquet", texts, rows=7)
    documents = [np.array(true_tokens([text]), dtype=np.uint16) for text in texts]
    expected = lecture_shards(documents, shard_size)
    os.makedirs(tmp_path / "lecture")
    for i, (split, tokens) in enumerate(expected):
        np.save(tmp_path / "lecture" / f"edufineweb_{split}_{i:06d}", tokens)
    for workers in (1, 3):
        out = tmp_path / str(workers) / "edufineweb"  # the default dataset's shards have this name in any folder
        run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", out, *FIRST_SHARD, shard_size, "--workers", workers)
        made = contents(out)
        assert json.loads(made.pop("manifest.json"))["val"] == "first-shard"
        assert made == contents(tmp_path / "lecture") and len(made) > 1
        run(monkeypatch, "--verify", out)


def test_a_first_shard_run_that_is_interrupted_after_each_shard_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    flags = ("--input", corpus[0], *FIRST_SHARD, 2500, "--out")
    run(monkeypatch, *flags, tmp_path / "whole" / "o")
    whole = contents(tmp_path / "whole" / "o")
    for _ in whole.keys() - {"manifest.json"}:
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            with contextlib.suppress(OSError):
                run(patch, *flags, tmp_path / "o")
    assert contents(tmp_path / "o") == whole and len(whole) > 4
    with pytest.raises(ValueError, match="val was 'first-shard', is 'documents'"):
        run(monkeypatch, "--input", corpus[0], "--shard-size", 2500, "--out", tmp_path / "o")


def test_a_manifest_without_val_is_of_a_run_with_documents(corpus, tmp_path, monkeypatch):
    """Earlier versions did not record it."""
    flags = ("--input", corpus[0], "--shard-size", 1000, "--val-tokens", 1000, "--out", tmp_path / "o")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        interrupt_after(patch, 2)
        run(patch, *flags)
    manifest = data.load_manifest(tmp_path / "o")
    del manifest["val"]
    fineweb.save_manifest(tmp_path / "o", manifest)
    with pytest.raises(ValueError, match="val was 'documents', is 'first-shard'"):
        run(monkeypatch, "--input", corpus[0], *FIRST_SHARD, 1000, "--out", tmp_path / "o")
    run(monkeypatch, *flags)
    assert sum(read_stream(tmp_path / "o"), []) == true_tokens(corpus[1])


def test_first_shard_of_a_source_of_one_shard_is_an_error(tmp_path, monkeypatch):
    """The lecture then writes a val shard alone, which nothing can be trained on."""
    write_parquet(tmp_path / "a.parquet", ["x y z"] * 10)
    for shard_size in (40, 41):
        with pytest.raises(ValueError, match="all 40 are in the val split, which is the first shard.*smaller --shard-size"):
            run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", tmp_path / "o", *FIRST_SHARD, shard_size)
    assert not (tmp_path / "o").exists()


# -----------------------------------------------------------------------------
# tokens

@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1) | st.sampled_from([" <|endoftext|> ", "<|endoftext|", "|>", "a \n", " b", "\ud800"]),
                min_size=1, max_size=6))
@example(["\ud800 and <|endoftext|>", "b"])  # was skipped as not encodable
def test_encoding_documents_together_equals_tiktoken_one_by_one(texts):
    assert fineweb.encode(texts).tolist() == true_tokens(texts)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab1' \n.\u00a0\u2003é\x1c", max_size=300))
def test_a_text_file_read_in_blocks_has_the_tokens_of_the_file_read_at_once(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", 7)
        parts = [(read()[0][0], begins) for read, begins in sources.txt_pieces(io.BytesIO(text.encode()))]
    tokens = np.concatenate([fineweb.encode([part], begins) for part, begins in parts])
    assert tokens.tolist() == true_tokens([text])
    assert [begins for _, begins in parts] == [True] + [False] * (len(parts) - 1)


def test_an_id_outside_the_vocabulary_is_an_assertion_error(monkeypatch):
    class Tokenizer:
        def encode_to_numpy(self, text, **kwargs):
            return np.array([70000], dtype=np.uint32)
    monkeypatch.setattr(data, "get_tokenizer", Tokenizer)
    for encode in (fineweb.encode, data.encode):
        with pytest.raises(AssertionError, match="70000"):
            encode("a")


# -----------------------------------------------------------------------------
# complete runs on local files

FLAGS = ("--shard-size", 1000, "--val-tokens", 1500)


@pytest.mark.parametrize("format", ["npy", "bin"])
def test_shards_contain_tiktokens_tokens_for_any_number_of_workers(corpus, tmp_path, monkeypatch, format):
    folder, texts = corpus
    for workers in (1, 2, 5):
        os.makedirs(tmp_path / str(workers))
        run(monkeypatch, "--input", folder, "--out", tmp_path / str(workers) / "mine", *FLAGS, "--workers", workers,
            "--format", format)
    assert contents(tmp_path / "1" / "mine") == contents(tmp_path / "2" / "mine") == contents(tmp_path / "5" / "mine")
    val, train = read_stream(tmp_path / "1" / "mine")
    assert val + train == true_tokens(texts)
    assert 0 < len(val) <= 1500 and train[0] == EOT
    names = sorted(os.listdir(tmp_path / "1" / "mine"))
    assert names[1] == f"mine_train_000002.{format}" and names[-1] == f"mine_val_000001.{format}"


def test_all_file_formats_give_the_same_documents(tmp_path, monkeypatch):
    texts = make_texts(40, seed=1)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    folder = tmp_path / "in"
    os.makedirs(folder / "sub")
    write_parquet(folder / "a.parquet", texts, rows=7)
    (folder / "b.jsonl").write_bytes(lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]))
    with pa.CompressedOutputStream(str(folder / "d.jsonl.zst"), "zstd") as f:
        f.write(lines)
    (folder / "e.txt").write_bytes(texts[3].encode() + b"\r\n")
    (folder / "sub" / "f.txt.gz").write_bytes(gzip.compress(texts[4].encode()))
    (folder / "readme.md").write_text("not a supported format")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    run(monkeypatch, "--input", folder, "--out", tmp_path / "out", *FLAGS)
    val, train = read_stream(tmp_path / "out")
    assert val + train == true_tokens(texts * 4 + [texts[3] + "\r\n", texts[4]])


def test_a_large_row_group_is_split_into_pieces(corpus, tmp_path, monkeypatch):
    folder, texts = corpus
    monkeypatch.setattr(sources, "PIECE_BYTES", 10)
    monkeypatch.setattr(sources, "BATCH_ROWS", 3)
    run(monkeypatch, "--input", folder, "--out", tmp_path / "out", *FLAGS)
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts)


def test_empty_and_non_text_documents_are_skipped_and_counted(tmp_path, monkeypatch):
    good = ["says <|endoftext|> in a \ud800 text", "long " * 3000, "b" * 50]
    with open(tmp_path / "a.jsonl", "w") as f:
        for value in [good[0], None, "", 7, good[1], ["x"], good[2]]:
            f.write(json.dumps({"text": value}) + "\n")
        f.write('{"other": 1}\n\n')
    write_parquet(tmp_path / "b.parquet", [None, "", *(text.replace("\ud800", "\ufffd") for text in good), " " * 1_000_000])
    run(monkeypatch, "--input", tmp_path / "a.jsonl", tmp_path / "b.parquet", "--out", tmp_path / "out", "--shard-size", 500,
        "--val-tokens", 100)
    manifest = fineweb.load_manifest(tmp_path / "out")
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(good * 2)
    assert manifest["next"]["skipped"] == 9
    assert sum(shard["documents"] for shard in manifest["shards"]) == 6
    assert max(shard["tokens"] for shard in manifest["shards"]) == 500


def test_max_tokens_may_end_within_a_document(corpus, tmp_path, monkeypatch):
    folder, texts = corpus
    run(monkeypatch, "--input", folder, "--out", tmp_path / "out", *FLAGS, "--max-tokens", 4321)
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts)[:4321]


@pytest.mark.parametrize("flags, message", [
    (("--text-column", "body"), "no column 'body'; it has text, score"),
    (("--text-column", "score"), "'score' of .* holds int64"),
    (("--val-tokens", 10**6), "no tokens are left for the train split"),
])
def test_invalid_input_is_an_error(tmp_path, monkeypatch, flags, message):
    """tests/test_bad_input.py has a hundred more."""
    write_parquet(tmp_path / "a.parquet", ["x y z"] * 10, score=pa.array(range(10)))
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", tmp_path / "out", *flags)


def test_too_little_disk_space_is_an_error_before_any_shard_is_written(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match="0.00 GB of free disk space"):
        run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "out", *FLAGS)
    assert not (tmp_path / "out").exists()


def test_an_unreadable_folder_or_file_is_an_error_before_the_work(tmp_path, monkeypatch):
    """os.walk skips a folder that cannot be listed."""
    for name in ("a/x.txt", "b/y.txt"):
        os.makedirs((tmp_path / name).parent)
        (tmp_path / name).write_text("text")
    scandir, access = os.scandir, os.access

    def denied(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        with pytest.raises(PermissionError, match="b'"):
            sources.local_source([str(tmp_path)])
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("y.txt") and access(path, mode))
    with pytest.raises(ValueError, match="b/y.txt cannot be read: permission denied"):
        sources.local_source([str(tmp_path)])


def test_links_to_folders_are_followed_and_manifests_and_hidden_folders_are_not_text(tmp_path):
    """Linked folders were skipped; the manifest in --out, if that is below --input, made the second run another source."""
    os.makedirs(tmp_path / "elsewhere" / "sub")
    os.makedirs(tmp_path / "in" / "out")
    (tmp_path / "elsewhere" / "sub" / "x.txt").write_text("text")
    (tmp_path / "in" / "out" / "manifest.json").write_text("{}")
    os.makedirs(tmp_path / "in" / ".tokens")
    (tmp_path / "in" / ".tokens" / "y.txt").write_text("hidden")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "link.txt")
    assert sources.local_source([str(tmp_path / "in")]).description == {"files": [["link.txt/sub/x.txt", 4]]}


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, monkeypatch):
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + "a text \ufeff ".encode())
    (tmp_path / "b.jsonl").write_bytes(bom + b'{"text": "b"}\n{"text": "c"}\n')
    run(monkeypatch, "--input", tmp_path / "a.txt", tmp_path / "b.jsonl", "--out", tmp_path / "out", "--val-tokens", 2)
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(["a text \ufeff ", "b", "c"])


@pytest.mark.parametrize("counts", [[None] * 9, [5, None] * 4 + [7], ["5"] * 9, [2.5] * 9, [-7] * 9, [2**61] * 9])
def test_an_unusable_token_count_is_ignored(tmp_path, counts):
    """A column of nulls once refused the file: "cannot convert float NaN to integer"."""
    kind = pa.int64() if None in counts else None
    write_parquet(tmp_path / "a.parquet", ["a text of 21 characters"] * 9, token_count=pa.array(counts, kind))
    source = sources.local_source([str(tmp_path / "a.parquet")])
    assert 0 < sources.estimate_tokens(source, "text") <= sum(source.sizes)


@pytest.mark.parametrize("first", ["damaged", "no rows", "empty texts"])
def test_a_first_file_without_text_does_not_make_the_estimate_zero(tmp_path, monkeypatch, first):
    """The estimate was 0 tokens: the val split was one document, and the check for disk space passed."""
    texts = make_texts(200, seed=12)
    write_parquet(tmp_path / "a.parquet", ["", None] if first == "empty texts" else [])
    write_parquet(tmp_path / "b.parquet", texts)
    if first == "damaged":
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
    flags = ("--input", tmp_path / "a.parquet", tmp_path / "b.parquet", "--out", tmp_path / "out", "--skip-bad-files")
    with monkeypatch.context() as patch:
        patch.setattr(fineweb.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(ValueError, match="0.00 GB of free disk space"):
            run(patch, *flags)
    run(monkeypatch, *flags)
    val, train = read_stream(tmp_path / "out")
    assert val + train == true_tokens(texts) and len(val) > 0.04 * len(train)


def test_a_token_count_that_arrow_cannot_convert_is_ignored(tmp_path):
    """Two columns were a KeyError, and a date outside of Python's range an OverflowError."""
    text = pa.array(["a text of 21 characters"] * 9)
    for columns in ([pa.array(range(9)), pa.array(range(9))], [pa.array([10**18] * 9, pa.timestamp("us"))]):
        names = ["text"] + ["token_count"] * len(columns)
        pq.write_table(pa.Table.from_arrays([text, *columns], names), tmp_path / "a.parquet")
        assert sources.estimate_tokens(sources.local_source([str(tmp_path / "a.parquet")]), "text") > 0


def test_a_column_with_a_dot_is_not_taken_for_a_field_of_a_struct(tmp_path, monkeypatch):
    """The struct's values were read instead: no tokens."""
    texts = make_texts(30)
    table = pa.table({"a": pa.array([{"b": 1}] * 30), "a.b": pa.array(texts)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    run(monkeypatch, "--input", tmp_path / "a.parquet", "--text-column", "a.b", "--out", tmp_path / "out", *FLAGS)
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts)


def test_workers_that_cannot_be_started_are_one_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
    with pytest.raises(ValueError, match="100 threads cannot be started .can't start new thread.; use a smaller --workers"):
        list(sources.map_in_order(str, range(3), 100, 200))


def test_progress_is_printed_without_a_terminal(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fineweb, "REPORT_SECONDS", 0)
    run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "out", *FLAGS)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("out_train_000003.npy: 1,000 tokens")]
    reports = [line for line in lines if " of about " in line]
    assert len(reports) > 1
    for line in reports:
        assert re.fullmatch(r"[\d.]+k? of about [\d.]+k tokens, [\d.]+[kM]tok/s, \d\d:\d\d left", line), line
    assert re.search(r"\n[\d.]+k tokens, [\d.]+[kM]tok/s\n", "\n".join(lines))  # more than the estimate


def damage(folder, texts):
    """Writes a damaged file of each format, and an intact file before and after them."""
    write_parquet(folder / "a.parquet", texts)
    whole = (folder / "a.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[:-100])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines)[:-300])
    (folder / "d.txt").write_bytes(b"not \xff UTF-8")
    (folder / "e.jsonl").write_bytes(lines[:-20])
    middle = bytearray(whole)
    middle[len(whole) // 3:len(whole) // 3 + 50] = bytes(50)
    (folder / "f.parquet").write_bytes(middle)
    write_parquet(folder / "z.parquet", texts)


def test_damaged_files_are_an_error_unless_skip_bad_files_is_given(tmp_path, monkeypatch):
    texts = make_texts(60, seed=2)
    os.makedirs(tmp_path / "in")
    damage(tmp_path / "in", texts)
    with pytest.raises(ValueError, match="b.parquet is damaged or truncated .*--skip-bad-files"):
        run(monkeypatch, "--input", tmp_path / "in", "--out", tmp_path / "out", *FLAGS)
    run(monkeypatch, "--input", tmp_path / "in", "--out", tmp_path / "skip", *FLAGS, "--skip-bad-files")
    manifest = fineweb.load_manifest(tmp_path / "skip")
    assert [bad["name"] for bad in manifest["bad_files"]] == ["b.parquet", "c.jsonl.gz", "d.txt", "e.jsonl", "f.parquet"]
    stream, true = sum(read_stream(tmp_path / "skip"), []), true_tokens(texts)
    assert stream[:len(true)] == true and stream[-len(true):] == true


def test_documents_before_the_damage_are_kept_and_later_ones_skipped(tmp_path, monkeypatch):
    texts = make_texts(60, seed=4)
    write_parquet(tmp_path / "a.parquet", texts)
    write_parquet(tmp_path / "b.parquet", texts)
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[start:start + 30] = bytes(30)
    (tmp_path / "a.parquet").write_bytes(raw)
    run(monkeypatch, "--input", tmp_path / "a.parquet", tmp_path / "b.parquet", "--out", tmp_path / "out", *FLAGS,
        "--skip-bad-files")
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts[:20] + texts)


def test_the_documents_before_a_bad_line_of_the_same_piece_are_kept(tmp_path, monkeypatch):
    """They were dropped. 200,000 brackets are a RecursionError."""
    texts = make_texts(30, seed=13)
    lines = [json.dumps({"text": text}) for text in texts]
    bad = [*lines[:20], "[" * 200_000, *lines[20:]]
    (tmp_path / "a.jsonl").write_text("\n".join(bad))
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    flags = ("--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--skip-bad-files", *FLAGS, "--out")
    run(monkeypatch, *flags, tmp_path / "out")
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts[:20] + texts)
    # a run that is resumed within the damaged piece
    with monkeypatch.context() as patch, pytest.raises(OSError):
        interrupt_after(patch, 1)
        run(patch, *flags, tmp_path / "again" / "out")
    assert data.load_manifest(tmp_path / "again" / "out")["next"]["file"] == 0
    run(monkeypatch, *flags, tmp_path / "again" / "out", "--workers", 1)
    assert contents(tmp_path / "again" / "out") == contents(tmp_path / "out")


def test_the_lines_before_the_end_of_a_truncated_archive_are_kept(tmp_path, monkeypatch):
    """Up to a megabyte of them was dropped."""
    texts = make_texts(60, seed=15)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    archive = gzip.compress(lines)[:-2000]
    kept = zlib.decompressobj(wbits=31).decompress(archive).count(b"\n")
    (tmp_path / "a.jsonl.gz").write_bytes(archive)
    (tmp_path / "b.jsonl").write_bytes(lines)
    run(monkeypatch, "--input", tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl", "--skip-bad-files", *FLAGS, "--out",
        tmp_path / "out")
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts[:kept] + texts) and 20 < kept < 60


def test_the_documents_before_the_damage_in_a_row_group_are_kept(tmp_path, monkeypatch):
    rng = random.Random(14)
    texts = [f"{i} " + rng.randbytes(200).hex() for i in range(64)]
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, data_page_size=4000, compression="snappy")
    write_parquet(tmp_path / "b.parquet", texts)
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    start = raw.index(b"40 ")  # a page after that of the first list of documents
    raw[start - 60:start] = bytes(60)
    (tmp_path / "a.parquet").write_bytes(raw)
    run(monkeypatch, "--input", tmp_path / "a.parquet", tmp_path / "b.parquet", "--skip-bad-files", *FLAGS, "--out",
        tmp_path / "out")
    stream, whole = sum(read_stream(tmp_path / "out"), []), true_tokens(texts)
    kept = stream.count(EOT) - len(texts)
    assert 16 <= kept < len(texts) and kept % 16 == 0
    assert stream == true_tokens(texts[:kept]) + whole


def test_a_folder_of_other_settings_is_not_resumed_and_the_difference_is_printed(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    run(monkeypatch, "--input", folder, "--out", tmp_path / "out", *FLAGS)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="shard_size was 1000, is 999"):
        run(monkeypatch, "--input", folder, "--out", tmp_path / "out", "--shard-size", 999, "--val-tokens", 1500)
    os.remove(folder / "001.parquet")
    with pytest.raises(ValueError, match="files was"):
        run(monkeypatch, "--input", folder, "--out", tmp_path / "out", *FLAGS)
    assert contents(tmp_path / "out") == before


# -----------------------------------------------------------------------------
# nobody else's files are touched

def test_a_failed_start_leaves_nothing_and_a_shard_copied_there_is_kept(corpus, tmp_path, monkeypatch):
    """A failed start once left a manifest, and then a second one deleted every shard that the manifest did not list."""
    with pytest.raises(ValueError, match="no column 'body'"):
        run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "a" / "mine", *FLAGS, "--text-column", "body")
    assert not (tmp_path / "a").exists()
    os.makedirs(tmp_path / "mine")
    data.write_shard(str(tmp_path / "mine" / "mine_train_000001.npy"), np.zeros(5, dtype=np.uint16))
    before = contents(tmp_path / "mine")
    with pytest.raises(ValueError, match="1 shards that no manifest.json lists .mine_train_000001.npy"):
        run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "mine", *FLAGS)
    assert contents(tmp_path / "mine") == before


def interrupt_after(monkeypatch, n):
    """Makes fineweb.add_shard fail after n shards, as a disk that is full does."""
    add_shard, written = fineweb.add_shard, []

    def add_and_fail(*args):
        if len(written) == n:
            raise OSError(28, "No space left on device")
        add_shard(*args)
        written.append(args[2])
    monkeypatch.setattr(fineweb, "add_shard", add_and_fail)


def test_an_interrupted_run_keeps_files_that_are_not_its_own(corpus, tmp_path, monkeypatch):
    flags = ("--input", corpus[0], "--out", tmp_path / "o", *FLAGS)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        interrupt_after(patch, 3)
        run(patch, *flags)
    others = ["o_train_000004.npy.5.tmp", "notes.txt", "x.npy.7.tmp", "o_train_000003.npy.tmp", "o_train_000003.bin.6.tmp"]
    for name in others:
        (tmp_path / "o" / name).write_text("mine")
    for name in ("o_train_000007.npy", "other_val_000000.bin", "train.bin"):
        (tmp_path / "o" / name).write_text("mine")
        before = contents(tmp_path / "o")
        with pytest.raises(ValueError, match=f"o holds 1 shards that no manifest.json lists .{name}, "):
            run(monkeypatch, *flags)
        assert contents(tmp_path / "o") == before
        os.remove(tmp_path / "o" / name)
    # the name of the next shard, with other tokens
    data.write_shard(str(tmp_path / "o" / "o_train_000003.npy"), np.zeros(1000, dtype=np.uint16))
    before = contents(tmp_path / "o")
    with pytest.raises(ValueError, match="o_train_000003.npy exists already and is not the shard to be written there"):
        run(monkeypatch, *flags)
    assert contents(tmp_path / "o") == before
    os.remove(tmp_path / "o" / "o_train_000003.npy")
    os.rename(tmp_path / "o" / "o_val_000001.npy", tmp_path / "away")
    with pytest.raises(ValueError, match="o_val_000001.npy has no tokens, but"):
        run(monkeypatch, *flags)
    os.rename(tmp_path / "away", tmp_path / "o" / "o_val_000001.npy")
    run(monkeypatch, *flags)
    assert all((tmp_path / "o" / name).read_text() == "mine" for name in others)
    assert sum(read_stream(tmp_path / "o"), []) == true_tokens(corpus[1])


def test_a_renamed_folder_resumes_under_the_names_of_its_shards(corpus, tmp_path, monkeypatch):
    """Shards of two names would be read in another order."""
    with monkeypatch.context() as patch, pytest.raises(OSError):
        interrupt_after(patch, 3)
        run(patch, "--input", corpus[0], "--out", tmp_path / "mine", *FLAGS)
    os.rename(tmp_path / "mine", tmp_path / "aaa")
    run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "aaa", *FLAGS)
    assert sum(read_stream(tmp_path / "aaa"), []) == true_tokens(corpus[1])


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(corpus, tmp_path, monkeypatch):
    """Two runs of different --input once mixed their shards, and --verify passed."""
    flags = ("--input", corpus[0], "--out", tmp_path / "o", *FLAGS)
    with fineweb.output_folder(tmp_path / "o") as locked:
        assert locked
        for second in (flags, ("--prepared", "a/b", "--out", tmp_path / "o")):
            with pytest.raises(ValueError, match="o is in use by another fineweb.py"):
                run(monkeypatch, *second)
    assert not (tmp_path / "o").exists()
    run(monkeypatch, *flags)
    assert fineweb.LOCK not in os.listdir(tmp_path / "o")


def test_without_kernel_locks_temporary_files_are_kept(corpus, tmp_path, monkeypatch, capsys):
    """Another process may be writing them."""
    monkeypatch.setattr("fcntl.flock", lambda f, flags: (_ for _ in ()).throw(OSError(37, "No locks available")))
    os.makedirs(tmp_path / "o")
    (tmp_path / "o" / "o_val_000000.npy.123.tmp").write_text("being written")
    run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "o", *FLAGS)
    assert "cannot be locked on this file system" in capsys.readouterr().out
    assert (tmp_path / "o" / "o_val_000000.npy.123.tmp").exists()


def test_a_full_disk_is_an_error_with_the_numbers_of_bytes(tmp_path):
    """NumPy's message was "306111 requested and 241600 written"."""
    for name in ("x_train_000001.npy", "x_train_000002.bin"):
        os.symlink("/dev/full", tmp_path / name)
        with pytest.raises(OSError, match=f"the disk is full: .*{name} needs 600,000 bytes, [0-9,]+ are free; free some"):
            data.write_shard(str(tmp_path / name), np.zeros(300_000, dtype=np.uint16))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            data.write_shard(str(tmp_path / "y_train_000001.npy"), np.zeros(300_000, dtype=np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and not (tmp_path / "y_train_000001.npy").exists()


def test_verify_prints_statistics_and_detects_one_flipped_bit(corpus, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "out", *FLAGS)
    run(monkeypatch, "--verify", tmp_path / "out")
    printed = capsys.readouterr().out
    val, train = read_stream(tmp_path / "out")
    assert f"train: {train.count(EOT):,} documents, {len(train):,} tokens, " in printed
    size = sum(len(text.encode()) for text in corpus[1])
    sizes = [float(x) * (len(t) - t.count(EOT)) for x, t in zip(re.findall(r"([\d.]+) bytes per token", printed), (train, val))]
    assert abs(sum(sizes) - size) < 0.001 * size
    longest = max(len(true_tokens([text])) for text in corpus[1])
    assert f"max {longest:,}\n" in printed
    assert f"mean {len(val + train) / len(corpus[1]):,.0f}," in printed
    path = data.find_shards(tmp_path / "out", "train")[1]
    raw = bytearray(open(path, "rb").read())
    raw[900] ^= 1
    open(path, "wb").write(raw)
    with pytest.raises(ValueError, match="_000003.npy has changed: sha256 was "):
        run(monkeypatch, "--verify", tmp_path / "out")


# -----------------------------------------------------------------------------
# resume

def test_resuming_after_any_shard_is_bitwise_identical_and_rewrites_no_shard(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    damage(folder, make_texts(30, seed=3))
    (folder / "0.jsonl").write_text('{"text": null}\n' * 5 + '{"text": "in the first piece"}\n')
    flags = ("--input", folder, *FLAGS, "--skip-bad-files", "--max-tokens", 30000, "--out")
    run(monkeypatch, *flags, tmp_path / "whole" / "o")
    whole, add_shard, written = contents(tmp_path / "whole" / "o"), fineweb.add_shard, []

    def add_and_fail(*args):
        add_shard(*args)
        written.append(args[2])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(fineweb, "add_shard", add_and_fail)
    for _ in range(100):
        try:
            run(monkeypatch, *flags, tmp_path / "o")
            break
        except OSError:
            # as a process that was killed leaves them
            following = f"o_{fineweb.load_manifest(tmp_path / 'o')['next']['split']}_{len(written):06d}.npy"
            (tmp_path / "o" / f"{following}.123.tmp").write_text("incomplete")
            (tmp_path / "o" / "manifest.json.123.tmp").write_text("incomplete")
            if len(written) % 2 and following in whole:
                shutil.copy(tmp_path / "whole" / "o" / following, tmp_path / "o")
    shards = [name for name in whole if name != "manifest.json"]
    assert contents(tmp_path / "o") == whole and sorted(written) == shards and len(shards) > 10


def test_ctrl_c_exits_with_status_130_and_a_second_run_completes(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", make_texts(1500, seed=5), rows=50)
    args = ["--input", tmp_path / "a.parquet", "--shard-size", 4000, "--val-tokens", 4000, "--out"]
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "fineweb.py"), *map(str, args), str(tmp_path / "out")],
                               stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out").exists() or len(os.listdir(tmp_path / "out")) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error, error
    assert not fineweb.load_manifest(tmp_path / "out")["complete"]
    os.makedirs(tmp_path / "w")
    run(monkeypatch, *args, tmp_path / "out")
    run(monkeypatch, *args, tmp_path / "w" / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "w" / "out")


READ_FOREVER = """
import pyarrow.parquet as pq, runpy, sources, sys
read_row_group = sources.read_row_group
def read_forever(open_file, metadata, i, column):
    if i == 0:
        return (yield from read_row_group(open_file, metadata, i, column))
    print("reading", file=sys.stderr, flush=True)
    while True:
        with open_file() as f:
            for _ in pq.ParquetFile(f, pre_buffer=False).iter_batches(10, use_threads=False):
                pass
sources.read_row_group = read_forever
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def endless(tmp_path):
    """Popen arguments of a run whose worker threads never return, except from the first row group."""
    write_parquet(tmp_path / "a.parquet", make_texts(1500, seed=5), rows=50)
    return [sys.executable, "-c", READ_FOREVER, os.path.join(ROOT, "fineweb.py"), "--input", str(tmp_path / "a.parquet"),
            "--workers", "8", "--out", str(tmp_path / "out")]


@pytest.mark.slow
def test_ctrl_c_exits_at_once_while_threads_are_inside_arrow(endless):
    """Interpreter shutdown would wait for these threads forever; when they were daemon threads, it aborted the process."""
    for _ in range(2):  # the abort happened in two of three runs
        process = subprocess.Popen(endless, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        while "reading" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "interrupted" in error, error


def test_a_run_that_reaches_max_tokens_does_not_wait_for_its_threads(endless, tmp_path):
    done = subprocess.run([*endless, "--max-tokens", "2000", "--val-tokens", "100"], capture_output=True, text=True, cwd=ROOT,
                          timeout=60)
    assert done.returncode == 0 and "2 shards, 2,000 tokens" in done.stdout, done.stderr
    assert fineweb.load_manifest(tmp_path / "out")["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("val", [["--val-tokens", 6000], ["--val", "first-shard"]])
def test_after_twenty_sigkills_the_output_is_bitwise_identical_and_no_shard_was_rewritten(tmp_path, monkeypatch, val):
    write_parquet(tmp_path / "a.parquet", make_texts(6000, seed=6), rows=50)
    flags = ["--input", tmp_path / "a.parquet", "--shard-size", 4000, *val, "--out"]
    os.makedirs(tmp_path / "w")
    start = time.time()
    run(monkeypatch, *flags, tmp_path / "w" / "out")
    whole, wall, kills, rng, mtimes = contents(tmp_path / "w" / "out"), time.time() - start, 0, random.Random(7), {}
    while kills < 20:
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, flags), str(tmp_path / "out")])
        process = multiprocessing.get_context("fork").Process(target=fineweb.main)
        process.start()
        process.join(rng.uniform(0.05, 0.5) * wall)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        manifest = fineweb.load_manifest(tmp_path / "out") if (tmp_path / "out").exists() else None
        for shard in manifest["shards"] if manifest else []:
            mtime = os.stat(tmp_path / "out" / shard["file"]).st_mtime_ns
            assert mtimes.setdefault(shard["file"], mtime) == mtime
        if manifest and manifest["complete"]:
            assert contents(tmp_path / "out") == whole
            shutil.rmtree(tmp_path / "out")
            mtimes = {}
    run(monkeypatch, *flags, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


# -----------------------------------------------------------------------------
# worker threads

@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_works_in_a_process_of_any_start_method(corpus, tmp_path, method, monkeypatch):
    folder, texts = corpus
    monkeypatch.setattr(sys, "argv", ["fineweb.py", "--input", str(folder), "--out", str(tmp_path / "out"), *map(str, FLAGS)])
    process = multiprocessing.get_context(method).Process(target=fineweb.main)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts)


def test_an_exception_in_a_worker_is_raised_and_leaves_no_temporary_file(corpus, tmp_path, monkeypatch):
    class Panic(BaseException):
        """Like a panic in tiktoken's Rust code: not a subclass of Exception."""
    calls, encode = Counter(), fineweb.encode

    def encode_and_panic(*args):
        calls["n"] += 1
        if calls["n"] == 5:
            raise Panic("worker")
        return encode(*args)
    monkeypatch.setattr(fineweb, "encode", encode_and_panic)
    with pytest.raises(Panic, match="worker"):
        run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "out", *FLAGS)
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


def test_map_in_order_keeps_the_order_and_reads_a_bounded_number_of_items_ahead():
    read, rng = [], random.Random(0)
    delays = [rng.random() / 200 for _ in range(60)]

    def items():
        for i in range(60):
            read.append(i)
            yield i

    def work(i):
        time.sleep(delays[i])
        return i * i
    for n, result in enumerate(sources.map_in_order(work, items(), 4, 7)):
        assert result == n * n and len(read) <= n + 8


@pytest.mark.slow
def test_a_hundred_workers_use_less_than_1500_megabytes(tmp_path):
    """Threads share the interpreter, the tokenizer and the buffers; a hundred processes would use 10 GB."""
    write_parquet(tmp_path / "a.parquet", make_texts(1500, seed=8) + ["word " * 200_000] * 10, rows=500)
    args = ["--input", tmp_path / "a.parquet", "--out", tmp_path / "out", "--val-tokens", 1000, "--workers", 100]
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "fineweb.py"), *map(str, args)], stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in family))
        except psutil.Error:
            pass
        time.sleep(0.01)
    assert process.returncode == 0 and 10**8 < peak < 1.5e9, peak


# -----------------------------------------------------------------------------
# the Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""


def git_hash(body):
    """As `git hash-object`: the Hub's identifier of a file that is not in Git LFS."""
    return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


class FakeHub(http.server.ThreadingHTTPServer):
    """Answers like the Hub for one dataset repository; faults: what goes wrong in each download, "" for nothing."""

    def __init__(self, repo, files, faults=()):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.repo, self.files, self.faults = repo, {"README.md": CARD.encode(), **files}, list(faults)
        self.seen, self.times, self.commit = Counter(), [], COMMIT
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def env(self, tmp_path):
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class FakeHubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": self.server.commit, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            paths = json.loads(asked)["paths"]
        except ValueError:
            from urllib.parse import parse_qs
            paths = parse_qs(asked)["paths"]
        self.answer(json.dumps([self.entry(path) for path in paths if path in self.server.files]).encode())

    def entry(self, path):
        return {"type": "file", "path": path, "size": len(self.server.files[path]), "oid": "0" * 40}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0].replace("%2F", "/")
        api, resolve = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/"
        if path.startswith(f"{api}/tree/"):
            folder = "/".join(path.removeprefix(f"{api}/tree/").split("/")[1:])
            entries = [self.entry(name) for name in hub.files if name.startswith(f"{folder}/" if folder else "")]
            folders = {"/".join(e["path"].split("/")[:k]) for e in entries for k in range(1, e["path"].count("/") + 1)}
            entries += [{"type": "directory", "path": f, "size": 0, "oid": "1" * 40} for f in sorted(folders) if f != folder]
            if "recursive=true" not in self.path.lower():
                entries = [e for e in entries if os.path.dirname(e["path"]) == folder]
            return self.answer(json.dumps(entries).encode()) if entries else self.answer(b"", 404, X_Error_Code="EntryNotFound")
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name, "size": len(body), "blobId": git_hash(body)} for name, body in hub.files.items()]
            return self.answer(json.dumps({"id": hub.repo, "sha": hub.commit, "siblings": siblings, "tags": [],
                                           "private": False, "downloads": 0, "likes": 0}).encode())
        if not path.startswith(resolve):
            return self.answer(b"", 404, X_Error_Code="RepoNotFound")
        name = "/".join(path.removeprefix(resolve).split("/")[1:])
        if name not in hub.files:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        self.download(hub, name)

    def download(self, hub, name):
        body, status, headers = hub.files[name], 200, {"ETag": f'"{name}"', "Accept_Ranges": "bytes"}
        if self.command == "GET" and name != "README.md":
            fault = hub.faults.pop(0) if hub.faults else None
            hub.times.append((time.monotonic(), fault))
            hub.seen[fault or name] += 1
            if fault == "429":
                return self.answer(b"slow down", 429, Retry_After=2)
            if fault == "500":
                return self.answer(b"oops", 500)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(body) - 1)
            headers["Content_Range"] = f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"
            body, status = body[start:end + 1], 206
        if self.command == "GET" and name != "README.md" and fault == "cut":
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.answer(body, status, **headers)


def parquet_bytes(tmp_path, texts):
    write_parquet(tmp_path / "x.parquet", texts, token_count=pa.array([len(true_tokens([t])) - 1 for t in texts]))
    return (tmp_path / "x.parquet").read_bytes()


def test_fineweb_edu_is_read_from_the_hub_despite_429_500_and_a_broken_connection(tmp_path):
    texts = make_texts(100)
    files = {f"sample/10BT/{i:03d}_00000.parquet": parquet_bytes(tmp_path, texts[50 * i:50 * i + 50]) for i in range(2)}
    files["data/other.parquet"] = parquet_bytes(tmp_path, ["of another config"])
    hub = FakeHub("HuggingFaceFW/fineweb-edu", files, ["", "", "429", "cut", "", "500"])
    result = command(*FLAGS, "--out", tmp_path / "out", "--workers", 1, **hub.env(tmp_path))
    assert result.returncode == 0, result.stderr
    assert hub.seen["429"] == hub.seen["500"] == hub.seen["cut"] == 1
    refused = next(i for i, (_, fault) in enumerate(hub.times) if fault == "429")
    assert hub.times[refused + 1][0] - hub.times[refused][0] >= 2  # the Retry-After header; the default is 1 s
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts)
    names = sorted(os.listdir(tmp_path / "out"))
    assert names[0] == "edufineweb_train_000002.npy" and "edufineweb_val_000000.npy" in names
    source = fineweb.load_manifest(tmp_path / "out")["source"]
    assert source["commit"] == COMMIT and source["name"] == "sample-10BT" and len(source["files"]) == 2


@pytest.mark.slow
def test_a_resumed_run_reads_the_commit_it_started_with_after_the_branch_has_moved(tmp_path):
    hub = FakeHub("me/texts", {"data/a.parquet": parquet_bytes(tmp_path, make_texts(80))})
    flags = ["--dataset", "me/texts", *FLAGS, "--out", tmp_path / "out"]
    assert command(*flags, **hub.env(tmp_path)).returncode == 0
    before = contents(tmp_path / "out")
    manifest = fineweb.load_manifest(tmp_path / "out")
    fineweb.save_manifest(str(tmp_path / "out"), {**manifest, "complete": False})
    hub.commit = "f" * 40
    again = command(*flags, **hub.env(tmp_path))
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["json", "jsonl.gz"])
def test_json_lines_are_read_from_the_hub(tmp_path, suffix):
    """Uncompressed files once failed: readlines of the Hub's file objects takes no argument."""
    texts = make_texts(40)
    body = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    hub = FakeHub("me/texts", {f"data/a.{suffix}": gzip.compress(body) if suffix.endswith("gz") else body})
    result = command("--dataset", "me/texts", *FLAGS, "--out", tmp_path / "out", **hub.env(tmp_path))
    assert result.returncode == 0, result.stderr
    assert sum(read_stream(tmp_path / "out"), []) == true_tokens(texts)


@pytest.mark.slow
def test_an_unsupported_format_on_the_hub_is_one_error_line(tmp_path):
    hub = FakeHub("me/texts", {"data/a.csv": b"id,text\n1,a document\n"})
    result = command("--dataset", "me/texts", *FLAGS, "--out", tmp_path / "out", **hub.env(tmp_path))
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert re.fullmatch(r"error: me/texts .* unsupported format \(data/a.csv\); supported are .parquet, .jsonl, .jsonl.gz, "
                        r".* convert .* --input\n", result.stderr), result.stderr


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_every_read_of_a_file_on_the_hub_is_retried(name, tmp_path, monkeypatch):
    """Reads of .jsonl, .txt and large row groups were not: once huggingface_hub gave up, the user saw a traceback."""
    import huggingface_hub
    monkeypatch.setattr(sources, "PIECE_BYTES", 0)  # every row group is a large one
    monkeypatch.setattr(sources, "HUB_WAITS", (10,))
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)  # huggingface_hub's too
    body = parquet_bytes(tmp_path, ["ab"]) if name == "a.parquet" else b'{"text": "ab"}\n'
    hub = FakeHub("me/texts", {name: body})
    connect = functools.partial(huggingface_hub.HfFileSystem, endpoint=f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", connect)
    source = sources.Source({}, [f"datasets/me/texts@{COMMIT}/{name}"], [len(body)], sources.open_hub_file)
    for faults, outcome in ((["500"] * 6, [["ab"]]), (["500"] * 99, None)):
        waits.clear()
        hub.faults = faults
        try:
            assert [texts for piece in sources.pieces(source, "text", set()) for texts in piece.read()] == outcome
        except ValueError as e:
            assert outcome is None and not sources.is_damage(e)
            assert re.fullmatch("the request to the Hub failed .*500.* run the same command again later, .*", str(e))
        assert [wait for wait in waits if wait > 8] == [10]


@pytest.mark.parametrize("text, printed", [("no route to host", "no route to host"), ("", "ReadTimeout")])
def test_a_hub_that_stays_unreachable_is_one_error_after_all_retries(monkeypatch, text, printed):
    """httpx raises timeouts with an empty text; the message about the retry once failed on them."""
    from huggingface_hub.errors import HTTPError
    waits, calls = [], Counter()
    monkeypatch.setattr(sources.time, "sleep", waits.append)

    class ReadTimeout(HTTPError):
        """Like httpx's class of this name."""

    def read():
        calls["n"] += 1
        raise ReadTimeout(text)
    with pytest.raises(ValueError, match=f"{printed}.*run the same command again later.*--input"):
        sources.with_retries(read)
    assert waits == list(sources.HUB_WAITS) and calls["n"] == len(waits) + 1


def test_without_a_network_the_first_request_fails_within_a_minute(monkeypatch, capsys):
    """A host name that DNS does not resolve was retried for nine minutes, with two more lines of huggingface_hub's a try."""
    import logging

    from huggingface_hub import HfApi
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    api = HfApi(endpoint="http://no-such-host.invalid")
    for first, expected in ((True, [10, 30]), (False, list(sources.HUB_WAITS))):
        waits.clear()
        with pytest.raises(ValueError, match="the request to the Hub failed"):
            sources.with_retries(lambda: api.dataset_info("a/b"), first)
        assert waits == expected and capsys.readouterr().out.count("retrying in") == len(waits)
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


def test_offline_mode_is_not_retried(monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: pytest.fail("retried"))

    def read():
        raise OfflineModeIsEnabled("offline mode is enabled")
    with pytest.raises(ValueError, match="offline mode is enabled"):
        sources.with_retries(read)


@pytest.mark.slow
def test_a_dataset_that_does_not_exist_is_an_error_with_its_name(tmp_path):
    hub = FakeHub("me/texts", {})
    result = command("--dataset", "me/absent", "--out", tmp_path / "out", **hub.env(tmp_path))
    assert result.returncode == 2 and "me/absent" in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.slow
def test_prepared_shards_are_downloaded_checked_and_resumed(tmp_path, monkeypatch):
    os.makedirs(tmp_path / "made")
    files = {}
    for name in ("fw_val_000000.bin", "fw_train_000001.bin", "fw_train_000002.bin"):
        data.write_shard(str(tmp_path / "made" / name), np.array([EOT, *range(len(files) + 500)], dtype=np.uint16))
        files[name] = (tmp_path / "made" / name).read_bytes()
    hub = FakeHub("kjj0/finewebedu10B-gpt2", files, ["", "cut"])
    flags = ["--prepared", hub.repo, "--out", tmp_path / "out"]
    few = command(*flags, "--max-tokens", 900, **hub.env(tmp_path))
    assert few.returncode == 0 and not (tmp_path / "out" / "fw_train_000002.bin").exists(), few.stderr
    (tmp_path / "out" / "fw_train_000001.bin").write_bytes(files["fw_train_000001.bin"][:-7])  # truncated since
    assert command(*flags, **hub.env(tmp_path)).returncode == 0
    assert hub.seen["cut"] == 1 and hub.seen["fw_val_000000.bin"] == 1
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    run(monkeypatch, "--verify", tmp_path / "out")


class FakeInfo:
    """The files of a dataset on the Hub, in place of HfApi and hf_hub_download."""
    sha = COMMIT

    def __init__(self, files, monkeypatch):
        self.files, self.lfs, self.asked, self.downloaded = files, True, [], []
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def dataset_info(self, repo, revision, files_metadata):
        self.asked.append(revision)
        return self

    @property
    def siblings(self):
        return [SimpleNamespace(rfilename=name, size=len(body), blob_id=git_hash(body),
                                lfs=SimpleNamespace(sha256=hashlib.sha256(body).hexdigest()) if self.lfs else None)
                for name, body in self.files.items()]

    def download(self, repo, name, repo_type, revision, local_dir):
        self.downloaded.append(name)
        with open(os.path.join(local_dir, name), "wb") as f:
            f.write(self.files[name])


def shard_bytes(tmp_path, n, first=EOT):
    data.write_shard(str(tmp_path / "x.bin"), np.array([first, *range(n)], dtype=np.uint16))
    return (tmp_path / "x.bin").read_bytes()


def test_a_download_overwrites_no_file_that_it_did_not_write(tmp_path, monkeypatch):
    """A file of another size was removed, and any manifest.json replaced."""
    names = ("fw_val_000000.bin", "fw_train_000001.bin", "fw_train_000002.bin")
    hub = FakeInfo({name: shard_bytes(tmp_path, 500) for name in names} | {"sub/fw_train_000003.bin": b""}, monkeypatch)
    flags = ("--prepared", "a/b", "--out", tmp_path / "out")

    def refused(message, *more):
        before = contents(tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, *flags, *more)
        assert contents(tmp_path / "out") == before
    os.makedirs(tmp_path / "out")
    for name, message in (("fw_val_000000.bin", "fw_val_000000.bin exists already and is not the shard of a/b"),
                          ("my_train_000001.npy", "1 shards that no manifest.json lists"),
                          ("manifest.json", "not of fineweb.py")):
        (tmp_path / "out" / name).write_text("mine")
        refused(message)
        os.remove(tmp_path / "out" / name)
    (tmp_path / "out" / names[0]).write_bytes(hub.files[names[0]][:-2] + b"\0\0")  # of the right size
    for hub.lfs in (False, True):
        refused("fw_val_000000.bin exists already and is not the shard of a/b")
    (tmp_path / "out" / names[0]).write_bytes(hub.files[names[0]])  # left by a killed process
    run(monkeypatch, *flags, "--max-tokens", 502)
    assert hub.downloaded == ["fw_train_000001.bin"] and hub.asked[-1] == "main"
    refused("was created from {'commit': .*not c/d at main", "--prepared", "c/d")
    refused("not a/b at v2", "--revision", "v2")
    # fewer tokens than before remove nothing from the manifest; the commit is that of the first run
    run(monkeypatch, *flags, "--max-tokens", 2)
    assert len(data.load_manifest(tmp_path / "out")["shards"]) == 2 and hub.asked[-1] == COMMIT
    run(monkeypatch, *flags)
    os.truncate(tmp_path / "out" / names[1], 2000)  # of the manifest, so it may be replaced
    run(monkeypatch, *flags)
    run(monkeypatch, "--verify", tmp_path / "out")
    assert hub.downloaded == ["fw_train_000001.bin", "fw_train_000002.bin", "fw_train_000001.bin"]


def test_a_download_into_a_folder_of_tokenized_text_is_refused(corpus, tmp_path, monkeypatch):
    flags = ("--input", corpus[0], "--out", tmp_path / "fw", *FLAGS, "--format", "bin")
    run(monkeypatch, *flags)
    before = contents(tmp_path / "fw")
    hub = FakeInfo({name: body for name, body in before.items() if name.endswith(".bin")}, monkeypatch)
    with pytest.raises(ValueError, match="fw was created from {'files': .*not a/b at main; choose another --out"):
        run(monkeypatch, "--prepared", "a/b", "--out", tmp_path / "fw")
    assert contents(tmp_path / "fw") == before and hub.asked == []


@pytest.mark.parametrize("lfs", [True, False])
def test_listed_shards_of_another_revision_are_downloaded_again(tmp_path, monkeypatch, lfs):
    """Manifests of earlier versions lack the commit. Files of equal size were kept, with the new commit in the manifest."""
    names = ("fw_val_000000.bin", "fw_train_000001.bin")
    hub = FakeInfo({name: shard_bytes(tmp_path, 500) for name in names}, monkeypatch)
    hub.lfs, flags = lfs, ("--prepared", "a/b", "--out", tmp_path / "out")
    run(monkeypatch, *flags)
    manifest = data.load_manifest(tmp_path / "out")
    del manifest["source"]["commit"]
    fineweb.save_manifest(tmp_path / "out", manifest)
    hub.files[names[1]] = shard_bytes(tmp_path, 500, first=7)
    run(monkeypatch, *flags)
    assert hub.downloaded == [*names, names[1]] and (tmp_path / "out" / names[1]).read_bytes() == hub.files[names[1]]
    run(monkeypatch, "--verify", tmp_path / "out")
    del manifest["source"]["revision"], hub.files[names[1]]
    fineweb.save_manifest(tmp_path / "out", manifest)
    hub.files["fw_train_000002.bin"] = shard_bytes(tmp_path, 500)
    with pytest.raises(ValueError, match="shards that a/b no longer has .fw_train_000001.bin, "):
        run(monkeypatch, *flags)


def test_a_damaged_download_is_an_error(tmp_path, monkeypatch):
    hub = FakeInfo({f"fw_{name}.bin": shard_bytes(tmp_path, 500) for name in ("val_000000", "train_000001")}, monkeypatch)
    download = hub.download

    def damaged(repo, name, repo_type, revision, local_dir):
        download(repo, name, repo_type, revision, local_dir)
        (tmp_path / "out" / name).write_bytes(shard_bytes(tmp_path, 500, first=7))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", damaged)
    with pytest.raises(ValueError, match="fw_val_000000.bin was damaged by the download: .* Delete the file"):
        run(monkeypatch, "--prepared", "a/b", "--out", tmp_path / "out")


@pytest.mark.parametrize("names, missing", [
    (["data/fw_val_000000.bin", "data/fw_train_000001.bin"], "val"), (["fw_val_000000.bin", "a/fw_train_000001.bin"], "train"),
    (["fw_train_000001.bin"], "val"), ([], "val")])
def test_a_dataset_without_both_splits_is_an_error_before_the_download(tmp_path, monkeypatch, names, missing):
    """The folder was complete and could not be trained on."""
    hub = FakeInfo({name: shard_bytes(tmp_path, 500) for name in names}, monkeypatch)
    with pytest.raises(ValueError, match=f"a/b has no {missing} shards .*not in a subfolder"):
        run(monkeypatch, "--prepared", "a/b", "--out", tmp_path / "out")
    assert hub.downloaded == [] and not (tmp_path / "out").exists()


def test_fewer_max_tokens_than_the_val_split_has_download_one_train_shard(tmp_path, monkeypatch):
    """Without it the folder was complete and could not be trained on; nor could one with a shard that the manifest lacks."""
    names = ["fw_val_000000.bin", *(f"fw_train_{i:06d}.bin" for i in (1, 2, 3))]
    hub = FakeInfo({name: shard_bytes(tmp_path, 500) for name in names}, monkeypatch)
    flags = ("--prepared", "a/b", "--out", tmp_path / "out", "--max-tokens", 5)
    run(monkeypatch, *flags)
    assert hub.downloaded == names[:2] and len(data.prepare_data(str(tmp_path / "out"))[0]) == 1
    (tmp_path / "out" / names[2]).write_bytes(hub.files[names[2]])  # of a run without --max-tokens that was killed
    run(monkeypatch, *flags)
    assert hub.downloaded == names[:2] and len(data.prepare_data(str(tmp_path / "out"))[0]) == 2


def test_shards_without_an_end_of_text_token_are_downloaded_and_verified(tmp_path, monkeypatch, capsys):
    """--verify ended with "zero-size array to reduction operation"."""
    names = ("fw_val_000000.bin", "fw_train_000001.bin")
    FakeInfo({name: shard_bytes(tmp_path, 500, first=7) for name in names}, monkeypatch)
    run(monkeypatch, "--prepared", "a/b", "--out", tmp_path / "out")
    run(monkeypatch, "--verify", tmp_path / "out")
    assert "train: 0 documents, 501 tokens" in capsys.readouterr().out


def test_an_interrupted_download_is_incomplete_in_the_manifest(tmp_path, monkeypatch):
    names = ("fw_val_000000.bin", "fw_val_set_train_000001.bin", "x_train_000002.bin")
    hub = FakeInfo({name: shard_bytes(tmp_path, 500) for name in names}, monkeypatch)
    body = hub.files.pop("x_train_000002.bin")
    hub.files["x_train_000002.bin"] = b"damaged"
    with pytest.raises(ValueError, match="x_train_000002.bin has no valid llm.c header"):
        run(monkeypatch, "--prepared", "a/b", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="out is incomplete: fineweb.py is still running or was interrupted"):
        data.prepare_data(str(tmp_path / "out"))
    os.remove(tmp_path / "out" / "x_train_000002.bin")
    hub.files["x_train_000002.bin"], hub.downloaded = body, []
    run(monkeypatch, "--prepared", "a/b", "--out", tmp_path / "out")
    assert hub.downloaded == ["x_train_000002.bin"] and len(data.prepare_data(str(tmp_path / "out"))[0]) == 2


# -----------------------------------------------------------------------------
# real text

@pytest.mark.slow
@pytest.mark.skipif("GPT2_REAL_DATA" not in os.environ, reason="GPT2_REAL_DATA is unset")
def test_shards_of_real_parquet_files_can_be_trained_on(tmp_path):
    source = os.path.join(os.environ["GPT2_REAL_DATA"], "fineweb_edu_like")
    assert command("--input", source, "--out", tmp_path / "real").returncode == 0
    assert command("--verify", tmp_path / "real").returncode == 0
    texts = [text for name in sorted(os.listdir(source)) for text in pq.read_table(f"{source}/{name}")["text"].to_pylist()]
    val, train = read_stream(tmp_path / "real")
    assert val + train == true_tokens(texts)
    result = subprocess.run([sys.executable, os.path.join(ROOT, "train_gpt2.py"), "--data", tmp_path / "real", "--preset",
                             "shakespeare", "--max-steps", "3", "--val-tokens", "1280", "--sample-every", "0", "--log-dir",
                             tmp_path / "log"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
