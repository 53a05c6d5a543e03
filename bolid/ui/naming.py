"""Prompts of the page that name the chosen person, until a client changes them: "a woman" or "a man"."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from bolid.ui.messages import readable_errors
from bolid.ui.workspace import Workspace

PROMPT = "a full body photo of a {}, in a red top and blue trousers, on a beach"
POSED = "a full body photo of a {} waving, in a red top and blue trousers, on a beach"
_NOUNS = ("woman", "man")


def name_person(workspace: Workspace, person: gr.Dropdown, prompts: dict[gr.Textbox, str]) -> None:
    """Let each prompt, which begins as its text of a woman, name the person that is chosen."""
    quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    noun = gr.Textbox(visible=False)
    known = person.change(readable_errors(lambda name: noun_of(workspace, name)), person, noun, **quick)
    for prompt, text in prompts.items():
        known.then(None, [prompt, noun], prompt, js=_renamed(text), **quick)


def noun_of(workspace: Workspace, name: str | None) -> str:
    """What a prompt calls this person, by the body; "" for nobody."""
    return _NOUNS[not workspace.people.is_woman(name)] if name else ""


def _renamed(text: str) -> str:
    """JavaScript: the prompt that nobody has changed yet, as it names another person."""
    usual = {noun: text.format(noun) for noun in _NOUNS}
    return f"""(prompt, noun) => {{
        const usual = {json.dumps(usual)};
        return noun && Object.values(usual).includes(prompt) ? usual[noun] : prompt;
    }}"""
