/** The panel of settings. A field left empty is not sent: the model's own value holds. */

import { button, h } from "./dom.js";
import { FIELDS } from "./fields.js";
import { apiKey, savedSettings } from "./store.js";

const SEEDS = 2 ** 31;

export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS;
}

export class Settings {
  /** `onKey` is called when another API key was entered. */
  constructor(section, onKey) {
    this.section = section;
    this.inputs = new Map();
    this.model = {};
    this.trained = { sizes: [], pixels: null };
    this.sizes = h("datalist", { id: "trained-sizes" });
    this.sizeHint = h("p", { class: "hint wide", id: "size-hint", role: "status", hidden: true });
    this.rows = FIELDS.map((field) => this.makeRow(field));
    const size = this.inputs.get("size");
    size.setAttribute("aria-describedby", this.sizeHint.id);
    size.closest(".row").append(this.sizes);
    this.form = h("form", { class: "fields", on: { submit: stay } }, ...this.rows);
    size.closest(".row").after(this.sizeHint);
    // A list may report its choice as a change alone.
    for (const event of ["input", "change"]) {
      this.form.addEventListener(event, () => {
        this.showSizeHint();
        this.save();
      });
    }
    for (const { name, instead } of FIELDS) {
      if (instead) this.inputs.get(name).addEventListener("input", () => this.empty(instead));
    }
    section.append(
      h(
        "div",
        { class: "sheet-head" },
        h("h2", { id: "settings-title" }, "Settings"),
        button("Reset", () => this.reset(), { class: "quiet" }),
        button("Close", () => section.hidePopover(), { class: "quiet sheet-close" }),
      ),
      h("p", { class: "hint" }, "Empty fields take the model's defaults."),
      this.form,
      makeKeyRow(onKey),
    );
    this.load();
  }

  /** Show the settings of one mode. */
  show(kind) {
    this.kind = kind;
    const defaults = this.defaults(kind);
    FIELDS.forEach(({ name, kinds, needs, own }, i) => {
      const input = this.inputs.get(name);
      this.rows[i].hidden = !kinds.includes(kind) || !this.can(needs);
      input.disabled = this.rows[i].hidden;
      if (defaults[own] !== undefined) showDefault(input, defaults[own]);
    });
    this.showSizeHint();
  }

  /** Whether the model was trained for something; before it is described, for anything. */
  can(something) {
    const { capabilities } = this.model;
    return !something || !capabilities || capabilities.includes(something);
  }

  /** The model's values of what is left empty, by the `own` name of the field. */
  defaults(kind) {
    const { image_size: size, video, ...rest } = this.model;
    if (kind !== "video") return { ...rest, size };
    return video ?? {};
  }

  /** Show the model's defaults in empty fields, and set the server's limits. */
  describe({ limits = {}, ...model }) {
    this.model = model;
    this.trained = { sizes: model.trained_sizes ?? [], pixels: model.trained_pixels ?? null };
    this.sizes.replaceChildren(...this.trained.sizes.map((size) => h("option", { value: size })));
    for (const { name, limit } of FIELDS) {
      if (limits[limit] !== undefined) this.inputs.get(name).max = limits[limit];
    }
    const tube = model.video?.tube_frames;
    if (tube) Object.assign(this.inputs.get("frames"), { min: tube, step: tube });
    this.show(this.kind);
  }

  /** Whether all values are valid; if not, the field at fault is shown. */
  check() {
    if (this.form.checkValidity()) return true;
    if (getComputedStyle(this.section).display === "none") this.section.showPopover();
    this.form.reportValidity();
    return false;
  }

  /** What to send in the shown mode; the seed is always there, drawn if none is entered. */
  options() {
    const options = { seed: randomSeed() };
    for (const [name, input] of this.inputs) {
      if (input.disabled) continue;
      if (input.type === "checkbox" ? input.checked : input.value !== "") {
        options[name] = valueOf(input);
      }
    }
    return options;
  }

