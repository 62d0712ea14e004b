"""A prediction: a row of JSONL with an answer and what it answers, as ms-swift and the published tools write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

__all__ = ["prediction_row", "write_prediction"]


def prediction_row(row: Mapping[str, Any], record: Mapping[str, Any], *, logprobs: bool) -> dict[str, Any]:
    """A row of an RL file and the answer to it.

    Args:
        row: of an RL file.
        record: `response`, `logprobs` and, where there is none, the `error`, as an `AnswerJournal` has it.
        logprobs: whether to keep log-probabilities.

    Returns:
        `response`, `labels` (the gold answer), `logprobs` where asked for, `messages` (the prompt and the response),
        `images` (paths as in the row; also those of images that the file holds itself), `dialogue_id` and, where
        there is no answer, `error`.

    Example:
        >>> row = {"prompt": [{"role": "user", "content": "Find it."}], "images": [{"path": "a.png", "bytes": b""}],
        ...        "reward_model": {"ground_truth": "gold"}, "extra_info": {"dialogue_id": "d", "images": ["a.png"]}}
        >>> prediction_row(row, {"response": "yes", "logprobs": [-0.5]}, logprobs=True)
        {'response': 'yes', 'labels': 'gold', 'logprobs': {'content': [{'logprob': -0.5}]}, 'messages': [{'role': \
'user', 'content': 'Find it.'}, {'role': 'assistant', 'content': 'yes'}], 'images': ['a.png'], 'dialogue_id': 'd'}
    """
    response = record["response"]
    found: dict[str, Any] = {"response": response, "labels": row["reward_model"]["ground_truth"]}
    if logprobs:
        found["logprobs"] = {"content": [{"logprob": value} for value in record["logprobs"]]}
    found["messages"] = [*row["prompt"], {"role": "assistant", "content": response}]
    found["images"] = list(row["extra_info"]["images"])
    found["dialogue_id"] = row["extra_info"]["dialogue_id"]
    if "error" in record:
        found["error"] = record["error"]
    return found


def write_prediction(file: IO[str], row: Mapping[str, Any]) -> None:
    """Write a row as a line."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
