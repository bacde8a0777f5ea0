"""
Text from a model: next-token sampling, generation with a KV cache, and a command line for both.

    python sample.py log/shakespeare --prompt "ROMEO:" --num-samples 4
    python sample.py log/gpt2-124M/model_19000.pt --prompt "Hello, I'm a language model," --temperature 0.8 --stream
    echo "Once upon a time" | python sample.py gpt2-xl -      # OpenAI's weights, from the Hugging Face Hub
    python sample.py log/gpt2-124M --interactive              # Ctrl-C stops an answer, Ctrl-D leaves

Prints the samples, each under a ruler; what is no text of a model goes to stderr. The same seed gives the same text on
the same machine. A text ends at <|endoftext|>, which is not printed.

The context: a prompt longer than the model's block_size is cut to its last block_size tokens. Whenever the context is
full, its older half is dropped and the newer half is read again, now from position 0: see context_start.
"""
import codecs
import contextlib
import platform
import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

from convert import load_model
from data import EOT, NUM_TOKENS, get_tokenizer
from runtime import DTYPES, ArgumentParser, choose_device, choose_dtype, keep_freed_memory, run_main

# -----------------------------------------------------------------------------
# one token

def sample_next_token(logits, generator=None, temperature=1.0, top_k=50, top_p=1.0):
    """Next token of each row, (B, 1) int64, drawn from the logits (B, V) of its last position.

    temperature 0 takes the likeliest. top_k 0, or more than there are tokens, keeps them all. top_p below 1 then keeps
    the likeliest tokens that together reach it, always one at least. The ids of a padded vocabulary past GPT-2's 50257
    are never drawn: no text belongs to them.
    """
    logits = logits[:, :NUM_TOKENS].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probs = F.softmax(logits / temperature, dim=-1)
    k = min(top_k, probs.size(-1)) or probs.size(-1)
    topk_probs, topk_indices = torch.topk(probs, k, dim=-1)             # (B, k), the likeliest first
    if top_p < 1:
        topk_probs = topk_probs / topk_probs.sum(dim=-1, keepdim=True)
        likelier = topk_probs.cumsum(dim=-1) - topk_probs               # (B, k), what stands before each
        topk_probs = topk_probs.masked_fill(likelier >= top_p, 0.0)
    ix = torch.multinomial(topk_probs, 1, generator=generator)          # (B, 1), a place among the k
    return torch.gather(topk_indices, -1, ix)


# -----------------------------------------------------------------------------
# many tokens

