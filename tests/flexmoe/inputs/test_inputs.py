"""Text lines, Parquet and datasets: the same requests as from JSONL."""

import json
import sys

import pytest

from flexmoe.errors import DataError, InputMissingError, StorageError, UsageError
from flexmoe.inputs.lines import RawRow
from flexmoe.inputs.options import InputOptions, open_requests
from flexmoe.inputs.parsers import parser_of

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def read(tmp_path):
    """Rows of an input as (custom_id, prompts or messages)."""

    def call(path, **options):
        with open_requests(path, InputOptions(**options), tmp_path) as requests:
            parser = parser_of(json.loads(json.dumps(requests.parser.setup())))
            rows = list(requests)
            elsewhere = [RawRow.unpacked(requests.raw(i).packed()).parse(parser) for i in range(len(rows))]
            assert elsewhere == rows
            return [(r.custom_id, (r.error and r.error.message) or r.messages or r.prompts) for r in rows]

    return call


def text(tmp_path, content):
    path = tmp_path / "in.txt"
    path.write_bytes(content)
    return path


def parquet(tmp_path, columns, **options):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "in.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_every_line_of_text_is_a_prompt(tmp_path, read):
    path = text(tmp_path, b'\xef\xbb\xbfone\r\n\r\n  two \n{"prompt": "x"}\n\nl\xc3\xa4st')
    assert read(path) == [
        ("row-1", ("one",)),
        ("row-3", ("  two ",)),
        ("row-4", ('{"prompt": "x"}',)),
        ("row-6", ("läst",)),
    ]


def test_format_may_be_named(tmp_path, read):
    path = tmp_path / "prompts"
    path.write_text("one\n")
    assert read(path, format="text") == [("row-1", ("one",))]


def test_line_of_text_goes_into_a_template(tmp_path, read):
    assert read(text(tmp_path, b"a{b}\n"), prompt_template="Say {text}!\n{{x}}") == [("row-1", ("Say a{b}!\n{x}",))]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\ntw\x00o\n", "line 2: byte 3 is NUL"),
        (b"one\n\xfftwo\n", "line 2: byte 1 is not UTF-8"),
        ("one\n".encode("utf-16"), "line 1: byte 4 is NUL; save the file as UTF-8"),
        ("one\n".encode("utf-16-le"), "line 1: byte 2 is NUL; save the file as UTF-8"),
        (b"", "no requests"),
        (b"\n \n", "no requests"),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path, read, content, words):
    with pytest.raises(DataError, match=words):
        read(text(tmp_path, content))


def test_bad_lines_of_text_may_be_recorded(tmp_path, read):
    assert read(text(tmp_path, b"one\n\xff\n"), on_invalid="record") == [
        ("row-1", ("one",)),
        ("row-2", "byte 1 is not UTF-8; save the file as UTF-8"),
    ]


def test_jsonl_rows_are_those_of_a_table_where_columns_are_asked_for(tmp_path, read):
    path = tmp_path / "in.jsonl"
    path.write_text('{"q": "one", "n": 5, "custom_id": 7}\n{"q": "two"}\n')
    assert read(path, prompt_column="q") == [("7", ("one",)), ("row-2", ("two",))]
    with path.open("a") as file:
        file.write('{"q": "three", "n": NaN, "custom_id": 9}\n{"q": NaN, "custom_id": 9.0}\n')
    assert [name for name, _ in read(path, prompt_column="q", on_invalid="record")] == ["7", "row-2", "9", "row-4"]
    path.write_text('{"q": "one", "n": 5, "custom_id": 7}\n{"q": "two"}\n')
    path.write_text('{"q": "one", "n": 5, "custom_id": "a"}\n{"q": "two", "n": 1.5}\n')
    assert read(path, prompt_template="{n}x {q}") == [("a", ("5x one",)), ("row-2", ("1.5x two",))]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"x": 1}, 'line 1: there is no column "q" but x'),
        ({"q": None}, "the column q is null"),
        ({"q": ["a"]}, "the column q is"),
        ([1], "one JSON object"),
        ({"q": "a", "custom_id": 1.5}, "custom_id is 1.5"),
    ],
)
def test_row_without_what_a_template_needs_is_a_structural_fault(tmp_path, read, row, words):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words):
        read(path, prompt_template="{q}")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("no column", "names no column"),
        ("{}", "is no column"),
        ("{0}", "is no column"),
        ("{text!r}", "is no column"),
        ("{text:>9}", "is no column"),
        ("{text", "expected '}'"),
        ("text}", "Single '}'"),
    ],
)
def test_bad_template_is_a_usage_error(template, words):
    with pytest.raises(UsageError, match=words):
        InputOptions(prompt_template=template)


