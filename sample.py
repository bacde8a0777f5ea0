"""
Generates text: sampling of the next token, generation with a KV cache, and the command.

    python sample.py log/shakespeare --prompt "ROMEO:" --num-samples 4
    python sample.py log/gpt2-124M/model_19000.pt --prompt "Hello, I'm a" --temperature 0.8 --stream
    echo "Once upon a time" | python sample.py gpt2-xl -      # OpenAI's weights
    python sample.py log/gpt2-124M --interactive              # Ctrl-C stops an answer, Ctrl-D exits

Prints each sample under a header line; messages go to stderr. The same seed gives the same text on
the same machine. A text ends at <|endoftext|>, which is not printed.

A prompt longer than the model's block_size is cut to its last block_size tokens. When the context
is full, its older half is dropped, and the newer half is processed again from position 0.
"""
import math
import platform
import shlex
import sys

from run.cli import ArgumentParser, first_line, number, print_error, run_main, start


def parse_args():
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("source", metavar="MODEL",
        help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl")
    add("stdin", nargs="*", metavar="-", default=[], help="read the prompt from stdin")
    add("--prompt", help="text to continue (default: start a document)")
    add("--prompt-file", metavar="FILE", help="continue the text in this file, UTF-8")
    add("--interactive", action="store_true", help="read prompts from the terminal, one a line")
    add("--num-samples", type=number(int, 1), default=4, help="number of samples (default 4)")
    add("--stream", action="store_true",
        help="print each token as it is generated, one sample at a time")
    add("--max-new-tokens", type=number(int, 1), default=64,
        help="maximum tokens to generate per sample (default 64)")
    add("--temperature", type=number(float, 0), default=1.0,
        help="sampling temperature, 0 for greedy (default 1.0)")
    add("--top-k", type=number(int, 0), default=50,
        help="keep the k most likely tokens, 0 for all (default 50)")
    add("--top-p", type=number(float, above=0, high=1), default=1.0,
        help="nucleus sampling: probability to keep (default 1.0, all)")
    add("--seed", type=number(int, 0), default=42, help="random seed (default 42)")
    add("--device", default="auto",
        help="cuda, xpu, mps or cpu (default: the first that is available)")
    add("--dtype", default="auto", help="dtype of the weights: auto, float32, bfloat16 or float16")
    add("--compile", nargs="?", choices=("on", "off"), const="on", default="off",
        help="torch.compile the network, which takes minutes (default off)")
    return parser.parse_intermixed_args()  # accepts - after flags, too


if __name__ == "__main__":
    start(parse_args)

import torch
import torch.nn as nn
from torch.nn import functional as F

from run.runtime import (DTYPES, choose_device, choose_dtype, keep_freed_memory,
                         without_cudnn_attention)
from run.tokenizer import GPT2, load_tokenizer
from run.weights import load_model

TINY = torch.finfo(torch.float32).tiny  # the smallest normal number, 1e-38; 1 / TINY is finite

# -----------------------------------------------------------------------------
# one token

def sample_next_token(logits, generator=None, temperature=1.0, top_k=50, top_p=1.0,
                      num_tokens=GPT2.num_tokens):
    """The next token of each row, (B, 1) int64, sampled from logits (B, V) of its last position.

    temperature 0 is greedy (argmax). top_k keeps the k most likely tokens; 0, or more than V, keeps
    all. top_p below 1 (nucleus sampling, Holtzman et al. 2020) then keeps the fewest most likely
    tokens whose probabilities sum to at least top_p. The ids of a padded vocabulary, from
    num_tokens on, are never sampled: they decode to no text.

    The token is -1 if the logits of a row contain NaN or have no finite maximum.
    """
    logits = logits[:, :num_tokens].float()
    highest = logits.amax(dim=-1, keepdim=True)                         # (B, 1); NaN propagates
    invalid = ~highest.isfinite()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True).masked_fill(invalid, -1)
    # logits minus their maximum: divided by a tiny temperature they are 0 or -inf, where inf - inf
    # would be NaN
    probs = F.softmax((logits - highest) / max(temperature, TINY), dim=-1)
    V = probs.size(-1)
    k = V if top_k == 0 else min(top_k, V)
    topk_probs, topk_indices = torch.topk(probs, k, dim=-1)             # (B, k), descending
    topk_probs = topk_probs.masked_fill(invalid, 1.0)  # multinomial on NaN aborts a CUDA process
    if top_p < 1:
        topk_probs = topk_probs / topk_probs.sum(dim=-1, keepdim=True)
        # the probability of the more likely tokens, 0 for the first
        cumulative = topk_probs.cumsum(dim=-1) - topk_probs             # (B, k)
        topk_probs = topk_probs.masked_fill(cumulative >= max(top_p, TINY), 0.0)
    ix = torch.multinomial(topk_probs, 1, generator=generator)          # (B, 1), index into the k
    return torch.gather(topk_indices, -1, ix).masked_fill(invalid, -1)


