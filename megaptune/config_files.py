"""Configuration files: safe YAML, layers, overrides, input paths, and readable validation problems."""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megaptune.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a repeated key (YAML keeps the last one silently) and reads 1e-3 as a number."""


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


class PathResolver:
    """Turns relative input paths into absolute ones, given the folder they are relative to."""

    def __init__(self, keys: tuple[str, ...], keep: Callable[[str], bool], unset: bool = False) -> None:
        self.keys, self.keep, self.unset = keys, keep, unset

    def __call__(self, raw: dict[str, Any], base: Path) -> None:
        for key in self.keys:
            section, name = key.split(".")
            holder = raw.get(section)
            value = holder.get(name) if isinstance(holder, dict) else None
            if isinstance(holder, dict) and isinstance(value, str):
                holder[name] = self.resolved(value, key, base)
            elif isinstance(holder, dict) and isinstance(value, list):
                holder[name] = [self.resolved(v, key, base) if isinstance(v, str) else v for v in value]
            elif isinstance(holder, dict) and isinstance(value, dict):
                found = {n: self.resolved(v, f"{key}.{n}", base) if isinstance(v, str) else v for n, v in value.items()}
                holder[name] = found

    def resolved(self, value: str, key: str, base: Path) -> str:
        if self.keep(value) or (self.unset and unset_variable(value)):
            return value
        return str((base / _expand(value, key)).resolve())


def _expand(value: str, key: str) -> str:
    unset = unset_variable(value)
    if unset:
        raise ConfigError(f"{key}: {value!r} uses the environment variable {unset}, which is not set")
    return os.path.expanduser(os.path.expandvars(value))


def unset_variable(value: str) -> str | None:
    """The first environment variable in a path that is not set."""
    unset = re.search(r"\$\{?(\w+)\}?", os.path.expandvars(value))
    return unset[1] if unset else None


def read_layers(path: Path, resolve: PathResolver, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file on top of the files that its ``defaults:`` list names."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `defaults:` goes in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        named_by = f" (named by `defaults:` in {seen[-1]})" if seen else ""
        raise ConfigError(f"cannot read the configuration file {path}{named_by}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    raw = _parse_yaml(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, found {type(raw).__name__}")
    layers = raw.pop("defaults", [])
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ConfigError(f"{path}: `defaults:` must be a list of files, found {layers!r}")
    resolve(raw, path.parent)
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, read_layers(path.parent / layer, resolve, (*seen, path)))
    _merge(merged, raw)
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def apply_override(raw: dict[str, Any], override: str, resolve: PathResolver) -> None:
    """Lay one ``a.b=value`` over ``raw``; the value is read as YAML."""
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: expected key=value, for example --set train.epochs=3")
    value: Any = _parse_yaml(text, f"--set {key}")
    for name in reversed(keys):
        value = {name: value}
    resolve(value, Path.cwd())
    _merge(raw, value)


def validated(schema: type[Schema], raw: dict[str, Any], source: str) -> Schema:
    """A plain mapping as an instance of ``schema``; ``source`` names it in the error.

    :raises ConfigError: with every problem found, and the nearest valid key for an unknown one.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [describe(problem, schema, raw) for problem in error.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(
            f"{source}: {count} in the configuration\n" + "\n".join(f"  - {line}" for line in lines)
        ) from None


def describe(problem: Any, root: type[BaseModel], raw: dict[str, Any]) -> str:
    """One pydantic problem as one line that names the key, what was found, and what to write."""
    location = _without_union_tags(problem["loc"], raw)
    key = ".".join(str(part) for part in location)
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key `{key}`{_nearest_key(key, root)}"
    if kind == "missing":
        return f"missing key `{key}`"
    if kind == "union_tag_invalid":
        expected = problem["ctx"]["expected_tags"]
        return f"`{key}.type`: {problem['ctx']['tag']!r} is not one of {expected}"
    if kind == "union_tag_not_found":
        return f"missing key `{key}.type` (lama, custom or superglue)"
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        return f"`{key}`: {message}" if key else message
    found = problem["input"]
    return f"`{key}`: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {found!r}"


def _without_union_tags(location: tuple[Any, ...], raw: dict[str, Any]) -> list[Any]:
    """Pydantic names the chosen member of a union inside the location; the file has no such level."""
    kept: list[Any] = []
    level: Any = raw
    for position, part in enumerate(location):
        inside = (isinstance(level, dict) and part in level) or (isinstance(level, list) and isinstance(part, int))
        if not inside and position < len(location) - 1:
            continue
        if not inside and isinstance(part, str) and ("[" in part or part in ("list", "literal")):
            continue
        kept.append(part)
        level = level[part] if inside else None
    return kept


def _nearest_key(key: str, root: type[BaseModel]) -> str:
    valid = list(all_keys(root))
    section, _, name = key.rpartition(".")
    if key in valid:
        return " for a task of this type (its `type` decides which keys it has)"
    siblings = [other for other in valid if other.rpartition(".")[0] == section]
    names = {other.split(".")[-1]: other for other in siblings}
    near = [names[found] for found in difflib.get_close_matches(name, names, n=1, cutoff=0.6)]
    if not near:  # the right name in the wrong section
        near = [other for other in valid if other.split(".")[-1] == name][:1]
    if not near:  # an abbreviation: lr for learning_rate
        near = [other for other in siblings if "".join(w[0] for w in other.split(".")[-1].split("_")) == name][:1]
    if near:
        return f", did you mean `{near[0]}`?"
    return f" (valid here: {', '.join(names)})" if names else ""


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, sections included."""
    found: dict[str, None] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = None
        for inner in _models_in(field.annotation):
            found.update(dict.fromkeys(all_keys(inner, f"{prefix}{name}.")))
    yield from found


def options_table(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of every option of a schema."""
    for name, field in model.model_fields.items():
        inner = list(_models_in(field.annotation))
        if not inner:
            kind = str(field.annotation).replace("typing.", "").replace("pathlib._local.", "").replace("pathlib.", "")
            kind = getattr(field.annotation, "__name__", kind) if "[" not in kind and "|" not in kind else kind
            default = "required" if field.is_required() else f"`{_as_yaml(field.default)}`"
            yield prefix + name, kind.replace("NoneType", "None"), default, field.description or ""
        for section in inner:
            tag = section.model_fields.get("type")
            only = f" ({get_args(tag.annotation)[0]})" if tag else ""
            named = f"{name}.<name>" if get_origin(field.annotation) is dict else name
            for key, kind, default, text in options_table(section, f"{prefix}{named}."):
                yield key, kind, default, text + only


def _as_yaml(value: Any) -> str:
    plain = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
