"""Llama 3 in plain PyTorch: the frozen backbone Θ of the paper (§3.2), Eq. 4 and 5 for token
positions.

Read this file first; it imports nothing of ours. Parameters carry the names of published
checkpoints without the leading `model.`, so the module tree below *is* the table of weight names.

Shapes: B batch, T new tokens, S tokens seen so far (cache and new), C width, H query heads,
G key/value heads, D head width, V vocabulary, A places asked for.

Left out: attention or MLP biases, sliding windows, mixtures, quantised weights.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama, under the names of a published config.json; sizes have no defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0       # Llama 3; Llama 2 and TinyLlama use 10,000
    rope_scaling: dict | None = None    # Llama 3.1 and 3.2: {"rope_type": "llama3", "factor": ...}
    tie_word_embeddings: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}; wanted a positive integer")
            if field.type is float and not _positive(value):
                raise ValueError(f"{field.name} is {value!r}; wanted a positive number")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}; wanted true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} query heads cannot share "
                             f"{self.num_key_value_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings want an even width")
        kind = rope_kind(self.rope_scaling)
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope scaling {kind!r} is not implemented; known: default, llama3")
        if kind == "llama3":
            for key in ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings"):
                if not _positive(value := self.rope_scaling.get(key)):
                    raise ValueError(f"rope scaling 'llama3': {key} is {value!r}; wanted a "
                                     "positive number")
            if not self.rope_scaling["low_freq_factor"] < self.rope_scaling["high_freq_factor"]:
                raise ValueError("rope scaling 'llama3': low_freq_factor is not below "
                                 "high_freq_factor")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LlamaConfig":
        """Read config.json, in the layouts of old and new checkpoints.

        Raises FileNotFoundError or ValueError that name the file and what is not implemented.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. A checkpoint folder holds config.json, "
                                    "model.safetensors and tokenizer.json; or use --model tiny")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(raw, dict) or raw.get("model_type") != "llama":
            kind = raw.get("model_type") if isinstance(raw, dict) else raw
            raise ValueError(f"{path}: model_type is {kind!r}; this code implements 'llama' only")
        for key in ("attention_bias", "mlp_bias", "quantization_config"):
            if raw.get(key):
                raise ValueError(f"{path}: {key} is set; this forward does not implement it")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{path}: hidden_act is {raw['hidden_act']!r}; wanted 'silu'")
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(key) or {}, dict):
                raise ValueError(f"{path}: {key} is {raw[key]!r}; wanted an object or null")

        # rotary settings: beside the sizes in older files, in one object in newer ones
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if (part := rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))) not in (
                None, 1):
            raise ValueError(f"{path}: partial_rotary_factor is {part!r}; only 1 is implemented")
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
        context = raw.setdefault("max_position_embeddings", 2048)
        raw["rope_scaling"] = None
        if rope_kind(rope) != "default":
            raw["rope_scaling"] = {"original_max_position_embeddings": context} | {
                key: value for key, value in rope.items() if key not in ("rope_theta", "type")} | {
                "rope_type": rope_kind(rope)}

        # the ecosystem's defaults for what a file may leave out; sizes have none
        raw.setdefault("rms_norm_eps", 1e-6)
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = raw.get("num_attention_heads")
        try:
            if raw.get("head_dim") is None:
                raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
            return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        except KeyError as error:
            raise ValueError(f"{path}: {error} is missing") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            what = str(error).removeprefix("LlamaConfig.__init__() ")
            raise ValueError(f"{path}: {what}") from None


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def rope_kind(scaling: dict | None) -> str:
    """The kind of rotary scaling a config asks for: "default" when it asks for none."""
    return (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"


def inverse_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Θ of Eq. 4: rope_theta^(-2i/D), i < D/2, slowed for long contexts if "llama3".  -> (D/2,)"""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / config.rope_theta ** (half / config.head_dim)
    if rope_kind(config.rope_scaling) == "llama3":
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)   # 1: as trained, 0: slowed by `factor`
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / s["factor"]
    return inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair (i, i + D/2) of each head by its angle, Eq. 4.  (B, H, T, D), (.., T, D/2) twice

    Split halves: i turns with i + D/2, as in published safetensors; Meta's .pth files interleave.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RotateFused(torch.autograd.Function):
    """`rotate` in two passes over memory instead of seven. R_k is orthogonal, so the gradient is
    turned back by the same angle, and nothing of x is kept for it.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        """As `rotate`."""
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * torch.cat((cos, cos), dim=-1)
        y[..., :half].addcmul_(x[..., half:], sin, value=-1)
        y[..., half:].addcmul_(x[..., :half], sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        """(B, H, T, D) -> the gradient of x; angles have none."""
        cos, sin = ctx.saved_tensors
        return RotateFused.apply(grad, cos, -sin), None, None


rotate_fused = RotateFused.apply


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention written out; the reference that `attend_fused` is tested against.

    q (B, H, T, D), k and v (B, G, S, D), mask True where a query may look (B or 1, 1, T, S) or None
    for causal attention of the last T of S tokens.  -> (B, H, T, D)
    """
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    if mask is None:
        mask = causal_mask(T, k.shape[2], q.device)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same by PyTorch's fused kernel: no (T, S) scores are kept for the backward pass.

    GPUs have a kernel for causal attention behind a prefix, CPUs take a mask. Under a mask the
    query heads of a group count as more queries of one head, because not every masked kernel knows
    groups, and copies of keys and values would be large.
    """
    (H, T), (G, S) = q.shape[1:3], k.shape[1:3]
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        return attend_fused(q.float(), k.float(), v.float(), mask).bfloat16()   # half the time
    if mask is None and (T == S or q.is_cuda):
        bias = None if T == S else causal_lower_right(T, S)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None,
                                              enable_gqa=H != G)
    mask = causal_mask(T, S, q.device) if mask is None else mask
    y = F.scaled_dot_product_attention(q.unflatten(1, (G, -1)).flatten(2, 3), k, v,
                                       attn_mask=mask.repeat(1, 1, H // G, 1))
    return y.unflatten(2, (-1, T)).flatten(1, 2)                # (B, G, H/G·T, D) -> (B, H, T, D)


def causal_mask(new: int, slots: int, device) -> Tensor:
    """True where one of the last `new` of so many tokens may look.  -> (1, 1, new, slots)"""
    return torch.ones(1, 1, new, slots, dtype=torch.bool, device=device).tril(slots - new)


class KVCache:
    """Keys and values of the tokens seen so far, one (B, G, S or more, D) pair per layer.

    A cache of batch 1 serves any number of rows (a prefix common to all of them is then run once),
    and gradients flow back through what it holds. Slots marked in `hidden` are never attended to.
    New tokens follow one another, unless `tree` says which of the last slots, old and new, are a
    new token's ancestors and itself: then they are nodes of a tree, and siblings share a row.
    """

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.length = 0                         # S; layers may have room for more, see `reserve`
        self.hidden: Tensor | None = None       # (B, S) bool
        self.tree: Tensor | None = None         # (B or 1, T, last slots) bool, set for each forward
        self.read_only = False                  # True: a forward sees what is here and adds nothing

    @property
    def room(self) -> int:
        """Slots that can be written without a copy of what is here."""
        return self.layers[0][0].shape[2] - self.length if self.layers else 0

    def reserve(self, slots: int, rows: int | None = None) -> None:
        """Make room for so many more slots (of so many rows), once for many forwards. Inference
        only: what is written into the room carries no gradient.
        """
        for i, pair in enumerate(self.layers):
            roomy = [x.new_empty(rows or len(x), x.shape[1], self.length + slots, x.shape[3])
                     for x in pair]
            for x, wide in zip(pair, roomy):
                wide[:, :, :self.length] = x[:, :, :self.length]
            self.layers[i] = tuple(roomy)

    def hide_from(self, lengths: Tensor) -> None:
        """Hide the right padding of a batch of prompts: the slots >= lengths, (B,)."""
        slots = torch.arange(self.length, device=lengths.device)
        self.hidden = slots >= lengths[:, None]

    def select(self, rows: Tensor) -> None:
        """Keep (and repeat) the given rows, in that order: follow beams, drop finished prompts."""
        self.layers = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.layers]
        self.hidden = None if self.hidden is None else self.hidden.index_select(0, rows)

    def mask(self, new: int, device) -> Tensor | None:
        """May query t look at slot s? (B or 1, 1, T, S) bool; None means causal."""
        if self.hidden is None and self.tree is None:
            return None
        mask = causal_mask(new, self.length + new, device)
        if self.tree is not None:
            before = mask[..., :self.length + new - self.tree.shape[-1]].fill_(True)
            before = before.expand(len(self.tree), -1, -1, -1)
            mask = torch.cat((before, self.tree[:, None]), dim=-1)
        if self.hidden is not None:
            seen = F.pad(~self.hidden, (0, new + self.length - self.hidden.shape[1]), value=True)
            mask = mask & seen[:, None, None, :]
        return mask


def join(old: Tensor, new: Tensor, slots: int) -> Tensor:
    """Keys or values of all slots, cached and new: written into the cache's room if it has any.

    (1 or B, G, S or more, D), (B, G, T, D) -> (B, G, slots, D), slots = S + T
    """
    if old.shape[2] < slots:
        return torch.cat((old.expand(len(new), -1, -1, -1), new), dim=2)
    old[:, :, slots - new.shape[2]:slots] = new
    return old[:, :, :slots]


def pick(x: Tensor, places: Tensor) -> Tensor:
    """The given places of the last dimension but one, other ones for each row.

    (B or 1, .., T, F), (B, A) -> (B, .., A, F)
    """
    x = x.expand(len(places), *x.shape[1:])
    places = places.view(len(places), *[1] * (x.dim() - 3), -1, 1)
    return x.gather(-2, places.expand(*x.shape[:-2], -1, x.shape[-1]))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) * weight, in float32 whatever the storage.  (..., C) -> (..., C)"""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


class RmsNormFused(torch.autograd.Function):
    """`rms_norm` and its gradient in half the passes over memory.

    With y = r x w, r = 1/√(mean(x²) + eps):  ∂L/∂x = r (g w) - x r³ <g w, x> / C
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        """As `rms_norm`."""
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        """(..., C) -> the gradients of x and, unless it is frozen, of the weight."""
        (x, weight, r), grad_weight = ctx.saved_tensors, None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * x * r).flatten(0, -2).sum(dim=0).to(weight.dtype)
        grad = grad * weight
        along = (grad * x).sum(dim=-1, keepdim=True, dtype=torch.float32) * r ** 3 / x.shape[-1]
        return (grad * r).addcmul_(x, along, value=-1).to(x.dtype), grad_weight, None