@pytest.mark.parametrize("template", ["{text.__class__}", "{text[0]}", "{__init__}"])
def test_template_reaches_no_attribute(tmp_path, read, template):
    with pytest.raises(DataError, match="there is no column"):
        read(text(tmp_path, b"one\n"), prompt_template=template)


@pytest.mark.parametrize(
    "options",
    [{"format": "csv"}, {"on_invalid": "skip"}, {"prompt_column": "a", "prompt_template": "{a}"}],
)
def test_bad_options_are_usage_errors(options):
    with pytest.raises(UsageError):
        InputOptions(**options)


def test_lines_of_text_have_no_columns(tmp_path, read):
    with pytest.raises(UsageError, match="no columns"):
        read(text(tmp_path, b"one\n"), prompt_column="a")


def test_parquet_column_holds_texts_ids_or_chats(tmp_path, read):
    ids = ["a", None, "c"]
    assert read(parquet(tmp_path, {"prompt": ["x", "ÿ", "z"], "custom_id": ids})) == [
        ("a", ("x",)),
        ("row-2", ("ÿ",)),
        ("c", ("z",)),
    ]
    assert read(parquet(tmp_path, {"ids": [[1, 2], [3]]}), prompt_column="ids") == [
        ("row-1", ((1, 2),)),
        ("row-2", ((3,),)),
    ]
    assert read(parquet(tmp_path, {"messages": [CHAT], "custom_id": [5]})) == [("5", tuple(CHAT))]


def test_parquet_columns_go_into_a_template(tmp_path, read):
    path = parquet(tmp_path, {"q": ["one", "two"], "n": [1, 2], "unused": [b"\xff", b"\xfe"]})
    assert read(path, prompt_template="{n}: {q}") == [("row-1", ("1: one",)), ("row-2", ("2: two",))]


def test_parquet_rows_come_in_order_from_many_row_groups(tmp_path, read):
    path = parquet(tmp_path, {"prompt": [f"p{i}" for i in range(3000)]}, row_group_size=700)
    assert read(path) == [(f"row-{i + 1}", (f"p{i}",)) for i in range(3000)]


def test_rows_of_a_table_that_cannot_be_understood_are_named_or_recorded(tmp_path, read):
    pa = pytest.importorskip("pyarrow")
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    column = pa.chunked_array([pa.array(["one"]), bad, pa.array([None], pa.string())])
    path = parquet(tmp_path, {"prompt": column, "custom_id": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"row 2: byte \d+ is not UTF-8"):
        read(path)
    rows = read(path, on_invalid="record")
    assert rows[0] == ("a", ("one",)) and rows[1][0] == "b" and rows[2][0] == "c"
    assert "not UTF-8" in rows[1][1] and "prompt is null" in rows[2][1]


def test_values_that_json_lacks_become_text(tmp_path, read):
    import datetime
    import decimal

    columns = {"d": [datetime.date(2024, 5, 1)], "p": [decimal.Decimal("1.50")], "b": [b"raw"]}
    assert read(parquet(tmp_path, columns), prompt_template="{d} {p} {b}") == [("row-1", ("2024-05-01 1.50 raw",))]
    assert "NaN" in read(parquet(tmp_path, {"x": [float("nan")]}), prompt_template="{x}", on_invalid="record")[0][1]


def test_columns_that_are_not_there_are_named(tmp_path, read):
    path = parquet(tmp_path, {"question": ["x"], "answer": ["y"]})
    with pytest.raises(UsageError, match="neither a column prompt nor messages but question, answer"):
        read(path)
    with pytest.raises(UsageError, match="no column 'q' but question, answer"):
        read(path, prompt_column="q")
    with pytest.raises(UsageError, match="no column 'q.x'"):
        read(path, prompt_template="{question} {q.x}")


def test_file_that_is_no_parquet_is_bad_data(tmp_path, read):
    pytest.importorskip("pyarrow")
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(path)
    with pytest.raises(InputMissingError, match="does not exist"):
        read(tmp_path / "none.parquet")


def test_parquet_without_rows_is_refused(tmp_path, read):
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="no requests"):
        read(parquet(tmp_path, {"prompt": pa.array([], pa.string())}))


