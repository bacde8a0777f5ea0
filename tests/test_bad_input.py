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
import torch

import checkpoint
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


@pytest.fixture(scope="module")
def tokenized(template, tmp_path_factory):
    """The same folder with the tokens of in.txt, which training writes before it reads the checkpoint's state."""
    folder = tmp_path_factory.mktemp("tokenized") / "here"
    shutil.copytree(template, folder, symlinks=True)
    with contextlib.chdir(folder):
        data.prepare_data("in.txt")
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


def write(path, contents):
    """A function that replaces a file of the folder by contents, text or bytes; None: by a FIFO."""
    def prepare(folder):
        (folder / path).unlink(missing_ok=True)
        if contents is None:
            os.mkfifo(folder / path)
        else:
            (folder / path).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return prepare


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
# train_gpt2.py, resuming a run whose files are damaged

def edit(name, change):
    """A function that changes the contents of one of the run's files, model_00002.pt or state_00002.pt: change(contents)."""
    def prepare(folder):
        path = folder / "run" / f"{name}_00002.pt"
        contents = torch.load(path)
        changed = change(contents)
        torch.save(contents if changed is None else changed, path)
    return prepare


def state(**changes):
    return edit("state", lambda contents: contents.update(changes))


def weights(changes):
    return edit("model", lambda contents: contents["model"].update(changes))


def wpe(value):
    return weights({"transformer.wpe.weight": value})


def config(**changes):
    return edit("model", lambda contents: contents["config"].update(changes))


def setting(**changes):
    return edit("state", lambda contents: contents["train_config"].update(changes))


def loader(**changes):
    return edit("state", lambda contents: contents["loader"].update(changes))


def moments(**changes):
    return edit("state", lambda contents: contents["optimizers"][0]["state"].update({0: changes}))


DAMAGED = [
    # the files
    ("log.txt is not a regular file", write("run/log.txt", None)),
    ("config.json is not a regular file", write("run/config.json", None)),
    ("config.json is not the config.json of a run", write("run/config.json", "{")),
    ("config.json is not the config.json of a run", write("run/config.json", '{"model_type": "gpt2", "n_layer": 12}')),
    ("config.json is not the config.json of a run", write("run/config.json", "[" * 100_000)),
    ("model_00002.pt is not a regular file", write("run/model_00002.pt", None)),
    ("cannot load ./run/state_00002.pt: it is truncated, damaged", write("run/state_00002.pt", "404: Not Found")),
    ("cannot load ./run/model_00002.pt: it is truncated, damaged", write("run/model_00002.pt", b"")),
    ("state_00002.pt", lambda folder: os.remove(folder / "run" / "state_00002.pt")),
    # the model
    ("model_00002.pt is not the model file of step 2", edit("model", lambda contents: torch.zeros(3))),
    ("model_00002.pt is not the model file of step 2", edit("model", lambda contents: {"model": contents["model"], "step": 2})),
    ("model_00002.pt is damaged: model is [", edit("model", lambda contents: contents.update(model=[1, 2]))),
    ("model_00002.pt is damaged: config is 'gpt2'", edit("model", lambda contents: contents.update(config="gpt2"))),
    ("model_00002.pt is damaged: step is 2.0", edit("model", lambda contents: contents.update(step=2.0))),
    ("its config does not describe a model", config(activation="gelu")),
    ("its config does not describe a model", config(n_layer="1")),
    ("its config does not describe a model", config(n_layer=10**9)),
    ("its config does not describe a model", config(vocab_size=2**62)),
    ("transformer.wte.weight", config(vocab_size=2**40)),
    ("do not fit this model: extra", weights({"extra": torch.zeros(1)})),
    ("do not fit this model: 5", weights({5: torch.zeros(1)})),
    ("transformer.wpe.weight is not a dense tensor", wpe([1.0])),
    ("transformer.wpe.weight is not a dense tensor", wpe(torch.zeros(16, 16).to_sparse())),
    ("transformer.wpe.weight is not a dense tensor", wpe(torch.zeros(16, 16, device="meta"))),
    ("transformer.wpe.weight (16, 8) for (16, 16)", wpe(torch.zeros(16, 8))),
    (r"\x1b[31m", weights({"\x1b[31mred": torch.zeros(1)})),
    # the state
    ("state_00002.pt is not the state file of step 2", state(step=3)),
    ("state_00002.pt is damaged: optimizers is None", state(optimizers=None)),
    ("state_00002.pt is damaged: loader is []", state(loader=[])),
    ("state_00002.pt is damaged: train_config is 5", state(train_config=5)),
    ("state_00002.pt is damaged: scaler is {'scale': 1024.0}", state(scaler={"scale": 1024.0})),
    ("state_00002.pt is damaged: scaler is {", state(scaler=dict.fromkeys(checkpoint.SCALER, float("nan")))),
    ("the checkpoint's position in the data is damaged: {}", state(loader={})),
    ("the checkpoint's position in the data is damaged", loader(position=-1)),
    ("the checkpoint's position in the data is damaged", loader(position="2")),
    ("the checkpoint's position in the data is damaged", loader(extra=2)),
    ("trained on other data", loader(fingerprint="0")),
    ("random number generators: TypeError", state(rng=[5])),
    ("random number generators: KeyError", state(rng=[{}])),
    ("random number generators: TypeError", state(rng=[{"cpu": torch.zeros(5056)}])),
    ("random number generators: RuntimeError", state(rng=[{"cpu": torch.zeros(7, dtype=torch.uint8)}])),
    ("has the state of 0 optimizers, this run has 1", state(optimizers=[])),
    ("the state of AdamW in the checkpoint does not fit the model", state(optimizers=["AdamW"])),
    ("the state of AdamW in the checkpoint does not fit the model", state(optimizers=[{"state": 5, "param_groups": []}])),
    ("the state of AdamW in the checkpoint does not fit the model", moments()),
    ("the state of AdamW in the checkpoint does not fit the model",
     moments(step=torch.zeros(()), exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))),
    ("the state of AdamW in the checkpoint does not fit the model", moments(step=2, exp_avg=None, exp_avg_sq=None)),
    ("the state of AdamW in the checkpoint does not fit the model", moments(momentum_buffer=torch.zeros(50304, 16))),
    # its settings
    ("--lr fast: must be a number", setting(lr="fast")),
    ("--n-layer 1.5: must be an integer", setting(n_layer=1.5)),
    ("--data is 5, must be a str", setting(data=5)),
    ("--shuffle is 'maybe', must be ('on', 'off')", setting(shuffle="maybe")),
    ("--keep-best is 'yes', must be a bool", setting(keep_best="yes")),
]


