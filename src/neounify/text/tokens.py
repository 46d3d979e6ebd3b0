"""Special tokens by name, and tokenizer folders: untrusted files become one checked description.

A description is the JSON object that a tokenizer.json holds. A folder with only
vocab.json and merges.txt gets the same description built here, so both layouts
go through one path and give the same ids.
"""

from pathlib import Path
from typing import Any

from neounify.errors import TokenizerError
from neounify.files import parse_json_object, read_bytes

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_OPEN = "<img>"
IMAGE_CLOSE = "</img>"
END_OF_TEXT = "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"

REQUIRED = (IM_START, IM_END, THINK_OPEN, THINK_CLOSE, IMAGE_CONTEXT, IMAGE_OPEN, IMAGE_CLOSE)
"""A tokenizer without all of these cannot drive a model."""

CONTROL = (
    *(IM_START, IM_END, IMAGE_CONTEXT, IMAGE_OPEN, IMAGE_CLOSE, END_OF_TEXT),
    *(VISION_START, VISION_END),
)
"""Tokens that steer the model: typed by a user they must never become the token itself."""

# --- tokenizer folders ---

MAX_FILE_BYTES = 64 * 1024 * 1024
"""Largest tokenizer file that is read, in bytes."""

FILE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The files that belong to a tokenizer; a saved copy holds the ones its source had."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's rule for cutting text into words before the merges."""

USABLE_FOLDER = (
    "a usable folder has tokenizer.json, or vocab.json and merges.txt with the special tokens in "
    "added_tokens.json or in tokenizer_config.json"
)

_MAX_ID = 2**31 - 1
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read_files(folder: Path) -> dict[str, bytes]:
    """Contents of all tokenizer files of `folder`, by name.

    Raises:
        TokenizerError: the folder does not exist, or a file is unreadable or above
            MAX_FILE_BYTES.
    """
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such folder; {USABLE_FOLDER}")
    return {
        name: read_bytes(folder / name, MAX_FILE_BYTES, TokenizerError)
        for name in FILE_NAMES
        if (folder / name).is_file()
    }


def describe(files: dict[str, bytes], folder: Path) -> tuple[dict[str, Any], str]:
    """Tokenizer description of the files of `folder`, and the path of its main file.

    Raises:
        TokenizerError: neither layout is complete, or a file is damaged.
    """
    if "tokenizer.json" in files:
        return parse_object(files, "tokenizer.json", folder), f"{folder / 'tokenizer.json'}"
    missing = [name for name in ("vocab.json", "merges.txt") if name not in files]
    if missing:
        raise TokenizerError(
            f"{folder}: no tokenizer.json and no {' or '.join(missing)}; {USABLE_FOLDER}"
        )
    vocab = parse_object(files, "vocab.json", folder)
    merges = _parse_merges(files["merges.txt"], folder / "merges.txt")
    added = _added_tokens(files, folder)
    return byte_level_description(vocab, merges, added), f"{folder / 'vocab.json'}"


