"""The chats and truths that `tests/oracles/make_chat_templates.py` froze."""

import functools
import json
import pathlib

from pt_jax.data.chat_templates import ChatTemplate, load_template
from pt_jax.data.tokenizers import Tokenizer, load_tokenizer

FOLDER = pathlib.Path(__file__).parents[1] / "oracles" / "chat"
GOLDEN = json.loads((FOLDER / "templates.json").read_text(encoding="utf-8"))
CHATS = GOLDEN["chats"]


@functools.cache
def tokenizer(name: str = "byte_level") -> Tokenizer:
  return load_tokenizer(FOLDER / name)


def template(case: dict) -> ChatTemplate:
  return load_template(case["template"], variables=case["variables"])


def label(case: dict) -> str:
  """What pytest calls a case of `published` or `built_in`."""
  parts = [case["template"], *case["variables"], case.get("original", case.get("tokenizer"))]
  return "-".join(map(str, parts))
