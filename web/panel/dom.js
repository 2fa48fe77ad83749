// Elements of the page, made and kept up to date.

import { t } from "./text.js";

/**
 * A new element: `make("p", { class: "quiet", onclick: run }, "text", child)`. What begins with "on" is a listener,
 * `null` and `false` leave an attribute or a child out.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Node | string | number | null | undefined | false)} children
 * @returns {any}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false).map(asNode));
  return element;
}

const asNode = (/** @type {any} */ child) => (child instanceof Node ? child : String(child));

/** Give `element` this text, unless it has it: what does not change is neither laid out nor read aloud again. */
export function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = String(text);
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, String(value));
}

/** A section with a heading that folds it: {element, body}. */
export function section(name, title) {
  const body = make("div", { class: "body" });
  const heading = make("h3", { id: `attune-${name}` }, title);
  const fold = make("details", { open: true }, make("summary", {}, heading), body);
  const element = make("section", { "aria-labelledby": `attune-${name}`, "data-section": name }, fold);
  return { element, body };
}

/** A place for what went wrong: `say(error, again)` shows it, with a button where `again` is given; `say("")` clears. */
export function alertBox() {
  const element = make("div", { class: "alert", role: "alert", hidden: true });
  /** @param {any} error @param {(() => void) | null} again */
  const say = (error, again = null) => {
    const text = error instanceof Error ? error.message : error;
    element.hidden = !text;
    const button = again && make("button", { type: "button", onclick: again }, t("error.again"));
    element.replaceChildren(...(text ? [make("span", {}, text), ...(button ? [button] : [])] : []));
  };
  return { element, say };
}

/** A button that cannot be pressed again while `action` (async) goes on. */
export function button(label, action, attributes = {}) {
  const element = make("button", { type: "button", ...attributes }, label);
  element.addEventListener("click", async () => {
    if (element.getAttribute("aria-disabled") === "true") return;
    element.setAttribute("aria-disabled", "true"); // not `disabled`, which would lose the keyboard's place
    try {
      await action();
    } finally {
      element.removeAttribute("aria-disabled");
    }
  });
  return element;
}

/** Put `text` into the clipboard; false where the browser does not let a page of this address do so. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No secure address, as http:// in a local network: the old way still works there.
  }
  const area = make("textarea", { style: "position: fixed; opacity: 0", "aria-hidden": "true", tabindex: -1 });
  area.value = text;
  const before = /** @type {any} */ (deepFocus());
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus?.();
  return done;
}

function deepFocus() {
  let element = document.activeElement;
  while (element?.shadowRoot?.activeElement) element = element.shadowRoot.activeElement;
  return element;
}

/** A button that copies `text`, and says that it did. */
export function copyButton(text, label, attributes = {}) {
  const said = make("span", { class: "said", role: "status" });
  const press = button(
    label,
    async () => {
      setText(said, (await copy(text)) ? t("tools.copied") : t("tools.copy.failed"));
      setTimeout(() => setText(said, ""), 4000);
    },
    attributes,
  );
  return make("span", { class: "copy" }, press, said);
}
