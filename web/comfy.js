// ComfyUI's front end, with its types: the only module that imports it.

// @ts-ignore The page serves it, in every version of the front end.
import { api as anApi } from "../../scripts/api.js";
// @ts-ignore
import { app as anApp } from "../../scripts/app.js";

/** @type {import("@comfyorg/comfyui-frontend-types").ComfyApi} */
export const api = anApi;
/** @type {import("@comfyorg/comfyui-frontend-types").ComfyApp} */
export const app = anApp;

export const ACTIVE = 0;
export const MUTED = 2;
export const BYPASSED = 4;

/**
 * On `event` of the server or the front end call `take` with what it says, until `signal` aborts.
 * @param {string} event
 * @param {(detail: any) => void} take
 * @param {AbortSignal} [signal]
 */
export function listen(event, take, signal) {
  /** @type {any} */ (api).addEventListener(event, ({ detail }) => take(detail), { signal });
}

let loading = 0;

/** Is a graph being loaded? Then the open workflow and the graph may not belong together. */
export const isLoading = () => loading > 0;

/** [execution id, node] of every node in `graph` and the subgraphs below it. */
export function* walk(graph, before = "") {
  for (const node of graph?.nodes ?? []) {
    const id = `${before}${node.id}`;
    yield [id, node];
    if (node.subgraph) yield* walk(node.subgraph, `${id}:`);
  }
}

/** The root graph of the open workflow, which older front ends call `graph`. */
export const rootGraph = () => app.rootGraph ?? app.graph;

/** Call `before` and `after` around every loading of a graph: another tab, a file, an undo. */
export function aroundLoading(before, after) {
  for (const name of ["loadGraphData", "loadApiJson"]) {
    const load = app[name];
    app[name] = function (...args) {
      const state = before();
      loading++;
      const end = () => {
        loading--;
        after(state);
      };
      let result;
      try {
        result = load.apply(this, args);
      } catch (error) {
        end();
        throw error;
      }
      if (typeof result?.then !== "function") end();
      else return Promise.resolve(result).finally(end);
      return result;
    };
  }
}
