"""The timeline pictures and traces: well-formed, complete, self-contained."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trimaran.runtime.pipeline.action import Action
from trimaran.runtime.pipeline.draw import save_png, timeline_svg
from trimaran.runtime.pipeline.schedules import build_schedule
from trimaran.runtime.pipeline.simulate import Costs, Span, simulate
from trimaran.runtime.pipeline.trace import chrome_trace

SVG = "{http://www.w3.org/2000/svg}"


def _spans(name: str = "1f1b", virtual_stages: int = 1, transfer: float = 0.0) -> list[Span]:
    costs = Costs.uniform(4 * virtual_stages, 10.0, 20.0, transfer)
    return simulate(build_schedule(name, 4, 8, virtual_stages), costs).spans


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_span_is_a_box_with_a_tooltip() -> None:
    spans = _spans("interleaved_1f1b", 2, transfer=1.0)
    boxes = list(ElementTree.fromstring(timeline_svg(spans, "run")).iter(f"{SVG}g"))
    tooltips = [box.findtext(f"{SVG}title") or "" for box in boxes]
    assert sorted(tooltip.split(":")[0] for tooltip in tooltips) == sorted(str(span.action) for span in spans)
    assert "0F0: forward, stage 0, microbatch 0\n0.000 to 10.000 ms (10.000 ms)" in tooltips


def test_rows_axis_and_bubble_are_labelled() -> None:
    texts = _texts(timeline_svg(_spans(), "1F1B"))
    assert {"rank 0", "rank 1", "rank 2", "rank 3", "time (ms)", "1F1B", "forward", "backward", "idle"} <= set(texts)
    assert {"0", "50", "100", "300"} <= set(texts)
    assert "330 ms, 27.3% bubble" in texts
    assert texts.count("27.3% idle") == 4
    assert "transfer" not in texts


def test_boxes_stay_inside_the_plot_and_keep_their_proportions() -> None:
    boxes = [
        box.find(f"{SVG}rect")
        for box in ElementTree.fromstring(timeline_svg(_spans(), "1F1B", width=800)).iter(f"{SVG}g")
    ]
    widths = {round(float(box.attrib["width"]) + 0.8, 1) for box in boxes if box is not None}
    assert len(widths) <= 3  # two lengths, give or take rounding
    assert max(widths) == pytest.approx(2 * min(widths), abs=0.2)
    assert all(
        float(box.attrib["x"]) >= 0 and float(box.attrib["x"]) + float(box.attrib["width"]) <= 800
        for box in boxes
        if box is not None
    )


def test_chunks_of_a_rank_have_their_own_shades() -> None:
    one, two = timeline_svg(_spans(), ""), timeline_svg(_spans("interleaved_1f1b", 2), "")
    fills = [set(re.findall(r'fill="(#[0-9a-f]{6})"', svg)) for svg in (one, two)]
    assert len(fills[1] - fills[0]) >= 2


def test_the_picture_needs_nothing_from_outside() -> None:
    svg = timeline_svg(_spans(transfer=1.0), "1F1B").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|href|<script|<style|@import|url\(", svg)


def test_titles_are_escaped() -> None:
    svg = timeline_svg(_spans(), "a < b & <script>")
    assert "<script>" not in svg
    assert "a < b & <script>" in _texts(svg)


def test_measured_spans_may_start_at_any_time() -> None:
    spans = [
        Span(0, Action.parse("0F0"), 5000.0, 5001.5),
        Span(1, Action.parse("1RECV_F0"), 5001.5, 5001.75),
        Span(1, Action.parse("1F0"), 5001.75, 5003.0),
    ]
    svg = timeline_svg(spans, "measured")
    assert "3 ms, 54.2% bubble" in _texts(svg)
    assert "1RECV_F0: receive of the input, stage 1, microbatch 0\n1.500 to 1.750 ms" in svg


@pytest.mark.parametrize("spans", [[], [Span(0, Action.parse("0F0"), 1.0, 1.0)]])
def test_nothing_to_draw_still_draws(spans: list[Span], tmp_path: Path) -> None:
    ElementTree.fromstring(timeline_svg(spans, "empty"))
    assert ("no spans recorded" in timeline_svg(spans, "empty")) == (not spans)
    save_png(spans, tmp_path / "empty.png")


def test_the_same_spans_give_the_same_text() -> None:
    assert timeline_svg(_spans(), "a") == timeline_svg(_spans(), "a")


def test_png_has_twice_the_pixels_of_its_width(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    save_png(_spans("interleaved_1f1b", 2, transfer=1.0), path, "costs $5 and 50%", width=600)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1200


# ---------------------------------------------------------------- traces

# Trace Event Format, "Complete Events" and "Metadata Events".
_FIELDS: dict[str, dict[str, Any]] = {
    "X": {"name": str, "cat": str, "ph": str, "ts": float, "dur": float, "pid": int, "tid": int, "args": dict},
    "M": {"name": str, "ph": str, "pid": int, "tid": int, "args": dict},
}


@pytest.mark.parametrize(("name", "virtual_stages"), [("1f1b", 1), ("interleaved_1f1b", 2), ("dualpipev", 2)])
def test_a_trace_has_the_fields_of_its_format_and_every_span(name: str, virtual_stages: int) -> None:
    spans = _spans(name, virtual_stages, transfer=1.0)
    trace = json.loads(json.dumps(chrome_trace({"one": spans, "two": spans})))
    assert trace["displayTimeUnit"] == "ms"
    events = trace["traceEvents"]
    assert all({key: type(value) for key, value in event.items()} == _FIELDS[event["ph"]] for event in events)
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in slices)
    found = sorted((event["pid"], event["name"], event["ts"], event["dur"]) for event in slices)
    ours = [(span.rank, str(span.action), span.start * 1e3, (span.stop - span.start) * 1e3) for span in spans]
    assert found == sorted(ours + [(rank + 4, *rest) for rank, *rest in ours])


def test_a_trace_names_ranks_and_threads_and_no_slice_of_a_thread_overlaps_another() -> None:
    events = chrome_trace({"mine": _spans("dualpipev", 2, transfer=7.0)})["traceEvents"]
    named = {(event["pid"], event["name"], event["tid"]): event["args"] for event in events if event["ph"] == "M"}
    assert [named[rank, "process_name", 0]["name"] for rank in range(4)] == [
        f"mine: pipeline rank {rank}" for rank in range(4)
    ]
    slices = [event for event in events if event["ph"] == "X"]
    threads = {(event["pid"], event["tid"]) for event in slices}
    assert {(pid, tid) for pid, name, tid in named if name == "thread_name"} == threads
    assert {named[pid, "thread_name", tid]["name"] for pid, tid in threads} >= {"compute", "transfers"}
    for thread in threads:
        own = sorted((each["ts"], each["ts"] + each["dur"]) for each in slices if (each["pid"], each["tid"]) == thread)
        assert all(stop <= start + 1e-9 for (_, stop), (start, _) in pairwise(own))


def test_a_trace_of_a_run_begins_at_0() -> None:
    spans = [Span(0, Action.parse("0F0"), 5000.0, 5001.5), Span(0, Action.parse("0B0"), 5001.5, 5003.0)]
    slices = [event for event in chrome_trace({"run": spans})["traceEvents"] if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in slices] == [(0.0, 1500.0), (1500.0, 1500.0)]
    assert chrome_trace({"empty": []})["traceEvents"] == []