def context_start(T, block_size):
    """Where the context of a text of T tokens begins: the smallest multiple of half a block that leaves at most a block.

    Learned positions cannot slide by one token without all keys and values changing; by halves, reading the context
    again costs each token little. block_size 1024: 0 up to 1024 tokens, 512 up to 1536, 1024 up to 2048.
    """
    half = (block_size + 1) // 2
    return -(-max(0, T - block_size) // half) * half


@torch.no_grad()
def stream(model, prompts, max_new_tokens, generator=None, temperature=1.0, top_k=50, top_p=1.0, hidden=None):
    """Yields the next token of every row, (B) int64 on the model's device, max_new_tokens times or until all have ended.

    prompts: B lists of token ids of any lengths, none empty; each row is what it would be alone (its draws apart). A row
    that came to <|endoftext|> goes on with nothing else. The model should be in eval mode, the generator on its device.
    hidden: model.hidden or a compiled one.
    """
    if not all(prompts):
        raise ValueError(f"an empty prompt; [{EOT}], <|endoftext|>, begins a document")
    hidden, block_size, device = hidden or model.hidden, model.config.block_size, model.transformer.wte.weight.device
    rows = [list(prompt[-block_size:]) for prompt in prompts]
    B, longest = len(rows), max(len(row) for row in rows)
    cache = model.make_cache(B, min(block_size, longest + max_new_tokens - 1))
    ended, starts, tokens = torch.zeros(B, dtype=torch.bool, device=device), None, None
    for _ in range(max_new_tokens):
        before, starts = starts, [context_start(len(row), block_size) for row in rows]
        contexts = [len(row) - start for row, start in zip(rows, starts)]
        last = torch.tensor(contexts, device=device) - 1                # (B), position of each row's newest token
        if starts != before:  # padded on the right: the pads' columns are written over before anything looks at them
            idx = torch.zeros((B, max(contexts)), dtype=torch.long)
            for b, (row, start) in enumerate(zip(rows, starts)):
                idx[b, :contexts[b]] = torch.tensor(row[start:])
            x = hidden(idx.to(device), torch.arange(max(contexts), device=device), None, cache)     # (B, T, C)
            x = x[torch.arange(B, device=device), last]                 # (B, C)
        else:
            attn_mask = torch.arange(max(contexts), device=device) <= last[:, None]                 # (B, S)
            x = hidden(tokens, last[:, None], attn_mask[:, None, None, :], cache)[:, -1]            # (B, C)
        tokens = sample_next_token(model.lm_head(x), generator, temperature, top_k, top_p)          # (B, 1)
        tokens = tokens.masked_fill(ended[:, None], EOT)
        ended = ended | (tokens[:, 0] == EOT)
        yield tokens[:, 0]
        if ended.all():
            return
        for row, token in zip(rows, tokens[:, 0].tolist()):
            row.append(token)


def generate(model, idx, max_new_tokens, generator=None, temperature=1.0, top_k=50, top_p=1.0):
    """idx (B, T) int64 with up to max_new_tokens tokens appended to each row, (B, T + new); see stream."""
    new = stream(model, idx.tolist(), max_new_tokens, generator, temperature, top_k, top_p)
    return torch.cat([idx, *(tokens[:, None] for tokens in new)], dim=1)


def stream_text(token_ids):
    """Yields the text of token ids up to <|endoftext|> in pieces, whole characters only: "", "é", " you", ...

    A character of several bytes may be spread over tokens. What is no UTF-8 becomes U+FFFD, as tokenizer.decode has it.
    """
    tokenizer, decoder = get_tokenizer(), codecs.getincrementaldecoder("utf-8")("replace")
    for token in token_ids:
        if token == EOT:
            break
        yield decoder.decode(tokenizer.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def encode_prompt(prompt):
    """Token ids of a text; an empty one begins a document (<|endoftext|>). ValueError for what is no UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as e:  # bytes of the command line that are no UTF-8 come as lone surrogates
        raise ValueError(f"the prompt is not UTF-8 at character {e.start + 1}; convert it first") from e
    return get_tokenizer().encode_ordinary(prompt) or [EOT]


def generate_text(model, prompt, num_samples, max_new_tokens, seed, temperature=1.0, top_k=50, top_p=1.0, hidden=None):
    """List of num_samples texts that begin with prompt; an empty prompt begins a document (<|endoftext|>)."""
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    prompts = [encode_prompt(prompt)] * num_samples
    new = stream(model, prompts, max_new_tokens, generator, temperature, top_k, top_p, hidden)
    rows = torch.stack(list(new), dim=1).tolist()                       # (B, new)
    return [prompt + "".join(stream_text(row)) for row in rows]


# -----------------------------------------------------------------------------
# fast weights

class PackedLinear(nn.Module):
    """A Linear for the CPU whose weight lies in the blocks that oneDNN reads fastest; it can only be used, not trained.

    A token needs each weight once, so reading them is the limit; torch's own layout gets half of it or less for a few
    rows (bench.py sample). These two operators are what torch.compile uses for constant weights.
    """

    def __init__(self, weight, bias, B):
        super().__init__()
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), B)  # for B rows; others are served too

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(device, dtype):
    """Whether this machine multiplies packed weights: oneDNN on x86, in float32 or in a bfloat16 it knows."""
    x86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return device == "cpu" and x86 and (dtype == "float32" or dtype == "bfloat16"
                                        and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def prepare_for_sampling(model, dtype, num_samples=1, compiled=False):
    """Casts the model to dtype (a name in DTYPES), once and for all, and packs its weights where can_pack; in place.

    What torch.compile is to compile is not packed: it does not know these operators with a weight that is no constant.
    Afterwards it serves stream, generate and generate_text alone: a packed lm_head knows GPT-2's 50257 ids and no padding.
    """
    model.to(DTYPES[dtype])
    if not compiled and can_pack(model.transformer.wte.weight.device.type, dtype):
        for parent in list(model.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    weight = module.weight[:NUM_TOKENS] if name == "lm_head" else module.weight
                    setattr(parent, name, PackedLinear(weight, module.bias, num_samples))
    return model


# -----------------------------------------------------------------------------
# the command

def read_prompt(args):
    """The prompt that the flags name, as text. ValueError for two of them, and for a file or stdin that is no UTF-8."""
    if sum(source is not None for source in (args.stdin, args.prompt, args.prompt_file)) + args.interactive > 1:
        raise ValueError("give one of --prompt, --prompt-file, - (stdin) and --interactive")
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None and args.stdin is None:
        return ""
    if args.stdin not in (None, "-"):
        raise ValueError(f"a second argument {args.stdin!r}; only - is allowed there: the prompt comes from stdin")
    name, file = ("stdin", sys.stdin.buffer) if args.stdin else (args.prompt_file, open(args.prompt_file, "rb"))
    with contextlib.nullcontext() if args.stdin else file:
        prompt = file.read()
    try:
        # the line break that ends a file, or what echo prints, is no part of the prompt
        return prompt.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8 at byte {e.start + 1}; convert it first (iconv -t UTF-8)") from e


def note_long_prompt(prompt, block_size):
    """Says on stderr that the beginning of a prompt is left out, if it is."""
    if (T := len(encode_prompt(prompt))) > block_size:
        print(f"the prompt has {T} tokens; the model reads the last {block_size}", file=sys.stderr)


def answer(model, prompt, generator, hidden, args):
    """Prints what follows a prompt, as it comes."""
    new = stream(model, [encode_prompt(prompt)], args.max_new_tokens, generator, args.temperature, args.top_k, args.top_p,
                 hidden)
    for text in stream_text(tokens.item() for tokens in new):
        print(text, end="", flush=True)
    print()


def interact(model, generator, hidden, args):
    """Reads prompts, a line each, and answers them, until Ctrl-D. Ctrl-C stops an answer, or empties the line."""
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused as such, and the next one read
    print("a line is a prompt; Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
            note_long_prompt(prompt, model.config.block_size)
            answer(model, prompt, generator, hidden, args)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except ValueError as e:  # of encode_prompt
            print(f"error: {e}", file=sys.stderr)


def make_parser():
    """The command line's flags."""
    parser = ArgumentParser(description="Sample text from a GPT-2.", allow_abbrev=False)
    parser.add_argument("source", help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl")
    parser.add_argument("stdin", nargs="?", metavar="-", help="read the prompt from stdin")
    parser.add_argument("--prompt", help="text to continue (default: begin a document)")
    parser.add_argument("--prompt-file", metavar="FILE", help="continue what this file holds, UTF-8")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts, one a line, and answer each")
    parser.add_argument("--num-samples", type=int, default=4, help="texts to draw (default 4)")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come, one sample after the other")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to draw for each (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1.0)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest tokens, 0 for all (default 50)")
    parser.add_argument("--top-p", type=float, default=1.0, help="and among the likeliest that together reach this"
                        " probability (default 1.0, all)")
    parser.add_argument("--seed", type=int, default=42, help="(default 42)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16: the weights are cast to it")
    parser.add_argument("--compile", action="store_true", help="torch.compile: minutes first, then faster, on a GPU")
    return parser


def print_samples(model, prompt, generator, hidden, args):
    """Prints --num-samples texts, each under a ruler; with --stream one after the other, as their tokens come."""
    note_long_prompt(prompt, model.config.block_size)
    rulers = [f"--- sample {i} " + "-" * 60 for i in range(1, args.num_samples + 1)]
    if args.stream:
        for ruler in rulers:
            print(ruler + "\n" + prompt, end="", flush=True)
            answer(model, prompt, generator, hidden, args)
        return
    texts = generate_text(model, prompt, args.num_samples, args.max_new_tokens, args.seed, args.temperature, args.top_k,
                          args.top_p, hidden)
    for ruler, text in zip(rulers, texts):
        print(f"{ruler}\n{text}")


def main():
    args = make_parser().parse_intermixed_args()  # so that - may stand after flags
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(args, name) >= least:  # catches nan too
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be {least} or more")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: it must be more than 0 and at most 1")
    prompt = read_prompt(args)
    encode_prompt(prompt)  # what is wrong with it shows before the model is loaded
    keep_freed_memory()
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it lacks
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, info = load_model(args.source, device)
    if info:
        print(f"{info['path']}: step {info['step']}, val loss {info['val_loss']}", file=sys.stderr)
    prepare_for_sampling(model, dtype, 1 if args.stream or args.interactive else args.num_samples, args.compile)
    hidden = torch.compile(model.hidden, dynamic=True) if args.compile else model.hidden
    generator = torch.Generator(device=device).manual_seed(args.seed)
    if args.interactive:
        interact(model, generator, hidden, args)
    else:
        print_samples(model, prompt, generator, hidden, args)


if __name__ == "__main__":
    run_main(main)
