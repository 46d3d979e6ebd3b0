"""Training data: the sample type that every source yields, and the sources."""

from neounify.data.record import sample_from_record, sample_to_record, write_sample
from neounify.data.sample import TASKS, DataError, ImagePart, Part, Sample, TextPart, Turn

__all__ = [
    "TASKS",
    "DataError",
    "ImagePart",
    "Part",
    "Sample",
    "TextPart",
    "Turn",
    "sample_from_record",
    "sample_to_record",
    "write_sample",
]
