// The machine in four lines.

import { alertBox, make, section } from "./dom.js";
import { said } from "./said.js";
import { get } from "./server.js";
import { t } from "./text.js";

export class Machine {
  #section = section("machine", t("machine.title"));
  element = this.#section.element;
  #alert = alertBox();
  #lines = make("ul", { class: "lines" });

  constructor() {
    this.#section.body.append(this.#alert.element, this.#lines);
  }

  async refresh() {
    try {
      const { version, comfyui, off, lines, remarks = [] } = await get("/attune/machine");
      this.#alert.say(off ? t("machine.off") : "");
      this.#lines.replaceChildren(
        ...lines.map((line) => make("li", {}, said(line))),
        ...remarks.map((remark) => make("li", { class: "remark" }, said(remark))),
        make("li", { class: "quiet" }, t("machine.version", { version, comfyui })),
      );
    } catch (error) {
      this.#alert.say(error, () => this.refresh());
    }
  }
}
