"""
run/prepare.py: the shards of --data: folders of our shards and of others, and text files, which are
tokenized once and split.

    ./test.sh tests/test_prepare.py

test_bad_input.py has the data that are refused.
"""
import errno
import json
import multiprocessing
import os
import re
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import EOT, TokenStream, get_tokenizer, write_shard
from run import prepare
from run.prepare import prepare_data, split_texts

TOKENS = np.array([50256, 0, 1, 258, 50255], dtype=np.uint16)


def tokens_of(paths):
    stream = TokenStream([str(path) for path in paths])
    return stream.read(0, len(stream)).tolist()


# -----------------------------------------------------------------------------
# folders of shards

def test_nanogpts_bin_without_header_is_read(tmp_path):
    for name in ("train.bin", "val.bin"):
        TOKENS.tofile(tmp_path / name)
    train, val = prepare_data(str(tmp_path))
    assert tokens_of(train) == tokens_of(val) == TOKENS.tolist()


def test_llm_cs_shards_without_a_number_are_read(tmp_path):
    """They were refused, or the text beside them was tokenized with another split."""
    for split, tokens in ("val", TOKENS[:3]), ("train", TOKENS):
        write_shard(str(tmp_path / f"tiny_shakespeare_{split}.bin"), tokens)
    (tmp_path / "tiny_shakespeare.txt").write_text("the text\n" * 50)
    train, val = prepare_data(str(tmp_path))
    assert tokens_of(train) == TOKENS.tolist() and tokens_of(val) == TOKENS[:3].tolist()


OLD_FIELDS = {"bad_files": [{"file": 0, "why": "damaged"}], "skip_bad_files": True}


@pytest.mark.parametrize("more", [{}, OLD_FIELDS], ids=["new", "of earlier versions"])
def test_a_manifest_is_read_with_and_without_the_fields_of_earlier_versions(tmp_path, more):
    entries = []
    for name in ("x_train_000001.npy", "x_val_000000.npy"):
        write_shard(str(tmp_path / name), TOKENS)
        entries.append({"file": name, "split": name.split("_")[1], "tokens": 5, "documents": 1,
                        "sha256": "0" * 64})
    manifest = {"version": 1, "source": {}, "shards": entries, "next": {"skipped": 0},
                "complete": True, **more}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    train, val = prepare_data(str(tmp_path))
    assert [os.path.basename(path) for path in train + val] == [e["file"] for e in entries]


# -----------------------------------------------------------------------------
# text files

PLAY = "".join(f"SPEAKER {i}:\nWhat light?\nIt is the {i}th.\n\n" for i in range(40))


def text_of(paths):
    """The text of a split; it begins with <|endoftext|>."""
    first, *tokens = tokens_of(paths)
    assert first == EOT and EOT not in tokens
    return get_tokenizer().decode(tokens)


