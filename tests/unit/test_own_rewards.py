"""Rewards of one's own: those of docs/rewards.md, wherever ours have a place, and what goes wrong in others."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_examples import written_example
from fake_server import completion, fake_server
from hydra.core.override_parser.overrides_parser import OverridesParser
from typer.testing import CliRunner

from ffr_verl import Fragment, format_fragment
from ffr_verl.cli import app
from ffr_verl.data.parquet_files import row_of_file
from ffr_verl.embeddings import write_store
from ffr_verl.errors import FFRError
from ffr_verl.evaluation import BootstrapSettings, compare, count_records, evaluate, evaluate_file
from ffr_verl.rewards import RewardConfig, batch, compute_score
from ffr_verl.samplers.advantages import ScoredAnswer, gdpo_advantages

GOLD = format_fragment(Fragment((1, 2), ()))
INFO = {"dialogue_id": "d7", "query": "q", "utterance_ids": [0, 1, 2], "image_utterances": [], "images": []}


@pytest.fixture
def brevity(tmp_path: Path) -> dict[str, Any]:
    file = written_example("rewards.md", "brevity.py", tmp_path)
    components = {"brevity": {"function": f"{file}:brevity", "most": 60}}
    return {"weights": {"f1": 1.0, "brevity": 0.2}, "components": components}


def value(text: str) -> float:
    return 1 / (1 + len(text) / 60)


def test_it_has_a_weight_and_a_key(brevity: dict[str, Any]) -> None:
    for answer in (GOLD, "no idea", ""):
        found = compute_score("", answer, GOLD, INFO, **brevity)
        assert found["brevity"] == pytest.approx(value(answer))
        assert found["score"] == pytest.approx(found["f1"] + 0.2 * value(answer))
    del brevity["weights"]["brevity"]
    assert compute_score("", None, GOLD, INFO, **brevity)["score"] == 0.0, "shown, and not counted"  # type: ignore[arg-type]
    plain = compute_score("", GOLD, GOLD)
    assert "brevity" not in plain


def test_settings_that_change_in_place_count(brevity: dict[str, Any]) -> None:
    before = compute_score("", GOLD, GOLD, **brevity)
    brevity["components"]["brevity"]["most"] = 1
    assert compute_score("", GOLD, GOLD, **brevity)["brevity"] < before["brevity"]


def test_a_store_that_it_can_do_without(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mine(completion, solution, *, store=None): return float(store is not None)")
    kwargs: dict[str, Any] = {"components": {"mine": f"{tmp_path}/mine.py:mine"}}
    assert compute_score("", GOLD, GOLD, INFO, **kwargs)["mine"] == 0.0
    write_store(tmp_path / "store", [("utt:d:0", np.ones(2))], model="toy")
    assert compute_score("", GOLD, GOLD, INFO, embeddings=str(tmp_path / "store"), **kwargs)["mine"] == 1.0


def test_a_package_too() -> None:
    components = {"exact": "pkg://ffr_verl/rewards/exact_match:exact_match_reward"}
    assert compute_score("", GOLD, GOLD, components=components)["exact"] == 1.0


def test_it_has_an_advantage_of_its_own(brevity: dict[str, Any]) -> None:
    group = [ScoredAnswer(1, 0.0, compute_score("", answer, GOLD, **brevity)) for answer in (GOLD, "no", "")]
    advantages = [float(one[0]) for one in gdpo_advantages([group], {"brevity": 0.3})[0]]
    assert advantages == sorted(advantages)
    assert len(set(advantages)) == 3


def test_overrides_of_a_command_line(tmp_path: Path) -> None:
    """The shell's lines of the docs, as Hydra reads them."""
    place = "+reward.custom_reward_function.reward_kwargs"
    door = "rewards/brevity.py:brevity"
    given = {
        f"{place}.components.brevity={door}": door,
        f"{place}.components.brevity=pkg://my.module:brevity": "pkg://my.module:brevity",
        f"{place}.components.brevity={{function: {door}, most: 60}}": {"function": door, "most": 60},
        f"{place}.weights.brevity=0.2": 0.2,
    }
    found = OverridesParser.create().parse_overrides(list(given))
    assert [json.loads(json.dumps(one.value(), default=str)) for one in found] == list(given.values())


def row(answer: str, turns: int = 3, **more: Any) -> dict[str, Any]:
    lines = "".join([f"<|utt_id_start|>{turn}<|utt_id_end|> a: turn {turn}" for turn in range(turns)])
    prompt = f"<|query_start|>q<|query_end|>{lines}"
    messages = [{"role": "user", "content": prompt}]
    return {"response": answer, "labels": GOLD, "messages": messages, "dialogue_id": "d7", **more}


