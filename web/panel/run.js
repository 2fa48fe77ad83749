// One sampling run as the panel shows it, live or long over. Knows nothing of the page.

/** A block of null stands for calls outside any block. @typedef {number | null} Block */
/** @typedef {{calls: number, seconds: number | null, share: number | null, error: number | null}} Figures */
/**
 * `of`: the kind of attention, "" where it is of none.
 * @typedef {{id: number, kind: string, text: string, block: Block, step: number | null, count: number, of: string}} Happening
 */
/** Kind of attention → kernel → calls. @typedef {Map<string, Map<string, number>>} Cell */
/**
 * Rows of blocks and columns of steps; each may stand for several where there are very many.
 * @typedef {{first: number, columns: number, columnsOf: number, rows: Block[], rowsOf: number,
 *   at: (row: number, column: number) => Cell | undefined}} Grid
 */

const MOST_COLUMNS = 200;
const MOST_ROWS = 100;
const MOST_EVENTS = 100;

const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

export class Run {
  number = 0;
  status = "running";
  model = "";
  prompt = "";
  /** the id of the node that samples, in subgraphs "57:12" */
  sampler = "";
  /** the first step of this run in the whole sampling */
  first = 0;
  /** @type {number | null} the step that is being sampled, or was last */
  step = null;
  /** steps of this run, 0 where nobody knows */
  length = 0;
  /** steps of the whole sampling, 0 where nobody knows */
  steps = 0;
  /** steps of which no cell was sent, as there are so many */
  left = 0;
  /** @type {number | null} */
  blocks = null;
  doubles = 0;
  /** @type {number | null} */
  seconds = null;
  /** @type {string[]} in the order of their first call */
  kernels = [];
  /** @type {Map<string, Figures>} */
  figures = new Map();
  /** @type {Happening[]} */
  events = [];
  eventsLeftOut = 0;
  /** @type {string[]} what else is to be said, as which kernel that was asked for could not run */
  notes = [];
  timed = false;
  /** @type {Set<string>} of attention: "self", "cross" */
  kinds = new Set();
  /** Step → block → what ran there. @type {Map<number, Map<Block, Cell>>} */
  #cells = new Map();

  /** Take in an `attune.live` event of this run. */
  update(event) {
    if (event.full) {
      this.#cells.clear();
      this.kinds.clear();
      this.figures.clear();
      this.left = event.steps_left_out ?? 0;
    }
    this.number = event.run;
    this.status = event.status;
    this.model = event.model ?? "";
    this.prompt = event.prompt_id ?? "";
    this.sampler = event.sampler_node ?? "";
    this.first = event.first_step ?? 0;
    this.length = event.steps ?? 0;
    this.step = number(event.step) ?? this.step;
    this.blocks = number(event.blocks);
    this.doubles = event.doubles ?? 0;
    this.kernels = event.kernels ?? this.kernels;
    this.#take(event.cells ?? []);
    for (const [name, one] of Object.entries(event.times ?? {})) {
      const { calls = 0, seconds = null, share = null, error_l1 = null } = one;
      this.figures.set(name, { calls, seconds, share, error: error_l1 });
      this.timed ||= seconds !== null;
    }
    this.notes = event.notes ?? this.notes;
    if (event.events) this.#happened(event.events, !event.full);
  }

  /** The run `number` out of `GET /attune/runs/{number}`. */
  static past(number, data) {
    const run = new Run();
    const { stage = {} } = data;
    run.number = number;
    run.status = data.status;
    run.model = data.model ?? "";
    run.prompt = data.prompt_id ?? "";
    run.sampler = data.sampler_node ?? "";
    run.first = stage.first_step ?? 0;
    run.length = stage.steps ?? 0;
    run.steps = Math.max(stage.steps_in_all ?? 0, run.first + (stage.steps ?? 0));
    run.blocks = data.blocks ?? null;
    run.doubles = data.doubles ?? 0;
    run.seconds = data.seconds ?? null;
    run.timed = Boolean(data.timed);
    for (const [name, one] of Object.entries(data.kernels ?? {})) {
      const error = one.error?.mean_l1 ?? null;
      run.figures.set(name, { calls: one.calls, seconds: one.seconds ?? null, share: one.share ?? null, error });
    }
    run.kernels = data.kernel_names ?? [];
    run.left = data.steps_left_out ?? 0;
    run.#take(data.cells ?? []);
    run.step = run.#cells.size ? Math.max(...run.#cells.keys()) : null;
    run.eventsLeftOut = data.events_left_out ?? 0;
    // The first line of a node's text repeats the kernels, where there are any.
    const said = Object.values(data.nodes ?? {}).flatMap(({ text = "", calls }) =>
      text.split("\n").slice(calls ? 1 : 0),
    );
    run.notes = [...new Set([...(data.notes ?? []), ...said])].filter(Boolean);
    run.#happened(data.events ?? [], false);
    return run;
  }

