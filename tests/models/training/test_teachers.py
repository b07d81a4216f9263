"""The teachers beside the objective's own: what they read, that they are kept and frozen, and what a recipe makes of them."""

import dataclasses

import pytest
import torch
from test_run_setup import train, weights, world  # noqa: F401 (world is a fixture)
from tiny_speech import make_examples, make_features, make_lm, make_speech_lm, make_tokenizer

from kdkernels.teacher import LMHead
from models.pseudo_gt.wording import prompt_end, worked_examples
from models.training.checkpoint import find_checkpoint
from models.training.curves import read_metrics
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import SourceConfig
from models.training.teacher_states import SourceError, TeacherStates
from models.training.teachers import (
    CenteredTeacher,
    KeptTeacher,
    ListeningTeacher,
    check_same_tokenizer,
    kept_bytes,
    snapshot,
)
from models.training.text_teacher import TextTeacher
from models.training.training_data import make_training_data

CPU = torch.device("cpu")


@pytest.fixture
def student():
    return make_speech_lm().eval()


class Store:
    """The features of the examples, by number."""

    def __init__(self, model, examples):
        self._features = dict(zip((e.id for e in examples), make_features(model, len(examples)), strict=True))

    def rows(self, examples):
        return torch.stack([self._features[e.id] for e in examples])


def data_for(model, count=5):
    examples = [dataclasses.replace(e, metadata={"gender": e.answer, "text": e.transcription}) for e in make_examples(count)]
    return make_training_data(model, examples, Store(model, examples), prefix_cache_mib=0)


def text_teacher(model, lm, **options):
    collator = model.make_collator()
    return TextTeacher(
        lm, make_tokenizer(), target_ids=collator.target_ids, end_ids=model.end_ids, device=CPU, **options
    )


@pytest.mark.parametrize("own_line", [False, True])
@pytest.mark.parametrize("layers", [(), (0, 2, 4)])
def test_the_text_teacher_reads_stage_1s_prompt_and_then_the_target(student, layers, own_line):
    data, lm, tokenizer = data_for(student), make_lm(make_tokenizer(), seed=5), make_tokenizer()
    # A second question, so that two texts of worked examples are read in one batch.
    data.examples[1] = dataclasses.replace(data.examples[1], question="A man?", choices=("man", "woman"))
    batch = data.make_batch(data.examples)
    states = text_teacher(student, lm, layers=layers, own_line=own_line)(batch, data.examples)
    row_start = 0
    for example in data.examples:
        target = student.make_collator().target_ids(example)
        prompt = tokenizer.encode(worked_examples(example, own_line=own_line))
        prompt += tokenizer.encode(prompt_end(example, own_line=own_line), add_special_tokens=False)
        assert "Note:" not in prompt_end(example)  # the hint may lie
        # In front of an answer stands in the examples what stands in front of the target.
        arrow = "->\n" if own_line else "->"
        assert prompt_end(example, own_line=own_line).endswith(arrow)
        answers = worked_examples(example, own_line=own_line).split(arrow)[1:]
        assert answers and all(answer[0].isspace() != own_line for answer in answers)
        with torch.no_grad():
            output = lm.model(torch.tensor([prompt + target]), output_hidden_states=True)
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(target))
        here = slice(row_start, row_start + len(target))
        torch.testing.assert_close(states.audio_hidden[here], output.last_hidden_state[0, at], rtol=1e-4, atol=1e-5)
        for k, layer in enumerate(layers):
            expected = output.hidden_states[layer][0, at]
            torch.testing.assert_close(states.audio_layers[here, k], expected, rtol=1e-4, atol=1e-5)
        row_start += len(target)
    assert states.text_hidden is None and torch.equal(states.head.weight, lm.lm_head.weight)
    assert torch.equal(states.speaks, batch.target != make_tokenizer().eos_token_id) and not states.speaks.all()


def test_the_text_teacher_says_nothing_about_any_end(student):
    """Of the student's answers, and of its own checkpoint, which may name several."""
    data, lm = data_for(student), make_lm(make_tokenizer(), seed=5)
    batch = data.make_batch(data.examples)
    end, first, second = (int(token) for token in (make_tokenizer().eos_token_id, batch.target[0], batch.target[1]))
    lm.generation_config.eos_token_id = [end, first]
    options = {"target_ids": student.make_collator().target_ids, "end_ids": [second], "device": CPU}
    states = TextTeacher(lm, make_tokenizer(), **options)(batch, data.examples)
    assert states.speaks.tolist() == [token not in (end, first, second) for token in batch.target.tolist()]


