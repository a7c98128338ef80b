"""A report in a real browser, with `pytest -m browser`: Debian has it as `chromium`."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import report, train
from tests import browser, cli

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.installed() is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two trained runs."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {"train__num_steps": 4, "train__sample_every": 2, "train__samples": 4}
    keys |= {"sampling__steps": 4, "train__eval_samples": 8, "model__depth": 2}
    for router in ("token_choice", "diffmoe"):
        train.main([*cli.digits(router, **keys), "--workdir", str(folder / router)])
    workdirs = [
        x for name in ("token_choice", "diffmoe") for x in ("--workdir", str(folder / name))
    ]
    report.main([*workdirs, "--out", str(folder / "report.html")])
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.opened(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium, written):
    """The report, just opened; its console must be clean at the end, and it asks for nothing."""
    chromium.problems.clear()
    chromium.open(written)
    yield chromium
    assert chromium.problems == []


def focused(page, selector):
    page.value(f"document.querySelector('{selector}').focus()")
    assert page.value(f"document.activeElement === document.querySelector('{selector}')")


def test_the_slider_over_steps_moves_the_grids(page):
    """With the keyboard: from the last step to the first, for both runs."""

    def state():
        return page.value(
            "[document.querySelector('output[for=samples-step]').textContent, "
            "...[...document.querySelectorAll('[data-grid]')].flatMap(f => "
            "[f.querySelector('img').src, f.querySelector('img').naturalWidth, "
            "f.querySelector('figcaption').textContent])]"
        )

    last = state()
    assert last[0] == "4 (2 of 2)"
    assert (last[3], last[6]) == ("token_choice, step 4", "diffmoe, step 4")
    focused(page, "#samples-step")
    page.press("ArrowLeft")
    first = state()
    assert first[0] == "2 (1 of 2)" and first[3] == "token_choice, step 2"
    assert first[1] != last[1] and first[4] != last[4] and first[2] > 50
    page.press("End")
    assert state() == last


def pixels(page, number):
    """u8[rows, columns, 4] of the first map of a run."""
    selector = f"document.querySelector('[data-maps=\"{number}\"] canvas').toDataURL()"
    data = page.value(selector).partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGBA"))


def test_sliders_over_layers_and_times_move_the_maps(page):
    for number in (0, 1):
        before, label = pixels(page, number), f"document.querySelector('output[for=%s-{number}]')"
        assert before.shape == (2, 2, 4) and (before[..., 3] == 255).all()
        seen = {before.tobytes()}
        for name, text in (("layer", "block 0 (1 of 2)"), ("time", "0 (0 = noise, 1 = image)")):
            focused(page, f"#{name}-{number}")
            page.press("Home")
            assert page.value((label % name) + ".textContent") == text
            seen.add(pixels(page, number).tobytes())
        assert page.value(
            f"document.getElementById('layer-{number}').getAttribute('aria-valuetext')"
        )
        assert len(seen) > 1
    bars = "document.querySelectorAll('[data-maps=\"1\"] .loads rect').length"
    assert page.value(bars) == 4  # experts


def test_every_chart_is_drawn_and_read_with_the_keyboard(page):
    count = "document.querySelectorAll('.chart').length"
    assert (
        page.value("document.querySelectorAll('.chart .plot path').length") > page.value(count) > 9
    )
    points = "[...document.querySelectorAll('.plot path')].map(p => p.getAttribute('d')).join()"
    assert "NaN" not in page.value(points) and "Infinity" not in page.value(points)
    focused(page, ".chart.large .plot")
    page.press("End")
    tip = page.value("document.getElementById('tip').textContent")
    assert tip.startswith("step 4\ntoken_choice: ") and "diffmoe: " in tip
    box = "document.querySelector('.chart.large input')"
    drawn = "document.querySelector('.chart.large path').getAttribute('d')"
    before = page.value(drawn)
    page.value(f"{box}.click()")
    assert page.value(drawn) != before


def test_keys_that_differ_are_shown_first(page):
    rows = "[...document.querySelectorAll('#config tbody tr')].filter(r => !r.hidden)"
    keys = f"{rows}.map(r => r.querySelector('th').textContent)"
    assert "model.router.name" in page.value(keys) and "seed" not in page.value(keys)
    page.value(
        "const w = document.getElementById('config-rows'); w.value = 'all'; "
        "w.dispatchEvent(new Event('change'))"
    )
    assert "seed" in page.value(keys)


@pytest.mark.parametrize("width,dark", [(390, True), (1600, False)])
def test_no_window_is_too_narrow(chromium, written, width, dark, tmp_path):
    chromium.problems.clear()
    chromium.open(written, width, dark=dark)
    wide = chromium.value("document.documentElement.scrollWidth")
    assert wide <= width
    with Image.open(chromium.picture(tmp_path / "page.png")) as image:
        corner = image.convert("L").getpixel((2, 2))
    assert (corner < 60) == dark and chromium.problems == []
