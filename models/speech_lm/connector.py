"""The connector: frames of a speech encoder in, a few vectors in the language model's embedding space out.

    features (B, K, T, D)  K chosen encoder layers, T frames
      -> standardised by the corpus' mean and deviation; a masked clip becomes exactly zero
      -> learned mix of the K layers (softmax weights, or their concatenation); or each layer has queries of its own
      -> learned queries (plus the clip's pooled mean and deviation) attend to the frames, then to each other
      -> projected to the language model's width, normalised to the scale of its embeddings   (B, Q, H)

The querying transformer follows BLIP-2 (Li et al., 2023) in the form of DeSTA2.5-Audio; it is the only part that trains.

Legend: B clips, K layers, T frames, D encoder width, W connector width, Q queries, H language model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_MIXES = ("softmax", "concat", "queries")
_STD_FLOOR = 1e-4
_POSITIVE_SETTINGS = (
    "num_feature_layers",
    "feature_dim",
    "num_frames",
    "output_dim",
    "num_queries",
    "width",
    "num_layers",
    "num_heads",
)


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Shape of a connector.

    Args:
        num_feature_layers: K, how many encoder layers the features hold.
        feature_dim: D, width of the encoder.
        num_frames: T, frames a clip.
        output_dim: H, width of the language model.
        num_queries: Q, audio tokens of a clip in the prompt.
        width: W.
        num_layers: transformer layers.
        num_heads: attention heads; `width` must be a multiple.
        layer_mix: "softmax": one weighted sum of the layers, as in DeSTA2.5; "concat": the layers side by side, K times the
            input width, which learns faster where K is small; "queries": each layer has queries of its own, which the same
            transformer layers read, and each of the Q results is a softmax-weighted sum over the layers, as in DeSTA2.
        pooled_statistics: add a projection of the frames' mean and deviation to every query. A property of the whole clip, such
            as the voice, is then visible from the first step.
        output_scale: root mean square of the outputs at the start; 0.14 is close to that of SmolLM2's embeddings.
        dropout: probability in the attention and feed-forward blocks.
    """

    num_feature_layers: int
    feature_dim: int
    num_frames: int
    output_dim: int
    num_queries: int = 8
    width: int = 192
    num_layers: int = 2
    num_heads: int = 4
    layer_mix: str = "concat"
    pooled_statistics: bool = True
    output_scale: float = 0.14
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in _POSITIVE_SETTINGS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.width % self.num_heads:
            raise ValueError(f"width: expected a multiple of num_heads ({self.num_heads}), got {self.width}")
        if self.layer_mix not in LAYER_MIXES:
            raise ValueError(f"layer_mix: expected one of {LAYER_MIXES}, got {self.layer_mix!r}")
        if self.output_scale <= 0:
            raise ValueError(f"output_scale: expected > 0, got {self.output_scale}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a fraction in [0, 1), got {self.dropout}")


