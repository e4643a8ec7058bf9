"""Texts -> token numbers, with the `tokenizers` library: CLIP's tokenizer from its files, or a small one trained on captions.

Both start a text with <|startoftext|>, end it with <|endoftext|> and pad it with <|endoftext|> to one length, as the
tokenizers of the public Würstchen weights do. OpenCLIP's own pads with number 0 instead.
"""

import gzip
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Bool, Int
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77
CLIP_MERGES = 49152 - 256 - 2  # OpenAI's file goes on after those that CLIP was trained with
CLIP_FILES = "tokenizer.json, vocab.json with merges.txt, or bpe_simple_vocab_16e6.txt.gz"
# Pieces that are never merged with each other: contractions, words, single digits, runs of other signs.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Texts -> (numbers int32 [B, length], mask bool [B, length], False on padding). Made by the functions below.

    A text that is too long is cut, with a warning that shows what was cut; an empty one is start and end alone.
    <|startoftext|> and <|endoftext|> inside a text become these tokens, as in transformers.
    Raises TypeError for anything but a list of strings.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, length: int):
        if length < 3:
            raise ValueError(f"found length {length}, expected at least 3: start, one token, end; give a larger length")
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        if start is None or end is None:
            raise ValueError(
                f"found a vocabulary without {START} or {END}, expected both; give a CLIP tokenizer's files"
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
        )
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=end, pad_token=END)
        self.tokenizer, self.length, self.end = tokenizer, length, end
        self.vocabulary = tokenizer.get_vocab_size()

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
        texts = strings(texts)
        encodings = self.tokenizer.encode_batch(texts)
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.overflowing:
                cut, _ = encoding.overflowing[0].offsets[1]  # of its first token after the start token
                warnings.warn(
                    f"found a text of more than {self.length} tokens, cut {text[cut:]!r} from its end; "
                    "shorten it, or put what matters first",
                    stacklevel=2,
                )
        ids_BT = np.asarray([encoding.ids for encoding in encodings], np.int32)
        mask_BT = np.asarray([encoding.attention_mask for encoding in encodings], bool)
        return ids_BT.reshape(-1, self.length), mask_BT.reshape(-1, self.length)

    def json(self) -> str:
        """What one tokenizer.json holds, length and padding included."""
        return self.tokenizer.to_str(pretty=True)


def strings(texts: Iterable[str]) -> list[str]:
    """The texts as a list; TypeError if they are one string or hold something else, ValueError for half a character."""
    if isinstance(texts, str):
        raise TypeError(f"found the one string {texts!r}, expected a list of strings; put it in brackets")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"found {text!r} of type {type(text).__name__} at position {number}, expected a string; "
                "decode or convert it, or give '' for no text"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"found {text!r} at position {number}, which holds half a character (a lone surrogate), expected text that "
                "UTF-8 can write; decode its bytes with errors='replace'"
            ) from error
    return texts


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """A file of `Tokenizer.json`."""
    tokenizer = _read([epath.Path(path)], tokenizer_json, "the tokenizer.json saved with a model")
    if not tokenizer.padding or not tokenizer.padding["length"]:
        raise ValueError(
            f"found no length in {str(path)!r}, expected a tokenizer saved by this project; read CLIP's by clip_tokenizer"
        )
    return Tokenizer(tokenizer, tokenizer.padding["length"])


def clip_tokenizer(path: str | Path) -> Tokenizer:
    """CLIP's tokenizer, 77 tokens a text, equal to transformers' CLIPTokenizerFast.

    `path`: a tokenizer.json, OpenAI's bpe_simple_vocab_16e6.txt.gz, or a folder with one of them or with vocab.json and
    merges.txt; tokenizer.json is preferred.
    Raises FileNotFoundError naming the files looked for, ValueError for files that hold something else.
    """
    path = Path(path)
    files, read = [path], openai_merges if path.suffix == ".gz" else tokenizer_json
    if path.is_dir():
        pair, packed = [path / "vocab.json", path / "merges.txt"], path / "bpe_simple_vocab_16e6.txt.gz"
        if (path / "tokenizer.json").is_file():
            files = [path / "tokenizer.json"]
        elif packed.is_file():
            files, read = [packed], openai_merges
        else:
            files, read = pair, vocabulary_and_merges
    return Tokenizer(_read(files, read, CLIP_FILES), CLIP_LENGTH)


def train_bpe(captions: Iterable[str], *, vocabulary: int, length: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens, trained on captions: the same ones in any order, the same tokenizer.

    Lower-case as CLIP's. Every byte is a token, so that no text is unknown; each word's first token carries its space.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(alphabet) + 2:
        raise ValueError(
            f"found vocabulary {vocabulary}, expected at least {len(alphabet) + 2}: every byte, start and end; "
            "raise it by the number of merges to learn"
        )
    captions = strings(captions)
    if not any(caption.strip() for caption in captions):
        raise ValueError(f"found no text in {len(captions)} captions, expected some; check the set's captions")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pieces(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return Tokenizer(tokenizer, length)


def tokenizer_json(path: epath.Path | Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def vocabulary_and_merges(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    """Hugging Face's vocab.json and merges.txt."""
    lines = merges.read_text(encoding="utf-8").strip().split("\n")
    lines = lines[1:] if "#version" in lines[0] else lines
    return _clip(json.loads(vocabulary.read_text(encoding="utf-8")), [tuple(line.split()) for line in lines])


def openai_merges(path: Path) -> tokenizers.Tokenizer:
    """OpenAI's gzipped merges; the numbers follow from their order."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").strip().split("\n")[1 : CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    characters = byte_characters()
    tokens = [*characters, *(f"{c}</w>" for c in characters), *("".join(merge) for merge in merges), START, END]
    return _clip({token: number for number, token in enumerate(tokens)}, merges)


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in GPT-2's and CLIP's order: first those that print as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    bpe = models.BPE(
        vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pieces(add_prefix_space=False)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def _pieces(*, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    pieces = Regex(rf"<\|startoftext\|>|<\|endoftext\|>|{PIECES}")
    split = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)])


def _read(files: list[Path], read: Callable[..., tokenizers.Tokenizer], expected: str) -> tokenizers.Tokenizer:
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"found no {' and no '.join(missing)}, expected {expected}; give the path of the file or of its folder"
        )
    try:
        return read(*files)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"found {' and '.join(map(str, files))} unreadable ({error}), expected {expected}; copy the files again"
        ) from error
