"""LoRA: low-rank factors Φ beside frozen weights Θ (§3.1, Eq. 2).  y = W x + (α/R) B A dropout(x)

Knows only torch. Files have peft's layout and names (adapter_config.json,
adapter_model.safetensors).
Left out: DoRA, biases, other modules saved whole, ranks that differ by layer; files with them are
refused by name.

Shapes: R rank; A (R, in), B (out, R).
"""

import json
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# What an adapter_config.json may say without changing y: how it was made, or a part of a feature
# that is off. Everything else that is set there and not read below is refused.
HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
READ_BELOW = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora",
              "bias", "init_lora_weights"}
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """The paper gives none of these; BIGRec, which it builds on, documents these (D5)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False        # rank-stabilised: α/√R instead of α/R

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank!r}; wanted a positive integer")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA alpha is {self.alpha!r}; wanted a positive number")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout!r}; wanted a number in [0, 1)")
        if type(self.rslora) is not bool:
            raise ValueError(f"use_rslora is {self.rslora!r}; wanted true or false")
        unknown = sorted(set(self.targets) - set(ALL_LINEAR))
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets {', '.join(unknown) or 'empty'}: "
                             f"wanted names among {', '.join(ALL_LINEAR)}")

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class SparseDropout(torch.autograd.Function):
    """Dropout that draws a number for each zero instead of one for each element, of which there are
    1/p times as many: on CPUs the drawing took a tenth of a tuning step.

    The gaps between zeros are geometric, so every element is zero with probability p whatever the
    others are. The seed says where they are; the gradient has its zeros at the same places.
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """Any shape, 0 < p < 1, () -> x's shape"""
        ctx.p, ctx.seed = p, seed
        return drop(x, p, seed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Of x only."""
        return drop(grad, ctx.p, ctx.seed), None, None


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x / (1 - p), and 0 at places that the seed tells."""
    n = x.numel()
    enough = int(n * p + 7 * math.sqrt(n * p) + 20)         # gaps to pass the end, all but surely
    uniform = torch.rand(enough, generator=torch.Generator().manual_seed(int(seed)))
    zeros = uniform.neg_().log1p_().div_(math.log1p(-p)).long().add_(1).cumsum(0).sub_(1)
    zeros = zeros[:int(torch.searchsorted(zeros, n))]
    return (x / (1 - p)).flatten().index_fill_(0, zeros, 0).view(x.shape)


# the same for torch.compile, which cannot look into it; called from Python it would be slower
drop_op = torch.library.custom_op("cetrec::drop", drop, mutates_args=())
drop_op.register_fake(lambda x, p, seed: x.new_empty(x.shape))
drop_op.register_autograd(
    lambda ctx, grad: (drop_op(grad, ctx.p, ctx.seed), None, None),
    setup_context=lambda ctx, inputs, output: vars(ctx).update(p=inputs[1], seed=inputs[2]))


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element 0 with probability p, else x / (1 - p)."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    call = drop_op if torch.compiler.is_compiling() else SparseDropout.apply
    return call(x, p, torch.randint(2**62, ()))


class LoraLinear(nn.Linear):
    """A frozen linear map and its factors. A is random, B zero: B A = 0 before the first step."""

    def __init__(self, linear: nn.Linear, config: LoraConfig):
        nn.Module.__init__(self)        # shares the weight: nothing is allocated or copied
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.config = config
        self.scale = config.scale
        self.active = True              # see without_factors
        w = linear.weight
        self.A = nn.Parameter(w.new_empty(config.rank, w.shape[1], dtype=torch.float32))
        self.B = nn.Parameter(w.new_zeros(w.shape[0], config.rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.train(linear.training)     # born in training mode; wrapping must not switch it

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Computes in x's precision; the factors are kept in float32."""
        y = F.linear(x, self.weight, self.bias)
        if self.active:     # added in place: a product of its own would be as wide as y
            dropped = dropout(x, self.config.dropout) if self.training else x
            low = F.linear(dropped, self.A.to(x.dtype))
            y.view(-1, self.out_features).addmm_(
                low.reshape(-1, self.config.rank), self.B.t().to(x.dtype), alpha=self.scale)
        return y


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16, dropout: float = 0.05,
             targets=("q_proj", "v_proj"), rslora: bool = False) -> list[nn.Parameter]:
    """Freeze the model, then wrap every linear map named in targets. Returns the factors Φ.

    Raises ValueError for a second call, a bad setting, or a target the model does not have.
    """
    config = LoraConfig(rank, alpha, dropout, tuple(targets), rslora)
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


@contextmanager
def without_factors(model: nn.Module):
    """Within this context the model is its base: factors stay, but are left out."""
    adapted = _adapted(model).values()
    for m in adapted:
        m.active = False
    try:
        yield model
    finally:
        for m in adapted:
            m.active = True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Factors under peft's names, which start where the published model does."""
    return {f"base_model.model.model.{name[name.index('layers.'):]}.lora_{factor}.weight":
            getattr(m, factor).data for name, m in _adapted(model).items() for factor in "AB"}


def save_lora(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json; each file appears whole.

    base: the folder or Hub name of the base, for peft's `base_model_name_or_path`.
    """
    folder = Path(folder)
    tensors = _tensors(model)
    if not tensors:
        raise ValueError("this model has no LoRA factors; call add_lora(model) first")
    config = next(iter(_adapted(model).values())).config
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.rank,
                "lora_alpha": config.alpha, "lora_dropout": config.dropout,
                "use_rslora": config.rslora, "target_modules": list(config.targets),
                "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
                "base_model_name_or_path": base}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()},
              folder / "adapter_model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "adapter_model.safetensors.part", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json.part").write_text(json.dumps(settings, indent=2) + "\n",
                                                     encoding="utf-8")
    os.replace(folder / "adapter_config.json.part", folder / "adapter_config.json")


def _read_config(path: Path) -> LoraConfig:
    """Settings of an adapter_config.json; ValueError for what would compute something else."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {settings.get('peft_type')!r}; wanted 'LORA'")
    for key, value in settings.items():
        if value and key not in HARMLESS | READ_BELOW:
            raise ValueError(f"{key} is set; not implemented")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias is {settings['bias']!r}; only 'none' is implemented")
    how = settings.get("init_lora_weights", True)
    if how not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(f"init_lora_weights is {how!r}; adapters that start from the base weights "
                         "may change them too, which is not implemented")
    targets = settings["target_modules"]
    if targets == "all-linear":
        targets = ALL_LINEAR
    if not isinstance(targets, list | tuple):
        raise ValueError(f"target_modules is {targets!r}; wanted a list of names or 'all-linear'")
    # peft writes "all-linear" out as full names; that none is left out shows in the tensors' names
    short = tuple(dict.fromkeys(str(name).rpartition(".")[2] for name in targets))
    return LoraConfig(settings["r"], settings["lora_alpha"], settings.get("lora_dropout", 0.0),
                      short, settings.get("use_rslora", False))


def load_lora(model: nn.Module, folder: str | Path) -> list[nn.Parameter]:
    """Add factors with the folder's settings and read them strictly. Returns the factors.

    Raises FileNotFoundError or ValueError, which name the file, and leaves the model as it was.
    """
    path, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found. An adapter is adapter_config.json and "
                                    "adapter_model.safetensors")
    try:
        config = _read_config(path)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        stored = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: damaged or truncated ({error})") from None
    factors = add_lora(model, **asdict(config))
    wanted = _tensors(model)
    wrong = sorted(name for name in wanted.keys() | stored.keys() if name not in wanted or
                   name not in stored or wanted[name].shape != stored[name].shape)
    fault = None
    if wrong:
        fault = (f"{len(wrong)} tensors missing, unexpected or of another shape, e.g. "
                 f"{', '.join(wrong[:3])}. Is it an adapter of this base?")
    elif bad := [name for name in wanted if not stored[name].isfinite().all()]:
        fault = f"{bad[0]} holds values that are not finite"
    if fault:
        _unwrap(model, lambda m: m.weight)
        raise ValueError(f"{weights}: {fault}")
    for name, tensor in wanted.items():
        tensor.copy_(stored[name])
    return factors


def _unwrap(model: nn.Module, weight) -> None:
    """Put plain linear maps with weight(m) in the place of the adapted ones."""
    for name, m in _adapted(model).items():
        linear = nn.Linear(m.in_features, m.out_features, bias=False, device="meta")
        linear.weight, linear.bias = weight(m), m.bias
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, linear)


def merge_lora(model: nn.Module) -> None:
    """Replace W by W + scale B A, summed in float32 and stored in W's precision; drop the factors.

    The outcome is another base: a fingerprint of the old one is forgotten.
    """
    def merged(m: LoraLinear) -> nn.Parameter:
        total = m.weight.float() + m.scale * (m.B @ m.A)
        return nn.Parameter(total.to(m.weight.dtype).detach(), requires_grad=False)

    _unwrap(model, merged)
    for part in model.modules():
        if hasattr(part, "fingerprint"):
            part.fingerprint = None
