"""Laws of the configuration: errors, --help, fields that a resumed run may change."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from paths import ROOT
from tiny import plain_config

from convert.from_hf import FromHfArgs
from convert.to_hf import ToHfArgs
from kd_jax.cache import CacheArgs
from kd_jax.config import (
    Config,
    DataConfig,
    LogConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OnPolicyConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    UserError,
    data,
    loss,
    on_policy,
    record,
    run,
    teacher,
)
from kd_jax.config.checks import IS_PATH, Range, metadata, plain_type
from kd_jax.config.command import check_out_file, load_config, parse_args, parse_config, run_command
from kd_jax.config.record import differences, dump, from_json
from kd_jax.demo import DemoArgs
from kd_jax.inference.arguments import EvaluateArgs, GenerateArgs
from kd_jax.lm_eval import LmEvalArgs
from kd_jax.losses import divergences, schedules
from kd_jax.models import attention
from kd_jax.plan import PlanArgs
from kd_jax.report import ReportArgs
from kd_jax.sweep import SweepArgs

EXAMPLE = ROOT / "configs" / "8b_to_1b.py"
ALL_CONFIGS = sorted(EXAMPLE.parent.rglob("*.py"))
MAX_SECONDS = 2.0


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    for entry in dataclasses.fields(cls):
        if part := record.part_of(entry.type):
            yield from leaves(part, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}"


LEAVES = sorted(leaves(Config))


def documented() -> dict[str, str]:
    """Returns the docstring under each field of each dataclass, as `Class.field`."""
    found = {}
    files = [Path(module.__file__) for module in (run, data, loss, on_policy, teacher)]
    for node in [node for file in files for node in ast.parse(file.read_text()).body]:
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[f"{node.name}.{field.target.id}"] = ast.literal_eval(text.value)
    return found


def owner(name: str) -> str:
    """Returns `Class.field` of a leaf such as `data.seq_len`."""
    part, _, field = name.rpartition(".")
    owner = record.part_of(get_type_hints(Config)[part]) if part else Config
    return f"{owner.__name__}.{field}"


def annotation(name: str) -> Any:
    """Returns the annotated type of a leaf such as `data.seq_len`."""
    part, _, field = name.rpartition(".")
    cls = record.part_of(get_type_hints(Config)[part]) if part else Config
    return get_type_hints(cls, include_extras=True)[field]


RANGES = [
    (cls, entry, mark)
    for cls in (GenerateArgs, EvaluateArgs, LmEvalArgs, PlanArgs, SweepArgs, DemoArgs)
    for entry in dataclasses.fields(cls)
    for mark in metadata(entry.type)
    if mark is not IS_PATH
]


@pytest.mark.parametrize("cls, entry, mark", RANGES, ids=lambda x: getattr(x, "name", ""))
def test_arguments_have_the_range_that_help_shows(cls, entry, mark, capsys):
    flag = "--" + entry.name.replace("_", "-")
    needed = [e for e in dataclasses.fields(cls) if e.default is e.default_factory]  # both missing
    argv = [word for e in needed for word in (f"--{e.name}", "x")]
    with pytest.raises(SystemExit):
        parse_args(cls, ["--help"])
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert re.search(rf"{flag} [^-].*? \(default: \S+; {mark}\)", shown)
    lowest = mark.above if mark.least is None else mark.least - 1
    with pytest.raises(UserError, match=f"^{flag}: expected {mark}, got {lowest}"):
        parse_args(cls, [*argv, f"{flag}={lowest}"])


def parse(*argv: str) -> Config:
    return parse_config(argv)


def refusal(capsys, *argv: str) -> str:
    """Returns the one message of a refused command line."""
    assert run_command(lambda argv: print(parse(*argv)), argv) == 2
    printed = capsys.readouterr()
    assert not printed.out and "Traceback" not in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("error: ") == 1
    return printed.err


def run_python(code: str, *argv: str) -> tuple[float, str]:
    """Returns the CPU seconds of a process, which other processes do not change, and its output."""
    command, before = [sys.executable, "-c", code, *argv], os.times()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    after = os.times()
    seconds = after.children_user + after.children_system
    return seconds - before.children_user - before.children_system, done.stdout


HELP = f"""
import sys
from kd_jax.config.command import run_command
from kd_jax.train import main
assert run_command(main, ["--config", "{EXAMPLE}", "--help"]) == 0
"""


@pytest.fixture(scope="module")
def help_text() -> str:
    text = subprocess.run(
        [sys.executable, "-m", "kd_jax.train", "--config", EXAMPLE, "--help"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    ).stdout  # fmt: skip
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("name", LEAVES)
def test_help_prints_every_field(name, help_text):
    flag = "--" + name.replace("_", "-")
    text = " ".join(documented()[owner(name)].split())
    between = r"(, --\S+)? ((?! --).)*"
    range_ = "".join(f"; {mark}" for mark in metadata(annotation(name)) if mark is not IS_PATH)
    hint = rf" \((required|default: [^;)]*{re.escape(range_)})\)"
    assert re.search(f" {re.escape(flag)}{between}{re.escape(text)}{hint}", help_text)


def test_every_number_has_a_range():
    for name in LEAVES:
        kind = plain_type(annotation(name))
        choices = {kind} if get_origin(kind) is tuple else {kind, *get_args(kind)}
        has_range = any(isinstance(mark, Range) for mark in metadata(annotation(name)))
        assert has_range == bool({int, float} & choices), name


@pytest.mark.parametrize(
    "range_, text, inside, outside",
    [
        (Range(least=1), "at least 1", [1, 2.5, inf], [0.9, -inf, nan]),
        (Range(above=0), "above 0", [1e-9, inf], [0, nan]),
        (Range(least=0, most=1), "at least 0 and at most 1", [0, 1], [-0.1, 1.1, nan]),
        (Range(least=0, below=1), "at least 0 and below 1", [0, 0.9], [1, -1, nan]),
        (Range(above=0, below=inf), "above 0 and finite", [1e300], [0, inf, nan]),
        (Range(above=-inf, below=inf), "finite", [-1e300, 1e300], [inf, -inf, nan]),
        (Range(least=0, also=-1), "at least 0, or -1", [-1, 0, 7], [-2, -0.5, nan]),
    ],
    ids=str,
)
def test_a_range_holds_what_it_says(range_, text, inside, outside):
    assert str(range_) == text
    assert [x in range_ for x in inside + outside] == [True] * len(inside) + [False] * len(outside)


@pytest.mark.parametrize("code", [HELP, "import sys, kd_jax.config"], ids=["help", "import"])
def test_help_and_import_take_no_jax_and_no_time(code):
    seconds, printed = run_python(code + "\nprint('jax' in sys.modules)")
    assert printed.split()[-1] == "False"
    assert seconds < MAX_SECONDS


def test_help_needs_no_config_file_and_fills_its_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(lambda argv: print(parse(*argv)), ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "--remat {" in line)
    paragraph = [line.strip("│ ") for line in lines[at + 1 : at + 5]]
    assert paragraph[0].startswith("Gradient checkpointing") and min(map(len, paragraph)) > 60


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--optim.learning-rat", "1"], "--optim.learning-rate"),
        (["--learning-rate", "1"], "--optim.learning-rate"),
        (["--optim.learning-rate"], "Missing value for argument '--optim.learning-rate'"),
        (["--seed", "x"], "--seed"),
        (["--optim.schedule", "cosin"], "cosine"),
        (["--lora.target-modules", "q_prj"], "got 'q_prj'. Did you mean q_proj?"),
        (["--steps", "3", "--epochs", "2"], "steps, epochs: expected"),
        (["--optim.accumulation-steps", "0"], "optim.accumulation-steps: expected at least 1"),
    ],
)
def test_wrong_flag_is_one_message(argv, said, capsys):
    assert said in refusal(capsys, "--config", str(EXAMPLE), *argv)


def test_all_problems_of_a_command_line_are_reported(capsys):
    argv = ["--data.seq-len", "1", "--seed=-1", "--loss.kd-ratio", "2", "--lora.rank", "0"]
    lines = refusal(capsys, "--config", str(EXAMPLE), *argv).splitlines()
    names = [line.removeprefix("error: ").split(":")[0] for line in lines]
    assert sorted(names) == ["data.seq-len", "lora.rank", "loss.kd-ratio", "seed"]


@pytest.mark.parametrize("argv", [[], ["--config"], ["--seed", "1"]])
def test_config_file_is_required(argv, capsys):
    assert "--config: expected a Python file" in refusal(capsys, *argv)


def test_missing_config_file_names_the_nearest(capsys):
    wrong = EXAMPLE.with_name("8b_to_2b.py")
    assert f"Did you mean {EXAMPLE}?" in refusal(capsys, "--config", str(wrong))


@pytest.mark.parametrize(
    "source, said",
    [
        ("def get_config():\n    return 1 / 0\n", "file.py:2: ZeroDivisionError"),
        ("import json\n\njson.loads('')\n", "file.py:3: JSONDecodeError"),
        ("x = 1\ndef get_config(:\n", "file.py:2: SyntaxError"),
        ("import nowhere_at_all\n", "file.py:1: ModuleNotFoundError"),
        ("x = 1\n", "file.py: expected a function get_config(), got none"),
        ("def get_config():\n    return {'steps': 1}\n", "return a Config, got {'steps': 1}"),
        ("from kd_jax.config import LoraConfig\nLoraConfig(rnk=1)\n", "file.py:2: TypeError"),
    ],
)
def test_broken_config_file_is_one_message(source, said, tmp_path, capsys):
    (tmp_path / "file.py").write_text(source)
    assert said in refusal(capsys, "--config", str(tmp_path / "file.py"))


WITHOUT_TEACHER = """
from kd_jax.config import *

