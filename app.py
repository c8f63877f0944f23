"""The dashboard (paper Fig. 8): an image and an instruction go in, an answer and its masks come out, and why.

python app.py                        the tiny model of this repository, on this machine alone
python app.py --version DIR          a merged model (scripts/merge_lora.py), or a released checkpoint
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import wraps
from html import escape
from pathlib import Path
from secrets import token_hex
from types import SimpleNamespace
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: no word about us to anybody

import gradio as gr
import torch
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers.utils import logging as transformers_logging

from model import layer_rules
from model.loading.weights import fingerprint
from model.structures import Turn
from utils.config import load_config
from utils.dashboard import view
from utils.dashboard.examples import SEEDS, Example, draw_example
from utils.dashboard.service import Dashboard, Limits, Visit
from utils.inference import cli
from utils.inference.loading import load_for_training

ROOT = Path(__file__).resolve().parent
TRAINED = "runs/tiny/merged"
CSS = ROOT / "utils" / "dashboard" / "style.css"
MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": 1}  # one answer at a time, in order of arrival
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Opens the dashboard in the browser's reach: http://127.0.0.1:7860. Without --version it shows the "
        f"tiny model: {TRAINED} if scripts/demo.sh has been run, otherwise the one in assets/tiny as it is before "
        "fine-tuning. docs/dashboard.md describes the page and its API.",
        epilog="Exit codes: 0 stopped, 2 wrong input or the port is taken, 130 interrupted while loading.",
    )
    add = parser.add_argument
    cli.add_model_flags(parser, default="the tiny model")
    cli.add_layer_flag(parser, "default: the model's own; last for the untrained one")
    add("--port", type=int, metavar="N", help="default: 7860, or the next one that is free")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0 = the whole network")
    add("--share", action="store_true", help="also give it a public address, through gradio's servers")
    add("--queue", type=int, default=64, metavar="N", help="questions that may wait; more are refused (default: 64)")
    add("--visitors", type=int, default=16, metavar="N", help="whose images stay encoded (default: 16)")
    add("--max_upload_mb", type=float, default=20, metavar="MB", help="largest file that is taken (default: 20)")
    add("--max_megapixels", type=float, default=30, metavar="MP", help="largest picture that is taken (default: 30)")
    args = parser.parse_args(arguments)
    for name in ("queue", "visitors", "max_upload_mb", "max_megapixels"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be more than 0")
    if args.version is None and (args.vision_tower or args.quantize or args.device_map):
        parser.error("--vision_tower, --quantize and --device_map need --version: the tiny model does without")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="uground-dashboard-") as folder:
        dashboard = build_dashboard(args, Path(folder))
        page, _, address = serve(dashboard, args, Path(folder))
        print(f"{dashboard.name}\n{address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
        dashboard.close()
    return 0


def build_dashboard(args: argparse.Namespace, folder: Path) -> Dashboard:
    """Loads the model that ``args`` name, and answers a first question so that the visitors' come fast."""
    asked_for = args.version
    if asked_for is None and (ROOT / TRAINED).is_dir():
        args.version = str(ROOT / TRAINED)
    if args.version is None:
        opened = untrained_tiny(args)
        name = "The tiny model before fine-tuning (assets/tiny): it knows drawn scenes only"
    else:
        opened = cli.open_model(args)
        name = "The tiny model, trained by the demo: it knows drawn scenes only" if asked_for is None else args.version
    opened.model.config.layer_rule(args.layer_policy)  # a mistake shows before the page opens
    dashboard = Dashboard(
        opened.model,
        opened.processor,
        name,
        opened.fingerprint,
        folder / "files" / "answers",
        layer_policy=args.layer_policy,
        limits=Limits(round(args.max_upload_mb * 1e6), round(args.max_megapixels * 1e6)),
        capacity=args.visitors,
    )
    dashboard.warm_up()
    return dashboard


