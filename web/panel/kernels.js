// The table of kernels: what works here, how fast and how exact, and what to do about the rest.

import { listen } from "../comfy.js";
import { alertBox, button, copyButton, make, section, setText } from "./dom.js";
import { said } from "./said.js";
import { get, post } from "./server.js";
import { t } from "./text.js";
import { named, short } from "./view.js";

// In this order; those of REST are folded away.
const ORDER = ["works", "host", "wrong numbers", "crashed", "hung", "cannot import", "undecided", "open"];
const OWN = ["sub_quad", "basic"]; // ComfyUI's, which nobody has to try
const REST = ["not installed", "unsupported"];
const PAUSE = 3000; // milliseconds between two looks while kernels are still to be tried in the background
const SIGN = { works: "✓", host: "✓", off: "–", open: "○", undecided: "?", "not installed": "–", unsupported: "–" };

export class Kernels {
  #section = section("kernels", t("kernels.title"));
  element = this.#section.element;
  #alert = alertBox();
  #list = make("div");
  #bar = make("progress", { max: 1, value: 0, "aria-label": t("kernels.probe") });
  #said = make("span", { role: "status" });
  #progress = make("p", { class: "row progress" }, this.#bar, this.#said);
  #probe = button(t("kernels.probe"), () => this.#start(), { title: t("kernels.probe.hint") });
  #folded = true;
  /** @type {any[]} */
  #rows = [];
  #filled = ""; // what the list shows
  #open = 0; // kernels that are still to be tried
  #timer = 0;
  #changed;
  #signal;

  /**
   * @param {() => void} changed called when kernels were tried.
   * @param {AbortSignal} signal ends its listening.
   */
  constructor(changed, signal) {
    this.#changed = changed;
    this.#signal = signal;
    this.#bar.hidden = true;
    this.#section.body.append(
      make("p", { class: "row" }, this.#probe),
      this.#progress,
      this.#alert.element,
      this.#list,
    );
    listen("attune.probe", (detail) => this.#hear(detail), signal);
  }

  async refresh() {
    try {
      const { kernels } = await get("/attune/kernels");
      for (const row of kernels) row.outcome ||= OWN.includes(row.name) && row.can_run_here ? "host" : "off";
      this.#alert.say(kernels.length ? "" : t("kernels.none"));
      this.#fill(kernels);
      this.#wait(kernels.filter((row) => row.outcome === "open").length);
      const { running, done, total } = await get("/attune/probe");
      if (running) this.#show(done, total, "");
    } catch (error) {
      this.#alert.say(error, () => this.refresh());
    }
  }

  /** Look again while `open` kernels are still to be tried: nobody tells of those that the server tries by itself. */
  #wait(open) {
    clearTimeout(this.#timer);
    if (open < this.#open) this.#changed();
    this.#open = open;
    if (!open || this.#signal.aborted) return;
    this.#timer = setTimeout(() => this.element.isConnected && this.refresh(), PAUSE);
  }

  async #start() {
    try {
      // The server would count those that cannot run here too; "host" and "off" are none of its own to try.
      const here = this.#rows.filter((row) => row.status === "available" && !["host", "off"].includes(row.outcome));
      const { total } = await post("/attune/probe", here.length ? { kernels: here.map((row) => row.name) } : {});
      this.#alert.say("");
      this.#show(0, total, "");
    } catch (error) {
      this.#alert.say(error);
    }
  }

  #show(done, total, kernel) {
    this.#bar.hidden = false;
    this.#bar.max = total || 1;
    this.#bar.value = done;
    setText(this.#said, t("kernels.probing", { done, total, kernel }).replace(/: $/, ""));
  }

  #hear(event) {
    if (!event) return;
    if (!event.ended) return this.#show(event.done, event.total, event.kernel);
    this.#bar.hidden = true;
    setText(this.#said, t("kernels.probed"));
    if (!this.element.isConnected) return;
    this.refresh();
    this.#changed();
  }

  #fill(rows) {
    this.#rows = rows;
    const now = JSON.stringify(rows);
    if (now === this.#filled) return; // what does not change keeps the keyboard's place
    this.#filled = now;
    const place = (row) => (ORDER.indexOf(row.outcome) + 1 || ORDER.length + 1) * 1e6 + (row.milliseconds ?? 1e5);
    const main = rows.filter((row) => !REST.includes(row.outcome)).sort((a, b) => place(a) - place(b));
    const rest = rows.filter((row) => REST.includes(row.outcome));
    const parts = main.length ? [table(main)] : [];
    if (rest.length) {
      const summary = make("summary", {}, t("kernels.rest", { count: rest.length }));
      const fold = make("details", { class: "inner", open: !this.#folded }, summary, table(rest));
      fold.addEventListener("toggle", () => (this.#folded = !fold.open));
      parts.push(fold);
    }
    this.#list.replaceChildren(...parts);
  }
}

function table(rows) {
  const heads = ["name", "verdict", "speed", "error"].map((id) => make("th", { scope: "col" }, t(`kernels.${id}`)));
  const body = rows.flatMap(lines);
  return make("table", { class: "kernels" }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
}

/** A row for a kernel, and one with cause and cure where it does not work. */
function lines(row) {
  const { name, title, outcome, milliseconds, timed, error, allowed, detail, reasons = [], cause, cure } = row;
  const verdict = t(`verdict.${outcome}`);
  const speed = make("td", {}, milliseconds === null ? "–" : `${short(milliseconds)} ms`);
  if (timed) speed.title = t("kernels.speed.hint", { timed });
  const far = make("td", {}, short(error));
  if (error !== null) far.title = t("kernels.error.hint", { error: short(error), allowed: short(allowed) });
  const sign = make("span", { class: "sign", "aria-hidden": "true" }, SIGN[/** @type {"works"} */ (outcome)] ?? "✕");
  const head = make("th", { scope: "row", title }, named(name));
  const first = make("tr", { "data-outcome": outcome }, head, make("td", {}, sign, verdict), speed, far);
  const why = outcome === "works" ? "" : cause || detail || reasons.join("; ");
  if (!why && !cure) return [first];
  const cell = make("td", { colspan: 4 }, make("p", {}, said(why)));
  if (cure) {
    cell.append(make("p", {}, said(cure.text)));
    if (cure.command) {
      const copy = copyButton(cure.command, t("kernels.copy"), {
        "aria-label": t("kernels.copy.of", { kernel: name }),
      });
      cell.append(make("p", { class: "row command" }, make("code", {}, cure.command), copy));
    }
  }
  return [first, make("tr", { class: "why" }, cell)];
}
