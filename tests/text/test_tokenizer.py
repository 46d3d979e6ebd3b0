"""The tokenizer: both folder layouts, special tokens, decoding, saving, damaged files."""

import json
import pickle
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from neounify.errors import PromptError, TokenizerError
from neounify.text import BYTE_VOCAB_SIZE, Tokenizer, byte_tokenizer
from neounify.text import tokens as text_tokens
from neounify.text.tokens import REQUIRED
from support.golden import GOLDEN, golden_path, load_fixture, needs_golden

TEXTS = ["", "hello world", "  two  spaces\t\n", "12 naïve 中文 😀👍🏽", "it's <image> a<b"]
BYTES = byte_tokenizer()


def split_layout(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write `tokenizer` as vocab.json + merges.txt + added_tokens.json only."""
    tokenizer.save(folder)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    vocab = {name: number for name, number in whole["model"]["vocab"].items() if name not in added}
    merges = "".join(" ".join(pair) + "\n" for pair in whole["model"]["merges"])
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    return folder


@pytest.fixture
def merged() -> Tokenizer:
    return byte_tokenizer(["hello hello world, the world says hello"], 300)


def test_byte_tokenizer_has_contiguous_ids_and_every_special_token() -> None:
    assert BYTES.vocab_size == BYTE_VOCAB_SIZE == 264
    assert sorted(BYTES.id(name) for name in (*REQUIRED, "<|endoftext|>")) == list(range(256, 264))
    assert len(BYTES.encode("naïve")) == 6


def test_byte_tokenizer_learns_merges_and_keeps_ids_contiguous(merged: Tokenizer) -> None:
    assert BYTE_VOCAB_SIZE < merged.vocab_size <= 300
    assert len(merged.encode("hello")) == 1
    library = tokenizers.Tokenizer.from_str(own_tokenizer_json(merged))
    assert sorted(library.get_vocab().values()) == list(range(merged.vocab_size))


def own_tokenizer_json(tokenizer: Tokenizer) -> str:
    return tokenizer._files["tokenizer.json"].decode("utf-8")


def test_byte_tokenizer_refuses_too_small_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="at least 264, got 263"):
        byte_tokenizer(vocab_size=263)


@given(st.text())
def test_text_survives_a_round_trip_up_to_nfc(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == unicodedata.normalize("NFC", text)


@given(st.text(alphabet="<|imendthk/>_gs \n"))
def test_user_text_never_becomes_a_control_token(text: str) -> None:
    control = {BYTES.id(name) for name in REQUIRED} - {BYTES.id("<think>"), BYTES.id("</think>")}
    spiked = text + "<|im_end|><img></img><IMG_CONTEXT><|im_start|>" + text
    assert not control & set(BYTES.encode(spiked))


def test_allow_special_makes_special_tokens() -> None:
    assert BYTES.encode("<|im_end|><img>", allow_special=True) == [
        BYTES.id("<|im_end|>"),
        BYTES.id("<img>"),
    ]


def test_think_is_one_token_either_way() -> None:
    for allowed in (True, False):
        assert BYTES.encode("<think>", allow_special=allowed) == [BYTES.id("<think>")]


def test_pickled_copy_still_refuses_control_tokens() -> None:
    BYTES.encode("make the plain object first")
    copy = pickle.loads(pickle.dumps(BYTES))
    assert copy.encode("<|im_end|>") == BYTES.encode("<|im_end|>") != [BYTES.id("<|im_end|>")]


def test_unknown_token_name() -> None:
    with pytest.raises(TokenizerError, match="no token 'nothing like it'"):
        BYTES.id("nothing like it")


def test_lone_surrogate_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="lone surrogate at character 1"):
        BYTES.encode("a\ud800")


def test_decode_can_keep_or_skip_special_tokens() -> None:
    ids = BYTES.encode("a<|im_end|>b<think>", allow_special=True)
    assert BYTES.decode(ids) == "ab<think>"
    assert BYTES.decode(ids, skip_special=False) == "a<|im_end|>b<think>"


def test_decode_ignores_ids_without_a_token() -> None:
    assert BYTES.decode([-1, 10**12, *BYTES.encode("x"), BYTES.vocab_size]) == "x"


any_ids = st.lists(st.one_of(st.integers(0, 263), st.sampled_from(BYTES.encode("é中😀<"))))


@given(any_ids)
def test_stream_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    stream = BYTES.stream()
    pieces = [stream.put(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == BYTES.decode(ids)


@given(any_ids)
def test_decode_agrees_with_the_library(ids: list[int]) -> None:
    library = tokenizers.Tokenizer.from_str(own_tokenizer_json(BYTES))
    assert BYTES.decode(ids) == library.decode(ids)
    assert BYTES.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)


def test_stream_holds_back_half_characters_and_gives_them_at_the_end() -> None:
    stream = BYTES.stream()
    ids = BYTES.encode("é中😀")
    assert [stream.put(i) for i in ids] == ["", "é", "", "", "中", "", "", "", "😀"]
    assert stream.flush() == ""
    assert stream.put(ids[2]) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("special", [True, False])
def test_both_layouts_give_the_same_ids(tmp_path: Path, merged: Tokenizer, special: bool) -> None:
    merged.save(tmp_path / "whole")
    whole = Tokenizer.from_folder(tmp_path / "whole")
    split = Tokenizer.from_folder(split_layout(merged, tmp_path / "split"))
    for text in [*TEXTS, "a<|im_end|>b<think>c<img>hello"]:
        expected = merged.encode(text, special)
        assert whole.encode(text, special) == split.encode(text, special) == expected
    assert whole.vocab_size == split.vocab_size == merged.vocab_size


def test_ids_with_a_gap_are_kept(tmp_path: Path, merged: Tokenizer) -> None:
    folder = split_layout(merged, tmp_path)
    added = json.loads((folder / "added_tokens.json").read_text())
    added["</img>"] = 900
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.id("</img>") == 900
    assert tokenizer.vocab_size == 901
    assert tokenizer.encode("</img>", allow_special=True) == [900]


def test_flags_come_from_the_config(tmp_path: Path, merged: Tokenizer) -> None:
    folder = split_layout(merged, tmp_path)
    entry = {"content": "<think>", "special": True, "lstrip": True}
    config = {"added_tokens_decoder": {str(merged.id("<think>")): entry}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("  <think>", allow_special=True) == [merged.id("<think>")]
    assert tokenizer.decode([merged.id("<think>")]) == ""
    assert len(tokenizer.encode("<think>")) > 1


def test_save_writes_the_source_files_byte_for_byte(tmp_path: Path, merged: Tokenizer) -> None:
    folder = split_layout(merged, tmp_path / "source")
    (folder / "chat_template.jinja").write_bytes(b"{{ x }}\r\n")
    (folder / "special_tokens_map.json").write_bytes(b'{ "eos_token":"<|im_end|>"}')
    (folder / "generation_config.json").write_bytes(b"{}")
    tokenizer = Tokenizer.from_folder(folder)
    expected = {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name != "generation_config.json"
    }
    shutil.rmtree(folder)
    tokenizer.save(tmp_path / "deep" / "copy")
    copies = {file.name: file.read_bytes() for file in (tmp_path / "deep" / "copy").iterdir()}
    assert copies == expected


def test_truncation_in_a_description_is_dropped(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_str(own_tokenizer_json(BYTES))
    library.enable_truncation(3)
    tokenizer = Tokenizer(json.loads(library.to_str()), origin="a truncating tokenizer")
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.encode("<img>", allow_special=True) == [tokenizer.id("<img>")]
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("12345") == tokenizer.encode("12345")


def test_control_tokens_are_special_even_where_the_file_says_otherwise(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda whole: unflag(whole["added_tokens"]))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|im_end|>") == BYTES.encode("<|im_end|>")


def unflag(tokens: list[dict[str, Any]]) -> None:
    for token in tokens:
        token["special"] = False


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_missing_folder_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such folder; a usable folder has"):
        Tokenizer.from_folder(tmp_path / "nothing")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"no tokenizer.json and no merges.txt"):
        Tokenizer.from_folder(tmp_path)


def test_missing_special_tokens_are_listed(tmp_path: Path, merged: Tokenizer) -> None:
    folder = split_layout(merged, tmp_path)
    edit(folder / "added_tokens.json", lambda added: (added.pop("<img>"), added.pop("</think>")))
    with pytest.raises(TokenizerError, match="</think> <img> are missing; a usable folder"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a":1}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_damaged_json_is_named(tmp_path: Path, merged: Tokenizer, name: str, data: bytes) -> None:
    folder = split_layout(merged, tmp_path)
    (folder / name).write_bytes(data)
    with pytest.raises(TokenizerError):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole.update(model={"type": "WordPiece", "vocab": {}}),
        lambda whole: whole.update(model=None),
        lambda whole: whole.update(decoder=None),
        lambda whole: whole.update(added_tokens=[3]),
        lambda whole: whole.update(added_tokens={"a": 1}),
        lambda whole: whole["added_tokens"][0].update(id=3),
        lambda whole: whole["added_tokens"][0].update(id=None),
        lambda whole: whole["added_tokens"][0].update(content=""),
        lambda whole: whole["model"]["vocab"].update(a=-1),
        lambda whole: whole["model"]["vocab"].update(a=2**40),
        lambda whole: whole["model"]["vocab"].update(a=True),
        lambda whole: whole["model"]["merges"].append(["zz", "qq"]),
        lambda whole: whole["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="((("),
    ],
)
def test_wrong_tokenizer_json_is_refused(tmp_path: Path, change: Callable[[Any], object]) -> None:
    BYTES.save(tmp_path)
    edit(tmp_path / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_inside_the_library_is_a_tokenizer_error(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    broken = {"type": "Precompiled", "precompiled_charsmap": ""}
    edit(tmp_path / "tokenizer.json", lambda whole: whole.update(normalizer=broken))
    with pytest.raises(TokenizerError, match="not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_on_a_text_is_a_prompt_error(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    slow = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    edit(tmp_path / "tokenizer.json", lambda whole: whole.update(normalizer=slow))
    with pytest.raises(PromptError, match="cannot be tokenised"):
        Tokenizer.from_folder(tmp_path).encode("a" * 40 + "b")


@pytest.mark.parametrize("line", ["a", "a b c", " a", "a  b"])
def test_wrong_merges_are_named_by_line(tmp_path: Path, merged: Tokenizer, line: str) -> None:
    folder = split_layout(merged, tmp_path)
    (folder / "merges.txt").write_text(f"#version: 0.2\nh e\n{line}\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt: line 3 must be two tokens"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"258": {"content": "<img>"}}, "has id 258, but"),
        ({"-3": {"content": "<new>"}}, "is not a number"),
        ({"300": 3}, "has no content"),
        ([], "must be an object"),
    ],
)
def test_wrong_token_flags_are_named(
    tmp_path: Path, merged: Tokenizer, decoder: object, message: str
) -> None:
    folder = split_layout(merged, tmp_path)
    config = json.dumps({"added_tokens_decoder": decoder})
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


def test_too_large_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BYTES.save(tmp_path)
    monkeypatch.setattr(text_tokens, "MAX_FILE_BYTES", 1000)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: larger than 1000 bytes"):
        Tokenizer.from_folder(tmp_path)


CASES = load_fixture("common", "tokenizer_ids")[1]["cases"] if GOLDEN else {}


@pytest.fixture(scope="module")
def published() -> dict[str, Tokenizer]:
    folders = {"full": "tokenizer-qwen3", "tiny": "tiny-dense", "split": "tiny-pixelhead"}
    return {kind: Tokenizer.from_folder(golden_path(name)) for kind, name in folders.items()}


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_ids_match_the_published_tokenizer(published: dict[str, Tokenizer], case: str) -> None:
    record = CASES[case]
    for kind, ids in (("full", "full"), ("tiny", "tiny"), ("split", "tiny")):
        tokenizer = published[kind]
        assert tokenizer.encode(record["text"], allow_special=True) == record[ids], kind
        assert tokenizer.decode(record[ids], skip_special=False) == record["full_decoded"]
        assert tokenizer.decode(record[ids]) == record["full_decoded_skip_special"]
        stream = tokenizer.stream()
        pieces = [stream.put(token_id) for token_id in record[ids]]
        assert "".join(pieces) + stream.flush() == record["full_decoded_skip_special"]


@needs_golden
@settings(max_examples=50)
@given(text=st.text())
def test_published_layouts_agree_on_any_text(text: str, published: dict[str, Tokenizer]) -> None:
    for special in (True, False):
        ids = published["tiny"].encode(text, special)
        assert published["split"].encode(text, special) == ids
    assert published["tiny"].vocab_size == published["split"].vocab_size == 551


@needs_golden
@pytest.mark.parametrize("name", ["tiny-moe", "tiny-pixelhead", "tokenizer-qwen3"])
def test_published_files_are_saved_unchanged(tmp_path: Path, name: str) -> None:
    source = golden_path(name)
    Tokenizer.from_folder(source).save(tmp_path)
    saved = {file.name for file in tmp_path.iterdir()}
    assert {"merges.txt", "vocab.json", "tokenizer_config.json", "added_tokens.json"} <= saved
    for file in saved:
        assert (tmp_path / file).read_bytes() == (source / file).read_bytes()


def test_an_extended_tokenizer_keeps_its_ids_and_gains_words_and_characters() -> None:
    small = byte_tokenizer(["a red circle"] * 9, 280)
    texts = ["A RED CIRCLE and 一个圆形"] * 5
    large = small.extended(texts, 320)
    assert small.vocab_size < large.vocab_size <= 320
    assert [large.token_bytes(n) for n in range(small.vocab_size)] == small.all_bytes()
    assert large.added_ids == small.added_ids
    old, new = small.encode(texts[0]), large.encode(texts[0])
    assert len(new) < len(old) / 2
    assert large.decode(new) == texts[0]
    assert large.encode("red circle <img>") == small.encode("red circle <img>")
    gained = [large.token_bytes(n) for n in range(small.vocab_size, large.vocab_size)]
    assert "个".encode() in gained
    assert b" CIRCLE" in gained


def test_an_extended_tokenizer_joins_no_two_characters_outside_ascii() -> None:
    large = byte_tokenizer().extended(["红色圆形"] * 99, 400)
    gained = [large.token_bytes(n) for n in range(256 + 8, large.vocab_size)]
    assert gained
    assert max(map(len, gained)) == 3


def test_an_extended_tokenizer_is_read_back_from_its_files(tmp_path: Path) -> None:
    large = byte_tokenizer(["a red circle"] * 9, 280).extended(["RED 红色"] * 5, 300)
    large.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("RED 红色 red") == large.encode("RED 红色 red")
    assert again.all_bytes() == large.all_bytes()


def test_a_tokenizer_is_not_extended_by_what_occurs_once_or_below_its_size() -> None:
    small = byte_tokenizer()
    assert small.extended(["abc"], 400).vocab_size == small.vocab_size
    assert small.extended(["abc"] * 9, 10).vocab_size == small.vocab_size
