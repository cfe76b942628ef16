"""What the passes find in a model, in words: a line for each, as `hawk-compile inspect` shows it."""

from hawk_compile.tools.inspection.inspect import Inspection


def in_words(found: Inspection) -> dict[str, str]:
    """Name -> what was found of it."""
    ids = ", ".join(map(str, found.placeholders)) or "none named"
    closing, ending = (
        " or ".join(map(str, known)) or "none known" for known in (found.vision_end, found.end_of_turn)
    )  # fmt: skip
    return {
        "model": f"{found.model}, {found.layers} decoder layers ({found.captured_layers} captured)",
        "merge": f"{', '.join(found.merges)}: masked_scatter at placeholder ids {ids}",
        "question": f"the newest user's text, behind its last image; id that closes images: {closing}, turns: {ending}",
        "scoring layer": f"{found.scoring_layer}{where_cut(found.scoring_layer)}",
        "attention": f"{found.attention}: {found.heads} heads, {found.kv_heads} KV heads of {found.head_dim}",
        "norm": found.norm or "none: the projections read different values",
        "projections": f"{found.query_projection or 'not one linear'}, {found.key_projection or 'not one linear'}",
        "scoring": f"{found.form}: {found.why}",
    }


def where_cut(layer: int) -> str:
    if not layer:
        return ", the first"
    ahead = f"layers 0 to {layer - 1} run" if layer > 1 else "layer 0 runs"
    return f": the first with attention; {ahead} at S"
