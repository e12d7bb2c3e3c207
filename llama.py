"""Llama 3 in plain PyTorch: the frozen backbone Θ of the paper (§3.2, Eq. 4 and 5).

Read this file first; it imports nothing of ours. Parameters have the names of published
checkpoints without the leading `model.`, so the modules below are also the table of weight names.

Shapes: B batch, T new tokens, S tokens seen so far (cached and new), C width, H query heads,
G key/value heads, D head width, V vocabulary, A places asked for.

Left out: attention or MLP biases, sliding windows, mixtures of experts, quantised weights.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn


_WANTED = {int: "a positive integer below 10^8", float: "a positive number",
           bool: "true or false"}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama under the names of a published config.json. The sizes have no defaults."""

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
            fits = {int: type(value) is int and 0 < value < 10**8, float: _positive(value),
                    bool: type(value) is bool}.get(field.type, True)
            _require(fits, f"{field.name} is {value!r}; wanted {_WANTED.get(field.type)}")
        _require(self.num_hidden_layers <= 1_000,
                 f"num_hidden_layers is {self.num_hidden_layers}; the deepest Llama has 126")
        H, G = self.num_attention_heads, self.num_key_value_heads
        _require(H % G == 0, f"{H} query heads cannot share {G} key/value heads evenly")
        _require(self.head_dim % 2 == 0,
                 f"head_dim is {self.head_dim}; rotary embeddings want an even width")
        kind, s = _rope_kind(self.rope_scaling), self.rope_scaling or {}
        _require(kind in ("default", "llama3"),
                 f"rope scaling {kind!r} is not implemented; known: default, llama3")
        if kind == "llama3":
            for key in ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings"):
                _require(_positive(s.get(key)), f"rope scaling 'llama3': {key} is {s.get(key)!r}; "
                         "wanted a positive number")
            _require(s["low_freq_factor"] < s["high_freq_factor"],
                     "rope scaling 'llama3': low_freq_factor is not below high_freq_factor")

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
            return cls(**cls._settings(json.loads(path.read_text(encoding="utf-8"))))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        except KeyError as error:
            raise ValueError(f"{path}: {error} is missing") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            fault = str(error).removeprefix("LlamaConfig.__init__() ")
            raise ValueError(f"{path}: {fault}") from None

    @classmethod
    def _settings(cls, raw) -> dict:
        """The fields above, from the content of a config.json."""
        kind = raw.get("model_type") if isinstance(raw, dict) else raw
        _require(kind == "llama", f"model_type is {kind!r}; this code implements 'llama' only")
        for key in ("attention_bias", "mlp_bias", "quantization_config"):
            _require(not raw.get(key), f"{key} is set; this forward does not implement it")
        _require(raw.get("hidden_act", "silu") == "silu",
                 f"hidden_act is {raw.get('hidden_act')!r}; wanted 'silu'")
        for key in ("rope_scaling", "rope_parameters"):
            _require(isinstance(raw.get(key) or {}, dict),
                     f"{key} is {raw.get(key)!r}; wanted an object or null")

        # Older files keep the rotary settings beside the sizes, newer ones in an object of its own.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        _require(part in (None, 1), f"partial_rotary_factor is {part!r}; only 1 is implemented")
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
        context = raw.setdefault("max_position_embeddings", 2048)
        raw["rope_scaling"] = None
        if _rope_kind(rope) != "default":
            raw["rope_scaling"] = {"original_max_position_embeddings": context} | {
                key: value for key, value in rope.items() if key not in ("rope_theta", "type")} | {
                "rope_type": _rope_kind(rope)}

        # What a file may leave out has the ecosystem's defaults.
        raw.setdefault("rms_norm_eps", 1e-6)
        heads = raw.get("num_attention_heads")
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
        raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // heads
        return {f.name: raw[f.name] for f in fields(cls) if f.name in raw}


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e18


