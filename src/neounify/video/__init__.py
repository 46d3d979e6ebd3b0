"""Video clips: encoding, untrusted files, choice of frames.

Importing it imports neither torch nor FFmpeg: files are decoded in processes that need no torch.
"""
