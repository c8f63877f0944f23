"""The dashboard in headless Chromium, with the tiny model of assets/tiny.

Skipped where Chromium is not installed; on Debian: apt-get install chromium
"""

import base64
import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import app
from utils.dashboard.view import css_color
from utils.datasets.masks import decode_mask
from utils.demo import scenes

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements.txt)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]
ANSWERS = "#ug-conversation .ug-answer"
HOSTILE = "<img src=x onerror=\"alert('prompt')\"><script>alert(1)</script> the red square"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "TRAINED", "runs/no/such/run")
        args = app.parse_arguments([])
        board = app.build_dashboard(args, folder)
    page, _, address = app.serve(board, args, folder)
    yield address
    page.close()
    board.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=flags)


@pytest.fixture
def visit(browser, address):
    """visit(**options) -> a new visitor's page. No page may open a dialog, log an error, or ask another server."""
    contexts, trouble = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("dialog", lambda dialog: trouble.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("pageerror", lambda error: trouble.append(f"error {error}"))
        page.on(
            "request",
            lambda request: request.url.startswith((address, "data:", "blob:")) or trouble.append(request.url),
        )
        page.goto(address)
        page.wait_for_selector("#ug-ask")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A drawn scene with a red square: the file, and the square's mask."""
    scene = scenes.sample_scene(np.random.default_rng(1), long_side=160)  # a quarter of what the page shows
    path = tmp_path_factory.mktemp("scene") / "<b>scene<img src=x onerror=alert(9)>.png"
    Image.fromarray(scene.image).save(path)
    (number,) = [n for n, shape in enumerate(scene.shapes) if (shape.color, shape.kind) == ("red", "square")]
    return path, scene.masks[number]


def send(page, path):
    page.set_input_files("#ug-image input[type=file]", path)


def ask(page, prompt):
    """Asks and waits for the whole answer; its text."""
    before = page.locator(ANSWERS).count()
    page.fill("#ug-prompt textarea", prompt)
    page.press("#ug-prompt textarea", "Enter")
    page.wait_for_function(
        "n => document.querySelectorAll('#ug-conversation .ug-answer').length > n"
        " && !document.querySelector('.ug-caret')",
        arg=before,
    )
    return page.locator(ANSWERS).last.inner_text()


def shown(page):
    """The picture on the page, [H, W, 3]."""
    data = page.get_attribute("#ug-result img", "src").split(",")[1]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def changes(page, action):
    """The picture before and after ``action``, which changes it."""
    source, before = page.get_attribute("#ug-result img", "src"), shown(page)
    action()
    page.wait_for_function("old => document.querySelector('#ug-result img').src != old", arg=source)
    return before, shown(page)


def download(page, button):
    with page.expect_download() as waiting:
        page.click(button)
    return waiting.value.path()


def test_upload_ask_toggle_follow_up_and_download(visit, scene):
    path, truth = scene
    page = visit()
    send(page, path)
    page.wait_for_selector("#ug-result img")
    plain = shown(page)
    assert "[SEG]" in ask(page, "the red square")
    assert page.locator(f"{ANSWERS} mark").get_attribute("style") == f"--ug: {css_color(0)}"
    painted, expected = np.abs(shown(page) - plain).max(-1) > 30, np.kron(truth, np.ones((4, 4), bool))
    assert (painted & expected).sum() / (painted | expected).sum() > 0.75
    _, without = changes(page, lambda: page.uncheck("#ug-masks input"))
    assert np.abs(without - plain).max() == 0
    changes(page, lambda: page.check("#ug-masks input"))
    _, bare = changes(page, lambda: page.uncheck("#ug-outline input"))
    _, solid = changes(page, lambda: page.fill("#ug-opacity input[type=number]", "1"))
    assert np.abs(solid - bare).max() > 60
    record = json.loads(download(page, "#ug-record").read_text())
    mask = decode_mask(record["masks"][0]["rle"])
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8
    with zipfile.ZipFile(download(page, "#ug-archive")) as archive:
        stored = np.array(Image.open(io.BytesIO(archive.read("mask_1.png"))))
    assert np.array_equal(stored > 0, mask)
    overlay = np.array(Image.open(download(page, "#ug-overlay")))
    assert overlay.shape[:2] == truth.shape
    assert "[REJ]" in ask(page, "the cyan cross")  # a false premise, on the same image
    assert not page.is_visible("#ug-masks")
    assert np.abs(shown(page) - plain).max() == 0
    assert page.locator(ANSWERS).count() == 2
    page.reload()
    page.wait_for_selector("#ug-ask")
    assert page.locator(ANSWERS).count() == 0


def test_why_this_mask(visit, scene):
    page = visit()
    send(page, scene[0])
    page.wait_for_selector("#ug-result img")
    ask(page, "the red square")
    page.click("#ug-why > button")
    assert "uses layer 8 (" in page.get_attribute("#ug-policy svg", "aria-label")
    assert page.locator("#ug-policy rect").count() == 9
    page.wait_for_selector("#ug-similarity img[alt*='layer 8']")
    page.fill("#ug-layer input[type=number]", "3")
    page.wait_for_selector("#ug-similarity img[alt*='layer 3']")
    page.click("#ug-measure")
    page.wait_for_selector("#ug-uncertainty img")
    assert "Uncertainty of [SEG] 1: 0." in page.inner_text("#ug-uncertainty")


def test_two_visitors_do_not_see_each_other(visit, scene):
    one, two = visit(), visit()
    for page in (one, two):
        send(page, scene[0])
        page.wait_for_selector("#ug-result img")
    ask(one, "the red square")
    ask(two, "the yellow diamond")
    assert "yellow diamond" not in one.inner_text("#ug-conversation")
    assert "red square" not in two.inner_text("#ug-conversation")
    json_of = [json.loads(download(page, "#ug-record").read_text()) for page in (one, two)]
    assert [record["prompt"] for record in json_of] == ["the red square", "the yellow diamond"]


def test_bad_input_is_told_and_nothing_runs(visit, scene, tmp_path):
    page = visit()
    alert = "#ug-conversation [role=alert]"
    page.click("#ug-ask")
    assert "question is empty" in page.inner_text(alert)
    text, huge = tmp_path / "note.png", tmp_path / "huge.png"
    text.write_text("this is a text file")
    Image.new("1", (10_000, 10_000)).save(huge)
    send(page, text)  # is refused before the page has it
    page.wait_for_function("m => document.body.innerText.includes(m)", arg="not a picture that can be read")
    send(page, huge)
    message = "10000 x 10000 pixels; at most 30 million"
    page.wait_for_function("([s, m]) => document.querySelector(s)?.innerText.includes(m)", arg=[alert, message])
    page.click("#ug-image button[aria-label='Remove Image']")
    send(page, scene[0])
    page.wait_for_selector("#ug-result img")
    ask(page, HOSTILE)
    assert HOSTILE in page.inner_text("#ug-conversation .ug-question")
    assert page.locator("#ug-conversation img, #ug-conversation script").count() == 0


def test_keyboard_alone_is_enough(visit):
    page = visit()

    def tab_to(selector):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        pytest.fail(f"no way by the Tab key to {selector}")

    page.focus("body")
    tab_to("#ug-pictures button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ug-questions button")
    page.wait_for_selector("#ug-result img")
    tab_to("#ug-questions button")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#ug-prompt textarea').value != ''")
    tab_to("#ug-prompt textarea")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ug-masks input")
    tab_to("#ug-masks input")
    changes(page, lambda: page.keyboard.press("Space"))
    tab_to("#ug-opacity input[type=range]")
    tab_to("#ug-record, #ug-record *")


CONTROLS = """() => [...document.querySelectorAll('button, input, textarea, select, [role=button], img')]
    .filter(e => e.checkVisibility() && !e.disabled)
    .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('title') || e.innerText?.trim() || e.alt
                   || [...(e.labels || [])].some(l => l.innerText.trim()) || e.querySelector('img[alt]:not([alt=""])')
                   || e.getAttribute('aria-labelledby')))
    .map(e => e.outerHTML.slice(0, 160))"""
CONTRASTS = """() => {
    const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const numbers = c => c.match(/[\\d.]+/g).map(Number);
    const under = e => { for (; e; e = e.parentElement) {
        const c = numbers(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0.99) return c; } return [255, 255, 255]; };
    return [...document.querySelectorAll('#ug-conversation *, #ug-policy *, label span, button, h1, .ug-about')]
        .filter(e => e.checkVisibility() && e.innerText?.trim() && e.children.length == 0)
        .map(e => { const a = light(numbers(getComputedStyle(e).color)), b = light(under(e));
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 120)]; })
        .filter(([ratio]) => ratio < 4.5); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_have_names_and_texts_have_contrast(visit, scene, scheme):
    page = visit(color_scheme=scheme, viewport={"width": 390, "height": 844})
    send(page, scene[0])
    page.wait_for_selector("#ug-result img")
    ask(page, "the red square")
    page.click("#ug-why > button")
    page.wait_for_selector("#ug-similarity img")
    assert page.evaluate(CONTROLS) == []
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing is cut off on a telephone