@pytest.mark.parametrize("kind", ["text", "listening"])
def test_a_teacher_follows_the_head_of_its_model(student, kind):
    data = data_for(student)
    lm = make_lm(make_tokenizer(), seed=5) if kind == "text" else make_speech_lm().eval()
    teacher = text_teacher(student, lm) if kind == "text" else ListeningTeacher(lm, data, device=CPU)
    batch, head = data.make_batch(data.examples), lm.get_output_embeddings()
    assert torch.equal(teacher(batch, data.examples).head.weight, head.weight)
    head.weight = torch.nn.Parameter(2 * head.weight.detach())
    assert torch.equal(teacher(batch, data.examples).head.weight, head.weight)
    head.forward = lambda hidden: -hidden @ head.weight.T
    with pytest.raises(TypeError, match="computes something else"):
        teacher(batch, data.examples)


def test_a_reasoning_trace_is_read_where_there_is_one(student):
    data, lm = data_for(student), make_lm(make_tokenizer(), seed=5)
    told = [dataclasses.replace(e, metadata={**e.metadata, "reasoning": "A low voice.\nSo a man."}) for e in data.examples]
    assert prompt_end(told[0], told[0].metadata["reasoning"]).endswith("\nReasoning: A low voice. So a man. ->")
    batch = data.make_batch(data.examples)
    plain = text_teacher(student, lm)(batch, told).audio_hidden
    reasoned = text_teacher(student, lm, reasoning=True)(batch, told).audio_hidden
    assert torch.equal(plain, text_teacher(student, lm)(batch, data.examples).audio_hidden)
    assert not torch.allclose(plain, reasoned, atol=1e-3)


def test_a_kept_teacher_says_what_the_live_one_says(student):
    data = data_for(student, 40)
    live = ListeningTeacher(make_speech_lm().eval(), data, device=CPU, layers=(1, 3))
    asked = []

    def counting(batch, examples):
        asked.append(len(examples))
        return live(batch, examples)

    kept = KeptTeacher(counting, data, title="t", progress_bar=False)
    assert asked == [32, 8]
    chosen = [data.examples[i] for i in (37, 3, 11)]
    batch = data.make_batch(chosen)
    now, then = live(batch, chosen), kept(batch, chosen)
    assert asked == [32, 8]
    for name in ("audio_hidden", "audio_layers"):
        torch.testing.assert_close(getattr(then, name), getattr(now, name), rtol=1e-4, atol=1e-5)
    assert then.text_hidden is None and then.speaks is None
    per_example = kept.bytes / len(data)
    assert kept_bytes(live, data) == pytest.approx(per_example * len(data), rel=0.1)
    assert kept.bytes == sum(x.nbytes for row in kept._states.values() for x in row.values())


def test_a_snapshot_keeps_what_trains_and_shares_the_rest(student):
    data = data_for(student)
    frozen = snapshot(student)
    assert not any(p.requires_grad for p in frozen.parameters()) and any(p.requires_grad for p in student.parameters())
    teacher, batch = ListeningTeacher(frozen, data, device=CPU), data.make_batch(data.examples)
    before = teacher(batch, data.examples).audio_hidden
    with torch.no_grad():
        expected = student.hidden_states_at(batch.target_index, **batch.model_inputs())
        torch.testing.assert_close(before, expected)
        for p in student.connector.parameters():
            p.add_(0.3)
        moved = student.hidden_states_at(batch.target_index, **batch.model_inputs())
    assert torch.equal(teacher(batch, data.examples).audio_hidden, before)
    assert not torch.allclose(moved, before, atol=1e-3)
    shared = {p.data_ptr() for p in student.lm.parameters()}
    assert {p.data_ptr() for p in frozen.lm.parameters()} == shared
    assert not {p.data_ptr() for p in frozen.connector.parameters()} & {p.data_ptr() for p in student.connector.parameters()}


class Tokenizer:
    def __init__(self, **vocabulary):
        self.vocabulary = vocabulary

    def get_vocab(self):
        return self.vocabulary


def test_another_tokenizer_is_refused_with_the_reason():
    one = Tokenizer(a=0, b=1, c=2)
    check_same_tokenizer("sources.text.folder", one, Tokenizer(a=0, b=1, c=2))
    with pytest.raises(SourceError, match=r"sources\.text\.folder: .*\('b' is id 1 of the student and 2 of the teacher\)"):
        check_same_tokenizer("sources.text.folder", one, Tokenizer(a=0, b=2, c=1))
    with pytest.raises(SourceError, match=r"only the teacher has the token 'd'"):
        check_same_tokenizer("x", one, Tokenizer(a=0, b=1, c=2, d=3))
    with pytest.raises(SourceError, match=r"only the student has the token 'c'"):
        check_same_tokenizer("x", one, Tokenizer(a=0, b=1))


