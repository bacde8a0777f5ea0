"""
fineweb.py and sources.py: packing, tokenization, input formats, resume, damaged files, the Hub.

    python -m pytest tests/test_fineweb.py -m "not slow"

Needs no network: texts are created in tmp_path, and the Hub is an HTTP server in this file on
127.0.0.1. The results are compared with tiktoken, one document at a time, and with a naive packing
of Python lists. tests/test_bad_input.py has the errors of flags and inputs.
"""
import base64
import errno
import functools
import gzip
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import data
import fineweb
import sources
from common import ENV, ROOT, python
from data import EOT, get_tokenizer
from run.prepare import load_manifest, prepare_data

WORDS = "the of a model learns tokens, 1984 naïve 北京 \n\n  don't x=1; emoji 🤖 end.".split(" ")
FLAGS = ("--shard-size", 1000, "--val-tokens", 1500)
FIRST_SHARD = ("--val", "first-shard", "--shard-size")


def make_texts(n, seed=0):
    """n documents of very different lengths, from a seed."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice((1, 5, 40, 400)))) or "x" for _ in range(n)]


def write_parquet(path, texts, rows=20, **columns):
    table = pa.table({"text": pa.array(texts, pa.string()), **columns})
    pq.write_table(table, path, row_group_size=rows)


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def true_tokens(texts):
    """The expected tokens in all shards, from tiktoken, one document at a time."""
    return [t for text in texts for t in [EOT, *get_tokenizer().encode_ordinary(text)]]


def read_splits(out):
    """[val tokens, train tokens], read with data.TokenStream."""
    streams = [data.TokenStream(data.find_shards(out, split)) for split in ("val", "train")]
    return [stream.read(0, len(stream)).tolist() for stream in streams]


def read_tokens(out):
    return sum(read_splits(out), [])


def contents(out):
    """{file name: bytes} of all files in a folder, temporary ones too."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def run(monkeypatch, *args):
    """fineweb.main() in this process."""
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, args)])
    fineweb.main()


def interrupt_after(monkeypatch, n):
    """Makes fineweb.add_shard fail after n shards, as on a full disk."""
    add_shard = fineweb.add_shard
    written = []

    def add_and_fail(*args):
        if len(written) == n:
            raise OSError(28, "No space left on device")
        add_shard(*args)
        written.append(args[2])
    monkeypatch.setattr(fineweb, "add_shard", add_and_fail)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Runs in this process do not wait for the disk: of their time, it was most."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def tokenized(tmp_path, monkeypatch):
    """A function: {name of an input file: bytes}, flags -> the tokens in all shards."""
    def tokenize(files, *flags):
        os.makedirs(tmp_path / "in", exist_ok=True)
        for name, body in files.items():
            (tmp_path / "in" / name).write_bytes(body)
        run(monkeypatch, "--input", tmp_path / "in", "--out", tmp_path / "out", *FLAGS, *flags)
        return read_tokens(tmp_path / "out")
    return tokenize


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
    """[(split, tokens), ...] as pack's docstring defines them; None if train would be empty."""
    boundaries = [i for i, t in enumerate(stream) if t == EOT]
    end = None
    if len(stream) > val_tokens:
        first = (val_tokens - 1) // shard_size * shard_size  # the shard that reaches val_tokens
        inside = [b for b in boundaries if first <= b <= val_tokens and b > 0]
        after = [b for b in boundaries if val_tokens < b <= first + shard_size]
        end = (inside[-1:] + after + [val_tokens])[0]  # a long document is cut
    if end is None:
        return None
    val = [("val", stream[i:min(i + shard_size, end)]) for i in range(0, end, shard_size)]
    return val + [("train", stream[i:i + shard_size])
                  for i in range(end, len(stream), shard_size)]


def cut(stream, cuts):
    """The stream as arrays, cut at the positions cuts (modulo its length)."""
    places = [0, *sorted(c % (len(stream) + 1) for c in cuts), len(stream)]
    return [np.array(stream[a:b], dtype=np.uint16) for a, b in zip(places, places[1:])]


