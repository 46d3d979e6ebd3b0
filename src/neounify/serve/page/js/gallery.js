/** The pictures of this session, each with what it was made from. */

import { button, h } from "./dom.js";
import { pictureActions } from "./picture.js";

const MODES = { chat: "Chat", paint: "Paint", edit: "Edit", story: "Story" };

export class Gallery {
  constructor(section, viewer, settings, deeds) {
    this.section = section;
    this.viewer = viewer;
    this.settings = settings;
    this.deeds = deeds;
    this.list = h("ul", { class: "thumbs" });
    this.empty = h(
      "p",
      { class: "hint" },
      "Pictures appear here as they are made, and stay until this page is closed or reloaded.",
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
  }

  add(picture) {
    const { prompt, options } = picture.record;
    this.empty.hidden = true;
    const label = `${prompt}, seed ${options.seed}`;
    const props = { type: "button", "aria-label": label, title: label };
    const thumb = h("button", { ...props, on: { click: () => this.open(picture) } });
    thumb.append(h("img", { src: picture.url, alt: "" }));
    this.list.prepend(h("li", {}, thumb));
  }

  open(picture) {
    const { record, url } = picture;
    const actions = pictureActions(picture, {
      again: (again) => this.leave(() => this.deeds.again(again)),
      edit: (edited) => this.leave(() => this.deeds.edit(edited)),
    });
    const close = button("Close", () => this.viewer.close(), { class: "quiet small-button" });
    this.viewer.replaceChildren(
      h("div", { class: "frame" }, h("img", { src: url, alt: record.prompt })),
      h(
        "div",
        { class: "facts" },
        h("header", {}, h("p", { class: "prompt" }, record.prompt), close),
        makeFacts([["Made by", MODES[record.kind]], ...this.settings.facts(record)]),
        h("div", { class: "buttons" }, ...actions),
      ),
    );
    this.viewer.showModal();
  }

  leave(deed) {
    this.viewer.close();
    deed();
  }
}

function makeFacts(facts) {
  const items = facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, show(value))]);
  return h("dl", {}, ...items);
}

function show(value) {
  return value === true ? "yes" : [value].flat().join(", ");
}
