import json

import numpy as np
import pytest
import torch
from tiny_speech import (
    TinyBackbones,
    make_config,
    make_encoder,
    make_examples,
    make_features,
    make_lm,
    make_speech_lm,
    make_tokenizer,
)
from torch import nn

from kdkernels.sampling import Sampling
from models.data.manifest import Example
from models.speech_lm.connector import Connector, ConnectorConfig
from models.speech_lm.model import SpeechLM, SpeechLMConfig, SpeechLMError


@pytest.fixture(scope="module")
def model() -> SpeechLM:
    model = make_speech_lm()
    model.fit_feature_statistics(make_features(model, 8))
    return model


def make_batch(model, count=4, **options):
    collate = model.make_collator(**options.pop("collator", {}))
    return collate(make_examples(count), make_features(model, count), **options)


def left_padded(batch):
    """The same rows padded on the left, and the target index there."""
    length = batch.input_ids.shape[1]
    shift = length - batch.attention_mask.sum(1)
    column = (torch.arange(length) - shift[:, None]) % length
    inputs = batch.model_inputs()
    inputs["input_ids"] = batch.input_ids.gather(1, column)
    inputs["attention_mask"] = batch.attention_mask.gather(1, column)
    return inputs, batch.target_index + shift[batch.target_row]


# --- the body -------------------------------------------------------------------------------------------------------


def test_forward_equals_the_language_model_on_hand_made_embeddings(model):
    batch = make_batch(model, 1)
    embeddings = model.lm.get_input_embeddings()(batch.input_ids)
    audio = model.connector(batch.audio_features)
    first = (batch.input_ids[0] == model.placeholder_token_id).nonzero()[0].item()
    embeddings[0, first : first + 3] = audio[0]
    expected = model.lm(inputs_embeds=embeddings).logits
    torch.testing.assert_close(model(**batch.model_inputs()).logits, expected)


def interleaved(model):
    """Two rows of text and clips: clip, words, clip, words; and words, one clip, words."""
    mark, words = [model.placeholder_token_id] * 3, [10, 11, 12, 13]
    rows = [mark + words[:2] + mark + words[2:], [*words, *mark, *words[:3]]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    features = make_features(model, 4).reshape(2, 2, *make_features(model, 1).shape[1:])
    return ids, mask, features


def test_several_clips_interleaved_with_text(model):
    ids, mask, features = interleaved(model)
    embeddings = model.lm.get_input_embeddings()(ids)
    audio = model.connector(features.flatten(0, 1))
    embeddings[0, 0:3], embeddings[0, 5:8], embeddings[1, 4:7] = audio[0], audio[1], audio[2]
    expected = model.lm(inputs_embeds=embeddings, attention_mask=mask).logits[mask.bool()]
    logits = model(ids, mask, audio_features=features).logits[mask.bool()]
    torch.testing.assert_close(logits, expected)
    # Masking one clip of one row changes that row alone.
    present = torch.tensor([[True, False], [True, True]])
    masked = model(ids, mask, audio_features=features, audio_present=present).logits
    plain = model(ids, mask, audio_features=features).logits
    torch.testing.assert_close(masked[1, : mask[1].sum()], plain[1, : mask[1].sum()])
    assert (masked[0, 5:] - plain[0, 5:]).abs().max() > 1e-3
    every = model(ids, mask, audio_features=features, audio_present=torch.tensor([False, True])).logits
    torch.testing.assert_close(every[1, : mask[1].sum()], plain[1, : mask[1].sum()])
    last, cache = torch.tensor([9, 10 + 9]), model.make_prefix_cache(dtype=torch.float32)
    with_cache = model.hidden_states_at(last, ids, mask, audio_features=features, prefix_cache=cache)
    without = model.hidden_states_at(last, ids, mask, audio_features=features)
    torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-4)


