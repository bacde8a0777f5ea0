"""
python -m bench: the variants and references compute the same as the model, the ladder, the
tables, the JSON, --compare.

    ./test.sh tests/test_bench.py   # no network, no GPU; a model of two blocks and 32 channels

No test asserts a time. Slow tests run the command.
"""
import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import bench.__main__ as command
import bench.checkpoint
import bench.data
import bench.hellaswag
import bench.ladder
import bench.sample
import bench.train
import fineweb
import sample
from run import runtime
from bench import measure
from bench.train import Variant, build_step
import model
from common import ENV, ONE, ROOT, python

@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Adds a size "tiny" in this process; restores torch's float32 matmul precision afterwards."""
    monkeypatch.setitem(model.SIZES, "tiny", (2, 2, 32, 64))
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def run_in_this_process(monkeypatch, *modules):
    """Makes modules run in this process what they run in a fresh one."""
    for module in modules:
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *args: function(*args))


def tiny_args(**changes):
    """The flags of a benchmark at the tiny size."""
    flags = dict(size="tiny", B=2, T=16, steps=2, ranks=0, picture=None, data=None, limit=2,
                 repeats=1, device="cpu", dtype="float32")
    return argparse.Namespace(**{**flags, **changes})


# -----------------------------------------------------------------------------
# the variants of a training step

def losses(variant):
    """Of three steps."""
    run, _, _ = build_step(variant, tiny_args(), ONE)
    return [run() for _ in range(3)]


@pytest.mark.parametrize("changes", [
    dict(flash=False),
    dict(ours=False),
    dict(fused=False),
    dict(grad_accum_steps=3),
    dict(flash=False, ours=False, fused=False),
])
def test_every_variant_has_the_same_losses(changes):
    """A variant changes how a step is computed, not its result; three times the same batch has
    the same mean gradient."""
    expected = losses(Variant("float32"))
    assert losses(Variant("float32", **changes)) == pytest.approx(expected, abs=2e-4)


def test_a_step_has_the_settings_of_its_variant():
    x, y = torch.zeros(2, 2, 16, dtype=torch.long)
    lecture = Variant("float32", flash=False, vocab_size=50257, fused=False, ours=False)
    _, raw_model, optimizers = build_step(lecture, tiny_args(), ONE)
    assert raw_model.config.vocab_size == 50257
    for block in raw_model.transformer.h:
        assert type(block.attn) is bench.train.NaiveAttention
    assert not optimizers[0].defaults["fused"] and not optimizers[0].param_groups[0]["fused"]
    logits, _ = raw_model(x, y)
    assert logits.requires_grad

    _, raw_model, optimizers = build_step(Variant("float32"), tiny_args(), ONE)
    logits, _ = raw_model(x, y)
    assert logits is None and optimizers[0].defaults["fused"]


def test_the_roofline_counts_every_matmul_and_attention_of_the_step(monkeypatch):
    """Each call takes as many seconds as it has FLOPs: their sum is what flops_per_token counts."""
    def flops(function, shapes, dtype, device, repeats):
        if function is F.linear:
            (rows, n_in), (n_out, _) = shapes
            return 6 * rows * n_in * n_out
        B, nh, T, hs = shapes[0]
        return 12 * B * nh * T * T * hs
    monkeypatch.setattr(bench.train, "forward_backward_seconds", flops)
    matrices = 50304 * 32 + 2 * 12 * 32 * 32
    expected = 2 * 16 * (6 * matrices + 12 * 2 * 32 * 16)
    assert bench.train.time_roofline(tiny_args()) == expected


def row_of(tokens_per_second, ms=1.0):
    """What time_step returns; a token has 200 FLOPs."""
    return {"ms/step": ms, "tok/s": tokens_per_second, "peak GB": 2.0,
            "GFLOP/s": 200 * tokens_per_second, "loss": 1.0}


def test_train_rows_are_relative_to_the_lecture_and_the_roofline(monkeypatch):
    """With a fake timer: the lecture takes 4 s, ours eager 2 s, compiled 1 s; the roofline is
    0.5 s, and the matmul peak twice our FLOP/s."""
    def time_step(variant, args):
        seconds = 4
        if variant.ours:
            seconds = 1 if variant.compile else 2
        return row_of(32 / seconds, 1000 * seconds)

    def in_fresh_process(function, *_):
        return 2 * 200e9 * 32 if function is measure.matmul_peak else 0.5
    monkeypatch.setattr(bench.train, "time_step", time_step)
    monkeypatch.setattr(bench.train, "in_fresh_process", in_fresh_process)
    rows = bench.train.bench_train(tiny_args())
    assert [row["x lecture"] for row in rows] == [1, 2, 4, 8]
    assert [row["% of roofline"] for row in rows] == [12.5, 25, 50, 100]
    assert [row["% of matmul peak"] for row in rows] == [12.5, 25, 50, 100]


