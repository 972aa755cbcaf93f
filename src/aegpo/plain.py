"""What a user wrote, as plain values: texts, numbers, lists and mappings, of which YAML makes nothing else.

Nothing in a text can run code, stand twice unnoticed, or be so large or deep that it could not be said what is wrong.
"""

from typing import Any

import yaml

LETTERS, VALUES, DEPTH, BITS = 100_000, 10_000, 20, 64  # that settings may have at most, so that any can be printed


def parse_yaml(text: str) -> Any:
    """What YAML reads; raises ValueError where it cannot, or where that is more than settings could ever be."""
    if len(text) > LETTERS:
        raise ValueError(f"it is longer than {LETTERS:,} letters")
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # of what turns `!!timestamp x` and the like into values
        raise ValueError(f"a value is not what it is said to be ({type(error).__name__}: {error})") from None
    refuse_boundless(content)
    return content


class _Loader(yaml.SafeLoader):
    """Of plain values only, and of mappings in which no key stands twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[tuple[str, str]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def refuse_boundless(value: Any) -> None:
    """Raise ValueError for what has no end, as an alias within its own value, or could not be printed or be a path."""
    left, count = [(value, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > VALUES or depth > DEPTH:
            what = f"hold more than {VALUES:,} values" if count > VALUES else f"are nested more than {DEPTH} deep"
            raise ValueError(f"settings {what}, counting what stands behind each alias")
        if isinstance(value, int) and value.bit_length() > BITS:
            raise ValueError(f"settings hold a whole number of more than {BITS} bits")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("settings hold a zero byte, which neither a name nor a path can have")
        if isinstance(value, dict):
            left += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list | tuple | set):
            left += [(item, depth + 1) for item in value]
