"""
Bad input to every script: one line that says what is wrong, exit status 2, and nothing written or
removed.

    .venv/bin/python -m pytest tests/test_bad_input.py

Each row is a command line, a part of its message, and optionally functions that prepare the folder
it runs in. The scripts run in this process, through the main and run_main of the command line, in
a copy of the same folder:

    in.txt         60 kB of text            run/          a run of a tiny model, one checkpoint
    hella.jsonl    one HellaSwag example    shards/       what fineweb.py made of in.txt
"""
import atexit
import contextlib
import gzip
import importlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from run import cli
import convert
from run import files
from common import TINY
from convert import hf_state_dict
from model import GPT, GPTConfig
from run.prepare import prepare_data

TIMEOUT = 20      # seconds that a command may take
MEMORY = 2 << 30  # bytes of address space that a command may add
EXAMPLE = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "label": 3,
    "endings": ["is using wrap.", "is ripping.", "is one.", "is."],
}


def run(script, arguments, monkeypatch):
    """Exit status of a script's main with these arguments, in this process; a run folder is
    unlocked at its end."""
    unlocks = []
    register = atexit.register

    def register_or_unlock(function, *args, **kwargs):
        if function.__module__ == "contextlib":  # the ExitStack of folder.lock_run
            unlocks.append(function)
        else:
            register(function, *args, **kwargs)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(arguments)])
    monkeypatch.setattr(atexit, "register", register_or_unlock)
    with pytest.raises(SystemExit) as end:
        cli.run_main(importlib.import_module(script).main)
        sys.exit(0)
    for unlock in unlocks:
        unlock()
    return end.value.code or 0


