"""YAML for run specs: the 1.2 scalars, no repeated keys, and the line of every field.

PyYAML reads YAML 1.1, where `3e-4` is text, `no` is false, `1:30` is 90 and `2024-01-01` is a date. Here numbers are
numbers, only true and false are booleans, and everything else is text.

ruamel.yaml 0.19, which reads YAML 1.2, was tried: it imports as fast (15 ms), but reads a spec of 3 KiB in 14 to 18 ms
against 10, makes a date of `2024-01-01` and 12 of `012`, names the first repeated key alone, and counts neither depth
nor aliases, so that of what is below only the table of scalars would be shorter.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from trimaran.runtime.spec.errors import FieldError, show
from trimaran.runtime.spec.tree import step

_SCALARS: Final = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
            r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
            r"|^\.(?:nan|NaN|NAN)$"
        ),
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN"),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), "<"),
)


# PyYAML reads some 10,000 values or 300,000 characters a second, and looks at every open bracket for each further one.
# A spec with every field has 350 values in 8 KiB, and its lists have room for 2,300 more.
MOST_BYTES: Final = 128 << 10
_MOST_VALUES: Final = 3000
MOST_DEPTH: Final = 32
_MOST_DIGITS: Final = 400  # a whole number of more is no number of any field
SHORTER: Final = "a spec with every field has 8 KiB; where data.source names many files, name folders or globs instead"
"""The remedy for a spec beyond these bounds."""
_PLAIN_TAGS: Final = ("bool", "float", "int", "map", "null", "seq", "str")


class _SpecLoader(yaml.SafeLoader):
    """SafeLoader with the scalars above, and bounds: values are counted with aliases written out."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012  PyYAML's own class attribute
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN_TAGS
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0
        self._counts: dict[yaml.Node, int] = {}  # of every value that has been read to its end

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        """Return the next value; PyYAML calls this for each one and for each alias."""
        mark, before = self.peek_event().start_mark, self._count  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = self._compose(parent, index)
            if node not in self._counts:
                raise ComposerError(None, None, "an alias stands inside the value that it names", mark)
            self._count += self._counts[node]
        else:
            self._count += 1
            node = self._compose(parent, index)
            self._counts[node] = self._count - before
        if self._count > _MOST_VALUES:
            fix = "write the values out, without aliases" if self.anchors else SHORTER
            rule = f"holds more than {_MOST_VALUES:,} values" + ", with aliases written out" * bool(self.anchors)
            raise _TooMuchError(rule, mark.line + 1, fix)
        return node

    def _compose(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        self._check_depth(self._depth, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None, "PyYAML calls for a value where there is one"
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Return the next scalar; PyYAML calls this for each one. Surrogates that JSON has in pairs are joined."""
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        try:
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            rule = "a text has half a surrogate pair, which is no character"
            raise ComposerError(None, None, rule, node.start_mark) from None
        if node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
            raise ComposerError(None, None, f"a number has {len(node.value):,} digits", node.start_mark)
        return node

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Read an opening bracket; PyYAML calls this for each one."""
        self._check_depth(self.flow_level, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def _check_depth(self, depth: int, mark: yaml.Mark) -> None:
        if depth >= MOST_DEPTH:
            rule = f"has values inside each other, more than {MOST_DEPTH} deep"
            raise _TooMuchError(rule, mark.line + 1, "close brackets, and indent less")

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; PyYAML calls this for each one."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # PyYAML's constructors fail so on tagged scalars such as `!!bool maybe`
            problem = f"{show(node.value)} is no !!{node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, problem, node.start_mark) from None


class _TooMuchError(Exception):
    """The text is beyond the bounds of a spec. Arguments: the rule, the line, counted from 1, and the remedy."""


class _SpecDumper(yaml.SafeDumper):
    """SafeDumper that also puts quotes around text which the scalars above would read as something else."""


for _tag, _pattern, _first in _SCALARS:
    _SpecDumper.add_implicit_resolver(_tag, _pattern, list(_first))
    _SpecLoader.add_implicit_resolver(_tag, _pattern, [*_first, ""] if _tag.endswith("null") else list(_first))


@dataclass
class YamlText:
    """What a YAML text holds.

    Attributes:
        value: the document as plain Python values; None where it could not be read.
        lines: line of every path, counted from 1; None for what does not stand in the text.
        errors: what is wrong with the text itself.
    """

    value: object = None
    lines: dict[str, int | None] = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)


def read_yaml(text: str, name: str) -> YamlText:
    """Return the value, the lines and the errors of a YAML text; never raises for what stands in it.

    Args:
        text: the document.
        name: what errors call it.
    """
    result = YamlText()
    try:
        loader = _SpecLoader(text)
        node = loader.get_single_node()
        if node is not None:
            result.lines = dict(_lines(node, ""))
            result.errors = list(_repeated_keys(node, "", set()))
            result.value = loader.construct_document(node)
    except _TooMuchError as error:
        rule, line, fix = error.args
        result.errors.append(FieldError(name, rule, None, fix, line))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else None
        result.errors.append(FieldError(name, f"is not valid YAML: {words}", None, _yaml_hint(words), line))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        result.errors.append(FieldError(name, f"is not valid YAML: {error.reason}", None, "remove the character", line))
    return result


def write_yaml(value: object) -> str:
    """Return the value as YAML text that `read_yaml` gives back unchanged."""
    return str(yaml.dump(value, Dumper=_SpecDumper, sort_keys=False, allow_unicode=True, width=120))


# Words of PyYAML's and of the errors above, and the remedy.
_HINTS: Final = {
    "\\t": "indent with spaces, not tabs",
    "mapping values are not allowed": "check the indentation, and put text with a colon in quotes",
    "an alias stands inside": "write the value out",
    "single document": "keep one document a file; remove the line ---",
    "for merging": "let << name a section with an anchor, such as <<: *base",
    "unhashable key": "write a name before the colon",
    "surrogate": "write the character itself",
    "digits": "write a smaller number",
    "alias": "define the anchor above it, or put a text that begins with * in quotes",
    "duplicate anchor": "give each anchor a name of its own",
    " is no !!": "write plain numbers, text and lists, without !! tags",
    " constructor for the tag": "write plain numbers, text and lists, without !! tags",
    " node, but found": "write plain numbers, text and lists, without !! tags",
}


def _yaml_hint(words: str) -> str:
    fitting = (hint for part, hint in _HINTS.items() if part in words)
    return next(fitting, "check brackets, quotes and indentation around that line")


def _lines(node: yaml.Node, path: str) -> Iterator[tuple[str, int]]:
    """Yield every path below `path` with its line; the number of values with aliases written out is bounded."""
    found: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        found = [(step(path, str(key.value)), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        found = [(step(path, index), item, item) for index, item in enumerate(node.value)]
    for inner, mark, value in found:
        yield inner, mark.start_mark.line + 1
        yield from _lines(value, inner)


def _repeated_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[FieldError]:
    """Yield an error for every key that its mapping already has; PyYAML would silently keep the last."""
    # An alias brings the same node again, and a circular one would never end.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, step(path, index), seen)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first and key.tag != "tag:yaml.org,2002:merge":
                rule = f"is given twice in the same place, first on line {first[name]}"
                yield FieldError(step(path, name), rule, None, "keep one of them", line)
            first.setdefault(name, line)
            yield from _repeated_keys(value, step(path, name), seen)
