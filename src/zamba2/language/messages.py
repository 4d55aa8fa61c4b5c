"""Conversations as lists of messages: what they must be, and the template for checkpoints that bring none. Cheap to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zamba2.errors import Zamba2Error

__all__ = ["CHATML", "ROLES", "brief", "check_messages"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Any) -> None:
    """Raise Zamba2Error unless ``messages`` is a non-empty list of {"role": one of ROLES, "content": text, ...}."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise Zamba2Error(f"messages is a {type(messages).__name__}; a list of {{role, content}} objects is needed.")
    if not messages:
        raise Zamba2Error("messages is empty; at least one message is needed.")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise Zamba2Error(f"messages[{i}] is a {type(message).__name__}; an object with role and content is needed.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise Zamba2Error(f"messages[{i}] has role {brief(repr(role))}; one of {', '.join(ROLES)} is needed.")
        if not isinstance(content, str):
            raise Zamba2Error(f"messages[{i}] has content of type {type(content).__name__}; a text is needed.")


def brief(error: object) -> str:
    """An error's text on one line of bounded length: templates choose their own messages."""
    text = " ".join(str(error)[:400].split())
    return text if len(text) <= 200 else text[:200] + "..."
