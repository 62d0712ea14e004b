"""A small MLDR-like set drawn by a seeded generator: real image files, no download, nothing to license.

Each dialogue mixes three topics. A topic has words of its own and an emblem (a shape in a colour); an utterance that
only shows an emblem belongs to the topic that the picture shows, so an answer needs the images. In a *dense* dialogue
the topics follow each other in blocks; in a *scattered* one they take turns. A query names one topic by words of it;
some queries name a topic that the dialogue does not touch, and their gold fragment is empty.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw

from ffr_verl.data.compose import ComposeSettings, Query, ShortDialogue, compose
from ffr_verl.data.sources.raw_dialogues import rows_of_raw_dialogue
from ffr_verl.data.templates import PromptTemplate
from ffr_verl.files import whole_or_nothing

SYSTEM = "you retrieve fragments from dialogues"
INSTRUCTION = "give the ids of the utterances and images that match the query"

_TEMPLATE = PromptTemplate(user="{query}\n" + INSTRUCTION + "\n{dialogue}", system=SYSTEM)

Shape = Literal["circle", "square", "triangle"]


@dataclass(frozen=True, slots=True)
class Topic:
    """A subject of talk: its words and the emblem that its images show."""

    name: str
    words: tuple[str, ...]
    shape: Shape
    colour: tuple[int, int, int]


_RED, _GREEN, _BLUE, _YELLOW = (210, 40, 40), (40, 170, 70), (50, 80, 220), (230, 200, 40)

TOPICS: tuple[Topic, ...] = (
    Topic("garden", ("roses", "soil", "seeds", "tulips", "hedge"), "circle", _GREEN),
    Topic("cooking", ("soup", "pepper", "oven", "recipe", "onion"), "circle", _RED),
    Topic("travel", ("train", "ticket", "suitcase", "hotel", "airport"), "circle", _BLUE),
    Topic("music", ("guitar", "concert", "piano", "singer", "drums"), "circle", _YELLOW),
    Topic("football", ("goal", "match", "coach", "team", "referee"), "square", _GREEN),
    Topic("work", ("office", "meeting", "boss", "salary", "deadline"), "square", _RED),
    Topic("weather", ("rain", "snow", "storm", "sunshine", "wind"), "square", _BLUE),
    Topic("pets", ("puppy", "kitten", "leash", "hamster", "parrot"), "square", _YELLOW),
    Topic("school", ("exam", "teacher", "homework", "pupil", "lesson"), "triangle", _GREEN),
    Topic("cars", ("engine", "tyres", "brakes", "garage", "fuel"), "triangle", _RED),
    Topic("health", ("doctor", "fever", "cough", "medicine", "nurse"), "triangle", _BLUE),
    Topic("money", ("bank", "loan", "savings", "coins", "taxes"), "triangle", _YELLOW),
)

_TEMPLATES = (
    "{a} and {b} again",
    "did you see the {a}",
    "we need {a} for the {b}",
    "no {a} without {b}",
    "i like the {a}",
    "tell me about the {a} and the {b}",
    "the {a} was good",
)
_IMAGE_TEXTS = ("", "look at this", "here you are")
_QUERY_TEMPLATES = ("the part about {a}", "where they talk about {a} and {b}", "about {a} and {b}")
_OWN_WORDS = ("user1", "user2")
_MOST_IMAGES = 8  # the recipes' rollout.limit_images; a dialogue that drew more is drawn again


def demo_vocabulary() -> tuple[str, ...]:
    """Every word that the generator can write, sorted; a word-level tokenizer needs no other."""
    texts = [*_TEMPLATES, *_IMAGE_TEXTS, *_QUERY_TEMPLATES, SYSTEM, INSTRUCTION, *_OWN_WORDS]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    for topic in TOPICS:
        words.update(topic.words)
    return tuple(sorted(words))


def draw_emblem(topic: Topic, rng: random.Random, *, size: int = 56) -> Image.Image:
    """An RGB picture, `size` pixels a side, of the topic's shape in its colour, a little moved and scaled."""
    image = Image.new("RGB", (size, size), (245, 245, 240))
    draw = ImageDraw.Draw(image)
    radius = rng.uniform(0.32, 0.46) * size
    centre_x, centre_y = (size / 2 + rng.uniform(-0.05, 0.05) * size for _ in range(2))
    box = (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius)
    if topic.shape == "circle":
        draw.ellipse(box, fill=topic.colour)
    elif topic.shape == "square":
        draw.rectangle(box, fill=topic.colour)
    else:
        draw.polygon([(centre_x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=topic.colour)
    return image


def _short_dialogue(
    topic: Topic, turns: int, pictures: list[str], image_share: float, literal_share: float, rng: random.Random
) -> ShortDialogue:
    """Some turns about two words of a topic, and three queries for them."""
    subject = rng.sample(topic.words, 2)
    others = [word for word in topic.words if word not in subject]
    made: list[dict[str, Any]] = []
    for _ in range(turns):
        if rng.random() < image_share:
            text = rng.choice(_IMAGE_TEXTS)
            made.append({"utterance": [*([text] if text else []), {"image_url": rng.choice(pictures)}]})
        else:
            literal = rng.random() < literal_share
            words = [rng.choice(subject), rng.choice(others)] if literal or len(others) < 2 else rng.sample(others, 2)
            made.append({"utterance": rng.choice(_TEMPLATES).format(a=words[0], b=words[1])})
    queries = tuple([Query(query.format(a=subject[0], b=subject[1])) for query in _QUERY_TEMPLATES])
    return ShortDialogue(topic.name, topic.name, tuple(made), queries)


def demo_rows(
    images_dir: Path,  # of the pictures; made when missing, its name starts the paths in the rows
    *,
    rows: int,
    seed: int = 0,
    turns_per_topic: tuple[int, int] = (1, 4),  # least and most of each of the three topics
    empty_share: float = 0.15,  # of queries whose topic the dialogue does not touch
    image_share: float = 0.25,  # of turns that show a picture instead of topic words; a dialogue may have none
    literal_share: float = 0.8,  # of the other turns that say a word of the query; the rest say others of their topic
    emblems: int = 4,  # pictures drawn of each topic
    prefix: str = "demo",  # start of each `dialogue_id`
) -> Iterator[dict[str, Any]]:
    """Rows in the MLDR format, a dialogue and a query each; equal arguments and seed give equal rows and pictures."""
    rng = random.Random(seed)
    images_dir.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[str]] = {}
    for topic in TOPICS:
        names = [f"{topic.name}_{number}.png" for number in range(emblems)]
        for name in names:
            draw_emblem(topic, rng).save(images_dir / name)
        pictures[topic.name] = [f"{images_dir.name}/{name}" for name in names]
    settings = ComposeSettings(negatives=empty_share)
    number = 0
    while number < rows:
        topics = rng.sample(TOPICS, 4)
        turns = rng.randint(*turns_per_topic)
        *parts, absent = (
            _short_dialogue(topic, turns, pictures[topic.name], image_share, literal_share, rng) for topic in topics
        )
        if sum(isinstance(turn["utterance"], list) for part in parts for turn in part.turns) > _MOST_IMAGES:
            continue
        dialogue = compose(f"{prefix}_{number:05d}", parts, absent, settings, rng)
        yield from rows_of_raw_dialogue(dialogue, template=_TEMPLATE)
        number += 1


def write_demo_set(
    output: Path, *, train_rows: int, heldout_rows: int, seed: int = 0, **options: Any
) -> tuple[Path, Path]:
    """Write `train.json`, `heldout.json` and `images/` under `output`; returns the two JSON paths.

    The two splits have no dialogue in common. Options go to `demo_rows`.
    """
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, rows, split_seed in (("train", train_rows, seed), ("heldout", heldout_rows, seed + 1_000_003)):
        path = output / f"{split}.json"
        made = demo_rows(output / f"images_{split}", rows=rows, seed=split_seed, prefix=f"demo_{split}", **options)
        with whole_or_nothing([path]) as (temporary,):
            temporary.write_text(json.dumps(list(made), ensure_ascii=False, indent=1), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]
