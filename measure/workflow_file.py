"""A ComfyUI workflow from a file: the API format, or what the front end saves (workflow_convert.py makes one of it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]  # node id -> {"class_type", "inputs", "_meta"}: what POST /prompt takes
EXPORT = "export the workflow in API format (in ComfyUI: Workflow, Export (API)) and give that file"


class WorkflowError(ValueError):
    """A workflow that cannot be run, in words for the user."""


def read_workflow(path: Path) -> dict[str, Any]:
    """The JSON of a workflow in either format. Raises WorkflowError, or OSError."""
    try:
        data = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError:
        raise WorkflowError(
            f"{path} is no workflow: it is not text. Wanted: the .json file that ComfyUI saves."
        ) from None
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} is no JSON, or it is cut off: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict):
        data = data["prompt"]  # the body of a request, as scripts keep it
    if not isinstance(data, dict) or not (is_ui(data) or _is_api(data)):
        raise WorkflowError(
            f"{path} is no workflow of ComfyUI: wanted an object with nodes and links (as saved) or of nodes with a "
            f"class_type (API format), found {_found(data)}"
        )
    return data


def is_ui(data: Mapping[str, Any]) -> bool:
    """Is it what the front end saves, rather than what the server takes?"""
    return isinstance(data.get("nodes"), list) and isinstance(data.get("links"), list)


def _is_api(data: Mapping[str, Any]) -> bool:
    return bool(data) and all(
        isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        for node in data.values()
    )


def _found(data: Any) -> str:
    if not isinstance(data, dict):
        return f"a {type(data).__name__}"
    odd = [name for name, node in data.items() if not (isinstance(node, dict) and node.get("class_type"))]
    return f"no class_type in {', '.join(odd[:3])}" if odd and len(odd) < len(data) else "neither"