def test_a_text_file_becomes_a_train_and_a_val_shard_with_all_of_its_text(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    train, val = (text_of(paths) for paths in prepare_data(str(tmp_path / "play.txt")))
    assert train + val == PLAY and val.startswith("SPEAKER")
    assert 0.85 < len(train) / len(PLAY) <= 0.9


def test_line_ends_and_unicode_are_preserved_and_a_byte_order_mark_is_no_text(tmp_path):
    text = "línea uno\r\nzwei 日本\r\n\r\n" * 30
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    train, val = prepare_data(str(tmp_path / "t.txt"))
    assert text_of(train) + text_of(val) == text


def test_each_text_file_of_a_folder_is_a_document_after_endoftext(tmp_path):
    documents = [f"document {i} " + "word " * 20 for i in range(20)]
    for i, text in enumerate(documents):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    (tmp_path / "notes.md").write_text("not a .txt file")
    train, val = (tokens_of(paths) for paths in prepare_data(str(tmp_path)))
    assert train + val == [token for text in documents for token in (EOT, *data.encode(text))]
    assert train.count(EOT) == 18 and val.count(EOT) == 2


def test_endoftext_ends_a_document_of_a_text_file(tmp_path):
    """TinyStories' layout: stories between <|endoftext|>, which was tokenized as ordinary text."""
    text = "<|endoftext|>\n".join(f"Story {i}.\n" + "word " * 20 for i in range(20))
    (tmp_path / "a.txt").write_text(text + "<|endoftext|>")
    train, val = (tokens_of(paths) for paths in prepare_data(str(tmp_path)))
    assert train + val == [EOT, *get_tokenizer().encode(text, allowed_special="all")]
    assert train.count(EOT) == 18 and val.count(EOT) == 2 and val[0] == EOT


def test_a_text_whose_folder_cannot_be_written_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    """It was "[Errno 30] Read-only file system: '.../.tokens/...'"."""
    (tmp_path / "t.txt").write_text("a line\n" * 20)

    def makedirs(path, exist_ok):
        raise OSError(errno.EROFS, "Read-only file system", path)
    monkeypatch.setattr(os, "makedirs", makedirs)
    message = (f"cannot create {tmp_path}/.tokens for the tokens of {tmp_path}/t.txt (Read-only"
               " file system): copy the text to")
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
    assert again != first and text_of(again[1]).endswith("THE END\n")
    # the same size but another modification time
    os.utime(path, ns=(1, 1))
    assert prepare_data(str(path)) != again


@pytest.mark.parametrize("damage", ["emptied", "without val", "cut", "of zeros"])
def test_damaged_tokens_of_a_text_are_created_again(damage, tmp_path):
    """They were trusted: "too few for one sequence of 1024 and its target; use more text"."""
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    train, val = prepare_data(str(path))
    if damage in ("emptied", "without val"):
        os.remove(val[0])
    if damage == "emptied":
        os.remove(train[0])
    if damage == "cut":
        os.truncate(train[0], 200)
    if damage == "of zeros":  # after a power failure
        size = os.path.getsize(train[0])
        os.truncate(train[0], 0)
        os.truncate(train[0], size)
    assert prepare_data(str(path)) == (train, val)
    assert text_of(train) + text_of(val) == PLAY


def test_two_processes_that_tokenize_a_text_at_the_same_time_use_the_same_files(
        tmp_path, monkeypatch):
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    others = []

    def write_after_another_process(*args):
        monkeypatch.setattr(prepare, "write_shard", write_shard)
        others.extend(prepare_data(str(path)))
        write_shard(*args)
    monkeypatch.setattr(prepare, "write_shard", write_after_another_process)
    train, val = prepare_data(str(path))
    assert others == [train, val] and text_of(train) + text_of(val) == PLAY
    assert len(os.listdir(tmp_path / ".tokens")) == 1


def test_what_a_process_killed_while_tokenizing_has_left_is_completed_and_removed(
        tmp_path, monkeypatch):
    """A folder .tokens/*.tmp stayed for ever."""
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    calls = []

    def kill_at_the_second(f):
        calls.append(f)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", kill_at_the_second)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=prepare_data, args=[str(path)])
        process.start()
        process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert sum(1 for _ in tmp_path.rglob("*.tmp")) == 1
    train, val = prepare_data(str(path))
    assert text_of(train) + text_of(val) == PLAY
    folder, = (tmp_path / ".tokens").iterdir()
    assert sorted(os.listdir(folder)) == ["play_train_000001.npy", "play_val_000000.npy"]


# -----------------------------------------------------------------------------
# split_texts

texts = st.lists(st.text("ab \n", max_size=80), min_size=1, max_size=8)


@given(texts.filter(lambda texts: sum(map(len, texts)) >= 2))
@settings(max_examples=300, deadline=None)
def test_a_split_keeps_all_text_and_val_is_10_to_20_percent(texts):
    train, val = split_texts(texts)
    assert "".join(train + val) == "".join(texts)
    total, in_val = len("".join(texts)), len("".join(val))
    assert total / 10 <= in_val <= total / 5 + 1
    if train + val != texts:  # at most one document is cut in two
        assert len(train + val) == len(texts) + 1 and train[-1] + val[0] in texts


def test_a_split_prefers_document_boundaries_then_blank_lines_then_line_ends():
    assert split_texts(["a line\n" * 10]) == (["a line\n" * 9], ["a line\n"])
    text = "x" * 83 + "\n\n" + "y" * 4 + "\n" + "z" * 10
    assert split_texts([text]) == ([text[:85]], [text[85:]])
    text = text.replace("\n\n", "xx")
    assert split_texts([text]) == ([text[:90]], [text[90:]])
    assert split_texts(["x" * 100]) == (["x" * 90], ["x" * 10])
    assert split_texts(["x" * 85, "y\n" * 7 + "y"]) == (["x" * 85], ["y\n" * 7 + "y"])
    # a blank line just after the middle once put the second half into val, and so did the second
    # of two books
    assert len(split_texts(["a\n" * 55 + "\n" + "b\n" * 45])[1][0]) < 25
    assert split_texts(["a\n" * 50, "b\n" * 50]) == (["a\n" * 50, "b\n" * 40], ["b\n" * 10])
