"""
The parsers of files, on inputs that hypothesis damages: each is read, or is one error that names
the file, within seconds.

    .venv/bin/python -m pytest tests/test_fuzz.py
    GPT2_FUZZ=2000 .venv/bin/python -m pytest tests/test_fuzz.py     # more inputs for each file
"""
import contextlib
import copy
import gzip
import io
import json
import os
import signal
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

import bench.__main__ as bench_command
import convert
import data
import hellaswag
import plots
from common import python, tiny_model
from convert import hf_state_dict
from run import folder, prepare, weights
from run.checkpoint import model_contents

SECONDS = 20  # for one input, on a busy machine


# -----------------------------------------------------------------------------
# what is done to a valid file

PLAIN = [
    None, True, False,
    -1, 0, 1, 3, 2**31, 2**40, 10**30,
    1.0, 2.7, float("nan"), float("inf"),
    "", "x", "12", "a/../b", "\x1b[31mred", "long" * 100,
    [], {}, [[]], [0], {"a": 1},
]


def damaged(contents):
    """A strategy: contents (bytes) with some bytes replaced, deleted, cut off or inserted."""
    end = len(contents)
    starts = st.one_of(st.integers(0, min(end, 1200)), st.integers(0, end))  # often in the header
    lengths = st.sampled_from([0, 1, 4, 8, end])
    new = st.binary(max_size=8)
    return st.builds(lambda start, length, new: contents[:start] + new + contents[start + length:],
                     starts, lengths, new)


