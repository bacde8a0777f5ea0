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
import pickle
import resource
import shutil
import signal
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from run import checkpoint
from run import cli
import convert
import data
from run import files
from convert import hf_state_dict
from model import GPT, GPTConfig

TIMEOUT = 20      # seconds that a command may take
MEMORY = 2 << 30  # bytes of address space that a command may add
TINY = ["--preset", "shakespeare", "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "16",
        "--total-batch-size", "128", "--batch-size", "8", "--compile", "off", "--sample-every", "0", "--val-tokens", "1024",
        "--optimizer", "adamw", "--dtype", "float32"]
EXAMPLE = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
           "ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap.", "is ripping.", "is one.", "is."]}


def run(script, argv, monkeypatch):
    """Exit status of a script's main with these arguments, in this process; a run folder is unlocked at its end."""
    unlocks = []
    register = atexit.register

    def register_or_unlock(function, *args, **kwargs):
        if function.__module__ == "run.folder":
            unlocks.append(function)
        else:
            register(function, *args, **kwargs)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    monkeypatch.setattr(atexit, "register", register_or_unlock)
    with pytest.raises(SystemExit) as end:
        cli.run_main(importlib.import_module(script).main)
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
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = (status.st_size, status.st_mtime_ns, os.path.islink(path))
    return found


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
    for name in before.keys() | after.keys():
        # a folder's own entry changes when a temporary file in it is created and removed
        if not (name in before and (folder / name).is_dir()):
            assert before.get(name) == after.get(name), name


def ids(rows):
    return [" ".join(row[0])[-60:] or "(no arguments)" for row in rows]


# -----------------------------------------------------------------------------
# what a row does to the folder: functions of the folder

