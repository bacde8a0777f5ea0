"""
GPT-2: the network, its sizes, its weights under Hugging Face's names, its optimizers.

Sources: "Language Models are Unsupervised Multitask Learners" (GPT-2, Radford et al. 2019) and its code
https://github.com/openai/gpt-2 (src/model.py); "Language Models are Few-Shot Learners" (GPT-3, Brown et al. 2020)
for the GPT-3 sizes and learning rates; "PaLM" (Chowdhery et al. 2022, appendix B) for the FLOPs a token.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig())                  # 124M, random weights
    model = GPT.from_pretrained("gpt2-xl")    # OpenAI's weights, from the Hugging Face Hub or a local folder
    logits, loss = model(idx, targets)

Shapes, everywhere in this file: B batch (sequences), T time (tokens), C channels (n_embd), nh heads (n_head),
hs head size (C / nh), V vocabulary (vocab_size).
"""
import json
import math
import os
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# sizes

@dataclass
class GPTConfig:
    block_size: int = 1024   # longest context, tokens
    vocab_size: int = 50257  # 50,000 BPE merges + 256 byte tokens + 1 <|endoftext|>; training pads it to 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True        # in Linear and LayerNorm, as GPT-2 has it
    dropout: float = 0.0     # 0 for pretraining; GPT-2's 0.1 may help when fine-tuning on little text

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be 1 or more")
        if self.n_embd % self.n_head != 0:
            fits = [nh for nh in range(1, self.n_embd + 1) if self.n_embd % nh == 0]
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; n_head that fit: {fits}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: it must be at least 0 and less than 1")

    @classmethod
    def from_hf(cls, hf_config):
        """The GPTConfig of a Hugging Face GPT2Config, given as the object or as the dict of its config.json.

        Raises ValueError for a variant that is not GPT-2 as OpenAI released it (another activation, scaled attention
        by layer, an inner width that is not 4C, an lm_head of its own).
        """
        hf = hf_config if isinstance(hf_config, dict) else hf_config.to_dict()
        gpt2 = {"model_type": "gpt2", "activation_function": "gelu_new", "n_inner": None, "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "layer_norm_epsilon": 1e-5, "add_cross_attention": False,
                "tie_word_embeddings": True}
        for name, want in gpt2.items():
            got = hf.get(name, want)
            if got != want and not (name == "n_inner" and got == 4 * hf["n_embd"]):
                raise ValueError(f"not a GPT-2: its config has {name}={got!r}, GPT-2 has {want!r}")
        return cls(block_size=hf["n_positions"], vocab_size=hf["vocab_size"], n_layer=hf["n_layer"],
                   n_head=hf["n_head"], n_embd=hf["n_embd"])


# GPT-2: the released checkpoints. GPT-3: table 2.1 of its paper; where the printed heads and width do not divide
# (XL: 24 x 128 against 2048), the head size follows the width.
#                   n_layer n_head n_embd block_size
SIZES = {
    "gpt2":            (12,  12,   768,  1024),  #  124M
    "gpt2-medium":     (24,  16,  1024,  1024),  #  350M
    "gpt2-large":      (36,  20,  1280,  1024),  #  774M
    "gpt2-xl":         (48,  25,  1600,  1024),  # 1558M
    "gpt3-small":      (12,  12,   768,  2048),  #  125M
    "gpt3-medium":     (24,  16,  1024,  2048),  #  350M
    "gpt3-large":      (24,  16,  1536,  2048),  #  760M
    "gpt3-xl":         (24,  16,  2048,  2048),  #  1.3B
}


PRETRAINED = [size for size in SIZES if size.startswith("gpt2")]  # OpenAI released these


def config_for(size, **changes):
    """GPTConfig of a name in SIZES, with any field changed: config_for("gpt2", vocab_size=50304)."""
    if size not in SIZES:
        raise ValueError(f"unknown model size {size!r}; there are: {', '.join(SIZES)}")
    n_layer, n_head, n_embd, block_size = SIZES[size]
    fields = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    return GPTConfig(**{**fields, **changes})


# -----------------------------------------------------------------------------
# the network

