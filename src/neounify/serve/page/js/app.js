/** The page: its modes, settings, gallery and files. */

import { getModels } from "./api.js";
import { Chat } from "./chat.js";
import { Gallery } from "./gallery.js";
import { MODES } from "./modes.js";
import { Settings } from "./settings.js";
import { Studio } from "./studio.js";
import { Tabs } from "./tabs.js";

const find = (id) => document.getElementById(id);

const settings = new Settings(find("settings"), showModel);
const actions = {
  keep: (image) => gallery.add(image),
  again(request) {
    goTo(request.kind);
    modes.get(request.kind).start(request);
  },
  edits: () => settings.can("edit"),
  edit(url) {
    goTo("edit");
    modes.get("edit").composer.fill("", [url]);
  },
};
const gallery = new Gallery(find("gallery"), find("viewer"), settings, actions);
const modes = new Map(
  MODES.map((mode) => {
    const Kind = mode.id === "chat" ? Chat : Studio;
    return [mode.id, new Kind(find(mode.id), mode, settings, actions)];
  }),
);
const tabs = new Tabs(document.querySelector("[role=tablist]"), (id) => settings.show(id));

function goTo(id) {
  find("gallery").hidePopover();
  tabs.visit(id);
  window.scrollTo({ top: 0 });
}

async function showModel() {
  try {
    const [model] = await getModels();
    find("model").textContent = model.id;
    settings.describe(model.neounify ?? {});
    const offered = new Map(MODES.map(({ id, needs }) => [id, settings.can(needs)]));
    tabs.offer((id) => offered.get(id));
  } catch (error) {
    find("model").textContent = error.message;
  }
}

function takeFiles(event, transfer) {
  const files = [...(transfer?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  modes.get(tabs.current).composer.addFiles(files);
}

document.addEventListener("paste", (event) => takeFiles(event, event.clipboardData));
document.addEventListener("drop", (event) => takeFiles(event, event.dataTransfer));
document.addEventListener("dragover", (event) => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
});
showModel();
