"""The generate command."""

import json

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from convert import to_hf
from kd_jax import generate, train
from kd_jax.config.command import run_command
from kd_jax.inference.prompts import TextWriter

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.write_plain_model(folder, seed=1, tie_word_embeddings=False)


def run(*argv):
    return run_command(generate.main, [str(word) for word in argv])


def answer(capsys, model, *argv):
    capsys.readouterr()
    argv = ("--model", model, "--dtype", "float32", "--max-new-tokens", 12, *argv)
    assert run(*argv) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_several_prompts_are_answered_as_they_are_alone(folder, capsys):
    prompts = ("Name the colour of the sky.", "Hi.")
    alone = [answer(capsys, folder, "--prompt", prompt) for prompt in prompts]
    assert alone[0] != alone[1]
    together = answer(capsys, folder, "--prompt", *prompts)
    shown = [f"> {p}\n{text.rstrip(chr(10))}" for p, text in zip(prompts, alone, strict=True)]
    assert together == "\n\n".join(shown) + "\n"


def test_the_template_the_system_message_and_the_seed_count(folder, capsys):
    prompt = ("--prompt", "Hi.")
    plain = answer(capsys, folder, *prompt)
    assert answer(capsys, folder, *prompt) == plain
    assert answer(capsys, folder, *prompt, "--raw") != plain
    assert answer(capsys, folder, *prompt, "--system", "Be brief.") != plain
    drawn = [answer(capsys, folder, *prompt, "--temperature", 2, "--seed", s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_ends_before_a_stop_text(folder, capsys):
    whole = answer(capsys, folder, "--prompt", "Hi.")
    middle = whole[len(whole) // 2 :][:3]
    cut = answer(capsys, folder, "--prompt", "Hi.", "--stop", middle)
    assert cut.rstrip("\n") == whole[: whole.index(middle)].rstrip("\n")


def test_a_run_answers_as_its_export_does(folder, tmp_path, capsys):
    data = tiny.write_data(tmp_path / "train.jsonl")
    template = tmp_path / "t.jinja"  # another than the folder's, with another end of turn
    template.write_text(
        "{% for m in messages %}{{ '<|start|>' + m.role + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    (tmp_path / "config.py").write_text(f"""
from kd_jax.config import *

def get_config():
    return Config(
        workdir={str(tmp_path / "run")!r}, teacher=None, compilation_cache=None, steps=3,
        student=StudentConfig(path={str(folder)!r}, dtype="float32"),
        data=DataConfig(path={str(data)!r}, seq_len=128, batch_size=8,
                        chat_template={str(template)!r}, cache_dir={str(tmp_path / "rows")!r}),
        lora=LoraConfig(rank=4), optim=OptimConfig(learning_rate=1e-2, warmup_steps=1),
    )
""")
    assert run_command(train.main, ["--config", str(tmp_path / "config.py")]) == 0
    text = template.read_text()
    template.unlink()
    argv = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert run_command(to_hf.main, argv) == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == text
    options = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert options["eos_token_id"] in (3, [2, 3])
    prompt = ("--prompt", "How many legs has a cat?")
    trained = answer(capsys, tmp_path / "run", *prompt)
    assert trained == answer(capsys, tmp_path / "out", *prompt)
    assert trained != answer(capsys, folder, *prompt)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--prompt", ""), "--prompt: expected text"),
        (("--prompt", "A", "--prompt", "B"), "--prompt: given twice"),
        (("--prompt", "Hi.", "--temperature", -1), "--temperature: expected at least 0"),
        (("--prompt", "Hi.", "--top-k", 3), "--temperature: expected above 0"),
        (
            ("--prompt", "Hi.", "--temperature", 1, "--top-p", 1.5),
            "--top-p: expected above 0 and at most 1",
        ),
        (("--prompt", "Hi.", "--date", "today"), "--date: expected 26 Jul 2024 or 2024-07-26"),
        (("--prompt", "Hi.", "--max-new-tokens", 0), "--max-new-tokens: expected at least 1"),
        (("--prompt", "word " * 200), "--prompt 1: expected 1 to 127 tokens"),
        (("--prompt", "Hi.", "--step", 1), "--step: expected a workdir"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_message(flags, said, folder, tmp_path, capsys):
    short = tmp_path / "short"
    short.mkdir()
    for file in folder.iterdir():
        (short / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (short / "config.json").unlink()
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    assert run("--model", short, *flags) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_no_answer_is_longer_than_the_context(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    short = tmp_path / "short"
    short.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (short / file.name).symlink_to(file)
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    assert run("--model", short, "--prompt", "Hi.", "--raw", "--max-new-tokens", 100) == 0
    assert "room for" in capsys.readouterr().err


def test_text_grows_by_whole_characters_and_is_that_of_all_tokens(tokenizer):
    text = "naïve 👩‍👩‍👧‍👦 日本語 🇳🇴 end"
    writer = TextWriter(tokenizer)
    pieces = [writer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + writer.flush() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_text_goes_on_after_invalid_bytes():
    vocab = {"x": 0, "<unk>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    fallback = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    writer = TextWriter(PreTrainedTokenizerFast(tokenizer_object=fallback))
    pieces = [writer.push(2 + byte) for byte in ("日".encode() + b"\xe6")]
    assert pieces == ["", "", "日", ""] and writer.push(0).endswith("x")


def test_nothing_of_a_stop_text_is_shown(tokenizer):
    writer = TextWriter(tokenizer, ("STOP", "never"))
    pieces = [writer.push(token) for token in tokenizer("go on, STand STOP here")["input_ids"]]
    assert "".join(pieces) + writer.flush() == "go on, STand "
    assert writer.ended
