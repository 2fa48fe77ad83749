"""Convert a UI workflow to the API prompt that the front end would send, and print it as JSON.

<python of .venv> convert.py <workflow.json> <object_info.json>
"""

import json
import sys
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api

if __name__ == "__main__":
    workflow, object_info = (json.loads(Path(path).read_text("utf-8")) for path in sys.argv[1:3])
    json.dump(convert_ui_to_api(workflow, object_info), sys.stdout)
