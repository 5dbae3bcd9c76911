"""Build steps of the site: formulas become MathML, and docstrings become Markdown. Nothing is loaded from another site."""

import html
import re
from collections.abc import Callable
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object
from latex2mathml.converter import convert

# ---------------------------------------------------------------------------------------------------- formulas

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
"""A formula as ``pymdownx.arithmatex`` leaves it: TeX between marks, in an element of its own."""


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of one page, a mkdocs event."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found["open"] == "[" else "inline"
    tex = html.unescape(found["tex"]).strip()
    formula = convert(tex, display=display)
    if "\\" in re.sub(r"<annotation.*?</annotation>", "", formula, flags=re.DOTALL):
        raise ValueError(f"a command of TeX that latex2mathml does not know, in {tex}")
    return f'<div class="formula">{formula}</div>' if display == "block" else formula


# -------------------------------------------------------------------------------------------------- docstrings

_ROLE = re.compile(r":(?:class|meth|func|attr|data|mod|exc):`(?P<short>~?)(?P<name>[\w.]+)`")
_EXAMPLE = re.compile(r"(?:^>>>.*\n)(?:^(?!\s*$).*\n?)*", re.MULTILINE)
_LITERAL = re.compile(r"::\n\n(?=    )")


class Docstrings(Extension):
    """Turns what docstrings have of reStructuredText into Markdown: references, examples without a heading, literal blocks."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Change the docstrings of a package that was loaded."""
        _visit(pkg, lambda owner: _rewrite(owner, pkg))


def _visit(owner: Object, change: Callable[[Object], None]) -> None:
    change(owner)
    for member in owner.members.values():
        if not isinstance(member, Alias):
            _visit(member, change)


def _rewrite(owner: Object, package: Module) -> None:
    if owner.docstring is None:
        return

    def linked(found: re.Match[str]) -> str:
        name = found["name"]
        text = name.rpartition(".")[2] if found["short"] else name
        target = _target(name, owner, package)
        return f'<autoref identifier="{target}" optional><code>{text}</code></autoref>' if target else f"`{text}`"

    text = _ROLE.sub(linked, owner.docstring.value)
    text = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the word that the parser knows
    owner.docstring.value = _LITERAL.sub(":\n\n", text)


def _target(name: str, owner: Object, package: Module) -> str | None:
    """Full path of what a docstring refers to by a name: a member of its own class, of its module, or a full path."""
    scope: Any = owner
    while scope is not None:
        if name.partition(".")[0] in scope.members:
            return f"{scope.path}.{name}"
        scope = scope.parent
    return name if name.startswith(f"{package.path}.") else None
