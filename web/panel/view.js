// One run on the page: a line about it, its map, a row for each kernel, what went wrong, and the map as a table.

import { make, setAttribute, setText } from "./dom.js";
import { BlockMap } from "./map.js";
import { colour } from "./palette.js";
import { inRanges } from "./run.js";
import { said } from "./said.js";
import { t } from "./text.js";

/** @typedef {import("./run.js").Run} Run */

/** A figure in at most three digits. @param {number | null} value */
export function short(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(0).replace("e-", "e−");
  return size >= 100 ? String(Math.round(value)) : String(Number(value.toPrecision(size < 1 ? 2 : 3)));
}

/** @param {number | null} share */
export const percent = (share) =>
  share === null ? "" : 0 < share && share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`;

/** The sampler's number as it stands on the graph: the last part of its id in a subgraph. @param {string | null} id */
export const samplerOf = (id) => (id ? `#${id.split(":").at(-1)}` : "");

/** @param {Run} run */
export function stageOf(run) {
  if (run.running && run.step !== null) {
    const values = { step: run.step, first: run.first, last: run.first + run.length - 1 };
    return t(run.length > 1 ? "run.step" : "run.only", values);
  }
  if (!run.length) return "";
  if (run.first === 0 && run.length >= run.steps) return t("run.whole", { steps: run.length });
  if (run.length === 1) return t("run.one", { step: run.first, steps: run.steps });
  return t("run.steps", { first: run.first, last: run.first + run.length - 1, steps: run.steps });
}

/** The square in a kernel's colour that stands beside its name. */
const swatch = (/** @type {string} */ name) =>
  make("span", { class: "swatch", style: `--of: ${colour(name)}`, "aria-hidden": "true" });

/** A kernel's name after its square; a long one may be broken after "_" only. */
export function named(/** @type {string} */ name) {
  const parts = name.split(/(?<=_)/).flatMap((part, place) => (place ? [make("wbr"), part] : [part]));
  return make("span", { class: "kernel", title: name === "host" && t("run.host") }, swatch(name), ...parts);
}

let views = 0;

export class RunView {
  element = make("div", { class: "run" });
  #about = make("p", { class: "about" });
  #map = new BlockMap();
  #marks = make("p", { class: "quiet marks" }, t("run.marks"));
  #switch = make("fieldset", { class: "switch", hidden: true }, make("legend", {}, t("run.kind")));
  #rows = make("tbody");
  #left = make("p", { class: "quiet", hidden: true });
  #untimed = make("p", { class: "quiet" }, t("run.untimed"));
  #events = make("ul", { class: "events", role: "log", "aria-label": t("run.events") });
  #more = make("p", { class: "quiet", hidden: true });
  #table = make("details", { class: "inner" }, make("summary", {}, t("run.table")));
  /** @type {Map<string, Record<string, any>>} */
  #kernels = new Map();
  /** @type {Map<string, HTMLElement>} */
  #notes = new Map();
  /** @type {Map<number, HTMLElement>} */
  #happened = new Map();
  /** @type {string | null} "" for all, null as long as the user has not chosen */
  #kind = null;
  #next = 0; // when the table may be made again, while it would change all the time
  #only = "";
  /** @type {Run | null} */
  #run = null;

