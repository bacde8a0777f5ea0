"""
Text from a model: next-token sampling, and a command line for it.

    python sample.py log/shakespeare --prompt "ROMEO:" --num-samples 4
    python sample.py log/gpt2-124M/model_19000.pt --prompt "Hello, I'm a language model," --temperature 0.8
    python sample.py gpt2-xl                      # OpenAI's weights, from the Hugging Face Hub

Prints the samples, each under a ruler. The same seed gives the same text on the same machine.
"""
import torch
from torch.nn import functional as F

from checkpoint import load_model
from data import EOT, NUM_TOKENS, get_tokenizer
from runtime import ArgumentParser, autocast, choose_device, choose_dtype, keep_freed_memory, run_main


def sample_next_token(logits, generator=None, temperature=1.0, top_k=50):
    """Next token of each row, (B, 1) int64, drawn from the logits (B, V) of its last position.

    temperature 0 takes the likeliest. top_k 0, or more than there are tokens, keeps them all. The ids of a padded
    vocabulary past GPT-2's 50257 are never drawn: no text belongs to them.
    """
    logits = logits[:, :NUM_TOKENS].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probs = F.softmax(logits / temperature, dim=-1)
    k = min(top_k, probs.size(-1)) or probs.size(-1)
    topk_probs, topk_indices = torch.topk(probs, k, dim=-1)             # (B, k)
    ix = torch.multinomial(topk_probs, 1, generator=generator)          # (B, 1), a place among the k
    return torch.gather(topk_indices, -1, ix)


@torch.no_grad()
def generate(model, idx, max_new_tokens, generator=None, temperature=1.0, top_k=50):
    """idx (B, T) int64 with max_new_tokens tokens appended to each row, (B, T + max_new_tokens).

    A context longer than the model's block_size is cut to its last block_size tokens. The model should be in eval
    mode; the generator must be on idx's device.
    """
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.config.block_size:])            # (B, 1, V)
        idx = torch.cat((idx, sample_next_token(logits[:, -1, :], generator, temperature, top_k)), dim=1)
    return idx


def generate_text(model, prompt, num_samples, max_new_tokens, seed, temperature=1.0, top_k=50):
    """List of num_samples texts that begin with prompt; an empty prompt begins a document (<|endoftext|>)."""
    device = next(model.parameters()).device
    tokenizer = get_tokenizer()
    tokens = tokenizer.encode_ordinary(prompt) or [EOT]
    idx = torch.tensor(tokens, dtype=torch.long, device=device).unsqueeze(0).repeat(num_samples, 1)
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = generate(model, idx, max_new_tokens, generator, temperature, top_k).tolist()
    # what follows <|endoftext|> belongs to another document
    rows = [row[1:] if row[0] == EOT else row for row in rows]
    return [tokenizer.decode(row[:row.index(EOT)] if EOT in row else row) for row in rows]


def main():
    parser = ArgumentParser(description="Sample text from a GPT-2.", allow_abbrev=False)
    parser.add_argument("source", help="run folder, model_*.pt file, gpt2 ... gpt2-xl, or a Hugging Face folder")
    parser.add_argument("--prompt", default="", help="text to continue (default: begin a document)")
    parser.add_argument("--num-samples", type=int, default=4, help="texts to draw (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to draw for each (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1.0)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest tokens, 0 for all (default 50)")
    parser.add_argument("--seed", type=int, default=42, help="(default 42)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    args = parser.parse_args()
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(args, name) >= least:  # catches nan too
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be {least} or more")
    keep_freed_memory()
    device = choose_device(args.device)
    model, info = load_model(args.source, device)
    if info:
        print(f"{info['path']}: step {info['step']}, val loss {info['val_loss']}")
    with autocast(device, choose_dtype(args.dtype, device)):
        texts = generate_text(model, args.prompt, args.num_samples, args.max_new_tokens, args.seed,
                              args.temperature, args.top_k)
    for i, text in enumerate(texts, 1):
        print(f"--- sample {i} " + "-" * 60 + f"\n{text}")


if __name__ == "__main__":
    run_main(main)
