// The last runs: one of them, or two side by side, and their reports.

import { alertBox, button, make, section, setText } from "./dom.js";
import { Run } from "./run.js";
import { download, get } from "./server.js";
import { t } from "./text.js";
import { RunView, named, percent, samplerOf, short } from "./view.js";

const FORMATS = { text: "txt", json: "json", png: "png" };

/** What stands for a run in a list. */
function label(row) {
  const kernels = Object.entries(row.observed ?? {}).sort(([, a], [, b]) => b - a);
  const ran = kernels.map(([name, calls]) => `${name} ×${calls}`).join(", ");
  const status = row.status === "finished" ? "" : t(`run.${row.status}`);
  const took = row.seconds ? t("run.seconds", { seconds: short(row.seconds) }) : "";
  const time = row.started ? new Date(row.started).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : "";
  return [row.run, time, row.model, samplerOf(row.sampler_node), took, ran, status].filter(Boolean).join(" · ");
}

export class History {
  #section = section("runs", t("runs.title"));
  element = this.#section.element;
  #alert = alertBox();
  #none = make("p", { class: "quiet" }, t("runs.none"));
  #first = make("select", { id: "attune-run-a" });
  #second = make("select", { id: "attune-run-b" });
  /** @type {HTMLElement} */
  #save = make("p", { class: "row save" }, make("span", {}, t("runs.save")));
  #content = make("div", { class: "content", hidden: true });
  #beside = make("div", { class: "beside" });
  #compared = make("div", { class: "compared", hidden: true });
  #views = [new RunView(), new RunView()];
  /** @type {Map<number, Run>} */
  #known = new Map();
  #newest = 0;
  #above;
  #keep;
  #shown = make("p", { class: "quiet", hidden: true }, t("runs.above"));
  #turn = 0;