def byte_level_description(
    vocab: dict[str, int], merges: list[list[str]], added_tokens: list[dict[str, Any]]
) -> dict[str, Any]:
    """Description of a tokenizer like Qwen2's: NFC, its split pattern, byte-level BPE.

    Args:
        vocab: byte-level tokens and their ids.
        merges: pairs of tokens, most important first.
        added_tokens: objects with content, id, special and the matching flags.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def added_token(content: str, token_id: int, *, special: bool, **flags: bool) -> dict[str, Any]:
    """Description of one added token; flags default to false."""
    return {
        "id": token_id,
        "content": content,
        **{flag: bool(flags.get(flag, False)) for flag in _FLAGS},
        "special": special,
    }


def settle(description: dict[str, Any], origin: str) -> dict[str, Any]:
    """Checked copy of a description, which this package can rely on.

    The copy never truncates, pads or drops merges at random, its control tokens are
    flagged special, and its added tokens stand in the vocabulary too, which is what
    makes the library keep ids that leave a gap.

    Raises:
        TokenizerError: not a byte-level BPE, malformed tokens, or two tokens of one id.
    """
    model, decoder = description.get("model"), description.get("decoder")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{origin}: the model must be a BPE, got {_type_of(model)}")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"{origin}: the decoder must be ByteLevel, got {_type_of(decoder)}")
    vocab, added = model.get("vocab"), description.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise TokenizerError(
            f"{origin}: the vocabulary must be an object and the added tokens an array, got "
            f"{type(vocab).__name__} and {type(added).__name__}"
        )
    for number, token in enumerate(added):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise TokenizerError(
                f"{origin}: added token {number} must be an object with a content, got "
                f"{str(token)[:80]}"
            )
        if not token["content"]:
            raise TokenizerError(f"{origin}: added token {number} is empty")
    whole = dict(vocab)
    for token in added:
        known = whole.setdefault(token["content"], token.get("id"))
        if known != token.get("id"):
            raise TokenizerError(
                f"{origin}: token {token['content']!r} has two ids, {known} and {token.get('id')}"
            )
    _check_ids(whole, origin)
    return {
        **description,
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {**token, "special": bool(token.get("special")) or token["content"] in CONTROL}
            for token in added
        ],
        "model": {**model, "dropout": None, "vocab": whole},
    }


def parse_object(files: dict[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    """The JSON object in file `name`, an empty one if the file is missing.

    Raises:
        TokenizerError: not UTF-8, not JSON, or not an object.
    """
    if name not in files:
        return {}
    return parse_json_object(files[name], folder / name, TokenizerError)


def _parse_merges(data: bytes, path: Path) -> list[list[str]]:
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 ({error})") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise TokenizerError(f"{path}: line {number} must be two tokens, got {line[:80]!r}")
        merges.append(pair)
    return merges


def _added_tokens(files: dict[str, bytes], folder: Path) -> list[dict[str, Any]]:
    """Added tokens of added_tokens.json and tokenizer_config.json, with flags, by rising id."""
    config = parse_object(files, "tokenizer_config.json", folder)
    named_special = _named_special(config) | _named_special(
        parse_object(files, "special_tokens_map.json", folder)
    )
    tokens = {
        name: added_token(name, token_id, special=name in named_special)
        for name, token_id in parse_object(files, "added_tokens.json", folder).items()
    }
    config_path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{config_path}: added_tokens_decoder must be an object")
    for key, entry in decoder.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"{config_path}: added token {key!r} has no content")
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise TokenizerError(f"{config_path}: added token id {key[:80]!r} is not a number")
        name = entry["content"]
        if name in tokens and tokens[name]["id"] != int(key):
            raise TokenizerError(
                f"{config_path}: token {name!r} has id {key}, "
                f"but {tokens[name]['id']} in added_tokens.json"
            )
        flags = {flag: bool(entry.get(flag, False)) for flag in _FLAGS}
        tokens[name] = added_token(name, int(key), special=bool(entry.get("special")), **flags)
    _check_ids({name: token["id"] for name, token in tokens.items()}, str(folder))
    return sorted(tokens.values(), key=lambda token: token["id"])


def _named_special(config: dict[str, Any]) -> set[str]:
    """Tokens that a config names as special, written as text or as an object."""
    entries = [config.get(key) for key in _NAMED_TOKENS]
    for key in _TOKEN_LISTS:
        value = config.get(key)
        entries += value if isinstance(value, list) else []
    contents = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return {content for content in contents if isinstance(content, str)}


def _check_ids(vocab: dict[str, Any], origin: str) -> None:
    for name, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id <= _MAX_ID:
            raise TokenizerError(
                f"{origin}: token {name[:80]!r} needs an id from 0 to {_MAX_ID}, "
                f"got {str(token_id)[:80]}"
            )
    owners: dict[int, str] = {}
    for name, token_id in vocab.items():
        if owners.setdefault(token_id, name) != name:
            raise TokenizerError(
                f"{origin}: {owners[token_id][:40]!r} and {name[:40]!r} share the id {token_id}"
            )


def _type_of(part: object) -> str:
    """The type that a part of a description names, for errors."""
    return repr(part.get("type"))[:80] if isinstance(part, dict) else str(part)[:80]


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
