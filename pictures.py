"""
Pictures of a model's weights, and of what its attention looks at.

    python pictures.py log/shakespeare                       # writes wpe.png, c_attn.png, norms.png, attention_0.png ... there
    python pictures.py gpt2 --out pictures --prompt "The cat sat on the mat because it was tired"

In a trained model positions are smooth waves and the weights have structure; after an initialisation both are noise, and
where training was short they are still rough. The lecture looks at the first two by hand in its notebook.
"""
import os

import torch

from convert import load_model
from data import EOT, NUM_TOKENS, get_tokenizer
from plots import write_figure
from runtime import ArgumentParser, run_main


def new_figure(width, height):
    """An empty matplotlib Figure of a size in inches, without pyplot: nothing to close."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained", dpi=80)


def wpe_figure(model, columns=(0.2, 0.3, 0.4)):
    """Figure of the position embeddings: all of wpe as a heat map, and a few of its columns over the positions.

    columns: which channels, as shares of n_embd.
    """
    wpe = model.transformer.wpe.weight.detach().float().cpu()             # (block_size, C)
    figure = new_figure(11, 3.6)
    left, right = figure.subplots(1, 2)
    limit = wpe.abs().quantile(0.99).item() if wpe.numel() < 2**24 else 3 * wpe.std().item()
    image = left.imshow(wpe.numpy(), aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    figure.colorbar(image, ax=left)
    left.set(title="wpe: a row is a position, a column a channel", xlabel="channel", ylabel="position")
    for share in columns:
        channel = int(share * wpe.size(1))
        right.plot(wpe[:, channel], linewidth=1, label=f"channel {channel}")
    right.set(title="three channels over the positions", xlabel="position")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    return figure


def c_attn_figure(model, layer=1, size=300):
    """Figure of the first size rows and columns of a block's c_attn, laid out (in, out) as OpenAI's checkpoints are."""
    weight = model.transformer.h[layer].attn.c_attn.weight.detach().float().cpu().t()[:size, :size]   # (C, 3C), cut
    figure = new_figure(4.6, 4.2)
    panel = figure.subplots()
    limit = 3 * weight.std().item()
    panel.imshow(weight.numpy(), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    panel.set(title=f"h.{layer}.attn.c_attn.weight[:{weight.size(0)}, :{weight.size(1)}]", xlabel="out: channels of q, k, v",
              ylabel="in: channel")
    return figure


def norms_figure(model):
    """Figure of the length of each token's embedding, in the order of its id, and of each position's.

    A token's id says when its merge was learnt: low ids are frequent. Ids past GPT-2's 50257 only pad the vocabulary.
    """
    wte, wpe = (model.transformer[name].weight.detach().float().norm(dim=1).cpu() for name in ("wte", "wpe"))
    figure = new_figure(11, 3.4)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    left.plot(wte[:NUM_TOKENS], ".", markersize=1, alpha=0.4)
    if len(wte) > NUM_TOKENS:
        left.plot(range(NUM_TOKENS, len(wte)), wte[NUM_TOKENS:], "o", markersize=3, color="tab:red", label="padding")
        left.legend(fontsize=8)
    left.set(title="length of each token's row in wte", xlabel="token id", ylabel="norm", ylim=(0, None))
    right.plot(wpe, linewidth=1)
    right.set(title="of each position's row in wpe", xlabel="position", ylim=(0, None))
    for panel in (left, right):
        panel.grid(alpha=0.3)
    return figure


@torch.no_grad()
def attention_weights(model, idx, layer):
    """(nh, T, T) float32: for each head of a block, how much each token of idx (T) int64 looks at each, softmax(q k^T).

    forward never makes this matrix: flash attention does without. It is recomputed here from the block's own input.
    """
    inputs, attn = [], model.transformer.h[layer].attn
    handle = attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        model(idx.unsqueeze(0))
    finally:
        handle.remove()
    x, = inputs
    B, T, C = x.size()
    q, k, _ = attn.c_attn(x).split(C, dim=2)                               # 3 x (1, T, C)
    q, k = (t.view(T, attn.n_head, C // attn.n_head).transpose(0, 1).float() for t in (q, k))        # (nh, T, hs)
    scores = q @ k.transpose(1, 2) / k.size(-1) ** 0.5                     # (nh, T, T)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(dim=-1)


def attention_figure(model, prompt, layer=0):
    """Figure of a block's attention on a prompt, one panel a head: a row is a token, the columns what it looks at.

    The colour goes with the square root, so that a head that looks at many tokens a little is seen too.
    """
    from matplotlib.colors import PowerNorm
    tokenizer = get_tokenizer()
    tokens = (tokenizer.encode_ordinary(prompt) or [EOT])[:model.config.block_size]
    weights = attention_weights(model, torch.tensor(tokens, device=model.lm_head.weight.device), layer).cpu()
    names = [tokenizer.decode([token]).replace("\n", "\\n") for token in tokens]
    num_heads = len(weights)
    columns = min(num_heads, 4)
    rows = -(-num_heads // columns)
    figure = new_figure(3 * columns + 0.6, 2.9 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    for head, panel in enumerate(panels.flat):
        if head >= num_heads:
            panel.set_axis_off()
            continue
        panel.imshow(weights[head].numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        panel.set_title(f"block {layer}, head {head}", fontsize=9)
        few = len(names) <= 24  # more would not be legible
        panel.set_xticks(range(len(names)) if few else [], names if few else [], rotation=90, fontsize=7)
        panel.set_yticks(range(len(names)) if few and head % columns == 0 else [],
                         names if few and head % columns == 0 else [], fontsize=7)
    return figure


def main():
    parser = ArgumentParser(description="Draw a GPT-2's weights and attention.", allow_abbrev=False)
    parser.add_argument("source", help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl")
    parser.add_argument("--out", help="folder for the pictures (default: source, where that is a folder)")
    parser.add_argument("--prompt", default="Hello, I'm a language model, and I know what I said",
                        help="whose attention to draw")
    args = parser.parse_args()
    out = args.out or (args.source if os.path.isdir(args.source) else None)
    if out is None:
        raise ValueError(f"{args.source} is no folder: say with --out where the pictures go")
    model, _ = load_model(args.source)
    os.makedirs(out, exist_ok=True)
    blocks = len(model.transformer.h)
    figures = {"wpe": wpe_figure(model), "c_attn": c_attn_figure(model, min(1, blocks - 1)), "norms": norms_figure(model)}
    figures.update((f"attention_{layer}", attention_figure(model, args.prompt, layer)) for layer in range(blocks))
    for name, figure in figures.items():
        print(f"wrote {write_figure(figure, os.path.join(out, f'{name}.png'))}")


if __name__ == "__main__":
    run_main(main)