def cached_attention(q, k, v, attn_mask, cache, pos):
    """Attention (B, nh, T, hs) of one layer's q, k, v, (B, nh, T, hs) each, whose cache is (2, B, nh, max_T, hs).

    Row b's token at position t has its key and value at cache[:, b, :, t], whatever the other rows' lengths are.
    """
    B, _, T, _ = q.size()
    rows, columns = torch.arange(B, device=q.device)[:, None], pos.expand(B, T)
    for kept, new in zip(cache, (k, v)):
        kept[rows, :, columns] = new.transpose(1, 2).to(kept.dtype)     # (B, T, nh, hs)
    if attn_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    k, v = cache[:, :, :, :attn_mask.size(-1)]                          # (B, nh, S, hs)
    return F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask).to(q.dtype)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        # query, key and value of all heads in one matrix
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, attn_mask=None, cache=None, pos=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)                        # 3 x (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is None:
            # flash attention: softmax(q k^T / sqrt(hs)) v without ever storing the (T, T) matrix
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=attn_mask is None,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:
            y = cached_attention(q, k, v, attn_mask, cache, pos)
        y = y.transpose(1, 2).contiguous().view(B, T, C)                # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        # GPT-2 was trained with the tanh approximation, so its weights need it
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, attn_mask=None, cache=None, pos=None):
        # pre-norm: the residual stream itself is never normalised, so gradients reach the embeddings unchanged
        x = x + self.attn(self.ln_1(x), attn_mask, cache, pos)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # weight tying: what a token looks like coming in is what it is compared with going out
        self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    def init_weights(self):
        """GPT-2's initialisation, drawn from torch's global generator."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, "bias", None) is not None and not isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        # positions are drawn smaller than tokens (openai/gpt-2 src/model.py)
        nn.init.normal_(self.transformer.wpe.weight, mean=0.0, std=0.01)
        # the residual stream is a sum of 2 n_layer contributions; this keeps its variance where it was (GPT-2, 2.3)
        for block in self.transformer.h:
            for c_proj in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(c_proj.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @classmethod
    def empty(cls, config):
        """A GPT to load weights into: its memory holds anything, since drawing weights would take longer than loading."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.transformer.wte.weight = model.lm_head.weight  # to_empty has made two of the tied one
        return model

    def crop_block_size(self, block_size):
        """Keeps the first block_size positions alone; ValueError for more than there are."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size {block_size} is over the {self.config.block_size} positions that these weights"
                             " know; give that many or fewer")
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach().clone(),
                                                            freeze=False)

    def hidden(self, idx, pos, attn_mask=None, cache=None):
        """What the lm_head reads: (B, T, C) for tokens idx (B, T) at positions pos, (T) or (B, T), both int64.

        attn_mask (B, 1, T, T) bool, True where a token (dim 2) may look at another (dim 3), takes the causal mask's
        place: several texts can share a row, or texts a beginning. T may then exceed block_size, positions may not.

        cache, from make_cache, is given idx's keys and values. Without a mask it is written only: a prompt begins. With
        one, then (B, 1, T, S), idx looks at what the cache holds for positions 0 to S-1, idx's own among them.
        """
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)       # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, attn_mask, None if cache is None else cache[i], pos)
        return self.transformer.ln_f(x)

    def make_cache(self, B, max_T):
        """Room for the keys and values of B rows of at most max_T tokens, (n_layer, 2, B, nh, max_T, hs)."""
        wte, config = self.transformer.wte.weight, self.config
        device_type = wte.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else wte.dtype
        if device_type == "cpu" and not torch.is_autocast_enabled("cpu"):
            # for a single query, torch's bf16 attention on a CPU takes three times as long as its float32 one
            dtype = torch.float32
        shape = config.n_layer, 2, B, config.n_head, max_T, config.n_embd // config.n_head
        return torch.zeros(shape, dtype=dtype, device=wte.device)

    def forward(self, idx, targets=None):
        """Logits for idx (B, T) int64, and the mean cross entropy when targets (B, T) int64 are given.

        With targets: logits (B, T, V) and a float32 scalar loss; targets of -100 are left out of the mean.
        Without: logits of the last position alone, (B, 1, V), and None: sampling needs no more.
        Raises ValueError for T over block_size.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens; this model's block_size is {self.config.block_size}")
        x = self.hidden(idx, torch.arange(T, device=idx.device))        # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None                    # (B, 1, V)
        logits = self.lm_head(x)                                        # (B, T, V)
        # cross_entropy in float32 whatever autocast made of the logits; under torch.compile the cast is fused away
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-100)
        return logits.detach(), loss

    # -------------------------------------------------------------------------
    # counts

    def num_params(self, with_wpe=True):
        """Number of parameters; the tied wte and lm_head count once."""
        n = sum(p.numel() for p in self.parameters())
        return n if with_wpe else n - self.transformer.wpe.weight.numel()

    def flops_per_token(self, T):
        """Floating point operations of one training token (forward and backward) in a sequence of T tokens.

        6N + 12 L H Q T (PaLM, appendix B): each weight but wpe's multiplies and adds once forward and twice
        backward; attention does the same with T keys and values of H Q = C channels. The causal half is not
        subtracted, as is the custom, so that figures can be compared.
        """
        return 6 * self.num_params(with_wpe=False) + 12 * self.config.n_layer * self.config.n_embd * T

    # -------------------------------------------------------------------------
    # weights from and to Hugging Face

    def load_hf_state_dict(self, hf_state_dict):
        """Takes over the weights of a GPT2LMHeadModel's or GPT2Model's state dict: a pure map of names and layouts.

        A vocabulary smaller than ours (50257 against a padded 50304) leaves the rows past it at zero.
        Raises ValueError naming the tensors that are missing, not GPT-2's, or of another shape.
        """
        theirs = {name.removeprefix("transformer."): tensor for name, tensor in our_names(hf_state_dict).items()}
        theirs.pop("lm_head.weight", None)
        ours = {name.removeprefix("transformer."): p for name, p in self.named_parameters()}
        if not self.config.bias:  # Hugging Face's GPT-2 always has biases; a model without may leave out zeros alone
            theirs = {name: t for name, t in theirs.items() if not name.endswith(".bias") or t.count_nonzero() > 0}
        wrong = sorted(ours.keys() ^ theirs.keys())
        if wrong:
            raise ValueError(f"weights do not fit this GPT: {', '.join(wrong[:5])} on one side only"
                             f" ({len(wrong)} tensors in all); is n_layer={self.config.n_layer} theirs too?")
        for name, tensor in theirs.items():
            rows = tensor.shape[0] if name == "wte.weight" else ours[name].shape[0]
            if tensor.shape != ours[name][:rows].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this GPT's has {tuple(ours[name].shape)}")
            with torch.no_grad():
                ours[name][:rows].copy_(tensor)
                ours[name][rows:].zero_()

    def hf_state_dict(self, vocab_size=50257, dtype=None):
        """This model's weights as a GPT2LMHeadModel names and lays them out; padded vocabulary rows are cut off.

        dtype: torch.bfloat16, say; default the weights' own.

        Tensors share memory with the model where their layout allows. The tied lm_head is left to Hugging Face.
        """
        state_dict = {}
        for name, p in self.named_parameters():
            tensor = p.detach().to(dtype or p.dtype)
            state_dict[name] = tensor.t().contiguous() if is_conv1d(name) else tensor
        if not self.config.bias:  # Hugging Face's GPT-2 always has biases
            for name, p in self.named_parameters():
                if not name.startswith(("transformer.wte", "transformer.wpe")):
                    state_dict[name.removesuffix("weight") + "bias"] = p.new_zeros(p.shape[0], dtype=dtype)
        wte = "transformer.wte.weight"
        state_dict[wte] = state_dict[wte][:vocab_size]
        return state_dict

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """OpenAI's weights: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", a Hub repository, or a local folder.

        A folder holds config.json and model.safetensors, as `git clone` of the Hub's repository leaves them.
        Raises FileNotFoundError when neither the folder nor the Hub has the two files, ValueError for a damaged one.
        """
        config, weights = read_hf(name_or_folder)
        model = cls.empty(config)
        model.load_hf_state_dict(weights)
        return model

    # -------------------------------------------------------------------------
    # optimizers

    def configure_optimizers(self, learning_rate, weight_decay, betas=(0.9, 0.95), optimizer="adamw", embd_lr_ratio=1.0):
        """The list of optimizers that train this model; each param group's "lr_scale" is its factor on the schedule.

        adamw: decay on every tensor of two or more dimensions (matrices and embeddings), none on biases and norms,
        as in the GPT-3 paper; embd_lr_ratio scales the embeddings' learning rate. muon: Muon (Jordan et al. 2024) for
        the matrices inside the blocks, which it orthogonalises, and AdamW for the rest, as its authors have it.
        """
        params = {name: p for name, p in self.named_parameters() if p.requires_grad}
        hidden = [p for name, p in params.items() if p.dim() >= 2 and name.startswith("transformer.h.")]
        embeddings = [p for name, p in params.items() if p.dim() >= 2 and not name.startswith("transformer.h.")]
        vectors = [p for p in params.values() if p.dim() < 2]
        # fused: one kernel for the whole update in place of a loop over tensors; torch has it for these devices
        fused = embeddings[0].device.type in ("cuda", "cpu")
        def adamw(*groups):
            return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)

        wide = {"params": embeddings, "weight_decay": weight_decay, "lr_scale": embd_lr_ratio}
        rest = {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0}
        if optimizer == "adamw":
            return [adamw({"params": hidden, "weight_decay": weight_decay, "lr_scale": 1.0}, wide, rest)]
        if optimizer != "muon":
            raise ValueError(f"unknown optimizer {optimizer!r}; there are: adamw, muon")
        # match_rms_adamw (Liu et al. 2025): updates as large as AdamW's would be, so that one learning rate serves both
        muon = torch.optim.Muon([{"params": hidden, "lr_scale": 1.0}], lr=learning_rate, weight_decay=weight_decay,
                                adjust_lr_fn="match_rms_adamw")
        return [muon, adamw(wide, rest)]