def lm_of(root):
    from models.speech_lm.model import SpeechLM

    return SpeechLM.from_pretrained(root / "untrained").config.lm


def curves(root, out):
    return read_metrics(root / out / "metrics.jsonl")


@pytest.mark.slow
def test_one_listening_source_is_plain_distillation(world):  # noqa: F811
    teacher = world / "teacher" / "final"
    words = ["optim.steps=6", "loss.kd_weight=0.7"]
    assert train(world, "kd", "by-teacher", *words, f"teacher.folder={teacher}") == 0
    source = ["sources.heard.role=acoustic", f"sources.heard.folder={teacher}", "sources.heard.weight=1"]
    assert train(world, "sft", "by-source", *words, "objective=sources", *source) == 0
    for one, other in zip(curves(world, "by-teacher"), curves(world, "by-source"), strict=True):
        for name in ("loss", "kd", "ce", "grad_norm"):
            # The states come out of other batches; a KL of 1e-4 is a difference of log-probabilities of size 6 in float32.
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=6 * 2**-24)
    one, other = weights(world, "by-teacher"), weights(world, "by-source")
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_all_sources_at_once_resume_bit_for_bit(world):  # noqa: F811
    words = [
        "optim.steps=6", "run.save_every_steps=3", f"teacher.folder={world / 'teacher' / 'final'}", "teacher.keep_mib=64",
        f"sources.text.folder={lm_of(world)}", "sources.text.weight_start=0", "sources.text.weight_ramp_steps=4",
        "run.log_every_steps=1",
    ]  # fmt: skip
    assert train(world, "everything", "whole", *words) == 0
    assert train(world, "everything", "parts", *words) == 0
    newest = find_checkpoint(world / "parts" / "checkpoints", "auto")
    for file in newest.path.iterdir():  # as if it had been killed after step 3
        file.unlink()
    newest.path.rmdir()
    assert train(world, "everything", "parts", *words, "run.resume=auto") == 0
    one, other = weights(world, "whole"), weights(world, "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    names = curves(world, "whole")[-1].keys()
    assert {"kd_teacher", "kd_text", "kd_acoustic", "layers", "layers_text", "layers_acoustic"} <= names
    first = curves(world, "whole")[0]  # the student starts as its own snapshot
    assert first["kd_acoustic"] < 1e-6 < first["kd_text"] and first["layers_acoustic"] < 1e-6 < first["layers_text"]


@pytest.mark.slow
def test_kept_and_live_sources_differ_in_rounding_alone(world):  # noqa: F811
    words = ["optim.steps=3", "loss.kd_weight=1", f"sources.text.folder={lm_of(world)}"]
    live = ["sources.text.keep_mib=0", "sources.acoustic.keep_mib=0"]
    assert train(world, "text_acoustic_kd", "kept", *words) == 0
    assert train(world, "text_acoustic_kd", "live", *words, *live) == 0
    for one, other in zip(curves(world, "kept"), curves(world, "live"), strict=True):
        for name in ("loss", "kd_text", "layers_text", "layers_acoustic"):
            assert one[name] == pytest.approx(other[name], rel=2e-2, abs=1e-5)  # the text teacher is in bfloat16


def test_a_source_that_does_not_fit_into_its_memory_says_so(world, capsys):  # noqa: F811
    words = ["optim.steps=1", f"sources.text.folder={lm_of(world)}", "sources.text.keep_mib=1", "sources.text.layers.weight=0"]
    assert train(world, "text_kd_top", "small", *words) == 0
    assert "keep_mib" not in capsys.readouterr().out
    from models.training import build_sources

    size = build_sources.kept_bytes
    try:
        build_sources.kept_bytes = lambda teacher, data: size(teacher, data) + (1 << 21)
        assert train(world, "text_kd_top", "small", *words) == 0
    finally:
        build_sources.kept_bytes = size
    assert "sources.text.keep_mib: the states of 12 examples need 2 MiB, 1 MiB are allowed" in capsys.readouterr().out


def test_weights_are_counted_and_silent_tokens_are_not():
    from models.training.objective import teacher_source
    from models.training.teacher_states import TeacherStates

    ramp = ["sources.text.weight=0.6", "sources.text.weight_start=0.2", "sources.text.weight_ramp_steps=2"]
    recipe = load_recipe("text_kd_all", ramp)
    states = TeacherStates(torch.zeros(3, 4), None, LMHead(torch.zeros(7, 4)), speaks=torch.tensor([True, True, False]))
    for step, weight in ((1, 0.2), (2, 0.4), (3, 0.6), (9, 0.6)):
        made = teacher_source(recipe, "text", step, states)
        assert made.source_weight.tolist() == pytest.approx([weight, weight, 0.0])
        assert made.text_hidden is None and made.alpha == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sources.text.rol=text"], r"unknown key 'sources\.text\.rol'; did you mean 'sources\.text\.role'"),
        (["sources.text.role=txt"], r"sources\.text\.role: expected one of audio, text, acoustic, got 'txt'"),
        (["sources.more.role=text"], r"sources\.more\.folder: role 'text' needs one"),
        (["sources.text.weight=-1"], r"sources\.text\.weight: expected >= 0, got -1"),
        (["sources.text.weight=.inf"], r"sources\.text\.weight: expected a finite number"),
        (["sources.text.alpha=1"], r"sources\.text\.alpha: expected 0 with role 'text'"),
        (["sources.a.role=acoustic", "sources.a.reasoning=true"], r"sources\.a\.reasoning: expected false with role 'acoustic'"),
        (["sources.text.layers.map=some"], r"sources\.text\.layers\.map: expected one of top, skip, all"),
        (["sources.text.layers.wight=1"], r"unknown key 'sources\.text\.layers\.wight'"),
        (["sources=3"], r"sources: expected names, each with its keys, got 3"),
        (["objective=sft"], r"sources: expected none with objective 'sft'"),
        (["sources.teacher.role=acoustic"], r"sources\.teacher: this name stands for"),
        (["run.gradient_checkpointing=true"], r"sources\.text\.layers\.weight: expected 0 with run\.gradient_checkpointing"),
        (["loss.kd_token_weight=divergence"], r"loss\.kd_token_weight: expected uniform or choice with objective 'sources'"),
    ],
)
def test_mistakes_in_sources_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("text_kd_all", words)


