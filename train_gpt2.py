"""
Trains GPT-2: the recipe of GPT-2 and GPT-3, on one CPU, one GPU or many.

    python train_gpt2.py                                              # picks a preset by the data at hand, says which
    python train_gpt2.py --preset gpt2-124M --data edu_fineweb10B
    torchrun --standalone --nproc_per_node=8 train_gpt2.py            # DDP on every GPU of this machine
    python train_gpt2.py --preset gpt2-1558M --dry-run                # the plan: memory, steps, FLOPs, hours

Writes into log/<exp-name>/: log.txt (`step stream value` a line), config.json, model_*.pt and state_*.pt (see
checkpoint.py), loss.png. Started again, it goes on from the newest checkpoint.

Sources: the GPT-2 paper (Radford et al. 2019), the GPT-3 paper (Brown et al. 2020, tables 2.1 and appendix B) for the
learning rates and the schedule, and the lecture "Let's reproduce GPT-2 (124M)", whose names are kept.
"""
import argparse
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
import data
import hellaswag
from model import GPT, GPTConfig, SIZES
from plots import plot_run
from runtime import (Ranks, all_gather, all_reduce_sum, autocast, choose_dtype, compile_for_training, device_name, free_memory,
                     get_rng_state, keep_freed_memory, peak_flops, print0, rank0_first, run_main, seed_all, set_rng_state,
                     setup, synchronize, teardown, write_run_description)
from sample import generate_text

FINEWEB_DIR = "edu_fineweb10B"  # where fineweb.py puts its shards
INPUT_TXT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "input.txt")

# -----------------------------------------------------------------------------
# configuration

def flag(default, meaning, **kwargs):
    """A field of TrainConfig with what its command line flag says."""
    return field(default=default, metadata={"help": meaning, **kwargs})


@dataclass
class TrainConfig:
    preset: str = flag("gpt2-124M", "model and recipe; by default chosen by the data at hand")
    data: str = flag("", f"folder of shards, text file, or folder of .txt; default {FINEWEB_DIR}/ if there, else input.txt")
    exp_name: str = flag("", "name of the run, which lives in log/<exp-name>; default the preset's")
    log_dir: str = flag("log", "folder of all runs")
    init_from: str = flag("", "start from these weights: gpt2 ... gpt2-xl, a model_*.pt, a run or Hugging Face folder")
    # the model
    n_layer: int = flag(12, "blocks")
    n_head: int = flag(12, "attention heads")
    n_embd: int = flag(768, "channels")
    block_size: int = flag(1024, "longest context, tokens")
    vocab_size: int = flag(50304, "GPT-2's 50257 padded to a multiple of 128: faster matmuls")
    dropout: float = flag(0.0, "probability")
    # the data
    sequence_length: int = flag(0, "T, tokens; default block_size")
    batch_size: int = flag(0, "micro-batch B, sequences; default the largest that fits and divides")
    total_batch_size: int = flag(524288, "tokens an optimizer step, over all ranks and micro-steps; 2**19 is about 0.5M")
    epochs: float = flag(1.0, "passes over the training data, unless max_steps is given")
    max_steps: int = flag(0, "optimizer steps; default as many as the epochs have")
    shuffle: str = flag("on", "order of the windows of an epoch: a seeded permutation, or the data's", choices=("on", "off"))
    # the optimizer; GPT-3 paper, appendix B, unless a preset says otherwise
    optimizer: str = flag("adamw", "muon takes the matrices inside the blocks, AdamW the rest", choices=("adamw", "muon"))
    lr: float = flag(6e-4, "peak learning rate")
    min_lr_ratio: float = flag(0.1, "learning rate at the end, as a share of the peak")
    embd_lr_ratio: float = flag(1.0, "learning rate of the embeddings, as a share of the others'")
    warmup_steps: int = flag(715, "steps of linear warm-up; 375M tokens at 0.5M a step")
    weight_decay: float = flag(0.1, "on matrices and embeddings")
    beta1: float = flag(0.9, "AdamW's momentum")
    beta2: float = flag(0.95, "AdamW's second moment")
    grad_clip: float = flag(1.0, "largest norm of the whole gradient")
    seed: int = flag(1337, "of the initial weights, the order of the data, and dropout")
    # the machine
    device: str = flag("auto", "cuda, mps or cpu")
    dtype: str = flag("auto", "of the matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = flag("auto", "torch.compile the training step; auto: on CUDA, and on a CPU with a C++ compiler for 100 steps"
                        " or more", choices=("auto", "on", "off"))
    # every so many steps, and at the end; 0 is never
    val_every: int = flag(250, "steps between validations")
    val_tokens: int = flag(10485760, "tokens of one validation, from the beginning of the val split")
    hella_every: int = flag(250, "steps between HellaSwag evaluations")
    hellaswag: str = flag("auto", "HellaSwag's validation .jsonl; auto: if it was downloaded; off")
    sample_every: int = flag(250, "steps between samples")
    prompt: str = flag("Hello, I'm a language model,", "what samples begin with")
    save_every: int = flag(1000, "steps between checkpoints")
    keep_last: int = flag(3, "checkpoints to keep; older ones are removed")
    resume: str = flag("auto", "go on with a run that has checkpoints, or never", choices=("auto", "never"))
    dry_run: bool = flag(False, "print the whole plan and exit")

    def __post_init__(self):
        self.sequence_length = self.sequence_length or self.block_size
        self.exp_name = self.exp_name or self.preset
        self.gpt_config()  # checks the model's fields
        if self.sequence_length > self.block_size:
            raise ValueError(f"--sequence-length {self.sequence_length} is over --block-size {self.block_size}")
        if self.total_batch_size % self.sequence_length != 0 or self.total_batch_size < 1:
            raise ValueError(f"--total-batch-size {self.total_batch_size} is not a multiple of the sequence length"
                             f" T={self.sequence_length}")
        least = dict(batch_size=0, epochs=0, max_steps=0, lr=0, min_lr_ratio=0, warmup_steps=0, weight_decay=0, val_every=0,
                     val_tokens=self.sequence_length, hella_every=0, sample_every=0, save_every=0, keep_last=1)
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be {minimum} or more")

    def gpt_config(self):
        """The GPTConfig of the model to train."""
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(GPTConfig) if hasattr(self, f.name)})


