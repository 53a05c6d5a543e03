"""Prompts: from lines of text, and what of them the text encoder reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bolid.generate.request import Request

_WEIGHT = re.compile(r"\([^()]*:\s*-?\d*\.?\d+\s*\)")  # (word:1.8), as other programs write emphasis
_EXTRA_NETWORK = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*>")


def read_prompts(lines: Sequence[str]) -> list[str]:
    """One prompt a line; empty lines and those that begin with # do not count."""
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def unsupported_syntax(prompt: str) -> Iterator[str]:
    """A warning for each piece of a prompt that other programs give a meaning and the text encoder reads as words."""
    for found in _WEIGHT.findall(prompt):
        yield f"{found} is read as words: prompts have no weights here"
    for found in _EXTRA_NETWORK.findall(prompt):
        yield f"{found} is read as words: LoRAs are loaded with --lora FILE:WEIGHT"


def encoded_prompts(pipe: Any, request: Request, warn: Callable[[str], None]) -> dict[str, str]:
    """Prompt -> what the text encoder reads of it: with the family's clothes where it names none, and cut."""
    texts = {request.negative: request.negative}
    texts |= {prompt: request.family.dressed(prompt) for prompt in request.prompts}
    encoded: dict[str, str] = {}
    for prompt, text in texts.items():
        encoded[prompt], lost = split_at_limit(pipe, text)
        for warning in unsupported_syntax(prompt):
            warn(warning)
        if lost:
            warn(f"the text encoder reads no more than {encoded[prompt]!r}; it does not read {lost!r}")
    return encoded


def split_at_limit(pipe: Any, prompt: str) -> tuple[str, str]:
    """(what the text encoders of `pipe` read of a prompt, the rest that they do not).

    They read a fixed number of tokens (77 in SD and SDXL, of which two mark start and end). Within it the first part is
    the prompt itself, beyond it the words are those of the tokenizer, in lower case; the last of them may be cut.
    """
    from bolid.backends.diffusion import quiet_diffusers

    tokenizer = pipe.tokenizer
    with quiet_diffusers():
        tokens = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        limit = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        if len(tokens) <= limit:
            return prompt, ""
        return tokenizer.decode(tokens[:limit]).strip(), tokenizer.decode(tokens[limit:]).strip()
