"""
The scaling study: how many tokens Muon saves compared with AdamW at three sizes, and whether two variants of Muon save more.

    python -m bench.scaling SHARDS --folder scaling --jobs 2        # hours of CPU; the same command resumes
    python -m bench.scaling SHARDS --folder scaling --picture scaling.png

AdamW and Muon are tuned at the smallest size, on one seed, and the learning rates of the blocks are transferred to the others:
they scale as 1/C for AdamW (Yang et al. 2022) and as 1/sqrt(C) for Muon scaled to AdamW's RMS, which keeps the spectral norm of
an update; the embeddings' rate is constant. At the middle size half and twice the transferred rates are tried too. AdamW trains
for STEPS steps, Muon for a fraction of them, each with its own schedule; the saving is STEPS divided by the number of steps at
which Muon, interpolated linearly in the logarithm of the steps, reaches AdamW's loss.

Runs are train_gpt2.py's, with the flags in COMMON. scaling.json beside this file holds {run: validation loss} of the runs made
so far on the textbook text of the figures in docs/speed.md; delete it for other shards.
"""
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import cli
from files import atomic_write, check_output


def parse_args():
    """The flags; ValueError for an invalid one. None for a run of the study, whose flags are those of train_gpt2.py."""
    if sys.argv[1:2] == ["--train"]:
        return None
    parser = cli.ArgumentParser(prog="python -m bench.scaling", description="Measure how many tokens Muon saves.")
    parser.add_argument("shards", help="folder of shards, as train_gpt2.py --data takes")
    parser.add_argument("--folder", default="scaling", help="folder of the runs in progress (default scaling)")
    parser.add_argument("--jobs", type=cli.number(int, 1, os.cpu_count()), default=2,
                        help="runs at a time, on one core each (default 2)")
    parser.add_argument("--picture", help="draw the savings into this PNG file")
    args = parser.parse_args()
    if not os.path.isdir(args.shards):
        raise FileNotFoundError(f"no folder of shards at {args.shards!r}; python fineweb.py creates one")
    if args.picture is not None:
        check_output(args.picture)
    return args


if __name__ == "__main__":
    cli.run_and_report(parse_args)  # --help and an invalid flag end the process here: PyTorch takes a second to import

import torch

import checkpoint
import plots
import train_gpt2
from bench.measure import print_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#        n_layer n_head n_embd; parameters of the blocks
SIZES = {"2M": (4, 3, 192), "8M": (7, 5, 320), "25M": (8, 8, 512)}
STEPS, TOKENS_PER_STEP, SEEDS = 400, 1024, (1, 2, 3)
PARTS = (0.5, 0.65)  # fractions of STEPS, for Muon
COMMON = ["--preset", "gpt2-124M", "--block-size", "128", "--batch-size", "8", "--total-batch-size", str(TOKENS_PER_STEP),
          "--warmup-steps", "40", "--min-lr-ratio", "0", "--val-tokens", "65536", "--val-every", "1000000",
          "--hella-every", "0", "--sample-every", "0", "--save-every", "0", "--dtype", "bfloat16",
          "--compile", "off", "--device", "cpu"]
# (learning rate of the blocks' matrices, of the embeddings), at the smallest size
SWEEP = {"adamw": [(1.25e-4, 12e-3), (2.5e-4, 12e-3), (5e-4, 12e-3), (1e-3, 12e-3), (2e-3, 12e-3), (4e-3, 12e-3), (5e-4, 6e-3),
                   (5e-4, 24e-3), (2.5e-4, 24e-3), (2.5e-4, 6e-3)],
         "muon": [(3e-3, 12e-3), (6e-3, 12e-3), (12e-3, 12e-3), (24e-3, 12e-3), (6e-3, 24e-3), (6e-3, 6e-3), (12e-3, 6e-3)]}


# -----------------------------------------------------------------------------
# a variant of Muon; the other one, NorMuon, helped and is in model.py

