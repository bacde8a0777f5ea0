"""
A run's settings, and the plan that follows from them.

The value of a setting comes from the first source that has it: the command line, the checkpoint
that the run resumes from, the weights of --init-from, the preset, the default in config.py. When a
run resumes, FIXED settings cannot change, FORCED ones only with --force; all others take effect.

The plan determines what these leave open: the number of steps, the dtype, whether to compile, and
what fits into memory: the micro-batch size B, and with it the number of micro-steps. All but the
first become settings, so a resumed run keeps them.
"""
import glob
import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict

import torch

import data
from run import checkpoint, folder, parallel, weights
from run.cli import ROOT, command, is_rank0, print0, short_path
from run.config import FINEWEB_DIR, INPUT_TXT, TrainConfig, parse_args, preset_settings
from run.runtime import device_name, free_memory, peak_flops
from run.tokenizer import find_tokenizer

# what cannot change when a run resumes
FIXED = ["preset", "init_from", "init", "n_layer", "n_head", "n_embd", "block_size", "vocab_size",
         "optimizer"]
# what makes it a different run
FORCED = ["total_batch_size", "seed", "shuffle", "dropout", "dtype"]
# how a process was started, which a resumed run does not inherit
STARTED = ["dry_run", "eval_only", "force", "resume"]
# what is chosen automatically, and the values that ask for it; a resumed run keeps its choice
AUTOMATIC = {"dtype": "auto", "batch_size": 0, "compile": "auto"}
# what may differ between ranks: names of this machine's files and devices
LOCAL = ["data", "log_dir", "init_from", "hellaswag", "device"]

# -----------------------------------------------------------------------------
# the preset, the data and the run's folder; given is the dict of the flags that were given

def holds_shards(path):
    """Whether path is a folder with train shards."""
    return os.path.isdir(path) and len(data.find_shards(path, "train")) > 0


def choose_preset(given):
    """(preset, data, reason): by default gpt2-124M for shards, shakespeare or finetune for text."""
    for_text = "finetune" if "init_from" in given else "shakespeare"
    if "preset" in given:
        default = INPUT_TXT if given["preset"] in ("shakespeare", "finetune") else FINEWEB_DIR
        return given["preset"], given.get("data", default), "chosen by --preset"
    if "data" in given:
        if holds_shards(given["data"]):
            return "gpt2-124M", given["data"], "--data is a folder of shards"
        return for_text, given["data"], "--data is not a folder of shards"
    if holds_shards(FINEWEB_DIR):
        return "gpt2-124M", FINEWEB_DIR, f"{FINEWEB_DIR}/ holds shards"
    reason = f"{FINEWEB_DIR}/ holds no shards ({command('fineweb.py')} creates them)"
    return for_text, INPUT_TXT, reason


def default_name(given):
    """The run's name without --exp-name: the preset's, or that of the text that --data names.

    Each text has its own run: otherwise the same command on another book would resume the run on
    the first one.
    """
    preset, source, _ = choose_preset(given)
    is_text = "preset" not in given and preset in ("shakespeare", "finetune")
    if not is_text or os.path.realpath(source) == os.path.realpath(INPUT_TXT):
        return preset
    name = os.path.basename(os.path.abspath(source))
    if not os.path.isdir(source):
        name = os.path.splitext(name)[0]
    return name if preset == "shakespeare" else f"{name}-{preset}"


def run_folder(given):
    """The run's folder: --resume's, or log/<exp-name>."""
    resume = given.get("resume", "auto")
    if resume in ("auto", "never"):
        log_dir = given.get("log_dir", TrainConfig.log_dir)
        return os.path.join(log_dir, given.get("exp_name", default_name(given)))
    if "exp_name" in given or "log_dir" in given:
        raise ValueError(f"--resume {resume} names the run: omit --exp-name and --log-dir")
    if os.path.isfile(resume):
        raise ValueError(f"--resume {resume} is a file: give its folder, which resumes from the"
                         " newest checkpoint in it; to resume from an older one, move the newer"
                         " files away first")
    if not folder.steps_of(resume, "model"):
        raise FileNotFoundError(f"--resume {resume}: there is no run with a checkpoint; allowed"
                                " are auto, never, or a run folder")
    return short_path(resume)  # its last part, the run's name, is not "."