def untrained_tiny(args: argparse.Namespace) -> cli.Opened:
    """assets/tiny as its training would find it, read at the layer that its pre-training taught: the last."""
    device = cli.pick_device(args.device)
    precision = cli.pick_precision(args.precision, device)
    parts = {"version": "llava", "vision_tower": "clip", "vision_pretrained": "sam.pth"}
    flags = [text for name, part in parts.items() for text in (f"--{name}", str(ROOT / "assets/tiny" / part))]
    config = load_config(["--config", str(ROOT / "configs/tiny.yaml"), *flags])
    torch.manual_seed(config.train.seed)
    paths = config.model.version, config.model.vision_tower, config.model.vision_pretrained
    transformers_logging.disable_progress_bar()
    model, processor, _ = load_for_training(*paths, precision, config.method, config.model.model_max_length)
    model.config.eval_layer_policy = "last"
    known = fingerprint(model.state_dict().values())
    return cli.Opened(model.to(device).eval(), processor, device, precision, known)


def serve(dashboard: Dashboard, args: argparse.Namespace, folder: Path) -> tuple[gr.Blocks, Any, str]:
    """Starts the page in threads of its own: the page, its web application, and its address."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "files")  # gradio clears it of what is old; examples are not in it
    examples = [draw_example(seed, folder / "examples") for seed in SEEDS]
    page = build_page(dashboard, examples)
    page.queue(max_size=args.queue, default_concurrency_limit=8)

    def health(_: Request) -> JSONResponse:
        return JSONResponse(dashboard.health(len(page._queue)))

    application, address, shared = page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        max_file_size=dashboard.limits.upload_bytes,
        app_kwargs={"routes": [Route("/health", health)], "middleware": [Middleware(Headers)]},
        theme=theme(),
        css=f"{CSS.read_text()}\n{view.style_sheet()}",
        footer_links=["api"],
        ssr_mode=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    return page, application, shared or address


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own system, and colors whose contrast is 4.5 or more."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="blue", **fonts).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


class Headers:
    """Adds a policy under which the browser loads nothing from elsewhere, whatever the page holds."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                extra = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


# ---------------------------------------------------------------------------------------------------------------- page


def build_page(dashboard: Dashboard, examples: list[Example]) -> gr.Blocks:
    with gr.Blocks(title="UGround", analytics_enabled=False, delete_cache=(600, 7200)) as page:
        gr.HTML(
            f'<h1>UGround</h1><p class="ug-about">Ask for things in a picture: the answer comes in words and masks. '
            f"<strong>{escape(dashboard.name)}.</strong></p>"
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                parts = question_column(dashboard, examples)
            with gr.Column(scale=3, min_width=300):
                vars(parts).update(vars(answer_column()))
        with gr.Accordion("Why this mask?", open=False, elem_id="ug-why"):
            vars(parts).update(vars(why_panel(dashboard)))
        wire(Handlers(dashboard, parts), parts, examples)
        offer_api(dashboard)
    return page


def upload_box(**options) -> gr.Image:
    """An image box that hands an upload on as it is, so that its size is checked before anything decodes it."""
    box = gr.Image(type="filepath", sources=["upload", "clipboard"], **options)
    box.preprocess = lambda payload: payload.path if payload is not None else None
    keep = box.async_move_resource_to_block_cache

    async def uploads_only(place):
        if str(place).startswith(("http:", "https:")):
            raise gr.Error("an address is no upload: send the picture itself", print_exception=False)
        return await keep(place)

    box.async_move_resource_to_block_cache = uploads_only
    return box


def question_column(dashboard: Dashboard, examples: list[Example]) -> SimpleNamespace:
    image = upload_box(label="Picture", alt_text="the uploaded picture", height=300, elem_id="ug-image")
    pictures = gr.Dataset(
        components=[gr.HTML(visible=False)],
        samples=[[view.thumbnail_html(example)] for example in examples],
        type="index",
        label="Examples: pictures",
        elem_id="ug-pictures",
    )
    questions = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=rows(examples[0]),
        type="values",
        label="Examples: questions",
        elem_id="ug-questions",
        visible=False,
    )
    prompt = gr.Textbox(
        label="Instruction",
        placeholder="the red star, or: which shape is the largest?",
        max_length=dashboard.limits.prompt_characters,
        lines=1,
        autofocus=True,
        elem_id="ug-prompt",
    )
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ug-ask")
        stop = gr.Button("Stop", min_width=80, elem_id="ug-stop")
        clear = gr.Button("Start over", min_width=80, elem_id="ug-clear")
    with gr.Accordion("Settings", open=False):
        own = f"the model's own ({dashboard.layer_policy})"
        choices = [(own, ""), *layer_rules.menu(dashboard.num_layers)]
        policy = gr.Dropdown(choices, value="", label="Layer policy: which layer a [SEG] connects from")
        remember = gr.Checkbox(dashboard.remember, label="The model sees the earlier questions of this conversation")
        length = gr.Slider(1, dashboard.limits.new_tokens, 64, step=1, label="Longest answer, in tokens")
    return SimpleNamespace(**{name: value for name, value in locals().items() if isinstance(value, gr.blocks.Block)})