def nodes(value):
    """(parent, key) of every node below a nested dict or list."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield value, key
        if isinstance(child, (dict, list)):
            yield from nodes(child)


def damaged_json(contents):
    """A strategy: a JSON file (bytes) with one or two of its nodes replaced or deleted."""
    @st.composite
    def draw_one(draw):
        value = json.loads(contents)
        for _ in range(draw(st.integers(1, 2))):
            parent, key = draw(st.sampled_from([(None, None), *nodes(value)]))
            other = copy.deepcopy(draw(st.sampled_from(PLAIN)))
            if parent is None:
                return json.dumps(other).encode()
            if draw(st.booleans()):
                parent[key] = other
            else:
                del parent[key]
        return json.dumps(value).encode()
    return draw_one()


# -----------------------------------------------------------------------------
# valid files: {name: contents}

def written(write):
    """The bytes that write(file) writes."""
    f = io.BytesIO()
    write(f)
    return f.getvalue()


def json_bytes(value):
    return json.dumps(value).encode()


SHARD = written(lambda f: np.save(f, np.array([50256, 1, 2, 3], dtype=np.uint16)))
LLMC_SHARD = struct.pack("<256i", data.BIN_MAGIC, data.BIN_VERSION, 10, *[0] * 253) + bytes(20)
SHARDS = [
    {"file": f"a_{split}_00000{number}.npy", "split": split, "tokens": 4, "documents": 1,
     "sha256": "0" * 64}
    for number, split in enumerate(("val", "train"))
]
MANIFEST = json_bytes({
    "version": prepare.MANIFEST_VERSION,
    "source": {"files": [["in.txt", 9]]},
    "shards": SHARDS,
    "next": {"split": "train", "file": 1, "number": 0, "token": 0, "skipped": 0},
    "complete": True,
})
PREPARED = {"manifest.json": MANIFEST, **{shard["file"]: SHARD for shard in SHARDS}}

EXAMPLE = {"activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he", "label": 3,
           "ctx": "A man is on a roof. he", "endings": ["wraps.", "rips.", "is.", "is."]}
JSONL = (json_bytes(EXAMPLE) + b"\n") * 2

RESULT = {
    "machine": {"device": "a CPU"},
    "settings": {"size": "gpt2", "B": 4},
    "benchmarks": {"train": [{"train": "eager", "tok/s": 10.0, "seconds": 2},
                             {"train": "compiled", "tok/s": 20.0}]},
}

RUN = {
    "log.txt": "".join(f"{step} val 3.5\n{step} train 4.0\n{step} norm inf\n"
                       f"{step} tok_per_sec 100.0\n" for step in range(3)).encode(),
    "config.json": json_bytes({
        "config": {"data": "in.txt", "lr": 0.1, "total_batch_size": 1024, "exp_name": "x"},
        "command": ["x"], "dtype": "float32", "device": "a CPU", "world_size": 1, "torch": "2",
        "commit": None}),
}

MODEL = tiny_model(n_layer=1, n_embd=8, block_size=8, vocab_size=16)
PT = written(lambda f: torch.save({**model_contents(MODEL, 3.5), "step": 2}, f))
HF_CONFIG = json.loads(convert.config_files(MODEL.config, "float32")["config.json"])
HF = {"config.json": json_bytes({**HF_CONFIG, "vocab_size": 16, "n_inner": None}),
      "model.safetensors": save_safetensors(hf_state_dict(MODEL))}
PART = "model-00001-of-00001.safetensors"
HF_IN_PARTS = {
    "model.safetensors.index.json": json_bytes({
        "metadata": {"total_size": 1}, "weight_map": dict.fromkeys(hf_state_dict(MODEL), PART)}),
    "config.json": HF["config.json"],
    PART: HF["model.safetensors"],
}


# -----------------------------------------------------------------------------
# what reads them

def read_shard(path):
    stream = data.TokenStream([path])
    if len(stream):
        stream.read(0, len(stream))


def compare_results(path):
    old = bench_command.read_result(path)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            bench_command.print_comparison(old, RESULT)
        except ValueError as e:
            assert "no measurement in common" in str(e)


def read_model(path):
    """What convert.py info reads, and the weights."""
    convert.describe(path)
    weights.load_model(path)


def read_run(run_dir):
    path = os.path.join(run_dir, "log.txt")
    with open(path, "rb") as f:
        before = f.read().split(b"\n")
    # a resumed run keeps or moves each line
    folder.cut_log(path, 2)
    after = []
    for name in ("log.txt", "log.txt.aside"):
        if os.path.exists(os.path.join(run_dir, name)):
            with open(os.path.join(run_dir, name), "rb") as f:
                after += f.read().split(b"\n")
    assert sorted(filter(None, after)) == sorted(filter(None, before))
    with open(path, "wb") as f:
        f.write(b"\n".join(before))
    folder.read_log(path)
    convert.scores_of(run_dir, 2)
    for by in plots.AXES:
        plots.read_curves(run_dir, by)


# the folder's files, of which the first is damaged, and what reads the file or the folder
FILE, FOLDER = "{folder}/{name}", "{folder}"
CASES = [
    (PREPARED, prepare.prepare_data, FOLDER),
    ({"a.jsonl": JSONL}, lambda path: list(hellaswag.iterate_examples(path)), FILE),
    ({"a.jsonl.gz": gzip.compress(JSONL, mtime=0)},
     lambda path: list(hellaswag.iterate_examples(path)), FILE),
    ({"old.json": json_bytes(RESULT)}, compare_results, FILE),
    (RUN, read_run, FOLDER),
    (dict(reversed(RUN.items())), read_run, FOLDER),
    ({"a_train_000000.npy": SHARD}, read_shard, FILE),
    ({"a_train_000000.bin": LLMC_SHARD}, read_shard, FILE),
    ({"train.bin": LLMC_SHARD}, read_shard, FILE),
    ({"a.pt": PT}, read_model, FILE),
    ({"a.bin": written(lambda f: convert.write_llmc(MODEL, f))}, read_model, FILE),
    (HF, read_model, FOLDER),
    (dict(reversed(HF.items())), read_model, FOLDER),
    (HF_IN_PARTS, read_model, FOLDER),
]


@pytest.mark.parametrize("contents, read, place", CASES)
def test_a_damaged_file_is_read_or_is_an_error_that_names_it(
        contents, read, place, tmp_path_factory):
    name = next(iter(contents))
    strategy = damaged(contents[name])
    if name.endswith(".json"):
        strategy = st.one_of(strategy, damaged_json(contents[name]))

    def expired(*_):
        raise AssertionError(f"not finished after {SECONDS} s")

    # the same inputs each time
    @settings(max_examples=int(os.environ.get("GPT2_FUZZ", 20)), derandomize=True, deadline=None,
              database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(new):
        folder = tmp_path_factory.mktemp("fuzz")
        for other in contents:
            (folder / other).write_bytes(new if other == name else contents[other])
        old = signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read(place.format(folder=folder, name=name))
        except (ValueError, OSError) as e:
            assert str(folder) in str(e), f"{e!r} does not name a file in {folder}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
    check()


@pytest.mark.slow
def test_ten_times_as_many_inputs():
    done = python("-m", "pytest", __file__, "-k", "not ten_times", timeout=900,
                  env={"GPT2_FUZZ": "400"})
    assert done.returncode == 0, done.stdout
