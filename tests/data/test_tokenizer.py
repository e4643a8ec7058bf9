import gzip
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from fid_imagegen.data.tokenizer import byte_characters, clip_tokenizer, load_tokenizer, train_bpe

OPENAI = Path("/work/shared/data/clip_bpe_simple_vocab_16e6.txt.gz")
MERGES = ["r e", "re d</w>", "c a", "ca t</w>", "a n", "an d</w>", "# #"]
CAPTIONS = ["a red square left of a blue circle", "a big green triangle", "two red circles", "a small blue square"] * 3
ODD = [
    "",
    "   \t\n ",
    "a red cat and a dog",
    "A  Red\tCAT\u00a0and\u2003a\ndog ",
    "can't won't we've I'm they're she'll he'd IT'S",
    "café vs cafe\u0301, ﬁne, Å Å, ½ ² Ⅷ",
    "İstanbul ẞ ΣΑΣ ǅ",
    "日本語のテキスト 中文 한국어 हिन्दी العربية עברית ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☃ \U0001f9ff",
    "3.14159 1,000 2024-01-01 12:30pm x²+y² ٣٤",
    "!!! ... ?!? #hash @user https://example.com/a?b=c&d=%20 <b>bold</b> &amp; &lt;",
    "<|startoftext|> and <|endoftext|>inside<|endoftext|>",
    "<|ENDOFTEXT|> <|endoftext |> <|",
    "zero\u200bwidth \u200e\u202eright\ufeff \x00nul \x7f \x85 \ufffd \U000e0001",
    "a\u0301\u0302\u0303\u0304 Z̷̢̛a̸͎̿l̵͕̚g̸̱̈o̵̘͂",
    "under_score CamelCase kebab-case a'b'c 'quoted' “quotes” l’été",
    "x" * 500,
    "word " * 200,
    "🙂" * 80,
]


def write_pair(folder, merges, packed=False):
    """vocab.json and merges.txt in CLIP's order, or OpenAI's one file."""
    characters = byte_characters()
    tokens = characters + [f"{c}</w>" for c in characters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    if packed:
        text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges])
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text.encode()))
    else:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    return folder


@pytest.fixture
def clip(tmp_path):
    return clip_tokenizer(write_pair(tmp_path / "clip", MERGES))


@pytest.fixture(scope="module")
def small():
    return train_bpe(CAPTIONS, vocabulary=300, length=12)


def test_numbers_of_a_handmade_vocabulary(clip):
    ids, mask = clip(["Red  cat", "and ## !", ""])
    start, end = 512 + len(MERGES), 513 + len(MERGES)
    number = {merge.replace(" ", ""): 512 + n for n, merge in enumerate(MERGES)}
    sign, bang = byte_characters().index("#"), byte_characters().index("!")
    # "##" at the end of a word is "#" and "#</w>": the merge is of the inside of words.
    expected = [
        [start, number["red</w>"], number["cat</w>"], end],
        [start, number["and</w>"], sign, 256 + sign, 256 + bang, end],
        [start, end],
    ]
    assert ids.dtype == np.int32 and ids.shape == mask.shape == (3, 77) and mask.dtype == bool
    for row, (found, kept) in enumerate(zip(ids, mask, strict=True)):
        count = len(expected[row])
        assert found[:count].tolist() == expected[row] and (found[count:] == end).all()
        assert kept[:count].all() and not kept[count:].any()
    assert clip.vocabulary == 514 + len(MERGES) and clip.length == 77 and clip.end == end
    assert clip([])[0].shape == clip([])[1].shape == (0, 77)


