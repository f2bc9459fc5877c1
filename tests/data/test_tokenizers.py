"""Tokenizers against hand-worked ids, round trips and the sentencepiece library itself."""

import io
import json
import pathlib
import shutil
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece

from pt_jax.data.tokenizers import ByteTokenizer, IncrementalDetokenizer, load_tokenizer

CHAT = pathlib.Path(__file__).parents[1] / "oracles" / "chat"
UNICODE = "Grüße, 世界! 👩‍👩‍👧🏽 e\u0301 שלום\n\ttab"
quick = hypothesis.settings(deadline=None, max_examples=60, database=None, derandomize=True)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> pathlib.Path:
  text = ["hello world, this is a test", "the tools and the calls: 12 + 30 = 42", "one\ntwo"] * 20
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text),
    model_writer=model,
    vocab_size=330,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    control_symbols=["<|im_start|>", "<|im_end|>"],
    user_defined_symbols=["<think>", "</think>", "<start_of_turn>"],
    hard_vocab_limit=False,
    minloglevel=2,
  )
  path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
  path.write_bytes(model.getvalue())
  return path


@pytest.fixture(scope="session")
def tokenizers(sentencepiece_model):
  return {
    "bytes": load_tokenizer("bytes"),
    "sentencepiece": load_tokenizer(sentencepiece_model),
    "byte_level": load_tokenizer(CHAT / "byte_level"),
    "metaspace": load_tokenizer(CHAT / "metaspace"),
  }


ALL = ("bytes", "sentencepiece", "byte_level", "metaspace")


def test_bytes_by_hand():
  tokenizer = ByteTokenizer(special=["<|endoftext|>"], markup=["<think>"], multiple=16)
  assert tokenizer.vocab_size == 272  # 256 + 2, up to a multiple of 16
  assert tokenizer.encode("é<think>a") == [0xC3, 0xA9, 257, ord("a")]
  assert tokenizer.encode("<|endoftext|>", special=True) == [256] == [tokenizer.eos_id]
  assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")
  assert tokenizer.decode([257, 104, 105, 256]) == "<think>hi<|endoftext|>"
  assert tokenizer.decode([257, 104, 105, 256], special=False) == "<think>hi"
  assert tokenizer.decode([0xC3]) == "\ufffd"
  assert tokenizer.decode([104, 271]) == "h"  # 271 only pads the table
  assert (tokenizer.pad_id, tokenizer.bos_id) == (None, None)
  encoding = tokenizer.encode_with_offsets("é<think>a")
  assert encoding.offsets == [(0, 1), (0, 1), (1, 8), (8, 9)]


@pytest.mark.parametrize("name", ALL)
def test_bytes_of_tokens_are_the_text(tokenizers, name):
  """Also of the tokens of half a character; the space that some put in front is theirs."""
  tokenizer = tokenizers[name]
  pieces = tokenizer.token_bytes()
  assert len(pieces) == tokenizer.vocab_size
  assert {pieces[i] for i in tokenizer.special_tokens.values()} == {b""}
  composed = unicodedata.normalize("NFC", UNICODE)  # one of them does that
  for text in (composed, "hello <think>one\n two", "12 + 30 = 42"):
    joined = b"".join(pieces[i] for i in tokenizer.encode(text)).decode()
    assert joined.removeprefix(" ") == text
  assert len({p for p in pieces if p}) > 200


def test_longest_named_token_wins():
  tokenizer = ByteTokenizer(special=["<a>", "<a><b>"], markup=[])
  assert tokenizer.encode("<a><b><a>", special=True) == [257, 256]


@pytest.mark.parametrize("named", [["<x>", "<x>"], [""]])
def test_bytes_refuses_names(named):
  with pytest.raises(ValueError, match="named tokens must be distinct and not empty"):
    ByteTokenizer(special=named)