  /** @param {any[][]} cells rows [step, block, kind, number of the kernel, calls so far] */
  #take(cells) {
    for (const [step, block, kind, kernel, calls] of cells) {
      let row = this.#cells.get(step);
      if (!row) this.#cells.set(step, (row = new Map()));
      let cell = row.get(block);
      if (!cell) row.set(block, (cell = new Map()));
      let counts = cell.get(kind);
      if (!counts) cell.set(kind, (counts = new Map()));
      counts.set(this.kernels[kernel] ?? String(kernel), calls);
      this.kinds.add(kind);
    }
  }

  /** @param {any[]} events @param {boolean} more They come on top of those that are known. */
  #happened(events, more) {
    const all = new Map(more ? this.events.map((one) => [one.id, one]) : []);
    events.forEach(({ id, kind, text, block = null, step = null, count = 1, call_kind = "" }, place) => {
      all.set(id ?? place, { id: id ?? place, kind, text, block, step, count, of: call_kind });
    });
    this.events = [...all.values()].slice(-MOST_EVENTS);
    this.eventsLeftOut = Math.max(this.eventsLeftOut, all.size - MOST_EVENTS);
  }

  get running() {
    return this.status === "running";
  }

  /** What ran, for a map. @returns {Grid} */
  grid() {
    const steps = [...this.#cells.keys()];
    const first = Math.min(this.first, ...steps);
    const last = Math.max(this.first + Math.max(1, this.length) - 1, ...steps);
    const blocks = new Set([...this.#cells.values()].flatMap((row) => [...row.keys()]));
    const unknown = blocks.delete(null);
    const count =
      unknown && !blocks.size ? 0 : Math.max(this.blocks ?? 0, 1 + Math.max(-1, ...[...blocks].map(Number)));
    const columnsOf = Math.ceil((last - first + 1) / MOST_COLUMNS);
    const rowsOf = Math.max(1, Math.ceil(count / MOST_ROWS));
    /** @type {Block[]} */
    const rows = [];
    for (let block = 0; block < count; block += rowsOf) rows.push(block);
    if (unknown || !count) rows.push(null);
    const at = (row, column) => {
      const step = first + column * columnsOf;
      if (columnsOf === 1 && rowsOf === 1) return this.#cells.get(step)?.get(rows[row]);
      const places = rows[row] === null ? [null] : Array.from({ length: rowsOf }, (_, one) => Number(rows[row]) + one);
      const all = Array.from({ length: columnsOf }, (_, one) => this.#cells.get(step + one));
      return sum(all.flatMap((one) => (one ? places.map((place) => one.get(place)) : [])));
    };
    return { first, columns: Math.floor((last - first) / columnsOf) + 1, columnsOf, rows, rowsOf, at };
  }

  /** What ran, in words: steps that are alike in one group of rows. Blocks are numbers; null is outside any block. */
  phases() {
    /** @type {{steps: number[], said: string, rows: {kernels: string, kind: string, blocks: Block[]}[]}[]} */
    const found = [];
    for (const [step, row] of [...this.#cells].sort(([a], [b]) => a - b)) {
      /** @type {Map<string, {kernels: string, kind: string, blocks: Block[]}>} */
      const lines = new Map();
      for (const [block, cell] of row) {
        for (const [kind, counts] of cell) {
          const kernels = [...counts.keys()].sort().join(", ");
          const line = lines.get(`${kind}/${kernels}`) ?? { kernels, kind, blocks: [] };
          line.blocks.push(block);
          lines.set(`${kind}/${kernels}`, line);
        }
      }
      const rows = [...lines.values()].map((line) => ({ ...line, blocks: sorted(line.blocks) }));
      rows.sort((a, b) => b.kind.localeCompare(a.kind) || b.blocks.length - a.blocks.length);
      const said = JSON.stringify(rows);
      if (found.at(-1)?.said === said) found.at(-1)?.steps.push(step);
      else found.push({ steps: [step], said, rows });
    }
    return found;
  }
}

const sorted = (/** @type {Block[]} */ blocks) => [...blocks].sort((a, b) => (a ?? Infinity) - (b ?? Infinity));

/** Several cells as one, undefined where none holds anything. @param {(Cell | undefined)[]} cells */
function sum(cells) {
  /** @type {Cell} */
  const all = new Map();
  for (const cell of cells) {
    for (const [kind, counts] of cell ?? []) {
      const found = all.get(kind) ?? new Map();
      for (const [kernel, calls] of counts) found.set(kernel, (found.get(kernel) ?? 0) + calls);
      all.set(kind, found);
    }
  }
  return all.size ? all : undefined;
}

/** The kernel with the most calls. @param {Map<string, number>} counts */
export function most(counts) {
  let best = "";
  for (const [kernel, calls] of counts) if (!best || calls > (counts.get(best) ?? 0)) best = kernel;
  return best;
}

/** Numbers as "0–3, 7". @param {(number | null)[]} numbers */
export function inRanges(numbers) {
  /** @type {number[][]} */
  const found = [];
  for (const one of numbers) {
    if (one === null) continue;
    const last = found.at(-1);
    if (last && last[1] === one - 1) last[1] = one;
    else found.push([one, one]);
  }
  return found.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}
