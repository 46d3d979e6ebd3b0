/** An answer as it comes: folded thoughts, text, images and videos in their order. */

import { h } from "./dom.js";
import { Tile, imageActions } from "./image.js";
import { alone } from "./requests.js";

export class Answer {
  /** `actions` are those of finished images; `expected` images get their places at once. */
  constructor(record, actions, expected = 0) {
    this.record = record;
    this.actions = actions;
    this.tiles = new Map();
    this.parts = [];
    this.started = false;
    // Places of images have a status of their own.
    const waits = { class: "status", hidden: expected > 0 };
    this.status = h("p", waits, "Waiting for the server");
    this.body = h("div", { class: "answer-body" });
    this.element = h("div", { class: "answer", "aria-busy": "true" }, this.body, this.status);
    for (let index = 0; index < expected; index++) this.tile(index);
  }

  add(event) {
    this.started = true;
    this.status.hidden = true;
    if (event.type === "text") this.addText(event);
    if (event.type === "preview") this.tile(event.index).preview(event);
    if (event.type === "image") this.addImage(event);
    if (event.type === "video") this.addVideo(event);
  }

  /** End the answer; `words` is the status of one that was cut off. */
  end(words = "") {
    this.element.removeAttribute("aria-busy");
    for (const tile of this.tiles.values()) tile.stop(this.tiles.size > 1);
    for (const label of this.body.querySelectorAll(".thought > summary")) {
      label.textContent = "Thought";
    }
    this.status.textContent = words || (this.parts.length ? "" : "The answer is empty.");
    this.status.hidden = !this.status.textContent;
  }

  /** Add buttons below a finished or stopped answer. */
  offer(...elements) {
    this.element.append(h("div", { class: "after" }, ...elements));
  }

  /** As a message of the conversation: text alone as a string, with images as parts. */
  message() {
    const said = this.parts.filter((part) => part.type !== "thought");
    const hasImages = said.some((part) => part.type === "image_url");
    const text = said.map((part) => part.text).join("");
    return { role: "assistant", content: hasImages ? said : text };
  }

  addText({ text, thought }) {
    const type = thought ? "thought" : "text";
    let part = this.parts.at(-1);
    if (part?.type !== type) {
      part = { type, text: "" };
      this.parts.push(part);
      this.block = thought ? this.addThought() : this.addParagraph();
    }
    part.text += text;
    this.block.append(text);
  }

  addParagraph() {
    const block = h("div", { class: "text" });
    this.body.append(block);
    return block;
  }

  addThought() {
    const block = h("div", { class: "text" });
    this.body.append(h("details", { class: "thought" }, h("summary", {}, "Thinking"), block));
    return block;
  }

  addImage({ index, url, seed, plan }) {
    const image = { record: alone(this.record, seed), index, url };
    this.tile(index).finish(url, imageActions(image, this.actions), plan);
    this.parts.push({ type: "image_url", image_url: { url } });
    this.actions.keep(image);
  }

  addVideo(event) {
    const { index, url, still } = event;
    const video = { record: this.record, index, url, still };
    this.tile(index).finishVideo(event, imageActions(video, this.actions));
    this.parts.push({ type: "video", url });
    this.actions.keep(video);
  }

  /** The place of image `index`; images that follow each other stand in one row. */
  tile(index) {
    if (!this.tiles.has(index)) {
      const tile = new Tile(this.record, index);
      this.tiles.set(index, tile);
      let row = this.body.lastElementChild;
      if (!row?.classList.contains("tiles")) {
        row = h("div", { class: "tiles" });
        this.body.append(row);
      }
      row.append(tile.element);
    }
    return this.tiles.get(index);
  }
}
