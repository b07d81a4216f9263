import pytest
import torch
from tiny_speech import make_lm, make_tokenizer

from models.speech_lm.prefix_cache import PrefixCache


@pytest.fixture(scope="module")
def lm():
    return make_lm(make_tokenizer()).requires_grad_(False)


def count_calls(lm, monkeypatch) -> list[int]:
    calls = []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls


def test_rows_equal_a_pass_of_the_model(lm):
    cache = PrefixCache(lm, dtype=torch.float32)
    prefixes = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    rows = cache.rows(prefixes)
    assert rows.mask.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    for number, prefix in enumerate(prefixes):
        with torch.no_grad():
            expected = lm.model(input_ids=torch.tensor([prefix]), use_cache=True).past_key_values
        for layer in range(4):
            got = rows.keys[layer][number, :, 5 - len(prefix) :]
            torch.testing.assert_close(got, expected.layers[layer].keys[0], atol=1e-5, rtol=1e-5)
            got = rows.values[layer][number, :, 5 - len(prefix) :]
            torch.testing.assert_close(got, expected.layers[layer].values[0], atol=1e-5, rtol=1e-5)
            assert not rows.keys[layer][number, :, : 5 - len(prefix)].any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_do_not_depend_on_what_is_computed_beside_a_prefix(lm, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randint(4, 300, (n,), generator=generator).tolist() for n in (1, 2, 3, 5, 8, 13, 21, 21, 34)]
    forward, read = lm.model.forward, []
    monkeypatch.setattr(lm.model, "forward", lambda **k: read.append(tuple(k["input_ids"].shape)) or forward(**k))
    together, filled, small = (PrefixCache(lm, dtype=dtype, **k) for k in ({}, {}, {"max_bytes": 1}))
    filled.fill(prefixes[::-1])
    for number, prefix in enumerate(prefixes):
        alone = PrefixCache(lm, dtype=dtype).rows([prefix])
        others = [c.rows(prefixes) for c in (together, filled, small)] + [small.rows([*prefixes[-3:], prefix])]
        for rows, row in zip(others, (number, number, number, 3), strict=True):
            for one, other in zip(alone.keys + alone.values, rows.keys + rows.values, strict=True):
                assert torch.equal(one[0], other[row, :, -len(prefix) :])
    # Equal bits may be a processor's kindness; the same product everywhere is not.
    assert {rows for rows, _ in read} == {1} and {length for _, length in read} == set(map(len, prefixes))


def test_bfloat16_storage_is_within_its_rounding(lm):
    exact = PrefixCache(lm, dtype=torch.float32).rows([[5, 6, 7]])
    rounded = PrefixCache(lm).rows([[5, 6, 7]])
    assert rounded.keys[0].dtype == torch.float32
    for a, b in zip(exact.keys + exact.values, rounded.keys + rounded.values, strict=True):
        assert ((a - b).abs() <= a.abs() * 2**-8).all()
        assert (a != b).any()


def test_second_look_up_runs_nothing(lm, monkeypatch):
    cache = PrefixCache(lm)
    assert cache.fill([[5, 6], [7, 8, 9], [5, 6], []]) == 0
    assert len(cache) == 2 and [5, 6] in cache and [6, 5] not in cache
    calls = count_calls(lm, monkeypatch)
    cache.rows([[5, 6], [7, 8, 9], [5, 6], []])
    assert not calls and cache.hits == 3 and cache.misses == 2
    cache.rows([[1, 2]])
    assert len(calls) == 1


def test_byte_limit_holds_and_what_is_beyond_it_is_computed_again(lm, monkeypatch):
    one = PrefixCache(lm)
    one.fill([[5, 6]])
    cache = PrefixCache(lm, max_bytes=one.nbytes, batch_size=1)
    assert cache.fill([[5, 6], [7, 8], [9, 10]]) == 2
    assert len(cache) == 1 and cache.nbytes == one.nbytes
    calls = count_calls(lm, monkeypatch)
    expected = one.rows([[7, 8]])
    calls.clear()
    torch.testing.assert_close(cache.rows([[7, 8]]).keys, expected.keys)
    assert len(calls) == 1 and len(cache) == 1


def test_empty_prefixes_alone(lm):
    rows = PrefixCache(lm).rows([[], []])
    assert rows.mask.shape == (2, 0) and not rows.keys


def test_no_gradient_and_no_mode_change(lm):
    lm.model.train()
    try:
        rows = PrefixCache(lm).rows([[5, 6]])
        assert lm.model.training and not rows.keys[0].requires_grad
    finally:
        lm.model.eval()


def test_save_and_load(lm, tmp_path):
    cache = PrefixCache(lm)
    cache.fill([[5, 6], [7, 8, 9]])
    path = cache.save(tmp_path / "prefixes.safetensors", lm_sha256="abc")
    again = PrefixCache(lm)
    assert again.load(path, lm_sha256="abc") == 2
    assert again.nbytes == cache.nbytes and again.misses == 0
    torch.testing.assert_close(again.rows([[7, 8, 9]]).values, cache.rows([[7, 8, 9]]).values, atol=0, rtol=0)
    with pytest.raises(ValueError, match="belongs to the language model abc, expected other"):
        again.load(path, lm_sha256="other")
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        PrefixCache(lm, dtype=torch.float32).load(path, lm_sha256="abc")
    small = PrefixCache(lm, max_bytes=1)
    assert small.load(path, lm_sha256="abc") == 0


def test_bad_arguments_are_named(lm):
    with pytest.raises(ValueError, match="max_bytes: expected >= 0"):
        PrefixCache(lm, max_bytes=-1)
    with pytest.raises(ValueError, match="dtype: expected a floating dtype"):
        PrefixCache(lm, dtype=torch.int8)
    with pytest.raises(ValueError, match="batch_size"):
        PrefixCache(lm, batch_size=0)