TINY_RUN = shlex.join(TINY) + " --data in.txt"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The folder described above."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "in.txt").write_text("To be, or not to be, that is the question.\n\n" * 1400)
    (folder / "hella.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.chdir(folder):
        training = f"{TINY_RUN} --log-dir . --exp-name run --max-steps 2"
        assert run("train_gpt2", training, monkeypatch) == 0
        os.mkdir("texts")
        for i in range(20):
            shutil.copy("in.txt", f"texts/{i}.txt")
        tokenizing = "--input texts --out shards --shard-size 100000 --workers 1"
        assert run("fineweb", tokenizing, monkeypatch) == 0
        shutil.rmtree("texts")
        shutil.rmtree(".tokens")
    return folder


@pytest.fixture(scope="module")
def tokenized(template, tmp_path_factory):
    """The same folder with the tokens of in.txt, which training writes before it reads the
    checkpoint's state."""
    folder = tmp_path_factory.mktemp("tokenized") / "here"
    shutil.copytree(template, folder, symlinks=True)
    with contextlib.chdir(folder):
        prepare_data("in.txt")
    return folder


@contextlib.contextmanager
def limits():
    """Context in which more than TIMEOUT seconds raise, and MEMORY more bytes of address space
    cannot be allocated."""
    def expired(*_):
        raise AssertionError(f"not finished after {TIMEOUT} s")
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    old_handler = signal.signal(signal.SIGALRM, expired)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    signal.alarm(TIMEOUT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def contents(folder):
    """{path: (size, modification time, is a link)} of everything below a folder, hidden files
    included."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            facts = status.st_size, status.st_mtime_ns, os.path.islink(path)
            found[os.path.relpath(path, folder)] = facts
    return found


@pytest.fixture
def check(template, tmp_path, monkeypatch, capfd):
    """A function that runs a script's row and asserts what the module's docstring says."""
    def run_row(script, row, template=template):
        arguments, message, *prepare = row
        folder = tmp_path / "here"
        shutil.copytree(template, folder, symlinks=True)
        monkeypatch.chdir(folder)
        for function in prepare:
            function(folder)
        before = contents(folder)
        capfd.readouterr()
        with limits():
            status = run(script, arguments, monkeypatch)
        err = capfd.readouterr().err
        assert status == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
        after = contents(folder)
        for name in before.keys() | after.keys():
            # a folder's own entry changes when a temporary file in it is created and removed
            if not (name in before and (folder / name).is_dir()):
                assert before.get(name) == after.get(name), name
    return run_row


# -----------------------------------------------------------------------------
# what a row does to the folder: functions of the folder

def write(name, contents):
    """Writes a file, text or bytes, and the folder it is in."""
    def prepare(folder):
        os.makedirs((folder / name).parent, exist_ok=True)
        as_bytes = contents if isinstance(contents, bytes) else contents.encode()
        (folder / name).write_bytes(as_bytes)
    return prepare


def write_with(name, change):
    """Replaces the bytes of a file by change(bytes)."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def break_file(name):
    """Cuts a file in half."""
    return write_with(name, lambda contents: contents[:len(contents) // 2])


def remove(name):
    return lambda folder: os.remove(folder / name)


def parquet(values, kind=None):
    """Writes a.parquet with one column, text."""
    def prepare(folder):
        import pyarrow as pa
        import pyarrow.parquet
        table = pa.table({"text": pa.array(values, kind)})
        pyarrow.parquet.write_table(table, folder / "a.parquet")
    return prepare


def manifest(**changes):
    """Changes fields of shards/manifest.json."""
    return write_with("shards/manifest.json",
                      lambda old: json.dumps({**json.loads(old), **changes}).encode())


def shard(**changes):
    """Changes fields of the first shard in shards/manifest.json."""
    def change(old):
        contents = json.loads(old)
        contents["shards"][0].update(changes)
        return json.dumps(contents).encode()
    return write_with("shards/manifest.json", change)


def state(change):
    """Changes the contents of the run's state file: change(contents)."""
    def prepare(folder):
        path = folder / "run" / "state_00002.pt"
        contents = torch.load(path)
        change(contents)
        torch.save(contents, path)
    return prepare


held = []


def lock_shards(folder):
    """Holds the lock of shards/, as a running fineweb.py does, until the next call."""
    held[:] = [files.lock(folder / "shards" / ".lock")]


def npy(array):
    """Bytes of a .npy file."""
    f = io.BytesIO()
    np.save(f, array)
    return f.getvalue()


def npy_with_header(header):
    """Bytes of a .npy file without data."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def llmc_shard(*header):
    """Bytes of a .bin file of llm.c with this header and two tokens."""
    return np.array([*header] + [0] * (256 - len(header)), dtype="<i4").tobytes() + bytes(4)


SIZES = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)


def pt(config=None, weights=None, **changes):
    """Writes a.pt, a small model, with changes to its config, tensors and other fields."""
    def prepare(folder):
        contents = {
            "model": {**GPT(GPTConfig(**SIZES)).state_dict(), **(weights or {})},
            "config": {**SIZES, **(config or {})},
            "step": 2,
            "val_loss": 3.5,
            **changes,
        }
        torch.save(contents, folder / "a.pt")
    return prepare


def llmc_model(where, value):
    """Writes a.bin, a small model of llm.c with another number at a place in its header."""
    def prepare(folder):
        with open(folder / "a.bin", "wb") as f:
            convert.write_llmc(GPT(GPTConfig(**SIZES)), f)
            f.seek(4 * where)
            f.write(struct.pack("<i", value))
    return prepare


def hf(**changes):
    """Writes hf, a small Hugging Face model with changes to its config.json."""
    def prepare(folder):
        (folder / "hf").mkdir()
        config = json.loads(convert.config_files(GPTConfig(**SIZES), "float32")["config.json"])
        config |= {"vocab_size": 16, **changes}
        (folder / "hf" / "config.json").write_text(json.dumps(config))
        state_dict = save_safetensors(hf_state_dict(GPT(GPTConfig(**SIZES))))
        (folder / "hf" / "model.safetensors").write_bytes(state_dict)
    return prepare


def compressed(folder):
    """Writes a.pt, a zip archive of 20 MB of zeros."""
    with zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(20 << 20))


GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"  # of a clone without it
NOT_A_RUNS_CONFIG = '{"model_type": "gpt2", "n_layer": 12}'

# -----------------------------------------------------------------------------
# train_gpt2.py; each row's flags come last, so they win over TINY_RUN's

TRAIN = [
    # what an unset shell variable gives, and what leaves --log-dir
    *((f"--exp-name '{name}'", f"--exp-name '{name}': must be the name of a folder, not empty")
      for name in ("", "..", "a/b")),
    ("--log-dir in.txt", "in.txt"),
    ("--data ''", "--data '': must not be empty"),
    # settings
    ("--epochs 2 --max-steps 3", "--epochs and --max-steps both set the length"),
    ("--optimizer sgd", "--optimizer invalid choice: 'sgd'"),
    ("--learning_rate 1", "unknown flag --learning-rate: did you mean --lr?"),
    ("config/train_shakespeare_char.py",
     "unrecognized arguments: config/train_shakespeare_char.py"),
    # evaluation
    ("--eval-only --data shards", "--eval-only: there is no checkpoint in log/shakespeare"),
    ("--eval-only --init-from run --data shards --hella-every 9 --hellaswag in.txt", "line 1"),
    # a run that exists
    ("--resume nowhere", "--resume nowhere: there is no run with a checkpoint"),
    ("--resume run/model_00002.pt", "is a file: give its folder"),
    ("--resume run --exp-name run", "--resume run names the run: omit --exp-name"),
    ("--resume never --log-dir . --exp-name run", "./run already holds a run"),
    ("--resume run --n-layer 2", "n_layer cannot change when a run resumes"),
    ("--resume run --seed 1 --shuffle off",
     "changing seed, shuffle makes it a different run; --force resumes anyway"),
    *((f"--data shards --dry-run {flags}", message) for flags, message in [
        ("--epochs 0.00001", "are less than one step of 128"),
        # settings that do not fit together
        ("--val-tokens 8", "--val-tokens 8 is less than one sequence of 16"),
        ("--n-head 3",
         "n_embd=16 is not a multiple of n_head=3; n_head that fit: [1, 2, 4, 8, 16]"),
        ("--total-batch-size 100", "--total-batch-size 100 is not a multiple of --block-size 16"),
        ("--optimizer muon --parallel fsdp", "--parallel fsdp cannot shard muon"),
        ("--vocab-size 100", "allowed are ids below 100"),
        ("--vocab-size 100 --sample-every 1", "GPT-2's 50257 tokens, the vocabulary has 100"),
        ("--block-size 99999 --total-batch-size 99999 --val-tokens 99999",
         "too few for one sequence"),
        ("--device tpu", "device 'tpu' is not available"),
        # weights
        ("--init-from nowhere.pt", "no checkpoint at nowhere.pt"),
        ("--init-from run --init lecture", "--init lecture is for random weights, and --init-"),
        ("--init-from run --n-layer 2", "--init-from's weights have n_layer=1: omit these flags"),
        ("--init-from run --block-size 32", "--block-size 32 is over the 16 positions of")]),
]

# a run whose files are damaged, resumed with the settings in its checkpoint
DAMAGED = [
    ("config.json is not the config.json of a run", write("run/config.json", "{")),
    ("config.json is not the config.json of a run", write("run/config.json", NOT_A_RUNS_CONFIG)),
    ("cannot load ./run/state_00002.pt: it is truncated, damaged or not a checkpoint",
     write("run/state_00002.pt", "404: Not Found")),
    ("no checkpoint in ./run can be loaded (skipping step 2: cannot load ./run/model_00002.pt",
     break_file("run/model_00002.pt")),
    ("state_00002.pt does not exist", remove("run/state_00002.pt")),
    ("state_00002.pt is not the state file of step 2",
     state(lambda contents: contents.update(step=3))),
    ("trained on other data", state(lambda contents: contents["loader"].update(fingerprint="0"))),
]

VAL = "shards/shards_val_000000.npy"
TOKENS = np.arange(5000, dtype=np.uint16)
UNLISTED = remove("shards/manifest.json")  # shards without a manifest, as build-nanogpt's
BIN = write("bin/x_val_000000.bin", llmc_shard(20240520, 1, 2))
JSON = '{"text": "a document"}\n'
DATA = [  # of train_gpt2.py
    ("nowhere", "no data at nowhere"),
    # text
    ("a.txt", "a.txt is empty: there is nothing to train on", write("a.txt", b"\xef\xbb\xbf")),
    ("a.txt", "byte 0xe9 in position 3", write("a.txt", "caf\u00e9".encode("latin-1"))),
    ("a.txt", "a.txt is not UTF-8 text", write("a.txt", "plain text".encode("utf-16-le"))),
    ("a.txt", "whitespace characters from character", write("a.txt", "a b" + " " * 2_000_000)),
    ("/dev/stdin", "/dev/stdin is not a regular file"),
    ("texts", "texts holds neither shards", write("texts/a.md", "text")),
    *((name, f"{name} is not plain text; create shards with",
       write(name, JSON)) for name in ("a.JSON", "a.parquet", "a.txt.gz", "a.csv")),
    (VAL, f"{VAL} is a single shard; --data takes the folder"),
    # folders of shards
    ("shards", "shards is incomplete: fineweb.py is still running or was interrupted",
     manifest(complete=False)),
    ("shards", "holds 1 shards that no manifest.json lists (x_train_000009.bin",
     write("shards/x_train_000009.bin", "")),
    ("shards", "it was removed or replaced", write(VAL, npy(TOKENS))),
    ("shards", "shards/manifest.json is damaged", write("shards/manifest.json", "[]")),
    ("shards", "the shard {", shard(split="test")),
    ("shards", "shards has no shard named *_val_NNNNNN", UNLISTED, remove(VAL)),
    ("char", "char holds nanoGPT's character-level data (meta.pkl)",
     write("char/train.bin", bytes(9000)), write("char/val.bin", bytes(9000)),
     write("char/meta.pkl", b"cos\nsystem\n(S'touch owned'\ntR.")),
    # contents
    *(("shards", message, UNLISTED, write(VAL, contents)) for contents, message in [
        (GIT_LFS, "is a Git LFS pointer, not the file itself"),
        (npy_with_header("{'descr': '<u2', 'shape': (("), "is not a valid .npy file"),
        (npy(TOKENS.astype(">u2")), "holds >u2 of shape (5000,)"),
        (npy(np.array([os.system], dtype=object)), "holds object of shape (1,)"),
        (npy(TOKENS)[:-1], "it is truncated")]),
    ("shards", "has the id 56024 among its tokens", UNLISTED,
     lambda folder: [path.unlink() for path in (folder / "shards").glob("*_train_*")],
     write("shards/x_train_000001.npy", npy(TOKENS + 55001))),
    *(("bin", message, BIN, write("bin/x_train_000001.bin", contents)) for contents, message in [
        (llmc_shard(20240520, 1, 3), "should hold 3 tokens"),
        (llmc_shard(20240521, 1, 2), "has no valid llm.c header"),
        (b"short", "has no valid llm.c header")]),
]

# -----------------------------------------------------------------------------
# fineweb.py

NEW = "--out new"
IN = f"--input in.txt {NEW}"
AGAIN = "--input in.txt --out shards"
LINES = f"--input a.jsonl {NEW}"
PARQUET = f"--input a.parquet {NEW}"
FINEWEB = [
    # flags
    ("--input in.txt", "--out is missing"),
    ("--input in.txt --out ''", "--out is missing"),
    (f"{IN} --shard-size 1e12", "out of memory: Unable to allocate 1.82 TiB"),
    (f"{IN} --val-tokens 1M", "no tokens are left for the train split: all 21,000 are in"),
    (f"{IN} --val first-shard --val-tokens 5", "--val first-shard takes the first"),
    (f"--dataset a/b/c --name x {NEW}", "Repo id"),
    # the output folder
    ("--input in.txt --out in.txt", "in.txt is not a folder; choose another --out"),
    ("--input in.txt --out /proc/new", "cannot write in /proc/new (No such file or directory)"),
    ("--input nowhere --out x/y/z", "no input at nowhere"),
    (AGAIN, "shards is in use by another fineweb.py", lock_shards),
    (IN, "new holds 1 shards that no manifest.json lists (mine_train_000001.npy",
     write("new/mine_train_000001.npy", "mine")),
    (LINES, "new/new_val_000000.npy exists already and is not the shard to be written there",
     write("a.jsonl", 20 * JSON), write("new/new_val_000000.npy", npy(TOKENS))),
    # the manifest of an earlier run
    (AGAIN, "created with other flags or from another source: shard_size was 100000, is 1"),
    (AGAIN, "shards/manifest.json is damaged", write("shards/manifest.json", "")),
    (IN, "new/manifest.json is damaged", write("new/manifest.json", '{"files": ["mine"]}')),
    (AGAIN, "its format version is 2, supported is 1", manifest(version=2)),
    # --verify
    ("--verify nowhere", "no shards (*_train_000001.npy or .bin) in 'nowhere'"),
    ("--verify shards", "_val_000000.npy has changed: sha256 was", shard(sha256="0" * 64)),
    ("--verify shards", "shards_val_000000.npy has no tokens, but", remove(VAL)),
    ("--verify shards", "has the id 65535", write_with(VAL, lambda old: old[:-2] + b"\xff\xff")),
    # the input
    (f"--input texts texts/a.txt {NEW}", "--input texts/a.txt is given twice",
     write("texts/a.txt", "text")),
    (f"--input texts {NEW}", "--input texts: no file of a supported format",
     write("texts/a.csv", "text")),
    (f"--input texts {NEW}", "No such file or directory: 'texts/b.txt'",
     write("texts/a.txt", "text"), lambda folder: os.symlink("nowhere", folder / "texts/b.txt")),
    (f"--input a.txt {NEW}", "the source contains no text", write("a.txt", b"\xef\xbb\xbf")),
    # other encodings were called damage
    *((f"--input {name} {NEW}", f"{name} is not UTF-8 text (", write(name, contents))
      for name, contents in [
        ("a.txt", "text".encode("utf-16")), ("a.txt", "text".encode("utf-16-le")),
        ("a.txt", b"text " * 99 + "caf\u00e9".encode("latin-1")),
        ("a.jsonl", JSON.encode("utf-16-be")),
        ("a.jsonl", (JSON + '{"text": "caf\u00e9"}').encode("latin-1")),
        ("a.json", '[{"text": "caf\u00e9"}]'.encode("latin-1"))]),
    *((LINES, message, write("a.jsonl", contents)) for contents, message in [
        (JSON + "[1, 2]\n", "row 2 of a.jsonl is not a JSON object"),
        (JSON + '{"text": "cut', "row 2 of a.jsonl is damaged or truncated (Unterminated"),
        (JSON + '{"text":' * 100_000, "recursion"),
        (f"[{JSON},{JSON[:-3]}", "a.jsonl is damaged or truncated (Unterminated string"),
        ("[]", "contains no text"),
        # all but the first line was dropped
        (f"[{JSON}]\n[{JSON}]\n", "a.jsonl is damaged or truncated (text follows the array"),
        (GIT_LFS, "a.jsonl is a Git LFS pointer, not the file itself"),
        ('{"body": "a"}\n', "has no column 'text'; it has body"),
        ('{"text": null}\n{"text": ["a"]}\n{"text": {"text": "a"}}\n\n', "contains no text")]),
    (f"--input a.txt.gz {NEW}", "Truncated compressed stream",
     write("a.txt.gz", gzip.compress(b"text " * 99)[:-9])),
    (f"--input a.txt.gz {NEW}", "a.txt.gz is damaged or truncated (it has no bytes)",
     write("a.txt.gz", "")),
    (f"--input a.jsonl.zst {NEW}", "a.jsonl.zst is damaged or truncated (",
     write("a.jsonl.zst", b"\x28\xb5\x2f\xfdx")),
    (PARQUET, "a.parquet is damaged or truncated (", parquet(["a"]), break_file("a.parquet")),
    (PARQUET, "column 'text' of a.parquet holds list<", parquet([["a"], ["b"]])),
    (f"{PARQUET} --text-column body", "no column 'body'; it has", parquet(["a"])),
    (PARQUET, "the source contains no text", parquet([None, ""], "string")),
]

# -----------------------------------------------------------------------------
# hellaswag.py


def hella(contents, message, name="bad.jsonl"):
    """The row of a file of examples."""
    return f"run --data {name}", message, write(name, contents)


def changed(**changes):
    """A line with a changed example; a value of None removes the field."""
    example = {name: value for name, value in {**EXAMPLE, **changes}.items() if value is not None}
    return json.dumps(example) + "\n"


LINE = json.dumps(EXAMPLE).encode() + b"\n"
GZIP = gzip.compress(LINE * 200, mtime=0)
HELLASWAG = [
    ("--data hella.jsonl", "name a model to score: "),
    ("run --data hella.jsonl --out run", "'run' is not the name of a file to write"),
    # --data
    ("run --data nowhere.jsonl", "no HellaSwag examples at nowhere.jsonl"),
    ("run --data run", "Is a directory: 'run'"),
    ("run --data in.txt", "cannot read HellaSwag examples from in.txt, line 1"),
    hella("\n \n", "bad.jsonl has no examples"),
    hella(LINE * 2 + b"[1, 2]\n", "line 3: an example must be a JSON object with activity_label"),
    hella(LINE + LINE[:50], "line 2: Unterminated string"),
    hella(LINE.replace(b"roof", b"r\xffof"), "line 1: 'utf-8' codec can't decode byte 0xff"),
    hella(GZIP[:100], "bad.gz, line 0: Compressed file ended", "bad.gz"),
    hella(GZIP[:-8] + b"\0" * 8, "bad.gz, line 200: CRC check failed", "bad.gz"),
    hella(GZIP[:40] + b"\xff" * 20 + GZIP[60:], "examples from bad.gz, line", "bad.gz"),
    hella(changed(endings="abcd"), "endings must be a list of four strings"),
    hella(changed(endings=["a", "b", "c"]), "endings must be a list of four strings"),
    hella(changed(label=4), "label is '4', it must be 0, 1, 2 or 3"),
    hella(changed(label=""),
          "label is '', it must be 0, 1, 2 or 3; the test split, whose labels are"),
    hella(changed(label=None), "a JSON object with activity_label, ctx, endings, label"),
    # the model
    ("a.pt --data hella.jsonl", "a.pt has NaN or infinite weights: transformer.ln_f.bias",
     pt(weights={"transformer.ln_f.bias": torch.full((8,), float("nan"))})),
    ("a.pt --data hella.jsonl", "a.pt has a vocabulary of 16 tokens, not GPT-2's 50257", pt()),
    ("run --data hella.jsonl", "an ending of 40 tokens; this model's block_size is only 16",
     write("hella.jsonl", changed(endings=["a", "b", "c", "b" + " d" * 39]))),
]

# -----------------------------------------------------------------------------
# the other scripts

SAMPLE = [
    ("run --device gpu", "device 'gpu' is not available"),
    ("run --dtype fp16", "unknown dtype 'fp16'"),
    *((f"run {flag} 5", f"unknown flag {flag}: did you mean {ours}?") for flag, ours in [
        ("--start", "--prompt"), ("--max-tokens", "--max-new-tokens"),
        ("--tokens", "--max-new-tokens")]),
    # prompts
    ("run 'To be'", "unexpected 'To be': a prompt is given as --prompt 'To be'"),
    ("run --prompt a --prompt-file in.txt", "give only one of --prompt, --prompt-f"),
    ("run --prompt '' -", "give only one of --prompt"),
    ("run --prompt a\udcffb", "not valid Unicode at character 2"),
    ("run --prompt-file nowhere.txt", "No such file or directory: 'nowhere.txt'"),
    ("run --prompt-file utf16.txt", "utf16.txt is not valid UTF-8 at byte 1",
     write("utf16.txt", "To be".encode("utf-16"))),
    # the model
    ("nowhere", "no checkpoint at nowhere"),
    ("''", "the name of the checkpoint is empty"),
    ("shards", "shards holds no checkpoint"),
    ("run/state_00002.pt", 'it lacks "model"'),
    ("a.pt", "a.pt has NaN or infinite weights: transformer.ln_f.bias",
     pt(weights={"transformer.ln_f.bias": torch.full((8,), float("inf"))})),
    ("a.pt", "a.pt has a vocabulary of 16 tokens, not GPT-2's 50257", pt()),
]

HF_FILE = "hf/model.safetensors"
INDEX = "hf/model.safetensors.index.json"
LARGER = GPT(GPTConfig(**{**SIZES, "n_layer": 2})).state_dict()
CONVERT = [
    ("", "required"),
    # the source
    ("info nobody/gpt2", "hf download USER/NAME"),
    ("info /dev/zero", "/dev/zero is not a regular file"),
    ("info model.safetensors", "model.safetensors lacks its config.json",
     write("model.safetensors", "hello")),
    # the output
    ("export run shards", "shards exists already; --overwrite"),
    ("convert run x.gguf", "x.gguf: .gguf is not a format to write; give X.pt, X.bin, or"),
    ("convert run missing/a.pt", "cannot write missing/a.pt: [Errno 2] No such file"),
    # files of torch.save
    ("info in.txt", "cannot load in.txt: it is truncated, damaged or not a checkpoint"),
    ("info run/model_00002.pt", "it is truncated, damaged or", break_file("run/model_00002.pt")),
    ("info a.pt", "archive/data.pkl is compressed, or a folder", compressed),
    ("info a.pt", "it contains posix.system, not only tensors and plain values, and could run"
     " code", pt(optimizer=os.system)),
    ("info a.pt", "a.pt is not a state dict of a GPT-2: it has other values than tensors, epoch",
     pt(weights={"epoch": 3})),
    ("info a.pt", "the config in a.pt is not of a GPT-2: n_embd=8 is not a", pt({"n_head": 3})),
    ("info a.pt", "the config in a.pt is not of a GPT-2: argument of type", pt(model_args=5)),
    ("info a.pt", "transformer.wpe.weight (8, 8) for (9, 8)", pt({"block_size": 9})),
    ("info a.pt", "the checkpoint may have another n_layer", pt(model=LARGER)),
    ("info a.pt", "expected 872,000,000,208 parameters, found", pt({"n_layer": 10**9})),
    ("info a.pt", "of a.pt differ (an untied lm_head)",
     pt(weights={"lm_head.weight": torch.zeros(16, 8)})),
    # llm.c
    ("info a.bin", "it starts with [20240520]", llmc_model(0, 20240520)),
    ("info a.bin", "version 4 of llm.c", llmc_model(1, 4)),
    ("info a.bin", "block_size=-1: must be an integer", llmc_model(2, -1)),
    ("info a.bin", "a.bin is truncated or damaged: expected", llmc_model(4, 2**31 - 1)),
    # Hugging Face
    ("info hf", "is not the config.json of a GPT-2: 'list' object", hf(),
     write("hf/config.json", "[]")),
    ("info hf", "n_layer=None: must be an integer", hf(n_layer=None)),
    ("info hf", "activation_function='relu', GPT-2 has 'gelu_new'", hf(activation_function="relu")),
    ("info hf", "model.safetensors is truncated or damaged", hf(), write(HF_FILE, "hello")),
    ("info hf", "model.safetensors.index.json is not", hf(), remove(HF_FILE), write(INDEX, "{}")),
    ("info hf", "hf has no b.safetensors", hf(), remove(HF_FILE),
     write(INDEX, '{"weight_map": {"a": "b.safetensors"}}')),
    # pointers of Git LFS
    *((f"info {name.partition('/')[0]}", f"{name} is a Git LFS pointer, not the file itself; get",
       hf(), write("hf/merges.txt", ""), write(name, GIT_LFS))
      for name in (HF_FILE, "hf/vocab.json", "a.pt", "a.bin")),
]

PLOTS = [
    ("shards", "shards has no log.txt"),
    ("run run", "got 2 sources; name their common picture"),
    ("run run --verdict", "got 2 sources; --weights and --verdict take one"),
    ("run --out shards", "'shards' is not the name of a file"),
    ("run --out x.doc", "Format 'doc' is not supported"),
    ("run --prompt a", "--prompt is the text of the attention pictures: add --weights"),
    ("--weights nowhere", "nowhere is not a folder; name a folder for the pictures"),
    ("--weights run --out in.txt", "File exists: 'in.txt'"),
    ("run --reference shards", "--reference shards: must be the name of a published"),
    ("run --reference", "no published curve fits run: the data, in.txt, are not known"),
    ("run --reference --by hours", "the hours of --reference's curve are not known"),
    ("run", "has no losses yet", write("run/log.txt", "0 train 3")),
    ("run", "has no losses yet", write("run/log.txt", "0 train nan\n1 lr 0.1\n")),
    ("run --by hours", "hours need tok_per_sec",
     write("run/log.txt", "0 train 3.5\n1 train 3.25\n")),
    ("run --by tokens", "--by tokens needs total_batch_size",
     write("run/config.json", '{"config": {}}')),
]

BENCH = [
    ("trian", "invalid choice: 'trian'"),
    ("train --size gpt4", "unknown model size 'gpt4'"),
    ("train --device tpu", "device 'tpu' is not available"),
    ("train --json run", "'run' is not the name of a file"),
    ("ladder --picture missing/a.png", "missing is not an existing folder"),
    ("train --compare nowhere.json", "No such file or directory: 'nowhere.json'"),
    ("train --compare in.txt", "in.txt is not a file that --json wrote"),
    ("train --compare run/config.json",
     "run/config.json is not a file that --json wrote (KeyError('benchmarks')"),
    *(("train --compare a.json", "a.json is not a file that --json wrote", write("a.json", text))
      for text in ("[1]", "[" * 3000,
                   '{"machine": {}, "settings": {}, "benchmarks": {"train": [5]}}')),
]

# -----------------------------------------------------------------------------
# the tests

TABLES = {
    "train_gpt2": [
        *((f"{TINY_RUN} {flags}", *rest) for flags, *rest in TRAIN),
        *((f"{TINY_RUN} --data {source}", *rest) for source, *rest in DATA),
    ],
    "fineweb": FINEWEB,
    "hellaswag": HELLASWAG,
    "sample": SAMPLE,
    "convert": CONVERT,
    "plots": PLOTS,
    "bench.__main__": BENCH,
}
ROWS = [pytest.param(script, row, id=f"{script} {row[0].removeprefix(TINY_RUN)}")
        for script, table in TABLES.items() for row in table]


@pytest.mark.parametrize("script, row", ROWS)
def test_bad_input(script, row, check):
    check(script, row)


@pytest.mark.parametrize("row", DAMAGED, ids=[row[0] for row in DAMAGED])
def test_a_damaged_run_is_not_resumed(row, check, tokenized):
    check("train_gpt2", ("--log-dir . --exp-name run --max-steps 3", *row), tokenized)


# outside of each flag's range
NUMBERS = {
    "train_gpt2": "--lr=nan --lr=0 --beta1=1 --warmup-steps=1.5 --n-layer=0 --n-layer=1000000000",
    "fineweb": "--shard-size=1 --workers=20000 --max-tokens=nan --val-tokens=0",
    "hellaswag": "--limit=0 --batch-tokens=0",
    "sample": "--num-samples=0 --max-new-tokens=-1 --temperature=-0.1 --temperature=hot --top-k=-1"
              " --top-p=0 --top-p=1.5 --seed=-1",
    "bench.__main__": "--steps=0 --batch_size=-1 --ranks=20000",
}


@pytest.mark.parametrize("script, flag", [
    (script, flag) for script, flags in NUMBERS.items() for flag in flags.split()])
def test_a_number_out_of_its_range_is_an_error(script, flag, check):
    name, value = flag.split("=")
    check(script, (flag, f"{name.replace('_', '-')} {value}: must be a"))
