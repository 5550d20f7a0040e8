"""The loop of an engine that fails, and the journal from which another resumes."""

import pytest

from flexmoe.errors import StorageError, UsageError
from flexmoe.llm import LLM
from flexmoe.params import EngineRequest, InFlight, SamplingParams
from flexmoe.ray.engine_loop import EngineLoop
from flexmoe.ray.token_journal import TokenJournal

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [tuple(range(3, 3 + length)) for length in (5, 9, 17)]
NEW = 20


def asked(journal=None):
    """Rows with their keys, and with what a journal has of them."""
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    rows = []
    for place, ids in enumerate(PROMPTS):
        key = bytes([place]) * 16
        resumed = () if journal is None else journal.resumed(key)
        request = EngineRequest(request_id=str(place), prompt_token_ids=ids, params=params, resumed=resumed)
        rows.append((key, request))
    return rows


@pytest.fixture
def llm(checkpoint, options):
    with LLM(str(checkpoint), **options) as made:
        yield made


def dies_after(engine, sweeps, error):
    step, left = engine.step, iter([True] * sweeps)

    def stepped():
        if next(left, False):
            return step()
        raise error

    engine.step = stepped


def tokens(futures):
    return [future.result(60).outputs[0].token_ids for future in futures]


def test_what_an_engine_had_done_when_it_failed_is_resumed(llm, checkpoint, options, tmp_path):
    expected = llm.generate([list(ids) for ids in PROMPTS], asked()[0][1].params)
    journal, failures = TokenJournal(tmp_path, 1000.0), []
    dies_after(llm.engine, 12, RuntimeError("the device is lost"))
    loop = EngineLoop(llm, journal, failures.append)
    for future in loop.submit(asked()):
        with pytest.raises(RuntimeError, match="the device is lost"):
            future.result(60)
    loop.close()
    assert [str(error) for error in failures] == ["the device is lost"]
    with pytest.raises(RuntimeError, match="the device is lost"):
        loop.submit(asked())

    other = TokenJournal(tmp_path, 1000.0)
    assert other.recovered_rows == len(PROMPTS)
    with LLM(str(checkpoint), **options) as fresh:
        loop = EngineLoop(fresh, other, failures.append)
        assert tokens(loop.submit(asked(other))) == [output.outputs[0].token_ids for output in expected]
        loop.close()
        assert 0 < fresh.metrics()["generated_tokens"] <= len(PROMPTS) * (NEW - 10), "the first tokens were kept"


def test_a_row_that_has_ended_stays_in_the_journal_until_it_is_handed_back(llm, tmp_path):
    journal = TokenJournal(tmp_path, 0.0)
    loop = EngineLoop(llm, journal, lambda error: None)
    first = tokens(loop.submit(asked()[:1]))
    long = EngineRequest(request_id="long", prompt_token_ids=(3,), params=SamplingParams(max_tokens=2, ignore_eos=True))
    tokens(loop.submit([(b"l" * 16, long)]))  # its sweeps write the journal
    [resumed] = TokenJournal(tmp_path, 1.0).resumed(bytes(16))
    assert resumed.token_ids == first[0]
    loop.release(["0", "long"])
    tokens(loop.submit(asked()[1:2]))
    assert TokenJournal(tmp_path, 1.0).resumed(bytes(16)) == ()
    loop.close()
    journal.close()
    assert not list(tmp_path.iterdir())


def test_a_row_without_room_has_an_error_and_a_closed_loop_takes_none(llm):
    loop = EngineLoop(llm, None, lambda error: None)
    params = SamplingParams(max_tokens=3000)
    request = EngineRequest(request_id="0", prompt_token_ids=(3,), params=params)
    [future] = loop.submit([(b"", request)])
    assert "the KV cache and its buffers were planned for" in future.result(60).error
    loop.close()
    with pytest.raises(UsageError, match="this engine is closed"):
        loop.submit(asked())


def test_closing_ends_rows_with_an_error(llm):
    loop = EngineLoop(llm, None, lambda error: None)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    requests = [EngineRequest(request_id=str(i), prompt_token_ids=(3,), params=params) for i in range(2000)]
    futures = loop.submit([(b"", request) for request in requests])
    loop.close()
    with pytest.raises(UsageError, match="this engine is closed"):
        futures[-1].result(60)


def test_rows_run_where_the_journal_cannot_be_written(llm, tmp_path, caplog):
    journal = TokenJournal(tmp_path, 0.0)

    def full(rows):
        raise StorageError("the disk is full")

    journal.save = full
    loop = EngineLoop(llm, journal, lambda error: None)
    assert all(len(ids) == NEW for ids in tokens(loop.submit(asked())))
    loop.close()
    assert "could not be kept: the disk is full" in caplog.text


def save(directory, key, ids):
    journal = TokenJournal(directory, 1.0)
    journal.save([(key, InFlight(request_id="0", index=0, token_ids=ids, logprobs=None))])
    return next(path for path in directory.iterdir())


def test_of_several_actors_that_had_a_row_the_one_with_most_tokens_counts(tmp_path):
    for ids in ([1, 2], [1, 2, 3], [1]):
        save(tmp_path, b"k" * 16, ids)
    [resumed] = TokenJournal(tmp_path, 1.0).resumed(b"k" * 16)
    assert resumed.token_ids == (1, 2, 3)


def test_a_damaged_file_is_said_and_left_out(tmp_path, caplog):
    path = save(tmp_path, b"k" * 16, [1, 2, 3])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    journal = TokenJournal(tmp_path, 1.0)
    assert journal.resumed(b"k" * 16) == () and "is damaged" in caplog.text