def _size(size, lr, **changes):
    n_layer, n_head, n_embd, block_size = SIZES[size]
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, lr=lr, **changes)


# What a preset changes in TrainConfig. Learning rates and the XL's 1M tokens a step: GPT-3 paper, table 2.1.
PRESETS = {
    "gpt2-124M":  _size("gpt2", 6e-4),
    "gpt2-350M":  _size("gpt2-medium", 3e-4),
    "gpt2-774M":  _size("gpt2-large", 2.5e-4),
    "gpt2-1558M": _size("gpt2-xl", 2e-4, total_batch_size=2**20, warmup_steps=358),
    "gpt3-125M":  _size("gpt3-small", 6e-4),
    "gpt3-350M":  _size("gpt3-medium", 3e-4),
    "gpt3-760M":  _size("gpt3-large", 2.5e-4),
    "gpt3-1.3B":  _size("gpt3-xl", 2e-4, total_batch_size=2**20, warmup_steps=358),
    # five minutes on a laptop's CPU; tuned by us on input.txt (README, "Results")
    "shakespeare": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, total_batch_size=1024, max_steps=1000, batch_size=8,
                        optimizer="muon", lr=0.02, embd_lr_ratio=0.5, min_lr_ratio=0.0, warmup_steps=20, weight_decay=0.1,
                        val_every=100, sample_every=250, save_every=100, keep_last=2, hella_every=0),
}


