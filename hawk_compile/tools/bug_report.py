"""A bug report: its sections, and what `hawk-compile env` fills in of them.

`.github/ISSUE_TEMPLATE/bug_report.md` has the same sections, for who opens an issue before this is run.
"""

from pathlib import Path
from typing import Any

ENVIRONMENT = "Environment"

SECTIONS = {
    "What you did": "In words: model, settings of optimize or the command line, and what was called.",
    "What you expected": "The answer, the numbers or the error that would have been right.",
    "What happened": "What came instead. If an answer is wrong: is it right after hawk_compile.restore(model)?",
    "Error": "The whole of it, with its traceback. TORCHDYNAMO_VERBOSE=1 shows torch.compile's part too.",
    "Minimal script": "As short as it still fails, with a public checkpoint or the demo model, and no private picture.",
    ENVIRONMENT: "What `hawk-compile env` prints, with `--model CHECKPOINT` where it is one model's trouble.",
}
"""The headings of a report, and what belongs below each."""

FENCES = {"Error": "text", "Minimal script": "python"}
"""Sections whose content is a block of code, and of which language."""

ABOUT_MODEL = ("model_type", "architectures", "dtype", "torch_dtype", "quantization_config", "transformers_version")
"""Fields of a checkpoint's config that a report gives."""


def report(environment: str = "") -> str:
    """The report in Markdown, with its last section filled in.

    Args:
        environment: what is known of the machine, as lines.
    """
    parts = []
    for heading, hint in SECTIONS.items():
        content = environment.rstrip("\n") if heading == ENVIRONMENT else ""
        parts += [f"## {heading}", f"<!-- {hint} -->", block(content, FENCES.get(heading, "text"), heading)]
    return "\n\n".join(part for part in parts if part) + "\n"


def block(content: str, language: str, heading: str) -> str:
    """A block of code around what a section holds; nothing where it holds words."""
    if heading not in (*FENCES, ENVIRONMENT):
        return ""
    return f"```{language}\n{content}\n```"


def about_model(source: str) -> dict[str, str]:
    """What a report says of a model: name -> value.

    What cannot be pruned or read is said in the place of what was found: that may be what is reported.

    Args:
        source: a checkpoint folder, a config.json, or a model type that was tried.
    """
    from hawk_compile.errors import HawkError
    from hawk_compile.tools.survey.table import facts_of, read_types, tried

    path = Path(source)
    try:
        if not path.exists() and len(path.parts) == 1:
            return {name: value for survey in tried(read_types(), source) for name, value in facts_of(survey).items()}
        return about_checkpoint(path)
    except HawkError as error:
        return {"model": str(error)}


def about_checkpoint(path: Path) -> dict[str, str]:
    """Of a checkpoint: what its config says, what lies beside it, and what the passes find."""
    from hawk_compile.errors import HawkError
    from hawk_compile.settings.head_weights import FILE_NAME
    from hawk_compile.tools.inspection.inspect import inspect_model
    from hawk_compile.tools.inspection.words import in_words

    folder = path if path.is_dir() else path.parent
    beside = [name for name in (FILE_NAME, "chat_template.jinja", "adapter_config.json") if (folder / name).is_file()]
    facts = {"checkpoint": path.name, "beside it": ", ".join(beside) or "no head weights, chat template or adapter"}
    facts |= {f"config.{name}": str(value) for name, value in stated(folder / "config.json").items()}
    try:
        return facts | in_words(inspect_model(path))
    except HawkError as error:
        return facts | {"passes": f"{type(error).__name__}: {error}"}


def stated(config: Path) -> dict[str, Any]:
    """What a report gives of a config; nothing of one that cannot be read, which inspection says better."""
    from hawk_compile.errors import HawkError, InputError
    from hawk_compile.files import read_json

    try:
        held = read_json(config, InputError, "config.json must be that of a checkpoint")
        return {name: held[name] for name in ABOUT_MODEL if held.get(name) is not None}
    except (HawkError, AttributeError):
        return {}