def write(name, contents):
    """Writes a file, text or bytes, and the folder it is in; None: a FIFO."""
    def prepare(folder):
        os.makedirs((folder / name).parent, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        if contents is None:
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return prepare


def link(name, target):
    def prepare(folder):
        os.makedirs((folder / name).parent, exist_ok=True)
        os.symlink(target, folder / name)
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


def duplicate_columns(folder):
    """Writes a.parquet with two columns, both named text."""
    import pyarrow as pa
    import pyarrow.parquet
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pyarrow.parquet.write_table(table, folder / "a.parquet")


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
    held[:] = [files.lock(folder / "shards" / ".fineweb.lock")]


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
    ([*NO_LOCK, "--vocab-size", "100", "--sample-every", "1"], "GPT-2's 50257 tokens, the vocabulary has 100"),
    ([*NO_LOCK, "--vocab-size", "100", "--hella-every", "1"], "--vocab-size 50304, or --sample-every 0 --hella-every 0"),
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
    ([*NO_LOCK, "--init-from", "run", "--init", "lecture"], "--init lecture is for random weights, and --init-from"),
    (["--init", "zeros"], "--init invalid choice: 'zeros'"),
    ([*NO_LOCK, "--init-from", "run", "--n-layer", "2"], "--init-from's weights have n_layer=1: omit these flags"),
    ([*NO_LOCK, "--init-from", "run", "--block-size", "32"], "--block-size 32 is over the 16 positions of"),
    (["--eval-only", "--data", "shards"], "--eval-only: there is no checkpoint in log/shakespeare"),
    (["--eval-only", "--init-from", "run", "--data", "shards", "--hella-every", "9", "--hellaswag", "in.txt"], "line 1"),
    # a run that exists
    (["--resume", "run", "--preset", "gpt2-124M"], "preset cannot change when a run resumes"),
    (["--resume", "run", "--init-from", "gpt2"], "init_from cannot change when a run resumes"),
    (["--resume", "run", "--init", "lecture"], "init cannot change when a run resumes"),
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
    ("cannot load ./run/state_00002.pt: it is not a checkpoint", write("run/state_00002.pt", "404: Not Found")),
    ("cannot load ./run/model_00002.pt: it is not a checkpoint", write("run/model_00002.pt", b"")),
    ("state_00002.pt", lambda folder: os.remove(folder / "run" / "state_00002.pt")),
    # the model
    ("model_00002.pt is not the model file of step 2", edit("model", lambda contents: torch.zeros(3))),
    ("model_00002.pt is not the model file of step 2", edit("model", lambda contents: {"model": contents["model"], "step": 2})),
    ("model_00002.pt is damaged: model is [", edit("model", lambda contents: contents.update(model=[1, 2]))),
    ("model_00002.pt is damaged: config is 'gpt2'", edit("model", lambda contents: contents.update(config="gpt2"))),
    ("model_00002.pt is damaged: step is 2.0", edit("model", lambda contents: contents.update(step=2.0))),
    ("its config does not describe a model", config(activation="gelu")),
    ("its config does not describe a model", config(n_layer="1")),
    ("its config says n_layer=1000000000 and", config(n_layer=10**9)),
    ("they are 17 tensors with", config(vocab_size=2**62)),
    ("17,592,186,047,984 parameters, they are", config(vocab_size=2**40)),
    ("do not fit this model: extra", weights({"extra": torch.zeros(1)})),
    ("do not fit this model: 5", weights({5: torch.zeros(1)})),
    ("transformer.wpe.weight of ./run/model_00002.pt is [1.0], expected a tensor", wpe([1.0])),
    ("torch.sparse_coo on cpu, expected a dense tensor", wpe(torch.zeros(16, 16).to_sparse())),
    ("torch.strided on meta, expected a dense tensor", wpe(torch.zeros(16, 16, device="meta"))),
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
    ("the state of AdamW in the checkpoint does not fit the model", state(optimizers=[{"state": [], "param_groups": []}])),
    ("the state of AdamW in the checkpoint does not fit the model", state(optimizers=["AdamW"])),
    ("the state of AdamW in the checkpoint does not fit the model", state(optimizers=[{"state": 5, "param_groups": []}])),
    ("the state of AdamW in the checkpoint does not fit the model", moments()),
    ("the state of AdamW in the checkpoint does not fit the model",
     moments(step=torch.zeros(()), exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))),
    ("the state of AdamW in the checkpoint does not fit the model", moments(step=2, exp_avg=None, exp_avg_sq=None)),
    ("the state of AdamW in the checkpoint does not fit the model", moments(momentum_buffer=torch.zeros(50304, 16))),
    # its settings
    ("--lr fast: must be a number", setting(lr="fast")),
    ("--batch-size 1.5: must be an integer", setting(batch_size=1.5)),
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
    ([*IN, "--shard-size", "1e12"], "--shard-size 1,000,000,000,000: two shards of 2 bytes per token do not fit"),
    ([*IN, "--shard-size", "1000000000000000"], "do not fit into the"),
    ([*IN, "--workers", "20000"], "--workers 20000: must be an integer, 0 or more and at most 1024"),
    ([*IN, "--workers", "-1"], "--workers -1: must be an integer"),
    ([*IN, "--max-tokens", "nan"], "--max-tokens nan: must be an integer"),
    ([*IN, "--max-tokens", str(2**70)], "must be an integer"),
    ([*IN, "--val-tokens", "0"], "--val-tokens 0: must be an integer, 1 or more"),
    ([*IN, "--val", "shard"], "--val invalid choice: 'shard'"),
    ([*IN, "--val", "first-shard", "--val-tokens", "5"], "--val first-shard takes the first --shard-size tokens; omit"),
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
    (AGAIN, "shards/manifest.json is not a regular file", remove("shards/manifest.json"), write("shards/manifest.json", None)),
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
    (["--input", "x.txt", *NEW], "--input x.txt is not a regular file", write("x.txt", None)),
    (["--input", "x.jsonl", *NEW], "--input x.jsonl is not a regular file", link("x.jsonl", "/dev/zero")),
    (["--input", "texts", *NEW], "--input texts/b.txt is not a regular file", write("texts/a.txt", "a"),
     write("texts/b.txt", None)),
    (["--input", "texts", *NEW], "--input texts/b.txt is not a regular file, or a broken", link("texts/b.txt", "nowhere")),
    (["--input", "a.txt", *NEW], "the source contains no text", write("a.txt", "")),
    (["--input", "a.txt", *NEW], "the source contains no text", write("a.txt", b"\xef\xbb\xbf")),
    (["--input", "a.txt", *NEW], "a.txt is damaged or truncated ('utf-8'", write("a.txt", "text".encode("utf-16"))),
    *((["--input", "a.jsonl", *NEW], message, write("a.jsonl", contents)) for contents, message in [
        (JSON + "[1, 2]\n", "line 2 is not a JSON object"), (JSON + '"text"\n', "line 2 is not a JSON object"),
        (JSON + '{"text": "cut', "line 2 is not a JSON object"), (JSON + "[" * 100_000, "line 2 is not a JSON object"),
        (JSON + '{"text":' * 100_000, "recursion"), ('[\n  {"text": "a"}\n]\n', "each line must be one"),
        ("plain text\n", "line 1 is not a JSON object"), ('{"body": "a"}\n', "has no field 'text'; it has body"),
        ('\n \n{"body": "a"}\n', "has no field 'text'; it has body"),
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
    (["--input", "a.parquet", *NEW], "a.parquet has 2 columns 'text'; rename all but one", duplicate_columns),
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
    ([""], "must not be empty; omit the flag"),
    # text
    (["a.txt"], "a.txt is empty: there is nothing to train on", write("a.txt", "")),
    (["a.txt"], "a.txt is empty", write("a.txt", b"\xef\xbb\xbf")),
    (["a.txt"], "a.txt is not UTF-8 text: byte 3", write("a.txt", "caf\u00e9".encode("latin-1"))),
    (["a.txt"], "a.txt is not UTF-8 text", write("a.txt", "text".encode("utf-16"))),
    (["a.txt"], "consecutive blanks", write("a.txt", "a b" + " " * 2_000_000)),
    (["a.txt"], "do not fit into memory", write("a.txt", ""), lambda folder: os.truncate(folder / "a.txt", 1 << 40)),
    (["a.txt"], "a.txt is not a regular file", write("a.txt", None)),
    (["/dev/zero"], "/dev/zero is not a regular file"),
    (["/dev/stdin"], "/dev/stdin is not a regular file", lambda folder: None),
    (["texts"], "texts/b.txt is not a regular file", write("texts/a.txt", "text"), write("texts/b.txt", None)),
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
    (["bin"], "x_val_000000.bin is not a regular file", write("bin/x_val_000000.bin", None),
     write("bin/x_train_000001.bin", llmc(20240520, 1, 2))),
]


@pytest.mark.parametrize("row", DATA, ids=ids(DATA))
def test_data_of_train_gpt2(row, template, tmp_path, monkeypatch, capfd):
    check("train_gpt2", ([*TINY, "--data", *row[0]], *row[1:]), template, tmp_path, monkeypatch, capfd)


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
    (["run", "--data", "hella.jsonl", "--limit", "1e-3"], "--limit 1e-3: must be an integer, 1 or more"),
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
    ([""], "the name of the checkpoint is empty"),
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

SIZES = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)