def test_one_clip_a_row_may_carry_the_dimension_of_clips(model):
    inputs = make_batch(model, 3).model_inputs()
    expected = model(**inputs).logits
    inputs["audio_features"] = inputs["audio_features"][:, None]
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_more_clips_in_the_text_than_given(model):
    ids, mask, features = interleaved(model)
    with pytest.raises(ValueError, match="input_ids: expected 3 audio positions a row or none, got 6 in row 0"):
        model(ids, mask, audio_features=features[:, 0])
    with pytest.raises(ValueError, match=r"audio_present: expected \(2,\) or \(2, 2\), got \(2, 3\)"):
        model(ids, mask, audio_features=features, audio_present=torch.ones(2, 3, dtype=torch.bool))


def test_hidden_states_times_head_are_the_logits(model):
    batch = make_batch(model)
    logits = model(**batch.model_inputs()).logits.flatten(0, 1)[batch.target_index]
    hidden = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)


def test_no_logits_are_built_for_hidden_states(model):
    batch = make_batch(model)

    def refuse(*_):
        raise AssertionError("the LM head was called")

    handle = model.get_output_embeddings().register_forward_pre_hook(refuse)
    try:
        model.hidden_states_at(batch.target_index, **batch.model_inputs()).sum().backward()
        model.hidden_states_at(batch.target_index, **batch.model_inputs(), prefix_cache=model.make_prefix_cache())
        with pytest.raises(AssertionError, match="was called"):
            model(**batch.model_inputs())
    finally:
        handle.remove()
        model.zero_grad()


def test_padding_side_does_not_matter(model):
    batch = make_batch(model)
    expected = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    inputs, index = left_padded(batch)
    torch.testing.assert_close(model.hidden_states_at(index, **inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_row_alone_equals_the_row_in_a_batch(model):
    batch = make_batch(model)
    together = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    features = make_features(model, 4)
    for row, example in enumerate(make_examples(4)):
        alone = model.make_collator()([example], features[row : row + 1])
        torch.testing.assert_close(
            model.hidden_states_at(alone.target_index, **alone.model_inputs()),
            together[batch.target_row == row],
            atol=1e-5,
            rtol=1e-5,
        )


def test_logits_to_keep(model):
    inputs = make_batch(model).model_inputs()
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, full[:, -3:])
    columns = torch.tensor([2, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=columns).logits, full[:, columns])


# --- prefix cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_prefix_cache_changes_nothing(model, left):
    batch = make_batch(model)
    inputs, index = left_padded(batch) if left else (batch.model_inputs(), batch.target_index)
    expected = model.hidden_states_at(index, **inputs)
    cache = model.make_prefix_cache(dtype=torch.float32)
    for _ in range(2):  # computed, then looked up
        got = model.hidden_states_at(index, **inputs, prefix_cache=cache)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert cache.hits == 4


def test_prefix_cache_in_bfloat16_stays_within_one_percent(model):
    batch = make_batch(model)
    expected = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    got = model.hidden_states_at(batch.target_index, **batch.model_inputs(), prefix_cache=model.make_prefix_cache())
    assert (got - expected).norm() / expected.norm() < 0.01


def test_prefix_cache_gives_the_same_gradient(model):
    batch = make_batch(model)
    gradients = []
    for cache in (None, model.make_prefix_cache(dtype=torch.float32)):
        model.zero_grad()
        hidden = model.hidden_states_at(batch.target_index, **batch.model_inputs(), prefix_cache=cache)
        hidden.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.connector.parameters()])
    for plain, cached in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, plain, atol=1e-5, rtol=1e-3)
    model.zero_grad()


def test_forward_with_prefix_cache(model):
    batch = make_batch(model)
    full = model(**batch.model_inputs()).logits
    cached = model(**batch.model_inputs(), prefix_cache=model.make_prefix_cache(dtype=torch.float32)).logits
    for row in range(4):
        start = (batch.input_ids[row] == model.placeholder_token_id).nonzero()[0].item()
        end = batch.attention_mask[row].sum()
        torch.testing.assert_close(cached[row, start:end], full[row, start:end], atol=1e-4, rtol=1e-4)
        assert not cached[row, :start].any()


