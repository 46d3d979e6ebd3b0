"""Headings under which `--help` groups the options of most commands."""

MODEL, PAINTING, TEXT, FILES, BATCH, REPORT = (
    "Model",
    "Painting",
    "Text",
    "Output",
    "Batch",
    "Reporting",
)