class Connector(nn.Module):
    """Q-Former from encoder features to language model embeddings; see the module's docstring."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        layers, dim, width = config.num_feature_layers, config.feature_dim, config.width
        self.register_buffer("feature_mean", torch.zeros(layers, 1, dim))
        self.register_buffer("feature_std", torch.ones(layers, 1, dim))
        if config.layer_mix == "softmax":
            self.layer_logits = nn.Parameter(torch.zeros(layers))
            mixed_dim = dim
        elif config.layer_mix == "queries":
            self.layer_logits = nn.Parameter(torch.zeros(config.num_queries, layers))
            mixed_dim = dim
        else:
            self.register_parameter("layer_logits", None)
            mixed_dim = layers * dim
        self.input_projection = nn.Linear(mixed_dim, width)
        self.frame_positions = nn.Parameter(torch.randn(config.num_frames, width) * 0.02)
        self.frame_norm = nn.LayerNorm(width)
        own = (layers,) if config.layer_mix == "queries" else ()
        self.queries = nn.Parameter(torch.randn(*own, config.num_queries, width) * 0.3)
        self.statistics_projection = nn.Linear(2 * mixed_dim, width) if config.pooled_statistics else None
        self.layers = nn.ModuleList(_QueryLayer(config) for _ in range(config.num_layers))
        self.output_projection = nn.Linear(width, config.output_dim)
        self.output_scale = nn.Parameter(torch.tensor(float(config.output_scale)))

    def forward(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """Map features to embeddings.

        Args:
            features: (B, K, T, D), raw, any floating dtype; no gradient goes to them.
            present: (B,) bool; False masks the clip: its standardised features become zero. None = all present.

        Returns:
            (B, Q, H) in the connector's dtype.

        Raises:
            ValueError: another shape.
        """
        config = self.config
        expected = (config.num_feature_layers, config.num_frames, config.feature_dim)
        if features.dim() != 4 or tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"features: expected (B, {', '.join(map(str, expected))}) for (layers, frames, width), "
                f"got {tuple(features.shape)}"
            )
        if present is not None and tuple(present.shape) != (features.shape[0],):
            raise ValueError(f"present: expected shape ({features.shape[0]},), got {tuple(present.shape)}")
        x = (features.detach().to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std  # (B, K, T, D)
        if present is not None:
            x = x * present.to(x.dtype)[:, None, None, None]
        if config.layer_mix == "queries":
            each = self._read(x.flatten(0, 1)[:, None], self.queries.expand(len(x), -1, -1, -1).flatten(0, 1))  # (B*K, Q, W)
            shares = self.layer_logits.softmax(-1)  # (Q, K)
            queries = torch.einsum("qk,bkqw->bqw", shares, each.unflatten(0, x.shape[:2]))
        else:
            queries = self._read(x, self.queries.expand(len(x), -1, -1))
        output = self.output_projection(queries)
        return F.layer_norm(output, output.shape[-1:]) * self.output_scale

    def _read(self, x: Tensor, queries: Tensor) -> Tensor:
        """(B, Q, W): what the queries (B, Q, W) find in the standardised features x (B, K, T, D)."""
        frames = self.frame_norm(self.input_projection(self._mix(x)) + self.frame_positions)  # (B, T, W)
        if self.statistics_projection is not None:
            # Statistics first, mix second: a deviation of zero (a masked clip) has no usable gradient.
            pooled = torch.cat([self._mix(x.mean(2, keepdim=True)), self._mix(x.std(2, keepdim=True))], dim=-1)
            queries = queries + self.statistics_projection(pooled)  # (B, Q, W) + (B, 1, W)
        for layer in self.layers:
            queries = layer(queries, frames)
        return queries

    def layer_weights(self) -> Tensor | None:
        """Learned share of each encoder layer, (K,) with sum 1, of "queries" the mean over them; None with "concat"."""
        if self.layer_logits is None:
            return None
        shares = self.layer_logits.detach().softmax(-1)
        return shares.mean(0) if shares.dim() == 2 else shares

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New random weights from torch's generator; the feature statistics (buffers) stay."""
        fresh = Connector(self.config)
        for mine, new in zip(self.parameters(), fresh.parameters(), strict=True):
            mine.copy_(new)

    @torch.no_grad()
    def fit_statistics(self, features: Tensor | Iterable[Tensor]) -> None:
        """Set the standardisation to the mean and deviation of `features` (N, K, T, D) over clips and frames.

        They are computed in float64, layer by layer, so features in half precision are accurate enough. An iterable of such
        tensors counts as all of them together; one of them is in memory at a time.
        """
        layers, width = self.config.num_feature_layers, self.config.feature_dim
        count = 0
        mean = torch.zeros(layers, width, dtype=torch.float64)
        squares = torch.zeros_like(mean)  # sums of squared distances from the mean
        for chunk in [features] if isinstance(features, Tensor) else features:
            if chunk.dim() != 4 or (chunk.shape[1], chunk.shape[3]) != (layers, width):
                raise ValueError(f"features: expected (N, {layers}, T, {width}), got {tuple(chunk.shape)}")
            here = chunk.shape[0] * chunk.shape[2]
            if not here:
                continue
            for layer in range(layers):
                values = chunk[:, layer].flatten(0, 1).double().cpu()  # (N*T, D)
                if not torch.isfinite(values).all():
                    raise ValueError(f"features: layer {layer} holds infinities or NaN")
                # Two parts' sums of squares add with the distance of their means (Chan, Golub, LeVeque 1979).
                own = values.mean(0)
                distance = own - mean[layer]
                squares[layer] += ((values - own) ** 2).sum(0) + distance**2 * (count * here / (count + here))
                mean[layer] += distance * (here / (count + here))
            count += here
        if count < 2:
            raise ValueError("features: expected at least two frames to take a deviation of, got fewer")
        self.feature_mean[:, 0] = mean.to(self.feature_mean)
        self.feature_std[:, 0] = ((squares / (count - 1)).sqrt() + _STD_FLOOR).to(self.feature_std)

    def _mix(self, x: Tensor) -> Tensor:
        if self.config.layer_mix == "queries":
            return x[:, 0]  # one layer at a time
        if self.layer_logits is None:
            return x.transpose(1, 2).flatten(2)  # (B, T, K*D)
        return torch.einsum("k,bktd->btd", self.layer_logits.softmax(0), x)  # (B, T, D)


class _QueryLayer(nn.Module):
    """Queries attend to the frames, then to each other, then pass a feed-forward block; each block normalises its input."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.width
        options = {"dropout": config.dropout, "batch_first": True}
        self.cross_norm, self.self_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, config.num_heads, **options)
        self.self_attention = nn.MultiheadAttention(width, config.num_heads, **options)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(config.dropout),
                                 nn.Linear(2 * width, width))  # fmt: skip

    def forward(self, queries: Tensor, frames: Tensor) -> Tensor:
        queries = queries + self.cross_attention(self.cross_norm(queries), frames, frames, need_weights=False)[0]
        normed = self.self_norm(queries)
        queries = queries + self.self_attention(normed, normed, normed, need_weights=False)[0]
        return queries + self.ffn(self.ffn_norm(queries))
