"""Files of requests: what is skipped, what is refused with its place, and what may be recorded instead."""

import errno
import json
import os
import tracemalloc

import pytest

from flexmoe.errors import DataError, InputMissingError, StorageError
from flexmoe.inputs import lines as lines_module
from flexmoe.inputs import request_file
from flexmoe.inputs.custom_ids import CustomIds
from flexmoe.inputs.lines import RawRow, lines
from flexmoe.inputs.parsers import parser_of
from flexmoe.inputs.request_file import MOST_FAULTS_LISTED, RequestFile
from flexmoe.openai.json_line import MAX_LINE_BYTES
from policies.common import file_io


def write(tmp_path, *rows):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def recorded(path):
    """(custom_id, code or None) of every row of a file whose faults are recorded."""
    with RequestFile.open(path, on_invalid="record") as requests:
        return [(r.custom_id, r.error and r.error.code) for r in requests]


def test_bom_crlf_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n\n{"prompt": "b"}\r\n{"prompt": "c"}')
    with RequestFile.open(path) as requests:
        assert [(r.custom_id, r.prompts) for r in requests] == [
            ("row-1", ("a",)),
            ("row-5", ("b",)),
            ("row-6", ("c",)),
        ]
        assert list(requests.custom_ids()) == ["row-1", "row-5", "row-6"]


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    row = json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False).encode()
    with RequestFile.open(write(tmp_path, row)) as requests:
        assert requests[0].prompts == ("a\u2028b\u0085c",)


def test_rows_are_read_again_in_any_order(tmp_path):
    with RequestFile.open(write(tmp_path, *({"prompt": f"p{i}"} for i in range(9)))) as requests:
        assert len(requests) == 9
        assert [requests[i].prompts[0] for i in (8, 0, 4)] == ["p8", "p0", "p4"]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
def test_lines_are_the_same_whatever_pieces_the_file_comes_in(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(lines_module, "_CHUNK_BYTES", chunk_bytes)
    content = b"one\n\ntwo\r\n" + b"x" * 9 + b"\n" + b"y" * 8 + b"\nlast"
    (tmp_path / "f").write_bytes(content)
    seen = []
    with open(tmp_path / "f", "rb") as file:
        found = list(lines(file.fileno(), 8, seen.append))
    assert [line.data for line in found] == [b"one", b"", b"two\r", None, b"y" * 8, b"last"]
    assert b"".join(seen) == content
    assert [content[line.offset : line.offset + line.length] for line in found] == content.splitlines(keepends=True)


def test_line_beyond_the_limit_is_refused_without_being_held(tmp_path):
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n')
        file.truncate(2**28)  # a hole: a line of 256 MiB that takes no disk
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"prompt": "b"}\n')
    tracemalloc.start()
    try:
        assert recorded(path) == [("row-1", None), ("row-2", "invalid_line"), ("row-3", None)]
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
    with pytest.raises(DataError, match=f"line 2: the line is longer than {MAX_LINE_BYTES} bytes"):
        RequestFile.open(path)


def test_longest_line_is_read_with_and_without_its_end(tmp_path):
    frame = json.dumps({"prompt": ""}).encode()
    row = frame[:-2] + b"x" * (MAX_LINE_BYTES - len(frame)) + frame[-2:]
    for content in (row, row + b"\n"):
        (tmp_path / "in.jsonl").write_bytes(content)
        with RequestFile.open(tmp_path / "in.jsonl") as requests:
            assert len(requests[0].prompts[0]) == MAX_LINE_BYTES - len(frame)


def test_custom_id_used_twice_names_both_lines(tmp_path):
    path = write(tmp_path, {"prompt": "p", "custom_id": "x"}, {"prompt": "p"}, {"prompt": "q", "custom_id": "x"})
    with pytest.raises(DataError, match='line 3: custom_id "x" is already the id of line 1'):
        RequestFile.open(path)


def test_given_custom_id_may_not_take_the_name_of_a_line(tmp_path):
    with pytest.raises(DataError, match='line 2: custom_id "row-2" is already the id of line 1'):
        RequestFile.open(write(tmp_path, {"prompt": "p", "custom_id": "row-2"}, {"prompt": "q"}))


def test_ids_are_compared_where_their_hashes_are_equal(monkeypatch):
    monkeypatch.setattr("flexmoe.inputs.custom_ids._hash", lambda custom_id: len(custom_id))
    names = ["aa", "bb", "c", "aa", None, "bb", "dd", "aa"]
    ids = CustomIds()
    for name in names:
        ids.add(name)
    assert ids.repeated(names.__getitem__) == {3: 0, 5: 1, 7: 0}


def test_malformed_line_names_file_and_line(tmp_path):
    path = write(tmp_path, {"prompt": "p"}, b"", b"oops")
    with pytest.raises(DataError, match=r"in\.jsonl: line 3: not valid JSON"):
        RequestFile.open(path)


def test_first_faults_are_told_together(tmp_path):
    path = write(tmp_path, *({"prompt": "p"} if i % 2 else b"oops" for i in range(60)))
    with pytest.raises(DataError) as caught:
        RequestFile.open(path)
    told = str(caught.value).split("\n")
    assert [line.split(":")[1].strip() for line in told[:MOST_FAULTS_LISTED]] == [f"line {n}" for n in range(1, 20, 2)]
    assert told[MOST_FAULTS_LISTED] == "and perhaps more" and "on_invalid='record'" in told[-1]


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("on_invalid", ["fail", "record"])
def test_file_without_requests_is_refused(tmp_path, content, on_invalid):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no requests"):
        RequestFile.open(path, on_invalid=on_invalid)


