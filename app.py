"""The dashboard (paper Fig. 8): answers instructions about an image with text and masks, and explains the masks.

python app.py                        the tiny model of this repository, for this machine only
python app.py --version DIR          a merged model (scripts/merge_lora.py), or a published checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import Opened
from utils.command_line.parser import Parser
from utils.config import load_config
from utils.dashboard.examples import SEEDS, Example, draw_example, read_examples
from utils.inference import cli

if TYPE_CHECKING:
    import gradio as gr
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from utils.dashboard.service import Dashboard

ROOT = Path(__file__).resolve().parent
TRAINED = "runs/tiny/merged"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        program="app.py",
        description="Serves the dashboard at http://127.0.0.1:7860. Without --version it shows the "
        f"tiny model: {TRAINED} if scripts/demo.sh has been run, otherwise assets/tiny before "
        "fine-tuning. docs/dashboard.md describes the page and its API.",
        epilog="Exit codes: 0 stopped, 2 invalid input or the port is taken, 130 interrupted while loading.",
    )
    add = parser.add_argument
    cli.add_model_flags(parser, default="the tiny model")
    cli.add_layer_flag(parser, "default: the model's own; last for the untrained one")
    cli.add_think_flag(parser)
    add("--port", type=int, metavar="N", help="port to listen on (default: 7860, or the next free one)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0 = the whole network")
    add("--share", action="store_true", help="also serve it at a public address, through gradio's servers")
    add(
        "--examples",
        type=Path,
        metavar="DIR",
        help="folder of example images, and of their questions in prompts.txt, one per line (default: drawn scenes for "
        "the tiny model, none for others)",
    )
    add("--queue", type=int, default=64, metavar="N", help="questions that may wait; more are rejected (default: 64)")
    add("--visitors", type=int, default=16, metavar="N", help="visitors whose images stay encoded (default: 16)")
    add("--max_upload_mb", type=float, default=20, metavar="MB", help="largest accepted file (default: 20)")
    add("--max_megapixels", type=float, default=30, metavar="MP", help="largest accepted picture (default: 30)")
    args = parser.parse_args(arguments)
    for name in ("queue", "visitors", "max_upload_mb", "max_megapixels"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be more than 0")
    of_a_folder = ("vision_tower", "base", "vision_pretrained", "quantize", "device_map")
    if args.version is None and (given := [f"--{name}" for name in of_a_folder if getattr(args, name)]):
        parser.error(f"{' and '.join(given)} need --version: the tiny model does not support them")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # docker stop, systemd: leaves by the way of an exception
    with tempfile.TemporaryDirectory(prefix="uground-dashboard-", ignore_cleanup_errors=True) as folder:
        dashboard = build_dashboard(args, Path(folder))
        page, _, address = serve(dashboard, args, Path(folder))
        print(f"{dashboard.name}\n{address} (Ctrl-C stops it)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
    dashboard.close()
    return 0


def build_dashboard(args: argparse.Namespace, folder: Path) -> Dashboard:
    """Loads the model of ``args``, and warms it up with a first question."""
    from utils.dashboard.service import Dashboard, Limits

    requested = args.version
    if requested is None and (ROOT / TRAINED).is_dir():
        args.version = str(ROOT / TRAINED)
    if args.version is None:
        opened = untrained_tiny(args)
        name = "The tiny model before fine-tuning (assets/tiny): it knows synthetic scenes only"
    else:
        opened = cli.open_model(args)
        name = args.version if requested else "The tiny model, trained by the demo: it knows synthetic scenes only"
    opened.model.config.layer_rule(args.layer_policy)  # an invalid flag fails before the page opens
    opened.processor.opening(args.think)
    dashboard = Dashboard(
        opened.model,
        opened.processor,
        name,
        opened.fingerprint,
        folder / "files" / "answers",
        layer_policy=args.layer_policy,
        think=args.think,
        limits=Limits(round(args.max_upload_mb * 1e6), round(args.max_megapixels * 1e6)),
        capacity=args.visitors,
    )
    dashboard.warm_up()
    return dashboard


def untrained_tiny(args: argparse.Namespace) -> Opened:
    """assets/tiny before fine-tuning, with the layer rule of its pre-training: the last layer."""
    import torch

    from model.loading.placement import pick_device, pick_precision
    from model.loading.pretrained import load_for_training
    from model.loading.weights import fingerprint

    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    folder = ROOT / "assets/tiny"
    paths = str(folder / "llava"), str(folder / "clip"), str(folder / "sam.pth")
    config = load_config(["--config", str(ROOT / "configs/tiny.yaml")], needs=())
    torch.manual_seed(config.train.seed)
    model, processor, rows = load_for_training(*paths, precision, config.method, config.model.model_max_length)
    model.config.eval_layer_policy = "last"
    weights = fingerprint(model.state_dict().values())
    model.to(device)  # type: ignore[arg-type]  # transformers' annotation is wrong
    sources = {row.module: row.source for row in rows}
    return Opened(model.eval(), processor, device, precision, weights, str(folder), sources)


def serve(dashboard: Dashboard, args: argparse.Namespace, folder: Path) -> tuple[gr.Blocks, Any, str]:
    """Starts the page in background threads; returns the page, its web application, and its address."""
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from utils.dashboard.page import Headers, build_page, style_sheet, theme
    from utils.dashboard.uploads import Quota, Uploads

    os.environ["GRADIO_TEMP_DIR"] = str(folder / "files")  # gradio deletes old files in it; examples are elsewhere
    examples = examples_of(args, dashboard, folder / "examples")
    page = build_page(dashboard, examples)
    page.queue(max_size=args.queue, default_concurrency_limit=8)

    uploads = Middleware(Uploads, Quota(bytes=20 * dashboard.limits.upload_bytes), dashboard.limits.upload_bytes)

    def health(_: Request) -> JSONResponse:
        return JSONResponse(dashboard.health(len(page._queue)))

    application, address, shared = launch(
        page,
        args,
        max_file_size=dashboard.limits.upload_bytes,
        app_kwargs={"routes": [Route("/health", health)], "middleware": [Middleware(Headers), uploads]},
        theme=theme(),
        css=style_sheet(),
        footer_links=["api"],
        ssr_mode=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    return page, application, shared or address


def launch(page: gr.Blocks, args: argparse.Namespace, **options: Any) -> Any:
    """``page.launch`` on the host and port of ``args``.

    Raises:
        ValueError: if the port is taken.
    """
    try:
        return page.launch(server_name=args.host, server_port=args.port, share=args.share, **options)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        taken = f"port {args.port} is" if args.port else "all ports from 7860 to 7959 are"
        raise ValueError(f"{taken} taken by another program; give a free one with --port") from error


def examples_of(args: argparse.Namespace, dashboard: Dashboard, folder: Path) -> list[Example]:
    """The examples of --examples; by default drawn scenes for a model that knows the tiny family's words alone."""
    if args.examples is not None:
        return read_examples(args.examples, folder)
    words = json.loads((ROOT / "assets/tiny/llava/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tiny = dashboard.processor.tokenizer.get_vocab().items() >= words.items()
    return [draw_example(seed, folder) for seed in SEEDS] if tiny else []


if __name__ == "__main__":
    sys.exit(cli.run(main, out_of_memory=cli.SMALLER_WEIGHTS))
