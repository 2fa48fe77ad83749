// What a node shows of its last runs: a DOM widget, which both renderers draw. Its style lives in a shadow tree, so
// that it reaches nothing else in the page.

import { app } from "./comfy.js";

const NAME = "attune_status";
const MARGIN = 6; // around the text, in the canvas renderer
const SETTLED = 300; // milliseconds after which the page has laid out a change
const REASONS = 6; // sentences of a badge's tooltip
const LONG = 90; // characters of a line from which on the tooltip repeats it
const AUTOMATIC = new Set(["auto", "auto_fast", "host"]);
const FAMILIES = ["flash", "sage"]; // asked for by this name, any member is what was asked for

const STYLE = new CSSStyleSheet();
STYLE.replaceSync(`
  :host { display: block; }
  .face {
    box-sizing: border-box; padding: 2px 0; overflow: hidden;
    font: 11px/1.45 var(--font-inter, Inter), Arial, sans-serif; color: var(--input-text, #ddd);
    user-select: text; cursor: default; text-align: left;
  }
  .run + .run { margin-top: 5px; }
  .run.old { opacity: 0.45; }
  .of { color: var(--descrip-text, #999); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .kernels { display: flex; flex-wrap: wrap; gap: 3px 8px; align-items: baseline; }
  .chip {
    padding: 0 6px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 8px; font-weight: 600;
    background: var(--comfy-input-bg, #222); overflow-wrap: anywhere;
  }
  .times { color: var(--descrip-text, #999); margin-left: 4px; font-variant-numeric: tabular-nums; }
  .warn .chip {
    color: color-mix(in srgb, #e5322d 65%, var(--input-text, #ddd)); border-color: #e5322d;
    background: color-mix(in srgb, #e5322d 14%, var(--comfy-input-bg, #222));
  }
  .warn .chip::before { content: "✕ " / "not what was asked for: "; }
  .what { color: var(--input-text, #ddd); }
  .line {
    margin-top: 3px; color: var(--descrip-text, #999); overflow-wrap: anywhere;
    display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  }
`);

/** Does the Vue renderer draw the nodes? */
const inVue = () => Boolean(globalThis.LiteGraph?.vueNodesMode);

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

/** Is `kernel` what was asked for by one of the names `wishes`? */
const asked = (wishes, kernel) =>
  wishes.some((wish) => wish === kernel || (FAMILIES.includes(wish) && kernel.startsWith(wish)));

/**
 * One block of text from the runs of one sampler: {kernels: [{name, count, warn, why: [text]}], lines: [text]}.
 * A kernel warns where it ran because one that was asked for could not; `why` says of each of those why not.
 */
export function summarise(runs) {
  const counts = new Map();
  const lines = new Set();
  for (const { node, run } of runs) {
    const wishes = node.requested.split(/ \/ |, /).filter((wish) => !AUTOMATIC.has(wish));
    const refused = node.refused.filter(({ kernel }) => asked(wishes, kernel));
    for (const [name, count] of Object.entries(node.observed)) {
      const sum = counts.get(name) ?? { name, count: 0, warn: false, why: [] };
      sum.count += count;
      counts.set(name, sum);
      if (!refused.length || asked(wishes, name)) continue;
      sum.warn = true;
      sum.why.push(
        `Asked for: ${wishes.join(", ")}.`,
        ...refused.map((one) => `Not ${one.kernel}: ${one.reasons.join("; ")}.`),
      );
      sum.why = [...new Set(sum.why)].slice(0, REASONS);
    }
    if (node.discarded && wishes.length) {
      // They were done again on ComfyUI's own attention; the notes say why.
      const sum = counts.get("host") ?? { name: "host", count: 0, warn: false, why: [] };
      sum.count += node.discarded;
      sum.warn = true;
      sum.why = [...new Set([...sum.why, `Asked for: ${wishes.join(", ")}.`, ...run.notes])].slice(0, REASONS);
      counts.set("host", sum);
    }
    // The first line of the text repeats the kernels, where there are any.
    for (const line of node.text.split("\n").slice(node.calls ? 1 : 0)) lines.add(line);
    for (const note of run.notes) lines.add(note);
    if (run.status !== "finished") lines.add(`This run ${run.status === "failed" ? "failed" : "was stopped"}.`);
  }
  const kernels = [...counts.values()].sort((a, b) => b.count - a.count);
  return { kernels, lines: [...lines].filter(Boolean) };
}

/** The blocks for a node's face: one per sampler, or one for all where all would say the same. */
export function blocks(entries) {
  const samplers = new Map();
  for (const entry of entries) {
    const key = `${entry.sampler}/${entry.old}`;
    samplers.set(key, [...(samplers.get(key) ?? []), entry]);
  }
  const found = [...samplers.values()].map((runs) => ({ of: runs[0].sampler, old: runs[0].old, ...summarise(runs) }));
  const same = new Set(found.map(({ kernels, lines, old }) => JSON.stringify([kernels, lines, old]))).size === 1;
  if (found.length > 1 && same) return [{ ...found[0], of: `each of ${found.length} samplers` }];
  return found.length > 1 ? found : found.map((block) => ({ ...block, of: "" }));
}

