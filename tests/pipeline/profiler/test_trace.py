import dataclasses
import json

import pytest

from imagefeed.pipeline.profiler.report import verdict
from imagefeed.pipeline.profiler.trace import render_trace
from tests.profiles import profile


@pytest.fixture(scope="module")
def trace():
    return json.loads(render_trace(profile()))


def events(trace, kind):
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


def tracks(trace):
    return {event["tid"]: event["args"]["name"] for event in events(trace, "M") if event["name"] == "thread_name"}


def test_steps_and_each_input_stage_have_a_track(trace):
    assert tracks(trace) == {1: "steps", 2: "input: read", 3: "input: waiting for decode", 4: "input: crop"}
    assert {event["tid"] for event in events(trace, "X")} == set(tracks(trace))


def test_events_come_in_the_order_of_their_beginning(trace):
    moments = [event["ts"] for event in trace["traceEvents"] if event["ph"] != "M"]
    assert moments == sorted(moments)
    assert moments[0] == 0


def test_slices_of_a_track_nest_and_none_overlaps_another(trace):
    for track in tracks(trace):
        ends = []
        for event in events(trace, "X"):
            if event["tid"] != track:
                continue
            begin = round(event["ts"] * 1000)
            end = begin + round(event["dur"] * 1000)
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)


def test_parts_of_a_step_fill_it():
    trace = json.loads(render_trace(profile(3, stalls=())))
    slices = [event for event in events(trace, "X") if event["tid"] == 1]
    parts = ["wait", "copy", "forward", "backward", "optimizer"]  # the rest takes no time
    assert [event["name"] for event in slices[:7]] == ["step 0", *parts, "step 1"]
    assert slices[0]["dur"] == pytest.approx(sum(event["dur"] for event in slices[1:6]), abs=1e-6)
    assert [(event["ts"], event["dur"]) for event in slices[:3]] == [(0, 23_100), (0, 10_000), (10_000, 100)]


def test_input_stages_lie_where_they_were_within_their_step(trace):
    read, second = (event for event in events(trace, "X") if event["name"] == "read" and event["args"]["step"] in (0, 1))
    assert (read["ts"], read["dur"]) == (1_000, 2_000)
    assert second["ts"] == pytest.approx(23_100 + 1_000, abs=1e-3)


def test_a_second_measurement_follows_the_first(trace):
    """Its clock starts anew; on the same track it would lie over the first."""
    begins = {event["args"]["step"]: event["ts"] for event in events(trace, "X") if event["name"].startswith("step ")}
    ends = {n: begins[n] + 23_100 + (100_000 if n % 10 == 7 else 0) for n in begins}
    assert len(begins) == 40
    assert begins[20] == pytest.approx(ends[19], abs=5)


def test_stalled_steps_are_marked(trace):
    stalled = [event["args"]["step"] for event in events(trace, "X") if event.get("args", {}).get("stalled")]
    assert stalled == [7, 17, 27, 37]
    (instant,) = events(trace, "i")
    assert instant["name"] == "periodic stall: 100 ms in rest"


def test_counters_say_rate_and_waiting_of_each_step(trace):
    rates = [event["args"]["images/s"] for event in events(trace, "C") if event["name"] == "rate"]
    waits = [event["args"]["ms"] for event in events(trace, "C") if event["name"] == "data wait"]
    assert len(rates) == len(waits) == 40
    assert rates[0] == pytest.approx(32 / 0.0231, abs=0.01) and waits[0] == 10


def test_what_the_trace_is_of_is_said_in_it(trace):
    assert trace["otherData"]["verdict"] == verdict(profile())
    assert trace["otherData"]["threads"] == "1"


def test_on_a_gpu_the_steps_are_of_its_stream():
    found = profile(settings=dataclasses.replace(profile().settings, device="NVIDIA H200"))
    assert tracks(json.loads(render_trace(found)))[1] == "GPU stream: steps"
