"""A speech LM on many families of language models: batches, cached prefixes and packed rows change nothing."""

from __future__ import annotations

import pytest
import torch
from lm_families import FAMILIES, HYBRIDS, make_family
from tiny_speech import make_config, make_examples, make_features, make_tokenizer

from models.speech_lm.collation import Collator
from models.speech_lm.model import SpeechLM
from models.speech_lm.prefix_cache import why_not_cached
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import DataConfig
from models.training.teacher_states import SourceError
from models.training.teachers import ListeningTeacher, LiveTeacher, check_packing
from models.training.text_teacher import TextTeacher
from models.training.train import train
from models.training.training_data import make_training_data

TOKENIZER = make_tokenizer()
ROWS, WINDOW = 6, 16
CPU = torch.device("cpu")
# Windows shorter than the prompts.
SLIDING = {
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "Gemma2": {"sliding_window": WINDOW},
    "Gemma3": {"sliding_window": WINDOW},
    "GptOss": {"sliding_window": WINDOW},
    "Phi3": {"sliding_window": WINDOW},
}
CASES = [(name, {}) for name in FAMILIES] + list(SLIDING.items())
HYBRID_CASES = [(name, {}) for name in HYBRIDS]


def names(case) -> str:
    return case if isinstance(case, str) else "-".join(case) or "plain"


def make_model(family, changes) -> SpeechLM:
    lm = make_family(family, len(TOKENIZER), **changes)
    torch.manual_seed(2)
    model = SpeechLM(make_config(), lm=lm, tokenizer=TOKENIZER).eval().requires_grad_(False)
    model.fit_feature_statistics(make_features(model, 8))
    return model


class Store:
    def __init__(self, model):
        self.features = make_features(model, ROWS)

    def rows(self, examples):
        return self.features[[int(example.id[1:]) for example in examples]]


def packed_data(model, *, count=ROWS, **options):
    return make_training_data(model, make_examples(count), Store(model), layout=DataConfig(packing="pack"), **options)


def collated(model, rows=range(ROWS), **options):
    examples = make_examples(ROWS)
    return model.make_collator()([examples[row] for row in rows], make_features(model, ROWS)[list(rows)], **options)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), CASES + HYBRID_CASES, ids=names)
def test_answers_of_a_batch_are_those_of_its_rows(family, changes):
    model = make_model(family, changes)
    alone = [model.generate(collated(model, [row], with_target=False), max_new_tokens=8)[0] for row in range(ROWS)]
    batch = collated(model, with_target=False)
    assert len(set(batch.attention_mask.sum(1).tolist())) > 2 and batch.attention_mask.sum(1).min() > WINDOW
    assert model.generate(batch, max_new_tokens=8) == alone
    if family in HYBRIDS:
        assert why_not_cached(model.lm) is not None
    else:
        cache = model.make_prefix_cache(dtype=torch.float32)
        assert model.generate(batch, max_new_tokens=8, prefix_cache=cache) == alone


@pytest.mark.parametrize("cached", [False, True])
def test_forward_continues_behind_the_last_token_of_each_row(cached):
    """As a loop of the caller's own does, with a window shorter than the prompt."""
    model = make_model("Mistral", SLIDING["Mistral"])
    batch = collated(model, with_target=False)
    inputs = batch.model_inputs()
    if not cached:  # rows padded on the left, as forward asks for
        order = inputs["attention_mask"].argsort(dim=1, stable=True)
        inputs |= {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    cache = {"prefix_cache": model.make_prefix_cache(dtype=torch.float32)} if cached else {}
    first = model(**inputs, **cache, use_cache=True)
    mask, token = inputs["attention_mask"], torch.full((ROWS, 1), 77)
    next_logits = model(token, torch.cat([mask, mask.new_ones(ROWS, 1)], 1), past_key_values=first.past_key_values).logits[:, -1]
    for row in range(ROWS):
        one = collated(model, [row], with_target=False)
        ids = torch.cat([one.input_ids, token[:1]], 1)
        expected = model(ids, audio_features=one.audio_features, audio_present=one.audio_present).logits[0, -1]
        torch.testing.assert_close(next_logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), CASES, ids=names)
