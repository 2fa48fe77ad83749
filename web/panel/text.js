// The panel's words. A translation is a `locales/<language>/main.json` with these ids under "attune"; ComfyUI serves it.

import { api, app } from "../comfy.js";
import { learn } from "./said.js";

/** @type {Record<string, string>} */
export const ENGLISH = {
  title: "Attention",
  tooltip: "Attention kernels: what works here, and what runs",

  "machine.title": "This machine",
  "machine.off": "ComfyUI-Attune is switched off by the environment variable ATTUNE. Unset it and restart ComfyUI.",
  "machine.version": "ComfyUI-Attune {version}, ComfyUI {comfyui}",

  "tools.title": "Tools",
  "tools.benchmark": "Benchmark this model",
  "tools.bundle": "Copy the doctor's bundle",
  "tools.copied": "Copied.",
  "tools.bundle.hint": "What the doctor found, as text, for a bug report.",
  "tools.copy.failed": "The browser does not let this page copy. The text is marked: press Ctrl+C.",
  "tools.bypass": "Bypass all",
  "tools.enable": "Enable all",
  "tools.bypass.hint":
    "All nodes of this workflow that choose a kernel, also those of KJNodes and those in subgraphs. What is muted " +
    "stays muted. Ctrl+Z undoes it.",

  "bench.sampler": "Benchmark the model of which sampler?",
  "bench.start": "Start",
  "bench.queued": "The benchmark is in the queue.",
  "bench.running": "The benchmark runs: {done} of {total}.",
  "bench.started": "The benchmark runs. It takes some seconds for each kernel and shape.",
  "bench.done": "The benchmark is done.",
  "bench.result": "Result of the benchmark",
  "bench.gone":
    "ComfyUI no longer knows the benchmark: it was taken out of the queue, its history was cleared, or ComfyUI was " +
    "started again.",
  "bench.picture": "Speed by shape, and speed against error",
  "bench.failed": "The benchmark failed: {message}",
  "bench.none":
    "No model to benchmark was found. Wanted: a sampler with a model, a conditioning and a latent connected; found " +
    "none in the open workflow that is not bypassed or muted. Open a workflow that samples.",
  "bench.refused":
    "ComfyUI did not take the benchmark: {message} Run the workflow once; what stops it there stops the benchmark too.",

  "live.title": "Sampling",
  "live.off": "The live map is off. Switch it on in Settings → Attune.",
  "live.none": "Nothing has been sampled yet. Run a workflow with an attention node, and watch it here.",
  "live.waiting": "Nothing is being sampled with an attention node. This was the last run.",

  "prompt.running": "The prompt that runs has no active attention node of ComfyUI-Attune: nothing of it is recorded.",
  "prompt.without":
    "The last prompt ran without an attention node of ComfyUI-Attune, so nothing of it was recorded: whatever it " +
    "sampled, ComfyUI itself or another pack computed the attention.",
  "prompt.default":
    "The last prompt ran without an attention node of ComfyUI-Attune, so nothing of it was recorded: whatever it " +
    "sampled was to run on {kernel}, the default of the environment.",
  "prompt.cached": "The last prompt sampled nothing: ComfyUI had all of it in its cache.",
  "prompt.nothing":
    "Nothing that the last prompt sampled went through its attention nodes: the result was in ComfyUI's cache, the " +
    "nodes are switched off, or they have no sampler of ComfyUI's behind them.",
  "prompt.failed": "The last prompt failed before anything was sampled with an attention node.",
  "prompt.stopped": "The last prompt was stopped before anything was sampled with an attention node.",
  "prompt.below": "Shown below: run {number}.",

  "run.number": "Run {number}",
  "run.steps": "steps {first}–{last} of {steps}",
  "run.one": "step {step} of {steps}, counted from 0",
  "run.step": "step {step} (of {first}–{last})",
  "run.only": "step {step}",
  "run.whole": "{steps} steps",
  "run.seconds": "{seconds}\u00a0s",
  "run.running": "running",
  "run.finished": "finished",
  "run.failed": "failed",
  "run.stopped": "stopped",
  "run.kind": "Calls shown",
  "run.kind.both": "All",
  "run.kind.self": "Self",
  "run.kind.cross": "Cross",
  "run.map": "Map of blocks (down) and steps (across). The arrow keys move from cell to cell.",
  "run.map.hint": "Point at a cell, or use the arrow keys, to read it.",
  "run.map.block": "Block",
  "run.map.step": "Step",
  "run.map.other": "other",
  "run.map.all": "all",
  "run.cell": "Step {step}, {block}: {what}",
  "run.cell.block": "block {block}",
  "run.cell.other": "calls outside any block",
  "run.cell.none": "no call yet",
  "run.marks": "× the kernel was given up here · ▼ the step was repeated",
  "run.marks.edge": "lower edge: cross attention",
  "run.marks.doubles": "line: the single blocks begin",
  "run.kernel": "Kernel",
  "run.host": "ComfyUI's own attention",
  "run.calls": "Calls",
  "run.time": "Time",
  "run.error": "Error",
  "run.highlight": "Show only {kernel} on the map",
  "run.untimed": "To see times, switch on time_calls on the Attention Selector.",
  "run.left": "The map has no room for {count} steps; the report has them.",
  "run.events": "What did not go as planned",
  "run.events.none": "Everything ran as it was asked for.",
  "event.fallback": "Fallback:",
  "event.demotion": "Given up:",
  "event.repeat": "Repeated:",
  "event.not attention": "Not attention:",
  "event.wait": "Waited:",
  "run.event": "{text} ({where})",
  "run.more": "{count} more are in the report.",
  "run.table": "The map as a table",
  "run.table.steps": "Steps",
  "run.table.blocks": "Blocks",
  "run.table.kind": "Kind",
  "run.table.both": "self and cross",

  "runs.title": "Last runs",
  "runs.none": "No run yet since ComfyUI was started.",
  "runs.show": "Show",
  "runs.with": "Beside",
  "runs.nothing": "(nothing)",
  "runs.above": "This run is shown above.",
  "runs.save": "Save the report:",
  "runs.text": "Text",
  "runs.save.as": "Save the report of run {number} as {format}",
  "runs.compare": "Side by side",
  "runs.difference": "Run {b} took {seconds} s, {percent} {word} than run {a} ({other} s).",
  "runs.slower": "more",
  "runs.faster": "less",
  "runs.gone": "Run {number} is no longer kept. ComfyUI keeps the last 50; choose another one.",

  "kernels.title": "Kernels",
  "kernels.probe": "Probe again",
  "kernels.probe.hint":
    "Tries every kernel in a process of its own and compares it with exact attention. One that works gets a new " +
    "chance in models where it had failed.",
  "kernels.probing": "Probing {done} of {total}: {kernel}",
  "kernels.probed": "All kernels were probed.",
  "kernels.name": "Kernel",
  "kernels.verdict": "Verdict",
  "kernels.speed": "Speed",
  "kernels.error": "Error",
  "kernels.error.hint": "{error} measured, {allowed} allowed (relative L2)",
  "kernels.speed.hint": "the fastest call of {timed}",
  "kernels.rest": "Not installed, or not for this machine ({count})",
  "kernels.copy": "Copy",
  "kernels.copy.of": "Copy what to type for {kernel}",
  "kernels.none": "ComfyUI-Attune knows no kernel here. Restart ComfyUI and read its log.",
  "verdict.works": "works",
  "verdict.host": "part of ComfyUI",
  "verdict.off": "not looked at",
  "verdict.open": "not tried yet",
  "verdict.not installed": "not installed",
  "verdict.cannot import": "cannot be imported",
  "verdict.unsupported": "not for this machine",
  "verdict.wrong numbers": "wrong numbers",
  "verdict.crashed": "crashed",
  "verdict.hung": "hung",
  "verdict.undecided": "undecided",

  "nodes.bypassed": "Bypassed attention nodes: {count}. Ctrl+Z undoes it.",
  "nodes.enabled": "Enabled attention nodes: {count}. Ctrl+Z undoes it.",
  "nodes.none.active": "Nothing to bypass: this workflow has no active attention node.",
  "nodes.none.bypassed": "Nothing to enable: this workflow has no bypassed attention node.",

  "error.away": "ComfyUI does not answer ({path}). Is it still running? Start it, then try again.",
  "error.old":
    "The server does not know {path} (HTTP 404). Restart ComfyUI, so that it loads the same version of " +
    "ComfyUI-Attune as this page.",
  "error.refused": "{message} ({path}, HTTP {status})",
  "error.strange": "The answer of {path} cannot be read: wanted JSON. Restart ComfyUI and reload this page.",
  "error.again": "Try again",
};

/** @type {Record<string, string>} */
let translated = {};

const chosen = () => String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");

/** Fetch the words of the language that ComfyUI is set to. English where there are none. */
export async function chooseLanguage() {
  const language = chosen();
  /** @type {Record<string, any>} */
  let words = {};
  try {
    if (language !== "en") words = (await (await api.fetchApi("/i18n")).json())[language] ?? {};
  } catch {
    // English will do.
  }
  if (language !== chosen()) return; // it was changed meanwhile: whoever asked for that has the words
  translated = words.attune ?? {};
  learn(words.attune_said ?? {});
}

/**
 * The words of `id`, with `{name}` replaced by `values.name`.
 * @param {string} id
 * @param {Record<string, string | number>} [values]
 */
export function t(id, values = {}) {
  const text = translated[id] ?? ENGLISH[id] ?? id;
  return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}
