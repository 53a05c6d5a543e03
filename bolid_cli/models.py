"""``bolid models``: which model families there are, and which one is used."""

from __future__ import annotations

from typing import Any

import typer

from bolid.families import FAMILY_NAMES, PARTS, chosen_family, get_family, remember_family
from bolid_cli._render import JsonOption, QuietOption, emit_json, note, print_table

app = typer.Typer(
    help="List the model families, or choose one.",
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("list")
def list_families(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show every model family, whether its files are there, and which one is used."""
    chosen, source = chosen_family()
    names = [*FAMILY_NAMES] + ([chosen] if chosen not in FAMILY_NAMES else [])
    families: list[dict[str, Any]] = []
    for name in names:
        family = get_family(name)
        families.append(
            {
                "name": name,
                "description": family.description,
                "image_size": family.image_size,
                "root": family.root,
                "missing": family.missing(),
                "chosen": name == chosen,
            }
        )
    if as_json:
        emit_json({"families": families, "chosen_by": source})
        return
    for entry in families:
        print(entry["name"])
    rows = []
    for entry in families:
        height, width = entry["image_size"]
        missing = entry["missing"]
        state = "complete" if not missing else "none" if len(missing) == len(PARTS) else "missing " + ", ".join(missing)
        name = f"{entry['name']} *" if entry["chosen"] else entry["name"]
        rows.append((name, f"{height}x{width}", entry["description"], state, entry["root"]))
    print_table(("family", "size", "what", "files", "where"), rows, quiet)
    note(f"* used by default, chosen by: {source}", quiet)


@app.command("use")
def use(name: str, quiet: QuietOption = False) -> None:
    """Remember NAME (a family, or a .toml file of your own) as the family of later commands."""
    remember_family(name)
    note(f"later commands use family {name!r} unless --family or BOLID_FAMILY says otherwise", quiet)