def shape_of_weights(given):
    """The model's fields of --init-from's weights, a dict; ValueError if the flags differ."""
    if "init_from" not in given:
        return {}
    if "init" in given:
        raise ValueError(f"--init {given['init']} is for random weights, and --init-from loads"
                         " others: omit one of them")
    shape = asdict(weights.read_model(given["init_from"])[0])
    del shape["dropout"]
    tokenizer = find_tokenizer(given["init_from"], shape["vocab_size"])
    if tokenizer and tokenizer.folder:
        raise ValueError(f"--init-from {given['init_from']} has its own tokenizer, and the data is"
                         " in GPT-2's tokens: train it with transformers, or start from gpt2")
    # positions can be left unused
    num_positions = shape.pop("block_size")
    block_size = given.get("block_size", num_positions)
    if block_size > num_positions:
        raise ValueError(f"--block-size {block_size} is over the {num_positions} positions of"
                         " --init-from's weights; use that many or fewer")
    wrong = [f"{name}={value}" for name, value in shape.items() if given.get(name, value) != value]
    if wrong:
        raise ValueError(f"--init-from's weights have {', '.join(wrong)}: omit these flags")
    return {**shape, "block_size": block_size}


# -----------------------------------------------------------------------------
# the checkpoint

def has_trained(run_dir):
    """Whether a --resume never run began to train before torchrun or Slurm restarted it.

    torchrun restarts its processes after one has died, Slurm a job that was requeued
    (train.sbatch). Then the run in the folder is this one, and is resumed.
    """
    counts = [os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT",
                                                "SLURM_RESTART_COUNT")]
    path = os.path.join(run_dir, "config.json")
    if all(count in (None, "", "0") for count in counts) or not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as f:
        started = json.load(f)
    return (started["config"]["resume"] == "never"
            # a run of an older version has no id
            and started.get("torchrun_id", "") == os.environ.get("TORCHELASTIC_RUN_ID"))


def load_run(given):
    """The Checkpoint to resume from, or None for a new run.

    Rank 0 locks the run folder before it is read.
    """
    if "eval_only" in given and "init_from" in given:
        return None
    run_dir = run_folder(given)
    if is_rank0() and "dry_run" not in given and "eval_only" not in given:
        folder.lock_run(run_dir)
    is_old_run = folder.steps_of(run_dir, "model") and not has_trained(run_dir)
    if given.get("resume") == "never" and is_old_run:
        raise ValueError(f"{run_dir} already holds a run; choose another --exp-name, or move that"
                         " folder away")
    return checkpoint.load_latest(run_dir)


def check_same_on_all_ranks(config, saved, ranks):
    """ValueError if the ranks start from different steps, settings or code.

    DDP would not notice: each rank would make other updates.
    """
    facts = {**asdict(config), "step": saved.step if saved else 0, "torch": torch.__version__}
    facts = {name: value for name, value in facts.items() if name not in LOCAL}
    for path in glob.glob("*.py", root_dir=ROOT) + glob.glob("run/*.py", root_dir=ROOT):
        with open(os.path.join(ROOT, path), "rb") as f:
            facts[path] = hashlib.sha256(f.read()).hexdigest()[:8]
    facts_of_ranks = parallel.all_gather(facts, ranks)
    for rank, found in enumerate(facts_of_ranks):
        for name, value in facts_of_ranks[0].items():
            if found.get(name) != value:
                raise ValueError(f"{name} is {value!r} on rank 0 and {found.get(name)!r} on rank"
                                 f" {rank}: every rank needs the same flags, code and run folder")


# -----------------------------------------------------------------------------
# the settings

