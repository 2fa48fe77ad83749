// Buttons: benchmark the model, copy the doctor's bundle, bypass and enable all.

import { api, app, listen } from "../comfy.js";
import { NODE, benchmarkPrompt, samplers } from "./benchmark.js";
import { alertBox, button, copy, make, section, setText } from "./dom.js";
import { bypassAll, enableAll } from "./nodes.js";
import { ask, get } from "./server.js";
import { t } from "./text.js";

const STORED = "attune.benchmark"; // for this page's session: the id of the benchmark's prompt

/** What the front end knows of a type of node. @type {import("./benchmark.js").Types} */
function types(name) {
  const data = globalThis.LiteGraph?.registered_node_types?.[name]?.nodeData;
  const inputs = Object.entries({ ...data?.input?.required, ...data?.input?.optional });
  const named = inputs.map(([input, spec]) => [input, String(/** @type {any} */ (spec)[0])]);
  return { inputs: Object.fromEntries(named), outputs: (data?.output ?? []).map(String) };
}

function stored() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return "";
  }
}

export class Tools {
  #section = section("tools", t("tools.title"));
  element = this.#section.element;
  #alert = alertBox();
  #said = make("p", { role: "status", class: "said" });
  #text = make("textarea", { readonly: true, rows: 6, hidden: true, "aria-label": t("tools.bundle") });
  #choice = make("div", { class: "row", hidden: true });
  #result = make("details", { class: "inner", open: true, hidden: true });
  #prompt = ""; // id of the benchmark's
  #over = true; // all of it has been told
  #counted = false; // its progress has been told

