"""The documentation's own tools: the API reference from docstrings, and what the site needs beyond plain Markdown.

    python tools/docs.py                       the API reference on standard output
    python tools/docs.py --write docs/api.md   the same into the file (tests/test_docs.py checks that it is current)

mkdocs.yml names this file as a hook. On the site, ```math blocks become MathML; a link that leaves docs/ goes to the
repository where `repo_url` is set, and without one names the path; pictures from outside docs/ are copied.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# --- the API reference ---------------------------------------------------------------------------------------------

HEAD = """\
# API reference

Written by `python tools/docs.py --write docs/api.md` from the docstrings. `import eft_kernels as eft` throughout.
`B` is the number of rows (requests), `J` the number of models, `V` the vocabulary, `K` the number of drafts.
A `Number` is one, or a tensor, list or array with one for each row; `PerRow` is that or None, which is off;
`AnyWeights` is what [`weights`](#weights) takes.
[Semantics](semantics.md) has the formulas, [API stability](stability.md) what may change.

<!-- run first
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from transformers.generation import GenerateDecoderOnlyOutput
-->
"""
GROUPS = {
    "Operations": ["sample", "verify", "draft", "combine", "logprobs", "token_logprobs"],
    "Results": ["SampleOutput", "VerifyOutput", "DraftOutput"],
    "Combinations": ["upscale", "proxy", "interpolate", "downscale", "weights", "Weights"],
}
HF = ["generate", "EmulatedOutput", "InvalidRowError", "EmulatedModel"]
SPECIAL = {("Model", "__call__"), ("EmulatedModel", "__init__")}  # methods that are shown all the same
DECODING = [
    "plain",
    "speculative",
    "Model",
    "NodeModel",
    "Prompt",
    "Target",
    "Drafts",
    "Auto",
    "Decoded",
    "Speculation",
]


def signature(name: str, function) -> str:
    """A definition without a body, wrapped to 120 columns."""
    found = inspect.signature(function)
    parts, star = [], False
    for p in found.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.VAR_POSITIONAL:
            star = True
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if p.annotation is not p.empty:
            text += f": {annotation(p.annotation)}"
        if p.default is not p.empty:
            default = f'"{p.default}"' if isinstance(p.default, str) else repr(p.default)
            text += f" = {default}" if p.annotation is not p.empty else f"={default}"
        parts.append(text)
    returns = f" -> {annotation(found.return_annotation)}" if found.return_annotation is not found.empty else ""
    line = f"def {name}({', '.join(parts)}){returns}: ..."
    if len(line) <= 120:
        return line
    return "\n".join([f"def {name}(", *(f"    {part}," for part in parts), f"){returns}: ..."])


def annotation(value) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


def fields(cls) -> str:
    """A class of fields as its source has it, with its comments."""
    source = textwrap.dedent(inspect.getsource(cls)).splitlines()
    tree = ast.parse("\n".join(source)).body[0]
    lines = [*(["@dataclass"] if tree.decorator_list else []), source[tree.lineno - 1]]
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            while source[above - 1].strip().startswith("#"):
                above -= 1
            lines += source[above : node.end_lineno]
    return "\n".join(lines)


def prose(doc: str | None, parameters=()) -> str:
    """A docstring as Markdown: what is described by name becomes a list, `Returns:` and `Raises:` paragraphs.

    Under `Args:`, a sentence among the names is an item, too, and one that ends with a colon has items of its own.
    """
    text = inspect.cleandoc(doc or "").replace("``", "`").replace(" Raises: ", "\nRaises: ")
    if parameters:  # several in one line
        text = re.sub(rf"(?m)^(  \w.*\.) (?=(?:{'|'.join(parameters)}): )", r"\1\n  ", text)
    out, item_indent = [], None  # of the list that the lines above belong to
    arguments, outer = False, None  # under Args:; the indent of the list around this one
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        item = re.match(r" *(\w+(?:\([^)]*\)| \(default [^)]*\))?(?:, \w+(?: \(default [^)]*\))?)*): (.*)", line)
        section = re.match(r"(Returns|Raises): (.*)", line)
        arguments = arguments and bool(line)
        if arguments and out[-1].endswith(":") and item_indent is not None and indent > item_indent:
            outer, item_indent = item_indent, indent
        elif outer is not None and indent <= outer:
            outer, item_indent = None, outer
        nested = "" if outer is None else "  "
        starts = item_indent == indent or not out or not out[-1]
        if line.strip() == "Args:":
            out += ["**Arguments**", ""]
            arguments = True
        elif section:
            out += [*([""] if out and out[-1] else []), f"**{section[1]}** {section[2]}"]
            item_indent = None
        elif item and starts:
            names = re.sub(r"(\w+(?:\([^)]*\))?)(?=,|$| \()", r"`\1`", re.sub(r" \(default", " (default", item[1]))
            out.append(f"{nested}- {names}: {item[2]}")
            item_indent = indent
        elif item_indent is not None and indent > item_indent:
            out.append(f"{nested}  {line.strip()}")
        elif arguments and item_indent == indent:
            sentence = line.strip()[0].isupper()
            out.append(f"{nested}{'- ' if sentence else '  '}{line.strip()}")
        else:
            out.append(line)
            item_indent = None
    return "\n".join(out)


def entry(name: str, value) -> list[str]:
    lines = [f"### class {name}" if inspect.isclass(value) else f"### {name}", ""]
    if inspect.isclass(value):
        if has_fields := issubclass(value, tuple) or hasattr(value, "__dataclass_fields__"):
            lines += ["```python", fields(value), "```", ""]
        lines += [prose(value.__doc__), ""]
        for attribute, member in vars(value).items():
            wanted = not attribute.startswith("_") or (value.__name__, attribute) in SPECIAL
            kind = type(member) if isinstance(member, (property, classmethod)) else None
            if has_fields or not wanted or not (kind or inspect.isfunction(member)):
                continue
            function = member.fget if kind is property else member.__func__ if kind else member
            if attribute != "__init__" and not function.__doc__:
                continue  # a library's own method, as it documents it
            decorator = f"@{kind.__name__}\n" if kind else ""
            doc = prose(function.__doc__, inspect.signature(function).parameters)
            lines += ["```python", decorator + signature(attribute, function), "```", "", doc, ""]
    else:
        lines += [
            "```python",
            signature(name.rpartition(".")[2], value),
            "```",
            "",
            prose(value.__doc__, inspect.signature(value).parameters),
            "",
        ]
    return lines


def api() -> str:
    """The page."""
    import eft_kernels as eft
    from eft_kernels import decoding

    named = {name for names in GROUPS.values() for name in names}
    rest = [name for name in eft.__all__ if name not in named | {"hf", "__version__"}]
    lines = [HEAD]
    for title, names in {**GROUPS, "Seeds and backends": rest}.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += entry(name, getattr(eft, name))
    lines += ["## Hugging Face transformers", "", "`eft.hf`; transformers is imported when it is first used.", ""]
    for name in HF:
        lines += entry(f"hf.{name}" if name == "generate" else name, getattr(eft.hf, name))
    lines += ["## Decoding loops", "", "`eft_kernels.decoding`. " + prose(decoding.__doc__), ""]
    for name in DECODING:
        lines += entry(name, getattr(decoding, name))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


# --- the site ------------------------------------------------------------------------------------------------------


def on_files(files, config):
    from mkdocs.structure.files import File

    docs = Path(config.docs_dir)
    pictures = {
        found
        for page in docs.glob("*.md")
        for found in re.findall(r"!\[[^]]*\]\(\.\./([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    for path in sorted(pictures):
        files.append(File.generated(config, path, abs_src_path=str(docs.parent / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    from latex2mathml.converter import convert

    def formula(found):
        markup = convert(found[1], display="block")
        if "\\" in markup:
            raise ValueError(f"{page.file.src_uri}: a command that latex2mathml does not know: {found[1]}")
        return markup

    def link(found):
        bang, text, path = found.groups()
        if not (Path(config.docs_dir).parent / path.partition("#")[0]).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: ../{path} does not exist")
        if bang:
            return f"![{text}]({path})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else f"{text} (`{path}`)"

    markdown = re.sub(r"(?ms)^```math\n(.*?)\n```$", formula, markdown)
    return re.sub(r"(!?)\[([^]]*)\]\(\.\./([^)]+)\)", link, markdown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The API reference, from the docstrings.")
    parser.add_argument("--write", metavar="FILE", help="write it there instead of standard output")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.write:
        Path(arguments.write).write_text(api(), encoding="utf-8")
    else:
        print(api(), end="")
