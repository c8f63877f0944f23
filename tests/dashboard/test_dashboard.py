"""The dashboard without a page: uploads and their limits, visitors, streamed answers, views."""

import base64
import io
import json
import re
import threading
import zipfile
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from pictures import picture, upload
from PIL import Image

from model.structures import Prediction, Turn
from utils.dashboard import view
from utils.dashboard.examples import SEEDS, draw_example
from utils.dashboard.service import Dashboard, Limits, open_upload
from utils.datasets.masks import decode_mask
from utils.plotting import overlays
from utils.plotting.overlays import color

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;'


def make_prediction(count=2, size=(48, 64), text="the red star [SEG] and the circle [SEG]."):
    logits = torch.full((count, *size), -3.0)
    for n in range(count):
        logits[n, 5 + 10 * n : 20 + 10 * n, 10 : 30 + n] = 3.0
    policy = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4]] * count)
    return Prediction(
        text if count else "no, [REJ].",
        [],
        logits,
        logits.sigmoid(),
        [4, 2][:count],
        policy.reshape(count, 5),
        torch.rand(count, 5, 4, 4),
        [False] * count,
    )


@pytest.fixture
def dashboard(tiny_processor, tmp_path):
    board = Dashboard(
        build_tiny_model(tiny_processor),
        tiny_processor,
        "tiny",
        "f00",
        tmp_path / "answers",
        capacity=2,
        remember=False,
    )
    yield board
    board.close()


@pytest.fixture
def answered(dashboard, tmp_path):
    """A visit whose answer has two masks."""
    visit = dashboard.open("v", upload(tmp_path))
    visit.prediction, visit.policy = make_prediction(), "argmax"
    visit.turns = [Turn("what is there", visit.prediction.text)]
    return visit


# ------------------------------------------------------------------------------------------------------------- uploads


def test_uploads_are_upright_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(picture()).save(tmp_path / "turned.jpg", exif=exif)
    assert open_upload(tmp_path / "turned.jpg", Limits()).shape == (64, 48, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.new("1", (10_000, 10_000)).save(path)  # 100 megapixels in some kB
    monkeypatch.setattr("utils.dashboard.service.read_image", lambda *a, **k: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="10000 x 10000 pixels; at most 30 million"):
        open_upload(path, Limits())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses, from twice as many on
    with pytest.raises(ValueError, match="at most 30 million"):
        open_upload(path, Limits())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is a text file", "not a picture"),
        (b"", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not a picture"),
        (b"x" * 5000, "at most 0 MB"),
    ],
)
def test_what_is_not_a_picture_is_rejected(tmp_path, content, message):
    path = tmp_path / "note.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_upload(path, Limits(upload_bytes=4000))
    assert str(tmp_path) not in str(caught.value)  # a visitor learns nothing about the server's disk


