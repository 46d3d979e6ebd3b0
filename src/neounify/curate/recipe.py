"""Recipe of a curation: its sources and the settings of its stages, as a TOML file.

    name = "mine"
    [[sources]]
    name = "web"
    kind = "jsonl"
    path = "web.jsonl"
    [stages.quality]
    min_sharpness = 60.0

Every stage has defaults, `enabled = false` leaves one out; stages that need a hook or a model run
once the recipe names it. Bounds are inclusive: a value that equals one is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from neounify.config.ranges import (
    STRICT,
    Count,
    Finite,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Range,
    Seed,
    check_names,
)
from neounify.data.configs import FileData, read_data
from neounify.errors import NeounifyError
from neounify.files import read_text
from neounify.plugins import NAME

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_RECIPE_BYTES = 2**18
MAX_NAME_CHARS = 64

Role = Literal["input", "target"]
BOTH: tuple[Role, ...] = ("input", "target")
TARGETS: tuple[Role, ...] = ("target",)


class CurateError(NeounifyError, ValueError):
    """A curation cannot be run: its recipe, its input, a hook or its output folder is at fault."""


def _hook_name(name: str | None) -> str | None:
    if name is not None and not NAME.fullmatch(name):
        raise ValueError(f"{name!r} does not name a hook; write package.module:name")
    return name


def _data(value: Any) -> FileData:
    data = read_data(value)
    if not isinstance(data, FileData):
        raise ValueError(f'data of kind "{data.kind}" is generated, not read; it cannot be curated')
    return data


HookName = Annotated[str | None, AfterValidator(_hook_name)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stage:
    """Settings that all stages have. A disabled stage neither measures nor drops."""

    enabled: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageStage(Stage):
    """A stage of images; `on` are the roles that it looks at."""

    on: tuple[Role, ...] = BOTH

    def __post_init__(self) -> None:
        if not self.on or len(set(self.on)) != len(self.on):
            raise ValueError(f'on: must be ["input"], ["target"] or both, got {list(self.on)}')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Readable(Stage):
    """1: images are decoded to their end; bounds of pixels and of bytes of a file."""

    max_pixels: Count = 100_000_000
    max_bytes: Count = 64_000_000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Known(Stage):
    """2: known bad images: files of SHA-256 and of perceptual hashes, one in hex a line."""

    sha256: str | None = None
    hashes: str | None = None
    distance: NonNegativeInt = 31


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Geometry(ImageStage):
    """3: the short side in pixels, and the long one over it."""

    min_side: Count = 256
    max_aspect: Annotated[float, AfterValidator(Range(1))] = 3.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Quality(ImageStage):
    """4: variance of the Laplacian, entropy in bits, mean luma, share of a one-colour border."""

    on: tuple[Role, ...] = TARGETS
    min_sharpness: NonNegative = 100.0
    min_entropy: NonNegative = 4.0
    min_luma: NonNegative = 10.0
    max_luma: NonNegative = 245.0
    max_border: Fraction = 0.3


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Exact(ImageStage):
    """5: the same pixels."""

    on: tuple[Role, ...] = TARGETS


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Near(ImageStage):
    """6: hashes that differ in at most `distance` of 256 bits, of images with a sound hash.

    `probe` = 1 finds all pairs up to a distance of 31, 0 is cheaper and misses a tenth of those
    at 31. `stored` are tables of earlier curations, whose kept images come before all others.
    """

    on: tuple[Role, ...] = TARGETS
    distance: Annotated[int, AfterValidator(Range(0, 31))] = 31
    min_quality: Annotated[int, AfterValidator(Range(0, 100))] = 50
    probe: Literal[0, 1] = 1
    stored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Text(Stage):
    """7: length, and similarity to other texts; the other measures have no bound by default."""

    min_words: NonNegativeInt = 2
    min_characters: NonNegativeInt = 5
    similarity: Fraction = 0.72
    languages: tuple[str, ...] | None = None
    max_repetition: Fraction | None = None
    max_urls: NonNegativeInt | None = None
    drop_file_names: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluation(Stage):
    """13: data that models are evaluated on; whatever is like it by stages 6 and 7 is dropped."""

    sets: tuple[Annotated[FileData, PlainValidator(_data)], ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HookStage(ImageStage):
    """A stage whose values come from a hook, called with batches of `batch` images.

    A call that takes longer than `timeout` seconds counts as failed.
    """

    hook: HookName = None
    batch: Count = 32
    timeout: Positive = 300.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Safety(HookStage):
    """8: scores of classes. A score of `bound` or more drops a sample, of a class in `never` any.

    Samples with a class in `never` are treated as known bad ones.
    """

    bound: Positive = 0.5
    never: tuple[str, ...] = ("minor_nudity",)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Watermark(HookStage):
    """9: a score of `bound` or more drops a sample."""

    on: tuple[Role, ...] = TARGETS
    bound: Positive = 0.5


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Beauty(HookStage):
    """9: a score, of 10 in the original, below `bound` drops a sample."""

    on: tuple[Role, ...] = TARGETS
    bound: Finite = 4.5


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Match(HookStage):
    """10: cosine of image and text; below `bound` dropped, below `recaption` captioned anew."""

    on: tuple[Role, ...] = TARGETS
    bound: Finite = 0.15
    recaption: Finite = 0.25


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Embeddings(HookStage):
    """11: vectors, compared inside each of `clusters`; a cosine of `bound` or more is a copy."""

    on: tuple[Role, ...] = TARGETS
    bound: Fraction = 0.75
    clusters: NonNegativeInt = 0
    """0: one for every 1,000 vectors."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Captions(Stage):
    """12: captions of a target by a checkpoint; the best replaces `share` of the old ones.

    `of` "low" captions samples that stage 10 found below `recaption`, "all" every one. Captions
    are scored by the hook of stage 10 if there is one, or else by the model's likelihood of the
    caption given the image against that without it.
    """

    model: str | None = None
    of: Literal["low", "all"] = "all"
    share: Fraction = 0.95
    short_question: str = "Describe the image briefly."
    full_question: str = "Describe the image in detail."
    short_tokens: Count = 48
    full_tokens: Count = 128
    device: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stages:
    """The stages in the order in which they run: 13 needs hashes alone, so it precedes hooks."""

    readable: Readable = field(default_factory=Readable)
    known: Known = field(default_factory=Known)
    geometry: Geometry = field(default_factory=Geometry)
    quality: Quality = field(default_factory=Quality)
    exact: Exact = field(default_factory=Exact)
    near: Near = field(default_factory=Near)
    text: Text = field(default_factory=Text)
    evaluation: Evaluation = field(default_factory=Evaluation)
    safety: Safety = field(default_factory=Safety)
    watermark: Watermark = field(default_factory=Watermark)
    beauty: Beauty = field(default_factory=Beauty)
    match: Match = field(default_factory=Match)
    embeddings: Embeddings = field(default_factory=Embeddings)
    captions: Captions = field(default_factory=Captions)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """Data by name; earlier ones of a recipe keep their copy where all else is equal."""

    name: str
    data: FileData


