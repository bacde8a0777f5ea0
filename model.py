"""
GPT-2: the network, OpenAI's weights, and its optimizers. Its sizes, GPTConfig, are in config.py.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig())                  # 124M, random weights
    model = GPT.from_pretrained("gpt2-xl")    # OpenAI's weights, from the Hub or a local folder
    logits, loss = model(idx, targets)

Sources: "Language Models are Unsupervised Multitask Learners" (GPT-2, Radford et al. 2019) and its
code https://github.com/openai/gpt-2 (src/model.py).

Shapes in this file: B batch (sequences), T time (tokens), C channels (n_embd), nh heads (n_head),
hs head size (C / nh), V vocabulary (vocab_size).
"""
import json
import math
import os
from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from config import GPTConfig

# -----------------------------------------------------------------------------
# the network

def cached_attention(q, k, v, attn_mask, cache, pos):
    """Attention (B, nh, T, hs) of new tokens, whose q, k, v are (B, nh, T, hs), with a KV cache.

    cache (2, B, nh, max_T, hs) holds the keys and values of one layer; the new ones are written
    into it at positions pos. The token of row b at position t is at cache[:, b, :, t], so rows may
    have different lengths.
    """
    B, _, T, _ = q.size()
    rows, columns = torch.arange(B, device=q.device)[:, None], pos.expand(B, T)
    for cached, new in zip(cache, (k, v)):
        cached[rows, :, columns] = new.transpose(1, 2).to(cached.dtype)  # (B, T, nh, hs)
    if attn_mask is None:
        # the first tokens of a text: there is nothing else in the cache to attend to
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    k, v = cache[:, :, :, :attn_mask.size(-1)]                           # (B, nh, S, hs)
    return F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask).to(q.dtype)


class CausalSelfAttention(nn.Module):
    """Attention of each token to itself and earlier ones: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        # queries, keys and values of all heads come from one matrix: one large matmul is faster
        # than 3 * nh small ones
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        # mixes the outputs of the heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, attn_mask=None, cache=None, pos=None):
        B, T, C = x.size()
        # GPT-2 124M: C = 768 channels are nh = 12 heads of hs = 64 channels each
        q, k, v = self.c_attn(x).split(C, dim=2)                        # 3 x (B, T, C)
        # the heads become a batch dimension: each attends independently of the others
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is None:
            # flash attention (Dao et al. 2022): softmax(q k^T / sqrt(hs)) v, causally masked,
            # without materializing the (T, T) matrix
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=attn_mask is None,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:
            y = cached_attention(q, k, v, attn_mask, cache, pos)
        # concatenate the heads; view needs contiguous memory
        y = y.transpose(1, 2).contiguous().view(B, T, C)                # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with GELU between them, token by token: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        # the inner width is four times the outer one
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        # OpenAI trained GPT-2 with the tanh approximation; its weights need it
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))       # (B, T, C)


class Block(nn.Module):
    """Attention, then an MLP, each added to its input: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, attn_mask=None, cache=None, pos=None):
        # pre-norm: the LayerNorms are inside the branches. The residual stream has only additions
        # from the embeddings to ln_f, so gradients reach every block unchanged along it.
        x = x + self.attn(self.ln_1(x), attn_mask, cache, pos)  # tokens exchange information
        x = x + self.mlp(self.ln_2(x))                          # each token is processed by itself
        return x


