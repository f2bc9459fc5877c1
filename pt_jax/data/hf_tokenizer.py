"""Hugging Face tokenizers: `tokenizer.json` and the small files beside it, without transformers."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from pt_jax.data.tokenizers import Encoding, missing_piece, piece_bytes

_NAMED = (
  "bos_token",
  "eos_token",
  "pad_token",
  "unk_token",
  "sep_token",
  "cls_token",
  "mask_token",
)

_PIECEWISE = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "none")


def _byte_level() -> dict[str, int]:
  """The characters that stand for bytes in byte-level BPE (GPT-2): those that print stand for
  themselves, the others for what comes from U+0100 on."""
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printed]
  return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class HFTokenizer:
  """A `tokenizer.json`. Tokens flagged special there are special; other added tokens are markup.

  Beside it are read `tokenizer_config.json` and `special_tokens_map.json` (names of the special
  tokens), and `chat_template.jinja` (which goes before the config's `chat_template`).

  Args:
    path: the folder, or the `tokenizer.json` itself (then nothing beside it is read).
  Raises:
    ValueError: a file that is missing or cannot be parsed, or a named token that has no id.
  """

  def __init__(self, path: str | Path):
    path = Path(path)
    self.name = str(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
      line = " ".join(str(error).split())[:200]
      raise ValueError(f"tokenizer {file}: not a tokenizer.json ({line})") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    config = _read_json(path / "tokenizer_config.json") if path.is_dir() else {}
    legacy = _read_json(path / "special_tokens_map.json") if path.is_dir() else {}
    self._read_special({**legacy, **{k: v for k, v in config.items() if v is not None}})
    self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
    self.chat_template = _chat_template(path, config)

  def _read_special(self, config: dict) -> None:
    named = {k: _content(config[k]) for k in _NAMED if config.get(k)}
    for key, piece in named.items():
      if self._tokenizer.token_to_id(piece) is None:
        raise ValueError(f"tokenizer {self.name}: {key} is {piece!r}, which has no id")
    added = self._tokenizer.get_added_tokens_decoder()
    flagged = {token.content for token in added.values() if token.special}
    self._tokenizer.add_special_tokens([p for p in named.values() if p not in flagged])
    added = self._tokenizer.get_added_tokens_decoder()
    self.special_tokens: Mapping[str, int] = {
      token.content: i for i, token in added.items() if token.special
    }
    self.template_variables: Mapping[str, str] = named
    self.bos_id: int | None = self.special_tokens.get(named.get("bos_token", ""))
    self.eos_id: int | None = self.special_tokens.get(named.get("eos_token", ""))
    self.pad_id: int | None = self.special_tokens.get(named.get("pad_token", ""))

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """The same tokenizer, reading special tokens as text."""
    plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    return self.encode_with_offsets(text, special=special).ids

  def encode_with_offsets(
    self, text: str, *, special: bool = False, first: bool = True
  ) -> Encoding:
    tokenizer = self._tokenizer if special else self._plain
    encoding = tokenizer.encode(text if first else "\n" + text, add_special_tokens=False)
    if first:
      return Encoding(encoding.ids, encoding.offsets)
    # A word-boundary mark goes to a newline in front, then taken away, as transformers does it.
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    if encoding.ids[: len(newline)] != newline:
      return self.encode_with_offsets(text, special=special)
    offsets = [(max(a - 1, 0), b - 1) for a, b in encoding.offsets[len(newline) :]]
    return Encoding(encoding.ids[len(newline) :], offsets)

  def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)

  def token_id(self, piece: str) -> int:
    i = self._tokenizer.token_to_id(piece)
    if i is None:
      raise missing_piece(self, piece)
    return i

  def token_bytes(self) -> list[bytes]:
    decoder = json.loads(self._tokenizer.to_str())["decoder"] or {"type": "none"}
    kinds = {d["type"] for d in decoder.get("decoders", [decoder])}
    if unknown := kinds - {"ByteLevel", *_PIECEWISE}:
      raise ValueError(f"tokenizer {self.name}: bytes of a token under decoder {min(unknown)!r}")
    added = self._tokenizer.get_added_tokens_decoder()
    out = [b""] * self.vocab_size
    for piece, i in self._tokenizer.get_vocab().items():
      if i in added:
        out[i] = b"" if added[i].special else added[i].content.encode()
      elif "ByteLevel" in kinds:
        out[i] = bytes(_BYTE_LEVEL[character] for character in piece)
      else:
        out[i] = piece_bytes(piece, byte_fallback="ByteFallback" in kinds)
    return out


def _read_json(path: Path) -> dict:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"tokenizer {path}: not JSON ({error})") from error
  if not isinstance(value, dict):
    raise ValueError(f"tokenizer {path}: expected a JSON object, found {type(value).__name__}")
  return value


def _content(token: str | dict) -> str:
  """The string of a token that may be written as an object."""
  return token["content"] if isinstance(token, dict) else token


def _chat_template(path: Path, config: dict) -> str | None:
  if (path / "chat_template.jinja").is_file():
    return (path / "chat_template.jinja").read_text(encoding="utf-8")
  template = config.get("chat_template")
  if isinstance(template, list):  # several named ones: take the default, as transformers does
    template = {t["name"]: t["template"] for t in template}.get("default")
  return template