def split_over_ranks(total_batch_size, block_size):
    """The nearest number of tokens that torchrun's processes can split into equal sequences.

    Unequal numbers per rank would need a weighted mean of the gradients, and a step then takes as
    long as on the rank with the most.
    """
    # some containers set WORLD_SIZE alone; torchrun sets RANK, too
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    unit = block_size * world_size
    nearest = max(1, round(total_batch_size / unit)) * unit
    if nearest != total_batch_size:
        print0(f"tokens per step: {nearest:,} instead of {total_batch_size:,}, to split them over"
               f" {world_size} processes")
    return nearest


def config_from_flags(argv=None):
    """(TrainConfig, the Checkpoint to resume from or None) of the command line.

    The run folder is locked.
    """
    given = parse_args(argv)
    if "epochs" in given:
        if "max_steps" in given:
            raise ValueError("--epochs and --max-steps both set the length of the run: give one of"
                             " them")
        given["max_steps"] = 0  # instead of the preset's or the run's
    preset, source, reason = choose_preset(given)
    saved = load_run(given)
    log_dir, exp_name = os.path.split(run_folder(given))
    place = {"log_dir": log_dir, "exp_name": exp_name}  # the run's folder may have been moved
    if saved:
        config = resumed_config(saved, given, place)
    else:
        config = TrainConfig(**{**preset_settings(preset), **shape_of_weights(given), **given,
                                **place, "preset": preset, "data": source})
        config.total_batch_size = split_over_ranks(config.total_batch_size, config.block_size)
        print0(f"preset {preset}, data {source}: {reason}; --preset and --data choose others")
    folder.check_tracker(config.tracker)
    return config, saved


def resumed_config(saved, given, place):
    """The TrainConfig of a resumed run: the checkpoint's settings, as changed by the flags."""
    stored = {**saved.state["train_config"], **saved.model["config"]}
    if os.path.basename(stored["data"]) == "input.txt" and not os.path.exists(stored["data"]):
        stored["data"] = INPUT_TXT  # this clone has been moved; fingerprints are compared later
    names = TrainConfig.__dataclass_fields__.keys()
    # settings that are newer than the run have their defaults
    before = TrainConfig(**{name: value for name, value in stored.items()
                            if name in names and name not in STARTED})
    given = {name: value for name, value in given.items() if AUTOMATIC.get(name) != value}
    if given.get("batch_size", before.batch_size) != before.batch_size:
        before.loss_chunks = 0  # planned for another B
    if "total_batch_size" in given:  # the same flag as before, of the same number of processes
        given["total_batch_size"] = split_over_ranks(given["total_batch_size"], before.block_size)
    config = TrainConfig(**{**asdict(before), **given, **place})
    changed = [name for name in given if getattr(before, name) != getattr(config, name)]
    fixed = [name for name in changed if name in FIXED]
    if fixed:
        raise ValueError(f"{', '.join(fixed)} cannot change when a run resumes; choose another"
                         " --exp-name")
    forced = [name for name in changed if name in FORCED]
    if forced and not config.force:
        raise ValueError(f"changing {', '.join(forced)} makes it a different run; --force resumes"
                         " anyway, another --exp-name starts over")
    for message in saved.messages:
        print0(message)
    print0(f"resuming {config.run_dir} from step {saved.step}, with its settings")
    ignored = sorted(stored.keys() - names)
    if ignored:
        print0(f"  ignored: {', '.join(ignored)}, which this version does not have")
    for name in changed:
        if name not in STARTED and name not in place:
            print0(f"  changed: {name} was {getattr(before, name)!r}, is {getattr(config, name)!r}")
    if "max_steps" in changed:
        print0("  the learning rate continues on the schedule of the new number of steps")
    return config


def how_to_resume(config):
    """The command that resumes a run that was stopped."""
    return f"--resume {config.run_dir}" if config.resume == "never" else "the same command"


# -----------------------------------------------------------------------------
# the plan: what fits into memory, the micro-batch, the number of steps, the FLOPs and hours

