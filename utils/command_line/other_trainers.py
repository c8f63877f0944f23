"""The flags of LISA and its relatives, and what they are here: one table for messages, docs/migrating.md and tests.

``THEIRS`` holds the facts: all flags of their programs with their defaults. ``ANSWERS`` says what a flag is here; one
without an entry is the same flag with the same default. ``python -m utils.command_line.other_trainers`` prints the
table as docs/migrating.md shows it.

Sources, as of November 2025: dvlab-research/LISA, MaverickRen/PixelLM, LeapLabTHU/GSVA, see-say-segment/sesame,
rui-qian/READ, and rui-qian/UGround, the release of the paper.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.settings import PUBLISHED
from utils.plotting.text_tables import markdown

Flags = Mapping[str, str]  # flag -> default, "" where none can be compared: a path, an id of the hub, a rank


def _flags(text: str) -> dict[str, str]:
    """``"lr=0.0003 version"`` -> {"lr": "0.0003", "version": ""}; words are joined by _, also in --vision-tower."""
    return {name: default for name, _, default in (word.partition("=") for word in text.split())}


def _without(flags: Flags, names: str) -> dict[str, str]:
    return {name: default for name, default in flags.items() if name not in names.split()}


# -- facts: their flags and defaults -----------------------------------------------------------------------------------

_LISA = _flags("""
    local_rank version vis_save_path precision=bf16 image_size=1024 model_max_length=512 lora_r=8 vision_tower
    load_in_8bit=false load_in_4bit=false dataset=sem_seg||refer_seg||vqa||reason_seg sample_rates=9,3,3,1
    sem_seg_data=ade20k||cocostuff||pascal_part||paco_lvis||mapillary
    refer_seg_data=refclef||refcoco||refcoco+||refcocog vqa_data=llava_instruct_150k reason_seg_data=ReasonSeg|train
    val_dataset=ReasonSeg|val dataset_dir log_base_dir=runs exp_name=lisa epochs=10 steps_per_epoch=500 batch_size=2
    grad_accumulation_steps=10 val_batch_size=1 workers=4 lr=0.0003 ce_loss_weight=1 dice_loss_weight=0.5
    bce_loss_weight=2 lora_alpha=16 lora_dropout=0.05 lora_target_modules=q_proj,v_proj explanatory=0.1 beta1=0.9
    beta2=0.95 num_classes_per_sample=3 exclude_val=false no_eval=false eval_only=false vision_pretrained out_dim=256
    resume print_freq=1 start_epoch=0 gradient_checkpointing=true train_mask_decoder=true use_mm_start_end=true
    auto_resume=true conv_type=llava_v1
""")
_PIXEL_LM_MODEL = _flags("""
    seg_token_num=1 image_feature_scale_num=1 preprocessor_config resize_vision_tower=false
    resize_vision_tower_size=224 vision_tower_for_mask=false pad_train_clip_images=false separate_mm_projector=false
""")
_PIXEL_LM_TRAIN = _PIXEL_LM_MODEL | _flags("""
    num_classes_per_question=1 masks_process_with_clip=false weight use_expand_question_list=false exp_name=pixellm
""")
_POLICY = _flags("""
    num_layers=33 strategy=policy_walker mode=3 baseline_type=ema baseline_beta=1 eval_legacy=false
""")
_UGROUND = (
    _LISA
    | _PIXEL_LM_TRAIN
    | _POLICY
    | _flags("""
    model_key model_max_length=2048
    dataset=sem_seg||refer_seg||neg_refer_seg||correct_refer_seg||vqa||reason_seg||reason_seg_plus||multi_reason_seg
    sample_rates=12,9,3,3,3,3,3,3 refer_seg_data=refclef||refcoco||refcoco+||refcocog||refzom||grefcoco
    neg_refer_seg_data=R-refcoco||R-refcoco+||R-refcocog correct_refer_seg_data=fprefcoco||fprefcoco+||fprefcocog
    reason_seg_plus_data=instance_seg||cot||conversations||caption multi_reason_seg_data=MultiReasonSeg|train
    exp_name= epochs=20 warmup_min_lr=0 warmup_num_steps=100 negative_sampling_weight=-1 no_resume=false
    resume_from_best=false save_ckpt=false eval_interval=0 seed=42