documents = st.lists(st.integers(0, 35).map(lambda n: [EOT, *range(n)]), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(documents, st.integers(1, 45), st.lists(st.integers(0, 400), max_size=6), st.integers(2, 12))
@example([[EOT, 1, 2], [EOT, 3, 4], [EOT, 5]], 6, [6], 3)  # documents that end at val_tokens
@example([[EOT, 1, 2], [EOT, 3, 4], [EOT, 5]], 6, [6], 8)  # were in the train split
@example([[EOT, *range(30)]], 7, [9], 12)  # one document was an error
@example([[EOT, 1, 2], [EOT, 3, 4], [EOT, 5]], 5, [], 5)  # of the docstring
@example([[EOT, *range(30)]], 7, [], 100)
def test_pack_equals_a_naive_packing_for_any_chunks(documents, val_tokens, cuts, shard_size):
    stream = sum(documents, [])
    expected = naive_pack(stream, shard_size, val_tokens)
    if expected is None:
        with pytest.raises(ValueError, match="--val-tokens"):
            list(fineweb.pack(cut(stream, cuts), shard_size, val_tokens))
        return
    shards = list(fineweb.pack(cut(stream, cuts), shard_size, val_tokens))
    assert [(split, tokens.tolist()) for split, tokens, _ in shards] == expected
    # resumed after any shard, it yields the rest
    done = 0
    for i, (_, tokens, next_split) in enumerate(shards[:-1], start=1):
        done += len(tokens)
        rest = fineweb.pack(cut(stream[done:], cuts), shard_size, val_tokens, next_split, done)
        assert [(split, tokens.tolist()) for split, tokens, _ in rest] == expected[i:]


def lecture_shards(documents, shard_size):
    """[(split, tokens), ...]: the loop of build-nanogpt's fineweb.py.

    There, a document longer than the rest of its shard and the next one is an error of NumPy's;
    here its middle is a shard.
    """
    shards, all_tokens, token_count = [], np.empty(shard_size, dtype=np.uint16), 0

    def write():
        shards.append(("train" if shards else "val", all_tokens[:token_count].copy()))
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


@pytest.mark.parametrize("texts, shard_size", [
    (make_texts(30, seed=11), 1000), (make_texts(30, seed=11), 197),  # documents of several shards
    (["x y z"] * 5, 4), (["x y z"] * 15, 16), (["x y z"] * 15, 18), (["x y z"] * 15, 59)])
def test_first_shard_gives_the_files_of_the_lecture(tmp_path, monkeypatch, texts, shard_size):
    write_parquet(tmp_path / "a.parquet", texts, rows=7)
    documents = [np.array(true_tokens([text]), dtype=np.uint16) for text in texts]
    os.makedirs(tmp_path / "lecture")
    for i, (split, tokens) in enumerate(lecture_shards(documents, shard_size)):
        np.save(tmp_path / "lecture" / f"edufineweb_{split}_{i:06d}", tokens)
    out = tmp_path / "edufineweb"  # the default dataset's shards have this name in any folder
    run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", out, *FIRST_SHARD, shard_size)
    made = contents(out)
    assert json.loads(made.pop("manifest.json"))["val"] == "first-shard"
    assert made == contents(tmp_path / "lecture") and len(made) > 1


def test_first_shard_of_a_source_of_one_shard_is_an_error(tmp_path, monkeypatch):
    """The lecture then writes a val shard alone, which nothing can be trained on."""
    write_parquet(tmp_path / "a.parquet", ["x y z"] * 10)
    for shard_size in (40, 41):
        with pytest.raises(ValueError, match="all 40 are in the val split.*smaller --shard-size"):
            run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", tmp_path / "o",
                *FIRST_SHARD, shard_size)
    assert not (tmp_path / "o").exists()


# -----------------------------------------------------------------------------
# tokens

ODD = [" <|endoftext|> ", "<|endoftext|", "|>", "a \n", " b", "\ud800"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1) | st.sampled_from(ODD), min_size=1, max_size=6))
@example(["\ud800 and <|endoftext|>", "b"])  # was skipped as not encodable
def test_encoding_documents_together_equals_tiktoken_one_by_one(texts):
    assert fineweb.encode(texts).tolist() == true_tokens(texts)
    assert fineweb.encode(texts, begins=False).tolist() == true_tokens(texts)[1:]


def documents_of(text):
    """The documents of a .txt file: <|endoftext|> stands between them."""
    return [document for document in text.split("<|endoftext|>") if document]


def pieces_of(text, block_bytes=7):
    """txt_pieces of a text, read in blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block_bytes)
        return list(sources.txt_pieces(io.BytesIO(text.encode())))


FRAGMENTS = ["a", "b1", "'s", "'", " ", "  ", "\n", "\r\n", "\t", ".", ",", "。", "，", "\u3000",
             "北京", "です", "、", "「", "！", "한", "é",
             "\u0301", "\u00a0", "\u2003", "\x1c", "\x85", "½", "٣",
             "<|", "<|endoftext|>"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=60).map("".join))
@example("word <|endoftext|>\nword<|endoftext|><|endoftext|>x<|endoftext|>")
def test_a_text_file_read_in_blocks_has_the_tokens_of_the_file_read_at_once(text):
    """Also where no single space between two words is near: after ., before a newline."""
    tokens = [fineweb.encode([text for text in batch if text], begins)
              for batches, begins in pieces_of(text) for batch in batches if any(batch)]
    tokens = np.concatenate([np.empty(0, dtype=np.uint16), *tokens])
    assert tokens.tolist() == true_tokens(documents_of(text))


@pytest.mark.parametrize("line", ["北京的一个句子\n", "一句话，又一句话。", "これは本です。",
                                  "word\n", "ab.cd,",
                                  "12\tab\tc\r\n", "a\n\nb  \n"])
def test_text_without_spaces_between_words_is_read_in_blocks(line):
    """A piece was the whole file: 3 GB of memory for 390 MB of Chinese."""
    text = line * 5000
    lengths = [len(part) for batches, _ in pieces_of(text, 1000) for [part] in batches]
    assert sum(lengths) == len(text) and max(lengths) < 2100


# -----------------------------------------------------------------------------
# complete runs on local files

@pytest.mark.parametrize("format", ["npy", "bin"])
def test_shards_have_tiktokens_tokens_for_any_number_of_workers(corpus, tmp_path, monkeypatch,
                                                                format):
    folder, texts = corpus
    for workers in (1, 2, 5):
        run(monkeypatch, "--input", folder, "--out", tmp_path / str(workers) / "mine", *FLAGS,
            "--workers", workers, "--format", format)
    made = [contents(tmp_path / workers / "mine") for workers in "125"]
    assert made[0] == made[1] == made[2]
    val, train = read_splits(tmp_path / "1" / "mine")
    assert val + train == true_tokens(texts)
    assert 0 < len(val) <= 1500 and train[0] == EOT
    names = list(made[0])
    assert names[1] == f"mine_train_000002.{format}" and names[-1] == f"mine_val_000001.{format}"


def test_all_file_formats_give_the_same_documents(tmp_path, monkeypatch):
    texts = make_texts(40, seed=1)
    lines = json_lines(texts)
    folder = tmp_path / "in"
    os.makedirs(folder / "sub")
    os.makedirs(tmp_path / "elsewhere")
    os.makedirs(folder / ".hidden")
    write_parquet(folder / "a.parquet", texts, rows=7)
    (folder / "b.jsonl").write_bytes(lines.removesuffix(b"\n"))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]))
    with pa.CompressedOutputStream(str(folder / "d.jsonl.zst"), "zstd") as f:
        f.write(lines)
    (folder / "e.txt").write_bytes(texts[3].encode() + b"\r\n")
    (folder / "sub" / "f.txt.gz").write_bytes(gzip.compress(texts[4].encode()))
    # a linked folder is read; hidden ones, an earlier run's manifest and other formats are not
    (tmp_path / "elsewhere" / "g.txt").write_text("text")
    os.symlink(tmp_path / "elsewhere", folder / "z.txt")
    for name in ("readme.md", "manifest.json", ".hidden/y.txt", ".x.txt"):
        (folder / name).write_text("not a text of the corpus")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    run(monkeypatch, "--input", folder, "--out", tmp_path / "out", *FLAGS)
    expected = true_tokens(texts * 4 + [texts[3] + "\r\n", texts[4], "text"])
    assert read_tokens(tmp_path / "out") == expected
    files = load_manifest(tmp_path / "out")["source"]["files"]
    assert files[-2:] == [["sub/f.txt.gz", len(gzip.compress(texts[4].encode()))],
                          ["z.txt/g.txt", 4]]


@pytest.mark.parametrize("piece_bytes", [10, sources.PIECE_BYTES])
def test_large_row_groups_are_split_and_a_dot_in_the_columns_name_is_not_a_struct(
        tmp_path, tokenized, monkeypatch, piece_bytes):
    """The field b of the struct a was read in place of the column a.b: no tokens."""
    texts = make_texts(30)
    table = pa.table({"a": pa.array([{"b": 1}] * 30), "a.b": pa.array(texts)})
    os.makedirs(tmp_path / "in")
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=7)
    monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(sources, "BATCH_ROWS", 3)
    assert tokenized({}, "--text-column", "a.b") == true_tokens(texts)
    source = sources.local_source([str(tmp_path / "in")])
    assert len(list(sources.pieces(source, "a.b"))) == (13 if piece_bytes == 10 else 5)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_and_indented_objects_are_read_in_blocks(tmp_path, tokenized, monkeypatch,
                                                              indent):
    """They were "damaged or truncated"."""
    texts = [*make_texts(60, seed=2), 'a "quoted\\" ],[ text', "long " * 2000]
    rows = [{"id": i, "text": text, "more": [{"text": "no"}]} for i, text in enumerate(texts)]
    array = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    objects = "\n".join(json.dumps(row, indent=2) for row in rows).encode()
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    files = {"a.json": BOM + b" \n" + array + b"\n", "b.json.gz": gzip.compress(array),
             "c.json": b" [ ]", "d.json": BOM + objects, "e.jsonl": objects + b"\n\n"}
    assert tokenized(files) == true_tokens(texts * 4)
    source = sources.local_source([str(tmp_path / "in" / "a.json")])
    assert len(list(sources.pieces(source, "text"))) > 3


def test_folders_of_the_datasets_library_are_read(tmp_path, monkeypatch):
    """Their metadata, such as state.json, was read as text, and .arrow files were not."""
    import datasets
    datasets.disable_progress_bars()
    texts = make_texts(50, seed=3)
    folder = tmp_path / "saved"
    dataset = datasets.Dataset.from_dict({"text": [*texts, None], "n": [1] * 51})
    datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(folder)
    write_parquet(folder / "c.parquet", texts)
    (folder / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    (folder / "a" / "cache-0123.arrow").write_bytes(b"of Dataset.map")
    run(monkeypatch, "--input", folder, "--out", tmp_path / "out", *FLAGS)
    assert read_tokens(tmp_path / "out") == true_tokens(texts * 3)
    assert load_manifest(tmp_path / "out")["next"]["skipped"] == 2


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(),
                                  pa.dictionary(pa.int32(), pa.string())])
def test_only_the_rows_of_invalid_utf8_are_skipped(tmp_path, monkeypatch, capsys, kind):
    """One ended the run, and the good rows of its batch were not read."""
    texts = make_texts(40, seed=4)
    raw = [text.encode() for text in texts]
    raw[5:5] = [b"caf\xe9", None, b"\xff"]
    buffers = pa.array(raw, pa.binary()).buffers()
    array = pa.Array.from_buffers(pa.string(), len(raw), buffers)
    if pa.types.is_dictionary(kind):
        array = array.dictionary_encode()
    elif kind != pa.string():
        array = array.cast(kind)
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", tmp_path / "out", *FLAGS)
    assert read_tokens(tmp_path / "out") == true_tokens(texts)
    assert "; 3 documents were skipped" in capsys.readouterr().out


@pytest.mark.parametrize("shard_size", [1000, 10**6])
def test_one_text_file_of_any_length_is_split_into_val_and_train(tmp_path, tokenized, monkeypatch,
                                                                 shard_size):
    """It was an error that recommended train_gpt2.py, which reads all of a text into memory."""
    text = "\n".join(make_texts(60, seed=5)) * 2
    monkeypatch.setattr(sources, "BLOCK_BYTES", 3000)
    expected = true_tokens([text])
    assert tokenized({"a.txt": text.encode()}, "--shard-size", shard_size) == expected
    assert len(read_splits(tmp_path / "out")[0]) == 1500


def test_endoftext_ends_a_document_of_a_text_file(tmp_path, tokenized, monkeypatch):
    """TinyStories' layout. It was ordinary text: seven tokens."""
    stories = [f"Story {i}.\n\n{text}\n" for i, text in enumerate(make_texts(50, seed=6))]
    text = "<|endoftext|>\n".join(stories)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 3000)
    expected = [EOT, *get_tokenizer().encode(text, allowed_special="all")]
    assert tokenized({"a.txt": text.encode()}) == expected and expected.count(EOT) == 50
    assert read_splits(tmp_path / "out")[1][0] == EOT
    assert sum(s["documents"] for s in load_manifest(tmp_path / "out")["shards"]) == 50