LOSS_CHUNKS = 8  # of the loss, in runs that need it (choice): more save little, and are slower


def optimizer_bytes(config, num_params):
    """Bytes of AdamW's two moments, float32; Muon has one, for the matrices in the blocks."""
    num_muon = 0
    if config.optimizer == "muon":
        num_muon = config.n_layer * 12 * config.n_embd**2
    return 8 * num_params - 4 * num_muon


def estimate_memory(config, num_params, B, world_size, loss_chunks=1):
    """{part: bytes} that each training process needs at micro-batch size B.

    The sum is within 15% of measured CPU runs.

    "state" persists between steps: per parameter 4 bytes of weight, 4 of gradient, and the
    optimizer's, all divided by world_size if they are sharded; DDP has 4 more, the buckets in which
    it reduces gradients. "micro-batch" is added by a forward and backward, at its peak:

    - activations, bytes per block, token and channel, in 16 bits (in float32): 36 (64). They are
      the block's input, which LayerNorm keeps in float32, 4; both LayerNorms' outputs, q, k, v,
      attention's output, the second residual, and the MLP before and after GELU. With activation
      checkpointing a block keeps 4, and one block at a time has all 36.
    - the loss, bytes per logit: logits, log-softmax and two gradients, all but the first in
      float32; compiled, only the logits exist, in the autocast dtype: their gradient overwrites
      them. With loss_chunks, of one chunk at a time (model.chunked_loss, not compiled).
    - the weights in the autocast dtype, and the tied embedding's gradient twice, of lm_head and of
      wte

    or by an evaluation, which keeps no activations, but is not compiled.

    "torch" is what PyTorch loads in the first step (measured). Not included: the copy of weights
    and moments, 12 bytes per parameter in the CPU memory of rank 0, from which a checkpoint is
    written. On a CPU more stays resident (runtime.keep_freed_memory).
    """
    is_fsdp = config.parallel == "fsdp" and world_size > 1
    is_float32 = config.dtype == "float32"
    value = 4 if is_float32 else 2  # bytes of a value in the autocast dtype
    T = config.block_size
    V, C, L = config.vocab_size, config.n_embd, config.n_layer
    tokens = B * T
    block = 12 * C * C + 13 * C            # parameters of a block
    root = num_params - L * block          # of wte, wpe, ln_f

    per_block = 64 if is_float32 else 36
    if config.activation_checkpointing:
        activations = tokens * C * (4 * L + per_block)
        cast_params = V * C + block
    else:
        activations = tokens * C * L * per_block
        cast_params = num_params
    casts = 0 if is_float32 else 2 * cast_params

    is_fused = config.compile != "off" and not is_fsdp and loss_chunks == 1
    per_logit = value if is_fused else value + 12
    loss = tokens * V / loss_chunks * per_logit

    # logits, float32 logits and log-softmax
    eval_tokens = min(tokens, max(T, 16384))
    at_evaluation = eval_tokens * V / loss_chunks * (value + 8)
    at_evaluation += 0 if is_float32 else 2 * num_params

    micro_batch = max(activations + loss + casts + 8 * V * C, at_evaluation)
    state = 8 * num_params + optimizer_bytes(config, num_params)
    if world_size > 1 and not is_fsdp:
        state += 4 * num_params
    if is_fsdp:
        state = state / world_size
        gathered = 4 * root + 16 * block   # weights of the root; weights, gradients of two blocks
        at_loss = activations + loss + casts + gathered
        at_backwards_end = gathered + 4 * root + 8 * V * C
        at_evaluation += 4 * num_params    # of an unsharded copy
        micro_batch = max(at_loss, at_backwards_end, at_evaluation)
    return {"state": state, "micro-batch": micro_batch, "torch": 250e6}


def is_too_large(needed, memory):
    """Whether a run does not fit into memory, bytes, even if the estimate is 15% too high."""
    return 0.85 * needed >= memory


