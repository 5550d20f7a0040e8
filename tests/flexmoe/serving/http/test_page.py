"""The page in a real browser: every state of a batch, errors that hold HTML, a running job, keys alone, a phone, light and dark.

``FLEXMOE_PICTURES=docs/images`` keeps the pictures of the documentation.
"""

import json
import os
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
pytest.importorskip("openai")

from tests.support.browser import Browser, found  # noqa: E402
from tests.support.serving import chat_rows, jsonl, options_of, planned, running, start_batch, wait_for  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found() is None, reason="there is no chromium (apt-get install chromium)"),
]
EVIL = "<img src=x onerror=\"window.pwned='img'\"><script>window.pwned='script'</script>"
STATE = "[...document.querySelectorAll('.state')].map(e => e.textContent)"


def long_rows(count, tokens=450):
    rows = chat_rows(count, max_tokens=tokens)
    for row in rows:
        row["body"]["ignore_eos"] = True
    return rows


@pytest.fixture(scope="module")
def busy(tiny_server_model, tmp_path_factory):
    """A server with a batch of every state; one of them is running."""
    home = tmp_path_factory.mktemp("page")
    options = planned(options_of([tiny_server_model], home), home / "machine.json", gpu_batch_size=8, num_gpu_batches=2)
    with running(options) as server, server.client() as client:
        rows = chat_rows(12)
        rows[3]["body"]["max_tokens"] = 10**6
        wait_for(client, start_batch(client, rows, metadata={"name": "evening questions"}))
        broken = jsonl(chat_rows(1)) + json.dumps({"custom_id": EVIL, "method": EVIL, "url": EVIL, "body": {}}).encode()
        file = client.files.create(file=("broken.jsonl", broken), purpose="batch")
        failed = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"name": EVIL, EVIL[:60]: EVIL},
        )
        wait_for(client, failed)
        wait_for(client, start_batch(client, long_rows(200), completion_window="1s"))
        cancelled = start_batch(client, long_rows(80))
        time.sleep(0.5)
        client.batches.cancel(cancelled.id)
        wait_for(client, cancelled)
        batch = start_batch(client, long_rows(2000), metadata={"name": "all abstracts of 2025"})
        wait_for(client, batch, "in_progress")
        yield server
        client.batches.cancel(batch.id)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(busy, browser):
    browser.complaints.clear()
    browser.look()
    browser.open(busy.url + "/")
    browser.wait("document.querySelectorAll('#batch-rows tr').length >= 5 && document.title.includes('FlexMoE')")
    yield browser
    assert browser.run("window.pwned") is None, "no script of a client has run"
    assert not browser.complaints


def keep(browser, name):
    directory = os.environ.get("FLEXMOE_PICTURES")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        browser.picture(Path(directory) / f"{name}.png")


def test_every_state_progress_lanes_memory_and_experts_are_shown(page):
    assert {"running", "completed", "failed", "expired", "cancelled"} <= set(page.run(STATE))
    page.wait("document.querySelectorAll('#lanes .lane, #speed path').length > 2")
    page.wait("document.querySelectorAll('#experts rect').length === 8")
    assert "times as often as the mean" in page.run("document.querySelector('#expert-summary').textContent")
    assert page.run("document.querySelectorAll('.tier progress').length") >= 1
    assert page.run("document.querySelector('#bottleneck').textContent").startswith("Bottleneck: ")
    bar = page.run("document.querySelector('#batch-rows progress').getAttribute('aria-label')")
    assert bar.endswith("of 2000 rows are done")
    page.run("document.querySelector('#batch-rows button.id').click()")
    assert "rows per second" in page.run("document.querySelector('#facts').textContent")
    assert "rows/s" in page.run("document.querySelector('#batch-rows td[data-name=Rate]').textContent")
    page.wait("document.querySelectorAll('#batch-lanes .lane .expected').length > 0")
    assert "rows in flight" in page.run("document.querySelector('#batch-rows-legend').textContent")
    page.wait("document.querySelectorAll('#advice li').length > 0")
    assert ": " in page.run("document.querySelector('#advice li').textContent")
    keep(page, "server-light")
    page.look(dark=True)
    keep(page, "server-dark")


def test_advice_is_text_and_a_given_policy_has_none(page):
    page.run("showAdvice({ advice: ['<b>more memory</b>: +5 %'], planned: true })")
    assert page.run("document.querySelector('#advice li').textContent") == "<b>more memory</b>: +5 %"
    page.run("showAdvice({ advice: [], planned: false })")
    assert "policy was given" in page.run("document.querySelector('#no-advice').textContent")
    assert page.run("document.querySelectorAll('#advice li').length") == 0


