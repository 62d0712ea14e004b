"""verl's reward loop with our reward: as a custom reward function and as the reward manager `ffr`.

On two tokenizers, one of which has the answer's tags as special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import write_store
from ffr_verl.errors import FFRError
from ffr_verl.fragments import TAGS
from ffr_verl.integrations.verl.reward_manager import FFRRewardManager, closing_tokens, decode_answer
from ffr_verl.rewards import RewardConfig, compute_score

GOLD = format_fragment(Fragment((1, 2), (0,)))
INFO = {
    "dialogue_id": "d",
    "utterance_ids": [0, 1, 2],
    "image_utterances": [1],
    "images": ["a.png"],
    "index": 0,
    "split": "train",
    "query": "q",
}


@pytest.fixture(scope="module")
def special_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a model whose answer tags are special tokens."""
    folder = tmp_path_factory.mktemp("special") / "model"
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    tokenizer.save_pretrained(folder)
    assert set(TAGS) <= set(AutoTokenizer.from_pretrained(folder).all_special_tokens)
    return folder


@pytest.fixture
def worker(composed: Callable[..., Any]) -> Callable[..., RewardLoopWorker]:
    def build(model: Path, *overrides: str, **reward_kwargs: Any) -> RewardLoopWorker:
        config = composed("main_ppo", "+recipe=ffr_grpo_cpu", f"actor_rollout_ref.model.path={model}", *overrides)
        with open_dict(config):
            custom = config.reward.custom_reward_function
            if custom.path == "pkg://ffr_verl.rewards":
                reward_kwargs.setdefault("f1_mode", "published")
            custom.reward_kwargs = {**(custom.reward_kwargs or {}), **reward_kwargs}
        return RewardLoopWorker(config)

    return build


def score(worker: RewardLoopWorker, completion: str, *, tail: str = "<|im_end|>") -> dict[str, Any]:
    """What the worker returns for a completion, batched as verl's agent loop does it."""
    tokenizer = worker.input_tokenizer
    prompt = torch.tensor([tokenizer.encode("give the ids")])
    response = torch.tensor([tokenizer.encode(completion + tail)])
    batch = TensorDict(
        {
            "prompts": prompt,
            "responses": response,
            "attention_mask": torch.ones(1, prompt.shape[1] + response.shape[1], dtype=torch.long),
        },
        batch_size=1,
    )
    columns = {
        "data_source": "ffr/mldr",
        "reward_model": {"style": "rule", "ground_truth": GOLD},
        "extra_info": dict(INFO),
        "__num_turns__": 2,
        "tool_extra_fields": {},
    }
    fields = {name: np.array([value], dtype=object) for name, value in columns.items()}
    return worker.loop.run_until_complete(worker.compute_score(DataProto(batch=batch, non_tensor_batch=fields)))


def test_ffr_is_in_verls_registry() -> None:
    assert get_reward_manager_cls("ffr") is FFRRewardManager


@pytest.mark.parametrize("manager", ["naive", "ffr"])
def test_ordinary_tags_are_scored_by_both(worker: Any, base_model: Path, manager: str) -> None:
    result = score(worker(base_model, f"reward.reward_manager.name={manager}"), GOLD)
    assert result["reward_score"] == pytest.approx(1.3)
    expected = compute_score("ffr/mldr", GOLD, GOLD)
    assert {name: result["reward_extra_info"][name] for name in expected} == pytest.approx(expected)


def test_special_tags_are_scored_by_ffr_only(worker: Any, special_model: Path) -> None:
    """`naive` drops them, and the gold answer itself earns nothing: the reason for the manager."""
    naive = score(worker(special_model, "reward.reward_manager.name=naive"), GOLD)
    assert naive["reward_score"] == 0.0
    ours = score(worker(special_model, "reward.reward_manager.name=ffr"), GOLD)
    assert ours["reward_score"] == pytest.approx(1.3)
    assert ours["reward_extra_info"]["f1"] == 1.0


