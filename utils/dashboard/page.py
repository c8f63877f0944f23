"""The dashboard's page: its widgets, event handlers and API.

``service.py`` runs the model, ``view.py`` renders; app.py loads a model and serves the page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import wraps
from html import escape
from pathlib import Path
from secrets import token_hex
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: no telemetry

import gradio as gr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model import layer_rules
from model.structures import MAX_NEW_TOKENS, Turn
from utils.dashboard import view
from utils.dashboard.examples import Example
from utils.dashboard.service import Dashboard, Visit


async def refuse_address(*_: Any, **__: Any) -> str:
    """Stands for gradio's download: any widget's input may name an address, which gradio would fetch."""
    raise gr.Error("a URL is not an upload: send the picture itself", print_exception=False)


gr.processing_utils.async_ssrf_protected_download = refuse_address

CSS = Path(__file__).with_name("style.css")
# one answer at a time, in order of arrival
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
# pictures and files of an answer: in the queue, too, so that what waits is bounded
VIEW_QUEUE: dict[str, Any] = {"concurrency_id": "view", "concurrency_limit": 2}
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


def theme() -> gr.themes.Base:
    """The visitor's system fonts, and colors with a contrast of at least 4.5."""
    text, code = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="blue", font=text, font_mono=code).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


def style_sheet() -> str:
    """The page's CSS."""
    return f"{CSS.read_text()}\n{view.palette_css()}"