# -----------------------------------------------------------------------------
# the ladder

def test_the_ladder_goes_from_float32_to_the_step_we_train_with():
    rungs = bench.ladder.rungs("bfloat16", "cpu", 2)
    variants = {name: variant for name, variant, reason in rungs if reason is None}
    assert variants["float32"] == Variant("float32", False, False, False, 50257, False, False)
    ours = Variant("bfloat16", tf32=False, compile=True, grad_accum_steps=4, world_size=2)
    assert variants["DDP x 2"] == ours
    assert "TF32" not in variants  # not on a CPU


def test_a_rung_that_this_machine_cannot_run_has_a_reason():
    rungs = bench.ladder.rungs("float32", "mps", 1)
    assert {name for name, _, reason in rungs if reason} == {
        "TF32", "float32 autocast", "torch.compile", "fused AdamW", "DDP x 1"}


def fake_ladder(monkeypatch, time_step):
    monkeypatch.setattr(bench.ladder, "time_step", time_step)
    monkeypatch.setattr(bench.ladder, "in_fresh_process", lambda function, *args: 640e9)


def test_ladder_rows_are_relative_to_the_rung_before(monkeypatch, tmp_path, capsys):
    """With a fake timer: a step takes 100 s in float32, half of it from bfloat16 on, and a rung
    runs out of memory."""
    def time_step(variant, args):
        if variant.fused and not variant.ours:
            raise MemoryError
        speed = 32 / (100 if variant.dtype == "float32" else 50)
        return row_of(speed, 32e3 * variant.grad_accum_steps / speed)
    fake_ladder(monkeypatch, time_step)
    picture = tmp_path / "ladder.png"
    args = tiny_args(dtype="bfloat16", picture=str(picture))
    rows = {row["ladder"]: row for row in bench.ladder.bench_ladder(args)}
    expected = {"tok/s": 0.32, "gain": 1, "% of matmul peak": 10}
    assert expected.items() <= rows["float32"].items()
    assert rows["bfloat16 autocast"]["gain"] == 2
    assert rows["torch.compile"]["gain"] == 1
    expected = {"tok/s": 0.64, "x float32": 2, "% of matmul peak": 20, "MFU %": None}
    assert expected.items() <= rows["gradient accumulation x 4"].items()
    assert "7.6x" in rows["flash attention"]["note"]
    assert "2x" in rows["torch.compile"]["note"]
    assert all(row["tok/s"] for row in rows.values())
    assert capsys.readouterr().out.splitlines()[-1] == (
        "not measured: TF32 (needs an NVIDIA GPU, Ampere or newer), fused AdamW (out of memory),"
        " DDP x 1 (one process; use --ranks)")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["ladder.png"]


def test_a_ladder_without_memory_for_any_rung_is_an_error(monkeypatch):
    def time_step(variant, args):
        raise MemoryError
    fake_ladder(monkeypatch, time_step)
    with pytest.raises(ValueError, match="every rung ran out of memory; use a smaller --batch"):
        bench.ladder.bench_ladder(tiny_args())


def test_the_published_ladder_has_no_empty_rows():
    with open(os.path.join(ROOT, "docs", "figures", "ladder.json"), encoding="utf-8") as f:
        rows = json.load(f)["benchmarks"]["ladder"]
    assert all(row["tok/s"] > 0 for row in rows)
    names = {name for name, _, _ in bench.ladder.rungs("bfloat16", "cpu", 1)}
    assert {row["ladder"] for row in rows} == names - {"TF32", "DDP x 1"}


# -----------------------------------------------------------------------------
# the other benchmarks

def test_loader_and_checkpoint_have_rows_for_a_tiny_model(monkeypatch):
    run_in_this_process(monkeypatch, bench.train)
    rows = bench.data.bench_loader(tiny_args())
    assert rows[-1]["% of step"] == 100 and all(row["ms/batch"] > 0 for row in rows)
    rows = bench.checkpoint.bench_checkpoint(tiny_args())
    params = model.config_for("tiny", vocab_size=50304).num_params()
    # float32 weights and AdamW's two moments
    assert rows[0]["GB"] == pytest.approx(3 * 4 * params / 1e9, rel=0.01)


@pytest.fixture
def keep_process(monkeypatch):
    """keep_freed_memory changes the whole process."""
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)


