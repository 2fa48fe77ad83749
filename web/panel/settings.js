// The pack's settings. Three of them are what a new node begins with; a workflow that is loaded keeps what it holds, as
// it has to mean the same everywhere.

import { app, isLoading } from "../comfy.js";

// The nodes' lists (attention/policy.py), which cannot be asked for before the page is set up.
export const KERNELS = [
  "auto",
  "auto_fast",
  "host",
  "sdpa",
  "sdpa_flash",
  "sdpa_efficient",
  "sdpa_cudnn",
  "sdpa_math",
  "xformers",
  "xformers_cutlass",
  "flash",
  "flash2",
  "flash3",
  "flash4",
  "sage",
  "sage1",
  "sage2_fp16_triton",
  "sage2_fp16_cuda",
  "sage2_fp8_cuda",
  "sage2_fp8_cuda_pp",
  "sage3",
  "sage3_per_block_mean",
  "kitchen_int8",
  "attune_int8",
  "split",
  "sub_quad",
  "basic",
  "attune_bf16",
];

// Widget → setting, of these nodes.
const NODES = new Set(["AttentionSelector", "AttentionRule"]);
/** @type {Record<string, string>} */
const OF_WIDGET = {
  kernel: "Attune.DefaultKernel",
  error_budget: "Attune.ErrorBudget",
  when_unavailable: "Attune.WhenUnavailable",
};

/** @param {(on: boolean) => void} liveMapChanged is told at once, and after each change. @returns {any[]} */
export function settings(liveMapChanged) {
  // The dialog lists the highest sortOrder first.
  return [
    {
      id: "Attune.LiveMap",
      sortOrder: 4,
      category: ["Attune", "Panel", "LiveMap"],
      name: "Live map while sampling",
      tooltip: "Show in the sidebar tab Attention which kernel computes which block at which step.",
      type: "boolean",
      defaultValue: true,
      onChange: liveMapChanged,
    },
    {
      id: "Attune.DefaultKernel",
      sortOrder: 3,
      category: ["Attune", "New nodes", "DefaultKernel"],
      name: "Default kernel",
      tooltip: "What a new Attention Selector or Attention Rule begins with. Nodes of a workflow keep what they hold.",
      type: "combo",
      options: KERNELS,
      defaultValue: "auto",
    },
    {
      id: "Attune.ErrorBudget",
      sortOrder: 2,
      category: ["Attune", "New nodes", "ErrorBudget"],
      name: "Error budget",
      tooltip:
        "What a new Attention Selector begins with: how far from exact attention 'auto' may go with precision 'fast'.",
      type: "slider",
      attrs: { min: 0, max: 1, step: 0.01 },
      defaultValue: 0.05,
    },
    {
      id: "Attune.WhenUnavailable",
      sortOrder: 1,
      category: ["Attune", "New nodes", "WhenUnavailable"],
      name: "When the kernel is unavailable",
      tooltip:
        "What a new Attention Selector begins with. fallback: go on with another one. error: stop before sampling.",
      type: "combo",
      options: ["fallback", "error"],
      defaultValue: "fallback",
    },
  ];
}

/** Give a node that the user puts on the graph the values of the settings. */
export function applyDefaults(node) {
  if (!NODES.has(node.comfyClass) || isLoading()) return;
  let configured = false; // a node out of a workflow, of the clipboard or of a copy is
  const onConfigure = node.onConfigure;
  node.onConfigure = function (...args) {
    configured = true;
    return onConfigure?.apply(this, args);
  };
  const begun = new Map((node.widgets ?? []).map((widget) => [widget.name, widget.value]));
  queueMicrotask(() => {
    node.onConfigure = onConfigure;
    if (configured) return;
    for (const widget of node.widgets ?? []) {
      const value = widget.name in OF_WIDGET && app.extensionManager.setting.get(OF_WIDGET[widget.name]);
      const untouched = widget.value === begun.get(widget.name); // or "Swap Nodes" or a script has set it
      if (untouched && value !== false && value !== undefined && value !== null && value !== widget.value) {
        widget.value = value;
      }
    }
  });
}
