"""
The parsers of files, on inputs that hypothesis damages: each is read, or is one error that names the file, within seconds.

    .venv/bin/python -m pytest tests/test_fuzz.py
    GPT2_FUZZ=2000 .venv/bin/python -m pytest tests/test_fuzz.py     # more inputs for each test

A valid file is damaged in its structure: one or two nodes of its nested value are replaced, deleted, renamed or wrapped
(mutated), or in its bytes: some are replaced, it is cut, something is appended (damaged).
"""
import atexit
import contextlib
import copy
import gzip
import io
import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file as save_safetensors

import bench.__main__ as bench_command
import convert
import data
import fineweb
import hellaswag
import plots
import train_gpt2
from convert import hf_state_dict
from model import GPT, GPTConfig
from run import folder
from run import weights

SIZES = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=50257)
SECONDS = 5  # for one input


def fuzz(count):
    """Runs a test on so many inputs, the same ones each time; GPT2_FUZZ in the environment is another number of them."""
    return settings(max_examples=int(os.environ.get("GPT2_FUZZ", count)), derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def reads_or_explains(read, name):
    """Asserts that read() returns, or raises a ValueError or OSError that names the file, in SECONDS; True if it returns."""
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

PLAIN = [None, True, False, -1, 0, 1, 3, 1.0, 2.7, 2**31, 2**40, 10**30, float("nan"), float("inf"), "", "x", "12", "a/../b",
         "\x1b[31mred", [], {}, [[]], [0], {"a": 1}, "long" * 100]
TENSORS = [torch.zeros(0), torch.tensor(2), torch.zeros(2, 2, 2), torch.zeros(8, dtype=torch.complex64),
           torch.zeros(3, dtype=int), torch.full((8,), float("nan")), torch.zeros(2, 2).to_sparse(),
           torch.empty(8, device="meta"), torch.zeros(1).expand(2**40), (1, 2)]


def nodes(value, place=()):
    """The places of all nodes of a nested value, as tuples of keys and indices."""
    yield place
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(child, (*place, key))


def mutated(value, others=PLAIN):
    """A strategy: value, a nested dict or list, with one or two of its nodes replaced, deleted, renamed, wrapped or doubled."""
    @st.composite
    def draw_one(draw):
        result = copy.deepcopy(value)
        for _ in range(draw(st.integers(1, 2))):
            # a shallow node as likely as a deep one: there are many more of the latter
            by_depth = {}
            for place in nodes(result):
                by_depth.setdefault(len(place), []).append(place)
            place = draw(st.sampled_from(by_depth[draw(st.sampled_from(sorted(by_depth)))]))
            other = copy.deepcopy(draw(st.sampled_from(others)))
            if not place:
                result = other if draw(st.integers(0, 4)) == 0 else result
                if not isinstance(result, (dict, list)):
                    return result
                continue
            parent = result
            for key in place[:-1]:
                parent = parent[key]
            key, action = place[-1], draw(st.sampled_from(["replace"] * 4 + ["delete", "rename", "wrap", "double"]))
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
                parent[other if isinstance(other, (str, int)) else "new"] = parent.pop(key)
        return result
    return draw_one()


def damaged(contents):
    """A strategy: contents (bytes) with some bytes replaced, cut, or with something appended or inserted."""
    end = len(contents)
    header = st.integers(0, min(end, 1200) - 1)
    replaced = st.lists(st.tuples(st.one_of(header, st.integers(0, end - 1)), st.binary(min_size=1, max_size=8)), min_size=1,
                        max_size=3)

    def replace(changes):
        result = bytearray(contents)
        for start, new in changes:
            result[start:start + len(new)] = new
        return bytes(result)
    return st.one_of(replaced.map(replace), st.integers(0, end).map(lambda n: contents[:n]),
                     st.builds(lambda i, new: contents[:i] + new + contents[i:], header, st.binary(min_size=1, max_size=4)),
                     st.binary(max_size=64))


def text_of(value):
    """JSON, or the text as it is."""
    return json.dumps(value, default=str)


# -----------------------------------------------------------------------------
# JSON

SHARDS = [{"file": "a_val_000000.npy", "split": "val", "tokens": 4, "documents": 1, "sha256": "0" * 64},
          {"file": "a_train_000001.npy", "split": "train", "tokens": 4, "documents": 1, "sha256": "0" * 64}]
SETTINGS = {"tokenizer": {"name": "gpt2", "sha256": data.TOKENIZER_SHA256}, "source": {"files": ["in.txt"], "bytes": [9]},
            "shard_size": 100, "val_tokens": 10, "max_tokens": 0, "format": "npy", "text_column": "text",
            "skip_bad_files": False}
MANIFEST = {**fineweb.open_manifest("nowhere", SETTINGS), "shards": SHARDS, "bad_files": [{"file": 0, "why": "damaged"}],
            "complete": True, "next": {"split": "train", "file": 1, "number": 0, "token": 0, "skipped": 0}}


@fuzz(20)
@given(st.one_of(mutated(MANIFEST).map(text_of).map(str.encode), damaged(text_of(MANIFEST).encode())))
def test_manifest(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("fuzz")
    for split, i in (("val", 0), ("train", 1)):
        data.write_shard(str(folder / f"a_{split}_{i:06d}.npy"), np.array([50256, 1, 2, 3], dtype=np.uint16))
    (folder / "manifest.json").write_bytes(contents)
    reads_or_explains(lambda: fineweb.open_manifest(str(folder), SETTINGS), str(folder))
    reads_or_explains(lambda: data.prepare_data(str(folder)), str(folder))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        reads_or_explains(lambda: fineweb.verify(str(folder)), str(folder))


EXAMPLE = {"activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he", "label": 3,
           "ctx": "A man is on a roof. he", "endings": ["wraps.", "rips.", "is.", "is."]}
JSONL = (text_of(EXAMPLE) + "\n").encode() * 2


@fuzz(30)
@given(st.one_of(damaged(JSONL), damaged(gzip.compress(JSONL, mtime=0))))
def test_hellaswag_examples(tmp_path_factory, contents):
    name = "a.jsonl.gz" if contents.startswith(b"\x1f\x8b") else "a.jsonl"
    path = str(tmp_path_factory.getbasetemp() / name)
    with open(path, "wb") as f:
        f.write(contents)
    reads_or_explains(lambda: list(hellaswag.iterate_examples(path)), path)


RESULT = {"machine": {"device": "a CPU"}, "settings": {"size": "gpt2", "B": 4},
          "benchmarks": {"train": [{"train": "eager", "tok/s": 10.0, "seconds": 2}, {"train": "compiled", "tok/s": 20.0}]}}


@fuzz(30)
@given(st.one_of(mutated(RESULT).map(text_of).map(str.encode), damaged(text_of(RESULT).encode())))
def test_results_of_bench(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "old.json"
    path.write_bytes(contents)

    def compare():
        with contextlib.redirect_stdout(io.StringIO()):
            old = bench_command.read_result(str(path))
            with contextlib.suppress(ValueError):  # nothing in common
                bench_command.print_comparison(old, RESULT)
    reads_or_explains(compare, path.name)


RUN_CONFIG = {"config": {"data": "in.txt", "lr": 0.1, "total_batch_size": 1024, "exp_name": "x"}, "command": ["x"],
              "dtype": "float32", "device": "a CPU", "world_size": 1, "torch": "2", "commit": None}
LOG = "\n".join(f"{step} {stream} {value}" for step in range(3) for stream, value in
                (("val", 3.5), ("train", 4.0), ("norm", float("inf")), ("tok_per_sec", 100.0))).encode() + b"\n"


@fuzz(20)
@given(st.one_of(st.just(LOG), damaged(LOG)),
       st.one_of(mutated(RUN_CONFIG).map(text_of).map(str.encode), damaged(text_of(RUN_CONFIG).encode())))
def test_log_and_config_of_a_run(tmp_path_factory, log, contents):
    run_dir = tmp_path_factory.getbasetemp() / "run"
    run_dir.mkdir(exist_ok=True)
    (run_dir / "log.txt").write_bytes(log)
    (run_dir / "config.json").write_bytes(contents)
    with contextlib.redirect_stdout(io.StringIO()):
        size, _ = folder.kept_log(str(run_dir), 2)
    assert 0 <= size <= len(log)
    reads_or_explains(lambda: folder.read_log(str(run_dir / "log.txt")), "log.txt")
    reads_or_explains(lambda: convert.scores_of(str(run_dir), 2), "log.txt")
    for by in plots.AXES:
        reads_or_explains(lambda by=by: plots.Curves(str(run_dir), by), str(run_dir))


# -----------------------------------------------------------------------------
# shards

def npy(dtype, shape):
    f = io.BytesIO()
    np.save(f, np.zeros(shape, dtype=dtype))
    return f.getvalue()


def npy_with_header(header):
    header = header.encode("latin1", "replace")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 2**16) + header + bytes(20)


NPY = npy(np.uint16, 10)
LLMC_SHARD = struct.pack("<256i", data.BIN_MAGIC, data.BIN_VERSION, 10, *[0] * 253) + bytes(20)
HEADERS = ["{'descr': '<u2', 'fortran_order': False, 'shape': (10,)}\n",
           "{'descr': '<u2', 'fortran_order': False, 'shape': ((((",
           "{'descr': '<u2', 'fortran_order': False, 'shape': (-10,)}\n", "{'descr': [[[', 'fortran_order': 0, 'shape': 10}",
           "{'descr': '<u2', 'fortran_order': False, 'shape': (True,)}\n", "(" * 9000, "{'descr': '" + "x" * 9000,
           "{'descr': '<u2', 'fortran_order': False, 'shape': (1" + "0" * 30 + ",)}\n", "\\", "{'descr': ('<u2', 3), 1: 2}"]


@fuzz(40)
@given(st.sampled_from(["a_train_000000.npy", "a_train_000000.bin", "train.bin"]),
       st.one_of(damaged(NPY), damaged(LLMC_SHARD), st.sampled_from(HEADERS).map(npy_with_header),
                 st.builds(npy, st.sampled_from(["<u4", ">u2", "f4", "O", "V2", "U3"]), st.sampled_from([10, (), (2, 5)]))))
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

def tiny_model(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **changes}))


