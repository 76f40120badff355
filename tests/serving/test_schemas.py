"""What reading a body costs, whatever stands in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_kit.serving.schemas import ChatRequest, CompletionRequest

MANY = 1000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1.5] * MANY},
        {"prompt": [[1.5] * MANY]},
        {"prompt": [{}] * MANY},
        {"messages": [{}] * MANY},
        {"messages": [{"role": "user", "content": [{}] * MANY}]},
        {"messages": [{"role": "user", "tool_calls": [1] * MANY}]},
    ],
)
def test_a_list_of_faults_is_read_to_its_first(body: dict[str, Any]) -> None:
    """Each fault takes longer than what it stands in, and only one is told."""
    kind = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps({"model": "tiny", **body}))
    assert caught.value.error_count() < 10