""")
)
_SESAME = _without(_LISA, "vis_save_path val_dataset explanatory exclude_val") | _flags("""
    dataset=refer_seg||correct_refer_seg||vqa||neg_refer_seg sample_rates=9,3,3
    sem_seg_data=ade20k||cocostuff||pascal_part||paco_lvis neg_refer_seg_data=R-refcocog||R-refcoco||R-refcoco+
    correct_refer_seg_data=fprefcocog||fprefcoco||fprefcoco+ exp_name=sesame_referseg epochs=20 batch_size=12
    grad_accumulation_steps=1 num_classes_per_sample=1 print_freq=3
""")
_READ = _SESAME | _flags("""
    sem_seg_data=ade20k||cocostuff||pascal_part||paco_lvis||mapillary exp_name=read_referseg auto_resume=false
    val_dataset val_split=val use_wandb=false use_released_param=true
""")
_GSVA = _without(_LISA, "version vis_save_path load_in_8bit load_in_4bit vision_pretrained gradient_checkpointing") | (
    _flags("""
    mllm_model_path segmentation_model_path model_max_length=1024 lora_r=0 log_base_dir=outputs exp_name=default
    batch_size=20 grad_accumulation_steps=1 workers=8 auto_resume=false no_sampling=false val_refzom=false
    merge_lora_path weight deepspeed=false deepspeed_config
""")
)
_SESAME_TEST = _flags("""
    cmd=inference local_rank process_num=0 world_size=2 pretrained_model_path vis_save_path image_size=1024
    model_max_length=512 val_dataset dataset_dir conv_type=llava_v1
""")
_SESAME_DEMO = _flags("""
    local_rank pretrained_model_path vis_save_dir image_size=1024 model_max_length=512 conv_type=llava_v1
""")
_LISA_CHAT = _flags("""
    version vis_save_path precision=bf16 image_size=1024 model_max_length=512 lora_r=8 vision_tower local_rank
    load_in_8bit=false load_in_4bit=false use_mm_start_end=true conv_type=llava_v1
""")
_LISA_MERGE = _flags("""
    version vis_save_path precision=bf16 vision_pretrained out_dim=256 image_size=1024 model_max_length=512 vision_tower
    lora_r=8 lora_alpha=16 lora_dropout=0.05 lora_target_modules=q_proj,v_proj local_rank train_mask_decoder=true
    use_mm_start_end=true conv_type=llava_v1 weight save_path
""")

# this project's program -> project -> flags of its program for the same purpose. Their training programs evaluate, too
# (--eval_only), and GSVA's merges (--merge_lora_path).
OTHERS = "other trainers"  # transformers, Lightning
THEIRS: dict[str, dict[str, Flags]] = {
    "train_ds.py": {
        "LISA": _LISA,
        "UGround": _UGROUND,
        "GSVA": _GSVA,
        "SESAME": _SESAME,
        "READ": _READ,
        "PixelLM": _LISA | _PIXEL_LM_TRAIN,
        OTHERS: _flags("learning_rate num_workers gradient_accumulation_steps"),
    },
    "test.py": {
        "LISA": _LISA,
        "UGround": _UGROUND | _flags("cmd=inference process_num=0 world_size=2"),
        "GSVA": _GSVA,
        "SESAME": _SESAME | _SESAME_TEST,
        "READ": _READ | _SESAME_TEST,
        "PixelLM": _LISA | _PIXEL_LM_TRAIN,
    },
    "chat.py": {
        "LISA": _LISA_CHAT,
        "UGround": _LISA_CHAT | _PIXEL_LM_MODEL | _flags("model_key"),
        "SESAME": _SESAME_DEMO,
        "READ": _SESAME_DEMO | _flags("vision_tower"),
        "PixelLM": _LISA_CHAT | _PIXEL_LM_MODEL,
    },
    "app.py": {
        "LISA": _LISA_CHAT | _flags("precision=fp16"),
        "UGround": _LISA_CHAT | _PIXEL_LM_MODEL | _flags("model_key"),
        "PixelLM": _LISA_CHAT | _flags("precision=fp16"),
    },
    "scripts/merge_lora.py": {
        "LISA": _LISA_MERGE,
        "UGround": _LISA_MERGE | _PIXEL_LM_MODEL | _POLICY | _flags("model_key eval_legacy=true"),
        "GSVA": _flags("""
            local_rank mllm_model_path segmentation_model_path vision_tower dataset_dir precision=bf16 lora_r=0 weight
            merge_lora_path
        """),
        "SESAME": _without(_LISA_MERGE, "vis_save_path"),
        "READ": _without(_LISA_MERGE, "vis_save_path") | _flags("use_released_param=true"),
        "PixelLM": _LISA_MERGE | _PIXEL_LM_MODEL,
    },
}

# -- what they are here ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a flag of another project is here.

    Attributes:
        here: this project's flag; "" = there is none.
        note: what to do instead, or how values differ.
        default: of ``here``, as ``--help`` spells it (``empty``); "" = as the other projects have it.
    """

    here: str = ""
    note: str = ""
    default: str = ""


