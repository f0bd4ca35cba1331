"""The generate command."""

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from convert import to_hf
from kd_jax import generate, train
from kd_jax.config import CheckpointConfig, DataConfig, LoraConfig, OptimConfig, UserError
from kd_jax.config.command import run_command
from kd_jax.data.answers import render
from kd_jax.data.fields import IS_METADATA
from kd_jax.data.questions import Question, read_questions
from kd_jax.data.records import make_record
from kd_jax.inference import answer_file, prompts
from kd_jax.inference.answer_file import AnswerFile
from kd_jax.inference.drawing import GREEDY
from kd_jax.inference.prompts import TextWriter
from kd_jax.weights.files import locked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = {"tie_word_embeddings": False, "num_hidden_layers": 1}
    return tiny.write_plain_model(folder, seed=1, **shape)


def run(*argv):
    return run_command(generate.main, [str(word) for word in argv])


def shortened(folder, short, context):
    """Returns a copy of a model with another context length."""
    short.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (short / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return short


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


def test_a_draft_model_changes_no_greedy_answer(folder, tmp_path_factory, capsys):
    draft = tmp_path_factory.mktemp("draft")
    tiny.write_plain_model(draft, seed=2, num_hidden_layers=1, vocab_size=352)
    prompts = ("--prompt", "Name the colour of the sky.", "Hi.")
    plain = answer(capsys, folder, *prompts)
    assert answer(capsys, folder, *prompts, "--draft", draft, "--draft-tokens", 3) == plain


def test_an_answer_ends_before_a_stop_text(folder, capsys):
    whole = answer(capsys, folder, "--prompt", "Hi.")
    middle = whole[len(whole) // 2 :][:3]
    cut = answer(capsys, folder, "--prompt", "Hi.", "--stop", middle)
    assert cut.rstrip("\n") == whole[: whole.index(middle)].rstrip("\n")


def test_a_stop_text_may_be_a_special_token(folder, tokenizer, tmp_path, capsys):
    model = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    head = tensors["lm_head.weight"]
    letter, end = tokenizer.convert_tokens_to_ids(["x", "<|end|>"])
    row = head[5].copy()
    head[:] = 0
    head[letter], head[end] = row, -row  # answers are of these two alone
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"instruction": "Hi."}) + "\n")
    argv = ("--prompt", "Hi.")
    cut = answer(capsys, model, *argv, "--stop", "<|end|>").strip()
    assert 0 < len(cut) < len(answer(capsys, model, *argv).strip())
    out = tmp_path / "out.jsonl"
    answer(capsys, model, "--data", data, "--out", out, "--stop", "<|end|>")
    (record,) = tiny.read_lines(out)
    assert record["messages"][-1]["content"] == cut and record["ended"]
    for given in (argv, ("--data", data, "--out", tmp_path / "new.jsonl")):
        assert run("--model", model, *given, "--stop", "x<|end|>") == 2
        assert "or one special token alone, got 'x<|end|>'" in capsys.readouterr().err