def test_it_has_a_column_in_evaluations(brevity: dict[str, Any], tmp_path: Path) -> None:
    answers = [GOLD, "no idea", GOLD.replace("2", "0")]
    rows = [*map(row, answers), row("", error="timeout")]
    result = evaluate(rows, reward_kwargs=brevity)
    mean = sum(map(value, answers)) / 4  # a row without an answer earns nothing
    assert result.rewards["brevity"] == pytest.approx(mean)
    assert result.intervals is not None
    low, high = result.intervals["rewards"]["brevity"]
    assert low < mean < high
    assert [part.rewards["brevity"] for part in result.breakdowns["gold"]] == [pytest.approx(mean)]
    ours = {**brevity, "components": {}, "weights": {"f1": 1.0}}
    without = evaluate(rows, reward_kwargs=ours)
    assert {**result.rewards, "brevity": 0} == {**without.rewards, "brevity": 0}
    assert result.micro == without.micro
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    none = BootstrapSettings(resamples=0)
    assert evaluate_file(tmp_path / "p.jsonl", reward_kwargs=brevity, bootstrap=none).rewards == result.rewards
    counts = [count_records(some, reward_kwargs=brevity) for some in (rows, rows[:1])]
    assert compare(*counts).difference["rewards"]["brevity"] == pytest.approx(0.0)


def test_it_has_a_column_in_the_command_and_the_report(brevity: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row(GOLD)) + "\n" + json.dumps(row("no idea", turns=0)))
    (tmp_path / "rewards.yaml").write_text(json.dumps(brevity))
    given = [str(tmp_path / "p.jsonl"), "--reward-kwargs", str(tmp_path / "rewards.yaml")]
    run = CliRunner().invoke(app, ["evaluate", *given, "--json", str(tmp_path / "r.json"), "--bootstrap", "0"])
    assert run.exit_code == 0, run.output
    assert "brevity" in run.output
    found = json.loads((tmp_path / "r.json").read_text())["rewards"]["brevity"]
    assert found == pytest.approx((value(GOLD) + value("no idea")) / 2)
    run = CliRunner().invoke(app, ["report", *given, "--output", str(tmp_path / "r.html")])
    assert run.exit_code == 0, run.output
    page = (tmp_path / "r.html").read_text()
    assert f'"brevity":{round(value(GOLD), 4)}' in page.replace(" ", "")
    assert '"components":["brevity"]' in page.replace(" ", "")


