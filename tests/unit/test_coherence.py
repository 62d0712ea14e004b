"""Coherence against a straightforward reading of its definition, and at its edges."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import EmbeddingStore, write_store
from ffr_verl.embeddings.store import write_arrays
from ffr_verl.errors import FFRError
from ffr_verl.rewards import CoherenceScorer, batch, coherence_reward, compute_score

MODES = ("published", "continuous", "gold_anchored")
COUNT_UTTERANCES, COUNT_IMAGES = 8, 5
INFO: dict[str, Any] = {
    "dialogue_id": "d",
    "utterance_ids": list(range(COUNT_UTTERANCES)),
    "image_utterances": [0, 2, 2, 5, 7],
    "images": ["a.png", "b.png", "c.png", "d.png", "a.png"],
}


def text(utterances: Sequence[int], images: Sequence[int]) -> str:
    return format_fragment(Fragment(tuple(utterances), tuple(images)))


def vectors(*, dimension: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    """Of all but utterance 6 and the image d.png, which have none; utterance 4 is all zeros."""
    random = np.random.default_rng(seed)
    keys = [f"utt:d:{number}" for number in range(COUNT_UTTERANCES) if number != 6]
    keys += [f"img:{name}" for name in ("a.png", "b.png", "c.png")]
    found = {key: random.normal(size=dimension).astype(np.float32) for key in keys}
    found["utt:d:4"] = np.zeros(dimension, dtype=np.float32)
    return found


def plain_coherence(
    predicted: Fragment, gold: Fragment, source: Mapping[str, np.ndarray], info: Mapping[str, Any], mode: str
) -> float:
    """The definition word by word, with vectors."""
    predicted_is_empty = not predicted.utterance_ids and not predicted.image_ids
    gold_is_empty = not gold.utterance_ids and not gold.image_ids
    if predicted_is_empty or gold_is_empty:
        return 1.0 if predicted_is_empty and gold_is_empty else 0.0
    if predicted.image_ids and not info["images"]:
        return 0.0
    utterances = {i: source[f"utt:d:{i}"] for i in predicted.utterance_ids if f"utt:d:{i}" in source}
    images = {
        i: source[f"img:{info['images'][i]}"]
        for i in predicted.image_ids
        if i < len(info["images"]) and f"img:{info['images'][i]}" in source
    }
    if mode == "published" and not (utterances and images):
        return 0.0
    sequence: list[tuple[np.ndarray, bool]] = []
    for identifier in sorted(set(utterances) | {info["image_utterances"][i] for i in images}):
        if identifier in utterances:
            sequence.append((utterances[identifier], identifier in gold.utterance_ids))
        held = [i for i in images if info["image_utterances"][i] == identifier]
        if held:
            mean = np.mean([images[i].astype(np.float64) for i in held], axis=0)
            sequence.append((mean, all(i in gold.image_ids for i in held)))
    if mode != "gold_anchored":
        sequence = [(vector, True) for vector, _inside in sequence]
    if not sequence:
        return 0.0
    if len(sequence) == 1:
        return 0.5 if sequence[0][1] else 0.0
    values = []
    for (first, first_inside), (second, second_inside) in itertools.pairwise(sequence):
        a, b = first.astype(np.float64), second.astype(np.float64)
        length = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = float(np.clip(a @ b / length, -1.0, 1.0)) if length else 0.0
        values.append(cosine if first_inside and second_inside else 0.0)
    return sum(values) / len(values)


id_lists = st.lists(st.integers(0, 9), max_size=8)
fragments = st.builds(lambda a, b: Fragment(tuple(a), tuple(b)), id_lists, st.lists(st.integers(0, 6), max_size=5))


@settings(max_examples=100)
@given(fragments, fragments, st.sampled_from(MODES), st.integers(0, 3))
def test_agrees_with_the_definition(predicted: Fragment, gold: Fragment, mode: Any, seed: int) -> None:
    """Random answers: repeats, ids outside the dialogue, ids without a vector, a zero vector, empties."""
    source = vectors(seed=seed)
    value = coherence_reward(
        format_fragment(predicted), format_fragment(gold), extra_info=INFO, store=source, mode=mode
    )
    assert value == pytest.approx(plain_coherence(predicted, gold, source, INFO, mode), abs=1e-6)
    assert -1.0 <= value <= 1.0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_store_gives_the_numbers_of_its_vectors(
    tmp_path: Path, dtype: Any, tolerance: float, normalize: bool
) -> None:
    """fp16 within 2e-3, with the long vectors of real encoders."""
    source = vectors(dimension=384)
    write_store(tmp_path / "store", source.items(), model="random", dtype=dtype, normalize=normalize)
    store = EmbeddingStore.open(tmp_path / "store")
    if normalize:  # means of image vectors are then means of unit vectors, as with a store of unit vectors
        source = {key: vector / (np.linalg.norm(vector) or 1.0) for key, vector in source.items()}
    random = np.random.default_rng(1)
    for _ in range(200):
        predicted = Fragment(
            tuple(random.integers(0, 9, random.integers(0, 8))), tuple(random.integers(0, 6, random.integers(0, 5)))
        )
        gold = Fragment(tuple(random.integers(0, 9, 4)), tuple(random.integers(0, 6, 2)))
        for mode in MODES:
            value = CoherenceScorer(store).score(predicted, gold, INFO, mode)  # type: ignore[arg-type]
            assert value == pytest.approx(plain_coherence(predicted, gold, source, INFO, mode), abs=tolerance)


SQUARE = {
    **{f"utt:d:{number}": np.array(vector, dtype=float) for number, vector in enumerate(([1, 0], [1, 1], [0, 1]))},
    "img:a.png": np.array([0.0, 2.0]),
    "img:b.png": np.array([0.0, -2.0]),
    "img:c.png": np.array([3.0, 0.0]),
}
SMALL = {
    "dialogue_id": "d",
    "utterance_ids": [0, 1, 2],
    "image_utterances": [0, 0, 1],
    "images": ["a.png", "b.png", "c.png"],
}
HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("predicted", "gold", "published", "continuous", "gold_anchored"),
    [
        # Emptiness is all that counts where one of the two is empty; a malformed text is empty.
        (text([], []), text([], []), 1.0, 1.0, 1.0),
        ("malformed", text([], []), 1.0, 1.0, 1.0),
        (text([0], []), text([], []), 0.0, 0.0, 0.0),
        (text([], []), text([0], []), 0.0, 0.0, 0.0),
        ("malformed", text([0], []), 0.0, 0.0, 0.0),
        (text([0], []), "malformed", 0.0, 0.0, 0.0),
        # Text alone: neighbours 0-1 and 1-2 are 45 degrees apart.
        (text([0, 1, 2], []), text([0, 1, 2], []), 0.0, HALF, HALF),
        (text([2, 0, 1, 1], []), text([0, 1, 2], []), 0.0, HALF, HALF),
        (text([0, 1, 2], []), text([0, 1], []), 0.0, HALF, HALF / 2),
        (text([0, 1, 2], []), text([7], []), 0.0, HALF, 0.0),
        # One element.
        (text([0], []), text([0], []), 0.0, 0.5, 0.5),
        (text([0], []), text([1], []), 0.0, 0.5, 0.0),
        (text([], [0]), text([1], [0]), 0.0, 0.5, 0.5),
        # Utterance 0, then its image at a right angle.
        (text([0], [0]), text([0], [0]), 0.0, 0.0, 0.0),
        # Utterance 1 and its image.
        (text([1], [2]), text([1], [2]), HALF, HALF, HALF),
        (text([1], [2]), text([1], [0]), HALF, HALF, 0.0),
        # Two opposite images of utterance 0 have the mean zero: cosine 0.
        (text([1], [0, 1]), text([1], [0, 1]), 0.0, 0.0, 0.0),
        # Images alone: a (of utterance 0), c (of utterance 1), at a right angle; b and c, too.
        (text([], [0, 2]), text([], [0, 2]), 0.0, 0.0, 0.0),
        # Nothing that exists.
        (text([9], [9]), text([0], [0]), 0.0, 0.0, 0.0),
        # An id outside the dialogue is left out.
        (text([0, 1, 9], []), text([0, 1], []), 0.0, HALF, HALF),
    ],
)
def test_worked_cases(predicted: str, gold: str, published: float, continuous: float, gold_anchored: float) -> None:
    for mode, expected in zip(MODES, (published, continuous, gold_anchored), strict=True):
        value = coherence_reward(predicted, gold, extra_info=SMALL, store=SQUARE, mode=mode)  # type: ignore[arg-type]
        assert value == pytest.approx(expected, abs=1e-12), mode


@pytest.mark.parametrize("mode", MODES)
def test_an_image_invented_in_a_dialogue_without_images_earns_nothing(mode: Any) -> None:
    info = {**SMALL, "images": [], "image_utterances": []}
    gold = text([0, 1], [])
    assert coherence_reward(text([0, 1], [0]), gold, extra_info=info, store=SQUARE, mode=mode) == 0.0


def test_reasoning_style() -> None:
    gold = text([0, 1], [])
    wrapped = f"<think>…</think><answer>{gold}</answer>"
    assert coherence_reward(wrapped, gold, extra_info=SMALL, store=SQUARE, style="reasoning") == pytest.approx(HALF)
    assert coherence_reward(gold, gold, extra_info=SMALL, store=SQUARE, style="reasoning") == 0.0


def test_arrays_serve_as_lists() -> None:
    """verl may hand the columns of a row over as numpy arrays."""
    info = {**SMALL, "utterance_ids": np.arange(3), "images": np.array(SMALL["images"], dtype=object)}
    gold = text([0, 1], [2])
    expected = coherence_reward(gold, gold, extra_info=SMALL, store=SQUARE)
    scorer = CoherenceScorer(SQUARE)
    for _ in range(2):
        assert scorer.score(Fragment((0, 1), (2,)), Fragment((0, 1), (2,)), info) == pytest.approx(expected)


def test_dialogues_that_share_an_id_are_told_apart() -> None:
    """Splits may name different rows alike; the second must not be scored with the first one's images."""
    scorer = CoherenceScorer(SQUARE)
    fragment = Fragment((1,), (0,))
    for _ in range(2):
        for images, expected in ((["c.png"], HALF), (["b.png"], -HALF)):
            info = {**SMALL, "images": images, "image_utterances": [1]}
            assert scorer.score(fragment, fragment, info) == pytest.approx(expected)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last dialogues needed is kept, and looked up again for those before them."""
    monkeypatch.setattr("ffr_verl.rewards.coherence._MOST_COSINES", 20)
    looked_up: list[str] = []

    class Source(dict[str, np.ndarray]):
        def get(self, key: str, default: Any = None) -> Any:
            looked_up.append(key)
            return super().get(key)

    scorer = CoherenceScorer(Source({f"utt:{name}:{number}": np.ones(2) for name in range(40) for number in range(3)}))
    fragment = Fragment((0, 1), ())

    def score(names: Sequence[int]) -> list[str]:
        looked_up.clear()
        for name in names:
            info = {"dialogue_id": str(name), "utterance_ids": [0, 1, 2], "image_utterances": [], "images": []}
            assert scorer.score(fragment, fragment, info) == pytest.approx(1.0)
        return looked_up

    assert len(score(range(40))) == 80
    assert score([39, 38, 37, 39, 38]) == []
    assert score([0]) == ["utt:0:0", "utt:0:1"]


def test_missing_keys_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    source = {"utt:d:0": np.ones(2), "utt:d:1": np.ones(2), "utt:e:0": np.ones(2)}
    scorer = CoherenceScorer(source)
    fragment = Fragment((0, 1, 2), (0, 2))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert scorer.score(fragment, fragment, SMALL) == pytest.approx(1.0)
        scorer.score(fragment, fragment, {**SMALL, "dialogue_id": "e"})
    assert len(caplog.records) == 1
    assert "no vector for img:a.png of dialogue d: it is left out of coherence." in caplog.text
    assert scorer.missing_keys == 5  # named in answers: of d one utterance, of e two, two images
    assert scorer.missing_in(fragment, SMALL) == 3  # utterance 2, images 0 and 2
    assert scorer.missing_in(None, SMALL) == 0


def test_a_mapping_is_complained_of_once_too(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Nothing is kept of a mapping between calls, as it may change; not even then is each answer worth a warning."""
    monkeypatch.setattr("ffr_verl.rewards.coherence._MISSING_IN_MAPPINGS", set())
    source = {"utt:d:0": np.ones(2), "utt:d:1": np.ones(2)}
    gold = text([0, 1, 2], [])
    for _ in range(3):
        assert coherence_reward(gold, gold, extra_info=SMALL, store=source) == pytest.approx(1.0)
    batch.coherence([gold] * 3, [gold] * 3, store=source, extra_info=[SMALL] * 3)
    assert len(caplog.records) == 1
    source["utt:d:2"] = -np.ones(2)
    assert coherence_reward(gold, gold, extra_info=SMALL, store=source) == pytest.approx(0.0)