SMALL = tiny_model(vocab_size=16)
OURS = {"model": dict(SMALL.state_dict()), "config": dict(vars(SMALL.config)), "step": 2, "val_loss": 3.5}
NANO = {"model": OURS["model"], "model_args": {**OURS["config"]}, "iter_num": 2, "best_val_loss": torch.tensor(3.5)}


def saved_bytes(contents):
    f = io.BytesIO()
    torch.save(contents, f)
    return f.getvalue()


def check_model(path):
    """info, and if it is a model of finite weights, loading it."""
    name = os.path.basename(path)
    if reads_or_explains(lambda: convert.describe(path), name):
        reads_or_explains(lambda: weights.load_model(path), name)


@fuzz(15)
@given(st.one_of(*(mutated(value, PLAIN + TENSORS) for value in (OURS, NANO))))
def test_contents_of_pt(tmp_path_factory, contents):
    path = str(tmp_path_factory.getbasetemp() / "a.pt")
    torch.save(contents, path)
    check_model(path)


@fuzz(30)
@given(damaged(saved_bytes(OURS)))
def test_bytes_of_pt(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "a.pt"
    path.write_bytes(contents)
    check_model(str(path))


@fuzz(20)
@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from([-1, 0, 1, 3, 7, 2**20, 2**31 - 1, -2**31])), max_size=3),
       st.binary())