def test_sources_alone_need_one():
    with pytest.raises(ConfigError, match="objective 'sources' needs at least one"):
        load_recipe("sft", ["objective=sources"])
    with pytest.raises(ConfigError, match="folder: role 'audio' needs one"):
        SourceConfig(role="audio")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sources.text.folder=no-such-model"], "error: sources.text.folder: "),
        (["sources.acoustic.folder=none"], "error: sources.acoustic.folder: expected a folder with speech_lm.json, got none"),
    ],
)
def test_a_missing_source_is_one_line(world, capsys, words, message):  # noqa: F811
    base = [f"sources.text.folder={lm_of(world)}"]
    assert train(world, "text_acoustic_kd", "never", *base, *words) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def two_paths(batch, offset):
    """A teacher whose text path is the audio path less `offset` at the answer's tokens."""
    generator = torch.Generator().manual_seed(int(batch.target.sum()))
    audio = torch.randn(len(batch.target), 4, generator=generator)
    return TeacherStates(audio, torch.where(batch.choice_mask[:, None], audio - offset, audio), None)


def test_a_centered_text_path_has_the_audio_paths_mean_by_task_and_token(student):
    data = data_for(student, count=6)
    for i in (1, 3):  # a task of its own, with an offset of its own
        data.examples[i] = dataclasses.replace(data.examples[i], task="other")
    offsets = {"gender": torch.tensor([1.0, 2.0, 3.0, 4.0]), "other": torch.tensor([-5.0, 0.0, 0.0, 7.0])}

    def teacher(batch, examples):
        rows = torch.stack([offsets.get(e.task, offsets["gender"]) for e in examples])
        noise = torch.randn(len(batch.target), 4, generator=torch.Generator().manual_seed(len(examples)))
        states = two_paths(batch, rows[batch.target_row])
        return dataclasses.replace(states, text_hidden=states.text_hidden + noise * batch.choice_mask[:, None])

    centered = CenteredTeacher(teacher, data)
    batch = data.make_batch(data.examples)
    plain, moved = teacher(batch, data.examples), centered(batch, data.examples)
    assert torch.equal(moved.audio_hidden, plain.audio_hidden)
    spelled = batch.choice_mask
    assert spelled.any() and not spelled.all()
    assert torch.equal(moved.text_hidden[~spelled], plain.text_hidden[~spelled])
    for task in ("gender", "other"):
        firsts = [
            (batch.choice_mask & (batch.target_row == row)).nonzero()[0, 0]
            for row, e in enumerate(data.examples)
            if (e.task == "other") == (task == "other")
        ]
        gap = (moved.audio_hidden - moved.text_hidden)[torch.stack(firsts)]
        torch.testing.assert_close(gap.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
        assert gap.abs().max() > 0.1  # what tells one item from another is still there


def test_centering_needs_both_paths(student):
    data = data_for(student)
    with pytest.raises(ValueError, match="teacher: expected both paths"):
        CenteredTeacher(lambda batch, examples: TeacherStates(torch.zeros(len(batch.target), 4), None, None), data)
