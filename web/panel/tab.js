// The sidebar tab "Attention": puts the sections together, and lets them work only while it is shown.

import { listen } from "../comfy.js";
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
    if (!this.#parts) await this.#build();
    const parts = this.#parts;
    if (!parts || !this.#shown) return;
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
    const { machine, history, kernels } = this.#parts ?? {};
    if (this.#shown) await Promise.all([machine, history, kernels].map((part) => part?.refresh()));
  }

  /** Draw what style sheets do not reach, in the colours of the theme. */
  #redraw() {
    this.#parts?.live.redraw();
    this.#parts?.history.redraw();
  }

  async #build() {
    await chooseLanguage();
    if (this.#parts) return;
    const history = new History((run) => live.show(run));
    const live = new Live(() => history.refresh());
    const machine = new Machine();
    const kernels = new Kernels();
    this.#parts = { live, history, machine, kernels };
    listen("reconnected", () => this.#refresh()); // ComfyUI may have been started again
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
      listen(end, () => this.#shown && !this.#wanted && history.refresh()); // which the live map would have told
    }
    const shadow = this.#host.attachShadow({ mode: "open" });
    shadow.adoptedStyleSheets = [STYLE];
    const elements = [machine, new Tools(), live, history, kernels].map((part) => part.element);
    shadow.append(make("h2", {}, t("title")), ...elements);
    shadow.addEventListener("keydown", keepKeys);
  }
}
