"""
Bad input to every script: one line that says what is wrong, exit status 2, and nothing written or removed.

    .venv/bin/python -m pytest tests/test_bad_input.py

Each row is a command line, a part of its message, and optionally a function that prepares the folder it runs in. The
scripts run in this process, through the main and run_main of the command line, in a copy of the same folder:

    in.txt         60 kB of text              run/          a run of a tiny model, with one checkpoint
    hella.jsonl    one HellaSwag example      shards/       what fineweb.py made of in.txt
"""
import atexit
import contextlib
import gzip
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys

import numpy as np
import pytest

import data
import runtime

TIMEOUT = 20      # seconds that a command may take
MEMORY = 2 << 30  # bytes of address space that a command may add
TINY = ["--preset", "shakespeare", "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "16",
        "--total-batch-size", "128", "--batch-size", "8", "--compile", "off", "--sample-every", "0", "--val-tokens", "1024",
        "--optimizer", "adamw", "--dtype", "float32"]
EXAMPLE = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
           "ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap.", "is ripping.", "is one.", "is."]}


def run(script, argv, monkeypatch):
    """Exit status of a script's main with these arguments, in this process; a run folder is unlocked at its end."""
    unlocks, register = [], atexit.register
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    monkeypatch.setattr(atexit, "register", lambda function, *args, **kwargs: (
        unlocks.append(function) if function.__module__ == "checkpoint" else register(function, *args, **kwargs)))
    with pytest.raises(SystemExit) as end:
        runtime.run_main(importlib.import_module(script).main)
        sys.exit(0)
    for unlock in unlocks:
        unlock()
    return end.value.code or 0


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The folder described above."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "in.txt").write_text("To be, or not to be, that is the question.\n\n" * 1400)
    (folder / "hella.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.chdir(folder):
        assert run("train_gpt2", [*TINY, "--data", "in.txt", "--log-dir", ".", "--exp-name", "run", "--max-steps", "2"],
                   monkeypatch) == 0
        os.mkdir("texts")
        for i in range(20):
            shutil.copy("in.txt", f"texts/{i}.txt")
        assert run("fineweb", ["--input", "texts", "--out", "shards", "--shard-size", "100000", "--workers", "1"],
                   monkeypatch) == 0
        shutil.rmtree("texts")
        shutil.rmtree(".tokens")
    return folder


@contextlib.contextmanager
def limits():
    """Context in which more than TIMEOUT seconds raise, and MEMORY more bytes of address space cannot be allocated."""
    def expired(*_):
        raise AssertionError(f"not finished after {TIMEOUT} s")
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    old, old_handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, expired)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    signal.alarm(TIMEOUT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def contents(folder):
    """{path: (size, modification time, link target)} of everything below a folder, hidden files included."""
    return {os.path.relpath(path, folder): (os.lstat(path).st_size, os.lstat(path).st_mtime_ns, os.path.islink(path))
            for parent, folders, files in os.walk(folder) for path in (os.path.join(parent, name) for name in folders + files)}


def check(script, row, template, tmp_path, monkeypatch, capfd):
    argv, message, *prepare = row
    folder = tmp_path / "here"
    shutil.copytree(template, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for function in prepare:
        function(folder)
    before = contents(folder)
    capfd.readouterr()
    with limits():
        status = run(script, argv, monkeypatch)
    err = capfd.readouterr().err
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    after = contents(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # a folder's own entry changes when a temporary file in it is created and removed
    assert not {name for name in changed if not (name in before and (folder / name).is_dir())}, changed


def ids(rows):
    return [" ".join(row[0])[-60:] or "(no arguments)" for row in rows]


# -----------------------------------------------------------------------------
# what a row does to the folder: functions of the folder

def write(name, contents):
    """Writes a file, and the folder it is in."""
    def prepare(folder):
        os.makedirs((folder / name).parent, exist_ok=True)
        (folder / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return prepare


def link(name, target):
    def prepare(folder):
        os.makedirs((folder / name).parent, exist_ok=True)
        os.symlink(target, folder / name)
    return prepare


def fifo(name):
    def prepare(folder):
        os.makedirs((folder / name).parent, exist_ok=True)
        os.mkfifo(folder / name)
    return prepare


def remove(name):
    return lambda folder: os.remove(folder / name)


def write_with(name, change):
    """Replaces the bytes of a file by change(bytes)."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def parquet(name, values, kind=None):
    """Writes a parquet file with one column, text."""
    def prepare(folder):
        import pyarrow as pa
        import pyarrow.parquet
        pyarrow.parquet.write_table(pa.table({"text": pa.array(values, kind)}), folder / name)
    return prepare


def manifest(**changes):
    """Changes fields of shards/manifest.json; a function gets the old value."""
    def change(old):
        old = json.loads(old)
        for key, value in changes.items():
            old[key] = value(old[key]) if callable(value) else value
        return json.dumps(old).encode()
    return write_with("shards/manifest.json", change)


def shard(**changes):
    """Changes fields of the first shard in shards/manifest.json."""
    return manifest(shards=lambda shards: [{**shards[0], **changes}, *shards[1:]])


def npy(header, contents=b""):
    """Bytes of a .npy file with this header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + contents


def llmc(*header):
    """Bytes of a .bin file of llm.c with this header and two tokens."""
    return np.array([*header] + [0] * (256 - len(header)), dtype="<i4").tobytes() + bytes(4)


held = []


def lock_folder(folder):
    """Holds the lock of shards/, as a running fineweb.py does, until the next call."""
    held[:] = [data.lock(folder / "shards" / ".fineweb.lock")]


# -----------------------------------------------------------------------------
# train_gpt2.py

TRAIN = [
    (["--n-layer", "0"], "--n-layer 0: must be an integer, 1 or more"),
    (["--lr", "nan"], "--lr nan: must be a number"),
]


@pytest.mark.parametrize("row", TRAIN, ids=ids(TRAIN))
def test_train_gpt2(row, template, tmp_path, monkeypatch, capfd):
    # the row's own flags come last, so they win
    row = ([*TINY, "--data", "in.txt", *row[0]], *row[1:])
    check("train_gpt2", row, template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# fineweb.py

VAL = "shards/shards_val_000000.npy"
TOKENS = np.arange(5000, dtype=np.uint16)


def saved(array):
    """Bytes of a .npy file."""
    f = io.BytesIO()
    np.save(f, array)
    return f.getvalue()


NEW = ["--out", "new"]
IN = ["--input", "in.txt", *NEW]
AGAIN = ["--input", "in.txt", "--out", "shards"]
JSON = '{"text": "a document"}\n'
FINEWEB = [
    # flags
    (["--input", "in.txt"], "--out is missing"),
    ([*IN, "--shard-size", "1"], "--shard-size 1: must be an integer, 2 or more"),
    ([*IN, "--shard-size", "1e12"], "--shard-size 1e12: must be an integer"),
    ([*IN, "--shard-size", "1000000000000000"], "do not fit into the"),
    ([*IN, "--workers", "20000"], "--workers 20000: must be an integer, 0 or more and at most 1024"),
    ([*IN, "--workers", "-1"], "--workers -1: must be an integer"),
    ([*IN, "--max-tokens", "nan"], "--max-tokens nan: must be an integer"),
    ([*IN, "--max-tokens", str(2**70)], "must be an integer"),
    ([*IN, "--val-tokens", "0"], "--val-tokens 0: must be an integer, 1 or more"),
    ([*IN, "--format", "parquet"], "invalid choice: 'parquet'"),
    ([*IN, "--text_colum", "body"], "unknown flag --text-colum: did you mean --text-column?"),
    ([*IN, "--prepared", "a/b"], "--input and --prepared exclude each other"),
    (["--input", "in.txt", "--out", ""], "--out '': must not be empty"),
    (["--verify", ""], "--verify '': must not be empty"),
    (["--prepared", "", *NEW], "--prepared '': must not be empty"),
    (["--input", "in.txt", "--out", "new\n"], "must not be empty or contain control characters"),
    (["--dataset", "a/b/c", "--name", "x", *NEW], "Repo id"),
    # the output folder
    (["--input", "in.txt", "--out", "in.txt"], "in.txt is not a folder; choose another name"),
    (["--input", "in.txt", "--out", "in.txt/sub/new"], "in.txt is not a folder; choose another name"),
    (["--input", "in.txt", "--out", "/dev/null"], "/dev/null is not a folder"),
    (["--input", "in.txt", "--out", "link"], "link is not a folder", link("link", "nowhere")),
    (["--input", "in.txt", "--out", "loop"], "loop is not a folder", link("loop", "loop")),
    (["--input", "in.txt", "--out", "/proc/new"], "files cannot be created in /proc/new"),
    (["--input", "in.txt", "--out", "x/" + "y" * 300], "(File name too long)"),
    (["--input", "nowhere", "--out", "x/y/z"], "no input at nowhere"),
    (AGAIN, "shards is in use by another fineweb.py", lock_folder),
    (IN, "new holds 1 shards that no manifest.json lists (mine_train_000001.npy", write("new/mine_train_000001.npy", "mine")),
    (["--input", "a.jsonl", *NEW], "new/new_val_000000.npy exists already and is not the shard to be written there",
     write("a.jsonl", 20 * JSON), write("new/new_val_000000.npy", saved(TOKENS))),
    (["--input", "a.jsonl", *NEW], "new/new_val_000000.npy is not a valid .npy file", write("a.jsonl", 20 * JSON),
     write("new/new_val_000000.npy", "mine")),
    (IN, "new/manifest.json is damaged or not of fineweb.py", write("new/manifest.json", '{"files": ["mine"]}')),
    # the manifest of an earlier run
    (AGAIN, "shards was created with other flags or from another source: shard_size was 100000, is 100000000"),
    *((AGAIN, message, write("shards/manifest.json", contents)) for contents, message in [
        ("[]", "a field is missing"), ("null", "a field is missing"), ("", "Expecting value"), ('{"version": 1}', "a field is"),
        ("[" * 100_000, "recursion"), ('{"version": 2}', "its format version is 2, supported is 1"), (b"\xff\xfe", "codec")]),
    (AGAIN, "a field is missing or of another type", manifest(shards={})),
    (AGAIN, "a field is missing or of another type", manifest(complete="true")),
    (AGAIN, "a field is missing or of another type", manifest(source=["in.txt"])),
    (AGAIN, "it lists no shards", manifest(shards=[])),
    (AGAIN, "the shard 7 is invalid", manifest(shards=[7])),
    (AGAIN, "is invalid or listed twice", manifest(shards=lambda shards: shards + shards[:1])),
    *((AGAIN, "is invalid or listed twice", shard(**change)) for change in [
        {"tokens": -5}, {"tokens": 5.0}, {"documents": -1}, {"file": "../in.txt"}, {"file": "sub/x_val_000000.npy"},
        {"file": "/etc/x_val_000000.npy"}, {"file": "a_train_000000.npy"}, {"split": "test"}, {"split": "("},
        {"sha256": None}]),
    (AGAIN, "a field is missing or of another type", manifest(next={})),
    (AGAIN, "a field is missing or of another type", manifest(next={"skipped": -1})),
    (AGAIN, "shards/manifest.json is not a regular file", remove("shards/manifest.json"), fifo("shards/manifest.json")),
    # --verify
    (["--verify", "nowhere"], "no manifest.json in nowhere"),
    (["--verify", "in.txt"], "no manifest.json in in.txt"),
    (["--verify", "shards"], "shards is incomplete", manifest(complete=False)),
    (["--verify", "shards"], "shards holds 1 shards that no manifest.json lists (other_train_000001.npy, ...)",
     write("shards/other_train_000001.npy", "")),
    (["--verify", "shards"], "shards_val_000000.npy has changed: sha256 was", shard(sha256="0" * 64)),
    (["--verify", "shards"], "shards_val_000000.npy has no tokens, but", remove(VAL)),
    (["--verify", "shards"], "it is truncated", write_with(VAL, lambda old: old + b"x")),
    (["--verify", "shards"], "tokens, but 5 in manifest.json", shard(tokens=5)),
    (["--verify", "shards"], "has the id 65535", write_with(VAL, lambda old: old[:-2] + b"\xff\xff")),
    # the input
    (["--input", "nowhere", *NEW], "no input at nowhere"),
    (["--input", "", *NEW], "no input at "),
    (["--input", "in.txt", "./in.txt", *NEW], "--input ./in.txt is given twice"),
    (["--input", "texts", "texts/a.txt", *NEW], "--input texts/a.txt is given twice", write("texts/a.txt", "text")),
    (["--input", "texts", *NEW], "is a link to", write("texts/a.txt", "text"), link("texts/sub/up", "..")),
    (["--input", "texts", *NEW], "--input texts: no file of a supported format", write("texts/a.csv", "text")),
    (["--input", "texts.txt", *NEW], "--input texts.txt: no file of a supported format", write("texts.txt/a.csv", "text")),
    (["--input", "shards", *NEW], "--input shards: no file of a supported format"),
    (["--input", "/dev/zero", *NEW], "--input /dev/zero: no file of a supported format"),
    (["--input", "-", *NEW], "no input at -"),
    (["--input", "x.txt", *NEW], "--input x.txt is not a regular file", fifo("x.txt")),
    (["--input", "x.jsonl", *NEW], "--input x.jsonl is not a regular file", link("x.jsonl", "/dev/zero")),
    (["--input", "texts", *NEW], "--input texts/b.txt is not a regular file", write("texts/a.txt", "a"), fifo("texts/b.txt")),
    (["--input", "texts", *NEW], "--input texts/b.txt is not a regular file, or a broken", link("texts/b.txt", "nowhere")),
    (["--input", "a.txt", *NEW], "the source contains no text", write("a.txt", "")),
    (["--input", "a.txt", *NEW], "the source contains no text", write("a.txt", b"\xef\xbb\xbf")),
    (["--input", "a.txt", *NEW], "a.txt is damaged or truncated ('utf-8'", write("a.txt", "text".encode("utf-16"))),
    *((["--input", "a.jsonl", *NEW], message, write("a.jsonl", contents)) for contents, message in [
        (JSON + "[1, 2]\n", "line 2 is not a JSON object"), (JSON + '"text"\n', "line 2 is not a JSON object"),
        (JSON + '{"text": "cut', "line 2 is not a JSON object"), (JSON + "[" * 100_000, "line 2 is not a JSON object"),
        (JSON + '{"text":' * 100_000, "recursion"), ('[\n  {"text": "a"}\n]\n', "each line must be one"),
        ("plain text\n", "line 1 is not a JSON object"), ('{"body": "a"}\n', "has no field 'text'; it has body"),
        ('{"text": null}\n{"text": ["a"]}\n{"text": {"text": "a"}}\n\n', "the source contains no text"),
        (JSON + b"\0".decode() * 5000, "line 2 is not"), (JSON + "1" * 5000, "line 2 is not a JSON object (Exceeds")]),
    (["--input", "a.jsonl", *NEW, "--text-column", "body"], "has no field 'body'; it has text", write("a.jsonl", JSON)),
    (["--input", "a.jsonl.gz", *NEW], "a.jsonl.gz is damaged or truncated (", write("a.jsonl.gz", "not gzip")),
    (["--input", "a.txt.gz", *NEW], "Truncated compressed stream", write("a.txt.gz", gzip.compress(b"text " * 99)[:-9])),
    (["--input", "a.jsonl.zst", *NEW], "a.jsonl.zst is damaged or truncated (", write("a.jsonl.zst", b"\x28\xb5\x2f\xfdx")),
    (["--input", "a.parquet", *NEW], "a.parquet is damaged or truncated (", write("a.parquet", "")),
    (["--input", "a.parquet", *NEW], "a.parquet is damaged or truncated (", write("a.parquet", b"PAR1" + bytes(50) + b"PAR1")),
    (["--input", "a.parquet", *NEW], "is damaged or truncated", parquet("a.parquet", ["a"]),
     write_with("a.parquet", lambda old: old[:-20])),
    (["--input", "a.parquet", *NEW], "column 'text' of a.parquet holds list<", parquet("a.parquet", [["a"], ["b"]])),
    (["--input", "a.parquet", *NEW], "column 'text' of a.parquet holds struct<", parquet("a.parquet", [{"text": "a"}])),
    (["--input", "a.parquet", *NEW], "column 'text' of a.parquet holds int64", parquet("a.parquet", [1, 2])),
    (["--input", "a.parquet", *NEW, "--text-column", "body"], "no column 'body'; it has text", parquet("a.parquet", ["a"])),
    (["--input", "a.parquet", *NEW], "the source contains no text", parquet("a.parquet", [None, ""], "string")),
    (["--input", "a.parquet", *NEW], "the source contains no text", parquet("a.parquet", [], "string")),
]


@pytest.mark.parametrize("row", FINEWEB, ids=ids(FINEWEB))
def test_fineweb(row, template, tmp_path, monkeypatch, capfd):
    check("fineweb", row, template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# train_gpt2.py --data

UNLISTED = remove("shards/manifest.json")  # shards without a manifest, as build-nanogpt's
BIN = write("bin/x_val_000000.bin", llmc(20240520, 1, 2))
DATA = [
    (["nowhere"], "no data at nowhere"),
    ([""], "no data at "),
    # text
    (["a.txt"], "a.txt is empty: there is nothing to train on", write("a.txt", "")),
    (["a.txt"], "a.txt is empty", write("a.txt", b"\xef\xbb\xbf")),
    (["a.txt"], "a.txt is not UTF-8 text: byte 3", write("a.txt", "caf\u00e9".encode("latin-1"))),
    (["a.txt"], "a.txt is not UTF-8 text", write("a.txt", "text".encode("utf-16"))),
    (["a.txt"], "consecutive blanks", write("a.txt", "a b" + " " * 2_000_000)),
    (["a.txt"], "do not fit into memory", write("a.txt", ""), lambda folder: os.truncate(folder / "a.txt", 1 << 40)),
    (["a.txt"], "a.txt is not a regular file", fifo("a.txt")),
    (["/dev/zero"], "/dev/zero is not a regular file"),
    (["/dev/stdin"], "/dev/stdin is not a regular file", lambda folder: None),
    (["texts"], "texts/b.txt is not a regular file", write("texts/a.txt", "text"), fifo("texts/b.txt")),
    (["texts"], "texts/b.txt is not a regular file", write("texts/a.txt", "text"), write("texts/b.txt/c.txt", "text")),
    (["texts"], "texts holds neither shards", write("texts/a.md", "text")),
    *(([name], f"{name} is not plain text; create shards with python fineweb.py --input", write(name, JSON))
      for name in ("a.jsonl", "a.json", "a.JSON", "a.parquet", "a.txt.gz", "a.jsonl.zst", "a.csv")),
    ([VAL], f"{VAL} is a single shard; --data takes the folder"),
    # folders of shards
    (["shards"], "shards is incomplete: fineweb.py is still running or was interrupted", manifest(complete=False)),
    (["shards"], "holds 1 shards that no manifest.json lists (x_train_000009.bin", write("shards/x_train_000009.bin", "")),
    (["shards"], "has no tokens, but", remove(VAL)),
    (["shards"], "it was removed or replaced", write(VAL, saved(TOKENS))),
    (["shards"], "shards/manifest.json is damaged", write("shards/manifest.json", "[]")),
    (["shards"], "supported is 1", manifest(version=3)),
    (["shards"], "is invalid or listed twice", shard(file="../../etc/x_val_000000.npy")),
    (["shards"], "shards has no shard named *_val_NNNNNN", UNLISTED, remove(VAL)),
    (["new"], "new has no shard named *_train_NNNNNN", write("new/x_val_000000.npy", saved(TOKENS))),
    (["char"], "char holds nanoGPT's character-level data (meta.pkl)", write("char/train.bin", bytes(9000)),
     write("char/val.bin", bytes(9000)), write("char/meta.pkl", b"cos\nsystem\n(S'touch owned'\ntR.")),
    # headers
    *((["shards"], message, UNLISTED, write(VAL, contents)) for contents, message in [
        (b"", "is not a valid .npy file"), (b"text", "is not a valid .npy file"), (npy(""), "is not a valid .npy file"),
        (npy("{'descr': '<u2', 'shape': (("), "is not a valid .npy file"), (npy("(" * 9000), "is not a valid .npy file"),
        (npy("-" * 9000 + "1"), "is not a valid .npy file"),
        (npy("{'descr': ('<u2',), 'fortran_order': False, 'shape': (0,)}"), "is not a valid .npy file"),
        (npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}"), "should hold -1 tokens"),
        (npy("{'descr': '<u2', 'fortran_order': False, 'shape': (1152921504606846976,)}", bytes(64)),
         "should hold 1,152,921,504,606,846,976 tokens"),
        (npy("{'descr': '<u2', 'fortran_order': True, 'shape': (4, 8)}", bytes(64)), "holds uint16 of shape (4, 8)"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "is not a valid .npy file"), (b"\x93NUMPY\x09\x00..", "valid .npy file"),
        (saved(TOKENS.astype(">u2")), "holds >u2 of shape (5000,)"), (saved(TOKENS.reshape(2, -1)), "shape (2, 2500)"),
        (saved(np.array([os.system], dtype=object)), "holds object of shape (1,)"), (saved(TOKENS)[:-1], "it is truncated"),
        (saved(TOKENS[:0]), "the val split of shards has 0 tokens")]),
    (["shards"], "has the id 56024 among its tokens", UNLISTED,
     lambda folder: [path.unlink() for path in (folder / "shards").glob("*_train_*")],
     write("shards/x_train_000001.npy", saved(TOKENS + 55001))),
    *((["bin"], message, BIN, write("bin/x_train_000001.bin", contents)) for contents, message in [
        (llmc(20240520, 1, 2**31 - 1), "should hold 2,147,483,647 tokens"), (llmc(20240520, 1, -1), "should hold -1 tokens"),
        (llmc(20240520, 2, 2), "has no valid llm.c header"), (llmc(20240521, 1, 2), "has no valid llm.c header"),
        (b"short", "has no valid llm.c header")]),
    (["bin"], "x_val_000000.bin is not a regular file", fifo("bin/x_val_000000.bin"),
     write("bin/x_train_000001.bin", llmc(20240520, 1, 2))),
]


@pytest.mark.parametrize("row", DATA, ids=ids(DATA))
def test_data_of_train_gpt2(row, template, tmp_path, monkeypatch, capfd):
    check("train_gpt2", ([*TINY, "--data", *row[0]], *row[1:]), template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# hellaswag.py

HELLASWAG = [
    (["run", "--data", "hella.jsonl", "--limit", "0"], "--limit 0: must be an integer, 1 or more"),
    (["run", "--data", "in.txt"], "in.txt, line 1 is not a HellaSwag example"),
]


@pytest.mark.parametrize("row", HELLASWAG, ids=ids(HELLASWAG))
def test_hellaswag(row, template, tmp_path, monkeypatch, capfd):
    check("hellaswag", row, template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# sample.py

SAMPLE = [
    (["nowhere"], "no checkpoint at nowhere"),
    (["run", "--top-p", "0"], "--top-p 0: must be a number, above 0 and at most 1"),
]


@pytest.mark.parametrize("row", SAMPLE, ids=ids(SAMPLE))
def test_sample(row, template, tmp_path, monkeypatch, capfd):
    check("sample", row, template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# convert.py

CONVERT = [
    (["info", "in.txt"], "cannot load in.txt"),
    (["convert", "run", "in.txt"], "in.txt exists already"),
]


@pytest.mark.parametrize("row", CONVERT, ids=ids(CONVERT))
def test_convert(row, template, tmp_path, monkeypatch, capfd):
    check("convert", row, template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# plots.py

PLOTS = [
    (["shards"], "shards has no log.txt"),
]


@pytest.mark.parametrize("row", PLOTS, ids=ids(PLOTS))
def test_plots(row, template, tmp_path, monkeypatch, capfd):
    check("plots", row, template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# python -m bench

BENCH = [
    (["train", "--steps", "0"], "--steps 0: must be an integer, 1 or more"),
]


@pytest.mark.parametrize("row", BENCH, ids=ids(BENCH))
def test_bench(row, template, tmp_path, monkeypatch, capfd):
    check("bench.__main__", row, template, tmp_path, monkeypatch, capfd)
