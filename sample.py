"""
Generates text: sampling of the next token, generation with a KV cache, and the command.

    python sample.py log/shakespeare --prompt "ROMEO:" --num-samples 4
    python sample.py log/gpt2-124M/model_19000.pt --prompt "Hello, I'm a language model," --temperature 0.8 --stream
    echo "Once upon a time" | python sample.py gpt2-xl -      # OpenAI's weights, from the Hugging Face Hub
    python sample.py log/gpt2-124M --interactive              # Ctrl-C stops an answer, Ctrl-D exits

Prints each sample under a header line; messages go to stderr. The same seed gives the same text on the same machine.
A text ends at <|endoftext|>, which is not printed.

A prompt longer than the model's block_size is cut to its last block_size tokens. When the context is full, its older
half is dropped, and the newer half is processed again from position 0: see context_start.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports below, which take seconds, ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import codecs
import platform
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from convert import load_model
from data import EOT, NUM_TOKENS, get_tokenizer
from runtime import DTYPES, ArgumentParser, choose_device, choose_dtype, keep_freed_memory, number, run_main

# -----------------------------------------------------------------------------
# one token

def sample_next_token(logits, generator=None, temperature=1.0, top_k=50, top_p=1.0):
    """The next token of each row, (B, 1) int64, sampled from the logits (B, V) of its last position.

    temperature 0 is greedy (argmax). top_k keeps the k most likely tokens; 0, or more than V, keeps all. top_p below 1
    (nucleus sampling, Holtzman et al. 2020) then keeps the fewest most likely tokens whose probabilities sum to at least
    top_p. The ids of a padded vocabulary, from 50257 on, are never sampled: they decode to no text.
    """
    logits = logits[:, :NUM_TOKENS].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probs = F.softmax(logits / temperature, dim=-1)
    k = min(top_k, probs.size(-1)) or probs.size(-1)
    topk_probs, topk_indices = torch.topk(probs, k, dim=-1)             # (B, k), in descending order
    if top_p < 1:
        topk_probs = topk_probs / topk_probs.sum(dim=-1, keepdim=True)
        cumulative = topk_probs.cumsum(dim=-1) - topk_probs             # (B, k), of the more likely tokens: 0 for the first
        topk_probs = topk_probs.masked_fill(cumulative >= top_p, 0.0)
    ix = torch.multinomial(topk_probs, 1, generator=generator)          # (B, 1), an index into the k
    return torch.gather(topk_indices, -1, ix)


# -----------------------------------------------------------------------------
# many tokens

def context_start(T, block_size):
    """Where the context of a text of T tokens starts. For block_size 1024: 0 up to T = 1024, 512 up to 1536, 1024 up to 2048.

    Moving the context by one token invalidates the KV cache, since the learned position of every token changes. Moving it
    by half a block recomputes the cache only every block_size / 2 tokens.
    """
    half = (block_size + 1) // 2
    return -(-max(0, T - block_size) // half) * half


@torch.no_grad()
def stream(model, prompts, max_new_tokens, generator=None, temperature=1.0, top_k=50, top_p=1.0, hidden=None):
    """Yields the next token of every row, (B) int64 on the model's device, max_new_tokens times or until all rows ended.

    prompts: B non-empty lists of token ids, of any lengths. The logits of a row do not depend on the other rows. After
    <|endoftext|> a row yields only <|endoftext|>. The model should be in eval mode, the generator on its device.
    hidden: model.hidden (the default), or a compiled version of it.
    """
    if not all(prompts):
        raise ValueError(f"a prompt is empty; to start a document use [{EOT}], <|endoftext|>")
    hidden, block_size, device = hidden or model.hidden, model.config.block_size, model.transformer.wte.weight.device
    rows = [list(prompt[-block_size:]) for prompt in prompts]
    B, longest = len(rows), max(len(row) for row in rows)
    cache = model.make_cache(B, min(block_size, longest + max_new_tokens - 1))
    ended, starts, tokens = torch.zeros(B, dtype=torch.bool, device=device), None, None
    for _ in range(max_new_tokens):
        before, starts = starts, [context_start(len(row), block_size) for row in rows]
        contexts = [len(row) - start for row, start in zip(rows, starts)]
        last = torch.tensor(contexts, device=device) - 1                # (B), position of each row's newest token
        if starts != before:
            # whole contexts, padded on the right; later tokens overwrite the padding in the cache before they attend to it
            idx = torch.zeros((B, max(contexts)), dtype=torch.long)
            for b, (row, start) in enumerate(zip(rows, starts)):
                idx[b, :contexts[b]] = torch.tensor(row[start:])
            x = hidden(idx.to(device), torch.arange(max(contexts), device=device), None, cache)     # (B, T, C)
            x = x[torch.arange(B, device=device), last]                 # (B, C)
        else:
            # one new token per row
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
    """Token ids of a text, [<|endoftext|>] for an empty one: it starts a document. ValueError for invalid UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as e:  # Python decodes invalid bytes of the command line to lone surrogates
        raise ValueError(f"the prompt is not valid UTF-8 at character {e.start + 1}; convert it first") from e
    return get_tokenizer().encode_ordinary(prompt) or [EOT]


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

def read_prompt(args):
    """The prompt that the flags give, a str. ValueError for more than one, and for a file or stdin that is not UTF-8."""
    if sum(given is not None for given in (args.stdin, args.prompt, args.prompt_file)) + args.interactive > 1:
        raise ValueError("give only one of --prompt, --prompt-file, - (stdin) and --interactive")
    if args.stdin is None and args.prompt_file is None:
        return args.prompt or ""
    prompt = sys.stdin.buffer.read() if args.stdin else Path(args.prompt_file).read_bytes()
    try:
        # the final line break, which editors and echo add, is not part of the prompt
        return prompt.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as e:
        raise ValueError(f"{args.prompt_file or 'stdin'} is not valid UTF-8 at byte {e.start + 1}; convert it first"
                         " (iconv -t UTF-8)") from e


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
    headers = [f"--- sample {i} " + "-" * 60 for i in range(1, args.num_samples + 1)]
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
    parser = ArgumentParser(description="Generate text with a GPT-2.")
    parser.add_argument("source", help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl")
    parser.add_argument("stdin", nargs="?", metavar="-", choices=["-"], help="read the prompt from stdin")
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
    args = parser.parse_intermixed_args()  # accepts - after flags, too
    prompt = read_prompt(args)
    encode_prompt(prompt)  # an invalid prompt raises before the model is loaded
    keep_freed_memory()
    sys.stdout.reconfigure(errors="replace")  # "?" for characters that the terminal cannot encode
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, info = load_model(args.source, device)
    if info:
        val_loss = "" if info["val_loss"] is None else f", val loss {info['val_loss']:.4f}"
        print(f"{info['path']}: step {info['step']}{val_loss}", file=sys.stderr)
    prepare_for_sampling(model, dtype, 1 if args.stream or args.interactive else args.num_samples, args.compile)
    hidden = torch.compile(model.hidden, dynamic=True) if args.compile else model.hidden
    generator = torch.Generator(device=device).manual_seed(args.seed)
    if args.interactive:
        interact(model, generator, hidden, args)
    else:
        print_samples(model, prompt, generator, hidden, args)


if __name__ == "__main__":
    run_main(main)
