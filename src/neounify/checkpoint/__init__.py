"""Checkpoint folders of the published layout: opened, checked, loaded, saved, summarised."""

from neounify.checkpoint.config_json import read_config, write_config
from neounify.checkpoint.dtypes import Dtype, DtypeChoice, choose_dtype, stored_dtype
from neounify.checkpoint.load import (
    LoadedCheckpoint,
    expected_shapes,
    load_checkpoint,
    load_model,
    resolve_device,
)
from neounify.checkpoint.lora_file import LoraSpec
from neounify.checkpoint.mapped import MappedFile, TensorInfo
from neounify.checkpoint.names import from_published, part_of, stream_of, to_published
from neounify.checkpoint.reader import CheckpointFolder, Summary, SummaryRow, summarise
from neounify.checkpoint.residency import NullResidency, Residency, StreamResidency
from neounify.checkpoint.save import save_model
from neounify.deprecation import moved

__all__ = [
    "CheckpointFolder",
    "Dtype",
    "DtypeChoice",
    "LoadedCheckpoint",
    "LoraSpec",
    "MappedFile",
    "NullResidency",
    "Residency",
    "StreamResidency",
    "Summary",
    "SummaryRow",
    "TensorInfo",
    "choose_dtype",
    "expected_shapes",
    "from_published",
    "load_checkpoint",
    "load_model",
    "part_of",
    "read_config",
    "resolve_device",
    "save_model",
    "stored_dtype",
    "stream_of",
    "summarise",
    "to_published",
    "write_config",
]

__getattr__ = moved(__name__, "neounify.checkpoint.load", {"Loaded": "LoadedCheckpoint"})
