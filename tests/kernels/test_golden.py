"""The operators meet every number of the authors' implementation (tests/golden/README.md)."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import hawk_compile.kernels.score.op
import hawk_compile.kernels.select.op  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden"
EPSILON = torch.finfo(torch.float32).eps


def load(name):
    """Per case its settings and its tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        cases = {case: json.loads(settings) for case, settings in file.metadata().items()}
        tensors: dict[str, dict[str, torch.Tensor]] = {case: {} for case in cases}
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            case, _, field = key.partition(".")
            tensors[case][field] = file.get_tensor(key)
    return {case: (cases[case], tensors[case]) for case in sorted(cases)}


SCORES, LAYER0 = load("scores"), load("layer0")


def test_the_golden_files_hold_all_cases():
    assert (len(SCORES), len(LAYER0)) == (8, 4)


@pytest.mark.parametrize("case", SCORES)
def test_scores(case, device):
    settings, golden = SCORES[case]
    q, k = golden["q"], golden["k"]
    visual_count, text_count = k.shape[2], q.shape[2]
    # One row: the visual tokens, then the text that asks.
    query = torch.cat([torch.zeros_like(k), q], 2)
    key = torch.cat([k, torch.zeros_like(q)], 2)
    visual = (torch.arange(visual_count + text_count) < visual_count).unsqueeze(0)
    scores = torch.ops.hawk.score_projected(
        query.to(device),
        key.to(device),
        visual.to(device),
        ~visual.to(device),
        golden["head_weights"].to(device),
        settings["normalization"],
    )
    # A score near 0 is a difference of terms as large as the row's largest score: 8 roundings of those.
    largest = golden["scores"].abs().max().item()
    torch.testing.assert_close(scores[0, :visual_count].cpu(), golden["scores"], rtol=1e-5, atol=8 * EPSILON * largest)

    kept = math.ceil(visual_count * settings["keep_ratio"])
    keep, valid = torch.ops.hawk.select(
        scores,
        visual.to(device),
        torch.ones_like(visual).to(device),
        torch.tensor([kept], device=device),
        text_count + kept,
    )
    assert keep[0, :kept].tolist() == golden["kept_visual"].tolist()
    assert valid.all()


@pytest.mark.parametrize("case", LAYER0)
def test_kept_positions_of_a_layer(case, device):
    settings, golden = LAYER0[case]
    ids, hidden = golden["input_ids"], golden["hidden"]
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + settings["rms_eps"]) * golden["norm_weight"]
    visual = ids == settings["image_token_id"]
    position = torch.arange(ids.shape[1]).unsqueeze(0)
    begin = position[ids == settings["vision_end_token_id"]].max() + 1
    turn_ends = position[(ids == settings["end_of_turn_token_id"]) & (position >= begin)]
    end = turn_ends.max() if len(turn_ends) else ids.shape[1]
    asks = (position >= begin) & (position < end)

    scores = torch.ops.hawk.score_folded(
        normed.to(device),
        visual.to(device),
        asks.to(device),
        *(golden[name].to(device) for name in ("wq", "bq", "wk", "bk", "head_weights")),
        "l2",
    )
    visual_count = int(visual.sum())
    kept = math.ceil(visual_count * settings["keep_ratio"])
    keep, valid = torch.ops.hawk.select(
        scores,
        visual.to(device),
        torch.ones_like(visual).to(device),
        torch.tensor([kept], device=device),
        ids.shape[1] - visual_count + kept,
    )
    assert keep[0].tolist() == golden["keep_indices"].tolist()
    assert valid.all()
