"""Provenance of generated images: metadata in the file, and an invisible watermark in the pixels.

`metadata` writes and reads facts, `xmp` the packet that all formats share, `watermark` marks
pixels with a number, `payload` is the coding of that number.
"""