class GPT(nn.Module):
    """GPT-2: tokens (B, T) int64 to logits (B, T, V) and the loss; GPT.hidden stops at (B, T, C).

    config is a GPTConfig or a transformers GPT2Config, whose dropout is ignored; init is that of
    the random initial weights, see init_weights.
    """

    def __init__(self, config, init="openai"):
        super().__init__()
        self.config = config = (config if isinstance(config, GPTConfig)
                                else GPTConfig.from_hf(config))
        self.loss_chunks = 1  # more of them: forward with targets needs less memory
        # the names are those of OpenAI's and Hugging Face's checkpoints
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # token embeddings
            wpe=nn.Embedding(config.block_size, config.n_embd),  # learned position embeddings
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),  # new in GPT-2: a final LayerNorm
        ))
        # from the final hidden states to a score for each token of the vocabulary
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # weight sharing scheme (Press and Wolf 2017): tokens that are similar as inputs should be
        # similar as outputs. One matrix serves both: 124M parameters instead of 163M.
        self.transformer.wte.weight = self.lm_head.weight
        self.init_weights(init)

    def init_weights(self, init):
        """Draws the weights from torch's global generator; init is "openai" or "lecture".

        "lecture" gives a new model bitwise the weights of build-nanogpt's from the same seed. The
        constructors above have drawn from the generator too, in the order of the lecture's.
        """
        if init not in ("openai", "lecture"):
            raise ValueError(f"unknown init {init!r}; allowed are openai, lecture")
        # Each block adds to the residual stream twice. A sum of 2 n_layer contributions has
        # sqrt(2 n_layer) times the std of one; scaling down the last matrix of each branch cancels
        # that factor (GPT-2 paper, section 2.3).
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():  # the tied wte and lm_head are drawn twice
            if isinstance(module, (nn.Linear, nn.Embedding)):  # 0.02: openai/gpt-2, src/model.py
                # the lecture's NANOGPT_SCALE_INIT: these matrices have their final std at once
                scaled = init == "lecture" and name.endswith(".c_proj")
                nn.init.normal_(module.weight, mean=0.0, std=residual_std if scaled else 0.02)
            if getattr(module, "bias", None) is not None and not isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)  # torch's default is uniform
        if init == "openai":
            # OpenAI's code has a smaller std for positions than for tokens; the lecture, 0.02
            nn.init.normal_(self.transformer.wpe.weight, mean=0.0, std=0.01)
            for block in self.transformer.h:
                nn.init.normal_(block.attn.c_proj.weight, mean=0.0, std=residual_std)
                nn.init.normal_(block.mlp.c_proj.weight, mean=0.0, std=residual_std)

    @classmethod
    def empty(cls, config):
        """A GPT with uninitialized parameters, to load weights into."""
        # on the meta device initialization costs nothing; drawing weights is slower than loading
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.transformer.wte.weight = model.lm_head.weight  # to_empty separates the two
        return model

    def crop_block_size(self, block_size):
        """Keeps the first block_size positions; ValueError for more than there are."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size {block_size} is over the {self.config.block_size}"
                             " positions of these weights; use that many or fewer")
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)

    def hidden(self, idx, pos, attn_mask=None, cache=None):
        """Final hidden states (B, T, C) of tokens idx (B, T) at positions pos (T) or (B, T).

        attn_mask (B, 1, T, T) bool replaces the causal mask: True where a token (dim 2) may attend
        to another (dim 3). Several texts can then share a row, or a common prefix, and T may
        exceed block_size; positions may not.

        cache, from make_cache, receives the keys and values of idx. Without a mask idx attends to
        itself, causally: a prompt. A mask (B, 1, T, S) instead selects among positions 0 to S-1 of
        the cache, which include those of idx.
        """
        # attention ignores the order of its keys; the position embeddings supply it
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)       # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, attn_mask, None if cache is None else cache[i], pos)
        return self.transformer.ln_f(x)

    def make_cache(self, B, max_T):
        """Allocates a KV cache (n_layer, 2, B, nh, max_T, hs) for B rows of up to max_T tokens."""
        wte, config = self.transformer.wte.weight, self.config
        device_type = wte.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else wte.dtype
        if device_type == "cpu" and not autocast:
            # for a single query, torch's bf16 attention on a CPU is three times slower than its
            # float32 attention (measured)
            dtype = torch.float32
        shape = config.n_layer, 2, B, config.n_head, max_T, config.n_embd // config.n_head
        return torch.zeros(shape, dtype=dtype, device=wte.device)

    def forward(self, idx, targets=None):
        """(logits, loss) of tokens idx (B, T) int64.

        With targets (B, T) int64: logits (B, T, V) without gradient, or None if loss_chunks > 1,
        and the mean cross entropy, a float32 scalar; targets of -100 are ignored. Without targets:
        logits of the last position (B, 1, V), all that sampling needs, and None. Raises ValueError
        for T over block_size.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is over this model's block_size"
                             f" {self.config.block_size}")
        x = self.hidden(idx, torch.arange(T, device=idx.device))        # (B, T, C)
        # x[:, [-1]] and not x[:, -1]: keeps the time dimension
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None                    # (B, 1, V)
        if self.loss_chunks > 1:
            return None, self.chunked_loss(x.flatten(0, 1), targets.flatten())
        logits = self.lm_head(x)                                        # (B, T, V)
        # cross_entropy takes (N, V) and (N): batch and time become one dimension. In float32, as
        # bf16 under autocast has 8 bits: near 10 a bf16 logit is a multiple of 1/16.
        logits_2d = logits.view(-1, logits.size(-1)).float()            # (B*T, V)
        loss = F.cross_entropy(logits_2d, targets.reshape(-1), ignore_index=-100)
        # detached: otherwise the compiled backward allocates a gradient of zeros for the logits
        return logits.detach(), loss

    def chunked_loss(self, x, targets):
        """forward's loss, to rounding, of final hidden states x (B*T, C) and targets (B*T).

        The logits of all tokens are the largest tensor of a step. Here they exist for one of
        loss_chunks parts at a time; the backward computes them again (Chen et al. 2016).
        """
        def sum_of_losses(x, targets):
            return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-100,
                                   reduction="sum")

        chunks = zip(x.chunk(self.loss_chunks), targets.chunk(self.loss_chunks))
        total = sum(recompute_in_backward(sum_of_losses, *chunk, use_reentrant=False)
                    for chunk in chunks)
        return total / (targets != -100).sum()

    def num_params(self, with_wpe=True):
        """Number of parameters; the tied wte and lm_head count once."""
        return self.config.num_params(with_wpe)

    # -------------------------------------------------------------------------
    # OpenAI's weights, in Hugging Face's layout

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """OpenAI's weights, "gpt2" to "gpt2-xl", or those of a Hub repository or a local folder.

        Raises FileNotFoundError if config.json or model.safetensors is not there, ValueError if
        one is damaged.
        """
        config, hf_state_dict = read_hf(name_or_folder)
        model = cls.empty(config)
        model.load_hf_state_dict(hf_state_dict)
        return model

    def load_hf_state_dict(self, hf_state_dict):
        """Loads the state dict of a transformers GPT2LMHeadModel or GPT2Model.

        If its vocabulary is smaller (50257, ours padded to 50304), the remaining rows are set to
        zero. Raises ValueError naming tensors that are missing, unexpected, or of another shape.
        """
        theirs, ours = from_hf_names(hf_state_dict), self.state_dict()
        if not self.config.bias:
            # Hugging Face's GPT-2 always has biases; a model without them accepts only zeros
            theirs = {name: t for name, t in theirs.items()
                      if not name.endswith(".bias") or t.count_nonzero() > 0}
        if wrong := sorted(ours.keys() ^ theirs.keys()):
            raise ValueError(f"weights do not fit: {', '.join(wrong[:3])} on one side only"
                             f" ({len(wrong)} in all); is n_layer {self.config.n_layer}?")
        for name, tensor in theirs.items():
            is_vocab = name in ("transformer.wte.weight", "lm_head.weight") and tensor.dim() == 2
            rows = tensor.shape[0] if is_vocab else ours[name].shape[0]
            if tensor.shape != ours[name][:rows].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this GPT's has"
                                 f" {tuple(ours[name].shape)}")
            with torch.no_grad():
                ours[name][:rows].copy_(tensor)
                ours[name][rows:].zero_()

    def hf_state_dict(self, vocab_size=50257, dtype=None):
        """The state dict of a GPT2LMHeadModel with these weights, wte cut to vocab_size rows.

        dtype: a torch.dtype, default that of the weights. The tied lm_head is omitted, as in
        Hugging Face's files. Tensors of the same layout and dtype share memory with the model.
        """
        state_dict = {}
        for name, p in self.named_parameters():
            tensor = p.detach().to(dtype or p.dtype)
            state_dict[name] = tensor.t().contiguous() if is_transposed(name) else tensor
            if not self.config.bias and name.split(".")[1] not in ("wte", "wpe"):
                # Hugging Face's GPT-2 always has biases
                state_dict[name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))
        state_dict["transformer.wte.weight"] = state_dict["transformer.wte.weight"][:vocab_size]
        return state_dict

    def configure_optimizers(self, learning_rate, weight_decay, betas=(0.9, 0.95),
                             optimizer="adamw", embd_lr_ratio=1.0):
        """The list of optimizers that train this model: AdamW, or Muon or NorMuon, and AdamW.

        "muon": Muon (Jordan et al. 2024) orthogonalizes the updates of the matrices inside the
        blocks; AdamW trains the others. A param group's "lr_scale" is its factor on the scheduled
        learning rate: embd_lr_ratio for the embeddings, else 1.
        """
        params = {name: p for name, p in self.named_parameters() if p.requires_grad}
        # weight decay applies to tensors with two or more dimensions, matrices and embeddings, not
        # to biases and LayerNorms, which have one
        matrices = {name: p for name, p in params.items() if p.dim() >= 2}
        hidden = [p for name, p in matrices.items() if name.startswith("transformer.h.")]
        embeddings = [p for name, p in matrices.items() if not name.startswith("transformer.h.")]
        vectors = [p for p in params.values() if p.dim() < 2]
        # fused: one kernel updates all tensors, instead of one kernel per operation and tensor
        fused = embeddings[0].device.type in ("cuda", "cpu")

        def adamw(*groups):
            return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)

        hidden_group = {"params": hidden, "weight_decay": weight_decay, "lr_scale": 1.0}
        embedding_group = {"params": embeddings, "weight_decay": weight_decay,
                           "lr_scale": embd_lr_ratio}
        vector_group = {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0}
        if optimizer == "adamw":
            return [adamw(hidden_group, embedding_group, vector_group)]
        if optimizer not in ("muon", "normuon"):
            raise ValueError(f"unknown optimizer {optimizer!r}; allowed are adamw, muon, normuon")
        # match_rms_adamw (Liu et al. 2025) scales Muon's updates to the RMS of AdamW's, so that
        # the same learning rate suits both
        kind = NorMuon if optimizer == "normuon" else torch.optim.Muon
        muon = kind([{"params": hidden, "lr_scale": 1.0}], lr=learning_rate,
                    weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return [muon, adamw(embedding_group, vector_group)]


class NorMuon(torch.optim.Muon):
    """Muon with rows of equal size in its updates (Li et al. 2025, arXiv 2510.05491).

    Each row of the orthogonalized update is divided by a running RMS of it; the whole keeps its
    norm. Needs a copy of the parameters during the step.
    """
    beta2 = 0.95  # of the running mean of squares

    @torch.no_grad()
    def step(self):
        """One update of all parameters that have a gradient."""
        old = {p: p.clone() for group in self.param_groups for p in group["params"]}
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0  # added below: it is not part of the update
        super().step()
        for group, group["weight_decay"] in zip(self.param_groups, decays):
            lr = max(group["lr"], torch.finfo(torch.float32).tiny)  # no division by 0
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = old[p] - p
                # of the update without its learning rate, which changes from step to step
                squares = (update / lr).square().mean(dim=1, keepdim=True)   # (rows, 1)
                mean = self.state[p].setdefault("row_mean", torch.zeros_like(squares))
                mean.lerp_(squares, 1 - self.beta2)
                equal_rows = update / (mean.sqrt() + 1e-12)
                scale = update.norm() / (equal_rows.norm() + 1e-12)
                p.copy_(old[p] * (1 - group["lr"] * group["weight_decay"]) - equal_rows * scale)


# -----------------------------------------------------------------------------
# Hugging Face's names and files

def is_transposed(name):
    """Whether Hugging Face stores a parameter transposed: "h.0.attn.c_attn.weight" -> True."""
    # OpenAI's checkpoints use a "Conv1D" module, weight (in, out); a Linear's is (out, in)
    return name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")


def tie_lm_head(weights):
    """Adds the lm_head, which files may omit, to a state dict; ValueError if it is not wte."""
    if (wte := weights.get("transformer.wte.weight")) is None:
        return
    lm_head = weights.setdefault("lm_head.weight", wte)
    # bitwise, since NaN is not equal to itself
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (wte, lm_head)]
    if wte.shape != lm_head.shape or not torch.equal(*bits):
        raise ValueError("lm_head.weight and wte.weight differ (an untied lm_head): not a GPT-2")


