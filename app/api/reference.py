"""The OpenAPI document as a page to read: ``docs/api.md`` is what ``fluxd openapi --markdown``
prints.

Owns the page's form. What it says stands in the routes and in the schemas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from app.api.bodies import FORM_TYPE, JSON_TYPE

Schema = Mapping[str, Any]
# Of each body that was shown: its heading, and the line of each field.
Shown = list[tuple[str, dict[str, str]]]

_HEAD = """\
# The HTTP API

<!-- Made by: fluxd openapi --markdown > docs/api.md -->

Every route, as `GET /openapi.json` describes it to programs; `fluxd openapi` prints the same \
without a server. Fields that are not required may be left out or null. Every answer carries \
`x-request-id`. Where API keys are set, send yours as `Authorization: Bearer KEY` or \
`x-api-key: KEY`. A `POST` with an `Idempotency-Key` is done once, however often it is sent.
"""
_ERRORS = """\
## Errors

All have one shape, `{"error": {"message", "type", "param", "code"}}`, in which the message says \
what is allowed and `param` names the field. `Retry-After` says when the same request may work, \
`retry-after-ms` the same more finely, and `x-should-retry: false` that it would fail again.

| status | meaning |
|---|---|
"""
_FIELDS = "| field | values | meaning |\n|---|---|---|\n"
_REFERENCE = "#/components/schemas/"
_LARGEST_INTEGER = 2**63 - 1
# With so many fields in common, a body is shown by what differs from an earlier one.
_MUCH_IN_COMMON = 8


def reference_page(document: Schema) -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD, _index(document)]
    meanings: dict[int, str] = {}
    shown: Shown = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(f"{method.upper()} {path}", operation, shown))
            for status, answer in operation["responses"].items():
                if not status.startswith("2"):
                    meanings.setdefault(int(status), answer["description"])
    # Without the status's own name, which differs between versions of Python.
    rows = (
        f"| {status} | {meanings[status].partition('. ')[2]} |\n" for status in sorted(meanings)
    )
    parts += [_ERRORS + "".join(rows), "## Objects\n"]
    parts += [_object(name, schema) for name, schema in document["components"]["schemas"].items()]
    return "\n".join(parts)


def _index(document: Schema) -> str:
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            title = f"{method.upper()} {path}"
            told = _prose(operation.get("description", "").partition("\n\n")[0])
            rows.append(f"| [`{title}`](#{_anchor(title)}) | {told} |\n")
    return "| route | what it does |\n|---|---|\n" + "".join(rows)


def _operation(title: str, operation: Schema, shown: Shown) -> str:
    parts = [f"## {title}\n\n{_prose(operation.get('description', ''))}\n"]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = (
            _row(given["name"], {**given["schema"], "description": given.get("description", "")})
            for given in parameters
        )
        parts.append(_FIELDS + "".join(rows))
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        parts.append(_body(title, content, shown))
    parts.append(_answers(operation["responses"]))
    return "\n".join(parts)


def _body(title: str, content: Schema, shown: Shown) -> str:
    """The fields of a JSON body, or of a form; where it may be either, how they differ."""
    is_json = JSON_TYPE in content
    schema = content[JSON_TYPE if is_json else FORM_TYPE]["schema"]
    fields, required = schema["properties"], schema.get("required", ())
    rows = {name: _row(name, field, name in required) for name, field in fields.items()}
    text = f"The body is {'JSON' if is_json else 'a form'}{_told(title, rows, shown)}"
    if is_json and FORM_TYPE in content:
        form = content[FORM_TYPE]["schema"]["properties"]
        files = _listed((f"`{name}`" for name, field in form.items() if _is_file(field)), "and")
        without = [f"`{name}`" for name in fields if name not in form]
        but = f" but {_listed(without, 'and')}" if without else ""
        text += f"\nOr it is a form: all of these as text{but}, and files in {files}.\n"
    return text


def _told(title: str, rows: dict[str, str], shown: Shown) -> str:
    """A table of all fields, or of those that an earlier body has not."""
    for earlier, known in shown:
        common = rows.items() & known.items()
        if len(common) >= _MUCH_IN_COMMON and known.keys() <= rows.keys():
            others = "".join(row for name, row in rows.items() if known.get(name) != row)
            return (
                f" with the fields of [{earlier}](#{_anchor(earlier)}), and:\n\n{_FIELDS}{others}"
            )
    shown.append((title, rows))
    return f":\n\n{_FIELDS}{''.join(rows.values())}"


def _is_file(field: Schema) -> bool:
    return any(
        option.get("format") == "binary" or option.get("items", {}).get("format") == "binary"
        for option in (field, *field.get("anyOf", ()))
    )


def _answers(responses: Schema) -> str:
    lines = []
    for status, answer in responses.items():
        if status.startswith("2"):
            said = answer["description"]
            told = "" if said == "Successful Response" else f" {said}"
            content = answer.get("content", {})
            kinds = _listed((_content(kind, content[kind]) for kind in content), "or")
            lines.append(f"**{status}**{told}{f' {kinds}.' if kinds else ''}\n")
    failures = sorted(status for status in responses if not status.startswith("2"))
    lines.append(f"[Errors](#errors): {', '.join(failures)}.\n")
    return "\n".join(lines)


def _content(kind: str, held: Schema) -> str:
    reference = held.get("schema", {}).get("$ref", "")
    return f"{_link(reference)} as `{kind}`" if reference else f"`{kind}`"


def _object(name: str, schema: Schema) -> str:
    head = f"### {name}\n\n{_prose(schema.get('description', ''))}\n\n"
    if "enum" in schema:
        return f"{head}{_values(schema)}\n"
    rows = (_row(field, held) for field, held in schema["properties"].items())
    return f"{head}{_FIELDS}{''.join(rows)}"


def _row(name: str, field: Schema, is_required: bool = False) -> str:
    told = _prose(field.get("description", ""))
    if is_required:
        told = f"Required. {told}".rstrip()
    return f"| `{name}` | {_values(field)} | {told} |\n".replace("|  |", "| |")


def _values(schema: Schema) -> str:
    """A schema in words."""
    if "$ref" in schema:
        return _link(schema["$ref"])
    options = [
        option
        for option in schema.get("anyOf", ())
        if option not in ({"type": "null"}, {"const": ""})
    ]
    if options:
        limits = {name: value for name, value in schema.items() if name not in ("anyOf", "type")}
        return " or ".join(dict.fromkeys(_values({**option, **limits}) for option in options))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    if "const" in schema:
        return f"`{schema['const']}`"
    match schema.get("type"):
        case "array":
            held = _values(schema.get("items", {}))
            return (
                f"up to {schema['maxItems']}: {held}" if "maxItems" in schema else f"list: {held}"
            )
        case "integer" | "number" as kind:
            return f"{kind}{_range(schema)}"
        case "string":
            return _text(schema)
        case "boolean":
            return "`true`, `false`"
        case "object" if "properties" in schema:
            return "object with " + _listed((f"`{name}`" for name in schema["properties"]), "and")
        case "object":
            return f"{_values(schema.get('additionalProperties', {}))} by name"
    return "anything"


def _text(schema: Schema) -> str:
    match schema.get("format"):
        case "picture":
            return "picture as base64 or data URL"
        case "binary":
            return "file"
    return f"text, at most {schema['maxLength']} characters" if "maxLength" in schema else "text"


def _range(schema: Schema) -> str:
    words = []
    if "minimum" in schema:
        words.append(f" from {schema['minimum']}")
    elif "exclusiveMinimum" in schema:
        words.append(f" above {schema['exclusiveMinimum']}")
    if "maximum" in schema:
        most = schema["maximum"]
        words.append(f" to {'2^63 - 1' if most == _LARGEST_INTEGER else format(most, 'g')}")
    if "multipleOf" in schema:
        words.append(f", in steps of {schema['multipleOf']}")
    return "".join(words)


def _link(reference: str) -> str:
    name = reference.removeprefix(_REFERENCE)
    return f"[{name}](#{_anchor(name)})"


def _anchor(title: str) -> str:
    """What the pages of code hosts make of a heading."""
    kept = (sign for sign in title.lower() if sign.isalnum() or sign in " -_")
    return "".join(kept).replace(" ", "-")


def _listed(words: Iterable[str], last: str) -> str:
    listed = list(words)
    if len(listed) < 2:
        return "".join(listed)
    return f"{', '.join(listed[:-1])} {last} {listed[-1]}"


def _prose(text: str) -> str:
    """A docstring's paragraphs, each on one line, its code marked as Markdown marks it."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(paragraphs).replace("``", "`").strip()
