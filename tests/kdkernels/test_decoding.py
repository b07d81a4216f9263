"""contrastive_generate against a naive loop: each row alone, two full forwards a token, no cache, no padding."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="decoding is tested on transformers' own model classes")
import tiny_lms

from kdkernels.decoding import contrast_logits, contrastive_generate, kept_probabilities
from kdkernels.teacher import DropKey, MarkAbsent, MaskFeatures

NEW_TOKENS = 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def one_row(inputs, row):
    """A row's inputs without its padding."""
    kept = inputs["attention_mask"][row].bool() if "attention_mask" in inputs else slice(None)
    mine = {key: value[row : row + 1] for key, value in inputs.items()}
    for key in ("input_ids", "attention_mask"):
        if key in mine:
            mine[key] = mine[key][:, kept]
    return mine


@torch.no_grad()
def naive(model, inputs, text_inputs, *, combine, eos=(), pad=0, new_tokens=NEW_TOKENS, **forward_options):
    """(tokens (B, T), scores per row): the definition, two forwards of everything for each token."""
    rows, all_scores = [], []
    for row in range(len(inputs["input_ids"])):
        audio, text = one_row(inputs, row), one_row(text_inputs, row)
        tokens, row_scores = [], []
        while len(tokens) < new_tokens and not (tokens and tokens[-1] in eos):
            z_audio, z_text = (model(**path, **forward_options).logits[0, -1].float() for path in (audio, text))
            scores = combine(z_audio, z_text)
            row_scores.append(scores)
            tokens.append(int(scores.argmax()))
            for path in (audio, text):
                path["input_ids"] = torch.cat([path["input_ids"], torch.tensor([[tokens[-1]]])], dim=1)
                path["attention_mask"] = torch.ones_like(path["input_ids"])
        rows.append(tokens)
        all_scores.append(row_scores)
    longest = max(map(len, rows))
    return torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in rows]), all_scores


def extrapolate(alpha):
    return lambda audio, text: (1 + alpha) * audio - alpha * text


def silenced(inputs):
    feature = tiny_lms.feature_name(inputs)
    return {**inputs, feature: torch.zeros_like(inputs[feature])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "use_cache"),
    [*((name, True) for name in tiny_lms.AUDIO_MODELS), ("voxtral", False), ("omni_thinker", False)],
)
def test_equals_the_naive_loop(name, use_cache):
    model, inputs = tiny_lms.AUDIO_MODELS[name]()
    expected, all_scores = naive(model, inputs, silenced(inputs), combine=extrapolate(1.5))
    plain, _ = naive(model, inputs, silenced(inputs), combine=extrapolate(0.0))
    assert not torch.equal(expected, plain)  # the contrast changes what is said
    tokens, scores = contrastive_generate(
        model,
        inputs,
        negative=MaskFeatures(tiny_lms.feature_name(inputs)),
        alpha=1.5,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=[],
        use_cache=use_cache,
        return_scores=True,
    )
    assert torch.equal(tokens, expected) and tokens.dtype == torch.int64
    reference = torch.stack([torch.stack(row) for row in all_scores])
    torch.testing.assert_close(scores, reference, rtol=1e-3, atol=1e-3)  # logits of the order of 30, contrasted


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts(side):
    model, inputs = tiny_lms.voxtral()
    for row, padding in enumerate((0, 5, 2)):
        columns = slice(0, padding) if side == "left" else slice(tiny_lms.LENGTH - padding, None)
        if side == "left":
            inputs["input_ids"][row] = inputs["input_ids"][row].roll(padding)
        inputs["input_ids"][row, columns] = 7
        inputs["attention_mask"][row, columns] = 0
    expected, _ = naive(model, inputs, silenced(inputs), combine=extrapolate(1.0))
    tokens = contrastive_generate(
        model, inputs, negative=MaskFeatures("input_features"), alpha=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=[]
    )
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("name", "text_length"), [("qwen2_audio", 9), ("granite_speech", 26), ("omni_thinker", 26), ("voxtral", 9)]
)
def test_text_prompts_of_another_length(name, text_length):
    model, inputs = tiny_lms.AUDIO_MODELS[name]()
    text_inputs = {"input_ids": tiny_lms.token_ids(length=text_length)}
    text_inputs["attention_mask"] = torch.ones_like(text_inputs["input_ids"])
    text_inputs["attention_mask"][0, -3:] = 0
    expected, _ = naive(model, inputs, text_inputs, combine=extrapolate(1.0))
    tokens = contrastive_generate(
        model, inputs, text_inputs=text_inputs, alpha=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=[]
    )
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", tiny_lms.TEXT_MODELS)
def test_text_models(name):
    """Soft cap and scale are in the logits that are contrasted."""
    model, inputs = tiny_lms.TEXT_MODELS[name]()
    text_inputs = {"input_ids": inputs["input_ids"][:, 6:]}
    expected, _ = naive(model, inputs, text_inputs, combine=extrapolate(1.0))
    tokens = contrastive_generate(
        model, inputs, text_inputs=text_inputs, alpha=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=[]
    )
    assert torch.equal(tokens, expected)