def _gone(note: str, flags: str) -> dict[str, Answer]:
    """The same note for several flags, none of which exists here."""
    return {flag: Answer(note=note) for flag in flags.split()}


_ALWAYS = {  # gone from every program
    "image_size": Answer(note="the input's size is read from SAM's weights"),
    "out_dim": Answer(note="phi's width is read from SAM's weights"),
    "use_mm_start_end": Answer(note="images always stand between their two tokens"),
    "train_mask_decoder": Answer(note="SAM's mask decoder always trains"),
    "conv_type": Answer(note="the template is always LLaVA-1.5's"),
    "pad_train_clip_images": Answer(note="CLIP's input is always padded, as with this flag"),
    "masks_process_with_clip": Answer(note="masks always keep the image's size, as without this flag"),
    "preprocessor_config": Answer(note="CLIP's input size is read from the folder of --vision_tower"),
    **_gone(
        "the model's folder holds it",
        "resize_vision_tower resize_vision_tower_size vision_tower_for_mask seg_token_num image_feature_scale_num "
        "separate_mm_projector",
    ),
    "use_expand_question_list": Answer(note="questions are drawn from one list of templates"),
    "num_layers": Answer(note="the number of layers is read from LLaVA's weights"),
    "merge_lora_path": Answer(note="merge with scripts/merge_lora.py --output"),
}
_QUANTIZE = {f"load_in_{kind}": Answer("quantize", f"--quantize {kind}") for kind in ("8bit", "4bit")}
_OF_THE_MODEL = _ALWAYS | {  # for programs that open a finished model
    **_gone("the model's folder holds it", "model_max_length lora_r lora_alpha lora_dropout lora_target_modules"),
    **_gone("the model's folder holds it", "strategy baseline_type baseline_beta use_released_param"),
    "model_key": Answer(note=f"the model's folder tells whether it is {PUBLISHED}"),
    "local_rank": Answer(note="it runs in one process"),
}

