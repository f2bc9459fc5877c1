import gzip
import json

import numpy as np
import pytest

from pt_jax.data import sources

ROWS = [{"question": f"q{i} é", "answer": i} for i in range(7)]


def write_jsonl(path, rows):
  path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
  return path


def write_json(path, rows):
  path.write_text(json.dumps(rows, indent=2), "utf-8")
  return path


def write_array_record(path, rows):
  assert sources.write_array_record(path, rows) == len(rows)
  return path


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".array_record": write_array_record}


@pytest.mark.parametrize("suffix", WRITERS)
def test_reads_back_what_was_written(tmp_path, suffix):
  path = WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)
  source = sources.open_source(path, fields=("question", "answer"))
  assert len(source) == 7
  assert [source[i] for i in (6, 0, 3)] == [ROWS[6], ROWS[0], ROWS[3]]  # any order
  assert source[np.int64(2)] == ROWS[2]
  assert list(source) == ROWS
  for outside in (7, -1):
    with pytest.raises(IndexError, match=f"row {outside} of a source with 7 rows"):
      source[outside]


@pytest.mark.parametrize("suffix", WRITERS)
def test_missing_field_names_the_row(tmp_path, suffix):
  path = WRITERS[suffix](tmp_path / f"rows{suffix}", [*ROWS[:2], {"question": "q", "reply": 1}])
  source = sources.open_source(path, fields=("question", "answer"))
  where = f"{path}:3" if suffix == ".jsonl" else f"{path}[2]"
  assert source[1] == ROWS[1]
  with pytest.raises(ValueError) as error:
    source[2]
  assert str(error.value) == f"{where}: no field 'answer', found 'question', 'reply'"
  assert source.where(2) == where


def test_blank_lines_are_not_rows_but_count_as_lines(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}\n\n{"a": 3}')  # and no newline at the end
  source = sources.JsonlSource(path)
  assert list(source) == [{"a": 1}, {"a": 2}, {"a": 3}]
  assert [source.where(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 4, 6)]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"a": 1', "not valid JSON"),
    (b'{"a": "\xff"}', "not valid JSON"),
    (b"[1, 2]", "expected a JSON object, got a list"),
  ],
)
def test_bad_line_names_file_and_line(tmp_path, line, message):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
  source = sources.JsonlSource(path)
  assert source[0] == {"a": 1}
  with pytest.raises(ValueError, match=message) as error:
    source[1]
  assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl", None, "no such file"),
    ("a.json", None, "no such file"),
    ("a.array_record", None, "no such file"),
    ("a.jsonl", b"", "no rows"),
    ("a.jsonl", b" \n\n", "no rows"),
    ("a.json", b"[]", "expected a JSON array of rows, got an empty array"),
    ("a.json", b'{"a": 1}', "expected a JSON array of rows, got a dict"),
    ("a.json", b"[1,", "not valid JSON"),
    ("a.array_record", b"text", "not an ArrayRecord file"),
    ("a.csv", b"a,b", "cannot read .csv, expected .jsonl, .json, .array_record"),
  ],
)
def test_bad_file(tmp_path, name, content, message):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    sources.open_source(path)
  assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_corrupt_record_names_the_row(tmp_path):
  noise = np.random.default_rng(0)  # does not compress: two records fill the first 61 kB
  rows = [{"text": noise.bytes(30_000).hex(), "i": i} for i in range(4)]
  path = write_array_record(tmp_path / "rows.array_record", rows)
  content = bytearray(path.read_bytes())
  content[70_000] ^= 255
  path.write_bytes(content)
  source = sources.ArrayRecordSource(path)
  assert [source[i] for i in (0, 1, 3)] == [rows[i] for i in (0, 1, 3)]
  with pytest.raises(ValueError, match=r"cannot be read \(Corrupted") as error:
    source[2]
  assert str(error.value).startswith(f"{path}[2]: ") and "\n" not in str(error.value)


def test_writer_leaves_nothing_half_done(tmp_path):
  path = tmp_path / "rows.array_record"
  with pytest.raises(ValueError, match=r"^row 1: cannot be written as JSON"):
    sources.write_array_record(path, [{"a": 1}, {"a": object()}])
  with pytest.raises(ValueError, match=r"^row 0: expected a JSON object, got a list"):
    sources.write_array_record(path, [[1]])
  assert list(tmp_path.iterdir()) == []
  write_array_record(path, ROWS)
  before = path.read_bytes()
  with pytest.raises(ValueError, match="exists already"):
    sources.write_array_record(path, ROWS[:1])
  assert path.read_bytes() == before
  with pytest.raises(ValueError, match="no such folder"):
    sources.write_array_record(tmp_path / "no/rows.array_record", ROWS)


def test_shards_read_as_one(tmp_path):
  first = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
  second = write_array_record(tmp_path / "b.array_record", ROWS[3:])
  source = sources.open_source([first, second], fields=("answer",))
  assert len(source) == 7 and list(source) == ROWS
  assert [source.where(i) for i in (2, 3)] == [f"{first}:3", f"{second}[0]"]


def test_split_is_disjoint_complete_and_repeatable():
  source = sources.MemorySource(ROWS)
  rest, held_out = sources.split(source, held_out=2, seed=3)
  assert (len(rest), len(held_out)) == (5, 2)
  assert sorted(row["answer"] for row in [*rest, *held_out]) == list(range(7))
  assert list(sources.split(source, held_out=2, seed=3)[1]) == list(held_out)
  picks = {tuple(row["answer"] for row in sources.split(source, 2, seed)[1]) for seed in range(9)}
  assert len(picks) > 1
  assert held_out.where(0) == f"memory[{held_out[0]['answer']}]"
  for size in (0, 7):
    with pytest.raises(ValueError, match=r"held_out must be in 1\.\.6"):
      sources.split(source, size)


def test_packed_files_are_read_as_the_plain_ones(tmp_path):
  lines = b'{"a": 1}\n\n{"a": 2}\n'
  (tmp_path / "rows.jsonl").write_bytes(lines)
  (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
  plain, packed = (
    sources.open_source(tmp_path / f"rows.jsonl{end}", ("a",)) for end in ("", ".gz")
  )
  assert [packed[i] for i in range(len(packed))] == [plain[0], plain[1]]
  assert packed.where(1).endswith("rows.jsonl.gz:3")
  (tmp_path / "rows.json.gz").write_bytes(gzip.compress(b'[{"a": 1}]'))
  assert sources.open_source(tmp_path / "rows.json.gz")[0] == {"a": 1}


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("rows.jsonl.gz", b"plain", "rows.jsonl.gz: not a gzip file"),
    ("rows.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "rows.jsonl.gz: not a gzip file"),
    ("rows.jsonl.gz", gzip.compress(b"\n", mtime=0), "rows.jsonl.gz: no rows"),
    ("rows.txt.gz", b"", "cannot read .gz, expected .jsonl, .json, .array_record"),
  ],
)
def test_a_packed_file_that_cannot_be_read(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    sources.open_source(tmp_path / name)