def test_what_is_known_to_have_no_vector_is_not_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An utterance without text, the images of a text-only encoder: left out, and nothing to complain of."""
    index = [("utt:d:0", 0), ("utt:d:1", 0), ("utt:d:2", -1), *((f"img:{name}.png", -1) for name in "abc")]
    write_arrays(tmp_path / "s", rows=[np.ones((1, 2))], index=index, dimension=2, model="text only")
    scorer = CoherenceScorer(EmbeddingStore.open(tmp_path / "s"))
    fragment = Fragment((0, 1, 2), (0,))
    assert scorer.score(fragment, fragment, SMALL) == pytest.approx(1.0)
    assert scorer.missing_keys == scorer.missing_in(fragment, SMALL) == 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "missing: dialogue_id, utterance_ids, image_utterances, images; `ffr-verl prepare` writes them"),
        ({**SMALL, "images": None}, "missing: images"),
        ({**SMALL, "image_utterances": [0]}, "extra_info: 1 image_utterances for 3 images"),
    ],
)
def test_extra_info_without_a_field_is_named(info: dict[str, Any], message: str) -> None:
    gold = text([0], [])
    with pytest.raises(FFRError, match=message):
        coherence_reward(gold, gold, extra_info=info, store=SQUARE)


def test_another_mode_is_refused() -> None:
    with pytest.raises(FFRError, match=r"coherence\.mode: found 'best', expected one of published"):
        coherence_reward("", "", extra_info=SMALL, store=SQUARE, mode="best")  # type: ignore[arg-type]


@pytest.fixture
def small_store(tmp_path: Path) -> str:
    write_store(tmp_path / "store", SQUARE.items(), model="square")
    return str(tmp_path / "store")


@pytest.mark.parametrize("mode", MODES)
def test_compute_score_weighs_coherence_in(small_store: str, mode: Any) -> None:
    completion, gold = text([1], [2]), text([1], [0])
    coherence = coherence_reward(completion, gold, extra_info=SMALL, store=SQUARE, mode=mode)
    scores = compute_score("ffr/mldr", completion, gold, SMALL, embeddings=small_store, coherence_mode=mode)
    assert scores["coherence"] == pytest.approx(coherence)
    assert scores["score"] == pytest.approx(scores["f1"] + coherence + 0.3)
    heavier = compute_score(
        "", completion, gold, SMALL, embeddings=small_store, coherence_mode=mode, weights={"coherence": 5.0}
    )
    assert heavier["score"] == pytest.approx(5.0 * coherence)


def test_compute_score_names_what_extra_info_lacks(small_store: str) -> None:
    gold = text([1], [])
    with pytest.raises(FFRError, match="extra_info: coherence needs dialogue_id"):
        compute_score("", gold, gold, None, embeddings=small_store)
    with pytest.raises(FFRError, match=r"extra_info\.utterance_ids is missing; mcc and f1_mode micro need it"):
        compute_score("", gold, gold, None, weights={"mcc": 1.0})


def test_mcc_joins_the_result_when_it_has_a_weight() -> None:
    gold = text([1], [])
    assert "mcc" not in compute_score("", gold, gold, SMALL)
    scores = compute_score("", gold, gold, SMALL, weights={"mcc": 2.0, "f1": 1.0})
    assert scores["mcc"] == pytest.approx(1.0)
    assert scores["score"] == pytest.approx(3.0)
    assert compute_score("", "x", gold, SMALL, weights={"mcc": 2.0})["mcc"] == 0.0


def test_batch_takes_the_dialogue_from_extra_info_or_from_mldr_columns(small_store: str) -> None:
    prompt = "<|query_start|>q<|query_end|>\n" + "\n".join(
        f"<|utt_id_start|>{number}<|utt_id_end|> user1: hi{images}"
        for number, images in enumerate(
            (
                "<|img_id_start|>0<|img_id_end|><image><|img_id_start|>1<|img_id_end|><image>",
                "<|img_id_start|>2<|img_id_end|><image>",
                "",
            )
        )
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}]
    gold = text([1], [2])
    expected = [pytest.approx(HALF), 0.0]
    completions, solution = [gold, "x"], [gold, gold]
    assert batch.coherence(completions, solution, store=small_store, extra_info=[SMALL, SMALL]) == expected
    reward = batch.configure(batch.coherence, store=small_store)
    columns: dict[str, Any] = {"dialogue_id": ["d", "d"], "images": [SMALL["images"]] * 2, "trainer_state": object()}
    assert reward(completions, solution, messages=[messages, messages], **columns) == expected
    assert reward(completions, solution, prompts=[prompt, messages], **columns) == expected
    objects = [[{"path": name} for name in SMALL["images"]]] * 2
    assert reward(completions, solution, messages=[messages] * 2, dialogue_id=["d"] * 2, images=objects) == expected
    scores = batch.configure(batch.ffr, reward_kwargs={"embeddings": small_store})(
        completions, solution, messages=[messages, messages], **columns
    )
    assert scores == [pytest.approx(1.3 + HALF), 0.0]
    assert batch.mcc([gold], [gold], messages=[messages], dialogue_id=["d"], images=[SMALL["images"]]) == [1.0]


def test_a_store_is_opened_once_a_process(small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever name and from whichever reward it is asked for, and only when it is."""
    opened: list[str] = []
    original = EmbeddingStore.open.__func__  # type: ignore[attr-defined]

    def counting(cls: type[EmbeddingStore], path: Any, *, verify: bool = False) -> EmbeddingStore:
        opened.append(str(path))
        return original(cls, path, verify=verify)  # type: ignore[no-any-return]

    monkeypatch.setattr(EmbeddingStore, "open", classmethod(counting))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(small_store)
    gold = text([0, 1], [])
    rewards = [batch.configure(batch.coherence, store=name) for name in (small_store, "store", Path("link"))]
    assert opened == []
    for reward in rewards:
        assert reward([gold], [gold], extra_info=[SMALL]) == [pytest.approx(HALF)]
    for mode in MODES:
        compute_score("", gold, gold, SMALL, embeddings="link", coherence_mode=mode)
    assert len(opened) == 1


