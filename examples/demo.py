"""Paint, read and edit with an untrained miniature, made here and now; a minute on a laptop.

The model has random weights: it shows that everything runs, not what a trained one can do.
"""

from pathlib import Path

import torch

import neounify
from neounify.model import NeoUnify
from neounify.presets import TINY
from neounify.text import byte_tokenizer

OUT = Path("out/demo")


def untrained_miniature() -> neounify.Pipeline:
    """A model of the published architecture with random weights."""
    torch.manual_seed(0)
    return neounify.Pipeline(NeoUnify(TINY).eval(), byte_tokenizer())


def main() -> None:
    print("Untrained miniature: the pictures are noise and the words are gibberish, on purpose.\n")
    OUT.mkdir(parents=True, exist_ok=True)
    untrained_miniature().save(OUT / "model", overwrite=True)
    pipe = neounify.load(OUT / "model")

    prompts = ["a red circle on a blue background", "two green stars"]
    painted = pipe.generate(prompts, width=64, height=64, steps=8, seed=1)
    for number, image in enumerate(painted.images):
        image.save(OUT / f"painted-{number}.png")
        print(f"painted {prompts[number]!r} -> {OUT}/painted-{number}.png")

    question = "what is in the picture?"
    answer = pipe.chat(question, images=[painted.images[0]], max_new_tokens=16)
    print(f"asked {question!r} -> {answer.text!r}")

    edited = pipe.edit("make the circle yellow", painted.images[0], steps=8, seed=2)
    edited.images[0].save(OUT / "edited.png")
    print(f"edited painted-0.png -> {OUT}/edited.png")


if __name__ == "__main__":
    main()
