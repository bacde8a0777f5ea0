"""
The network against independent implementations: transformers' GPT2LMHeadModel, naive attention,
AdamW's formula; counts worked out by hand; weights to and from Hugging Face.

    .venv/bin/python -m pytest tests/test_model.py

Needs transformers (requirements-dev.txt). Weights are random; no network is used.
"""
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from common import tiny_model
from convert import hf_state_dict
from model import GPT, GPTConfig, Muon, config_for
from run.weights import from_hf_names, is_transposed

#         n_layer n_head n_embd block_size vocab_size
SHAPES = [(1,      1,     8,     16,        50),
          (2,      4,     32,    24,        97),
          (3,      3,     48,    40,        256)]
BLOCK_MATRICES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def hf_model(n_layer, n_head, n_embd, block_size, vocab_size, bias=True):
    """A GPT2LMHeadModel of random tensors, large enough that a mistake in any one shows."""
    torch.manual_seed(n_layer)
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size,
                        vocab_size=vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(mean=1.0 if ".ln_" in name and name.endswith("weight") else 0.0, std=0.2)
            if name.endswith(".bias") and not bias:
                p.zero_()
    return theirs


def both_models(shape, bias):
    """(ours, theirs) with the same weights; without biases, theirs are zeros."""
    theirs = hf_model(*shape, bias=bias)
    config = GPTConfig.from_hf(theirs.config)
    config.bias = bias
    ours = GPT(config).eval()
    weights = from_hf_names(theirs.state_dict())
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()})
    return ours, theirs


# -----------------------------------------------------------------------------
# the forward and its gradients

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_every_gradient_equal_hugging_faces(shape, bias):
    """Targets of -100 are ignored in the mean; without targets, only the last logits return."""
    ours, theirs = both_models(shape, bias)
    B, T, V = 3, shape[3] - 1, shape[4]
    idx, targets = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(1))
    targets[0, :5] = -100
    logits, loss = ours(idx, targets)
    their_logits = theirs(idx).logits
    their_loss = F.cross_entropy(their_logits.view(-1, V), targets.view(-1))
    assert logits.shape == (B, T, V) and loss.dtype == torch.float32
    assert (logits - their_logits).abs().max() < 1e-4
    assert abs(loss.item() - their_loss.item()) < 1e-5

    last, no_loss = ours(idx)
    assert no_loss is None and last.shape == (B, 1, V)
    assert torch.allclose(last[:, 0], their_logits[:, -1], atol=1e-4)

    loss.backward()
    their_loss.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    their_gradients["lm_head.weight"] = their_gradients["transformer.wte.weight"]
    names = [name for name, _ in ours.named_parameters()]
    assert len(names) == (2 + 12 * shape[0] + 2 if bias else 2 + 6 * shape[0] + 1)
    for name, p in ours.named_parameters():
        expected = their_gradients[name]
        if is_transposed(name):
            expected = expected.t()
        assert p.grad.abs().max() > 0, name
        assert torch.allclose(p.grad, expected, atol=1e-5, rtol=1e-3), name


def test_targets_may_be_a_slice():
    """x, y = tokens[:, :-1], tokens[:, 1:] are not contiguous: .view(-1) of them once raised."""
    model = tiny_model()
    tokens = torch.randint(64, (2, 17))
    x, y = tokens[:, :-1], tokens[:, 1:]
    assert torch.equal(model(x, y)[1], model(x.contiguous(), y.contiguous())[1])


def test_a_token_does_not_change_earlier_logits():
    model = tiny_model()
    idx = torch.randint(64, (1, 12))
    changed = idx.clone()
    changed[0, 7] = (idx[0, 7] + 1) % 64
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_attention_equals_naive_attention():
    attn = tiny_model(n_embd=32, n_head=4).transformer.h[0].attn
    with torch.no_grad():
        attn.c_attn.weight.normal_(std=0.5)
    x = torch.randn(2, 12, 32)
    heads = attn.c_attn(x).view(2, 12, 3, 4, 8)
    y = torch.zeros(2, 12, 4, 8)
    for head in range(4):
        q, k, v = heads[:, :, :, head].unbind(2)  # (B, T, hs)
        for t in range(12):
            scores = torch.einsum("bh,bsh->bs", q[:, t], k[:, :t + 1]) / math.sqrt(8)
            weights = torch.softmax(scores, dim=-1)
            y[:, t, head] = torch.einsum("bs,bsh->bh", weights, v[:, :t + 1])
    assert torch.allclose(attn(x), attn.c_proj(y.view(2, 12, 32)), atol=1e-5)


