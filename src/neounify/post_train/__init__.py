"""Post-training: reinforcement learning, few-step distillation, merging of experts.

Each method is one file: its loss with the source of its formula, and the `Method` that the trainer
runs (`neounify.train.method`).
"""