  /** @param {AbortSignal} signal ends its listening. */
  constructor(signal) {
    const buttons = [
      button(t("tools.benchmark"), () => this.#benchmark(), { class: "primary" }),
      button(t("tools.bundle"), () => this.#bundle(), { title: t("tools.bundle.hint") }),
      button(t("tools.bypass"), bypassAll, { title: t("tools.bypass.hint") }),
      button(t("tools.enable"), enableAll, { title: t("tools.bypass.hint") }),
    ];
    this.#section.body.append(make("p", { class: "row" }, ...buttons), this.#choice, this.#alert.element, this.#said);
    this.#section.body.append(this.#text, this.#result);
    listen("execution_start", (detail) => this.#mine(detail) && setText(this.#said, t("bench.started")), signal);
    listen("progress", (detail) => this.#progress(detail), signal);
    listen("executed", (detail) => this.#executed(detail), signal);
    for (const end of ["execution_error", "execution_interrupted"]) {
      listen(end, (detail) => this.#failed(detail), signal);
    }
    for (const news of ["status", "reconnected"]) listen(news, () => this.#find(), signal);
    this.#follow(stored());
    this.#find();
  }

  #mine(detail) {
    return Boolean(this.#prompt) && detail?.prompt_id === this.#prompt;
  }

  async #bundle() {
    this.#text.hidden = true;
    setText(this.#said, "");
    try {
      const text = await (await ask("/attune/bundle")).text();
      this.#alert.say("");
      if (await copy(text)) return setText(this.#said, t("tools.copied"));
      this.#text.value = text;
      this.#text.hidden = false;
      this.#text.focus();
      this.#text.select();
      setText(this.#said, t("tools.copy.failed"));
    } catch (error) {
      this.#alert.say(error);
    }
  }

  async #benchmark() {
    this.#choice.hidden = true;
    this.#alert.say("");
    setText(this.#said, "");
    try {
      const { output, workflow } = await app.graphToPrompt();
      const found = samplers(/** @type {any} */ (output), types);
      const selected = Object.values(app.canvas.selected_nodes ?? {}).map((node) => String(node.id));
      const meant = found.filter(({ node }) => selected.includes(String(node.split(":").at(-1))));
      if (!found.length) this.#alert.say(t("bench.none"));
      else if (found.length === 1) await this.#queue(output, workflow, found[0]);
      else if (meant.length === 1) await this.#queue(output, workflow, meant[0]);
      else this.#choose(output, workflow, found);
    } catch (error) {
      this.#alert.say(error);
    }
  }

  /** There are several samplers: which one's model? */
  #choose(output, workflow, found) {
    const options = found.map(({ node }, at) =>
      make("option", { value: at }, `${output[node]._meta?.title ?? output[node].class_type} #${node}`),
    );
    const select = make("select", { id: "attune-sampler" }, ...options);
    const start = button(t("bench.start"), () => this.#queue(output, workflow, found[Number(select.value)]));
    this.#choice.replaceChildren(make("label", { for: "attune-sampler" }, t("bench.sampler")), select, start);
    this.#choice.hidden = false;
    select.focus();
  }

  async #queue(output, workflow, sampler) {
    this.#choice.hidden = true;
    this.#result.hidden = true;
    try {
      const answer = await api.queuePrompt(0, { output: benchmarkPrompt(output, sampler, types), workflow });
      this.#follow(String(answer.prompt_id));
      setText(this.#said, t("bench.queued"));
    } catch (error) {
      const { error: refused, node_errors } = error.response ?? {};
      const errors = Object.values(node_errors ?? {}).flatMap((node) =>
        node.errors.map((one) => `${one.message}: ${one.details}.`),
      );
      const message = errors.slice(0, 3).join(" ") || refused?.message || error.message;
      this.#alert.say(t("bench.refused", { message }));
    }
  }

  #progress(detail) {
    if (!this.#mine(detail) || detail.node !== NODE) return;
    this.#counted = true;
    setText(this.#said, t("bench.running", { done: detail.value, total: detail.max }));
  }

  #executed(detail) {
    if (this.#mine(detail) && detail.node === NODE) this.#show(detail.output ?? {});
  }

  #failed(detail) {
    if (!this.#mine(detail)) return;
    this.#over = true;
    setText(this.#said, "");
    const message = detail.exception_message ?? t("run.stopped");
    this.#alert.say(t("bench.failed", { message }));
  }

  #show({ images = [], text = [] }) {
    this.#over = true;
    setText(this.#said, t("bench.done"));
    const pictures = images.map((image) => {
      const address = api.apiURL(`/view?${new URLSearchParams(image)}`);
      const picture = make("img", { src: address, alt: t("bench.picture") });
      return make("a", { href: address, target: "_blank", rel: "noopener" }, picture);
    });
    const label = { tabindex: 0, role: "region", "aria-label": t("tools.benchmark") };
    const summary = make("summary", {}, t("bench.result"));
    this.#result.replaceChildren(summary, ...pictures, make("pre", label, text.join("\n")));
    this.#result.hidden = false;
  }

  /** This prompt is the benchmark to tell of, also after the page was loaded again. */
  #follow(/** @type {string} */ id) {
    this.#prompt = id;
    this.#over = this.#counted = false;
    try {
      if (id) sessionStorage.setItem(STORED, id);
      else sessionStorage.removeItem(STORED);
    } catch {
      // Storage is full or forbidden: a reload forgets the benchmark.
    }
  }

  /** Look for the benchmark where ComfyUI has it: this page may not have heard how it goes on, or how it ended. */
  async #find() {
    const id = this.#prompt;
    if (!id || this.#over) return;
    const ended = async () => (await get(`/history/${id}`))[id];
    try {
      let found = await ended();
      const { queue_running = [], queue_pending = [] } = found ? {} : await get("/queue");
      const within = (/** @type {any[]} */ items) => items.some((item) => item[1] === id);
      const [runs, waits] = [within(queue_running), within(queue_pending)];
      found ??= runs || waits ? null : await ended(); // it may have ended between the two questions
      if (id !== this.#prompt || this.#over) return;
      if (found) return this.#ended(found);
      if (waits) return setText(this.#said, t("bench.queued"));
      if (runs) return this.#counted || setText(this.#said, t("bench.started"));
      this.#follow("");
      setText(this.#said, "");
      this.#alert.say(t("bench.gone"));
    } catch {
      // ComfyUI is away; it says when it is there again.
    }
  }

  /** Tell the end of the benchmark by its entry in the history. */
  #ended({ outputs = {}, status }) {
    if (outputs[NODE]) return this.#show(outputs[NODE]);
    const told = Object.fromEntries(status?.messages ?? []);
    this.#failed({ prompt_id: this.#prompt, ...(told.execution_error ?? {}) });
  }
}
