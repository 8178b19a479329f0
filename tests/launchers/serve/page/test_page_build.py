"""The page of serve is one document that fetches nothing, and its policy allows its own script and style alone."""

import base64
import hashlib
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import trimaran.launchers.serve.page as package
from trimaran.launchers.serve.page import MODULES, STYLES, build_page

FOLDER = Path(package.__file__).parent
_IMPORTS = re.compile(r'^import \{ ([^}]*) \} from "\./(\w+\.js)";$', re.MULTILINE)
_EXPORTS = re.compile(r"^export (?:async )?(?:function\*?|class|const) (\w+)", re.MULTILINE)


def test_the_policy_allows_the_script_and_the_style_by_their_hashes() -> None:
    page = build_page()
    html = page.html.decode()
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        assert len(contents) == 1
        digest = base64.b64encode(hashlib.sha256(contents[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in page.csp
    assert page.csp.startswith("default-src 'none'; ")
    assert "unsafe" not in page.csp
    assert "require-trusted-types-for 'script'" in page.csp


def test_the_document_fetches_nothing_and_has_no_script_in_attributes() -> None:
    html = build_page().html.decode()
    addresses = re.findall(r'\s(?:src|href)="([^"]*)"', html)
    assert addresses
    assert all(each.startswith(("#", "data:image/svg+xml,")) for each in addresses), addresses
    assert not re.search(r"@import|url\(", html)
    assert not re.search(r'\s(on\w+|style)="', html)
    assert len(html) < 120_000, "a page that is loaded at once"


def test_every_module_is_in_the_page_and_imports_only_what_stands_before_it() -> None:
    assert sorted(MODULES) == sorted(path.name for path in FOLDER.glob("*.js"))
    assert sorted(STYLES) == sorted(path.name for path in FOLDER.glob("*.css"))
    exported: dict[str, set[str]] = {}
    for name in MODULES:
        source = (FOLDER / name).read_text()
        for names, module in _IMPORTS.findall(source):
            missing = {each.strip() for each in names.split(",")} - exported.get(module, set())
            assert not missing, f"{name} imports {sorted(missing)} from {module}"
        exported[name] = set(_EXPORTS.findall(source))
        assert len(source.splitlines()) <= 400, name
    script = build_page().html.decode()
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)


def test_every_source_of_the_page_is_installed_with_the_package() -> None:
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["trimaran.launchers.serve.page"]
    left_out = [path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"]
    left_out = [name for name in left_out if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert not left_out


def test_no_markup_is_ever_made_of_text() -> None:
    for name in MODULES:
        source = (FOLDER / name).read_text()
        wrong = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source)
        assert not wrong, f"{name}: {wrong}"
