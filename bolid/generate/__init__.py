"""`bolid generate`: a prompt and a profile in, pictures out."""

from __future__ import annotations

from bolid.generate.command import generate
from bolid.generate.prompts import read_prompts
from bolid.generate.saving import save_picture

__all__ = ["generate", "read_prompts", "save_picture"]
