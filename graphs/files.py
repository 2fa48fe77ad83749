"""Workflow files: read with all that says how they are written, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..measure.bench_file import write
from ..measure.workflow_file import WorkflowError, is_ui
from .media import texts_in
from .text import LARGEST, Style, dumps, loads, style_of


@dataclass
class Document:
    """A workflow that was read.

    `data` is what is written back, `workflow` the part of it that is the workflow: the same, or the prompt of a
    request's body. `api`: it is in API format. `medium`: "PNG", … where it lies in a picture or a video, else "".
    `text` is the file's text, "" for media.
    """

    path: Path
    data: Any
    workflow: dict[str, Any]
    api: bool
    medium: str = ""
    style: Style = field(default_factory=Style)
    text: str = ""


def read(path: Path, to_run: bool = False) -> Document:
    """The workflow in a file, of either format, or in a picture or a video. Raises WorkflowError, OSError.

    to_run: of a picture, which holds both, what ran rather than what was shown.
    """
    if path.is_dir():
        raise WorkflowError(f"{path} is a folder. Wanted: the .json file of a workflow, or a picture or video with one")
    if path.exists() and not path.is_file():
        raise WorkflowError(f"{path} is no file: it is a pipe or a device. Wanted: the .json file of a workflow")
    media = texts_in(path)
    if media is not None:
        medium, texts = media
        order = ("prompt", "workflow") if to_run else ("workflow", "prompt")
        name = next(name for name in order if name in texts)
        # ComfyUI writes NaN there, and its front end takes it for null.
        document = _made(path, loads(texts[name], f"the {name} in {path}", lambda _: None), name == "prompt")
        document.medium = medium
        return document
    size = path.stat().st_size
    if size > LARGEST:
        raise WorkflowError(
            f"{path} has {size / 1e6:.0f} MB. Wanted: at most {LARGEST // 1_000_000} MB; no workflow is that large, it "
            "may be a model or hold pictures"
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise WorkflowError(
            f"{path} is no workflow: it is not text in UTF-8. Wanted: the .json file that ComfyUI saves, or a PNG, "
            "WebP, MP4 or WebM that it wrote"
        ) from None
    document = _made(path, loads(text.removeprefix("\ufeff"), str(path)), None)
    document.style, document.text = style_of(text), text
    return document


def _made(path: Path, data: Any, api: bool | None) -> Document:
    workflow = data
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict) and not is_ui(data) and not _is_node(data):
        workflow = data["prompt"]  # the body of a request, as scripts keep it
    if isinstance(workflow, dict):
        if is_ui(workflow) and not api:
            return Document(path, data, workflow, False)
        if workflow and all(map(_is_node, workflow.values())):
            return Document(path, data, workflow, True)
    raise WorkflowError(
        f"{path} is no workflow of ComfyUI: wanted an object with nodes and links (as saved) or of nodes with a "
        f"class_type and inputs (API format), found {_found(workflow)}"
    )


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _found(data: Any) -> str:
    if not isinstance(data, dict):
        return {list: "a list", str: "a text", type(None): "null"}.get(type(data), f"a {type(data).__name__}")
    if not data:
        return "an empty object"
    keys = ", ".join(list(map(str, data))[:4])
    return f"an object with {keys[:100]}{', …' if len(data) > 4 else ''}"


def save(document: Document, out: Path | None, backup: bool) -> Path | None:
    """Write a document into `out`, or back into its own file; returns the backup of what was there, if one was made.

    Raises WorkflowError where that is no workflow's file, OSError.
    """
    if out is None and document.medium:
        raise WorkflowError(
            f"{document.path}: workflows in pictures and videos ({document.medium}) are only read. Say where the "
            "workflow is to go with -o FILE.json"
        )
    target = Path(os.path.realpath(out or document.path))  # what a link points to is replaced, not the link
    if not target.parent.is_dir():
        raise WorkflowError(f"there is no folder {target.parent}: make it, or write elsewhere with -o")
    text = dumps(document.data, document.style)
    kept, mode = None, None
    if target.exists():
        if out is not None:
            _must_be_workflow(target)
        if not os.access(target, os.W_OK):  # it could be replaced all the same, as its folder allows
            raise WorkflowError(f"{target} is write-protected, and is as it was: write elsewhere with -o")
        mode = target.stat().st_mode
    try:
        if mode is not None and backup:
            kept = _free_name(target)
            shutil.copy2(target, kept)
        write(target, text)
    except BaseException as error:
        if kept is not None:
            kept.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WorkflowError(
                f"{target} cannot be written ({error.strerror or error}); nothing was changed. Wanted: a folder with "
                "room where you may write; say another one with -o"
            ) from None
        raise
    if mode is not None:
        with contextlib.suppress(OSError):  # some file systems have no modes
            target.chmod(mode)
    return kept


def _must_be_workflow(target: Path) -> None:
    try:
        there = read(target)
    except WorkflowError as error:
        raise WorkflowError(f"{target} is not overwritten, since it is no workflow: {error}") from None
    if there.medium:
        raise WorkflowError(f"{target} is not overwritten, since it is a picture or a video: give -o a name with .json")


def _free_name(path: Path) -> Path:
    """A name for a backup that no file has."""
    number = 1
    while (kept := path.with_name(f"{path.name}.bak{number if number > 1 else ''}")).exists():
        number += 1
    return kept