def _rope_kind(scaling: dict | None) -> str:
    """The kind of rotary scaling that a config asks for; "default" means none."""
    return (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"


# ----------------------------------------------------------------------------------------------
# Rotary positions (Eq. 4)


def inverse_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Θ of Eq. 4: θ_i = rope_theta^(-2i/D) for the pairs i = 0 .. D/2 - 1.  -> (D/2,)

    Llama 3.1 and 3.2 slow the pairs that turn so seldom that their whole circle does not fit into
    the original context ("llama3" scaling), keep those that turn often, and blend between.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / config.rope_theta ** (even / config.head_dim)
    if _rope_kind(config.rope_scaling) == "llama3":
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)   # 1: as trained, 0: slowed by `factor`
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / s["factor"]
    return inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of numbers in the last dimension by its angle: R x of Eq. 4.

    x (.., D), cos and sin (.., D/2), one angle for each pair.

    A pair (a, b) at the angle φ becomes (a cos φ - b sin φ, b cos φ + a sin φ). Which two numbers
    make a pair is a convention. Here a stands in the first half of x and b at the same place of the
    second half, (x_i, x_{i + D/2}): published safetensors weights are made for these *split
    halves*. Eq. 4 writes *adjacent pairs* (x_2i, x_2i+1), and so do Meta's own .pth files. The two
    are the same rotation up to an order of the coordinates, so `cetrec.rotary`, which follows Eq. 4
    to the letter, sorts the coordinates, calls this function, and sorts them back.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ----------------------------------------------------------------------------------------------
# Attention, with a cache


def causal_mask(new: int, slots: int, device) -> Tensor:
    """True where one of the last `new` of so many tokens may look.  -> (1, 1, new, slots)"""
    return torch.ones(1, 1, new, slots, dtype=torch.bool, device=device).tril(slots - new)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D) v by PyTorch's fused kernel, which keeps no (T, S) scores for backward.

    q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D). Each key/value head serves H/G query
    heads. mask (B or 1, 1, T, S) is True where a query may look; None means causal, with T = S.
    """
    if q.device.type == "cpu":          # its kernels take twice the time in bfloat16
        q, k, v = (x.float() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """Keys and values of the tokens seen so far, so that new tokens need not run the old again.

    layers holds a pair of (B, G, S or more, D) for each block. A cache of one row serves any number
    of rows, so a prefix that they have in common is run once, and gradients flow back through it.

    New tokens follow one another unless `tree` says otherwise. Then the last slots are the nodes
    of a tree that grows behind the prompt, and tree[t, s] says whether slot s is new token t itself
    or one of its ancestors. Two beams after two steps, where both go on from the first:

        prompt slots        nodes                   mask of the new tokens
        p p p p p           0: "The"   1: "A"       p p p p p | 1 0 1 0     node 2
              \\             2: "cat"   3: "dog"     p p p p p | 1 0 0 1     node 3
               (2 and 3 are children of 0)

    Rows with shorter prompts have padding among their slots, which `hidden` marks.
    """

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.length = 0                     # S; the tensors may have room for more slots
        self.hidden: Tensor | None = None   # (B, S of some time ago) bool, slots nobody looks at
        self.tree: Tensor | None = None     # (B or 1, T, last slots) bool, set before each forward
        self.read_only = False              # True: a forward looks at what is here and adds nothing

    def make_room(self, new: int, rows: int) -> None:
        """Without gradients, let slots be written in place: there is a copy every 64 tokens only,
        instead of one each. With gradients, or if it may only be read, what is here stays as it is:
        `join` finds no room and copies."""
        for i, (k, v) in enumerate(self.layers):
            if torch.is_grad_enabled() or self.read_only:
                self.layers[i] = k[:, :, :self.length], v[:, :, :self.length]
            elif len(k) != rows or k.shape[2] < self.length + new:
                self.layers[i] = tuple(F.pad(x[:, :, :self.length].expand(rows, -1, -1, -1),
                                             (0, 0, 0, new + 64)) for x in (k, v))

    def select(self, rows: Tensor) -> None:
        """Keep (and repeat) the given rows, in that order."""
        self.layers = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.layers]
        self.hidden = None if self.hidden is None else self.hidden.index_select(0, rows)

    def positions(self, new: int, device) -> Tensor:
        """Positions of new tokens: counted on from here without hidden slots, in a tree one after
        the parent's.  -> (T,), or (B, T) when rows differ"""
        positions = self.length + torch.arange(new, device=device)
        if self.tree is not None:
            positions = self.length + new - self.tree.shape[-1] + self.tree.sum(dim=-1) - 1
        if self.hidden is not None:
            positions = positions - self.hidden.sum(dim=1, keepdim=True)
        return positions

    def mask(self, new: int, device) -> Tensor | None:
        """Where the new tokens may look, (B or 1, 1, T, S) bool; None means causal from slot 0."""
        if not self.length and self.tree is None:
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
    """Keys or values of all slots, cached and new, in place where there is room.

    (1 or B, G, S - T or more, D), (B, G, T, D) -> (B, G, S, D)
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


class Attention(nn.Module):
    """Grouped-query attention under rotation (Eq. 5): H query heads share G key/value heads.

    Queries and keys are turned by their positions m and n, and <R_m q, R_n k> = <q, R_{n-m} k>:
    scores depend on distances only. Values are not turned.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, cos, sin, mask, past, wanted=None):
        """x (B, T, C), past keys and values or None -> (B, T or A, C), all keys and values.

        Where only the places wanted (B, A) are asked for, only these need queries.
        """
        k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # (B, G, T, D)
                for proj in (self.k_proj, self.v_proj))
        k = rotate(k, cos, sin)
        if wanted is not None:
            if mask is None:
                mask = causal_mask(x.shape[1], x.shape[1], x.device)
            x, cos, sin, mask = (pick(part, wanted) for part in (x, cos, sin, mask))
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)   # (B, H, T or A, D)
        q = rotate(q, cos, sin)
        if past is not None:
            k, v = (join(old, new, mask.shape[-1]) for old, new in zip(past, (k, v)))   # S slots
        y = attend(q, k, v, mask).to(x.dtype)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)                # -> (B, T or A, C)