def test_empty_and_non_text_documents_are_skipped_and_counted(tmp_path, monkeypatch):
    good = ["says <|endoftext|> in a \ud800 text", "long " * 3000, "b" * 50]
    values = [good[0], None, "", 7, good[1], ["x"], good[2]]
    (tmp_path / "a.jsonl").write_bytes(json_lines(values) + b'{"other": 1}\n\n')
    text = [text.replace("\ud800", "\ufffd") for text in good]
    write_parquet(tmp_path / "b.parquet", [None, "", *text, " " * 1_000_000])
    run(monkeypatch, "--input", tmp_path / "a.jsonl", tmp_path / "b.parquet",
        "--out", tmp_path / "out", "--shard-size", 500, "--val-tokens", 100)
    manifest = load_manifest(tmp_path / "out")
    assert read_tokens(tmp_path / "out") == true_tokens(good * 2)
    assert manifest["next"]["skipped"] == 9
    assert sum(shard["documents"] for shard in manifest["shards"]) == 6
    assert max(shard["tokens"] for shard in manifest["shards"]) == 500


def test_max_tokens_may_end_within_a_document(tokenized):
    texts = make_texts(30)
    assert tokenized({"a.jsonl": json_lines(texts)}, "--max-tokens", 4321) == \
        true_tokens(texts)[:4321]


def test_a_byte_order_mark_is_not_part_of_the_text(tokenized):
    files = {"a.txt": BOM + "a text \ufeff ".encode(), "b.jsonl": BOM + json_lines(["b", "c"])}
    assert tokenized(files, "--val-tokens", 2) == true_tokens(["a text \ufeff ", "b", "c"])


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    """os.walk skips a folder that cannot be listed."""
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError):
        sources.local_source([str(tmp_path)])


# -----------------------------------------------------------------------------
# the estimated number of tokens

@pytest.mark.parametrize("counts, expected", [
    ([7] * 9, 63), ([None] * 9, None), ([5, None] * 4 + [7], 27), (["5"] * 9, None),
    ([2.5] * 9, None), ([-7] * 9, None), ([700] * 9, None)])
def test_the_estimate_is_that_of_token_count_if_it_can_be_of_gpt2(tmp_path, counts, expected):
    """A column of nulls once refused the file: "cannot convert float NaN to integer"."""
    kind = pa.int64() if None in counts else None
    texts = ["a text of 21 characters"] * 9
    write_parquet(tmp_path / "a.parquet", texts, token_count=pa.array(counts, kind))
    source = sources.local_source([str(tmp_path / "a.parquet")])
    _, [size] = sources.read_footer(source, source.names[0], "text")
    by_size = int(sources.TOKENS_PER_BYTE * size)
    assert sources.estimate_tokens(source, "text") == pytest.approx(expected or by_size, abs=1)


@pytest.mark.parametrize("first", [[], ["", None]], ids=["no rows", "empty texts"])
def test_a_first_file_without_text_does_not_make_the_estimate_zero(tmp_path, monkeypatch, first):
    """The estimate was 0 tokens: the val split was one document, and the disk seemed to suffice."""
    texts = make_texts(200, seed=12)
    write_parquet(tmp_path / "a.parquet", first)
    write_parquet(tmp_path / "b.parquet", texts)
    flags = ("--input", tmp_path / "a.parquet", tmp_path / "b.parquet", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
        with pytest.raises(ValueError, match="0.00 GB of free disk space"):
            run(patch, *flags)
    assert not (tmp_path / "out").exists()
    run(monkeypatch, *flags)
    val, train = read_splits(tmp_path / "out")
    assert val + train == true_tokens(texts) and len(val) > 0.04 * len(train)


# -----------------------------------------------------------------------------
# damaged files, and files of others

def test_after_a_damaged_file_is_replaced_the_run_is_resumed(tmp_path, monkeypatch):
    """The damage is in a page that a worker reads; test_bad_input has the other formats."""
    rng = random.Random(14)
    texts = [f"{i} " + rng.randbytes(200).hex() for i in range(64)]
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=16,
                       compression="snappy", use_dictionary=False, data_page_size=4000)
    whole = (tmp_path / "b.parquet").read_bytes()
    start = whole.index(b"40 ")
    damaged = whole[:start - 60] + bytes(60) + whole[start:]
    (tmp_path / "b.parquet").write_bytes(damaged)
    flags = ("--input", tmp_path / "a.parquet", tmp_path / "b.parquet", *FLAGS,
             "--workers", 1, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="b.parquet is damaged or truncated .*copy it again"):
        run(monkeypatch, *flags)
    assert len(data.find_shards(tmp_path / "out", "train")) > 3
    (tmp_path / "b.parquet").write_bytes(whole)
    run(monkeypatch, *flags)
    assert read_tokens(tmp_path / "out") == true_tokens(texts * 2)


LAST = {
    "z.jsonl": b'{"body": "a"}\n', "z.json": b'[{"body": "a"}]', "z.jsonl.gz": b"",
    "z.txt": "caf\u00e9".encode("latin-1"), "z.parquet": b"PAR1", "z.arrow": b"",
}