def rows(example: Example) -> list[list[str]]:
    return [[question] for question in example.questions]


def answer_column() -> SimpleNamespace:
    chat = gr.HTML(view.transcript_html([]), elem_id="ug-conversation")
    picture = gr.HTML(view.EMPTY, elem_id="ug-result")
    masks = gr.CheckboxGroup([], label="Masks", visible=False, elem_id="ug-masks")
    with gr.Row(visible=False) as looks:
        opacity = gr.Slider(0, 1, 0.55, step=0.05, label="Opacity", elem_id="ug-opacity")
        outline = gr.Checkbox(True, label="Outline", elem_id="ug-outline")
    with gr.Row(visible=False) as downloads:
        overlay = gr.DownloadButton("Overlay (PNG)", elem_id="ug-overlay")
        archive = gr.DownloadButton("Masks (PNG, zipped)", elem_id="ug-archive")
        record = gr.DownloadButton("JSON", elem_id="ug-record")
    return SimpleNamespace(**{name: value for name, value in locals().items() if isinstance(value, gr.blocks.Block)})


def why_panel(dashboard: Dashboard) -> SimpleNamespace:
    seg = gr.Radio([], label="[SEG]", visible=False, elem_id="ug-seg")
    with gr.Row():
        with gr.Column(min_width=300):
            chart = gr.HTML('<p class="ug-hint">Ask for something first.</p>', elem_id="ug-policy")
        with gr.Column(min_width=300):
            layer = gr.Slider(
                0, dashboard.num_layers - 1, step=1, label="Layer of the similarity map", elem_id="ug-layer"
            )
            similarity = gr.HTML(elem_id="ug-similarity")
        with gr.Column(min_width=300):
            measure = gr.Button("Measure the uncertainty (Monte Carlo)", elem_id="ug-measure")
            doubt = gr.HTML(elem_id="ug-doubt")
    return SimpleNamespace(**{name: value for name, value in locals().items() if isinstance(value, gr.blocks.Block)})


def wire(on: Handlers, parts: SimpleNamespace, examples: list[Example]) -> None:
    p, quiet = parts, {"api_visibility": "private", "show_progress": "hidden"}
    at_once = quiet | {"queue": False}
    shown = [p.chat, p.picture, p.masks, p.looks, p.downloads, p.seg, p.layer, p.chart, p.similarity, p.doubt]
    question = [p.image, p.prompt, p.policy, p.remember, p.length, p.opacity, p.outline]
    p.pictures.click(
        lambda index: (
            examples[index].path,
            gr.Dataset(samples=[[q] for q in examples[index].questions], visible=True),
        ),
        p.pictures,
        [p.image, p.questions],
        **at_once,
    )
    p.questions.click(lambda row: row[0], p.questions, p.prompt, **at_once)
    p.image.change(on.opened, [p.image], shown, **quiet, **MODEL_QUEUE)
    asked = [
        event(on.answer, question, [p.prompt, *shown], **quiet, **MODEL_QUEUE)
        for event in (p.ask.click, p.prompt.submit)
    ]
    for event in asked:
        written = event.then(on.files, [p.masks, p.opacity, p.outline], [p.overlay, p.archive, p.record], **at_once)
        written.then(on.explain, [p.seg, p.layer], [p.chart, p.similarity, p.doubt], **at_once)
    p.stop.click(on.stopped, None, p.chat, cancels=asked, **at_once)
    p.clear.click(on.cleared, [p.image], shown, cancels=asked, **quiet, **MODEL_QUEUE)
    for event in (p.masks.input, p.opacity.release, p.outline.input):
        event(
            on.look, [p.masks, p.opacity, p.outline], [p.picture, p.overlay], trigger_mode="always_last", **at_once
        )  # a click while the last one is drawn counts
    p.opacity.input(on.preview, [p.masks, p.opacity, p.outline], p.picture, trigger_mode="always_last", **at_once)
    p.seg.input(on.chosen_layer, p.seg, p.layer, **at_once)
    for event in (p.layer.change, p.seg.input):
        event(on.explain, [p.seg, p.layer], [p.chart, p.similarity, p.doubt], trigger_mode="always_last", **at_once)
    p.measure.click(on.measure, p.seg, p.doubt, **quiet, **MODEL_QUEUE)


