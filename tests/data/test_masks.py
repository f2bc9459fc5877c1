"""Masks: transformers' goldens, templates without marks, segments worked out by hand, bad rows."""

import re

import numpy as np
import pytest

from pt_jax.data.chat_templates import BUILT_IN, load_template
from pt_jax.data.masks import encode_chat, stop_tokens
from pt_jax.data.segments import SEGMENTS
from pt_jax.data.tokenizers import ByteTokenizer
from tests.data.chats import CHATS, GOLDEN, label, template, tokenizer

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def encode(chat, used, own=None, **options):
  messages, tools = CHATS[chat]["messages"], CHATS[chat]["tools"]
  return encode_chat(messages, own or tokenizer(), used, tools=tools, **options)


def digits(mask) -> str:
  return "".join(str(int(m)) for m in mask)


def last_run(mask: str) -> str:
  """The mask with only its last run of ones."""
  return re.sub(r"1(?=.*01)", "0", mask)


def without_newlines(expected: dict) -> str:
  """The golden mask without newlines that touch a turn: TRL trains the one behind the closing token
  (and, for Qwen 2.5, the one in front of the answer, which the prompt already has)."""
  mask, own = list(expected["mask"]), tokenizer()
  for i, token in enumerate(expected["ids"]):
    if own.decode([token]) == "\n" and mask[i] == "1":
      previous = own.decode([expected["ids"][i - 1]])
      following = own.decode(expected["ids"][i + 1 : i + 2])
      if (
        previous in ("assistant", "<|im_end|>", "<end_of_turn>", "<|end|>") and following != "<eos>"
      ):
        mask[i] = "0"
  return "".join(mask)


# The same tokens and masks as transformers. One chat is left out where the text allows no equality:
# its answer begins with a newline that transformers merges into the prompt (see test_chat.py).


def merges_into_prompt(name, chat):
  return chat == "spaces" and name.split("_training")[0] in ("chatml", "qwen2_5", "qwen3", "phi3")


@pytest.mark.parametrize("case", GOLDEN["built_in"], ids=label)
def test_mask_of_a_built_in_template(case):
  used, compared = template(case), 0
  rewrites = case["template"] == "qwen3" and not case["variables"]
  for chat, expected in case["chats"].items():
    if merges_into_prompt(case["template"], chat):
      continue
    encoded = encode(chat, used, tokenizer(case["tokenizer"]), turns="last" if rewrites else "all")
    assert encoded.tokens.tolist() == expected["ids"], chat
    mask = last_run(expected["mask"]) if rewrites else expected["mask"]
    assert digits(encoded.mask) == mask, chat
    assert encoded.tokens.dtype == np.int32
    assert encoded.mask.dtype == np.float32
    assert encoded.mask[0] == 0
    compared += 1
  assert compared >= 4


@pytest.mark.parametrize("name", ["qwen2_5_training", "qwen3_training", "phi3_training"])
def test_mask_of_a_template_with_marks_that_a_user_brings(name):
  used = load_template(GOLDEN["sources"][name])
  for chat, expected in GOLDEN["trained"][name].items():
    if not merges_into_prompt(name, chat):
      encoded = encode(chat, used)
      assert encoded.tokens.tolist() == expected["ids"], chat
      assert digits(encoded.mask) == expected["mask"], chat


@pytest.mark.parametrize("case", GOLDEN["built_in"], ids=label)
def test_mask_does_not_need_marks(case):
  """Without `{% generation %}` transformers' mask is all 0; ours is the same as with it."""
  marked = template(case)
  source, count = re.subn(r"\{%- (end)?generation %\}", "{%- if true %}{%- endif %}", marked.source)
  assert count == 2
  bare = load_template(source, variables=case["variables"])
  assert not bare.has_generation_marks
  rewrites = case["template"] == "qwen3" and not case["variables"]
  own = tokenizer(case["tokenizer"])
  for chat in case["chats"]:
    turns = "last" if rewrites else "all"
    expected, encoded = (encode(chat, t, own, turns=turns) for t in (marked, bare))
    assert encoded.tokens.tolist() == expected.tokens.tolist()
    assert digits(encoded.mask) == digits(expected.mask), chat


