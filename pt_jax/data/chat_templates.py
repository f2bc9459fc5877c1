"""Chat templates: jinja sources that turn messages into text, run as transformers runs them.

`{% generation %}` blocks, and text that the caller wants to find again, carry marks through the
rendering: Unicode noncharacters (U+FDD0 to U+FDD5), which no exchanged text may hold. `strip_marks`
takes them out and says where they were. So the environment needs no state, and positions are those
of the text itself.

Left out: documents, images, and tools given as Python functions (give their JSON schema).
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from pt_jax.data.tokenizers import Tokenizer

GENERATED = "\ufdd0\ufdd1"  # opens and closes a generation block
LITERAL = "\ufdd2\ufdd3"  # around a special token's string that came from a message
RESULT = "\ufdd4\ufdd5"  # around the content of a tool message
_MARK = re.compile(f"([{GENERATED}{LITERAL}{RESULT}])")


@dataclasses.dataclass(frozen=True)
class Rendering:
  """A rendered chat; spans are half-open character ranges of `text`, in order."""

  text: str
  generated: tuple[tuple[int, int], ...]  # the template's {% generation %} blocks
  literal: tuple[tuple[int, int], ...]  # special-token strings that came from a message
  result: tuple[tuple[int, int], ...]  # contents of tool messages, if they were marked


def strip_marks(marked: str) -> Rendering:
  """Takes the marks out of a rendered text.

  Raises: ValueError if a mark lost its partner (the template cut a marked text in two).
  """
  pieces, at = [], 0
  found: dict[str, list[int]] = {m: [] for m in GENERATED + LITERAL + RESULT}
  for piece in _MARK.split(marked):
    if piece in found:
      found[piece].append(at)
    else:
      pieces.append(piece)
      at += len(piece)
  spans = []
  for opening, closing in (GENERATED, LITERAL, RESULT):
    if len(found[opening]) != len(found[closing]):
      raise ValueError("the template cuts a message at a special token's text")
    spans.append(tuple(zip(found[opening], found[closing])))
  return Rendering("".join(pieces), *spans)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat template; `load_template` makes one."""

  name: str  # for error messages
  source: str  # jinja
  variables: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  think: tuple[str, str] = ("<think>", "</think>")  # what stands around reasoning in the rendering
  tool_call: tuple[str, str] = ("<tool_call>", "</tool_call>")  # and around a call

  @property
  def has_generation_marks(self) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

  def run(self, variables: Mapping[str, Any]) -> str:
    """Returns the rendering, marks included.

    Raises: ValueError with what the template objected to.
    """
    named = {n: _MissingToken(name=n) for n in ("bos_token", "eos_token")}
    try:
      return _compiled(self.source).render({**named, **variables, **self.variables})
    except (jinja2.TemplateError, TypeError, KeyError) as error:
      raise ValueError(f"template {self.name!r}: {error}") from error


# name: (file, variables). Licences of the originals differ; these files were written for pt_jax to
# give the same text.
BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
  "chatml": ("chatml", {}),
  "qwen2_5": (
    "chatml",
    {
      "default_system": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    },
  ),
  "qwen3": ("qwen3", {}),
  "llama3": ("llama3", {}),
  "llama3_1": ("llama3_1", {}),
  "gemma": ("gemma", {}),
  "plain": ("plain", {}),
}


def load_template(
  template: str | Path, *, tokenizer: Tokenizer | None = None, variables: Mapping | None = None
) -> ChatTemplate:
  """Returns a chat template that compiles.

  Args:
    template: a built-in name (`BUILT_IN`), "tokenizer" for the one that came with `tokenizer`, a
      path that ends in `.jinja`, or jinja source.
    variables: values for variables of the template, such as `{"preserve_thinking": True}` (qwen3)
      or `{"date_string": "26 Jul 2024"}` (llama3_1).
  Raises:
    ValueError: no such template, a syntax error, or a variable that the template does not read.
  """
  name, source, preset = _source(str(template), tokenizer)
  chosen = {**preset, **(variables or {})}
  unread = sorted(set(chosen) - _variables(name, source))
  if unread:
    raise ValueError(f"chat template {name!r} reads no variable {unread[0]!r}")
  return ChatTemplate(name, source, chosen)


def _source(template: str, tokenizer: Tokenizer | None) -> tuple[str, str, dict[str, Any]]:
  """Returns name, jinja source and preset variables."""
  if template == "tokenizer":
    if tokenizer is None or tokenizer.chat_template is None:
      raise ValueError(f"tokenizer {getattr(tokenizer, 'name', None)} brings no chat template")
    return f"template of {tokenizer.name}", tokenizer.chat_template, {}
  if template in BUILT_IN:
    file, preset = BUILT_IN[template]
    path = resources.files("pt_jax.data") / "templates" / f"{file}.jinja"
    return template, path.read_text(encoding="utf-8"), preset
  if "{{" in template or "{%" in template:
    return "given as jinja", template, {}
  if template.endswith(".jinja") and Path(template).is_file():
    return template, Path(template).read_text(encoding="utf-8"), {}
  raise ValueError(
    f"no chat template {template!r}: expected one of {', '.join(BUILT_IN)}, 'tokenizer', "
    "a .jinja file or jinja source"
  )


def _variables(name: str, source: str) -> set[str]:
  try:
    _compiled(source)
    return jinja2.meta.find_undeclared_variables(_environment().parse(source))
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(f"chat template {name!r}, line {error.lineno}: {error.message}") from error


class _Generation(jinja2.ext.Extension):
  """`{% generation %} ... {% endgeneration %}`: what the assistant wrote."""

  tags = {"generation"}  # noqa: RUF012  (jinja declares it a set)

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

  def _mark(self, caller: Callable[[], str]) -> str:
    return GENERATED[0] + caller() + GENERATED[1]


class _MissingToken(jinja2.Undefined):
  """A special token the tokenizer lacks: it may be asked for (`if bos_token`), not written."""

  def __str__(self) -> str:
    raise jinja2.UndefinedError(f"it writes {self._undefined_name}, which the tokenizer lacks")


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


@functools.cache
def _environment() -> jinja2.Environment:
  """The sandbox of transformers' `apply_chat_template` (utils/chat_template_utils.py, 5.23)."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson
  known = cast(dict[str, Any], environment.globals)
  known["raise_exception"] = _raise_exception
  known["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
  return environment


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
  return _environment().from_string(source)
