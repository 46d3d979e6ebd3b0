/** One image of an answer, from the first preview to the finished thing. */

import { button, h } from "./dom.js";
import { download } from "./files.js";

export class Tile {
  constructor(record, index) {
    this.record = record;
    this.index = index;
    this.image = null;
    this.progress = h("progress", { max: 1, "aria-label": "Progress of the image" });
    this.words = h("span", {}, "Waiting for its turn");
    this.frame = h("div", { class: "frame" });
    this.caption = h("figcaption", {}, this.progress, this.words);
    this.plan = h("div", { class: "text" });
    this.folded = h(
      "details",
      { class: "thought", hidden: true },
      h("summary", {}, "Thought"),
      this.plan,
    );
    this.element = h(
      "figure",
      { class: "tile", "data-state": "waiting" },
      this.frame,
      this.caption,
      this.folded,
    );
  }

  preview({ step, steps, url, plan }) {
    this.element.dataset.state = "generating";
    this.show(url, `Preview of: ${this.record.prompt}`, plan);
    this.progress.max = steps;
    this.progress.value = step;
    this.words.textContent = `Step ${step} of ${steps}`;
  }

  /** `actions` are buttons for the finished image. */
  finish(url, actions, plan) {
    this.element.dataset.state = "finished";
    this.show(url, this.record.prompt, plan);
    this.caption.replaceChildren(...actions);
  }

  /** No more will come; `named` says so at this image, where it is one of several. */
  stop(named) {
    if (this.element.dataset.state === "finished") return;
    this.element.dataset.state = "stopped";
    const reached = this.image ? ` (${this.words.textContent.toLowerCase()})` : "";
    this.caption.replaceChildren(named || this.image ? `Not finished${reached}` : "");
    if (!this.image && !named) this.element.hidden = true;
  }

  show(url, alt, plan = "") {
    if (!this.image) this.frame.append((this.image = h("img")));
    this.image.src = url;
    this.image.alt = alt;
    this.plan.textContent = plan;
    this.folded.hidden = plan === "";
  }
}

/** The buttons of a finished image; `actions` has `again(record)` and `edit(url)`. */
export function imageActions({ record, index, url }, actions) {
  const stem = `neounify-${record.kind}-seed-${record.options.seed}-${index + 1}`;
  return [
    button("Download", () => download(url, stem), { class: "small-button" }),
    button("Regenerate", () => actions.again(record), { class: "small-button" }),
    button("Edit this", () => actions.edit(url), { class: "small-button" }),
  ];
}
