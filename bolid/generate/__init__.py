"""`bolid generate`: a prompt and a profile in, pictures out."""

from __future__ import annotations

from bolid.generate.command import generate, read_prompts

__all__ = ["generate", "read_prompts"]
