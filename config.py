"""
What a training run is made of: every setting once, with its default, meaning and flag; the presets; what fits.

TrainConfig's fields are the flags of train_gpt2.py. Their values come from, the later over the earlier: the field's
default, the preset, the run that is gone on with, the command line.

Sources: the GPT-2 paper (Radford et al. 2019) for the sizes, the GPT-3 paper (Brown et al. 2020, table 2.1 and appendix
B) for learning rates, batch and schedule, and the lecture "Let's reproduce GPT-2 (124M)" for the rest of gpt2-124M.
"""
import os
from argparse import SUPPRESS
from dataclasses import asdict, dataclass, field, fields, replace

import checkpoint
import data
from model import GPTConfig, SIZES
from runtime import ArgumentParser, print0
from tracker import TRACKERS

FINEWEB_DIR = "edu_fineweb10B"  # where fineweb.py puts its shards
FINEWEB_TOKENS = 9_850_000_000  # about what it has for training: a plan can be made before they are there
INPUT_TXT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "input.txt")


def flag(default, meaning, **kwargs):
    """A field of TrainConfig with what its command line flag says."""
    return field(default=default, metadata={"help": meaning, **kwargs})


@dataclass
class TrainConfig:
    preset: str = flag("gpt2-124M", "model and recipe; by default chosen by the data at hand")
    data: str = flag("", f"folder of shards, text file, or folder of .txt; default {FINEWEB_DIR}/ if there, else input.txt")
    exp_name: str = flag("", "name of the run, which lives in log/<exp-name>; default the preset's")
    log_dir: str = flag("log", "folder of all runs")
    init_from: str = flag("", "start from these weights: gpt2 ... gpt2-xl, a checkpoint file, a run or Hugging Face folder")
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
    schedule: str = flag("cosine", "of the learning rate after its warm-up: half a cosine down, or constant with a straight"
                         " decay at the end", choices=("cosine", "wsd"))
    wsd_decay: float = flag(0.2, "schedule wsd: share of all steps, the last ones, that the decay takes")
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
    parallel: str = flag("ddp", "what the processes of torchrun share out: ddp nothing, zero the optimizer's state, fsdp the"
                         " weights and gradients too", choices=("ddp", "zero", "fsdp"))
    activation_checkpointing: bool = flag(False, "keep only the blocks' inputs for the backward, and compute the rest again")
    # every so many steps, and at the end; 0 is never
    val_every: int = flag(250, "steps between validations")
    val_tokens: int = flag(10485760, "tokens of one validation, from the beginning of the val split")
    hella_every: int = flag(250, "steps between HellaSwag evaluations")
    hellaswag: str = flag("auto", "HellaSwag's validation .jsonl; auto: if it was downloaded; off")
    sample_every: int = flag(250, "steps between samples")
    prompt: str = flag("Hello, I'm a language model,", "what samples begin with")
    save_every: int = flag(1000, "steps between checkpoints")
    save_minutes: float = flag(30.0, "minutes between checkpoints, where save_every steps take longer; 0 is never")
    keep_last: int = flag(3, "checkpoints to keep; older ones are removed")
    tracker: str = flag("none", "send the streams of log.txt to TensorBoard or Weights & Biases too", choices=TRACKERS)
    keep_best: bool = flag(False, "keep the checkpoint with the lowest val loss too")
    # when things go wrong
    resume: str = flag("auto", "auto: go on with a run that has checkpoints; never: refuse to; or a run folder, or the"
                       " model_*.pt in one, to go on from")
    force: bool = flag(False, "go on although the data or the batch are not those the run was trained with")
    skip_nonfinite: int = flag(0, "steps with a loss or gradient that is not finite to leave out before giving up")
    timeout: float = flag(10.0, "minutes that a rank waits for the others")
    deterministic: bool = flag(False, "the same bits in every run on a GPU too, at some cost in speed")
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
        if self.optimizer == "muon" and self.parallel != "ddp":
            raise ValueError(f"--parallel {self.parallel} cannot share out muon, which needs whole matrices; give"
                             " --optimizer adamw or --parallel ddp")
        least = dict(batch_size=0, epochs=0, max_steps=0, lr=0, min_lr_ratio=0, warmup_steps=0, weight_decay=0, val_every=0,
                     val_tokens=self.sequence_length, hella_every=0, sample_every=0, save_every=0, save_minutes=0, keep_last=1,
                     skip_nonfinite=0, timeout=0.01)
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be {minimum} or more")
        if not 0 < self.wsd_decay <= 1:
            raise ValueError(f"--wsd-decay {self.wsd_decay}: a share of the steps, over 0 and at most 1")

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
    # minutes on a laptop's CPU; tuned by us on input.txt, where more steps only learn it by heart (README, "Results")
    "shakespeare": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, total_batch_size=1024, max_steps=600, batch_size=8,
                        optimizer="muon", lr=0.012, embd_lr_ratio=2.0, min_lr_ratio=0.0, warmup_steps=20,
                        val_every=100, sample_every=200, save_every=100, keep_last=2, hella_every=0, prompt="ROMEO:"),
}