@pytest.mark.parametrize(("module", "format"), [("pyarrow.parquet", "parquet"), ("datasets", "dataset")])
def test_missing_library_is_a_usage_error_that_names_the_extra(tmp_path, read, monkeypatch, module, format):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pip install 'flexmoe\[data\]'"):
        read(tmp_path, format=format)


def test_full_disk_under_the_rows_of_a_table_is_a_storage_error(tmp_path, read, monkeypatch):
    path = parquet(tmp_path, {"prompt": ["x"]})
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "w+b", buffering=0))
    with pytest.raises(StorageError, match="No space left"):
        read(path)


def test_row_group_that_is_the_whole_file_is_not_held(tmp_path):
    import random
    import subprocess

    texts = [random.Random(i).randbytes(4000).hex() for i in range(6000)]
    path = parquet(tmp_path, {"prompt": texts}, use_dictionary=False, compression="none")
    code = (
        "import sys, pathlib, pyarrow; from flexmoe.inputs.options import open_requests;"
        "assert len(open_requests(sys.argv[1], scratch=pathlib.Path(sys.argv[2]))) == 6000;"
        "print(pyarrow.default_memory_pool().max_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < path.stat().st_size / 2


def test_rows_of_a_table_leave_no_file(tmp_path, read):
    path = parquet(tmp_path, {"prompt": ["x"]})
    with open_requests(path, InputOptions(), tmp_path) as requests:
        assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"] and requests[0].prompts == ("x",)


def test_content_hash_of_a_table_is_that_of_what_is_asked(tmp_path):
    hashes = []
    for columns, options in (({"prompt": ["x"], "a": [1]}, {}), ({"prompt": ["x"], "a": [2]}, {"row_group_size": 1})):
        with open_requests(parquet(tmp_path, columns, **options), InputOptions(), tmp_path) as requests:
            hashes.append(requests.content_hash)
    with open_requests(parquet(tmp_path, {"prompt": ["y"]}), InputOptions(), tmp_path) as requests:
        assert hashes[0] == hashes[1] != requests.content_hash


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset of one split on disk, and one of two."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"question": ["one", "two"], "custom_id": [1, 2], "chat": [CHAT, CHAT]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    return tmp_path


def test_dataset_on_disk_is_read(dataset, read):
    assert read(dataset / "one", prompt_column="question") == [("1", ("one",)), ("2", ("two",))]
    assert read(dataset / "one", prompt_column="chat") == [("1", tuple(CHAT)), ("2", tuple(CHAT))]


def test_split_of_a_dataset_is_chosen(dataset, read):
    assert read(dataset / "two", prompt_template="{question}?", dataset_split="test") == [("2", ("two?",))]
    with pytest.raises(UsageError, match="no split 'dev' but train, test"):
        read(dataset / "two", prompt_column="question", dataset_split="dev")


def test_directory_that_is_no_dataset_is_named(dataset, read):
    (dataset / "empty").mkdir()
    with pytest.raises(InputMissingError, match="empty cannot be read as a dataset"):
        read(dataset / "empty", prompt_column="question")
    with pytest.raises(InputMissingError, match="no regular file"):
        read(dataset / "empty", format="jsonl")


def test_dataset_may_be_named_with_its_configuration(dataset, read, monkeypatch):
    import datasets

    asked = []

    def load(*arguments):
        asked.append(arguments)
        if arguments[0] == "nobody/none":
            raise ConnectionError("couldn't reach the hub\nat all")
        return datasets.load_from_disk(dataset / "two")

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"format": "dataset", "prompt_column": "question"}
    assert read("openai/gsm8k:main", **options) == [("1", ("one",)), ("2", ("two",))]
    assert read("some/other", dataset_split="test", **options) == [("2", ("two",))]
    assert asked == [("openai/gsm8k", "main"), ("some/other", None)]
    with pytest.raises(InputMissingError, match="nobody/none cannot be read as a dataset: couldn't reach the hub$"):
        read("nobody/none", **options)