@pytest.mark.parametrize("name", LAST)
def test_the_last_file_is_checked_before_the_first_token(corpus, tmp_path, monkeypatch, name):
    """It was found when it was reached, after hours, and other files meant another folder."""
    (corpus[0] / name).write_bytes(LAST[name])
    monkeypatch.setattr(fineweb, "tokenize", lambda piece: pytest.fail("tokenized"))
    with pytest.raises(ValueError, match=f"{name} (has no column 'text'; it has body|is )"):
        run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "out", *FLAGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_an_encrypted_file_is_named_with_the_remedy(tmp_path, monkeypatch, plaintext_footer):
    """It was "damaged or truncated; copy it again"."""
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Client(encryption.KmsClient):
        def __init__(self, config):
            super().__init__()

        def wrap_key(self, key, name):
            return base64.b64encode(key)
    factory = encryption.CryptoFactory(Client)
    config = encryption.EncryptionConfiguration(footer_key="a", column_keys={"b": ["text"]},
                                                plaintext_footer=plaintext_footer)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    table = pa.table({"text": make_texts(30)})
    pq.write_table(table, tmp_path / "a.parquet", encryption_properties=properties)
    with pytest.raises(ValueError, match="a.parquet is encrypted or"):
        run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", tmp_path / "out")


def test_zstd_windows_of_two_gigabytes_are_read(tokenized):
    """Files of `zstd --long=31` were "damaged or truncated; copy it again"."""
    line = json_lines(["a text"])
    # a frame of one block, that says it needs a window of 2 GB: RFC 8878, 3.1.1
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + (len(line) << 3 | 1).to_bytes(3, "little")
    files = {"a.jsonl.zst": frame + line}
    assert tokenized(files, "--val-tokens", 1) == true_tokens(["a text"])


