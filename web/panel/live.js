// The section about the sampling that goes on, and the messages that feed it.

import { api, listen } from "../comfy.js";
import { make, section, setText } from "./dom.js";
import { Run } from "./run.js";
import { get, post } from "./server.js";
import { t } from "./text.js";
import { RunView } from "./view.js";

const REPEAT = 15_000; // milliseconds; the server forgets who has not asked for twice as long
const PAUSE = 200; // milliseconds after which a change of the queue is looked at: they come in numbers

export class Live {
  #section = section("live", t("live.title"));
  element = this.#section.element;
  #said = make("p", { class: "quiet", role: "status" }, t("live.none"));
  #view = new RunView();
  /** @type {Run | null} */
  #run = null;
  #frame = 0;
  #timer = 0;
  #mounted = false;
  #wanted = true;
  #watching = false;
  #ended;
  /** @type {any} what the server knows of the prompt that runs or ran last */
  #prompt = null;
  #look = 0;

  /**
   * @param {(run: Run) => void} ended is told when a run has come to an end.
   * @param {AbortSignal} signal ends its listening.
   */
  constructor(ended, signal) {
    this.#ended = ended;
    this.#view.element.hidden = true;
    this.#section.body.append(this.#said, this.#view.element);
    listen("attune.live", (detail) => this.#hear(detail), signal);
    const again = () => {
      this.#forget();
      this.tell();
    };
    listen("reconnected", again, signal);
    listen("status", () => this.refresh(), signal); // a prompt has come, begun or ended, of whichever page
    document.addEventListener("visibilitychange", () => this.tell(), { signal });
  }

  /** The panel is shown, or no longer. */
  set mounted(shown) {
    this.#mounted = shown;
    if (!shown) this.#forget();
    this.tell();
  }

  /** A run goes on unseen from now on: if it still does when somebody looks again, the server tells all of it. */
  #forget() {
    if (!this.#run?.running) return;
    this.#run = null;
    this.#view.element.hidden = true;
  }

  /** Show a run that is over no longer where it is none of the server's. @param {(run: Run) => boolean} known */
  keep(known) {
    if (!this.#run || this.#run.running || known(this.#run)) return;
    this.#run = null;
    this.#view.element.hidden = true;
    this.#say();
  }

  /** Does the user want to see the map? */
  set wanted(on) {
    this.#wanted = on;
    this.tell();
  }

  /** Tell the server whether this page shows what is sampled. */
  tell() {
    const on = this.#mounted && this.#wanted && !document.hidden;
    clearInterval(this.#timer);
    if (on) this.#timer = setInterval(() => this.#send(true), REPEAT);
    if (on || this.#watching) this.#send(on);
    this.#watching = on;
    this.#say();
  }

  /** Ask which prompt was the last one, a moment after this was called first. */
  refresh() {
    if (!this.#mounted) return;
    this.#look ||= setTimeout(async () => {
      this.#look = 0;
      if (!this.#mounted) return;
      try {
        this.#prompt = (await get("/attune/last-prompt")).prompt;
      } catch {
        this.#prompt = null; // the other sections say what is wrong
      }
      this.#say();
    }, PAUSE);
  }

  /** Why no run belongs to the prompt that runs or ran last, "" where one does or nobody knows. */
  #why() {
    const { state, nodes, runs = [], cached, default: kernel } = this.#prompt ?? { state: "" };
    if (!state || runs.length || (state === "running" && nodes)) return "";
    if (state === "running") return t("prompt.running");
    if (cached) return t("prompt.cached");
    if (!nodes) return kernel ? t("prompt.default", { kernel }) : t("prompt.without");
    return t(`prompt.${state === "finished" ? "nothing" : state}`);
  }

  #say() {
    this.#said.hidden = Boolean(this.#wanted && this.#run?.running);
    const why = this.#wanted ? this.#why() : "";
    const below = why && this.#run ? t("prompt.below", { number: this.#run.number }) : "";
    const usual = t(!this.#wanted ? "live.off" : this.#run ? "live.waiting" : "live.none");
    this.#said.className = why ? "remark" : "quiet";
    setText(this.#said, why ? `${why} ${below}`.trim() : usual);
  }

  async #send(on) {
    const client_id = api.clientId;
    if (!client_id) return;
    try {
      await post("/attune/watch", { client_id, on });
    } catch (error) {
      if (on) setText(this.#said, error.message);
      if (on) this.#said.hidden = false;
    }
  }

  #hear(event) {
    if (!this.#mounted || !event) return;
    if (!this.#run || this.#run.number !== event.run) {
      if (!event.full && event.status !== "running") return; // the end of a run of which nothing is known
      this.#run = new Run();
    }
    const before = this.#run.running;
    this.#run.update(event);
    this.#frame ||= requestAnimationFrame(() => this.#draw());
    if (before && !this.#run.running) this.#ended(this.#run);
  }

  #draw() {
    this.#frame = 0;
    if (!this.#run) return;
    this.#view.element.hidden = false;
    this.#view.show(this.#run);
    this.#say();
  }

  /** The newest run that has ended: show it, unless the next one is shown already. @param {Run} run */
  show(run) {
    if (this.#run?.running && this.#run.number > run.number) return false;
    this.#run = run;
    this.#draw();
    return true;
  }

  redraw() {
    this.#view.redraw();
  }
}
