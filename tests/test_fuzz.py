"""
The parsers of files, on inputs that hypothesis damages: each is read, or is one error that names
the file, within seconds.

    .venv/bin/python -m pytest tests/test_fuzz.py
    GPT2_FUZZ=2000 .venv/bin/python -m pytest tests/test_fuzz.py     # more inputs for each test

A valid file is damaged in its structure: one or two nodes of its nested value are replaced,
deleted, renamed or wrapped (mutated), or in its bytes: some are replaced, it is cut, something is
appended (damaged).
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

SECONDS = 5  # for one input


def fuzz(count):
    """Runs a test on so many inputs, the same ones each time; the environment's GPT2_FUZZ is
    another number of them."""
    return settings(max_examples=int(os.environ.get("GPT2_FUZZ", count)), derandomize=True,
                    deadline=None, database=None, suppress_health_check=list(HealthCheck))


def reads_or_explains(read, name):
    """Asserts that read() returns, or raises a ValueError or OSError that names the file, in
    SECONDS; True if it returns."""
    def expired(*_):
        raise AssertionError(f"not finished after {SECONDS} s")
    old = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
        return True
    except (ValueError, OSError) as e:
        assert name in str(e), f"{e!r} does not name {name}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# -----------------------------------------------------------------------------
# what is done to a valid value, or to bytes

PLAIN = [
    None, True, False,
    -1, 0, 1, 3, 2**31, 2**40, 10**30,
    1.0, 2.7, float("nan"), float("inf"),
    "", "x", "12", "a/../b", "\x1b[31mred", "long" * 100,
    [], {}, [[]], [0], {"a": 1},
]
ACTIONS = ["replace"] * 4 + ["delete", "rename", "wrap", "double"]


def nodes(value, place=()):
    """The places of all nodes of a nested value, as tuples of keys and indices."""
    yield place
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield from nodes(child, (*place, key))


def mutated(value):
    """A strategy: value, a nested dict or list, as JSON, with one or two of its nodes replaced,
    deleted, renamed, wrapped or doubled."""
    @st.composite
    def draw_one(draw):
        result = copy.deepcopy(value)
        for _ in range(draw(st.integers(1, 2))):
            # a shallow node as likely as a deep one: there are many more of the latter
            by_depth = {}
            for place in nodes(result):
                by_depth.setdefault(len(place), []).append(place)
            depth = draw(st.sampled_from(sorted(by_depth)))
            place = draw(st.sampled_from(by_depth[depth]))
            other = copy.deepcopy(draw(st.sampled_from(PLAIN)))
            if not place:
                if draw(st.integers(0, 4)) == 0:
                    result = other
                if not isinstance(result, (dict, list)):
                    return result
                continue
            *path, key = place
            parent = result
            for step in path:
                parent = parent[step]
            action = draw(st.sampled_from(ACTIONS))
            if action == "replace":
                parent[key] = other
            elif action == "delete":
                del parent[key]
            elif action == "wrap":
                parent[key] = [parent[key]]
            elif isinstance(parent, list):
                parent.append(parent[key])
            elif action == "double":
                parent[f"{key}2"] = parent[key]
            else:
                name = other if isinstance(other, (str, int)) else "new"
                parent[name] = parent.pop(key)
        return result
    return draw_one().map(json_bytes)


def damaged(contents):
    """A strategy: contents (bytes) with some bytes replaced, cut, or with something inserted."""
    end = len(contents)
    header = st.integers(0, min(end, 1200) - 1)
    anywhere = st.one_of(header, st.integers(0, end - 1))
    changes = st.lists(st.tuples(anywhere, st.binary(min_size=1, max_size=8)),
                       min_size=1, max_size=3)

    def replace(changes):
        result = bytearray(contents)
        for start, new in changes:
            result[start:start + len(new)] = new
        return bytes(result)

    def cut(n):
        return contents[:n]

    def insert(i, new):
        return contents[:i] + new + contents[i:]
    return st.one_of(
        changes.map(replace),
        st.integers(0, end).map(cut),
        st.builds(insert, header, st.binary(min_size=1, max_size=4)),
        st.binary(max_size=64),
    )


def json_bytes(value):
    return json.dumps(value).encode()


def damaged_json(value):
    return st.one_of(mutated(value), damaged(json_bytes(value)))


# -----------------------------------------------------------------------------
# JSON

SHARDS = [
    {"file": f"a_{split}_00000{number}.npy", "split": split, "tokens": 4, "documents": 1,
     "sha256": "0" * 64}
    for number, split in enumerate(("val", "train"))
]
MANIFEST = {
    "version": prepare.MANIFEST_VERSION,
    "source": {"files": [["in.txt", 9]]},
    "shards": SHARDS,
    "next": {"split": "train", "file": 1, "number": 0, "token": 0, "skipped": 0},
    "complete": True,
}


@fuzz(20)
@given(damaged_json(MANIFEST))
def test_manifest(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("fuzz")
    for shard in SHARDS:
        data.write_shard(str(folder / shard["file"]), np.array([50256, 1, 2, 3], dtype=np.uint16))
    (folder / "manifest.json").write_bytes(contents)
    reads_or_explains(lambda: prepare.prepare_data(str(folder)), str(folder))


EXAMPLE = {"activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he", "label": 3,
           "ctx": "A man is on a roof. he", "endings": ["wraps.", "rips.", "is.", "is."]}
JSONL = (json_bytes(EXAMPLE) + b"\n") * 2


@fuzz(30)
@given(st.one_of(damaged(JSONL), damaged(gzip.compress(JSONL, mtime=0))))
def test_hellaswag_examples(tmp_path_factory, contents):
    name = "a.jsonl.gz" if contents.startswith(b"\x1f\x8b") else "a.jsonl"
    path = str(tmp_path_factory.getbasetemp() / name)
    with open(path, "wb") as f:
        f.write(contents)
    reads_or_explains(lambda: list(hellaswag.iterate_examples(path)), path)


RESULT = {
    "machine": {"device": "a CPU"},
    "settings": {"size": "gpt2", "B": 4},
    "benchmarks": {"train": [{"train": "eager", "tok/s": 10.0, "seconds": 2},
                             {"train": "compiled", "tok/s": 20.0}]},
}


@fuzz(30)
@given(damaged_json(RESULT))
def test_results_of_bench(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "old.json"
    path.write_bytes(contents)

    def compare():
        with contextlib.redirect_stdout(io.StringIO()):
            old = bench_command.read_result(str(path))
            with contextlib.suppress(ValueError):  # nothing in common
                bench_command.print_comparison(old, RESULT)
    reads_or_explains(compare, path.name)


RUN_CONFIG = {
    "config": {"data": "in.txt", "lr": 0.1, "total_batch_size": 1024, "exp_name": "x"},
    "command": ["x"],
    "dtype": "float32",
    "device": "a CPU",
    "world_size": 1,
    "torch": "2",
    "commit": None,
}
LOG = "".join(f"{step} val 3.5\n{step} train 4.0\n{step} norm inf\n{step} tok_per_sec 100.0\n"
              for step in range(3)).encode()


@fuzz(20)
@given(st.one_of(st.just(LOG), damaged(LOG)), damaged(json_bytes(RUN_CONFIG)))
def test_log_and_config_of_a_run(tmp_path_factory, log, contents):
    run_dir = tmp_path_factory.getbasetemp() / "run"
    run_dir.mkdir(exist_ok=True)
    (run_dir / "log.txt").write_bytes(log)
    (run_dir / "config.json").write_bytes(contents)
    path = str(run_dir / "log.txt")
    reads_or_explains(lambda: folder.read_log(path), "log.txt")
    reads_or_explains(lambda: convert.scores_of(str(run_dir), 2), "log.txt")
    for by in plots.AXES:
        reads_or_explains(lambda by=by: plots.read_curves(str(run_dir), by), str(run_dir))
    # a resumed run keeps or moves each line
    folder.cut_log(path, 2)
    aside = run_dir / "log.txt.aside"
    after = (run_dir / "log.txt").read_bytes().split(b"\n")
    if aside.exists():
        after += aside.read_bytes().split(b"\n")
        aside.unlink()
    assert sorted(filter(None, after)) == sorted(filter(None, log.split(b"\n")))


# -----------------------------------------------------------------------------
# shards

def written(write):
    """The bytes that write(file) writes."""
    f = io.BytesIO()
    write(f)
    return f.getvalue()


NPY = written(lambda f: np.save(f, np.zeros(10, dtype=np.uint16)))
LLMC_SHARD = struct.pack("<256i", data.BIN_MAGIC, data.BIN_VERSION, 10, *[0] * 253) + bytes(20)


@fuzz(40)
@given(st.sampled_from(["a_train_000000.npy", "a_train_000000.bin", "train.bin"]),
       st.one_of(damaged(NPY), damaged(LLMC_SHARD)))
def test_shards(tmp_path_factory, name, contents):
    path = str(tmp_path_factory.getbasetemp() / name)
    with open(path, "wb") as f:
        f.write(contents)

    def read():
        stream = data.TokenStream([path])
        if len(stream):
            stream.read(0, len(stream))
    reads_or_explains(read, path)


# -----------------------------------------------------------------------------
# models

SMALL = tiny_model(n_layer=1, n_embd=8, block_size=8, vocab_size=16)


def check_model(path):
    """info, and if it is a model of finite weights, loading it."""
    name = os.path.basename(path)
    if reads_or_explains(lambda: convert.describe(path), name):
        reads_or_explains(lambda: weights.load_model(path), name)


PT = written(lambda f: torch.save({**model_contents(SMALL, 3.5), "step": 2}, f))
LLMC = written(lambda f: convert.write_llmc(SMALL, f))


@fuzz(30)
@given(damaged(PT))
def test_bytes_of_pt(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "a.pt"
    path.write_bytes(contents)
    check_model(str(path))


@fuzz(30)
@given(damaged(LLMC))
def test_bytes_of_llmc(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "a.bin"
    path.write_bytes(contents)
    check_model(str(path))


HF_WEIGHTS = save_safetensors(hf_state_dict(SMALL))
HF_CONFIG = json.loads(convert.config_files(SMALL.config, "float32")["config.json"])
HF_CONFIG |= {"vocab_size": 16, "n_inner": None}
HF_INDEX = {"metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(hf_state_dict(SMALL), "model-00001-of-00001.safetensors")}


def check_folder(folder, config, **files):
    """Writes a Hugging Face folder and reads it."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "config.json").write_bytes(config)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    check_model(str(folder))


@fuzz(20)
@given(damaged_json(HF_CONFIG))
def test_config_of_hugging_face(tmp_path_factory, contents):
    folder = tmp_path_factory.getbasetemp() / "hf"
    check_folder(folder, contents, **{"model.safetensors": HF_WEIGHTS})


@fuzz(20)
@given(damaged(json_bytes(HF_INDEX)))
def test_index_of_hugging_face(tmp_path_factory, contents):
    folder = tmp_path_factory.getbasetemp() / "hf"
    check_folder(folder, json_bytes(HF_CONFIG), **{
        "model.safetensors.index.json": contents, "model-00001-of-00001.safetensors": HF_WEIGHTS})


@fuzz(20)
@given(damaged(HF_WEIGHTS))
def test_weights_of_hugging_face(tmp_path_factory, contents):
    folder = tmp_path_factory.getbasetemp() / "hf"
    check_folder(folder, json_bytes(HF_CONFIG), **{"model.safetensors": contents})


@pytest.mark.slow
def test_ten_times_as_many_inputs():
    done = python("-m", "pytest", __file__, "-k", "not ten_times", timeout=900,
                  env={"GPT2_FUZZ": "400"})
    assert done.returncode == 0, done.stdout
