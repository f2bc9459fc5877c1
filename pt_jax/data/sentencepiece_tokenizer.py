"""SentencePiece models (`tokenizer.model`), with special tokens that text cannot forge."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

from pt_jax.data.tokenizers import Encoding, missing_piece, piece_bytes

# Protobuf makes these classes at import, where a type checker cannot see them.
_MODEL: Any = vars(sentencepiece_model_pb2)["ModelProto"]
_TEXT: Any = vars(sentencepiece_pb2)["SentencePieceText"]

# Gemma's model has its turn marks as user-defined symbols, which SentencePiece makes of any text.
_TURN_MARK = re.compile(r"<\|[^|\s]+\|>|<(start|end)_of_turn>")


class SentencePieceTokenizer:
  """A SentencePiece model. Control pieces and turn marks are special; other symbols are markup.

  Text after a special token gets no dummy prefix (`▁`), as in transformers' non-legacy Llama, so a
  chat decodes to what it was encoded from.

  Args:
    path: a `.model` file.
  Raises:
    ValueError: the file is missing or is not a SentencePiece model.
  """

  chat_template: str | None = None

  def __init__(self, path: str | Path):
    self.name = str(path)
    try:
      model = _MODEL.FromString(Path(path).read_bytes())
      self._first = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
      model.normalizer_spec.add_dummy_prefix = False
      model.normalizer_spec.remove_extra_whitespaces = False
      self._later = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # protobuf and SentencePiece each have their own
      raise ValueError(f"tokenizer {path}: not a SentencePiece model ({_line(error)})") from error
    self.vocab_size = self._first.get_piece_size()
    self._read_special(model)
    # A symbol that must stay text is cut after its first character, so it can match no piece.
    self._pattern = re.compile("|".join(map(re.escape, self._longest_first())) or "(?!)")

  def _read_special(self, model: Any) -> None:
    kinds = _MODEL.SentencePiece
    self.special_tokens: Mapping[str, int] = {
      p.piece: i
      for i, p in enumerate(model.pieces)
      if p.type == kinds.CONTROL or (p.type == kinds.USER_DEFINED and _TURN_MARK.fullmatch(p.piece))
    }
    self._special_ids = frozenset(self.special_tokens.values())
    named = {n: getattr(self._first, f"{n}_id")() for n in ("pad", "bos", "eos")}
    self.pad_id: int | None = named["pad"] if named["pad"] >= 0 else None
    self.bos_id: int | None = named["bos"] if named["bos"] >= 0 else None
    self.eos_id: int | None = named["eos"] if named["eos"] >= 0 else None
    self.template_variables: Mapping[str, str] = {
      f"{n}_token": self._first.id_to_piece(i) for n, i in named.items() if i >= 0
    }

  def _longest_first(self) -> list[str]:
    return sorted(self.special_tokens, key=len, reverse=True)

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    return self.encode_with_offsets(text, special=special).ids

  def encode_with_offsets(
    self, text: str, *, special: bool = False, first: bool = True
  ) -> Encoding:
    ids, offsets, at = [], [], 0
    for match in self._pattern.finditer(text):
      cut = match.start() if special else match.start() + 1
      self._append(text, at, cut, first and at == 0, ids, offsets)
      at = cut
      if special:
        ids.append(self.special_tokens[match.group()])
        offsets.append(match.span())
        at = match.end()
    self._append(text, at, len(text), first and at == 0, ids, offsets)
    return Encoding(ids, offsets)

  def _append(self, text, start, end, first, ids, offsets) -> None:
    """Adds the tokens of text[start:end] to `ids` and `offsets`."""
    processor = self._first if first else self._later
    serialized = processor.encode(text[start:end], out_type="serialized_proto")
    waiting = 0  # bytes of a character whose last byte has not come: they have no surface
    for piece in _TEXT.FromString(serialized).pieces:
      ids.append(piece.id)
      waiting += 1
      if piece.surface:
        offsets.extend([(start, start + len(piece.surface))] * waiting)
        start, waiting = start + len(piece.surface), 0
    offsets.extend([(start, end)] * waiting)

  def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
    text, run, processor = [], [], self._first
    for i in [i for i in map(int, ids) if i < self.vocab_size]:
      if i not in self._special_ids:
        run.append(i)
        continue
      text += [processor.decode(run), self._first.id_to_piece(i) if special else ""]
      run, processor = [], self._later
    return "".join([*text, processor.decode(run)])

  def token_id(self, piece: str) -> int:
    i = self._first.piece_to_id(piece)
    if i == self._first.unk_id() and piece != self._first.id_to_piece(i):
      raise missing_piece(self, piece)
    return i

  def token_bytes(self) -> list[bytes]:
    first = self._first
    nothing = lambda i: i in self._special_ids or first.is_unknown(i) or first.is_unused(i)
    one = lambda i: piece_bytes(first.id_to_piece(i), byte_fallback=first.is_byte(i))
    return [b"" if nothing(i) else one(i) for i in range(self.vocab_size)]


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]
