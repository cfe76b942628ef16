"""What a chat template puts around a user's text, learned by rendering it with marked texts.

Texts that differ at one place, and ids that are equal on both sides of it, show what the template puts before a user's
text (`opens`) and behind it (`closes`), whatever the tokenizer merges. What was learned is then tried on every
conversation that was rendered: a format that does not find the marked text in all of them is not used.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hawk_compile.compat.models import file_of
from hawk_compile.errors import ConfigError
from hawk_compile.files import read_json
from hawk_compile.plan.chat import Chat, ChatFormat, Ids, Row, Span, places
from hawk_compile.plan.rendering import (
    LONGEST,
    Conversations,
    Make,
    Template,
    UnknownTemplate,
    attempt,
    shared_end,
    shared_start,
)
from hawk_compile.settings.config import HawkConfig


def learn(source: Any, ends: Sequence[int]) -> ChatFormat:
    """The format of a processor's or tokenizer's chat template.

    Args:
        ends: ids that end a turn.

    Raises:
        UnknownTemplate: it has none, or one whose texts cannot be found by what surrounds them.
    """
    template, talk = rendered(source)
    return checked(template, talk, learned(template, talk, ends), ends)


def rendered(source: Any) -> tuple[Template, Conversations]:
    """A template, and conversations as it takes them: with contents as lists of parts, or as plain strings."""
    template = Template(source)
    for listed in (True, False):
        talk = Conversations(template, listed)
        if attempt(template, talk.one(), talk.two(talk.second), talk.two(talk.third), talk.answered(talk.first)):
            return template, talk
    raise UnknownTemplate("it renders no conversation of two turns")


def learned(template: Template, talk: Conversations, ends: Sequence[int]) -> ChatFormat:
    closes, tail = closes_of(template, talk)
    return ChatFormat(
        opens=(opens := opens_of(template, talk, ends)),
        closes=closes,
        tools=tools_of(template, talk, opens),
        tail=tail,
        blank=template.blank(),
        special=tuple(sorted(template.special)),
    )


def opens_of(template: Template, talk: Conversations, ends: Sequence[int]) -> tuple[Ids, ...]:
    """What stands before the first and before a later text: what they share, if that is a header, else each."""
    (first, _), (one, _), (other, _) = attempt(
        template, talk.one(), talk.two(talk.second), talk.two(talk.third)
    )
    later = shared_end([one, other])
    systems = attempt(template, talk.after_system(talk.second), talk.after_system(talk.third))
    seen = [first, later, *([shared_end([before for before, _ in systems])] if systems else [])]
    opens: list[Ids] = []
    shared = shared_end([first, later])
    if template.is_header(shared):
        opens.append(template.from_special(shared, ends))
    for pattern in seen:
        if template.is_header(pattern) and not any(pattern[-len(each) :] == each for each in opens):
            opens.append(template.from_special(pattern, ends))
    if not opens:
        raise UnknownTemplate("nothing that is more than white space stands before a user's text")
    return tuple(opens)


def closes_of(template: Template, talk: Conversations) -> tuple[tuple[Ids, ...], Ids]:
    """What stands behind a text: (patterns that close it, what is left of that at the end of a prompt)."""
    (_, asked), (_, one), (_, other) = attempt(
        template, talk.one(), talk.answered(talk.first), talk.answered(talk.third)
    )
    unasked = attempt(template, talk.one(generation=False))
    end = unasked[0][1] if unasked else ()
    both = shared_start([asked, end])
    if template.special & {*both}:
        close = template.through_special(both)
        return tuple(dict.fromkeys((close, template.without_blank(close)))), ()
    answered = shared_start([one, other])
    close = template.through_special(shared_start([asked, answered]) if asked else answered)
    closes = dict.fromkeys((close, template.without_blank(close)))
    return tuple(pattern for pattern in closes if template.is_header(pattern)), end


def tools_of(template: Template, talk: Conversations, opens: tuple[Ids, ...]) -> tuple[Ids, ...]:
    """What stands before a tool's message, where a user's text could begin there too."""
    tools = attempt(template, talk.tool_message(talk.first, "weather"), talk.tool_message(talk.second, "clock"))
    if not tools:
        return ()
    pattern = shared_end([before for before, _ in tools])[-LONGEST:]
    row = np.array(pattern, np.int64)
    # What stands before the open belongs to the call of the tool, and is another with another call.
    opened = [int(starts[-1]) for each in opens if len(starts := places(row, each))]
    pattern = pattern[min(opened) :] if opened else ()
    return (pattern,) if pattern and pattern not in opens else ()


def checked(template: Template, talk: Conversations, form: ChatFormat, ends: Sequence[int]) -> ChatFormat:
    """The format, if it finds the newest user's text in every conversation that the template renders."""
    makes = [
        (1, talk.one()), (1, talk.one(generation=False)), (2, talk.two(talk.second)),
        (2, talk.two(talk.third, generation=False)), (3, talk.three()),
        (1, talk.before_tool("weather", talk.second)),
    ]  # fmt: skip
    for count, make in makes:
        if any(len(turns) != count or not right for turns, right in newest_text(template, talk, form, ends, make)):
            raise UnknownTemplate("what surrounds a user's text does not find it in all conversations")
    return form


