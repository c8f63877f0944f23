"""What the page's events change, without a browser (test_browser.py has one)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from answering import says_seg_often
from conftest import build_tiny_model
from pictures import upload

from utils.dashboard.examples import draw_example
from utils.dashboard.service import Dashboard

gr = pytest.importorskip("gradio")
from utils.dashboard.page import Handlers, Widgets, answer_column, question_column, why_panel  # noqa: E402

ME, NOBODY = SimpleNamespace(session_hash="me"), SimpleNamespace(session_hash="nobody")


@pytest.fixture(scope="module")
def page(tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    model = says_seg_often(build_tiny_model(tiny_processor, seed=1), tiny_processor)
    board = Dashboard(model, tiny_processor, "tiny", "f00", folder / "answers")
    with gr.Blocks():
        widgets = Widgets(question_column(board, [draw_example(1, folder)]), answer_column(), why_panel(board))
    yield Handlers(board, widgets)
    board.close()


def ask(page, image, prompt="the red star", tokens=8):
    """All states of the page while an answer is generated."""
    return list(page.answer(image, prompt, "fixed:2", False, tokens, 0.5, True, ME))


def test_widgets_are_named_after_what_they_are(page):
    columns = page.widgets.question, page.widgets.answer, page.widgets.why
    for column in columns:
        for name, widget in vars(column).items():
            kind = type(column).__annotations__[name].removeprefix("gr.")
            assert type(widget).__name__ == kind, name
    answer = page.widgets.answer
    assert [file.label for file in (answer.overlay, answer.archive, answer.record)] == [
        "Overlay (PNG)",
        "Masks (PNG, zipped)",
        "JSON",
    ]
    assert len({id(widget) for column in columns for widget in vars(column).values()}) == 26


def test_an_answer_appears_with_its_masks(page, tmp_path):
    image = upload(tmp_path)
    answer, why = page.widgets.answer, page.widgets.why
    opened = page.opened(image, ME)
    assert "<img" in opened[answer.picture]
    assert opened[answer.masks].visible is False
    first, *_, last = ask(page, image)
    assert "ug-caret" in first[answer.chat]
    visit = page.visit(ME)
    numbers = list(range(len(visit.masks)))
    assert numbers
    assert last[answer.masks].value == numbers
    assert last[answer.downloads].visible is False  # until the files are written
    assert last[why.layer] == 2 == page.chosen_layer(0, ME)


def test_an_answer_can_be_explained_and_downloaded(page, tmp_path):
    ask(page, upload(tmp_path))
    *files, downloads = page.files([0], 0.5, True, ME)
    assert downloads.visible is True
    assert [Path(path).name for path in files] == ["overlay.png", "masks.zip", "answer.json"]
    assert all(Path(path).is_file() for path in files)
    picture, overlay = page.look([0], 0.5, True, ME)
    assert picture == page.preview([0], 0.5, True, ME) != page.preview([], 0.5, True, ME)
    assert overlay == files[0]
    chart, similarity, uncertainty = page.explain(0, 3, ME)
    assert "<svg" in chart
    assert "layer 3" in similarity
    assert uncertainty == ""
    assert "Uncertainty of [SEG] 1" in page.measure(0, ME)
    assert "Uncertainty of [SEG] 1" in page.explain(0, 3, ME)[2]


def test_errors_are_shown_on_the_page(page, tmp_path):
    chat = page.widgets.answer.chat
    assert "the question is empty" in ask(page, upload(tmp_path), "  ")[-1][chat]
    note = tmp_path / "note.png"
    note.write_text("a text")
    assert "not a picture" in page.opened(str(note), ME)[chat]
    assert "ask for something first" in page.measure(0, NOBODY)
    assert page.look([0], 0.5, True, NOBODY) == (gr.skip(), gr.skip())


def test_a_conversation_is_stopped_and_cleared(page, tmp_path):
    image, chat = upload(tmp_path), page.widgets.answer.chat
    ask(page, image, "the red star")
    assert "the red star" in page.stopped(ME)
    assert "Stopped." in page.stopped(ME)
    assert "the red star" not in page.cleared(image, ME)[chat]
    page.opened(None, ME)
    assert page.visit(ME) is None


def test_start_over_removes_a_refused_picture(page, tmp_path):
    image, widgets = upload(tmp_path), page.widgets
    ask(page, image)
    note = tmp_path / "note.png"
    note.write_text("a text")
    refused = page.opened(str(note), ME)
    assert refused[widgets.why.seg].value is None  # nothing of the answer before stays chosen
    assert page.visit(ME) is None
    cleared = page.cleared(str(note), ME)
    assert cleared[widgets.question.image] is None
    assert "not a picture" not in cleared[widgets.answer.chat]
