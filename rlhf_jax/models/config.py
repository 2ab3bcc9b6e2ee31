"""The shape of a model, and presets by name."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.errors import UserError

_CHOICES = {
    "norm": ("rms", "layer"),
    "norm_place": ("before", "after", "around"),
    "position": ("rope", "learned"),
    "activation": ("swiglu", "geglu", "gelu", "gelu_tanh"),
    "rope_scaling": ("none", "linear", "yarn", "llama3"),
    "head": ("lm", "scalar"),
    "compute_dtype": ("float32", "bfloat16"),
    "remat": ("none", "full", "dots"),
    "attention": ("reference", "xla", "cudnn", "splash"),
}
_WHOLE = (
    *("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width"),
    *("max_length", "unroll", "sliding_window", "rope_original_length", "experts_per_token"),
)
_OPTIONAL = (
    *("sliding_window", "logit_softcap", "attention_softcap", "query_scale"),
    *("rope_original_length", "rope_attention_factor", "rope_local_theta", "unroll"),
)
_REAL = (
    *("norm_eps", "rope_theta", "rope_local_theta", "rotary_fraction", "rope_factor", "rope_low"),
    *("rope_high", "rope_attention_factor", "embed_scale", "query_scale", "init_std"),
    *("logit_softcap", "attention_softcap"),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; `norm_place` says where its norms stand.

    `kv_heads == heads` is multi-head attention, `1` multi-query, anything between grouped-query.
    `max_length` is the context the model is made for: rows of a learned position table, and the
    limit of generation. Parameters are float32 always; `compute_dtype` is that of activations and
    matrix products, while softmax, norm statistics, logits and scores stay float32.
    Logits of `unused` ids, rows that pad a vocabulary, count nowhere: they are never drawn, and
    probabilities are of the other ids.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int  # tokens
    norm: str = "rms"  # "rms" or "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = False  # of "layer" norms
    norm_plus_one: bool = False  # norms multiply by 1 + scale, as in Gemma
    norm_place: str = "before"  # of what a sublayer reads; "after" it (OLMo-2); "around" (Gemma-2)
    parallel: bool = False  # attention and MLP read the same x, as in GPT-NeoX
    position: str = "rope"  # "rope" (rotated halves, as in Llama) or "learned"
    rope_theta: float = 10_000.0
    rotary_fraction: float = 1.0  # of each head's dimensions, its first ones
    rope_scaling: str = "none"  # "linear", "yarn" or "llama3": `transformer.rope_frequencies`
    rope_factor: float = 1.0
    rope_original_length: int | None = None  # tokens, before scaling
    rope_low: float = 1.0  # turns within it below which a frequency is divided by the factor
    rope_high: float = 4.0  # and above which it is kept
    rope_attention_factor: float | None = None  # of YaRN's cos and sin; None: 0.1·ln(factor) + 1
    rope_local_theta: float | None = None  # of windowed layers, unscaled; None: as the others
    activation: str = "swiglu"  # "swiglu", "geglu" (tanh), "gelu" (erf) or "gelu_tanh"
    attention_bias: bool = False
    attention_out_bias: bool = True  # with attention_bias: of its output too (not in Qwen2)
    mlp_bias: bool = False
    experts: int = 0  # MLPs of mlp_width in each layer, of which a router chooses; 0: one for all
    experts_per_token: int = 2
    expert_renormalize: bool = True  # the chosen ones' weights sum to 1; not in all of Qwen3-MoE
    qk_norm: bool = False  # RMS norm of queries and keys per head, before RoPE
    qk_norm_whole: bool = False  # over all heads at once, as in OLMo-2
    query_scale: float | None = None  # of queries; None: 1/√head_dim
    embed_scale: float = 1.0  # of embeddings as they enter; √width in Gemma
    tied_embeddings: bool = True
    logit_softcap: float | None = None  # c·tanh(logits/c)
    attention_softcap: float | None = None
    sliding_window: int | None = None  # tokens visible back, the present one included
    window_pattern: str = "w"  # of layers, repeated: w has the window, g sees everything
    unused: tuple[tuple[int, int], ...] = ()  # ids from … to before … that no word has, in order
    head: str = "lm"  # "lm", or "scalar" for reward and value models
    init_std: float = 0.02
    short_convolution: int = 0  # preceding tokens that queries and keys are also made of
    copy_init: bool = False  # attention starts by adding what it attends to: `transformer.init`
    compute_dtype: str = "float32"
    remat: str = "none"  # what the backward pass recomputes: "none", "full", "dots" (all but dots)
    attention: str = "reference"  # the kernel: models/fused_attention.py
    unroll: int | None = None  # layers per turn of the scan; None: `layers_per_turn` says how many

    def __post_init__(self):
        # JSON has no tuples, and a config must be hashable.
        object.__setattr__(self, "unused", tuple(map(tuple, self.unused)))

    def validate(self) -> ModelConfig:
        """Returns the config itself, or raises UserError naming the first field that is wrong."""
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(
                    f"model.{field} = {getattr(self, field)!r}: choose one of {', '.join(choices)}"
                )
        for field in _WHOLE + _REAL:
            value = getattr(self, field)
            if value is None and field in _OPTIONAL:
                continue
            kinds, what = (int, "whole number") if field in _WHOLE else (int | float, "number")
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                raise UserError(f"model.{field} = {value!r}: give a {what} above 0")
        for field in ("experts", "short_convolution"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"model.{field} = {value!r}: give a whole number, 0 for none")
        if self.experts and self.experts_per_token > self.experts:
            raise UserError(
                f"model.experts_per_token = {self.experts_per_token} is above model.experts = "
                f"{self.experts}"
            )
        if self.experts and (self.activation != "swiglu" or self.mlp_bias):
            raise UserError(
                f"model.experts = {self.experts}: experts have activation = 'swiglu' and no "
                "mlp_bias"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"model.head_dim = {self.head_dim}: RoPE needs an even number")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"model.rotary_fraction = {self.rotary_fraction}: RoPE needs an even number of the "
                f"{self.head_dim} dimensions of a head"
            )
        if self.rope_scaling in ("yarn", "llama3") and self.rope_original_length is None:
            raise UserError(
                f"model.rope_scaling = {self.rope_scaling!r} needs model.rope_original_length"
            )
        if self.rope_low >= self.rope_high:
            raise UserError(
                f"model.rope_low = {self.rope_low} must be below model.rope_high = {self.rope_high}"
            )
        if not self.window_pattern or set(self.window_pattern) - set("wg"):
            raise UserError(
                f"model.window_pattern = {self.window_pattern!r}: one letter a layer, w for the "
                "window or g for none"
            )
        if self.parallel and self.norm_place != "before":
            raise UserError("model.parallel = True: only with norm_place = 'before'")
        if self.norm_bias and self.norm == "rms":
            raise UserError("model.norm_bias = True: only norm = 'layer' has a bias")
        bounds = [0, *(bound for each in self.unused for bound in each), self.vocab_size]
        if bounds != sorted(bounds) or self.unused == ((0, self.vocab_size),):
            raise UserError(
                f"model.unused = {self.unused}: give ranges of ids in order, below model.vocab_size"
                f" = {self.vocab_size} and not all of them"
            )
        self._check_attention()
        return self

    def _check_attention(self) -> None:
        """Refuses shapes that the kernels of models/fused_attention.py can't do."""
        stated = f"model.attention = {self.attention!r}"
        if self.attention in ("xla", "cudnn") and self.attention_softcap is not None:
            raise UserError(f"{stated} has no attention_softcap: choose 'reference'")
        if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise UserError(f"{stated} needs compute_dtype = 'bfloat16', or choose 'xla'")
        if self.attention == "splash" and len(set(self.windowed)) > 1:
            raise UserError(
                f"{stated} takes no layers with a window beside layers without: choose 'xla'"
            )

    @property
    def layers_per_turn(self) -> int:
        """How many layers a turn of the scan over layers computes.

        Turns take time from small models. Large ones compile faster with one layer per turn, and
        where there are more, XLA for GPUs keeps some activations in two layouts.
        """
        return min(self.layers, self.unroll or (4 if self.width < 512 else 1))

    @property
    def words(self) -> np.ndarray:
        """Bool [vocab_size]: the ids that are not `unused`."""
        found = np.ones(self.vocab_size, bool)
        for start, stop in self.unused:
            found[start:stop] = False
        return found

    @property
    def forward(self) -> ModelConfig:
        """The same without a backward pass, so that models which differ in that share code."""
        return dataclasses.replace(self, remat="none")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether it sees only `sliding_window` tokens back."""
        pattern = self.window_pattern if self.sliding_window is not None else "g"
        return tuple(pattern[i % len(pattern)] == "w" for i in range(self.layers))


def _gpt2(layers: int, width: int, heads: int, **changes) -> ModelConfig:
    config = ModelConfig(
        vocab_size=50_257,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        max_length=1024,
        norm="layer",
        norm_bias=True,
        position="learned",
        activation="gelu_tanh",
        attention_bias=True,
        mlp_bias=True,
    )
    return dataclasses.replace(config, **changes)


def _llama(layers: int, width: int, heads: int, kv_heads: int, **changes) -> ModelConfig:
    config = ModelConfig(
        vocab_size=128_256,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        max_length=8192,
        rope_theta=500_000.0,
        tied_embeddings=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    return dataclasses.replace(config, **changes)


_tiny = ModelConfig(
    # Two wide layers learn the town's facts from less text than four of two thirds the width.
    vocab_size=1024,
    layers=2,
    width=192,
    heads=6,
    kv_heads=6,
    head_dim=32,
    mlp_width=512,
    max_length=256,
    qk_norm=True,
    init_std=0.05,
    copy_init=True,
    remat="dots",  # on a CPU, recomputing is faster than writing and reading memory
)

PRESETS: dict[str, ModelConfig] = {
    # 1M parameters, for a laptop's CPU.
    "tiny": _tiny,
    "10m": dataclasses.replace(
        _tiny, vocab_size=4096, layers=6, width=320, heads=5, kv_heads=5, head_dim=64,
        mlp_width=896, max_length=1024, init_std=0.03,
    ),
    "125m": _gpt2(12, 768, 12),
    "350m": _gpt2(24, 1024, 16),
    "1b": _llama(16, 2048, 32, 8, max_length=131_072, tied_embeddings=True),
    "8b": _llama(32, 4096, 32, 8, mlp_width=14_336),
    "70b": _llama(80, 8192, 64, 8, mlp_width=28_672),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to pre-train: a preset, and what differs from it; see `ModelConfig`."""

    preset: str = "tiny"  # one of `PRESETS`
    layers: int | None = None  # blocks of attention and MLP
    width: int | None = None  # of the residual stream
    heads: int | None = None  # of queries
    kv_heads: int | None = None  # of keys and values
    head_dim: int | None = None  # numbers per query, key or value
    mlp_width: int | None = None  # hidden numbers of an MLP
    max_length: int | None = None  # tokens
    tied_embeddings: bool | None = None  # logits are made by the embedding
    norm: str | None = None  # "rms" or "layer"
    position: str | None = None  # "rope" or "learned"
    short_convolution: int | None = None  # preceding tokens, of queries and keys
    activation: str | None = None  # "swiglu", "geglu", "gelu" or "gelu_tanh"
    compute_dtype: str | None = None  # "float32" or "bfloat16"
    remat: str | None = None  # what the backward pass recomputes: "none", "full", "dots"
    attention: str | None = None  # the kernel: models/fused_attention.py

    def settled(self) -> Shape:
        """Returns the shape with the preset's values where none are given."""
        if self.preset not in PRESETS:
            known = ", ".join(PRESETS)
            raise UserError(f"config: model.preset = {self.preset!r}: choose one of {known}")
        of_preset = dataclasses.asdict(PRESETS[self.preset])
        stated = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        names = [field.name for field in dataclasses.fields(self)]
        return Shape(**{name: (of_preset | stated)[name] for name in names})

    def model(self, vocab_size: int) -> ModelConfig:
        """The config of a model with so many token ids; UserError for one that cannot be."""
        stated = dataclasses.asdict(self.settled())
        preset = PRESETS[stated.pop("preset")]
        return dataclasses.replace(preset, **stated, vocab_size=vocab_size).validate()

    def validate(self) -> None:
        """Raises UserError for a shape that no model can have."""
        self.model(vocab_size=1)