def newest_text(
    template: Template, talk: Conversations, form: ChatFormat, ends: Sequence[int], make: Make
) -> Iterator[tuple[list[Span], bool]]:
    """(the users' texts in a conversation, whether the last is the marked one); nothing if it cannot be rendered."""
    special = np.array(form.special, np.int64)
    for before, after in attempt(template, make):
        row = np.array(make(talk.first), np.int64)
        turns = form.turns(row, np.array(ends, np.int64))
        wanted = (len(before), len(row) - len(after))
        yield turns, bool(turns) and (turns[-1] == wanted or only_special(row, turns[-1], wanted, special))


def system_stands_apart(source: Any, form: ChatFormat, ends: Sequence[int]) -> bool:
    """Whether a system prompt is told from a user's text; some templates put it into the user's turn, unmarked."""
    template, talk = rendered(source)
    return all(right for _, right in newest_text(template, talk, form, ends, talk.after_system(talk.second)))


def only_special(row: Row, span: Span, wanted: Span, special: Row) -> bool:
    """Whether a span holds the text that is wanted, and beside it ids that are no text."""
    (start, stop), (first, last) = span, wanted
    beside = np.concatenate([row[start:first], row[last:stop]])
    return start <= first and stop >= last and bool(np.isin(beside, special).all())


def source_at(path: str) -> Any:
    """The tokenizer of a checkpoint that is on this machine, with its chat template; nothing is downloaded or run.

    Raises:
        UnknownTemplate: there is none.
    """
    from transformers import AutoTokenizer

    here: dict[str, Any] = {"local_files_only": True}
    if not path:
        raise UnknownTemplate("the model was not loaded from a checkpoint")
    try:
        names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
        files = {name: file_of(path, name) for name in names}
        if not files["tokenizer_config.json"]:
            raise UnknownTemplate("no tokenizer lies there")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **here)
        if not tokenizer.chat_template and files["chat_template.json"]:
            beside = read_json(files["chat_template.json"], ConfigError, "chat_template.json must hold a chat template")
            tokenizer.chat_template = beside["chat_template"]
    except UnknownTemplate:
        raise
    except Exception as error:  # a tokenizer that cannot be loaded here, for whatever reason, is none
        raise UnknownTemplate(f"its tokenizer cannot be loaded ({type(error).__name__})") from error
    return tokenizer


def chat_of(processor: Any, path: str, ends: Sequence[int], chosen_ends: bool = False) -> Chat:
    """What can be learned for a model.

    Args:
        processor: a processor or tokenizer; None: that of the checkpoint at `path`.
        ends: ids that end a turn.
        chosen_ends: whether they are the user's own choice, which a checkpoint's template does not overrule.
    """
    where = "processor" if processor is not None else path or "the checkpoint"
    if processor is None and chosen_ends:
        return Chat(None, "end_of_turn_token_id is set, and no processor")
    try:
        source = processor if processor is not None else source_at(path)
        form = learn(source, ends)
        beside = "" if system_stands_apart(source, form, ends) else ", whose system prompt votes with the question"
        return Chat(form, f"chat template of {where}{beside}")
    except UnknownTemplate as error:
        whose = f"chat template of {where}" if processor is not None or path else "none"
        return Chat(None, f"{whose}: {error}")
    except Exception as error:  # what a foreign tokenizer raises must not stop a prefill
        return Chat(None, f"chat template of {where}: {type(error).__name__} while it was read: {error}", lasting=False)


def chat_of_settings(config: HawkConfig, path: str, ends: Sequence[int]) -> Chat:
    """What can be learned for a model by its settings; `path`, `ends` as for `chat_of`.

    Raises:
        ConfigError: nothing can be learned from the processor that they name.
    """
    chat = chat_of(config.processor, path, ends, config.end_of_turn_token_id is not None)
    if config.processor is not None and chat.form is None:
        remedy = (
            "give one with the model's chat template, or leave it out (the report says what tells where users' texts "
            "stand instead)" if chat.lasting else "call again, if another thread was using it, or leave it out"
        )  # fmt: skip
        raise ConfigError(
            f"processor={type(config.processor).__name__} must have a chat template that says where users' texts "
            f"stand; {chat.origin}: {remedy}"
        )
    return chat
