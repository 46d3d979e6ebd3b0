/** The images and videos of this session, each with its request. */

import { button, h } from "./dom.js";
import { imageActions, player } from "./image.js";

const MODES = { chat: "Chat", generate: "Generate", video: "Video", edit: "Edit", story: "Story" };

export class Gallery {
  constructor(section, viewer, settings, actions) {
    this.section = section;
    this.viewer = viewer;
    this.settings = settings;
    this.actions = actions;
    this.list = h("ul", { class: "thumbs" });
    this.empty = h(
      "p",
      { class: "hint" },
      "What is generated appears here, and stays until this page is closed or reloaded.",
    );
    section.append(
      h(
        "div",
        { class: "sheet-head" },
        h("h2", { id: "gallery-title" }, "Gallery"),
        button("Close", () => section.hidePopover(), { class: "quiet sheet-close" }),
      ),
      this.empty,
      this.list,
    );
    viewer.addEventListener("click", (event) => {
      if (event.target === viewer) viewer.close();
    });
    // A video would play on, unseen.
    viewer.addEventListener("close", () => viewer.replaceChildren());
  }

  add(image) {
    const { prompt, options } = image.record;
    this.empty.hidden = true;
    const label = `${prompt}, seed ${options.seed}`;
    const props = { type: "button", "aria-label": label, title: label };
    const thumb = h("button", { ...props, on: { click: () => this.open(image) } });
    thumb.append(h("img", { src: image.still ?? image.url, alt: "" }));
    if (image.still) thumb.classList.add("clip");
    this.list.prepend(h("li", {}, thumb));
  }

  open(image) {
    const { record, url, still } = image;
    const actions = imageActions(image, {
      again: (again) => this.leave(() => this.actions.again(again)),
      edit: (edited) => this.leave(() => this.actions.edit(edited)),
      edits: this.actions.edits,
    });
    const close = button("Close", () => this.viewer.close(), { class: "quiet small-button" });
    this.viewer.replaceChildren(
      h(
        "div",
        { class: "frame" },
        still ? player(url, still, record.prompt) : h("img", { src: url, alt: record.prompt }),
      ),
      h(
        "div",
        { class: "facts" },
        h("header", {}, h("p", { class: "prompt" }, record.prompt), close),
        makeFacts([["Mode", MODES[record.kind]], ...this.settings.facts(record)]),
        h("div", { class: "buttons" }, ...actions),
      ),
    );
    this.viewer.showModal();
  }

  leave(action) {
    this.viewer.close();
    action();
  }
}

function makeFacts(facts) {
  const items = facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, show(value))]);
  return h("dl", {}, ...items);
}

function show(value) {
  return value === true ? "yes" : [value].flat().join(", ");
}
