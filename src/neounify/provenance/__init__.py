"""Provenance of generated images.

`metadata` writes and reads facts in image files (XMP, text chunks); `watermark` marks pixels.
"""
