"""Where a base comes from (a folder or the Hugging Face Hub), and the digest that names it."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from llama import Llama, LlamaConfig, tensor_places

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
WEIGHT_FILES = ["model.safetensors.index.json", "model.safetensors", "model-*.safetensors"]


def find_checkpoint(name: str) -> Path:
    """The folder called `name`, or else a snapshot of that Hub repository, fetched if need be.

    The Hub's own environment variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE. Raises ValueError
    if the repository is gated or unknown or cannot be reached; FileNotFoundError or ValueError if
    its config.json asks for what `Llama` does not implement, before any weight is fetched.
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


def fingerprint(folder: str | Path) -> str:
    """A digest of the sizes, of every stored value and of the tokenizer of a checkpoint, the same
    for one file and for shards. It says which base an adapter was tuned on. Raises what load_llama
    raises for files that are absent, damaged or do not fit."""
    config = LlamaConfig.from_folder(folder)
    with torch.device("meta"):
        places = tensor_places(Path(folder), Llama(config))
    digests = {}
    for name, (path, stored) in places.items():
        with safe_open(path, framework="pt") as file:
            values = file.get_tensor(stored).contiguous().view(torch.uint8).numpy()
            digests[name] = hashlib.sha256(values).hexdigest()
    if config.tie_word_embeddings:
        digests.pop("lm_head.weight", None)         # a second copy of embed_tokens
    if (tokenizer := Path(folder) / "tokenizer.json").is_file():
        digests[tokenizer.name] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    description = json.dumps([asdict(config), digests], sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()[:16]