def test_lzo_compression_is_named_with_the_remedy(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": make_texts(30)}), tmp_path / "a.parquet", compression="snappy")
    whole = (tmp_path / "a.parquet").read_bytes()
    # the codec in the footer, a Thrift enumeration before the number of values: 1 is Snappy, 3 LZO
    (tmp_path / "a.parquet").write_bytes(whole.replace(b"\x15\x02\x16", b"\x15\x06\x16"))
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert metadata.row_group(0).column(0).compression == "LZO"
    with pytest.raises(ValueError, match="a.parquet is .* compressed by LZO"):
        run(monkeypatch, "--input", tmp_path / "a.parquet", "--out", tmp_path / "out")


def test_a_disk_error_is_not_called_damage():
    for error in (OSError(errno.EIO, "Input/output error"), ValueError("ours")):
        with pytest.raises(type(error), match=re.escape(str(error))):
            with sources.damage_as_error("a.parquet"):
                raise error


def test_a_folder_of_other_settings_is_not_resumed(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    flags = ("--input", folder, "--out", tmp_path / "out")
    run(monkeypatch, *flags, *FLAGS)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="shard_size was 1000, is 999"):
        run(monkeypatch, *flags, "--shard-size", 999, "--val-tokens", 1500)
    with pytest.raises(ValueError, match="val was 'documents', is 'first-shard'"):
        run(monkeypatch, *flags, *FIRST_SHARD, 1500)
    os.remove(folder / "001.parquet")
    with pytest.raises(ValueError, match="files was"):
        run(monkeypatch, *flags, *FLAGS)
    assert contents(tmp_path / "out") == before


def test_an_interrupted_folder_is_resumed_with_files_of_others_and_another_name(
        corpus, tmp_path, monkeypatch):
    """The manifest is of an earlier version, with two keys more. The folder was renamed: shards
    of two names would be read in another order."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        interrupt_after(patch, 3)
        run(patch, "--input", corpus[0], "--out", tmp_path / "mine", *FLAGS)
    folder = tmp_path / "aaa"
    os.rename(tmp_path / "mine", folder)
    manifest = load_manifest(folder)
    fineweb.save_manifest(folder, {**manifest, "skip_bad_files": False, "bad_files": []})
    others = ["mine_train_000004.npy.5.tmp", "notes.txt", "mine_train_000003.bin.6.tmp"]
    for name in [*others, "mine_train_000007.npy"]:
        (folder / name).write_text("mine")
    before = contents(folder)
    flags = ("--input", corpus[0], "--out", folder, *FLAGS)
    with pytest.raises(ValueError, match="1 shards that no manifest.json lists .mine_train_000007"):
        run(monkeypatch, *flags)
    assert contents(folder) == before
    os.remove(folder / "mine_train_000007.npy")
    run(monkeypatch, *flags)
    assert all((folder / name).read_text() == "mine" for name in others)
    assert read_tokens(folder) == true_tokens(corpus[1]) and load_manifest(folder)["complete"]


# -----------------------------------------------------------------------------
# --verify

def test_verify_prints_the_numbers_of_tokens_and_detects_one_flipped_bit(corpus, tmp_path,
                                                                         monkeypatch, capsys):
    run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "out", *FLAGS)
    run(monkeypatch, "--verify", tmp_path / "out")
    printed = capsys.readouterr().out
    for split, tokens in zip(("val", "train"), read_splits(tmp_path / "out")):
        assert f" documents, {len(tokens):,} tokens" in printed
        assert re.search(rf"^{split}: \d+ shards, {tokens.count(EOT)} documents, ", printed, re.M)
    assert "all counts and hashes match; 0 documents were skipped" in printed
    path = tmp_path / "out" / "out_train_000003.npy"
    raw = bytearray(path.read_bytes())
    raw[900] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="_000003.npy has changed: sha256 was "):
        run(monkeypatch, "--verify", tmp_path / "out")


def test_a_folder_downloaded_from_the_hub_is_verified_and_trained_on(tmp_path, monkeypatch, capsys):
    """As `hf download REPO --repo-type dataset --local-dir DIR` leaves it: without a manifest."""
    folder = tmp_path / "edu_fineweb10B"
    for name in (".gitattributes", "README.md", ".cache/huggingface/.gitignore",
                 ".cache/huggingface/download/edu_fineweb_train_000001.bin.metadata"):
        os.makedirs((folder / name).parent, exist_ok=True)
        (folder / name).write_text("x")
    tokens = np.array([EOT, *range(500)], dtype=np.uint16)
    names = [f"edu_fineweb_{name}.bin" for name in ("val_000000", "train_000001", "train_000002")]
    for name in names:
        data.write_shard(str(folder / name), tokens)
    train, val = prepare_data(str(folder))
    assert [os.path.basename(path) for path in [*val, *train]] == names
    run(monkeypatch, "--verify", folder)
    assert capsys.readouterr().out.startswith("val: 1 shards, 1 documents, 501 tokens\n"
                                              "train: 2 shards, 2 documents, 1,002 tokens\n")
    # what is wrong with one of them is an error that names it
    path = folder / names[2]
    whole = path.read_bytes()
    for damaged, message in ((whole[:-2], "it is truncated or not a shard"),
                             (b"\0" * 8 + whole[8:], "has no valid llm.c header"),
                             (whole[:-2] + (50257).to_bytes(2, "little"), "has the id 50257")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{names[2]} .*{message}"):
            run(monkeypatch, "--verify", folder)


# -----------------------------------------------------------------------------
# resume

@pytest.mark.parametrize("val", [FLAGS, (*FIRST_SHARD, 1000)])
def test_resuming_after_any_shard_is_bitwise_identical_and_rewrites_no_shard(
        tmp_path, monkeypatch, val):
    folder = tmp_path / "in"
    texts = make_texts(20)
    os.makedirs(folder)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    (folder / "0.jsonl").write_bytes(json_lines([None] * 5 + ["in the first piece"]))
    write_parquet(folder / "1.parquet", texts, rows=4)
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(json_lines(texts)))
    (folder / "3.json").write_text(json.dumps([{"text": text} for text in texts]))
    (folder / "4.txt").write_text(" ".join(texts))
    flags = ("--input", folder, *val, "--max-tokens", 10500, "--out")
    run(monkeypatch, *flags, tmp_path / "whole" / "o")
    whole = contents(tmp_path / "whole" / "o")
    add_shard = fineweb.add_shard
    written = []

    def add_and_fail(*args):
        add_shard(*args)
        written.append(args[2])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(fineweb, "add_shard", add_and_fail)
    while len(written) < len(whole) - 1:
        with pytest.raises(OSError, match="No space left"):
            run(monkeypatch, *flags, tmp_path / "o")
        # as a process that was killed leaves them
        split = load_manifest(tmp_path / "o")["next"]["split"]
        following = f"o_{split}_{len(written):06d}.npy"
        if len(written) % 2 and following in whole:
            shutil.copy(tmp_path / "whole" / "o" / following, tmp_path / "o")
    run(monkeypatch, *flags, tmp_path / "o")
    assert contents(tmp_path / "o") == whole
    assert sorted(written) == [name for name in whole if name != "manifest.json"]
    assert len(written) > 10


def test_ctrl_c_exits_with_status_130_and_a_second_run_completes(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", make_texts(1500, seed=5), rows=50)
    args = ["--input", tmp_path / "a.parquet", "--shard-size", 4000, "--val-tokens", 4000, "--out"]
    process = subprocess.Popen([sys.executable, "fineweb.py", *map(str, args), tmp_path / "out"],
                               stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENV)
    first_line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert first_line.startswith("out_val_000000.npy: "), first_line
    assert process.returncode == 130 and "Traceback" not in error, error
    assert not load_manifest(tmp_path / "out")["complete"]
    run(monkeypatch, *args, tmp_path / "out")
    run(monkeypatch, *args, tmp_path / "w" / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "w" / "out")


READ_FOREVER = """
import pyarrow.parquet as pq, runpy, sources, sys
read_row_group = sources.read_row_group
def read_forever(source, name, metadata, i, *rest):
    if i == 0:
        return (yield from read_row_group(source, name, metadata, i, *rest))
    print("reading", file=sys.stderr, flush=True)
    while True:
        with source.open(name) as f:
            for _ in pq.ParquetFile(f, pre_buffer=False).iter_batches(10, use_threads=False):
                pass
sources.read_row_group = read_forever
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def endless(tmp_path):
    """python's arguments of a run whose threads never return, except from the first row group."""
    write_parquet(tmp_path / "a.parquet", make_texts(1500, seed=5), rows=50)
    return ["-c", READ_FOREVER, os.path.join(ROOT, "fineweb.py"), "--workers", "8",
            "--input", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]


@pytest.mark.slow
def test_ctrl_c_exits_at_once_while_threads_are_inside_arrow(endless):
    """Interpreter shutdown would wait for them forever; with daemon threads, it aborted."""
    for _ in range(2):  # the abort happened in two of three runs
        process = subprocess.Popen([sys.executable, *endless], stderr=subprocess.PIPE, text=True,
                                   cwd=ROOT)
        while "reading" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "interrupted" in error, error


def test_a_run_that_reaches_max_tokens_does_not_wait_for_its_threads(endless, tmp_path):
    done = python(*endless, "--max-tokens", "2000", "--val-tokens", "100")
    assert done.returncode == 0 and "2 shards, 2,000 tokens" in done.stdout, done.stderr
    assert load_manifest(tmp_path / "out")["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("val", [["--val-tokens", 6000], ["--val", "first-shard"]])
def test_after_twenty_sigkills_the_output_is_bitwise_identical(tmp_path, monkeypatch, val):
    write_parquet(tmp_path / "a.parquet", make_texts(6000, seed=6), rows=50)
    flags = ["--input", tmp_path / "a.parquet", "--shard-size", 4000, *val, "--out"]
    out = tmp_path / "out"
    start = time.time()
    run(monkeypatch, *flags, tmp_path / "w" / "out")
    wall = time.time() - start
    whole = contents(tmp_path / "w" / "out")
    # a forked process that is killed would keep tqdm's lock, which is shared with this process
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)
    rng = random.Random(7)
    kills = 0
    mtimes = {}
    while kills < 20:
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, flags), str(out)])
        process = multiprocessing.get_context("fork").Process(target=fineweb.main)
        process.start()
        process.join(rng.uniform(0.05, 0.5) * wall)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        manifest = load_manifest(out) if out.exists() else None
        if manifest is None:
            continue
        for shard in manifest["shards"]:  # none is written a second time
            mtime = os.stat(out / shard["file"]).st_mtime_ns
            assert mtimes.setdefault(shard["file"], mtime) == mtime
        if manifest["complete"]:
            (out / ".lock").unlink(missing_ok=True)  # of a process killed just before its end
            assert contents(out) == whole
            shutil.rmtree(out)
            mtimes = {}
    run(monkeypatch, *flags, out)
    assert contents(out) == whole