class Cautious(torch.optim.Muon):
    """Weight decay only where it has the sign of the update (Chen et al. 2025, arXiv 2510.12402)."""

    @torch.no_grad()
    def step(self):
        """One update of all parameters."""
        old = {p: p.clone() for group in self.param_groups for p in group["params"]}
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step()
        for group, group["weight_decay"] in zip(self.param_groups, decays):
            for p in group["params"]:
                same_sign = (old[p] - p) * old[p] > 0
                p.sub_(old[p] * same_sign, alpha=group["lr"] * group["weight_decay"])


Cautious.__name__ = "Muon"  # by which parallel.py knows the state of an optimizer when a run resumes
VARIANTS = ("cautious", "normuon")


# -----------------------------------------------------------------------------
# runs

class Study:
    """Runs in a folder; each is made once."""

    def __init__(self, shards, folder, jobs):
        self.shards, self.folder, self.jobs = os.path.abspath(shards), os.path.abspath(folder), jobs
        self.path, self.losses, self.lock = os.path.join(ROOT, "bench", "scaling.json"), {}, threading.Lock()
        os.makedirs(self.folder, exist_ok=True)
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as f:
                self.losses = json.load(f)

    def run(self, size, optimizer, rates, part=1.0, seed=1):
        """Validation loss of a run."""
        lr, embd_lr = rates
        name = f"{size}-{optimizer}-{lr:g}-{embd_lr:g}-{part:g}-{seed}"
        if name not in self.losses:
            n_layer, n_head, n_embd = map(str, SIZES[size])
            flags = [*COMMON, "--data", self.shards, "--log-dir", self.folder, "--exp-name", name, "--resume", "auto",
                     "--n-layer", n_layer, "--n-head", n_head, "--n-embd", n_embd, "--seed", str(seed), "--lr", str(lr),
                     "--embd-lr-ratio", str(embd_lr / lr), "--max-steps", str(round(STEPS * part)), "--optimizer",
                     "muon" if optimizer == "cautious" else optimizer]
            done = subprocess.run([sys.executable, "-m", "bench.scaling", "--train", optimizer, *flags], cwd=ROOT,
                                  capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode != 0:
                raise RuntimeError(f"{name} failed: {done.stderr[-1000:]}")
            run_dir = os.path.join(self.folder, name)
            loss = checkpoint.read_log(os.path.join(run_dir, "log.txt"))["val"][-1][1]
            shutil.rmtree(run_dir)
            with self.lock:
                self.losses[name] = loss
                with atomic_write(self.path, "w") as f:
                    json.dump(self.losses, f, indent=1)
            print(f"{len(self.losses):3d} {name} {loss:.4f}", flush=True)
        return self.losses[name]

    def all(self, runs):
        """[loss of run(*arguments) for arguments in runs], several at a time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(lambda arguments: self.run(*arguments), runs))


def rates_at(size, optimizer, rates):
    """The rates of the smallest size, transferred."""
    narrower = SIZES["2M"][2] / SIZES[size][2]
    return rates[0] * (narrower if optimizer == "adamw" else math.sqrt(narrower)), rates[1]


def steps_at(loss, points):
    """Steps at which the line through the two points (steps, loss) next to a loss has it, in the logarithm of the steps."""
    points = sorted(points)
    pairs = list(zip(points, points[1:]))
    nearest = pairs[0 if loss > points[0][1] else -1]  # if it is outside of all
    (s0, l0), (s1, l1) = next((pair for pair in pairs if pair[1][1] <= loss <= pair[0][1]), nearest)
    return math.exp(math.log(s0) + (l0 - loss) / (l0 - l1) * math.log(s1 / s0))


def mean_and_error(values):
    """(mean, standard error of the mean)."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def study(s):
    """(rows of the sizes, rows of the variants) of a Study; runs what is missing."""
    best = {}
    for optimizer, grid in SWEEP.items():
        losses = s.all([("2M", optimizer, rates) for rates in grid])
        best[optimizer] = grid[losses.index(min(losses))]
        print(f"{optimizer} at 2M: " + ", ".join(f"{lr:g} and {embd:g} {loss:.3f}" for (lr, embd), loss in zip(grid, losses))
              + f"; chosen {best[optimizer]}", flush=True)
    rows = []
    for size in SIZES:
        adamw, muon = (rates_at(size, optimizer, best[optimizer]) for optimizer in ("adamw", "muon"))
        if size == "8M":  # is the transferred rate the best one here, too?
            near = [(optimizer, (factor * rates[0], rates[1])) for optimizer, rates in (("adamw", adamw), ("muon", muon))
                    for factor in (0.5, 1.0, 2.0)]
            losses = s.all([(size, optimizer, rates) for optimizer, rates in near])
            print("8M, seed 1: " + ", ".join(f"{o} {r[0]:.2g} {loss:.3f}" for (o, r), loss in zip(near, losses)), flush=True)
        targets = s.all([(size, "adamw", adamw, 1.0, seed) for seed in SEEDS])
        runs = [(size, "muon", muon, part, seed) for seed in SEEDS for part in PARTS]
        losses = s.all(runs)
        savings = [STEPS / steps_at(target, [(STEPS * run[3], loss) for run, loss in zip(runs, losses) if run[4] == seed])
                   for seed, target in zip(SEEDS, targets)]
        mean, error = mean_and_error(savings)
        row = {"size": size, "AdamW": mean_and_error(targets)[0]}
        for part in PARTS:
            row[f"Muon at {part:g}"] = statistics.mean(loss for run, loss in zip(runs, losses) if run[3] == part)
        rows.append({**row, "saving": f"{mean:.2f}", "s.e.": f"{error:.2f}", "seeds": " ".join(f"{x:.2f}" for x in savings)})
        print(rows[-1], flush=True)
    size, part, muon = "8M", PARTS[-1], rates_at("8M", "muon", best["muon"])
    base, variants = s.all([(size, "muon", muon, part, seed) for seed in SEEDS]), []
    for variant in VARIANTS:
        differences = [a - b for a, b in zip(s.all([(size, variant, muon, part, seed) for seed in SEEDS]), base)]
        mean, error = mean_and_error(differences)
        variants.append({"Muon at 8M": variant, "difference": f"{mean:.4f}", "s.e.": f"{error:.4f}",
                         "helps": "yes" if mean < -2 * error else "no"})
        print(variants[-1], flush=True)
    return rows, variants


def draw(rows, path):
    """Draws the saving over the size."""
    figure = plots.new_figure(5, 3.4)
    panel = figure.subplots()
    sizes = [row["size"] for row in rows]
    savings, errors = ([float(row[name]) for row in rows] for name in ("saving", "s.e."))
    panel.errorbar(sizes, savings, [2 * error for error in errors], marker="o", capsize=4)
    panel.axhline(1, color="0.5", linewidth=0.8)
    panel.set(xlabel="parameters of the blocks", ylabel="AdamW's tokens / Muon's", title="tokens to AdamW's loss, 2 s.e.")
    panel.grid(alpha=0.3)
    return plots.write_figure(figure, path)


def main():
    args = parse_args()
    if args is None:  # a run: --train, its optimizer, then the flags of train_gpt2.py
        if sys.argv[2] == "cautious":
            torch.optim.Muon = Cautious
        sys.argv = ["train_gpt2.py", *sys.argv[3:]]
        train_gpt2.plot_run = lambda *args, **kwargs: None
        return train_gpt2.main()
    rows, variants = study(Study(args.shards, args.folder, args.jobs))
    print_table(rows)
    print_table(variants)
    if args.picture:
        print(draw(rows, args.picture))


if __name__ == "__main__":
    cli.run_main(main)
