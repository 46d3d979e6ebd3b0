"""Settings of data sources as recipes hold them, and the table of formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from neounify.config.ranges import STRICT, Fraction, Positive, check_names, read_kind
from neounify.data.forms import FORMS
from neounify.data.records import TASK_ALIASES, RecordRules
from neounify.data.sample import TASKS, ClipReading, DataError

if TYPE_CHECKING:
    from neounify.data.sources import SampleSource

FORMATS = {
    "scenes": "neounify.scenes.world.samples:SceneData",
    "motion": "neounify.motion.world.samples:MotionData",
    "jsonl": "neounify.data.sources:JsonlData",
    "json": "neounify.data.arrays:JsonData",
    "csv": "neounify.data.tables:CsvData",
    "parquet": "neounify.data.parquet:ParquetData",
    "captions": "neounify.data.folders:CaptionData",
    "shards": "neounify.data.shards:ShardData",
    "llama_factory": "neounify.data.llama_factory:LlamaFactoryData",
}
"""The `DataConfig` of every kind of data, as "module:class"; imported when a recipe names it."""
DEFAULT_FORMAT = "scenes"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig(ABC):
    """The settings of one source of a stage, as an item of a recipe's `data` holds them.

    Its `kind` is its name in `FORMATS`. A mixture draws from it in proportion to `weight`.
    """

    kind: str
    weight: Positive = 1.0

    @abstractmethod
    def build(self) -> SampleSource:
        """The source. Raises DataError for data that cannot be read."""

    def unseen(self, seed: int) -> SampleSource | None:
        """Endless samples of the same world from another seed, for a tokenizer; None for files."""
        return None

    def tasks_drawn(self) -> Collection[str]:
        """Tasks that its samples may have."""
        return TASKS

    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of all its images; none where they are of any size."""
        return []


def read_data(value: Any) -> DataConfig:
    """An item of a recipe's `data` by its `kind`; a config is taken as it is. Raises ValueError."""
    if isinstance(value, DataConfig):
        return value
    config: DataConfig = read_kind(value, FORMATS, DEFAULT_FORMAT, "data")
    return config


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FileData(DataConfig):
    """Files of samples.

    `task` overrides what the records say; `form` is the only form that they may have, by default
    each record's fields tell; `ignore` names fields of records that are not to be read; `clips`
    says which frames of video files are read; `colour_profiles = false` takes all pixels for sRGB,
    as the published code does. Above a share of `max_skipped` of the samples that cannot be used,
    training ends with an error.
    """

    path: str = ""
    task: str | None = None
    form: str | None = None
    ignore: tuple[str, ...] = ()
    clips: ClipReading = field(default_factory=ClipReading)
    colour_profiles: bool = True
    max_skipped: Fraction = 1.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f'data of kind "{self.kind}" needs a path')
        if self.task is not None:
            check_names("task", [self.task], (*TASKS, *TASK_ALIASES), "task")
        if self.form is not None:
            check_names("form", [self.form], FORMS, "form")

    def tasks_drawn(self) -> Collection[str]:
        return TASKS if self.task is None else (self.task,)

    @property
    def rules(self) -> RecordRules:
        """Rules for the records of one source."""
        return RecordRules(task=self.task, form=self.form, ignored=self.ignore, clips=self.clips)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecordData(FileData):
    """Files of records that name files of images and clips.

    Their paths are relative to `images` and must stay below it, by default the folder of each file
    of records.
    """

    images: str | None = None

    @property
    def image_folder(self) -> Path | None:
        """`images`, if it is there. Raises DataError."""
        if self.images is None:
            return None
        if not Path(self.images).is_dir():
            raise DataError(f"the folder of images {self.images} is not there")
        return Path(self.images)