class Headers:
    """Adds a content security policy under which the browser loads nothing from other servers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


# ---------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class QuestionColumn:
    """The input: picture, examples of pictures and questions, instruction, buttons, settings."""

    image: gr.Image
    pictures: gr.Dataset
    questions: gr.Dataset
    prompt: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    clear: gr.Button
    policy: gr.Dropdown
    remember: gr.Checkbox
    length: gr.Slider


@dataclass(frozen=True)
class AnswerColumn:
    """The output: conversation, picture with masks, their display settings (``looks``) and files (``downloads``)."""

    chat: gr.HTML
    picture: gr.HTML
    masks: gr.CheckboxGroup
    looks: gr.Row
    opacity: gr.Slider
    outline: gr.Checkbox
    downloads: gr.Row
    overlay: gr.DownloadButton
    archive: gr.DownloadButton
    record: gr.DownloadButton


@dataclass(frozen=True)
class WhyPanel:
    """The panel about one [SEG]: the policy's distribution, a layer's similarity map, the Monte-Carlo uncertainty."""

    seg: gr.Radio
    chart: gr.HTML
    layer: gr.Slider
    similarity: gr.HTML
    measure: gr.Button
    uncertainty: gr.HTML


@dataclass(frozen=True)
class Widgets:
    """All widgets that events read and write."""

    question: QuestionColumn
    answer: AnswerColumn
    why: WhyPanel


def build_page(dashboard: Dashboard, examples: list[Example]) -> gr.Blocks:
    with gr.Blocks(title="UGround", analytics_enabled=False, delete_cache=(600, 7200)) as page:
        gr.HTML(
            f'<h1>UGround</h1><p class="ug-about">Ask for things in a picture: the answer comes in words and masks. '
            f"<strong>{escape(dashboard.name)}.</strong></p>"
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                question = question_column(dashboard, examples)
            with gr.Column(scale=3, min_width=300):
                answer = answer_column()
        with gr.Accordion("Why this mask?", open=False, elem_id="ug-why"):
            why = why_panel(dashboard)
        widgets = Widgets(question, answer, why)
        wire(Handlers(dashboard, widgets), widgets, examples)
        offer_api(dashboard)
    return page


def upload_box(**options: Any) -> gr.Image:
    """An image box that passes on the uploaded file, so that its size is checked before it is decoded."""
    box = gr.Image(type="filepath", sources=["upload", "clipboard"], **options)
    box.preprocess = lambda payload: payload.path if payload is not None else None  # type: ignore[method-assign]
    return box


def question_column(dashboard: Dashboard, examples: list[Example]) -> QuestionColumn:
    image = upload_box(label="Picture", alt_text="the uploaded picture", height=300, elem_id="ug-image")
    pictures = gr.Dataset(
        components=[gr.HTML(visible=False)],
        samples=[[view.thumbnail_html(example)] for example in examples],
        type="index",
        label="Examples: pictures",
        elem_id="ug-pictures",
        visible=bool(examples),
    )
    questions = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=question_rows(examples[0]) if examples else [],
        type="values",
        label="Examples: questions",
        elem_id="ug-questions",
        visible=False,
    )
    prompt = gr.Textbox(
        label="Instruction",
        placeholder=placeholder(examples),
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
        choices: list[str | tuple[str, str]] = [(own, ""), *layer_rules.menu(dashboard.num_layers)]
        policy = gr.Dropdown(choices, value="", label="Layer policy: which layer's hidden state and map a [SEG] uses")
        remember = gr.Checkbox(dashboard.remember, label="The model sees the earlier questions of this conversation")
        length = gr.Slider(1, dashboard.limits.new_tokens, MAX_NEW_TOKENS, step=1, label="Longest answer, in tokens")
    return QuestionColumn(image, pictures, questions, prompt, ask, stop, clear, policy, remember, length)


def placeholder(examples: list[Example]) -> str:
    """A question of the first example; without examples, one that any photograph can be asked."""
    questions = examples[0].questions if examples else ()
    return questions[0] if questions else "the person on the left, or: what could one sit on?"


def question_rows(example: Example) -> list[list[str]]:
    return [[question] for question in example.questions]


def answer_column() -> AnswerColumn:
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
    return AnswerColumn(chat, picture, masks, looks, opacity, outline, downloads, overlay, archive, record)


def why_panel(dashboard: Dashboard) -> WhyPanel:
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
            uncertainty = gr.HTML(elem_id="ug-uncertainty")
    return WhyPanel(seg, chart, layer, similarity, measure, uncertainty)


def wire(on: Handlers, widgets: Widgets, examples: list[Example]) -> None:
    """Connects events to their handlers, and to the widgets that they read and write."""
    q, a, w = widgets.question, widgets.answer, widgets.why
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    at_once = quiet | {"queue": False}
    soon = quiet | VIEW_QUEUE
    often = soon | {"trigger_mode": "always_last"}  # runs once more for events that arrive meanwhile
    mask_style, panel = [a.masks, a.opacity, a.outline], [w.chart, w.similarity, w.uncertainty]
    shown = [a.chat, a.picture, a.masks, a.looks, a.downloads, w.seg, w.layer, *panel]
    question = [q.image, q.prompt, q.policy, q.remember, q.length, a.opacity, a.outline]

    def take(index: int) -> tuple[Change, Change]:
        rows = question_rows(examples[index])
        return examples[index].path, gr.Dataset(samples=rows, visible=bool(rows))

    q.pictures.click(take, q.pictures, [q.image, q.questions], **at_once)
    q.questions.click(lambda row: row[0], q.questions, q.prompt, **at_once)
    q.image.change(on.opened, [q.image], shown, **quiet, **MODEL_QUEUE)
    answers = [
        event(on.answer, question, [q.prompt, *shown], **quiet, **MODEL_QUEUE)
        for event in (q.ask.click, q.prompt.submit)
    ]
    for answer in answers:
        written = answer.then(on.files, mask_style, [a.overlay, a.archive, a.record, a.downloads], **soon)
        written.then(on.explain, [w.seg, w.layer], panel, **soon)
    q.stop.click(on.stopped, None, a.chat, cancels=[*answers], **at_once)
    q.clear.click(on.cleared, [q.image], [q.image, *shown], cancels=[*answers], **quiet, **MODEL_QUEUE)
    for event in (a.masks.input, a.opacity.release, a.outline.input):
        event(on.look, mask_style, [a.picture, a.overlay], **often)
    a.opacity.input(on.preview, mask_style, a.picture, **often)
    w.seg.input(on.chosen_layer, w.seg, w.layer, **at_once)
    for event in (w.layer.change, w.seg.input):
        event(on.explain, [w.seg, w.layer], panel, **often)
    w.measure.click(on.measure, w.seg, w.uncertainty, **quiet, **MODEL_QUEUE)


Change = Any  # a widget's new value, itself with new properties, or gr.skip()
Changes = dict[gr.blocks.Block, Change]


class Handlers:
    """The page's event handlers. Every visitor has their own conversation (``session_hash``)."""

    def __init__(self, dashboard: Dashboard, widgets: Widgets) -> None:
        self.dashboard, self.widgets = dashboard, widgets

    def visit(self, request: gr.Request) -> Visit | None:
        return self.dashboard.visits.get(str(request.session_hash))

    def blank(self, chat: str, picture: str = view.EMPTY) -> Changes:
        """The page without an answer."""
        a, w = self.widgets.answer, self.widgets.why
        return {
            a.chat: chat,
            a.picture: picture,
            a.masks: gr.CheckboxGroup(choices=[], value=[], visible=False),
            a.looks: gr.Row(visible=False),
            a.downloads: gr.Row(visible=False),
            w.seg: gr.Radio(choices=[], value=None, visible=False),
            w.layer: gr.skip(),
            w.chart: view.NO_MASK,
            w.similarity: "",
            w.uncertainty: "",
        }

    def opened(self, image: str | None, request: gr.Request) -> Changes:
        visitor = str(request.session_hash)
        if image is None:
            self.dashboard.visits.drop(visitor)
            return self.blank(view.transcript_html([]))
        try:
            visit = self.dashboard.open(visitor, image)
        except ValueError as error:
            self.dashboard.visits.drop(visitor)  # of the picture before
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
    ) -> Iterator[Changes]:
        chat, visit = self.widgets.answer.chat, self.visit(request)
        turns = visit.turns if visit is not None and visit.source == image else []
        yield {chat: view.transcript_html([*turns, Turn(prompt, "")], writing=True)}
        try:
            updates = self.dashboard.ask(str(request.session_hash), image, prompt, policy, remember, length)
            with closing(updates):
                for update in updates:
                    if isinstance(update, Visit):
                        yield self.answered(update, opacity, outline)
                    else:
                        thought, answer = self.dashboard.processor.split_thought(update)
                        transcript = view.transcript_html([*turns, Turn(prompt, answer, thought)], writing=True)
                        yield {chat: transcript, self.widgets.question.prompt: ""}
        except ValueError as error:
            yield {chat: view.transcript_html(turns, error=str(error))}

    def answered(self, visit: Visit, opacity: float, outline: bool) -> Changes:
        a, w, numbers = self.widgets.answer, self.widgets.why, list(range(len(visit.masks)))
        assert visit.prediction is not None
        names = [(f"[SEG] {n + 1}", n) for n in numbers]
        return {
            a.chat: view.transcript_html(visit.turns, cut=visit.prediction.cut),
            a.picture: view.masks_html(visit, numbers, opacity, outline),
            a.masks: gr.CheckboxGroup(choices=names, value=numbers, visible=bool(numbers)),
            a.looks: gr.Row(visible=bool(numbers)),
            a.downloads: gr.Row(visible=False),  # until its files are written
            w.seg: gr.Radio(choices=names, value=0 if numbers else None, visible=len(numbers) > 1),
            w.layer: visit.prediction.layers[0] if numbers else gr.skip(),
        }

    def files(self, chosen: list[int], opacity: float, outline: bool, request: gr.Request) -> tuple[Change, ...]:
        visit = self.visit(request)
        if visit is None or visit.prediction is None:
            return (gr.skip(),) * 4
        overlay = view.write_overlay(visit, chosen, opacity, outline)
        return overlay, view.write_masks(visit), view.write_record(visit, self.dashboard.name), gr.Row(visible=True)

    def preview(self, chosen: list[int], opacity: float, outline: bool, request: gr.Request) -> Change:
        visit = self.visit(request)
        return gr.skip() if visit is None else view.masks_html(visit, chosen, opacity, outline)

    def look(self, chosen: list[int], opacity: float, outline: bool, request: gr.Request) -> tuple[Change, ...]:
        visit = self.visit(request)
        if visit is None:
            return gr.skip(), gr.skip()
        return view.masks_html(visit, chosen, opacity, outline), view.write_overlay(visit, chosen, opacity, outline)

    def chosen_layer(self, seg: int, request: gr.Request) -> Change:
        visit = self.visit(request)
        return visit.prediction.layers[seg] if visit is not None and visit.prediction is not None else gr.skip()

    def explain(self, seg: int | None, layer: int, request: gr.Request) -> tuple[str, str, str]:
        visit = self.visit(request)
        if visit is None or seg is None or seg >= len(visit.masks):
            return view.NO_MASK, "", ""
        similarity = view.layer_map_html(visit.image, self.dashboard.layer_map(visit, seg, layer), seg, layer)
        return view.policy_html(visit, seg), similarity, view.uncertainty_html(visit, seg)

    def measure(self, seg: int | None, request: gr.Request) -> str:
        try:
            return view.uncertainty_html(self.dashboard.measure_uncertainty(str(request.session_hash)), seg or 0)
        except ValueError as error:
            return view.error_html(str(error))

    def stopped(self, request: gr.Request) -> str:
        visit = self.visit(request)
        return view.transcript_html(visit.turns if visit is not None else [], error="Stopped.")

    def cleared(self, image: str | None, request: gr.Request) -> Changes:
        """Forgets the conversation, and removes a picture that was refused."""
        visit = self.visit(request)
        if visit is None or visit.source != image:
            return {self.widgets.question.image: None, **self.opened(None, request)}
        self.dashboard.reset(str(request.session_hash))
        return self.opened(image, request)


