"""Many devices, by torch's own engine: ranks, meshes, sharding, owners of matrices.

It knows the model's parts by name and is applied from outside; the model knows nothing of it.
"""
