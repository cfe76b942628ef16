"""The operators as torch sees them: opcheck, torch.compile with symbolic sizes, and what they refuse."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hawk_compile.kernels.gather.op
import hawk_compile.kernels.score.op
import hawk_compile.kernels.select.op  # noqa: F401
from tests.kernels import oracle
from tests.kernels.cases import SIZES, Sizes, folded, masks, projected

SMALL = SIZES["two KV heads, width 24"]
ROWS = SIZES["three rows, one without visual tokens"]


def select_arguments(sizes=ROWS):
    visual, _, token = masks(sizes)
    scores = torch.arange(visual.numel(), dtype=torch.float32).sin().view(visual.shape)
    budget = (visual & token).sum(1) // 2
    length = int(((token & ~visual).sum(1) + budget).max())
    return [scores, visual, token, budget, length]


def gather_arguments(size=12, length=5):
    values = torch.arange(2 * size * 3, dtype=torch.float32).view(2, size, 3)
    return [values, torch.arange(length).expand(2, length) * 2]


ARGUMENTS = {
    "score_folded": lambda: folded(ROWS, torch.float32, "softmax"),
    "score_folded without bias": lambda: folded(SMALL, torch.bfloat16, "l2", bias=False),
    "score_projected": lambda: projected(ROWS, torch.float32, "minmax"),
    "select": select_arguments,
    "gather": gather_arguments,
}


def operator(name):
    return getattr(torch.ops.hawk, name.split()[0]).default


def on(device, arguments):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name, device):
    torch.library.opcheck(operator(name), tuple(on(device, ARGUMENTS[name]())))


# The first batch's sizes all differ: Dynamo gives equal sizes one symbol.
BATCHES = [
    ((0, 2, 10, 3), (4, 3, 5, 3), (1, 4, 7, 3)),
    ((0, 3, 20, 6), (4, 2, 20, 3)),
    ((0, 9, 30, 2), (1, 8, 30, 2), (2, 1, 2, 36), (0, 1, 39, 1)),
]


class Prune(torch.nn.Module):
    """All four operators, with the weights as parameters as they stand in a model: their sizes are constants."""

    def __init__(self, q_weight, q_bias, k_weight, k_bias, head_weights):
        super().__init__()
        self.weights = torch.nn.ParameterList([q_weight, q_bias, k_weight, k_bias])
        self.register_buffer("head_weights", head_weights)

    def forward(self, hidden, visual, query, token, budget, slots):
        ops = torch.ops.hawk
        wq, bq, wk, bk = self.weights
        score = ops.score_folded(hidden, visual, query, wq, bq, wk, bk, self.head_weights, "l2")
        q = torch.nn.functional.linear(hidden, wq, bq).unflatten(2, (4, 8)).transpose(1, 2)
        k = torch.nn.functional.linear(hidden, wk, bk).unflatten(2, (2, 8)).transpose(1, 2)
        same = ops.score_projected(q, k, visual, query, self.head_weights, "l2")
        # A plain integer argument would be constant at first: the pass computes the length from symbolic sizes.
        keep, valid = ops.select(score, visual, token, budget, slots.shape[0])
        return score, same, keep, valid, ops.gather(hidden, keep), ops.gather(token, keep)


# This cache goes by the operators' names: it would answer from the disk with what an older body compiled to. Not by
# monkeypatch, whose undoing takes the setting out of torch's config module for the rest of the process.
@torch._functorch.config.patch(enable_autograd_cache=False)
@torch.no_grad()
def test_one_compilation_serves_all_sizes(device):
    """In one graph, with symbolic B, S and S'."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    compiled = None
    for rows in BATCHES:
        sizes = Sizes(4, 2, 8, 24, rows)
        arguments = folded(sizes, torch.float32, "l2")
        if compiled is None:
            module = Prune(*arguments[3:8]).to(device)
            compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
        _, visual, token, budget, length = select_arguments(sizes)
        inputs = on(device, [*arguments[:3], token, budget, torch.empty(length)])
        score, same, keep, valid, kept_hidden, kept_token = (t.cpu() for t in compiled(*inputs))
        expected = oracle.score_folded(*arguments)
        expected.check(score)
        expected.check(same)
        assert (keep.tolist(), valid.tolist()) == oracle.select(score, visual, token, budget, length)
        row = torch.arange(len(rows)).unsqueeze(1)
        torch.testing.assert_close(kept_hidden, arguments[0][row, keep], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(kept_token, token[row, keep])
    assert counter.frame_count == 1
    torch.compiler.reset()


def change(position, value):
    """An edit of an argument list: `value` is what to put there, or a function of what stands there."""

    def edit(arguments):
        arguments[position] = value(arguments[position]) if callable(value) else value
        return arguments

    return edit


REFUSED = [
    ("score_folded", change(0, lambda t: t[0]), r"hidden must be \[B, S, D\]; got 2 dimensions"),
    ("score_folded", change(0, lambda t: t.long()), "hidden must have a floating-point dtype; got torch.int64"),
    ("score_folded", change(1, lambda t: t.int()), "visual_mask must be bool"),
    ("score_folded", change(2, lambda t: t.int()), "question_mask must have a floating-point dtype"),
    ("score_folded", change(3, lambda t: t[:-1]), "q_weight must have H \\* d rows with H = 6"),
    ("score_folded", change(4, lambda t: t[:-1]), r"q_bias must be \[30\]"),
    ("score_folded", change(5, lambda t: t[:-1]), "k_weight must have Hkv \\* d rows with d = 5"),
    ("score_folded", change(5, lambda t: t[:20]), "multiple of the number of KV heads; got 6 and 4"),
    ("score_folded", change(5, lambda t: t[:, :-1]), "must read vectors of hidden's last dimension, 33"),
    ("score_folded", change(6, lambda t: t[:-1]), r"k_bias must be \[30\]"),
    ("score_folded", change(7, lambda t: t[:0]), r"head_weights must be \[H\] with H > 0"),
    ("score_folded", change(8, "L2"), "normalization must be one of l2, softmax, minmax; got 'L2'"),
    ("score_projected", change(0, lambda t: t[0]), r"query must be \[B, H, S, d\]; got 3 dimensions"),
    ("score_projected", change(0, lambda t: t[:, :5]), r"head_weights must be \[H\] with H = 5"),
    ("score_projected", change(1, lambda t: t[:, :4]), "multiple of the number of KV heads; got 6 and 4"),
    ("score_projected", change(1, lambda t: t[..., :4]), "key must have query's last dimension, 5; got 4"),
    ("score_projected", change(3, lambda t: t[0]), r"question_mask must be \[B, S\]; got 1 dimensions"),
    ("select", change(0, lambda t: t.long()), "scores must have a floating-point dtype"),
    ("select", change(1, lambda t: t[0]), r"visual_mask must be \[B, S\]"),
    ("select", change(2, lambda t: t.int()), "token_mask must be bool"),
    ("select", change(3, lambda t: t[0]), r"budget must be \[B\] int64"),
    ("select", change(3, lambda t: t.float()), r"budget must be \[B\] int64"),
    ("select", change(4, 100), "length must be between 0 and S = 21, the row's positions; got 100"),
    ("gather", change(0, lambda t: t[0, :, 0]), r"values must be \[B, S, \.\.\.\]"),
    ("gather", change(1, lambda t: t.int()), r"keep must be \[B, S'\] int64"),
]


@pytest.mark.parametrize(("name", "edit", "message"), REFUSED, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(REFUSED)])
def test_refusals_name_the_argument_and_what_was_received(name, edit, message):
    operator(name)(*ARGUMENTS[name]())  # accepted as it is
    with pytest.raises(ValueError, match=message):
        operator(name)(*edit(ARGUMENTS[name]()))