# ----------------------------------------------------------------------------------------------------------------- API


Answer = dict[str, Any]  # a JSON object


def offer_api(dashboard: Dashboard) -> None:
    """Adds /ask, /why and /reset for gradio's clients (docs/dashboard.md)."""

    def visitor_of(request: gr.Request) -> str:
        return request.session_hash or token_hex()  # a bare request has no session, and gets a conversation of its own

    @as_api_errors
    def ask(
        image: str | None, prompt: str, layer_policy: str, masks: str, max_new_tokens: float, request: gr.Request
    ) -> Iterator[Answer]:
        view.check_pictures(masks)
        updates = dashboard.ask(
            visitor_of(request), image, prompt or "", layer_policy, max_new_tokens=int(max_new_tokens)
        )
        with closing(updates):
            for update in updates:
                yield {"answer": update} if isinstance(update, str) else view.answer_json(update, dashboard.name, masks)

    @as_api_errors
    def why(number: float, layer: float, uncertainty: bool, request: gr.Request) -> Iterator[Answer]:
        yield view.explain(dashboard, visitor_of(request), int(number), int(layer), bool(uncertainty))

    @as_api_errors
    def reset(request: gr.Request) -> Iterator[Answer]:
        dashboard.visits.drop(visitor_of(request))
        yield {"status": "ok"}

    with gr.Row(visible=False):
        question = [
            upload_box(label="image: none = that of the previous call"),
            gr.Textbox(label="prompt"),
            gr.Textbox("", label="layer_policy: empty = the model's own"),
            gr.Textbox("rle", label="masks: rle or png"),
            gr.Number(MAX_NEW_TOKENS, precision=0, label="max_new_tokens"),
        ]
        reason = [
            gr.Number(1, precision=0, label="number of the [SEG], from 1"),
            gr.Number(-1, precision=0, label="layer: -1 = the chosen one"),
            gr.Checkbox(label="uncertainty: measure it"),
        ]
        for function, inputs in ((ask, question), (why, reason), (reset, [])):
            gr.Button().click(function, inputs, gr.JSON(), api_name=function.__name__, **MODEL_QUEUE)


def as_api_errors(function: Callable[..., Iterator[Answer]]) -> Callable[..., Iterator[Answer]]:
    """Turns ValueErrors, which the caller can fix, into gradio's errors, whose text reaches the caller."""

    @wraps(function)
    def wrapped(*arguments: Any) -> Iterator[Answer]:
        try:
            yield from function(*arguments)
        except ValueError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return wrapped
