"""
Bad input to every script: one line that says what is wrong, exit status 2, and nothing written or removed.

    .venv/bin/python -m pytest tests/test_bad_input.py

Each row is a command line, a part of its message, and optionally a function that prepares the folder it runs in. The
scripts run in this process, through the main and run_main of the command line, in a copy of the same folder:

    in.txt         60 kB of text              run/          a run of a tiny model, with one checkpoint
    hella.jsonl    one HellaSwag example      shards/       what fineweb.py made of in.txt
"""
import contextlib
import gzip
import importlib
import json
import os
import resource
import shutil
import signal
import sys

import pytest
import torch

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

def damaged(kind):
    """A function that writes KIND.pt, a damaged copy of the run's model file, into the folder it is given."""
    def save(folder):
        contents = torch.load(folder / "run" / "model_00002.pt")
        weights, config = contents["model"], contents["config"]
        if kind in ("nan", "inf"):
            weights["transformer.ln_f.weight"][3] = float(kind)
        elif kind == "char":  # as nanoGPT's character-level models
            config["vocab_size"] = 65
            for name in ("transformer.wte.weight", "lm_head.weight"):
                weights[name] = weights[name][:65].clone()
        elif kind == "short":
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:3].clone()
        elif kind == "lacks":
            del weights["transformer.ln_f.bias"]
        torch.save(contents, folder / f"{kind}.pt")
    return save


def write(name, contents):
    """A function that writes a file into the folder it is given."""
    contents = contents.encode() if isinstance(contents, str) else contents
    return lambda folder: (folder / name).write_bytes(contents)


def fifo(folder):
    os.mkfifo(folder / "fifo")


def hella(contents, message, name="bad.jsonl"):
    """The row of a file of examples."""
    return ["run", "--data", name], message, write(name, contents)


def changed(**changes):
    """A line with a changed example: a value of None removes the field, null sets it to None."""
    return json.dumps({name: None if value == "null" else value for name, value in {**EXAMPLE, **changes}.items()
                       if value is not None}) + "\n"