# -----------------------------------------------------------------------------
# Hugging Face's layout and files

def is_conv1d(name):
    """Whether a parameter is one that OpenAI's code keeps transposed: "h.0.attn.c_attn.weight" -> True."""
    return name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")


def our_names(hf_state_dict):
    """A GPT2LMHeadModel's or GPT2Model's state dict under this file's names and layouts; the tensors are views.

    Raises ValueError for an lm_head of its own.
    """
    weights = {}
    for name, tensor in hf_state_dict.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        # .attn.bias and .attn.masked_bias are causal masks that old files hold as buffers
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            # openai's checkpoints keep c_* as "Conv1D", (in, out); a Linear has (out, in)
            weights[name] = tensor.t() if is_conv1d(name) else tensor
    wte, lm_head = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    if wte is not None and lm_head is not None and not torch.equal(wte, lm_head):
        raise ValueError("lm_head.weight and wte.weight differ; GPT-2 has one matrix for both, so this is not one")
    if wte is not None:
        weights["lm_head.weight"] = wte
    return weights


def read_hf(name_or_folder):
    """(GPTConfig, state dict as stored, memory-mapped) of what GPT.from_pretrained takes; it says what is raised."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    config_path, names = hub_file(name_or_folder, "config.json"), ["model.safetensors"]
    index = os.path.join(name_or_folder, "model.safetensors.index.json")
    try:
        with open(config_path, encoding="utf-8") as f:
            config = GPTConfig.from_hf(json.load(f))
        if os.path.isfile(index) and not os.path.isfile(os.path.join(name_or_folder, names[0])):
            with open(index, encoding="utf-8") as f:  # transformers cuts what is larger than a few GB into several files
                names = sorted({os.path.basename(name) for name in json.load(f)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if str(e).startswith("not a GPT-2"):
            raise
        raise ValueError(f"{config_path} is not a GPT-2's config.json ({e!r}); download it again") from e
    weights = {}
    for name in names:
        path = hub_file(name_or_folder, name)
        try:
            weights |= load_file(path)
        except SafetensorError as e:
            raise ValueError(f"{path} is cut short or damaged ({e}); download it again") from e
    return config, weights


def hub_file(name_or_folder, filename):
    """Path of one file of a local folder, or of a Hub repository after downloading it to huggingface_hub's cache."""
    if os.path.isdir(name_or_folder):
        path = os.path.join(name_or_folder, filename)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name_or_folder} has no {filename}; a Hugging Face folder holds config.json"
                                    " and model.safetensors")
        return path
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    repo = f"openai-community/{name_or_folder}" if name_or_folder in PRETRAINED else name_or_folder
    unreachable = None
    try:  # asks once: hf_hub_download asks for 24 seconds before it says that there is no internet
        get_hf_file_metadata(hf_hub_url(repo, filename))
    except (OSError, ValueError):
        pass  # the Hub has answered, or we were told to stay offline: hf_hub_download knows what to do
    except Exception as e:  # its HTTP library's own: no connection. What is in the cache will do
        unreachable = e
    try:
        return hf_hub_download(repo, filename, local_files_only=unreachable is not None)
    except (OSError, ValueError) as e:  # every error of huggingface_hub is one of the two
        why = str(unreachable or e).strip().splitlines()[0]
        raise FileNotFoundError(f"could not get {filename} from {constants.ENDPOINT}/{repo}: {why}. Without internet,"
                                " name a local folder that holds config.json and model.safetensors") from e