class Handlers:
    """What the page's events do; every visitor has a conversation of their own (``session_hash``)."""

    def __init__(self, dashboard: Dashboard, parts: SimpleNamespace) -> None:
        self.dashboard, self.parts = dashboard, parts

    def visit(self, request: gr.Request) -> Visit | None:
        return self.dashboard.visits.get(str(request.session_hash))

    def blank(self, chat: str, picture: str = view.EMPTY) -> dict:
        """The page without an answer."""
        p = self.parts
        hidden = {p.masks: gr.CheckboxGroup(choices=[], value=[], visible=False), p.looks: gr.Row(visible=False)}
        hidden |= {p.downloads: gr.Row(visible=False), p.seg: gr.Radio(choices=[], visible=False), p.layer: gr.skip()}
        return hidden | {p.chat: chat, p.picture: picture, p.chart: view.NO_MASK, p.similarity: "", p.doubt: ""}

    def opened(self, image: str | None, request: gr.Request) -> dict:
        visitor = str(request.session_hash)
        if image is None:
            self.dashboard.visits.drop(visitor)
            return self.blank(view.transcript_html([]))
        try:
            visit = self.dashboard.open(visitor, image)
        except ValueError as error:
            return self.blank(view.transcript_html([], error=str(error)))
        return self.blank(view.transcript_html(visit.turns), view.masks_html(visit, [], 0, False))

    def answer(
        self,
        image: str | None,
        prompt: str,
        policy: str,
        remember: bool,
        length: int,
        opacity: float,
        outline: bool,
        request: gr.Request,
    ) -> Iterator[dict]:
        p, visit = self.parts, self.visit(request)
        turns = visit.turns if visit is not None and visit.source == image else []
        options = {"layer_policy": policy, "remember": remember, "max_new_tokens": length}
        yield {p.chat: view.transcript_html([*turns, Turn(prompt, "")], writing=True)}
        try:
            with closing(self.dashboard.ask(str(request.session_hash), image, prompt, **options)) as news:
                for new in news:
                    if isinstance(new, Visit):
                        yield self.answered(new, opacity, outline)
                    else:
                        yield {p.chat: view.transcript_html([*turns, Turn(prompt, new)], writing=True), p.prompt: ""}
        except ValueError as error:
            yield {p.chat: view.transcript_html(turns, error=str(error))}

    def answered(self, visit: Visit, opacity: float, outline: bool) -> dict:
        p, numbers = self.parts, list(range(len(visit.masks)))
        names = [(f"[SEG] {n + 1}", n) for n in numbers]
        return {
            p.chat: view.transcript_html(visit.turns),
            p.picture: view.masks_html(visit, numbers, opacity, outline),
            p.masks: gr.CheckboxGroup(choices=names, value=numbers, visible=bool(numbers)),
            p.looks: gr.Row(visible=bool(numbers)),
            p.downloads: gr.Row(visible=True),
            p.seg: gr.Radio(choices=names, value=0 if numbers else None, visible=len(numbers) > 1),
            p.layer: visit.prediction.layers[0] if numbers else gr.skip(),
        }

    def files(self, chosen: list[int], opacity: float, outline: bool, request: gr.Request) -> tuple:
        visit = self.visit(request)
        if visit is None or visit.prediction is None:
            return gr.skip(), gr.skip(), gr.skip()
        overlay = view.write_overlay(visit, chosen, opacity, outline)
        return overlay, view.write_masks(visit), view.write_record(visit, self.dashboard.name)

    def preview(self, chosen: list[int], opacity: float, outline: bool, request: gr.Request) -> Any:
        visit = self.visit(request)
        return gr.skip() if visit is None else view.masks_html(visit, chosen, opacity, outline)

    def look(self, chosen: list[int], opacity: float, outline: bool, request: gr.Request) -> tuple:
        visit = self.visit(request)
        if visit is None:
            return gr.skip(), gr.skip()
        return view.masks_html(visit, chosen, opacity, outline), view.write_overlay(visit, chosen, opacity, outline)

    def chosen_layer(self, seg: int, request: gr.Request) -> Any:
        visit = self.visit(request)
        return visit.prediction.layers[seg] if visit is not None and visit.prediction is not None else gr.skip()

    def explain(self, seg: int | None, layer: int, request: gr.Request) -> tuple[str, str, str]:
        visit = self.visit(request)
        if visit is None or seg is None or seg >= len(visit.masks):
            return view.NO_MASK, "", ""
        similarity = view.layer_map_html(visit.image, self.dashboard.layer_map(visit, seg, layer), seg, layer)
        return view.policy_html(visit, seg), similarity, view.doubt_html(visit, seg)

    def measure(self, seg: int | None, request: gr.Request) -> str:
        try:
            return view.doubt_html(self.dashboard.doubt(str(request.session_hash)), seg or 0)
        except ValueError as error:
            return view.error_html(str(error))

    def stopped(self, request: gr.Request) -> str:
        visit = self.visit(request)
        return view.transcript_html(visit.turns if visit is not None else [], error="Stopped.")

    def cleared(self, image: str | None, request: gr.Request) -> dict:
        self.dashboard.reset(str(request.session_hash))
        return self.opened(image, request)


