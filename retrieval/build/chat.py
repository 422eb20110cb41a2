"""Chats: lists of messages, as the model's replies or as the whole text that its template makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from freedraft.retrieval.build.extras import require
from freedraft.retrieval.index.errors import SourceError

ChatPart = Literal["replies", "all"]
# OpenAI's and Hugging Face's names, and ShareGPT's.
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def as_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with `role` and `content` from a list of mappings.

    Content that is a list of parts is joined from those that have text.

    Raises:
        ValueError: it is not such a list; the message says what is wrong.
    """
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise ValueError(f"message {i}: expected a mapping, got {type(item).__name__}")
        role = next((item[key] for key in ROLE_KEYS if key in item), None)
        if not isinstance(role, str):
            raise ValueError(f"message {i}: no role")
        content = next((item[key] for key in CONTENT_KEYS if key in item), None)
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(part for part in parts if isinstance(part, str))
        # A call of a tool may come without content.
        if content is not None and not isinstance(content, str):
            raise ValueError(f"message {i}: content: expected text, got {type(content).__name__}")
        messages.append({**item, "role": ROLES.get(role, role), "content": content or ""})
    return messages


def replies(messages: list[dict[str, Any]]) -> Iterator[str]:
    """What the assistant said, a text a message."""
    return (message["content"] for message in messages if message["role"] == "assistant" and message["content"])


class ChatTemplate:
    """A tokenizer's chat template, rendered as transformers does, without transformers.

    Jinja2's sandbox keeps a template from the interpreter: it comes with a model that somebody made.

    Args:
        source: the template.
        special_tokens: `bos_token` and the like, which templates refer to.

    Raises:
        MissingPackageError: jinja2 is not installed.
        SourceError: the template is not valid.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        sandbox = require("jinja2.sandbox", "rendering a chat template")
        jinja2 = require("jinja2", "rendering a chat template")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_extension()]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._errors = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise SourceError(f"the tokenizer's chat template is not valid: {error}") from error

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The text of a chat.

        Raises:
            ValueError: the template does not take these messages.
        """
        try:
            text: str = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **self._special_tokens
            )
        except self._errors as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return text


def load_chat_template(folder: Path) -> ChatTemplate:
    """The chat template of a tokenizer's folder: `chat_template.jinja`, else in `tokenizer_config.json`.

    Raises:
        SourceError: there is none, or it is not valid.
        MissingPackageError: jinja2 is not installed.
    """
    config: dict[str, Any] = {}
    try:
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        else:
            template = _default_template(config.get("chat_template"))
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"chat template in {folder}: {error}") from error
    if not isinstance(template, str):
        raise SourceError(
            f"{folder}: no chat template, neither chat_template.jinja nor in tokenizer_config.json: "
            "index only the replies (--chat replies), or use a chat model's tokenizer"
        )
    special = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                special[name] = text
    return ChatTemplate(template, special)


def _default_template(value: Any) -> Any:
    # Either one template or several, each with a name.
    if isinstance(value, list):
        return next((item.get("template") for item in value if item.get("name") == "default"), None)
    return value


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja2's own escapes HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _generation_extension() -> Any:
    """`{% generation %}` and `{% endgeneration %}`, which mark what the model says: here they stand for their body."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation
