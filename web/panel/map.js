// The map of a run: rows of blocks, columns of steps, each cell in the colour of the kernel that computed it.

import { chart } from "./chart.js";
import { make, setText } from "./dom.js";
import { colour } from "./palette.js";
import { most } from "./run.js";
import { t } from "./text.js";

/** @typedef {import("./run.js").Run} Run @typedef {import("./run.js").Grid} Grid */

const HEIGHT = 230;
const [LEFT, RIGHT, TOP, BOTTOM] = [50, 4, 12, 34]; // around the cells: axes with their labels
const LABEL = 14;
const EDGE = 0.7; // of a cell's height, where cross attention on another kernel begins
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

/** Every how many-th of `count` numbers is written, so that they stand `wanted` pixels apart at least. */
const stride = (count, size, wanted) =>
  [1, 2, 5, 10, 20, 50, 100].find((n) => n * size >= wanted) ?? Math.max(1, count);

export class BlockMap {
  element = make("div", { class: "map" });
  #plot = make("div", { class: "plot", tabindex: 0, role: "application", "aria-label": t("run.map") });
  #said = make("p", { class: "readout", "aria-live": "polite" }, t("run.map.hint"));
  /** @type {import("uplot") | null} */
  #chart = null;
  #marker = make("div", { class: "marker", hidden: true });
  /** @type {Run | null} */
  #run = null;
  /** @type {Grid | null} */
  #grid = null;
  #kind = "";
  #only = "";
  /** @type {[number, number] | null} row and column that are read */
  #at = null;
  #asked = false;