def test_errors_of_a_file_are_listed_as_text_with_their_line(page):
    page.run(
        "[...document.querySelectorAll('#batch-rows tr')].find(r => r.querySelector('.failed')).querySelector('button').click()"
    )
    told = page.run("document.querySelector('#fault-rows').textContent")
    assert "line 2: " in told and "<img src=x" in told
    assert page.run("document.querySelector('#batch-lanes-box').offsetParent") is None, "it never had a row in flight"
    assert page.run("document.querySelectorAll('#content img').length") == 0
    assert "<script>" in page.run("document.querySelector('#facts').textContent")
    keep(page, "server-errors")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_without_scrolling_sideways(page, dark):
    page.look(390, 844, dark=dark)
    page.run("document.querySelector('#batch-rows button.id').click()")
    assert page.run("document.documentElement.scrollWidth") <= 390
    smallest = "Math.min(...[...document.querySelectorAll('button, input, select')].filter(e => e.offsetParent).map(e => e.offsetHeight))"
    assert page.run(smallest) >= 40, "a finger finds every control"
    if dark:
        keep(page, "server-phone")


def test_every_control_has_a_name_and_text_has_contrast(page):
    nameless = [role for role, name in page.controls() if not name.strip() and role != "RootWebArea"]
    assert not nameless
    for dark in (False, True):
        page.look(dark=dark)
        assert page.run(CONTRAST) >= 4.5


CONTRAST = """(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!color.endsWith(", 0)") && color !== "transparent") return color;
    }
    return "rgb(255,255,255)";
  };
  const ratio = (e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const shown = [...document.querySelectorAll("main *, header *")].filter((e) => e.offsetParent && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  return Math.min(...shown.map(ratio));
})()"""


def test_a_batch_is_sent_looked_at_and_cancelled_without_a_mouse(page, tmp_path):
    path = tmp_path / "by keyboard.jsonl"
    path.write_bytes(jsonl(long_rows(30)))
    before = page.run("document.querySelectorAll('#batch-rows tr').length")
    page.choose_file("#file", path)
    page.run("document.body.focus()")
    page.tab_to("e.textContent === 'Upload and start'")
    page.press("Enter")
    page.wait(f"document.querySelectorAll('#batch-rows tr').length === {before + 1}")
    page.wait("document.activeElement.id === 'detail-title'")
    assert "by keyboard.jsonl" in page.run("document.querySelector('#facts').textContent")
    page.tab_to("e.id === 'close-detail'")
    page.press("Enter")
    assert "by keyboard.jsonl" in page.run("document.activeElement.textContent"), "the focus is where it came from"
    page.tab_to("e.textContent === 'Cancel'")
    page.press("Enter")
    page.wait("document.querySelector('#confirm').open")
    assert page.run("document.activeElement.textContent") == "Go on running"
    page.press("Escape")
    page.wait("!document.querySelector('#confirm').open")
    page.tab_to("e.textContent === 'Cancel'")
    page.press("Enter")
    page.tab_to("e.textContent === 'Cancel the batch'")
    page.press("Enter")
    page.wait("['cancelling', 'cancelled'].includes(document.querySelector('#batch-rows .state').textContent)")
    page.wait("document.querySelector('#batch-rows .state').textContent === 'cancelled'")


def test_an_error_of_the_server_is_told_and_goes_when_it_is_over(page, busy):
    page.run("ask = async () => { throw new TypeError('no network'); }; poll()")
    page.wait("!document.querySelector('#problem').hidden")
    assert "cannot be reached" in page.run("document.querySelector('#problem').textContent")
    keep(page, "server-unreachable")


def test_a_server_with_a_key_asks_for_it(tiny_server_model, tmp_path, browser):
    options = options_of([tiny_server_model], tmp_path, api_key="a-long-secret-key")
    with running(options) as server:
        browser.look()
        browser.open(server.url + "/")
        browser.wait("!document.querySelector('#key-form').hidden && document.querySelector('#content').hidden")
        keep(browser, "server-key")
        browser.run("document.querySelector('#key').value = 'a-long-secret-key'")
        browser.tab_to("e.textContent === 'Use key'")
        browser.press("Enter")
        browser.wait(
            "!document.querySelector('#content').hidden && document.querySelectorAll('#models li').length === 1"
        )
        assert browser.run("document.querySelector('#no-batches').hidden") is False
