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

NO_LOCK = ["--data", "shards", "--dry-run"]  # creates no folder


def break_file(name):
    """Cuts a file in half."""
    def prepare(folder):
        contents = (folder / name).read_bytes()
        (folder / name).write_bytes(contents[:len(contents) // 2])
    return prepare


TRAIN = [
    (["--n-layer", "0"], "--n-layer 0: must be an integer, 1 or more"),
    (["--lr", "nan"], "--lr nan: must be a number"),
    # names: what an unset shell variable gives, and what leaves --log-dir
    (["--exp-name", ""], "--exp-name '': must be the name of a folder, not empty"),
    (["--exp-name", "."], "--exp-name '.': must be the name of a folder"),
    (["--exp-name", ".."], "--exp-name '..': must be the name of a folder"),
    (["--exp-name", "a/b"], "--exp-name 'a/b': must be the name of a folder, not empty, without slashes"),
    (["--exp-name", "/tmp/a"], "--exp-name '/tmp/a': must be"),
    (["--exp-name", "../run"], "--exp-name '../run': must be"),
    (["--exp-name", "a\nb"], "--exp-name 'a\\nb': must be"),
    (["--exp-name=-x"], "--exp-name '-x': must be"),
    (["--exp-name", "run "], "outer blanks"),
    (["--exp-name", "x" * 300], "of at most 200 bytes"),
    (["--log-dir", ""], "--log-dir '': must not be empty"),
    (["--log-dir", "in.txt"], "in.txt"),
    (["--data", ""], "--data '': must not be empty"),
    (["--init-from", ""], "--init-from '': must not be empty"),
    (["--resume", ""], "--resume '': must not be empty"),
    (["--resume", "nowhere"], "--resume nowhere does not exist"),
    (["--resume", "in.txt"], "in.txt is not named like a checkpoint"),
    (["--resume", "shards"], "--resume shards: there is no checkpoint"),
    (["--resume", "empty"], "--resume empty: there is no checkpoint", lambda folder: os.mkdir(folder / "empty")),
    (["--resume", "run", "--exp-name", "run"], "--resume run names the run: omit --exp-name"),
    (["--resume", "never", "--log-dir", ".", "--exp-name", "run"], "./run already holds a run"),
    # numbers that make no sense
    (["--lr", "0"], "--lr 0: must be a number, above 0"),
    (["--lr", "inf"], "--lr inf: must be a number"),
    (["--min-lr-ratio", "1.5"], "--min-lr-ratio 1.5: must be a number, 0 or more and at most 1"),
    (["--embd-lr-ratio", "-1"], "--embd-lr-ratio -1: must be a number, 0 or more"),
    (["--weight-decay", "-0.1"], "--weight-decay -0.1: must be"),
    (["--beta1", "1"], "--beta1 1: must be a number, 0 or more and at most 0.99999"),
    (["--beta2", "nan"], "--beta2 nan: must be"),
    (["--grad-clip", "-1"], "--grad-clip -1: must be a number, 0 or more"),
    (["--warmup-steps", "1.5"], "--warmup-steps 1.5: must be an integer"),
    (["--wsd-decay", "0"], "--wsd-decay 0: must be a number, above 0"),
    ([*NO_LOCK, "--dropout", "1"], "dropout=1.0: must be at least 0 and less than 1"),
    (["--epochs", "inf"], "--epochs inf: must be a number"),
    (["--epochs", "2", "--max-steps", "3"], "--epochs and --max-steps both set the length"),
    ([*NO_LOCK, "--epochs", "0.00001"], "are less than one step of 128"),
    (["--timeout", "inf"], "--timeout inf: must be a number"),
    (["--timeout", "0"], "--timeout 0: must be a number, 0.01 or more"),
    (["--seed", "-1"], "--seed -1: must be an integer, 0 or more"),
    (["--keep-last", "0"], "--keep-last 0: must be an integer, 1 or more"),
    ([*NO_LOCK, "--val-tokens", "8"], "--val-tokens 8 is less than one sequence of 16"),
    (["--max-steps", str(2**70)], "must be an integer, 0 or more"),
    # sizes of no machine
    (["--n-layer", "1000000000"], "--n-layer 1000000000: must be an integer, 1 or more and at most 1000"),
    (["--n-embd", "1000000007"], "--n-embd 1000000007: must be"),
    (["--n-head", "1000000007"], "--n-head 1000000007: must be"),
    (["--vocab-size", str(2**40)], "--vocab-size 1099511627776: must be"),
    (["--block-size", str(2**40)], "--block-size 1099511627776: must be"),
    (["--total-batch-size", str(2**50)], "--total-batch-size 1125899906842624: must be"),
    ([*NO_LOCK, "--block-size", "99999", "--total-batch-size", "99999", "--val-tokens", "99999"], "too few for one sequence"),
    ([*NO_LOCK, "--batch-size", str(2**40)], "--batch-size that would fit: [1, 2, 4, 8]"),
    # settings that do not fit together
    ([*NO_LOCK, "--n-head", "3"], "n_embd=16 is not a multiple of n_head=3; n_head that fit: [1, 2, 4, 8, 16]"),
    ([*NO_LOCK, "--sequence-length", "32"], "--sequence-length 32 is over --block-size 16"),
    ([*NO_LOCK, "--total-batch-size", "100"], "is not a multiple of the sequence length T=16"),
    ([*NO_LOCK, "--batch-size", "3"], "is not a multiple of B*T*W = 3*16*1"),
    ([*NO_LOCK, "--optimizer", "muon", "--parallel", "zero"], "--parallel zero cannot shard muon"),
    ([*NO_LOCK, "--vocab-size", "100"], "allowed are ids below 100"),
    # words
    (["--optimizer", "sgd"], "--optimizer invalid choice: 'sgd'"),
    (["--preset", "gpt5"], "--preset invalid choice: 'gpt5'"),
    (["--shuffle", "yes"], "--shuffle invalid choice: 'yes'"),
    ([*NO_LOCK, "--device", "tpu"], "device 'tpu' is not available"),
    (["--max_iters", "5"], "unknown flag --max-iters: did you mean --max-steps?"),
    (["--learning_rate", "1"], "unknown flag --learning-rate: did you mean --lr?"),
    (["--wandb_run_name", "x"], "unknown flag --wandb-run-name: did you mean --exp-name?"),
    (["--num_train_epochs", "3"], "unknown flag --num-train-epochs: did you mean --epochs?"),
    (["config/train_shakespeare_char.py"], "unrecognized arguments: config/train_shakespeare_char.py"),
    # data and weights
    ([*NO_LOCK, "--data", "nowhere"], "no data at nowhere"),
    ([*NO_LOCK, "--init-from", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    ([*NO_LOCK, "--init-from", "in.txt"], "cannot load in.txt"),
    ([*NO_LOCK, "--init-from", "run", "--n-layer", "2"], "--init-from's weights have n_layer=1: omit these flags"),
    ([*NO_LOCK, "--init-from", "run", "--block-size", "32"], "--block-size 32 is over the 16 positions of"),
    (["--eval-only", "--data", "shards"], "--eval-only: there is no checkpoint in log/shakespeare"),
    (["--eval-only", "--init-from", "run", "--data", "shards", "--hella-every", "9", "--hellaswag", "in.txt"], "line 1"),
    # a run that exists
    (["--resume", "run", "--preset", "gpt2-124M"], "preset cannot change when a run resumes"),
    (["--resume", "run", "--init-from", "gpt2"], "init_from cannot change when a run resumes"),
    (["--resume", "run", "--n-layer", "2"], "n_layer cannot change when a run resumes"),
    (["--resume", "run", "--optimizer", "muon"], "optimizer cannot change when a run resumes"),
    (["--resume", "run", "--dropout", "0.1"], "changing dropout makes it a different run; --force resumes anyway"),
    (["--resume", "run", "--seed", "1", "--shuffle", "off"], "changing seed, shuffle makes it a different run"),
    (["--resume", "run"], "no checkpoint in run can be loaded", break_file("run/model_00002.pt")),
    (["--resume", "run/model_00002.pt"], "cannot load run/state_00002.pt", break_file("run/state_00002.pt")),
    (["--resume", "run/model_00002.pt"], "run/state_00002.pt", lambda folder: os.remove(folder / "run/state_00002.pt")),
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