def test_it_is_a_function_for_other_trainers(brevity: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, name = brevity["components"]["brevity"]["function"].rpartition("/")
    monkeypatch.chdir(folder)
    ours = batch.component(name, most=60)
    whole = batch.configure(batch.ffr, weights={"brevity": 2.0}, components={"brevity": name})
    monkeypatch.chdir("/")
    assert ours.__name__ == "brevity"
    conversation = [{"role": "assistant", "content": "no idea"}]
    assert ours([GOLD, conversation], [GOLD] * 2) == pytest.approx([value(GOLD), value("no idea")])
    assert whole([""], [GOLD]) == [2.0]

    def asks(completion: str, solution: str, *, extra_info: dict[str, Any], style: str) -> float:
        return len(extra_info["utterance_ids"]) + (style == "reasoning") / 2

    found = batch.component(asks, answer_style="reasoning")([GOLD], [GOLD], extra_info=[INFO])
    assert found == [3.5]
    with pytest.raises(FFRError, match="this reward needs the dialogue of each row"):
        batch.component(asks)([GOLD], [GOLD])


MINE = """
import random
def raises(completion, solution, *, extra_info):
    return 1 / len(completion)
def nan(completion, solution): return float("nan")
def a_list(completion, solution): return [1.0]
def keys(completion, solution): return {"score": 1.0, "length": 2}
def none(completion, solution): return None
def chance(completion, solution): return random.random()
def huge(completion, solution): return 10**400
def leaves(completion, solution): raise SystemExit(3)
class Mute(Exception):
    def __str__(self): raise ValueError
def mute(completion, solution): raise Mute
def changes(completion, solution, *, extra_info):
    extra_info["seen"] = extra_info.get("seen", 0) + 1
    return 1.0
def numpy(completion, solution):
    import numpy
    return numpy.float32(0.5)
async def later(completion, solution): return 1.0
def narrow(completion): return 1.0
def asks(completion, solution, *, model): return 1.0
class Whole:
    pass
number = 1
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"dialogue d7: raised ZeroDivisionError: division by zero \(mine\.py, line 4\); a component returns",
        ),
        ("nan", r"returned nan; a component returns one finite number for any completion"),
        ("a_list", r"returned a list; a component"),
        ("keys", r"returned a dict with the keys score, length; a component"),
        ("none", r"returned a NoneType"),
        ("huge", r"raised OverflowError: int too large"),
        ("leaves", r"raised SystemExit: 3 \(mine\.py"),
        ("mute", r"raised Mute: <"),
        ("changes", r"changed extra_info, which other rewards read; it must be pure"),
        ("chance", r"returned 0\.\d+, then 0\.\d+ for the same answer; it must be pure"),
    ],
)
def test_what_goes_wrong_names_reward_and_row(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    kwargs = {"components": {"mine": f"{tmp_path}/mine.py:{name}"}}
    with pytest.raises(FFRError, match=rf"reward mine \(.*mine\.py:{name}\): .*{message}"):
        compute_score("", GOLD, GOLD, INFO, **kwargs)
    with pytest.raises(
        FFRError, match=r"record 0: reward mine .*dialogue d7" if name == "raises" else "record 0: rew"
    ):
        evaluate([row(GOLD)], reward_kwargs=kwargs)
    with pytest.raises(FFRError, match="row 0 of the batch: reward mine"):
        batch.component(kwargs["components"]["mine"], name="mine")([GOLD], [GOLD], extra_info=[INFO])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mine": "MINE:later"}, r"MINE:later is an async function, expected f\(completion, solution"),
        ({"mine": "MINE:Whole"}, "is a class, expected f"),
        ({"mine": "MINE:narrow"}, r"takes \(completion\), expected f"),
        ({"mine": "MINE:number"}, "is of type int, expected a function"),
        (
            {"mine": "MINE:asks"},
            r"needs model, which is not one of .*, store nor a setting; give it: \{function: .*, model: \.\.\.\}",
        ),
        ({"mine": {"function": "MINE:asks", "modl": 1}}, r"mine\.modl: unknown key; did you mean 'model'\?"),
        ({"mine": {"function": "MINE:nan", "weight": 1}}, r"mine\.weight: unknown key"),
        ({"mine": "MINE:nam"}, r"there is no nam in it; did you mean 'nan'\?"),
        ({"mine": "nowhere.py:mine"}, r"nowhere\.py:mine: no such file on .*same path on every machine"),
        ({"mine": "MINE"}, r"expected path/to/file\.py:name"),
        ({"mine": "pkg://no_such_module:f"}, r"cannot be imported: ModuleNotFoundError: No module named 'no_such_m"),
        ({"mine": {"functio": "MINE:asks"}}, r"mine\.functio: unknown key; did you mean 'function'\?"),
        ({"mine": "no_such_name"}, r"found 'no_such_name', expected one of .*entry point of group ffr_verl\.rewards"),
        ({"f1": "MINE:nan"}, r"\.f1: there is a metric of this name already"),
        ({"f1_images": "MINE:nan"}, "there is a metric of this name already"),
        ({"micro_x": "MINE:nan"}, "there is a metric of this name already"),
        ({"a/b": "MINE:nan"}, r"found 'a/b', expected letters, digits and _"),
        ({"mine": 3}, r"found 3, expected pkg://module:name"),
        ([1], r": found \[1\], expected a mapping"),
    ],
)
def test_what_is_no_component(tmp_path: Path, kwargs: Any, message: str) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    given = json.loads(json.dumps(kwargs).replace("MINE", f"{tmp_path}/mine.py"))
    with pytest.raises(FFRError, match=rf"reward_kwargs\.components.*{message.replace('MINE', '.*')}"):
        RewardConfig.from_kwargs({"components": given})


def test_all_that_are_none_are_told_at_once() -> None:
    with pytest.raises(FFRError) as raised:
        RewardConfig.from_kwargs({"components": {"f1": "pkg://a:b", "no name": "pkg://a:b", "c": "pkg://absent:c"}})
    assert [line.split(":")[0] for line in str(raised.value).split("\n")] == [
        f"reward_kwargs.components.{name}" for name in ("f1", "no name", "c")
    ]


def test_numbers_of_other_kinds_are_fine(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    found = compute_score("", GOLD, GOLD, components={"mine": f"{tmp_path}/mine.py:numpy"})["mine"]
    assert (type(found), found) == (float, 0.5)


def test_a_weight_of_nothing_is_an_error() -> None:
    with pytest.raises(FFRError, match=r"weights\.f2: unknown key; .*own stands in reward_kwargs\.components"):
        RewardConfig.from_kwargs({"weights": {"f2": 1.0}})


def test_the_judge_of_the_docs(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once for a question, eight at a time; a server that is not there is an error that names it."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    door = f"{written_example('rewards.md', 'judge.py', tmp_path)}:judge"
    data = parquet / "heldout.rl.parquet"
    info = row_of_file(data, 0)["extra_info"]
    with fake_server() as server:
        server.reply = lambda body, number: completion("7 of 10")
        given = {"function": door, "endpoint": server.url, "model": "m", "data": [str(data)]}
        kwargs: dict[str, Any] = {"components": {"judge": given}}
        answers = [format_fragment(Fragment((one,), ())) for one in range(6)]
        gold = answers[0]
        assert compute_score("", "no idea", gold, info, **kwargs)["judge"] == 0.0
        with ThreadPoolExecutor(12) as threads:
            found = list(threads.map(lambda one: compute_score("", one, gold, info, **kwargs)["judge"], answers * 4))
        asked = len(server.bodies)
        assert set(found) <= {0.0, 0.7}
        assert 0.7 in found
        assert server.most_at_once <= 8
        assert info["query"] in server.texts()[0]
        assert [compute_score("", one, gold, info, **kwargs)["judge"] for one in answers] == found[:6]
        assert len(server.bodies) == asked, "kept"
    given["model"] = "other"
    with pytest.raises(FFRError, match=r"reward judge .*: dialogue .*: raised APIConnectionError: Connection error"):
        compute_score("", gold, gold, info, **kwargs)