# -----------------------------------------------------------------------------
# worker threads

def test_an_exception_in_a_worker_is_raised_and_leaves_no_temporary_file(corpus, tmp_path,
                                                                         monkeypatch):
    class Panic(BaseException):
        """Like a panic in tiktoken's Rust code: not a subclass of Exception."""
    encode = fineweb.encode
    calls = []

    def encode_and_panic(*args):
        calls.append(args)
        if len(calls) == 5:
            raise Panic("worker")
        return encode(*args)
    monkeypatch.setattr(fineweb, "encode", encode_and_panic)
    with pytest.raises(Panic, match="worker"):
        run(monkeypatch, "--input", corpus[0], "--out", tmp_path / "out", *FLAGS)
    # the folder itself is removed if no shard was complete
    assert not list(tmp_path.glob("out/*.tmp"))


def test_map_in_order_keeps_the_order_and_reads_a_bounded_number_of_items_ahead():
    rng = random.Random(0)
    delays = [rng.random() / 200 for _ in range(60)]
    read = []

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
    """Threads share the tokenizer and the buffers; a hundred processes would use 10 GB."""
    texts = make_texts(1500, seed=8) + ["word " * 200_000] * 10
    write_parquet(tmp_path / "a.parquet", texts, rows=500)
    process = subprocess.Popen([sys.executable, "fineweb.py", "--input", tmp_path / "a.parquet",
                                "--out", tmp_path / "out", "--val-tokens", "1000",
                                "--workers", "100"], stderr=subprocess.DEVNULL, cwd=ROOT, env=ENV)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0 and 1e5 < usage.ru_maxrss < 1.5e6, usage.ru_maxrss  # kB


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


