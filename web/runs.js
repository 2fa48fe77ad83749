// Which sampling run belongs to which open workflow. Knows nothing of the page; attune.js feeds it.
//
// A tab is {workflow, path, graph}: the front end's workflow object, its path, and the id of its root graph. Two tabs
// may hold the same graph id (the same file opened twice), so the tab that queued a prompt is remembered, over a
// reload of the page by its path. Only prompts of which nothing is known are told by the graph id alone.

const KEPT = 50;
const ASKED = 10; // of so many earlier prompts at once
const STORED = "attune.prompts";

/** Forget the oldest entries of `map` above `size`. */
function trim(map, size) {
  for (const key of map.keys()) {
    if (map.size <= size) break;
    map.delete(key);
  }
}

/** A short fingerprint of `text`. */
function hash(text) {
  let a = 0x811c9dc5;
  let b = 0x2545f491;
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    a = Math.imul(a ^ code, 0x01000193);
    b = Math.imul(b ^ code, 0x85ebca6b) + 1;
  }
  return (a >>> 0).toString(36) + (b >>> 0).toString(36);
}

/** Fingerprints of an API prompt's nodes, by id; equal where a node and all that leads to it are, ids included. */
export function fingerprints(prompt) {
  const done = {};
  const of = (id) => {
    const node = prompt[id];
    if (!node) return "";
    if (!(id in done)) {
      done[id] = ""; // a loop ends here
      const linked = ([name, value]) =>
        Array.isArray(value) && value.length === 2 && String(value[0]) in prompt
          ? [name, of(String(value[0])), value[1]]
          : [name, value];
      const inputs = Object.entries(node.inputs ?? {}).map(linked);
      done[id] = hash(JSON.stringify([id, node.class_type, inputs]));
    }
    return done[id];
  };
  Object.keys(prompt).forEach(of);
  return done;
}

/** Is `tab` where `prompt` was queued? */
function owns(prompt, tab) {
  const same = prompt.workflow ? prompt.workflow === tab.workflow : Boolean(prompt.path) && prompt.path === tab.path;
  return same && prompt.graph === tab.graph;
}

export class Runs {
  #prompts = new Map(); // prompt id -> {id, workflow, path, graph, cached, order, done}, oldest first
  #prints = new Map(); // prompt id -> the fingerprints of its nodes
  #runs = new Map(); // one entry per sampling run, oldest first
  #started = 0;

  /** `tab` queued the API prompt `prompt`, which the server calls `id`. */
  queued(id, tab, prompt) {
    this.#prompts.set(id, { id, ...tab, cached: [], order: 0, done: false });
    this.learn(id, prompt);
    trim(this.#prompts, KEPT);
  }

  /** The API prompt that the server calls `id` was this one. */
  learn(id, prompt) {
    this.#prints.set(id, fingerprints(prompt));
    trim(this.#prints, 2 * KEPT);
  }

  started(id) {
    const prompt = this.#prompts.get(id);
    if (prompt) prompt.order = ++this.#started;
  }

  /** The server did not run `nodes` again: what they gave the last time still stands. */
  cached(id, nodes) {
    const prompt = this.#prompts.get(id);
    if (prompt) prompt.cached = nodes.map(String);
  }

  ended(id) {
    const prompt = this.#prompts.get(id);
    if (prompt) prompt.done = true;
  }

  add(run) {
    const key = `${run.prompt_id}/${run.run}`;
    const known = this.#runs.get(key);
    if (known && run.status === "running") return;
    this.#runs.set(key, run);
    trim(this.#runs, 2 * KEPT);
  }

  /**
   * The runs to show in `tab`, as [{run, old}]. `old` marks a run of an earlier prompt while the present one has not
   * come so far. A sampler that was cached shows the run that its result came from.
   */
  shown(tab) {
    const last = this.#last(tab);
    if (!last) return this.#latest(tab).map((run) => ({ run, old: false }));
    const fresh = this.#behind(last);
    const entries = fresh.map((run) => ({ run, old: false }));
    if (last.done) return entries;
    const reached = new Set(fresh.map((run) => run.sampler_node));
    const before = this.#last(tab, last.order);
    const waiting = before ? this.#behind(before) : this.#latest(tab);
    return [...waiting.filter((run) => !reached.has(run.sampler_node)).map((run) => ({ run, old: true })), ...entries];
  }

  /** Ids of prompts whose runs may be the origin of what was cached in `tab`, if only their API prompts were known. */
  unknown(tab) {
    const cached = this.#last(tab)?.cached ?? [];
    const possible = this.#ended().filter((run) => cached.includes(run.sampler_node));
    return [...new Set(possible.map((run) => run.prompt_id))].filter((id) => !this.#prints.has(id)).slice(-ASKED);
  }

  /** All runs that have come to an end, oldest first. */
  #ended() {
    return [...this.#runs.values()].filter((run) => run.status !== "running");
  }

  /** The runs of the prompt that came last of those that are told by the graph's id alone. */
  #latest(tab) {
    const known = (run) => this.#prompts.has(run.prompt_id) || !run.workflow_id || run.workflow_id !== tab.graph;
    const mine = this.#ended().filter((run) => !known(run));
    return mine.filter((run) => run.prompt_id === mine.at(-1).prompt_id);
  }

  /** The prompt of `tab` that started last (before number `order`), or undefined. */
  #last(tab, order = Infinity) {
    return [...this.#prompts.values()]
      .filter((prompt) => prompt.order && prompt.order < order && owns(prompt, tab))
      .sort((a, b) => a.order - b.order)
      .at(-1);
  }

  /**
   * The runs behind the results of `prompt`: its own, and for each cached sampler the latest that was made in the same
   * way, by nodes of the same ids. That may have been in another tab.
   */
  #behind(prompt) {
    const runs = this.#ended();
    const ran = new Set(runs.filter((run) => run.prompt_id === prompt.id).map((run) => run.sampler_node));
    const origin = new Map(); // sampler -> id of the prompt that its cached result came from
    for (const run of runs) {
      const print = this.#prints.get(run.prompt_id)?.[run.sampler_node];
      const same = print && print === this.#prints.get(prompt.id)?.[run.sampler_node];
      if (same && !ran.has(run.sampler_node) && prompt.cached.includes(run.sampler_node)) {
        origin.set(run.sampler_node, run.prompt_id);
      }
    }
    return runs.filter((run) => run.prompt_id === prompt.id || origin.get(run.sampler_node) === run.prompt_id);
  }

  /** Keep over a reload of the page who queued what. `open` holds the open workflows: a closed one has no path. */
  save(open) {
    const kept = [...this.#prompts.values()].map(({ workflow, ...prompt }) => ({
      ...prompt,
      prints: this.#prints.get(prompt.id),
      path: workflow ? open.has(workflow) && workflow.path : prompt.path,
    }));
    try {
      sessionStorage.setItem(STORED, JSON.stringify(kept));
    } catch {
      // Storage is full or forbidden: after a reload the graph id alone tells.
    }
  }

  restore() {
    try {
      for (const { prints, ...prompt } of JSON.parse(sessionStorage.getItem(STORED) ?? "[]")) {
        this.#prompts.set(prompt.id, { ...prompt, done: true });
        if (prints) this.#prints.set(prompt.id, prints);
        this.#started = Math.max(this.#started, prompt.order);
      }
    } catch {
      sessionStorage.removeItem(STORED);
    }
  }
}
