"""
Equal to the lecture: an independent implementation of build-nanogpt's train_gpt2.py, against ours.

    ./test.sh tests/test_lecture.py          # one process, and the loader
    ./test.sh --all tests/test_lecture.py    # also torch.compile, two gloo ranks, the 124M model

The implementation shares no code with ours: a network, a loader, a schedule, a loop. The golden
numbers are its results with torch 2.13 on x86-64. Runs are in float32 on the CPU, where --preset
gpt2-124M-lecture is made small by flags.
"""
import itertools
import math
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train_gpt2
from common import ONE, ROOT, launcher, python
from data import DataLoaderLite, TokenStream
from model import GPT, GPTConfig
from run import cli, reference
from run.config import TrainConfig, preset_settings
from run.folder import read_log

V, T, L, NH, C = 512, 32, 2, 4, 32                             # the small model
TOTAL, STEPS, WARMUP, LR, VAL_TOKENS = 1024, 50, 10, 2e-3, 2048
FLAGS = ["--preset", "gpt2-124M-lecture", "--n-layer", L, "--n-head", NH, "--n-embd", C,
         "--block-size", T, "--vocab-size", V, "--total-batch-size", TOTAL, "--max-steps", STEPS,
         "--warmup-steps", WARMUP, "--lr", LR, "--val-tokens", VAL_TOKENS, "--val-every", 25,
         "--hella-every", 0, "--sample-every", 0, "--save-every", 0, "--dtype", "float32",
         "--device", "cpu"]
FLAGS = [str(flag) for flag in FLAGS]
GOLDEN_STEPS = [0, 10, 20, 30, 40, 49]
GOLDEN_LOSSES = [6.172029, 5.463089, 4.368732, 3.591631, 3.241112, 3.130597]
# over 1: every step is clipped
GOLDEN_NORMS = [2.986796, 2.080302, 2.098675, 1.939945, 1.850865, 1.806162]
GOLDEN_WEIGHTS = 15.331051  # norm of all weights after the last step


# -----------------------------------------------------------------------------
# the lecture's arithmetic

class LectureBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); constructors in the lecture's order."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(C), nn.LayerNorm(C)])
        self.qkv, self.mix = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norms[0](x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class LectureModel(nn.Module):
    """GPT-2 as the lecture initializes it: tied first, then a draw for each module.

    Children come before their parents.
    """

    def __init__(self, V, T, L, heads, C):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList([LectureBlock(C, heads) for _ in range(L)])
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.tokens.weight = self.head.weight
        small = {layer for block in self.blocks for layer in (block.mix, block.down)}

        def draw(module):
            if isinstance(module, (nn.Embedding, nn.Linear)):
                module.weight.data.normal_(0.0, 0.02 * (2 * L) ** -0.5 if module in small else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()
        self.apply(draw)

    def loss(self, x, y):
        hidden = self.tokens(x) + self.positions.weight[:x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())

    def weights(self):
        """{name in GPT-2: tensor}"""
        names = {"norms.0": "ln_1", "norms.1": "ln_2", "qkv": "attn.c_attn", "mix": "attn.c_proj",
                 "up": "mlp.c_fc", "down": "mlp.c_proj", "norm": "ln_f", "tokens": "wte",
                 "positions": "wpe"}
        weights = {"lm_head.weight": self.head.weight}
        for name, p in self.named_parameters():
            module, _, kind = name.rpartition(".")
            place = "transformer."
            if module.startswith("blocks."):
                _, i, module = module.split(".", 2)
                place = f"transformer.h.{i}."
            weights[f"{place}{names[module]}.{kind}"] = p
        return weights


def lecture_positions(lengths, B, T, rank, W):
    """Yields (shard, first token) of each micro-batch that the lecture's loader reads on a rank.

    lengths: of the shards.
    """
    shard, first = 0, B * T * rank
    while True:
        yield shard, first
        first += B * T * W
        if first + B * T * W + 1 > lengths[shard]:
            shard, first = (shard + 1) % len(lengths), B * T * rank


def lecture_batches(paths, B, T, rank, W):
    """Yields x, y of each micro-batch of a rank."""
    shards = [np.load(path).astype(np.int64) for path in paths]
    for shard, first in lecture_positions([len(tokens) for tokens in shards], B, T, rank, W):
        chunk = torch.from_numpy(shards[shard][first:first + B * T + 1])
        yield chunk[:-1].view(B, T), chunk[1:].view(B, T)


def lecture_lr(step, peak, warmup, steps):
    """The learning rate of a step, down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / (steps - warmup))
    return 0.1 * peak + 0.5 * (1.0 + cosine) * (peak - 0.1 * peak)


def lecture_run(folder, B, W):
    """(losses, gradient norms, {step: validation loss}, model) of the lecture's loop.

    Its W ranks compute one after the other.
    """
    torch.manual_seed(1337)
    model = LectureModel(V, T, L, NH, C)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False,
                                  fused=False)
    paths = [os.path.join(folder, f"edufineweb_train_{i:06d}.npy") for i in (1, 2)]
    val_path = os.path.join(folder, "edufineweb_val_000000.npy")
    ranks = [lecture_batches(paths, B, T, rank, W) for rank in range(W)]
    accumulation = TOTAL // (B * T * W)
    losses, norms, vals = [], [], {}
    for step in range(STEPS):
        if step % 25 == 0:
            batches = lecture_batches([val_path], B, T, 0, 1)
            batches = itertools.islice(batches, VAL_TOKENS // (B * T))
            with torch.no_grad():
                vals[step] = np.mean([model.loss(x, y).item() for x, y in batches])
        optimizer.zero_grad()
        total = 0.0
        for _ in range(accumulation):
            for batches in ranks:
                loss = model.loss(*next(batches)) / accumulation
                total += loss.item() / W
                (loss / W).backward()  # DDP: the mean of the ranks' gradients
        losses.append(total)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = lecture_lr(step, LR, WARMUP, STEPS)
        optimizer.step()
    return losses, norms, vals, model


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder laid out as build-nanogpt's, two train shards, of which the run needs the first."""
    folder = tmp_path_factory.mktemp("shards")
    for name, length, offset in (("train_000001", 60_000, 0), ("train_000002", 9_000, 60_000),
                                 ("val_000000", 5_000, 99_000)):
        i = np.arange(offset, offset + length)
        np.save(folder / f"edufineweb_{name}.npy", (i % 7 * (i // 50 % 5)).astype(np.uint16))
    return str(folder)


# -----------------------------------------------------------------------------
# the parts

@pytest.mark.parametrize("shape", [(61, 12, 1, 2, 16), (97, 24, 3, 4, 32)])
def test_a_seed_gives_bitwise_the_lectures_initial_weights(shape):
    torch.manual_seed(1337)
    theirs = LectureModel(*shape).weights()
    torch.manual_seed(1337)
    V, T, L, heads, C = shape
    config = GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=heads, n_embd=C)
    ours = GPT(config, init="lecture").state_dict()
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name


def test_every_step_of_the_schedule_has_the_lectures_learning_rate():
    c = TrainConfig(**preset_settings("gpt2-124M-lecture"))
    for step in range(19073):
        ours = train_gpt2.get_lr(step, c.lr, c.lr * c.min_lr_ratio, c.warmup_steps, c.max_steps,
                                 c.schedule)
        assert math.isclose(ours, lecture_lr(step, 6e-4, 715, 19073), rel_tol=1e-12)


@pytest.mark.parametrize("preset", ["gpt2-124M", "gpt2-124M-lecture"])
def test_the_presets_have_the_lectures_settings(preset):
    c = TrainConfig(**preset_settings(preset))
    assert (c.total_batch_size, c.block_size, c.seed) == (2**19, 1024, 1337)
    assert (c.lr, c.min_lr_ratio, c.warmup_steps, c.schedule) == (6e-4, 0.1, 715, "cosine")
    assert (c.optimizer, c.beta1, c.beta2, c.weight_decay, c.grad_clip) == \
        ("adamw", 0.9, 0.95, 0.1, 1.0)
    assert c.val_tokens == 20 * 64 * 1024 * 8  # 20 batches on each of 8 GPUs
    assert c.gpt_config() == GPTConfig(vocab_size=50304)
    if preset == "gpt2-124M":
        assert (c.init, c.shuffle, c.max_steps, c.epochs) == ("openai", "on", 0, 1.0)
    else:
        assert (c.init, c.shuffle, c.max_steps) == ("lecture", "off", 19073)


@pytest.mark.parametrize("B, W", [(1, 1), (2, 1), (4, 3), (2, 8), (8, 2)])
def test_every_step_has_the_tokens_that_the_lectures_loader_gives_it(B, W, tmp_path):
    """In file order, within the first shard; each token is there once."""
    T, windows, tokens = 8, 48, np.random.default_rng(0).permutation(5000).astype(np.uint16)
    paths = [str(tmp_path / f"edufineweb_train_{i:06d}.npy") for i in (1, 2)]
    for path, part in zip(paths, (tokens[:4200], tokens[4200:])):
        np.save(path, part)

    def tokens_of_a_step(next_batches):
        batches = [torch.stack(next_batch()) for _ in range(windows // (B * W))
                   for next_batch in next_batches]
        # (2, windows * T): all of x, and all of y
        return torch.cat(batches, dim=1).flatten(1).sort().values

    ours = [DataLoaderLite(TokenStream(paths), B, T, rank, W, shuffle=False) for rank in range(W)]
    theirs = [lecture_batches(paths, B, T, rank, W) for rank in range(W)]
    try:
        for step in range(10):
            assert torch.equal(tokens_of_a_step([loader.next_batch for loader in ours]),
                               tokens_of_a_step([batches.__next__ for batches in theirs])), step
    finally:
        for loader in ours:
            loader.close()


@pytest.mark.parametrize("B, W, steps", [
    (64, 1, 190), (16, 1, 190), (64, 2, 190), (32, 8, 190), (64, 8, 189)])
def test_on_shards_of_100M_tokens_the_batches_are_the_lectures_for_190_steps(B, W, steps, tmp_path):
    """As config.py says; on sparse files, whose tokens are not read."""
    paths = [str(tmp_path / f"edufineweb_train_{i:06d}.npy") for i in (1, 2)]
    header = {"descr": "<u2", "fortran_order": False, "shape": (10**8,)}
    for path in paths:
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.truncate(f.tell() + 2 * 10**8)
    stream = TokenStream(paths)
    accumulation = 2**19 // (B * 1024 * W)
    equal = []  # number of equal micro-batches, by rank
    for rank in range(W):
        loader = DataLoaderLite(stream, B, 1024, rank, W, shuffle=False)
        n = 0
        for shard, first in lecture_positions([10**8] * 2, B, 1024, rank, W):
            if 1024 * int(loader.window_indices(n * B * W)[0]) != 10**8 * shard + first:
                break
            n += 1
        equal.append(n)
    assert min(equal) // accumulation == steps


@pytest.mark.slow
def test_the_124M_model_starts_as_the_lectures():
    """The numbers are those of build-nanogpt's script with seed 1337 and torch 2.13."""
    config = TrainConfig(**preset_settings("gpt2-124M-lecture"))
    torch.manual_seed(config.seed)
    model = train_gpt2.build_model(config, None, ONE)
    found = {name: [*p[0, :3].tolist(), p.double().norm().item()]
             for name, p in model.transformer.named_parameters() if p.dim() == 2}
    expected = {"wte": [0.00897012, -0.00099618, -0.04377645, 124.304900],
                "wpe": [-0.00879707, -0.05003349, -0.01467433, 17.736613],
                "h.0.attn.c_attn": [-0.02396797, -0.00847834, -0.01034393, 26.588270],
                "h.11.mlp.c_proj": [-0.00225190, 0.00709499, 0.00142978, 6.267009]}
    for name, values in expected.items():
        assert found[f"{name}.weight"] == pytest.approx(values, abs=1e-6), name
    assert found["h.0.attn.c_proj.weight"][3] == pytest.approx(3.134092, abs=1e-6)
    x, y = (factor * torch.arange(2048).view(2, 1024) % 50257 for factor in (7919, 104729))
    with torch.no_grad():
        assert model(x, y)[1].item() == pytest.approx(10.9647331, abs=2e-6)


# -----------------------------------------------------------------------------
# train_gpt2.py's runs

def check_run(cwd, folder, B, W):
    """Compares the run in cwd with the lecture's, and the lecture's with the golden numbers."""
    run_dir = cwd / "log" / "gpt2-124M-lecture"
    logged = {stream: dict(points) for stream, points in read_log(run_dir / "log.txt").items()}
    weights = torch.load(run_dir / f"model_{STEPS:05d}.pt", weights_only=True)["model"]
    losses, norms, vals, model = lecture_run(folder, B, W)
    assert list(logged["train"].values()) == pytest.approx(losses, abs=1e-6)
    assert list(logged["norm"].values()) == pytest.approx(norms, abs=1e-5)
    assert {step: logged["val"][step] for step in vals} == pytest.approx(vals, abs=1e-6)
    assert weights.keys() == model.weights().keys()
    for name, p in model.weights().items():
        assert torch.allclose(weights[name], p, rtol=0, atol=1e-5), name
    # ten times the tolerance: another CPU sums in another order
    assert [losses[step] for step in GOLDEN_STEPS] == pytest.approx(GOLDEN_LOSSES, abs=1e-5)
    assert [norms[step] for step in GOLDEN_STEPS] == pytest.approx(GOLDEN_NORMS, abs=1e-4)
    del weights["lm_head.weight"]  # tied to wte
    squares = sum(p.double().square().sum().item() for p in weights.values())
    assert math.sqrt(squares) == pytest.approx(GOLDEN_WEIGHTS, abs=1e-4)


@pytest.mark.parametrize("B", [8, 32])  # 4 micro-steps, and one
def test_one_process_trains_as_the_lecture(B, shards, tmp_path, monkeypatch):
    compared = []

    def compare(settings, curve, step, losses):
        compared.append((step, *losses))

    def compare_first(run_dir, settings, step):
        logged = read_log(os.path.join(run_dir, "log.txt"))
        compared.append((step, *[name for name in logged if logged[name][-1][0] == step]))
    monkeypatch.setattr(reference, "print_comparison", compare)
    monkeypatch.setattr(reference, "print_first_losses", compare_first)
    monkeypatch.setattr(train_gpt2, "plot_run", lambda run_dir, baselines: None)  # takes a second
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *FLAGS, "--data", shards,
                                      "--batch-size", str(B), "--compile", "off"])
    with pytest.raises(SystemExit) as end:
        cli.run_main(train_gpt2.main)
    assert end.value.code == 0
    check_run(tmp_path, shards, B, 1)
    # every validation and every update is shown to reference.py, in this order
    expected = []
    for step in range(STEPS + 1):
        if step % 25 == 0:
            expected.append((step, "val"))
        if step < STEPS:
            evaluated = ["val", "val_bpb"] if step % 25 == 0 else []
            expected.append((step, *evaluated, "train", "lr", "norm", "tok_per_sec"))
    assert compared == expected


@pytest.mark.slow
@pytest.mark.parametrize("B, W, flags", [
    (8, 1, "--compile on"), (4, 2, "--compile off"), (16, 2, "--compile off"),
    (4, 2, "--compile on"), (4, 2, "--compile off --parallel fsdp")])
def test_compiled_and_on_two_ranks_it_trains_as_the_lecture(B, W, flags, shards, tmp_path):
    done = python(*launcher(W), os.path.join(ROOT, "train_gpt2.py"), *FLAGS, "--data", shards,
                  "--batch-size", B, *flags.split(), cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    check_run(tmp_path, shards, B, W)
