"""
bench.py: what it measures is what it says, its table, its JSON, its comparison of two results.

    ./test.sh tests/test_bench.py        # no network, no GPU; a model of two blocks and 32 channels

No test asserts a time. The references are checked against the model they stand beside; slow tests run the command itself.
"""
import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import bench
import bench_checkpoint
import bench_data
import bench_hellaswag
import bench_ladder
import bench_limits
import bench_train
import hellaswag
import model as model_module
import runtime
from bench_train import Step, build_step

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = runtime.Ranks(0, 0, 1, "cpu", False)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A size "tiny" for what runs in this process; sets torch's float32 precision back afterwards."""
    monkeypatch.setitem(model_module.SIZES, "tiny", (2, 2, 32, 64))
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def alone(monkeypatch, *modules):
    """Lets modules run in this process what they would run in a fresh one."""
    for module in modules:
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *args: function(*args))


def tiny_args(**changes):
    """The flags of a figure at the tiny size."""
    flags = dict(size="tiny", batch_size=2, sequence_length=16, steps=2, ranks=0, picture=None, data=None, limit=2, repeats=1,
                 device="cpu", dtype="float32")
    return argparse.Namespace(**{**flags, **changes})


# -----------------------------------------------------------------------------
# the variants of the step compute the same thing

def losses(step, steps=3):
    run, _, _ = build_step(step, "tiny", 2, 16, ALONE)
    return [run() for _ in range(steps)]


@pytest.mark.parametrize("changes", [dict(flash=False), dict(ours=False), dict(fused=False), dict(grad_accum_steps=3),
                                     dict(flash=False, ours=False, fused=False)])
def test_every_rung_trains_as_ours_does(changes):
    """A rung changes how the step is computed, never what; the same batch three times over has the same mean gradient."""
    assert losses(Step("float32", **changes)) == pytest.approx(losses(Step("float32")), abs=2e-4)


def test_written_out_attention_is_attention():
    q, k, v = torch.randn(3, 2, 3, 8, 4).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(bench_train.written_out_attention(q, k, v), expected, atol=1e-6)


def test_a_step_is_built_of_what_it_says():
    _, raw_model, optimizers = build_step(Step("float32", flash=False, vocab_size=50257, fused=False, ours=False), "tiny", 2,
                                          16, ALONE)
    assert raw_model.config.vocab_size == 50257
    assert {type(block.attn) for block in raw_model.transformer.h} == {bench_train.WrittenOutAttention}
    assert not optimizers[0].defaults["fused"] and not optimizers[0].param_groups[0]["fused"]
    logits, _ = raw_model(*torch.zeros(2, 2, 16, dtype=torch.long).unbind(0))
    assert logits.requires_grad
    _, raw_model, optimizers = build_step(Step("float32"), "tiny", 2, 16, ALONE)
    logits, _ = raw_model(*torch.zeros(2, 2, 16, dtype=torch.long).unbind(0))
    assert not logits.requires_grad and optimizers[0].defaults["fused"]


def test_the_limit_counts_every_matmul_and_attention_of_the_step(monkeypatch):
    """Each call is said to take as many seconds as it has FLOPs: the sum must be what flops_per_token counts."""
    def flops(function, shapes, dtype, device, repeats):
        if function is F.linear:
            (rows, n_in), (n_out, _) = shapes
            return 6 * rows * n_in * n_out
        (B, nh, T, hs), _, _ = shapes
        return 12 * B * nh * T * T * hs
    monkeypatch.setattr(bench_train, "forward_backward_seconds", flops)
    _, raw_model, _ = build_step(Step("float32"), "tiny", 2, 16, ALONE)
    matrices = sum(p.numel() for name, p in raw_model.named_parameters() if p.dim() == 2 and "wpe" not in name)
    expected = 2 * 16 * (6 * matrices + 12 * 2 * 32 * 16)
    assert bench_train.time_matmuls_and_attention("tiny", 2, 16, "float32", "cpu", 1) == expected


# -----------------------------------------------------------------------------
# the ladder

