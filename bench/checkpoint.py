"""How long a save delays training, compared with a synchronous save, and how long loading takes."""
import os
import tempfile
import time

from run import checkpoint, parallel, runtime
from run.folder import paths
from bench.measure import print_table, timed
from bench.train import Variant, build_step


def bench_checkpoint(args):
    """Rows of a synchronous save, a save in the background, and loading.

    Each is given in seconds and in training steps. The checkpoint holds the weights and AdamW's
    moments. The stall is how much longer training takes while a checkpoint is saved in the
    background, the copy included.
    """
    ranks = parallel.Ranks(0, 0, 1, args.device, False)
    run, raw_model, optimizers = build_step(Variant(args.dtype), args, ranks)
    step, _ = timed(run, args.device, args.steps, 2)

    def copied():
        weights, states = parallel.full_state(raw_model, optimizers, ranks)
        state = {"optimizers": states, "scaler": {}, "loader": {}, "rng": [], "train_config": {}}
        return checkpoint.model_contents(raw_model, None, weights), state

    def load():
        latest = checkpoint.load_latest(folder)
        raw_model.load_state_dict(latest.model["model"])
        parallel.load_full_optimizer_state(optimizers, latest.state["optimizers"])

    with tempfile.TemporaryDirectory() as folder:
        synchronous, _ = timed(lambda: checkpoint.save(folder, 1, *copied()), args.device)
        writer = checkpoint.Writer()
        start = time.perf_counter()
        copy, _ = timed(lambda: writer.start(checkpoint.save, folder, 2, *copied()), args.device)
        steps = 0
        while steps == 0 or not writer.pending.done():
            run()
            steps += 1
        runtime.synchronize(args.device)
        stall = time.perf_counter() - start - steps * step
        writer.wait()
        loading, _ = timed(load, args.device)
        size = sum(os.path.getsize(path) for path in paths(folder, 2))
    times = {
        "synchronous save": synchronous,
        "background save: stall": stall,
        "background save: copy": copy,
        "load": loading,
    }
    rows = []
    for name, seconds in times.items():
        rows.append({"checkpoint": name, "seconds": seconds, "training steps": seconds / step,
                     "GB": size / 1e9})
    return print_table(rows)