def get_config():
    return Config(workdir="w", teacher=None, student=StudentConfig(path="s"),
                  data=DataConfig(path="d"), steps=1)
"""


def test_a_file_without_a_teacher_takes_one_from_a_flag(tmp_path, capsys):
    file = tmp_path / "file.py"
    file.write_text(WITHOUT_TEACHER)
    assert parse("--config", str(file)).teacher is None
    given = parse("--config", str(file), "--teacher.path=t", "--teacher.dtype", "float32")
    assert given.teacher == TeacherConfig(path="t", dtype="float32") and given.distils
    said = refusal(capsys, "--config", str(file), "--teacher.dtype", "float32")
    assert said.startswith("error: --teacher.dtype: expected --teacher.path as well")


@pytest.mark.parametrize(
    "changes, distils",
    [
        ({}, True),
        ({"teacher": None}, False),
        ({"loss": LossConfig(kd_ratio=0.0)}, False),
        ({"loss": LossConfig(kd_ratio=0.0, kd_ratio_end=0.0, schedule="linear")}, False),
        ({"loss": LossConfig(kd_ratio=0.0, kd_ratio_end=0.1, schedule="linear")}, True),
        ({"loss": LossConfig(kd_ratio=0.1, kd_ratio_end=0.0, schedule="cosine")}, True),
    ],
)
def test_a_run_distils_where_a_teacher_has_weight(changes, distils):
    assert plain_config(**changes).distils == distils
    assert from_json(dump(plain_config(**changes))) == plain_config(**changes)


def test_flags_lie_over_the_file():
    changed = parse("--seed", "7", f"--config={EXAMPLE}", "--data.no-pack", "--mesh.data", "-1")
    want = load_config(EXAMPLE)
    want = dataclasses.replace(want, seed=7, data=dataclasses.replace(want.data, pack=False))
    assert changed == want


@pytest.mark.parametrize(
    "words, pack",
    [
        (["--data.pack", "False"], False),
        (["--data.pack=false"], False),
        (["--data.pack", "True"], True),
        (["--data.no-pack", "true"], False),
        (["--data.no-pack"], False),
    ],
)
def test_a_switch_takes_true_and_false(words, pack):
    changed = parse(f"--config={EXAMPLE}", *words, "--seed", "3")
    assert changed.data.pack is pack and changed.seed == 3


def test_a_switch_with_another_value_names_its_forms(capsys):
    assert run_command(parse_config, [f"--config={EXAMPLE}", "--data.pack", "maybe"]) == 2
    assert (
        "expected --data.pack or --data.no-pack, got --data.pack maybe" in capsys.readouterr().err
    )


@pytest.mark.parametrize("given", ["steps=9", "epochs=9"])
@pytest.mark.parametrize(
    "flags, want",
    [
        (["--steps", "3"], (3, None)),
        (["--epochs=0.5"], (None, 0.5)),
        (["--steps", "3", "--epochs", "None"], (3, None)),
        (["--steps", "None", "--epochs", "2"], (None, 2)),
    ],
)
def test_length_flag_replaces_the_files_length(given, flags, want, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(EXAMPLE.read_text().replace("epochs=1", given))
    parsed = parse("--config", str(file), *flags)
    assert (parsed.steps, parsed.epochs) == want


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"steps": None}, ["steps, epochs"]),
        ({"epochs": 1.0}, ["steps, epochs"]),
        ({"steps": 0}, ["steps"]),
        ({"steps": None, "epochs": 0.0}, ["epochs"]),
        ({"seed": 2**32}, ["seed"]),
        ({"data": DataConfig(path="d", batch_size=0, max_conversations=0)},
         ["data.batch-size", "data.max-conversations"]),
        ({"data": DataConfig(path="d", batch_size=6), "optim": OptimConfig(accumulation_steps=4)},
         ["data.batch-size"]),
        ({"optim": OptimConfig(learning_rate=float("nan"), beta1=1.0, beta2=-0.1, epsilon=0.0,
                               clip_norm=0.0, warmup_steps=-1, weight_decay=-1.0)},
         ["optim.beta1", "optim.beta2", "optim.clip-norm", "optim.epsilon", "optim.learning-rate",
          "optim.warmup-steps", "optim.weight-decay"]),
        ({"loss": LossConfig(kd_ratio=1.5, temperature=0.0, chunk_tokens=0)},
         ["loss.chunk-tokens", "loss.kd-ratio", "loss.temperature"]),
        ({"loss": LossConfig(kd_ratio_end=-0.1, temperature_end=0.0, schedule_steps=11)},
         ["loss.kd-ratio-end", "loss.schedule", "loss.schedule-steps", "loss.schedule-steps",
          "loss.temperature-end"]),
        ({"loss": LossConfig(divergence="jsd", jsd_beta=1.1, akl_mass=0.7)},
         ["loss.akl-mass", "loss.jsd-beta"]),
        ({"loss": LossConfig(divergence="symmetric_kl", symmetric_weight=-0.1, skew_alpha=0.5)},
         ["loss.skew-alpha", "loss.symmetric-weight"]),
        ({"loss": LossConfig(divergence="skew_forward_kl", skew_alpha=1.0)}, ["loss.skew-alpha"]),
        ({"loss": LossConfig(divergence="adaptive_kl", akl_mass=0.0)}, ["loss.akl-mass"]),
        ({"loss": LossConfig(divergence="alpha_beta", ab_alpha=-1.0, ab_beta=float("nan"))},
         ["loss.ab-alpha", "loss.ab-beta"]),
        ({"loss": LossConfig(divergence="tvd", compat="trl", scale_by_t2=True)},
         ["loss.divergence", "loss.scale-by-t2"]),
        ({"loss": LossConfig(compat="torchtune", temperature=2.0, temperature_end=3.0,
                             schedule="linear")},
         ["loss.temperature", "loss.temperature-end"]),
        ({"loss": LossConfig(divergence="jsd", jsd_beta=0.1, compat="distillkit",
                             scale_by_t2=False)},
         ["loss.jsd-beta", "loss.scale-by-t2"]),
        ({"loss": LossConfig(schedule="cosine", schedule_steps=1)},
         ["loss.schedule", "loss.schedule-steps"]),
        ({"loss": LossConfig(schedule="linear", temperature_end=2.0, schedule_steps=11)},
         ["loss.schedule-steps"]),
        ({"on_policy": OnPolicyConfig(fraction=1.5, temperature=-1.0, top_p=0.0, max_new_tokens=0,
                                      every_steps=0, log_samples=-1)},
         ["on-policy.every-steps", "on-policy.fraction", "on-policy.log-samples",
          "on-policy.max-new-tokens", "on-policy.temperature", "on-policy.temperature",
          "on-policy.top-p"]),
        ({"on_policy": OnPolicyConfig(fraction=0.05, schedule_steps=11, temperature=0.0, top_p=0.5),
          "teacher": None},
         ["on-policy.fraction", "on-policy.fraction", "on-policy.schedule-steps",
          "on-policy.schedule-steps", "on-policy.temperature"]),
        ({"on_policy": OnPolicyConfig(fraction=1.0, schedule="linear", max_new_tokens=63),
          "data": DataConfig(path="d", seq_len=64, train_on="all"),
          "teacher": TeacherConfig(path="t", cache="c")},
         ["on-policy.fraction", "on-policy.fraction", "on-policy.max-new-tokens",
          "on-policy.schedule"]),
        ({"lora": LoraConfig(rank=0, alpha=0.0, dropout=1.0, target_modules=())},
         ["lora.alpha", "lora.dropout", "lora.rank", "lora.target-modules"]),
        ({"mesh": MeshConfig(data=-1, fsdp=-1, tensor=-2)}, ["mesh", "mesh.tensor"]),
        ({"log": LogConfig(every_steps=0, profile_start=-1, profile_steps=0)},
         ["log.every-steps", "log.profile-start", "log.profile-steps"]),
        ({"teacher": TeacherConfig(path="t", system="", seq_len=1)},
         ["teacher.seq-len", "teacher.system"]),
        ({"teacher": TeacherConfig(path="t", seq_len=64)}, ["teacher.seq-len"]),
        ({"teacher": TeacherConfig()}, ["teacher.path"]),
        ({"teacher": TeacherConfig(path="t", ema_decay=0.5)}, ["teacher.ema-decay"]),
        ({"teacher": TeacherConfig(path="t", kind="base", adapter="a"), "trainable": "full"},
         ["teacher.adapter", "teacher.kind", "teacher.path"]),
        ({"teacher": TeacherConfig(kind="ema", cache="c", dtype="float32", shard_over=())},
         ["teacher.cache", "teacher.dtype", "teacher.shard-over"]),
        ({"teacher": TeacherConfig(path="t", messages=True),
          "data": DataConfig(path="d", train_on="all")}, ["data.train-on"]),
        ({"attention": "cudnn", "student": StudentConfig(path="s", dtype="float32")},
         ["attention"]),
        ({"attention": "cudnn", "teacher": TeacherConfig(path="t", dtype="float32")},
         ["attention"]),
        ({"remat": "layers", "workdir": Path("w"), "seed": True, "lora": None,
          "optim": OptimConfig(schedule="cosin", learning_rate="1e-4", accumulation_steps=2.0),
          "data": DataConfig(path="d", pack=1, max_conversations="3")},
         ["data.max-conversations", "data.pack", "lora", "optim.accumulation-steps",
          "optim.learning-rate", "optim.schedule", "remat", "seed", "workdir"]),
        ({"workdir": "", "data": DataConfig(path="a,~nobody-here/b", chat_template=""),
          "student": StudentConfig(path="~nobody-here/x"), "teacher": TeacherConfig(path="")},
         ["data.chat-template", "data.path", "student.path", "teacher.path", "workdir"]),
    ],
)  # fmt: skip
def test_all_problems_are_reported_at_once(changes, names):
    with pytest.raises(UserError) as caught:
        plain_config(**changes)
    assert sorted(line.split(":")[0] for line in str(caught.value).splitlines()) == names


@pytest.mark.parametrize(
    "beta, near", [(0.0, None), (0.04, 0), (0.05, None), (0.5, None), (0.96, 1), (1.0, None)]
)
def test_a_divergence_that_all_but_vanishes_is_warned_of(beta, near):
    warning = LossConfig(divergence="jsd", jsd_beta=beta).warning
    assert warning is None if near is None else f"jsd-beta {beta} is near {near}" in warning
    assert LossConfig(divergence="jsd_cross", jsd_beta=beta).warning is None


def test_problems_say_what_was_expected():
    with pytest.raises(
        UserError, match=r"^remat: expected auto\|none\|dots\|attention\|layer, got 'layers'$"
    ):
        plain_config(remat="layers")


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": "full", "lora": LoraConfig(rank=0)},
        {"attention": "cudnn"},
        {"steps": None, "epochs": 2},
        {"optim": OptimConfig(clip_norm=None, learning_rate=0)},
        {"loss": LossConfig(divergence="jsd", jsd_beta=0.0, compat="trl", scale_by_t2=False)},
        {"loss": LossConfig(divergence="alpha_beta", ab_alpha=1.5, ab_beta=-0.5)},
        {"loss": LossConfig(compat="maxtext", temperature=2.0, scale_by_t2=True)},
        {"loss": LossConfig(temperature_end=2.0, schedule="linear", schedule_steps=10)},
        {"on_policy": OnPolicyConfig(fraction_end=1.0, schedule="cosine", schedule_steps=10)},
        {"teacher": None, "on_policy": OnPolicyConfig(max_new_tokens=4096)},
    ],
)
def test_what_is_meant_is_accepted(changes):
    assert from_json(dump(plain_config(**changes))) == plain_config(**changes)


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_from_json_inverts_dump(path):
    loaded = load_config(path)
    assert from_json(json.loads(json.dumps(dump(loaded)))) == loaded


def set_leaf(tree: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    head, _, rest = name.partition(".")
    return {**tree, head: set_leaf(tree[head], rest, value) if rest else value}


PARTS = ("log", "mesh", "distributed", "checkpoint", "eval")
FREE = {
    "workdir", "compilation_cache", "data.cache_dir", "data.num_processes", "data.chat_template",
    "remat", "attention", "loss.chunk_tokens", "on_policy.log_samples",
    "teacher.path", "teacher.adapter", "teacher.shard_over", "data.path",
    "teacher.cache", "teacher.cache_missing",
    "student.path", "student.adapter", "student.shard_over",
}  # fmt: skip


@pytest.mark.parametrize("name", LEAVES)
def test_resuming_may_change_only_what_changes_no_result(name):
    old = dump(plain_config())
    free = name in FREE or (name.split(".")[0] in PARTS and name != "eval.fraction")
    changed = differences(old, set_leaf(old, name, "changed"))
    assert [line.split(":")[0] for line in changed] == ([] if free else [name])


def test_fields_that_an_earlier_version_lacked_had_their_defaults():
    now, changed = dump(plain_config()), dump(plain_config(seed=3))
    earlier = {name: x for name, x in now.items() if name not in ("seed", "on_policy")}
    assert not differences(earlier, now)
    assert differences(earlier, changed) == ["seed: 0 -> 3"]
    later = {**now, "unknown": 1}
    assert differences(later, now) == ["unknown: 1 -> None"]


def literal(cls: type, name: str) -> set[str]:
    return set(get_args(get_type_hints(cls)[name]))


def test_choices_are_what_is_implemented():
    assert literal(LossConfig, "divergence") == set(divergences.DIVERGENCES)
    assert literal(LossConfig, "compat") == set(loss.COMPATS)
    assert all(set(x.divergences) < set(divergences.DIVERGENCES) for x in loss.COMPATS.values())
    marks = [mark for entry in dataclasses.fields(LossConfig) for mark in metadata(entry.type)]
    used = [set(mark) for mark in marks if isinstance(mark, loss.UsedBy)]
    assert len(used) > 3 and all(x < set(divergences.DIVERGENCES) for x in used)
    assert (
        literal(OptimConfig, "schedule") == literal(LossConfig, "schedule") == set(schedules.SHAPES)
    )
    assert literal(OnPolicyConfig, "schedule") == set(schedules.SHAPES)
    assert literal(Config, "attention") == {"auto", *get_args(attention.Implementation)}


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_config_files_are_lab_records(path):
    assert isinstance(load_config(path), Config)
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert {"Command:", "Hardware:", "Expected:"} <= set(text.split())
    assert f"--config {path.relative_to(ROOT)}" in text


@pytest.mark.parametrize(
    "error, status, said",
    [
        (None, 0, ""),
        (UserError("seed: no"), 2, "error: seed: no\n"),
        (SystemExit(0), 0, ""),
        (KeyboardInterrupt(), 1, "interrupted\n"),
        (IsADirectoryError(21, "Is a directory", "a"), 1, "then run the same command to resume\n"),
        (KeyError("bug"), 1, "KeyError: 'bug'\n"),
    ],
)
def test_exit_status(error, status, said, capsys):
    def main(argv):
        if error is not None:
            raise error

    assert run_command(main, []) == status
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    "content, free",
    [(None, True), ('{"results": {}}', True), ('{"model_type": "llama"}', False), ("text", False),
     ("[]", False), ("5", False), ("", False)],
)  # fmt: skip
def test_a_result_replaces_only_an_earlier_result(content, free, tmp_path):
    file = tmp_path / "out.json"
    if content is not None:
        file.write_text(content)
    if free:
        assert check_out_file(str(file), "--out", "results") == file
        return
    with pytest.raises(UserError, match=r"--out: expected a new file, or an earlier result"):
        check_out_file(str(file), "--out", "results")
    assert file.read_text() == content


def test_every_command_refuses_what_is_no_path_and_an_unknown_home():
    for cls, names in (
        (ToHfArgs, ("workdir", "out")),
        (FromHfArgs, ("source", "out")),
        (ReportArgs, ("runs", "out")),
        (EvaluateArgs, ("model", "data", "teacher", "chat-template")),
        (CacheArgs, ("config", "out")),
    ):
        for path in ("", "~nobody-here/x", "a\0b"):
            with pytest.raises(UserError) as caught:
                parse_args(cls, [word for name in names for word in (f"--{name}", path)])
            found = str(caught.value).splitlines()
            assert sorted(x.split(":")[0] for x in found) == sorted(f"--{x}" for x in names)


@pytest.mark.parametrize("path", ["/dev/null", "{}", "{}/absent/out.json"])
def test_a_result_needs_a_file_in_a_folder(path, tmp_path):
    with pytest.raises(UserError, match=r"--out: expected a"):
        check_out_file(path.format(tmp_path), "--out", "results")