@pytest.mark.parametrize(
    ("completion", "tail", "malformed"),
    [
        (GOLD, "", ""),
        (GOLD, "<|im_end|><|endoftext|><|endoftext|>", ""),
        (GOLD, "<|im_end|> ", "text_outside"),
        ("<|im_start|>" + GOLD, "<|im_end|>", "text_outside"),
        (GOLD.replace("1, 2", "1, 1"), "<|im_end|>", "repeated_id"),
        (GOLD.replace("1, 2", "1, 7"), "<|im_end|>", "id_outside_dialogue"),
        (GOLD.replace("[0]", "[1]"), "<|im_end|>", "id_outside_dialogue"),
        (GOLD.replace("1, 2", "1 2"), "<|im_end|>", "bad_id_list"),
        ("", "<|im_end|>", "empty"),
    ],
)
def test_answers_are_diagnosed(worker: Any, special_model: Path, completion: str, tail: str, malformed: str) -> None:
    """Special tokens that end an answer are no fault of it; in it they are."""
    info = score(worker(special_model), completion, tail=tail)["reward_extra_info"]
    assert info["malformed"] == malformed
    assert (info["gold_utterances"], info["gold_images"]) == (2, 1)
    if not malformed:
        assert (info["predicted_utterances"], info["predicted_images"], info["missing_embeddings"]) == (2, 1, 0)
    assert all(isinstance(info[name], float) for name in compute_score("", "", ""))


def test_coherence_and_missing_vectors(worker: Any, base_model: Path, tmp_path: Path) -> None:
    vectors = {"utt:d:0": np.ones(2), "utt:d:1": np.array([1.0, 0.0]), "img:a.png": np.array([1.0, 1.0])}
    write_store(tmp_path / "store", vectors.items(), model="toy")
    result = score(worker(base_model, embeddings=str(tmp_path / "store")), GOLD)["reward_extra_info"]
    assert result["coherence"] == pytest.approx(0.5**0.5)  # utterance 1 and its image; utterance 2 has no vector
    assert result["missing_embeddings"] == 1
    assert result["score"] == pytest.approx(1.3 + 0.3 * 0.5**0.5)


def test_a_reward_of_ones_own(worker: Any, base_model: Path, tmp_path: Path) -> None:
    """Its value is in the result; what is wrong with it is handed to our buffer, and raised where there is none."""
    (tmp_path / "mine.py").write_text(
        "def length(completion, solution): return float(len(completion))\n"
        "def broken(completion, solution, *, extra_info): return 1 / len(completion)\n"
    )
    components = {"length": f"{tmp_path}/mine.py:length"}
    found = score(worker(base_model, components=components, weights={"f1": 1.0, "length": 0.5}), GOLD)
    assert found["reward_extra_info"]["length"] == len(GOLD)
    assert found["reward_score"] == pytest.approx(1.0 + 0.5 * len(GOLD))
    for door, message in (("broken", "dialogue d: raised ZeroDivisionError"), ("brokn", "there is no brokn in it")):
        components = {"mine": f"{tmp_path}/mine.py:{door}"}
        info = score(worker(base_model, components=components), GOLD)["reward_extra_info"]
        assert list(info) == ["reward_error"]
        assert message in info["reward_error"]
        with pytest.raises(FFRError, match=message):
            score(worker(base_model, "trainer.v1.sampler.custom_sampler.path=null", components=components), GOLD)


