"""LoRA: low-rank factors Φ beside the frozen weights Θ (§3.1, Eq. 2).  y = W x + (α/R) B A x

Eq. 2 minimises the loss of Eq. 1 over Φ alone, with Θ fixed. Φ are two thin matrices beside
some of the model's linear maps: instead of the out · in numbers of a change to W, only the R (in +
out) numbers of B and A are trained. So an 8B model has a few million trainable numbers, and only
these need gradients and optimizer states.

    x ──┬── W (out, in), frozen ─────────────────── + ── y
        └── dropout ── A (R, in) ── B (out, R) ── · α/R ┘

This file adds the factors to any module, and reads and writes them in the files of the peft library
(adapter_config.json, adapter_model.safetensors). It needs no other file of ours.

Left out: DoRA, rank-stabilised scaling, biases, modules saved whole, ranks that differ by layer.
Files that have them are refused by name.

Shapes: R rank; A (R, in), B (out, R).
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Keys of an adapter_config.json that do not affect the output. Whatever else is set there, and is
# not read below, is refused.
NO_EFFECT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
             "inference_mode", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
READ_BELOW = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias",
              "init_lora_weights"}


@dataclass(frozen=True)
class LoraConfig:
    """Which linear maps get factors, and their rank, scale and dropout.

    The paper gives none of these (D5 in docs/readings.md). The defaults are those of BIGRec, which
    it builds on.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        for name, kinds, low, high in (("rank", (int,), 1, 10**5),
                                       ("alpha", (int, float), 1e-12, 10**18),
                                       ("dropout", (int, float), 0, 0.99)):
            if type(value := getattr(self, name)) not in kinds or not low <= value <= high:
                raise ValueError(f"LoRA {name} is {value!r}; wanted a number of {low} to {high}")
        if not set() < {*self.targets} <= {*ALL_LINEAR}:
            raise ValueError(f"LoRA targets is {self.targets!r}; wanted some of {ALL_LINEAR}")

    @property
    def scale(self) -> float:
        """The factor α/R of the product B A."""
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A frozen linear map with its factors.

    A starts at random and B at zero. So B A = 0 before the first step, and adding factors does not
    change the model; yet B has a gradient, because A is not zero.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig):
        nn.Module.__init__(self)        # not nn.Linear's: the weight is shared, nothing allocated
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.config = config
        self.active = True              # see without_factors
        w = linear.weight
        self.A = nn.Parameter(w.new_empty(config.rank, w.shape[1], dtype=torch.float32))
        self.B = nn.Parameter(w.new_zeros(w.shape[0], config.rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.train(linear.training)     # a new module is in training mode; the wrapped may not be

    def forward(self, input: Tensor) -> Tensor:
        """y = W x + (α/R) B A dropout(x).  (.., in) -> (.., out)

        Factors are kept in float32, because steps of AdamW are smaller than what bfloat16 can add;
        they multiply in x's precision. Dropout acts on their input and in training only. The
        product is added to y in place, because by itself it would be as large as y.
        """
        y = F.linear(input, self.weight, self.bias)
        if self.active:
            x = F.dropout(input, self.config.dropout, self.training)
            low = F.linear(x, self.A.to(x.dtype)).reshape(-1, self.config.rank)
            y.view(-1, self.out_features).addmm_(low, self.B.t().to(x.dtype),
                                                 alpha=self.config.scale)
        return y


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All factors Φ, in the order of the modules."""
    return [p for m in _adapted(model).values() for p in (m.A, m.B)]


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16, dropout: float = 0.05,
             targets: Sequence[str] = ("q_proj", "v_proj")) -> list[nn.Parameter]:
    """Eq. 2: freeze the model (Θ), wrap the linear maps named in targets, return the factors (Φ).

    Everything is frozen first, so that what is not wrapped has no gradient either: norms,
    embeddings, the output map. Raises ValueError for a second call, a bad setting, or a target that
    the model does not have.
    """
    config = LoraConfig(rank, alpha, dropout, tuple(targets))
    if _adapted(model):
        raise ValueError("this model has LoRA factors already; merge_lora(model) first")
    found = [(parent, name, child) for parent in model.modules() for name, child in
             parent.named_children() if isinstance(child, nn.Linear) and name in config.targets]
    if absent := set(config.targets) - {name for _, name, _ in found}:
        raise ValueError(f"LoRA targets {', '.join(sorted(absent))}: the model has no such map")
    for p in model.parameters():
        p.requires_grad_(False)
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, config))
    return lora_parameters(model)


@contextmanager
def without_factors(model: nn.Module) -> Iterator[nn.Module]:
    """In this context the factors are switched off.

    Grounding with the base's weights, as BIGRec does it, uses this (D11).
    """
    adapted = _adapted(model).values()
    for m in adapted:
        m.active = False
    try:
        yield model
    finally:
        for m in adapted:
            m.active = True


def merge_lora(model: nn.Module) -> None:
    """Replace W by W + (α/R) B A and drop the factors.

    The sum is formed in float32 and stored in W's precision. The result is a plain model.
    """
    _unwrap(model, lambda m: nn.Parameter(
        (m.weight.float() + m.config.scale * (m.B @ m.A)).to(m.weight.dtype).detach(),
        requires_grad=False))


def _unwrap(model: nn.Module, weight) -> None:
    """Put plain linear maps with weight(m) in the place of the wrapped ones."""
    for name, m in _adapted(model).items():
        linear = nn.Linear(m.in_features, m.out_features, bias=False, device="meta")
        linear.weight, linear.bias = weight(m), m.bias
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, linear)


# ----------------------------------------------------------------------------------------------
# Files


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The factors under peft's names: base_model.model.model. + our name + .lora_A or .lora_B."""
    return {f"base_model.model.model.{name[name.index('layers.'):]}.lora_{factor}.weight":
            getattr(m, factor).data for name, m in _adapted(model).items() for factor in "AB"}


def save_lora(model: nn.Module, folder: str | Path, base_model: str | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Both are written in a new folder first and then moved, so neither is ever half-written, and
    nothing is written through a link. base_model: its folder or Hub name, which peft reads as
    `base_model_name_or_path`.
    """
    folder, tensors = Path(folder), _tensors(model)
    if not tensors:
        raise ValueError("this model has no LoRA factors; call add_lora(model) first")
    config = next(iter(_adapted(model).values())).config
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.rank,
                "lora_alpha": config.alpha, "lora_dropout": config.dropout,
                "target_modules": list(config.targets), "bias": "none", "fan_in_fan_out": False,
                "inference_mode": True, "base_model_name_or_path": base_model}
    content = save({name: t.contiguous().cpu() for name, t in tensors.items()}, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        Path(new, "adapter_model.safetensors").write_bytes(content)
        Path(new, "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            Path(new, name).replace(folder / name)


def _read_config(path: Path) -> LoraConfig:
    """Settings of an adapter_config.json. ValueError for whatever would compute something else."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if value and key not in NO_EFFECT | READ_BELOW:
            raise ValueError(f"{key} is set, which is not implemented")
    # Adapters that start from the base weights, as "pissa" does, may change these weights too.
    for key, value, implemented in (
            ("peft_type", settings.get("peft_type"), ["LORA"]),
            ("bias", settings.get("bias", "none"), ["none"]),
            ("init_lora_weights", settings.get("init_lora_weights", True),
             [True, False, "gaussian", "orthogonal"])):
        if value not in implemented:
            raise ValueError(f"{key} is {value!r}, which is not implemented; wanted "
                             f"{' or '.join(map(repr, implemented))}")
    targets = settings["target_modules"]
    if targets == "all-linear":
        targets = ALL_LINEAR
    if not isinstance(targets, list | tuple):
        raise ValueError(f"target_modules is {targets!r}; wanted a list of names or 'all-linear'")
    # peft may write full names; whether one of them was left out shows in the tensors' names.
    names = tuple(dict.fromkeys(str(name).rpartition(".")[2] for name in targets))
    return LoraConfig(settings["r"], settings["lora_alpha"], settings.get("lora_dropout", 0), names)


def load_lora(model: nn.Module, folder: str | Path) -> list[nn.Parameter]:
    """Add factors with the settings of the folder and read them strictly. Returns the factors.

    peft silently drops the temporal embedding: an adapter of ours that is loaded there runs without
    it. Raises FileNotFoundError or ValueError, which name the file. After an error no factors are
    left in the model.
    """
    path, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    try:
        config, stored = _read_config(path), load_file(weights)
        factors = add_lora(model, **asdict(config))
    except SafetensorError as error:
        raise ValueError(f"{weights}: damaged or truncated ({error})") from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {fault}") from None
    tensors = _tensors(model)
    wrong = sorted(name for name in tensors.keys() | stored.keys() if name not in tensors or
                   name not in stored or tensors[name].shape != stored[name].shape
                   or stored[name].dtype not in (torch.float32, torch.float16, torch.bfloat16)
                   or not stored[name].isfinite().all())
    if wrong:
        _unwrap(model, lambda m: m.weight)
        raise ValueError(f"{weights}: {len(wrong)} tensors missing, unexpected, of another shape, "
                         "not stored as float32, float16 or bfloat16, or not finite, e.g. "
                         f"{', '.join(wrong[:3])}. Is it an adapter of this base model?")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
    return factors
