"""Where a base comes from (a folder or the Hugging Face Hub), its tokenizer, and its digest."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
from safetensors import safe_open

from data import Tokenizer
from llama import Llama, LlamaConfig, tensor_places
from support.files import read_object

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


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    Published folders name their special tokens in tokenizer_config.json, or give their ids in
    generation_config.json or config.json; any of these may be absent. Raises FileNotFoundError or
    ValueError that name the file, also if the base has no embedding for some token.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found. A checkpoint folder holds config.json, "
                                "model.safetensors and tokenizer.json")
    model = read_object(path).get("model")
    if isinstance(model, dict) and (model.get("continuing_subword_prefix")
                                    or model.get("end_of_word_suffix")):
        # The library ends the whole process over some of these.
        raise ValueError(f"{path}: words with a prefix or suffix, which no Llama has")
    try:
        bpe = tokenizers.Tokenizer.from_file(str(path))
        bpe.encode("a").ids, bpe.decode([0])        # some faults show only in use
    except Exception as error:      # the library raises nothing more specific
        raise ValueError(f"{path}: not a tokenizer file ({error})") from None
    except BaseException as error:  # ... or panics, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: not a tokenizer file; the tokenizers library fails on it") \
            from None
    bpe.no_truncation()             # the file may hold the settings of somebody's last call
    bpe.no_padding()
    names, generation, config = (
        read_object(file) if (file := path.parent / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"))
    ids = {"bos": [], "eos": [], "pad": []}
    for kind, found in ids.items():
        token = names.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and bpe.token_to_id(token) is not None:
            found.append(bpe.token_to_id(token))
        given = generation.get(f"{kind}_token_id", config.get(f"{kind}_token_id"))
        for value in given if isinstance(given, list) else [given]:
            if type(value) is int and value >= 0:       # older files say -1 for "none"
                found.append(value)
    if not ids["eos"]:
        raise ValueError(f"{path.parent}: no EOS token in tokenizer_config.json, "
                         "generation_config.json or config.json; answers could never end")
    largest = max(*bpe.get_vocab(with_added_tokens=True).values(), *ids["eos"], *ids["bos"])
    rows = config.get("vocab_size")
    if type(rows) is int and largest >= rows:
        raise ValueError(f"{path}: holds token id {largest}, but the embedding has {rows} rows "
                         "(vocab_size in config.json). Is it the tokenizer of another model?")
    return Tokenizer(bpe, tuple(dict.fromkeys(ids["eos"])), next(iter(ids["bos"]), None),
                     (ids["pad"] + ids["eos"])[0])


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
