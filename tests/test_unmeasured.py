"""docs/unmeasured.md says what it is made from."""

from support.gpu_log import PAGE, page, read_runs


def test_the_page_lists_every_gpu_test_that_has_never_run(request):
    tests = [item.nodeid for item in request.session.items if item.get_closest_marker("gpu")]
    text = PAGE.read_text("utf-8")
    narrowed = [request.config.getoption(name) for name in ("keyword", "markexpr", "no_comfyui", "deselect")]
    if request.config.args_source.name != "ARGS" and not any(narrowed):
        assert text == page(tests, read_runs()), "run `python3 dev.py test --unmeasured` and commit the page"
    never = [test for test in tests if not read_runs().get(test)]
    assert all(f"`{test}`" in text for test in never)


def test_a_test_leaves_the_page_when_it_has_passed_somewhere():
    runs = {"tests/a.py::one": [{"gpu": "NVIDIA H200", "torch": "2.11.0", "date": "2026-11-21"}]}
    text = page(["tests/a.py::one", "tests/a.py::two"], runs)
    assert "`tests/a.py::two`" in text and "`tests/a.py::one`" not in text
    assert "1 of 2" in text and "NVIDIA H200 (torch 2.11.0, 2026-11-21)" in text
