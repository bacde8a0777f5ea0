"""
Generates text: sampling of the next token, generation with a KV cache, and the command.

    python sample.py log/shakespeare --prompt "ROMEO:" --num-samples 4
    python sample.py log/gpt2-124M/model_19000.pt --prompt "Hello, I'm a language model," --temperature 0.8 --stream
    echo "Once upon a time" | python sample.py gpt2-xl -      # OpenAI's weights, from the Hugging Face Hub
    python sample.py log/gpt2-124M --interactive              # Ctrl-C stops an answer, Ctrl-D exits

Prints each sample under a header line; messages go to stderr. The same seed gives the same text on the same machine.
A text ends at <|endoftext|>, which is not printed.

A prompt longer than the model's block_size is cut to its last block_size tokens. When the context is full, its older
half is dropped, and the newer half is processed again from position 0.
"""
import codecs
import contextlib
import platform
import shlex
import sys

from run.cli import ArgumentParser, number, printable, run_main, start


def parse_args():
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(description="Generate text with a GPT-2.")
    parser.add_argument("source", help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl")
    parser.add_argument("stdin", nargs="*", metavar="-", help="read the prompt from stdin")
    parser.add_argument("--prompt", help="text to continue (default: start a document)")
    parser.add_argument("--prompt-file", metavar="FILE", help="continue the text in this file, UTF-8")
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal, one a line")
    parser.add_argument("--num-samples", type=number(int, 1), default=4,
                        help="number of samples (default 4)")
    parser.add_argument("--stream", action="store_true", help="print each token as it is generated, one sample at a time")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=64,
                        help="maximum tokens to generate per sample (default 64)")
    parser.add_argument("--temperature", type=number(float, 0), default=1.0,
                        help="sampling temperature, 0 for greedy (default 1.0)")
    parser.add_argument("--top-k", type=number(int, 0), default=50,
                        help="keep the k most likely tokens, 0 for all (default 50)")
    parser.add_argument("--top-p", type=number(float, above=0, high=1), default=1.0,
                        help="nucleus sampling: probability to keep (default 1.0, all)")
    parser.add_argument("--seed", type=number(int, 0), default=42, help="random seed (default 42)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first that is available)")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights: auto, float32, bfloat16 or float16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, which takes minutes")
    return parser.parse_intermixed_args()  # accepts - after flags, too


if __name__ == "__main__":
    start(parse_args)

import torch
import torch.nn as nn
from torch.nn import functional as F

from data import EOT, NUM_TOKENS, encode, get_tokenizer
from run.files import check_regular
from run.runtime import DTYPES, choose_device, choose_dtype, free_memory, keep_freed_memory, without_cudnn_attention
from run.weights import load_model

MAX_PROMPT = 2**22                      # bytes that are read of a prompt
TINY = torch.finfo(torch.float32).tiny  # the smallest normal number, 1e-38; its reciprocal is finite

# -----------------------------------------------------------------------------
# one token

def sample_next_token(logits, generator=None, temperature=1.0, top_k=50, top_p=1.0):
    """The next token of each row, (B, 1) int64, sampled from the logits (B, V) of its last position.

    temperature 0 is greedy (argmax). top_k keeps the k most likely tokens; 0, or more than V, keeps all. top_p below 1
    (nucleus sampling, Holtzman et al. 2020) then keeps the fewest most likely tokens whose probabilities sum to at least
    top_p. The ids of a padded vocabulary, from 50257 on, are never sampled: they decode to no text.

    The token is -1 if the logits of a row contain NaN or have no finite maximum.
    """
    logits = logits[:, :NUM_TOKENS].float()
    highest = logits.amax(dim=-1, keepdim=True)                         # (B, 1); amax propagates NaN
    if temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True)
    else:
        # logits minus their maximum: divided by a tiny temperature they are 0 or -inf, where inf - inf would be NaN
        probs = F.softmax((logits - highest) / max(temperature, TINY), dim=-1)
        k = min(top_k, probs.size(-1)) or probs.size(-1)
        topk_probs, topk_indices = torch.topk(probs, k, dim=-1)         # (B, k), in descending order
        topk_probs = topk_probs.masked_fill(~highest.isfinite(), 1.0)   # multinomial on NaN would abort a CUDA process
        if top_p < 1:
            topk_probs = topk_probs / topk_probs.sum(dim=-1, keepdim=True)
            cumulative = topk_probs.cumsum(dim=-1) - topk_probs         # (B, k), of the more likely tokens: 0 for the first
            topk_probs = topk_probs.masked_fill(cumulative >= max(top_p, TINY), 0.0)
        ix = torch.multinomial(topk_probs, 1, generator=generator)      # (B, 1), an index into the k
        tokens = torch.gather(topk_indices, -1, ix)
    return tokens.masked_fill(~highest.isfinite(), -1)


