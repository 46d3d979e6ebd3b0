"""The two loops over the model: text for many sequences, denoising for many images."""
