"""Text in, text out: exact round trips, no half characters, templates in a sandbox."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from astraea_jax.models.config import CheckpointError
from astraea_jax.models.tokenizer import Tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def wrap(raw: tokenizers.Tokenizer, template: str | None = None) -> Tokenizer:
    return Tokenizer(raw, bos_id=None, eos_ids=frozenset(), template=template, special={"bos_token": "<s>"})


def byte_level() -> Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return wrap(raw)


def byte_fallback() -> Tokenizer:
    """Like Llama 2: pieces with ▁ for a space, and <0xNN> for bytes without a piece."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "b", "c", "▁é"]
    raw = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return wrap(raw)


BYTES, PIECES = byte_level(), byte_fallback()


@given(st.text())
def test_any_text_survives(text):
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.lists(st.integers(0, 255), max_size=60))
def test_streamed_bytes_add_up_to_the_whole(ids):
    stream = BYTES.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.flush() == BYTES.decode(ids)


@given(st.text("ab cé€🎉x", max_size=20))
def test_streamed_pieces_add_up_to_the_whole(text):
    ids = []
    for letter in text:
        raw = [{"a": 258, "b": 259, "c": 260, " ": 257}.get(letter)]
        ids += raw if raw[0] is not None else [1 + byte for byte in letter.encode()]
    stream = PIECES.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.flush() == PIECES.decode(ids)
    assert not any("�" in part for part in parts)


def test_half_characters_wait():
    stream = BYTES.stream()
    ids = BYTES.encode("€!")
    assert [stream.push(token) for token in ids] == ["", "", "€", "!"]


def test_bytes_that_never_make_a_character_come_out_in_the_end():
    stream = BYTES.stream()
    lone = BYTES.encode("é")[0]
    assert stream.push(lone) == ""
    assert stream.flush() == "�"
    parts = [stream.push(lone) for _ in range(2 * stream.LONGEST)]
    assert "".join(parts) == "�" * len(parts)


@pytest.fixture
def folder(random_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((random_folder / name).read_bytes())
    return tmp_path


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_end_tokens_come_from_every_file(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert Tokenizer.from_folder(folder).eos_ids == {3, 4, 257}


BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [256], "tokens": ["<|im_start|>"]}},
}


def test_end_tokens_of_the_configuration_are_a_fallback(folder):
    """transformers counts them where ``generation_config.json`` names none."""
    change(folder / "config.json", eos_token_id=5)
    assert Tokenizer.from_folder(folder).eos_ids == {5, 257}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert Tokenizer.from_folder(folder).eos_ids == {3, 257}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": True}))
    with pytest.raises(CheckpointError, match="eos_token_id is True"):
        Tokenizer.from_folder(folder)


def test_dropout_of_training_is_switched_off(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] |= {"vocab": {**data["model"]["vocab"], "ab": 258}, "merges": [["a", "b"]], "dropout": 0.9}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.from_folder(folder)
    assert {tuple(tokenizer.encode("abab")) for _ in range(20)} == {(258, 258)}


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="cannot encode"):
        BYTES.encode("\ud800")


def test_bos_is_added_once(folder):
    change(folder / "tokenizer.json", post_processor=BOS)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_id == 256
    assert tokenizer.encode("a", add_bos=True) == [256, 64]
    assert tokenizer.encode("<|im_start|>a", add_bos=True) == [256, 64]
    assert tokenizer.encode("a") == [64]


@pytest.mark.parametrize("extra", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_a_bos_that_is_only_named_is_not_added(extra, folder):
    """transformers 5 takes no notice of ``add_bos_token`` beside a tokenizer.json either."""
    change(folder / "tokenizer_config.json", bos_token={"content": "<|im_start|>"}, **extra)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.encode("a", add_bos=True)) == (None, [64])


def test_absent_and_damaged_files(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="template is damaged"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(folder)


def test_a_model_without_a_template_says_so():
    with pytest.raises(CheckpointError, match="no chat template"):
        BYTES.render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_templates_are_sandboxed_and_fail_as_values(template):
    raw = tokenizers.Tokenizer(models.BPE())
    with pytest.raises(ValueError, match="cannot render"):
        wrap(raw, template).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("name", ["CodeLlamaTokenizer", "GPTNeoXTokenizerFast"])
def test_tokenizer_classes_that_are_not_read_are_refused(name, folder):
    change(folder / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(CheckpointError, match="is not read"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_class": 3}, "tokenizer_class is 3"),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": "no"}, "legacy is 'no'"),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": 1}, "add_prefix_space is 1"),
    ],
)
def test_damaged_fields_of_tokenizer_classes_are_refused(fields, message, folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, "pre_tokenizer": None, "decoder": None}))
    change(folder / "tokenizer_config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


def test_a_class_needs_the_kind_of_model_it_makes(folder):
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(folder / "tokenizer.json"))
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(CheckpointError, match=r"needs a BPE model, tokenizer\.json has WordLevel"):
        Tokenizer.from_folder(folder)