def test_prefix_cache_with_a_row_of_text_alone(model):
    batch = make_batch(model, 2)
    inputs = batch.model_inputs()
    inputs["input_ids"] = batch.input_ids.masked_fill(
        (batch.input_ids == model.placeholder_token_id) & (torch.arange(2)[:, None] == 1), 7
    )
    expected = model.hidden_states_at(batch.target_index, **inputs)
    got = model.hidden_states_at(
        batch.target_index, **inputs, prefix_cache=model.make_prefix_cache(dtype=torch.float32)
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_prefix_cache_errors(model):
    batch = make_batch(model)
    cache = model.make_prefix_cache()
    with pytest.raises(ValueError, match="index: expected positions after the first audio token"):
        model.hidden_states_at(torch.tensor([0]), **batch.model_inputs(), prefix_cache=cache)
    with pytest.raises(ValueError, match="prefix_cache: expected one made with this model's language model"):
        model(**batch.model_inputs(), prefix_cache=make_speech_lm().make_prefix_cache())
    with pytest.raises(ValueError, match="train_lm: a prefix cache needs a frozen"):
        make_speech_lm(train_lm=True).make_prefix_cache()
    gaps = batch.attention_mask.clone()
    gaps[0, 2] = 0
    with pytest.raises(ValueError, match="attention_mask: expected each row's tokens side by side, got gaps in row 0"):
        model(**(batch.model_inputs() | {"attention_mask": gaps}), prefix_cache=cache)


# --- what trains ----------------------------------------------------------------------------------------------------


def test_gradient_reaches_the_connector_only(model):
    model.zero_grad()
    batch = make_batch(model)
    model.train()
    assert not model.lm.training and model.connector.training
    model.hidden_states_at(batch.target_index, **batch.model_inputs()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.connector.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.lm.parameters())
    assert set(model.trainable_parameters()) == set(model.connector.parameters())
    model.zero_grad()
    model.eval()


def test_train_lm(model):
    trained = make_speech_lm(train_lm=True)
    batch = make_batch(trained)
    trained.train()
    assert trained.lm.training
    trained.hidden_states_at(batch.target_index, **batch.model_inputs()).square().mean().backward()
    assert trained.lm.model.layers[0].mlp.up_proj.weight.grad is not None


def test_gradient_checkpointing_gives_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make_speech_lm()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        batch = make_batch(model)
        model.hidden_states_at(batch.target_index, **batch.model_inputs()).square().mean().backward()
        gradients.append([p.grad for p in model.connector.parameters()])
        if checkpointing:
            with pytest.raises(ValueError, match="prefix_cache: cannot be combined with gradient checkpointing"):
                model.hidden_states_at(
                    batch.target_index, **batch.model_inputs(), prefix_cache=model.make_prefix_cache()
                )
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# --- the negative path ----------------------------------------------------------------------------------------------


def test_masked_audio_does_not_depend_on_the_clip(model):
    batch = make_batch(model)
    inputs = batch.model_inputs() | {"audio_present": torch.zeros(4, dtype=torch.bool)}
    masked = model.hidden_states_at(batch.target_index, **inputs)
    other = inputs | {"audio_features": make_features(model, 4, seed=9)}
    assert torch.equal(model.hidden_states_at(batch.target_index, **other), masked)
    without = inputs | {"audio_features": None, "audio_present": None}
    torch.testing.assert_close(model.hidden_states_at(batch.target_index, **without), masked)
    heard = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    assert (heard - masked).abs().max() > 1e-3


def test_masking_one_row_leaves_the_others(model):
    batch = make_batch(model)
    heard = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    one = batch.model_inputs() | {"audio_present": torch.tensor([True, False, True, True])}
    got = model.hidden_states_at(batch.target_index, **one)
    changed = batch.target_row == 1
    torch.testing.assert_close(got[~changed], heard[~changed])
    assert (got[changed] - heard[changed]).abs().max() > 1e-3


def test_masked_clip_has_a_finite_gradient():
    for mix in ("softmax", "concat", "queries"):
        model = make_speech_lm(layer_mix=mix)
        batch = make_batch(model)
        inputs = batch.model_inputs() | {"audio_present": torch.zeros(4, dtype=torch.bool)}
        model.hidden_states_at(batch.target_index, **inputs).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.connector.parameters() if p.grad is not None)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_generate_equals_repeated_forwards(model, cached):
    batch = make_batch(model, with_target=False)
    cache = model.make_prefix_cache(dtype=torch.float32) if cached else None
    got = model.generate(batch, max_new_tokens=6, prefix_cache=cache)
    features = make_features(model, 4)
    for row, example in enumerate(make_examples(4)):
        ids = torch.tensor([model.make_collator().prompt_ids(example)])
        new: list[int] = []
        for _ in range(6):
            token = model(ids, audio_features=features[row : row + 1]).logits[0, -1].argmax().item()
            if token == model.tokenizer.eos_token_id:
                break
            new.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert got[row] == model.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("cached", [False, True])
