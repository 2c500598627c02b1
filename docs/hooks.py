"""What the site has beyond docs/*.md: pages at the root, references made from the code, equations, code beside them.

Loaded by mkdocs.yml. Pages read as well without it, as plain Markdown.
"""

import ast
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
import typer
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from afm_pipe.cli.app import app
from afm_pipe.params.file import schema_of_params

ROOT = Path(__file__).resolve().parent.parent
AT_ROOT = {  # pages outside docs/, by their place in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
NOTEBOOKS = ROOT / "notebooks"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)]*)?\)")
CODE = re.compile(r"^<!-- code: (?P<file>\S+) (?P<names>[\w, .]+) -->$", re.MULTILINE)
DISPLAY, INLINE = re.compile(r"\$\$(.+?)\$\$", re.DOTALL), re.compile(r"(?<![\\$\w`])\$([^$\n]+?)\$(?![\w$])")
FENCE = re.compile(r"(^```.*?^```|^(?: {4}[^\n]*\n)+|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root of the repository, the pictures that they show, and the references."""
    pages = {place: (ROOT / name).read_text(encoding="utf-8") for name, place in AT_ROOT.items()}
    pages |= {"params-reference.md": params_reference(), "commands.md": commands_reference()}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", pages["index.md"]):
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Make a page of the repository one of the site."""
    place = page.file.src_uri
    origin = next((name for name, at in AT_ROOT.items() if at == place), f"docs/{place}")
    markdown = re.sub(r"(<!--[^>]*-->)\n(?=\|)", r"\1\n\n", markdown)  # a table needs an empty line before it
    markdown = CODE.sub(lambda found: source_of(found["file"], found["names"].split(", ")), markdown)
    parts = FENCE.split(markdown)
    for index in range(0, len(parts), 2):  # every other part is code
        text = LINK.sub(lambda link: _link(link, origin), parts[index])
        text = DISPLAY.sub(lambda tex: _math(tex[1], "block"), text)
        parts[index] = INLINE.sub(lambda tex: _math(tex[1], "inline"), text)
    return "".join(parts)


def on_post_build(config: Any) -> None:
    """Fail for what a strict build does not see: a page that asks a reader's browser for something elsewhere."""
    for page in Path(config["site_dir"]).rglob("*.html"):
        loads = r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(https?://[^\"\s>]+)"
        if loaded := re.findall(loads, page.read_text(encoding="utf-8")):
            raise SystemExit(f"error: Found {page} loading {loaded[0]}, expected nothing from the network.")


def source_of(file: str, names: list[str]) -> str:
    """Return functions or classes of a file without their docstrings, as a block of code.

    Raises KeyError for a name that the file does not have, so that a page cannot show code that is gone.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    blocks = []
    for name in names:
        node = nodes[name]
        skipped: set[int] = set()
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            skipped = set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
        kept = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        blocks.append("\n".join(lines[number - 1] for number in kept if number not in skipped))
    body = "\n\n".join(blocks)
    return f'```python title="{file}"\n{body}\n```'


def params_reference() -> str:
    """Return the page of all params, from the JSON schema: one table per section."""
    schema = schema_of_params()
    lines = [
        "# All params",
        "",
        "Every field of `params.yaml`, made from its schema, which `afm-pipe schema` prints.",
        "[params.md](params.md) explains how runs inherit and what reruns when a field changes.",
        "",
    ]
    first: dict[str, str] = {}  # where a section was described, by its title
    for name, field in schema["properties"].items():
        lines += [f"## {name}", "", *_described(field)]
        if name == "runs":  # the fields of train again
            lines += ["Every field of `train` and `seed`, all optional: a run overrides what it lists.", ""]
            continue
        kinds = _objects(field, schema)
        for path, definition in kinds:
            heading = f"{name}.{path}" if path else name
            same = [each for each in kinds if each[0] == path]
            if path or len(same) > 1:
                title = f"{definition['title']}: " if len(same) > 1 else ""
                lines += [f"### {title}{heading}", "", *_described(definition)]
            at = first.setdefault(definition["title"], heading)
            lines += _fields(definition, schema) if at == heading else [f"Its fields are those of `{at}`.", ""]
        if not kinds:
            lines += [f"Type: {_type(field, schema)}.", ""]
    return "\n".join(lines)


def _described(field: dict[str, Any]) -> list[str]:
    return [_sentence(field["description"]), ""] if "description" in field else []


def _sentence(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("<", "&lt;").replace("|", "\\|")


def _objects(field: dict[str, Any], schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return a section's objects with their dotted paths, in the order of their fields."""
    found: list[tuple[str, dict[str, Any]]] = []
    for place, part in _parts(field, path):
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]] | {"title": part["$ref"].rpartition("/")[2]}
        if "properties" not in part:
            found += [] if part is field else _objects(part, schema, place)
            continue
        if any(place == at and part["title"] == other["title"] for at, other in found):
            continue
        found.append((place, part))
        for name, inner in part["properties"].items():
            found += _objects(inner, schema, f"{place}.{name}" if place else name)
    return [each for index, each in enumerate(found) if each not in found[:index]]