def test_a_run_answers_as_its_export_does(folder, tmp_path, capsys):
    tiny.write_data(tmp_path / "train.jsonl")
    template = tmp_path / "t.jinja"  # another than the folder's, with another end of turn
    template.write_text(
        "{% for m in messages %}{{ '<|start|>' + m.role + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=1)
    fields = {"workdir": str(tmp_path / "run"), "lora": LoraConfig(rank=4), "optim": optim}
    tiny.write_config(
        tmp_path, teacher=None, student=folder, dtype="float32",
        rows={"chat_template": str(template)}, steps=3, checkpoint=CheckpointConfig(every_steps=2),
        **fields,
    )  # fmt: skip
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

    last = tmp_path / "run" / "checkpoints" / "3"
    last.rename(tmp_path / "3")  # as if the run had not come so far
    data = ("--data", tmp_path / "train.jsonl", "--max-conversations", 1)
    argv = (*data, "--out", tmp_path / "answers.jsonl", "--dtype", "float32")
    answer(capsys, tmp_path / "run", *argv)
    (tmp_path / "3").rename(last)
    assert run("--model", tmp_path / "run", "--max-new-tokens", 12, *argv) == 2
    assert "begun with another configuration: model.checkpoint " in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--prompt", ""), "--prompt: expected text"),
        (("--prompt", "A", "--prompt", "B"), "--prompt: given twice"),
        (("--prompt", "Hi.", "--temperature", -1), "--temperature: expected at least 0"),
        (("--prompt", "Hi.", "--top-k", 3), "--temperature: expected above 0"),
        (("--prompt", "Hi.", "--seed", 2**64), "--seed: expected at least 0 and below 4294967296"),
        (
            ("--prompt", "Hi.", "--temperature", 1, "--top-p", 1.5),
            "--top-p: expected above 0 and at most 1",
        ),
        (("--prompt", "Hi.", "--date", "today"), "--date: expected 26 Jul 2024 or 2024-07-26"),
        (("--prompt", "Hi.", "--max-new-tokens", 0), "--max-new-tokens: expected at least 1"),
        (("--prompt", "word " * 200), "--prompt 1: expected 1 to 127 tokens"),
        (("--prompt", "Hi.", "--step", 1), "--step: expected a workdir"),
        (("--prompt", "Hi.", "--temperature", "inf"), "--temperature: expected at least 0"),
        (("--prompt", "Hi.", "--split", "test"), "--split: expected --data as well"),
        (("--prompt", "Hi.", "--distributed.timeout-seconds", 9), "--distributed: expected --data"),
        (("--prompt", "Hi.", "--draft-tokens", 7), "--draft-tokens: expected --draft as well"),
        (("--prompt", "Hi.", "--raw", "--system", "Be brief."), "--raw: expected no --system"),
        (("--prompt", "Hi \udcff."), "--prompt: expected Unicode text"),
        (("--prompt", "Hi.", "--draft", "nowhere"), "--draft: expected a folder or a hub id"),
        (("--prompt", "Hi.", "--mesh.tensor", "3"), "mesh: expected a product of 2 (the devices)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_message(flags, said, folder, tmp_path, capsys):
    assert run("--model", shortened(folder, tmp_path / "short", 128), *flags) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_damaged_weights_are_said(folder, tmp_path, capsys):
    model = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "data.jsonl").write_text('{"prompt": "Hi."}')
    asked = ("--data", tmp_path / "data.jsonl", "--out", tmp_path / "out.jsonl")
    for flags in (("--prompt", "Hi."), asked):
        assert run("--model", model, *flags) == 2
        assert "--model: expected finite logits, got NaN" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_without_a_tokens_embedding_is_refused(folder, tmp_path, capsys):
    small = tiny.write_plain_model(tmp_path / "small", seed=1, vocab_size=100)
    for flags in (("--model", small), ("--model", folder, "--draft", small)):
        assert run(*flags, "--prompt", "Hi.") == 2
        said = f"{flags[-2]}: expected an embedding for each token of the prompts, got a model with"
        assert said in capsys.readouterr().err


def test_no_answer_is_longer_than_the_context(folder, tmp_path, capsys):
    short = shortened(folder, tmp_path / "short", 40)
    assert run("--model", short, "--prompt", "Hi.", "--raw", "--max-new-tokens", 100) == 0
    assert "room for" in capsys.readouterr().err


def test_text_grows_by_whole_characters_and_is_that_of_all_tokens(tokenizer, monkeypatch):
    text = "naïve 👩‍👩‍👧‍👦 日本語 🇳🇴 end" * 20
    decoded, decode = [], prompts.decode_answer
    monkeypatch.setattr(
        prompts, "decode_answer", lambda *x: decoded.append(len(x[1])) or decode(*x)
    )
    writer, tokens = TextWriter(tokenizer), tokenizer(text)["input_ids"]
    pieces = [writer.push(token) for token in tokens]
    assert "".join(pieces) + writer.flush() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert sum(decoded) < 150 * len(tokens)  # the recent ones, not all with each


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


# Answers to data.

MODES = ("--temperature", 1, "--samples", 2, "--max-new-tokens", 12, "--dtype", "float32")


def write_questions(file):
    records = [
        {"instruction": "Hi.", "output": "unused"},
        {"messages": [{"role": "user", "content": "Name the colour of the sky."}]},
        {"conversations": [{"from": "human", "value": "How many legs has a cat?"}]},
        {"prompt": "Say a word.", "completion": " blue"},
        {"prompt": [{"role": "user", "content": "What is two plus three?"}]},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def answered(folder, tmp_path_factory):
    """A folder with data and the file of their answers."""
    place, data = tmp_path_factory.mktemp("answered"), tmp_path_factory.mktemp("data")
    for file in (place / "data.jsonl", data / "data.jsonl"):
        write_questions(file)
    # Of a folder without names of splits, as of a file, the split is train.
    assert run("--model", folder, "--data", data, "--out", place / "out.jsonl", *MODES) == 0
    return place


def test_each_prompt_of_a_file_is_answered_in_its_template(answered, folder, tmp_path, capsys):
    found = tiny.read_lines(answered / "out.jsonl")
    assert [(x["index"], x["sample"]) for x in found] == [(i, s) for i in range(5) for s in (0, 1)]
    assert found[6]["prompt"] == "Say a word." and found[6]["completion"] != " blue"
    assert [turn["role"] for turn in found[0]["messages"]] == ["user", "assistant"]
    assert len({json.dumps(x.get("messages")) for x in found[:2]}) == 2
    assert all(0 < x["tokens"] <= 12 for x in found)
    assert sorted(x.name for x in answered.iterdir()) == [
        "data.jsonl", "out.jsonl", "out.jsonl.config.json"
    ]  # fmt: skip
    first, second = answered / "data.jsonl", tmp_path / "second.jsonl"
    hinted = {**tiny.read_lines(first)[1], "teacher_messages": [{"role": "user", "content": "?"}]}
    second.write_text(json.dumps(hinted) + "\n")
    both = ("--data", f"{first}, {second}", "--max-conversations", 1)
    greedy = (*both, "--batch-rows", 1)
    greedy = (*greedy, "--dtype", "float32", "--max-new-tokens", 12)
    assert run("--model", folder, *greedy, "--out", tmp_path / "greedy.jsonl") == 0
    said = capsys.readouterr().err
    assert f"warning: {first}, {second}: 1 records have `teacher_messages`: ignored" in said
    texts = [x["messages"][-1]["content"] for x in tiny.read_lines(tmp_path / "greedy.jsonl")]
    for prompt, text in zip(("Hi.", "Name the colour of the sky."), texts, strict=True):
        assert answer(capsys, folder, "--prompt", prompt) == text + "\n"


def test_training_reads_answers(answered, tokenizer):
    for number, line in enumerate((answered / "out.jsonl").read_bytes().splitlines()):
        record = make_record(f"line {number}", line)
        assert {why for _, why in record.ignored} == {IS_METADATA}
        assert render(tokenizer, record, tiny.TEMPLATE, "26 Jul 2024").spans


def test_a_killed_command_goes_on_at_whole_lines(answered, folder, tmp_path, monkeypatch, capsys):
    want = (answered / "out.jsonl").read_bytes()
    lines = want.splitlines(keepends=True)
    torn = [b"\0\0\n", b"[]\n", b'{"index": 0}\n', lines[7][:20]]
    out = tmp_path / "out[1].jsonl"
    part, other = tmp_path / "out[1].jsonl.part0", tmp_path / "out[1].jsonl.part0.mine"
    part.write_bytes(b"".join(lines[:7:2] + torn))
    other.write_text("mine")
    record = (answered / "out.jsonl.config.json").read_bytes()
    (tmp_path / "out[1].jsonl.config.json").write_bytes(record)
    drawn = []
    sampled = answer_file.sample_rows

    def counted(spec, arrays, rows, **options):
        drawn.append(len(rows))
        return sampled(spec, arrays, rows, **options)

    monkeypatch.setattr(answer_file, "sample_rows", counted)
    argv = ("--model", folder, "--data", answered / "data.jsonl", "--out", out)
    with locked(tmp_path / "out[1].jsonl.lock", wait=False):
        assert run(*argv, *MODES) == 2
        assert "is being written by" in capsys.readouterr().err
    assert run(*argv, *MODES) == 0
    assert out.read_bytes() == want and other.exists() and not part.exists()
    assert sum(drawn) == len(lines) - 4
    assert run(*argv, *MODES) == 0  # nothing is left to do
    assert sum(drawn) == len(lines) - 4


def questions_of(lengths):
    return [Question(i, f"line {i}", [5] * n, "", [], text=str(i)) for i, n in enumerate(lengths)]


OPTIONS = answer_file.Options(
    sampling=GREEDY, samples=2, seed=0, stop_tokens=(), stop_texts=(), max_new_tokens=6,
    context=10, batch_rows=None, vocab_size=300,
)  # fmt: skip


def test_processes_share_the_prompts_and_one_joins_their_parts(tmp_path, monkeypatch):
    def draw(spec, arrays, places, questions, options, decode):
        for place in places:
            record = {"ended": True, "tokens": 3, **questions[place[0]].answered("yes")}
            yield place, {**record, "empty": True} if place == (2, 1) else record

    monkeypatch.setattr(answer_file, "_draw", draw)
    monkeypatch.setattr(answer_file, "together", lambda name, work: work())
    monkeypatch.setattr(answer_file.jax, "process_count", lambda: 2)
    file = answer_file.AnswerFile(str(tmp_path / "out.jsonl"), {"seed": 0})
    for process in (1, 0):
        monkeypatch.setattr(answer_file.jax, "process_index", lambda process=process: process)
        first = (lambda name, work: work()) if process == 0 else lambda name, work: None
        monkeypatch.setattr(answer_file, "on_first", first)
        counts = answer_file.write_answers(file, None, {}, questions_of([4] * 5), OPTIONS, str)
        if process == 1:
            assert len(tiny.read_lines(tmp_path / "out.jsonl.part1")) == 5 and counts is None
    assert counts == {"answers": 10, "empty": 1, "ended": 10, "tokens": 30}
    places = [(x["index"], x["sample"]) for x in tiny.read_lines(tmp_path / "out.jsonl")]
    assert places == [(i, s) for i in range(5) for s in (0, 1) if (i, s) != (2, 1)]
    assert not file.parts()


def test_a_part_is_written_anew_only_without_a_torn_line(tmp_path):
    file = answer_file.AnswerFile(str(tmp_path / "out.jsonl"), {})
    line = json.dumps({"index": 0, "sample": 0, "ended": True, "tokens": 3}) + "\n"
    part = tmp_path / "out.jsonl.part0"
    part.write_text(line)
    before = part.stat()
    assert file.part(0) == part and part.stat().st_mtime_ns == before.st_mtime_ns
    part.write_text(line + line[:20])
    torn = part.stat().st_ino
    assert file.part(0).read_text() == line and part.stat().st_ino != torn  # a new file


def test_answers_of_another_configuration_are_refused(answered, folder, tmp_path, capsys):
    argv = ("--model", folder, "--data", answered / "data.jsonl", "--out", answered / "out.jsonl")
    assert run(*argv, *MODES, "--seed", 1) == 2
    assert "begun with another configuration: seed 0 (now 1)" in capsys.readouterr().err
    identity = answered / "out.jsonl.config.json"
    earlier = json.loads(identity.read_text())
    earlier["model"]["checkpoint"], template = "an earlier one", earlier.pop("template")
    with pytest.raises(UserError) as refused:
        AnswerFile(str(answered / "out.jsonl"), {**earlier, "template": f"{template} "})
    assert "model.checkpoint None (now 'an earlier one'), another template." in str(refused.value)
    assert run(*argv[:4], "--out", answered / "data.jsonl", *MODES) == 2
    assert "which is another file" in capsys.readouterr().err
    assert run(*argv[:2], "--data", answered, "--out", answered / "new.jsonl", *MODES) == 2
    assert "--out: expected a place that --data does not read" in capsys.readouterr().err
    (tmp_path / "out.jsonl.config.json").write_text("{")
    assert run(*argv[:4], "--out", tmp_path / "out.jsonl", *MODES) == 2
    assert "out.jsonl.config.json: expected JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record, flags, said",
    [
        ({"text": "words"}, (), "expected records with a prompt"),
        ({"messages": []}, (), "data.jsonl:1: messages: expected a list of turns"),
        ({"prompt": "word " * 300}, (), "expected prompts of 1 to 127 tokens"),
        ({"prompt": "Hi."}, ("--samples", 2), "--temperature: expected above 0 with --samples"),
        ({"prompt": "Hi."}, ("--prompt", "Hi."), "--prompt: expected either"),
        (
            {"prompt": "Hi.", "completion": " Ho."},
            ("--system", "S."),
            "data.jsonl:1: expected messages",
        ),
        ({"prompt": "Hi."}, ("--chat-template", "bare"), "template with a generation prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_in_data_is_one_message(record, flags, said, folder, tmp_path, capsys):
    short = shortened(folder, tmp_path / "short", 128)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(record) + "\n")
    bare = tmp_path / "bare.jinja"
    turn = "{{ '<|start|>' + m.role + '<|end|>' + m.content + '<|eot|>' }}"
    bare.write_text("{% for m in messages %}" + turn + "{% endfor %}")
    flags = [bare if flag == "bare" else flag for flag in flags]
    assert run("--model", short, "--data", data, "--out", tmp_path / "out.jsonl", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("speaker", ["function_response", "Observation", "function", "ipython"])
def test_a_prompt_may_end_with_a_tools_result(speaker, tokenizer, tmp_path):
    called = {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}
    turns = [{"from": "human", "value": "Add."}, called, {"from": speaker, "value": "24"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    questions, _ = read_questions(DataConfig(path=f"{tmp_path}/a.jsonl"), tokenizer, tiny.TEMPLATE)
    assert [x["content"] for x in questions[0].messages] == ["Add.", "", "24"]


def test_each_source_gives_its_first_conversations(tokenizer, tmp_path):
    for name in "ab":
        lines = [json.dumps({"prompt": f"{name}{number}"}) for number in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = DataConfig(path=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", max_conversations=2)
    questions, _ = read_questions(data, tokenizer, tiny.TEMPLATE)
    assert [x.messages[0]["content"] for x in questions] == ["a0", "a1", "b0", "b1"]


def test_prompts_without_room_are_counted():
    fitting, (skipped, cut) = answer_file.fit_context(questions_of([4, 10, 0, 5, 9]), OPTIONS)
    assert [question.index for question in fitting] == [0, 3, 4]
    assert "2 prompts leave no room in the context of 10 tokens" in skipped
    assert "line 1 (10), line 2 (0)" in skipped
    assert "2 prompts leave room for less than --max-new-tokens" in cut