@pytest.mark.parametrize("kind", ALL)
def test_round_trip_and_offsets(tokenizers, kind):
  tokenizer = tokenizers[kind]

  @quick
  @hypothesis.given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x1FFFF)))
  @hypothesis.example(UNICODE)
  def check(text):
    if kind == "byte_level":  # its normalizer is NFC, as Qwen's
      hypothesis.assume(tokenizer._tokenizer.normalizer.normalize_str(text) == text)
    text = text.replace("▁", "").replace("\0", "")  # SentencePiece reads ▁ as a space
    text = "x" + text if kind == "metaspace" else text  # Metaspace forgets a space at the start
    encoding = tokenizer.encode_with_offsets(text)
    assert encoding.ids == tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids) == text
    assert all(i < tokenizer.vocab_size for i in encoding.ids)
    assert len(encoding.offsets) == len(encoding.ids)
    assert encoding.offsets == sorted(encoding.offsets)
    covered = {i for a, b in encoding.offsets for i in range(a, b)}
    assert covered == set(range(len(text)))  # every character has a token

  check()


@pytest.mark.parametrize("kind", ALL)
def test_text_never_becomes_a_special_token(tokenizers, kind):
  tokenizer = tokenizers[kind]
  for piece, i in tokenizer.special_tokens.items():
    assert tokenizer.token_id(piece) == i
    if piece == "<unk>":
      continue
    forged = tokenizer.encode(f"a {piece}b")
    assert i not in forged, piece
    assert tokenizer.decode(forged) == f"a {piece}b"
    assert tokenizer.encode(f"a {piece}b", special=True).count(i) == 1  # the control
    assert piece not in tokenizer.decode([i], special=False)


@pytest.mark.parametrize("kind", ALL)
def test_later_piece_has_no_word_boundary(tokenizers, kind):
  tokenizer = tokenizers[kind]
  first = tokenizer.encode_with_offsets("hello", first=True)
  later = tokenizer.encode_with_offsets("hello", first=False)
  context = tokenizer.encode("\n")
  assert tokenizer.decode([*context, *later.ids]) == "\nhello"
  assert later.offsets[0][0] == 0
  assert later.offsets[-1][1] == 5
  if kind in ("sentencepiece", "metaspace"):
    assert tokenizer.decode([*context, *first.ids]) == "\n hello"  # the control


@pytest.mark.parametrize("kind", ALL)
def test_unknown_piece(tokenizers, kind):
  with pytest.raises(ValueError, match=r"'<\|nope\|>' is not in its vocabulary of \d+") as error:
    tokenizers[kind].token_id("<|nope|>")
  assert tokenizers[kind].name in str(error.value)


@pytest.mark.parametrize("kind", ALL)
def test_ids_beyond_the_vocabulary_are_nothing(tokenizers, kind):
  tokenizer = tokenizers[kind]
  ids = tokenizer.encode("hello")
  assert tokenizer.decode([*ids, tokenizer.vocab_size + 3]) == tokenizer.decode(ids)


def test_sentencepiece_is_the_library_on_plain_text(tokenizers, sentencepiece_model):
  library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
  ours = tokenizers["sentencepiece"]
  for text in ("hello world", " the tools\n12", UNICODE, "", "a <think>test</think> b"):
    assert ours.encode(text) == library.encode(text)
    assert ours.decode(library.encode(text)) == library.decode(library.encode(text))
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
  assert ours.template_variables == {"bos_token": "<s>", "eos_token": "</s>"}
  assert "<think>" not in ours.special_tokens  # markup
  assert "<start_of_turn>" in ours.special_tokens  # a turn mark, though user-defined in the model
  assert library.piece_to_id("<start_of_turn>") in library.encode("<start_of_turn>")  # the control


def test_sentencepiece_chat_round_trip(tokenizers):
  tokenizer = tokenizers["sentencepiece"]
  text = "<|im_start|>the test<|im_end|>\n<|im_start|> two spaces<|im_end|>"
  ids = tokenizer.encode(text, special=True)
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(ids, special=False) == "the test\n two spaces"