_TRAIN = _ALWAYS | {
    "precision": Answer("precision", "fp16 does not exist in training: use bf16 or fp32"),
    "model_max_length": Answer("model_max_length", default="2048"),
    "resize_vision_tower": Answer(
        note="--clip_resize 448 --image_pool 2, where PixelLM's code pools to 16 x 16 image tokens; "
        "configs/methods/pixellm.yaml has all of its settings"
    ),
    "resize_vision_tower_size": Answer("clip_resize", "0 = the tower's own side", "0"),
    "vision_tower_for_mask": Answer("mask_decoder", "--mask_decoder pixel_decoder", "segment_anything"),
    "seg_token_num": Answer("codebook_tokens"),
    "image_feature_scale_num": Answer(note="SAM has one scale, --mask_decoder pixel_decoder two"),
    "separate_mm_projector": Answer(
        note="--mask_decoder pixel_decoder has a projector of its own; UGround's release never reads its second one"
    ),
    "lora_r": Answer("lora_r", default="8"),
    "load_in_8bit": Answer(note="test.py, chat.py and app.py take --quantize 8bit"),
    "load_in_4bit": Answer(note="test.py, chat.py and app.py take --quantize 4bit"),
    "dataset": Answer("dataset", default="refer_seg||reason_seg"),
    "sample_rates": Answer("sample_rates", "empty = all equal", "empty"),
    "sem_seg_data": Answer("sem_seg_data", default="ade20k||cocostuff||pascal_part||paco_lvis||mapillary"),
    "refer_seg_data": Answer("refer_seg_data", default="refclef||refcoco||refcoco+||refcocog"),
    "neg_refer_seg_data": Answer("neg_refer_seg_data", default="R-refcoco||R-refcoco+||R-refcocog"),
    "correct_refer_seg_data": Answer("correct_refer_seg_data", default="fprefcoco||fprefcoco+||fprefcocog"),
    "val_split": Answer(note='name it in --val_dataset, as in "ReasonSeg|val"'),
    "val_refzom": Answer(note='name the benchmark: --val_dataset "refzom|test"'),
    "log_base_dir": Answer("log_base_dir", default="runs"),
    "exp_name": Answer("exp_name", default="uground"),
    "epochs": Answer("epochs", default="10"),
    "batch_size": Answer("batch_size", default="2"),
    "grad_accumulation_steps": Answer("grad_accumulation_steps", default="10"),
    "val_batch_size": Answer("val_batch_size", default="4"),
    "workers": Answer("workers", default="4"),
    "ce_loss_weight": Answer("text_loss_weight"),
    "dice_loss_weight": Answer("dice_loss_weight", "also weighs the loss of the similarity maps", "4"),
    "bce_loss_weight": Answer("bce_loss_weight", "also weighs the loss of the similarity maps"),
    "explanatory": Answer("explanatory", "-1 = off", "-1"),
    "num_classes_per_sample": Answer("questions_per_image", default="3"),
    "num_classes_per_question": Answer(
        note="a question names one target; --joint_probability lists all of an image in one (gRefCOCO, Ref-ZOM)"
    ),
    "negative_sampling_weight": Answer("negative_sampling_weight", "0 = off, which is -1 in the release", "0"),
    "exclude_val": Answer(note='name the splits to train on, as in --reason_seg_data "ReasonSeg|train"'),
    "eval_only": Answer(note="evaluate with test.py"),
    "print_freq": Answer("log_every", default="10"),
    "start_epoch": Answer(note="--auto_resume true resumes the run where it stopped"),
    "gradient_checkpointing": Answer("gradient_checkpointing", default="false"),
    "auto_resume": Answer("auto_resume", default="false"),
    "no_resume": Answer(note="nothing is resumed without --auto_resume or --resume"),
    "resume_from_best": Answer(note="--resume takes the folder of any checkpoint of a run"),
    "save_ckpt": Answer(note="the latest and the best checkpoint are kept; --save_every N saves more often"),
    "eval_interval": Answer(note="validation follows each epoch; lower --steps_per_epoch for more of it"),
    "warmup_min_lr": Answer(note="the warm-up always starts at 0"),
    "warmup_num_steps": Answer("warmup_steps"),
    "seed": Answer("seed", default="0"),
    "vis_save_path": Answer(note="chat.py writes to its --output"),
    "weight": Answer("version", "a merged folder, an adapter or a published checkpoint; --resume resumes a run"),
    "model_key": Answer(
        note="UGround is trained; configs/methods has LISA, GSVA, SESAME, READ and PixelLM as settings"
    ),
    "strategy": Answer(note="policy_walker is Policy-Prompted Masking, the method; --layer_selection sets its rule"),
    "mode": Answer("layer_selection", "1: last; 2: policy, with --phi_layer last; 3: policy", "policy"),
    "baseline_type": Answer("baseline", "ema: average; critic: critic", "average"),
    "baseline_beta": Answer("critic_loss_weight", "with --baseline critic"),
    "eval_legacy": Answer("val_layer_policy", "--val_layer_policy last", "empty"),
    "mllm_model_path": Answer("version"),
    "segmentation_model_path": Answer("vision_pretrained"),
    "no_sampling": Answer(note="samples are always drawn; an epoch has --steps_per_epoch steps"),
    "deepspeed": Answer(note="DeepSpeed always runs"),
    "use_wandb": Answer("report_to", "--report_to tensorboard,wandb", "tensorboard"),
    "use_released_param": Answer(note="configs/methods/read.yaml has READ's settings, --point_prompts among them"),
    "learning_rate": Answer("lr"),
    "num_workers": Answer("workers"),
    "gradient_accumulation_steps": Answer("grad_accumulation_steps"),
}
_OF_TRAINING_ALONE = """
    dataset sample_rates sem_seg_data refer_seg_data neg_refer_seg_data correct_refer_seg_data vqa_data reason_seg_data
    reason_seg_plus_data multi_reason_seg_data epochs steps_per_epoch grad_accumulation_steps lr ce_loss_weight
    dice_loss_weight bce_loss_weight explanatory beta1 beta2 num_classes_per_sample num_classes_per_question
    negative_sampling_weight exclude_val no_eval print_freq start_epoch gradient_checkpointing train_mask_decoder
    auto_resume resume_from_best save_ckpt eval_interval warmup_min_lr warmup_num_steps use_expand_question_list
    no_sampling deepspeed deepspeed_config use_wandb
"""
_TEST = (
    _OF_THE_MODEL
    | _QUANTIZE
    | _gone("it is of training alone", _OF_TRAINING_ALONE)
    | {
        "local_rank": Answer("local_rank"),
        "precision": Answer("precision", "bf16 on a GPU, fp32 elsewhere", "auto"),
        "vision_pretrained": Answer("vision_pretrained", "only for an adapter; a merged model holds SAM"),
        "val_batch_size": Answer("batch_size", default="4"),
        "batch_size": Answer("batch_size", "images per step of the evaluation", "4"),
        "workers": Answer("workers", "2 with a GPU, else 0", "empty"),
        "seed": Answer("seed", default="0"),
        "cmd": Answer(note="test.py answers and prints metrics; scripts/score.py computes them again"),
        **_gone("test.py --processes N starts a process per GPU", "process_num world_size"),
        "val_split": _TRAIN["val_split"],
        "val_refzom": _TRAIN["val_refzom"],
        "vis_save_path": Answer("output", "--save_overlays N plots samples there"),
        **_gone("results are written to --output", "exp_name log_base_dir"),
        "eval_only": Answer(note="test.py only evaluates"),
        "no_resume": Answer(note="nothing is resumed without --resume"),
        "resume": Answer("resume", "without a value: it resumes the evaluation in --output"),
        "weight": Answer(note="merge with scripts/merge_lora.py; --version takes the merged folder"),
        "pretrained_model_path": Answer("version"),
        "mllm_model_path": Answer("version", "of a merged model"),
        "segmentation_model_path": Answer("vision_pretrained", "only for an adapter; a merged model holds SAM"),
        "mode": Answer(
            "layer_policy", "the release's mode 1: last; 2 and 3: sample, or last with its --eval_legacy", "empty"
        ),
        "eval_legacy": Answer("layer_policy", "--layer_policy last", "empty"),
    }
)
_ASK = _OF_THE_MODEL | _QUANTIZE | {"precision": Answer("precision", "bf16 on a GPU, fp32 elsewhere", "auto")}
_CHAT = _ASK | {
    "vis_save_path": Answer("output"),
    "vis_save_dir": Answer("output"),
    "pretrained_model_path": Answer("version"),
}
_APP = _ASK | {"vis_save_path": Answer(note="the dashboard keeps answers in a temporary folder")}
_RUN = "the run's checkpoint holds it"
_MERGE = (
    _ALWAYS
    | _gone(_RUN, "precision model_max_length lora_r lora_alpha lora_dropout lora_target_modules dataset_dir")
    | _gone(_RUN, "model_key strategy mode baseline_type baseline_beta eval_legacy use_released_param")
    | {
        "local_rank": Answer(note="it runs in one process"),
        "version": Answer("version", "only if the base has moved since the run"),
        "vision_tower": Answer("vision_tower", "only if it has moved since the run"),
        "vision_pretrained": Answer("vision_pretrained", "only if it has moved since the run"),
        "mllm_model_path": Answer("version", "only if the base has moved since the run"),
        "segmentation_model_path": Answer("vision_pretrained", "only if it has moved since the run"),
        "weight": Answer("checkpoint", "the run's folder; no zero_to_fp32.py before"),
        "save_path": Answer("output"),
        "merge_lora_path": Answer("output"),
        "vis_save_path": Answer(note="nothing is plotted"),
    }
)
ANSWERS = {
    "train_ds.py": _TRAIN,
    "test.py": _TEST,
    "chat.py": _CHAT,
    "app.py": _APP,
    "scripts/merge_lora.py": _MERGE,
}


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A flag of other projects, for one of this project's programs.

    Attributes:
        theirs: project -> its default; "" where none can be compared.
        action: ``same``, ``other default``, ``renamed`` or ``gone``.
    """

    program: str
    flag: str
    theirs: dict[str, str]
    action: str
    answer: Answer


def rows(program: str) -> list[Row]:
    """All flags that other projects' users may give to ``program``; empty for a program without counterparts."""
    projects = THEIRS.get(program, {})
    table = []
    for flag in dict.fromkeys(flag for flags in projects.values() for flag in flags):
        theirs = {project: flags[flag] for project, flags in projects.items() if flag in flags}
        answer = ANSWERS[program].get(flag, Answer(flag))
        action = "gone" if not answer.here else "renamed" if answer.here != flag else "same"
        if action == "same" and answer.default and any(value not in ("", answer.default) for value in theirs.values()):
            action = "other default"
        table.append(Row(program, flag, theirs, action, answer))
    return table