def test_hellaswag_scores_examples_spread_over_the_file(monkeypatch, keep_process, tmp_path):
    """All three scorings predict the same in float32, from every third of six examples on."""
    path, scored = str(tmp_path / "examples.jsonl"), []
    bench.hellaswag.write_examples(path, 6)
    lecture_rows = bench.hellaswag.lecture_rows

    def recorded(example):
        scored.append(example["ctx"])
        return lecture_rows(example)
    monkeypatch.setattr(bench.hellaswag, "lecture_rows", recorded)
    monkeypatch.setattr(model, "SIZES", {"tiny": (1, 1, 4, 256)})
    rows = bench.hellaswag.bench_hellaswag(tiny_args(data=path))
    assert [row["differ"] for row in rows] == [0, 0, 0]
    assert {row["examples"] for row in rows} == {2}
    with open(path, encoding="utf-8") as f:
        contexts = [json.loads(line)["ctx"] for line in f]
    assert scored[1:3] == [contexts[0], contexts[3]]  # after one for the warm-up


def test_tiktokens_own_encoding_is_as_it_ships_and_has_our_tokens():
    from tiktoken_ext.openai_public import r50k_pat_str
    assert bench.data.tiktokens_gpt2()._pat_str == r50k_pat_str
    text = "Hello, I'm  a language\n\n model 2<|endoftext|> naïve 北京 "
    assert bench.data.tokenize_row({"text": text}).tolist() == fineweb.encode([text]).tolist()


@pytest.mark.slow  # imports datasets
def test_every_pipeline_of_tokenizing_has_all_tokens(tmp_path):
    bench.data.write_input_txt_as_parquet(tmp_path)
    rows = bench.data.bench_tokenize(tiny_args(data=str(tmp_path)))
    assert len({round(row["M tok/s"] / row["MB/s"], 9) for row in rows}) == 1 and len(rows) > 3


@pytest.mark.parametrize("time_one", ["time_lecture", "time_transformers", "time_ours"])
def test_sampling_counts_the_tokens_that_are_timed(time_one, monkeypatch, keep_process):
    monkeypatch.setitem(model.SIZES, "tiny", (1, 1, 4, 32))
    sampled, sample_next_token = [], sample.sample_next_token

    def counting(logits, *args):
        sampled.append(logits.size(0))
        return sample_next_token(logits, *args)

    monkeypatch.setattr(sample, "sample_next_token", counting)
    seconds, tokens = getattr(bench.sample, time_one)(tiny_args(), 2, 16)
    assert seconds > 0 and tokens == 2 * 16
    # the warm-up's eight steps are not counted
    assert sum(sampled) == (2 * (8 + 16) if time_one == "time_ours" else 0)


def test_the_sampling_roofline_counts_each_weight_that_a_token_reads_once():
    assert bench.sample.bytes_per_step("gpt2", "bfloat16") == 2 * (124_439_808 - 1024 * 768)


# -----------------------------------------------------------------------------
# measuring

def test_timed_takes_the_median_after_the_warmup(monkeypatch):
    """With a fake clock: calls take 100, 1, 5 and 2 s, the first one is the warm-up."""
    now, durations = [0.0], iter([100, 1, 5, 2])

    def work():
        now[0] += next(durations)
        return now[0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.timed(work, repeats=3, warmup=1) == (2, 108)


def test_forward_backward_seconds_times_both_directions():
    calls = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            calls.append("backward")
            return 2 * grad * ctx.saved_tensors[0]
    shapes = [(4, 4)]
    assert measure.forward_backward_seconds(Square.apply, shapes, "float32", "cpu", repeats=3) > 0
    # once for the shape of the gradient, 2 + 3 calls
    assert calls == ["forward", *["forward", "backward"] * 5]


def test_a_table_is_aligned_and_omits_columns_without_values(capsys):
    rows = [{"a": "x", "tok/s": 1234.5, "MFU %": None, "note": ""},
            {"a": "longer", "tok/s": None, "MFU %": None, "note": "n"}]
    assert measure.print_table(rows) is rows
    assert capsys.readouterr().out.splitlines() == [
        "a          tok/s  note",
        "x       1,234.50",
        "longer         -  n",
    ]


# -----------------------------------------------------------------------------
# the command; test_bad_input.py has invalid flags and files

def result(**benchmarks):
    return {"machine": {"device": "a"}, "settings": {"size": "gpt2"}, "benchmarks": benchmarks}


def test_the_comparison_finds_what_is_worse_in_any_unit(capsys):
    old = result(train=[{"train": "eager", "tok/s": 100.0, "peak GB": 4.0, "loss": 9.0},
                        {"train": "gone", "tok/s": 1.0}],
                 loader=[{"loader": "read", "ms/batch": 2.0}],
                 sample=[{"sample": "ours", "tok/s": 10.0, "x lecture": None}])
    new = result(train=[{"train": "eager", "tok/s": 90.0, "peak GB": 2.0, "loss": 1.0},
                        {"train": "new", "tok/s": 1.0}],
                 loader=[{"loader": "read", "ms/batch": 4.0}],
                 sample=[{"sample": "ours", "tok/s": 10.2, "x lecture": None}])
    command.print_comparison(old, new)
    assert capsys.readouterr().out.splitlines() == [
        "compared      unit      before    now  ratio",
        "train: eager  tok/s     100.00  90.00   0.90",
        "train: eager  peak GB     4.00   2.00   2.00",
        "loader: read  ms/batch    2.00   4.00   0.50",
        "sample: ours  tok/s      10.00  10.20   1.02",
        "2 of 4 are worse by more than 5%: train: eager (tok/s), loader: read (ms/batch)"]


def test_the_comparison_prints_settings_that_differ(capsys):
    old = result(train=[{"train": "eager", "tok/s": 100.0}])
    new = {**old, "machine": {"device": "b"}}
    command.print_comparison(old, new)
    assert "different device: 'a' before, 'b' now" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no measurement in common"):
        command.print_comparison(old, result(loader=[]))


@pytest.fixture
def run_bench(monkeypatch):
    """A function that runs the command in this process; "train" returns --steps as its tok/s."""
    def train(args):
        return [{"train": "eager", "tok/s": float(args.steps)}]

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, flags), "--device", "cpu"])
        command.main()
    run_in_this_process(monkeypatch, command)
    monkeypatch.setitem(command.BENCHMARKS, "train", train)
    return run