def test_faults_that_are_recorded_become_error_rows_with_the_ids_that_could_be_read(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "p", "custom_id": "a"},
        b"oops",
        {"prompt": 5, "custom_id": "b"},
        {"prompt": "p", "custom_id": 7},
        b'{"prompt": "\xff"}',
        {"prompt": "p", "n": 10**9},
    )
    bad = "invalid_line"
    assert recorded(path) == [
        ("a", None),
        ("row-2", bad),
        ("b", bad),
        ("row-4", bad),
        ("row-5", bad),
        ("row-6", "invalid_value"),
    ]
    with RequestFile.open(path, on_invalid="record") as requests:
        assert requests.rows_invalid == 4
        assert requests[2].error.param == "prompt" and "prompt is 5" in requests[2].error.message


def test_recorded_rows_never_share_an_id(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "p", "custom_id": "row-4"},
        {"prompt": "p", "custom_id": "row-5"},
        {"prompt": "p", "custom_id": "row-5-2"},
        b"oops",
        {"prompt": "q", "custom_id": "row-4"},
        {"prompt": "r"},
        {"prompt": "s", "custom_id": "row-6"},
    )
    bad = "invalid_line"
    assert recorded(path) == [
        ("row-4", None),
        ("row-5", None),
        ("row-5-2", None),
        ("row-4-2", bad),
        ("row-5-3", bad),
        ("row-6", None),
        ("row-7", bad),
    ]
    with RequestFile.open(path, on_invalid="record") as requests:
        assert 'custom_id "row-4" is already the id of line 1' in requests[4].error.message
        assert requests.rows_invalid == 3


@pytest.mark.parametrize("on_invalid", ["fail", "record"])
def test_row_parsed_elsewhere_is_the_same_request(tmp_path, on_invalid):
    rows = [{"prompt": "ä"}, {"prompt": [1, 2], "n": 2}] + [
        b'{"x": "\xff"}',
        b"",
        {"prompt": "q", "custom_id": "row-1"},
    ]
    with RequestFile.open(
        write(tmp_path, *rows[: 5 if on_invalid == "record" else 2]), on_invalid=on_invalid
    ) as requests:
        parser = parser_of(json.loads(json.dumps(requests.parser.setup())))
        for row in range(len(requests)):
            packed = json.loads(json.dumps(requests.raw(row).packed()))
            assert RawRow.unpacked(packed).parse(parser) == requests[row]


def test_missing_input_is_told_apart_from_bad_input(tmp_path):
    with pytest.raises(InputMissingError, match="does not exist"):
        RequestFile.open(tmp_path / "none.jsonl")
    with pytest.raises(InputMissingError, match="no regular file"):
        RequestFile.open(tmp_path)


def test_file_changed_after_it_was_opened_is_noticed(tmp_path):
    path = write(tmp_path, {"prompt": "p"}, {"prompt": "q"})
    with RequestFile.open(path) as requests:
        with path.open("ab") as file:
            file.write(b'{"prompt": "r"}\n')
        with pytest.raises(DataError, match="changed"):
            requests[0]


def test_change_that_leaves_size_and_time_is_noticed(tmp_path):
    path = write(tmp_path, {"prompt": "p"}, {"prompt": "q"})
    with RequestFile.open(path) as requests:
        before = path.stat()
        with path.open("r+b") as file:
            file.write(b'{"prompt": "x"}\n')
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert requests[1].prompts == ("q",)
        with pytest.raises(DataError, match="changed"):
            requests[0]


def test_input_that_is_replaced_is_read_on_from_the_old_file(tmp_path):
    path = write(tmp_path, {"prompt": "p"})
    with RequestFile.open(path) as requests:
        (tmp_path / "new").write_bytes(b'{"prompt": "x"}\n')
        os.replace(tmp_path / "new", path)
        assert requests[0].prompts == ("p",)


def test_content_hash_follows_the_content(tmp_path):
    with RequestFile.open(write(tmp_path, {"prompt": "p"})) as requests:
        first = requests.content_hash
    with RequestFile.open(write(tmp_path, {"prompt": "q"})) as requests:
        assert requests.content_hash != first and len(first) == 64


def test_read_that_fails_or_comes_short_is_told_or_gone_on_with(tmp_path, monkeypatch):
    path, real = write(tmp_path, {"prompt": "p" * 50}), os.pread
    monkeypatch.setattr(file_io.os, "pread", lambda fd, size, at: real(fd, min(size, 3), at))
    with RequestFile.open(path) as requests:
        assert requests[0].prompts == ("p" * 50,)

        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(file_io.os, "pread", broken)
        with pytest.raises(StorageError, match="Input/output error"):
            requests[0]
        with pytest.raises(StorageError, match="Input/output error"):
            RequestFile.open(path)


@pytest.mark.slow
def test_state_of_a_row_is_a_few_bytes(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b'{"prompt": "p", "custom_id": "id-%d"}\n' % i for i in range(20_000)))
    tracemalloc.start()
    try:
        with RequestFile.open(path) as requests:
            assert tracemalloc.get_traced_memory()[0] < 60 * len(requests) + 200_000
    finally:
        tracemalloc.stop()


def test_nothing_is_left_open_by_a_file_that_is_refused(tmp_path, monkeypatch):
    opened = []
    real = request_file._open_regular
    monkeypatch.setattr(request_file, "_open_regular", lambda path: opened.append(real(path)) or opened[-1])
    with pytest.raises(DataError):
        RequestFile.open(write(tmp_path, b"oops"))
    assert [file.closed for file in opened] == [True]