def _source(value: Any) -> Source:
    if isinstance(value, Source):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("must be a table with a name, a kind and a path")
    rest = {key: item for key, item in value.items() if key != "name"}
    data = _data({"kind": "jsonl", **rest})
    name = value.get("name", Path(data.path).stem)
    if not isinstance(name, str) or not _is_name(name):
        raise ValueError(
            f"name: {name!r:.80} cannot name a source; use letters, digits, - and _ "
            f"(up to {MAX_NAME_CHARS})"
        )
    return Source(name=name, data=data)


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_CHARS and name.replace("-", "").replace("_", "").isalnum()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CurateRecipe:
    """A curation. `samples_per_unit` samples are one task of a worker and one shard of output.

    `measure` "first" ends a sample at its first reason, "all" measures everything, so that other
    bounds can be tried on the table. `max_unreadable` is the share of a source above which the
    run fails. `folder` is that of the recipe's file, where hooks are looked for.
    """

    sources: tuple[Annotated[Source, PlainValidator(_source)], ...]
    name: str = "curated"
    measure: Literal["first", "all"] = "first"
    samples_per_unit: Count = 1000
    max_unreadable: Fraction = 0.5
    seed: Seed = 0
    stages: Stages = field(default_factory=Stages)
    folder: Path | None = None

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a recipe needs sources with different names, got {names}")
        if not _is_name(self.name):
            raise ValueError(f"name: {self.name[:80]!r} cannot name the folder of a curation")


def read_curate_recipe(path: Path) -> CurateRecipe:
    """Read a TOML recipe. Raises CurateError that names the file and the field."""
    try:
        table = tomllib.loads(read_text(path, MAX_RECIPE_BYTES, CurateError))
        return recipe_from_table(table, path.parent)
    except tomllib.TOMLDecodeError as error:
        raise CurateError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise CurateError(f"{path} is nested too deeply") from error
    except CurateError as error:
        text = str(error)
        raise CurateError(text if str(path) in text else f"{path}: {text}") from error


def recipe_from_table(table: Mapping[str, Any], folder: Path | None = None) -> CurateRecipe:
    """A recipe from parsed TOML. Raises CurateError."""
    values = {**table, "folder": None if folder is None else str(folder)}
    try:
        check_names("recipe", table, [*CurateRecipe.__dataclass_fields__][:-1], "field")
        # As JSON, so that strict validation takes lists for tuples but no text for numbers.
        return TypeAdapter(CurateRecipe).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise CurateError("; ".join(_explain(item) for item in error.errors()[:5])) from error
    except ValueError as error:
        raise CurateError(str(error)) from error


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "unexpected_keyword_argument":
        return f"{where} is not a field of a recipe of curation"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] in ("value_error", "missing") else f", got {item['input']!r:.60}"
    return f"{where}: {message}{got}"
