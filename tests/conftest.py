"""Fixtures and options of all tests. The pack is imported as `comfyui_attune`, devtools/ as `attune_devtools`.

Markers: `comfyui` needs a ComfyUI (set by itself on every test that uses a fixture of one), `browser` needs a Chrome
or Chromium as well, `gpu` needs a CUDA device. With --no-comfyui only the rest is run.
"""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from support.loading import ROOT, load_package

load_package("attune_devtools", ROOT / "devtools")
load_package("comfyui_attune", ROOT)

from attune_devtools import CACHE, chrome, comfyui  # noqa: E402
from support.server import Server  # noqa: E402

pytest_plugins = ["support.gpu_log"]
# Everything here is small, and on a busy machine threads wait for each other. Servers and children take it over.
os.environ.setdefault("OMP_NUM_THREADS", "1")
IN_CI = bool(os.environ.get("CI"))
NEEDS_COMFYUI = {"comfyui_folder", "models", "server", "make_server", "comfy", "browser", "page", "open_page"}
NEEDS_BROWSER = {"browser", "page", "open_page"}

set_hypothesis_home_dir(CACHE / "hypothesis")
hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=300, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if IN_CI else "dev")


def pytest_addoption(parser):
    parser.addoption("--no-comfyui", action="store_true", help="only the tests that need neither ComfyUI nor a GPU")


def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if names & NEEDS_BROWSER:
            item.add_marker("browser")
        if names & NEEDS_COMFYUI or item.get_closest_marker("browser"):
            item.add_marker("comfyui")
        if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))
        without = config.getoption("no_comfyui")
        off = without and (item.get_closest_marker("comfyui") or item.get_closest_marker("gpu"))
        (dropped if off else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
        config.stash[_DROPPED] = len(dropped)


_DROPPED = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(_DROPPED, 0):
        terminalreporter.write_line(f"--no-comfyui: {count} tests that need ComfyUI, a browser or a GPU were left out")


def _why_no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device; torch.cuda.is_available() is False here"


@pytest.fixture(scope="session")
def comfyui_folder() -> Path:
    """The folder of ComfyUI: COMFYUI_PATH, or what dev.py downloaded."""
    folder = comfyui.locate()
    if not folder.exists():
        pytest.fail(f"ComfyUI is not at {folder}: run `python3 dev.py test` once, or set COMFYUI_PATH")
    return folder


@pytest.fixture(scope="session")
def models(comfyui_folder) -> Path:
    """The models folder with the tiny Wan 2.2 models under their official names; shared by all runs."""
    folder = CACHE / "models"
    script = ROOT / "tests" / "tiny_models.py"
    subprocess.run([sys.executable, str(script), str(comfyui_folder), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def make_server(comfyui_folder, models, tmp_path_factory):
    """make_server(*flags, packs=(), env=None, folder="base", pack=ROOT): a started Server on a new base directory.

    `packs` are folders of further custom nodes; `folder` names the base directory; `pack` is this pack's folder. Stop
    it (`server.stop()`) as soon as you are done with it; at the end of the session all are stopped.
    """
    started: list[Server] = []
    home = tmp_path_factory.mktemp("home")  # so that kernels are proved once for all servers

    def make(*flags: str, packs=(), env=None, folder="base", pack=ROOT) -> Server:
        base = tmp_path_factory.mktemp(folder)
        server = Server.fresh(
            Path(sys.executable),
            comfyui_folder,
            base,
            models,
            ("--cpu", *flags),
            packs,
            {"ATTUNE_HOME": str(home), **(env or {})},
            pack,
        )
        started.append(server)
        server.start()
        make_inputs(server)
        return server

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(make_server) -> Server:
    """The server of the whole session, with the pack, on the CPU."""
    return make_server()


def make_inputs(server: Server) -> None:
    """Make every input picture that a workflow in workflows/ names."""
    script = ROOT / "devtools" / "venv_scripts" / "make_inputs.py"
    workflows = [str(path) for path in sorted((ROOT / "workflows").glob("*.json"))]
    subprocess.run([sys.executable, str(script), str(server.base / "input"), *workflows], check=True)


@pytest.fixture(scope="session")
def comfy(comfyui_folder, tmp_path_factory):
    """Makes `import comfy…` work in this process, on the CPU. Returns the folder of ComfyUI."""
    os.environ["ATTUNE_HOME"] = str(tmp_path_factory.mktemp("home"))
    if str(comfyui_folder) not in sys.path:
        sys.path.append(str(comfyui_folder))
        import comfy.options  # noqa: F401  First: it keeps comfy.cli_args from reading pytest's arguments.
        from comfy.cli_args import args

        args.cpu = True
    return comfyui_folder


@pytest.fixture(scope="session")
def browser():
    """A headless Chrome or Chromium under playwright. Without one: skipped, in CI failed."""
    executable = chrome.find()
    if executable is None:
        (pytest.fail if IN_CI else pytest.skip)(chrome.MISSING)
    from playwright.sync_api import sync_playwright

    from support.browser import LAUNCH_FLAGS

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, headless=True, args=LAUNCH_FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser, server):
    """open_page(vue=False, server=None): a fresh browser page with ComfyUI ready in it (support.browser.ComfyPage)."""
    from support.browser import ComfyPage

    opened: list[ComfyPage] = []

    def open_one(vue: bool = False, other: Server | None = None) -> ComfyPage:
        opened.append(ComfyPage(browser, other or server, vue))
        return opened[-1]

    yield open_one
    for page in opened:
        page.close()


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def page(open_page, request):
    """A page with ComfyUI in it, once for each of the front end's two renderers."""
    return open_page(vue=request.param)


@pytest.fixture(scope="session", params=[False, True], ids=["canvas", "vue"])
def desk_page(request, browser, server, tmp_path_factory):
    """One page per renderer for all tests that use `desk`."""
    from support.browser import ComfyPage
    from support.browser_nodes import Desk

    page = ComfyPage(browser, server, request.param)
    yield Desk(page, tmp_path_factory.mktemp("pictures"))
    page.close()


@pytest.fixture
def desk(desk_page):
    """A page of each renderer (support.browser_nodes.Desk), with the workflows of earlier tests still open in tabs."""
    before = len(desk_page.problems)
    yield desk_page
    assert desk_page.problems[before:] == []


@pytest.fixture
def panel(desk):
    """The tab on that page, with the pack's own routes behind it; closed afterwards."""
    from support.panel import Panel

    desk.page.set_default_timeout(60_000)
    panel = Panel(desk)
    yield panel
    panel.close()