LINE = json.dumps(EXAMPLE).encode() + b"\n"
GZIP = gzip.compress(LINE * 200, mtime=0)
HELLASWAG = [
    # flags
    (["run", "--data", "hella.jsonl", "--limit", "0"], "--limit 0: must be an integer, 1 or more"),
    (["run", "--data", "hella.jsonl", "--limit", "1e3"], "--limit 1e3: must be an integer, 1 or more"),
    (["run", "--data", "hella.jsonl", "--show", "-1"], "--show -1: must be an integer, 0 or more"),
    (["run", "--data", "hella.jsonl", "--batch-tokens", "0"], "--batch-tokens 0: must be an integer, 1 or more"),
    (["run", "--data", "hella.jsonl", "--batch_tokens", str(2**63)], "--batch-tokens 9223372036854775808: must be an integer"),
    (["run", "--data", "hella.jsonl", "--dtype", "int8"], "unknown dtype 'int8'"),
    (["run", "--data", "hella.jsonl", "--device", "tpu"], "device 'tpu' is not available"),
    (["run", "--data", "hella.jsonl", "--jsn"], "unknown flag --jsn: did you mean --json?"),
    (["run", "hella.jsonl"], "unrecognized arguments: hella.jsonl"),
    (["--data", "hella.jsonl"], "name a model to score: python hellaswag.py MODEL --data FILE"),
    (["--out", "scores.jsonl"], "name a model to score"),
    # --out
    (["run", "--data", "hella.jsonl", "--out", ""], "the empty name"),
    (["run", "--data", "hella.jsonl", "--out", "run"], "'run' is not the name of a file to write"),
    (["run", "--data", "hella.jsonl", "--out", "new/scores.jsonl"], "new is not an existing folder"),
    (["run", "--data", "hella.jsonl", "--out", "in.txt/scores.jsonl"], "in.txt is not an existing folder"),
    (["run", "--data", "hella.jsonl", "--out", "link"], "new is not an existing folder",
     lambda folder: os.symlink("new/scores.jsonl", folder / "link")),
    (["run", "--data", "hella.jsonl", "--out", "hella.jsonl"], "would replace a file that is read"),
    (["run", "--data", "hella.jsonl", "--out", "link"], "would replace a file that is read",
     lambda folder: os.symlink("hella.jsonl", folder / "link")),
    (["run/model_00002.pt", "--data", "hella.jsonl", "--out", "run/model_00002.pt"], "would replace a file that is read"),
    # --data
    (["run", "--data", "nowhere.jsonl"], "no HellaSwag examples at nowhere.jsonl"),
    (["run", "--data", ""], "no HellaSwag examples at"),
    (["run", "--data", "run"], "run is not a regular file"),
    (["run", "--data", "/dev/zero"], "/dev/zero is not a regular file"),
    (["run", "--data", "fifo"], "fifo is not a regular file", fifo),
    (["run", "--data", "in.txt"], "in.txt, line 1 is not a HellaSwag example"),
    (["run", "--data", "run/model_00002.pt"], "run/model_00002.pt, line 1 is not a HellaSwag example"),
    hella("", "bad.jsonl has no examples"),
    hella("\n \n", "bad.jsonl has no examples"),
    hella(LINE * 2 + b"[1, 2]\n", "line 3 is not a HellaSwag example: it must be a JSON object"),
    hella("null\n", "it must be a JSON object"),
    hella("[" * 100_000, "maximum recursion depth exceeded"),
    hella('{"a":' * 50_000 + "1" + "}" * 50_000, "line 1 is not a HellaSwag example: it is longer than 262,144 bytes"),
    hella(LINE + b"x" * 2**19, "line 2 is not a HellaSwag example: it is longer than 262,144 bytes"),
    hella(LINE + LINE[:50], "line 2 is not a HellaSwag example: Unterminated string"),
    hella(LINE.replace(b"roof", b"r\xffof"), "'utf-8' codec can't decode byte 0xff"),
    hella(LINE.decode().encode("utf-16"), "'utf-8' codec can't decode byte 0xff in position 0"),
    hella(LINE.replace(b"roof", b"\\ud800"), "surrogates not allowed"),
    hella(GZIP[:100], "bad.gz is damaged after line", "bad.gz"),
    hella(GZIP[:40] + b"\xff" * 20 + GZIP[60:], "is damaged after line"),
    hella(GZIP[:-8] + b"\0" * 8, "is damaged after line 200: CRC check failed"),
    hella(GZIP[:10], "is damaged after line 0"),
    hella(changed(endings="abcd"), "endings is 'abcd', it must be four non-empty strings in a list"),
    hella(changed(endings=dict(a="1", b="2", c="3", d="4")), "it must be four non-empty strings in a list"),
    hella(changed(endings=["a", "b", "c"]), "it must be four non-empty strings in a list"),
    hella(changed(endings=["a", "b", "c", 4]), "it must be four non-empty strings in a list"),
    hella(changed(endings=["a", "b", "c", ""]), "it must be four non-empty strings in a list"),
    hella(changed(endings="null"), "endings is None"),
    hella(changed(label=2.7), "label is 2.7, it must be 0, 1, 2 or 3"),
    hella(changed(label=True), "label is True"),
    hella(changed(label=-1), "label is -1"),
    hella(changed(label=10**400), "label is 1000"),
    hella(changed(label="null"), "label is None"),
    hella(changed(label=float("inf")), "label is inf"),
    hella(changed(label=float("nan")), "label is nan"),
    hella(changed(label=""), "it has no label, as in the test split"),
    hella(changed(label=None), "it lacks label"),
    hella(changed(ctx=None, activity_label=None), "it lacks activity_label, ctx"),
    hella(changed(ctx=["a"]), "ctx is ['a'], it must be a string"),
    hella(changed(ctx_a="null"), "ctx_a is None, it must be a string"),
    hella(changed(ctx_b=5), "ctx_b is 5, it must be a string"),
    hella(changed(ctx_b=None), "both ctx_a and ctx_b, or neither"),
    hella(changed(activity_label=7), "activity_label is 7"),
    # the model
    (["nowhere", "--data", "hella.jsonl"], "no checkpoint at nowhere"),
    (["hella.jsonl", "--data", "hella.jsonl"], "cannot load hella.jsonl"),
    (["shards", "--data", "hella.jsonl"], "shards holds no checkpoint"),
    (["nan.pt", "--data", "hella.jsonl"], "nan.pt has NaN or infinite weights: transformer.ln_f.weight", damaged("nan")),
    (["char.pt", "--data", "hella.jsonl"], "vocabulary has 65 tokens; HellaSwag needs GPT-2's 50257", damaged("char")),
    (["run", "--data", "hella.jsonl"], "example 0 has an ending of 40 tokens; this model's block_size is only 16",
     write("hella.jsonl", changed(endings=["a", "b", "c", "b" + " d" * 39]))),
]


@pytest.mark.parametrize("row", HELLASWAG, ids=ids(HELLASWAG))
def test_hellaswag(row, template, tmp_path, monkeypatch, capfd):
    check("hellaswag", row, template, tmp_path, monkeypatch, capfd)


# -----------------------------------------------------------------------------
# sample.py