  constructor() {
    this.element.append(this.#plot, this.#said);
    this.#plot.addEventListener("keydown", (event) => this.#key(event));
    this.#plot.addEventListener("focus", () => this.#at ?? this.#read(0, 0));
    new ResizeObserver(() => this.#size()).observe(this.#plot);
  }

  /** Show what ran in `run`: calls of one kind, or "" for all, of one kernel, or "" for all. */
  show(run, kind, only) {
    if (run !== this.#run) this.#at = null;
    [this.#run, this.#kind, this.#only] = [run, kind, only];
    this.#grid = run.grid();
    this.draw();
  }

  /** Draw again, in the colours of the theme. */
  draw() {
    const grid = this.#grid;
    if (!grid) return;
    const u = this.#chart;
    if (!u) return void this.#make();
    const columns = [...Array(grid.columns).keys()];
    u.batch(() => {
      u.setData([columns, columns.map(() => 0)]);
      u.redraw(true, true); // with its axes, which may name other steps
    });
    this.#said.setAttribute("aria-live", "off"); // what the user did not ask for is not read aloud five times a second
    this.#mark();
  }

  async #make() {
    if (this.#asked) return;
    this.#asked = true;
    try {
      const { uPlot, sheet } = await chart();
      const root = /** @type {ShadowRoot} */ (this.#plot.getRootNode());
      if (root.adoptedStyleSheets && !root.adoptedStyleSheets.includes(sheet)) root.adoptedStyleSheets.push(sheet);
      this.#chart = new uPlot(this.#options(), [[0], [0]], this.#plot);
      this.#chart.over.append(this.#marker);
      this.draw();
    } catch (error) {
      console.error("Attune:", error);
      this.#asked = false;
    }
  }

  /** @returns {import("uplot").Options} */
  #options() {
    const ink = (name) => () => getComputedStyle(this.#plot).getPropertyValue(name) || "#888";
    const grid = () => /** @type {Grid} */ (this.#grid);
    const font = "11px Inter, Arial, sans-serif";
    /** @type {import("uplot").Axis} */
    const axis = {
      stroke: ink("--quiet"),
      grid: { show: false },
      ticks: { show: false },
      font,
      labelFont: font,
      gap: 4,
    };
    const numbers = (count, size, wanted) => {
      const every = stride(count, size / count, wanted);
      return [...Array(count).keys()].filter((one) => one % every === 0);
    };
    return {
      width: Math.max(120, this.#plot.clientWidth),
      height: HEIGHT,
      legend: { show: false },
      padding: [TOP, RIGHT, 0, 0],
      cursor: { x: false, y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: {
        x: { time: false, range: () => [-0.5, grid().columns - 0.5] },
        y: { range: () => [-0.5, grid().rows.length - 0.5], dir: -1 },
      },
      series: [{}, { paths: () => null, points: { show: false } }],
      axes: [
        {
          ...axis,
          size: BOTTOM - LABEL,
          label: t("run.map.step"),
          labelSize: LABEL,
          splits: (u) => numbers(grid().columns, u.width - LEFT - RIGHT, 30),
          values: (_, splits) => splits.map((one) => String(grid().first + one * grid().columnsOf)),
        },
        {
          ...axis,
          size: LEFT - LABEL,
          label: t("run.map.block"),
          labelSize: LABEL,
          splits: (u) => numbers(grid().rows.length, HEIGHT - TOP - BOTTOM, 15),
          values: (_, splits) => splits.map((one) => this.#name(one)),
        },
      ],
      hooks: {
        drawClear: [(u) => this.#cells(u, ink("--empty")())],
        draw: [(u) => this.#events(u, ink("--ink")(), ink("--paper")())],
        setCursor: [(u) => this.#point(u)],
      },
    };
  }

  /** The name of a row. */
  #name(row) {
    const { rows } = /** @type {Grid} */ (this.#grid);
    const block = rows[row];
    if (block !== null) return String(block);
    return t(rows.length === 1 ? "run.map.all" : "run.map.other");
  }

  /** The kernels to show in a cell, the last one as its lower edge. @param {import("./run.js").Cell} [cell] */
  #shown(cell) {
    if (!cell) return [];
    const kinds = this.#kind ? [this.#kind] : ["self", "cross"];
    const found = kinds.map((kind) => cell.get(kind)).filter((counts) => counts !== undefined);
    const names = found.map((counts) => (this.#only && counts.has(this.#only) ? this.#only : most(counts)));
    return [...new Set(names)];
  }

  /** @param {import("uplot")} u @param {string} empty */
  #cells(u, empty) {
    const grid = /** @type {Grid} */ (this.#grid);
    const { ctx } = u;
    const gap = Math.min(u.bbox.width / grid.columns, u.bbox.height / grid.rows.length) > 6 * devicePixelRatio ? 1 : 0;
    const left = (column) => Math.round(u.valToPos(column - 0.5, "x", true));
    const top = (row) => Math.round(u.valToPos(row - 0.5, "y", true));
    /** @type {Map<string, number[][]>} colour → boxes */
    const boxes = new Map();
    const put = (style, ...box) => {
      if (!boxes.has(style)) boxes.set(style, []);
      boxes.get(style)?.push(box);
    };
    for (let row = 0; row < grid.rows.length; row++) {
      const [y, end] = [top(row), top(row + 1) - gap];
      for (let column = 0; column < grid.columns; column++) {
        const [x, right] = [left(column), left(column + 1) - gap];
        const names = this.#shown(grid.at(row, column));
        const edge = names.length > 1 ? y + Math.max(1, Math.floor((end - y) * EDGE)) : end;
        const style = (name) =>
          !name ? empty : this.#only && name !== this.#only ? `${colour(name)}38` : colour(name);
        put(style(names[0]), x, y, right - x, edge - y);
        if (names.length > 1) put(style(names[names.length - 1]), x, edge, right - x, end - edge);
      }
    }
    ctx.save();
    for (const [style, list] of boxes) {
      ctx.fillStyle = style;
      ctx.beginPath();
      for (const [x, y, width, height] of list) ctx.rect(x, y, width, height);
      ctx.fill();
    }
    ctx.restore();
  }

  /** Signs where a kernel was given up and where a step was repeated. @param {import("uplot")} u */
  #events(u, ink, paper) {
    const grid = /** @type {Grid} */ (this.#grid);
    const { ctx } = u;
    const size = 4 * devicePixelRatio;
    ctx.save();
    const doubles = (this.#run?.doubles ?? 0) / grid.rowsOf;
    if (doubles > 0 && doubles < grid.rows.length && grid.rows[0] !== null) {
      ctx.fillStyle = ink; // where the single blocks begin
      ctx.fillRect(u.bbox.left, u.valToPos(doubles - 0.5, "y", true) - size / 4, u.bbox.width, size / 2);
    }
    for (const event of this.#run?.events ?? []) {
      if (event.step === null || !["demotion", "repeat"].includes(event.kind)) continue;
      if (this.#kind && event.of && event.of !== this.#kind) continue;
      const x = u.valToPos(Math.floor((event.step - grid.first) / grid.columnsOf), "x", true);
      const inside = event.kind === "demotion" && event.block !== null && grid.rows[0] !== null;
      const y = inside ? u.valToPos(Math.floor(Number(event.block) / grid.rowsOf), "y", true) : u.bbox.top - 1.4 * size;
      ctx.beginPath();
      if (event.kind === "repeat") {
        ctx.moveTo(x - size, y - size);
        ctx.lineTo(x + size, y - size);
        ctx.lineTo(x, y + size * 0.7);
        ctx.fillStyle = ink;
        ctx.fill();
        continue;
      }
      ctx.moveTo(x - size, y - size);
      ctx.lineTo(x + size, y + size);
      ctx.moveTo(x + size, y - size);
      ctx.lineTo(x - size, y + size);
      for (const [style, width] of [
        [paper, 4],
        [ink, 1.8],
      ]) {
        ctx.strokeStyle = String(style);
        ctx.lineWidth = Number(width) * devicePixelRatio;
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  /** The pointer has moved. @param {import("uplot")} u */
  #point(u) {
    const { left = -1, top = -1 } = u.cursor;
    if (left < 0 || top < 0 || !this.#grid) return;
    this.#read(Math.round(u.posToVal(top, "y")), Math.round(u.posToVal(left, "x")));
  }

  #key(event) {
    const move = MOVES[/** @type {keyof typeof MOVES} */ (event.key)];
    const grid = this.#grid;
    if (!grid || event.ctrlKey || event.metaKey || event.altKey) return;
    const [row, column] = this.#at ?? [0, 0];
    if (move) this.#read(row + move[0], column + move[1]);
    else if (event.key === "Home") this.#read(row, 0);
    else if (event.key === "End") this.#read(row, grid.columns - 1);
    else return;
    event.preventDefault();
  }

  #read(row, column) {
    const grid = this.#grid;
    if (!grid) return;
    this.#at = [Math.min(Math.max(row, 0), grid.rows.length - 1), Math.min(Math.max(column, 0), grid.columns - 1)];
    this.#said.setAttribute("aria-live", "polite");
    this.#mark();
  }

  /** Outline the cell that is read, and say what it holds. */
  #mark() {
    const [grid, u] = [this.#grid, this.#chart];
    this.#marker.hidden = !this.#at || !u;
    if (!this.#at || !grid || !u) return setText(this.#said, t("run.map.hint"));
    const [row, column] = this.#at;
    const [x, y] = [u.valToPos(column - 0.5, "x"), u.valToPos(row - 0.5, "y")];
    const [width, height] = [u.over.clientWidth / grid.columns, u.over.clientHeight / grid.rows.length];
    this.#marker.style.cssText = `transform: translate(${x}px, ${y}px); width: ${width}px; height: ${height}px`;
    const step = range(grid.first + column * grid.columnsOf, grid.columnsOf);
    const block = grid.rows[row];
    const where = block === null ? t("run.cell.other") : t("run.cell.block", { block: range(block, grid.rowsOf) });
    const cell = grid.at(row, column);
    const kinds = [...(cell ?? [])].filter(([kind]) => !this.#kind || kind === this.#kind);
    const what = kinds.map(
      ([kind, counts]) => `${kind} ${[...counts].map(([name, n]) => `${name} ×${n}`).join(" + ")}`,
    );
    setText(this.#said, t("run.cell", { step, block: where, what: what.join(", ") || t("run.cell.none") }));
  }

  #size() {
    const width = this.#plot.clientWidth;
    if (this.#chart && width > 60 && Math.abs(width - this.#chart.width) > 1) {
      this.#chart.setSize({ width, height: HEIGHT });
      this.#mark();
    }
  }
}

const range = (/** @type {number} */ first, /** @type {number} */ many) =>
  many > 1 ? `${first}–${first + many - 1}` : String(first);
