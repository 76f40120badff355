"""Laws of the worker: it answers, what takes too much is stopped, and the next one is answered."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qlora_kit.process import worker
from qlora_kit.process.worker import MemoryLimitError, TimeLimitError, Worker

MEMORY = 512 * 1024**2


@pytest.fixture
def ask():
    made = Worker("worker_answers:answer")
    yield lambda question, seconds=5.0: made.ask(question, seconds=seconds, memory=MEMORY)
    made.end()


def test_answers_are_what_json_holds(ask):
    for value in (None, 1.5, "é\ud800\n", [1, {"a": [True]}], "x" * 2**20):
        assert ask(value) == value


def test_all_questions_go_to_one_process(ask):
    assert ask("process") == ask("process") != os.getpid()


def test_what_takes_too_long_is_stopped_and_the_next_is_answered(ask):
    first = ask("process")
    with pytest.raises(TimeLimitError):
        ask({"seconds": 100}, seconds=0.1)
    assert ask("process") != first


def test_the_time_of_one_question_is_not_that_of_the_next(ask):
    for _ in range(4):
        ask({"seconds": 0.2}, seconds=0.4)


def test_what_takes_too_much_memory_is_stopped_and_the_next_is_answered(ask):
    with pytest.raises(MemoryLimitError):
        ask({"bytes": MEMORY})
    with pytest.raises(MemoryLimitError):
        ask({"exit": 1})  # as a process ends that the system has no memory for
    assert ask({"bytes": 1000}) == 1000


def test_a_question_nested_too_deeply_is_not_asked(ask):
    deep: list = []
    for _ in range(10**5):
        deep = [deep]
    with pytest.raises(RecursionError):
        ask(deep)
    assert ask(1) == 1


def test_a_process_that_ended_for_want_of_questions_is_started_again(ask, monkeypatch):
    impatient = "import qlora_kit.process.worker as w; w.IDLE_S = 0; serve("
    monkeypatch.setattr(worker, "START", worker.START.replace("serve(", impatient))
    first = ask("process")
    while Path(f"/proc/{first}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert ask("process") != first


def test_processes_that_end_before_they_answer_are_no_endless_loop(ask):
    with pytest.raises(ChildProcessError):
        ask({"exit": 0})
    assert ask(1) == 1


def test_a_forked_process_has_a_worker_of_its_own(ask):
    first = ask("process")
    child = os.fork()
    if child == 0:
        os._exit(0 if ask("process") not in (first, os.getpid()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ask("process") == first


def test_no_process_can_be_started(ask, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        ask(1)


def test_an_interrupted_question_is_not_answered_to_the_next(ask, monkeypatch):
    read = worker.receive

    def interrupted(pipe):
        raise KeyboardInterrupt

    ask(0)
    monkeypatch.setattr(worker, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask({"seconds": 0.2})
    monkeypatch.setattr(worker, "receive", read)
    assert ask(2) == 2
