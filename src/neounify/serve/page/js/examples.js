/** Things to try. They fit the world of shapes that the bundled model knows. */

import { button, h } from "./dom.js";
import { readPicture } from "./files.js";

const PICTURE = "example.png";

const EXAMPLES = {
  chat: [
    { text: "How many squares are there?", picture: true },
    { text: "What colour is the square?", picture: true },
    { text: "Describe the picture in detail.", picture: true },
  ],
  paint: [
    { text: "a large blue star on a black background" },
    { text: "a green triangle left of a yellow square" },
    { text: "two purple crosses" },
    { text: "top left: a pink star, bottom right: a small orange circle" },
  ],
  edit: [
    { text: "Turn the square red.", picture: true },
    { text: "Remove the triangle.", picture: true },
    { text: "Turn the background black.", picture: true },
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

/** Buttons that fill the composer; `fill(text, pictures)`. */
export function makeExamples(kind, fill) {
  const buttons = EXAMPLES[kind].map(({ text, label, picture }) =>
    button(label ?? text, async () => fill(text, picture ? [await examplePicture()] : []), {
      class: "example",
    }),
  );
  return h(
    "div",
    { class: "examples", role: "group", "aria-label": "Examples" },
    EXAMPLES[kind].some((example) => example.picture)
      ? h("img", { src: PICTURE, alt: "Example picture: a green triangle and a yellow square" })
      : null,
    ...buttons,
  );
}

async function examplePicture() {
  const response = await fetch(PICTURE);
  return readPicture(await response.blob());
}
