// The section about the sampling that goes on, and the messages that feed it.

import { api, listen } from "../comfy.js";
import { make, section, setText } from "./dom.js";
import { Run } from "./run.js";
import { post } from "./server.js";
import { t } from "./text.js";
import { RunView } from "./view.js";

const REPEAT = 15_000; // milliseconds; the server forgets who has not asked for twice as long

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

  /** @param {(run: Run) => void} ended is told when a run has come to an end. */
  constructor(ended) {
    this.#ended = ended;
    this.#view.element.hidden = true;
    this.#section.body.append(this.#said, this.#view.element);
    listen("attune.live", (detail) => this.#hear(detail));
    listen("reconnected", () => {
      this.#forget();
      this.tell();
    });
    document.addEventListener("visibilitychange", () => this.tell());
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

  #say() {
    this.#said.hidden = Boolean(this.#wanted && this.#run?.running);
    setText(this.#said, t(!this.#wanted ? "live.off" : this.#run ? "live.waiting" : "live.none"));
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
