"""Conversations, in the spellings that datasets use, and the chat template that makes texts of them."""

from typing import Any

from cats_llm.errors import CatsError, first_line

Message = dict[str, Any]
"""``role`` and ``content``, two texts, and whatever else a chat template may look at (tool_calls, name ...)."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def conversation(value: Any, where: str) -> list[Message]:
    """A conversation of a row as messages with ``role`` and ``content``.

    Takes the names ``from`` and ``value`` as well, content in parts of type text, and content that is null beside a
    call of a tool. Keys without a value are left out: tables give every message the keys of all.

    Args:
        where: the row, for errors.

    Raises:
        CatsError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise CatsError(f"{where} has messages that are no conversation: a list of role and content is wanted.")
    return [_message(message, f"{where}, message {number},") for number, message in enumerate(value, 1)]


def _message(given: Message, where: str) -> Message:
    message = {key: value for key, value in given.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content") if "content" in message else message.pop("value", "")
    spelt = "content" in given or "value" in given or "tool_calls" in given
    if not isinstance(role, str) or not spelt:
        keys = ", ".join(map(str, given)) or "nothing"
        raise CatsError(f"{where} is no part of a conversation with role and content (it has: {keys}).")
    return {"role": _ROLES.get(role, role), "content": _text(content, where), **message}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise CatsError(f"{where} has a content of {kind or type(part).__name__}, and only text can be read.")
    return "".join(part["text"] for part in parts)


def render(messages: list[Message], tokenizer: Any, where: str, generation_prompt: bool = False) -> str:
    """The text that the tokenizer's chat template makes of messages, special tokens included.

    Args:
        messages: see `conversation`.
        where: what the messages are, for errors.
        generation_prompt: end with what an answer of the assistant begins with.

    Raises:
        CatsError: the tokenizer has no chat template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CatsError(
            f"{where} has messages, but the tokenizer has no chat template; give prompt and completion, or text."
        )
    # templates of models that see take content in parts only, and refuse any other or pass over it in silence
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    said = [content for message in messages if (content := message["content"].strip())]
    outcomes: list[str | CatsError] = []
    for form in (messages, parts):
        try:
            text = _apply(form, tokenizer, where, generation_prompt)
        except CatsError as error:
            outcomes.append(error)
            continue
        if not said or any(content in text for content in said):
            return text
        outcomes.append(text)
    if isinstance(outcomes[0], CatsError):
        raise outcomes[0]
    return outcomes[0]


def _apply(messages: list[Message], tokenizer: Any, where: str, generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except ImportError as error:
        raise CatsError("chat templates need jinja2: pip install jinja2.") from error
    except Exception as error:  # a template is a program: it raises what it likes, and so does jinja2
        raise CatsError(
            f"{where} has messages that the tokenizer's chat template refuses ({first_line(error)}); change them or "
            "leave them out."
        ) from error
    return text