  constructor() {
    const name = `attune-kind-${++views}`;
    for (const kind of ["", "self", "cross"]) {
      const radio = make("input", { type: "radio", name, value: kind });
      radio.addEventListener("change", () => {
        this.#kind = kind;
        this.#draw();
      });
      this.#switch.append(make("label", {}, radio, make("span", {}, t(`run.kind.${kind || "both"}`))));
    }
    const heads = ["kernel", "calls", "time", "error"].map((id) => make("th", { scope: "col" }, t(`run.${id}`)));
    const table = make("table", { class: "figures" }, make("thead", {}, make("tr", {}, ...heads)), this.#rows);
    this.#table.addEventListener("toggle", () => this.#tabulate());
    this.element.append(this.#about, this.#switch, this.#map.element, this.#left, this.#marks, table, this.#untimed);
    this.element.append(this.#events, this.#more, this.#table);
  }

  /** @param {Run} run */
  show(run) {
    if (run !== this.#run) {
      this.#happened.clear();
      this.#notes.clear();
      this.#events.replaceChildren();
    }
    this.#run = run;
    const seconds = run.seconds === null ? "" : t("run.seconds", { seconds: short(run.seconds) });
    const about = [t("run.number", { number: run.number }), run.model, samplerOf(run.sampler)];
    const parts = [...about, stageOf(run), t(`run.${run.status}`), seconds];
    setText(this.#about, parts.filter(Boolean).join(" · "));
    setAttribute(this.#about, "data-status", run.status);
    this.#untimed.hidden = run.timed;
    this.#figures(run);
    this.#tell(run);
    this.#draw();
    if (!run.running || performance.now() > this.#next) this.#tabulate();
  }

  /** The theme has changed. */
  redraw() {
    this.#map.draw();
  }

  #draw() {
    if (!this.#run) return;
    const { kinds } = this.#run;
    const both = kinds.has("self") && kinds.has("cross");
    const kind = both ? (this.#kind ?? "self") : "";
    this.#switch.hidden = !both;
    this.#switch.querySelector(`[value="${kind}"]`).checked = true;
    const marks = [t("run.marks"), both && !kind && t("run.marks.edge"), this.#run.doubles && t("run.marks.doubles")];
    setText(this.#marks, marks.filter(Boolean).join(" · "));
    this.#map.show(this.#run, kind, this.#only);
  }

  /** @param {Run} run */
  #figures(run) {
    const names = new Set([...run.kernels, ...run.figures.keys()]);
    for (const [name, { row }] of this.#kernels) {
      if (names.has(name)) continue;
      row.remove();
      this.#kernels.delete(name);
      if (this.#only === name) this.#only = "";
    }
    for (const name of names) {
      const cells = this.#kernels.get(name) ?? this.#addKernel(name);
      const { calls = 0, seconds = null, share = null, error = null } = run.figures.get(name) ?? {};
      setText(cells.calls, calls.toLocaleString());
      const time = [percent(share), seconds === null ? "" : t("run.seconds", { seconds: short(seconds) })];
      setText(cells.time, time.filter(Boolean).join(", ") || "–");
      cells.bar.style.setProperty("--share", String(share ?? 0));
      setText(cells.error, short(error));
    }
  }

  #addKernel(name) {
    const press = make("button", { type: "button", class: "only", "aria-pressed": "false" }, named(name));
    press.title = t("run.highlight", { kernel: name });
    press.addEventListener("click", () => {
      this.#only = this.#only === name ? "" : name;
      for (const [other, { press: one }] of this.#kernels)
        one.setAttribute("aria-pressed", String(other === this.#only));
      this.#draw();
    });
    const [calls, time, error] = ["", "", ""].map(() => make("span"));
    const bar = make("td", { class: "share", style: `--of: ${colour(name)}` }, time);
    const head = make("th", { scope: "row" }, press);
    const row = make("tr", {}, head, make("td", {}, calls), bar, make("td", {}, error));
    const cells = { row, press, calls, time, bar, error };
    this.#kernels.set(name, cells);
    this.#rows.append(row);
    return cells;
  }

  /** @param {Run} run */
  #tell(run) {
    const known = new Set(run.events.map(({ id }) => id));
    for (const [id, line] of this.#happened) {
      if (!known.has(id)) line.parentElement?.remove();
      if (!known.has(id)) this.#happened.delete(id);
    }
    for (const { id, kind, text, block, step, count } of run.events) {
      const where = [
        step === null ? "" : t("run.only", { step }),
        block === null ? "" : t("run.cell.block", { block }),
        count > 1 ? `×${count}` : "",
      ].filter(Boolean);
      const what = said(text);
      const told = where.length ? t("run.event", { text: what, where: where.join(", ") }) : what;
      if (!this.#happened.has(id)) {
        const line = make("span");
        this.#happened.set(id, line);
        this.#events.append(make("li", { "data-kind": kind }, make("b", {}, t(`event.${kind}`)), " ", line));
      }
      setText(this.#happened.get(id), told);
    }
    const none = !run.running && !run.events.length && !run.notes.length ? [t("run.events.none")] : [];
    const notes = [...run.notes, ...none];
    for (const [text, line] of this.#notes) {
      if (!notes.includes(text)) line.remove();
      if (!notes.includes(text)) this.#notes.delete(text);
    }
    for (const text of notes) {
      if (this.#notes.has(text)) continue;
      this.#notes.set(text, make("li", { class: none.length ? "quiet" : "note" }, said(text)));
      this.#events.append(this.#notes.get(text) ?? "");
    }
    this.#more.hidden = run.eventsLeftOut <= 0;
    setText(this.#more, t("run.more", { count: run.eventsLeftOut }));
    this.#left.hidden = !run.left;
    setText(this.#left, t("run.left", { count: run.left }));
  }

  /** The map for those who do not see it: made only when it is unfolded. */
  #tabulate() {
    if (!this.#table.open || !this.#run) return;
    this.#next = performance.now() + 1000;
    const rows = [];
    for (const phase of this.#run.phases()) {
      for (const { kernels, kind, blocks } of phase.rows) {
        const outside = blocks.includes(null) ? t(blocks.length > 1 ? "run.map.other" : "run.map.all") : "";
        const where = [inRanges(blocks), outside].filter(Boolean).join(", ");
        rows.push([inRanges(phase.steps), where, kind, kernels]);
      }
    }
    const now = JSON.stringify(rows);
    if (this.#table.dataset.said === now) return;
    this.#table.dataset.said = now;
    const heads = ["run.table.steps", "run.table.blocks", "run.table.kind", "run.kernel"];
    const head = make("tr", {}, ...heads.map((id) => make("th", { scope: "col" }, t(id))));
    const body = rows.map((row) => make("tr", {}, ...row.map((text) => make("td", {}, text))));
    const table = make("table", { class: "plain" }, make("thead", {}, head), make("tbody", {}, ...body));
    this.#table.querySelector("table")?.remove();
    this.#table.append(table);
  }
}
