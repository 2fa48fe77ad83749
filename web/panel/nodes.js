// Bypassing and enabling the attention nodes of the open workflow, all at once.

import { ACTIVE, BYPASSED, app, rootGraph, walk } from "../comfy.js";
import { t } from "./text.js";

// Nodes that decide what computes a model's attention, whichever pack they are of, and the one that records its calls:
// those that `attune workflow bypass` takes (graphs/kinds.py).
export const ATTENTION = [
  "AttentionSelector",
  "AttentionRule",
  "SDPAForce",
  "Sage3Switch",
  "AttentionCapture",
  "Sage3AttentionOnlySwitch",
  "PathchSageAttentionKJ",
  "PatchFlashAttentionKJ",
  "ModelAttentionBackend",
];

// In the properties of a node that was bypassed with all others: "enable all" gives those back and no others, as a
// workflow may hold nodes that were bypassed before.
const MARK = "attune_bypassed";

/**
 * Set every attention node of the open workflow from one mode to another, as one step of Ctrl+Z; returns how many. One
 * that is muted stays so: what is behind it would not run either, which is what its user wanted.
 */
function change(from, to) {
  const all = new Set([...walk(rootGraph())].map(([, node]) => node)); // a subgraph may be there twice
  const there = [...all].filter((node) => ATTENTION.includes(node.type) && node.mode === from);
  const marked = there.filter((node) => node.properties?.[MARK]);
  const nodes = to === ACTIVE && marked.length ? marked : there;
  if (!nodes.length) return 0;
  app.canvas.emitBeforeChange();
  try {
    for (const node of nodes) {
      node.mode = to;
      if (to === BYPASSED) (node.properties ??= {})[MARK] = true;
      else delete node.properties?.[MARK];
    }
  } finally {
    app.canvas.emitAfterChange();
  }
  app.canvas.setDirty(true, true);
  return nodes.length;
}

function tell(count, done, nothing) {
  const detail = count ? t(done, { count }) : t(nothing);
  app.extensionManager.toast.add({ severity: count ? "success" : "info", summary: t("title"), detail, life: 5000 });
}

export const bypassAll = () => tell(change(ACTIVE, BYPASSED), "nodes.bypassed", "nodes.none.active");
export const enableAll = () => tell(change(BYPASSED, ACTIVE), "nodes.enabled", "nodes.none.bypassed");