def test_generate_refuses_positions_that_follow_the_longest_row(model, cached, monkeypatch):
    batch = make_batch(model, with_target=False)
    cache = model.make_prefix_cache() if cached else None
    longest = int(batch.attention_mask.sum(1).max())
    rope = {"rope_type": "longrope", "original_max_position_embeddings": longest}
    monkeypatch.setattr(model.lm.config, "rope_parameters", rope)
    model.generate(batch, max_new_tokens=1, prefix_cache=cache)
    with pytest.raises(ValueError, match=f"expected texts of at most {longest} tokens, new ones included, got {longest + 1}"):
        model.generate(batch, max_new_tokens=2, prefix_cache=cache)


def test_an_answer_stops_at_every_end_that_the_checkpoint_names(model, monkeypatch):
    batch = make_batch(model, with_target=False)
    assert model.end_ids == [model.tokenizer.eos_token_id]
    assert any(model.generate(batch, max_new_tokens=4))
    every = list(range(len(model.tokenizer)))
    monkeypatch.setattr(model.lm.generation_config, "eos_token_id", every)
    assert model.end_ids == every
    assert model.generate(batch, max_new_tokens=4) == [""] * 4
    draws = torch.full((4, 4), 0.5, dtype=torch.float64)
    sampled = model.own_answers(batch, draws, sampling=Sampling(1.0, max_new_tokens=4))
    for rows in (sampled, model.answer_ids(batch), model.answer_ids(batch, alpha=1.0)):
        assert [len(row) for row in rows] == [1] * 4
    with pytest.raises(ValueError, match="alpha: expected a number beside plausibility"):
        model.answer_ids(batch, plausibility=0.1)
    with pytest.raises(ValueError, match="max_new_tokens: expected >= 1"):
        model.generate(batch, max_new_tokens=0)