@pytest.mark.parametrize("name", ["qwen2_5", "phi3", "llama3", "gemma"])
def test_mask_of_an_original_is_that_of_its_training_variant(name):
  """Masks that TRL's authors marked, but for newlines at the edges of a turn."""
  used = load_template(GOLDEN["sources"].get(name, name))
  for chat, expected in GOLDEN["trained"][f"{name}_training"].items():
    if not merges_into_prompt(name, chat):
      encoded = encode(chat, used)
      assert encoded.tokens.tolist() == expected["ids"], chat
      assert digits(encoded.mask) == without_newlines(expected), chat


def test_chats_with_several_turns_tools_and_unicode_are_compared():
  compared = {c["template"] for c in GOLDEN["built_in"] if {"multi", "unicode"} <= set(c["chats"])}
  assert compared == set(BUILT_IN)
  tools = {c["template"] for c in GOLDEN["built_in"] if "one_call" in c["chats"]}
  assert tools == {"chatml", "qwen2_5", "qwen3", "llama3_1"}


def test_spans_are_the_mask():
  encoded = encode("two_calls", load_template("chatml"))
  mask = np.zeros_like(encoded.mask)
  for span in encoded.spans:
    mask[span.start : span.end] += 1
  assert mask.tolist() == encoded.mask.tolist()
  assert [span.message for span in encoded.spans] == [2, 5, 7]
  assert {span.kind for span in encoded.spans} == {"assistant"}


# Templates that change a turn once the chat goes on


@pytest.mark.parametrize("chat", ["multi", "thinking_twice", "two_calls"])
def test_template_that_does_not_preserve_prefixes(chat):
  message = r"^train.jsonl:3: template 'qwen3' does not preserve prefixes: up to message \d"
  with pytest.raises(ValueError, match=message) as error:
    encode(chat, load_template("qwen3"), where="train.jsonl:3")
  assert "turns='last'" in str(error.value)
  assert "\n" not in str(error.value)
  encoded = encode(chat, load_template("qwen3"), turns="last")
  assert len({span.message for span in encoded.spans}) == 1
  encode(chat, load_template("qwen3", variables={"preserve_thinking": True}))  # keeps every turn


def test_template_that_changes_the_prompt():
  source = (
    "{% for m in messages %}{{ loop.length if m.role == 'user' }}{{ m.content }}<|im_end|>"
    "{% endfor %}"
  )
  with pytest.raises(ValueError, match="does not preserve prefixes"):
    encode_chat([USER, ANSWER], ByteTokenizer(), load_template(source))


def test_last_turn_only():
  encoded = encode("multi", load_template("chatml"), turns="last")
  trained = tokenizer().decode(encoded.tokens[encoded.mask > 0])
  assert trained == "Blue then.<|im_end|>"


# Segments


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
BY_HAND = {
  "think": ["<think>\nI should look.\n</think>\n\n", "<think>\nThe tool says 30.\n</think>\n\n"],
  "tool_call": [CALL + "<|im_end|>"],
  "tool_result": ["30, sunny"],
  "answer": ["Sunny, 30 °C.<|im_end|>"],
}


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
@pytest.mark.parametrize("kind", BY_HAND)
def test_segments_by_hand(name, kind):
  for own in (tokenizer(), tokenizer("metaspace"), ByteTokenizer()):
    encoded = encode("thinking_calls", load_template(name), own, train_on=kind)
    texts = [own.decode(encoded.tokens[s.start : s.end]).strip(" ") for s in encoded.spans]
    assert texts == BY_HAND[kind]
    assert encoded.mask.sum() == sum(s.end - s.start for s in encoded.spans)


