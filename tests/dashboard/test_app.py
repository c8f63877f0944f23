"""The dashboard's server: its API, its limits, many clients at once, and what must not be accessible."""

import base64
import io
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from answering import says_seg_often
from conftest import build_tiny_model
from forks import Program
from pictures import upload
from PIL import Image
from transformers import PreTrainedTokenizerFast

import app
from model import layer_rules
from utils.dashboard.examples import LONG_SIDE, draw_example, example_queries
from utils.dashboard.service import Dashboard, Limits, Visit
from utils.dashboard.uploads import Quota
from utils.datasets.masks import decode_mask
from utils.demo import scenes

gradio_client = pytest.importorskip("gradio_client")
QUEUE = 24


class Served:
    """A page that is being served, and requests as of a program that does not know gradio."""

    def __init__(self, dashboard, address, folder):
        self.dashboard, self.folder = dashboard, folder
        self.address = address.rstrip("/")
        self.http = httpx.Client(base_url=self.address, timeout=60)

    def client(self):
        return gradio_client.Client(self.address, verbose=False)

    def upload(self, path, name=None):
        response = self.http.post(
            "/gradio_api/upload", files={"files": (name or Path(path).name, Path(path).read_bytes())}
        )
        response.raise_for_status()
        return {"path": response.json()[0], "meta": {"_type": "gradio.FileData"}}

    def post(self, image, prompt, tokens=2):
        response = self.http.post("/gradio_api/call/ask", json={"data": [image, prompt, "", "rle", tokens]})
        response.raise_for_status()
        return response.json()["event_id"]

    def result(self, event):
        """The last event of the stream and its data."""
        with httpx.stream("GET", f"{self.address}/gradio_api/call/ask/{event}", timeout=60) as stream:
            events = [line for line in stream.iter_lines() if line]
        return events[-2].removeprefix("event: "), json.loads(events[-1].removeprefix("data: "))


@pytest.fixture(scope="module")
def served(tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    limits = Limits(upload_bytes=100_000, pixels=1_000_000)
    model = says_seg_often(build_tiny_model(tiny_processor, seed=1), tiny_processor)
    board = Dashboard(
        model, tiny_processor, "tiny", "f00", folder / "files" / "answers", limits=limits, capacity=4, remember=False
    )
    album = tmp_path_factory.mktemp("album")
    upload(album)
    args = app.parse_arguments(["--queue", str(QUEUE), "--examples", str(album)])
    page, _, address = app.serve(board, args, folder)
    yield Served(board, address, folder)
    page.close()
    board.close()


@pytest.fixture
def slow_words(served, monkeypatch):
    """Every token takes 50 ms, so that there is time to do something meanwhile."""
    read = served.dashboard.processor.decode
    monkeypatch.setattr(served.dashboard.processor, "decode", lambda ids: time.sleep(0.05) or read(ids))


# ----------------------------------------------------------------------------------------------------------------- API


def test_a_client_asks_follows_up_and_starts_over(served, tmp_path, monkeypatch):
    predictions = []
    ask = served.dashboard.ask
    monkeypatch.setattr(served.dashboard, "ask", lambda *a, **k: (predictions.append(n) or n for n in ask(*a, **k)))
    client, image = served.client(), gradio_client.handle_file(upload(tmp_path))
    job = client.submit(image, "the red star", "last", "rle", 6, api_name="/ask")
    answer = job.result()
    visit = next(p for p in predictions if isinstance(p, Visit))
    assert answer["answer"] == visit.prediction.text
    assert (answer["prompt"], answer["layer_policy"], answer["model"]) == ("the red star", "last", "tiny")
    assert (answer["width"], answer["height"]) == (64, 48)
    assert len(job.outputs()) > 1  # it was written piece by piece
    assert client.predict(None, "the circle", api_name="/ask")["prompt"] == "the circle"
    client.predict(api_name="/reset")
    with pytest.raises(Exception, match="no image to ask about"):
        client.predict(None, "the circle", api_name="/ask")


def test_the_api_says_why(served, tmp_path):
    client, image = served.client(), gradio_client.handle_file(upload(tmp_path))
    answer = client.predict(image, "the red star", "fixed:2", "png", 8, api_name="/ask")
    assert answer["masks"]
    assert {mask["layer"] for mask in answer["masks"]} == {2}
    mask = np.array(Image.open(io.BytesIO(base64.b64decode(answer["masks"][0]["png"]))))
    assert mask.shape == (48, 64)
    assert int((mask == 255).sum()) == answer["masks"][0]["pixels"]
    why = client.predict(1, 3, True, api_name="/why")
    assert (why["layer"], why["similarity_layer"], len(why["policy"])) == (2, 3, served.dashboard.num_layers)
    assert sum(why["policy"]) == pytest.approx(1, abs=1e-3)
    for name in ("similarity_png", "deviation_png"):
        assert Image.open(io.BytesIO(base64.b64decode(why[name]))).size == (64, 48)
    assert 0 <= why["uncertainty"] <= 1
    for number, layer, message in ((99, -1, "no .SEG. number 99"), (1, 9, "layer 9 does not exist")):
        with pytest.raises(Exception, match=message):
            client.predict(number, layer, False, api_name="/why")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([None, "the red star"], "no image to ask about"),
        ([True, "  "], "question is empty"),
        ([True, "x" * 2001], "2001 characters"),
        ([True, "the red star", "best"], "unknown layer rule"),
        ([True, "the red star", "last", "gif"], "use rle or png"),
        ([True, "the red star", "last", "rle", 10**6], "not between"),
    ],
)
def test_invalid_requests_are_explained(served, tmp_path, data, message):
    image = gradio_client.handle_file(upload(tmp_path)) if data[0] else None
    with pytest.raises(Exception, match=message):
        served.client().predict(image, *data[1:], api_name="/ask")


