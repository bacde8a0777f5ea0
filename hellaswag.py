"""
HellaSwag: a text and four ways it may go on, one of them right (Zellers et al. 2019, https://arxiv.org/abs/1905.07830,
data https://github.com/rowanz/hellaswag). The ending that a model finds likeliest is its answer; chance is 0.25.

    python hellaswag.py gpt2                      # OpenAI's weights; downloads the 10,042 validation examples once
    python hellaswag.py log/gpt2-124M             # a run's newest checkpoint, a model_*.pt, a Hugging Face folder
    torchrun --nproc_per_node=8 hellaswag.py gpt2-xl
    python hellaswag.py                           # only downloads

An example (one line of the file; label says which ending is right):

    {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
     "ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap ...", "is ripping ...", ...], ...}

Two styles of scoring are in use, and their numbers must not be mixed; both are reported:

    completion   the lecture's: ctx, then " " + ending; acc by the sum of an ending's log-probabilities, acc_norm by
                 their mean over its tokens
    lm-eval      EleutherAI's lm-evaluation-harness, task hellaswag, 0-shot: "activity_label: ctx_a Ctx_b" and endings
                 without WikiHow's [markup]; acc by the sum, acc_norm by the sum over the ending's characters

acc / acc_norm on the full set:   completion    lm-eval            completion    lm-eval
                     GPT-2 124M  .2859/.2955  .2892/.3114   1558M  .3842/.4893  .4004/.5089

The log-probabilities come from scoring.py, in float32, over GPT-2's 50257 ids: a vocabulary padded for speed scores as the
exported model does. Of equally good endings the first is the answer, as the harness has it.
"""
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from convert import load_model
from data import EOT, NUM_TOKENS, get_tokenizer
from parallel import all_gather, rank0_first, setup, teardown
from runtime import ArgumentParser, choose_dtype, keep_freed_memory, print0, run_main
from scoring import score

STYLES = ("completion", "lm-eval")

# -----------------------------------------------------------------------------
# the data

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
FOLDER = "hellaswag"
SPLITS = ("train", "val", "test")
NUM_EXAMPLES = 10042  # in val, the split that everyone reports
VAL_BYTES, VAL_SHA256 = 12246618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


def path_of(split):
    """Where download puts a split: "val" -> hellaswag/hellaswag_val.jsonl."""
    return os.path.join(FOLDER, f"hellaswag_{split}.jsonl")