def test_the_ladder_climbs_from_float32_to_the_step_we_train_with():
    steps = {name: step for name, step, _ in bench_ladder.climb("bfloat16", "cpu", 2)}
    assert steps["float32"] == Step("float32", False, False, False, 50257, False, False)
    assert steps["DDP x 2"] == Step("bfloat16", tf32=False, compile=True, grad_accum_steps=4, world_size=2)
    assert steps["TF32"] is None  # a CPU has none


def test_a_rung_that_the_machine_lacks_says_why():
    why = {name: note for name, step, note in bench_ladder.climb("float32", "mps", 1) if step is None}
    assert why.keys() == {"TF32", "float32 autocast", "torch.compile", "fused AdamW", "DDP x 1"} and all(why.values())


def test_ladder_rows_are_each_against_the_rung_before(monkeypatch, tmp_path):
    """With clocks of our own: 100 s in float32, half of it from bf16 on, and a rung that does not fit in memory."""
    def time_step(step, size, B, T, device, repeats, warmup):
        if step.fused and not step.ours:
            raise MemoryError
        return {"seconds": step.grad_accum_steps * (100 if step.dtype == "float32" else 50), "loss": 1.0, "memory": 2e9,
                "flops": 6400 * step.grad_accum_steps}
    monkeypatch.setattr(bench_ladder, "time_step", time_step)
    monkeypatch.setattr(bench_ladder, "in_fresh_process", lambda function, *args: 640.0)
    picture = tmp_path / "ladder.png"
    rows = {row["ladder"]: row for row in bench_ladder.bench_ladder(tiny_args(dtype="bfloat16", picture=str(picture)))}
    assert rows["float32"]["tok/s"] == 0.32 and rows["float32"]["gain"] == 1 and rows["float32"]["% of matmul peak"] == 10
    assert rows["bfloat16 autocast"]["gain"] == 2 and rows["torch.compile"]["gain"] == 1
    assert rows["fused AdamW"]["tok/s"] is None and rows["fused AdamW"]["note"] == "out of memory"
    last = rows["gradient accumulation x 4"]
    assert last["tok/s"] == 0.64 and last["x float32"] == 2 and last["% of matmul peak"] == 20 and last["MFU %"] is None
    assert "7.6 x" in rows["flash attention"]["note"] and "2 x" in rows["torch.compile"]["note"]
    assert picture.read_bytes().startswith(b"\x89PNG") and os.listdir(tmp_path) == ["ladder.png"]


# -----------------------------------------------------------------------------
# the other figures

def test_loader_and_checkpoint_have_rows_for_a_tiny_model(monkeypatch):
    alone(monkeypatch, bench_data, bench_checkpoint, bench_train)
    rows = bench_data.bench_loader(tiny_args())
    assert rows[-1]["% of a step"] == 100 and all(row["ms a batch"] > 0 for row in rows)
    rows = bench_checkpoint.bench_checkpoint(tiny_args())
    params = 50304 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert rows[0]["GB"] == pytest.approx(3 * 4 * params / 1e9, rel=0.01)  # float32 weights and AdamW's two moments


def test_examples_made_of_input_txt_are_what_hellaswag_reads():
    examples = bench_hellaswag.examples_of_input_txt(5)
    assert len({json.dumps(example) for example in examples}) == 5
    for example in examples:
        tokens, mask, _ = hellaswag.render_example(example)
        assert tokens.shape[0] == 4 and mask.any(dim=1).all()


def test_documents_made_of_input_txt_are_the_text(tmp_path):
    import pyarrow.parquet as pq
    bench_data.write_input_txt_as_parquet(tmp_path, copies=2)
    texts = ["".join(pq.read_table(path)["text"].to_pylist()) for path in sorted(tmp_path.iterdir())]
    with open(os.path.join(ROOT, "input.txt"), encoding="utf-8") as f:
        assert texts == [f.read()] * 2


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
    assert bench_limits.forward_backward_seconds(Square.apply, [(4, 4)], "float32", "cpu", repeats=3) > 0
    assert calls == ["forward", *["forward", "backward"] * 5]  # the gradient's shape, two to warm up, three


# -----------------------------------------------------------------------------
# the command

def result(**figures):
    return {"machine": {"device": "a"}, "settings": {"size": "gpt2"}, "figures": figures}