class FakeHub(http.server.ThreadingHTTPServer):
    """Answers like the Hub for one dataset repository.

    faults: what goes wrong in each download: "429", "500", "cut", or "" for nothing.
    """
    daemon_threads = True

    def __init__(self, repo, files, faults=()):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.repo = repo
        self.files = {"README.md": CARD.encode(), **files}
        self.faults = list(faults)
        self.times = []  # (time, fault) of the downloads
        self.commit = COMMIT
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fineweb(self, tmp_path, *args):
        """The CompletedProcess of fineweb.py with this Hub, into the folder out."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(tmp_path / "hf"),
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return python("fineweb.py", *args, *FLAGS, "--out", tmp_path / "out", env=env)


class FakeHubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body would wait 40 ms for the headers' acknowledgement

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        headers = {"Content-Length": len(body), "X-Repo-Commit": self.server.commit, **headers}
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value):
        self.answer(json.dumps(value).encode())

    def entry(self, path):
        return {"type": "file", "path": path, "size": len(self.server.files[path]), "oid": "0" * 40}

    def do_POST(self):
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = urllib.parse.parse_qs(form)["paths"]
        self.answer_json([self.entry(path) for path in asked if path in self.server.files])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = self.path.split("?")[0].replace("%2F", "/")
        api = f"/api/datasets/{hub.repo}"
        if path.startswith(f"{api}/tree/"):
            folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
            self.answer_tree(folder)
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            self.answer_json({"id": hub.repo, "sha": hub.commit, "siblings": siblings, "tags": [],
                              "private": False, "downloads": 0, "likes": 0})
        elif path.startswith(f"/datasets/{hub.repo}/resolve/"):
            name = path.removeprefix(f"/datasets/{hub.repo}/resolve/").partition("/")[2]
            if name in hub.files:
                self.download(name)
            else:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
        else:
            self.answer(b"", 404, X_Error_Code="RepoNotFound")

    def answer_tree(self, folder):
        start = f"{folder}/" if folder else ""
        entries = [self.entry(name) for name in self.server.files if name.startswith(start)]
        folders = set()
        for entry in entries:
            parts = entry["path"].split("/")
            folders |= {"/".join(parts[:k]) for k in range(1, len(parts))}
        entries += [{"type": "directory", "path": f, "size": 0, "oid": "1" * 40}
                    for f in sorted(folders - {folder})]
        if "recursive=true" not in self.path.lower():
            entries = [e for e in entries if os.path.dirname(e["path"]) == folder]
        if entries:
            self.answer_json(entries)
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    def download(self, name):
        hub = self.server
        body, status = hub.files[name], 200
        headers = {"ETag": f'"{name}"', "Accept_Ranges": "bytes"}
        fault = ""
        if self.command == "GET" and name != "README.md":
            fault = hub.faults.pop(0) if hub.faults else ""
            hub.times.append((time.monotonic(), fault))
        if fault == "429":
            return self.answer(b"slow down", 429, Retry_After=2)
        if fault == "500":
            return self.answer(b"oops", 500)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(body) - 1)
            headers["Content_Range"] = f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"
            body, status = body[start:end + 1], 206
        if fault == "cut":
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.answer(body, status, **headers)


def parquet_bytes(tmp_path, texts):
    counts = pa.array([len(true_tokens([text])) - 1 for text in texts])
    write_parquet(tmp_path / "x.parquet", texts, token_count=counts)
    return (tmp_path / "x.parquet").read_bytes()


def test_fineweb_edu_is_read_from_the_hub_despite_429_500_and_a_broken_connection(tmp_path):
    texts = make_texts(100)
    files = {"sample/10BT/000_00000.parquet": parquet_bytes(tmp_path, texts[:50]),
             "sample/10BT/001_00000.parquet": parquet_bytes(tmp_path, texts[50:]),
             "data/other.parquet": parquet_bytes(tmp_path, ["of another config"])}
    hub = FakeHub("HuggingFaceFW/fineweb-edu", files, ["", "", "429", "cut", "", "500"])
    result = hub.fineweb(tmp_path, "--workers", 1)
    assert result.returncode == 0, result.stderr
    faults = [fault for _, fault in hub.times]
    assert faults[:6] == ["", "", "429", "cut", "", "500"]
    # the Retry-After header; the default is 1 s
    refused = faults.index("429")
    assert hub.times[refused + 1][0] - hub.times[refused][0] >= 2
    assert read_tokens(tmp_path / "out") == true_tokens(texts)
    names = sorted(os.listdir(tmp_path / "out"))
    assert names[0] == "edufineweb_train_000002.npy" and "edufineweb_val_000000.npy" in names
    source = load_manifest(tmp_path / "out")["source"]
    assert source["commit"] == COMMIT and source["name"] == "sample-10BT"
    assert len(source["files"]) == 2


@pytest.mark.slow
def test_a_resumed_run_reads_the_commit_it_started_with_after_the_branch_has_moved(tmp_path):
    hub = FakeHub("me/texts", {"data/a.parquet": parquet_bytes(tmp_path, make_texts(80))})
    assert hub.fineweb(tmp_path, "--dataset", "me/texts").returncode == 0
    before = contents(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    fineweb.save_manifest(str(tmp_path / "out"), {**manifest, "complete": False})
    hub.commit = "f" * 40
    again = hub.fineweb(tmp_path, "--dataset", "me/texts")
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["me/texts"], r"me/texts .* unsupported format.*\(.*data/a.csv\); supported are .parquet"),
    (["me/texts", "--split", "test"], "me/texts None has no split 'test'; it has train"),
    (["me/absent"], ".*me/absent")])
def test_an_error_of_the_hub_is_one_line(tmp_path, flags, message):
    hub = FakeHub("me/texts", {"data/a.csv": b"id,text\n1,a document\n"})
    result = hub.fineweb(tmp_path, "--dataset", *flags)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert re.fullmatch(f"error: {message}.*\n", result.stderr), result.stderr


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_read_of_a_file_on_the_hub_is_retried(name, tmp_path, monkeypatch):
    """Reads of .jsonl, .txt and large row groups were not: the user saw a traceback."""
    import huggingface_hub
    monkeypatch.setattr(sources, "PIECE_BYTES", 0)  # every row group is a large one
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)  # huggingface_hub's too
    body = {"a.jsonl": json_lines(["ab"]), "a.jsonl.gz": gzip.compress(json_lines(["ab"])),
            "a.parquet": parquet_bytes(tmp_path, ["ab"])}[name]
    hub = FakeHub("me/texts", {name: body})
    connect = functools.partial(huggingface_hub.HfFileSystem, endpoint=hub.url)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", connect)
    source = sources.Source({}, [f"datasets/me/texts@{COMMIT}/{name}"], [len(body)],
                            sources.open_hub_file)

    def read():
        waits.clear()
        return [batch for piece in sources.pieces(source, "text") for batch in piece.batches]
    hub.faults = ["500"] * 6
    assert read() == [["ab"]] and [wait for wait in waits if wait > 8] == [10]
    hub.faults = ["500"] * 99
    with pytest.raises(ValueError, match="the request to the Hub failed .*500.* again later, "):
        read()
    assert [wait for wait in waits if wait > 8] == list(sources.HUB_WAITS)


def raise_timeout(text):
    from huggingface_hub.errors import HTTPError

    class ReadTimeout(HTTPError):
        """Like httpx's class of this name."""
    raise ReadTimeout(text)


@pytest.mark.parametrize("answer, printed", [
    (lambda: raise_timeout("no route to host"), "no route"),
    # httpx raises timeouts with an empty text; the message about the retry once failed on them
    (lambda: raise_timeout(""), "ReadTimeout"),
    # a proxy's page was "Expecting value: line 1 column 1 (char 0)", without a second try
    (lambda: json.loads("<html>Sign in</html>"), "its answer is not JSON")])
def test_a_hub_that_stays_unreachable_is_one_error_after_all_retries(monkeypatch, answer, printed):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ValueError, match=f"{printed}.*again later.*--input"):
        sources.with_retries(answer)
    assert waits == list(sources.HUB_WAITS)


def test_without_a_network_the_first_request_fails_within_a_minute(monkeypatch, capsys):
    """It was retried for nine minutes, with two more lines of huggingface_hub's for each retry."""
    import huggingface_hub
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    connect = functools.partial(huggingface_hub.HfApi, endpoint="http://no-such-host.invalid")
    monkeypatch.setattr(huggingface_hub, "HfApi", connect)
    with pytest.raises(ValueError, match="the request to the Hub failed"):
        sources.hub_source("a/b", "default", "train", "main")
    assert [wait for wait in waits if wait > 8] == [10, 30]
    assert capsys.readouterr().err.count("\n") == 2
