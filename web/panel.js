// What the pack adds to ComfyUI's page beside the nodes' faces: a sidebar tab, commands, a menu, settings.

import { app } from "./comfy.js";
import { bypassAll, enableAll } from "./panel/nodes.js";
import { applyDefaults, settings } from "./panel/settings.js";
import { Tab } from "./panel/tab.js";
import { ENGLISH } from "./panel/text.js";

const tab = new Tab();

app.registerExtension({
  name: "attune.panel",
  commands: [
    { id: "Attune.BypassAll", label: "Bypass all attention nodes", icon: "pi pi-eye-slash", function: bypassAll },
    { id: "Attune.EnableAll", label: "Enable all attention nodes", icon: "pi pi-eye", function: enableAll },
  ],
  menuCommands: [{ path: ["Edit"], commands: ["Attune.BypassAll", "Attune.EnableAll"] }],
  settings: settings((on) => (tab.wanted = on)),
  nodeCreated: applyDefaults,
  setup() {
    app.extensionManager.registerSidebarTab({
      id: "attune",
      icon: "pi pi-th-large",
      title: ENGLISH.title, // ComfyUI translates it where a language file has it
      tooltip: ENGLISH.tooltip,
      type: "custom",
      render: (container) => tab.render(container),
      destroy: () => tab.destroy(),
    });
  },
});
