"""Training data: the sample type that every source yields, and the sources."""

from neounify.data.records import RecordRules, sample_from_record, sample_to_record
from neounify.data.sample import TASKS, DataError, Part, Sample, SampleImage, SampleText, Turn

__all__ = [
    "TASKS",
    "DataError",
    "Part",
    "RecordRules",
    "Sample",
    "SampleImage",
    "SampleText",
    "Turn",
    "sample_from_record",
    "sample_to_record",
]