def test_the_three_kinds_of_files_are_one_tokenizer(clip, tmp_path):
    packed = write_pair(tmp_path / "packed", MERGES, packed=True)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "tokenizer.json").write_text(clip.json(), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = clip(ODD)
        for tokenizer in (
            clip_tokenizer(packed),
            clip_tokenizer(packed / "bpe_simple_vocab_16e6.txt.gz"),
            clip_tokenizer(saved),
            clip_tokenizer(saved / "tokenizer.json"),
            load_tokenizer(saved / "tokenizer.json"),
        ):
            for found, wanted in zip(tokenizer(ODD), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.skipif(not OPENAI.exists(), reason="needs OpenAI's vocabulary")
def test_openai_vocabulary():
    tokenizer = clip_tokenizer(OPENAI)
    assert tokenizer.vocabulary == 49408 and tokenizer.end == 49407
    ids, mask = tokenizer(["a photo of a cat", "Hello, world!"])
    # Well-known numbers of CLIP's documentation and tests.
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407] and mask[0].sum() == 7
    assert ids[1, :6].tolist() == [49406, 3306, 267, 1002, 256, 49407]


@pytest.mark.parametrize("make", ["clip", "small"])
def test_a_long_text_is_cut_and_the_warning_shows_what(request, make):
    tokenizer = request.getfixturevalue(make)
    kept = ["Red"] * (tokenizer.length - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = tokenizer([" ".join(kept)])  # exactly full
    assert mask.all()
    with pytest.warns(
        UserWarning, match=rf"more than {tokenizer.length} tokens, cut 'Red\\tcat, Zürich!' from"
    ) as caught:
        cut, cut_mask = tokenizer(["red", " ".join([*kept, "Red\tcat, Zürich!"])])
    assert len(caught) == 1 and caught[0].filename == __file__
    np.testing.assert_array_equal(cut[1:], ids)
    assert cut_mask[1].all() and cut[1, -1] == tokenizer.end


def test_texts_that_are_not_strings(clip, small):
    for tokenizer in (clip, small):
        with pytest.raises(TypeError, match=r"found 3 of type int at position 1, expected a string"):
            tokenizer(["a", 3])
        with pytest.raises(TypeError, match=r"found None of type NoneType at position 0"):
            tokenizer([None])
        with pytest.raises(TypeError, match=r"found b'a' of type bytes"):
            tokenizer([b"a"])
        with pytest.raises(TypeError, match=r"found the one string 'a cat', expected a list"):
            tokenizer("a cat")
        with pytest.raises(ValueError, match=r"found 'a\\ud800' at position 0.*lone surrogate"):
            tokenizer(["a\ud800"])


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"vocab\.json and no .*merges\.txt, expected tokenizer\.json, vocab\.json"
    ):
        clip_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found no \S*absent\.json, expected"):
        clip_tokenizer(tmp_path / "absent.json")
    folder = write_pair(tmp_path / "half", MERGES)
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no \S*half/merges\.txt, expected"):
        clip_tokenizer(folder)
    (folder / "merges.txt").write_text("#version: 0.2\nno such\n")
    with pytest.raises(ValueError, match=r"merges\.txt unreadable \(.*\), expected tokenizer\.json"):
        clip_tokenizer(folder)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json unreadable"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "bad.txt.gz").write_text("not gzip")
    with pytest.raises(ValueError, match=r"bad\.txt\.gz unreadable"):
        clip_tokenizer(tmp_path / "bad.txt.gz")


def test_a_vocabulary_without_start_and_end(tmp_path):
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"without <\|startoftext\|> or <\|endoftext\|>"):
        clip_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"found no length in .*clip_tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_trained_bpe_learns_the_words_and_knows_every_byte(small):
    ids, mask = small(["a red square", "A  RED\nsquare", "Zü 日", ""])
    assert ids.shape == (4, 12) and mask[0].sum() == 5  # start, three words, end
    np.testing.assert_array_equal(ids[0], ids[1])
    assert mask[2].sum() == 10 and (ids[2, 1:9] != small.end).all()  # 4 bytes and 4, with their spaces
    assert ids[3].tolist() == [0, *[1] * 11] and mask[3].sum() == 2 and small.end == 1
    assert ids.max() < small.vocabulary <= 300
    # Where a word begins is part of it: one word of two is not two words.
    assert small(["redsquare"])[0].tolist() != small(["red square"])[0].tolist()


def test_trained_bpe_is_the_same_every_time_and_in_any_order(small, tmp_path):
    (tmp_path / "a.json").write_text(small.json(), encoding="utf-8")
    other = train_bpe(CAPTIONS[::-1], vocabulary=300, length=12)
    (tmp_path / "b.json").write_text(other.json(), encoding="utf-8")
    # A process of its own: hash maps are seeded there anew.
    made = f"train_bpe({CAPTIONS!r}, vocabulary=300, length=12)"
    code = f"from fid_imagegen.data.tokenizer import train_bpe; print({made}.json())"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, encoding="utf-8")
    texts = {(tmp_path / f"{name}.json").read_text("utf-8") for name in "ab"} | {run.stdout.removesuffix("\n")}
    assert len(texts) == 1
    loaded = load_tokenizer(tmp_path / "a.json")
    assert (loaded.length, loaded.vocabulary, loaded.end) == (small.length, small.vocabulary, small.end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found, wanted in zip(loaded(ODD), small(ODD), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_training_asks_for_something_to_learn():
    with pytest.raises(ValueError, match="found vocabulary 257, expected at least 258"):
        train_bpe(CAPTIONS, vocabulary=257, length=12)
    with pytest.raises(ValueError, match="found length 2, expected at least 3"):
        train_bpe(CAPTIONS, vocabulary=300, length=2)
    for nothing in ([], ["", " "]):
        with pytest.raises(ValueError, match="found no text in"):
            train_bpe(nothing, vocabulary=300, length=12)
    with pytest.raises(TypeError, match="found 3 of type int"):
        train_bpe(["a", 3], vocabulary=300, length=12)


@pytest.mark.parity
@pytest.mark.parametrize("vocabulary", ["handmade", "openai"])
def test_equals_transformers(tmp_path, vocabulary):
    """The same vocabulary and merges in transformers' CLIPTokenizerFast, and its own tokenizer.json read back."""
    transformers = pytest.importorskip("transformers")
    if vocabulary == "openai":
        if not OPENAI.exists():
            pytest.skip("needs OpenAI's vocabulary")
        merges = gzip.decompress(OPENAI.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
        ours = clip_tokenizer(OPENAI)
    else:
        merges = MERGES
        ours = clip_tokenizer(write_pair(tmp_path / "packed", merges, packed=True))
    folder = write_pair(tmp_path / "pair", merges)
    pairs = [tuple(merge.split()) for merge in merges]
    theirs = transformers.CLIPTokenizerFast(
        vocab=json.loads((folder / "vocab.json").read_text("utf-8")), merges=pairs, model_max_length=77
    )
    theirs.save_pretrained(tmp_path / "hf")
    texts = ODD + [chr(code) * 2 for code in range(0, 0x3000, 7)] + [f"a{chr(code)}b" for code in range(0x300)]
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tokenizer in (ours, clip_tokenizer(folder), clip_tokenizer(tmp_path / "hf")):
            ids, mask = tokenizer(texts)
            np.testing.assert_array_equal(ids, wanted["input_ids"])
            np.testing.assert_array_equal(mask, wanted["attention_mask"])