def test_main_writes_json_and_compares_with_it(run_bench, tmp_path, capsys):
    path = tmp_path / "result.json"
    run_bench("train", "--dtype", "float32", "--json", path)
    written = json.loads(path.read_text())
    assert written["benchmarks"] == {"train": [{"train": "eager", "tok/s": 6.0}]}
    assert written["machine"]["torch"]
    assert {"B": 4, "T": 512, "dtype": "float32"}.items() <= written["settings"].items()
    run_bench("train", "--quick", "--compare", path)  # --quick has 3 steps
    assert "1 of 1 are worse by more than 5%: train: eager (tok/s)" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_result_that_cannot_be_written_is_compared_all_the_same(run_bench, tmp_path,
                                                                 monkeypatch, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(result(train=[{"train": "eager", "tok/s": 6.0}])))

    def full(*_):
        raise OSError("No space left on device")
    monkeypatch.setattr(command, "atomic_write", full)
    with pytest.raises(OSError, match="No space left"):
        run_bench("train", "--json", tmp_path / "new.json", "--compare", old)
    assert "0 of 1 are worse" in capsys.readouterr().out


def test_all_runs_every_benchmark_and_quick_skips_the_ladder(run_bench, monkeypatch):
    assert list(command.BENCHMARKS) == command.NAMES
    ran = []
    for name in command.BENCHMARKS:
        monkeypatch.setitem(command.BENCHMARKS, name, lambda args, name=name: ran.append(name))
    every = ["train", "ladder", "hellaswag", "sample", "tokenize", "loader", "checkpoint"]
    run_bench("all")
    assert ran == every
    ran.clear()
    run_bench("all", "--quick")
    every.remove("ladder")
    assert ran == every


def test_children_end_when_their_parent_is_killed():
    """A benchmark once computed for half an hour after its parent was killed."""
    child = "print('started', flush=True); import time; time.sleep(300)"
    parent = f"from bench.measure import in_fresh_process; in_fresh_process(exec, {child!r})"
    with subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__': {parent}"], cwd=ROOT,
                          env=ENV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.kill()
        # returns when the child, which has the same stdout, has ended
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_process_that_is_killed_raises():
    with pytest.raises(MemoryError, match="was killed"):
        measure.in_fresh_process(os._exit, 1)


@pytest.mark.slow
def test_ranks_of_ddp_are_timed_together():
    """Two gloo ranks of 124M at the smallest batch: their gradients are averaged, so both have
    the same loss."""
    args = tiny_args(size="gpt2", B=1, steps=1)
    step = bench.train.time_step(Variant("float32", world_size=2), args)
    assert step["ms/step"] > 0
    assert 5 < step["loss"] < 10.5  # of one batch, after two steps of warm-up


@pytest.mark.slow
def test_the_command_prints_a_table(tmp_path):
    process = python("-m", "bench", "loader", "--batch-size", "1", "--sequence-length", "16",
                     "--steps", "1", "--json", "result.json",
                     cwd=tmp_path, timeout=300, env={"PYTHONPATH": ROOT})
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["benchmarks"]["loader"]
    assert [row["loader"] for row in rows] == [
        "read and cast a batch", "wait for a batch", "training step"]
    assert process.stdout.splitlines()[-4].split() == ["loader", "ms/batch", "%", "of", "step"]