def test_damaged_and_missing_files_are_rejected(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(Path(upload(tmp_path)).read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        open_upload(path, Limits())
    with pytest.raises(ValueError, match="upload it again"):
        open_upload(tmp_path / "gone.png", Limits())


def test_the_number_of_samples_is_limited(dashboard, tmp_path):
    with pytest.raises(ValueError, match="mc:600000 takes 600000 samples; at most 64"):
        next(dashboard.ask("v", upload(tmp_path), "the red star", layer_policy="mc:600000"))
    with pytest.raises(ValueError, match="unknown layer rule"):
        next(dashboard.ask("v", upload(tmp_path), "the red star", layer_policy="mc:\u00b2"))


# ------------------------------------------------------------------------------------------------------------ visitors


def test_answers_are_streamed_and_then_complete(dashboard, tmp_path):
    *pieces, visit = dashboard.ask("v", upload(tmp_path), "the red star", max_new_tokens=6)
    assert len(pieces) == 6
    assert visit.prediction.text == visit.turns[-1].answer == pieces[-1]
    half = 1  # of a character may change
    assert all(later.startswith(earlier[:-half]) for earlier, later in pairwise(pieces))
    assert visit.policy == "argmax"
    assert dashboard.answered == 1


def test_a_follow_up_encodes_nothing_again(dashboard, tmp_path, monkeypatch):
    image = upload(tmp_path)
    list(dashboard.ask("v", image, "the red star", max_new_tokens=4))
    monkeypatch.setattr(dashboard.model, "encode_images", lambda *a, **k: pytest.fail("CLIP ran again"))
    *_, visit = dashboard.ask("v", image, "the circle", max_new_tokens=4)
    *_, same = dashboard.ask("v", None, "the square", max_new_tokens=4)
    assert same is visit
    assert [turn.question for turn in visit.turns] == ["the red star", "the circle", "the square"]


def test_visitors_do_not_see_each_other(dashboard, tmp_path):
    one, two = upload(tmp_path, "a.png", 1), upload(tmp_path, "b.png", 2, (40, 40))
    *_, first = dashboard.ask("one", one, "the red star", max_new_tokens=3)
    *_, second = dashboard.ask("two", two, "the circle", max_new_tokens=3)
    assert first.folder != second.folder
    assert [turn.question for turn in dashboard.visits.get("one").turns] == ["the red star"]
    assert dashboard.visits.get("two").image.shape == (40, 40, 3)
    with pytest.raises(ValueError, match="no image"):
        next(dashboard.ask("three", None, "the circle"))


def test_only_the_latest_visitors_are_kept(dashboard, tmp_path):
    image = upload(tmp_path)
    for visitor in ("a", "b"):
        list(dashboard.ask(visitor, image, "the red star", max_new_tokens=2))
        view.write_record(dashboard.visits.get(visitor), "tiny")
    old = dashboard.visits.get("b").folder
    assert old.is_dir()
    dashboard.visits.get("a")  # seen later than b
    dashboard.open("c", image)
    assert len(dashboard.visits) == 2
    assert dashboard.visits.get("b") is None
    assert not old.exists()
    assert list(dashboard.ask("b", image, "the circle", max_new_tokens=2))[-1].turns == [
        Turn("the circle", dashboard.visits.get("b").prediction.text)
    ]


def test_start_over_keeps_the_image_and_forgets_the_rest(dashboard, tmp_path):
    image = upload(tmp_path)
    *_, visit = dashboard.ask("v", image, "the red star", max_new_tokens=2, remember=True)
    assert visit.session.history
    dashboard.reset("v")
    assert dashboard.open("v", image) is visit
    assert (visit.turns, visit.session.history, visit.prediction) == ([], [], None)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("  ", {}, "empty"),
        ("x" * 2001, {}, "2001 characters"),
        ("star", {"max_new_tokens": 0}, "max_new_tokens 0"),
        ("star", {"max_new_tokens": 10**9}, "not between"),
        ("star", {"layer_policy": "best"}, "unknown layer rule"),
    ],
)
def test_invalid_questions_are_rejected_and_change_nothing(dashboard, tmp_path, prompt, options, message):
    image = upload(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(dashboard.ask("v", image, prompt, **options))
    assert list(dashboard.ask("v", image, "the red \ud83d star", max_new_tokens=2))  # half a surrogate pair


def test_leaving_cancels_the_answer(dashboard, tmp_path):
    image, written = upload(tmp_path), []
    read = dashboard.processor.decode
    dashboard.processor.decode = lambda ids: written.append(len(ids)) or read(ids)
    try:
        updates = dashboard.ask("v", image, "the red star", max_new_tokens=500)
        next(updates)
        updates.close()  # as gradio does when the client has left
    finally:
        dashboard.processor.decode = read
    assert max(written) < 400
    assert dashboard.visits.get("v").turns == []
    *_, visit = dashboard.ask("w", image, "the circle", max_new_tokens=2)
    assert len(visit.turns) == 1


def test_simultaneous_questions_are_all_answered(dashboard, tmp_path):
    image = upload(tmp_path)

    def ask(number):
        list(dashboard.ask(f"visitor {number}", image, "the red star", max_new_tokens=2))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert dashboard.answered == 6
    assert len(dashboard.visits) == 2


def test_uncertainty_is_of_the_latest_answer(dashboard, answered):
    with pytest.raises(ValueError, match="no mask yet"):
        dashboard.measure_uncertainty("nobody")
    seen = []
    answered.session.decode_again = lambda policy: seen.append(policy) or make_prediction()
    dashboard.measure_uncertainty("v")
    assert seen == ["mc:16"]


def test_layer_maps_have_the_images_size(dashboard, answered):
    for layer in range(dashboard.num_layers):
        grid = dashboard.layer_map(answered, 1, layer)
        assert grid.shape == (48, 64)
    answered.prediction.layer_maps[1, 3] = 0.5
    assert np.allclose(dashboard.layer_map(answered, 1, 3), 0.5)


def test_health_reports_what_runs(dashboard):
    health = dashboard.health(waiting=3)
    assert json.loads(json.dumps(health)) == health
    assert (health["status"], health["model"], health["fingerprint"], health["queue"]) == ("ok", "tiny", "f00", 3)
    assert health["uptime_seconds"] >= 0


# ---------------------------------------------------------------------------------------------------------------- text


class Tags(HTMLParser):
    """Collects tags, their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data):
        self.text += data


def test_markup_is_shown_and_never_runs():
    shown = view.transcript_html([Turn(HOSTILE, f"{HOSTILE} [SEG] {HOSTILE}")], error=HOSTILE)
    tags = Tags(shown)
    assert not {"script", "img"} & set(tags.tags)
    assert not [name for name in tags.attributes if name.startswith("on")]
    assert tags.text.count("<script>alert(1)</script>") == 4
    assert tags.text.count("&amp;") == 4  # what was typed, not what a browser makes of it


def test_segs_have_the_colors_of_their_masks():
    html = view.answer_html("the red star [SEG] and a circle [SEG], not [REJ].")
    assert [html.count(view.css_color(n)) for n in range(3)] == [2, 2, 0]  # the words and the token
    assert Tags(html).text == "the red star [SEG]1 and a circle [SEG]2, not [REJ]."
    assert "#" not in view.answer_html("[SEG]", colored=False)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("It is [SEG].", ""),
        ("Yes, here it is: [SEG].", ""),
        ("the red star [SEG]", "the red star"),
        ("Sure, the red star is [SEG].", "the red star is"),
        ("It is the red star [SEG].", "the red star"),
        ("a cup [SEG] and the small plate: [SEG]", "the small plate:"),
        ("[SEG]", ""),
    ],
)
def test_words_that_a_seg_refers_to(answer, words):
    end = answer.rindex("[SEG]")
    assert answer[view.words_before(answer, end) : end].strip() == words


@pytest.mark.parametrize("number", range(7))
def test_a_mark_can_be_read_on_its_color(number):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear))

    ink = luminance([0, 0, 0] if view.ink(number) == "#000" else [255, 255, 255])
    low, high = sorted([ink, luminance(color(number))])
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("argmax", "layer 3 (layer policy"),
        ("fixed:3", "layer 3 (layer policy"),
        ("soft", "all layers, most weight on 3 (layer policy"),
        ("mc:16", "sampled layers, most often 3 (layer policy"),
    ],
)
def test_the_panel_names_the_layer_of_a_mask(answered, policy, words):
    answered.policy, answered.prediction.layers[0] = policy, 3
    assert f"[SEG] 1 uses {words}" in view.policy_html(answered, 0)


def test_only_the_newest_answer_is_colored():
    html = view.transcript_html([Turn("a", "[SEG]"), Turn("b", "[SEG]")])
    assert html.count("--ug") == 1


def test_a_thought_folds_and_is_open_while_it_is_written():
    turn = Turn("a", "It is [SEG].", "<b> red")
    html = view.transcript_html([turn])
    assert '<details class="ug-thought"><summary>Thought</summary>&lt;b&gt; red</details>' in html
    assert "<details" not in view.transcript_html([Turn("a", "It is [SEG].")])
    assert '<details class="ug-thought" open>' in view.transcript_html([Turn("a", "", "red")], writing=True)
    assert "open" not in view.transcript_html([turn], writing=True)


# ------------------------------------------------------------------------------------------------------------ pictures


def decoded(html):
    data = re.search(r"data:image/webp;base64,([^\"]+)", html)[1]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_chosen_masks_are_painted_at_the_pages_size(answered):
    painted, plain = (decoded(view.masks_html(answered, chosen, 1.0, False)) for chosen in ([0, 1], []))
    assert painted.shape == (480, 640, 3)
    changed = np.abs(painted - plain).max(-1) > 40
    union = np.kron(answered.masks.any(0), np.ones((10, 10), bool))
    assert (changed == union).mean() > 0.97
    only = decoded(view.masks_html(answered, [1], 1.0, False))
    middle = only[250, 150]  # row 25, column 15: the second mask alone
    assert np.abs(middle - np.array(overlays.color(1))).max() < 25
    assert "masks over it: none" in view.masks_html(answered, [], 1.0, False)


def test_outlines_can_be_left_out(answered):
    with_outline, without = (decoded(view.masks_html(answered, [0], 0.0, on)) for on in (True, False))
    assert np.abs(with_outline - without).max() > 100
    assert np.abs(without - decoded(view.masks_html(answered, [], 0.0, False))).max() == 0


def test_large_images_are_reduced_and_small_ones_enlarged():
    assert view.shown_size(3000, 4000) == (960, 1280)
    assert view.shown_size(120, 90) == (640, 480)
    assert view.shown_size(700, 900) == (700, 900)
    assert view.shown_size(1, 9000) == (1, 1280)


def test_policy_chart_shows_all_layers(answered):
    html = view.policy_html(answered, 0)
    assert html.count("<rect") == 5
    assert html.count("ug-chosen") == 1
    assert "layer 3: 30.0%" in html
    assert "uses layer 4 (layer policy" in html
    assert "untrained" not in html
    answered.prediction.policy[0] = torch.tensor([0, 0.25, 0.25, 0.25, 0.25])
    assert "untrained" in view.policy_html(answered, 0)


# --------------------------------------------------------------------------------------------------------------- files


def test_record_holds_masks_boxes_layers_and_scores(answered):
    record = view.answer_json(answered, "tiny")
    assert json.loads(json.dumps(record)) == record
    first, second = record["masks"]
    assert np.array_equal(decode_mask(first["rle"]), answered.masks[0])
    assert (first["layer"], second["layer"]) == (4, 2)
    assert second["policy"][2] == 0.2
    assert (first["number"], first["color"]) == (1, view.css_color(0))
    assert first["box_xywh"] == [10, 5, 20, 15]
    assert first["score"] == pytest.approx(torch.tensor(3.0).sigmoid().item(), abs=1e-4)
    assert "rle" not in view.answer_json(answered, "tiny", "png")["masks"][0]


def test_files_are_lossless_and_at_the_images_size(answered):
    with zipfile.ZipFile(view.write_masks(answered)) as archive:
        assert archive.namelist() == ["mask_1.png", "mask_2.png"]
        mask = np.array(Image.open(io.BytesIO(archive.read("mask_2.png"))))
    assert np.array_equal(mask, answered.masks[1] * np.uint8(255))
    overlay = np.array(Image.open(view.write_overlay(answered, [0], 0.5, True)))
    assert np.array_equal(overlay, overlays.overlay(answered.image, answered.masks[:1], 0.5))
    assert json.loads(Path(view.write_record(answered, "tiny")).read_text())["answer"] == answered.prediction.text


def test_an_answer_without_masks_has_files_too(answered):
    answered.prediction = make_prediction(0)
    assert view.answer_json(answered, "tiny")["masks"] == []
    assert np.array_equal(np.array(Image.open(view.write_overlay(answered, [], 0.5, True))), answered.image)
    with zipfile.ZipFile(view.write_masks(answered)) as archive:
        assert archive.namelist() == []


def test_examples_are_reproducible(tmp_path):
    first, again = (draw_example(SEEDS[0], tmp_path / name) for name in ("a", "b"))
    assert first.questions == again.questions
    assert len(first.questions) == 5
    assert Path(first.path).read_bytes() == Path(again.path).read_bytes()


def test_only_the_page_imports_gradio():
    """Everything else works, and starts, without it."""
    files = [path for room in ("model", "utils", "scripts") for path in (ROOT / room).rglob("*.py")]
    named = [path for path in files if re.search(r"^\s*(import|from) gradio\b", path.read_text(), re.MULTILINE)]
    assert named == [ROOT / "utils/dashboard/page.py"]
    assert not [path for path in files if "dashboard.page import" in path.read_text()]
