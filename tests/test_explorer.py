"""The explorer of shapes, in a real browser: the module's numbers, and it answers to touch."""

import shutil

import pytest

import petseg_utils as pets

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the explorer is tested in a browser, by playwright"
)
PAGE = pets.ROOT / "notebooks" / "explorer.html"
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def chromium():
    if not BROWSER:
        pytest.skip("there is no Chromium here: install it to test the explorer.")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    context = chromium.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.failures = []
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.on(
        "request",
        lambda request: (
            page.failures.append(request.url) if request.url.startswith("http") else None
        ),
    )
    page.goto(PAGE.as_uri())
    yield page
    assert page.failures == []
    context.close()


def choose(page, **values: int) -> None:
    """Move the sliders, as a hand would."""
    for name, value in values.items():
        page.locator(f"#{name}").evaluate(
            "(slider, v) => { slider.value = v; slider.dispatchEvent(new Event('input')); }", value
        )


def steps_of(page, selector: str) -> list[str]:
    """Return of which steps the elements are."""
    return page.locator(selector).evaluate_all("all => all.map(one => one.dataset.step)")


def table(page) -> list[list[str]]:
    rows = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    return page.locator("#rows tr").evaluate_all(rows)


@pytest.mark.parametrize("sizes", [(256, 32, 5), (128, 7, 7), (36, 1, 2), (480, 64, 3)], ids=str)
def test_every_number_is_that_of_the_module(page, sizes):
    side, b, depth = sizes
    choose(page, N=side, b=b, depth=depth)
    steps = pets.analyse_shapes(pets.UNet(b, depth), side)
    assert all(step.agrees for step in steps)
    columns = ("step", "formula", "traced", "parameters", "MFLOP", "receptive field")
    assert table(page) == [[str(step.row[name]) for name in columns] for step in steps]
    total = page.locator("#total td").all_text_contents()
    assert total[3] == f"{sum(step.parameters for step in steps):,}"
    assert total[4] == f"{sum(step.flops for step in steps) / 1e6:,.1f}"
    drawn = [step.name for step in steps if not step.name.startswith(("pool", "upsample"))]
    assert steps_of(page, "#u rect[data-step]") == ["image", *drawn]


def test_side_that_does_not_divide_is_explained(page):
    choose(page, N=100, depth=3)
    told = page.locator("#told").text_content()
    assert "100 is no multiple of 8" in told
    assert "96 or 104" in told
    assert steps_of(page, "tr.bad") == ["pool3", "bottleneck"]
    choose(page, N=104)
    assert page.locator("tr.bad").count() == 0
    assert page.locator("#told.bad").count() == 0


def test_pointing_at_a_box_lights_its_row_and_opens_the_block(page):
    page.locator("#u rect[data-step=down2]").hover()
    assert steps_of(page, "tr.lit") == ["down2"]
    told = page.locator("#told").text_content()
    assert "32 → 64" in told
    assert "64 → 64" in told
    block = pets.conv_plus_conv(32, 64)
    for part in (block[:2], block[3:5]):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters" in told


@pytest.mark.parametrize("width", [360, 390, 768])
@pytest.mark.parametrize("depth", [2, 5, 7])
def test_page_is_no_wider_than_the_screen(page, width, depth):
    page.set_viewport_size({"width": width, "height": 800})
    choose(page, depth=depth)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    places = page.locator("#u rect, #u text").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().toJSON())"
    )
    assert min(place["left"] for place in places) >= 0
    assert max(place["right"] for place in places) <= width


def test_where_there_is_no_room_for_labels_it_says_how_to_see_them(page):
    assert page.locator("#told").text_content() == "Touch a box or a row."
    page.set_viewport_size({"width": 390, "height": 800})
    page.reload()
    assert page.locator("#told").text_content() == "Touch a box for its shape."


def test_without_javascript_a_sentence_points_to_the_drawing(chromium):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(PAGE.as_uri())
    assert "needs JavaScript" in page.locator("body").inner_text()
    context.close()
