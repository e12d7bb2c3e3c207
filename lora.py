"""LoRA: low-rank factors Φ beside frozen weights Θ (§3.1, Eq. 2).  y = W x + (α/R) B A dropout(x)

Knows only torch. Files have peft's layout and names (adapter_config.json,
adapter_model.safetensors).
Left out: DoRA, rank-stabilised scaling, biases, ranks that differ by layer; files with them are
refused.

Shapes: R rank; A (R, in), B (out, R).
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """The paper gives none of these; BIGRec, which it builds on, documents these (D5)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank!r}; wanted a positive integer")
        if not self.alpha > 0:
            raise ValueError(f"LoRA alpha is {self.alpha!r}; wanted a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout!r}; wanted a number in [0, 1)")
        unknown = sorted(set(self.targets) - set(ALL_LINEAR))
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets {', '.join(unknown) or 'empty'}: "
                             f"wanted names among {', '.join(ALL_LINEAR)}")


class LoraLinear(nn.Linear):
    """A frozen linear map and its factors. A is random, B zero: B A = 0 before the first step."""

    def __init__(self, linear: nn.Linear, config: LoraConfig):
        nn.Module.__init__(self)        # shares the weight: nothing is allocated or copied
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.config = config
        self.scale = config.alpha / config.rank
        w = linear.weight
        self.A = nn.Parameter(w.new_empty(config.rank, w.shape[1], dtype=torch.float32))
        self.B = nn.Parameter(w.new_zeros(w.shape[0], config.rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.train(linear.training)     # born in training mode; wrapping must not switch it

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's precision; the factors' product is float32"""
        low = F.linear(F.dropout(x, self.config.dropout, self.training).float(), self.A)
        return F.linear(x, self.weight, self.bias) + F.linear(low * self.scale, self.B).to(x.dtype)


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16, dropout: float = 0.05,
             targets=("q_proj", "v_proj")) -> list[nn.Parameter]:
    """Freeze the model, then wrap every linear map named in targets. Returns the factors Φ.

    Raises ValueError for a second call, a bad setting, or a target the model does not have.
    """
    config = LoraConfig(rank, alpha, dropout, tuple(targets))
    if _adapted(model):
        raise ValueError("this model has LoRA factors already; merge_lora(model) first")
    for p in model.parameters():
        p.requires_grad_(False)
    found = [(parent, name, child) for parent in model.modules() for name, child in
             parent.named_children() if isinstance(child, nn.Linear) and name in config.targets]
    if absent := set(config.targets) - {name for _, name, _ in found}:
        raise ValueError(f"LoRA targets {', '.join(sorted(absent))}: no such linear map in the "
                         f"model")
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, config))
    return lora_parameters(model)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All factors, in module order."""
    return [p for m in _adapted(model).values() for p in (m.A, m.B)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Factors under peft's names, which start where the published model does."""
    return {f"base_model.model.model.{name[name.index('layers.'):]}.lora_{factor}.weight":
            getattr(m, factor).data for name, m in _adapted(model).items() for factor in "AB"}


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json; each file appears whole."""
    folder = Path(folder)
    tensors = _tensors(model)
    if not tensors:
        raise ValueError("this model has no LoRA factors; call add_lora(model) first")
    config = next(iter(_adapted(model).values())).config
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.rank,
                "lora_alpha": config.alpha, "lora_dropout": config.dropout,
                "target_modules": list(config.targets), "bias": "none", "fan_in_fan_out": False,
                "inference_mode": True, "base_model_name_or_path": None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()},
              folder / "adapter_model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "adapter_model.safetensors.part", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json.part").write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(folder / "adapter_config.json.part", folder / "adapter_config.json")


def load_lora(model: nn.Module, folder: str | Path) -> list[nn.Parameter]:
    """Add factors with the folder's settings and read them strictly. Returns the factors."""
    path, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found. An adapter is adapter_config.json and "
                                    "adapter_model.safetensors")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {settings.get('peft_type')!r}; wanted 'LORA'")
        for switch in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern",
                       "alpha_pattern"):
            if settings.get(switch):
                raise ValueError(f"{switch} is set; not implemented")
        if settings.get("bias", "none") != "none":
            raise ValueError(f"bias is {settings['bias']!r}; only 'none' is implemented")
        targets = settings["target_modules"]
        config = LoraConfig(settings["r"], settings["lora_alpha"], settings["lora_dropout"],
                            ALL_LINEAR if targets == "all-linear" else tuple(targets))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        stored = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: damaged or truncated ({error})") from None
    factors = add_lora(model, config.rank, config.alpha, config.dropout, config.targets)
    wanted = _tensors(model)
    wrong = sorted(name for name in wanted.keys() | stored.keys() if name not in wanted or
                   name not in stored or wanted[name].shape != stored[name].shape)
    if wrong:
        merge_lora(model)               # the factors are zero still: this takes them out again
        raise ValueError(f"{weights}: {len(wrong)} tensors missing, unexpected or of another "
                         f"shape, e.g. {', '.join(wrong[:3])}. Is it an adapter of this base?")
    for name, tensor in wanted.items():
        tensor.copy_(stored[name])
    return factors


def merge_lora(model: nn.Module) -> None:
    """Replace W by W + (α/R) B A, summed in float32, and drop the factors."""
    for name, m in _adapted(model).items():
        linear = nn.Linear(m.in_features, m.out_features, bias=False, device="meta")
        merged = m.weight.float() + m.scale * (m.B @ m.A)
        linear.weight = nn.Parameter(merged.to(m.weight.dtype).detach(), requires_grad=False)
        linear.bias = m.bias
        model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2],
                                                                     linear)
