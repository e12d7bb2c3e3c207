"""Small models, tokenizers and worlds that several test files share."""

import contextlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cetrec import TemporalLlama  # noqa: E402
from data import Tokenizer, make_sequences, split_by_time  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from support.synthetic import SyntheticWorld  # noqa: E402
from support.tiny import TINY_BASES, TinyBase, tiny_tokenizer  # noqa: E402

torch.set_num_threads(1)        # the tensors of these tests are so small that threads only wait

TITLES = ["Heat (1995)", "Toy Story (1995)", 'Say "Cheese", Amélie (2001)',
          "Seven 7 Samurai (1954)", "Jumanji (1995)", "Heat", "Alien³ (1992)", "1984 (1984)",
          "Ran", "Up, Up and Away (2000)", "Ocean's 11 (2001)", "Se7en (1995)",
          "(500) Days of Summer (2009)"]

# This is how Llama 3 splits text before merging. What matters for item spans follows from it.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def small_config(**changes) -> LlamaConfig:
    """A Llama with grouped heads and a head width that is not hidden_size / heads."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
             "max_position_embeddings": 512}
    return LlamaConfig(**(sizes | changes))


def published_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Weights of a closed form, under published names without their prefix. The shapes are written
    out here."""
    V, C, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    H = config["num_attention_heads"]
    G, D = config.get("num_key_value_heads", H), config.get("head_dim", C // H)
    shapes = {"embed_tokens.weight": (V, C), "norm.weight": (C,), "lm_head.weight": (V, C)}
    if config.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{n}.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (G * D, C),
            "self_attn.v_proj": (G * D, C), "self_attn.o_proj": (C, H * D),
            "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C), "mlp.down_proj": (C, inner),
            "input_layernorm": (C,), "post_attention_layernorm": (C,)}.items()}
    tensors = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        n = torch.arange(math.prod(shape), dtype=torch.float64)
        tensors[name] = (0.3 * torch.sin((i + 1) * n ** 1.3 + i)
                         + ("norm" in name)).view(shape).float()
    return tensors


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def llama() -> Llama:
    model = Llama(small_config())
    for p in model.parameters():        # so much larger than at first that differences show
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer(TITLES, np.ones(len(TITLES), dtype=int), "movies", 330)


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Tokenizer:
    """Byte-level BPE with Llama 3's own splitting, so that tokens straddle quotes and titles."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(['"' + '", "'.join(TITLES) + '"\n'] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(bpe, (1,))


@pytest.fixture
def temporal(tokenizer):
    """kind -> a small TemporalLlama for the tokenizer's vocabulary, away from initial values."""
    def build(kind: str = "rope", scale: float = 1.0) -> TemporalLlama:
        torch.manual_seed(1)
        model = Llama(small_config(vocab_size=tokenizer.bpe.get_vocab_size()))
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return TemporalLlama(model, kind, scale).eval()
    return build


@pytest.fixture(scope="session")
def world_splits():
    """(train, valid, test) of a synthetic world of 40 items and 120 users."""
    return split_by_time(make_sequences(SyntheticWorld(items=40).interactions(120)))


@contextlib.contextmanager
def small_runs():
    """Runs on the synthetic world take a second or two here: few users, and a tinier base."""
    draw = SyntheticWorld.interactions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticWorld, "interactions", lambda self, seed: draw(self, 120, seed))
        patch.setitem(TINY_BASES, "synthetic", TinyBase(
            pieces=300, hidden_size=32, intermediate_size=64, max_sequences=64))
        yield patch


@pytest.fixture
def real_data() -> Path:
    """The folder named by CETREC_DATA, which holds ml-100k/ and others as unpacked."""
    folder = Path(os.environ.get("CETREC_DATA", "data"))
    if not (folder / "ml-100k").is_dir():
        pytest.skip("no real data: set CETREC_DATA to the folder that holds ml-100k/ and ml-1m/")
    return folder
