"""The README.md of a model folder: a model card for the Hugging Face Hub, from the run's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from model import layer_rules
from model.backbones import BACKBONES
from model.loading.hub import repository_of
from model.settings import decoder_kind
from utils.config import config_from
from utils.datasets.spec import Spec
from utils.plotting.text_tables import markdown
from utils.training.lineage import own_entry

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

LAYERS = {  # layer_selection -> the layer that a [SEG] uses
    "policy": "the transformer layer that a policy chooses",
    "last": "the last transformer layer",
    "uniform": "a transformer layer drawn at random",
    "fixed": "one fixed transformer layer",
    "soft": "the weighted average of all transformer layers",
    "ce_soft": "the weighted average of all transformer layers",
}
TAGS = ("uground", "referring-expression-segmentation", "reasoning-segmentation")
LICENCES = """The code is Apache-2.0. Weights carry the licences of the models they derive from: {base}{sam};
LLaVA's instruction data are CC BY 4.0, and the segmentation data sets have terms of their own, some for research only.
Whoever publishes this folder states which apply (`license` above)."""


def model_card(name: str, meta: dict[str, Any], adapter: bool, license: str = "other") -> str:
    """The text of the card, with its YAML front matter.

    Args:
        name: of the model; meta: as in ``uground_run.json``; adapter: whether the folder needs its base.
        license: an identifier of the Hub.
    """
    from huggingface_hub import ModelCardData  # here and below, as --help need not wait for it

    from model.loading.weights import path_setting

    base = meta.get("resolved") or meta["config"]["model"]  # runs of older code have no ``resolved``
    method = config_from(meta["config"], "the run").flat()  # older runs lack newer settings
    kind = decoder_kind(method)
    has_sam = kind.has_encoder
    backbone = BACKBONES[meta.get("backbone", "llava")]  # runs of older code have LLaVA
    paths = {module: base[path_setting(module, base)] for module in meta["base"]}
    repositories = {path: repository for path in paths.values() if (repository := repository_of(path))}
    data = ModelCardData(
        base_model=list(repositories.values()) or None,
        model_name=name,
        license=license,
        library_name="uground",
        pipeline_tag="image-segmentation",
        tags=[
            "uground",
            "referring-expression-segmentation",
            "reasoning-segmentation",
            backbone.title.lower(),
            *["sam"] * has_sam,
        ],
        eval_results=_results(meta["metrics"]),
    )
    use = "python chat.py --version THIS_FOLDER --image photo.jpg"
    if adapter and not repositories.keys() >= set(paths.values()):
        use += " --base BASE_FOLDER" + " --vision_tower CLIP_FOLDER" * ("vision_tower" in meta["base"])
        use += " --vision_pretrained SAM" * has_sam
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        "UGround answers a question about an image with text and masks. "
        f"{backbone.title} generates an answer with `[SEG]` tokens; " + _prompting(method),
        f"This folder is {'an adapter: it is loaded on top of its base' if adapter else 'complete'}.",
        f"```bash\n{use}\n```",
        "## Base\n\n" + _base_table(paths, meta["base"]),
        "## Lineage\n\n" + _lineage_table(meta),
        "## Data\n\n" + _data_table(meta["data"]),
        f"Optimizer steps: {meta['step']}; processes: {meta['processes']}; seed: {meta['config']['train']['seed']}.",
        "## Results\n\n" + _metrics_table(meta["metrics"]),
        "On the run's validation data, which also selected the checkpoint; `test.py` computes results to report.",
        f"## Reproduce\n\nCode: commit `{meta['commit']}`; "
        + ", ".join(f"{package} {version}" for package, version in meta["versions"].items())
        + ".\n\n```yaml\n"
        + yaml.safe_dump(meta["config"], sort_keys=False).rstrip()
        + "\n```",
        "## Licences\n\n" + LICENCES.format(base=backbone.licence, sam=f", {kind.title} {kind.licence}" * has_sam),
    ]
    return "\n\n".join(parts) + "\n"


def _prompting(method: dict[str, Any]) -> str:
    """How a mask comes from a [SEG], in half a sentence; method: setting -> value."""
    layer = LAYERS[layer_rules.parse(method["layer_selection"], use="training").name]
    prompt = "similarity map" if method["mask_prompt"] or method["point_prompts"] else "hidden state"
    kind = decoder_kind(method)
    decoder = kind.title if kind.has_encoder else f"PixelLM's {kind.title}"
    return f"for each of them, {layer} gives the {prompt} that prompts {decoder}."


def _base_table(paths: dict[str, str], fingerprints: dict[str, str]) -> str:
    rows = [
        [module, path if repository_of(path) else Path(path).name, f"`{fingerprints[module]}`"]
        for module, path in paths.items()
    ]
    return markdown([["part", "file", "fingerprint"], *rows])


def _lineage_table(meta: dict[str, Any]) -> str:
    rows = [
        [
            entry["name"],
            entry["source"],
            f"{entry['steps']:,}" if "steps" in entry else "?",
            ", ".join(entry.get("data", ["?"])),
            f"`{entry['commit']}`" if "commit" in entry else "?",
        ]
        for entry in (*meta.get("lineage", []), own_entry(meta))
    ]
    return markdown([["model", "trained from", "steps", "data", "code"], *rows])


def _data_table(data: list[dict[str, Any]]) -> str:
    rows = [[row.get("source", row["name"]), row["type"], f"{row['images']:,}", f"{row['share']:.1%}"] for row in data]
    return markdown([["data set", "type", "images", "share"], *rows]) if rows else "None: not trained."


def _metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    rows = [[spec, name, f"{value:.3f}"] for spec, values in metrics.items() for name, value in values.items()]
    return markdown([["benchmark", "metric", "value"], *rows]) if rows else "Not validated."


def _results(metrics: dict[str, dict[str, float]]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=spec.name.lower(),
            dataset_name=str(spec),
            dataset_split=spec.split,
            metric_type=name,
            metric_value=round(value, 4),
        )
        for spec, values in ((Spec.parse(text), values) for text, values in metrics.items())
        for name, value in values.items()
    ]