def pt(config=None, weights=None, **changes):
    """Writes a.pt, a small model with changes to its config, to its tensors (None: removed) and to its other fields."""
    def prepare(folder):
        tensors = {**GPT(GPTConfig(**SIZES)).state_dict(), **(weights or {})}
        contents = {"model": {name: t for name, t in tensors.items() if t is not None}, "step": 2, "val_loss": 3.5,
                    "config": {**SIZES, **(config or {})}, **changes}
        torch.save(contents, folder / "a.pt")
    return prepare


def llmc(where, value):
    """Writes a.bin, a small model of llm.c with another number at a place in its header."""
    def prepare(folder):
        with open(folder / "a.bin", "wb") as f:
            convert.write_llmc(GPT(GPTConfig(**SIZES)), f)
            f.seek(4 * where)
            f.write(struct.pack("<i", value))
    return prepare


def hf(text=None, weights=None, index=None, **changes):
    """Writes hf, a small Hugging Face model with changes to its config.json; or files with these contents (b"": no file)."""
    def prepare(folder):
        (folder / "hf").mkdir()
        config = {**json.loads(convert.config_files(GPTConfig(**SIZES), "float32")["config.json"]), "vocab_size": 16, **changes}
        (folder / "hf" / "config.json").write_text(json.dumps(config) if text is None else text)
        state_dict = hf_state_dict(GPT(GPTConfig(**SIZES)))
        files = {"model.safetensors": save_safetensors(state_dict | weights if isinstance(weights, dict) else state_dict)}
        files |= {"model.safetensors": weights} if isinstance(weights, bytes) else {}
        files |= {"model.safetensors": b"", "model.safetensors.index.json": index} if index is not None else {}
        for name, contents in files.items():
            if contents:
                (folder / "hf" / name).write_bytes(contents)
    return prepare


