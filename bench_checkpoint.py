"""
What a checkpoint costs: the stall of training while it is written, and the time to go on from it (bench.py checkpoint).

The reference is the same checkpoint written in line, with training waiting for the disk.
"""
import os
import tempfile
import time
from dataclasses import asdict

import checkpoint
import runtime
from bench_limits import in_fresh_process, median_seconds, shape_for
from bench_train import Step, build_step


def time_checkpoint(size, B, T, dtype, device, repeats):
    """{"step", "in line", "copy", "stall", "restore": seconds, "bytes"} of a checkpoint, weights and AdamW's state.

    stall: how much longer the steps take, the copy included, from a save to the moment all is on disk.
    """
    ranks = runtime.Ranks(0, 0, 1, device, False)
    run, raw_model, optimizers = build_step(Step(dtype), size, B, T, ranks)
    seconds = median_seconds(run, repeats, device)
    state = {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "scaler": {}, "loader": {}, "rng": [],
             "log_bytes": 0, "train_config": {}}
    contents = {"model": raw_model.state_dict(), "config": asdict(raw_model.config), "val_loss": None}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        checkpoint.save(folder, 1, contents, state)
        in_line = time.perf_counter() - start
        writer = checkpoint.Writer()
        start, steps = time.perf_counter(), 0
        writer.start(checkpoint.save, folder, 2, *checkpoint.snapshot((contents, state)))
        copy = time.perf_counter() - start
        while steps == 0 or not writer.pending.done():
            run()
            steps += 1
        runtime.synchronize(device)
        stall = time.perf_counter() - start - steps * seconds
        writer.wait()
        size_of = sum(os.path.getsize(path) for path in checkpoint.paths(folder, 2))
        start = time.perf_counter()
        model, saved, _ = checkpoint.load_latest(folder)
        checkpoint.load_weights(raw_model, model["model"], "the checkpoint")
        for optimizer, old in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        runtime.synchronize(device)
        restore = time.perf_counter() - start
    return {"step": seconds, "in line": in_line, "copy": copy, "stall": stall, "restore": restore, "bytes": size_of}


def bench_checkpoint(args):
    """Rows of seconds and of steps of training: in line, in the background (all of the stall; its copy alone), going on."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    B, T = shape_for(args, device)
    figures = in_fresh_process(time_checkpoint, args.size, B, T, dtype, device, args.steps)
    names = {"in line": "written while training waits", "stall": "written in the background: all of the stall",
             "copy": "  of which the copy", "restore": "loaded again"}
    return [{"checkpoint": name, "seconds": figures[key], "steps": figures[key] / figures["step"],
             "GB": figures["bytes"] / 1e9} for key, name in names.items()]