@pytest.mark.parametrize("cached", [False, True])
def test_key_value_cache_of_the_caller(model, cached):
    batch = make_batch(model, with_target=False)
    inputs, _ = left_padded(batch)
    options = {"prefix_cache": model.make_prefix_cache(dtype=torch.float32)} if cached else {}
    output = model(**inputs, **options, use_cache=True, logits_to_keep=1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(3):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(token, mask, past_key_values=output.past_key_values, use_cache=True)
        whole = model(ids, mask, inputs["audio_features"], inputs["audio_present"])
        torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_contrastive_decoding_takes_this_model(model, cached):
    from kdkernels.decoding import contrastive_generate
    from kdkernels.teacher import MarkAbsent

    batch = make_batch(model, with_target=False)
    options = {"prefix_cache": model.make_prefix_cache(dtype=torch.float32)} if cached else {}
    plain = contrastive_generate(
        model, batch.model_inputs() | options, negative=MarkAbsent(), alpha=0.0, max_new_tokens=4,
        eos_token_id=model.tokenizer.eos_token_id,
    )  # fmt: skip
    expected = model.generate(batch, max_new_tokens=4)
    texts = model.tokenizer.batch_decode(getattr(plain, "sequences", plain), skip_special_tokens=True)
    assert [text.strip() for text in texts] == expected


# --- audio ----------------------------------------------------------------------------------------------------------


def test_encode_audio_equals_the_encoder_of_transformers(model):
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(16_000).astype(np.float32) * 0.1
    got = model.encode_audio([wave])
    encoder, extractor = make_encoder()
    encoder.config.max_source_positions = 50
    table = nn.Embedding(50, 16)
    table.weight.data = encoder.embed_positions.weight.data[:50].clone()
    encoder.embed_positions = table
    mel = extractor(
        wave, sampling_rate=16_000, return_tensors="pt", padding="do_not_pad", truncation=False
    ).input_features
    with torch.no_grad():
        states = encoder(mel[..., :100], output_hidden_states=True).hidden_states
    expected = torch.stack([states[1], states[2]], dim=1).unflatten(2, (5, 10)).mean(3)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert got.shape == (1, 2, 5, 16) and got.dtype == torch.float32 and not got.requires_grad


def test_encode_audio_last_layer_is_normalised():
    model = make_speech_lm(encoder_layers=(0, 3), audio_frames=50)
    got = model.encode_audio([np.random.default_rng(0).standard_normal(16_000).astype(np.float32)])
    torch.testing.assert_close(got[0, 1].mean(-1), torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(got[0, 1].std(-1, unbiased=False), torch.ones(50), atol=1e-2, rtol=0)


def test_encode_audio_batching_cutting_and_short_clips(model):
    rng = np.random.default_rng(1)
    waves = [rng.standard_normal(n).astype(np.float32) * 0.1 for n in (16_000, 7_000, 40_000, 100)]
    together = model.encode_audio(waves, batch_clips=3)
    for wave, row in zip(waves, together, strict=True):
        torch.testing.assert_close(model.encode_audio([wave])[0], row, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode_audio([waves[2][:16_000]])[0], together[2], atol=1e-5, rtol=1e-4)


def test_encode_audio_by_torch_is_the_processors(monkeypatch):
    waves = [np.random.default_rng(2).standard_normal(n).astype(np.float32) * 0.1 for n in (16_000, 7_000)]
    model = make_speech_lm()
    expected = model.encode_audio(waves)
    model.use_log_mel("torch")
    monkeypatch.setattr(type(model.feature_extractor), "__call__", None)  # it is not asked
    torch.testing.assert_close(model.encode_audio(waves), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ([], "waveforms: expected at least one"),
        ([np.zeros((2, 100), np.float32)], r"waveforms\[0\]: expected a non-empty 1-D array, got shape \(2, 100\)"),
        ([np.ones(100, np.float32), np.zeros(0, np.float32)], r"waveforms\[1\]: expected a non-empty"),
        ([np.full(100, np.nan, np.float32)], "expected finite samples"),
        ([np.zeros(100, np.int16)], "expected floats"),
    ],
)
def test_encode_audio_refuses(model, waves, message):
    with pytest.raises(ValueError, match=message):
        model.encode_audio(waves)


def test_encoder_is_loaded_when_it_is_needed():
    source = TinyBackbones()
    model = SpeechLM.from_config(make_config(), resolver=source)
    assert source.loaded == ["tiny/lm"]
    model.encode_audio([np.ones(1000, np.float32)])
    assert source.loaded == ["tiny/lm", "tiny/encoder"]
    assert not any(p.requires_grad for p in model.encoder.parameters())
    unknown = SpeechLM.from_config(make_config(encoder_dim=None), resolver=TinyBackbones())
    assert unknown.config.encoder_dim == 16
    with pytest.raises(ValueError, match="encoder_layers: expected at most 3"):
        SpeechLM.from_config(make_config(encoder_layers=(4,)), resolver=TinyBackbones()).encode_audio([np.ones(9000)])


# --- connector ------------------------------------------------------------------------------------------------------


def make_connector(**changes) -> Connector:
    settings = {
        "num_feature_layers": 2,
        "feature_dim": 6,
        "num_frames": 5,
        "output_dim": 10,
        "width": 8,
        "num_heads": 2,
    }
    return Connector(ConnectorConfig(**(settings | changes)))


@pytest.mark.parametrize("mix", ["softmax", "concat", "queries"])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_connector_shapes_and_scale(mix, pooled, layers):
    connector = make_connector(layer_mix=mix, pooled_statistics=pooled, num_layers=layers, num_queries=7)
    out = connector(torch.randn(3, 2, 5, 6))
    assert out.shape == (3, 7, 10)
    torch.testing.assert_close(out.square().mean(-1).sqrt(), torch.full((3, 7), 0.14), atol=1e-3, rtol=0)
    weights = connector.layer_weights()
    assert weights is None if mix == "concat" else torch.equal(weights, torch.full((2,), 0.5))


@torch.no_grad()
def test_queries_of_each_layer_are_mixed_by_shares_of_their_own():
    """Each layer's queries read that layer alone; result q is the mean over layers with the weights softmax(layer_logits[q])."""
    connector = make_connector(layer_mix="queries", num_queries=3, num_layers=2)
    connector.layer_logits.copy_(torch.tensor([[0.0, 0.0], [2.0, 0.0], [-50.0, 50.0]]))
    features = torch.randn(4, 2, 5, 6)
    alone = make_connector(layer_mix="softmax", num_feature_layers=1, num_queries=3, num_layers=2)
    read = []
    for layer in range(2):
        state = {name: value for name, value in connector.state_dict().items() if name in alone.state_dict()}
        state |= {"layer_logits": torch.zeros(1), "queries": connector.queries[layer]}
        state |= {name: connector.state_dict()[name][layer : layer + 1] for name in ("feature_mean", "feature_std")}
        alone.load_state_dict(state)
        read.append(alone._read(features[:, layer : layer + 1], alone.queries.expand(4, -1, -1)))
    shares = connector.layer_logits.softmax(-1)
    mixed = connector.output_projection(sum(shares[:, k, None] * read[k] for k in range(2)))
    expected = torch.nn.functional.layer_norm(mixed, mixed.shape[-1:]) * 0.14
    torch.testing.assert_close(connector(features), expected)
    torch.testing.assert_close(connector.layer_weights(), shares.mean(0))


def test_connector_standardises():
    connector = make_connector()
    features = torch.randn(20, 2, 5, 6) * torch.tensor([3.0, 0.1])[:, None, None] + 5
    connector.fit_statistics(features.half())
    other = make_connector()
    other.load_state_dict(connector.state_dict())
    other.feature_mean.zero_()
    other.feature_std.fill_(1)
    standard = (features.double() - features.double().mean((0, 2), keepdim=True)) / features.double().std(
        (0, 2), keepdim=True
    )
    torch.testing.assert_close(connector(features), other(standard.float()), atol=2e-3, rtol=0)


def test_reset_parameters_keeps_statistics():
    connector = make_connector()
    connector.fit_statistics(torch.randn(4, 2, 5, 6))
    before = {name: value.clone() for name, value in connector.state_dict().items()}
    connector.reset_parameters()
    after = connector.state_dict()
    assert torch.equal(after["feature_mean"], before["feature_mean"])
    assert not torch.equal(after["queries"], before["queries"])


def test_connector_errors():
    with pytest.raises(ValueError, match="width: expected a multiple of num_heads"):
        make_connector(width=9)
    with pytest.raises(ValueError, match="layer_mix: expected one of"):
        make_connector(layer_mix="mean")
    with pytest.raises(ValueError, match=r"features: expected \(B, 2, 5, 6\).*got \(3, 2, 4, 6\)"):
        make_connector()(torch.zeros(3, 2, 4, 6))
    with pytest.raises(ValueError, match=r"present: expected shape \(3,\), got \(2,\)"):
        make_connector()(torch.zeros(3, 2, 5, 6), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer 1 holds infinities or NaN"):
        bad = torch.zeros(3, 2, 5, 6)
        bad[1, 1, 1, 1] = torch.nan
        make_connector().fit_statistics(bad)


# --- saving ---------------------------------------------------------------------------------------------------------


def test_save_and_load_by_reference(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "connector.safetensors", "speech_lm.json"]
    source = TinyBackbones()
    again = SpeechLM.from_pretrained(folder, resolver=source)
    assert source.loaded == ["tiny/lm"] and again.config == model.config
    batch = make_batch(model)
    torch.testing.assert_close(
        again.hidden_states_at(batch.target_index, **batch.model_inputs()),
        model.hidden_states_at(batch.target_index, **batch.model_inputs()),
        atol=0,
        rtol=0,
    )


@pytest.mark.slow
def test_save_with_the_backbones_inside(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "model", include_frozen=True)
    again = SpeechLM.from_pretrained(folder)
    batch = make_batch(again, with_target=False)
    assert again.generate(batch, max_new_tokens=4) == model.generate(batch, max_new_tokens=4)
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    torch.testing.assert_close(again.encode_audio([wave]), model.encode_audio([wave]))
    assert not any(p.requires_grad for p in again.lm.parameters())
    # Its backbones have no other place, so a later save takes them along.
    third = SpeechLM.from_pretrained(again.save_pretrained(tmp_path / "again"))
    assert third.generate(batch, max_new_tokens=4) == model.generate(batch, max_new_tokens=4)


def test_trained_language_model_is_stored(tmp_path):
    trained = make_speech_lm(train_lm=True)
    with torch.no_grad():
        trained.lm.model.norm.weight.mul_(1.5)
    again = SpeechLM.from_pretrained(trained.save_pretrained(tmp_path / "model"))
    torch.testing.assert_close(again.lm.model.norm.weight, trained.lm.model.norm.weight)


def test_other_weights_than_those_trained_with_are_refused(model, tmp_path):
    lm_folder = tmp_path / "lm"
    tokenizer = make_tokenizer()
    make_lm(tokenizer).save_pretrained(lm_folder)
    tokenizer.save_pretrained(lm_folder)
    encoder, extractor = make_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    extractor.save_pretrained(tmp_path / "encoder")
    config = make_config(lm=str(lm_folder), encoder=str(tmp_path / "encoder"))
    saved = SpeechLM.from_config(config).save_pretrained(tmp_path / "model")
    SpeechLM.from_pretrained(saved).encode_audio([np.ones(1000, np.float32)])
    make_lm(tokenizer, seed=7).save_pretrained(lm_folder)
    with pytest.raises(SpeechLMError, match=r"was trained with .* of SHA-256"):
        SpeechLM.from_pretrained(saved)


def test_damaged_folders_are_named(model, tmp_path):
    with pytest.raises(SpeechLMError, match=r"expected a saved speech LM with speech_lm\.json, found none"):
        SpeechLM.from_pretrained(tmp_path)
    folder = model.save_pretrained(tmp_path / "model")
    data = (folder / "connector.safetensors").read_bytes()
    (folder / "connector.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SpeechLMError, match=r"connector\.safetensors"):
        SpeechLM.from_pretrained(folder, resolver=TinyBackbones())
    record = json.loads((folder / "speech_lm.json").read_text())
    (folder / "speech_lm.json").write_text(json.dumps(record | {"format_version": 99}))
    with pytest.raises(SpeechLMError, match="expected format version 1, got 99"):
        SpeechLM.from_pretrained(folder, resolver=TinyBackbones())
    settings = record["config"]
    for text, message in (
        ('{"format_version": 1}', r"damaged: it has no 'config'"),
        ("[]", "unreadable"),
        (json.dumps(record | {"config": settings | {"num_querys": 3}}), "num_querys: unknown setting; did you mean num_queries"),
        (json.dumps(record | {"config": settings | {"connector_width": 33}}), "expected a multiple of num_heads"),
        (json.dumps(record | {"config": 3}), r"speech_lm\.json: "),
    ):
        (folder / "speech_lm.json").write_text(text)
        with pytest.raises(SpeechLMError, match=message):
            SpeechLM.from_pretrained(folder, resolver=TinyBackbones())
    (folder / "speech_lm.json").write_text("{")
    with pytest.raises(SpeechLMError, match="unreadable"):
        SpeechLM.from_pretrained(folder, resolver=TinyBackbones())


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": ()}, "encoder_layers: expected integers"),
        ({"encoder_layers": (-1,)}, "encoder_layers: expected integers"),
        ({"max_audio_seconds": 31}, r"max_audio_seconds: expected in \(0, 30\]"),
        ({"audio_frames": 51}, "audio_frames: expected 1 to 50"),
        ({"lm_dtype": "int8"}, "lm_dtype: expected one of"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_config_takes_lists_and_dicts():
    assert SpeechLMConfig(encoder_layers=[1, 2]).encoder_layers == (1, 2)
    with pytest.raises(ValueError, match="conector_width: unknown setting; did you mean connector_width"):
        SpeechLMConfig.from_dict({"conector_width": 3})


def test_placeholder_token_of_choice():
    model = make_speech_lm(placeholder_token="<|im_start|>")
    assert model.placeholder_token_id == model.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert model.make_collator().placeholder_token_id == model.placeholder_token_id
    with pytest.raises(ValueError, match="placeholder_token: expected a token of the vocabulary, got '<nope>'"):
        make_speech_lm(placeholder_token="<nope>")


def test_input_errors(model):
    batch = make_batch(model)
    inputs = batch.model_inputs()
    with pytest.raises(ValueError, match=r"input_ids: expected \(B, L\) int64"):
        model(batch.input_ids.float())
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(batch.input_ids, batch.attention_mask[:, 1:])
    with pytest.raises(ValueError, match="input_ids: expected 3 audio positions a row or none, got 2 in row 0"):
        first = (batch.input_ids[0] == model.placeholder_token_id).nonzero()[0].item()
        ids = batch.input_ids.clone()
        ids[0, first] = 7
        model(**(inputs | {"input_ids": ids}))
    with pytest.raises(ValueError, match="audio_features: expected 4 rows"):
        model(**(inputs | {"audio_features": inputs["audio_features"][:2], "audio_present": None}))
    with pytest.raises(ValueError, match="audio_present: expected"):
        model(**(inputs | {"audio_present": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="index: expected values in"):
        model.hidden_states_at(torch.tensor([10_000]), **inputs)
    with pytest.raises(ValueError, match=r"index: expected \(N,\) int64"):
        model.hidden_states_at(torch.tensor([1.0]), **inputs)
    with pytest.raises(ValueError, match="encoder, feature_extractor: expected both or neither"):
        SpeechLM(model.config, lm=model.lm, tokenizer=model.tokenizer, encoder=make_encoder()[0])


def test_example_without_audio_runs(model):
    example = Example(id="t", audio=None, transcription="Where?", question="Who?", target="A man.")
    batch = model.make_collator()([example])
    assert torch.isfinite(model.hidden_states_at(batch.target_index, **batch.model_inputs())).all()


@pytest.fixture
def full_float32():
    """Products and convolutions of float32 on CUDA keep all bits. By default cuDNN rounds a convolution's operands to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_cuda_equals_cpu(full_float32):
    model = make_speech_lm()
    batch = make_batch(model)
    prompts = make_batch(model, with_target=False)
    expected = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    texts = model.generate(prompts, max_new_tokens=4)
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    features = model.encode_audio([wave])
    model.cuda()
    on_gpu = batch.to("cuda")
    for cache in (None, model.make_prefix_cache(dtype=torch.float32)):
        got = model.hidden_states_at(on_gpu.target_index, **on_gpu.model_inputs(), prefix_cache=cache)
        torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=1e-3)
        assert model.generate(prompts.to("cuda"), max_new_tokens=4, prefix_cache=cache) == texts
    torch.testing.assert_close(model.encode_audio([wave]).cpu(), features, atol=1e-3, rtol=1e-3)
