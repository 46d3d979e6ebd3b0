"""Text to image, questions, an edit and a story with the bundled model, on one HTML page."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from demo_page import Entry, write_page

import neounify
from neounify.bundled import bundled_model
from neounify.image.contact_sheet import contact_sheet
from neounify.pipeline import ImagePart, TextPart

OUT = Path("out/demo")
PROMPTS = (
    "a red circle",
    "a large blue star on a black background",
    "a green triangle left of a yellow square",
    "two purple crosses",
    "top left: a pink star, bottom right: a small orange circle",
    "a small cyan square above a large red triangle on a grey background",
)
QUESTIONS = ("How many objects are there?", "What colour is the background?")
DETAIL = "Describe the picture in detail."
STORY = (
    "Tell a story in three pictures. It starts with a red circle in the top left on a white "
    "background. Draw a blue star in the bottom right. Make the background grey."
)


def main() -> None:
    started = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    pipe = neounify.load(bundled_model(), dtype="float32")
    result = pipe.generate(list(PROMPTS), seed=7)
    entries = [Entry(p, [i]) for p, i in zip(PROMPTS, result.images, strict=True)]
    for entry in entries:
        print(f"generated  {entry.prompt}")

    for entry in entries[2:4]:
        for question in (*QUESTIONS, DETAIL):
            answer = pipe.chat(question, images=entry.images).text
            entry.texts.append(f"{question} {answer}")
            print(f"asked      {question} -> {answer}")

    instruction = "Turn the square red."
    edited = pipe.edit(instruction, entries[2].images[0], seed=3)
    entries.append(Entry(instruction, [entries[2].images[0], edited.images[0]]))
    print(f"edited     {instruction}")

    story = Entry(STORY, [])
    for part in pipe.interleave(STORY, seed=1, max_images=3):
        if isinstance(part, ImagePart):
            story.images.append(part.image)
        elif isinstance(part, TextPart):
            story.texts.append(part.text)
    story.texts = ["".join(story.texts).strip()]
    entries.append(story)
    print("story      " + story.texts[0].replace("\n", "\n           "))

    images = [np.asarray(image) for entry in entries for image in entry.images]
    prompts = [entry.prompt for entry in entries for _ in entry.images]
    sheet = contact_sheet(images, prompts, [True] * len(images))
    sheet.save(OUT / "demo.png")
    write_page(entries, OUT / "demo.html")
    print(f"\n{OUT}/demo.html and {OUT}/demo.png, after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