def written(name, contents=b"hello"):
    """Writes a file."""
    return lambda folder: (folder / name).write_bytes(contents)


def archive(compression, overlapping=False):
    """Writes a.pt, a zip archive of 20 MB of zeros; overlapping: its directory lists them a hundred times."""
    def prepare(folder):
        with zipfile.ZipFile(folder / "a.pt", "w", compression) as z:
            z.writestr("archive/data.pkl", bytes(20 << 20))
            if overlapping:
                z.filelist *= 100
    return prepare


def code(folder):
    with open(folder / "a.pt", "wb") as f:
        pickle.dump({"model": {}, "config": os.system}, f, protocol=2)


def cut(folder):
    contents = (folder / "run" / "model_00002.pt").read_bytes()
    (folder / "a.pt").write_bytes(contents[:len(contents) // 2])


def links(folder):
    """A checkpoint a.pt and a link to it, and a link to a file in a folder that does not exist."""
    pt()(folder)
    (folder / "link.pt").symlink_to("a.pt")
    (folder / "dangling.bin").symlink_to("missing/b.bin")


WTE, C_FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"
CONVERT = [
    # flags
    ([], "required"),
    (["exprt", "run", "x"], "invalid choice: 'exprt'"),
    (["export", "run"], "required: out"),
    (["export", "run", "x", "--dtype", "float16"], "invalid choice: 'float16'"),
    (["export", "run", "x", "--push", "not a name"], "not a name"),
    (["export", "run", "x", "--push", ""], "Repo id must"),
    # names
    (["info", ""], "the name of the checkpoint is empty"),
    (["export", "", "x"], "the name of the checkpoint is empty"),
    (["export", "run", ""], "'the empty name' is not the name of a file"),
    (["convert", "run", "", "--overwrite"], "'the empty name' is not the name of a file"),
    (["info", "nowhere/model"], "no checkpoint at nowhere/model"),
    (["info", "nobody/gpt2"], "hf download USER/NAME"),
    (["info", "shards"], "shards holds no checkpoint"),
    # what would be replaced
    (["export", "run", "shards"], "shards exists already"),
    (["export", "run", "."], ". exists already"),
    (["export", "run", ".", "--overwrite"], "README.md and no model.safetensors", written("README.md")),
    (["convert", "run", ".", "--overwrite"], "config.json and no model.safetensors", written("config.json")),
    (["export", "run", "run", "--overwrite"], "run is the source itself"),
    (["export", "run", "run/../run/", "--overwrite"], "run/../run/ is the source itself"),
    (["export", "run/model_00002.pt", "run", "--overwrite"], "run is a run folder"),
    (["convert", "run/model_00002.pt", "run/model_00002.pt", "--overwrite"], "model_00002.pt is the source itself"),
    (["convert", "run", "run/model_00002.pt", "--overwrite"], "would be a checkpoint of that run"),
    (["convert", "run", "run/state_00009.pt"], "would be a checkpoint of that run"),
    (["convert", "a.pt", "link.pt", "--overwrite"], "link.pt is the source itself", links),
    (["convert", "run", "a.pt"], "a.pt exists already", pt()),
    (["convert", "run", "a.bin"], "a.bin exists already", llmc(0, 0)),
    (["export", "run", "notes"], "notes exists already", written("notes")),
    (["export", "run", "notes", "--overwrite"], "notes is not a folder", written("notes")),
    (["export", "hf", "hf/.", "--overwrite"], "is the source itself", hf()),
    # where nothing can be written
    (["convert", "run", "in.txt"], ".txt is not a format to write"),
    (["convert", "run", "x.gguf"], ".gguf is not a format to write"),
    (["export", "run", "x.onnx"], ".onnx is not a format to write; give a folder"),
    (["export", "run", "x.bin"], ".bin is not a format to write"),
    (["convert", "run", "x.PT"], ".PT is not a format to write"),
    (["convert", "run", "x.safetensors"], "give a folder"),
    (["convert", "run", "missing/a.pt"], "missing is not an existing folder"),
    (["export", "run", "missing/x"], "missing is not an existing folder"),
    (["convert", "run", "in.txt/a.bin"], "in.txt is not an existing folder"),
    (["convert", "run", "dangling.bin"], "missing is not an existing folder", links),
    (["export", "run", "/dev/full"], "/dev/full is not a folder"),
    (["convert", "run", "x.pt", "--dtype", "bfloat16"], "our own files are float32"),
    (["export", "a.pt", "x"], "GPT-2's tokenizer does not fit it", pt()),
    # files of other kinds
    (["info", "in.txt"], "it is not a checkpoint"),
    (["info", "a.pt"], "it is not a checkpoint", written("a.pt", b"")),
    (["info", "fifo"], "fifo is not a regular file", lambda folder: os.mkfifo(folder / "fifo")),
    (["info", "/dev/zero"], "/dev/zero is not a regular file"),
    (["info", "run/state_00002.pt"], "state_00002.pt is not a model checkpoint"),
    (["info", "a.pt"], "it is truncated, damaged", cut),
    (["info", "a.pt"], "its entries are compressed or overlap", archive(zipfile.ZIP_DEFLATED)),
    (["info", "a.pt"], "its entries are compressed or overlap", archive(zipfile.ZIP_STORED, True)),
    (["info", "a.pt"], "it contains posix.system, not only tensors and plain values, and could run code", code),
    (["info", "a.pt"], "not a checkpoint (UnpicklingError: Unsupported operand", written("a.pt", pickle.dumps([]))),
    # damaged checkpoints: sizes
    (["info", "a.pt"], "n_layer=1000000000 and", pt({"n_layer": 10**9})),
    (["export", "a.pt", "x"], "do not fit this model", pt({"n_embd": 10**9 + 7, "n_head": 1})),
    (["info", "a.pt"], "n_head that fit: [1]", pt({"n_embd": 10**9 + 7})),
    (["info", "a.pt"], "n_embd=8 is not a multiple of n_head=1152921504606846976", pt({"n_head": 2**60})),
    (["info", "a.pt"], "8,796,093,023", pt({"vocab_size": 2**40})),
    (["info", "a.pt"], "transformer.wpe.weight (8, 8) for (9, 8)", pt({"block_size": 9})),
    (["info", "a.pt"], "more than are stored", pt({"vocab_size": 2**40}, {WTE: torch.zeros(1, 8).expand(2**40, 8)})),
    # damaged checkpoints: types
    (["info", "a.pt"], "n_layer=1.0: must be an integer", pt({"n_layer": 1.0})),
    (["info", "a.pt"], "n_layer=True: must be an integer", pt({"n_layer": True})),
    (["info", "a.pt"], "block_size='8': must be an integer", pt({"block_size": "8"})),
    (["info", "a.pt"], "bias=1: must be true or false", pt({"bias": 1})),
    (["info", "a.pt"], "dropout=nan: must be at least 0", pt({"dropout": float("nan")})),
    (["info", "a.pt"], "it has rope", pt({"rope": True})),
    (["info", "a.pt"], "is not a GPTConfig", pt(**{"config": None, "model_args": [1]})),
    (["info", "a.pt"], '"model" in a.pt is not a state dict', pt(model=[torch.zeros(2)])),
    (["info", "a.pt"], "1,080 parameters, they are 1 tensors with 2", pt(model={1: torch.zeros(2)})),
    (["info", "a.pt"], "do not fit this model: 1 ", pt(weights={1: torch.zeros(2)})),
    (["info", "a.pt"], "h of a.pt is {'weight': tensor", pt(model={"h": {"weight": torch.zeros(2)}})),
    (["info", "a.pt"], "wte.weight of a.pt is torch.int64", pt(weights={WTE: torch.zeros(16, 8, dtype=int)})),
    (["info", "a.pt"], "c_fc.weight of a.pt is torch.complex64", pt(weights={C_FC: torch.zeros(32, 8, dtype=torch.complex64)})),
    (["info", "a.pt"], "torch.sparse_coo", pt(weights={C_FC: torch.zeros(32, 8).to_sparse()})),
    (["info", "a.pt"], "on meta", pt(weights={WTE: torch.empty(16, 8, device="meta")})),
    (["info", "a.pt"], "c_fc.weight (1, 32, 8) for (32, 8)", pt(weights={C_FC: torch.zeros(1, 32, 8)})),
    (["info", "a.pt"], "differ (an untied lm_head)", pt(weights={"lm_head.weight": torch.zeros(16, 8)})),
    (["info", "a.pt"], "do not fit this model: transformer.wpe.weight", pt(weights={"transformer.wpe.weight": None})),
    (["info", "a.pt"], "\"val_loss\" in a.pt is '3.5', expected a number", pt(val_loss="3.5")),
    (["info", "a.pt"], '"val_loss" in a.pt is [3.5]', pt(val_loss=[3.5])),
    (["info", "a.pt"], r'"step" in a.pt is', pt(step="7\x1b[31m")),
    # llm.c
    (["info", "a.bin"], "it starts with [20240520]", llmc(0, 20240520)),
    (["info", "a.bin"], "version 4 of llm.c", llmc(1, 4)),
    (["info", "a.bin"], "block_size=-1: must be an integer", llmc(2, -1)),
    (["info", "a.bin"], "it is truncated or damaged", llmc(4, 2**31 - 1)),
    (["info", "a.bin"], "padded_vocab_size -5", llmc(7, -5)),
    (["info", "a.bin"], "it starts with []", written("a.bin", b"")),
    # Hugging Face
    (["info", "hf"], "it lacks 'n_embd'", hf("{\"n_positions\": 8, \"vocab_size\": 16, \"n_layer\": 1, \"n_head\": 1}")),
    (["info", "hf"], "is not the config.json of a GPT-2: 'list' object", hf("[]")),
    (["info", "hf"], "is not the config.json of a GPT-2: Expecting", hf("{")),
    (["info", "hf"], "n_layer=None: must be an integer", hf(n_layer=None)),
    (["info", "hf"], "n_layer=1.0: must be an integer", hf(n_layer=1.0)),
    (["info", "hf"], "block_size=16.5: must be an integer", hf(n_positions=16.5)),
    (["info", "hf"], "activation_function='relu', GPT-2 has 'gelu_new'", hf(activation_function="relu")),
    (["info", "hf"], "model_type='llama', GPT-2 has 'gpt2'", hf(model_type="llama")),
    (["info", "hf"], "says 872,000,000,208 parameters", hf(n_layer=10**9)),
    (["export", "hf", "x"], "says 8,796,093,023,", hf(vocab_size=2**40)),
    (["info", "hf"], "model.safetensors is truncated or damaged", hf(weights=b"version https://git-lfs.github.com/spec/v1")),
    (["info", "hf"], "(1, 8, 32) for (32, 8)", hf(weights={C_FC: torch.zeros(1, 8, 32)})),
    (["info", "hf"], "model.safetensors.index.json is not", hf(index=b"{}")),
    (["info", "hf"], "hf has no b.safetensors", hf(index=b'{"weight_map": {"a": "../b.safetensors"}}')),
    (["info", "model.safetensors"], "model.safetensors lacks its config.json", written("model.safetensors")),
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
    ([], "required: BENCHMARK"),
    (["trian"], "invalid choice: 'trian'"),
    (["train", "--steps", "0"], "--steps 0: must be an integer, 1 or more"),
    (["train", "--batch_size", "-1"], "--batch-size -1: must be an integer, 0 or more"),
    (["train", "--size", "gpt4"], "unknown model size 'gpt4'"),
    (["ladder", "--ranks", "20000"], "--ranks 20000: must be an integer, 0 or more and at most"),
    (["train", "--device", "tpu"], "device 'tpu' is not available"),
    (["train", "--dtype", "int8"], "unknown dtype 'int8'"),
    (["all", "--data", "in.txt"], "all takes no --data"),
    (["train", "--data", "in.txt"], "train takes no --data"),
    (["tokenize", "--data", "nowhere"], "no data at 'nowhere'"),
    (["train", "--json", "run"], "'run' is not the name of a file"),
    (["train", "--json", "missing/a.json"], "missing is not an existing folder"),
    (["ladder", "--picture", "missing/a.png"], "missing is not an existing folder"),
    (["ladder", "--picture", "a.pdf"], "--picture a.pdf: only ladder draws one, into a file named *.png"),
    (["train", "--picture", "a.png"], "--picture a.png: only ladder draws one"),
    (["train", "--compare", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
    (["train", "--compare", "in.txt"], "in.txt is not a file that --json wrote"),
    (["train", "--compare", "run/config.json"], "run/config.json is not a file that --json wrote (KeyError('benchmarks')"),
]


@pytest.mark.parametrize("row", BENCH, ids=ids(BENCH))
def test_bench(row, template, tmp_path, monkeypatch, capfd):
    check("bench.__main__", row, template, tmp_path, monkeypatch, capfd)