def test_header_of_llmc(tmp_path_factory, changes, noise):
    path = tmp_path_factory.getbasetemp() / "a.bin"
    f = io.BytesIO()
    convert.write_llmc(SMALL, f)
    contents = bytearray(f.getvalue())
    for where, value in changes:
        contents[4 * where:4 * where + 4] = struct.pack("<i", value)
    path.write_bytes(contents + noise[1:])
    check_model(str(path))


HF_WEIGHTS = hf_state_dict(SMALL)
HF_CONFIG = {**json.loads(convert.config_files(SMALL.config, "float32")["config.json"]), "vocab_size": 16, "n_inner": None}
HF_INDEX = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(HF_WEIGHTS, "model-00001-of-00001.safetensors")}


def check_folder(folder, **files):
    """Writes a Hugging Face folder and reads it."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    check_model(str(folder))


@fuzz(20)
@given(st.one_of(mutated(HF_CONFIG).map(text_of).map(str.encode), damaged(text_of(HF_CONFIG).encode())))
def test_config_of_hugging_face(tmp_path_factory, contents):
    folder = tmp_path_factory.getbasetemp() / "hf"
    weights = tmp_path_factory.getbasetemp() / "hf.safetensors"
    save_safetensors(HF_WEIGHTS, weights)
    check_folder(folder, **{"config.json": contents, "model.safetensors": weights.read_bytes()})


@fuzz(20)
@given(st.one_of(mutated(HF_INDEX).map(text_of).map(str.encode), damaged(text_of(HF_INDEX).encode())))
def test_index_of_hugging_face(tmp_path_factory, contents):
    folder = tmp_path_factory.getbasetemp() / "hf"
    weights = tmp_path_factory.getbasetemp() / "hf.safetensors"
    save_safetensors(HF_WEIGHTS, weights)
    check_folder(folder, **{"config.json": text_of(HF_CONFIG).encode(), "model.safetensors.index.json": contents,
                            "model-00001-of-00001.safetensors": weights.read_bytes()})


@fuzz(20)
@given(st.one_of(mutated(HF_WEIGHTS, TENSORS[:6]), st.just(None)), st.data())
def test_weights_of_hugging_face(tmp_path_factory, weights, draw):
    folder = tmp_path_factory.getbasetemp() / "hf"
    path = tmp_path_factory.getbasetemp() / "hf.safetensors"
    if isinstance(weights, dict):
        weights = {str(name): tensor.clone() for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    save_safetensors(weights if isinstance(weights, dict) else HF_WEIGHTS, path)
    contents = path.read_bytes() if isinstance(weights, dict) else draw.draw(damaged(path.read_bytes()))
    check_folder(folder, **{"config.json": text_of(HF_CONFIG).encode(), "model.safetensors": contents})


# -----------------------------------------------------------------------------
# checkpoints of a run

FLAGS = ["--preset", "shakespeare", "--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "8",
         "--total-batch-size", "32", "--batch-size", "4", "--compile", "off", "--sample-every", "0", "--val-every", "0",
         "--optimizer", "adamw", "--dtype", "float32", "--data", "in.txt", "--log-dir", ".", "--exp-name", "run"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with in.txt and a run of two steps, run; contents of its state file)"""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "in.txt").write_text("To be, or not to be, that is the question.\n\n" * 100)
    (folder / "run").mkdir()
    with contextlib.chdir(folder):
        train("--max-steps", "2")
    return folder, weights.load_file(str(folder / "run" / "state_00002.pt"))