def divisors(n, most):
    """The divisors of n that are at most `most`, ascending."""
    return [i for i in range(1, min(n, most) + 1) if n % i == 0]


def given_batch_size(config, per_rank):
    """The config's B, lowered to a divisor of a rank's sequences; 0 if it is to be chosen."""
    return max(divisors(per_rank, config.batch_size), default=0)


def choose_batch_size(config, num_params, world_size, memory, on_cpu):
    """(B, loss_chunks) that fit into memory, in bytes per process.

    B divides a rank's sequences, so that grad_accum_steps = total_batch_size / (B T world_size) is
    an integer; ValueError lists the allowed numbers of processes.

    A resumed run keeps both if they fit into all of the memory, a new one the config's B. Otherwise
    B is the largest that fits into 85%, of at most 4096 tokens on a CPU, where more are no faster,
    65536 on a GPU, or 1. The loss is computed in chunks, which is slower, if the config's B, or a
    larger one of up to 4096 tokens, does not fit otherwise: fewer are too few for fast matmuls
    (choice).
    """
    T = config.block_size
    sequences = config.total_batch_size // T
    if sequences % world_size != 0:
        raise ValueError(f"{sequences} sequences per step cannot be split over {world_size}"
                         f" processes; numbers that would fit: {divisors(sequences, 1024)}")
    per_rank = sequences // world_size

    def needed(B, loss_chunks):
        return sum(estimate_memory(config, num_params, B, world_size, loss_chunks).values())

    def fits(B, loss_chunks):
        return needed(B, loss_chunks) < 0.85 * memory

    B = given_batch_size(config, per_rank)
    if config.loss_chunks and needed(B, config.loss_chunks) < memory:
        return B, config.loss_chunks
    if B and not config.loss_chunks:
        return B, 1 if fits(B, 1) else LOSS_CHUNKS
    most = (4096 if on_cpu else 65536) // T
    enough = min(most, math.ceil(4096 / T))
    whole = max((B for B in divisors(per_rank, most) if fits(B, 1)), default=0)
    chunked = max((B for B in divisors(per_rank, enough) if fits(B, LOSS_CHUNKS)), default=0)
    if whole > 0 and whole >= chunked:
        return whole, 1
    return max(chunked, 1), LOSS_CHUNKS


def available_memory(ranks):
    """Bytes available to each process, the same on every rank: the smallest; inf if unknown."""
    memory = free_memory(ranks.device) or math.inf
    if ranks.device == "cpu":
        memory /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # a machine's processes share it
    return min(parallel.all_gather(memory, ranks))


def make_plan(config, num_tokens, ranks, resumed=False):
    """(B, grad_accum_steps, max_steps) of the run; prints its plan.

    Sets what config leaves open: compile, batch_size and loss_chunks. num_tokens: size of the
    training data. ValueError if the run needs more memory than is available.
    """
    before = asdict(config)
    T = config.block_size
    num_params = config.gpt_config().num_params()
    epoch_tokens = (num_tokens - 1) // T * T  # every token but the first is a target
    max_steps = config.max_steps or int(config.epochs * epoch_tokens / config.total_batch_size)
    if max_steps < 1:
        raise ValueError(f"{config.epochs} epochs of {num_tokens:,} tokens are less than one step"
                         f" of {config.total_batch_size:,}: use --preset shakespeare, for little"
                         " text, or --max-steps, or a smaller --total-batch-size")
    memory = available_memory(ranks)
    # the compiled step needs less memory, so B depends on it
    config.compile = parallel.choose_compile(config, max_steps, resumed, ranks)
    B, config.loss_chunks = choose_batch_size(config, num_params, ranks.world_size, memory,
                                              ranks.device == "cpu")
    # tokens per step are fixed; B and the number of ranks only arrange them
    grad_accum_steps = config.total_batch_size // (B * T * ranks.world_size)
    # a B that was only lowered to a divisor is not stored: other ranks may have other divisors
    if B != given_batch_size(config, grad_accum_steps * B):
        config.batch_size = B
    print_plan(config, num_tokens, B, max_steps, memory, ranks)
    for name in (*AUTOMATIC, "loss_chunks"):
        if resumed and before[name] not in (getattr(config, name), AUTOMATIC.get(name), 0):
            print0(f"  changed: {name} was {before[name]!r}, is {getattr(config, name)!r}")
    needed = sum(estimate_memory(config, num_params, B, ranks.world_size,
                                 config.loss_chunks).values())
    if is_too_large(needed, memory) and not (config.force or config.dry_run):
        raise ValueError(f"the run needs about {needed / 1e9:,.1f} GB per process, of which"
                         f" {memory / 1e9:,.1f} GB are available: choose a smaller --batch-size"
                         " (or model), --activation-checkpointing or --parallel fsdp, or give"
                         " --force to try it anyway")
    return B, grad_accum_steps, max_steps