@pytest.mark.parametrize("part", ["attention's weights", "the rest"])
def test_dropout_is_applied_in_train_mode_only(part):
    model = tiny_model(dropout=0.5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and part == "attention's weights":
            module.p = 0.0
        elif hasattr(module, "c_attn") and part == "the rest":
            module.dropout = 0.0
    idx = torch.randint(64, (2, 12))
    assert model(idx, idx)[1] != model(idx, idx)[1]
    model.eval()
    assert model(idx, idx)[1] == model(idx, idx)[1]


def test_a_sequence_longer_than_block_size_is_an_error():
    message = "a sequence of 17 tokens is over this model's block_size 16"
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros((1, 17), dtype=torch.long))


class LargestFloat(TorchDispatchMode):
    """Records the number of elements of the largest float tensor that any operation returns."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.largest = max(self.largest, t.numel())
        return result


def test_training_returns_no_logits():
    """As an output of the compiled step they kept 6.6 GB from being overwritten by their
    gradient (B=64, T=1024)."""
    model = tiny_model().train()
    idx = torch.randint(64, (2, 9))
    logits, loss = model(idx, idx)
    assert logits is None and loss.requires_grad
    logits, evaluated = model.eval()(idx, idx)
    assert logits.shape == (2, 9, 64) and torch.equal(evaluated, loss)


@pytest.mark.parametrize("loss_chunks", [2, 3, 100])
def test_the_loss_in_chunks_equals_the_whole_one_and_needs_less_memory(loss_chunks):
    """Loss and every gradient, also with ignored targets; logits exist for one chunk at a time,
    and none is saved for the backward."""
    model = tiny_model(seed=3, vocab_size=1000).train().double()
    x, y = torch.randint(1000, (2, 5, 7))
    y[1, 2:5] = -100
    saved_shapes = []

    def record(tensor):
        saved_shapes.append(tensor.shape)
        return tensor

    def loss_and_gradients(chunks):
        model.loss_chunks = chunks
        model.zero_grad()
        saved_shapes.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
        with LargestFloat() as recorded, hooks:
            _, loss = model(x, y)
            logits_are_saved = any(shape[-1:] == (1000,) for shape in saved_shapes)
            assert logits_are_saved == (chunks == 1)
            loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()], recorded.largest

    whole, gradients, largest = loss_and_gradients(1)
    chunked, others, smaller = loss_and_gradients(loss_chunks)
    assert chunked == pytest.approx(whole, rel=1e-6)  # the logits are float32
    for a, b in zip(gradients, others):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)
    rows = math.ceil(35 / loss_chunks)
    assert largest == 35 * 1000
    assert smaller == max(rows, 16) * 1000  # wte has 16 * 1000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss_chunks", [1, 2])
def test_layernorm_residual_stream_and_loss_are_float32_under_autocast(dtype, loss_chunks,
                                                                       monkeypatch):
    """And attention is that of float32 to the rounding of its inputs: the softmax has no 16-bit
    sums. (A public run in float16 diverged without this.)"""
    model = tiny_model(block_size=1024, n_layer=1).train()
    model.loss_chunks = loss_chunks
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(50)
    dtypes, attention = {}, []

    def record_dtypes(module, args, out):
        dtypes[names[module]] = {args[0].dtype, out.dtype}
    names = {module: name for name, module in model.named_modules() if "ln_" in name}
    for module in names:
        module.register_forward_hook(record_dtypes)
    cross_entropy, sdpa = F.cross_entropy, F.scaled_dot_product_attention

    def recorded_loss(logits, *args, **kwargs):
        dtypes["loss"] = {logits.dtype}
        return cross_entropy(logits, *args, **kwargs)

    def recorded_attention(q, k, v, *args, **kwargs):
        attention.append((q, k, v, sdpa(q, k, v, *args, **kwargs)))
        return attention[-1][-1]
    monkeypatch.setattr(F, "cross_entropy", recorded_loss)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded_attention)

    x = torch.randint(64, (1, 1024))
    with torch.autocast("cpu", dtype):
        loss = model(x, x)[1]
    loss.backward()
    assert loss.dtype == torch.float32
    layers = ["transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f", "loss"]
    assert dtypes == {name: {torch.float32} for name in layers}
    (q, k, v, out), = attention
    assert q.dtype == k.dtype == out.dtype == dtype
    exact = sdpa(q.double(), k.double(), v.double(), is_causal=True)
    assert (out.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()


# -----------------------------------------------------------------------------
# initialization, counts

def test_initial_weights_have_gpt2s_standard_deviations():
    model = tiny_model(n_layer=3, n_embd=128, block_size=256, vocab_size=512)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert p.count_nonzero() == 0, name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02
            if "wpe" in name:
                std = 0.01
            if "c_proj" in name:
                std = 0.02 / math.sqrt(2 * 3)
            # 16,384 values or more: 5% is nine standard errors
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name


def test_a_seed_gives_the_weights_that_it_always_gave():
    """Figures and runs depend on them: the numbers are those of the first release.
    "lecture" is in tests/test_lecture.py."""
    weights = tiny_model(seed=1337, block_size=12, vocab_size=61).state_dict()
    first_two_and_norm = {
        "wte": [-0.01183173, 0.00517739, 0.6367764],
        "wpe": [0.00140125, -0.00604576, 0.1452859],
        "h.0.attn.c_attn": [-0.0110973, 0.04654427, 0.5468273],
        "h.0.attn.c_proj": [0.00342997, -0.00176006, 0.1626318],
        "h.1.mlp.c_fc": [-0.00401468, 0.01920505, 0.6523604],
        "h.1.mlp.c_proj": [0.00239109, 0.01762271, 0.3098769],
    }
    for name, expected in first_two_and_norm.items():
        weight = weights[f"transformer.{name}.weight"]
        found = [*weight.flatten()[:2].tolist(), weight.norm()]
        assert found == pytest.approx(expected, abs=1e-6), name


def test_an_unknown_initialization_is_an_error():
    with pytest.raises(ValueError, match="unknown init 'gpt2'; allowed are openai, lecture"):
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8), init="gpt2")


def test_wte_and_lm_head_are_one_tensor_before_and_after_loading():
    model = tiny_model()
    for _ in range(2):
        assert model.transformer.wte.weight is model.lm_head.weight
        model.load_state_dict(model.state_dict())
        model.load_state_dict(from_hf_names(hf_state_dict(model, vocab_size=64)))


# the counts of the released checkpoints; GPT-3's follow from GPT-2's with a context of 2048
@pytest.mark.parametrize("size, count", [
    ("gpt2", 124_439_808),
    ("gpt2-medium", 354_823_168),
    ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200),
    ("gpt3-small", 124_439_808 + 1024 * 768),
    ("gpt3-medium", 354_823_168 + 1024 * 1024),
])
def test_parameter_counts_of_the_sizes(size, count):
    with torch.device("meta"):
        model = GPT(config_for(size))
    assert model.num_params() == model.config.num_params() == count
    wpe = model.config.block_size * model.config.n_embd
    assert model.num_params(with_wpe=False) == count - wpe


def test_flops_per_token_equals_the_formula_worked_out_by_hand():
    # H=4, Q=2, C=8, L=3, V=11, without biases: wte 88; ln_f 8;
    # a block has 2 norms of 8 and 8*24 + 8*8 + 8*32 + 32*8 = 768: 784
    config = GPTConfig(block_size=5, vocab_size=11, n_layer=3, n_head=4, n_embd=8, bias=False)
    N = 88 + 3 * 784 + 8
    assert GPT(config).num_params() == config.num_params() == N + 5 * 8
    assert config.flops_per_token(5) == 6 * N + 12 * 3 * 4 * 2 * 5
    # the commonly cited 0.855 GFLOP per token of GPT-2 124M at T = 1024
    N = 124_439_808 - 1024 * 768
    assert config_for("gpt2").flops_per_token(1024) == 6 * N + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("changes, words", [
    (dict(n_embd=18, n_head=4), "n_embd=18 is not a multiple of n_head=4"),
    (dict(n_embd=10**9 + 7, n_head=12), r"n_head that fit: \[1\]$"),  # short, and at once
    (dict(n_layer=0), "n_layer=0"),
    (dict(vocab_size=-1), "vocab_size=-1"),
    (dict(dropout=1.0), "dropout=1.0"),
])
def test_an_invalid_config_is_an_error_that_names_the_field(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**changes)


# -----------------------------------------------------------------------------
# weights to and from Hugging Face

def test_a_matrix_inside_a_block_is_stored_transposed():
    """All other names are covered by the gradients that equal Hugging Face's."""
    assert is_transposed("transformer.h.11.attn.c_proj.weight")
    assert not is_transposed("lm_head.weight")


