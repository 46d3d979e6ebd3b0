"""Paint, ask, edit and tell a story with the model of the package; all of it on one page."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from demo_page import Entry, write_page

import neounify
from neounify.bundled import bundled_model
from neounify.pipeline import ImagePart, TextPart
from neounify.scenes.bench import contact_sheet

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
    painted = pipe.generate(list(PROMPTS), seed=7)
    entries = [Entry(p, [i]) for p, i in zip(PROMPTS, painted.images, strict=True)]
    for entry in entries:
        print(f"painted   {entry.asked}")

    for entry in entries[2:4]:
        for question in (*QUESTIONS, DETAIL):
            answer = pipe.chat(question, images=entry.pictures).text
            entry.said.append(f"{question} {answer}")
            print(f"asked     {question} -> {answer}")

    wanted = "Turn the square red."
    edited = pipe.edit(wanted, entries[2].pictures[0], seed=3)
    entries.append(Entry(wanted, [entries[2].pictures[0], edited.images[0]]))
    print(f"edited    {wanted}")

    story = Entry(STORY, [])
    for part in pipe.interleave(STORY, seed=1, max_images=3):
        if isinstance(part, ImagePart):
            story.pictures.append(part.image)
        elif isinstance(part, TextPart):
            story.said.append(part.text)
    story.said = ["".join(story.said).strip()]
    entries.append(story)
    print("told      " + story.said[0].replace("\n", "\n          "))

    pictures = [(picture, entry.asked) for entry in entries for picture in entry.pictures]
    sheet = contact_sheet(
        [np.asarray(p) for p, _ in pictures], [t for _, t in pictures], [True] * len(pictures)
    )
    sheet.save(OUT / "demo.png")
    write_page(entries, OUT / "demo.html")
    print(f"\n{OUT}/demo.html and {OUT}/demo.png, after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
