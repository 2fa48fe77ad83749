"""The JavaScript of web/ against the types of ComfyUI's front end. Needs npm, which users of the pack do not."""

import shutil

import pytest

from attune_devtools import web_types
from support.loading import ROOT


@pytest.fixture(scope="module")
def compiler():
    found = web_types.obtain()
    if found is None:
        pytest.skip(web_types.MISSING)
    return found


def test_the_types_are_right(compiler):
    assert web_types.problems(compiler) == ""


def test_what_the_front_end_does_not_have_is_found(compiler, tmp_path):
    shutil.copytree(ROOT / "web", tmp_path / "web")
    settings = (tmp_path / "web" / "tsconfig.json").read_text("utf-8")
    settings = settings.replace("../.cache/web-types", web_types.FOLDER.as_posix())
    (tmp_path / "web" / "tsconfig.json").write_text(settings, "utf-8")
    nodes = tmp_path / "web" / "panel" / "nodes.js"
    nodes.write_text(nodes.read_text("utf-8").replace("emitBeforeChange(", "emitBeforeChanges("), "utf-8")
    assert "emitBeforeChanges" in web_types.problems(compiler, tmp_path / "web")