def test_formulas_and_mask_reach_the_loop():
    model, inputs = tiny_lms.voxtral()

    def masked(audio, text):
        scores = 4 * audio - 3 * text
        return scores.masked_fill(audio < audio.max() + math.log(0.2), -math.inf)

    cases = [
        ({"formula": "authors", "alpha": 0.7}, lambda audio, text: audio - 0.7 * text),
        ({"formula": "aad"}, extrapolate(0.5)),
        ({"alpha": 3.0, "plausibility": 0.2}, masked),
    ]
    seen = []
    for options, combine in cases:
        expected, _ = naive(model, inputs, silenced(inputs), combine=combine)
        tokens = contrastive_generate(
            model,
            inputs,
            negative=MaskFeatures("input_features"),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=[],
            **options,
        )
        assert torch.equal(tokens, expected)
        seen.append(tokens.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_alpha_zero_is_greedy_decoding():
    model, inputs = tiny_lms.voxtral()
    from transformers import GenerationConfig

    tokens = contrastive_generate(
        model, inputs, negative=MaskFeatures("input_features"), alpha=0.0, max_new_tokens=NEW_TOKENS, eos_token_id=[]
    )
    own = model.generation_config
    assert own.repetition_penalty == 5.0  # given back as it was
    model.generation_config = GenerationConfig()
    greedy = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[:, tiny_lms.LENGTH :]
    assert torch.equal(tokens, greedy)


class TestEnding:
    @pytest.fixture(params=["transformers", "forward"])
    def model(self, request):
        model, self.inputs = tiny_lms.voxtral()
        return model if request.param == "transformers" else Wrapped(model)

    def run(self, model, **options):
        return contrastive_generate(
            model,
            self.inputs,
            negative=MaskFeatures("input_features"),
            alpha=1.0,
            **{"max_new_tokens": NEW_TOKENS, **options},
        )

    def test_each_row_ends_on_its_own(self, model):
        free = self.run(model, eos_token_id=[])
        assert free.shape == (3, NEW_TOKENS)
        eos = [int(free[0, 2]), int(free[1, 4])]
        ends = [next((t for t in range(NEW_TOKENS) if int(row[t]) in eos), NEW_TOKENS) for row in free]
        assert ends[0] != ends[1]
        tokens, scores = self.run(model, eos_token_id=eos, pad_token_id=77, return_scores=True)
        assert tokens.shape[1] == scores.shape[1] == min(NEW_TOKENS, max(ends) + 1)
        for row, end in zip(range(3), ends, strict=True):
            assert torch.equal(tokens[row, : end + 1], free[row, : end + 1])
            assert (tokens[row, end + 1 :] == 77).all()

    def test_single_id_and_default_pad(self, model):
        free = self.run(model, eos_token_id=[])
        eos = int(free[0, 0])
        tokens = self.run(model, eos_token_id=eos)
        assert (tokens[0] == eos).all()

    def test_one_token(self, model):
        assert self.run(model, max_new_tokens=1, eos_token_id=[]).shape == (3, 1)


def test_end_token_of_the_model_itself():
    model, inputs = tiny_lms.voxtral()
    options = {"negative": MaskFeatures("input_features"), "alpha": 1.0, "max_new_tokens": NEW_TOKENS}
    free = contrastive_generate(model, inputs, eos_token_id=[], **options)
    model.generation_config.eos_token_id = int(free[0, 1])
    tokens = contrastive_generate(model, inputs, **options)
    end = free[0].tolist().index(int(free[0, 1]))
    assert (tokens[0, end:] == free[0, 1]).all()


class TestSampling:
    def test_follows_the_contrasted_distribution(self):
        """4,096 draws of one token; chi-square of the counts against softmax(scores / temperature)."""
        _, inputs = tiny_lms.voxtral()
        row = {key: value[:1].expand(4096, *value.shape[1:]) for key, value in inputs.items()}
        fixed = SimpleNamespace(logits=None)
        audio, text = torch.randn(12), torch.randn(12)

        class Constant(nn.Module):
            def forward(self, input_ids, attention_mask, input_features, past_key_values=None, use_cache=None):
                half = len(input_ids) // 2
                fixed.logits = torch.cat([audio.expand(half, 1, 12), text.expand(half, 1, 12)])
                return fixed

        tokens = contrastive_generate(
            Constant(),
            row,
            negative=MaskFeatures("input_features"),
            alpha=1.0,
            max_new_tokens=1,
            temperature=1.7,
            generator=torch.Generator().manual_seed(3),
        )
        expected = torch.softmax((2 * audio - text) / 1.7, dim=0) * 4096
        counts = torch.bincount(tokens.flatten(), minlength=12)
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 31.3  # chi-square with 11 degrees of freedom, 0.1%

    @pytest.mark.parametrize(
        ("limits", "kept"),
        [
            ({}, [0.4, 0.3, 0.2, 0.1]),
            ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
            ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
            ({"top_p": 0.4}, [0.4, 0, 0, 0]),  # the best alone has as much
            ({"top_p": 0.5}, [0.4, 0.3, 0, 0]),
            ({"top_p": 0.01}, [0.4, 0, 0, 0]),
            ({"top_k": 3, "top_p": 0.7}, [4 / 9, 3 / 9, 0, 0]),  # 4/9 + 3/9 of what top_k leaves
        ],
    )
    def test_top_k_and_top_p_keep_the_best(self, limits, kept):
        order = torch.tensor([2, 0, 3, 1])
        scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()[:, order] * 1.7
        expected = torch.tensor([kept])[:, order]
        torch.testing.assert_close(kept_probabilities(scores, 1.7, **limits), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_top_k_of_one_is_the_best_token(self):
        model, inputs = tiny_lms.voxtral()
        options = {"negative": MaskFeatures("input_features"), "alpha": 1.0, "max_new_tokens": 4, "eos_token_id": []}
        best = contrastive_generate(model, inputs, **options)
        for limit in ({"top_k": 1}, {"top_p": 1e-6}):
            assert torch.equal(contrastive_generate(model, inputs, temperature=50.0, **limit, **options), best)

    def test_is_reproducible_and_differs_from_greedy(self):
        model, inputs = tiny_lms.voxtral()
        options = {"negative": MaskFeatures("input_features"), "alpha": 1.0, "max_new_tokens": 6, "eos_token_id": []}
        first, again, other = (
            contrastive_generate(
                model, inputs, temperature=50.0, generator=torch.Generator().manual_seed(seed), **options
            )
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_both_paths_continue_with_the_sampled_token(self):
        model, inputs = tiny_lms.voxtral()
        tokens, scores = contrastive_generate(
            model,
            inputs,
            negative=MaskFeatures("input_features"),
            alpha=1.0,
            max_new_tokens=4,
            eos_token_id=[],
            temperature=20.0,
            generator=torch.Generator().manual_seed(0),
            return_scores=True,
        )
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens[:, :3]], dim=1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        with torch.no_grad():
            audio, text = (model(**path).logits[:, -1] for path in (longer, silenced(longer)))
        torch.testing.assert_close(scores[:, 3], 2 * audio - text, rtol=1e-3, atol=1e-3)


class Wrapped(nn.Module):
    """A module that is no transformers model, with an audio_present input and a cache: what SpeechLM looks like."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.columns = []

    def forward(
        self,
        input_ids,
        attention_mask=None,
        input_features=None,
        audio_present=None,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=0,
    ):
        self.columns.append(input_ids.shape[1])
        if audio_present is not None:
            input_features = input_features * audio_present[:, None, None]
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_features=input_features,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


class TestForwardLoop:
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_equals_the_naive_loop(self, use_cache):
        inner, inputs = tiny_lms.voxtral()
        inputs["attention_mask"][2, -4:] = 0
        model = Wrapped(inner)
        expected, _ = naive(inner, inputs, silenced(inputs), combine=extrapolate(1.0))
        tokens = contrastive_generate(
            model, inputs, negative=MarkAbsent(), alpha=1.0, max_new_tokens=NEW_TOKENS, use_cache=use_cache
        )
        assert torch.equal(tokens, expected)
        columns = [20] + [1] * 5 if use_cache else list(range(20, 26))
        assert model.columns == columns

    def test_no_cache_is_not_silent(self):
        class Cacheless(nn.Module):
            def forward(self, input_ids, attention_mask):
                return SimpleNamespace(logits=F_one_hot(input_ids + 1))

        def F_one_hot(ids):
            return nn.functional.one_hot(ids, 50).float()

        inputs = {"input_ids": torch.tensor([[3, 4]])}
        options = {"negative": dict, "alpha": 1.0, "max_new_tokens": 3}
        with pytest.raises(
            ValueError, match=r"Cacheless.forward to take past_key_values and use_cache.*use_cache=False"
        ):
            contrastive_generate(Cacheless(), inputs, **options)
        assert contrastive_generate(Cacheless(), inputs, use_cache=False, **options).tolist() == [[5, 6, 7]]

    def test_cache_that_is_not_returned(self):
        class Forgetful(Wrapped):
            def forward(self, input_ids, attention_mask, input_features, past_key_values=None, use_cache=False):
                return SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 5), past_key_values=None)

        _, inputs = tiny_lms.voxtral()
        with pytest.raises(ValueError, match="to return past_key_values, got none; pass use_cache=False"):
            contrastive_generate(
                Forgetful(None), inputs, negative=MaskFeatures("input_features"), alpha=1.0, max_new_tokens=2
            )


class TestContrast:
    audio, text = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([1.0, 3.0, 0.5])

    def test_formulas(self):
        close = torch.testing.assert_close
        close(contrast_logits(self.audio, self.text, alpha=2.0), torch.tensor([4.0, -3.0, -4.0]))
        close(contrast_logits(self.audio, self.text, alpha=2.0, formula="authors"), torch.tensor([0.0, -5.0, -2.0]))
        close(contrast_logits(self.audio, self.text, formula="aad"), torch.tensor([2.5, 0.0, -1.75]))
        close(contrast_logits(self.audio, self.text, formula="aad", alpha=2.0), torch.tensor([4.0, -3.0, -4.0]))

    def test_plausibility_keeps_the_best_and_what_is_close_to_it(self):
        beta = math.exp(-1.5)  # keeps z_audio >= 0.5
        got = contrast_logits(self.audio, self.text, alpha=2.0, plausibility=beta)
        assert got.tolist() == pytest.approx([4.0, -3.0, -math.inf])
        only = contrast_logits(self.audio, self.text, alpha=2.0, plausibility=1.0)
        assert only.tolist() == pytest.approx([4.0, -math.inf, -math.inf])

    def test_masked_tokens_stay_masked(self):
        audio = torch.tensor([1.0, -math.inf, 0.0, -math.inf])
        text = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
        for formula in ("extrapolate", "authors"):
            got = contrast_logits(audio, text, alpha=1.0, formula=formula)
            assert got.tolist() == [-math.inf, -math.inf, 0.0, -math.inf]

    def test_half_precision_is_combined_in_float32(self):
        got = contrast_logits(self.audio.bfloat16(), self.text.bfloat16(), alpha=0.1)
        assert got.dtype == torch.float32
        assert torch.equal(got, contrast_logits(self.audio, self.text, alpha=0.1))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "alpha: expected a number for formula 'extrapolate', got None"),
            ({"alpha": -1.0}, "alpha: expected a finite number >= 0, got -1.0"),
            ({"alpha": 1e39}, r"alpha: expected a finite number >= 0, got 1e\+39 .*in float32"),
            ({"alpha": math.nan}, "alpha: expected a finite number >= 0, got nan"),
            ({"alpha": 1.0, "formula": "x"}, "formula: expected one of extrapolate, authors, aad, got 'x'"),
            ({"alpha": 1.0, "plausibility": 0.0}, r"plausibility: expected a number in \(0, 1\] or None, got 0.0"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            contrast_logits(self.audio, self.text, **options)

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"text_logits: expected shape \(3,\), got \(2,\)"):
            contrast_logits(self.audio, self.text[:2], alpha=1.0)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"alpha": None}, "alpha: expected a number"),
            ({"max_new_tokens": 0}, "max_new_tokens: expected a positive int, got 0"),
            ({"temperature": 1e-300}, r"temperature: expected .*got 1e-300 .*in float32"),
            ({"temperature": 0.0}, r"temperature: expected a positive number or None \(best token\), got 0.0"),
            ({"top_k": 5}, "top_k: expected None without temperature, which means the best token, got 5"),
            ({"top_p": 0.5}, "top_p: expected None without temperature"),
            ({"temperature": 1.0, "top_k": 0}, "top_k: expected a positive int or None, got 0"),
            ({"temperature": 1.0, "top_p": 1.5}, r"top_p: expected a number in \(0, 1\] or None, got 1.5"),
            ({"negative": None}, "negative, text_inputs: expected exactly one of them, got neither"),
            ({"text_inputs": {}}, "negative, text_inputs: expected exactly one of them, got both"),
            ({"negative": DropKey("input_features")}, "negative: expected it to keep the inputs' names"),
            (
                {"negative": None, "text_inputs": {"input_ids": torch.ones(2, 4).long()}},
                "text_inputs: expected 3 rows as in inputs, got 2",
            ),
        ],
    )
    def test_arguments_are_named(self, change, message):
        model, inputs = tiny_lms.voxtral()
        options = {"negative": MaskFeatures("input_features"), "alpha": 1.0, "max_new_tokens": 2, **change}
        with pytest.raises(ValueError, match=message):
            contrastive_generate(model, inputs, **options)

    def test_position_ids(self):
        model, inputs = tiny_lms.llama()
        with pytest.raises(ValueError, match="inputs: expected no position_ids"):
            contrastive_generate(model, {**inputs, "position_ids": inputs["input_ids"]}, negative=dict, alpha=1.0)

    def test_positions_that_follow_the_longest_row(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
        config = LlamaConfig(**{**tiny_lms._TEXT, "max_position_embeddings": 22}, rope_parameters=rope, eos_token_id=None)
        model, (_, inputs) = LlamaForCausalLM(config), tiny_lms.llama()
        assert contrastive_generate(model, inputs, negative=dict, alpha=1.0, max_new_tokens=3).shape[1] == 3
        with pytest.raises(ValueError, match=r"model: expected texts of at most 22 tokens, new ones included, got 23.*dynamic"):
            contrastive_generate(model, inputs, negative=dict, alpha=1.0, max_new_tokens=4)

    def test_generation_config_comes_back_after_an_error(self):
        model, inputs = tiny_lms.voxtral()
        own = model.generation_config
        bad = {**inputs, "input_features": inputs["input_features"][:2]}
        with pytest.raises(ValueError, match="Audio features and audio tokens do not match"):
            contrastive_generate(model, bad, negative=MaskFeatures("input_features"), alpha=1.0)
        assert model.generation_config is own


def test_peft_model_uses_its_adapter():
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    model, inputs = tiny_lms.llama()
    text_inputs = {"input_ids": inputs["input_ids"][:, 6:]}
    options = {"text_inputs": text_inputs, "alpha": 1.0, "max_new_tokens": NEW_TOKENS, "eos_token_id": []}
    before = contrastive_generate(model, inputs, **options)
    own = model.generation_config
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["o_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    after = contrastive_generate(adapted, inputs, **options)
    expected, _ = naive(adapted, inputs, text_inputs, combine=extrapolate(1.0))
    assert torch.equal(after, expected) and not torch.equal(after, before)
    assert model.generation_config is own


def test_adapters_of_the_audio_are_on_and_then_as_they_were():
    """Granite Speech turns its LoRA off in a generate() without audio, and lets it train in one with audio."""
    model, inputs = tiny_lms.granite_speech_with_adapter(target_modules=["q_proj", "v_proj"])
    model.requires_grad_(False)
    options = {"alpha": 1.5, "max_new_tokens": NEW_TOKENS, "eos_token_id": []}
    expected, _ = naive(model, inputs, silenced(inputs), combine=extrapolate(1.5))
    for turned_off in (False, True):
        with tiny_lms.any_peft():
            tokens = contrastive_generate(model, inputs, negative=MaskFeatures("input_features"), **options)
        assert torch.equal(tokens, expected)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        assert all(layer.disable_adapters == turned_off for layer in layers)
        tiny_lms.text_only_generate(model, inputs)