# -----------------------------------------------------------------------------
# from the command line

def parse_args(argv=None):
    """The flags that were given, as a dict; flags, help texts and types are made from TrainConfig's fields."""
    parser = ArgumentParser(description="Train a GPT-2.", usage="train_gpt2.py [flags]", allow_abbrev=False)
    for f in fields(TrainConfig):
        kwargs = {**f.metadata, "default": SUPPRESS}
        if f.default != "" and f.default is not False and f.name != "preset":
            in_preset = any(f.name in changes for changes in PRESETS.values())
            kwargs["help"] += f" (default {f.default}{', or what the preset says' if in_preset else ''})"
        name = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(name, action="store_true", **kwargs)
        elif f.name == "preset":
            parser.add_argument(name, choices=list(PRESETS), **kwargs)
        else:
            parser.add_argument(name, type=f.type, metavar=None if "choices" in kwargs else f.type.__name__.upper(), **kwargs)
    return vars(parser.parse_args(argv))


def choose_preset(given):
    """(preset, data, why) for what the flags leave open: gpt2-124M on shards, shakespeare on text."""
    def holds_shards(folder):
        return os.path.isdir(folder) and bool(data.find_shards(folder, "train"))

    if "preset" in given:
        return given["preset"], given.get("data", INPUT_TXT if given["preset"] == "shakespeare" else FINEWEB_DIR), "as asked"
    if "data" in given:
        shards = holds_shards(given["data"])
        why = f"--data {'holds' if shards else 'is no folder of'} shards"
        return ("gpt2-124M" if shards else "shakespeare"), given["data"], why
    if holds_shards(FINEWEB_DIR):
        return "gpt2-124M", FINEWEB_DIR, f"{FINEWEB_DIR}/ holds shards"
    return "shakespeare", INPUT_TXT, f"{FINEWEB_DIR}/ holds no shards (python fineweb.py makes them)"


def shape_of_weights(given):
    """The model's fields that come with --init-from's weights, as a dict; ValueError if flags ask for other ones."""
    if not given.get("init_from"):
        return {}
    shape = asdict(checkpoint.read_model(given["init_from"])[0])
    shape = {name: value for name, value in shape.items() if name in TrainConfig.__dataclass_fields__ and name != "dropout"}
    if given.get("block_size", shape["block_size"]) > shape["block_size"]:
        raise ValueError(f"--block-size {given['block_size']} is over the {shape['block_size']} positions that --init-from's"
                         " weights know; give that many or fewer")
    shape["block_size"] = given.get("block_size", shape["block_size"])
    if wrong := [name for name in shape if given.get(name, shape[name]) != shape[name]]:
        raise ValueError(f"--init-from brings its own {', '.join(f'{n}={shape[n]}' for n in wrong)}: leave these flags out")
    return shape


def run_folder(given):
    """log/<exp-name> of the flags: of --resume, where that names a folder or a file in one, else of the preset."""
    resume = given.get("resume", "auto")
    if resume not in ("auto", "never"):
        if "exp_name" in given or "log_dir" in given:
            raise ValueError(f"--resume {resume} says which run it is: leave --exp-name and --log-dir out")
        if not os.path.exists(resume):
            raise FileNotFoundError(f"--resume {resume}: not there; give auto, never, a run folder, or a model_*.pt in one")
        return os.path.normpath(resume if os.path.isdir(resume) else os.path.dirname(resume) or ".")
    return os.path.join(given.get("log_dir", TrainConfig.log_dir), given.get("exp_name", choose_preset(given)[0]))


def load_run(given):
    """(model contents, state contents, messages) of the checkpoint to go on from, or None for a new run."""
    run_dir, resume = run_folder(given), given.get("resume", "auto")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        resume = "auto"  # torchrun started the ranks anew: what the run has saved since counts
    if resume == "never" and checkpoint.steps_of(run_dir, "model"):
        raise ValueError(f"{run_dir} already holds a run; choose another --exp-name, or move that folder away")
    if resume in ("auto", "never") or os.path.isdir(resume):
        saved = checkpoint.load_latest(run_dir)
        if not saved and resume not in ("auto", "never"):
            raise FileNotFoundError(f"--resume {resume}: no checkpoint there")
        return saved
    step = checkpoint.step_of(resume)
    return *checkpoint.load_pair(run_dir, step), []


