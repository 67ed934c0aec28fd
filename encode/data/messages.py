"""Instructions inside conversations: lists of messages, as datasets for language models with pictures hold them."""

import re
from typing import Any

SPEAKER, SAID = ("role", "from"), ("content", "value")  # OpenAI's names, and those of ShareGPT
PEOPLE = ("user", "human")
PICTURE = re.compile(r"<\|?/?(image|img)[^<>]*>")  # stands in a text where a picture is shown


def is_message(value: Any) -> bool:
    """Whether somebody says something there."""
    return isinstance(value, dict) and any(name in value for name in SPEAKER) and any(name in value for name in SAID)


def instruction_in(messages: list[Any]) -> str | None:
    """What a person says first, without what stands for pictures; None where nobody says anything.

    Later turns of a conversation are edits of pictures that came in between.
    """
    for message in filter(is_message, messages):
        speaker, said = (next(message[name] for name in names if name in message) for names in (SPEAKER, SAID))
        if speaker in PEOPLE:
            parts = said if isinstance(said, list) else [said]
            texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
            return " ".join(PICTURE.sub(" ", " ".join(text for text in texts if isinstance(text, str))).split())
    return None