  /**
   * @param {(run: Run) => boolean} above shows the newest run in the section above; false where it shows another.
   * @param {(known: (run: Run) => boolean) => void} keep is told which runs are the server's.
   */
  constructor(above, keep) {
    this.#above = above;
    this.#keep = keep;
    for (const format of Object.keys(FORMATS)) {
      const press = button(format === "text" ? t("runs.text") : format.toUpperCase(), () => this.#download(format));
      this.#save.append(press);
    }
    const pick = (id, select) => make("p", { class: "row" }, make("label", { for: select.id }, t(id)), select);
    this.#content.append(pick("runs.show", this.#first), pick("runs.with", this.#second), this.#save);
    this.#content.append(this.#shown, this.#compared, this.#beside);
    for (const select of [this.#first, this.#second]) select.addEventListener("change", () => this.#show());
    this.#section.body.append(this.#alert.element, this.#none, this.#content);
  }

  /** Ask the server for the list, and show the newest run unless the user has chosen another one. */
  async refresh() {
    try {
      const { runs } = await get("/attune/runs");
      this.#alert.say("");
      await this.#list(runs.filter((row) => row.status !== "running"));
    } catch (error) {
      this.#alert.say(error, () => this.refresh());
    }
  }

  async #list(rows) {
    // ComfyUI may have been started again, and counts from the beginning.
    const prompts = new Map(rows.map((row) => [row.run, row.prompt_id]));
    const known = (run) => prompts.has(run.number) && (!run.prompt || prompts.get(run.number) === run.prompt);
    for (const [number, run] of this.#known) if (!known(run)) this.#known.delete(number);
    this.#keep(known);
    this.#none.hidden = rows.length > 0;
    this.#content.hidden = !rows.length;
    if (!rows.length) return;
    const newest = rows.at(-1).run;
    const follow = !this.#first.value || Number(this.#first.value) === this.#newest;
    this.#newest = newest;
    const options = () => rows.map((row) => make("option", { value: row.run }, label(row))).reverse();
    fill(this.#first, options(), follow ? String(newest) : this.#first.value);
    const nothing = make("option", { value: "" }, t("runs.nothing"));
    fill(this.#second, [nothing, ...options()], this.#second.value);
    await this.#show();
  }

  /** @param {number} number @returns {Promise<Run>} */
  async #get(number) {
    const known = this.#known.get(number);
    if (known) return known;
    const run = Run.past(number, await get(`/attune/runs/${number}`));
    this.#known.set(number, run);
    return run;
  }

  async #show() {
    const turn = ++this.#turn;
    for (const press of this.#save.querySelectorAll("button")) {
      const values = { number: this.#first.value, format: press.textContent ?? "" };
      press.setAttribute("aria-label", t("runs.save.as", values));
    }
    const numbers = [this.#first.value, this.#second.value].filter(Boolean).map(Number);
    try {
      const runs = await Promise.all(numbers.map((number) => this.#get(number)));
      if (turn !== this.#turn) return; // the user has chosen again meanwhile
      this.#alert.say("");
      const above = this.#above(await this.#get(this.#newest)) && runs.length === 1 && runs[0].number === this.#newest;
      this.#shown.hidden = !above;
      const shown = (above ? [] : runs).map((run, place) => {
        this.#views[place].show(run);
        return this.#views[place].element;
      });
      for (const element of [...this.#beside.children]) if (!shown.includes(element)) element.remove();
      for (const element of shown) if (!element.isConnected) this.#beside.append(element);
      this.#beside.classList.toggle("two", shown.length > 1);
      this.#compare(runs);
    } catch (error) {
      if (turn !== this.#turn) return;
      this.#beside.replaceChildren();
      this.#shown.hidden = this.#compared.hidden = true;
      const gone = error.status === 404;
      this.#alert.say(gone ? t("runs.gone", { number: numbers.join(", ") }) : error, gone ? null : () => this.#show());
    }
  }

  /** @param {Run[]} runs */
  #compare([a, b]) {
    this.#compared.hidden = !b;
    if (!b) return;
    const head = ["run.kernel", "run.calls", "run.time", "run.error"].map((id) => t(id));
    const columns = [head[0], ...head.slice(1).flatMap((name) => [`${name} ${a.number}`, `${name} ${b.number}`])];
    const names = [...new Set([a, b].flatMap((run) => [...run.figures.keys()]))];
    const of = (run, name) => run.figures.get(name) ?? { calls: 0, seconds: null, share: null, error: null };
    const time = ({ seconds, share }) =>
      seconds === null ? "–" : [`${short(seconds)} s`, share === null ? "" : `(${percent(share)})`].join(" ").trim();
    const rows = names.map((name) => {
      const [one, other] = [of(a, name), of(b, name)];
      const cells = [one.calls, other.calls, time(one), time(other), short(one.error), short(other.error)];
      const header = make("th", { scope: "row" }, named(name));
      return make("tr", {}, header, ...cells.map((cell) => make("td", {}, cell)));
    });
    const caption = make("caption", {}, t("runs.compare"));
    const heads = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
    const table = make(
      "table",
      { class: "figures wide" },
      caption,
      make("thead", {}, heads),
      make("tbody", {}, ...rows),
    );
    const said = make("p", { role: "status" });
    if (a.seconds && b.seconds) {
      const ratio = b.seconds / a.seconds - 1;
      const word = t(ratio < 0 ? "runs.faster" : "runs.slower");
      const values = { a: a.number, b: b.number, seconds: short(b.seconds), other: short(a.seconds), word };
      setText(said, t("runs.difference", { ...values, percent: percent(Math.abs(ratio)) }));
    }
    this.#compared.replaceChildren(
      said,
      make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": t("runs.compare") }, table),
    );
  }

  async #download(format) {
    const number = this.#first.value;
    const name = `attune-run-${number}.${FORMATS[/** @type {keyof typeof FORMATS} */ (format)]}`;
    try {
      await download(`/attune/runs/${number}/report?format=${format}`, name);
      this.#alert.say("");
    } catch (error) {
      this.#alert.say(error);
    }
  }

  redraw() {
    for (const view of this.#views) view.redraw();
  }
}

/** Give `select` these options, and keep its value where it is still there. */
function fill(select, options, value) {
  const said = options.map((option) => option.textContent).join("\n");
  if (select.dataset.said !== said) select.replaceChildren(...options);
  select.dataset.said = said;
  select.value = value;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}