def test_segments_of_two_calls_beside_an_answer():
  own = tokenizer()
  encoded = encode("two_calls", load_template("qwen2_5"), own, train_on=SEGMENTS)
  turn = [(s.kind, own.decode(encoded.tokens[s.start : s.end])) for s in encoded.spans[:3]]
  first, second = '{"city": "Oslo", "days": 2}', '{"city": "東京"}'
  call = '\n<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>'
  assert turn == [
    ("answer", "Let me look."),
    ("tool_call", call.format(first)),
    ("tool_call", call.format(second) + "<|im_end|>"),
  ]


@pytest.mark.parametrize(
  "name, chat",
  [(c["template"], chat) for c in GOLDEN["built_in"] if not c["variables"] for chat in c["chats"]],
)
def test_segments_divide_a_turn_without_rest(name, chat):
  used, turns = load_template(name), "last" if name == "qwen3" else "all"
  whole = encode(chat, used, turns=turns)
  parts = []
  for kind in SEGMENTS:
    try:
      parts.append(encode(chat, used, turns=turns, train_on=kind).mask)
    except ValueError as error:
      assert f"nothing to train on: the chat has no {kind}" in str(error)
  assert np.sum(parts, 0).tolist() == whole.mask.tolist()
  together = encode(chat, used, turns=turns, train_on=SEGMENTS)
  assert together.mask.tolist() == whole.mask.tolist()


def test_kinds_weigh_what_they_are_given():
  own, used = tokenizer(), load_template("qwen3")
  weights = {"think": 0.25, "answer": 2.0, "tool_result": 0.5}
  encoded = encode("thinking_calls", used, own, train_on=weights)
  expected = np.zeros(len(encoded.tokens), np.float32)
  for kind, weight in weights.items():
    expected += weight * encode("thinking_calls", used, own, train_on=kind).mask
  np.testing.assert_array_equal(encoded.mask, expected)
  assert set(expected) == {0.0, *weights.values()}


def test_results_beside_the_assistant():
  own = tokenizer()
  encoded = encode("two_calls", load_template("chatml"), train_on=["assistant", "tool_result"])
  results = [s for s in encoded.spans if s.kind == "tool_result"]
  assert [s.message for s in results] == [3, 4]
  assert [own.decode(encoded.tokens[s.start : s.end]) for s in results] == ["3", "18 ☔"]
  alone = encode("two_calls", load_template("chatml"))
  assert encoded.mask.sum() == alone.mask.sum() + sum(s.end - s.start for s in results)


def test_call_without_tags():
  own = tokenizer()
  encoded = encode("one_call", load_template("llama3_1"), train_on="tool_call")
  text = own.decode(encoded.tokens[encoded.mask > 0])
  assert text == '{"name": "weather", "parameters": {"city": "Kyōto"}}<|eot_id|>'


def test_prompt_that_opens_the_reasoning():
  """As DeepSeek-R1 and Qwen3.5 do: the tag is in the prompt, the rest of it is trained."""
  source = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
  )
  own, chat = ByteTokenizer(), [USER, {**ANSWER, "reasoning": "so"}]
  used = load_template(source)
  encoded = encode_chat(chat, own, used, train_on="think")
  assert own.decode(encoded.tokens[encoded.mask > 0]) == "so</think>"
  encoded = encode_chat(chat, own, used, train_on="answer")
  assert own.decode(encoded.tokens[encoded.mask > 0]) == "yes<|im_end|>"


# Stop tokens


@pytest.mark.parametrize(
  "name, expected",
  [
    ("chatml", ["<|im_end|>", "<eos>"]),
    ("qwen3", ["<|im_end|>", "<eos>"]),
    ("llama3", ["<|eot_id|>", "<eos>"]),
    ("llama3_1", ["<|eot_id|>", "<eos>"]),
    ("gemma", ["<end_of_turn>", "<eos>"]),
    ("plain", ["<eos>"]),
  ],
)
def test_stop_tokens(name, expected):
  own = tokenizer()
  assert stop_tokens(own, load_template(name)) == tuple(map(own.token_id, expected))