# -----------------------------------------------------------------------------
# many tokens

class KVCache:
    """Keys and values of the tokens that one block has processed, k and v (B, nh, max_T, hs).

    The token of row b at position t is at k[b, :, t], so rows may have different lengths. Before each forward pos, (T) or
    (B, T), and attn_mask, (B, 1, T, S) bool or None for the first tokens of a text, are those of the new tokens.
    """

    def __init__(self, shape, dtype, device):
        self.k, self.v = torch.zeros((2, *shape), dtype=dtype, device=device)
        self.pos = self.attn_mask = None

    def update(self, k, v):
        """Stores the new tokens' keys and values, (B, nh, T, hs); returns those to attend to, and the mask; see GPT.hidden."""
        B, _, T, _ = k.size()
        rows, columns = torch.arange(B, device=k.device)[:, None], self.pos.expand(B, T)
        for cached, new in ((self.k, k), (self.v, v)):
            cached[rows, :, columns] = new.transpose(1, 2).to(cached.dtype)  # (B, T, nh, hs)
        if self.attn_mask is None:
            return k, v, None  # there is nothing else in the cache to attend to
        S = self.attn_mask.size(-1)
        return self.k[:, :, :S], self.v[:, :, :S], self.attn_mask


def make_caches(model, B, max_T):
    """A KVCache for each block, of B rows of up to max_T tokens."""
    wte, config = model.transformer.wte.weight, model.config
    device_type = wte.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else wte.dtype
    if device_type == "cpu" and not autocast:
        # for a single query, torch's bf16 attention on a CPU is three times slower than its float32 attention (measured)
        dtype = torch.float32
    shape = B, config.n_head, max_T, config.n_embd // config.n_head
    return [KVCache(shape, dtype, wte.device) for _ in range(config.n_layer)]


def prefill(hidden, rows, caches, device):
    """Final hidden states (B, C) of the last token of each row, a list of ids; fills the caches."""
    longest = max(len(row) for row in rows)
    # padded on the right; later tokens overwrite the padding in the cache before they attend to it
    idx = torch.zeros((len(rows), longest), dtype=torch.long)
    for b, row in enumerate(rows):
        idx[b, :len(row)] = torch.tensor(row)
    pos = torch.arange(longest, device=device)
    for cache in caches:
        cache.pos, cache.attn_mask = pos, None
    x = hidden(idx.to(device), pos, caches)                             # (B, T, C)
    last = torch.tensor([len(row) for row in rows], device=device) - 1  # (B)
    return x[torch.arange(len(rows), device=device), last]


