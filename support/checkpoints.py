"""Checkpoint folders of base models: where they come from, whether they are sound, their digest.

llama.py reads a sound folder, and refuses by name what its forward does not implement. Damaged or
absurd folders are found here, before anything is loaded.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data import Sequences, Tokenizer, encode_sequences
from llama import Llama, LlamaConfig, find_tensors, read_tensor
from support.files import read_object

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "model.safetensors.index.json", "model.safetensors", "model-*.safetensors"]
WEB_PAGE = "something else came, perhaps the page of a network that wants a log-in first"


def find_checkpoint(name: str) -> Path:
    """The folder called `name`, or else a snapshot of that Hub repository, fetched if need be.

    The Hub's own environment variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE. Raises ValueError
    if the repository is gated or unknown or cannot be reached; FileNotFoundError or ValueError if
    its config.json asks for what `Llama` does not implement, before any weight is fetched.
    """
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        return Path(name)
    from huggingface_hub import constants, hf_hub_download, model_info, try_to_load_from_cache
    revision, seconds = "main", constants.HF_HUB_ETAG_TIMEOUT
    try:        # a request without a time limit would wait for ever
        info = ask(model_info, name, "the list of its files", revision=revision, timeout=seconds)
    except ValueError:
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise
        print(f"{name}: the Hub does not list its files; taking what its cache has in "
              f"{Path(cached).parent}")
        return Path(cached).parent
    names = [file.rfilename for file in info.siblings or ()]
    require("config.json" in names, f"{name}: has no config.json, so it is not a checkpoint folder")
    wanted = [f for pattern in FILES for f in names if fnmatch(f, pattern)]
    for file in tqdm(wanted, desc=name, unit="file", leave=False):
        path = Path(ask(hf_hub_download, name, file, filename=file, revision=revision))
        with open(path, "rb") as fetched:
            page = fetched.read(1_000).lstrip()[:5].lower() in (b"<!doc", b"<html")
        if page:
            path.unlink()           # or it would be taken for the file the next time
            raise ValueError(f"{name}: {constants.ENDPOINT} was asked for {file}: {WEB_PAGE}")
        if file == "config.json":
            check_config(path.parent)
        revision = path.parent.name                     # the commit: all files are of the same one
    return path.parent


def ask(request: Callable, name: str, what: str, **settings):
    """What the Hub answers about a repository. Raises ValueError for whatever goes wrong."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    try:
        return request(name, **settings)
    except GatedRepoError:
        raise ValueError(
            f"{name}: a gated repository. Accept its terms at https://huggingface.co/{name}, then "
            "log in with `hf auth login` or set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: neither a folder here nor a repository on the Hub. Check the spelling; for a "
            "private one log in with `hf auth login` or set HF_TOKEN") from None
    except Exception as error:      # the library's, its HTTP library's or the system's
        cause = error.__cause__ or error
        page = isinstance(cause, json.JSONDecodeError)
        reason = (WEB_PAGE if page else str(cause).strip() or repr(cause)).splitlines()[0]
        raise ValueError(
            f"{name}: no folder here, not complete in the Hub's cache, and the Hub cannot be "
            f"reached ({ENDPOINT} was asked for {what}: {reason}). Connect, log in, unset "
            "HF_HUB_OFFLINE, or pass a folder. Files that are whole are kept") from None


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
        bpe = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        bpe.encode("a").ids, bpe.decode([0])        # some faults show only in use
    except BaseException as error:  # the library raises nothing more specific, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: not a tokenizer file ({error})") from None
    bpe.no_truncation()             # the file may hold the settings of somebody's last call
    bpe.no_padding()
    whole, text = (bpe.encode("a", add_special_tokens=special) for special in (True, False))
    require(bool(text.ids) and whole.ids[-len(text.ids):] == text.ids,
            f"{path}: it turns 'a' into {whole.tokens}. Its post_processor may add BOS before a "
            "text, but nothing after it, where the answer goes; EOS is added to the answers here")
    names, generation, config = (
        read_object(file) if (file := path.parent / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"))
    ids = {"bos": [], "eos": [], "pad": []}
    for kind, found in ids.items():
        token = names.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and bpe.token_to_id(token) is not None:
            found.append(bpe.token_to_id(token))
        stored = generation.get(f"{kind}_token_id", config.get(f"{kind}_token_id"))
        for value in stored if isinstance(stored, list) else [stored]:
            if type(value) is int and value >= 0:       # older files say -1 for "none"
                found.append(value)
    if not ids["eos"]:
        raise ValueError(f"{path.parent}: no EOS token in tokenizer_config.json, "
                         "generation_config.json or config.json; answers could never end")
    largest = max(*bpe.get_vocab(with_added_tokens=True).values(), *ids["eos"], *ids["bos"],
                  *whole.ids)
    rows = config.get("vocab_size") if type(config.get("vocab_size")) is int else math.inf
    if largest >= rows:
        where = " before every text (post_processor)" if largest in whole.ids else ""
        raise ValueError(f"{path}: holds token id {largest}{where}, but the embedding has {rows} "
                         "rows (vocab_size in config.json). Is it the tokenizer of another model?")
    pad_id = next(i for i in ids["pad"] + ids["eos"] if i < rows)       # some are out of range
    return Tokenizer(bpe, tuple(dict.fromkeys(ids["eos"])), next(iter(ids["bos"]), None), pad_id)


def require(condition: bool, fault: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(fault)


def positive(value) -> bool:
    """Is it a number that could be a size, a factor or a frequency?"""
    return type(value) in (int, float) and 0 < value < 1e18


def check_config(folder: str | Path) -> LlamaConfig:
    """The configuration in a checkpoint folder.

    Raises FileNotFoundError, or a ValueError that names the file and what is wrong with it.
    """
    path = Path(folder) / "config.json"
    try:
        config = LlamaConfig.from_folder(folder)
        for f in fields(config):
            value = getattr(config, f.name)
            sound, expected = {
                int: (type(value) is int and 0 < value < 10**8, "a positive integer below 10^8"),
                float: (positive(value), "a positive number"),
                bool: (type(value) is bool, "true or false")}.get(f.type, (True, ""))
            require(sound, f"{f.name} is {value!r}; wanted {expected}")
        H, G, L = (config.num_attention_heads, config.num_key_value_heads,
                   config.num_hidden_layers)
        require(L <= 1_000, f"num_hidden_layers is {L}; the deepest Llama has 126")
        require(H % G == 0, f"{H} query heads cannot share {G} key/value heads evenly")
        require(config.head_dim % 2 == 0,
                f"head_dim is {config.head_dim}; rotary embeddings want an even width")
        if s := config.rope_scaling:
            for key in ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings"):
                require(positive(s.get(key)), f"rope scaling 'llama3': {key} is {s.get(key)!r}; "
                        "wanted a positive number")
            require(s["low_freq_factor"] < s["high_freq_factor"],
                    "rope scaling 'llama3': low_freq_factor is not below high_freq_factor")
        return config
    except FileNotFoundError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not the settings of a Llama ({error})") from None


def check_index(folder: Path) -> None:
    """Raise ValueError if an index of shards is damaged, or names files outside its folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        require(bool(names) and all(Path(name).name == name for name in names),
                "names other places")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of files in this folder ({error})") from None


def check_checkpoint(folder: str | Path) -> str:
    """Read every file of a checkpoint folder once. Returns its digest.

    The digest is of the sizes, of every stored value and of the tokenizer; it is the same for one
    file and for shards. It says which base model an adapter was tuned on. Raises FileNotFoundError
    or ValueError for files that are absent or damaged, for tensors that do not fit config.json, and
    for values that are not finite.
    """
    folder, config = Path(folder), check_config(folder)
    check_index(folder)
    with torch.device("meta"):
        model = Llama(config)
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated ({error}). Fetch it again") from None
    for name, (path, stored) in find_tensors(folder, model).items():
        value = read_tensor(path, stored)
        require(bool(torch.stack(value.aminmax()).isfinite().all()),
                f"{path}: {stored} holds values that are not finite")
        digests[name] = hashlib.sha256(
            value.contiguous().view(torch.uint8).numpy()).hexdigest()
    if config.tie_word_embeddings:                  # some files store the tied matrix twice
        second = digests.pop("lm_head.weight", None)
        require(second in (None, digests["embed_tokens.weight"]),
                f"{folder}: config.json ties lm_head to embed_tokens, but the files hold different "
                "values for them. Which is right?")
    if (tokenizer := folder / "tokenizer.json").is_file():
        digests[tokenizer.name] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    description = json.dumps([asdict(config), digests], sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()[:16]


def check_context(tokenizer: Tokenizer, sequences: Sequences, context: int) -> None:
    """Raise ValueError if the longest sequence does not fit a context of so many tokens."""
    width = np.array([len(e.ids) for e in tokenizer.bpe.encode_batch(sequences.titles)])
    total = np.concatenate(([0], width[sequences.items].cumsum()))
    i = int(np.argmax(total[sequences.targets + 1] - total[sequences.starts]))
    longest = sequences.select(slice(i, i + 1))
    tokens = len(encode_sequences(tokenizer, longest)[0].tokens)
    if tokens > context:
        history = longest.titles_of(longest.history(0))
        raise ValueError(f"a history of {len(history)} items, {history[0][:60]!r} to "
                         f"{history[-1][:60]!r}, makes {tokens} tokens with its answer, more than "
                         f"the base's context of {context}. Use a base with a longer context, or "
                         "shorten the titles")
