"""Tokenizers: the one interface, the byte tokenizer, loading from a path, and text that grows.

A tokenizer has two kinds of named token. *Special* tokens (`<|im_start|>`, `</s>`) hold the
structure of a chat; `encode` makes them only where the caller says so, so text from a data row
never forges one. *Markup* tokens (`<think>`, `<tool_call>`) are ordinary vocabulary that happens to
be one piece; they are recognised in any text, as the published chat formats do.

`sentencepiece_tokenizer.py` and `hf_tokenizer.py` hold the two that read files. Left out: training
a tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Encoding(NamedTuple):
  """Token ids with the half-open range of characters that each one stands for.

  Several tokens of one character share its range. Ranges never decrease.
  """

  ids: list[int]  # [T]
  offsets: list[tuple[int, int]]  # [T]


class Tokenizer(Protocol):
  """What the rest of the code may ask of a tokenizer."""

  name: str  # for error messages: "bytes" or the path it came from
  vocab_size: int  # one more than the largest id
  pad_id: int | None
  bos_id: int | None
  eos_id: int | None
  special_tokens: Mapping[str, int]  # the pieces that plain text never becomes
  template_variables: Mapping[str, str]  # `bos_token`, `eos_token`... as a chat template reads them
  chat_template: str | None  # jinja that came with the tokenizer

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Returns the ids of `text`; strings of special tokens become them only if `special`."""
    ...

  def encode_with_offsets(
    self, text: str, *, special: bool = False, first: bool = True
  ) -> Encoding:
    """As `encode`, with character ranges. `first=False`: the text continues an earlier one."""
    ...

  def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
    """Returns the text of `ids`, with or without special tokens.

    Bytes that are not UTF-8 become U+FFFD. An id without a piece (a row that only pads the
    embedding table, which an untrained model may sample) becomes nothing.
    """
    ...

  def token_id(self, piece: str) -> int:
    """Returns the id of one piece. Raises: ValueError if the vocabulary has no such piece."""
    ...

  def token_bytes(self) -> list[bytes]:
    """Returns the bytes that each id adds to a text, [vocab_size]; none for special tokens and ids
    without a piece. Raises: ValueError where a piece's bytes depend on its neighbours."""
    ...


def missing_piece(tokenizer: Tokenizer, piece: str) -> ValueError:
  """The error for a piece that a tokenizer does not have."""
  return ValueError(
    f"tokenizer {tokenizer.name}: {piece!r} is not in its vocabulary of {tokenizer.vocab_size}"
  )


def piece_bytes(piece: str, *, byte_fallback: bool) -> bytes:
  """The bytes of a SentencePiece piece: `▁` is a space, `<0x0A>` a byte if there are such."""
  if byte_fallback and (match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece)):
    return bytes.fromhex(match[1])
  return piece.replace("\u2581", " ").encode()


SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")