def download(split="val"):
    """Path of the official file of a split in SPLITS, fetched unless it is there.

    It gets its name when it is whole: of the size that the server announced, and val of the size and sha256 above.
    A transfer that broke off is taken up where it ended by the next call. Raises OSError naming the URL.
    """
    path = path_of(split)
    if os.path.exists(path):
        return path
    os.makedirs(FOLDER, exist_ok=True)
    url, part = URL + os.path.basename(path), f"{path}.part"
    announced = fetch(url, part)
    expected = VAL_BYTES if split == "val" else announced
    size = os.path.getsize(part)
    with open(part, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if expected not in (None, size) or split == "val" and digest != VAL_SHA256:
        os.remove(part)
        raise OSError(f"{url} gave {size:,} bytes with sha256 {digest[:8]}..., not the file it should be"
                      + (f" ({VAL_BYTES:,} bytes, {VAL_SHA256[:8]}...)" if split == "val" else "")
                      + "; it was removed. Run this again, or give a good copy with --data FILE")
    os.replace(part, path)
    return path


def fetch(url, part):
    """Appends what the file part still lacks of url to it; the bytes of the whole as the server says them, or None."""
    import requests
    from tqdm import tqdm
    have = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        # identity: a compressed body would count other bytes than the file's
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            if response.status_code == 416:  # nothing lies past what we have
                return None
            response.raise_for_status()
            if response.status_code != 206:
                have = 0                     # the server knows no ranges and sends it all
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(part, "ab" if have else "wb") as f, tqdm(
                    total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(url)) as bar:
                for chunk in response.raw.stream(2**20):
                    f.write(chunk)
                    bar.update(len(chunk))
                f.flush()
                os.fsync(f.fileno())
    except (requests.RequestException, OSError) as e:
        raise OSError(f"cannot download {url}: {e}. Run this again to go on, or give a copy with --data FILE") from e
    except Exception as e:  # urllib3 has errors of its own for a body that breaks off
        if not type(e).__module__.startswith("urllib3"):
            raise
        raise OSError(f"{url} broke off: {e}; run this again to fetch the rest") from e
    return total


def check_example(example):
    """The example with its label as an int; ValueError, KeyError or TypeError for what is not one."""
    for name in ("ctx", "activity_label"):
        if not isinstance(example[name], str):
            raise ValueError(f"{name} is {example[name]!r}, it must be text")
    endings = example["endings"]
    if len(endings) != 4 or not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise ValueError("endings must be four texts that are not empty")
    if ("ctx_a" in example) != ("ctx_b" in example):
        raise ValueError("ctx_a and ctx_b must both be there, or neither")
    label = int(example["label"])
    if label not in range(4):
        raise ValueError(f"label is {label}, it must be 0, 1, 2 or 3")
    return {**example, "label": label}


def iterate_examples(path):
    """Yields the examples of a .jsonl or .jsonl.gz file; ValueError names the first line that is not one, and why."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no HellaSwag examples at {path}; python hellaswag.py downloads them to {path_of('val')}")
    number = 0
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        try:
            for line in f:
                number += 1
                yield check_example(json.loads(line))
        except (EOFError, gzip.BadGzipFile) as e:
            raise ValueError(f"{path} is damaged after line {number}: {e}") from e
        except (KeyError, ValueError, TypeError) as e:
            why = f"it lacks {e}" if isinstance(e, KeyError) else e
            raise ValueError(f"{path}, line {number} is not a HellaSwag example: {why}") from e


# -----------------------------------------------------------------------------
# from examples to tokens

def without_markup(text):
    """WikiHow's text as the harness cleans it: "Pull. [step] Wait [title] Go" -> "Pull. Wait. Go"."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def split_context(ctx):
    """(ctx_a, ctx_b) of a ctx that came without them: ctx_b is a last sentence that does not end.

    Example: "A man is sitting on a roof. he" -> ("A man is sitting on a roof.", "he")
    """
    head, stop, tail = ctx.rpartition(". ")
    return (head + ".", tail) if stop and tail.strip() and tail.strip()[-1] not in ".!?" else (ctx, "")


def texts_of(example, style):
    """(context, four endings) as a style has them; context + ending is the text to score."""
    if style == "completion":
        return example["ctx"], [" " + ending for ending in example["endings"]]  # GPT-2's words begin with a space
    ctx_a, ctx_b = (example["ctx_a"], example["ctx_b"]) if "ctx_a" in example else split_context(example["ctx"])
    # str.capitalize also makes small letters of all the others: the harness's numbers have that in them
    query = without_markup(f"{example['activity_label']}: {ctx_a} {ctx_b.capitalize()}")
    context = query.rstrip()  # GPT-2 joins a space to the word that follows it
    return context, [query[len(context):] + " " + without_markup(ending) for ending in example["endings"]]


def tokenize(examples, style):
    """[(context, [ending, ending, ending, ending]), ...]: each text of texts_of as a 1-D uint16 array.

    An empty context becomes <|endoftext|>, since a first token needs something to be predicted from.
    """
    tokenizer, encoded = get_tokenizer(), []
    for example in examples:
        # one by one: handing texts as short as these to encode_ordinary_batch's threads takes twice the time
        context, endings = texts_of(example, style)
        context, *endings = [np.array(tokenizer.encode_ordinary(text), dtype=np.uint16) for text in (context, *endings)]
        encoded.append((context if len(context) else np.array([EOT], dtype=np.uint16), endings))
    return encoded


# -----------------------------------------------------------------------------
# one example, step by step: what is computed below, at its plainest

def render_example(example, style="completion"):
    """(tokens, mask, label) of an example: tokens and mask are (4, N) int64, padded with zeros to the longest row.

    A row is the context followed by one ending; mask is 1 on the ending, where the loss counts.
    """
    (context, endings), = tokenize([example], style)
    N = len(context) + max(len(ending) for ending in endings)
    tokens, mask = torch.zeros((4, N), dtype=torch.long), torch.zeros((4, N), dtype=torch.long)
    for i, ending in enumerate(endings):
        tokens[i, :len(context) + len(ending)] = torch.from_numpy(np.concatenate([context, ending]).astype(np.int64))
        mask[i, len(context):len(context) + len(ending)] = 1
    return tokens, mask, example["label"]


def ending_losses(tokens, mask, logits):
    """Summed loss of each ending, (4) float32; logits are (4, N, V), any dtype."""
    logits = logits[:, :-1, :NUM_TOKENS].float()
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")                  # (4, N-1)
    return (losses * mask[:, 1:]).sum(dim=1)  # the position before a token predicts it


def get_most_likely_row(tokens, mask, logits):
    """Index of the ending with the lowest mean loss a token; logits are (4, N, V), any dtype."""
    return (ending_losses(tokens, mask, logits) / mask[:, 1:].sum(dim=1)).argmin().item()


# -----------------------------------------------------------------------------
# the score

@dataclass
class HellaSwag:
    """A set of examples, tokenized: kept in memory, it is scored again and again in training."""
    examples: list   # dicts, as in the file
    labels: object   # (n) int64
    encoded: dict    # style -> what tokenize returns
    lengths: dict    # style -> (n, 4) float64: tokens (completion) or characters (lm-eval) of the endings


def prepare(path, limit=None):
    """The HellaSwag of a .jsonl(.gz) file, or of its first limit examples."""
    examples = list(itertools.islice(iterate_examples(path), limit))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    encoded = {style: tokenize(examples, style) for style in STYLES}
    lengths = {"completion": np.array([[len(ending) for ending in endings] for _, endings in encoded["completion"]], float),
               "lm-eval": np.array([[len(without_markup(e)) for e in example["endings"]] for example in examples], float)}
    return HellaSwag(examples, np.array([example["label"] for example in examples]), encoded, lengths)


def predictions(sums, lengths):
    """(by sum, by norm): the most likely ending of each example, (n) int64 each; the first of equals.

    An ending without a character (lm-eval, nothing but markup) has the norm minus infinity.
    """
    with np.errstate(divide="ignore"):
        return sums.argmax(axis=1), (sums / lengths).argmax(axis=1)


def figures(sums, lengths, labels):
    """{"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} of (n, 4) log-probabilities; the errors as the harness's."""
    result = {}
    for name, predicted in zip(("acc", "acc_norm"), predictions(sums, lengths)):
        p = float((predicted == labels).mean())
        result[name], result[f"{name}_stderr"] = p, math.sqrt(p * (1 - p) / max(1, len(labels) - 1))
    return result


def evaluate(model, hellaswag, dtype, ranks, batch_tokens=None, hidden=None, bar=False):
    """({style: metrics}, {style: sums (n, 4)}, {style: number of examples truncated}), the same on every rank.

    Returns None if a stop is requested meanwhile. bar: show a progress bar.
    """
    results, sums, num_cut = {}, {}, {}
    for style in STYLES:
        lengths, labels = hellaswag.lengths[style], hellaswag.labels
        with progress(style, lengths, labels, bar) as shown:
            scored = score(model, hellaswag.encoded[style], dtype, ranks, batch_tokens, hidden, shown)
        if scored is None:
            return None
        sums[style], num_cut[style] = scored
        results[style] = figures(sums[style], lengths, labels)
    return results, sums, num_cut


@contextlib.contextmanager
def progress(style, lengths, labels, shown):
    """A progress bar with the running acc_norm of this rank's examples, as score's watch; None when not shown."""
    if not shown:
        yield None
        return
    from tqdm import tqdm
    with tqdm(total=100, desc=style, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        def watch(sums, fraction):
            done = (sums < 0).all(axis=1)
            if done.any():
                bar.set_postfix_str(f"acc_norm {figures(sums[done], lengths[done], labels[done])['acc_norm']:.4f}", False)
            bar.update(100 * fraction - bar.n)
        yield watch


def for_training(source, ranks):
    """The HellaSwag to score during training, or None.

    source: a .jsonl(.gz) file, "auto" (the validation set if it was downloaded, else a message is printed) or "off".
    """
    if source == "off":
        return None
    if source == "auto":
        source = path_of("val")
        if not all(all_gather(os.path.exists(source), ranks)):
            print0(f"HellaSwag is off: {source} does not exist. Download it with python hellaswag.py, or give --hellaswag FILE")
            return None
    return prepare(source)


def score_in_training(model, hellaswag, dtype, ranks):
    """{"hella": acc_norm, completion style, "hella_lm_eval": acc_norm, lm-eval style}; {} if a stop is requested meanwhile."""
    scored = evaluate(model, hellaswag, dtype, ranks)
    if scored is None:
        return {}
    return {"hella": scored[0]["completion"]["acc_norm"], "hella_lm_eval": scored[0]["lm-eval"]["acc_norm"]}


# -----------------------------------------------------------------------------
# the command line

def summary(results, n):
    """One line: every figure, its standard error, n, and whether that is the set that others report."""
    parts = [f"{style}: acc {r['acc']:.4f} acc_norm {r['acc_norm']:.4f} (s.e. {r['acc_norm_stderr']:.4f})"
             for style, r in results.items()]
    note = "" if n == NUM_EXAMPLES else f" -- NOT COMPARABLE with published figures, which are of all {NUM_EXAMPLES:,}"
    return f"HellaSwag | {' | '.join(parts)} | n {n:,}{note}"


def write_examples(path, hellaswag, sums):
    """--out: a line of JSON an example, {"ind", "label", style: {"logprobs": [4], "lengths": [4], "pred", "pred_norm"}}.

    logprobs are sums over an ending's tokens, in nats; lengths what acc_norm divides them by.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    predicted = {style: predictions(sums[style], hellaswag.lengths[style]) for style in STYLES}
    with open(temporary, "w", encoding="utf-8") as f:
        for i, example in enumerate(hellaswag.examples):
            line = {"ind": example.get("ind", i), "label": example["label"]}
            for style in STYLES:
                line[style] = {"logprobs": sums[style][i].tolist(), "lengths": hellaswag.lengths[style][i].tolist(),
                               "pred": int(predicted[style][0][i]), "pred_norm": int(predicted[style][1][i])}
            f.write(json.dumps(line) + "\n")
    os.replace(temporary, path)


def print_example(hellaswag, sums, i):
    """Prints example i with the mean loss a token of its endings, completion style."""
    example, losses = hellaswag.examples[i], -sums["completion"][i] / hellaswag.lengths["completion"][i]
    print(f"---\nexample {example.get('ind', i)}: {example['ctx']}")
    for k, ending in enumerate(example["endings"]):
        print(f"{k} (loss: {losses[k]:.4f}) {ending}")
    print(f"predicted: {losses.argmin()}, actual: {example['label']}")


def worst(hellaswag, sums, K):
    """Indices of the K examples that the model is surest and wrong about, completion style, the worst first.

    Sure: the loss a token of the right ending, less that of the predicted one.
    """
    losses = -sums["completion"] / hellaswag.lengths["completion"]
    margin = losses[np.arange(len(losses)), hellaswag.labels] - losses.min(axis=1)
    return [int(i) for i in np.argsort(-margin, kind="stable")[:K] if margin[i] > 0]


def parse_args():
    parser = ArgumentParser(description="HellaSwag score of a GPT-2.", allow_abbrev=False)
    parser.add_argument("source", nargs="?", help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl;"
                        " without it the examples are downloaded and no more")
    parser.add_argument("--data", help=f"examples, .jsonl or .jsonl.gz (default: {path_of('val')}, downloaded once)")
    parser.add_argument("--limit", type=int, help="score the first examples only")
    parser.add_argument("--batch-tokens", type=int, help="positions in the network at a time (default: 4096, on a GPU 32768)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: pays for itself on large sets")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--out", help="write each example's log-probabilities and predictions to this .jsonl file")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="print the first K examples with their losses")
    parser.add_argument("--worst", type=int, default=0, metavar="K", help="print the K it is surest and wrong about")
    args = parser.parse_args()
    for name, least in (("limit", 1), ("batch_tokens", 1), ("show", 0), ("worst", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be {least} or more")
    return args


def run(args, ranks):
    """Scores args.source and prints what was asked for, on rank 0."""
    with rank0_first(ranks):  # one downloads, the others find the file
        path = args.data or download("val")
    if args.source is None:
        print0(f"HellaSwag's examples: {path}")
        return
    hellaswag = prepare(path, args.limit)
    model, info = load_model(args.source, ranks.device)
    hidden = torch.compile(model.hidden, dynamic=True) if args.compile else None
    dtype = choose_dtype(args.dtype, ranks.device)
    start = time.perf_counter()
    results, sums, num_cut = evaluate(model, hellaswag, dtype, ranks, args.batch_tokens, hidden, ranks.master_process)
    seconds, n = time.perf_counter() - start, len(hellaswag.examples)
    if not ranks.master_process:
        return
    for i in range(min(args.show, n)):
        print_example(hellaswag, sums, i)
    for i in worst(hellaswag, sums, args.worst):
        print_example(hellaswag, sums, i)
    if args.out:
        write_examples(args.out, hellaswag, sums)
    notes = [f"{num_cut[style]} examples over the model's block lost the beginning of their context ({style})"
             for style in STYLES if num_cut[style]]
    if without := sum("ctx_a" not in example for example in hellaswag.examples):
        notes.append(f"{without} examples lack ctx_a and ctx_b: lm-eval's text was made from ctx")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps({"source": args.source, **info, "data": path, "n": n, "full": n == NUM_EXAMPLES, "dtype": dtype,
                          "seconds": round(seconds, 3), "cut": num_cut, **results}))
    else:
        print(f"{summary(results, n)} | {seconds:.1f} s, {dtype}")


def main():
    args = parse_args()
    keep_freed_memory()
    ranks = setup(args.device)
    try:
        run(args, ranks)
    finally:
        teardown()


if __name__ == "__main__":
    run_main(main)
