"""``mabridge providers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mabridge.cli._common import command, json_option

if TYPE_CHECKING:
    from mabridge.plugins import ProviderEntry, Registry


@command()
@click.argument("name", required=False)
@json_option
def providers(name: str | None, as_json: bool) -> None:
    """List the types of providers, or the options of the type NAME."""
    from mabridge.plugins import registry

    known = registry()
    if name is None:
        _list(known, as_json)
    else:
        _show(known.get(name), as_json)


def _list(known: Registry, as_json: bool) -> None:
    from mabridge.cli._output import echo_json, table

    found = [
        {
            "name": entry.name,
            "plugin": entry.plugin,
            "installed": entry.installed,
            "install": None if entry.installed else entry.hint,
        }
        for entry in known.providers.values()
    ]
    if as_json:
        failures = [{"plugin": failure.plugin, "error": str(failure)} for failure in known.failures]
        echo_json({"providers": found, "failures": failures})
        return
    table(
        ("provider", "plugin", "ready"),
        [(row["name"], row["plugin"], "yes" if row["installed"] else f"no: {row['install']}") for row in found],
    )
    for failure in known.failures:
        click.echo(f"mabridge: {failure}", err=True)


def _show(entry: ProviderEntry, as_json: bool) -> None:
    from mabridge.cli._output import echo_json, table

    schema: dict[str, Any] = entry.load().Options.model_json_schema()
    required = schema.get("required", ())
    options = {
        name: {
            "type": _type(field),
            "default": field.get("default"),
            "required": name in required,
            "description": field.get("description"),
        }
        for name, field in schema.get("properties", {}).items()
    }
    if as_json:
        echo_json({"name": entry.name, "plugin": entry.plugin, "options": options})
        return
    table(
        ("option", "type", "default", "meaning"),
        [
            (name, row["type"], "(required)" if row["required"] else _toml(row["default"]), row["description"])
            for name, row in options.items()
        ],
    )


def _type(field: dict[str, Any]) -> str:
    """Write the type of an option, out of its JSON schema."""
    if "$ref" in field:
        name = str(field["$ref"]).rsplit("/", 1)[-1]
        return '{ env = "NAME" }' if name == "EnvVar" else name
    if "anyOf" in field:
        kinds = [_type(part) for part in field["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type") or field.get("const") or "any")


def _toml(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
