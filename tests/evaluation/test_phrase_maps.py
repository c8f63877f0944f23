"""The similarity of a phrase's last token with the image: scores, positions, and the program on base weights."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import make_backbone

from model.structures import EvalQuery, EvalSample, Turn
from scripts import analyze
from utils.evaluation import phrase_maps
from utils.evaluation.phrase_maps import cell_scores

TINY = Path(__file__).resolve().parents[2] / "assets/tiny"


def test_scores_of_a_map_are_those_of_pairs_of_points():
    random = torch.Generator().manual_seed(0)
    maps, share = torch.rand(3, 12, generator=random), torch.rand(12, generator=random)
    valid = torch.ones(12, dtype=torch.bool)
    valid[[2, 7]] = False
    maps[0, 2] = 9.0  # the highest cell shows no image
    scores = cell_scores(maps, share, valid)
    for layer, row in enumerate(maps):
        cells = [(float(row[i]), float(share[i])) for i in range(12) if valid[i]]
        pairs = [(p * (1 - q), (a > b) + 0.5 * (a == b)) for a, p in cells for b, q in cells]
        expected = sum(weight * won for weight, won in pairs) / sum(weight for weight, _ in pairs)
        assert scores["auc"][layer] == pytest.approx(expected)
        assert scores["hit"][layer] == pytest.approx(max(cells)[1])
        total = sum(p for _, p in cells)
        above = [[p for a, p in cells if a >= threshold] for threshold, _ in cells]
        best = max(sum(row) / (total + len(row) - sum(row)) for row in above)
        assert scores["iou"][layer] == pytest.approx(best)
    perfect = cell_scores(share[None].round(), share.round(), valid)
    assert [float(values[0]) for values in perfect.values()] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("question", ["the red star", "Where is the red star?", "star (red)!"])
def test_the_last_word_is_found(tiny_processor, question):
    ids = tiny_processor.builder.encode((Turn(question),)).ids
    place = tiny_processor.builder.last_of_question(question)
    last = question.rstrip("?!)").split()[-1].strip("(")
    assert tiny_processor.tokenizer.decode(ids[: place + 1]).rstrip().endswith(last)
    assert last not in tiny_processor.tokenizer.decode(ids[place + 1 :])


class Two:
    """A split of two images: a target in the upper left quarter, and one in the lower right one, and an absent one."""

    spec = "two"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = np.full((60, 80, 3), 60 * index, np.uint8)
        masks = np.zeros((1, 60, 80), np.uint8)
        masks[0, 30 * index : 30 * (index + 1), 40 * index : 40 * (index + 1)] = 1
        queries = [EvalQuery("0", "red star", masks), EvalQuery("1", "nothing", masks[:0])]
        return EvalSample(f"two|{index}", str(index), image, queries)


@pytest.mark.parametrize("backbone", ["qwen3_vl", "internvl3"])
def test_states_that_point_at_the_target_hit_it(monkeypatch, backbone):
    """The phrase's state and those of the target's cells are made alike in one layer; elsewhere they are random."""
    model, processor = make_backbone(backbone)
    forward = model.forward_language

    def planted(batch, **options):
        output = forward(batch, **options)
        states = output.hidden[2].clone()
        direction = torch.zeros(states.shape[-1])
        direction[3] = 100.0
        for b, (h, w) in enumerate(batch.grids):
            states[b, batch.segment_ids[b] >= 1] = direction
            for token, cell in zip(batch.image_tokens[b].tolist(), batch.image_cells[b].tolist()):
                inside = cell < h * w and (cell // w >= h / 2, cell % w >= w / 2) == (b == 1, b == 1)
                states.flatten(0, 1)[token] = direction * inside
        output.hidden = (*output.hidden[:2], states, *output.hidden[3:])
        return output

    monkeypatch.setattr(model, "forward_language", planted)
    result = phrase_maps.measure(model, processor, Two(), limit=2)
    rows = [row for row in result.rows() if row["similarity"] == "cosine"]
    assert len(rows) == model.config.num_layers
    best = max(rows, key=lambda row: row["hit"])
    assert (best["layer"], best["hit"]) == (2, 1.0)
    assert best["iou"] > 0.65  # cells are cut by the target's edge
    assert result.areas == pytest.approx([0.25, 0.25], abs=0.08)
    assert "best at layer 2" in phrase_maps.sentence(result)


def test_one_image_has_no_control(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match=r"1 of 1 images has a target.*--limit 2 or more"):
        phrase_maps.measure(tiny_model, tiny_processor, Two(), limit=1)


def test_base_weights_are_asked_without_a_mask_decoder(tmp_path, data, capsys):
    flags = ["--what", "phrases", "--version", str(TINY / "llava"), "--vision_tower", str(TINY / "clip")]
    given = ["--dataset_dir", str(data), "--val_dataset", "ReasonSeg|val_short"]
    assert analyze.main([*flags, *given, "--limit", "4", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "phrases; a random cell hits" in capsys.readouterr().out
    [table] = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2 * 9
    assert all(0 <= float(row["hit"]) <= 1 for row in rows)
    with pytest.raises(ValueError, match=r"--vision_tower: is missing; .* holds no CLIP"):
        analyze.main([*flags[:4], *given, "--output", str(tmp_path)])
