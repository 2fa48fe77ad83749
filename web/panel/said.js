// What the server says, in the page's language: whole sentences are known by their English words. A translation has
// them under "attune_said" in its `main.json`, with `{name}` for what varies. What is not there stays English.

const KEPT = 1000;
const LONGEST = 1000; // letters of what is looked up: what an error says of itself is no sentence of ours
const VALUE = "((?:(?!; |\\. [A-Z'`]).)*?)"; // what ends a sentence is in no value
const NAME = "([^\\s:;,]+)"; // {kernel} is one word, or it would take "not flash2 ×4: " along

/** @type {{pattern: RegExp, names: string[], words: string}[]} those with the most words of their own first */
let sentences = [];
/** @type {Map<string, string>} */
const known = new Map();

/** @param {Record<string, string>} table English sentence → sentence */
export function learn(table) {
  known.clear();
  const own = (/** @type {string} */ english) => english.replace(/\{\w+\}/g, "").length;
  sentences = Object.entries(table)
    .sort(([a], [b]) => own(b) - own(a))
    .map(([english, words]) => {
      const parts = english.split(/\{(\w+)\}/); // text, name, text, name, ...
      const escaped = (/** @type {string} */ part) => part.replace(/[^\w\s]/g, "\\$&");
      const source = parts.map((part, at) => (at % 2 ? (part === "kernel" ? NAME : VALUE) : escaped(part))).join("");
      return { pattern: new RegExp(`^${source}$`, "s"), names: parts.filter((_, at) => at % 2), words };
    });
}

/** `text` as one of the sentences, or undefined. @param {string} text */
function whole(text) {
  for (const { pattern, names, words } of sentences) {
    const found = pattern.exec(text);
    if (found) return words.replace(/\{(\w+)\}/g, (_, name) => said(found[1 + names.indexOf(name)] ?? ""));
  }
}

/** The parts of `text`, each by itself; undefined where none of them is known. */
function inParts(/** @type {string} */ text, /** @type {RegExp} */ border, /** @type {string} */ between) {
  const parts = text.split(border);
  if (parts.length < 2) return;
  const told = parts.map(said);
  return told.some((part, at) => part !== parts[at]) ? told.join(between) : undefined;
}

/** What the server says in the page's language, as far as it is known there. @param {string} text @returns {string} */
export function said(text) {
  if (!sentences.length || !text) return text;
  const before = known.get(text);
  if (before !== undefined) return before;
  const told =
    (text.length > LONGEST ? undefined : whole(text)) ??
    inParts(text, /(?<=\.) (?=[A-Z'`])/, " ") ??
    inParts(text, /; /, "；") ??
    inParts(text, /, /, "，") ??
    text;
  if (known.size >= KEPT) known.clear();
  known.set(text, told);
  return told;
}