# ----------------------------------------------------------------------------------------------------------------- API


def offer_api(dashboard: Dashboard) -> None:
    """/ask, /why and /reset for gradio's clients: docs/dashboard.md."""

    def visitor_of(request: gr.Request) -> str:
        return request.session_hash or token_hex()  # a bare request has no session: nobody shares its conversation

    @as_api_errors
    def ask(image, prompt, layer_policy, masks, max_new_tokens, request: gr.Request):
        view.check_pictures(masks)
        news = dashboard.ask(visitor_of(request), image, prompt or "", layer_policy, max_new_tokens=int(max_new_tokens))
        with closing(news):
            for new in news:
                yield {"answer": new} if isinstance(new, str) else view.describe(new, dashboard.name, masks)

    @as_api_errors
    def why(number, layer, uncertainty, request: gr.Request):
        yield view.explain(dashboard, visitor_of(request), int(number), int(layer), bool(uncertainty))

    @as_api_errors
    def reset(request: gr.Request):
        dashboard.visits.drop(visitor_of(request))
        yield {"status": "ok"}

    with gr.Row(visible=False):
        question = [
            upload_box(label="image: none = the one of the call before"),
            gr.Textbox(label="prompt"),
            gr.Textbox("", label="layer_policy: empty = the model's own"),
            gr.Textbox("rle", label="masks: rle or png"),
            gr.Number(64, precision=0, label="max_new_tokens"),
        ]
        reason = [
            gr.Number(1, precision=0, label="number of the [SEG], from 1"),
            gr.Number(-1, precision=0, label="layer: -1 = the chosen one"),
            gr.Checkbox(label="uncertainty: measure it"),
        ]
        for function, inputs in ((ask, question), (why, reason), (reset, [])):
            gr.Button().click(function, inputs, gr.JSON(), api_name=function.__name__, **MODEL_QUEUE)


def as_api_errors(function: Callable) -> Callable:
    """What the caller can put right becomes gradio's error, which reaches the caller as text."""

    @wraps(function)
    def wrapped(*arguments):
        try:
            yield from function(*arguments)
        except ValueError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return wrapped


if __name__ == "__main__":
    sys.exit(cli.run(main))