class ByteTokenizer:
  """UTF-8 bytes are ids 0 to 255, named tokens follow; no files needed.

  Args:
    special: special tokens; `<|pad|>` and `<|endoftext|>` among them are the pad and end tokens.
    markup: pieces of one token that any text may contain.
    multiple: `vocab_size` is rounded up to a multiple of it, so that an embedding table shards.
  Raises:
    ValueError: a name that is empty or given twice.
  """

  name: str = "bytes"
  chat_template: str | None = None

  def __init__(
    self, special: Sequence[str] = SPECIAL, markup: Sequence[str] = MARKUP, multiple: int = 16
  ):
    named = [*special, *markup]
    if "" in named or len(set(named)) < len(named):
      raise ValueError(
        f"tokenizer bytes: named tokens must be distinct and not empty, found {named}"
      )
    self._ids = {piece: 256 + i for i, piece in enumerate(named)}
    self._pieces = {i: piece for piece, i in self._ids.items()}
    self.vocab_size = -(-(256 + len(named)) // multiple) * multiple
    self.special_tokens: Mapping[str, int] = {piece: self._ids[piece] for piece in special}
    self.pad_id: int | None = self.special_tokens.get("<|pad|>")
    self.bos_id: int | None = None
    self.eos_id: int | None = self.special_tokens.get("<|endoftext|>")
    self.template_variables: Mapping[str, str] = {
      name: piece
      for name, piece in (("pad_token", "<|pad|>"), ("eos_token", "<|endoftext|>"))
      if piece in self.special_tokens
    }
    self._split_all = _splitter(named)
    self._split_markup = _splitter(markup)

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    return self.encode_with_offsets(text, special=special).ids

  def encode_with_offsets(
    self, text: str, *, special: bool = False, first: bool = True
  ) -> Encoding:
    del first  # bytes have no word boundaries
    ids, offsets, at = [], [], 0
    for part in (self._split_all if special else self._split_markup).split(text):
      if part in self._ids and (special or part not in self.special_tokens):
        ids.append(self._ids[part])
        offsets.append((at, at + len(part)))
      else:
        for i, character in enumerate(part, start=at):
          data = character.encode("utf-8", errors="replace")
          ids.extend(data)
          offsets.extend([(i, i + 1)] * len(data))
      at += len(part)
    return Encoding(ids, offsets)

  def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
    data = bytearray()
    for i in map(int, ids):
      if i < 256:
        data.append(i)
      elif i in self._pieces and (special or self._pieces[i] not in self.special_tokens):
        data += self._pieces[i].encode()
    return data.decode("utf-8", errors="replace")

  def token_id(self, piece: str) -> int:
    if piece not in self._ids:
      raise missing_piece(self, piece)
    return self._ids[piece]

  def token_bytes(self) -> list[bytes]:
    named = {i: p for i, p in self._pieces.items() if p not in self.special_tokens}
    first = [bytes([i]) for i in range(256)]
    return first + [named.get(i, "").encode() for i in range(256, self.vocab_size)]


def _splitter(pieces: Sequence[str]) -> re.Pattern[str]:
  """A pattern whose `split` keeps the pieces; the longest wins where two start together."""
  longest_first = sorted(pieces, key=len, reverse=True)
  return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def load_tokenizer(path: str | Path) -> Tokenizer:
  """Returns the tokenizer at `path`.

  Args:
    path: "bytes"; a SentencePiece `.model` file; a `tokenizer.json`; or a folder that holds either
      (`tokenizer.json` first).
  Raises:
    ValueError: nothing there that can be read as a tokenizer.
  """
  if str(path) == "bytes":
    return ByteTokenizer()
  from pt_jax.data.hf_tokenizer import HFTokenizer
  from pt_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer

  path = Path(path)
  if path.is_dir():
    if (path / "tokenizer.json").is_file():
      return HFTokenizer(path)
    if (path / "tokenizer.model").is_file():
      return SentencePieceTokenizer(path / "tokenizer.model")
    raise ValueError(f"tokenizer {path}: the folder has no tokenizer.json and no tokenizer.model")
  if not path.is_file():
    raise ValueError(f'tokenizer {path}: no such file or folder (and it is not "bytes")')
  if path.suffix == ".json":
    return HFTokenizer(path)
  if path.suffix == ".model":
    return SentencePieceTokenizer(path)
  raise ValueError(f"tokenizer {path}: expected a .json or .model file")


class IncrementalDetokenizer:
  """Text of a growing list of tokens, for stop strings and streaming.

  `push` returns only whole characters: while the last one may still grow, it is held back. The
  pieces that `push` and the final `flush` return, joined, are `tokenizer.decode` of all the tokens.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._shown = 0  # tokens whose text has been returned
    self._context = 0  # first token that is decoded again, so that spaces between words survive
    self.text = ""  # all that has been returned

  def push(self, token: int) -> str:
    """Takes the next token and returns the text that it completes, often but not always its own."""
    self._ids.append(int(token))
    return self._advance(final=False)

  def flush(self) -> str:
    """Returns what was held back; a character that never came to its end is U+FFFD."""
    return self._advance(final=True)

  def _advance(self, *, final: bool) -> str:
    before = self._tokenizer.decode(self._ids[self._context : self._shown])
    now = self._tokenizer.decode(self._ids[self._context :])
    if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
      return ""
    self._context, self._shown = self._shown, len(self._ids)
    piece = now[len(before) :]
    self.text += piece
    return piece
