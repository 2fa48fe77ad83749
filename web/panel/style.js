// The panel's style, in the colours of ComfyUI's theme; it lives in a shadow tree and reaches nothing else.

export const STYLE = new CSSStyleSheet();
STYLE.replaceSync(`
  :host {
    --ink: var(--base-foreground, var(--input-text, #ddd));
    --quiet: var(--muted-foreground, var(--descrip-text, #999));
    --paper: var(--comfy-menu-bg, #353535);
    --raised: var(--secondary-background, var(--comfy-input-bg, #222));
    --hover: var(--secondary-background-hover, var(--content-hover-bg, #444));
    --line: var(--border-default, var(--border-color, #4e4e4e));
    --accent: var(--primary-background, #236692);
    --strong: color-mix(in srgb, var(--accent) 66%, #000);
    --empty: color-mix(in srgb, var(--ink) 9%, var(--paper));
    --bad: color-mix(in srgb, #e5322d 70%, var(--ink));
    --good: color-mix(in srgb, #16a34a 70%, var(--ink));
    display: block; height: 100%; overflow: auto; container-type: inline-size;
    font: 13px/1.45 var(--font-inter, Inter), Arial, sans-serif; color: var(--ink); background: var(--paper);
    scrollbar-width: thin; text-align: left;
  }
  * { box-sizing: border-box; }
  [hidden] { display: none !important; }
  h2 { font-size: 14px; font-weight: 700; margin: 0; padding: 16px 14px 4px; }
  h3 { display: inline; font-size: 13px; font-weight: 600; margin: 0; }
  p { margin: 6px 0; }
  section { border-top: 1px solid color-mix(in srgb, var(--line) 55%, transparent); padding: 8px 14px; }
  summary { cursor: pointer; padding: 2px 0; border-radius: 4px; }
  summary::marker { color: var(--quiet); }
  .body { padding: 4px 0 6px; }
  .quiet { color: var(--quiet); }
  .row { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

  button, select {
    font: inherit; color: var(--ink); background: var(--raised); border: 1px solid transparent; border-radius: 6px;
    padding: 4px 10px; min-height: 28px; cursor: pointer;
  }
  select { border-color: var(--line); min-width: 0; flex: 1 1 120px; text-overflow: ellipsis; }
  option { color: var(--ink); background: var(--paper); }
  button:hover { background: var(--hover); }
  button.primary { background: var(--strong); color: #fff; }
  button.primary:hover { background: color-mix(in srgb, var(--strong) 85%, #000); }
  button[aria-disabled] { opacity: 0.6; cursor: progress; }
  textarea, pre {
    width: 100%; font: 11px/1.4 ui-monospace, Consolas, monospace; color: inherit; background: var(--raised);
    border: 1px solid var(--line); border-radius: 6px; padding: 8px; margin: 6px 0;
  }
  pre { overflow: auto; max-height: 320px; white-space: pre; }
  img { display: block; max-width: 100%; border-radius: 6px; }
  code {
    font: 11px/1.5 ui-monospace, Consolas, monospace; background: var(--raised); border-radius: 4px; padding: 2px 6px;
    overflow-wrap: anywhere; flex: 1 1 140px; user-select: all;
  }
  .said { color: var(--quiet); }
  p.said { margin: 0; min-height: 1.45em; }
  .alert {
    border: 1px solid var(--bad); border-radius: 6px; padding: 6px 10px; margin: 6px 0; overflow-wrap: anywhere;
    display: flex; flex-wrap: wrap; gap: 6px; align-items: center; background: color-mix(in srgb, #e5322d 10%, var(--paper));
  }
  .alert span { flex: 1 1 160px; }

  ul { list-style: none; margin: 0; padding: 0; }
  .lines li { padding: 1px 0; overflow-wrap: anywhere; }
  .remark::before { content: "! "; font-weight: 700; color: var(--bad); }

  table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 4px 0; }
  th, td { text-align: left; font-weight: 400; padding: 3px 6px 3px 0; vertical-align: baseline; }
  thead th { color: var(--quiet); font-size: 11px; border-bottom: 1px solid var(--line); white-space: nowrap; }
  .kernel { display: inline-block; padding-left: 18px; text-indent: -18px; }
  .swatch, .kernel * { text-indent: 0; }
  .figures td, .figures thead th:not(:first-child) { text-align: right; white-space: nowrap; }
  .figures td:last-child, .kernels td:last-child { padding-right: 0; }
  .kernels td:nth-child(n + 3), .kernels thead th:nth-child(n + 3) { text-align: right; white-space: nowrap; }
  .kernels .why td { text-align: left; white-space: normal; color: var(--quiet); padding: 0 0 8px 18px; overflow-wrap: anywhere; }
  .kernels .why p { margin: 2px 0; }
  .plain td { padding-right: 8px; }
  caption { text-align: left; color: var(--quiet); font-size: 11px; }
  .swatch {
    display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; background: var(--of);
    box-shadow: 0 0 0 1px color-mix(in srgb, var(--ink) 35%, transparent);
  }
  .sign { display: inline-block; width: 1.2em; font-weight: 700; color: var(--bad); }
  :is([data-outcome="works"], [data-outcome="host"]) .sign { color: var(--good); }
  :is([data-outcome="open"], [data-outcome="off"], [data-outcome="undecided"], [data-outcome="not installed"], [data-outcome="unsupported"]) .sign { color: var(--quiet); }
  .copy { display: inline-flex; gap: 6px; align-items: center; }
  progress { flex: 1 1 80px; height: 8px; accent-color: var(--accent); }
  .progress { min-height: 1.45em; margin: 0; }

  .about { min-height: 1.45em; overflow-wrap: anywhere; }
  .about[data-status="failed"], .about[data-status="stopped"] { color: var(--bad); }
  .switch { display: flex; gap: 2px; border: 0; margin: 4px 0; padding: 0; align-items: center; }
  .switch legend { float: left; padding: 0 8px 0 0; color: var(--quiet); }
  .switch label { position: relative; }
  .switch input { position: absolute; opacity: 0; inset: 0; margin: 0; cursor: pointer; }
  .switch span { display: block; padding: 2px 10px; border-radius: 6px; background: var(--raised); }
  .switch input:checked + span { background: var(--strong); color: #fff; }
  .switch input:focus-visible + span { outline: 2px solid var(--accent); outline-offset: 2px; }
  .plot { height: 230px; border-radius: 6px; overflow: hidden; }
  .plot .uplot { font: inherit; }
  .marker {
    position: absolute; left: 0; top: 0; pointer-events: none; border-radius: 2px;
    box-shadow: 0 0 0 2px var(--paper), 0 0 0 4px var(--ink);
  }
  .readout { min-height: 2.9em; margin: 2px 0; overflow-wrap: anywhere; }
  .marks { font-size: 11px; }
  .only { background: none; padding: 1px 4px 1px 3px; min-height: 0; text-align: left; }
  .only[aria-pressed="true"] { background: var(--hover); font-weight: 600; }
  .share { background: linear-gradient(var(--of), var(--of)) right bottom / calc(var(--share, 0) * 100%) 3px no-repeat; }
  .events { max-height: 180px; overflow: auto; margin: 6px 0; }
  .events li { padding: 2px 0 2px 9px; margin: 2px 0; border-left: 3px solid var(--line); overflow-wrap: anywhere; }
  .events li:is([data-kind="demotion"], [data-kind="repeat"], [data-kind="fallback"]) { border-left-color: var(--bad); }
  .events b { font-weight: 600; margin-right: 2px; }
  .events .quiet { border-left-color: var(--good); }
  .scroll { overflow-x: auto; }
  .wide td, .wide th { white-space: nowrap; }
  .beside { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr); }
  @container (min-width: 560px) { .beside.two { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
  @container (max-width: 300px) { section { padding-inline: 8px; } .kernels td:nth-child(2) { overflow-wrap: anywhere; } }
  @media (forced-colors: active) { .swatch { forced-color-adjust: none; } }
`);
