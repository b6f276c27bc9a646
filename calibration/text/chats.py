"""Rows of chat messages as text: rendered by the tokenizer's chat template, as the model was trained to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from calibration.errors import InputError
from calibration.text.documents import Chats, Documents, refuse_half_surrogates

_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT's rows, in the words of chat templates."""
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template, which is a program, can end with on messages that it does not expect."""


@dataclass(frozen=True)
class _Rendered(Sequence[str]):
    """The text of each chat, rendered at each access."""

    chats: Chats
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.chats.messages)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        where = self.chats.where(index)
        messages: list[Any] = [_message(entry) for entry in self.chats.messages[index]]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except _TEMPLATE_ERRORS as error:
            raise InputError(
                f"{where}: the tokenizer's chat template does not take these messages"
                f" ({type(error).__name__}: {error}); mend or remove the row"
            ) from error
        refuse_half_surrogates(str(text), where)
        return str(text)


def rendered(chats: Chats, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Each chat as a document. Cost: every chat is rendered once.

    Raises InputError for a tokenizer without a chat template, and for a row that its template does not take.
    """
    source = chats.provenance["source"]
    if not tokenizer.chat_template:
        raise InputError(
            f"{source}: rows of chat messages are read with the tokenizer's chat template, and it has none; use the"
            " chat model's own tokenizer, or rows with the field 'text'"
        )
    texts = _Rendered(chats, tokenizer)
    return Documents(texts, [len(text) for text in texts], chats.provenance)


def refuse_bad_messages(value: Any, name: str, where: str) -> None:
    """Raises InputError unless a value is a list of messages, each with a role and its text."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {name!r} is {type(value).__name__}, not a list of messages")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, Mapping) or not _is_message(entry):
            raise InputError(
                f"{where}: message {number} of {name!r} has no role and content that are text (or from and value)"
            )


def _is_message(entry: Mapping[str, Any]) -> bool:
    role, content = _role_and_content(entry)
    calls = content is None and entry.get("tool_calls")
    return isinstance(role, str) and (isinstance(content, str) or bool(calls))


def _role_and_content(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    if "role" in entry:
        return entry["role"], entry.get("content")
    return entry.get("from"), entry.get("value")


def _message(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message in the words of chat templates, with whatever else it holds; parquet has null for what it lacks."""
    if "role" in entry:
        return {key: value for key, value in entry.items() if value is not None or key == "content"}
    role, content = _role_and_content(entry)
    return {"role": _ROLES.get(role, role), "content": content}
