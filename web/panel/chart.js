// The charts' library, fetched when the panel is first shown: uPlot, see web/vendor. Its folder bears its version, as
// browsers keep what is no .js for a while.

const HOME = new URL("../vendor/uplot-1.6.32/", import.meta.url);

/** @type {Promise<{uPlot: typeof import("uplot"), sheet: CSSStyleSheet}> | null} */
let fetched = null;

/** uPlot, and its style sheet for the shadow tree that it is used in. */
export function chart() {
  fetched ??= load();
  fetched.catch(() => (fetched = null)); // the next one tries again
  return fetched;
}

async function load() {
  const [module, style] = await Promise.all([
    import(new URL("uPlot.esm.mjs", HOME).href),
    fetch(new URL("uPlot.min.css", HOME)).then((answer) => answer.text()),
  ]);
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(style);
  return { uPlot: module.default, sheet };
}