def test_no_stop_token():
  source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
  with pytest.raises(ValueError, match="a rollout could not stop"):
    stop_tokens(ByteTokenizer(special=[]), load_template(source))


# Bad input

THOUGHTFUL = {**ANSWER, "reasoning": "because"}
CALLING = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}


@pytest.mark.parametrize(
  "messages, name, options, message",
  [
    ([USER], "chatml", {}, "nothing to train on: the chat has no assistant"),
    ([USER, ANSWER], "chatml", {"train_on": "think"}, "nothing to train on: the chat has no think"),
    (
      [USER, ANSWER],
      "chatml",
      {"train_on": ["think", "tool_result"]},
      "nothing to train on: the chat has no think or tool_result",
    ),
    (
      [USER, {"role": "assistant", "content": " "}],
      "chatml",
      {},
      r"nothing to train on: message 1 \(assistant\) is empty",
    ),
    ([ANSWER, USER, ANSWER], "chatml", {}, "message 0 is the assistant's: there is no prompt"),
    ([USER, THOUGHTFUL], "llama3", {}, r"template 'llama3' leaves out reasoning of message 1"),
    (
      [USER, {**CALLING, "content": "a"}],
      "llama3",
      {},
      r"template 'llama3' leaves out tool_calls of message 1",
    ),
    (
      [USER, {**CALLING, "content": "so"}],
      "llama3_1",
      {},
      r"template 'llama3_1' leaves out content of message 1",
    ),
    (
      [USER, {"role": "assistant", "content": "<think>and so on"}],
      "chatml",
      {"train_on": "answer"},
      r"message 1: a tag without its partner in '<think>and so on",
    ),
    (
      [USER, {**ANSWER, "reasoning": "a</think>b<think>c"}],
      "chatml",
      {"train_on": "think"},
      r"message 1: the message has 1 reasoning, but template 'chatml' shows 2 between '<think>'",
    ),
    (
      [USER, {**CALLING, "content": "<tool_call>x</tool_call>"}],
      "chatml",
      {"train_on": "tool_call"},
      r"message 1: the message has 1 tool_calls, but template 'chatml' shows 2",
    ),
  ],
)
def test_bad_row(messages, name, options, message):
  with pytest.raises(ValueError, match="^rows.jsonl:8: " + message) as error:
    encode_chat(messages, tokenizer(), load_template(name), where="rows.jsonl:8", **options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("train_on", ["everything", [], ["think", "user"]])
def test_bad_kind(train_on):
  with pytest.raises(ValueError, match=r"train_on is .*, expected some of assistant, think"):
    encode_chat([USER, ANSWER], ByteTokenizer(), load_template("chatml"), train_on=train_on)


@pytest.mark.parametrize(
  "train_on, message",
  [
    ({"think": 0.0}, "train_on: think: expected a finite weight > 0, found 0.0"),
    ({"answer": 1, "think": float("nan")}, "train_on: think: .* found nan"),
    ({"assistant": 1, "think": 2}, "expected a weight for the assistant or its parts"),
  ],
)
def test_bad_weights(train_on, message):
  with pytest.raises(ValueError, match=message):
    encode_chat([USER, ANSWER], ByteTokenizer(), load_template("chatml"), train_on=train_on)


def test_bad_turns():
  with pytest.raises(ValueError, match="turns is 'first', expected 'all' or 'last'"):
    encode_chat([USER, ANSWER], ByteTokenizer(), load_template("chatml"), turns="first")  # type: ignore[arg-type]


def test_marks_that_leave_a_turn_out():
  source = (
    "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
  )
  with pytest.raises(ValueError, match="marks no generation in message 1"):
    encode_chat([USER, ANSWER, USER], ByteTokenizer(), load_template(source))


def test_template_that_hides_a_result():
  source = load_template("chatml").source.replace("+ message.content + '\\n</tool_response>'", "")
  assert source != load_template("chatml").source
  with pytest.raises(ValueError, match="shows 0 of 1 tool results"):
    encode("one_call", load_template(source), train_on="tool_result")