def answer_of(program: str, flag: str) -> Answer | None:
    """What ``flag`` (without dashes) of another project is in ``program``; None if no project has it."""
    known = any(flag in flags for flags in THEIRS.get(program, {}).values())
    return ANSWERS[program].get(flag, Answer(flag)) if known else None


def as_text(value: Any) -> str:
    """A setting as flags and the table spell it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ("||" if all(isinstance(item, str) for item in value) else ",").join(map(as_text, value)) or "empty"
    return "empty" if value in ("", None) else f"{value:g}" if isinstance(value, float) else str(value)


def differences_from_lisa(arguments: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Lines that name the settings with another default than LISA's, if the command line is in LISA's flags.

    It is if it names no flag but LISA's and the release's (there is no --config), or spells one as only they do
    (--vision-tower).

    Args:
        arguments: of train_ds.py; settings: flag -> value of the run.
    """
    typed = {word[2:].partition("=")[0] for word in arguments if word.startswith("--")}
    given = {name.replace("-", "_") for name in typed}
    table = rows("train_ds.py")
    theirs = {row.flag for row in table} | {row.answer.here for row in table}
    if not (given and given <= theirs) and not any("-" in name for name in typed - {"local-rank"}):
        return []
    changes = []
    for row in table:
        here, default = row.answer.here, row.theirs.get("LISA", "")
        if here and default and here not in given:
            value = as_text(settings[here]) if settings[here] not in ("", ()) else row.answer.default or default
            if value != default:
                changes.append(f"{here} {default} -> {value}")
    head = "flags of LISA: other defaults of this run (LISA's -> here; docs/migrating.md):"
    lines = textwrap.wrap(", ".join(changes), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return [head, *lines] if changes else []


def markdown_tables() -> str:
    """The table in Markdown, a section per program; flags with the same answer share a line."""
    head = ["flag there", "projects", "action", "flag here", "default there", "default here", "note"]
    parts = []
    for program in THEIRS:
        lines: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
        for row in rows(program):
            flags, projects = lines.setdefault(_cells(row), ([], []))
            flags.append(f"`--{row.flag}`")
            projects += [project for project in row.theirs if project not in projects]
        cells = [
            [
                ", ".join(flags),
                "all" if len(projects) >= len(THEIRS[program].keys() - {OTHERS}) else ", ".join(projects),
                *rest,
            ]
            for rest, (flags, projects) in lines.items()
        ]
        parts.append(f"## For {program}\n\n{markdown([head, *cells])}\n")
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    """Action, flag here, default there, default here, note."""
    compared = row.action == "other default" or (row.action == "renamed" and row.answer.default)
    defaults: dict[str, list[str]] = {}
    for project, default in row.theirs.items() if compared else ():
        if default:
            defaults.setdefault(default, []).append(project)
    there = [f"{value} ({', '.join(names)})" if len(defaults) > 1 else value for value, names in defaults.items()]
    here = f"`--{row.answer.here}`" if row.action == "renamed" else ""
    return row.action, here, "; ".join(there), row.answer.default if there else "", row.answer.note


if __name__ == "__main__":
    print(markdown_tables(), end="")
