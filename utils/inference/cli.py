"""What the programs that run a model share: flags of the model and its device, loading, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from model import layer_rules
from model.processing.thoughts import THINK
from model.settings import PRECISION_NAMES, PUBLISHED, QUANTIZATIONS

if TYPE_CHECKING:
    from model.opened import Opened

SMALLER_BATCH = "lower --batch_size or use --precision bf16"
SMALLER_WEIGHTS = "use --precision bf16 or --quantize 8bit"  # for programs without batches


def run(
    main: Callable[[list[str] | None], int], arguments: list[str] | None = None, out_of_memory: str = SMALLER_BATCH
) -> int:
    """Calls ``main`` and returns its exit code; 2 for errors that the user can fix, 130 for Ctrl-C (no tracebacks).

    Args:
        out_of_memory: what to do if the GPU's memory is too small, with flags of the program.
    """
    name = Path(sys.argv[0]).name
    try:
        return main(arguments)
    except BrokenPipeError:  # the reader of our output (head, less) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported before a model is needed
            raise
        message = f"out of memory on the GPU: {out_of_memory} ({error})"
    except (ValueError, OSError, SafetensorError) as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2


def whole(low: int) -> Callable[[str], int]:
    """The type of a flag whose value is a whole number of at least ``low``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def add_model_flags(parser: argparse.ArgumentParser, default: str = "") -> None:
    """The flags that ``open_model`` reads.

    Args:
        default: describes what is loaded without --version; "" = --version is required.
    """
    add = parser.add_argument
    add(
        "--version",
        required=not default,
        metavar="DIR",
        help=f"merged model, as scripts/merge_lora.py writes it, or a published checkpoint of {PUBLISHED}: its folder, "
        "or its hub id org/name[@revision]" + (f" (default: {default})" if default else ""),
    )
    add(
        "--vision_tower",
        default="",
        metavar="DIR",
        help="CLIP for a published checkpoint or an adapter, if not what it names",
    )
    add(
        "--precision", choices=("auto", *PRECISION_NAMES), default="auto", help="default: bf16 on a GPU, fp32 elsewhere"
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the NVIDIA GPU if there is one, else cpu)")
    add("--base", default="", metavar="DIR", help="what an adapter (--adapter_only) was trained from, if it has moved")
    add("--vision_pretrained", default="", metavar="PATH", help="mask decoder for an adapter, if it has moved")
    placement = parser.add_mutually_exclusive_group()
    placement.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="quantize the language model's layers to 8 or 4 bits (bitsandbytes; cuda or cpu)",
    )
    placement.add_argument(
        "--device_map",
        choices=("auto",),
        help="distribute the language model's layers over all GPUs, and main memory if they are too small",
    )


def add_layer_flag(parser: argparse._ActionsContainer, default: str) -> None:
    """Adds ``--layer_policy``, whose help lists all layer rules of inference.

    Args:
        default: describes the rule without the flag.
    """
    rules = layer_rules.describe("inference")
    parser.add_argument(
        "--layer_policy",
        metavar="RULE",
        help=f"layer whose hidden state and similarity map a [SEG] uses: {rules} ({default})",
    )


def add_think_flag(parser: argparse._ActionsContainer) -> None:
    """Adds ``--think``."""
    parser.add_argument(
        "--think",
        choices=THINK,
        default="auto",
        help="whether generated answers begin with a thought: auto = as the model likes (default); on needs one that "
        "was trained with thought_format, off changes nothing without",
    )


def open_model(args: argparse.Namespace, device: str | None = None) -> Opened:
    """Loads the model that the flags of ``add_model_flags`` name.

    Args:
        device: overrides ``--device``, for a process that a launcher gave its own.

    Raises:
        ValueError: for a wrong folder, or a device that is missing or unsuitable.
    """
    from model.loading.pretrained import load

    if args.device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--device_map is for one process that uses all GPUs; start it without a launcher")
    return load(
        args.version,
        args.precision,
        device or args.device,
        vision_tower=args.vision_tower,
        base=args.base,
        vision_pretrained=args.vision_pretrained,
        quantize=args.quantize,
        device_map=args.device_map,
    )
