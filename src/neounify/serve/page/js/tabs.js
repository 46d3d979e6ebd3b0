/** Panels by earlier addresses. */
const RENAMED = { paint: "generate" };

/** Tabs that the arrow keys move through; the address keeps the chosen one. */
export class Tabs {
  /** `onChange(id)` is called with the panel that is shown. */
  constructor(list, onChange) {
    this.tabs = [...list.querySelectorAll("[role=tab]")];
    this.onChange = onChange;
    list.addEventListener("click", (event) => {
      const tab = event.target.closest("[role=tab]");
      if (tab) this.visit(panelOf(tab));
    });
    list.addEventListener("keydown", (event) => this.move(event));
    for (const type of ["hashchange", "popstate"]) {
      window.addEventListener(type, () => this.showAddressed());
    }
    this.showAddressed();
  }

  /** Show a panel so that the browser's Back returns to the one before. */
  visit(id) {
    if (id !== this.current) history.pushState(null, "", `#${id}`);
    this.show(id);
  }

  /** Offer the panels for which `isOffered(id)`; where the shown one is none of them, the first. */
  offer(isOffered) {
    for (const tab of this.tabs) tab.hidden = !isOffered(panelOf(tab));
    if (this.offered.every((tab) => panelOf(tab) !== this.current)) {
      if (this.offered.length) this.show(panelOf(this.offered[0]));
    }
  }

  get offered() {
    return this.tabs.filter((tab) => !tab.hidden);
  }

  show(id) {
    this.current = id;
    for (const tab of this.tabs) {
      const chosen = panelOf(tab) === id;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      document.getElementById(panelOf(tab)).hidden = !chosen;
    }
    history.replaceState(null, "", `#${id}`);
    this.onChange(id);
  }

  showAddressed() {
    const address = location.hash.slice(1);
    const wanted = RENAMED[address] ?? address;
    const ids = this.tabs.map(panelOf);
    this.show(ids.includes(wanted) ? wanted : ids[0]);
  }

  move(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const tabs = this.offered;
    const last = tabs.length - 1;
    const now = tabs.findIndex((tab) => panelOf(tab) === this.current);
    const next = Number.isFinite(step) ? (now + step + last + 1) % (last + 1) : step > 0 ? last : 0;
    this.visit(panelOf(tabs[next]));
    tabs[next].focus();
  }
}

function panelOf(tab) {
  return tab.getAttribute("aria-controls");
}
