// "Benchmark this model": a prompt of its own, made of what leads to a sampler in the open workflow and an
// AttentionBenchmark node in the sampler's place. Knows nothing of the page.

/** @typedef {[string, number]} Link */
/** @typedef {{class_type: string, inputs: Record<string, any>, _meta?: {title?: string}}} PromptNode */
/** @typedef {Record<string, PromptNode>} Prompt */
/** @typedef {{node: string, model: Link, positive: Link | null, negative: Link | null, latent: Link}} Sampler */
/** The types of a node's inputs by name, and those of its outputs. @typedef {(type: string) => {inputs: Record<string, string>, outputs: string[]}} Types */

export const NODE = "attune_benchmark";

/** Is this API prompt one of ours? */
export const isBenchmark = (/** @type {Prompt} */ prompt) => NODE in prompt;

/** The links of `node` to inputs of one type, by the input's name. @returns {Record<string, Link>} */
function links(node, type, /** @type {Types} */ types) {
  const { inputs } = types(node.class_type);
  const linked = Object.entries(node.inputs).filter(([name, value]) => inputs[name] === type && Array.isArray(value));
  return Object.fromEntries(linked);
}

const firstOf = (/** @type {Record<string, Link>} */ found) => Object.values(found)[0] ?? null;

/** What a sampler works on, or null where the node is no sampler. @returns {Sampler | null} */
function sampler(/** @type {Prompt} */ prompt, /** @type {string} */ id, /** @type {Types} */ types) {
  const node = prompt[id];
  if (!node || !types(node.class_type).outputs.includes("LATENT")) return null;
  const latent = firstOf(links(node, "LATENT", types));
  const guider = firstOf(links(node, "GUIDER", types));
  const from = guider ? prompt[guider[0]] : node; // SamplerCustomAdvanced has model and conditionings at its guider
  const model = from && firstOf(links(from, "MODEL", types));
  const conditionings = from ? links(from, "CONDITIONING", types) : {};
  const { negative = null, ...others } = conditionings;
  const positive = others.positive ?? firstOf(others);
  if (!latent || !model || !positive) return null;
  return { node: id, model, positive, negative: guided(prompt, from) ? negative : null, latent };
}

/** Does the negative conditioning count? With a cfg of 1 samplers leave it out. */
function guided(/** @type {Prompt} */ prompt, /** @type {PromptNode} */ node) {
  const { cfg } = node.inputs;
  const value = Array.isArray(cfg) ? prompt[cfg[0]]?.inputs.value : cfg;
  return !(typeof value === "number" && value <= 1);
}

/** Every sampler of a prompt. @returns {Sampler[]} */
export function samplers(/** @type {Prompt} */ prompt, /** @type {Types} */ types) {
  return Object.keys(prompt)
    .map((id) => sampler(prompt, id, types))
    .filter((found) => found !== null);
}

/** The nodes that lead to these links, and they themselves. */
function ancestors(/** @type {Prompt} */ prompt, /** @type {(Link | null)[]} */ from) {
  /** @type {Prompt} */
  const found = {};
  /** @type {any[][]} */
  const waiting = from.filter((link) => link !== null);
  while (waiting.length) {
    const id = String(waiting.pop()?.[0]);
    if (id in found || !(id in prompt)) continue;
    found[id] = prompt[id];
    const values = Object.values(prompt[id].inputs);
    waiting.push(...values.filter((value) => Array.isArray(value) && value.length === 2));
  }
  return found;
}

/**
 * The API prompt that benchmarks the model of the sampler `chosen`. The benchmark only needs the latent's size, so what
 * an earlier sampler made of it is not sampled: the latent is that which the first one begins with.
 * @returns {Prompt}
 */
export function benchmarkPrompt(
  /** @type {Prompt} */ prompt,
  /** @type {Sampler} */ chosen,
  /** @type {Types} */ types,
) {
  let { latent } = chosen;
  const passed = new Set();
  for (let before = sampler(prompt, latent[0], types); before && !passed.has(before.node);) {
    passed.add(before.node);
    latent = before.latent;
    before = sampler(prompt, latent[0], types);
  }
  const { model, positive, negative } = chosen;
  const linked = { model, positive, ...(negative ? { negative } : {}), latent };
  const seed = Math.floor(Math.random() * 0x1_0000_0000); // the server would not measure the same again
  const inputs = { shapes: "from the model", kernels: "all", seconds: 1, dtype: "auto", seed, ...linked };
  const node = { class_type: "AttentionBenchmark", inputs, _meta: { title: "Attention Benchmark" } };
  return { ...ancestors(prompt, [model, positive, negative, latent]), [NODE]: node };
}