def parse_args(argv=None):
    """The flags that were given, as a dict; flags, help texts and types are made from TrainConfig's fields."""
    parser = argparse.ArgumentParser(description="Train a GPT-2.", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(TrainConfig):
        kwargs = {**f.metadata, "help": f"{f.metadata['help']} (default {f.default!r})".replace(" (default '')", "")}
        name = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(name, action="store_true", **kwargs)
        elif f.name == "preset":
            parser.add_argument(name, choices=list(PRESETS), **kwargs)
        else:
            parser.add_argument(name, type=f.type, metavar=None if "choices" in kwargs else f.type.__name__.upper(), **kwargs)
    return vars(parser.parse_args(argv))


def choose_preset(given):
    """(preset, data, why) for what the flags leave open: gpt2-124M where there are shards, else shakespeare."""
    shards_there = os.path.isdir(FINEWEB_DIR) and data.find_shards(FINEWEB_DIR, "train")
    source = given.get("data") or (FINEWEB_DIR if shards_there else INPUT_TXT)
    is_shards = os.path.isdir(source) and data.find_shards(source, "train")
    preset = given.get("preset") or ("gpt2-124M" if is_shards else "shakespeare")
    why = "as asked" if "preset" in given else f"{source} holds shards" if is_shards else \
        f"{FINEWEB_DIR}/ holds no shards (python fineweb.py makes them)" if "data" not in given else f"{source} is text"
    return preset, source, why


def make_config(given):
    """(TrainConfig, checkpoint to go on from or None) of the flags: over the saved run's, or else the preset's, values."""
    preset, source, why = choose_preset(given)
    run_dir = os.path.join(given.get("log_dir", TrainConfig.log_dir), given.get("exp_name", preset))
    saved = checkpoint.load_latest(run_dir)
    if saved and given.get("resume") == "never":
        raise ValueError(f"{run_dir} already holds a run; choose another --exp-name, or move that folder away")
    if not saved:
        print0(f"preset {preset}, data {source}: {why}; --preset {{{','.join(PRESETS)}}} and --data choose others")
        return TrainConfig(**{**PRESETS[preset], **given, "preset": preset, "data": source}), None
    base = saved[1]["train_config"]
    config = TrainConfig(**{**base, "dry_run": False, **given})
    print0("\n".join([*saved[2], f"going on with {run_dir} from step {saved[1]['step']}, with its own settings"]))
    for f in fields(TrainConfig):
        if base[f.name] != getattr(config, f.name):
            print0(f"  changed: {f.name} was {base[f.name]!r}, is {getattr(config, f.name)!r}")
    fixed = ["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "sequence_length", "total_batch_size", "optimizer"]
    if changed := [name for name in fixed if base[name] != getattr(config, name)]:
        raise ValueError(f"{', '.join(changed)} cannot change in the middle of a run; choose another --exp-name")
    return config, saved


# -----------------------------------------------------------------------------
# the plan

def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """Learning rate of a step: linear warm-up, then a cosine from max_lr down to min_lr."""
    # 1) linear warm-up; + 1, for a first step at 0 would teach nothing
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    # 2) past max_steps it stays at the minimum
    if step >= max_steps:
        return min_lr
    # 3) in between, half a cosine
    decay_ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (max_lr - min_lr)


def estimate_memory(gpt_config, num_params, B, T, dtype):
    """Bytes that training takes at micro-batch B, to choose B by: weights, gradients, AdamW's two moments, activations.

    A block keeps about 34 bytes a token and channel in 16 bits with flash attention (Korthikanti et al. 2022, without
    their T x T terms); the loss holds the logits, their gradient and a float32 working copy.
    """
    wide = 2 if dtype == "float32" else 1
    weights = num_params * (16 + (2 if wide == 1 else 0))
    activations = B * T * (gpt_config.n_layer * gpt_config.n_embd * 34 * wide + gpt_config.vocab_size * (4 * wide + 4))
    return weights + activations


def choose_batch_size(config, num_params, world_size, memory, on_cpu, dtype):
    """The micro-batch B to use, and so grad_accum_steps = total_batch_size / (B T world_size), which must be whole.

    B is the config's, or the largest that divides, fits into 85% of memory (bytes, or None), and is worth it: on a CPU
    more than 4096 tokens at once gain nothing. Raises ValueError listing the B that would fit.
    """
    T, sequences = config.sequence_length, config.total_batch_size // config.sequence_length
    if sequences % world_size != 0:
        raise ValueError(f"{sequences} sequences a step do not divide among {world_size} processes; numbers that would fit:"
                         f" {[w for w in range(1, min(sequences, 1024) + 1) if sequences % w == 0]}")
    divisors = [B for B in range(1, sequences // world_size + 1) if (sequences // world_size) % B == 0]
    if config.batch_size:
        if config.batch_size not in divisors:
            raise ValueError(f"--total-batch-size {config.total_batch_size} is not a multiple of B*T*W = {config.batch_size}*"
                             f"{T}*{world_size}; --batch-size that would fit: {divisors}")
        return config.batch_size
    worth = [B for B in divisors if B * T <= (4096 if on_cpu else 65536)]
    fit = [B for B in worth
           if memory is None or estimate_memory(config.gpt_config(), num_params, B, T, dtype) < 0.85 * memory]
    return max(fit, default=1)


def print_plan(config, model, ranks, dtype, B, grad_accum_steps, max_steps, num_tokens, memory):
    """Prints what is going to happen, in numbers."""
    T, N = config.sequence_length, model.num_params()
    flops = model.flops_per_token(T)
    print0(f"model: {N:,} parameters, {model.config}")
    print0(f"data: {num_tokens:,} training tokens; {max_steps:,} steps of {config.total_batch_size:,} tokens"
           f" = {max_steps * config.total_batch_size / num_tokens:.2f} epochs")
    print0(f"a step: {grad_accum_steps} micro-steps of B={B} x T={T} on each of {ranks.world_size} process(es),"
           f" {ranks.device_type}, {dtype}")
    print0(f"memory: about {estimate_memory(model.config, N, B, T, dtype) / 1e9:.1f} GB for each process"
           + (f", {memory / 1e9:.1f} GB free" if memory else ""))
    total = flops * max_steps * config.total_batch_size
    print0(f"work: {flops / 1e9:.3f} GFLOP a token, {total:.3g} FLOP in all")
    if peak := peak_flops(ranks.device, dtype):
        print0(f"time: about {total / (0.5 * peak * ranks.world_size) / 3600:.1f} hours at half the peak of"
               f" {ranks.world_size} x {device_name(ranks.device)}")


# -----------------------------------------------------------------------------
# the pieces of the loop

def train_step(model, raw_model, optimizers, scaler, loader, lr, grad_accum_steps, grad_clip, dtype, ranks):
    """One optimizer step over total_batch_size tokens; (loss, gradient norm) before it, means over all ranks.

    Raises ValueError, with the weights as they were, when the loss or the norm is not finite.
    """
    first_window = loader.position
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss_accum = torch.zeros((), device=ranks.device)
    for micro_step in range(grad_accum_steps):
        x, y = loader.next_batch()
        if ranks.ddp:
            # gradients are summed over the ranks once, in the last backward; DDP reads this in its forward
            model.require_backward_grad_sync = (micro_step == grad_accum_steps - 1)
        with autocast(ranks.device, dtype):
            _, loss = model(x, y)
        # gradients of successive backward() calls add up: a SUM, where the loss of a large batch is a MEAN
        loss = loss / grad_accum_steps
        loss_accum += loss.detach()
        scaler.scale(loss).backward()
    loss_accum = all_reduce_sum(loss_accum, ranks) / ranks.world_size
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip)
    loss, norm = loss_accum.item(), norm.item()  # the one point of a step where the CPU waits for the GPU
    # in float16 a norm that overflows is the scaler's to handle: it skips the step and lowers the scale
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise ValueError(f"loss {loss}, gradient norm {norm} in the step that read windows {first_window} to"
                         f" {loader.position - 1} of the data's order; the weights were not updated. Go on from the last"
                         " checkpoint with a lower --lr, or --dtype float32")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.step(optimizer)
    scaler.update()
    return loss, norm


@torch.no_grad()
def evaluate_loss(raw_model, stream, B, T, val_tokens, dtype, ranks):
    """Mean cross entropy over the first val_tokens tokens of the val split; each rank takes a part of them."""
    raw_model.eval()
    total, count = 0.0, 0
    # logits are the largest thing in an evaluation: at most 4096 tokens of them at a time
    B = max(1, min(B, 4096 // T))
    for x, y in data.iterate_batches(stream, B, T, val_tokens, ranks.rank, ranks.world_size, ranks.device):
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

    def __init__(self, path, keep_bytes):
        with open(path, "ab") as f:
            f.truncate(min(keep_bytes, f.tell()))
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # by the line: what was logged is on its way to disk

    def write(self, step, stream, value):
        """Appends one fact."""
        self.file.write(f"{step} {stream} {value}\n")

    def size(self):
        """Bytes so far."""
        return self.file.tell()


def report(log, step, quiet=False, **facts):
    """Logs facts (stream=value) of a step on rank 0, and prints them unless quiet."""
    for stream, value in facts.items():
        if log is not None:
            log.write(step, stream, value)
        if not quiet:
            print0(f"step {step:5d} | {stream} {value:.4f}")


# -----------------------------------------------------------------------------
# saving and going on

def save(run, step, val_loss):
    """Writes the checkpoint of step (all ranks call it, rank 0 writes) and removes the oldest ones."""
    rng = all_gather(get_rng_state(run.ranks.device), run.ranks)
    if run.ranks.master_process:
        state = {"optimizers": [optimizer.state_dict() for optimizer in run.optimizers], "scaler": run.scaler.state_dict(),
                 "loader": run.loader.state_dict(), "rng": rng, "log_bytes": run.log.size(), "train_config": asdict(run.config)}
        checkpoint.save(run.run_dir, run.raw_model, step, val_loss, state)
        checkpoint.prune(run.run_dir, run.config.keep_last)
        print0(f"saved {checkpoint.paths(run.run_dir, step)[0]}")


def restore(state, optimizers, scaler, loader, ranks):
    """Puts back all that save wrote but the weights. With another number of ranks, only the generators start afresh."""
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])
    loader.load_state_dict(state["loader"])
    if len(state["rng"]) == ranks.world_size:
        set_rng_state(state["rng"][ranks.rank], ranks.device)


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
    run_dir: str
    log: object                 # Log on rank 0, else None


def build_model(config, saved, device):
    """The GPT to train, on its device: as saved, or with init_from's weights, or fresh from the seed."""
    if saved is None and config.init_from:
        return checkpoint.load_model(config.init_from, device)[0].train()
    model = GPT(config.gpt_config())
    if saved is not None:
        checkpoint.load_weights(model, saved[0]["model"], "the checkpoint")
    return model.to(device)


def set_up(config, saved, ranks):
    """The Run of a config, from its beginning or from what was saved; None if there is nothing to train."""
    dtype = choose_dtype(config.dtype, ranks.device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, on GPUs that have it
    seed_all(config.seed)                       # the same weights on every rank
    with rank0_first(ranks):                    # text is tokenized by one
        splits = data.prepare_data(config.data)
    raw_model = build_model(config, saved, ranks.device)
    train_stream, val_stream = (data.TokenStream(shards, raw_model.config.vocab_size) for shards in splits)
    T = config.sequence_length
    if len(val_stream) <= T:
        raise ValueError(f"the val split has {len(val_stream)} tokens, too few for one sequence of {T}; give more text")
    memory = free_memory(ranks.device)
    B = choose_batch_size(config, raw_model.num_params(), ranks.world_size, memory, ranks.device == "cpu", dtype)
    B = min(all_gather(B, ranks))  # the ranks may have seen different amounts of free memory
    grad_accum_steps = config.total_batch_size // (B * T * ranks.world_size)
    loader = data.DataLoaderLite(train_stream, B, T, ranks.rank, ranks.world_size, config.shuffle == "on", config.seed,
                                 ranks.device)
    max_steps = config.max_steps or int(config.epochs * loader.num_windows * T / config.total_batch_size)
    if max_steps < 1:
        raise ValueError(f"{config.epochs} epochs of {len(train_stream):,} tokens are less than one step of"
                         f" {config.total_batch_size:,}: more --epochs, --max-steps, or a smaller --total-batch-size")
    print_plan(config, raw_model, ranks, dtype, B, grad_accum_steps, max_steps, len(train_stream), memory)
    run_dir, first_step = os.path.join(config.log_dir, config.exp_name), saved[1]["step"] if saved else 0
    if first_step >= max_steps:
        print0(f"{run_dir} is finished at step {first_step}: sample from it with python sample.py {run_dir},"
               " train on with --max-steps, or begin anew with --exp-name")
    if config.dry_run or first_step >= max_steps:
        return None
    optimizers = raw_model.configure_optimizers(config.lr, config.weight_decay, (config.beta1, config.beta2),
                                                config.optimizer, config.embd_lr_ratio)
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
    model = compile_for_training(raw_model, config.compile, max_steps - first_step, B, T, dtype, ranks.device)
    if ranks.ddp:
        model = DDP(model, device_ids=[ranks.local_rank] if ranks.device_type == "cuda" else None, gradient_as_bucket_view=True)
    seed_all(config.seed + 1 + ranks.rank)      # from here on only dropout draws, differently on each rank
    if saved:
        restore(saved[1], optimizers, scaler, loader, ranks)
    score_hellaswag = hellaswag.for_training(config.hellaswag, ranks) if config.hella_every else None
    log = None
    if ranks.master_process:
        os.makedirs(run_dir, exist_ok=True)
        write_run_description(os.path.join(run_dir, "config.json"), asdict(config), ranks, dtype)
        log = Log(os.path.join(run_dir, "log.txt"), keep_bytes=saved[1]["log_bytes"] if saved else 0)
    return Run(config, ranks, dtype, raw_model, model, optimizers, scaler, loader, val_stream, score_hellaswag,
               grad_accum_steps, first_step, max_steps, run_dir, log)


def due(step, every, run):
    """Whether it is time for what happens every so many steps, and at the end; not at the step a run was resumed from,
    where it happened before that was saved."""
    return every and (step % every == 0 or step == run.max_steps) and not step == run.first_step > 0


def training_loop(run):
    """Every so many steps validate, score, sample, save; then one step of training; then one line about it."""
    config, ranks, loader, raw_model = run.config, run.ranks, run.loader, run.raw_model
    peak, val_loss = peak_flops(ranks.device, run.dtype), None
    for step in range(run.first_step, run.max_steps + 1):  # step = number of updates made
        if due(step, config.val_every, run):
            val_loss = evaluate_loss(raw_model, run.val_stream, loader.B, loader.T, config.val_tokens, run.dtype, ranks)
            report(run.log, step, val=val_loss)
        if run.score_hellaswag and due(step, config.hella_every, run):
            report(run.log, step, **run.score_hellaswag(raw_model, run.dtype))
        if due(step, config.sample_every, run):
            print_samples(raw_model, config.prompt, run.dtype, ranks)
        if due(step, config.save_every, run) and step > 0:
            save(run, step, val_loss)
        if step == run.max_steps:
            break

        epoch = int(loader.epoch)
        lr = get_lr(step, config.lr, config.lr * config.min_lr_ratio, config.warmup_steps, run.max_steps)
        synchronize(ranks.device)
        t0 = time.perf_counter()
        loss, norm = train_step(run.model, raw_model, run.optimizers, run.scaler, loader, lr, run.grad_accum_steps,
                                config.grad_clip, run.dtype, ranks)
        synchronize(ranks.device)
        dt = time.perf_counter() - t0  # seconds, of training alone
        tok_per_sec = config.total_batch_size / dt
        mfu = raw_model.flops_per_token(loader.T) * tok_per_sec / (peak * ranks.world_size) if peak else None
        print0(f"step {step:5d}/{run.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | dt {dt * 1000:.2f}ms"
               f" | tok/sec {tok_per_sec:,.0f}" + (f" | MFU {mfu:.1%}" if mfu else ""))
        report(run.log, step, quiet=True, train=loss, lr=lr, norm=norm, tok_per_sec=tok_per_sec)
        if int(loader.epoch) > epoch:
            report(run.log, step, epoch=int(loader.epoch))  # every window was seen; the next epoch has its own order
    loader.close()
    if ranks.master_process:
        picture = plot_run(run.run_dir, baselines=FINEWEB_DIR in config.data)
        print0(f"finished; curves: {picture}, samples: python sample.py {run.run_dir}")


def main():
    given = parse_args()
    keep_freed_memory()
    ranks = setup(given.get("device", "auto"))
    try:
        run = set_up(*make_config(given), ranks)
        if run:
            training_loop(run)
    finally:
        teardown()


if __name__ == "__main__":
    run_main(main)