def test_cached_prefixes_and_packing_change_nothing_or_are_refused(family, changes):
    """Prompts are longer than the window: the cache keeps all of their columns."""
    model = make_model(family, changes)
    batch = collated(model)
    expected = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    cache = model.make_prefix_cache(dtype=torch.float32)
    got = model.hidden_states_at(batch.target_index, **batch.model_inputs(), prefix_cache=cache)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if family != "GptOss":  # behind cached prefixes the masks of packed rows are explicit
        check_packing(model, packed_data(model), CPU)
    data = packed_data(model, prefix_cache_mib=0)
    if family in ("OPT", "GptOss"):  # these do not read from position ids where a sample begins
        for check in (check_packing, lambda lm, data, device: LiveTeacher(lm, data, device=device)):
            with pytest.raises(SourceError, match=rf"data\.packing: expected none with {family}ForCausalLM, which does not keep"):
                check(model, data, CPU)
        return
    check_packing(model, data, CPU)
    packed = model.hidden_states_at(batch.target_index, **data.model_inputs(batch))
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_one_example_is_compared_with_itself():
    model = make_model("OPT", {})
    data = packed_data(model, count=1, prefix_cache_mib=0)
    with pytest.raises(SourceError, match=r"data\.packing: expected none with OPTForCausalLM"):
        check_packing(model, data, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrid_language_models_run_with_default_settings(family, capsys):
    """Without the prefix cache, and a line says so."""
    model = make_model(family, {})
    examples = make_examples(ROWS)
    data = make_training_data(model, examples, Store(model))
    assert data.extra_inputs == {} and f"prefix cache: {family}ForCausalLM runs without one" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"prefix_cache: {family}ForCausalLM has to run without one"):
        model.make_prefix_cache()
    batch = data.make_batch(examples)
    states = LiveTeacher(model, data, device=CPU)(batch, examples)
    heard = ListeningTeacher(model, data, device=CPU)(batch, examples)
    torch.testing.assert_close(states.audio_hidden, heard.audio_hidden, rtol=1e-4, atol=1e-4)
    target_ids = model.make_collator().target_ids
    reader = TextTeacher(model.lm, TOKENIZER, target_ids=target_ids, end_ids=(), device=CPU)
    together = reader(batch, examples).audio_hidden
    alone = torch.cat([reader(data.make_batch([example]), [example]).audio_hidden for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_packing_behind_cached_prefixes_falls_back_where_the_masks_do_not_allow_it(capsys):
    model = make_model("Mistral", SLIDING["Mistral"])
    data = packed_data(model)
    assert "prefix_cache" not in data.extra_inputs and data.extra_inputs["pack_tokens"] == 512
    assert "MistralForCausalLM runs without it under data.packing=pack: it has a sliding window" in capsys.readouterr().out


def test_a_tokenizer_longer_than_the_embeddings_is_an_error_where_a_text_needs_it():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["zebra"])  # as Gemma 3's tokenizer has one token more than its text models embed
    model = SpeechLM(make_config(), lm=make_family("Llama", size), tokenizer=tokenizer).eval()
    examples = make_examples(2)
    make_training_data(model, examples, Store(model), prefix_cache_mib=0)
    examples[1] = type(examples[1])(**{**vars(examples[1]), "target": "A zebra."})
    message = rf"example 'e1': tokenizer: expected ids below {size}, .* got {size} \('zebra'\) from a tokenizer of {size + 1}"
    with pytest.raises(SourceError, match=message):
        make_training_data(model, examples, Store(model), prefix_cache_mib=0)
    with pytest.raises(ValueError, match=message):
        model.make_collator()(examples)
    assert len(Collator(tokenizer, 3)(examples)) == 2  # nothing to compare with
    with pytest.raises(ValueError, match="tokenizer: expected ids below 3, the number of the language model's embeddings"):
        SpeechLM(make_config(), lm=make_family("Llama", 3), tokenizer=tokenizer)


def test_the_student_is_compared_before_the_first_step(tmp_path):
    model = make_model("GptOss", {})
    model.connector.requires_grad_(True)
    words = ["data.packing=pack", f"run.out_dir={tmp_path / 'run'}", "run.device=cpu", "run.tensorboard=false", "optim.steps=1"]
    with pytest.raises(SourceError, match=r"data\.packing: expected none with GptOssForCausalLM"):
        train(load_recipe("sft", [*words, "run.progress_bar=false"]), model=model, data=packed_data(model))
    assert not (tmp_path / "run").exists()
