"""
Pictures of a run: read log.txt, draw the loss and HellaSwag curves beside GPT-2's and GPT-3's.

    python plots.py log/shakespeare               # writes log/shakespeare/loss.png

log.txt has one fact a line, `step stream value`; the streams are train, val, hella (acc_norm, completion
style), hella_lm_eval, lr, norm, tok_per_sec, epoch.
"""
import os

# Loss of OpenAI's GPT-2 124M on FineWeb-Edu val (build-nanogpt's notebook) and HellaSwag acc_norm, completion style, of
# GPT-2 124M (measured by build-nanogpt's hellaswag.py) and GPT-3 124M (GPT-3 paper, appendix H): comparable with a run
# on FineWeb-Edu, and with no other.
GPT2_LOSS, GPT2_HELLASWAG, GPT3_HELLASWAG = 3.2924, 0.2955, 0.337


def read_log(path):
    """{stream: [(step, value), ...] in the file's order} of a log.txt; ValueError names a line that is not a fact."""
    streams = {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                step, stream, value = line.split()
                streams.setdefault(stream, []).append((int(step), float(value)))
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: expected `step stream value`, got {line.strip()!r}") from e
    return streams


def smooth(values, window):
    """Running mean over the last window values, as long as values: smooth([1, 2, 3, 4], 2) -> [1, 1.5, 2.5, 3.5]."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def plot_run(run_dir, out=None, baselines=False):
    """Draws a run folder's curves into out (default: loss.png in it) and returns that path.

    baselines adds the lines of GPT-2 and GPT-3, which mean something for FineWeb-Edu only.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    out = out or os.path.join(run_dir, "loss.png")
    streams = read_log(os.path.join(run_dir, "log.txt"))
    has_hella = "hella" in streams
    figure, panels = plt.subplots(1, 1 + has_hella, figsize=(7 + 6 * has_hella, 4.5), squeeze=False, layout="constrained")
    panel = panels[0][0]
    if "train" in streams:
        steps, values = zip(*streams["train"])
        panel.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=1)
        panel.plot(steps, smooth(values, max(1, len(values) // 50)), color="tab:blue", label="train (running mean)")
    if "val" in streams:
        steps, values = zip(*streams["val"])
        panel.plot(steps, values, color="tab:orange", marker="o", markersize=3, label=f"val (last {values[-1]:.3f})")
    if baselines:
        panel.axhline(GPT2_LOSS, color="tab:red", linestyle="--", label=f"GPT-2 124M on FineWeb-Edu val ({GPT2_LOSS})")
    panel.set(xlabel="step", ylabel="loss (nats a token)", title=os.path.basename(os.path.abspath(run_dir)))
    panel.grid(alpha=0.3)
    panel.legend()
    if has_hella:
        panel = panels[0][1]
        for stream, style, color in (("hella", "completion", "tab:blue"), ("hella_lm_eval", "lm-eval", "tab:cyan")):
            if stream in streams:
                steps, values = zip(*streams[stream])
                panel.plot(steps, values, color=color, marker="o", markersize=3, label=f"{style} (last {values[-1]:.4f})")
        panel.axhline(GPT2_HELLASWAG, color="tab:red", linestyle="--", label=f"GPT-2 124M, completion ({GPT2_HELLASWAG})")
        panel.axhline(GPT3_HELLASWAG, color="tab:green", linestyle="--", label=f"GPT-3 124M ({GPT3_HELLASWAG})")
        panel.set(xlabel="step", ylabel="HellaSwag acc_norm", title="HellaSwag val")
        panel.grid(alpha=0.3)
        panel.legend()
    temporary = f"{out}.{os.getpid()}.tmp"
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, out)
    return out


def main():
    from runtime import ArgumentParser, run_main  # they need torch, and reading or drawing a log does not

    def plot():
        parser = ArgumentParser(description="Draw a run's curves.", allow_abbrev=False)
        parser.add_argument("run_dir", help="run folder, log/<exp-name>")
        parser.add_argument("--out", help="picture to write (default: loss.png in the run folder)")
        parser.add_argument("--baselines", action="store_true", help="add GPT-2's loss line (for FineWeb-Edu runs)")
        args = parser.parse_args()
        if not os.path.isfile(os.path.join(args.run_dir, "log.txt")):
            raise FileNotFoundError(f"{args.run_dir} has no log.txt; give the folder of a run, log/<exp-name>")
        print(f"wrote {plot_run(args.run_dir, args.out, args.baselines)}")
    run_main(plot)


if __name__ == "__main__":
    main()
