"""Native unified multimodal models: one transformer that reads, writes, looks and paints."""

__version__ = "0.1.0"