@pytest.mark.parametrize("row", DAMAGED, ids=[f"{i} {row[0]}"[-60:] for i, row in enumerate(DAMAGED)])
def test_a_damaged_run(row, tokenized, tmp_path, monkeypatch, capfd):
    """Resumed with the settings in its checkpoint."""
    row = (["--log-dir", ".", "--exp-name", "run", "--max-steps", "3"], *row)
    check("train_gpt2", row, tokenized, tmp_path, monkeypatch, capfd)


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

def settings(**changes):
    """A function that writes these settings into the run's config.json."""
    return write("run/config.json", json.dumps({"config": changes}))


LOSSES = "0 train 3.5\n1 train 3.25\n"
PLOTS = [
    (["shards"], "shards has no log.txt"),
    (["nowhere"], "nowhere has no log.txt"),
    (["in.txt"], "in.txt has no log.txt"),
    ([], "the following arguments are required: source"),
    (["run", "run"], "got 2 sources; name their common picture"),
    (["run", "--by", "epochs"], "invalid choice: 'epochs'"),
    (["run", "--baselines", "pile"], "invalid choice: 'pile'"),
    (["run", "--out", ""], "'the empty name' is not the name of a file"),
    (["run", "--out", "shards"], "'shards' is not the name of a file"),
    (["run", "--out", "nowhere/x.png"], "nowhere is not an existing folder"),
    (["run", "--out", "in.txt/x.png"], "in.txt is not an existing folder"),
    (["run", "--out", "x.pdf"], "pictures are PNG files"),
    (["run", "--out", "picture"], "pictures are PNG files"),
    (["run", "--out", "/dev/full"], "No space left on device"),
    (["run", "--prompt", "a"], "--prompt is the text of the attention pictures: add --weights"),
    (["run", "--weight"], "unknown flag --weight: did you mean --weights"),
    (["--weights", "run", "run"], "--weights takes one"),
    (["--weights", "nowhere"], "nowhere is not a folder; name a folder for the pictures"),
    (["--weights", "run", "--out", ""], "'the empty name' is not the name of a file"),
    (["--weights", "run", "--out", "in.txt"], "in.txt is not an existing folder"),
    (["--weights", "run", "--out", "in.txt/new"], "in.txt is not an existing folder"),
    (["--weights", "run", "--prompt", " " * 2_000_000], "blank"),
    (["run"], "has no values yet", write("run/log.txt", "")),
    (["run"], "has no values yet", write("run/log.txt", "0 train 3")),
    (["run"], "line 1: expected `step stream value`, got '404: Not Found'", write("run/log.txt", "404: Not Found\n")),
    (["run"], "line 1: expected", write("run/log.txt", b"\x89PNG\r\n\x1a\n\0\0")),
    (["run"], "line 3: expected", write("run/log.txt", LOSSES + "two train 3\n")),
    (["run"], "line 3: expected", write("run/log.txt", LOSSES + "-2 train 3\n")),
    (["run"], "line 3: expected", write("run/log.txt", LOSSES + "9" * 30 + " train 3\n")),
    (["run"], r"got '2 \x1b[31mtrain", write("run/log.txt", LOSSES + "2 \x1b[31mtrain 3 4\n")),
    (["run"], "log.txt is not a regular file", write("run/log.txt", None)),
    (["run", "--baselines"], "has no finite loss, train or val, to draw; its streams are lr",
     write("run/log.txt", "0 lr 0.1\n")),
    (["run"], "has no finite loss", write("run/log.txt", "0 train nan\n1 train inf\n1 lr 0.1\n")),
    (["run", "--by", "hours"], "needs tok_per_sec, missing", write("run/log.txt", LOSSES)),
    (["run", "--by", "hours"], "a tok_per_sec of 0 or less", write("run/log.txt", LOSSES + "1 tok_per_sec 0\n")),
    (["run", "--by", "tokens"], "needs total_batch_size", settings()),
    (["run"], "total_batch_size in run/config.json is '128', must be a positive integer", settings(total_batch_size="128")),
    (["run"], "n_layer in run/config.json is 0", settings(n_layer=0)),
    (["run"], "n_embd in run/config.json is None", settings(n_embd=None)),
    (["run"], "config.json is not the config.json of a run", write("run/config.json", "{")),
    (["run"], "config.json is not the config.json of a run", write("run/config.json", '{"model_type": "gpt2"}')),
    (["run"], "config.json is not the config.json of a run", write("run/config.json", "[" * 100_000)),
    (["run"], "config.json is not the config.json of a run", write("run/config.json", b"\xff\xfe")),
    (["run"], "config.json is not a regular file", write("run/config.json", None)),
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