def test_hf_folder(tokenizers, tmp_path):
  tokenizer = tokenizers["byte_level"]
  assert (tokenizer.bos_id, tokenizer.eos_id) == (
    tokenizer.token_id("<bos>"),
    tokenizer.token_id("<eos>"),
  )
  assert tokenizer.template_variables["pad_token"] == "<pad>"
  assert tokenizer.chat_template is None
  assert "<think>" not in tokenizer.special_tokens
  folder = tmp_path / "folder"
  shutil.copytree(CHAT / "byte_level", folder)
  templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
  config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": templates}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  other = load_tokenizer(folder)
  assert other.chat_template == "D"
  assert other.eos_id == other.token_id("<|im_end|>")
  assert other.bos_id is None
  (folder / "chat_template.jinja").write_text("{{ 'file' }}")
  assert load_tokenizer(folder).chat_template == "{{ 'file' }}"
  assert load_tokenizer(folder / "tokenizer.json").encode("ok") == other.encode("ok")


def _broken(tmp_path, case):
  folder = tmp_path / "folder"
  shutil.copytree(CHAT / "byte_level", folder)
  if case == "no tokenizer":
    (folder / "tokenizer.json").unlink()
  elif case == "corrupt":
    (folder / "tokenizer.json").write_text('{"model": 3')
  elif case == "corrupt config":
    (folder / "tokenizer_config.json").write_text("{")
  elif case == "config is a list":
    (folder / "tokenizer_config.json").write_text("[]")
  elif case == "eos without id":
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
  elif case == "not sentencepiece":
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0anonsense")
  elif case == "suffix":
    (folder / "vocab.txt").write_text("a")
    return folder / "vocab.txt"
  elif case == "missing":
    return folder / "elsewhere"
  return folder


@pytest.mark.parametrize(
  "case, message",
  [
    ("missing", r'elsewhere: no such file or folder \(and it is not "bytes"\)'),
    ("no tokenizer", r"folder: the folder has no tokenizer.json and no tokenizer.model"),
    ("corrupt", r"tokenizer.json: not a tokenizer.json \(.+\)"),
    ("corrupt config", r"tokenizer_config.json: not JSON"),
    ("config is a list", r"tokenizer_config.json: expected a JSON object, found list"),
    ("eos without id", r"folder: eos_token is '<nope>', which has no id"),
    ("not sentencepiece", r"tokenizer.model: not a SentencePiece model \(.+\)"),
    ("suffix", r"vocab.txt: expected a .json or .model file"),
  ],
)
def test_bad_path(tmp_path, case, message):
  with pytest.raises(ValueError, match=message) as error:
    load_tokenizer(_broken(tmp_path, case))
  assert "\n" not in str(error.value)


def test_incremental_by_hand():
  stream = IncrementalDetokenizer(load_tokenizer("bytes"))
  assert [stream.push(i) for i in "a👋".encode()] == ["a", "", "", "", "👋"]
  assert [stream.push(i) for i in (0xE4, 0xBD)] == ["", ""]
  assert stream.flush() == "\ufffd"  # a character that never came to its end
  assert stream.flush() == ""
  assert stream.text == "a👋\ufffd"


@pytest.mark.parametrize("kind", ALL)
def test_incremental_shows_whole_characters(tokenizers, kind):
  tokenizer = tokenizers[kind]
  stream = IncrementalDetokenizer(tokenizer)
  ids = tokenizer.encode("hello  world " + UNICODE + " 👋 the end")
  naive = [tokenizer.decode(ids[:i]) for i in range(len(ids))]
  assert any("\ufffd" in text for text in naive)  # the control: this text can be cut in a character
  pieces = [stream.push(i) for i in ids]
  assert not any("\ufffd" in piece for piece in pieces)
  assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "byte_level"])
def test_incremental_is_decode_of_any_ids(tokenizers, kind):
  """What an untrained model samples. (A fallback of bytes in HF rereads invalid runs: left out.)"""
  tokenizer = tokenizers[kind]

  @quick
  @hypothesis.given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
  def check(ids):
    stream = IncrementalDetokenizer(tokenizer)
    shown = "".join(stream.push(i) for i in ids)
    assert not shown.endswith("\ufffd")
    assert shown + stream.flush() == stream.text == tokenizer.decode(ids)

  check()