def _parts(field: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """Return what a field may be: itself, the members of a union, the values of a mapping, the items of a list."""
    if "anyOf" in field or "oneOf" in field:
        return [part for each in field.get("anyOf", field.get("oneOf")) for part in _parts(each, path)]
    if "patternProperties" in field:
        name = f"{path}.NAME" if path else "NAME"
        return [part for each in field["patternProperties"].values() for part in _parts(each, name)]
    if isinstance(field.get("additionalProperties"), dict):
        return _parts(field["additionalProperties"], f"{path}.NAME" if path else "NAME")
    if field.get("type") == "array" and isinstance(field.get("items"), dict):
        return _parts(field["items"], f"{path}[]")
    return [(path, field)]


def _fields(definition: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    lines = ["| field | type | meaning |", "| --- | --- | --- |"]
    for name, field in definition["properties"].items():
        meaning = _sentence(field.get("description", ""))
        lines.append(f"| `{name}` | {_type(field, schema)} | {meaning} |")
    return [*lines, ""]


BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return a field's type in words."""
    if "$ref" in field:
        return f"section {field['$ref'].rpartition('/')[2]}"
    for union in ("anyOf", "oneOf"):
        if union in field:
            return " or ".join(dict.fromkeys(_type(each, schema) for each in field[union]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type", "any")
    if kind == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list: {_type(items, schema)}"
    if kind == "object":
        return "sections by name" if "patternProperties" in field or field.get("additionalProperties") else "section"
    words = {"boolean": "true or false", "string": "text", "integer": "whole number", "null": "null"}.get(kind, kind)
    bounds = [text.format(field[key]) for key, text in BOUNDS.items() if abs(field.get(key, 10**6)) < 10**6]
    return f"{words} {' and '.join(bounds)}".strip().replace("<", "&lt;").replace("|", "\\|")


def commands_reference() -> str:
    """Return the page of all commands, from their --help."""
    group = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "What `afm-pipe COMMAND --help` says. A stage of `dvc repro` and its command do the same.",
        "",
    ]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if command.hidden:
            continue
        summary, _, example = (command.help or "").partition("Example: ")
        lines += [f"## {name}", "", _sentence(summary.strip()), "", f"    {example.strip()}", ""]
        rows = []
        for param in command.params:
            names = ", ".join(f"`{opt}`" for opt in (*param.opts, *param.secondary_opts) if opt.startswith("-"))
            names = names or f"`{(param.metavar or param.name.upper()).strip('[].')}`"
            rows.append(f"| {names} | {_sentence(getattr(param, 'help', None) or '')} |")
        if rows:
            lines += ["| option | meaning |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


def _link(link: re.Match[str], origin: str) -> str:
    """Return a link between files of the repository as one between pages of the site; others as their text."""
    target, anchor = link["target"], link["anchor"] or ""
    if not target or "://" in target or target.startswith("mailto:"):
        return link[0]
    path = (ROOT / origin).parent / target
    name = path.resolve().relative_to(ROOT).as_posix()
    if link["image"] or name in AT_ROOT or name.startswith("docs/"):
        place = AT_ROOT.get(name, name.removeprefix("docs/"))
        return f"{link['image']}[{link['text']}]({place}{anchor})"
    if name.startswith("notebooks/") and path.is_file():
        return f"[{link['text']}]({name})"
    shown = link["text"].strip("`")
    return f"`{name}`" if shown in (name, target) else f"{link['text']} (`{name}`)"


def _math(tex: str, display: str) -> str:
    return latex2mathml.converter.convert(tex.strip(), display=display).replace("\n", "")
