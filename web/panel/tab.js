// The sidebar tab "Attention": puts the sections together, and lets them work only while it is shown.

import { app, listen } from "../comfy.js";
import { History } from "./history.js";
import { Kernels } from "./kernels.js";
import { Live } from "./live.js";
import { Machine } from "./machine.js";
import { make } from "./dom.js";
import { STYLE } from "./style.js";
import { chooseLanguage, t } from "./text.js";
import { Tools } from "./tools.js";

const PLAIN = ["SELECT", "INPUT", "TEXTAREA", "BUTTON", "SUMMARY", "DIV"];

/** Keys that act here must not reach ComfyUI's shortcuts, which are single letters. */
function keepKeys(event) {
  const target = event.composedPath()[0];
  if (!event.ctrlKey && !event.metaKey && !event.altKey && PLAIN.includes(target.tagName)) event.stopPropagation();
}

export class Tab {
  #host = make("div", { style: "height: 100%" });
  /** @type {{live: Live, history: History, machine: Machine, kernels: Kernels} | null} */
  #parts = null;
  /** @type {MutationObserver | null} */
  #theme = null;
  #shown = false;
  #wanted = true;
  #end = new AbortController(); // of the sections' listening

  constructor() {
    this.#host.addEventListener("keydown", keepKeys);
    const translate = () => this.#translate().catch((error) => console.error("Attune:", error));
    app.ui.settings.addEventListener("Comfy.Locale.change", translate);
  }

  /** The front end shows the tab in `container`; it may say so several times. */
  render(container) {
    if (this.#host.parentNode !== container) container.replaceChildren(this.#host);
    container.style.height = "100%";
    if (this.#shown) return;
    this.#shown = true;
    this.#open().catch((error) => console.error("Attune:", error));
  }

  /** The tab is shown no longer. */
  destroy() {
    this.#shown = false;
    this.#theme?.disconnect();
    if (this.#parts) this.#parts.live.mounted = false;
    this.#host.remove();
  }

  /** Does the user want the live map? */
  set wanted(on) {
    this.#wanted = on;
    if (this.#parts) this.#parts.live.wanted = on;
  }

  async #open() {
    const { signal } = this.#end;
    if (!this.#parts) await this.#build();
    const parts = this.#parts;
    if (!parts || !this.#shown || signal.aborted) return;
    parts.live.wanted = this.#wanted;
    parts.live.mounted = true;
    this.#redraw();
    this.#theme = new MutationObserver(() => requestAnimationFrame(() => this.#redraw()));
    for (const element of [document.documentElement, document.body]) {
      this.#theme.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    }
    await this.#refresh();
  }

  async #refresh() {
    const { machine, live, history, kernels } = this.#parts ?? {};
    if (this.#shown) await Promise.all([machine, live, history, kernels].map((part) => part?.refresh()));
  }

  /** Draw what style sheets do not reach, in the colours of the theme. */
  #redraw() {
    this.#parts?.live.redraw();
    this.#parts?.history.redraw();
  }

  async #build() {
    const { signal } = this.#end;
    await chooseLanguage();
    if (this.#parts || signal.aborted) return;
    const history = new History(
      (run) => live.show(run),
      (known) => live.keep(known),
    );
    const machine = new Machine();
    const ended = () => {
      history.refresh();
      machine.refresh(); // a kernel may have been given up
    };
    const live = new Live(ended, signal);
    const kernels = new Kernels(() => machine.refresh(), signal);
    this.#parts = { live, history, machine, kernels };
    listen("reconnected", () => this.#refresh(), signal); // ComfyUI may have been started again
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
      const told = () => (this.#wanted ? machine.refresh() : ended()); // the live map tells of each run
      listen(end, () => this.#shown && told(), signal);
    }
    const shadow = this.#host.shadowRoot ?? this.#host.attachShadow({ mode: "open" });
    shadow.adoptedStyleSheets = [STYLE];
    const elements = [machine, new Tools(signal), live, history, kernels].map((part) => part.element);
    shadow.replaceChildren(make("h2", {}, t("title")), ...elements);
  }

  /** ComfyUI has changed its language: everything is made anew in that one. */
  async #translate() {
    await undefined; // the front end says so before it keeps the new value
    if (!this.#parts && !this.#shown) return; // the tab asks when it is opened
    if (this.#parts) this.#parts.live.mounted = false;
    this.#theme?.disconnect();
    this.#end.abort();
    this.#end = new AbortController();
    this.#parts = null;
    if (this.#shown) await this.#open();
  }
}