# -----------------------------------------------------------------------------
# many tokens

class KVCache:
    """Keys and values of the tokens that one block has processed, k and v (B, nh, max_T, hs).

    The token of row b at position t is at k[b, :, t], so rows may have different lengths. Before
    each forward, pos and attn_mask are set to those of the new tokens: (T) or (B, T), and
    (B, 1, T, S) bool or, for the first tokens of a text, None.
    """

    def __init__(self, shape, dtype, device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.pos = None
        self.attn_mask = None

    def update(self, k, v):
        """Stores the keys and values of the new tokens, (B, nh, T, hs).

        Returns those to attend to, and the mask; see GPT.hidden.
        """
        B, _, T, _ = k.size()
        rows = torch.arange(B, device=k.device)[:, None]
        columns = self.pos.expand(B, T)
        self.k[rows, :, columns] = k.transpose(1, 2).to(self.k.dtype)   # (B, T, nh, hs)
        self.v[rows, :, columns] = v.transpose(1, 2).to(self.v.dtype)
        if self.attn_mask is None:
            return k, v, None  # there is nothing else in the cache to attend to
        S = self.attn_mask.size(-1)
        return self.k[:, :, :S], self.v[:, :, :S], self.attn_mask


def make_caches(model, B, max_T):
    """A KVCache for each block, of B rows of up to max_T tokens."""
    wte, config = model.transformer.wte.weight, model.config
    if torch.is_autocast_enabled(wte.device.type):
        dtype = torch.get_autocast_dtype(wte.device.type)
    elif wte.device.type == "cpu":
        # for a single query, torch's bfloat16 attention on a CPU is three times slower than its
        # float32 attention (measured)
        dtype = torch.float32
    else:
        dtype = wte.dtype
    shape = (B, config.n_head, max_T, config.n_embd // config.n_head)
    return [KVCache(shape, dtype, wte.device) for _ in range(config.n_layer)]


def prefill(hidden, rows, caches):
    """Final hidden states (B, C) of the last token of each row, a list of ids; fills the caches."""
    device = caches[0].k.device
    B = len(rows)
    T = max(len(row) for row in rows)
    # padded on the right; later tokens overwrite the padding in the cache before they attend to it
    idx = torch.zeros((B, T), dtype=torch.long)
    for b, row in enumerate(rows):
        idx[b, :len(row)] = torch.tensor(row)
    pos = torch.arange(T, device=device)
    for cache in caches:
        cache.pos = pos
        cache.attn_mask = None
    x = hidden(idx.to(device), pos, caches)                             # (B, T, C)
    last = torch.tensor([len(row) for row in rows], device=device) - 1  # (B)
    return x[torch.arange(B, device=device), last]


def decode(hidden, tokens, lengths, caches):
    """Final hidden states (B, C) of one new token per row, (B, 1); lengths: of the rows with it."""
    device = tokens.device
    max_T = caches[0].k.size(2)
    # S grows in steps of 32: kernels on a GPU are chosen, and torch.compile specializes, per length
    S = min(max_T, math.ceil(max(lengths) / 32) * 32)
    pos = torch.tensor(lengths, device=device)[:, None] - 1             # (B, 1)
    attn_mask = torch.arange(S, device=device) <= pos                   # (B, S)
    for cache in caches:
        cache.pos = pos
        cache.attn_mask = attn_mask[:, None, None, :]                   # (B, 1, 1, S)
    return hidden(tokens, pos, caches)[:, -1]


@torch.no_grad()
def stream(model, prompts, max_new_tokens, generator=None, temperature=1.0, top_k=50, top_p=1.0,
           hidden=None, tokenizer=GPT2):
    """Yields the next token of every row, (B) int64, until all rows ended.

    prompts: B non-empty lists of token ids, of any lengths. At most max_new_tokens are generated.
    The logits of a row do not depend on the other rows. After <|endoftext|> a row yields only
    <|endoftext|>. The model should be in eval mode, the generator on its device. hidden:
    model.hidden (the default), or what prepare_for_sampling returned. Raises ValueError for an
    empty prompt and if the logits are non-finite.
    """
    if not all(prompts):
        raise ValueError(f"a prompt is empty; to start a document use [{tokenizer.eot}],"
                         " <|endoftext|>")
    hidden = hidden or model.hidden
    block_size = model.config.block_size
    device = model.transformer.wte.weight.device
    rows = [list(prompt[-block_size:]) for prompt in prompts]  # the contexts
    longest = max(len(row) for row in rows)
    caches = make_caches(model, len(rows), min(block_size, longest + max_new_tokens - 1))
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    tokens = None
    for _ in range(max_new_tokens):
        # Dropping one token would invalidate the KV cache, since the learned position of every
        # other token changes; half of the context is dropped, so that the cache is recomputed only
        # every block_size / 2 tokens.
        full = [row for row in rows if len(row) > block_size]
        for row in full:
            del row[:(block_size + 1) // 2]
        with without_cudnn_attention():
            if tokens is None or full:
                x = prefill(hidden, rows, caches)                       # (B, C)
            else:
                x = decode(hidden, tokens, [len(row) for row in rows], caches)
        tokens = sample_next_token(model.lm_head(x), generator, temperature, top_k, top_p,
                                   tokenizer.num_tokens)                # (B, 1)
        tokens = tokens.masked_fill(ended[:, None], tokenizer.eot)
        ended = ended | (tokens[:, 0] == tokenizer.eot)
        new = tokens[:, 0].tolist()  # waits for the device, once per token
        if -1 in new:
            raise ValueError("the model's logits are NaN or infinite: its activations overflow;"
                             " try --dtype float32")
        yield tokens[:, 0]
        if all(token == tokenizer.eot for token in new):
            return
        for row, token in zip(rows, new):
            row.append(token)


def generate(model, idx, max_new_tokens, generator=None, temperature=1.0, top_k=50, top_p=1.0):
    """idx (B, T) int64 with up to max_new_tokens tokens appended to each row; see stream."""
    new = stream(model, idx.tolist(), max_new_tokens, generator, temperature, top_k, top_p)
    return torch.cat([idx, *(tokens[:, None] for tokens in new)], dim=1)


def stream_text(token_ids, tokenizer=GPT2, context=()):
    """Yields the text of token ids up to <|endoftext|> in pieces of complete characters.

    The bytes of a character may be split over tokens. Invalid UTF-8 becomes U+FFFD, as in
    tokenizer.decode. context: the token ids before them; the text of a token may depend on the one
    before it. Example: "", "é", " you".
    """
    window = list(context[-1:])            # the last tokens
    done = len(tokenizer.decode(window))   # characters of their text that are not to be yielded
    for token in token_ids:
        if token == tokenizer.eot:
            break
        window.append(token)
        text = tokenizer.decode(window)
        if text.endswith("\ufffd"):  # an incomplete character, perhaps
            yield ""
            continue
        yield text[done:]
        window = [token]
        done = len(tokenizer.decode(window))
    yield tokenizer.decode(window)[done:]


def encode_prompt(prompt, tokenizer=GPT2):
    """Token ids of a text, [<|endoftext|>] for an empty one: it starts a document."""
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.eot]
    if tokens == [-1]:
        raise ValueError("the prompt is empty, and this tokenizer has no <|endoftext|> to start a"
                         " document with; give a --prompt")
    return tokens


def generate_text(model, prompt, num_samples, max_new_tokens, seed, temperature=1.0, top_k=50,
                  top_p=1.0, hidden=None, tokenizer=GPT2):
    """A list of num_samples texts that start with prompt; see stream."""
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = encode_prompt(prompt, tokenizer)
    new = stream(model, [tokens] * num_samples, max_new_tokens, generator, temperature, top_k,
                 top_p, hidden, tokenizer)
    rows = torch.stack(list(new), dim=1).tolist()                       # (B, new)
    return [prompt + "".join(stream_text(row, tokenizer, tokens)) for row in rows]


# -----------------------------------------------------------------------------
# faster: packed weights on a CPU, a CUDA graph on a GPU

class PackedLinear(nn.Module):
    """A Linear for inference on the CPU, its weight in the layout that oneDNN reads fastest.

    Generating a token reads every weight once, so memory bandwidth is the limit. With few rows
    torch's default layout reaches half of it or less (python -m bench sample). torch.compile uses
    these operators for constant weights.
    """

    def __init__(self, weight, bias, B):
        super().__init__()
        self.bias = bias
        # optimized for B rows, valid for any number
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), B)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(device, dtype):
    """Whether PackedLinear works on this machine: oneDNN on x86, in a dtype the CPU supports."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if device != "cpu" or not is_x86 or not torch.backends.mkldnn.is_available():
        return False
    if dtype == "bfloat16":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == "float32"


def cuda_graph(function):
    """(replay, result): replay() runs the kernels of function() on the same tensors again.

    They are captured once in a CUDA graph. function must not wait for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    capture = torch.cuda.graph(graph)
    # libraries allocate their workspaces, one per stream, in the first calls: before the capture,
    # and on its stream
    capture.capture_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(capture.capture_stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(capture.capture_stream)
    with torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves its own stream
        with capture:
            result = function()
    return graph.replay, result


class GraphedHidden:
    """model.hidden for sampling on a GPU, with a CUDA graph of the decoding of one token per row.

    Launching a token's kernels one by one takes the CPU ten times as long as they take the GPU
    (docs/speed.md); a graph launches all of them at once. Its tensors and their shapes are fixed:
    the new tokens are copied into it, and they attend to the whole cache, masked.
    """

    def __init__(self, hidden):
        self.hidden = hidden
        self.caches = None  # those that the graph reads and writes
        self.has_failed = False

    def __call__(self, idx, pos, caches):
        is_prefill = caches[0].attn_mask is None
        if is_prefill or self.has_failed:
            return self.hidden(idx, pos, caches)
        if caches is not self.caches:
            self._capture(idx, pos, caches)
        self.idx.copy_(idx)
        self.pos.copy_(pos)
        self.replay()
        return self.x

    def _capture(self, idx, pos, caches):
        self.caches = caches
        self.idx, self.pos = idx.clone(), pos.clone()                   # (B, 1), (B, 1)
        columns = torch.arange(caches[0].k.size(2), device=idx.device)  # (max_T)

        def decode_one():
            attn_mask = (columns <= self.pos)[:, None, None, :]         # (B, 1, 1, max_T)
            for cache in caches:
                cache.pos = self.pos
                cache.attn_mask = attn_mask
            return self.hidden(self.idx, self.pos, caches)

        try:
            self.replay, self.x = cuda_graph(decode_one)
        except RuntimeError as e:  # perhaps of an old driver
            print_error(f"sampling slowly, without a CUDA graph: {first_line(e)}")
            self.has_failed = True
            # a capture computes nothing, nor the mask of this token
            self.replay, self.x = (lambda: None), decode_one()


@torch.no_grad()
def prepare_for_sampling(model, dtype, num_samples=1, compiled=False):
    """Casts the model to dtype (a name in DTYPES), in place; returns the fastest model.hidden.

    On a CPU the weights are packed where can_pack, on an NVIDIA or AMD GPU decoding is a CUDA
    graph; or all of it is compiled. Use the result, and the model, only for sampling.
    """
    model.to(DTYPES[dtype])
    device_type = model.transformer.wte.weight.device.type
    if compiled:  # torch.compile supports packed weights only as constants
        return torch.compile(model.hidden, dynamic=True)
    if device_type == "cuda":
        return GraphedHidden(model.hidden)
    if can_pack(device_type, dtype):
        for parent in list(model.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, PackedLinear(module.weight, module.bias, num_samples))
    return model.hidden


# -----------------------------------------------------------------------------
# the command

def read_prompt(args):
    """The prompt that the flags give, a str. ValueError for more than one."""
    words = " ".join(args.stdin)
    if words not in ("", "-"):
        raise ValueError(f"unexpected {words!r}: a prompt is given as"
                         f" --prompt {shlex.quote(words)}")
    given = [words == "-", args.prompt is not None, args.prompt_file is not None, args.interactive]
    if sum(given) > 1:
        raise ValueError("give only one of --prompt, --prompt-file, - (stdin) and --interactive")
    if words == "-":
        return decode_prompt(sys.stdin.buffer.read(), "stdin")
    if args.prompt_file is not None:
        with open(args.prompt_file, "rb") as f:
            return decode_prompt(f.read(), args.prompt_file)
    return args.prompt or ""


def decode_prompt(contents, name):
    """The text of the bytes of a file or of stdin; ValueError, with the name, for invalid UTF-8."""
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not valid UTF-8 at byte {e.start + 1}; convert it first"
                         " (iconv -t UTF-8)") from e
    # the final line break, which editors and echo add, is not part of the prompt
    return text.removesuffix("\n").removesuffix("\r")