@pytest.mark.parametrize("model", ["base_model", "special_model"])
def test_ids_are_credited_to_their_tokens(worker: Any, model: str, request: pytest.FixtureRequest) -> None:
    ours = worker(request.getfixturevalue(model), f1_mode="micro")
    completion = GOLD.replace("[1, 2]", "[0, 2]")
    result = score(ours, completion)
    info, tokens = result["reward_extra_info"], ours.input_tokenizer.encode(completion)
    credits = json.loads(info["id_credits"])
    assert [ours.input_tokenizer.decode([tokens[token]]) for _, token, _ in credits] == ["0", "2", "]", "0"]
    assert [value > 0 for *_, value in credits] == [False, True, False, True]
    assert sum(value for *_, value in credits) == pytest.approx(info["f1_micro"])
    assert json.loads(info["confusion"]) == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert info["cut_off"] == 0.0
    for name in info:
        with pytest.raises(FFRError, match="there is a metric of this name already"):
            RewardConfig.from_kwargs({"components": {name: "pkg://mine:brevity"}})
    assert score(ours, "no", tail="")["reward_extra_info"]["id_credits"] == ""
    assert score(ours, "no", tail="")["reward_extra_info"]["cut_off"] == 1.0


def test_ids_of_tokens_that_read_differently_by_themselves(worker: Any, base_model: Path) -> None:
    """A tokenizer whose decoder drops the blank before a first word, as SentencePiece's do."""
    ours = worker(base_model, f1_mode="micro")
    usual = json.loads(score(ours, GOLD)["reward_extra_info"]["id_credits"])
    tokenizer = ours.reward_manager.tokenizer

    class Tokenizer:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            words = [tokenizer.decode([token], skip_special_tokens=skip_special_tokens) for token in tokens]
            return "".join([f" {word}" if word.isdigit() else word.strip() for word in words]).removeprefix(" ")

    ours.reward_manager.tokenizer = Tokenizer()
    found = score(ours, GOLD)["reward_extra_info"]
    assert found["malformed"] == ""
    assert json.loads(found["id_credits"]) == usual


@pytest.mark.parametrize("model", ["base_model", "special_model"])
def test_the_manager_alone_is_enough(composed: Any, model: str, request: pytest.FixtureRequest) -> None:
    """`reward.reward_manager.name=ffr` in a job that names no reward function, on tags of both kinds."""
    path = request.getfixturevalue(model)
    config = composed("main_ppo", "reward.reward_manager.name=ffr", f"actor_rollout_ref.model.path={path}")
    assert score(RewardLoopWorker(config), GOLD)["reward_score"] == pytest.approx(1.3)
    with open_dict(config):
        config.reward.reward_kwargs = OmegaConf.create({"weights": {"f1": 2.0, "mcc": 1.0}})
    result = score(RewardLoopWorker(config), GOLD)
    assert result["reward_score"] == pytest.approx(2.0 + result["reward_extra_info"]["mcc"])
    with open_dict(config):
        config.reward.reward_kwargs = OmegaConf.create({"wieghts": {"f1": 2.0}})
    with pytest.raises(FFRError, match=r"reward_kwargs\.wieghts: unknown key; did you mean 'weights'\?"):
        RewardLoopWorker(config)


@pytest.mark.parametrize("name", ["plain", "mapping", "asynchronous"])
def test_another_reward_function_keeps_working(worker: Any, base_model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "other.py").write_text(
        "def plain(data_source, solution_str, ground_truth, extra_info, bonus):\n"
        "    return float(solution_str == ground_truth) + bonus\n"
        "def mapping(**given):\n"
        "    return {'score': plain(**given), 'length': len(given['solution_str'])}\n"
        "async def asynchronous(**given):\n"
        "    return mapping(**given)\n"
    )
    result = score(
        worker(
            base_model,
            f"reward.custom_reward_function.path={tmp_path / 'other.py'}",
            f"reward.custom_reward_function.name={name}",
            "reward.custom_reward_function.reward_kwargs=null",
            bonus=0.5,
        ),
        GOLD,
    )
    assert result["reward_score"] == pytest.approx(1.5)
    assert result["reward_extra_info"]["malformed"] == ""


def test_decoding_keeps_what_is_inside(special_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(special_model)
    closing = closing_tokens(tokenizer)
    for text in (GOLD, "<|im_end|>" + GOLD, GOLD.partition(";")[0]):
        ids = tokenizer.encode(text + "<|im_end|><|endoftext|>")
        assert decode_answer(tokenizer, ids, closing) == text
    assert decode_answer(tokenizer, [], closing) == ""