def test_markup_in_messages_is_escaped(served, tmp_path):
    with pytest.raises(Exception, match="&lt;b&gt;"):
        served.client().predict(gradio_client.handle_file(upload(tmp_path)), "a star", "<b>", api_name="/ask")


def test_the_menu_offers_every_rule_of_inference(served):
    parts = served.http.get("/config").json()["components"]
    [dropdown] = [part["props"] for part in parts if str(part["props"].get("label")).startswith("Layer policy")]
    own, *offered = [value for _, value in dropdown["choices"]]
    assert own == ""
    assert offered == layer_rules.menu(served.dashboard.num_layers)


def test_health_is_json(served):
    health = served.http.get("/health").json()
    assert health["status"] == "ok"
    assert {"model", "fingerprint", "queue", "visitors", "answered", "uptime_seconds"} <= health.keys()


# ------------------------------------------------------------------------------------------------------------- uploads


def refusal(served, image):
    kind, message = served.result(served.post(image, "the red star"))
    assert kind == "error"
    return message["error"] if isinstance(message, dict) else str(message)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_uploads_are_rejected_with_a_message(served, tmp_path):
    text, huge = tmp_path / "note.png", tmp_path / "huge.png"
    text.write_text("this is a text file")
    Image.new("1", (10_000, 10_000)).save(huge)
    sent = served.http.post("/gradio_api/upload", files={"files": ("note.png", text.read_bytes())})
    assert sent.status_code == 415
    assert "not a picture that can be read" in sent.text
    assert not list((served.folder / "files").rglob("note.png"))
    assert "10000 x 10000 pixels; at most 1 million" in refusal(served, served.upload(huge))


def test_too_many_bytes_are_refused_while_they_arrive(served):
    response = served.http.post("/gradio_api/upload", files={"files": ("big.png", b"x" * 200_000)})
    assert response.status_code == 413