# What a run cannot change on its way, and what it can with --force alone, for it would not be the same run any more.
FIXED = ["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "sequence_length", "optimizer"]
HARMFUL = ["total_batch_size", "seed", "shuffle", "dropout", "dtype"]


def make_config(given):
    """(TrainConfig, checkpoint to go on from or None) of the flags: over the saved run's, or else the preset's, values."""
    preset, source, why = choose_preset(given)
    saved = load_run(given)
    if not saved:
        print0(f"preset {preset}, data {source}: {why}; --preset and --data choose others ({', '.join(PRESETS)})")
        return TrainConfig(**{**PRESETS[preset], **shape_of_weights(given), **given, "preset": preset, "data": source}), None
    # what the run was, with today's defaults for flags that it did not know; how it was started is not part of it
    base = TrainConfig(**{**saved[1]["train_config"], "dry_run": False, "force": False, "resume": "auto"})
    log_dir, exp_name = os.path.split(run_folder(given))  # the folder may have been moved
    config = TrainConfig(**{**asdict(base), **given, "log_dir": log_dir, "exp_name": exp_name})
    print0("\n".join([*saved[2], f"going on with {run_folder(given)} from step {saved[1]['step']}, with its own settings"]))
    changed = [name for name in given if getattr(base, name) != getattr(config, name)]
    for name in changed:
        if name not in ("dry_run", "force", "resume", "exp_name", "log_dir"):
            print0(f"  changed: {name} was {getattr(base, name)!r}, is {getattr(config, name)!r}")
    if wrong := [name for name in changed if name in FIXED]:
        raise ValueError(f"{', '.join(wrong)} cannot change in the middle of a run; choose another --exp-name")
    if (wrong := [name for name in changed if name in HARMFUL]) and not config.force:
        raise ValueError(f"with another {', '.join(wrong)} this would not be the same run; --force goes on all the same,"
                         " another --exp-name begins anew")
    return config, saved


# -----------------------------------------------------------------------------
# what fits

def estimate_memory(config, num_params, B, dtype, world_size, on_cpu):
    """Bytes that each process of a training has in use at micro-batch B; within 15% of what was measured on a CPU.

    What stands from step to step (weights 4 bytes a parameter, gradients 4, AdamW's moments 8: 16 in all, whole or in
    parts), what one forward and backward add, and what torch loads. On a CPU more stays resident, for glibc keeps what is
    freed (runtime.keep_freed_memory). Counted for the eager mode, in bytes:

    - a block's activations a token and channel: 36 in 16 bits, 68 in float32 (its input, which LayerNorm keeps, 4; two
      LayerNorms, q, k, v, attention, the second residual, the MLP before and after GELU); a recomputed one keeps 4
    - the loss a logit: the logits, log-softmax and two gradients, float32 all but the first; torch.compile fuses some
    - the tied embedding's gradient: the lm_head's share waits, whole, for wte's
    """
    wide, T, W = 2 if dtype == "float32" else 1, config.sequence_length, world_size
    parallel, again = config.parallel if W > 1 else "ddp", config.activation_checkpointing
    compiled = parallel != "fsdp" and (config.compile == "on" or config.compile == "auto" and not on_cpu)
    V, C, L, tokens = config.vocab_size, config.n_embd, config.n_layer, B * T
    block = 12 * C * C + 13 * C
    root = num_params - L * block  # wte, wpe, ln_f

    kept = L * C * 4 + C * (36 if wide == 1 else 68) if again else L * C * (36 if wide == 1 else 68)
    loss = V * (4 * wide + 4 if compiled else 2 * wide + 12)
    casts = 0 if wide == 2 else 2 * (V * C + block if again else num_params)  # what autocast made of the weights
    step = tokens * (kept + loss) + casts + 8 * V * C
    if parallel == "fsdp":
        standing = 16 * num_params / W
        gathered = 4 * root + 16 * block                   # weights of the root, and of two blocks with their gradients
        step += gathered - 8 * V * C                       # at the loss
        step = max(step, gathered + 4 * root + 8 * V * C)  # at the end of the backward: the root's gradients, being summed
        step = max(step, 4 * num_params + min(tokens, max(T, 4096)) * V * (2 * wide + 8))  # an evaluation: all weights
    else:
        standing = 8 * num_params + 8 * (max(num_params / W, V * C) if parallel == "zero" else num_params)
    return standing + step + 250e6  # what torch loads for a first step, measured


def memory_table(config, num_params, B, dtype, world_size, on_cpu):
    """What every way to share out needs at micro-batch B, GB a process, as lines of text: the dry run prints them."""
    numbers = sorted({1, 2, 4, 8, world_size})
    lines = [f"memory a process at B={B}, GB; processes:".ljust(46) + "".join(f"{W:7d}" for W in numbers)]
    for parallel in ("ddp", "zero", "fsdp"):
        for again in (False, True):
            way = replace(config, parallel=parallel, activation_checkpointing=again, optimizer="adamw")
            needs = [estimate_memory(way, num_params, B, dtype, W, on_cpu) for W in numbers]
            name = f"  --parallel {parallel}" + " --activation-checkpointing" * again
            lines.append(f"{name:46s}" + "".join(f"{n / 1e9:7.1f}" for n in needs))
    return "\n".join(lines)


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
           if memory is None or estimate_memory(config, num_params, B, dtype, world_size, on_cpu) < 0.85 * memory]
    return max(fit, default=1)
