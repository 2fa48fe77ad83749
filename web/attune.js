// ComfyUI-Attune in the browser: each node of the pack shows which kernel really ran, and why not the one asked for.

import { BYPASSED, MUTED, api, app, aroundLoading, isLoading, rootGraph, walk } from "./comfy.js";
import { Face } from "./face.js";
import { isBenchmark } from "./panel/benchmark.js";
import { Runs } from "./runs.js";

const runs = new Runs();
const faces = new WeakMap(); // node -> Face
const queueing = new Set(); // requests to queue a prompt that the server has not answered
let turn = Promise.resolve(); // the news heard so far have been taken in

/** The object behind the front end's reactive proxy: the same one however it was reached. */
const plain = (object) => object?.__v_raw ?? object;

/** The open tab, as runs.js means it. */
function tab() {
  const workflow = plain(app.extensionManager?.workflow?.activeWorkflow) ?? null;
  return { workflow, path: workflow?.path ?? "", graph: String(rootGraph()?.id) };
}

/** Make every node of the open graph show its last runs, or nothing. Never throws: graphs are loaded around it. */
function render() {
  if (isLoading()) return;
  try {
    draw();
  } catch (error) {
    console.error("Attune:", error);
  }
}

function draw() {
  const nodes = new Map(walk(rootGraph()));
  const shown = runs.shown(tab());
  const title = (id) => (id ? `${nodes.get(id)?.title ?? "sampler"} #${id}` : "sampler");
  /** @type {Map<any, any[]>} */
  const entries = new Map([...nodes.values()].map((node) => [node, []]));
  for (const { run, old } of shown) {
    for (const [id, part] of Object.entries(run.nodes)) {
      const node = nodes.get(id);
      const here = node && node.type === part.node_type && node.mode !== MUTED && node.mode !== BYPASSED;
      if (here) entries.get(node)?.push({ node: part, run, old, sampler: title(run.sampler_node) });
    }
  }
  for (const [node, found] of entries) {
    if (!found.length && !faces.has(node)) continue;
    if (!faces.has(node)) faces.set(node, new Face(node));
    faces.get(node).show(found);
  }
}

/** Fetch what this page was not there to hear. */
async function refill() {
  try {
    const answer = await api.fetchApi("/attune/runs");
    if (answer.ok) (await answer.json()).runs.forEach((run) => runs.add(run));
  } catch {
    return; // the server is away; the next graph that is loaded asks again
  }
  render();
}

/** A result was cached that may come from a prompt of which this page knows nothing: ask the server for that. */
async function learn() {
  for (const id of runs.unknown(tab())) {
    try {
      const prompt = (await (await api.fetchApi(`/history/${id}`)).json())[id]?.prompt?.[2];
      runs.learn(id, prompt ?? {});
    } catch {
      return; // the server is away
    }
  }
}

function save() {
  const workflows = app.extensionManager?.workflow?.openWorkflows ?? [];
  runs.save(new Set(workflows.map(plain)));
}

/** Remember which tab queued which prompt. */
function watchQueue() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (number, data, ...rest) {
    const from = tab();
    const request = queuePrompt.call(api, number, data, ...rest);
    queueing.add(request);
    try {
      const answer = await request;
      if (answer?.prompt_id && data?.output && data.workflow?.id === from.graph && !isBenchmark(data.output)) {
        runs.queued(answer.prompt_id, from, data.output);
        save();
      }
      return answer;
    } finally {
      queueing.delete(request);
    }
  };
}

/** After a graph was loaded (another tab, a file, an undo) its nodes are new objects. */
function watchLoading() {
  aroundLoading(
    () => tab().graph,
    (before) => {
      render();
      if (tab().graph !== before) refill();
    },
  );
}

/**
 * On `event`: take its news in and show it, one after the other. News of a prompt can come before the answer that
 * gives the prompt its id, so that is waited for.
 */
function on(event, take) {
  const hear = async (detail) => {
    await Promise.allSettled(queueing);
    await take(detail ?? {});
    render();
  };
  api.addEventListener(event, ({ detail }) => {
    turn = turn.then(() => hear(detail)).catch((error) => console.error("Attune:", error));
  });
}

app.registerExtension({
  name: "attune.status",
  async setup() {
    runs.restore();
    watchQueue();
    watchLoading();
    on("attune.status", (run) => runs.add(run));
    on("execution_start", ({ prompt_id }) => runs.started(prompt_id));
    on("execution_cached", ({ prompt_id, nodes }) => {
      runs.cached(prompt_id, nodes ?? []);
      return learn();
    });
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
      on(end, ({ prompt_id }) => runs.ended(prompt_id));
    }
    api.addEventListener("reconnected", refill);
    addEventListener("pagehide", save);
    await refill();
  },
});
