"""Reading YAML that people write: it cannot execute code, and a key said twice is an error, not a silent choice."""

from typing import Any

import yaml

from distmeta.errors import UserError
from distmeta.storage import Location


class _Strict(yaml.SafeLoader):
    """The safe loader, which of a repeated key would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(location: Location, mend: str) -> Any:
    """What a YAML file holds.

    Raises:
        FileNotFoundError: there is none.
        UserError: naming the file and line: not YAML, a key twice, nested beyond reason; `mend` ends the sentence.
    """
    try:
        return yaml.load(location.read_bytes().decode(), Loader=_Strict)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None)
        why = f" ({problem.splitlines()[0]})" if problem else ""
        raise UserError(f"{location}{line}: not readable as YAML{why}; {mend}") from None