def test_batch_says_which_columns_it_needs() -> None:
    gold = text([1], [])
    with pytest.raises(FFRError, match="coherence needs an embedding store: configure"):
        batch.coherence([gold], [gold])
    with pytest.raises(FFRError, match=r"needs the dialogue of each row: a column extra_info .* found images"):
        batch.coherence([gold], [gold], store=SQUARE, images=[[]])
    with pytest.raises(FFRError, match=r"row 0 of the batch: column messages: no <\|query_start\|>"):
        batch.mcc([gold], [gold], messages=[[{"role": "user", "content": "hi"}]], dialogue_id=["d"])
    with pytest.raises(FFRError, match="column extra_info: 1 values for 2 completions"):
        batch.mcc([gold, gold], [gold, gold], extra_info=[SMALL])
    prompt = "<|query_start|>q<|query_end|>\n<|utt_id_start|>0<|utt_id_end|> a: <|img_id_start|>0<|img_id_end|><image>"
    decoded: dict[str, Any] = {"prompts": [prompt], "dialogue_id": ["d"], "images": [[Image.new("RGB", (8, 8))]]}
    with pytest.raises(
        FFRError, match=r"row 0 of the batch: extra_info\.images: found \(Image\), expected the image's path"
    ):
        batch.coherence([gold], [gold], store=SQUARE, **decoded)
    assert batch.mcc([gold], [gold], **decoded) == [1.0], "only their number matters there"
    weighing_mcc = batch.configure(batch.ffr, reward_kwargs={"weights": {"f1": 1.0, "mcc": 1.0}})
    assert weighing_mcc([gold], [gold], **decoded) == [2.0]
    with pytest.raises(FFRError, match=r"coherence\.weights: unknown key"):
        batch.configure(batch.coherence, weights=1)


def test_a_configured_reward_keeps_its_name() -> None:
    """Trainers label their curves with `__name__`."""
    assert batch.configure(batch.f1, beta=2.0).__name__ == "f1"
    assert batch.configure(batch.ffr).__name__ == "ffr"