function draw({ of, old, kernels, lines }) {
  const block = make("div", old ? "run old" : "run");
  if (of) block.append(make("div", "of", of));
  if (kernels.length) {
    const row = make("div", "kernels");
    for (const { name, count, warn, why } of kernels) {
      const kernel = make("span", warn ? "kernel warn" : "kernel");
      const ran = `${count} attention calls ran on ${name}`;
      kernel.title = [`${ran}${warn ? ", which is not what was asked for." : ""}`, ...why].join("\n");
      kernel.append(make("span", "chip", name), make("span", "times", `×${count}`));
      row.append(kernel);
    }
    block.append(row);
  }
  for (const text of lines) {
    const [, what = "", rest] = text.match(/^(not \S+(?: ×\d+)?: )?(.*)$/s);
    const line = make("div", "line");
    line.append(make("span", "what", what), rest);
    if (text.length > LONG) line.title = text;
    block.append(line);
  }
  return block;
}

/** The face of one node. Nothing is added to the node before there is something to show. */
export class Face {
  #node;
  /** @type {any} */
  #widget = null;
  #inner = make("div", "face");
  #shown = "[]";
  #height = 0; // of the text in pixels
  #grown = 0; // by how much the text made the node higher than the user had it
  #before = null; // the node's height before the text changed, while the Vue renderer has yet to lay it out

  constructor(node) {
    this.#node = node;
  }

  /** Show `entries`: [{node: one node's part of a run, run, sampler: title, old}]. None: show nothing. */
  show(entries) {
    const found = entries.length ? blocks(entries) : [];
    const now = JSON.stringify(found);
    if (now === this.#shown) return;
    this.#shown = now;
    if (!found.length) return this.#hide();
    if (!this.#widget) this.#attach();
    this.#before ??= this.#node.size[1];
    this.#inner.style.paddingInline = inVue() ? "0" : `${MARGIN}px`;
    this.#inner.replaceChildren(...found.map(draw));
    this.#height = measure(this.#inner, this.#node.size[0] - 2 * MARGIN);
    if (this.#widget.hidden) this.#setHidden(false);
    this.#fit();
    this.#settle();
  }

  #attach() {
    const host = document.createElement("div");
    host.dataset.attune = "";
    this.#inner.setAttribute("role", "status");
    const shadow = host.attachShadow({ mode: "open" });
    shadow.adoptedStyleSheets = [STYLE];
    shadow.append(this.#inner);
    passToCanvas(host);

    const height = () => this.#height + 2 * MARGIN;
    this.#widget = this.#node.addDOMWidget(NAME, NAME, host, {
      serialize: false,
      margin: MARGIN,
      getMinHeight: height,
      getMaxHeight: height,
      getValue: () => "",
      setValue: () => {},
    });
    this.#widget.serialize = false;
    new ResizeObserver(() => this.#settle()).observe(this.#inner);

    // A saved workflow keeps the height that the user gave the node.
    const onSerialize = this.#node.onSerialize;
    this.#node.onSerialize = (data, ...rest) => {
      const result = onSerialize?.call(this.#node, data, ...rest);
      if (data.size) data.size = [data.size[0], data.size[1] - this.#grown];
      return result;
    };
  }

  #setHidden(hidden) {
    this.#widget.hidden = this.#widget.options.hidden = hidden;
    const widgets = [...this.#node.widgets];
    this.#node.widgets = widgets.filter((widget) => widget !== this.#widget); // the Vue renderer sees a change,
    this.#node.widgets = widgets; // and looks at all of them again
  }

  #hide() {
    if (!this.#widget) return;
    this.#inner.replaceChildren();
    this.#setHidden(true);
    this.#before = null;
    this.#grow(0);
  }

  /** See to it that the node is as high as its text needs. */
  #fit() {
    const height = this.#inner.offsetHeight; // 0 while it is not on the page
    const node = this.#node;
    if (this.#widget.hidden || node.collapsed) return;
    this.#height = height || this.#height;
    if (inVue()) {
      // There the page makes room by itself; what remains is to know how much.
      if (height && this.#before !== null) {
        this.#grown = Math.max(0, this.#grown + node.size[1] - this.#before);
        this.#before = node.size[1];
      }
    } else {
      this.#grow(Math.max(0, node.computeSize()[1] - (node.size[1] - this.#grown)));
    }
  }

  /** Fit again when the page has been laid out. What changes the node's height after that is the user. */
  #settle() {
    requestAnimationFrame(() => this.#fit());
    setTimeout(() => {
      this.#fit();
      if (this.#inner.offsetHeight) this.#before = null;
    }, SETTLED);
  }

  #grow(grown) {
    const [width, height] = this.#node.size;
    const change = grown - this.#grown;
    this.#grown = grown;
    if (change) this.#node.setSize([width, height + change]);
    this.#node.setDirtyCanvas?.(true, true);
  }
}

/** The height of the text `inner` at a width, in pixels, whether or not its node is on the page. */
function measure(inner, width) {
  const host = document.createElement("div");
  host.style.cssText = `position: fixed; visibility: hidden; width: ${width}px`;
  const shadow = host.attachShadow({ mode: "open" });
  shadow.adoptedStyleSheets = [STYLE];
  const copy = inner.cloneNode(true);
  copy.removeAttribute("role"); // or it would be read aloud
  shadow.append(copy);
  document.body.append(host);
  const height = copy.offsetHeight;
  host.remove();
  return height;
}

/** The wheel and the middle button do over the text what they do over the canvas. */
function passToCanvas(element) {
  element.addEventListener(
    "wheel",
    (event) => {
      if (inVue()) return; // there the node does it
      event.preventDefault();
      app.canvas.processMouseWheel(event);
    },
    { passive: false },
  );
  element.addEventListener("pointerdown", (event) => event.button === 1 && app.canvas.processMouseDown(event));
  element.addEventListener("pointermove", (event) => event.buttons & 4 && app.canvas.processMouseMove(event));
  element.addEventListener("pointerup", (event) => event.button === 1 && app.canvas.processMouseUp(event));
}
