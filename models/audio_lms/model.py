"""An audio LM of transformers behind the protocol that the training loop and the evaluation ask for.

    model = AudioLM.from_pretrained("Qwen/Qwen2.5-Omni-3B", dtype=torch.bfloat16, trains="lora", lora=Lora(r=16))
    clips = ClipReader(audio_root, sampling_rate=model.sampling_rate)
    batch = model.make_collator()(examples, clips.rows(examples))
    hidden = model.hidden_states_at(batch.target_index, **batch.model_inputs())   # (N, H); no logits are built
    model.save_pretrained("runs/student/final")                                   # transformers' from_pretrained loads it

The path without the audio is inside: rows whose `audio_present` is False get the family's silent features (family.py). So
teachers, controls and audio dropout say which rows hear, as with a speech LM of this project.

Legend: B rows, L columns, N positions, H hidden width, E entries of the features.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdkernels.decoding import contrastive_generate
from kdkernels.head_capture import HeadCapture
from kdkernels.head_layers import head_module
from kdkernels.layer_states import LayerStates
from kdkernels.model_modes import audio_adapters_on, evaluating
from kdkernels.paths import MaskFeatures
from kdkernels.placement import is_placed
from kdkernels.sampling import Sampling, own_answers, until_end
from models.audio_lms.collation import AudioBatch, AudioCollator
from models.audio_lms.families import check_own_code, family_of
from models.audio_lms.family import AudioLMError, Family, Turn, matches, sampling_rate, tokenizer_of
from models.audio_lms.settings import NEGATIVES, TRAINS, Lora
from models.backbones.answer_noise import AnswerNoise
from models.backbones.causal_lm import named_ends
from models.backbones.hub import from_hub
from models.backbones.model_folder import BackboneError, check_all_loaded, quiet_transformers, weights_sha256
from models.io_utils import atomic_dir, atomic_write_json

_ADAPTER_FILE = "adapter_config.json"
_BASE_FILE = "base.json"  # beside an adapter: the SHA-256 of the weights that it was trained with
# What a processor is loaded from, in a checkpoint of any age.
_PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer*", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.jinja",
)  # fmt: skip


class AudioLM(nn.Module):
    """See the module's docstring. `from_pretrained` is the usual way to make one.

    Args:
        lm: an audio LM of transformers, in evaluation mode.
        processor: its processor.
        trains: "full" = language model and connector, "connector" = that alone, "lora" = a new LoRA; None = nothing. The audio
            encoder never trains.
        lora: settings, where trains is "lora".
        source: hub id or folder of the weights, which an adapter names as its base.
        base_sha256: of the weights in that folder; an adapter is saved with it and refuses other weights.
        folder: where the processor's files lie; None = the processor is written by transformers.
        negative: what a row that hears nothing has in the place of its sound: "zeros" in its features, or the features of
            "silence". With "absent", who makes the path without the audio leaves the clip out of its prompt (`is_absent`).

    Attributes:
        lm: the model; with a LoRA a PeftModel around it.
        family: what is known of its kind.
        merge: write the LoRA into the weights when the model is saved; else the result is an adapter.
    """

    def __init__(
        self,
        lm: nn.Module,
        processor: Any,
        *,
        trains: str | None = None,
        lora: Lora | None = None,
        source: str | None = None,
        base_sha256: str | None = None,
        folder: Path | None = None,
        merge: bool = False,
        negative: str = "zeros",
    ) -> None:
        super().__init__()
        if negative not in NEGATIVES:
            raise ValueError(f"negative: expected one of {', '.join(NEGATIVES)}, got {negative!r}")
        self.family: Family = family_of(lm.config)
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.sampling_rate = sampling_rate(processor)
        self.merge = merge
        self.is_absent = negative == "absent"
        self._silent = _silence(self.family, processor) if negative == "silence" else self.family.negative
        self._folder = folder
        self._base_sha256 = base_sha256
        self._gradient_checkpointing = False
        self.lm = _trainable(lm, self.family, trains, lora or Lora(), source)
        self.train(False)

    # --- making, saving, loading --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        spec: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
        device_map: Any = None,
        trains: str | None = None,
        lora: Lora | None = None,
        merge: bool = False,
        negative: str = "zeros",
    ) -> AudioLM:
        """Load a checkpoint, or an adapter that `save_pretrained` wrote.

        Args:
            spec: hub id ("Qwen/Qwen2-Audio-7B-Instruct", optionally "@revision") or folder. Only safetensors are loaded, and
                no code of a repository runs.
            dtype: of the weights.
            attention: transformers' attn_implementation, such as "sdpa" or "flash_attention_2"; None = transformers chooses.
            device_map: transformers' device_map, such as "auto", which needs accelerate.
            trains, lora, merge, negative: see the class.

        Raises:
            AudioLMError: no such checkpoint, one that this project cannot run, or an adapter whose base has other weights than
                those that it was trained with.
        """
        from transformers import AutoConfig

        own, *base = checkpoint_folders(spec)
        adapter, folder = (own, base[0]) if base else (None, own)
        if adapter is not None and trains == "lora" and not merge:
            raise AudioLMError(
                f"{spec}: expected merge with trains='lora', as it is an adapter itself; a new adapter would name a base that "
                "lacks these weights"
            )
        source = _base_of(own) if base else str(Path(spec).resolve()) if Path(spec).is_dir() else os.fspath(spec)
        check_own_code(folder)
        local = Path(source).expanduser().is_dir()
        with quiet_transformers():
            try:
                family = family_of(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
                if family.check is not None:
                    family.check(folder)
                if adapter is not None and local:
                    _check_base(adapter, folder)
                base_sha256 = weights_sha256(folder) if trains == "lora" and not merge and local else None
                lm, loaded = model_class_of(family).from_pretrained(
                    folder, dtype=dtype, attn_implementation=attention, device_map=device_map, local_files_only=True,
                    use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                )  # fmt: skip
                if not getattr(lm, "_hf_peft_config_loaded", False):  # then this would be about the adapter alone
                    check_all_loaded(loaded, folder)
                processor = _load_processor(family, own)
            except (OSError, ValueError, ImportError, KeyError, BackboneError) as error:
                raise AudioLMError(f"{spec}: {' '.join(str(error).split())}") from error
            if adapter is not None:
                lm = _with_adapter(lm, adapter)
        return cls(
            lm.eval(), processor, trains=trains, lora=lora, source=source, base_sha256=base_sha256, folder=own, merge=merge,
            negative=negative,
        )  # fmt: skip

    @classmethod
    def from_config(cls, config: Any, processor: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> AudioLM:
        """A model with random weights, for tests; `options` as in the class."""
        family = family_of(config)
        return cls(model_class_of(family)._from_config(config, dtype=dtype).eval(), processor, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write what transformers loads: weights or an adapter, config and the processor's files.

        The folder appears complete or not at all, in place of an older one. With `merge` the LoRA is part of the weights from
        then on, in this model too. An adapter names its base by the hub id or the folder that this model was loaded from. Of a
        folder it also holds the SHA-256 of the weights.
        """
        if self.merge and self._has_lora:
            self.lm = self.lm.merge_and_unload()
        with atomic_dir(Path(folder)) as made:
            self.lm.save_pretrained(made)  # beside an adapter no config.json: transformers would then look for all weights here
            if self._has_lora and self._base_sha256 is not None:
                atomic_write_json(made / _BASE_FILE, {"weights_sha256": self._base_sha256})
            if self._folder is None:
                self.processor.save_pretrained(made)
            else:  # as they came: what is loaded here may be only the part that hears
                for pattern in _PROCESSOR_FILES:
                    for file in self._folder.glob(pattern):
                        shutil.copyfile(file, made / file.name)
        return Path(folder)

    def make_collator(self, **options: Any) -> AudioCollator:
        """An `AudioCollator` with this model's family and processor."""
        return AudioCollator(self.family, self.processor, **options)

    # --- text and audio -----------------------------------------------------------------------------------------------

    def hidden_states_at(
        self,
        index: Tensor,
        *,
        layers: Sequence[int] = (),
        audio_present: Tensor | None = None,
        entries: Tensor | None = None,
        answer_noise: AnswerNoise | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The LM head's inputs at chosen positions; the head computes nothing and no logits exist.

        Args:
            index: (N,) int64, row * L + column.
            layers: also the states of these layers of the language model, counted as in `kdkernels.layer_map`.
            audio_present: (B,) bool; False = the row's sound is masked. None = all rows hear.
            entries: (B,) int64, how many entries of the features belong to each row; None = one a row.
            answer_noise: is added to the embeddings of the answers' tokens.
            inputs: of the model, as `AudioBatch.model_inputs` gives them.

        Returns:
            (N, H) in the model's dtype, with a gradient to what trains. With K layers (N, 1 + K, H): first what the head reads.

        Raises:
            ValueError: layers with gradient checkpointing, which first runs each layer without a gradient.
        """
        if layers and self._gradient_checkpointing and self.training:
            raise ValueError("layers: cannot be combined with gradient checkpointing")
        inputs = self._masked(inputs, audio_present, entries)
        taken = LayerStates(self.lm, layers, index) if layers else None
        noise = contextlib.nullcontext() if answer_noise is None else self._noise(answer_noise, inputs["input_ids"])
        with audio_adapters_on(self.lm), HeadCapture(head_module(self.lm)) as capture, noise:
            if taken is None:
                self.lm(**inputs, use_cache=False)
            else:
                with taken:
                    self.lm(**inputs, use_cache=False)
        hidden = capture.hidden().flatten(0, 1)
        hidden = hidden[index.to(hidden.device)]  # layers of a device_map may end elsewhere than they begin
        return hidden if taken is None else torch.cat([hidden[:, None], taken.stacked().to(hidden.device)], 1)

    def generate(self, batch: AudioBatch | Mapping[str, Any], **options: Any) -> list[str]:
        """The answers of `answer_ids` as texts, without special tokens and outer white space."""
        rows = self.answer_ids(batch, **options)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    @torch.no_grad()
    def answer_ids(
        self,
        batch: AudioBatch | Mapping[str, Any],
        *,
        max_new_tokens: int = 16,
        alpha: float | None = None,
        formula: str = "extrapolate",
        plausibility: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Greedy answers to a batch of prompts; with `alpha` by contrastive decoding of the paths with and without the audio.

        Args:
            batch: rows that end with the last token of their prompt, or their model inputs.
            max_new_tokens: limit of each row.
            formula, plausibility, temperature, top_k, top_p, generator: of `kdkernels.contrastive_generate`; only with alpha.

        Returns:
            B lists of ids. One whose last id is none of `end_ids` was cut off after `max_new_tokens`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
        contrasted = (plausibility, temperature, top_k, top_p) != (None,) * 4
        if alpha is None and (formula != "extrapolate" or contrasted):
            raise ValueError("alpha: expected a number beside formula, plausibility, temperature, top_k or top_p, got None")
        inputs = dict(batch.model_inputs() if isinstance(batch, AudioBatch) else batch)
        inputs = self._masked(inputs, inputs.pop("audio_present", None), inputs.pop("entries", None))
        stop = self.end_ids
        if alpha is None:
            tokens = self._greedy(inputs, max_new_tokens, stop)
        else:
            tokens = contrastive_generate(
                self.lm, inputs, negative=self.family.negative, alpha=alpha, max_new_tokens=max_new_tokens, eos_token_id=stop,
                formula=formula, plausibility=plausibility, temperature=temperature, top_k=top_k, top_p=top_p,
                generator=generator,
            )  # fmt: skip
        return until_end(tokens, stop)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer: that of the chat, the end of text, and what the checkpoint's generation config names."""
        lm = self.lm.get_base_model() if self._has_lora else self.lm
        return sorted({self.make_collator().end_id, *named_ends(lm, self.tokenizer)})

    def own_answers(
        self,
        batch: AudioBatch | Mapping[str, Any],
        draws: Tensor,
        *,
        sampling: Sampling,
        suppressed: Iterable[int] = (),
    ) -> list[list[int]]:
        """Sampled answers to a batch of prompts, as token ids; see `kdkernels.sampling.own_answers`.

        Args:
            batch: as in `generate`.

        Returns:
            B lists of ids. One whose last id is not the end of an answer was cut off after `sampling.max_new_tokens`.
        """
        inputs = dict(batch.model_inputs() if isinstance(batch, AudioBatch) else batch)
        inputs = self._masked(inputs, inputs.pop("audio_present", None), inputs.pop("entries", None))
        return own_answers(self.lm, inputs, draws, sampling=sampling, end_ids=self.end_ids, suppressed=suppressed)

    def _greedy(self, inputs: dict[str, Any], max_new_tokens: int, stop: list[int]) -> Tensor:
        """(B, T) new tokens, by transformers' generate with a config of its own: a checkpoint's sampling has no effect."""
        from transformers import GenerationConfig

        lm = self.lm.get_base_model() if self._has_lora else self.lm
        ids, mask = _left_padded(inputs["input_ids"], inputs["attention_mask"])
        config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop[0])
        own, lm.generation_config = lm.generation_config, GenerationConfig()  # which fills what a config leaves open
        try:
            with evaluating(lm), audio_adapters_on(lm):  # without a clip Granite Speech switches its own off, and leaves it so
                made = lm.generate(**inputs | {"input_ids": ids, "attention_mask": mask}, generation_config=config)
        finally:
            lm.generation_config = own
        return made[:, ids.shape[1] :]

    @contextlib.contextmanager
    def _noise(self, noise: AnswerNoise, input_ids: Tensor) -> Iterator[None]:
        """Inside, the language model's embeddings of `input_ids` have the noise."""
        seen = 0

        def add(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
            nonlocal seen
            if embedded.shape[:2] != input_ids.shape:
                return embedded
            seen += 1
            return noise.added(embedded)

        with contextlib.ExitStack() as hooks:
            hooks.callback(self.get_input_embeddings().register_forward_hook(add).remove)
            yield
        if seen != 1:
            raise ValueError(f"answer_noise: expected {self.family.name} to embed its tokens once, got {seen} times")

    def _masked(self, inputs: dict[str, Any], present: Tensor | None, entries: Tensor | None) -> dict[str, Any]:
        """`inputs` with features in the model's dtype, and with silent ones in the rows that hear nothing."""
        found = [name for name in self.family.features if inputs.get(name) is not None]
        inputs = inputs | {name: inputs[name].to(self.lm.dtype) for name in found}
        if present is None or not found:
            return inputs
        silent = self._silent(inputs)
        if entries is not None:
            present = present.repeat_interleave(entries, output_size=len(inputs[found[0]]))  # (E,)
        keeps = {name: present.view(-1, *[1] * (inputs[name].dim() - 1)) for name in found}
        return inputs | {name: torch.where(keeps[name], inputs[name], silent[name]) for name in found}

    # --- what training and evaluation ask of a model --------------------------------------------------------------------

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return head_module(self.lm)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.lm.get_input_embeddings()

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass: less memory, a third more time."""
        if hasattr(self.lm, "activation_checkpointing_enable"):  # the newer name; the older one warns
            self.lm.activation_checkpointing_enable()
        else:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._gradient_checkpointing = True
        self.train(self.training)

    def train(self, mode: bool = True) -> AudioLM:
        """As torch does, but what has frozen weights only stays in evaluation mode: a frozen batch norm must not move.

        Activation checkpointing works in training mode alone, so with it the language model's layers are in training mode too.
        """
        super().train(mode)
        if mode:
            for name, module in self.lm.named_modules():
                weights = list(module.parameters())
                recomputes = self._gradient_checkpointing and matches(self.family.language_model, name)
                if weights and not recomputes and not any(weight.requires_grad for weight in weights):
                    module.eval()
        return self

    def to(self, *args: Any, **options: Any) -> AudioLM:
        """As torch does; a model that a device_map has placed stays where it is."""
        return self if self.is_placed else super().to(*args, **options)

    @property
    def is_placed(self) -> bool:
        """Whether a device_map has placed the weights on several devices."""
        return is_placed(self.lm)

    @property
    def device(self) -> torch.device:
        """The device of the LM head."""
        return self.get_output_embeddings().weight.device

    @property
    def _has_lora(self) -> bool:
        return hasattr(self.lm, "merge_and_unload")


def find_checkpoint_folder(spec: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: `spec` itself, or the hub's cache of it, downloaded if need be.

    Raises:
        AudioLMError: there is none; the message lists the places that were tried.
    """
    spec = os.fspath(spec)
    folder = Path(spec).expanduser()
    if (folder / "config.json").is_file() or (folder / _ADAPTER_FILE).is_file():
        return folder
    tried = [f"folder {folder}: {'no config.json in it' if folder.is_dir() else 'no such folder'}"]
    hub_id, _, revision = spec.partition("@")
    found = from_hub(hub_id, revision or None, tried) if is_hub_id(spec) and not folder.is_dir() else None
    if found is None:
        raise AudioLMError(f"{spec}: expected a hub id or a folder of an audio LM, found none. Tried: {'; '.join(tried)}")
    return found


def is_hub_id(spec: str) -> bool:
    """Whether `spec` has the form owner/name or owner/name@revision."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", spec) is not None


def checkpoint_folders(spec: str | os.PathLike[str]) -> list[Path]:
    """The folder of a checkpoint; of an adapter its own folder and that of its base."""
    folder = find_checkpoint_folder(spec)
    base = adapter_base(folder)
    return [folder] if base is None else [folder, find_checkpoint_folder(base)]


def adapter_base(folder: Path) -> str | None:
    """Hub id or folder of an adapter's base, which is neither looked for nor fetched; None for a folder that holds no adapter."""
    return _base_of(folder) if _is_adapter(folder) else None


def _base_of(folder: Path) -> str:
    """Hub id or folder of the weights that an adapter belongs to."""
    try:
        return json.loads((folder / _ADAPTER_FILE).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise AudioLMError(f"{folder / _ADAPTER_FILE}: expected the name of its base model: {error}") from error


def _check_base(folder: Path, base: Path) -> None:
    """AudioLMError where the folder `base` has other weights than those that the adapter in `folder` was trained with."""
    if not (folder / _BASE_FILE).is_file():  # of an older release, or trained with a base of the hub
        return
    try:
        expected = json.loads((folder / _BASE_FILE).read_text())["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AudioLMError(f"{folder / _BASE_FILE}: expected the SHA-256 of the adapter's base: {error}") from error
    actual = weights_sha256(base)
    if actual != expected:
        raise AudioLMError(
            f"{folder}: its adapter was trained with {base} of SHA-256 {expected}, got {actual}; use the same weights of the "
            "base, or train with merge"
        )


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a model; Granite Speech's checkpoints hold both."""
    return (folder / _ADAPTER_FILE).is_file() and not any(folder.glob("model*.safetensors"))


def _with_adapter(lm: nn.Module, folder: Path) -> nn.Module:
    """`lm` with the LoRA of `folder` merged into its weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be those of a new LoRA
        try:
            return _peft().PeftModel.from_pretrained(lm, folder).merge_and_unload()
        except UserWarning as warning:
            raise AudioLMError(f"{folder}: expected all weights of the adapter: {' '.join(str(warning).split())[:300]}") from None


def _trainable(lm: nn.Module, family: Family, trains: str | None, lora: Lora, source: str | None) -> nn.Module:
    """`lm` with requires_grad where `trains` says so, and with a new LoRA for "lora"."""
    if trains not in (None, *TRAINS):
        raise ValueError(f"trains: expected one of {', '.join(TRAINS)} or None, got {trains!r}")
    lm.requires_grad_(False)
    if trains is not None and getattr(lm, "_hf_peft_config_loaded", False):
        # transformers writes such a model's weights under names that it does not find again.
        raise AudioLMError(f"{source}: expected weights without a LoRA of their own to train, got some with one; merge it first")
    if trains == "lora":
        # Whole names: PEFT turns patterns into ends of names for some families, and the encoder's layers have the same ends.
        names = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and gets_lora(name, family, lora)]
        if not names:
            raise AudioLMError(f"lora.targets: expected ends of names of the language model's linear layers, got {lora.targets}")
        if unknown := [target for target in lora.targets if not any(name.endswith(f".{target}") for name in names)]:
            raise AudioLMError(f"lora.targets: expected ends of names of the language model's linear layers, got also {unknown}")
        config = _peft().LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
        wrapped = _peft().get_peft_model(lm, config)
        wrapped.peft_config["default"].base_model_name_or_path = source
        return wrapped
    wanted = {"full": f"({family.language_model}|{family.connector})", "connector": family.connector}.get(trains)
    trained = [p for name, p in lm.named_parameters() if wanted is not None and matches(wanted, name)]
    if wanted is not None and not trained:
        raise AudioLMError(f"trains: found no weights of {trains!r} in {type(lm).__name__}; its modules have other names")
    for parameter in trained:
        parameter.requires_grad_(True)
    return lm


def gets_lora(name: str, family: Family, lora: Lora) -> bool:
    """Whether a new LoRA goes on the linear layer of this name."""
    if not lora.targets:
        return re.fullmatch(family.lora, name) is not None
    return matches(family.language_model, name) and name.endswith(tuple(f".{target}" for target in lora.targets))


def model_class_of(family: Family) -> Any:
    """The class of transformers, or AudioLMError where this release lacks it."""
    import transformers

    found = getattr(transformers, family.model_class, None)
    if found is None:
        raise AudioLMError(f"{family.name}: it needs {family.model_class}, which transformers {transformers.__version__} lacks")
    return found


def _load_processor(family: Family, folder: Path) -> Any:
    from transformers import AutoProcessor

    if family.load_processor is not None:
        return family.load_processor(str(folder))
    return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _silence(family: Family, processor: Any) -> MaskFeatures:
    """The inputs of the path without the audio, with the features of a silent clip."""
    silent = np.zeros(sampling_rate(processor), np.float32)
    made = family.encoded(processor, [Turn("", (silent,))]).features
    values = torch.cat([made[name].flatten().float() for name in family.features])
    low, high = values.aminmax()
    if not float(high - low) < 1e-3:
        raise AudioLMError(f"negative: expected zeros or absent with {family.name}, whose features of silence are not constant")
    return MaskFeatures(*family.features, value=float(low))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise AudioLMError("lora: it needs the package peft: pip install peft") from None
    return peft


def _left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L) with each row's tokens at its end: new tokens follow there."""
    order = (attention_mask != 0).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