def test_compare_names_what_became_worse_whatever_the_unit():
    old = result(train=[{"step": "eager", "tok/s": 100.0, "peak GB": 4.0, "loss": 9.0}, {"step": "gone", "tok/s": 1.0}],
                 loader=[{"loader": "read", "ms a batch": 2.0}], limits=[{"limits": "copy", "GB/s": 10.0, "GFLOP/s": None}])
    new = result(train=[{"step": "eager", "tok/s": 90.0, "peak GB": 2.0, "loss": 1.0}, {"step": "new", "tok/s": 1.0}],
                 loader=[{"loader": "read", "ms a batch": 4.0}], limits=[{"limits": "copy", "GB/s": 10.2, "GFLOP/s": None}])
    rows = {(row["figure"], row["unit"]): (row["ratio"], row["now"]) for row in bench.compare(old, new)}
    assert rows == {("train: eager", "tok/s"): (0.9, "worse"), ("train: eager", "peak GB"): (2.0, "better"),
                    ("loader: read", "ms a batch"): (0.5, "worse"), ("limits: copy", "GB/s"): (pytest.approx(1.02), "same")}


def test_the_comparison_says_what_else_changed(capsys):
    old, new = result(train=[{"step": "eager", "tok/s": 100.0}]), result(train=[{"step": "eager", "tok/s": 50.0}])
    new["machine"]["device"] = "b"
    bench.print_comparison(old, new)
    printed = capsys.readouterr().out
    assert "another device: was 'a', is 'b'" in printed
    assert "1 of 1 became worse by more than 5%: train: eager (tok/s)" in printed
    with pytest.raises(ValueError, match="no figure in common"):
        bench.print_comparison(old, result(loader=[]))


def test_a_table_is_aligned_and_has_a_dash_for_what_was_not_measured(capsys):
    bench.print_table([{"a": "x", "tok/s": 1234.5}, {"a": "longer", "tok/s": None}])
    assert capsys.readouterr().out.splitlines() == ["a          tok/s", "x       1,234.50", "longer         -"]


def test_main_writes_the_json_it_prints_and_compares_it(tmp_path, monkeypatch, capsys):
    alone(monkeypatch, bench)
    monkeypatch.setitem(bench.FIGURES, "limits", lambda args: [{"limits": "copy", "GB/s": float(args.steps)}])
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "limits", "--device", "cpu", "--json", str(path)])
    bench.main()
    written = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
    assert written["figures"] == {"limits": [{"limits": "copy", "GB/s": 6.0}]} and written["machine"]["torch"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "limits", "--device", "cpu", "--quick", "--compare", str(path)])
    bench.main()
    assert "1 of 1 became worse by more than 5%: limits: copy (GB/s)" in capsys.readouterr().out  # 3 steps in --quick
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("flags, message", [(["all", "--data", "x"], "--data"), (["train", "--steps", "0"], "--steps"),
                                            (["train", "--batch-size", "-1"], "--steps"), (["nothing"], "invalid choice")])
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        bench.parse_args(flags)


def test_what_is_no_result_cannot_be_compared_with(tmp_path):
    for contents in ("[1]", "no JSON"):
        (tmp_path / "old.json").write_text(contents)
        with pytest.raises(ValueError, match="--compare takes what --json wrote"):
            bench.read_result(str(tmp_path / "old.json"))


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_and_not_a_wait():
    with pytest.raises(MemoryError, match="was killed"):
        bench_limits.in_fresh_process(os._exit, 1)


@pytest.mark.slow
def test_ranks_of_ddp_are_timed_together():
    """Two gloo ranks of 124M at the smallest batch: their gradients are averaged, so both see the same loss."""
    figures = bench_train.time_step(Step("float32", world_size=2), "gpt2", 1, 16, "cpu", 1, 1)
    assert figures["seconds"] > 0 and 5 < figures["loss"] < 10.5  # one batch, twice


@pytest.mark.slow
def test_the_command_prints_a_table_and_one_line_of_json(tmp_path):
    process = subprocess.run([sys.executable, os.path.join(ROOT, "bench.py"), "limits"], cwd=tmp_path, capture_output=True,
                             text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout.splitlines()[-1])["figures"]
    assert [row["GFLOP/s"] is None for row in figures["limits"]] == [False, False, True]