rms_norm_fused = RmsNormFused.apply


class RMSNorm(nn.Module):
    """`rms_norm` and its weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        return rms_norm_fused(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, cos, sin, mask, past, slots, wanted=None):
        """x (B, T, C), past keys and values or None, S -> (B, T or A, C), all keys and values"""
        k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # (B, G, T, D)
                for proj in (self.k_proj, self.v_proj))
        k = rotate_fused(k, cos, sin)
        if wanted is not None:          # keys and values of all tokens, queries of a few
            if mask is None:
                mask = causal_mask(x.shape[1], slots, x.device)
            x, cos, sin, mask = (pick(part, wanted) for part in (x, cos, sin, mask))
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)   # (B, H, T or A, D)
        q = rotate_fused(q, cos, sin)
        if past is not None:
            k, v = (join(old, new, slots)                                       # -> (B, G, S, D)
                    for old, new in zip(past, (k, v)))
        y = attend_fused(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)                # -> (B, T or A, C)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(z) = z σ(z)."""
    return F.silu(gate) * up


class SwigluFused(torch.autograd.Function):
    """`swiglu` that keeps its two inputs for the backward pass and nothing else."""

    @staticmethod
    def forward(ctx, gate, up):
        """As `swiglu`."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


swiglu_fused = SwigluFused.apply


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.down_proj(swiglu_fused(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and a residual connection."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, past, slots, wanted=None):
        """x (B, T, C), past keys and values or None, S -> (B, T or A, C), all keys and values"""
        y, keys_values = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, slots,
                                        wanted)
        x = y + (x if wanted is None else pick(x, wanted))
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class FloatLinear(torch.autograd.Function):
    """x Wᵀ in float32 for a W stored in less, a block of which is converted at a time: a float32
    copy of a large vocabulary would be gigabytes.
    """

    @staticmethod
    def forward(ctx, x, weight):
        """(N, C), (V, C) -> (N, V) float32"""
        ctx.save_for_backward(x, weight)
        y = x.new_empty(len(x), len(weight), dtype=torch.float32)
        for rows in FloatLinear.blocks(weight):
            torch.mm(x.float(), weight[rows].float().t(), out=y[:, rows])
        return y

    @staticmethod
    def backward(ctx, grad):
        """Gradients of x and, unless it is frozen, of the weight."""
        (x, weight), grad_weight = ctx.saved_tensors, None
        grad_x = torch.zeros_like(x, dtype=torch.float32)
        for rows in FloatLinear.blocks(weight):
            grad_x.addmm_(grad[:, rows], weight[rows].float())
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x.float()).to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight

    @staticmethod
    def blocks(weight: Tensor) -> list[slice]:
        """Rows that make 4 MB in float32, what a CPU's cache holds; on a GPU 256 MB."""
        rows = max(1, 2**(26 if weight.is_cuda else 20) // weight.shape[1])
        return [slice(start, start + rows) for start in range(0, len(weight), rows)]


class Llama(nn.Module):
    """The decoder. `forward` stops at the final norm, so logits are computed only where wanted."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.fingerprint: str | None = None     # of the checkpoint it was loaded from
        self.recompute = False                  # True: blocks run again in backward, to save memory
        self.compiled = None                    # see compile_blocks
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile make kernels for tuning: one set for all blocks and all batch shapes.
        """
        self.compiled = torch.compile(lambda block, *inputs: block(*inputs), dynamic=True,
                                      backend=backend)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings x_t of Eq. 6.  (B, T) -> (B, T, C)"""
        return self.embed_tokens(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token scores f, float32 whatever the storage: their differences are small.

        (..., C) -> (..., V)
        """
        weight = self.lm_head.weight
        if weight.dtype == torch.float32:
            return F.linear(hidden, weight)
        logits = FloatLinear.apply(hidden.reshape(-1, hidden.shape[-1]), weight)
        return logits.view(*hidden.shape[:-1], -1)

    def positions(self, new: int, cache: KVCache | None, device) -> Tensor:
        """Default positions of `new` tokens: counted on from the cache, less its hidden slots.

        In a tree a token comes right after its parent.  -> (T,), or (B, T) when rows differ
        """
        past = cache.length if cache is not None else 0
        positions = torch.arange(past, past + new, device=device)
        if cache is not None and cache.tree is not None:
            positions = past + new - cache.tree.shape[-1] + cache.tree.sum(dim=-1) - 1
        if past and cache.hidden is not None:
            positions = positions - cache.hidden.sum(dim=1, keepdim=True)
        return positions

    def forward(self, tokens: Tensor | None, *, embeddings: Tensor | None = None,
                positions: Tensor | None = None, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.  tokens (B, T) -> (B, T, C)

        embeddings (B, T, C) replace embed(tokens); positions (T,) or (B, T), integer or float,
        default to 0 .. T-1 counted on from the cache; the cache is extended in place, unless it is
        read-only. wanted (B, A) are places among the T: the last block works for these only, and
        the outcome is (B, A, C).
        """
        x = self.embed(tokens) if embeddings is None else embeddings
        T = x.shape[1]
        if positions is None:
            positions = self.positions(T, cache, x.device)
        angles = positions[..., None].float() * inverse_frequencies(self.config, x.device)
        angles = angles.view(-1, 1, *angles.shape[-2:])         # (B or 1, 1, T, D/2): heads alike
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask = cache.mask(T, x.device) if cache is not None else None
        pasts, grown = cache.layers if cache is not None else [], []
        slots = T + (cache.length if cache is not None else 0)
        roomy = cache is not None and cache.room >= T
        for i, past in enumerate(pasts or [None] * len(self.layers)):
            inputs = (x, cos, sin, mask, past, slots, wanted if i == len(self.layers) - 1 else None)
            if self.recompute and torch.is_grad_enabled():
                x, keys_values = checkpoint(self.layers[i], *inputs, use_reentrant=False)
            elif self.compiled and torch.is_grad_enabled():
                x, keys_values = self.compiled(self.layers[i], *inputs)
            else:
                x, keys_values = self.layers[i](*inputs)
            if cache is not None and not cache.read_only and not roomy:
                grown.append(keys_values)
        if cache is not None and not cache.read_only:
            cache.layers, cache.length = grown or pasts, cache.length + T
        return self.norm(x)


# ----------------------------------------------------------------------------------------------
# Checkpoints: config.json and safetensors, one file or shards with an index; local or on the Hub

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
WEIGHT_FILES = ["model.safetensors.index.json", "model.safetensors", "model-*.safetensors"]


def find_checkpoint(name: str) -> Path:
    """The folder called `name`, or else a snapshot of that Hub repository, fetched if need be.

    The Hub's own environment variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE. Raises ValueError:
    gated, no such repository, no network; FileNotFoundError or ValueError if its config.json asks
    for what `Llama` does not implement, before any weight is fetched.
    """
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (GatedRepoError, LocalEntryNotFoundError,
                                        RepositoryNotFoundError)
    try:
        LlamaConfig.from_folder(snapshot_download(name, allow_patterns=SMALL_FILES))
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES + WEIGHT_FILES))
    except GatedRepoError:
        raise ValueError(
            f"{name}: a gated repository. Accept its terms at https://huggingface.co/{name}, then "
            "log in with `hf auth login` or set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: neither a folder here nor a repository on the Hub. Check the spelling; for a "
            "private one log in with `hf auth login` or set HF_TOKEN") from None
    except LocalEntryNotFoundError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"{name}: no folder here, not complete in the Hub's cache, and the Hub cannot be "
            f"reached ({reason}). Connect, unset HF_HUB_OFFLINE, or pass a folder") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{single}: not found, nor {index.name}. Weights are read from "
                                "safetensors files only")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        names[0]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not a safetensors index (wanted a 'weight_map')") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: names {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found, though {index.name} names it")
    return [folder / name for name in names]


def _headers(files: list[Path], wanted: dict[str, Tensor], tied: bool) -> dict[str, tuple]:
    """Our name -> (file, stored name) for every tensor, from the files' headers alone.

    Raises one ValueError for all tensors that are missing, unexpected or of another shape or type.
    """
    where, wrong = {}, []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():
                name, entry = stored.removeprefix("model."), file.get_slice(stored)
                shape, kind = tuple(entry.get_shape()), entry.get_dtype()
                if name.endswith("rotary_emb.inv_freq"):
                    continue                            # a buffer of older files; computed here
                if name == "lm_head.weight" and tied:   # some store both; they must be equal
                    wanted = wanted | {name: wanted["embed_tokens.weight"]}
                if name not in wanted or name in where:
                    wrong.append(f"{stored} in {path.name} unexpected")
                elif shape != wanted[name].shape:
                    wrong.append(f"{stored} in {path.name} of shape {shape}, wanted "
                                 f"{tuple(wanted[name].shape)}")
                elif kind not in ("F32", "F16", "BF16"):
                    wrong.append(f"{stored} in {path.name} stored as {kind}, wanted F32, F16 or "
                                 "BF16")
                where[name] = (path, stored)
    wrong += [f"{name} missing" for name in wanted if name not in where]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(f"{files[0].parent}: tensors do not fit config.json: "
                         f"{'; '.join(wrong[:6])}{more}. Do they belong together?")
    return where


def _read(path: Path, stored: str, device, dtype: torch.dtype | None) -> tuple[Tensor, str]:
    """One tensor and the SHA-256 of its bytes. Each value is copied once, from the mapped file.

    The file is mapped anew for every 64 MB, so that pages already copied are given back.
    """
    out, start, digest, rows = None, 0, hashlib.sha256(), 1
    while out is None or start < len(out):
        with safe_open(path, framework="pt") as file:
            entry = file.get_slice(stored)
            if out is None:
                shape, rows = entry.get_shape(), max(1, 2**26 // entry[:1].nbytes)
            piece = entry[start:start + rows]
            if not torch.stack(piece.aminmax()).isfinite().all():
                raise ValueError(f"{path}: {stored} holds values that are not finite")
            if out is None:
                out = torch.empty(shape, dtype=dtype or piece.dtype, device=device)
            out[start:start + rows].copy_(piece)
            digest.update(piece.contiguous().view(torch.uint8).numpy())
            start += rows
            del piece, entry                            # views of the map
    return out, digest.hexdigest()


def load_llama(folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """Read a checkpoint folder strictly. dtype None keeps the stored precision.

    Peak memory is that of the weights and 64 MB. `fingerprint` becomes a digest of the sizes and of
    every stored value, the same for one file and for shards, on any device, in any dtype.
    Raises FileNotFoundError or ValueError: file absent or damaged, tensors missing, unexpected or
    misshapen (listed together, before any is read), a value that is not finite.
    """
    folder = Path(folder)
    config = LlamaConfig.from_folder(folder)
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.named_parameters())             # tied weights appear once
    path = folder
    try:
        where, found, digests = {}, {}, {}
        for path in (files := _weight_files(folder)):   # each must open before any is read
            safe_open(path, framework="pt")
        where = _headers(files, wanted, config.tie_word_embeddings)
        for name, (path, stored) in where.items():
            found[name], digests[name] = _read(path, stored, device, dtype)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}). Fetch it again") from None
    if config.tie_word_embeddings:
        head = digests.pop("lm_head.weight", digests["embed_tokens.weight"])
        if head != digests["embed_tokens.weight"]:
            raise ValueError(f"{folder}: config.json ties lm_head to embed_tokens, but the files "
                             "hold different values for them. Which is right?")
        found["lm_head.weight"] = found["embed_tokens.weight"]
    model.load_state_dict(found, assign=True)
    if config.tie_word_embeddings:                      # one parameter, not two of one storage
        model.lm_head.weight = model.embed_tokens.weight
    description = json.dumps([asdict(config), digests], sort_keys=True)
    model.fingerprint = hashlib.sha256(description.encode()).hexdigest()[:16]
    return model.eval()


def save_llama(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors under published names; each file appears whole.

    Raises ValueError for a model that carries LoRA factors.
    """
    folder = Path(folder)
    with torch.device("meta"):
        plain = {name for name, _ in Llama(model.config).named_parameters()}
    if extra := sorted({name for name, _ in model.named_parameters()} ^ plain):
        raise ValueError(f"not a plain Llama: {extra[0]} and {len(extra) - 1} more tensors have no "
                         "place in a checkpoint; merge_lora(model) first")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {("" if name.startswith("lm_head") else "model.") + name:
               p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": dtype, **asdict(model.config)}
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "config.json.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "config.json.part", folder / "config.json")