def warn_if_cut(prompt, block_size, tokenizer):
    """Prints a message to stderr if a prompt is longer than the context."""
    T = len(encode_prompt(prompt, tokenizer))
    if T > block_size:
        print(f"the prompt has {T} tokens; only the last {block_size} are used", file=sys.stderr)


def print_continuation(model, prompt, generator, hidden, tokenizer, args):
    """Generates the continuation of a prompt and prints it token by token."""
    tokens = encode_prompt(prompt, tokenizer)
    new = stream(model, [tokens], args.max_new_tokens, generator, args.temperature, args.top_k,
                 args.top_p, hidden, tokenizer)
    for text in stream_text((token.item() for token in new), tokenizer, tokens):
        print(text, end="", flush=True)
    print()


def print_samples(model, prompt, generator, hidden, tokenizer, args):
    """Prints --num-samples texts, each under a header line; with --stream token by token."""
    warn_if_cut(prompt, model.config.block_size, tokenizer)
    headers = [f"--- sample {i} " + "-" * 60 for i in range(1, args.num_samples + 1)]
    if args.stream:
        for header in headers:
            print(f"{header}\n{prompt}", end="", flush=True)
            print_continuation(model, prompt, generator, hidden, tokenizer, args)
        return
    texts = generate_text(model, prompt, args.num_samples, args.max_new_tokens, args.seed,
                          args.temperature, args.top_k, args.top_p, hidden, tokenizer)
    for header, text in zip(headers, texts):
        print(f"{header}\n{text}")


