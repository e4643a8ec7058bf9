"""Captions reach their pictures from every container, and those that cannot are counted and named."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fid_imagegen.data import pipeline
from fid_imagegen.data.captions import texts
from fid_imagegen.data.sources import make_source

CLASSES = ("bird", "cat", "dog")
FILES = [f"{CLASSES[i // 3]}/{i}.png" for i in range(9)]
CAPTIONS = [(f"picture {i}, ö",) if i % 2 else (f"picture {i}, ö", f"again {i}") for i in range(9)]


def write_csv(folder):
    lines = ["number,caption,file"]
    lines += [f'{i},"{text}",{file}' for i, (file, all) in enumerate(zip(FILES, CAPTIONS, strict=True)) for text in all]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # as spreadsheets save it


def write_jsonl(folder):
    rows = [{"file": file, "caption": text} for file, all in zip(FILES, CAPTIONS, strict=True) for text in all]
    (folder / "captions.csv").unlink()
    (folder / "captions.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_txt(folder):
    (folder / "captions.csv").unlink()
    for file, all in zip(FILES, CAPTIONS, strict=True):
        (folder / file).with_suffix(".txt").write_text("\n".join(all) + "\n\n", encoding="utf-8")


WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "txt": write_txt}


@pytest.fixture
def captioned(config):
    def make(path, **changes):
        return make_source(config(**{"source": "captions", "path": path, "channels": 3, **changes}))

    return make


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("container", ["folder", "zip"])
def test_captions_of_every_kind(folder, tmp_path, images, captioned, kind, container):
    WRITERS[kind](folder)
    path = folder
    if container == "zip":
        path = shutil.make_archive(str(tmp_path / "made"), "zip", folder.parent, "set")  # all within one folder
    source = captioned(path)
    assert [source[i]["captions"] for i in range(9)] == [source.captions(i) for i in range(9)] == CAPTIONS
    np.testing.assert_array_equal([source[i]["image"] for i in range(9)], images)
    assert [source[i]["label"] for i in range(9)] == [i // 3 for i in range(9)] and source.num_classes == 3
    assert list(texts(source)) == [text for all in CAPTIONS for text in all]


SEPARATED = "above\u2028below\u0085end"  # `str.splitlines` cuts at both


@pytest.mark.parametrize("name", ["captions.jsonl", "a.txt"])
def test_only_a_line_feed_ends_a_line(tmp_path, images, captioned, name):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    row = json.dumps({"file": "a.png", "caption": SEPARATED}, ensure_ascii=False)
    text = row if name.endswith("jsonl") else SEPARATED
    (tmp_path / name).write_text(f"{text}\r\n{text}\n", encoding="utf-8", newline="")
    assert captioned(tmp_path).captions(0) == (SEPARATED, SEPARATED)


def test_fingerprint_follows_the_captions_and_not_their_container(folder, captioned):
    found = set()
    for write in WRITERS.values():
        write_csv(folder)
        write(folder)
        found.add(captioned(folder).fingerprint)
        (folder / "captions.jsonl").unlink(missing_ok=True)
    assert len(found) == 1
    text = (folder / FILES[4]).with_suffix(".txt")
    text.write_text(text.read_text(encoding="utf-8").replace("picture", "Picture"), encoding="utf-8")
    assert captioned(folder).fingerprint not in found


def test_a_folder_without_captions_in_use_is_as_before(folder, config):
    before = make_source(config(source="folder", path=folder))
    write_csv(folder)
    after = make_source(config(source="folder", path=folder))
    assert before.fingerprint == after.fingerprint and set(after[0]) == {"image", "label"}
    assert not hasattr(after, "captions")


# Batches: one of the captions, by the example's bits; tokens in place of texts.


def take(count, source, made, **options):
    iterator = pipeline.batches(source, made, **{"seed": 0, "batch_size": 18, **options})
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


@pytest.fixture
def source(folder, config):
    write_csv(folder)
    made = config(source="captions", path=folder, channels=3, flip=True)
    return make_source(made), made


@pytest.mark.parametrize("limit", [0, 2**30])
def test_each_example_has_one_of_its_record_s_captions(source, monkeypatch, limit):
    monkeypatch.setattr(pipeline, "MEMORY_LIMIT", limit)
    second = []
    for batch in take(20, *source):
        for text, index in zip(batch["caption"], batch["index"].tolist(), strict=True):
            assert text in CAPTIONS[index]
            if len(CAPTIONS[index]) == 2:
                second.append(text == CAPTIONS[index][1])
    assert 0.3 < np.mean(second) < 0.7


def test_captions_are_the_same_on_any_number_of_processes_and_after_a_restart(source):
    whole = [batch["caption"].tolist() for batch in take(6, *source)]
    halves = [take(6, *source, process_index=p, process_count=2) for p in range(2)]
    assert [[*a["caption"], *b["caption"]] for a, b in zip(*halves, strict=True)] == whole
    assert [batch["caption"].tolist() for batch in take(2, *source, start_step=4)] == whole[4:]


def test_the_choice_of_a_caption_is_not_the_flip(source):
    made = take(40, *source)
    plain = {i: pipeline.examples(*source, [i])[0] for i in range(0, 9, 2)}
    agreement = [
        (image != plain[index]).any() == (text == CAPTIONS[index][1])
        for batch in made
        for image, text, index in zip(batch["image"], batch["caption"], batch["index"].tolist(), strict=True)
        if index in plain
    ]
    assert 0.35 < np.mean(agreement) < 0.65


def test_tokens_take_the_place_of_texts(source):
    def tokenize(captions):
        assert isinstance(captions, list) and len(captions) == 18
        tokens = np.array([[len(text), ord(text[0])] for text in captions], np.int32)
        return {"tokens": tokens, "mask": tokens > 0}

    (batch,), (texts_of,) = take(1, *source, tokenize=tokenize), take(1, *source)
    assert set(batch) == {"image", "label", "index", "tokens", "mask"}
    assert batch["tokens"][:, 0].tolist() == [len(text) for text in texts_of["caption"]]
    np.testing.assert_array_equal(batch["image"], texts_of["image"])


def test_tokens_of_an_uncaptioned_source(config):
    made = config(source="synthetic")
    with pytest.raises(ValueError, match=r"found no captions in synthetic, expected .*; change config.data.source"):
        pipeline.batches(make_source(made), made, seed=0, batch_size=4, tokenize=lambda captions: {})
    with pytest.raises(ValueError, match=r"found no captions in synthetic"):
        next(texts(make_source(made)))


def test_parts_keep_their_captions(folder, captioned):
    write_csv(folder)
    part = captioned(folder, holdout_every=4)
    assert list(texts(part)) == [text for i, all in enumerate(CAPTIONS) if i % 4 != 3 for text in all]
    assert part[3]["captions"] == part.captions(3) == CAPTIONS[4]


# TFDS


@pytest.fixture
def coco(tmp_path, images):
    """A TFDS set with the image and caption features of coco_captions; its last record has no caption."""
    import io

    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2
    from tensorflow_datasets.proto import tf_feature_pb2 as pb

    root = tmp_path / "tfds" / "tiny" / "1.0.0"
    root.mkdir(parents=True)
    writer = ArrayRecordWriter(str(root / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for pixels, captions in zip(images, [*CAPTIONS[:8], ()], strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        features = {
            "image": pb.Feature(bytes_list=pb.BytesList(value=[file.getvalue()])),
            "captions/text": pb.Feature(bytes_list=pb.BytesList(value=[text.encode() for text in captions])),
            "captions/id": pb.Feature(int64_list=pb.Int64List(value=range(len(captions)))),
        }
        writer.write(tf_example_pb2.Example(features=pb.Features(feature=features)).SerializeToString())
    writer.close()
    captions = tfds.features.Sequence({"text": np.str_, "id": np.int64})
    image = tfds.features.Image(shape=(None, None, 3))
    tfds.features.FeaturesDict({"image": image, "captions": captions}).save_config(root)
    split = {"name": "train", "numBytes": "1", "shardLengths": ["9"]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path / "tfds"


def test_tfds_captions(coco, config, images):
    source = make_source(config(source="tfds:tiny", path=coco, channels=3))
    assert [source.captions(i) for i in range(8)] == [source[i]["captions"] for i in range(8)] == CAPTIONS[:8]
    np.testing.assert_array_equal(source[5]["image"], images[5])
    with pytest.raises(ValueError, match=r"found no caption in record 8 of tfds:tiny"):
        source.captions(8)


def test_tfds_without_captions_is_uncaptioned(tfds_dir, config):
    source = make_source(config(source="tfds:tiny", path=tfds_dir))
    assert not hasattr(source, "captions") and set(source[0]) == {"image", "label"}


# Bad input


def test_images_without_captions_and_captions_without_images_are_counted_and_named(folder, captioned):
    write_csv(folder)
    (folder / "captions.csv").write_text(
        "file,caption\n"
        + "".join(f"{file},text\n" for file in FILES[:2])
        + f"{FILES[2]},  \nlost.png,a\nb/lost.png,b\n"
    )
    with pytest.raises(ValueError) as caught:
        captioned(folder)
    message = str(caught.value)
    assert "found 7 images without captions (bird/2.png; cat/3.png; " in message and "; and 2 more) and" in message
    assert "and 2 captions without usable images (lost.png; b/lost.png)" in message
    assert "skip_unreadable=True" in message


def test_they_are_left_out_and_logged_only_if_asked(folder, captioned, caplog):
    write_csv(folder)
    whole = captioned(folder).fingerprint
    (folder / FILES[4]).unlink()
    (folder / "bird" / "other.png").write_bytes((folder / FILES[0]).read_bytes())
    (folder / "dog" / "broken.png").write_bytes(b"not a png")
    with caplog.at_level("WARNING"):
        source = captioned(folder, skip_unreadable=True)
    assert "1 images without captions (bird/other.png)" in caplog.text
    assert "2 captions without usable images (cat/4.png" not in caplog.text  # one image, two captions
    assert "1 captions without usable images (cat/4.png)" in caplog.text
    assert [source.captions(i) for i in range(8)] == CAPTIONS[:4] + CAPTIONS[5:]
    assert source[4]["label"] == 1 and source.fingerprint != whole


def test_a_txt_without_an_image(folder, captioned):
    write_txt(folder)
    (folder / "dog" / "readme.txt").write_text("a set")
    with pytest.raises(ValueError, match=r"0 images without captions and 1 captions .* \(dog/readme.txt\)"):
        captioned(folder)


def test_no_captions_at_all_and_too_many(folder, captioned):
    (folder / "captions.csv").unlink()
    with pytest.raises(ValueError, match=r"found no captions in .*, expected one of: captions.csv or .*=folder"):
        captioned(folder)
    for name in ("captions.csv", "cat/captions.jsonl"):
        (folder / name).write_text("")
    with pytest.raises(ValueError, match=r"found captions.csv, cat/captions.jsonl in .*; keep one"):
        captioned(folder)


def test_nothing_captioned_is_an_error_even_if_skipping(folder, captioned):
    (folder / "captions.csv").write_text("file,caption\n")
    with pytest.raises(ValueError, match="found 9 images without captions"):
        captioned(folder, skip_unreadable=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", b"image,text\na.png,b\n", "in row 2 of captions.csv, expected strings `file` and `caption`"),
        ("captions.csv", b"file,caption\na.png\n", "in row 2 of captions.csv"),
        ("captions.jsonl", b'{"file": "a"}', "in row 1 of captions.jsonl"),
        ("captions.jsonl", b'\n["a", "b"]', "in row 2 of captions.jsonl"),
        ("captions.jsonl", b'{"file": "a", "caption": 3}', "in row 1 of captions.jsonl"),
        ("captions.jsonl", b"{file", "found {file in row 1 of captions.jsonl"),
        (
            "captions.jsonl",
            rb'{"file": "a", "caption": "half \ud83d"}',
            r"found .*half \\ud83d.* in row 1 .* whole characters",
        ),
        ("captions.jsonl", b'\n{"file": "\\udc00", "caption": "b"}', "in row 2 of captions.jsonl"),
        ("captions.jsonl", b"[" * 100_000, r"found \[\[.* in row 1 of captions.jsonl"),
        (
            "captions.csv",
            b'file,caption\na,b\nc,"d\n' + b"e,f\n" * 40_000,
            r"found a row after row 2 of captions.csv that cannot be read \(.*\), expected quotes in pairs; close",
        ),
        ("captions.csv", b"file,caption\na,\xff\n", "found captions.csv in .* that is not UTF-8 .*; save it as UTF-8"),
    ],
)
def test_bad_tables(folder, captioned, name, content, message):
    (folder / "captions.csv").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        captioned(folder)