def from_hf_names(hf_state_dict):
    """The state dict of a GPT2LMHeadModel or GPT2Model in our names and layouts, as views.

    Raises ValueError for an untied lm_head.
    """
    weights = {}
    for name, tensor in hf_state_dict.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks, which old files hold as buffers
        # OpenAI's files and GPT2Model's lack the prefix
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        weights[name] = tensor.t() if is_transposed(name) and tensor.dim() == 2 else tensor
    tie_lm_head(weights)
    return weights


def read_json(path, parse):
    """parse(contents) of a JSON file; ValueError names the file."""
    try:
        with open(path, encoding="utf-8") as f:
            return parse(json.load(f))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{path} is not the {os.path.basename(path)} of a GPT-2: {reason}") from e


def read_hf(name_or_folder):
    """(GPTConfig, state dict as stored, memory-mapped) of what GPT.from_pretrained takes."""
    import safetensors.torch
    config_path, names = hub_file(name_or_folder, "config.json"), ["model.safetensors"]
    config, weights = read_json(config_path, GPTConfig.from_hf), {}
    index = os.path.join(name_or_folder, "model.safetensors.index.json")  # of several files
    if os.path.isfile(index) and not os.path.isfile(os.path.join(name_or_folder, names[0])):
        names = read_json(index, lambda c: {os.path.basename(f) for f in c["weight_map"].values()})
    for name in names:
        path = hub_file(name_or_folder, name)
        try:
            weights |= safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, KeyError) as e:  # KeyError: an unknown dtype
            raise ValueError(f"{path} is truncated or damaged ({e}); download it again") from e
    if config.num_params() > (n := sum(tensor.numel() for tensor in weights.values())):
        raise ValueError(f"{config_path} says {config.num_params():,} parameters, the file {n:,}")
    return config, weights


def hub_file(name_or_folder, filename):
    """Path of a file in a local folder, or of a Hub repository's file in the Hub's cache."""
    if os.path.isdir(name_or_folder):
        path = os.path.join(name_or_folder, filename)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name_or_folder} has no {filename}; a Hugging Face folder"
                                    " has config.json and model.safetensors")
        return path
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    repo = name_or_folder if "/" in name_or_folder else f"openai-community/{name_or_folder}"
    unreachable = None
    try:
        # a single request: hf_hub_download retries for 24 seconds before it reports no connection
        get_hf_file_metadata(hf_hub_url(repo, filename))
    except (OSError, ValueError):
        pass  # the Hub answered, or offline mode is on: hf_hub_download handles both
    except Exception as e:  # its HTTP library's own class: no connection, so use the cache
        unreachable = e
    try:
        return hf_hub_download(repo, filename, local_files_only=unreachable is not None)
    except (OSError, ValueError) as e:  # every error of huggingface_hub is one of the two
        why = str(unreachable or e).strip().splitlines()[0]
        raise FileNotFoundError(f"could not get {filename} from {constants.ENDPOINT}/{repo}:"
                                f" {why}. Without internet, name a local folder of it") from e
