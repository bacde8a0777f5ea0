"""
Trains GPT-2: the recipe of GPT-2 and GPT-3, on one CPU, one GPU or many.

    python train_gpt2.py                                              # picks a preset by the data at hand, says which
    python train_gpt2.py --preset gpt2-124M --data edu_fineweb10B
    torchrun --standalone --nproc_per_node=8 train_gpt2.py            # DDP on every GPU of this machine
    python train_gpt2.py --preset gpt2-1558M --dry-run                # the plan: memory, steps, FLOPs, hours

Writes into log/<exp-name>/: log.txt (`step stream value` a line), config.json, model_*.pt and state_*.pt (see
checkpoint.py), loss.png. Started again, it goes on from the newest checkpoint. SIGTERM, SIGUSR1 and Ctrl-C finish the
step, save, and end with status 0, 75 and 130; a second Ctrl-C ends at once.

Sources: the GPT-2 paper (Radford et al. 2019), the GPT-3 paper (Brown et al. 2020, tables 2.1 and appendix B) for the
learning rates and the schedule, and the lecture "Let's reproduce GPT-2 (124M)", whose names are kept.
"""
import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field

import torch

import checkpoint
import data
import hellaswag
import parallel
from config import (FINEWEB_DIR, FINEWEB_TOKENS, TrainConfig, choose_batch_size, estimate_memory, make_config,
                    memory_table, parse_args, run_folder)
from model import GPT, GPTConfig
from plots import plot_run, read_log
from runtime import (Ranks, Stop, StopSignals, agree, all_gather, all_reduce_sum, autocast, be_deterministic, choose_dtype,
                     device_name, free_memory, get_rng_state, keep_freed_memory, peak_flops, print0, rank0_first, run_main,
                     seed_all, set_rng_state, setup, synchronize, teardown, write_run_description)
from sample import generate_text
from tracker import check_tracker, open_tracker

# -----------------------------------------------------------------------------
# the pieces of the loop

def get_lr(step, max_lr, min_lr, warmup_steps, max_steps, schedule="cosine", wsd_decay=0.2):
    """Learning rate of a step: linear warm-up, then a cosine from max_lr down to min_lr.

    Schedule "wsd" (warm-up, stable, decay; Hu et al. 2024) stays at max_lr and falls in a straight line to min_lr over the
    last wsd_decay of max_steps.
    """
    # 1) linear warm-up; + 1, for a first step at 0 would teach nothing
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    # 2) past max_steps it stays at the minimum
    if step >= max_steps:
        return min_lr
    # 3) in between, constant and then a line
    if schedule == "wsd":
        return min_lr + min(1.0, (max_steps - step) / (wsd_decay * max_steps)) * (max_lr - min_lr)
    # 4) or half a cosine
    decay_ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (max_lr - min_lr)


class NotFinite(ValueError):
    """A loss or gradient norm that is not finite; the weights are as they were before the step."""


def train_step(model, raw_model, optimizers, scaler, loader, lr, grad_accum_steps, grad_clip, dtype, ranks):
    """One optimizer step over total_batch_size tokens; (loss, gradient norm) before it, means over all ranks.

    Raises NotFinite, with the weights as they were, when the loss or the norm is not finite.
    """
    first_window = loader.position
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss_accum = torch.zeros((), device=ranks.device)
    for micro_step in range(grad_accum_steps):
        x, y = loader.next_batch()
        if ranks.ddp:
            # gradients are summed over the ranks once, in the last backward; DDP reads this in its forward; FSDP sums always
            model.require_backward_grad_sync = (micro_step == grad_accum_steps - 1)
        with autocast(ranks.device, dtype):
            _, loss = model(x, y)
        # gradients of successive backward() calls add up: a SUM, where the loss of a large batch is a MEAN
        loss = loss / grad_accum_steps
        loss_accum += loss.detach()
        scaler.scale(loss).backward()
    own_loss = loss_accum.clone()  # this rank's, to say where one that is not finite came from
    loss_accum = all_reduce_sum(loss_accum, ranks) / ranks.world_size
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = parallel.clip_grad_norm(raw_model, grad_clip)
    loss, norm = loss_accum.item(), norm.item()  # the one point of a step where the CPU waits for the GPU
    # in float16 a norm that overflows is the scaler's to handle: it skips the step and halves the scale, within reason
    overflow = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
        scaler.update()
        where = [rank for rank, value in enumerate(all_gather(own_loss.item(), ranks)) if not math.isfinite(value)]
        raise NotFinite(f"loss {loss}{f' (rank {where})' if where else ''}, gradient norm {norm} in the step that read"
                        f" windows {first_window} to {loader.position - 1} of the data's order; the weights were not"
                        " updated")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.step(optimizer)
    scaler.update()
    return loss, norm


