"""
GPT-2: its sizes, the network, and its optimizers. Importing it loads nothing else of this project.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig())                    # 124M, random weights
    model = GPT.from_pretrained("gpt2-xl")      # OpenAI's weights, from the Hub or a local folder
    _, loss = model(idx, targets)               # training: the logits are not returned
    logits, loss = model.eval()(idx, targets)

Sources: "Language Models are Unsupervised Multitask Learners" (GPT-2, Radford et al. 2019) and its
code https://github.com/openai/gpt-2 (src/model.py).

Shapes in this file: B batch (sequences), T time (tokens), C channels (n_embd), nh heads (n_head),
hs head size (C / nh), V vocabulary (vocab_size).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

# -----------------------------------------------------------------------------
# the sizes

@dataclass
class GPTConfig:
    block_size: int = 1024   # maximum context length, tokens
    vocab_size: int = 50257  # 50,000 BPE merges + 256 byte tokens + 1 <|endoftext|>
    n_layer: int = 12        # number of blocks
    n_head: int = 12         # attention heads per block
    n_embd: int = 768        # channels of the residual stream
    bias: bool = True        # in Linear and LayerNorm; GPT-2 has it, nanoGPT can go without
    dropout: float = 0.0     # 0 for pretraining; GPT-2's 0.1 may help to fine-tune on little text

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)  # of any type, if it comes from a file
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r:.40}: must be an integer, 1 or more")
        if self.n_embd % self.n_head != 0:
            fits = [nh for nh in range(1, min(self.n_embd, 100) + 1) if self.n_embd % nh == 0]
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head};"
                             f" n_head that fit: {fits}")
        if type(self.bias) is not bool:
            raise ValueError(f"bias={self.bias!r:.40}: must be true or false")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r:.40}: must be at least 0 and less than 1")

    def num_params(self, with_wpe=True):
        """Number of parameters; the tied wte and lm_head count once.

        By arithmetic: a GPT of these sizes need not fit into memory.
        """
        V, T, L, C = self.vocab_size, self.block_size, self.n_layer, self.n_embd
        norm, biases = C * (1 + self.bias), 9 * C * self.bias  # LayerNorm, a block's Linears
        blocks = L * (12 * C * C + biases + 2 * norm)
        return V * C + with_wpe * T * C + blocks + norm        # wte, wpe, blocks, ln_f

    def flops_per_token(self, T):
        """FLOPs of training on one token, forward and backward, at sequence length T.

        6N + 12 L H Q T (PaLM, appendix B): each weight except wpe has a multiplication and an
        addition in the forward and two of each in the backward; attention has the same for T keys
        and T values of H Q = C channels. By convention the causal half is not subtracted.
        """
        return 6 * self.num_params(with_wpe=False) + 12 * self.n_layer * self.n_embd * T

    @classmethod
    def from_hf(cls, hf_config):
        """The GPTConfig of a transformers GPT2Config, or of the dict in its config.json.

        Raises ValueError for a variant of GPT-2 that this network does not implement.
        """
        hf = dict(hf_config if isinstance(hf_config, dict) else hf_config.to_dict())
        aliases = {"n_positions": "block_size", "max_position_embeddings": "block_size",
                   "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                   "hidden_size": "n_embd"}
        for alias, name in aliases.items():  # the later ones take precedence, as in transformers
            if alias in hf:
                hf[name] = hf[alias]
        # a config.json may omit what equals transformers' defaults, which are those above
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        config = cls(**{name: hf[name] for name in sizes if name in hf})
        # transformers' names of the tanh approximation
        if hf.get("activation_function") in ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast",
                                             "gelu_accurate"):
            hf["activation_function"] = "gelu_new"
        if hf.get("n_inner") == 4 * config.n_embd:
            hf["n_inner"] = None
        gpt2 = {"model_type": "gpt2", "activation_function": "gelu_new", "n_inner": None,
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                "layer_norm_epsilon": 1e-5, "add_cross_attention": False}
        for name, want in gpt2.items():
            got = hf.get(name, want)
            if got != want:
                raise ValueError(f"not a GPT-2: its config has {name}={got!r}, GPT-2 has {want!r}")
        return config


# GPT-2: the released checkpoints. GPT-3: table 2.1 of its paper; where heads x head size there do
# not equal the width (XL: 24 x 128 against 2048), we keep the width and the head size.
#                   n_layer n_head n_embd block_size
SIZES = {
    "gpt2":            (12,  12,   768,  1024),  #  124M parameters
    "gpt2-medium":     (24,  16,  1024,  1024),  #  350M
    "gpt2-large":      (36,  20,  1280,  1024),  #  774M
    "gpt2-xl":         (48,  25,  1600,  1024),  # 1558M
    "gpt3-small":      (12,  12,   768,  2048),  #  125M
    "gpt3-medium":     (24,  16,  1024,  2048),  #  350M
    "gpt3-large":      (24,  16,  1536,  2048),  #  760M
    "gpt3-xl":         (24,  16,  2048,  2048),  #  1.3B
}
PRETRAINED = [size for size in SIZES if size.startswith("gpt2")]  # OpenAI released these weights


def config_for(size, **changes):
    """GPTConfig of a size in SIZES, fields changed: config_for("gpt2", vocab_size=50304)."""
    if size not in SIZES:
        raise ValueError(f"unknown model size {size!r}; allowed are {', '.join(SIZES)}")
    shape = dict(zip(("n_layer", "n_head", "n_embd", "block_size"), SIZES[size]))
    return GPTConfig(**{**shape, **changes})


# -----------------------------------------------------------------------------
# the network


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

    def forward(self, x, cache=None):
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
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:
            # sampling and scoring: other keys and values, and another mask; see GPT.hidden
            k, v, attn_mask = cache.update(k, v)
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask,
                                               is_causal=attn_mask is None).to(q.dtype)
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

    def forward(self, x, cache=None):
        # pre-norm: the LayerNorms are inside the branches. The residual stream has only additions
        # from the embeddings to ln_f, so gradients reach every block unchanged along it.
        x = x + self.attn(self.ln_1(x), cache)  # tokens exchange information
        x = x + self.mlp(self.ln_2(x))          # each token is processed by itself
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

    @classmethod
    def from_pretrained(cls, source):
        """A GPT with OpenAI's weights, "gpt2" to "gpt2-xl", or those of a file or folder.

        source is anything that run.weights.read_model takes; it names the errors.
        """
        from run.weights import read_model
        config, weights, _ = read_model(source)
        model = cls.empty(config)
        model.load_state_dict(weights)
        return model

    def crop_block_size(self, block_size):
        """Keeps the first block_size positions; ValueError for more than there are."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size {block_size} is over the {self.config.block_size}"
                             " positions of these weights; use that many or fewer")
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)

    def hidden(self, idx, pos=None, caches=None):
        """Final hidden states (B, T, C) of tokens idx (B, T) at positions pos, by default 0 to T-1.

        caches, one per block, replace causal attention among idx. The method update(k, v) of a
        block's cache takes the keys and values of idx, (B, nh, T, hs), and returns those to attend
        to, (B, nh, S, hs), and a mask (B, 1, T, S) bool, True where a token may attend; None for a
        causal one. See sample.KVCache and hellaswag.SharedContext. pos is then (T) or (B, T).
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)          # (T)
        # attention ignores the order of its keys; the position embeddings supply it
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)       # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x) if caches is None else block(x, caches[i])
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """(logits, loss) of tokens idx (B, T) int64.

        With targets (B, T) int64: the mean cross entropy, a float32 scalar, which ignores targets
        of -100, and logits (B, T, V), or None in training and if loss_chunks > 1. Without targets:
        logits of the last position (B, 1, V), all that sampling needs, and None. Raises ValueError
        for T over block_size.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is over this model's block_size"
                             f" {self.config.block_size}")
        x = self.hidden(idx)                                            # (B, T, C)
        # x[:, [-1]] and not x[:, -1]: keeps the time dimension
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None                    # (B, 1, V)
        if self.loss_chunks > 1:
            return None, self.chunked_loss(x.flatten(0, 1), targets.flatten())
        logits = self.lm_head(x)                                        # (B, T, V)
        # cross_entropy takes (N, V) and (N): batch and time become one dimension. Softmax and the
        # loss are computed in float32; the logits themselves have autocast's dtype.
        logits_2d = logits.view(-1, logits.size(-1)).float()            # (B*T, V)
        loss = F.cross_entropy(logits_2d, targets.reshape(-1), ignore_index=-100)
        # training does not use the logits: if the compiled step returned them, their gradient could
        # not overwrite them, 6.6 GB at B=64, T=1024
        return None if self.training else logits, loss

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

    def configure_optimizers(self, learning_rate, weight_decay, betas=(0.9, 0.95),
                             optimizer="adamw", embd_lr_ratio=1.0):
        """The list of optimizers that train this model: AdamW, or Muon and AdamW.

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
        if optimizer != "muon":
            raise ValueError(f"unknown optimizer {optimizer!r}; allowed are adamw, muon")
        muon = Muon([{"params": hidden, "lr_scale": 1.0}], lr=learning_rate,
                    weight_decay=weight_decay)
        return [muon, adamw(embedding_group, vector_group)]


# -----------------------------------------------------------------------------
# Muon

def orthogonalize(updates, coefficients, steps):
    """Matrices (n, rows, columns) with all singular values near 1, in bfloat16.

    Newton-Schulz iteration (Jordan et al. 2024), as in torch.optim.Muon.
    """
    a, b, c = coefficients
    X = updates.bfloat16()
    is_tall = X.size(1) > X.size(2)
    if is_tall:
        X = X.mT
    # the iteration converges for a spectral norm of up to 1
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if is_tall else X


def split_qkv(matrix):
    """q, k and v, (C, C) each, of a tensor with the shape of c_attn's weight; others whole."""
    rows, columns = matrix.shape
    return matrix.chunk(3) if rows == 3 * columns else [matrix]


