"""What the reference's build adds to mkdocs and griffe: SRDConfig's fields, links to the checkout.

Griffe reads the sources and imports nothing.
"""

import ast
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
# How the docstrings are read, here and in mkdocs.yml: what is returned is one text, however many lines it has.
PARSING = {"returns_multiple_items": False}
log = logging.getLogger("mkdocs.hooks.reference")


class Reference(griffe.Extension):
    """Griffe's view of the package as it is installed, with the texts of SRDConfig's fields."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Read `name: type = _described(default, text)` as a field with that default and that docstring."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "_described":
            default, text = call.arguments
            attr.value = default
            attr.docstring = griffe.Docstring(ast.literal_eval(str(text)), parent=attr)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Put such fields into the class's docstring, where they become one table with types and defaults."""
        if cls.name != "SRDConfig" or cls.docstring is None:
            return
        fields = [m for m in cls.members.values() if m.is_attribute and m.docstring and "property" not in m.labels]
        lines = ["Args:"]
        for m in fields:
            assert m.docstring is not None
            lines.append(f"    {m.name}: {m.docstring.value}")
            m.docstring = None
        text, raises, errors = cls.docstring.value.partition("Raises:")
        cls.docstring.value = text + "\n".join(lines) + "\n\n" + raises + errors

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Correct names that griffe takes for a module."""
        if pkg.path != "srd_fast":
            return
        for name, member in list(pkg.members.items()):
            # `from .reflection import reflect`: the function, which griffe takes for the module of the same name.
            target = loader.modules_collection.get_member(member.target_path) if is_own(member) else None
            if target is not None and target.is_module and name in target.members:
                pkg.set_member(name, griffe.Alias(name, f"{target.path}.{name}", parent=pkg))


def is_own(member: griffe.Object | griffe.Alias) -> bool:
    """Whether a member is another name of something in the package."""
    return isinstance(member, griffe.Alias) and member.target_path.startswith("srd_fast.")


def load() -> griffe.Module:
    """The package `srd_fast` as the reference sees it, with aliases resolved."""
    loader = griffe.GriffeLoader(
        extensions=griffe.load_extensions(Reference),
        search_paths=[ROOT],
        docstring_parser=griffe.Parser.google,
    )
    package = loader.load("srd_fast")
    loader.resolve_aliases(implicit=True, external=False)
    assert isinstance(package, griffe.Module)
    return package


CHANGELOG = "changelog.md"


def on_files(files: "Files", *, config: "MkDocsConfig") -> None:
    """Make a page of the checkout's changelog."""
    from mkdocs.structure.files import File

    # It stands beside what it links to, pages a folder below.
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, CHANGELOG, content=re.sub(r"\]\((?!http|#)", "](../", text)))


_LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)")


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Name files of the checkout instead of linking to them, which a built page cannot; warn of those not there."""

    def named(link: re.Match[str]) -> str:
        text, path = link.groups()
        if not (ROOT / path).exists():
            log.warning("%s links to ../%s, which is not there", page.file.src_path, path)
        return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"

    return markdown if "/" in page.file.src_path else _LINK.sub(named, markdown)


# A line's code, and a cell of a table. What is longer than a telephone is wide may be broken all the same.
_TEXT = re.compile(r"<pre.*?</pre>|(?P<tag><code>|<t[dh][^>]*>)(?P<text>[^<]+)", re.DOTALL)
_WHOLE = re.compile(
    r"""(?<!\S)(?: \[?[-+]?[\d.,]+[ ](?:[±x][ ])?[-+]?[\d.,]+\]? | (?=\S*-)\S{1,30} )(?!\S)""", re.VERBOSE
)
_OPTION = re.compile(r"(?<=>)--?[a-z][\w-]{0,30}(?=<|\s)")
_MARKED = r'<span class="whole">\g<0></span>'
_PICTURE = re.compile(r"<picture>(.*?)</picture>", re.DOTALL)
_DARK_SOURCE = re.compile(r"<source [^>]*prefers-color-scheme: dark[^>]*>\s*")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Mark what a line may not break, such as `--all` or `1.52 ± 0.01`, and let pictures follow the page's scheme."""

    def kept_whole(found: re.Match[str]) -> str:
        if found["tag"] is None:
            return _OPTION.sub(_MARKED, found[0])
        return found["tag"] + _WHOLE.sub(_MARKED, found["text"])

    def of_both_pages(picture: re.Match[str]) -> str:
        light = _DARK_SOURCE.sub("", picture[1])
        dark = light.replace("-light.svg", "-dark.svg")
        return f'<picture class="on-light">{light}</picture><picture class="on-dark">{dark}</picture>'

    return _PICTURE.sub(of_both_pages, _TEXT.sub(kept_whole, html))