  /** [label, value] of all that is known of how a request was answered. */
  facts({ kind, options }) {
    const defaults = this.defaults(kind);
    return FIELDS.filter(({ name, kinds, instead }) => kinds.includes(kind) && !options[instead])
      .map(({ name, label, own }) => [label, options[name] ?? defaults[own]])
      .filter(([, value]) => value !== undefined);
  }

  makeRow({ name, label, help, input, choices, wide }) {
    const props = { id: `setting-${name}`, title: help };
    const control = choices
      ? h("select", props, ...optionsOf(choices))
      : h("input", { ...props, placeholder: "default", ...input });
    this.inputs.set(name, control);
    if (control.type === "checkbox") {
      return h("label", { class: "row check wide", title: help }, control, label);
    }
    const caption = h("label", { for: control.id, title: help }, label);
    if (name !== "seed") return h("div", { class: wide ? "row wide" : "row" }, caption, control);
    control.placeholder = "random";
    const joined = h("div", { class: "joined" }, control, this.dice());
    return h("div", { class: "row wide" }, caption, joined);
  }

  dice() {
    const draw = () => {
      this.inputs.get("seed").value = randomSeed();
      this.save();
    };
    const label = "Draw a random seed and keep it";
    const props = { class: "dice", "aria-label": label, title: label };
    return button(h("span", { class: "die", "aria-hidden": "true" }), draw, props);
  }

  /** Under the size, where the model was not trained at the one that is entered. */
  showSizeHint() {
    const { value, disabled } = this.inputs.get("size");
    const { sizes, pixels } = this.trained;
    const [width, height] = value.split("x").map(Number);
    const area = width * height;
    const known = this.kind !== "video" && (sizes.length > 0 || pixels !== null);
    if (this.kind === "video") this.inputs.get("size").removeAttribute("list");
    else this.inputs.get("size").setAttribute("list", this.sizes.id);
    const fits = sizes.includes(value) || (pixels && pixels[0] <= area && area <= pixels[1]);
    const odd = known && !disabled && area > 0 && !fits;
    this.sizeHint.hidden = !odd;
    this.sizeHint.textContent = odd ? `${describeTrained(sizes, pixels)} Others may look broken.` : "";
  }

  empty(name) {
    this.inputs.get(name).value = "";
  }

  reset() {
    this.form.reset();
    this.showSizeHint();
    this.save();
  }

  save() {
    const entered = [...this.inputs].map(([name, input]) => [name, stateOf(input)]);
    savedSettings.set(JSON.stringify(Object.fromEntries(entered)));
  }

  load() {
    const entered = JSON.parse(savedSettings.get() || "{}");
    for (const [name, input] of this.inputs) {
      if (input.type === "checkbox") input.checked = entered[name] === true;
      else input.value = entered[name] ?? "";
    }
  }
}

function optionsOf(choices) {
  return Object.entries(choices).map(([value, label]) => h("option", { value }, label));
}

/** What an empty field stands for. */
function showDefault(input, value) {
  if (input.options) input.options[0].textContent = `${value} (default)`;
  else input.placeholder = value;
}

function describeTrained(sizes, pixels) {
  const side = (area) => `${Math.floor(Math.sqrt(area))}x${Math.floor(Math.sqrt(area))}`;
  const range = pixels ? [`areas from ${side(pixels[0])} to ${side(pixels[1])}`] : [];
  return `This model was trained at ${[...range, ...sizes.slice(0, 4)].join(", ")}.`;
}

function stay(event) {
  event.preventDefault();
}

function stateOf(input) {
  return input.type === "checkbox" ? input.checked : input.value;
}

function valueOf(input) {
  return input.type === "number" ? Number(input.value) : stateOf(input);
}

function makeKeyRow(onKey) {
  const input = h("input", {
    id: "api-key",
    type: "password",
    autocomplete: "off",
    placeholder: "if the server requires one",
    value: apiKey.get(),
  });
  input.addEventListener("change", () => {
    apiKey.set(input.value.trim());
    onKey();
  });
  return h(
    "form",
    { class: "row key", on: { submit: stay } },
    h("label", { for: input.id }, "API key"),
    input,
    h("p", { class: "hint" }, "Forgotten when this tab is closed."),
  );
}