class Muon(torch.optim.Muon):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), with the matrices of one shape in a batch.

    torch's updates one matrix after another: 1,639 kernels for GPT-2 124M, which take 9 ms of an
    H200 and 47 ms of the CPU that launches them.

    c_attn is one matrix for speed; q, k and v are orthogonalized separately. The losses are lower
    (docs/speed.md), as others found: karpathy/nanochat, pull request 27; NVIDIA/Megatron-LM, 1428;
    KellerJordan/modded-nanogpt, 47. In one matrix, the part with the largest gradients gets most of
    the update.
    """

    @torch.no_grad()
    def step(self):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            shapes = {}  # {shape: [(weights, gradient, momentum) of a matrix, ...]}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                tensors = p, p.grad, self.state[p]["momentum_buffer"]
                for matrix in zip(*map(split_qkv, tensors)):
                    shapes.setdefault(matrix[0].shape, []).append(matrix)
            for shape, matrices in shapes.items():
                self.update(*zip(*matrices), max(shape), group)

    def update(self, weights, gradients, buffers, longest, group):
        """The update of matrices of one shape, whose longer side is longest."""
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        updates = orthogonalize(nesterov, group["ns_coefficients"], group["ns_steps"]).float()
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        # scaled to the RMS of AdamW's updates, about 0.2, so that the same learning rate suits
        # both (Liu et al. 2025)
        lr = group["lr"] * 0.2 * math.sqrt(longest)
        torch._foreach_add_(weights, updates.unbind(), alpha=-lr)
