"""
Bad input to every script: one line that says what is wrong, exit status 2, and nothing written or removed.

    .venv/bin/python -m pytest tests/test_bad_input.py

Each row is a command line, a part of its message, and optionally a function that prepares the folder it runs in. The
scripts run in this process, through the main and run_main of the command line, in a copy of the same folder:

    in.txt         60 kB of text              run/          a run of a tiny model, with one checkpoint
    hella.jsonl    one HellaSwag example      shards/       what fineweb.py made of in.txt
"""
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys

import pytest

import runtime

TIMEOUT = 20      # seconds that a command may take
MEMORY = 2 << 30  # bytes of address space that a command may add
TINY = ["--preset", "shakespeare", "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "16",
        "--total-batch-size", "128", "--batch-size", "8", "--compile", "off", "--sample-every", "0", "--val-tokens", "1024",
        "--optimizer", "adamw", "--dtype", "float32"]
EXAMPLE = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
           "ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap.", "is ripping.", "is one.", "is."]}


def run(script, argv, monkeypatch):
    """Exit status of a script's main with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(SystemExit) as end:
        runtime.run_main(importlib.import_module(script).main)
        sys.exit(0)
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

FINEWEB = [
    (["--input", "in.txt"], "--out is missing"),
    (["--input", "in.txt", "--out", "new", "--shard-size", "1"], "--shard-size 1: must be an integer, 2 or more"),
]


@pytest.mark.parametrize("row", FINEWEB, ids=ids(FINEWEB))
def test_fineweb(row, template, tmp_path, monkeypatch, capfd):
    check("fineweb", row, template, tmp_path, monkeypatch, capfd)


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