SAMPLE = [
    # flags
    ([], "the following arguments are required: source"),
    (["run", "--num-samples", "0"], "--num-samples 0: must be an integer, 1 or more"),
    (["run", "--num-samples", "2.5"], "--num-samples 2.5: must be an integer, 1 or more"),
    (["run", "--num-samples", str(10**30)], "must be an integer, 1 or more"),
    (["run", "--max-new-tokens", "-1"], "--max-new-tokens -1: must be an integer, 1 or more"),
    (["run", "--temperature", "-0.1"], "--temperature -0.1: must be a number, 0 or more"),
    (["run", "--temperature", "inf"], "--temperature inf: must be a number, 0 or more"),
    (["run", "--temperature", "hot"], "--temperature hot: must be a number, 0 or more"),
    (["run", "--top-k", "-1"], "--top-k -1: must be an integer, 0 or more"),
    (["run", "--top-p", "0"], "--top-p 0: must be a number, above 0 and at most 1"),
    (["run", "--top-p", "nan"], "--top-p nan: must be a number"),
    (["run", "--top-p", "1e-400"], "--top-p 1e-400: must be a number, above 0"),
    (["run", "--seed", "-1"], "--seed -1: must be an integer, 0 or more"),
    (["run", "--seed", str(2**64)], "--seed 18446744073709551616: must be an integer"),
    (["run", "--dtype", "fp16"], "unknown dtype 'fp16'"),
    (["run", "--device", "gpu"], "device 'gpu' is not available"),
    (["run", "--start", "x"], "unknown flag --start: did you mean --prompt?"),
    (["run", "--max_tokens", "5"], "unknown flag --max-tokens: did you mean --max-new-tokens?"),
    (["run", "--out_dir", "x"], "unrecognized arguments: --out-dir x"),
    # prompts
    (["run", "To be"], "unexpected 'To be': a prompt is given as --prompt 'To be'"),
    (["run", "--prompt", "To", "be"], "unexpected 'be': a prompt is given as --prompt be"),
    (["run", "--prompt"], "--prompt expected one argument"),
    (["run", "--prompt", "a", "--prompt-file", "in.txt"], "give only one of --prompt, --prompt-file, - (stdin) and"),
    (["run", "--prompt", "", "-"], "give only one of --prompt"),
    (["run", "--interactive", "--prompt-file", "in.txt"], "give only one of --prompt"),
    (["run", "--prompt", "a\udcffb"], "not valid Unicode at character 2"),
    (["run", "--prompt", " " * 1_500_000], "1,500,000 consecutive blanks from character 1"),
    (["run", "--prompt-file", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    (["run", "--prompt-file", ""], "No such file or directory: ''"),
    (["run", "--prompt-file", "run"], "run is not a regular file"),
    (["run", "--prompt-file", "/dev/zero"], "/dev/zero is not a regular file"),
    (["run", "--prompt-file", "fifo"], "fifo is not a regular file", fifo),
    (["run", "--prompt-file", "/dev/fd/999"], "No such file or directory: '/dev/fd/999'"),
    (["run", "--prompt-file", "run/model_00002.pt"], "run/model_00002.pt is not valid UTF-8 at byte"),
    (["run", "--prompt-file", "utf16.txt"], "utf16.txt is not valid UTF-8 at byte 1",
     write("utf16.txt", "To be".encode("utf-16"))),
    (["run", "--prompt-file", "big.txt"], "big.txt has over 4 MiB", lambda folder: os.truncate(folder / "in.txt", 2**41) or
     os.rename(folder / "in.txt", folder / "big.txt")),
    # memory
    (["run", "--num-samples", "1000000000"], "GB are available: --num-samples may be at most"),
    (["run", "--num-samples", "1", "--max-new-tokens", str(10**12)], "GB are available: --max-new-tokens may be at most"),
    (["run", "--num-samples", str(2**62), "--top-k", "0"], "4,611,686,018,427,387,904 sample(s) of 64 tokens need about"),
    # the model
    (["nowhere"], "no checkpoint at nowhere"),
    ([""], "no checkpoint at"),
    (["log"], "no checkpoint at log"),
    (["shards"], "shards holds no checkpoint"),
    (["in.txt"], "cannot load in.txt"),
    (["run/state_00002.pt"], 'it lacks "model"'),
    (["run/model_00001.pt"], "no checkpoint at run/model_00001.pt"),
    (["empty.pt"], "cannot load empty.pt", write("empty.pt", b"")),
    (["run"], "cannot load run/model_00002.pt", lambda folder: os.truncate(folder / "run" / "model_00002.pt", 1000)),
    (["nan.pt"], "nan.pt has NaN or infinite weights: transformer.ln_f.weight (1 tensors in all)", damaged("nan")),
    (["inf.pt"], "inf.pt has NaN or infinite weights: transformer.ln_f.weight", damaged("inf")),
    (["char.pt"], "char.pt has a vocabulary of 65 tokens, not GPT-2's 50257", damaged("char")),
    (["short.pt"], "transformer.wpe.weight (3, 16) for (16, 16)", damaged("short")),
    (["lacks.pt"], "the weights of lacks.pt do not fit this model: transformer.ln_f.bias", damaged("lacks")),
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
