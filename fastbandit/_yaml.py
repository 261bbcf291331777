"""Settings in YAML, read strictly: what a reader could take in two ways is refused.

YAML lets a file name a key twice, of which the last counts, and lets a few lines stand for a
billion values. Neither has a place in settings, which may be a stranger's.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from fastbandit._files import _HALF

__all__ = ["LARGEST_YAML", "parse_yaml"]

#: Bytes of a file of settings; ours have three thousand.
LARGEST_YAML = 64 * 2**10

_DEEPEST = 64
# Values after every alias is replaced by what it stands for.
_MOST_VALUES = 100_000
_LONGEST_NUMBER = 100  # characters


class _Loader(yaml.SafeLoader):
    """Safe values only, each key once, within bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of whole nodes, by id; the document keeps them alive
        self._nodes: list[Node] = []
        # The keys of each mapping as they are written: a merge (<<) adds others to the node.
        self._keys: dict[int, list[Node]] = {}

    def compose_node(self, parent: Any, index: Any) -> Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._refuse(f"nested deeper than {_DEEPEST} levels", self.peek_event())
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            if alias is not None:  # what it stands for is not whole yet
                self._refuse("a value that holds itself", alias)
            self._sizes[id(node)] = self._size(node)
            self._nodes.append(node)
        return node

    def _size(self, node: Node) -> int:
        if isinstance(node, ScalarNode):
            if _HALF.search(node.value):
                self._refuse("half a character (a lone surrogate)", node)
            return 1
        parts = node.value
        if isinstance(node, MappingNode):
            parts = [part for pair in node.value for part in pair]
            self._keys[id(node)] = parts[::2]
        size = 1 + sum(self._sizes[id(part)] for part in parts)
        if size > _MOST_VALUES:
            self._refuse(f"more than {_MOST_VALUES:,} values", node)
        return size

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node in self._keys.get(id(node), ()):
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
            except TypeError:  # a list as a key, which is refused below
                continue
            if twice:
                self._refuse(f"the key {key!r:.80} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        self._check_number(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        self._check_number(node)
        return super().construct_yaml_float(node)

    def _check_number(self, node: Any) -> None:
        if isinstance(node, ScalarNode) and len(node.value) > _LONGEST_NUMBER:
            self._refuse(f"a number of more than {_LONGEST_NUMBER} characters", node)

    def _refuse(self, problem: str, place: Any) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, plain values only.

    Raises:
        ValueError: not YAML, a key given twice in one mapping, nested deeper than 64 levels, more
            than 100,000 values with every alias written out, or text with half a character. The
            message is one line and says where.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # A character that YAML forbids, the 30th of February, a number too large for Python.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(reason) from None
    finally:
        if loader is not None:
            loader.dispose()