def test_a_hostile_file_name_is_only_a_name(served, tmp_path):
    sent = served.upload(upload(tmp_path), name="../../<img src=x onerror=alert(1)>.png")
    assert str(served.folder) in sent["path"]
    assert ".." not in sent["path"]
    assert "<" not in sent["path"]
    kind, _ = served.result(served.post(sent, "the red star"))
    assert kind == "complete"


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(app.__file__)), "../../etc/passwd", "file:///etc/passwd"])
def test_other_files_are_neither_read_nor_given_out(served, path):
    message = refusal(served, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert "root:" not in message
    for url in (f"/gradio_api/file={path}", f"/gradio_api/file=%2e%2e/{path}", f"/static/../../{path}"):
        assert served.http.get(url).status_code in (400, 403, 404)


def test_the_server_fetches_nothing_for_a_visitor(served, monkeypatch):
    message = refusal(served, {"path": f"{served.address}/health", "meta": {"_type": "gradio.FileData"}})
    assert "not an upload" in message


def test_no_widget_fetches_an_address(served):
    """Not only image boxes: gradio fetches for whatever input holds a file."""
    asked: list[str] = []

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    site = HTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    monkeypatch_public = pytest.MonkeyPatch()
    monkeypatch_public.setattr("safehttpx.is_public_ip", lambda ip: True)
    address = {"path": f"http://127.0.0.1:{site.server_port}/x", "meta": {"_type": "gradio.FileData"}}
    try:
        functions = served.http.get("/config").json()["dependencies"]
        for number, function in enumerate(functions):
            session = f"fetch{number}"
            join = {"data": [address] * len(function["inputs"]), "fn_index": function["id"], "session_hash": session}
            served.http.post("/gradio_api/queue/join", json=join)
            served.http.post("/gradio_api/run/predict", json=join)
        time.sleep(1)
    finally:
        monkeypatch_public.undo()
        site.shutdown()
    assert len(functions) > 15
    assert asked == []


def test_pages_load_nothing_from_elsewhere(served):
    page = served.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert not re.search(r"https?://", policy)
    loaded = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](https?://[^"']+)""", page.text)
    assert [url for url in loaded if not url.startswith(served.address)] == []


# -------------------------------------------------------------------------------------------------------- many at once


def test_twenty_clients_at_once_lose_nothing(served, tmp_path):
    images = [upload(tmp_path, f"{n}.png", n, (40 + n, 64)) for n in range(20)]

    def ask(number):
        kind, data = served.result(served.post(served.upload(images[number]), f"question {number}"))
        assert kind == "complete"
        return data[0]

    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(ask, range(20)))
    assert [answer["prompt"] for answer in answers] == [f"question {n}" for n in range(20)]
    assert [answer["height"] for answer in answers] == [40 + n for n in range(20)]
    assert all(decode_mask(m["rle"]).shape == (a["height"], 64) for a in answers for m in a["masks"])
    assert len(served.dashboard.visits) <= 4


def test_answers_come_in_the_order_of_the_questions(served, tmp_path, monkeypatch):
    order, ask = [], served.dashboard.ask

    def noted(visitor, source, prompt, *arguments, **options):
        yield from ask(visitor, source, prompt, *arguments, **options)
        order.append(prompt)

    monkeypatch.setattr(served.dashboard, "ask", noted)
    image = served.upload(upload(tmp_path))
    events = [served.post(image, f"question {n}") for n in range(10)]
    with ThreadPoolExecutor(20) as clients:
        assert {kind for kind, _ in clients.map(served.result, events)} == {"complete"}
    assert order == [f"question {n}" for n in range(10)]


def test_two_clients_do_not_see_each_other(served, tmp_path):
    one, two = served.client(), served.client()
    one.predict(gradio_client.handle_file(upload(tmp_path)), "the red star", api_name="/ask")
    with pytest.raises(Exception, match="no image to ask about"):
        two.predict(None, "the circle", api_name="/ask")
    bare = [served.result(served.post(None, "the circle")) for _ in range(2)]  # nor do requests without a session
    assert {kind for kind, _ in bare} == {"error"}


def test_the_queue_is_bounded(served, tmp_path, monkeypatch):
    go, read = threading.Event(), served.dashboard.processor.decode
    monkeypatch.setattr(served.dashboard.processor, "decode", lambda ids: go.wait(30) and read(ids))
    image = served.upload(upload(tmp_path))
    events, refused = [], None
    for _ in range(QUEUE + 5):
        response = served.http.post("/gradio_api/call/ask", json={"data": [image, "a star", "", "rle", 1]})
        if response.status_code != 200:
            refused = response
            break
        events.append(response.json()["event_id"])
    assert refused is not None
    assert refused.status_code == 503
    assert served.http.get("/health").json()["queue"] >= QUEUE
    go.set()
    with ThreadPoolExecutor(len(events)) as clients:
        assert {kind for kind, _ in clients.map(served.result, events)} == {"complete"}


def test_a_client_that_leaves_frees_its_place(served, tmp_path, slow_words):
    image = served.upload(upload(tmp_path))
    before, start = served.dashboard.answered, time.monotonic()
    event = served.post(image, "a long story", tokens=400)  # 20 s
    with httpx.stream("GET", f"{served.address}/gradio_api/call/ask/{event}", timeout=60) as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith("data:"):
            pass
    kind, data = served.result(served.post(image, "a short one"))
    assert (kind, data[0]["prompt"]) == ("complete", "a short one")
    assert time.monotonic() - start < 12
    assert served.dashboard.answered == before + 1


# ------------------------------------------------------------------------------------------------------------- command