def decode(hidden, tokens, lengths, caches):
    """Final hidden states (B, C) of one new token per row, tokens (B, 1); lengths: of the rows, with it."""
    max_T, device = caches[0].k.size(2), tokens.device
    # S grows in steps of 32: on a GPU kernels are chosen, and torch.compile specializes, per length
    S = min(max_T, -(-max(lengths) // 32) * 32)
    last = torch.tensor(lengths, device=device) - 1                     # (B)
    attn_mask = torch.arange(S, device=device) <= last[:, None]         # (B, S)
    for cache in caches:
        cache.pos, cache.attn_mask = last[:, None], attn_mask[:, None, None, :]
    return hidden(tokens, last[:, None], caches)[:, -1]


@torch.no_grad()
def stream(model, prompts, max_new_tokens, generator=None, temperature=1.0, top_k=50, top_p=1.0, hidden=None):
    """Yields the next token of every row, (B) int64 on the model's device, max_new_tokens times or until all rows ended.

    prompts: B non-empty lists of token ids, of any lengths. The logits of a row do not depend on the other rows. After
    <|endoftext|> a row yields only <|endoftext|>. The model should be in eval mode, the generator on its device.
    hidden: model.hidden (the default), or a compiled version of it. Raises ValueError if the logits are non-finite.
    """
    if not all(prompts):
        raise ValueError(f"a prompt is empty; to start a document use [{EOT}], <|endoftext|>")
    hidden, block_size, device = hidden or model.hidden, model.config.block_size, model.transformer.wte.weight.device
    rows = [list(prompt[-block_size:]) for prompt in prompts]  # the contexts
    B, longest = len(rows), max(len(row) for row in rows)
    caches = make_caches(model, B, min(block_size, longest + max_new_tokens - 1))
    ended, tokens = torch.zeros(B, dtype=torch.bool, device=device), None
    for _ in range(max_new_tokens):
        # Dropping one token would invalidate the KV cache, since the learned position of every other token changes; half of
        # the context is dropped, so the cache is recomputed only every block_size / 2 tokens.
        full = [row for row in rows if len(row) > block_size]
        for row in full:
            del row[:(block_size + 1) // 2]
        with without_cudnn_attention():
            if tokens is None or full:
                x = prefill(hidden, rows, caches, device)               # (B, C)
            else:
                x = decode(hidden, tokens, [len(row) for row in rows], caches)
        tokens = sample_next_token(model.lm_head(x), generator, temperature, top_k, top_p)          # (B, 1)
        tokens = tokens.masked_fill(ended[:, None], EOT)
        ended = ended | (tokens[:, 0] == EOT)
        new = tokens[:, 0].tolist()  # waits for the device, once per token
        if -1 in new:
            raise ValueError("the model's logits are NaN or infinite: its activations overflow; try --dtype float32")
        yield tokens[:, 0]
        if all(token == EOT for token in new):
            return
        for row, token in zip(rows, new):
            row.append(token)


def generate(model, idx, max_new_tokens, generator=None, temperature=1.0, top_k=50, top_p=1.0):
    """idx (B, T) int64 with up to max_new_tokens tokens appended to each row, (B, T + new); see stream."""
    new = stream(model, idx.tolist(), max_new_tokens, generator, temperature, top_k, top_p)
    return torch.cat([idx, *(tokens[:, None] for tokens in new)], dim=1)


def stream_text(token_ids):
    """Yields the text of token ids up to <|endoftext|> in pieces of complete characters: "", "é", " you", ...

    The bytes of a character may be split over tokens. Invalid UTF-8 becomes U+FFFD, as in tokenizer.decode.
    """
    tokenizer, decoder = get_tokenizer(), codecs.getincrementaldecoder("utf-8")("replace")
    for token in token_ids:
        if token == EOT:
            break
        yield decoder.decode(tokenizer.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def encode_prompt(prompt):
    """Token ids of a text, [<|endoftext|>] for an empty one: it starts a document. ValueError if data.encode raises it."""
    return encode(prompt).tolist() or [EOT]


def generate_text(model, prompt, num_samples, max_new_tokens, seed, temperature=1.0, top_k=50, top_p=1.0, hidden=None):
    """A list of num_samples texts that start with prompt; an empty prompt starts a document. See stream."""
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    prompts = [encode_prompt(prompt)] * num_samples
    new = stream(model, prompts, max_new_tokens, generator, temperature, top_k, top_p, hidden)
    rows = torch.stack(list(new), dim=1).tolist()                       # (B, new)
    return [prompt + "".join(stream_text(row)) for row in rows]


# -----------------------------------------------------------------------------
# packed weights

class PackedLinear(nn.Module):
    """An inference-only Linear for the CPU, whose weight is stored in the blocked layout that oneDNN reads fastest.

    Generating a token reads every weight once, so memory bandwidth is the limit. With few rows torch's default layout
    reaches half of it or less (python -m bench sample). torch.compile uses these operators for constant weights.
    """

    def __init__(self, weight, bias, B):
        super().__init__()
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), B)  # optimized for B rows, valid for any

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(device, dtype):
    """Whether PackedLinear works on this machine: oneDNN on x86, in float32, or in bfloat16 if the CPU supports it."""
    x86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return device == "cpu" and x86 and (dtype == "float32" or dtype == "bfloat16"
                                        and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def prepare_for_sampling(model, dtype, num_samples=1, compiled=False):
    """Casts the model to dtype (a name in DTYPES) and packs its weights where can_pack; in place. Returns it.

    compiled: the model will be compiled, so it is not packed: torch.compile supports these operators only with constant
    weights. Use the result only for sampling: a packed lm_head has 50257 rows, without the padding of the vocabulary.
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

def read_file(name=None):
    """The text of a prompt's file, or of stdin for None. ValueError if it is too long, not UTF-8, or may never end."""
    if name is not None and not name.startswith("/dev/fd/"):  # process substitution is a FIFO
        check_regular(name)
    with open(name, "rb") if name is not None else contextlib.nullcontext(sys.stdin.buffer) as f:
        contents = f.read(MAX_PROMPT + 1)
    if len(contents) > MAX_PROMPT:
        raise ValueError(f"{name or 'stdin'} has over {MAX_PROMPT / 2**20:.0f} MiB, of which only the last tokens would be"
                         " used; give only its end (tail -c 10000)")
    try:
        # the final line break, which editors and echo add, is not part of the prompt; neither is a byte order mark
        return contents.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name or 'stdin'} is not valid UTF-8 at byte {e.start + 1}; convert it first"
                         " (iconv -t UTF-8)") from e


def read_prompt(args):
    """The prompt that the flags give, a str. ValueError for more than one."""
    words = " ".join(args.stdin)
    if words not in ("", "-"):
        raise ValueError(f"unexpected {words!r}: a prompt is given as --prompt {shlex.quote(words)}")
    if bool(words) + (args.prompt is not None) + (args.prompt_file is not None) + args.interactive > 1:
        raise ValueError("give only one of --prompt, --prompt-file, - (stdin) and --interactive")
    if (words or args.interactive) and sys.stdin is None:
        raise ValueError("stdin is closed; use --prompt or --prompt-file")
    return read_file(args.prompt_file) if words or args.prompt_file is not None else args.prompt or ""


def check_memory(config, device, dtype, prompt_tokens, args):
    """Raises ValueError, naming what would fit, if generate_text needs more memory for args.num_samples than there is."""
    T, prompt_tokens = min(config.block_size, prompt_tokens + args.max_new_tokens), min(config.block_size, prompt_tokens)
    k = min(args.top_k or NUM_TOKENS, NUM_TOKENS)
    # bytes per sample (measured): keys and values, the prompt's activations, logits and what sample_next_token makes of them
    fixed = (2 * config.n_layer * config.n_embd * T * (4 if device == "cpu" else DTYPES[dtype].itemsize)
             + 40 * config.n_embd * prompt_tokens + 12 * NUM_TOKENS + 20 * k)
    per_sample = fixed + 500 * args.max_new_tokens  # each generated token is a tensor
    needed, free = args.num_samples * per_sample, free_memory(device)
    if free is None or needed <= free:
        return
    allowed = (f"--num-samples may be at most {free // per_sample:,}" if per_sample <= free else
               f"--max-new-tokens may be at most {max(0, free - fixed) // 500:,} without --stream")
    raise ValueError(f"{args.num_samples:,} sample(s) of {args.max_new_tokens:,} tokens need about {needed / 1e9:,.1f} GB of"
                     f" memory, {free / 1e9:,.1f} GB are available: {allowed}")


def warn_if_cut(prompt, block_size):
    """Prints a message to stderr if a prompt is longer than the context."""
    if (T := len(encode_prompt(prompt))) > block_size:
        print(f"the prompt has {T} tokens; only the last {block_size} are used", file=sys.stderr)


def print_continuation(model, prompt, generator, hidden, args):
    """Generates the continuation of a prompt and prints it token by token."""
    new = stream(model, [encode_prompt(prompt)], args.max_new_tokens, generator, args.temperature, args.top_k, args.top_p,
                 hidden)
    for text in stream_text(tokens.item() for tokens in new):
        print(text, end="", flush=True)
    print()


def print_samples(model, prompt, generator, hidden, args):
    """Prints --num-samples texts, each under a header line; with --stream one after another, token by token."""
    warn_if_cut(prompt, model.config.block_size)
    headers = (f"--- sample {i} " + "-" * 60 for i in range(1, args.num_samples + 1))
    if args.stream:
        for header in headers:
            print(header + "\n" + prompt, end="", flush=True)
            print_continuation(model, prompt, generator, hidden, args)
        return
    texts = generate_text(model, prompt, args.num_samples, args.max_new_tokens, args.seed, args.temperature, args.top_k,
                          args.top_p, hidden)
    for header, text in zip(headers, texts):
        print(f"{header}\n{text}")


def interact(model, generator, hidden, args):
    """Reads prompts, one a line, and answers each, until Ctrl-D. Ctrl-C stops an answer, or clears the line."""
    sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 then raises in encode_prompt, not in input
    print("each line is a prompt; Ctrl-C stops an answer, Ctrl-D exits", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
            warn_if_cut(prompt, model.config.block_size)
            print_continuation(model, prompt, generator, hidden, args)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except ValueError as e:  # from encode_prompt
            print(f"error: {e}", file=sys.stderr)


def main():
    args = parse_args()
    prompt = read_prompt(args)
    prompt_tokens = len(encode_prompt(prompt))  # an invalid prompt raises before the model is loaded
    keep_freed_memory()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, info = load_model(args.source, device)
    if model.config.vocab_size < NUM_TOKENS:
        raise ValueError(f"{args.source} has a vocabulary of {model.config.vocab_size} tokens, not GPT-2's {NUM_TOKENS} (is it"
                         " a character-level model?): there is no tokenizer for it here")
    if not (args.stream or args.interactive):
        check_memory(model.config, device, dtype, prompt_tokens, args)
    if info:
        val_loss = "" if info["val_loss"] is None else f", val loss {info['val_loss']:.4f}"
        print(printable(f"{info['path']}: step {info['step']}{val_loss}"), file=sys.stderr)
    prepare_for_sampling(model, dtype, 1 if args.stream or args.interactive else args.num_samples, args.compile)
    hidden = torch.compile(model.hidden, dynamic=True) if args.compile else model.hidden
    generator = torch.Generator(device=device).manual_seed(args.seed)
    if args.interactive:
        interact(model, generator, hidden, args)
    else:
        print_samples(model, prompt, generator, hidden, args)


if __name__ == "__main__":
    run_main(main)
