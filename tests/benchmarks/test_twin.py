"""benchmarks/twin.py retrieval measures the index on real plays; the figures that no machine changes are held to."""

import re
import sys

import pytest

from tests.benchmarks.scripts import load_script


def test_the_index_keeps_what_it_promises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["twin.py", "retrieval", "--smoke"])
    load_script("twin").main()
    out = capsys.readouterr().out

    def figure(pattern: str) -> float:
        found = re.search(pattern, out)
        assert found is not None, out
        return float(found[1])

    assert "texts: 5 works" in out
    assert figure(r"half masked ([\d.]+)") >= 0.9
    assert figure(r"removed from their passage ([\d.]+)") < 0.9  # would be 1 if the sentences were still there
    assert figure(r"search among 1,000 passages, questions: ([\d.]+) ms") > 0
    assert figure(r"absent topics: ([\d.]+)%") >= 80
    assert figure(r"([\d.]+)% with one letter changed are marked") == 100
    assert figure(r"quotes: ([\d.]+)% of verbatim ones pass") == 100
    assert figure(r"the right one to ([\d.]+)%") >= 95
    assert figure(r"any to ([\d.]+)% of held-out ones") <= 5


def test_texts_of_one_s_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load_script("twin")
    (tempest,) = benchmark.plays(["the-tempest"])
    monkeypatch.setattr(sys, "argv", ["twin.py", "retrieval", "--smoke", "--sources", tempest])
    benchmark.main()
    out = capsys.readouterr().out
    assert "texts: 1 works" in out
    assert "questions by hand" not in out
