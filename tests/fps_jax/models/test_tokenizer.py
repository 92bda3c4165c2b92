"""Ids from either file against upstream's (tests/data/tokenizer_expected_ids.json) and against sentencepiece itself."""

import io
import json
import random
import shutil

import numpy as np
import pytest

from fps_jax.models.tokenizer import Tokenizer, clean
from tests.reference import DATA

SOURCE = DATA / "Wan2.1-T2V-tiny-Diffusers/tokenizer"
ROWS = json.loads((DATA / "tokenizer_expected_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["tokenizer.json", "spiece.model"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(SOURCE / request.param, directory)
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_ids_are_upstreams(tokenizer, row):
    assert [*tokenizer.ids(row["text"]), tokenizer.eos_id] == row["ids"]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_padded_to_512_with_a_mask(tokenizer, row):
    ids, mask = tokenizer([row["text"]])
    length = len(row["ids"])
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (1, 512)
    assert ids[0, :length].tolist() == row["ids"]
    assert not ids[0, length:].any()
    assert mask[0].tolist() == [1] * length + [0] * (512 - length)


def test_truncation_keeps_the_end_token(tokenizer):
    row = ROWS[2]["ids"]
    ids, mask = tokenizer([ROWS[2]["text"], ""], max_length=10)
    assert ids.tolist() == [[*row[:9], 1], [1] + [0] * 9]
    assert mask.sum(1).tolist() == [10, 1]
    exact, _ = tokenizer([ROWS[2]["text"]], max_length=len(row))
    assert exact[0].tolist() == row


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.vocab_size) == (0, 1, 2, 400)
    assert tokenizer.ids("a</s><pad>") == [266, 1, 0]  # as upstream: the name of a token in a prompt is the token


def test_both_files_agree_on_random_text(tmp_path):
    shutil.copy(SOURCE / "spiece.model", tmp_path)
    one, other = Tokenizer.from_directory(SOURCE), Tokenizer.from_directory(tmp_path)
    assert (one.source.name, other.source.name) == ("tokenizer.json", "spiece.model")
    rng = random.Random(0)
    pools = [
        [chr(c) for c in range(32, 592)],
        [chr(rng.randrange(32, 0xD800)) for _ in range(2000)],
        list("  \t\n\u3000\u00a0\u200b\u200d\u2581\ufeffcats"),
        list("色调艳丽🐼👩\u200d👧e\u0301½ﬁ①ｶﾞ"),
        ["</s>", "<pad>", "<unk>", " ", "a", "cat"],
    ]
    for i in range(2000):
        text = "".join(rng.choices(pools[i % len(pools)], k=rng.randrange(30)))
        assert one.ids(text) == other.ids(text), ascii(text)


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_spiece_model_gives_what_sentencepiece_gives(tmp_path, byte_fallback):
    """A freshly trained model; without byte fallback, unseen characters are the unknown token."""
    import sentencepiece

    sentences = [row["text"] for row in ROWS if row["text"].isascii()] + [
        "the quick brown fox jumps over a lazy dog"
    ] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=310 if byte_fallback else 50,
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    ours = Tokenizer.from_directory(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert ours.vocab_size == theirs.vocab_size()
    for text in ["a fox", "dogs over  foxes ", "QWERTY 42", "狐 fox 🐼🐼", "ＦＵＬＬ ﬁ"]:
        assert ours.ids(text) == theirs.encode(text)
    assert (2 in ours.ids("狐")) is not byte_fallback


@pytest.mark.parametrize(
    ("text", "cleaned"),
    json.loads((DATA / "cleaned_text.json").read_text(encoding="utf-8")),
)
def test_cleaning_is_upstreams(text, cleaned):
    assert clean(text) == cleaned


def test_prompts_are_cleaned(tokenizer):
    ids, _ = tokenizer(["  A cat&amp;amp; a\n\n dog "])
    want, _ = tokenizer(["A cat& a dog"])
    assert ids.tolist() == want.tolist()


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer.json nor spiece.model; copy them"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("damage", ["empty", "cut", "random"])
def test_damaged_file(tmp_path, name, damage):
    whole = (SOURCE / name).read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "random": np.random.default_rng(0).bytes(2000)}[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} can't be read as a .*download it again") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_models_tokenizer(tmp_path):
    content = json.loads((SOURCE / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    content["post_processor"] = None
    content["model"]["vocab"][1][0] = "<eos>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no token '</s>', so it isn't UMT5's tokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_model_that_is_not_unigram(tmp_path):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and a dog"] * 4),
        model_writer=model,
        vocab_size=20,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(NotImplementedError, match="isn't a unigram model"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("prompts", ["one string", [None], [3]])
def test_prompts_of_a_wrong_type(tokenizer, prompts):
    with pytest.raises(ValueError, match="must be a list of strings"):
        tokenizer(prompts)


def test_no_room_for_the_end_token(tokenizer):
    with pytest.raises(ValueError, match="max_length=0 leaves no room"):
        tokenizer(["a"], max_length=0)