def train(*flags):
    """train_gpt2.py's main in this process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as at_exit:
        patch.setattr(atexit, "register", at_exit.callback)
        patch.setattr(sys, "argv", ["train_gpt2.py", *FLAGS, *flags])
        patch.setattr(folder, "lock_run", lambda run_dir: None)  # this process would hold it until its end
        patch.setattr(train_gpt2, "plot_run", lambda *args, **kwargs: "")
        with pytest.raises(SystemExit):
            train_gpt2.main()
            sys.exit(0)


@fuzz(8)
@given(st.data())
def test_state_of_a_run(trained, draw):
    folder, state = trained
    contents = draw.draw(mutated(state, PLAIN + TENSORS))
    with contextlib.chdir(folder):
        for name in os.listdir("run"):
            if "00003" in name:
                os.remove(f"run/{name}")
        torch.save(contents, "run/state_00002.pt")
        reads_or_explains(lambda: train("--max-steps", "3"), "")


@pytest.mark.slow
def test_ten_times_as_many_inputs():
    done = subprocess.run([sys.executable, "-m", "pytest", __file__, "-k", "not ten_times"], capture_output=True, text=True,
                          timeout=900, env={**os.environ, "GPT2_FUZZ": "400"})
    assert done.returncode == 0, done.stdout