def test_a_gpt2model_without_prefix_and_with_causal_masks_loads_as_views():
    theirs = hf_model(*SHAPES[1])
    state_dict = theirs.transformer.state_dict()  # no prefix, no lm_head
    state_dict["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    state_dict["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    weights = from_hf_names(state_dict)
    c_attn = weights["transformer.h.1.attn.c_attn.weight"]
    assert c_attn.data_ptr() == state_dict["h.1.attn.c_attn.weight"].data_ptr()
    wte = state_dict["wte.weight"]
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"] is wte

    ours = GPT(theirs.config).eval()
    assert ours.config.dropout == 0
    ours.load_state_dict(weights)
    idx = torch.randint(97, (2, 9))
    assert torch.allclose(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_hf_state_dict_loads_into_transformers_and_back_unchanged(bias):
    ours = tiny_model(std=0.3, bias=bias)  # a vocabulary of 61 padded to 64
    theirs = hf_model(2, 2, 16, 16, 61)
    exported = hf_state_dict(ours, vocab_size=61)
    missing, unexpected = theirs.load_state_dict(exported, strict=False)
    assert missing in ([], ["lm_head.weight"]) and unexpected == []
    theirs.tie_weights()
    idx = torch.randint(61, (2, 10))
    assert torch.allclose(ours(idx, idx)[0][..., :61], theirs(idx).logits, atol=1e-4)

    back = from_hf_names(exported)
    for name, p in ours.named_parameters():
        expected = p[:61] if name == "transformer.wte.weight" else p
        assert torch.equal(back[name], expected), name


@pytest.mark.parametrize("name, value", [
    ("activation_function", "relu"),
    ("n_inner", 100),
    ("scale_attn_by_inverse_layer_idx", True),
    ("scale_attn_weights", False),
    ("layer_norm_epsilon", 1e-6),
    ("add_cross_attention", True),
    ("model_type", "gpt_neo"),
])
def test_a_variant_of_gpt2_is_an_error_that_names_its_setting(name, value):
    config = {**GPT2Config(n_embd=32, n_head=4).to_dict(), name: value}
    with pytest.raises(ValueError, match=f"not a GPT-2: its config has {name}="):
        GPT(config)


def test_from_hf_accepts_an_object_a_dict_and_an_inner_width_of_4c():
    config = GPT2Config(n_layer=5, n_head=4, n_embd=32, n_positions=77, vocab_size=99, n_inner=128)
    want = GPTConfig(block_size=77, vocab_size=99, n_layer=5, n_head=4, n_embd=32)
    assert GPTConfig.from_hf(config) == GPTConfig.from_hf(config.to_dict()) == want


def test_from_pretrained_loads_a_folder_that_transformers_saved(tmp_path):
    theirs = hf_model(*SHAPES[2])
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(256, (2, 39))
    assert torch.allclose(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4)


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "no internet"])
def test_from_pretrained_without_a_download_says_what_to_do(offline, tmp_path, monkeypatch):
    constants = "huggingface_hub.constants"
    url = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(f"{constants}.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url)
    message = "^could not get config.json from http://127.0.0.1:9/openai-community/gpt2: .*local"
    with pytest.raises(FileNotFoundError, match=message) as error:
        GPT.from_pretrained("gpt2")
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# optimizers

@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_tensors_of_two_or_more_dimensions_decay_and_each_parameter_is_in_one_group(name):
    model = tiny_model()
    in_groups = []
    for optimizer in model.configure_optimizers(1e-3, 0.1, optimizer=name):
        for group in optimizer.param_groups:
            in_groups += group["params"]
            for p in group["params"]:
                assert group["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0)
    assert len(in_groups) == len({id(p) for p in in_groups}) == len(list(model.parameters()))


def test_muon_updates_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = tiny_model()
    muon, adamw = model.configure_optimizers(1e-3, 0.1, optimizer="muon", embd_lr_ratio=0.25)
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert in_muon == {f"transformer.h.{i}.{part}.weight" for i in range(2)
                       for part in BLOCK_MATRICES}
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
    for group in adamw.param_groups:
        for p in group["params"]:
            expected = 0.25 if names[id(p)] in embeddings else 1.0
            assert group["lr_scale"] == expected, names[id(p)]


def test_two_steps_of_adamw_equal_its_formula():
    """With fused=True on the CPU too; betas of 0.9 and 0.95 and eps of 1e-8 are the defaults."""
    model = tiny_model().train()
    want = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    m, v = dict.fromkeys(want, 0.0), dict.fromkeys(want, 0.0)
    optimizer, = model.configure_optimizers(1e-2, 0.1)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"] is True
    for t in (1, 2):
        idx, targets = torch.randint(64, (2, 2, 12))
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        for name, p in model.named_parameters():
            g = p.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            m_hat, v_hat = m[name] / (1 - 0.9 ** t), v[name] / (1 - 0.95 ** t)
            decay = 0.1 if p.dim() >= 2 else 0.0
            want[name] = want[name] * (1 - 1e-2 * decay) - 1e-2 * m_hat / (v_hat.sqrt() + 1e-8)
        optimizer.step()
    for name, p in model.named_parameters():
        # where a gradient is as small as eps, float32 and float64 differ in the last digits
        assert (p.double() - want[name]).abs().max() < 2e-5, name


class CountOps(TorchDispatchMode):
    """Counts the operations that are dispatched; on a GPU most of them are kernels."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_muon_equals_torchs_with_q_k_and_v_apart_and_needs_few_operations():
    """On an H200, torch's took 47 ms per step of 124M to launch, one matrix after another."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32)] * 6  # c_attn, c_proj, c_fc, c_proj
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = []  # a list of matrices for each of ours
    for p in ours:
        parts = p.detach().clone().split(8 if p.shape == (24, 8) else 32)
        theirs.append([torch.nn.Parameter(part) for part in parts])
    unused = torch.nn.Parameter(torch.ones(8, 8))
    settings = dict(lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon([*ours, unused], **settings)
    torchs = torch.optim.Muon(sum(theirs, []), **settings)
    for _ in range(3):
        for p, parts in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            p.grad[:8] /= 20  # q's is smaller than k's and v's
            for part, gradient in zip(parts, p.grad.split(len(parts[0]))):
                part.grad = gradient.clone()
        with CountOps() as few:
            optimizer.step()
        with CountOps() as many:
            torchs.step()
    for p, parts in zip(ours, theirs):
        assert torch.allclose(p, torch.cat(parts), atol=1e-5)
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape  # as in older checkpoints
    assert torch.equal(unused, torch.ones(8, 8))
    assert few.count < many.count / 3, (few.count, many.count)


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; allowed are adamw, muon"):
        tiny_model().configure_optimizers(1e-3, 0.1, optimizer="sgd")
