"""What users give chat.py and test.py by mistake: a clear error (exit code 2, no traceback) or a defined result."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import ask, evaluate, run
from programs import chat as chat_script
from programs import evaluation as test_script

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def assert_error(result, *words):
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert err.count("error:") == 1
    for word in words:
        assert str(word) in err


# -- images ------------------------------------------------------------------------------------------------------------


def pixels(*shape, dtype=np.uint8, high=255):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def save_grey(path):
    Image.fromarray(pixels(48, 64)).save(path)


def save_alpha(path):
    Image.fromarray(pixels(48, 64, 4), "RGBA").save(path)


def save_16_bits(path):
    Image.fromarray(pixels(48, 64, dtype=np.uint16, high=65535)).save(path)


def save_palette(path):
    Image.fromarray(pixels(48, 64, 3)).quantize(16).save(path)


def save_cmyk(path):
    Image.fromarray(pixels(48, 64, 4), "CMYK").save(path, format="TIFF")


def save_one_pixel(path):
    Image.fromarray(pixels(1, 1, 3)).save(path)


def save_wide(path):
    Image.fromarray(pixels(1, 5000, 3)).save(path)


def save_tall(path):
    Image.fromarray(pixels(5000, 1, 3)).save(path)


@pytest.mark.parametrize(
    ("save", "size"),
    [
        (save_grey, (48, 64)),
        (save_alpha, (48, 64)),
        (save_16_bits, (48, 64)),
        (save_palette, (48, 64)),
        (save_cmyk, (48, 64)),
        (save_one_pixel, (1, 1)),
        (save_wide, (1, 5000)),
        (save_tall, (5000, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unusual_images_are_answered_at_their_size(capsys, version, tmp_path, save, size):
    path = tmp_path / "unusual.png"
    save(path)
    code, out, err = ask(capsys, version, path, tmp_path)
    assert code == 0, err
    assert "[SEG]" in out
    for name in ("unusual_mask_1.png", "unusual_overlay.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == size[::-1]


def test_exif_rotation_is_applied(capsys, version, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels(40, 60, 3)).save(path, exif=exif)
    assert ask(capsys, version, path, tmp_path)[0] == 0
    values = json.loads((tmp_path / "turned.json").read_text())
    assert (values["width"], values["height"]) == (40, 60)
    with Image.open(tmp_path / "turned_mask_1.png") as mask:
        assert mask.size == (40, 60)


@pytest.mark.parametrize("content", [b"", b"no image at all", "cut off"], ids=["empty", "text", "cut off"])
def test_undecodable_images(capsys, version, photo, tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(photo.read_bytes()[:300] if content == "cut off" else content)
    assert_error(ask(capsys, version, path, tmp_path), path, "cannot be decoded")


def test_missing_images_and_folders(capsys, version, tmp_path):
    assert_error(ask(capsys, version, tmp_path / "none.jpg", tmp_path), "none.jpg does not exist")
    assert_error(ask(capsys, version, tmp_path, tmp_path), "holds no image")


def test_output_that_cannot_be_written(capsys, version, photo, val_data, tmp_path):
    (tmp_path / "file").write_text("")
    for result in (
        ask(capsys, version, photo, tmp_path / "file"),
        evaluate(capsys, version, val_data, tmp_path / "file"),
    ):
        assert result[0] == 2
        assert "Traceback" not in result[2]
        assert str(tmp_path / "file") in result[2]


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_empty_prompts(capsys, version, photo, tmp_path, prompt):
    assert_error(ask(capsys, version, photo, tmp_path, prompt), "empty", "the red star")


@pytest.mark.parametrize("prompt", ["where is [SEG]?", "<image> [SEG] [REJ]", "[SEG]", "<image>", "<im_start><im_end>"])
def test_special_tokens_in_prompts_are_plain_text(capsys, version, photo, tmp_path, prompt):
    code, out, err = ask(capsys, version, photo, tmp_path, prompt)
    assert code == 0, err
    values = json.loads((tmp_path / "photo.json").read_text())
    assert values["prompt"] == prompt
    assert len(values["masks"]) == out.count("[SEG]") <= 2  # of the answer, not of the prompt


@pytest.mark.parametrize("prompt", ["ein größeres Ω 🚗", "<b>&amp;</b>; rm -rf / %s {query}", "word " * 300, "\udcff"])
def test_odd_prompts(capsys, version, photo, tmp_path, prompt):
    code, _, err = ask(capsys, version, photo, tmp_path, prompt)
    assert code == 0, err


def test_prompt_needs_an_image(capsys, version):
    assert_error(run(capsys, chat_script, "--version", version, "--prompt", "a"), "--prompt needs --image")


# -- models ------------------------------------------------------------------------------------------------------------


def test_wrong_model_folders(capsys, version, photo, val_data, tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava"}')
    run = tmp_path / "run"
    (run / "checkpoints/step_00000006").mkdir(parents=True)
    (run / "checkpoints/index.json").write_text("{}")
    for folder, words in (
        (run, ["is of a training run", f"merge_lora.py --checkpoint {run}"]),
        (run / "checkpoints/step_00000006", ["is of a training run", f"merge_lora.py --checkpoint {run}"]),
        (tmp_path / "nowhere", ["nowhere: no such folder"]),
        (empty, ["empty has no config.json"]),
        (other, ["'llava'", "merge_lora"]),
    ):
        assert_error(ask(capsys, folder, photo, tmp_path), "--version", *words)
        assert_error(evaluate(capsys, folder, val_data, tmp_path / "out"), "--version", *words)


def test_a_model_whose_weights_are_damaged(capsys, version, photo, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(version).iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[:5000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    assert_error(ask(capsys, broken, photo, tmp_path))
    (broken / "model.safetensors").unlink()
    assert_error(ask(capsys, broken, photo, tmp_path), "model.safetensors")


def test_unknown_devices(capsys, version, photo, tmp_path):
    assert_error(ask(capsys, version, photo, tmp_path, "a", "--device", "toaster"), "--device toaster")
    code, _, err = ask(capsys, version, photo, tmp_path, "a", "--precision", "fp8")
    assert code == 2
    assert "fp8" in err


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ReasonSegg|val", ["unknown data set 'ReasonSegg'", "'ReasonSeg'"]),
        ("ReasonSeg", ["ReasonSeg|"]),
        ("ReasonSeg|vall", ["unknown split 'vall'", "'val'"]),
        ("refcoco|unc|val", ["refcoco|unc|val", "refs"]),
        (" || ", ["--val_dataset names nothing"]),
        ("llava_instruct_150k|val", ["no evaluation", "ReasonSeg"]),
    ],
)
def test_unknown_data_sets(capsys, version, val_data, tmp_path, spec, words):
    assert_error(evaluate(capsys, version, val_data, tmp_path / "out", spec), *words)
    assert not (tmp_path / "out").exists()


def test_missing_dataset_dir(capsys, version, tmp_path):
    assert_error(evaluate(capsys, version, tmp_path / "nowhere", tmp_path / "out"), "--dataset_dir", "nowhere")


def test_evaluation_stops_at_missing_and_broken_images(capsys, version, val_data, tmp_path):
    folder = val_data / "reason_seg" / "ReasonSeg" / "val"
    for number in (1, 3):
        (folder / f"{number}.jpg").write_bytes(b"no image")
    assert_error(evaluate(capsys, version, val_data, tmp_path / "out"), "2 images", folder / "1.jpg", folder / "3.jpg")
    (folder / "1.jpg").unlink()
    assert_error(evaluate(capsys, version, val_data, tmp_path / "out"), "1.json has no image")
    assert not list((tmp_path / "out").iterdir())


def test_wrong_numbers(capsys, version, val_data, tmp_path):
    for flag, value in (("--limit", "0"), ("--batch_size", "-1"), ("--limit", "many"), ("--save_overlays", "1.5")):
        code, _, err = evaluate(capsys, version, val_data, tmp_path / "out", "ReasonSeg|val", flag, value)
        assert code == 2
        assert f"{value!r} is not a whole number" in err
    more = ("--limit", 1, "--control", "shuffled_prompts")
    code, _, err = evaluate(capsys, version, val_data, tmp_path / "out", "ReasonSeg|val", *more)
    assert code == 2
    assert "at least 2 images" in err


def test_answers_without_seg_are_scored_as_empty(capsys, mute_version, val_data, tmp_path):
    more = ("--mode", "generate", "--max_new_tokens", 3)
    code, out, err = evaluate(capsys, mute_version, val_data, tmp_path / "out", "ReasonSeg|val", *more)
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "ReasonSeg_val.generate.json").read_text())
    assert summary["metrics"] == {"gIoU": 0.0, "cIoU": 0.0}
    assert summary["counts"]["answers_without_seg"] == summary["counts"]["answers_cut"] == 5
    assert "cut off at --max_new_tokens or 64 [SEG]: 5 answers (generate)" in out


def test_missing_flags_are_named(capsys):
    code, _, err = run(capsys, test_script)
    assert code == 2
    assert "--version, --dataset_dir" in err
    _, _, err = run(capsys, test_script, "--version", "x", "--dataset_dir", "x")
    assert "one of the arguments --val_dataset --suite is required" in err
