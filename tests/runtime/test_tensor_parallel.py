"""A model whose heads two processes share keeps the tokens, and says what it says, in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import zoo
from tests.runtime.models import ROUNDING
from tests.runtime.tensor_parallel import NAME, SETTINGS, answers

ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """With weights of its own for every head, and every voter by itself; what needs all heads at once is refused."""
    model = zoo.build(NAME, layers=2)
    model.save_pretrained(tmp_path)
    rows = model.base_model.language_model.layers[0].self_attn.q_proj.weight.shape[0]  # type: ignore[union-attr]
    alone = list(answers(model))
    assert len(alone) == len(SETTINGS)
    done = subprocess.run(
        [sys.executable, *LAUNCH, "-m", "tests.runtime.tensor_parallel", str(tmp_path)], capture_output=True, text=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for rank in range(2):
        *together, refusal = [line for line in lines if line["rank"] == rank]
        assert 'query="content" weighs the question\'s tokens by all heads' in refusal["error"]
        assert len(together) == len(alone)
        for one, other in zip(alone, together, strict=True):
            assert other["rows"] == rows // 2
            assert one["keep"] == other["keep"] and one["ids"] == other["ids"]
            torch.testing.assert_close(torch.tensor(one["logits"]), torch.tensor(other["logits"]), **ROUNDING)
