/** Example prompts for the scenes of shapes that the bundled model was trained on. */

import { button, h } from "./dom.js";
import { readMedia } from "./files.js";

const IMAGE = "example.png";

const EXAMPLES = {
  chat: [
    { text: "How many squares are there?", image: true },
    { text: "What colour is the square?", image: true },
    { text: "Describe the picture in detail.", image: true },
  ],
  generate: [
    { text: "a large blue star on a black background" },
    { text: "a green triangle left of a yellow square" },
    { text: "two purple crosses" },
    { text: "top left: a pink star, bottom right: a small orange circle" },
  ],
  video: [
    { text: "A red circle moves to the right." },
    { text: "A green star grows, on a black background." },
    { text: "A blue square bounces off the edge." },
  ],
  edit: [
    { text: "Turn the square red.", image: true },
    { text: "Remove the triangle.", image: true },
    { text: "Turn the background black.", image: true },
  ],
  story: [
    {
      text:
        "Tell a story in three pictures. It starts with a red circle in the top left on a white " +
        "background. Draw a blue star in the bottom right. Turn the red circle green.",
      label: "A circle meets a star",
    },
    { text: "Tell a story in two pictures. It starts with a yellow star.", label: "A yellow star" },
  ],
};

/** Buttons that fill the composer; `fill(text, images)`. */
export function makeExamples(kind, fill) {
  const buttons = EXAMPLES[kind].map(({ text, label, image }) =>
    button(label ?? text, async () => fill(text, image ? [await exampleImage()] : []), {
      class: "example",
    }),
  );
  return h(
    "div",
    { class: "examples", role: "group", "aria-label": "Examples" },
    EXAMPLES[kind].some((example) => example.image)
      ? h("img", { src: IMAGE, alt: "Example image: a green triangle and a yellow square" })
      : null,
    ...buttons,
  );
}

async function exampleImage() {
  const response = await fetch(IMAGE);
  return readMedia(await response.blob());
}