@torch.no_grad()
def evaluate_loss(raw_model, stream, B, T, val_tokens, dtype, ranks, check=lambda: None):
    """Mean cross entropy over the first val_tokens tokens of the val split; each rank takes a part of them.

    check() is called before each batch, equally often on all ranks; what it raises ends the evaluation.
    """
    raw_model.eval()
    total, count = 0.0, 0
    # logits are the largest thing in an evaluation: at most 4096 tokens of them at a time
    B = max(1, min(B, 4096 // T))
    for x, y in data.iterate_batches(stream, B, T, val_tokens, ranks.rank, ranks.world_size, ranks.device):
        check()
        if len(x) > 0:  # not on a rank that has no window left
            with autocast(ranks.device, dtype):
                _, loss = raw_model(x, y)
            total += loss.item() * y.numel()
            count += y.numel()
    raw_model.train()
    sums = torch.tensor([total, count], dtype=torch.float32 if ranks.device == "mps" else torch.float64, device=ranks.device)
    total, count = all_reduce_sum(sums, ranks).tolist()
    return total / count


def print_samples(raw_model, prompt, dtype, ranks, num_samples=4, max_new_tokens=32):
    """Prints samples that begin with prompt; the ranks share them out."""
    raw_model.eval()
    for i in range(ranks.rank, num_samples, ranks.world_size):
        with autocast(ranks.device, dtype):
            text, = generate_text(raw_model, prompt, 1, max_new_tokens, seed=42 + i)
        print(f"sample {i}: {text!r}", flush=True)
    raw_model.train()


class Log:
    """log.txt, one `step stream value` a line; on resume what lies past keep_bytes is cut off, to be written again."""

    def __init__(self, path, keep_bytes, track=None):
        self.track = track  # tracker.open_tracker's function, or None
        with open(path, "ab") as f:
            if f.tell() < keep_bytes:
                print0(f"{path} has lost its end: {f.tell():,} bytes are left of {keep_bytes:,}")
            f.truncate(min(keep_bytes, f.tell()))
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # by the line: what was logged is on its way to disk

    def write(self, step, stream, value):
        """Appends one fact."""
        self.file.write(f"{step} {stream} {value}\n")

    def size(self):
        """Bytes so far, all of them on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()


def report(log, step, quiet=False, **facts):
    """Logs facts (stream=value) of a step on rank 0, and prints them unless quiet."""
    for stream, value in facts.items():
        if log is not None:
            log.write(step, stream, value)
        if not quiet:
            print0(f"step {step:5d} | {stream} {value:.4f}")
    if log is not None and log.track:
        log.track(step, facts)


# -----------------------------------------------------------------------------
# saving and going on

def save(run, step, val_loss, evaluated):
    """Copies what the checkpoint of step holds (all ranks call it); rank 0 writes it while training goes on.

    evaluated: whether what is due at this step is in the log; else the run does it when it goes on.
    """
    rng = all_gather(get_rng_state(run.ranks.device), run.ranks)
    run.saved_at = time.monotonic()
    run.writer.wait()  # for the checkpoint before this one: its copy is freed before the next is made
    weights, optimizer_states = parallel.full_state(run.raw_model, run.optimizers, run.ranks)
    if not run.ranks.master_process:
        return
    state = {"optimizers": optimizer_states, "scaler": run.scaler.state_dict(),
             "loader": run.loader.state_dict(), "rng": rng, "log_bytes": run.log.size(), "evaluated": evaluated,
             "skipped": run.skipped, "train_config": asdict(run.config)}
    model_contents = {**checkpoint.contents_of(run.raw_model, val_loss), "model": weights}
    run.writer.start(write_checkpoint, run.run_dir, step, model_contents, state)


def write_checkpoint(run_dir, step, model_contents, state):
    """The writer thread's part of save: the files, then the removal of those that need not be kept."""
    checkpoint.save(run_dir, step, model_contents, state)
    best, config = None, state["train_config"]
    if config["keep_best"]:
        losses = dict(read_log(os.path.join(run_dir, "log.txt")).get("val", []))
        best = min((s for s in checkpoint.saved_steps(run_dir) if s in losses), key=losses.get, default=None)
    checkpoint.prune(run_dir, config["keep_last"], best)
    print0(f"saved {checkpoint.paths(run_dir, step)[0]}")


def restore(state, optimizers, scaler, loader, ranks, force):
    """Puts back all that save wrote but the weights. With another number of ranks, only the generators start afresh."""
    parallel.load_full_optimizer_state(optimizers, state["optimizers"])
    if state["scaler"]:  # empty where the run was not in float16
        scaler.load_state_dict(state["scaler"])
    loader.load_state_dict(state["loader"], force)
    if len(state["rng"]) == ranks.world_size:
        set_rng_state(state["rng"][ranks.rank], ranks.device)
    else:
        print0(f"  changed: {ranks.world_size} processes, were {len(state['rng'])}; the data's order is the same")


# -----------------------------------------------------------------------------
# the run

@dataclass
class Run:
    """What set_up builds and the loop uses."""
    config: TrainConfig
    ranks: Ranks
    dtype: str                  # of the matmuls
    raw_model: GPT              # evaluated, sampled, saved; its parameters are the only ones
    model: torch.nn.Module      # the same, compiled and wrapped in DDP: trained
    optimizers: list
    scaler: torch.amp.GradScaler
    loader: data.DataLoaderLite
    val_stream: data.TokenStream
    score_hellaswag: object     # function of (raw_model, dtype), or None
    grad_accum_steps: int
    first_step: int
    max_steps: int
    skipped: int                # steps left out for a loss that was not finite
    run_dir: str
    log: object                 # Log on rank 0, else None
    evaluated: bool = False     # whether what is due at first_step was done before the run was stopped there
    writer: checkpoint.Writer = field(default_factory=checkpoint.Writer)
    saved_at: float = field(default_factory=time.monotonic)  # when the last checkpoint was made

    def close(self):
        """Ends the threads, the writer's when all is on disk; raises what went wrong in it."""
        self.loader.close()
        self.writer.wait()


def open_data(config, ranks):
    """(train TokenStream, val TokenStream); text is tokenized first, by one rank."""
    with rank0_first(ranks):
        splits = data.prepare_data(config.data)
    train_stream, val_stream = (data.TokenStream(shards, config.vocab_size) for shards in splits)
    for split, stream in (("train", train_stream), ("val", val_stream)):
        if len(stream) <= config.sequence_length:
            raise ValueError(f"the {split} split of {config.data} has {len(stream)} tokens, too few for one sequence of"
                             f" {config.sequence_length} and its target; give more text or a smaller --block-size")
    return train_stream, val_stream


def make_plan(config, num_tokens, ranks, dtype):
    """(B, grad_accum_steps, max_steps) for num_tokens training tokens; prints them and what they will take."""
    with torch.device("meta"):  # counts without memory
        model = GPT(config.gpt_config())
    T, memory = config.sequence_length, free_memory(ranks.device)
    B = choose_batch_size(config, model.num_params(), ranks.world_size, memory, ranks.device == "cpu", dtype)
    B = min(all_gather(B, ranks))  # the ranks may have seen different amounts of free memory
    grad_accum_steps = config.total_batch_size // (B * T * ranks.world_size)
    epoch_tokens = (num_tokens - 1) // T * T
    max_steps = config.max_steps or int(config.epochs * epoch_tokens / config.total_batch_size)
    if max_steps < 1:
        raise ValueError(f"{config.epochs} epochs of {num_tokens:,} tokens are less than one step of"
                         f" {config.total_batch_size:,}: more --epochs, --max-steps, or a smaller --total-batch-size")
    flops = model.flops_per_token(T)
    total = flops * max_steps * config.total_batch_size
    plan = (config, model.num_params(), B, dtype, ranks.world_size, ranks.device == "cpu")
    needed = estimate_memory(*plan)
    print0(f"model: {model.num_params():,} parameters, {model.config}\n"
           f"data: {num_tokens:,} training tokens; {max_steps:,} steps of {config.total_batch_size:,} tokens"
           f" = {max_steps * config.total_batch_size / epoch_tokens:.2f} epochs\n"
           f"a step: {grad_accum_steps} micro-steps of B={B} x T={T} on each of {ranks.world_size} process(es),"
           f" {ranks.device_type}, {dtype}\n"
           f"memory: about {needed / 1e9:.1f} GB a process" + (f", {memory / 1e9:.1f} GB free" if memory else "")
           + (": THIS WILL NOT FIT" if memory and needed > memory else "") + "\n"
           f"work: {flops / 1e9:.3f} GFLOP a token, {total:.3g} FLOP in all" + ("\n" + memory_table(*plan)) * config.dry_run)
    if peak := peak_flops(ranks.device, dtype):
        print0(f"time: about {total / (0.5 * peak * ranks.world_size) / 3600:.1f} hours at half the peak of"
               f" {ranks.world_size} x {device_name(ranks.device)}")
    return B, grad_accum_steps, max_steps


def build_model(config, saved, device):
    """The GPT to train, on its device: as saved, or with init_from's weights, or fresh from the seed."""
    if not saved and config.init_from:
        return checkpoint.load_model(config.init_from, device, config.block_size, config.dropout)[0].train()
    model = GPT(GPTConfig(**saved[0]["config"]) if saved else config.gpt_config())
    if saved:
        checkpoint.load_weights(model, saved[0]["model"], "the checkpoint")
    return model.to(device)


def set_up(config, saved, ranks):
    """The Run of a config, from its beginning or from what was saved; None if there is nothing to train."""
    check_tracker(config.tracker)
    dtype = choose_dtype(config.dtype, ranks.device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, on GPUs that have it
    if config.deterministic:
        be_deterministic()
    if config.dry_run and config.data == FINEWEB_DIR and not os.path.exists(FINEWEB_DIR):
        print0(f"{FINEWEB_DIR}/ is not there yet: this is the plan for FineWeb-Edu's sample of 10B tokens")
        make_plan(config, FINEWEB_TOKENS, ranks, dtype)
        return None
    train_stream, val_stream = open_data(config, ranks)
    B, grad_accum_steps, max_steps = make_plan(config, len(train_stream), ranks, dtype)
    run_dir, first_step = os.path.join(config.log_dir, config.exp_name), saved[1]["step"] if saved else 0
    evaluated = bool(saved) and saved[1].get("evaluated", True)
    finished = evaluated and first_step >= max_steps
    if finished:
        print0(f"{run_dir} is finished at step {first_step}: sample from it with python sample.py {run_dir},"
               " train on with --max-steps, or begin anew with --exp-name")
    if config.dry_run or finished:
        return None
    run = build_run(config, saved, ranks, dtype, train_stream, val_stream, B, grad_accum_steps, max_steps)
    run.evaluated = evaluated
    return run


def build_run(config, saved, ranks, dtype, train_stream, val_stream, B, grad_accum_steps, max_steps):
    """The Run itself: loader, weights, optimizers, the compiled and wrapped model, the log; as saved, or fresh."""
    T, run_dir = config.sequence_length, os.path.join(config.log_dir, config.exp_name)
    first_step, skipped = (saved[1]["step"], saved[1].get("skipped", 0)) if saved else (0, 0)
    loader = data.DataLoaderLite(train_stream, B, T, ranks.rank, ranks.world_size, config.shuffle == "on", config.seed,
                                 ranks.device)
    seed_all(config.seed)                       # the same weights on every rank
    raw_model = build_model(config, saved, "cpu" if parallel.is_fsdp(config, ranks) else ranks.device)
    model = parallel.wrap(raw_model, config, max_steps - first_step, B, dtype, ranks)
    optimizers = parallel.make_optimizers(raw_model, config, ranks)
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
    seed_all(config.seed + 1 + ranks.rank)      # from here on only dropout draws, differently on each rank
    if saved:
        restore(saved[1], optimizers, scaler, loader, ranks, config.force)
    score_hellaswag = hellaswag.for_training(config.hellaswag, ranks) if config.hella_every else None
    log = open_log(run_dir, config, saved, ranks, dtype) if ranks.master_process else None
    return Run(config, ranks, dtype, raw_model, model, optimizers, scaler, loader, val_stream, score_hellaswag,
               grad_accum_steps, first_step, max_steps, skipped, run_dir, log)


def open_log(run_dir, config, saved, ranks, dtype):
    """The Log of a run folder, cut back to what was saved; config.json beside it; newer checkpoints out of the way."""
    if newer := checkpoint.set_aside(run_dir, saved[1]["step"] if saved else -1):
        print0(f"set aside, as *.aside: {', '.join(newer)}")
    write_run_description(os.path.join(run_dir, "config.json"), asdict(config), ranks, dtype)
    keep_bytes, first_step = (saved[1]["log_bytes"], saved[1]["step"]) if saved else (0, 0)
    return Log(os.path.join(run_dir, "log.txt"), keep_bytes, open_tracker(config.tracker, run_dir, asdict(config), first_step))


def due(step, every, run):
    """Whether it is time for what happens every so many steps, and at the end; not at the step a run was resumed from,
    if it happened before that was saved."""
    return every and (step % every == 0 or step == run.max_steps) and not (step == run.first_step and run.evaluated)


def train_and_log(run, step):
    """One step of training and the line about it."""
    config, ranks, loader = run.config, run.ranks, run.loader
    epoch = int(loader.epoch)
    lr = get_lr(step, config.lr, config.lr * config.min_lr_ratio, config.warmup_steps, run.max_steps, config.schedule,
                config.wsd_decay)
    synchronize(ranks.device)
    t0 = time.perf_counter()
    try:
        loss, norm = train_step(run.model, run.raw_model, run.optimizers, run.scaler, loader, lr, run.grad_accum_steps,
                                config.grad_clip, run.dtype, ranks)
    except NotFinite as e:
        if run.skipped >= config.skip_nonfinite:
            raise NotFinite(f"step {step}: {e}. Go on from the last checkpoint with a lower --lr, --dtype float32,"
                            " or --skip-nonfinite N to leave out such steps") from e
        run.skipped += 1
        print0(f"step {step}: {e}: left out, {run.skipped} of {config.skip_nonfinite}")
        report(run.log, step, quiet=True, skipped=run.skipped)
        return
    synchronize(ranks.device)
    dt = time.perf_counter() - t0  # seconds, of training alone
    tok_per_sec = config.total_batch_size / dt
    peak = peak_flops(ranks.device, run.dtype)
    mfu = run.raw_model.flops_per_token(loader.T) * tok_per_sec / (peak * ranks.world_size) if peak else None
    print0(f"step {step:5d}/{run.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | dt {dt * 1000:.2f}ms"
           f" | tok/sec {tok_per_sec:,.0f}" + (f" | MFU {mfu:.1%}" if mfu else ""))
    report(run.log, step, quiet=True, train=loss, lr=lr, norm=norm, tok_per_sec=tok_per_sec)
    if int(loader.epoch) > epoch:
        report(run.log, step, epoch=int(loader.epoch))  # every window was seen; the next epoch has its own order


def training_loop(run, stop):
    """Every so many steps validate, score, sample, save; then one step of training. The status to exit with."""
    config, ranks, raw_model = run.config, run.ranks, run.raw_model
    for step in range(run.first_step, run.max_steps + 1):  # step = number of updates made
        val_loss, evaluated, stopped = None, True, None
        try:
            stop.check()
            if due(step, config.val_every, run):
                val_loss = evaluate_loss(raw_model, run.val_stream, run.loader.B, run.loader.T, config.val_tokens, run.dtype,
                                         ranks, stop.check)
                report(run.log, step, val=val_loss)
            if run.score_hellaswag and due(step, config.hella_every, run):
                report(run.log, step, **run.score_hellaswag(raw_model, run.dtype, stop.check))
            if due(step, config.sample_every, run):
                print_samples(raw_model, config.prompt, run.dtype, ranks)
        except Stop as e:
            evaluated, stopped = False, e
        run.writer.check()
        minutes = (time.monotonic() - run.saved_at) / 60
        if step > 0 and (due(step, config.save_every, run) or stopped and step > run.first_step
                         or config.save_minutes and agree(minutes >= config.save_minutes and ranks.master_process, ranks)):
            save(run, step, val_loss, evaluated)
        if stopped:
            run.writer.wait()
            print0(f"stopped at step {step} by {stopped}; the same command goes on from there")
            return stopped.status
        if step < run.max_steps:
            train_and_log(run, step)
    run.writer.wait()
    if ranks.master_process:
        picture = plot_run(run.run_dir, baselines=FINEWEB_DIR in config.data)
        print0(f"finished; curves: {picture}, samples: python sample.py {run.run_dir}")
    return 0


def main():
    given = parse_args()
    keep_freed_memory()
    ranks = setup(given.get("device", "auto"), given.get("timeout", TrainConfig.timeout))
    status = 0
    try:
        with contextlib.ExitStack() as stack:
            if ranks.master_process and not given.get("dry_run"):
                stack.enter_context(checkpoint.lock_run(run_folder(given)))
            run = set_up(*make_config(given), ranks)
            if run:
                stack.callback(run.close)
                status = training_loop(run, stack.enter_context(StopSignals(ranks)))
    finally:
        teardown()
    sys.exit(status)


if __name__ == "__main__":
    run_main(main)