# ----------------------------------------------------------------------------------------------
# The decoder


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) * weight, computed in float32 whatever the storage."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) -> (.., C)"""
        inverse = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return (x.float() * inverse * self.weight).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), with silu(z) = z σ(z).

    The gate decides, for each inner unit, how much of `up` goes through.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection.

        x = x + attention(norm(x));  x = x + mlp(norm(x))

    A block is a pure function of its inputs: it returns its keys and values instead of writing them
    anywhere. So it can be run twice (--recompute) or compiled.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, past, wanted=None):
        """x (B, T, C), past keys and values or None -> (B, T or A, C), all keys and values"""
        y, keys_values = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, wanted)
        x = y + (x if wanted is None else pick(x, wanted))
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class Llama(nn.Module):
    """The decoder. `forward` ends at the final norm, so that logits are made only where wanted.

    With the vocabulary of Llama 3 the logits of one token are as large as its hidden states in all
    layers together, and only the answer's few tokens need them.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.run_block = Block.__call__     # --recompute and --compile put a wrapper here
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings x_t of Eq. 6.  (B, T) -> (B, T, C)"""
        return self.embed_tokens(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores f of the next token, float32 whatever the storage, because Eq. 8 takes small
        differences of them.  (.., C) -> (.., V)"""
        return F.linear(hidden.float(), self.lm_head.weight.float())

    def forward(self, tokens: Tensor | None, *, embeddings: Tensor | None = None,
                positions: Tensor | None = None, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.  tokens (B, T) -> (B, T, C)

        embeddings (B, T, C) replace embed(tokens). positions (T,) or (B, T), integer or real,
        default to 0, 1, .. T-1, counted on from the cache. The cache is extended unless it is
        read-only. If places wanted (B, A) are given, the last block works for them only, and the
        outcome is (B, A, C).
        """
        x = self.embed(tokens) if embeddings is None else embeddings
        rows, T, _ = x.shape
        cache = cache or KVCache()
        cache.make_room(T, rows)
        mask = cache.mask(T, x.device)
        positions = cache.positions(T, x.device) if positions is None else positions
        angles = positions[..., None].float() * inverse_frequencies(self.config, x.device)
        angles = angles.view(-1, 1, *angles.shape[-2:])     # (B or 1, 1, T, D/2): alike for heads
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        call = self.run_block if torch.is_grad_enabled() else Block.__call__
        grown, last = [], len(self.layers) - 1
        for i, block in enumerate(self.layers):
            past = cache.layers[i] if cache.layers else None
            x, keys_values = call(block, x, cos, sin, mask, past, wanted if i == last else None)
            in_place = past is not None and past[0].shape[2] >= cache.length + T
            grown.append(past if in_place or cache.read_only else keys_values)
        if not cache.read_only:
            cache.layers, cache.length = grown, cache.length + T
        return self.norm(x)


# ----------------------------------------------------------------------------------------------
# Checkpoint folders: config.json, and safetensors in one file or in shards with an index


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that an index names."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(content["weight_map"].values()))
            _require(names and all(Path(name).name == name for name in names), "names other places")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index}: not an index of files in this folder ({error})") from None
    for path in (files := [folder / name for name in names]):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. Weights are read from model.safetensors, "
                                    f"or from the shards named in {index.name}")
    return files


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}). Fetch it again") from None


