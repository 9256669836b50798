"""What was measured stays readable."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_result_is_json(path: Path) -> None:
    assert json.loads(path.read_text(encoding="utf-8"))