def print_plan(config, num_tokens, B, max_steps, memory, ranks):
    """Prints the model, the steps, and what they need; memory: bytes that each process has."""
    model = config.gpt_config()
    T, W = config.block_size, ranks.world_size
    num_params = model.num_params()
    print0(f"model: {num_params:,} parameters, {model}")

    epoch_tokens = (num_tokens - 1) // T * T
    epochs = max_steps * config.total_batch_size / epoch_tokens  # over 1: data is repeated
    print0(f"data: {num_tokens:,} training tokens; {max_steps:,} steps of"
           f" {config.total_batch_size:,} tokens = {epochs:.2f} epochs")

    grad_accum_steps = config.total_batch_size // (B * T * W)
    line = (f"step: {grad_accum_steps} micro-steps of B={B} x T={T} on each of {W} process(es),"
            f" {ranks.device_type}, {config.dtype}")
    if config.loss_chunks > 1:
        line += f", the loss in {config.loss_chunks} chunks to save memory"
    print0(line)

    line = f"learning rate: {config.lr:g} after a warmup of {config.warmup_steps:,} steps"
    if config.warmup_steps < max_steps:
        line += f", {config.schedule} to {config.lr * config.min_lr_ratio:g} at step {max_steps:,}"
    else:
        line += (f", WHICH THE RUN OF {max_steps:,} DOES NOT REACH: it never decays;"
                 f" --warmup-steps {max_steps // 10} is 10% of the run")
    print0(line)

    parts = estimate_memory(config, num_params, B, W, config.loss_chunks)
    needed = sum(parts.values())
    sizes = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items())
    line = f"memory: about {needed / 1e9:.1f} GB per process ({sizes})"
    if memory < math.inf:
        line += f", {memory / 1e9:.1f} GB available"
    if is_too_large(needed, memory):
        line += ", IT WILL NOT FIT"
    elif needed >= memory:
        line += ", IT MAY NOT FIT"
    print0(line)

    flops = model.flops_per_token(T)  # forward and backward
    total_flops = flops * max_steps * config.total_batch_size
    print0(f"work: {flops / 1e9:.3f} GFLOPs per token, {total_flops:.3g} FLOPs in all")
    peak = peak_flops(ranks.device, config.dtype)
    if peak is not None:
        # a well-tuned run of this size reaches 40 to 60% of the peak
        hours = total_flops / (0.5 * peak * W) / 3600
        print0(f"time: about {hours:.1f} hours at half the peak of {W} x"
               f" {device_name(ranks.device)}")

    # of weights and moments; an older checkpoint is removed after the next one is written
    size = 4 * num_params + optimizer_bytes(config, num_params)
    count = config.keep_last + 1 + config.keep_best
    path = os.path.abspath(config.run_dir)
    while not os.path.isdir(path) and path != os.path.dirname(path):  # Windows: no such drive
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    line = f"disk: up to {count} checkpoints of {size / 1e9:.2f} GB, {free / 1e9:,.1f} GB free"
    if count * size > free:
        line += ", THEY MAY NOT FIT"
    print0(line)
