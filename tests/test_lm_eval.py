"""The lm-eval model against lm-eval's own `hf` model, on the same folder, in float32."""

import json

import lm_eval
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from convert import to_hf
from kd_jax import lm_eval as command
from kd_jax import train
from kd_jax.config import OptimConfig
from kd_jax.config.command import run_command
from kd_jax.inference.lm_eval_model import KdJaxLM

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWERS = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  until: ["cat", "\\n\\n"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), seed=1, num_hidden_layers=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of two tasks with data: contexts are shared, repeated or end in spaces."""
    root = tmp_path_factory.mktemp("tasks")
    records = []
    for i in range(12):
        question = tiny.WORDS[i % 6] + ("", " ", "\\n")[i % 3]
        choices = [f" {word}" for word in ("blue", "four legs", "cat", "It is five.")]
        records.append({"question": question, "choices": choices[: 2 + i % 3], "label": i % 2})
    (root / "data.json").write_text(json.dumps(records))
    for name, text in (("tiny_choices", CHOICES), ("tiny_answers", ANSWERS)):
        (root / f"{name}.yaml").write_text(text.format(name=name, data=root / "data.json"))
    text = CHOICES.format(name="tiny_broken", data=root / "not_there.json")
    (root / "tiny_broken.yaml").write_text(text)
    return root


def ours(folder, **options):
    return KdJaxLM(str(folder), dtype="float32", compilation_cache=None, **options)


def theirs(folder, **options):
    options = {"dtype": "float32", "device": "cpu", "batch_size": 4, **options}
    return HFLM(pretrained=str(folder), **options)


def ask(model, kind, *arguments):
    requests = [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]
    return getattr(model, kind)(requests, disable_tqdm=True)


def assert_same_scores(got, want):
    for (value, greedy), (expected, expected_greedy) in zip(got, want, strict=True):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert greedy == expected_greedy


PAIRS = [
    ("Name the colour of the sky.", " Blue."),
    ("Name the colour of the sky.", " Blue."),
    ("Name the colour of the sky. ", "Blue."),
    ("Name the colour of the sky.  \n ", "Blue, and green is the grass."),
    ("Name the colour of the sky.", "x"),
    ("", "The sky is blue, and grass is green."),
    ("", "<|begin|>The sky is blue."),
    ("<|begin|>Name it.", " Blue."),
    ("a", "b"),
    ("A cat has four legs. " * 4, "How many legs has a cat?"),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 24},
        {"add_bos_token": True},
        {"prefix_token_id": 7},
    ],
    ids=str,
)
def test_log_likelihoods_are_hfs(options, folder):
    mine, hf = ours(folder, **options), theirs(folder, **options)
    want = ask(hf, "loglikelihood", *PAIRS)
    assert_same_scores(ask(mine, "loglikelihood", *PAIRS), want)
    assert len({round(value, 3) for value, _ in want}) > len(PAIRS) // 2


def test_greediness_is_hfs(folder):
    mine, hf = ours(folder), theirs(folder)
    requests = []
    for text in tiny.WORDS:
        context = hf.tok_encode(text)
        greedy = hf.model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)
        greedy = greedy[0, len(context) :].tolist()
        requests += [(None, context, greedy), (None, context, [*greedy[:-1], 9])]
    want = hf._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_same_scores(mine._loglikelihood_tokens(requests, disable_tqdm=True), want)
    assert [greedy for _, greedy in want] == [True, False] * len(tiny.WORDS)


@pytest.mark.parametrize("max_length", [None, 16])
def test_rolling_log_likelihoods_are_hfs(max_length, folder):
    texts = [(" ".join(tiny.WORDS[:n]),) for n in (1, 3, 6)]
    got = ask(ours(folder, max_length=max_length), "loglikelihood_rolling", *texts)
    want = ask(theirs(folder, max_length=max_length), "loglikelihood_rolling", *texts)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_answers_are_hfs(folder):
    options = {"until": ["cat", "<|end|>"], "max_gen_toks": 40, "do_sample": False}
    asked = [(text, options) for text in (*tiny.WORDS, "<|begin|>a")]
    asked += [(tiny.WORDS[0], {"until": "the", "max_gen_toks": 5}), (tiny.WORDS[0], {})]
    got = ask(ours(folder), "generate_until", *asked)
    want = ask(theirs(folder, batch_size=1), "generate_until", *asked)
    assert got == want and len(set(got)) > 5
    assert ask(ours(folder, batch_size=2), "generate_until", *asked) == want


def test_answers_end_where_hfs_do(folder, monkeypatch):
    mine, hf = ours(folder), theirs(folder, batch_size=1)
    decoded, text_of = [], mine._text
    monkeypatch.setattr(
        mine, "_text", lambda tokens: decoded.append(len(tokens)) or text_of(tokens)
    )
    for text in tiny.WORDS[:3]:
        (whole,) = ask(hf, "generate_until", (text, {"max_gen_toks": 30}))
        stop = whole[len(whole) // 2 :][:2]
        asked = (text, {"until": ["not there", stop], "max_gen_toks": 30})
        got = ask(mine, "generate_until", asked)
        assert got == ask(hf, "generate_until", asked) == [whole[: whole.index(stop)]]
    decoded.clear()
    ask(mine, "generate_until", (tiny.WORDS[0], {"until": ["日", "本"], "max_gen_toks": 30}))
    assert max(decoded[:-1]) <= 12 < decoded[-1]  # the last tokens with each, the whole at the end


def test_an_unknown_option_of_generation_is_refused(folder):
    with pytest.raises(command.UserError, match="num_beams"):
        ask(ours(folder), "generate_until", ("a", {"num_beams": 4}))


def evaluate(model, tasks, *names, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"bootstrap_iters": 0, **options}
    return lm_eval.simple_evaluate(model, tasks=list(names), task_manager=manager, **options)


def test_a_tasks_every_example_is_as_hfs(folder, tasks):
    options = {"apply_chat_template": True, "num_fewshot": 2}
    names = ("tiny_choices", "tiny_answers")
    got = evaluate(ours(folder), tasks, *names, **options)
    want = evaluate(theirs(folder, batch_size=1), tasks, *names, **options)
    for mine, hf in zip(
        got["samples"]["tiny_choices"], want["samples"]["tiny_choices"], strict=True
    ):
        assert mine["arguments"] == hf["arguments"]
        assert_same_scores(mine["filtered_resps"], hf["filtered_resps"])
    for mine, hf in zip(
        got["samples"]["tiny_answers"], want["samples"]["tiny_answers"], strict=True
    ):
        assert mine["filtered_resps"] == hf["filtered_resps"]
    assert got["results"] == want["results"]
    assert 0 < got["results"]["tiny_choices"]["acc,none"] < 1


@pytest.mark.slow
def test_another_model_would_be_noticed(folder, tasks, tmp_path):
    other = tiny.write_model(tmp_path / "model", seed=2)
    got, want = (
        evaluate(ours(x), tasks, "tiny_choices")["samples"]["tiny_choices"] for x in (folder, other)
    )
    with pytest.raises(AssertionError):
        for mine, another in zip(got, want, strict=True):
            assert_same_scores(mine["filtered_resps"], another["filtered_resps"])


def run(*argv):
    return run_command(command.main, [str(word) for word in argv])


@pytest.mark.slow
def test_the_command_takes_workdirs(folder, tasks, tmp_path, capsys):
    tiny.write_data(tmp_path / "train.jsonl")
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=1)
    fields = {"workdir": str(tmp_path / "run"), "optim": optim, "steps": 3}
    config = tiny.write_config(tmp_path, teacher=None, student=folder, **fields)
    assert run_command(train.main, ["--config", str(config)]) == 0
    out = tmp_path / "out"
    argv = ["--workdir", str(tmp_path / "run"), "--out", str(out)]
    assert run_command(to_hf.main, argv) == 0
    flags = ("--tasks", "tiny_choices", "--include-path", tasks, "--dtype", "float32")
    capsys.readouterr()
    for model in (tmp_path / "run", out):
        file = tmp_path / f"{model.name}.json"
        assert run("--model", model, *flags, "--out", file, "--log-samples") == 0
        assert "tiny_choices" in capsys.readouterr().out
    file = tmp_path / f"{folder.name}.json"
    less = ("--limit", 3, "--json")
    assert run("--model", folder, *flags, "--out", file, "--log-samples", *less) == 0
    assert json.loads(capsys.readouterr().out)["n-samples"]["tiny_choices"]["effective"] == 3
    run_, exported, before = (
        [x["filtered_resps"] for x in json.loads(file.read_text())["samples"]["tiny_choices"]]
        for file in (tmp_path / f"{name}.json" for name in ("run", "out", folder.name))
    )
    for mine, other in zip(run_, exported, strict=True):
        assert_same_scores(mine, other)
    assert len(before) == 3 and run_[:3] != before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tasks", "tiny_choicse"), "got tiny_choicse. Did you mean tiny_choices?"),
        (("--tasks", ","), "--tasks: expected names"),
        (("--tasks", "tiny_choices", "--limit", 0), "--limit: expected at least 1"),
        (("--tasks", "tiny_choices", "--out", "/not/there/x"), "--out: expected a file"),
        (("--tasks", "tiny_broken"), "expected tasks whose data can be read"),
    ],
)
def test_mistakes_are_answered(flags, said, folder, tasks, capsys, monkeypatch):
    init = TaskManager.__init__

    def without_defaults(self, *_, include_path, include_defaults=True):
        init(self, include_path=include_path, include_defaults=False)  # which take seconds to read

    monkeypatch.setattr(TaskManager, "__init__", without_defaults)
    assert run("--model", folder, "--include-path", tasks, *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error:") == 1


def test_a_folder_of_tasks_that_is_not_there_is_refused(folder, capsys):
    flags = ("--tasks", "hellaswag", "--include-path", "/not/there")
    assert run("--model", folder, *flags) == 2
    assert "--include-path: expected a folder" in capsys.readouterr().err