def test_flags_are_checked(capsys, tmp_path):
    for flags, word in (
        (["--queue", "0"], "--queue"),
        (["--max_megapixels", "-1"], "--max_megapixels"),
        (["--quantize", "8bit"], "--version"),
        (["--base", "llava"], "--base need --version"),
        (["--vision_pretrained", "sam.pth"], "--vision_pretrained need --version"),
    ):
        with pytest.raises(SystemExit) as caught:
            app.parse_arguments(flags)
        assert caught.value.code == 2
        assert word in capsys.readouterr().err
    assert app.cli.run(app.main, ["--version", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_without_flags_a_good_tiny_model_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "TRAINED", "runs/no/such/run")
    board = app.build_dashboard(app.parse_arguments([]), tmp_path)
    rng = np.random.default_rng(1)
    scene = scenes.sample_scene(rng)
    (number,) = [n for n, shape in enumerate(scene.shapes) if (shape.color, shape.kind) == ("red", "square")]
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    *_, visit = board.ask("v", str(tmp_path / "scene.png"), "the red square")
    assert "before fine-tuning" in board.name
    [mask], truth = visit.masks, scene.masks[number]
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8
    *_, visit = board.ask("v", None, "the cyan cross")
    assert "[REJ]" in visit.prediction.text
    assert len(visit.masks) == 0
    for seed in app.SEEDS:  # the examples' questions, too
        rng = np.random.default_rng(seed)
        scene = scenes.sample_scene(rng, long_side=LONG_SIDE)
        path = draw_example(seed, tmp_path).path
        for query in example_queries(scene, rng):
            *_, visit = board.ask("v", path, query.text)
            truth, masks = scene.masks[list(query.targets)].any(0), visit.masks.any(0)
            assert (masks & truth).sum() >= 0.75 * (masks | truth).sum(), (seed, query.text)
    board.close()


def test_old_files_go_and_examples_stay(served, tmp_path):
    examples = sorted((served.folder / "examples").iterdir())
    assert len(examples) == 1
    sent = served.upload(upload(tmp_path))
    cleared = served.folder / "files"  # what gradio clears
    assert cleared in Path(sent["path"]).parents
    assert all(cleared not in example.parents for example in examples)


def test_the_models_words_decide_on_the_built_in_examples(tmp_path):
    words = PreTrainedTokenizerFast.from_pretrained(Path(app.__file__).parent / "assets/tiny/llava").get_vocab()

    def offered(vocabulary):
        tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
        dashboard = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
        return len(app.examples_of(app.parse_arguments([]), dashboard, tmp_path))

    assert offered(words | {"[SEG]": len(words)}) == len(app.SEEDS)
    assert offered({"photograph": 0}) == 0


def test_examples_of_a_folder(served, tmp_path):
    album, copies = tmp_path / "album", tmp_path / "copies"
    album.mkdir()
    Image.new("RGB", (40, 30)).save(album / "beach.jpg")
    (album / "prompts.txt").write_bytes("\ufeffthe dog\r\nthe caf\u00e9\r\n".encode("utf-16-le"))
    [example] = app.examples_of(app.parse_arguments(["--examples", str(album)]), served.dashboard, copies)
    assert example.questions == ("the dog", "the caf\u00e9")
    assert Path(example.path) == copies / "beach.jpg"
    with pytest.raises(ValueError, match="holds no image"):
        app.examples_of(app.parse_arguments(["--examples", str(copies.parent)]), served.dashboard, copies)


def test_a_taken_port_is_said_in_one_line(served):
    port = int(served.address.rsplit(":", 1)[1])
    page = app_page()
    with pytest.raises(ValueError, match=f"port {port} is taken by another program; give a free one with --port"):
        app.launch(page, app.parse_arguments(["--port", str(port)]), quiet=True)


def app_page():
    import gradio

    with gradio.Blocks() as page:
        gradio.HTML("")
    return page


def test_an_address_cannot_fill_the_disk():
    quota = Quota(files=3, bytes=100, everyone=2)
    assert [quota.admit("a", size) for size in (60, 60, 40, 0, 0)] == [True, False, True, True, False]
    assert quota.admit("b", 100)
    assert not quota.admit("c", 1)  # all addresses together


def test_sigterm_deletes_the_uploads(tmp_path):
    """docker stop, systemd and kill end the server as Ctrl-C does."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Program(Path(app.__file__), "--port", port, env=environment, output=tmp_path / "printed.txt")
    while server.ends(0.05) is None and "Ctrl-C" not in server.printed():
        pass
    picture = upload(tmp_path)
    sent = httpx.post(
        f"http://127.0.0.1:{port}/gradio_api/upload", files={"files": ("holiday.png", Path(picture).read_bytes())}
    )
    stored = Path(sent.json()[0])
    assert stored.is_file()
    server.process.terminate()
    assert server.ends(60) == 0
    assert not list(tmp_path.glob("uground-dashboard-*"))