def interact(model, generator, hidden, tokenizer, args):
    """Reads prompts, one a line, and answers each; Ctrl-C stops an answer, Ctrl-D exits."""
    try:
        import readline  # noqa: F401  gives input() line editing and a history
    except ImportError:  # Windows has none
        pass
    # invalid UTF-8 then raises in encode_prompt, not in input
    sys.stdin.reconfigure(errors="surrogateescape")
    print("each line is a prompt; Ctrl-C stops an answer, Ctrl-D exits", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
            warn_if_cut(prompt, model.config.block_size, tokenizer)
            print_continuation(model, prompt, generator, hidden, tokenizer, args)
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
    keep_freed_memory()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, info = load_model(args.source, device)
    tokenizer = load_tokenizer(args.source, model.config.vocab_size)
    tokenizer.encode(prompt)  # an invalid prompt raises before anything is printed
    if info:
        val_loss = "" if info["val_loss"] is None else f", val loss {info['val_loss']:.4f}"
        print(f"{info['path']}: step {info['step']}{val_loss}", file=sys.stderr)
    num_rows = 1 if args.stream or args.interactive else args.num_samples
    hidden = prepare_for_sampling(model, dtype, num_rows, args.compile == "on")
    generator = torch.Generator(device=device).manual_seed(args.seed)
    if args.interactive:
        interact(model, generator, hidden, tokenizer, args)
    else:
        print_samples(model, prompt, generator, hidden, tokenizer, args)


if __name__ == "__main__":
    run_main(main)
