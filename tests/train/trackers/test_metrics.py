"""The reader of metrics.jsonl against lines that a crash or a disk may leave."""

from pathlib import Path

import pytest

from train.trackers.metrics import parse_event, read_events


def test_whole_events_are_read_and_torn_lines_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_events(file) == []
    file.write_bytes(b'{"step": 1, "loss": 0.5}\n\xff\xfe{"step"\n12\n{"loss": 1}\n{"step": 2.0}\n\n{"step": 3, "lo')
    assert read_events(file) == [{"step": 1, "loss": 0.5}, {"step": 2.0}]


@pytest.mark.parametrize("line", ["", "null", "[1]", '"step"', '{"step": "1"}', '{"step": null}', '{"step": 1'])
def test_what_is_no_event(line: str) -> None:
    assert parse_event(line) is None