def tensor_places(folder: Path, model: Llama) -> dict[str, tuple[Path, str]]:
    """Our name -> (file, stored name) of every tensor, from the headers of the files alone.

    Raises FileNotFoundError for absent files, and one ValueError for all tensors that are missing,
    unexpected or of another shape or type.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}     # tied ones once
    where, wrong, tied = {}, [], model.config.tie_word_embeddings
    for path in _weight_files(folder):
        with _open(path) as file:
            for stored in file.keys():
                name, entry = stored.removeprefix("model."), file.get_slice(stored)
                shape, kind = tuple(entry.get_shape()), entry.get_dtype()
                if name.endswith("rotary_emb.inv_freq"):
                    continue                            # older files store what we compute
                if name == "lm_head.weight" and tied:   # some store both; load_llama compares
                    wanted = wanted | {name: wanted["embed_tokens.weight"]}
                if name not in wanted or name in where:
                    wrong.append(f"{stored} in {path.name} unexpected")
                elif shape != wanted[name] or kind not in ("F32", "F16", "BF16"):
                    wrong.append(f"{stored} in {path.name} of shape {shape} as {kind}, wanted "
                                 f"{wanted[name]} as F32, F16 or BF16")
                where[name] = (path, stored)
    wrong += [f"{name} missing" for name in wanted if name not in where]
    _require(not wrong, f"{folder}: {len(wrong)} tensors do not fit config.json: "
             f"{'; '.join(wrong[:6])}. Do they belong together?")
    return where


def _read(path: Path, stored: str, device, dtype: torch.dtype | None) -> Tensor:
    """One tensor. The file is mapped into memory and unmapped again for each, so that no more than
    one of them is in memory twice."""
    with _open(path) as file:
        mapped = file.get_tensor(stored)
        _require(bool(torch.stack(mapped.aminmax()).isfinite().all()),
                 f"{path}: {stored} holds values that are not finite")
        return mapped.to(device, dtype, copy=True)


def load_llama(folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """Read a checkpoint folder strictly. dtype None keeps the stored precision.

    Raises FileNotFoundError or ValueError for files that are absent or damaged, for tensors that
    are missing, unexpected or misshapen (all listed together, before any is read), and for values
    that are not finite.
    """
    config = LlamaConfig.from_folder(folder)
    with torch.device("meta"):
        model = Llama(config)
    found = {name: _read(path, stored, device, dtype)
             for name, (path, stored) in tensor_places(Path(folder), model).items()}
    if config.tie_word_embeddings:                      # one parameter, not two of the same values
        shared = found["embed_tokens.weight"]
        _require(torch.equal(found.setdefault("lm_head.weight", shared), shared),
                 f"{folder}: config.json ties lm_head to embed_tokens, but the files hold "
                 "different values for them. Which is right?")
        found["lm_head.weight"] = shared
    model.load_state_dict(found, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def save_llama(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors under published names; each file appears whole.

    Raises ValueError for a model that carries LoRA factors.
    """
    folder, tensors = Path(folder), {}
    for name, p in model.named_parameters():
        _require(not name.endswith((".A", ".B")), f"{name} has no place in the checkpoint of a "
                 "plain Llama; merge_lora(model) first")
        stored = name if name.startswith("lm_head") else f"model.{name}"
        tensors[stored] = p.detach().contiguous().cpu()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
              **asdict(model.config)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors.part").write_bytes(save(tensors, {"format": "pt"}))
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "config.json.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "config.json.part", folder / "config.json")
