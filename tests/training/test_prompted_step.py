"""A teacher with a prompt of its own, against transformers on the conversations one by one."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from samples import chat, write_lines
from tiny_run import Run, assert_near
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd_jax.config import MeshConfig
from kd_jax.data.batches import eval_batches
from kd_jax.models.decoder import Decoder
from kd_jax.parallel.placement import put_batch
from kd_jax.setup.forward import targets

pytestmark = pytest.mark.devices(8)

SYSTEM = "Answer as the cat, who is blue."
ANSWERS = ["Five.", "The sky is blue, and grass is green.", "A cat has four legs.", "hat", "No."]
FEW_SHOT = chat("Be brief.", "Two?", "2.", "And what is it?", roles="suau")


def conversations():
    """Returns records of one to three exchanges: (record, the teacher's turns, learned answers)."""
    found = []
    for i in range(15):
        turns = [{"role": "system", "content": f"Rule {i}."}] if i % 4 == 0 else []
        for j in range(1 + i % 3):
            turns += chat(f"Number {i}, {j}?", ANSWERS[(i + j) % 5])
        learned = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
        if i % 5 == 2 and len(learned) > 1:  # the first answer is only context
            turns[learned.pop(0)]["weight"] = 0
        own, record = [*turns], {"messages": turns}
        if i % 3 == 1:  # ends with a question: it replaces what is before the first learned answer
            record["teacher_messages"] = FEW_SHOT
            own = FEW_SHOT + turns[learned[0] :]
        elif i % 3 == 2:  # ends with an answer: it is whole, and has more answers before
            own = FEW_SHOT[:3] + turns[1 if i % 4 == 0 else 0 :]
            record["teacher_messages"] = own
        first = own[0]["content"] if own[0]["role"] == "system" else None
        rest = own[0 if first is None else 1 :]
        system = SYSTEM if first is None else f"{SYSTEM}\n\n{first}"
        found.append((record, [{"role": "system", "content": system}, *rest], len(learned)))
    return found


@pytest.fixture(scope="module")
def prompted(make_config, tmp_path_factory):
    """Returns the config of a run whose teacher has a system message and turns of its own."""
    path = tmp_path_factory.mktemp("prompts") / "chats.jsonl"
    write_lines(path, [record for record, *_ in conversations()])
    config = make_config(seq_len=384, prompt={"system": SYSTEM, "messages": True})
    return replace(config, data=replace(config.data, path=str(path)))


@pytest.fixture(scope="module")
def plain(prompted):
    """The run on eight devices that split the rows, and its gradients and metrics."""
    run = Run(prompted)
    return run, *run.gradients(whole(run))


def whole(run):
    """Returns all rows as a batch [1, B, S], and checks that it is packed and multi-turn."""
    (batch,) = eval_batches(run.rows, -(-len(run.rows) // 8) * 8)
    assert batch["segment_ids"].max() > 1
    return {name: x[None] for name, x in batch.items()}


def encoded(tokenizer, turns, learned):
    """Returns a conversation's tokens and which of them are of its last `learned` answers."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array(found["offset_mapping"])[:, 0]
    mask = np.zeros(len(starts), bool)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    for i in answers[-learned:]:
        before = tokenizer.apply_chat_template(
            turns[:i], tokenize=False, date_string="26 Jul 2024", add_generation_prompt=True
        )
        end = len(before) + len(turns[i]["content"]) + len("<|eot|>")
        mask |= (starts >= len(before)) & (starts < end)
    return torch.tensor(found["input_ids"]), torch.tensor(mask)


def predicted(model, tokens, mask):
    """Returns the logits [n, V] of the target tokens, and these."""
    logits = model(tokens[None]).logits[0, :-1][mask[1:]]
    return logits, tokens[1:][mask[1:]]


def test_probabilities_loss_and_gradients_are_those_of_transformers(plain):
    run, gradients, metrics = plain
    batch = whole(run)
    tokenizer = AutoTokenizer.from_pretrained(run.config.student.path)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(part.path, dtype=torch.float64)
        for part in (run.config.student, run.config.teacher)
    )
    total, count, wanted = 0.0, 0, {}
    for record, turns, learned in conversations():
        ours = encoded(tokenizer, record["messages"], learned)
        z_s, labels = predicted(student, *ours)
        with torch.no_grad():
            z_t, same = predicted(teacher, *encoded(tokenizer, turns, learned))
        assert torch.equal(labels, same) and len(labels) > 1
        log_p, log_q = z_t.log_softmax(-1), z_s.log_softmax(-1)
        ce = torch.nn.functional.nll_loss(log_q, labels, reduction="sum")
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        total, count = total + 0.5 * ce + 0.5 * kl, count + len(labels)
        wanted[tuple(ours[0].tolist())] = log_p.exp().numpy()
    (total / count).backward()
    assert metrics["target_tokens"] == count
    assert metrics["loss"] == pytest.approx(total.item() / count, rel=1e-5)
    name = "layers.self_attn.q_proj.weight"
    layers = [layer.self_attn.q_proj.weight.grad.numpy() for layer in student.model.layers]
    assert_near({name: gradients[name]}, {name: np.stack(layers)}, 1e-4)
    for got, want in zip(*probabilities(run, batch, wanted), strict=True):
        assert np.abs(got - want).max() <= 1e-5
    # Twin: one position off is seen.
    places = np.roll(batch["teacher_places"], 1, axis=-1)
    shifted = probabilities(run, batch | {"teacher_places": places}, wanted)
    assert np.mean([np.abs(a - b).max() > 0.01 for a, b in zip(*shifted, strict=True)]) > 0.9


def probabilities(run, batch, wanted):
    """Returns the teacher's probabilities [n, V] of each document, the run's and the wanted."""
    placed = put_batch({name: x[0] for name, x in batch.items()}, run.mesh)
    arrays = run.models.teacher_arrays
    side, outputs = jax.jit(lambda *x: run.program.teacher(*x, layers=(0, -1)))(arrays, placed)
    last = Decoder(run.models.teacher, arrays).final_norm(outputs[1])
    np.testing.assert_allclose(last, side.hidden, rtol=1e-5, atol=1e-5)  # at the same places
    z = np.asarray(side.hidden, np.float64) @ np.asarray(side.head, np.float64).T
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    mask = np.asarray(targets(placed).mask)
    got, want = [], []
    for row, segments in enumerate(batch["segment_ids"][0]):
        for number in range(1, segments.max() + 1):
            own = segments == number
            got.append(p[row, own & mask[row]])
            want.append(wanted[tuple(batch["tokens"][0, row, own].tolist())])
    assert len(got) == len(wanted)
    return got, want


def test_a_mesh_changes_nothing_and_gathers_no_rows(prompted, plain):
    run = Run(replace(prompted, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    batch = whole(run)
    gradients, metrics = run.gradients(batch)
    assert_near(gradients, plain[1], 1e-5)
    assert metrics["kd_loss"] == pytest.approx(plain[2]["kd_loss"], rel=1e-6)
    # Each device takes its rows' hidden states from the teacher's rows that it has.
    placed = put_batch({name: x[0] for name, x in batch.items()}, run.mesh)
    hidden = jax.jit(lambda *x: run.program.teacher(*x)[0].hidden)
    text = hidden.lower(run.models.teacher_arrays, placed).compile().as_text()
    (B, T), D = placed["teacher_tokens"].shape, run.models.teacher.arch.hidden_size
    assert f"f32[{B // 4},{T},{D}]" in text and f"f32[{B},{T},{D}]" not in text
